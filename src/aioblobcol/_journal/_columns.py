"""What the triggers of one table need to know: its columns with URIs, its key, what is foreign.

Pure: text in, text out; the dialects write SQL with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from sqlalchemy import Table

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


def literal(text: str) -> str:
    """Write a string as an SQL literal; backslashes mean nothing in it."""
    return "'" + text.replace("'", "''") + "'"


def quoted(dialect: Any, name: str, schema: str | None = None) -> str:
    """Write an identifier as the dialect does, always quoted where it must be."""
    preparer = dialect.identifier_preparer
    text = str(preparer.quote(name))
    return f"{preparer.quote_schema(schema)}.{text}" if schema else text
