"""aioblobcol: `Blob` columns (the managed strength), without a journal, its store in memory."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from bench import DocSession, Lab, StorageRefused
from sqlalchemy import Engine, ForeignKey
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from aioblobcol import Blob, BlobType, blob_sessionmaker
from aioblobcol.errors import StoreError
from aioblobcol.testing import MemoryStore, Step


class Base(DeclarativeBase):
    """The metadata of this library's tables."""


class Doc(Base):
    """A row with two files."""

    __tablename__ = "docs"

    id: Mapped[int] = mapped_column(primary_key=True)
    says: Mapped[str]
    file: Mapped[Blob | None] = mapped_column(BlobType())
    thumb: Mapped[Blob | None] = mapped_column(BlobType())
    folder_id: Mapped[int | None] = mapped_column(ForeignKey("folders.id"))


class Folder(Base):
    """A row that owns others."""

    __tablename__ = "folders"

    id: Mapped[int] = mapped_column(primary_key=True)
    docs: Mapped[list[Doc]] = relationship(cascade="all, delete-orphan", lazy="selectin")


class AioblobcolLab(Lab):
    """Keys are made by the library."""

    distribution = "aioblobcol"
    Doc = Doc
    Folder = Folder

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Open an empty store and make the tables."""
        self._engine = create_async_engine(f"sqlite+aiosqlite:///{self.database}")
        async with self._engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with MemoryStore() as self._store:
            self._store.hooks.append(self._meet)
            self._session = blob_sessionmaker(self._engine, self._store)
            yield
        await self._engine.dispose()

    async def _meet(self, step: Step) -> None:
        if step.stage != "before" or step.operation not in {"put", "delete"}:
            return
        try:
            await self.faults.meet(step.operation)
        except StorageRefused as exc:
            raise StoreError(step.operation, step.uri, "InvalidRequest (injected)") from exc

    @property
    def engine(self) -> Engine:
        """The engine below the sessions."""
        return self._engine.sync_engine

    def session(self) -> AbstractAsyncContextManager[DocSession]:
        """Open a session of `blob_sessionmaker`."""
        return self._session()

    def file(self, content: bytes, *, name: str | None = None) -> Blob:
        """Return a `Blob`; its name is metadata only."""
        return Blob(content, filename=name)

    def key(self, value: str) -> str:
        """Return the URI as it is."""
        return value

    def objects(self) -> dict[str, bytes]:
        """Return what the store holds."""
        return {uri: stored.body for uri, stored in self._store.objects.items()}


LAB = AioblobcolLab
