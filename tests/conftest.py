"""Fixtures of all tests: real databases, stores, and an end without loose ends."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy.engine import make_url
from support.databases import Database, open_postgres, open_sqlite
from support.postgres_server import postgres_server

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children would ignore it too

pytest_plugins = ["aioblobcol.testing.fixtures"]


@pytest.fixture(scope="session")
def postgres_url(worker_id: str) -> Iterator[str]:
    """Give the URL of a PostgreSQL database of this process alone."""
    url = os.environ.get("AIOBLOBCOL_TEST_POSTGRES_URL")
    if url:
        yield _own_database(url, worker_id)
        return
    with postgres_server("max_prepared_transactions = 10") as server:
        yield server.url


def _own_database(url: str, worker_id: str) -> str:
    """Create a database for one worker on a shared server."""
    import asyncio  # noqa: PLC0415 - only on a shared server

    import asyncpg  # noqa: PLC0415

    name = f"aioblobcol_{worker_id}"
    given = make_url(url)

    async def create() -> None:
        connection = await asyncpg.connect(
            given.set(drivername="postgresql").render_as_string(hide_password=False)
        )
        try:
            await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            await connection.execute(f'CREATE DATABASE "{name}"')
        finally:
            await connection.close()

    asyncio.run(create())
    return given.set(drivername="postgresql+asyncpg", database=name).render_as_string(
        hide_password=False
    )


@pytest_asyncio.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[Database]:
    """Give a SQLite file with an empty table, savepoints and all."""
    async with open_sqlite(tmp_path / "test.db") as database:
        yield database


@pytest_asyncio.fixture
async def postgres(postgres_url: str) -> AsyncIterator[Database]:
    """Give PostgreSQL with an empty table."""
    async with open_postgres(postgres_url) as database:
        yield database


@pytest_asyncio.fixture(params=["sqlite", "postgresql"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """Give each database in turn."""
    if request.param == "sqlite":
        async with open_sqlite(tmp_path / "test.db") as opened:
            yield opened
    else:
        async with open_postgres(request.getfixturevalue("postgres_url")) as opened:
            yield opened


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests have recorded."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, figures in report.user_properties if report.when == "call" else ():
                if name == "figures":
                    terminalreporter.write_line(f"{report.nodeid}: {figures}")
