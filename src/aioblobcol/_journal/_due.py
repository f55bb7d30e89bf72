"""Which entries are due, whose they are, and for how long they have been waiting.

Times are the database's.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, DateTime, and_, false, func, or_, select, type_coerce

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
    table, dialect_name = journal.table, connection.dialect.name
    is_own = is_under(table.c.uri, journal.stores.values())
    condemnable = is_condemnable(table, dialect_name)
    unadopted = is_unadopted(table, dialect_name, journal.lease)
    found = await connection.execute(
        select(
            database_time(dialect_name),
            select(func.min(table.c.not_before)).where(condemnable, is_own).scalar_subquery(),
            select(func.min(table.c.since)).where(unadopted, is_own).scalar_subquery(),
        )
    )
    now, not_before, since = found.one()
    due = [not_before] if not_before is not None else []
    due += [since + journal.lease] if since is not None else []
    return max((now - moment for moment in due), default=timedelta(0))
