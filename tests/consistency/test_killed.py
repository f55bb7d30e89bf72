"""Processes killed with SIGKILL, and a killed PostgreSQL: afterwards both stores agree."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.killed_programs import PROGRAMS
from support.killing import Figures, Nursery, Ward, open_nursery, open_ward

from aioblobcol.testing import S3Server

STEP_KILLS = 3
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
