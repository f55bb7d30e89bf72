"""Which entries are due, whose they are, and for how long they have been waiting.

Times are the database's.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, ColumnElement, DateTime, and_, false, func, or_, select, type_coerce

from .._uri import root_uri

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncConnection

    from .._store._base import Store
    from ._table import Journal


def database_time(dialect_name: str, delay: timedelta = timedelta(0)) -> ColumnElement[Any]:
    """Return the database's time, so much later, as the journal's columns hold it."""
    if dialect_name == "sqlite":
        seconds = f"{delay.total_seconds():+f} seconds"
        text = func.strftime("%Y-%m-%d %H:%M:%f000", "now", seconds)
        return type_coerce(text, DateTime())
    return func.clock_timestamp(type_=DateTime(timezone=True)) + delay


def is_under(uri: ColumnElement[str], stores: Iterable[Store]) -> ColumnElement[bool]:
    """Tell whether a URI lies under one of *stores*; LIKE would not, SQLite's knows no case."""
    roots = sorted({root_uri(store.bucket, store.prefix) for store in stores})
    return or_(false(), *(func.substr(uri, 1, len(root)) == root for root in roots))


def is_unadopted(table: Table, dialect_name: str, lease: timedelta) -> ColumnElement[bool]:
    """Tell whether an entry was staged, and no row has taken its object within the lease."""
    return and_(table.c.state == "staged", table.c.since <= database_time(dialect_name, -lease))


def is_condemnable(table: Table, dialect_name: str) -> ColumnElement[bool]:
    """Tell whether an object was let go, or condemned, and its time has come."""
    now = database_time(dialect_name)
    return and_(table.c.state.in_(["retired", "deleting"]), table.c.not_before <= now)


async def lag_of(connection: AsyncConnection, journal: Journal) -> timedelta:
    """Return for how long the oldest entry of the journal's stores has been due; 0 if none is."""
    table = journal.table
    is_own = is_under(table.c.uri, journal.stores.values())

    def earliest(column: Column[Any], state: str) -> ColumnElement[Any]:
        # a minimum of one state is one step in the index; what is not due yet is told below
        found = select(func.min(column)).where(table.c.state == state, is_own)
        return found.scalar_subquery()

    found = await connection.execute(
        select(
            database_time(connection.dialect.name),
            earliest(table.c.not_before, "retired"),
            earliest(table.c.not_before, "deleting"),
            earliest(table.c.since, "staged"),
        )
    )
    now, *due, since = found.one()
    due.append(None if since is None else since + journal.lease)
    lags: list[timedelta] = [now - moment for moment in due if moment is not None]
    return max([timedelta(0), *lags])
