"""Real databases: SQLite files and PostgreSQL, with the same table in each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from aioblobcol import use_explicit_begin

from .models import Base


@dataclasses.dataclass(frozen=True)
class Database:
    """One database with an empty `tasks` table."""

    name: str
    url: str
    engine: AsyncEngine

    @property
    def is_sqlite(self) -> bool:
        return self.name == "sqlite"

    @property
    def session(self) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(self.engine, expire_on_commit=False)

    def engine_with(self, **arguments: Any) -> AsyncEngine:
        """Return another engine on the same database; the caller disposes it."""
        return create_async_engine(self.url, **arguments)


@contextlib.asynccontextmanager
async def open_sqlite(path: Path, *, explicit_begin: bool = True) -> AsyncIterator[Database]:
    url = f"sqlite+aiosqlite:///{path}"
    engine = create_async_engine(url, connect_args={"timeout": 20})
    if explicit_begin:
        use_explicit_begin(engine)
    sa.event.listen(engine.sync_engine, "connect", _set_pragmas)
    async with _tables(engine):
        yield Database("sqlite", url, engine)


def _set_pragmas(dbapi_connection: Any, _record: object) -> None:
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


@contextlib.asynccontextmanager
async def open_postgres(url: str) -> AsyncIterator[Database]:
    engine = create_async_engine(url)
    async with _tables(engine):
        yield Database("postgresql", url, engine)


@contextlib.asynccontextmanager
async def _tables(engine: AsyncEngine) -> AsyncIterator[None]:
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
            await connection.run_sync(Base.metadata.create_all)
        yield
    finally:
        await engine.dispose()


async def terminate_backends(engine: AsyncEngine) -> None:
    """Have PostgreSQL end every other connection to this database."""
    async with engine.connect() as connection:
        await connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
        )
