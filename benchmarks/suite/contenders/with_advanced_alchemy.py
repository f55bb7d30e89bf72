"""advanced-alchemy's `FileObject` on obstore, with its session listeners.

Source: its documentation, "File Object Storage" and the guide "Obstore Storage Backend".
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

from advanced_alchemy.config import AsyncSessionConfig, SQLAlchemyAsyncConfig
from advanced_alchemy.types import FileObject, StoredObject, storages
from advanced_alchemy.types.file_object.backends.obstore import ObstoreBackend
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ..place import Act, Place
from ..tables import COLUMNS, use_wal
from .raw_obstore import open_s3

BACKEND = "files"


class Base(DeclarativeBase):
    """The metadata of its rows."""


class FileRow(Base):
    """A row of files."""

    __tablename__ = "file_rows"

    id: Mapped[str] = mapped_column(primary_key=True)
    blob_1: Mapped[FileObject | None] = mapped_column(StoredObject(backend=BACKEND))
    blob_2: Mapped[FileObject | None] = mapped_column(StoredObject(backend=BACKEND))
    blob_3: Mapped[FileObject | None] = mapped_column(StoredObject(backend=BACKEND))
    blob_4: Mapped[FileObject | None] = mapped_column(StoredObject(backend=BACKEND))
    blob_5: Mapped[FileObject | None] = mapped_column(StoredObject(backend=BACKEND))
    blob_6: Mapped[FileObject | None] = mapped_column(StoredObject(backend=BACKEND))
    blob_7: Mapped[FileObject | None] = mapped_column(StoredObject(backend=BACKEND))
    blob_8: Mapped[FileObject | None] = mapped_column(StoredObject(backend=BACKEND))


def _register(place: Place) -> None:
    storages.register_backend(ObstoreBackend(key=BACKEND, fs=open_s3(place)))


def _file(body: bytes) -> FileObject:
    return FileObject(backend=BACKEND, filename=f"{uuid.uuid4().hex}.bin", content=body)


@contextlib.asynccontextmanager
async def put(place: Place) -> AsyncIterator[Act]:
    """Save one small file."""
    (body,) = place.bodies()
    _register(place)
    yield Act(lambda _: _file(body).save_async())


@contextlib.asynccontextmanager
async def get(place: Place) -> AsyncIterator[Act]:
    """Read one small file."""
    (body,) = place.bodies()
    _register(place)
    saved = _file(body)
    await saved.save_async()

    async def run(_subject: Any) -> None:
        assert await saved.get_content_async() == body

    yield Act(run)


async def _uploads_done() -> None:
    """Wait for its uploads, which are tasks of their own after COMMIT."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    while tasks:
        await asyncio.wait(tasks)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}


@contextlib.asynccontextmanager
async def _sessions(place: Place) -> AsyncIterator[Any]:
    _register(place)
    config = SQLAlchemyAsyncConfig(
        connection_string=f"sqlite+aiosqlite:///{place.directory / 'files'}.db",
        session_config=AsyncSessionConfig(expire_on_commit=False),
    )
    engine = config.get_engine()
    use_wal(engine.sync_engine)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    try:
        yield config.create_session_maker()
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def create(place: Place) -> AsyncIterator[Act]:
    """Create a row; it is done when its objects are there."""
    bodies = place.bodies()
    async with _sessions(place) as sessions:

        async def run(_subject: Any) -> None:
            files = {c: _file(body) for c, body in zip(COLUMNS, bodies, strict=False)}
            async with sessions() as session:
                session.add(FileRow(id=uuid.uuid4().hex, **files))
                await session.commit()
            await _uploads_done()

        yield Act(run)
