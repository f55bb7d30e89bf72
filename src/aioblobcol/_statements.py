"""What a statement does, read from its text and its parameters, as far as the ledger cares.

Pure text. When in doubt a statement is taken for less than it is: a write that is not
recognised makes the commit refuse, it never makes a delete.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from ._uri import object_marks


class Kind(enum.Enum):
    """What matters about a statement."""

    INSERT = "insert"
    UPDATE = "update"  # also MERGE, REPLACE, and statements that do several things
    DELETE = "delete"
    SAVEPOINT = "savepoint"
    RELEASE = "release"
    ROLLBACK_TO = "rollback to"
    CONTROL = "control"  # ends a transaction behind SQLAlchemy's back
    OTHER = "other"

    def __init__(self, value: str) -> None:
        """Say whether it may change rows that name objects."""
        self.changes_rows = value in {"insert", "update", "delete"}


class Evidence(enum.Enum):
    """What a finished statement proves about the URIs that it named."""

    CHANGED = "it changed every row that it was for"
    SEVERAL = "it put one URI into more than one row"
    LIKELY = "it changed rows, but not certainly the column that the upload was for"
    NOTHING = "it changed no row"
    UNCLEAR = "the number of rows that the driver tells does not say which"


@dataclasses.dataclass(frozen=True, slots=True)
class Statement:
    """A statement on its way to the database.

    Attributes:
        kind: what it does.
        name: of a savepoint.
        may_skip_rows: INSERT .. ON CONFLICT, INSERT OR IGNORE, INSERT .. SELECT.
        may_skip_conflicts: the first two of these.
        first_word: in capitals.
        code: the text with comments, literals and quoted names blanked out.
        text: as it is sent.
        where_at: where the WHERE of an UPDATE stands in it.
        is_countable: False if the number of rows may be that of another part of it (a CTE that
            writes, several statements in one text), or of several rows that may be skipped.
    """

    kind: Kind
    name: str | None = None
    may_skip_rows: bool = False
    may_skip_conflicts: bool = dataclasses.field(default=False, compare=False)
    is_countable: bool = True
    first_word: str = dataclasses.field(default="", compare=False)
    code: str = dataclasses.field(default="", repr=False, compare=False)
    text: str = dataclasses.field(default="", repr=False, compare=False)
    where_at: int | None = dataclasses.field(default=None, compare=False)

    @property
    def replaces_rows(self) -> bool:
        """INSERT OR REPLACE: rows that are there go without a word."""
        return _REPLACES.match(self.code) is not None


_END = re.compile(";")
_WORD = re.compile(r"[A-Za-z]+")
_SAVEPOINT = re.compile(r"SAVEPOINT\s+(?P<name>\S+)", re.IGNORECASE)
_RELEASE = re.compile(r"RELEASE\s+(?:SAVEPOINT\s+)?(?P<name>\S+)", re.IGNORECASE)
_ROLLBACK_TO = re.compile(
    r"ROLLBACK\s+(?:WORK\s+|TRANSACTION\s+)?TO\s+(?:SAVEPOINT\s+)?(?P<name>\S+)", re.IGNORECASE
)
_REPLACES = re.compile(r"\s*(?:INSERT\s+OR\s+)?REPLACE\b", re.IGNORECASE)
_CONFLICTS = (
    r"\bON\s+CONFLICT\b|\bON\s+DUPLICATE\s+KEY\b|\bOR\s+IGNORE\b"
    r"|\bINSERT\s+(?:LOW_PRIORITY\s+|DELAYED\s+|HIGH_PRIORITY\s+)?IGNORE\b"
)
_SKIPS_CONFLICTS = re.compile(_CONFLICTS, re.IGNORECASE)
_SKIPS = re.compile(rf"\bSELECT\b|{_CONFLICTS}", re.IGNORECASE)
_SELECT = re.compile(r"\bSELECT\b", re.IGNORECASE)
_READS = re.compile(r"\b(?:SELECT|TABLE)\b", re.IGNORECASE)
_AFTER_EQUALS = r"=\s*(?:[\"`\[]?\w+[\"`\]]?\s*\.\s*)?[\"`\[]?{}(?!\w)"
_RETURNING = re.compile(r"\bRETURNING\b", re.IGNORECASE)
_WHERE = re.compile(r"[()]|\bWHERE\b", re.IGNORECASE)
_NAMED = re.compile(r"(?<![:\w]):(?P<colon>\w+)|%\((?P<percent>\w+)\)s")
_NUMBERED = re.compile(r"\$(?P<number>\d+)")
_IN_ORDER = re.compile(r"\?|%s")
_ROW_NUMBER = re.compile(r"_m\d+\Z")  # of INSERT .. VALUES with several rows
_ON_CONFLICT_SETS = re.compile(
    r"\bDO\s+UPDATE\s+SET\b|\bON\s+DUPLICATE\s+KEY\s+UPDATE\b", re.IGNORECASE
)
_ASSIGNED = re.compile(r"(\"[^\"]+\"|`[^`]+`|\[[^\]]+\]|\w+)\s*=")
_SETS_NULL = re.compile(r"=\s*NULL\b", re.IGNORECASE)
_SETS_NAME = re.compile(r"=\s*(?!NULL\b|TRUE\b|FALSE\b)[A-Za-z_~(]", re.IGNORECASE)
_MANY_ROWS = re.compile(r"\)\s*,\s*\(")
_BODY = re.compile(
    r"\s*CREATE\b.*?\b(?:TRIGGER|FUNCTION|PROCEDURE)\b.*\bBEGIN\b.*\bEND\b",
    re.IGNORECASE | re.DOTALL,
)
_INNERMOST = re.compile(r"\([^()]*\)")
_OUTER = re.compile(r"\b(SELECT|INSERT|UPDATE|DELETE|MERGE|REPLACE)\b(?!\s+AS\b)", re.IGNORECASE)
_INNER_WRITE = re.compile(r"\(\s*(INSERT|UPDATE|DELETE|MERGE|WITH)\b", re.IGNORECASE)

_ENDS = frozenset({"COMMIT", "END", "ABORT", "ROLLBACK"})
# Source: MySQL manual, "Statements That Cause an Implicit Commit".
_MYSQL_ENDS = re.compile(
    r"(?:ALTER|ANALYZE|BEGIN|CACHE|CHANGE|CHECK|CREATE|DROP|FLUSH|GRANT|IMPORT|INSTALL|LOAD|LOCK|"
    r"OPTIMIZE|RENAME|REPAIR|RESET|REVOKE|START|STOP|TRUNCATE|UNINSTALL|UNLOCK|XA|"
    r"SET\b[^;]*\b(?:AUTOCOMMIT|PASSWORD))\b|/\*",  # /*! .. */ is carried out
    re.IGNORECASE,
)
_MYSQL = frozenset({"mysql", "mariadb"})

# What is no code: comments, literals, quoted names. An unterminated one is left as it is, so
# that words in it count: rather one word too many.
_NO_CODE = re.compile(r"""--[^\n]*|/\*|'(?:[^']|'')*+'|"(?:[^"]|"")*+"|`[^`]*`|\[[^\]]*\]""")
_NO_CODE_POSTGRESQL = re.compile(
    r"""--[^\n]*|/\*|(?<!\w)[eE]'(?:[^'\\]|\\.|'')*+'|'(?:[^']|'')*+'|"(?:[^"]|"")*+"|"""
    r"\$(?P<tag>(?:[A-Za-z_]\w*)?)\$.*?\$(?P=tag)\$",
    re.DOTALL,
)
_NO_CODE_MYSQL = re.compile(
    r"""--(?=\s|\Z)[^\n]*|\#[^\n]*|/\*(?!!|M!)|'(?:[^'\\]|\\.|'')*+'|"(?:[^"\\]|\\.|"")*+"|`[^`]*`""",
    re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")


@functools.lru_cache(maxsize=512)
def read_statement(text: str, *, dialect: str) -> Statement:
    """Classify *text*, the SQL as it is sent."""
    bare = _blank_out(text, dialect)
    body = _BODY.match(bare)
    ends = [found.start() for found in _END.finditer(bare, body.end() if body else 0)]
    spans = zip([0, *(end + 1 for end in ends)], [*ends, len(bare)], strict=True)
    statements = [
        _read_one(text, bare, (start, end), dialect)
        for start, end in spans
        if bare[start:end].strip(" \t\r\n\f(")
    ]
    whole = statements[0] if len(statements) == 1 else _read_several(statements)
    first = _WORD.search(bare)
    return dataclasses.replace(
        whole,
        first_word=first[0].upper() if first is not None else "",
        code=bare,
        text=text,
        where_at=_top_level_where(bare),
    )


def _read_several(statements: Sequence[Statement]) -> Statement:
    """Take several statements in one text for one; a savepoint among them cannot be followed."""
    kinds = {statement.kind for statement in statements}
    if kinds & {Kind.CONTROL, Kind.SAVEPOINT, Kind.RELEASE, Kind.ROLLBACK_TO}:
        return Statement(Kind.CONTROL)
    writes = {kind for kind in kinds if kind.changes_rows}
    if not writes:
        return Statement(Kind.OTHER)
    return Statement(writes.pop() if len(writes) == 1 else Kind.UPDATE, is_countable=False)


def _read_one(text: str, bare: str, span: tuple[int, int], dialect: str) -> Statement:
    code = bare[span[0] : span[1]].rstrip()
    start = len(code) - len(code.lstrip(" \t\r\n\f("))
    for pattern, kind in (
        (_SAVEPOINT, Kind.SAVEPOINT),
        (_RELEASE, Kind.RELEASE),
        (_ROLLBACK_TO, Kind.ROLLBACK_TO),
    ):
        found = pattern.match(code, start)
        if found is not None:
            name = text[span[0] + found.start("name") : span[0] + found.end("name")]
            return Statement(kind, name=_savepoint_name(name, dialect))
    first = _WORD.match(code, start)
    word = first[0].upper() if first is not None else ""
    if word in _ENDS or (word == "PREPARE" and "TRANSACTION" in code.upper()):
        return Statement(Kind.CONTROL)
    if dialect in _MYSQL and _MYSQL_ENDS.match(code, start):
        return Statement(Kind.CONTROL)
    if word == "WITH":
        return _read_with(code[start:])
    return _read_write(word, code)


def _savepoint_name(name: str, dialect: str) -> str:
    if dialect == "postgresql" and name.startswith('"'):
        return name[1:-1].replace('""', '"')  # only here quoted names are told apart by case
    return name.strip('"`[]').lower()


def _read_with(code: str) -> Statement:
    inner = {found.upper() for found in _INNER_WRITE.findall(code)}
    outside, removed = code, 1
    while removed:
        outside, removed = _INNERMOST.subn("", outside)
    found = _OUTER.search(outside)
    outer = found[1].upper() if found is not None else ""
    if not inner:  # WITH .. INSERT .. SELECT reads, and may read nothing
        return _read_write(outer, f"SELECT {code}")
    written = inner | ({outer} - {"SELECT", ""})
    kind = _read_write(written.pop() if len(written) == 1 else "MERGE", "").kind
    return Statement(kind if kind.changes_rows else Kind.UPDATE, is_countable=False)


def _read_write(word: str, code: str) -> Statement:
    if word == "INSERT":
        skips = _SKIPS.search(code) is not None
        many = skips and _MANY_ROWS.search(code) is not None
        return Statement(
            Kind.INSERT,
            may_skip_rows=skips,
            may_skip_conflicts=_SKIPS_CONFLICTS.search(code) is not None,
            is_countable=not many,
        )
    if word == "DELETE":
        return Statement(Kind.DELETE)
    if word in {"UPDATE", "MERGE", "REPLACE"}:
        return Statement(Kind.UPDATE)
    return Statement(Kind.OTHER)


def _blank_out(text: str, dialect: str) -> str:
    """Blank out comments (spaces), literals and quoted names (``?``); offsets stay the same."""
    pattern = _NO_CODE
    if dialect == "postgresql":
        pattern = _NO_CODE_POSTGRESQL
    elif dialect in _MYSQL:
        pattern = _NO_CODE_MYSQL
    parts: list[str] = []
    at = 0
    while (found := pattern.search(text, at)) is not None:
        is_block = found[0] == "/*"
        end = _comment_end(text, found.end(), nests=dialect == "postgresql") if is_block else None
        filler = " " if is_block or found[0].startswith(("--", "#")) else "~"
        parts += [text[at : found.start()], filler * ((end or found.end()) - found.start())]
        at = end or found.end()
    return "".join((*parts, text[at:]))


def _comment_end(text: str, at: int, *, nests: bool) -> int:
    depth = 1
    for edge in _COMMENT_EDGE.finditer(text, at):
        if edge[0] == "*/":
            depth -= 1
        elif nests:
            depth += 1
        if not depth:
            return edge.end()
    return len(text)


def _top_level_where(code: str) -> int | None:
    depth = 0
    for found in _WHERE.finditer(code):
        if found[0] == "(":
            depth += 1
        elif found[0] == ")":
            depth -= 1
        elif depth == 0:
            return found.start()
    return None


def assigned_uris(
    statement: Statement, parameters: Any, text: str, named: AbstractSet[str], *, executemany: bool
) -> set[str]:
    """Return those of the *named* URIs that a statement puts into rows, as far as can be told.

    All of an INSERT's; of an UPDATE's those before its WHERE; in doubt, all. None of a DELETE's.
    """
    if not named:
        return set()
    assigned = set(assigned_strings(statement, parameters, text, executemany=executemany))
    return {uri for uri in named if uri in assigned or any(uri in value for value in assigned)}


def assigned_strings(
    statement: Statement, parameters: Any, text: str, *, executemany: bool
) -> Iterator[str]:
    """Yield the strings with ``s3://`` that a statement puts into rows, as far as can be told.

    All of an INSERT's; of an UPDATE's those before its WHERE; in doubt, all. None of a DELETE's.
    Its own text, as far as it counts, is one of them.
    """
    if statement.kind is not Kind.INSERT and statement.kind is not Kind.UPDATE:
        return
    where = statement.where_at
    if statement.kind is Kind.INSERT or not statement.is_countable or where is None:
        yield from _strings(parameters)
        where = len(text)
    else:
        is_many = executemany and isinstance(parameters, (list, tuple))
        for each in parameters if is_many else [parameters]:
            if next(_strings(each), None) is not None:
                placed = _placed_parameters(statement.code, each)
                yield from _strings([value for at, value in placed if at < where])
    if "s3://" in text[:where]:
        yield text[:where]


def assigned_marks(
    statement: Statement, parameters: Any, text: str, *, executemany: bool
) -> Iterator[str]:
    """Yield the `object_marks` of the strings that a statement puts into rows."""
    for value in assigned_strings(statement, parameters, text, executemany=executemany):
        yield from object_marks(value)


def copied_columns(statement: Statement, names: Iterable[str]) -> set[str]:
    """Return those of the columns *names* whose values a statement may put elsewhere by itself.

    As ``INSERT INTO history SELECT html ..`` and ``UPDATE .. SET image = html`` do. In doubt, yes:
    what is found here is kept.
    """
    everywhere, assigned = _sources(statement)
    if everywhere.lstrip().startswith("*"):
        return set(names)
    return {
        name
        for name in names
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", everywhere, re.IGNORECASE)
        or re.search(_AFTER_EQUALS.format(re.escape(name)), assigned, re.IGNORECASE)
    }


def _sources(statement: Statement) -> tuple[str, str]:
    """Return the text in which any name is read, and that in which one after ``=`` is."""
    code, text = statement.code, statement.text
    if statement.kind is Kind.INSERT:
        found = _READS.search(code)
        if found is not None and found[0].upper() == "TABLE":
            return "*", ""
        return _before_returning(statement, found.end()) if found is not None else "", ""
    if statement.kind is not Kind.UPDATE:
        return "", ""
    if statement.first_word == "MERGE":
        return _before_returning(statement, 0), ""
    end = statement.where_at if statement.where_at is not None else len(code)
    inner = _SELECT.search(code, 0, end)  # SET html = (SELECT ..)
    if inner is None:
        returned = _RETURNING.search(code, 0, end)
        return "", text[: returned.start() if returned is not None else end]
    return _before_returning(statement, inner.start()), text[: inner.start()]


def _before_returning(statement: Statement, start: int) -> str:
    returned = _RETURNING.search(statement.code, start)
    return statement.text[start : returned.start() if returned is not None else None]


def may_copy(statement: Statement) -> bool:
    """Tell whether a statement may copy a value from one cell to another by itself."""
    if statement.kind is Kind.INSERT:
        return _READS.search(statement.code) is not None
    if statement.kind is not Kind.UPDATE:
        return False
    is_merge = statement.first_word == "MERGE"
    return is_merge or _SETS_NAME.search(statement.code[: statement.where_at]) is not None


def _placed_parameters(code: str, parameters: Any) -> Iterator[tuple[int, Any]]:
    """Yield where in the text each parameter stands."""
    if isinstance(parameters, Mapping):
        for found in _NAMED.finditer(code):
            yield found.start(), parameters.get(found["colon"] or found["percent"])
        return
    values = list(parameters or ())
    numbered = list(_NUMBERED.finditer(code))
    if numbered:
        for found in numbered:
            index = int(found["number"]) - 1
            if index < len(values):
                yield found.start(), values[index]
        return
    for found, value in zip(_IN_ORDER.finditer(code), values, strict=False):
        yield found.start(), value


def _is_set(value: Any) -> bool:
    return isinstance(value, (Mapping, tuple, list))


def evidence_of(statement: Statement, *, rows: int, sets: int) -> Evidence:
    """Say what the number of changed rows proves.

    Args:
        statement: as `read_statement` returned it.
        rows: how many rows the driver says were changed; negative if it does not say.
        sets: how many sets of parameters were sent in one go.
    """
    if not statement.is_countable:
        return Evidence.UNCLEAR
    if rows == 0:
        return Evidence.NOTHING
    is_insert = statement.kind is Kind.INSERT
    if is_insert and not statement.may_skip_rows:
        # it was answered without an error, so every row is there; SQLite can have tables that
        # skip rows by themselves, and then it counts them
        return Evidence.CHANGED if rows < 0 or rows >= sets else Evidence.UNCLEAR
    if rows == sets:
        return Evidence.CHANGED
    if rows > sets == 1 and not is_insert:
        return Evidence.SEVERAL
    return Evidence.UNCLEAR  # more rows than sets: one set may have matched two, another none


def named_uris(parameters: Any, text: str, watched: AbstractSet[str]) -> set[str]:
    """Return the watched URIs that a statement names, in its parameters or in its text."""
    named: set[str] = set()
    for value in _strings(parameters):
        _find(value, watched, named)
    if "s3://" in text:
        _find(text, watched, named)
    return named


def count_sets(parameters: Any, *, executemany: bool) -> int:
    """Return how many sets of parameters were sent in one go."""
    is_list = isinstance(parameters, Sequence) and not isinstance(parameters, (str, bytes))
    # SQLAlchemy's insertmanyvalues reports one flat set of parameters as executemany, too
    if executemany and is_list and all(map(_is_set, parameters)):
        return len(parameters) or 1
    return 1


def placements(
    compiled_parameters: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None
) -> dict[str, set[str]]:
    """Say under which names a compiled statement takes each URI.

    Args:
        compiled_parameters: name to value, for each set of parameters.
        columns: key to name of the columns of the table that an INSERT or UPDATE changes; only
            what is put into one of them is returned, under both. None for text, whose
            parameters have the names that its author gave them.
    """
    found: dict[str, set[str]] = {}
    for parameters in compiled_parameters:
        for given, value in parameters.items():
            if not isinstance(value, str) or "s3://" not in value:
                continue
            name = given if columns is None or given in columns else _ROW_NUMBER.sub("", given)
            if columns is None:
                found.setdefault(value, set()).add(name)
            elif name in columns:
                found.setdefault(value, set()).update((name, columns[name]))
    return found


def sets_on_conflict(text: str, names: AbstractSet[str]) -> bool:
    """Tell whether an upsert sets one of the columns *names* in a row that is there already."""
    clause = _ON_CONFLICT_SETS.search(text)
    if clause is None:
        return True  # it does nothing then, and the number of rows tells
    assigned = {found.strip('"`[]') for found in _ASSIGNED.findall(text, clause.end())}
    return not names.isdisjoint(assigned)


def empties_a_column(text: str, compiled_parameters: Iterable[Mapping[str, Any]]) -> bool:
    """Tell whether an UPDATE sets something to NULL."""
    if _SETS_NULL.search(text):
        return True
    return any(value is None for each in compiled_parameters for value in each.values())


def _find(value: str, watched: AbstractSet[str], named: set[str]) -> None:
    if value in watched:
        named.add(value)
    else:
        named.update(uri for uri in watched if uri in value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if "s3://" in value:
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _strings(each)
