"""Random programs on managed sessions: no LOSS ever, no orphan but the documented kinds.

See `support.managed_programs` for what a program is and how it is judged.
"""

from __future__ import annotations

import asyncio
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy.exc import SAWarning
from support.managed_programs import PostgresDatabase, Program, SqliteFile, World, programs

from aioblobcol.testing import MemoryStore, S3Server

# SQLAlchemy's opinions about what programs do, such as adding a row that is there
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")


def run_programs(make_world: Callable[[], World], *, examples: int) -> None:
    """Run so many programs, all in one event loop, and fail with the smallest one that fails."""
    with asyncio.Runner() as runner:
        opened = make_world().open()
        world = runner.run(opened.__aenter__())
        started = time.monotonic()

        @settings(
            max_examples=examples,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
            print_blob=True,
        )
        @given(program=programs(with_raw=world.is_journaled))
        def run(program: Program) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SAWarning)
                runner.run(world.run(program))

        try:
            run()
        finally:
            runner.run(opened.__aexit__(None, None, None))
        seconds = time.monotonic() - started
        print(f"\n{world.count} programs in {seconds:.0f} s; errors: {world.statistics}")  # noqa: T201
        assert world.count >= examples


class TestManagedMachine:
    def test_on_sqlite(self, tmp_path: Path) -> None:
        """Whatever a program does on SQLite, both stores agree afterwards."""
        run_programs(lambda: World(SqliteFile(tmp_path / "test.db"), MemoryStore()), examples=300)

    @pytest.mark.slow
    def test_on_postgresql(self, postgres_url: str) -> None:
        """Whatever a program does on PostgreSQL, both stores agree afterwards."""
        run_programs(lambda: World(PostgresDatabase(postgres_url), MemoryStore()), examples=150)

    @pytest.mark.slow
    def test_with_a_journal_on_sqlite(self, tmp_path: Path) -> None:
        """With a journal nothing is left at all, whatever failed and whoever wrote the rows."""
        run_programs(
            lambda: World(SqliteFile(tmp_path / "test.db"), MemoryStore(), is_journaled=True),
            examples=200,
        )

    @pytest.mark.slow
    def test_with_a_journal_on_postgresql(self, postgres_url: str) -> None:
        """The same on PostgreSQL, with TRUNCATE."""
        run_programs(
            lambda: World(PostgresDatabase(postgres_url), MemoryStore(), is_journaled=True),
            examples=150,
        )


@pytest.mark.long
@pytest.mark.timeout(3600)
class TestManyPrograms:
    def test_20_000_on_a_store_in_memory(self, tmp_path: Path) -> None:
        """No program of 20,000 makes the stores disagree."""
        run_programs(
            lambda: World(SqliteFile(tmp_path / "test.db"), MemoryStore()), examples=20_000
        )

    def test_10_000_with_a_journal_on_sqlite(self, tmp_path: Path) -> None:
        """Nor does one of 10,000 with a journal, and none leaves anything."""
        run_programs(
            lambda: World(SqliteFile(tmp_path / "test.db"), MemoryStore(), is_journaled=True),
            examples=10_000,
        )

    def test_3_000_with_a_journal_on_postgresql(self, postgres_url: str) -> None:
        run_programs(
            lambda: World(PostgresDatabase(postgres_url), MemoryStore(), is_journaled=True),
            examples=3_000,
        )

    def test_1_000_on_an_s3_server(self, tmp_path: Path, s3: S3Server) -> None:
        """Nor does one of 1,000 against a server that speaks S3."""
        bucket = f"test-{uuid.uuid4().hex}"
        asyncio.run(s3.create_bucket(bucket))
        run_programs(
            lambda: World(SqliteFile(tmp_path / "test.db"), s3.open_store(bucket=bucket)),
            examples=1_000,
        )
