"""The journal's status: what an operator sees of it; on both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from support.databases import Database
from support.journal import Journaled, open_journaled

from aioblobcol import InvalidInputError, StateStatus, Worker, journal_status
from aioblobcol.testing import MemoryStore

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)


@pytest_asyncio.fixture
async def journaled(database: Database, memory_store: MemoryStore) -> AsyncIterator[Journaled]:
    """Give the journaled tables, whose journal is empty."""
    async with open_journaled(database, memory_store) as opened:
        yield opened


async def enter(
    journaled: Journaled,
    name: str,
    state: str,
    *,
    since: timedelta = -HOUR,
    not_before: timedelta = HOUR,
    **more: Any,
) -> None:
    """Enter an object, with times relative to now."""
    now = datetime.now(timezone.utc)
    if journaled.database.is_sqlite:
        now = now.replace(tzinfo=None)
    uri = journaled.uri(name) if len(name) == 1 else name
    values = {"uri": uri, "state": state, "since": now + since, "not_before": now + not_before}
    async with journaled.database.engine.begin() as connection:
        await connection.execute(sa.insert(journaled.journal.table).values({**values, **more}))


def is_about(actual: timedelta | None, expected: timedelta) -> bool:
    return actual is not None and abs(actual - expected) < timedelta(seconds=30)


class TestStatus:
    async def test_an_empty_journal(self, journaled: Journaled) -> None:
        """Nothing anywhere, and no lag."""
        status = await journal_status(journaled.database.engine, journaled.journal)

        assert status.staged == status.retired == status.deleting == StateStatus()
        assert (status.lag, status.oldest_staged, status.parked) == (timedelta(0), None, ())

    async def test_counts_and_ages(self, journaled: Journaled) -> None:
        """By state: how many, how many of them are due, and how old the oldest is."""
        await enter(journaled, "a", "staged", since=-90 * MINUTE)
        await enter(journaled, "b", "staged", since=-MINUTE)
        await enter(journaled, "c", "retired", since=-2 * HOUR, not_before=-20 * MINUTE)
        await enter(journaled, "d", "retired", since=-MINUTE)

        status = await journal_status(journaled.database.engine, journaled.journal)

        assert (status.staged.count, status.staged.due) == (2, 1)
        assert is_about(status.staged.oldest, 90 * MINUTE)
        assert status.oldest_staged == journaled.uri("a")
        assert (status.retired.count, status.retired.due) == (2, 1)
        assert is_about(status.retired.oldest, 2 * HOUR)

    @pytest.mark.parametrize("state", ["staged", "retired", "deleting"])
    async def test_lag(self, journaled: Journaled, state: str) -> None:
        """How long the oldest entry has been due: since its lease, or its time, was over."""
        await enter(journaled, "a", state, since=-100 * MINUTE, not_before=-40 * MINUTE)
        await enter(journaled, "b", "retired", not_before=-10 * MINUTE)
        engine = journaled.database.engine

        assert is_about((await journal_status(engine, journaled.journal)).lag, 40 * MINUTE)
        worker = Worker(journaled.journal, engine)
        assert is_about(await worker.lag(), 40 * MINUTE)
        assert is_about((await worker.run_once()).lag, 40 * MINUTE)
        assert await worker.lag() == timedelta(0)

    async def test_why_condemned_ones_wait(self, journaled: Journaled) -> None:
        """One reason for each: being deleted, deleted again later, backing off, or parked."""
        await enter(journaled, "a", "deleting", claim="worker")
        await enter(journaled, "b", "deleting", last_error="once, long ago")
        await enter(journaled, "c", "deleting", attempts=2, last_error="SlowDown")
        await enter(journaled, "d", "deleting", attempts=3, last_error="parked: AccessDenied")
        await enter(journaled, "e", "deleting", not_before=-MINUTE, claim="killed")

        status = await journal_status(journaled.database.engine, journaled.journal)

        assert (status.deleting.count, status.deleting.due) == (5, 1)
        assert (status.claimed, status.quarantined, status.backing_off) == (1, 1, 1)
        assert status.parked_count == 1
        (parked,) = status.parked
        assert (parked.uri, parked.reason, parked.attempts) == (
            journaled.uri("d"),
            "AccessDenied",
            3,
        )
        assert is_about(parked.next_try - datetime.now(timezone.utc), HOUR)

    async def test_many_parked_ones(self, journaled: Journaled) -> None:
        """Some are listed, all are counted."""
        for name in "abc":
            await enter(journaled, name, "deleting", attempts=1, last_error="parked: AccessDenied")
        engine = journaled.database.engine

        status = await journal_status(engine, journaled.journal, max_parked=2)

        assert (len(status.parked), status.parked_count) == (2, 3)
        with pytest.raises(InvalidInputError):
            await journal_status(engine, journaled.journal, max_parked=-1)

    async def test_entries_of_other_stores(self, journaled: Journaled) -> None:
        """They are counted apart, and are nobody's lag; a prefix's case matters."""
        for place in ("elsewhere/x", "bucket/PREFIX"):
            await enter(journaled, f"s3://{place}/id={0:032x}", "retired", not_before=-HOUR)

        status = await journal_status(journaled.database.engine, journaled.journal)

        assert (status.elsewhere, status.retired.count, status.retired.due) == (2, 2, 0)
        assert status.lag == timedelta(0)
