"""What the triggers of one table need to know: its columns with URIs, its key, its name.

Text in, text out, but for `present`, which asks a database what it has; the dialects write SQL
with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    CHAR,
    JSON,
    Column,
    MetaData,
    String,
    Table,
    Text,
    cast,
    inspect,
    literal_column,
    type_coerce,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from .._column import BlobType
from ..errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.engine import Connection, Dialect
    from sqlalchemy.sql.compiler import SQLCompiler

MAX_IDENTIFIER_BYTES = 63
"""Source: PostgreSQL documentation, "Identifiers and Key Words" (NAMEDATALEN - 1)."""
LET_GO = "let go"
"""The ``claim`` of an entry whose row let it go before the trigger that adopts it has run."""


@dataclasses.dataclass(frozen=True, slots=True)
class UriColumn:
    """A column that holds URIs.

    Attributes:
        column: of a table.
        is_json: it holds an object with the URI in ``uri``.
    """

    column: Column[Any]
    is_json: bool

    @property
    def name(self) -> str:
        """What the database calls it."""
        return self.column.name

    @property
    def uri(self) -> ColumnElement[str]:
        """The URI as an expression."""
        if self.is_json:
            return JsonMember(self.column, "uri")
        if isinstance(self.column.type, CHAR):
            return cast(self.column, Text)  # without the spaces that CHAR(n) is filled with
        return type_coerce(self.column, String())

    def json_member(self, name: str, dialect: Dialect) -> str:
        """Write the URI in JSON, as `uri` does, for a column that is called *name* there."""
        return _json_member(name, "uri", self.column, dialect)


class JsonMember(FunctionElement[str]):
    """A member of the object in a column, as text; NULL where there is none, or no JSON.

    One row with text that cannot be read must not keep all others from being read. Triggers,
    questions and indexes write it alike, without parameters, so that an index is found.
    """

    type = Text()
    inherit_cache = True

    def __init__(self, column: ColumnElement[Any], key: str) -> None:
        super().__init__(column, literal_column(key))


@compiles(JsonMember)
def _compile_json_member(element: JsonMember, compiler: SQLCompiler, **arguments: Any) -> str:
    column, key = element.clauses
    name, text = (compiler.process(each, **arguments) for each in (column, key))
    return _json_member(name, text, column, compiler.dialect)


def _json_member(name: str, key: str, column: ColumnElement[Any], dialect: Dialect) -> str:
    """Write what `JsonMember` is."""
    if dialect.name != "postgresql":
        text = f"CAST(json_extract({name}, '$.{key}') AS TEXT)"
        return f"CASE WHEN json_valid({name}) THEN {text} END"
    if column.type.compile(dialect=dialect) != "JSONB":
        # json, unlike jsonb, keeps what cannot be turned into text
        name = rf"replace(CAST({name} AS text), '\u0000', '\ufffd')::json"
    return f"({name} ->> '{key}')"


@dataclasses.dataclass(frozen=True, slots=True)
class JournaledTable:
    """A table whose objects the journal looks after.

    Attributes:
        table: with at least one column of URIs, and a primary key.
        columns: those that hold URIs.
    """

    table: Table
    columns: tuple[UriColumn, ...]

    @property
    def uris(self) -> list[ColumnElement[str]]:
        """The URIs in its columns, as expressions."""
        return [each.uri for each in self.columns]

    @property
    def key_names(self) -> tuple[str, ...]:
        """The primary key's columns."""
        return tuple(column.name for column in self.table.primary_key)

    def identifier(self, what: str) -> str:
        """Return a name of ours for something of this table: always the same, never too long."""
        parts = [part for part in (self.table.schema, self.table.name) if part]
        name = "_".join(("aioblobcol", what, *parts))
        if len(parts) == 1:
            return shortened(name, self.table.name)
        return _with_digest(name, "\0".join(parts))


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A journal in one kind of database, and how names are written there.

    Attributes:
        dialect: of the database.
        journal: its table.
        schemas: a connection's ``schema_translate_map``.
    """

    dialect: Dialect
    journal: Table
    schemas: Mapping[str | None, str | None] = dataclasses.field(default_factory=dict)

    def schema_of(self, table: Table) -> str | None:
        """Return the schema in which a table is."""
        return self.schemas.get(table.schema, table.schema)

    def name_of(self, table: Table) -> str:
        """Write a table's name."""
        return self.quoted(table.name, table)

    def plain_name_of(self, table: Table) -> str:
        """Return a table's name for people."""
        return ".".join(part for part in (self.schema_of(table), table.name) if part)

    def quoted(self, name: str, beside: Table | None = None) -> str:
        """Write an identifier, quoted where it must be, in the schema of a table."""
        preparer = self.dialect.identifier_preparer
        text = str(preparer.quote(name))
        schema = None if beside is None else self.schema_of(beside)
        return f"{preparer.quote_schema(schema)}.{text}" if schema else text


