"""What the triggers of one table need to know: its columns with URIs, its key, what is foreign.

Pure: text in, text out; the dialects write SQL with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from sqlalchemy import CHAR, JSON, Column, MetaData, String, Table, Text, cast, type_coerce

from .._column import BlobType
from ..errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement

MAX_IDENTIFIER_BYTES = 63
"""Source: PostgreSQL documentation, "Identifiers and Key Words" (NAMEDATALEN - 1)."""


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
            text: ColumnElement[str] = type_coerce(self.column, JSON)["uri"].as_string()
            return text
        if isinstance(self.column.type, CHAR):
            return cast(self.column, Text)  # without the spaces that CHAR(n) is filled with
        return type_coerce(self.column, String())


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
        if len(name.encode()) <= MAX_IDENTIFIER_BYTES and len(parts) == 1:
            return name
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
        kept = name.encode()[: MAX_IDENTIFIER_BYTES - 9].decode(errors="ignore")
        return f"{kept}_{digest}"


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


def quoted(dialect: Any, name: str, schema: str | None = None) -> str:
    """Write an identifier as the dialect does, always quoted where it must be."""
    preparer = dialect.identifier_preparer
    text = str(preparer.quote(name))
    return f"{preparer.quote_schema(schema)}.{text}" if schema else text
