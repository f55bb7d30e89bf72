"""advanced-alchemy: `FileObject` columns, its async config with its listeners, obstore in memory.

Source: its documentation, "Advanced Types", "File Object Storage", and the guide "Obstore Storage
Backend": a backend is registered under a key, and the sessions come from `SQLAlchemyAsyncConfig`,
which wires the listeners.
"""

# The project is checked without its peers installed, too.
# mypy: disable-error-code="import-not-found, no-any-return"

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any
from unittest import mock

from advanced_alchemy.config import AsyncSessionConfig, SQLAlchemyAsyncConfig
from advanced_alchemy.types import FileObject, StoredObject, storages
from advanced_alchemy.types.file_object.backends.obstore import ObstoreBackend
from bench import DocSession, Lab, Operation, use_explicit_begin
from sqlalchemy import Engine, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    """The metadata of this library's tables."""


class Doc(Base):
    """A row with two files."""

    __tablename__ = "docs"

    id: Mapped[int] = mapped_column(primary_key=True)
    says: Mapped[str]
    file: Mapped[FileObject | None] = mapped_column(StoredObject(backend="files"))
    thumb: Mapped[FileObject | None] = mapped_column(StoredObject(backend="files"))
    folder_id: Mapped[int | None] = mapped_column(ForeignKey("folders.id"))


class Folder(Base):
    """A row that owns others."""

    __tablename__ = "folders"

    id: Mapped[int] = mapped_column(primary_key=True)
    docs: Mapped[list[Doc]] = relationship(cascade="all, delete-orphan", lazy="selectin")


class AdvancedAlchemyLab(Lab):
    """File names are made unique by the program, except where a scenario gives one."""

    distribution = "advanced-alchemy"
    Doc = Doc
    Folder = Folder

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Register an empty backend and make the tables."""
        self._backend = ObstoreBackend(key="files", fs="memory://")
        storages.register_backend(self._backend)
        self._config = SQLAlchemyAsyncConfig(
            connection_string=f"sqlite+aiosqlite:///{self.database}",
            session_config=AsyncSessionConfig(expire_on_commit=False),
        )
        engine = self._config.get_engine()
        use_explicit_begin(engine.sync_engine)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        with (
            self._faulty("save_object_async", "put"),
            self._faulty("delete_object_async", "delete"),
        ):
            yield
            await engine.dispose()

    def _faulty(self, method: str, operation: Operation) -> contextlib.AbstractContextManager[Any]:
        carry_out = getattr(self._backend, method)

        async def meet(*args: Any, **kwargs: Any) -> Any:
            await self.faults.meet(operation)
            return await carry_out(*args, **kwargs)

        return mock.patch.object(self._backend, method, meet)

    @property
    def engine(self) -> Engine:
        """The engine that the config made."""
        return self._config.get_engine().sync_engine

    def session(self) -> AbstractAsyncContextManager[DocSession]:
        """Open a session of the config, which has the listeners."""
        return self._config.get_session()

    def file(self, content: bytes, *, name: str | None = None) -> FileObject:
        """Return a `FileObject` that is uploaded with its row."""
        filename = name or f"{uuid.uuid4().hex}.bin"
        return FileObject(backend="files", filename=filename, content=content)

    def key(self, value: str) -> str:
        """Return the file name: it is the key."""
        return str(json.loads(value)["filename"])

    def objects(self) -> dict[str, bytes]:
        """Return what obstore holds."""
        store = self._backend.fs
        paths = [each["path"] for batch in store.list() for each in batch]
        return {path: bytes(store.get(path).bytes()) for path in paths}

    async def settle(self) -> None:
        """Wait for its uploads and deletes, which are tasks of their own after COMMIT."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        while tasks:
            await asyncio.wait(tasks)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}


LAB = AdvancedAlchemyLab