def tables_with_uris(
    metadata: MetaData, uri_columns: Sequence[Column[Any]] = ()
) -> list[JournaledTable]:
    """Return the tables with managed columns, or with one of *uri_columns*.

    Raises:
        InvalidInputError: one of *uri_columns* is in no table of *metadata*, so that it would not
            be looked at, or is neither text nor JSON.
    """
    for column in uri_columns:
        if not any(column.table is table for table in metadata.tables.values()):
            raise InvalidInputError(f"uri_columns: {column} is in no table of this MetaData")
        if not isinstance(_impl(column), (JSON, String)):
            raise InvalidInputError(f"uri_columns: {column} is neither text nor JSON")
    found = []
    for table in metadata.sorted_tables:
        columns = tuple(
            UriColumn(column, is_json)
            for column in table.columns
            if (is_json := _holds_uris(column, uri_columns)) is not None
        )
        if columns:
            found.append(JournaledTable(table, columns))
    return found


def present(
    connection: Connection, tables: Sequence[JournaledTable], place: Place
) -> list[JournaledTable]:
    """Return those of *tables* that the database has, with those of their columns that it has.

    Views are no tables; a migration meets tables that will get more columns later.
    """
    inspector = inspect(connection)
    schemas = {place.schema_of(each.table) for each in tables}
    names = {schema: set(inspector.get_table_names(schema)) for schema in schemas}
    found = []
    for each in tables:
        schema = place.schema_of(each.table)
        if each.table.name not in names[schema]:
            continue
        there = {column["name"] for column in inspector.get_columns(each.table.name, schema)}
        columns = tuple(column for column in each.columns if column.name in there)
        if columns:
            found.append(dataclasses.replace(each, columns=columns))
    return found


def column_of(given: Any) -> Column[Any]:
    """Return the column of a mapped attribute, or the column itself.

    Raises:
        InvalidInputError: neither.
    """
    column = getattr(getattr(given, "property", None), "columns", [given])[0]
    if not isinstance(column, Column):
        raise InvalidInputError(f"uri_columns are columns, such as Task.url, not {given!r}")
    return column


def _holds_uris(column: Column[Any], uri_columns: Sequence[Column[Any]]) -> bool | None:
    """Tell whether a column holds URIs in JSON; None if it holds none at all."""
    if isinstance(column.type, BlobType):
        return column.type.format == "json"
    if any(column is each for each in uri_columns):
        return isinstance(_impl(column), JSON)
    return None


def _impl(column: Column[Any]) -> Any:
    """Return a column's type, or what a `TypeDecorator` stands around."""
    return getattr(column.type, "impl_instance", column.type)


def literal(text: str) -> str:
    """Write a string as an SQL literal; backslashes mean nothing in it."""
    return "'" + text.replace("'", "''") + "'"


def shortened(name: str, of: str | None = None) -> str:
    """Return a name that no database finds too long; *of* tells it from others that begin so."""
    if len(name.encode()) <= MAX_IDENTIFIER_BYTES:
        return name
    return _with_digest(name, name if of is None else of)


def _with_digest(name: str, of: str) -> str:
    digest = hashlib.sha256(of.encode()).hexdigest()[:8]
    kept = name.encode()[: MAX_IDENTIFIER_BYTES - 9].decode(errors="ignore")
    return f"{kept}_{digest}"
