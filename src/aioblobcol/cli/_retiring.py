"""``aioblobcol retire-table``: let go of what a table names, before it is dropped or detached.

DROP and DETACH fire no triggers: the objects would stay, and nobody would know of them.
Invariant: rows stop naming their objects only in the transaction that enters these in the journal.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sqlalchemy import MetaData, delete, false, func, null, or_, select, text, update
from sqlalchemy.sql.schema import RETAIN_SCHEMA

from .._journal import Journal, JournaledTable
from .._store._base import is_owned
from .._uri import is_one_attempt
from ._servers import CannotRunError, UsageError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

ROWS_PER_FETCH = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Retirement:
    """What is, or would be, let go.

    Attributes:
        table: its name.
        rows: how many name something.
        objects: how many of the journal's objects they name.
        columns: with URIs.
        deletes_rows: a column takes no NULL, so that the rows have to go.
    """

    table: str
    rows: int
    objects: int
    columns: tuple[str, ...]
    deletes_rows: bool


def find_table(journal: Journal, name: str, parent: str | None) -> JournaledTable:
    """Return the table, or a partition with its parent's columns.

    Raises:
        UsageError: the journal looks after no such table.
    """
    known = {each.table.fullname: each for each in journal.journaled_tables}
    found = known.get(parent or name)
    if found is None:
        raise UsageError(
            "--partition-of" if parent else "TABLE",
            f"the journal looks after no table {parent or name!r}, but after {', '.join(known)}; "
            "of a partition, name its parent by --partition-of",
        )
    if parent is None:
        return found
    schema, _, bare = name.rpartition(".")
    table = found.table.to_metadata(MetaData(), schema=schema or RETAIN_SCHEMA, name=bare)
    columns = (dataclasses.replace(each, column=table.c[each.column.key]) for each in found.columns)
    return JournaledTable(table, tuple(columns))


async def retire(
    engine: AsyncEngine, journal: Journal, journaled: JournaledTable, *, really: bool
) -> Retirement:
    """Count, and if told so, make the rows let go of what they name.

    Raises:
        CannotRunError: the journal's triggers are not there; nothing was changed.
        SQLAlchemyError: the database refused; nothing was changed.
    """
    async with engine.connect() as connection:
        if connection.dialect.name == "postgresql":  # one snapshot: what is counted is what goes
            await connection.execution_options(isolation_level="REPEATABLE READ")
        async with connection.begin():
            if really:
                await _lock(connection, journal, journaled)
            found = await _count(connection, journal, journaled)
            if really:
                await _let_go(connection, journal, journaled, found)
    return found


async def _lock(connection: AsyncConnection, journal: Journal, journaled: JournaledTable) -> None:
    """Let nobody else write, from before the snapshot on."""
    if connection.dialect.name == "sqlite":
        await connection.execute(delete(journal.table).where(false()))
        return
    name = connection.dialect.identifier_preparer.format_table(journaled.table)
    await connection.execute(text(f"LOCK TABLE {name} IN SHARE ROW EXCLUSIVE MODE"))


async def _count(
    connection: AsyncConnection, journal: Journal, journaled: JournaledTable
) -> Retirement:
    objects = 0
    options = {"yield_per": ROWS_PER_FETCH}
    for uri in journaled.uris:
        statement = select(uri).where(uri.is_not(None))
        async with connection.stream(statement, execution_options=options) as found:
            async for each in found.scalars():
                objects += _is_ours(journal, each)
    columns = [each.column for each in journaled.columns]
    is_naming = or_(*(column.is_not(None) for column in columns))
    rows = await connection.scalar(
        select(func.count()).select_from(journaled.table).where(is_naming)
    )
    return Retirement(
        table=journaled.table.fullname,
        rows=rows or 0,
        objects=objects,
        columns=tuple(column.name for column in columns),
        deletes_rows=not all(column.nullable for column in columns),
    )


def _is_ours(journal: Journal, uri: str) -> bool:
    is_under = any(is_owned(store, uri) for store in journal.stores.values())
    return is_under and is_one_attempt(uri)


async def _let_go(
    connection: AsyncConnection, journal: Journal, journaled: JournaledTable, found: Retirement
) -> None:
    entries = select(func.count()).select_from(journal.table)
    before = await connection.scalar(entries) or 0
    statement: Any = delete(journaled.table)
    if not found.deletes_rows:
        values = {each.column: null() for each in journaled.columns}
        statement = update(journaled.table).values(values)
    await connection.execute(statement)
    retired = (await connection.scalar(entries) or 0) - before
    if retired < found.objects:
        raise CannotRunError(
            f"only {retired:,} of {found.objects:,} objects went into the journal, so nothing was "
            f"changed: are its triggers on {found.table} there? `aioblobcol ddl --no-table` prints "
            "them"
        )
