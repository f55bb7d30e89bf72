"""Many workers, one journal: the database is all that they have in common."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from support.databases import Database
from support.journaled import World, open_world

from aioblobcol._uri import marker_uri
from aioblobcol._worker import Worker, WorkReport
from aioblobcol.testing import StoredObject

WORKERS = 5
STAGE = """
INSERT INTO aioblobcol_journal (uri, state)
SELECT :root || lpad(to_hex(n), 32, '0'), 'staged'
FROM generate_series(CAST(:first AS int), :last) AS n"""
RETIRE = """
INSERT INTO aioblobcol_journal (uri, state, owner)
SELECT :root || lpad(to_hex(n), 32, '0'), 'retired', 'a row'
FROM generate_series(CAST(:first AS int), :last) AS n"""
ADOPT = """
INSERT INTO world_tasks (url, html)
SELECT CAST(n AS text), :root || lpad(to_hex(n), 32, '0')
FROM generate_series(CAST(:first AS int), :last) AS n"""


class Crowd:
    """A world whose journal lists many objects, some of them live after all."""

    def __init__(self, world: World, count: int) -> None:
        self.world = world
        self.root = f"s3://{world.store.bucket}/{world.store.prefix}/x/id="
        self.live = self.uris(1, count // 100)
        self.bypassed = self.uris(1_000_001, 1_000_000 + count // 100)
        self.retired = self.uris(2_000_001, 2_000_000 + count * 9 // 10)
        self.expired = self.uris(3_000_001, 3_000_000 + count // 10)

    def uris(self, first: int, last: int) -> list[str]:
        return [f"{self.root}{number:032x}" for number in range(first, last + 1)]

    async def settle_in(self) -> None:
        """Write rows, entries and objects."""
        written = [
            (STAGE, self.live),
            (STAGE, self.bypassed),
            (ADOPT, self.live),
            (ADOPT, self.bypassed),
            (STAGE, self.bypassed),  # past the triggers
            (STAGE, self.expired),
            (RETIRE, self.retired),
        ]
        async with self.world.engine.begin() as connection:
            for statement, uris in written:
                first, last = (int(uri.rpartition("=")[2], 16) for uri in (uris[0], uris[-1]))
                values = {"root": self.root, "first": first, "last": last}
                await connection.execute(sa.text(statement), values)
            await connection.run_sync(self._make_due)
        objects = (*self.live, *self.bypassed, *self.retired, *self.expired)
        self.world.store.objects.update(dict.fromkeys(objects, StoredObject(b"x", {}, {})))

    def _make_due(self, connection: sa.Connection) -> None:
        long_ago: Any = sa.func.now() - timedelta(days=9)
        table = self.world.journal.table
        connection.execute(sa.update(table).values(since=long_ago, not_before=long_ago))

    async def drain(self, batch_size: int) -> list[list[WorkReport]]:
        """Have workers with a connection each do rounds until nothing is due."""
        engines = [self.world.database.engine_with(pool_size=1) for _ in range(WORKERS)]
        journal, none = self.world.journal, timedelta(0)
        workers = [
            Worker(journal, engine, batch_size=batch_size, quarantine=none) for engine in engines
        ]
        reports = await asyncio.gather(*(worker.drain() for worker in workers))
        for engine in engines:
            await engine.dispose()
        return reports

    def deletes(self) -> Counter[str]:
        """Return how often each object was deleted."""
        calls = self.world.store.calls
        return Counter(uri for operation, uris in calls if operation == "delete" for uri in uris)


@pytest.mark.parametrize(
    "count", [2_000, pytest.param(100_000, marks=[pytest.mark.long, pytest.mark.timeout(1200)])]
)
async def test_each_object_is_deleted_and_none_that_a_row_names(
    postgres: Database,
    count: int,
    record_property: Callable[[str, object], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever is due goes, once; what a row names stays, though the journal lists it."""
    caplog.set_level(logging.ERROR)  # what was adopted late is a warning for each
    async with open_world(postgres) as world:
        crowd = Crowd(world, count)
        await crowd.settle_in()
        began = time.perf_counter()
        reports = await crowd.drain(batch_size=min(500, count // 40))
        seconds = time.perf_counter() - began
        deletes = crowd.deletes()

        assert set(deletes) == {*crowd.retired, *crowd.expired}
        assert set(deletes.values()) == {1}
        marker = marker_uri(world.store.bucket, world.store.prefix)
        assert set(world.store.objects) == {*crowd.live, *crowd.bypassed, marker}
        assert await world.states() == {}
        assert all(reports), "each worker had a share"
        assert sum(report.removed for each in reports for report in each) == count
        rate = f"{count / seconds:,.0f} a second"
        record_property("figures", f"{count:,} entries, {WORKERS} workers: {seconds:.1f} s, {rate}")
