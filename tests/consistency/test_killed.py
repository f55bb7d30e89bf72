"""Processes killed with SIGKILL, and a killed PostgreSQL: afterwards both stores agree."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from support.killed_postgres import kill_in_commits
from support.killed_programs import PREFIX, PROGRAMS, open_engine
from support.killing import (
    Comparison,
    Figures,
    LastWords,
    Nursery,
    Ward,
    open_nursery,
    open_tables,
    open_ward,
)
from support.postgres_server import PostgresServer, postgres_server

from aioblobcol._worker import Worker
from aioblobcol.testing import MemoryStore, S3Server

STEP_KILLS = 2
RANDOM_KILLS = 25
LATEST_KILL = 0.25
"""Seconds after which most programs are done."""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with open_nursery() as opened:
        yield opened


@pytest_asyncio.fixture(params=["sqlite", "postgresql"])
async def ward(
    request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server, nursery: Nursery
) -> AsyncIterator[Ward]:
    """Give each database in turn."""
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path / 'killed.db'}"
    else:
        url = request.getfixturevalue("postgres_url")
    async with open_ward(url, s3, nursery) as opened:
        yield opened


def verdict(figures: Figures, record_property: Callable[[str, object], None]) -> None:
    """Note the figures, and fail if something is wrong."""
    record_property("figures", str(figures))
    assert not figures.failures, "\n".join(figures.failures)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
class TestKilled:
    async def test_somewhere(
        self, ward: Ward, program: str, record_property: Callable[[str, object], None]
    ) -> None:
        """Neither LOSS nor LEAK after kills at a few steps, on the wire and at a random time."""
        dice = random.Random(f"{program} {ward.place.engine.dialect.name}")  # noqa: S311
        alive = await ward.run(program)
        for kill_at in dice.sample(range(1, alive.steps + 1), STEP_KILLS):
            await ward.run(program, kill_at=kill_at)
        await ward.run(program, wire=dice.randint(1, alive.requests))
        await ward.run(program, kill_after=dice.uniform(0, LATEST_KILL))

        verdict(ward.figures, record_property)
        assert ward.figures.kills >= STEP_KILLS

    @pytest.mark.long
    @pytest.mark.timeout(3600)
    async def test_everywhere(
        self, ward: Ward, program: str, record_property: Callable[[str, object], None]
    ) -> None:
        """Nor after a kill at every step, at every request on the wire, and at random times."""
        dice = random.Random(f"{program} {ward.place.engine.dialect.name}")  # noqa: S311
        alive = await ward.run(program)
        for kill_at in range(1, alive.steps + 1):
            await ward.run(program, kill_at=kill_at)
        for wire in range(1, alive.requests + 1):
            await ward.run(program, wire=wire)
        for _ in range(RANDOM_KILLS):
            await ward.run(program, kill_after=dice.uniform(0, LATEST_KILL))

        verdict(ward.figures, record_property)
        assert ward.figures.kills >= alive.steps


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Give a server that writes its log late, unless it is told to at a COMMIT."""
    # the latter has recovery take no seconds
    settings = ("wal_writer_delay = 10s", "recovery_init_sync_method = syncfs")
    with postgres_server(*settings) as opened:
        yield opened


@contextlib.asynccontextmanager
async def open_comparison(server: PostgresServer, **settings: str) -> AsyncIterator[Comparison]:
    engine = open_engine(server.url, connect_args={"server_settings": settings})
    async with MemoryStore(bucket="bucket", prefix=PREFIX) as store:
        async with open_tables(engine, store) as place:
            yield Comparison(place)
    await engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("synchronous_commit", ["on", "off"])
class TestKilledPostgresql:
    @pytest.mark.parametrize(
        "kills", [6, pytest.param(30, marks=[pytest.mark.long, pytest.mark.timeout(1200)])]
    )
    async def test_in_the_middle_of_commits(
        self,
        server: PostgresServer,
        synchronous_commit: str,
        kills: int,
        record_property: Callable[[str, object], None],
    ) -> None:
        """What was acknowledged is there again, the stores agree; whatever the default is."""
        dice = random.Random(f"{kills} {synchronous_commit}")  # noqa: S311
        settings = {"synchronous_commit": synchronous_commit}
        async with open_comparison(server, **settings) as comparison:
            for _ in range(kills):
                await kill_in_commits(server, comparison, dice)

            verdict(comparison.figures, record_property)

    async def test_what_was_condemned_stays_so(
        self, server: PostgresServer, synchronous_commit: str
    ) -> None:
        """An object was deleted: no row may name it, though the server forgets what it can."""
        settings = {"synchronous_commit": synchronous_commit}
        async with open_comparison(server) as comparison:
            place = comparison.place
            put = await place.put("t1", "late")
            await place.let_days_pass()
            hasty = open_engine(server.url, connect_args={"server_settings": settings})
            worker = Worker(place.journal, hasty)
            assert (await worker.run_once()).deleted == 1
            server.kill()
            await hasty.dispose()
            await place.engine.dispose()
            await asyncio.to_thread(server.start_again)
            with pytest.raises(DBAPIError, match="being deleted"):
                async with place.engine.begin() as connection:
                    row = {"key": "t1", "html_says": "late", **put.to_values()}
                    await connection.execute(sa.insert(place.Task), row)
            await put.clean_up_created_s3_object_when_create_or_update_row_failed()

            assert await comparison.compare(LastWords()) == []
