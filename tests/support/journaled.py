"""Sessions with a journal: mapped classes, both stores, and what every test must leave behind."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aioblobcol import Blob, BlobType, Journal, blob_sessionmaker
from aioblobcol._worker import Worker
from aioblobcol.testing import MemoryStore, assert_consistent

from .databases import Database


class World:
    """A database with a journal, a store, and sessions of both strengths.

    Attributes:
        Doc: with a managed column.
        Task: with a plain column of URIs, of the explicit strength.
    """

    def __init__(
        self, database: Database, store: Any, *, name: str = "world", **arguments: Any
    ) -> None:
        class Base(DeclarativeBase):
            pass

        class Doc(Base):
            __tablename__ = f"{name}_docs"

            key: Mapped[str] = mapped_column(primary_key=True)
            title: Mapped[str | None]
            body: Mapped[Blob | None] = mapped_column(BlobType())
            cover: Mapped[Blob | None] = mapped_column(BlobType(format="json"))

        class Task(Base):
            __tablename__ = f"{name}_tasks"

            url: Mapped[str] = mapped_column(primary_key=True)
            html: Mapped[str | None]
            doc: Mapped[str | None] = mapped_column(
                sa.ForeignKey(f"{name}_docs.key", ondelete="CASCADE")
            )

        self.Base, self.Doc, self.Task = Base, Doc, Task
        self.database, self.store = database, store
        self.journal = Journal(
            Base.metadata,
            store,
            engine=database.engine,
            table_name=f"{name}_journal" if name != "world" else "aioblobcol_journal",
            **{"uri_columns": [Task.html], "retention": timedelta(0), **arguments},
        )
        self.sessions: async_sessionmaker[AsyncSession] = blob_sessionmaker(
            database.engine, journal=self.journal
        )

    @property
    def engine(self) -> AsyncEngine:
        return self.database.engine

    def worker(self) -> Worker:
        return Worker(self.journal, self.engine, quarantine=timedelta(0))

    async def states(self) -> dict[str, str]:
        """Return the state of every object that the journal lists."""
        table = self.journal.table
        async with self.engine.connect() as connection:
            rows = await connection.execute(sa.select(table.c.uri, table.c.state))
            return {uri: state for uri, state in rows}  # noqa: C416

    async def check(self) -> dict[str, bytes]:
        """Let time pass and the worker work; then both stores must agree, and nothing be left."""
        self.store.hooks.clear()
        await self.expire_leases()
        await self.worker().drain()
        found = await assert_consistent(
            self.store, self.engine, [self.Doc.body, self.Doc.cover, self.Task.html]
        )
        assert await self.states() == {}
        return found

    async def expire_leases(self) -> None:
        """Let everything that is staged have been so for days."""
        table = self.journal.table
        async with self.engine.begin() as connection:
            long_ago: Any = (
                sa.func.datetime("now", "-9 days")
                if self.database.is_sqlite
                else sa.func.now() - timedelta(days=9)
            )
            await connection.execute(sa.update(table).values(since=long_ago, not_before=long_ago))


@contextlib.asynccontextmanager
async def open_world(database: Database, **arguments: Any) -> AsyncIterator[World]:
    """Give empty tables with their journal."""
    async with MemoryStore(bucket="bucket", prefix="app") as store:
        world = World(database, store, **arguments)
        async with database.engine.begin() as connection:
            await connection.run_sync(world.Base.metadata.drop_all)
            await connection.run_sync(world.Base.metadata.create_all)
        try:
            yield world
        finally:
            async with database.engine.begin() as connection:
                await connection.run_sync(world.Base.metadata.drop_all)
