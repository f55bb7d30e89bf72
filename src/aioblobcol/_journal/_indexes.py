"""Indexes on the columns with URIs, for who asks whether a row names an object.

The worker and the check do, for each object that they are about to delete. They are proposals: a
table that is read through once per batch needs none while it is small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import CHAR, PrimaryKeyConstraint, UniqueConstraint

from ._columns import JournaledTable, UriColumn

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect

    from ._table import Journal


def proposed_indexes(journal: Journal, dialect: Dialect) -> list[str]:
    """Return statements that create the indexes which are not declared; they may be repeated."""
    is_sqlite, preparer = dialect.name == "sqlite", dialect.identifier_preparer
    statements = []
    for journaled in journal.journaled_tables:
        # SQLite wants the schema before the index
        table = preparer.format_table(journaled.table, use_schema=not is_sqlite)
        schema = journaled.table.schema if is_sqlite else None
        before = f"{preparer.quote_schema(schema)}." if schema else ""
        for column in journaled.columns:
            # SQLAlchemy warns of SQLite's indexes on expressions whenever it reads what there is
            if _is_indexed(journaled, column) or (is_sqlite and column.is_json):
                continue
            name = before + preparer.quote(journaled.identifier(f"uri_{column.name}"))
            expression = _expression(column, preparer.quote(column.name), dialect)
            statements.append(f"CREATE INDEX IF NOT EXISTS {name} ON {table} ({expression})")
    return statements


def _expression(column: UriColumn, name: str, dialect: Dialect) -> str:
    """Write what `UriColumn.uri` asks for."""
    if column.is_json:
        return f"({column.json_member(name, dialect)})"
    return f"CAST({name} AS TEXT)" if isinstance(column.column.type, CHAR) else name


def _is_indexed(journaled: JournaledTable, column: UriColumn) -> bool:
    """Tell whether an index that is declared begins with the column."""
    table = journaled.table
    declared = [list(index.expressions) for index in table.indexes]
    declared += [
        list(each.columns)
        for each in table.constraints
        if isinstance(each, (UniqueConstraint, PrimaryKeyConstraint))
    ]
    return any(bool(columns) and columns[0] is column.column for columns in declared)
