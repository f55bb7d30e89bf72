"""What a statement does, read from its text and its parameters, as far as the ledger cares.

Pure text. When in doubt a statement is taken for less than it is: a write that is not
recognised makes the commit refuse, it never makes a delete.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any


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

    @property
    def changes_rows(self) -> bool:
        """It may change rows that name objects."""
        return self in {Kind.INSERT, Kind.UPDATE, Kind.DELETE}


class Evidence(enum.Enum):
    """What a finished statement proves about the URIs that it named."""

    CHANGED = "it changed every row that it was for"
    NOTHING = "it changed no row"
    UNCLEAR = "the driver does not tell how many rows it changed"


@dataclasses.dataclass(frozen=True, slots=True)
class Statement:
    """A statement on its way to the database."""

    kind: Kind
    name: str | None = None  # of a savepoint
    may_skip_rows: bool = False  # INSERT .. ON CONFLICT, INSERT OR IGNORE


_COMMENT = re.compile(r"\s+|--[^\n]*(?:\n|\Z)|/\*.*?\*/|\(", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+")
_NAME = r"(?P<name>\"[^\"]+\"|`[^`]+`|\S+)"
_SAVEPOINT = re.compile(rf"SAVEPOINT\s+{_NAME}", re.IGNORECASE)
_RELEASE = re.compile(rf"RELEASE\s+(?:SAVEPOINT\s+)?{_NAME}", re.IGNORECASE)
_ROLLBACK_TO = re.compile(
    rf"ROLLBACK\s+(?:WORK\s+|TRANSACTION\s+)?TO\s+(?:SAVEPOINT\s+)?{_NAME}", re.IGNORECASE
)
_INNER_WRITE = re.compile(r"\b(INSERT|UPDATE|DELETE|MERGE)\b", re.IGNORECASE)
_SKIPS = re.compile(
    r"\bON\s+CONFLICT\b|\bOR\s+IGNORE\b|\bINSERT\s+IGNORE\b|\bSELECT\b", re.IGNORECASE
)
_SECOND_CONTROL = re.compile(
    r";\s*(?:COMMIT|END|ROLLBACK|ABORT)\b(?!\s+(?:WORK\s+)?TO\b)", re.IGNORECASE
)

_ENDS = frozenset({"COMMIT", "END", "ABORT", "ROLLBACK"})
# Source: MySQL manual, "Statements That Cause an Implicit Commit".
_MYSQL_ENDS = re.compile(
    "ALTER|ANALYZE|BEGIN|CACHE|CHANGE|CHECK|CREATE|DROP|FLUSH|GRANT|INSTALL|LOAD|LOCK|OPTIMIZE|"
    "RENAME|REPAIR|RESET|REVOKE|START|STOP|TRUNCATE|UNINSTALL|UNLOCK"
)


def read_statement(text: str, *, dialect: str) -> Statement:
    """Classify *text*, the SQL as it is sent."""
    if _SECOND_CONTROL.search(text):
        return Statement(Kind.CONTROL)
    start = 0
    while (skipped := _COMMENT.match(text, start)) is not None:
        start = skipped.end()
    first = _WORD.match(text, start)
    word = first[0].upper() if first is not None else ""
    for pattern, kind in (
        (_SAVEPOINT, Kind.SAVEPOINT),
        (_RELEASE, Kind.RELEASE),
        (_ROLLBACK_TO, Kind.ROLLBACK_TO),
    ):
        found = pattern.match(text, start)
        if found is not None:
            return Statement(kind, name=found["name"].rstrip(";").strip('"`').lower())
    if word in _ENDS or (word == "PREPARE" and "TRANSACTION" in text.upper()):
        return Statement(Kind.CONTROL)
    if dialect in {"mysql", "mariadb"} and _MYSQL_ENDS.fullmatch(word):
        return Statement(Kind.CONTROL)
    return _read_write(word, text[start:])


def _read_write(word: str, text: str) -> Statement:
    if word == "WITH":
        words = {found.upper() for found in _INNER_WRITE.findall(text)}
        word = words.pop() if len(words) == 1 else "MERGE" if words else ""
        # WITH .. INSERT .. SELECT reads, and may read nothing
        return _read_write(word, f"SELECT {text}") if word else Statement(Kind.OTHER)
    if word == "INSERT":
        return Statement(Kind.INSERT, may_skip_rows=_SKIPS.search(text) is not None)
    if word == "DELETE":
        return Statement(Kind.DELETE)
    if word in {"UPDATE", "MERGE", "REPLACE"}:
        return Statement(Kind.UPDATE)
    return Statement(Kind.OTHER)


def evidence_of(statement: Statement, *, rows: int, sets: int) -> Evidence:
    """Say what the number of changed rows proves.

    Args:
        statement: as `read_statement` returned it.
        rows: how many rows the driver says were changed; negative if it does not say.
        sets: how many sets of parameters were sent in one go.
    """
    if rows == 0:
        return Evidence.NOTHING
    if statement.kind is Kind.INSERT and not statement.may_skip_rows:
        return Evidence.CHANGED  # it was answered without an error, so every row is there
    if rows >= sets and not (statement.kind is Kind.INSERT and rows > 1):
        return Evidence.CHANGED
    return Evidence.CHANGED if rows == sets else Evidence.UNCLEAR


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
    if executemany and is_list and parameters and not isinstance(parameters[0], str):
        return sum(isinstance(each, (Mapping, Sequence)) for each in parameters) or 1
    return 1


def column_values(
    compiled_parameters: Iterable[Mapping[str, Any]], columns: AbstractSet[str]
) -> set[str]:
    """Return the strings that a compiled INSERT or UPDATE certainly puts into columns."""
    return {
        value
        for parameters in compiled_parameters
        for name, value in parameters.items()
        if isinstance(value, str) and (name in columns or re.sub(r"_m\d+\Z", "", name) in columns)
    }


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
