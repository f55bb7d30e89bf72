"""How the journal is doing: what an operator looks at, and an alarm is set on.

A few aggregates and a short list, however many entries there are. Reads only, asks no store.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, and_, case, func, not_, or_, select

from ._journal import PARKED, Journal, database_time, is_condemnable, is_unadopted, is_under, lag_of
from .errors import InvalidInputError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


@dataclasses.dataclass(frozen=True, slots=True)
class StateStatus:
    """The entries in one state.

    Attributes:
        count: how many there are.
        due: how many of them a worker could deal with now.
        oldest: how long the oldest has been in this state; None if there is none.
    """

    count: int = 0
    due: int = 0
    oldest: timedelta | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ParkedObject:
    """An object that S3 refuses to delete for good; somebody has to act.

    Attributes:
        uri: the object.
        reason: S3's.
        attempts: how often deleting it has failed.
        next_try: aware, in UTC.
    """

    uri: str
    reason: str
    attempts: int
    next_try: datetime


@dataclasses.dataclass(frozen=True, slots=True)
class JournalStatus:
    """What the journal holds at one moment.

    Attributes:
        staged: uploads that no row names yet.
        retired: objects that their rows let go, kept for the retention.
        deleting: condemned objects.
        lag: for how long the oldest entry has been due; 0 while the workers keep up.
        oldest_staged: the URI of the upload that has been waiting for its row the longest.
        claimed: condemned ones that a worker is deleting now.
        quarantined: condemned ones that are deleted once more later: their uploads may be late.
        backing_off: condemned ones whose delete failed and is tried again.
        parked_count: condemned ones that S3 refuses to delete; not among those backing off.
        parked: the first of them.
        elsewhere: entries under none of the journal's stores, which no worker touches.
    """

    staged: StateStatus
    retired: StateStatus
    deleting: StateStatus
    lag: timedelta
    oldest_staged: str | None
    claimed: int
    quarantined: int
    backing_off: int
    parked_count: int
    parked: tuple[ParkedObject, ...]
    elsewhere: int


async def journal_status(
    engine: AsyncEngine, journal: Journal, *, max_parked: int = 20
) -> JournalStatus:
    """Look at the journal.

    Args:
        engine: of the database with the journal; one connection is used.
        journal: its stores need not be open.
        max_parked: how many of the parked objects are listed.

    Raises:
        InvalidInputError: ``max_parked`` is negative.
        SQLAlchemyError: the database could not be asked.
    """
    if max_parked < 0:
        raise InvalidInputError("max_parked is not negative")
    async with engine.connect() as connection:
        counts = await _counts(connection, journal)
        return JournalStatus(
            staged=_state(counts.get("staged")),
            retired=_state(counts.get("retired")),
            deleting=_state(counts.get("deleting")),
            lag=await lag_of(connection, journal),
            oldest_staged=await _oldest_staged(connection, journal),
            **{
                name: sum(getattr(each, name) for each in counts.values())
                for name in ("claimed", "quarantined", "backing_off", "parked_count", "elsewhere")
            },
            parked=await _parked(connection, journal, max_parked),
        )


async def _counts(connection: AsyncConnection, journal: Journal) -> dict[str, Any]:
    """Return a row of sums for each state."""
    table, dialect_name = journal.table, connection.dialect.name
    now = database_time(dialect_name)
    is_own = is_under(table.c.uri, journal.stores.values())
    is_due = or_(
        is_condemnable(table, dialect_name), is_unadopted(table, dialect_name, journal.lease)
    )
    waits = and_(table.c.state == "deleting", table.c.not_before > now, table.c.claim.is_(None))
    has_failed, is_parked = table.c.attempts > 0, _is_parked(journal)
    sums = {
        "due": and_(is_due, is_own),
        "claimed": and_(
            table.c.state == "deleting", table.c.not_before > now, table.c.claim.is_not(None)
        ),
        "quarantined": and_(waits, not_(has_failed)),
        "backing_off": and_(waits, has_failed, not_(is_parked)),
        "parked_count": is_parked,
        "elsewhere": not_(is_own),
    }
    found = await connection.execute(
        select(
            table.c.state,
            func.count().label("entries"),
            func.min(table.c.since).label("oldest"),
            now.label("now"),
            *(
                func.sum(case((condition, 1), else_=0)).label(name)
                for name, condition in sums.items()
            ),
        ).group_by(table.c.state)
    )
    return {row.state: row for row in found}


def _is_parked(journal: Journal) -> ColumnElement[bool]:
    table = journal.table
    return and_(
        table.c.state == "deleting",
        table.c.attempts > 0,
        table.c.claim.is_(None),  # otherwise it is being tried again
        func.coalesce(table.c.last_error, "").startswith(PARKED, autoescape=True),
    )


def _state(row: Any) -> StateStatus:
    return StateStatus() if row is None else StateStatus(row.entries, row.due, row.now - row.oldest)


async def _oldest_staged(connection: AsyncConnection, journal: Journal) -> str | None:
    table = journal.table
    found: str | None = await connection.scalar(
        select(table.c.uri).where(table.c.state == "staged").order_by(table.c.since).limit(1)
    )
    return found


async def _parked(
    connection: AsyncConnection, journal: Journal, limit: int
) -> tuple[ParkedObject, ...]:
    table = journal.table
    found = await connection.execute(
        select(table.c.uri, table.c.last_error, table.c.attempts, table.c.not_before)
        .where(_is_parked(journal))
        .order_by(table.c.not_before, table.c.uri)
        .limit(limit)
    )
    return tuple(
        ParkedObject(uri, error.removeprefix(PARKED), attempts, _aware(next_try))
        for uri, error, attempts, next_try in found
    )


def _aware(moment: datetime) -> datetime:
    """SQLite's are in UTC and do not say so."""
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment


__all__ = ["JournalStatus", "ParkedObject", "StateStatus", "journal_status"]
