"""What the triggers of one table need to know: its columns with URIs, its key, what is foreign.

Pure: text in, text out; the dialects write SQL with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, Column, MetaData, String, Table, type_coerce

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
        name: of the column.
        is_json: it holds an object with the URI in ``uri``.
    """

    name: str
    is_json: bool


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
        found: list[ColumnElement[str]] = []
        for each in self.columns:
            column = self.table.c[each.name]
            found.append(
                type_coerce(column, JSON)["uri"].as_string()
                if each.is_json
                else type_coerce(column, String())
            )
        return found

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
    """Return the tables with managed columns, or with one of *uri_columns*."""
    found = []
    for table in metadata.sorted_tables:
        columns = tuple(
            UriColumn(column.name, is_json)
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
        return isinstance(column.type, JSON)
    return None


def literal(text: str) -> str:
    """Write a string as an SQL literal; backslashes mean nothing in it."""
    return "'" + text.replace("'", "''") + "'"


def quoted(dialect: Any, name: str, schema: str | None = None) -> str:
    """Write an identifier as the dialect does, always quoted where it must be."""
    preparer = dialect.identifier_preparer
    text = str(preparer.quote(name))
    return f"{preparer.quote_schema(schema)}.{text}" if schema else text
