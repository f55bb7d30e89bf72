"""aioblobcol itself: explicit and managed, on its aiobotocore store and on its obstore store."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import sqlalchemy.exc
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aioblobcol import (
    Blob,
    BlobType,
    PutS3ApiCall,
    blob_sessionmaker,
    blob_transaction,
    download_blob,
    open_blob,
    open_store,
    put_s3,
    use_explicit_begin,
)

from ..pattern import iter_blocks, stream_pattern
from ..place import BUCKET, Act, Place
from ..tables import COLUMNS, Row, create_engine_at

OpenStore = Callable[[Place], AbstractAsyncContextManager[Any]]


class Base(DeclarativeBase):
    """The metadata of the managed rows."""


class ManagedRow(Base):
    """A row whose session uploads."""

    __tablename__ = "managed_rows"

    id: Mapped[str] = mapped_column(primary_key=True)
    blob_1: Mapped[Blob | None] = mapped_column(BlobType())
    blob_2: Mapped[Blob | None] = mapped_column(BlobType())
    blob_3: Mapped[Blob | None] = mapped_column(BlobType())
    blob_4: Mapped[Blob | None] = mapped_column(BlobType())
    blob_5: Mapped[Blob | None] = mapped_column(BlobType())
    blob_6: Mapped[Blob | None] = mapped_column(BlobType())
    blob_7: Mapped[Blob | None] = mapped_column(BlobType())
    blob_8: Mapped[Blob | None] = mapped_column(BlobType())


def on_aiobotocore(place: Place) -> AbstractAsyncContextManager[Any]:
    """Open the store that the library opens by itself."""
    return open_store(bucket=BUCKET, prefix="rows", **place.client_arguments)


def on_obstore(place: Place) -> AbstractAsyncContextManager[Any]:
    """Open the store on obstore."""
    from aioblobcol.obstore import open_obstore  # noqa: PLC0415 - an extra

    return open_obstore(
        f"s3://{BUCKET}/rows",
        config=place.obstore_config,
        client_options=place.obstore_client_options,
    )


# explicit


@dataclasses.dataclass(frozen=True, slots=True)
class Explicit:
    """The explicit strength on one store and one engine."""

    place: Place
    store: Any
    engine: AsyncEngine
    bodies: list[bytes]

    async def create(self, _subject: Any = None) -> Row:
        """Create a row."""
        row_id = uuid.uuid4().hex
        async with (
            AsyncSession(self.engine, expire_on_commit=False) as session,
            blob_transaction(session, store=self.store) as tx,
        ):
            put = await tx.put_s3(pk=row_id, api_calls=self._calls())
            row = Row(id=row_id, **put.to_values())
            session.add(row)
        return row

    async def update(self, row: Row) -> None:
        """Replace all columns; the clean-up goes on in the background."""
        async with (
            AsyncSession(self.engine, expire_on_commit=False) as session,
            blob_transaction(session, store=self.store, background=True) as tx,
        ):
            put = await tx.put_s3(pk=row.id, api_calls=self._calls(row))
            await session.execute(
                update(Row).where(Row.id == row.id, put.guard(Row)).values(**put.to_values())
            )

    async def fail(self, row: Row) -> None:
        """Create a row whose key is taken."""
        with contextlib.suppress(sqlalchemy.exc.IntegrityError):
            async with (
                AsyncSession(self.engine, expire_on_commit=False) as session,
                blob_transaction(session, store=self.store) as tx,
            ):
                put = await tx.put_s3(pk=row.id, api_calls=self._calls())
                session.add(Row(id=row.id, **put.to_values()))

    def _calls(self, row: Row | None = None) -> list[PutS3ApiCall]:
        columns = COLUMNS[: self.place.columns]
        return [
            PutS3ApiCall(column, body, getattr(row, column) if row is not None else None)
            for column, body in zip(columns, self.bodies, strict=True)
        ]


@contextlib.asynccontextmanager
async def _explicit(place: Place, opening: OpenStore) -> AsyncIterator[Explicit]:
    engine = await create_engine_at(place.directory)
    use_explicit_begin(engine)
    try:
        async with opening(place) as store:
            yield Explicit(place, store, engine, place.bodies())
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def explicit_create(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Create a row."""
    async with _explicit(place, opening) as own:
        yield Act(own.create)


@contextlib.asynccontextmanager
async def explicit_update(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Replace all columns of a row."""
    async with _explicit(place, opening) as own:
        yield Act(own.update, before=own.create, after=own.store.runtime.background.drain)


@contextlib.asynccontextmanager
async def explicit_fail(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Create a row whose commit fails."""
    async with _explicit(place, opening) as own:
        yield Act(own.fail, before=own.create, after=own.store.runtime.background.drain)


def obstore_explicit_create(place: Place) -> Any:
    """Create a row."""
    return explicit_create(place, on_obstore)


def obstore_explicit_update(place: Place) -> Any:
    """Replace all columns of a row."""
    return explicit_update(place, on_obstore)


def obstore_explicit_fail(place: Place) -> Any:
    """Create a row whose commit fails."""
    return explicit_fail(place, on_obstore)


# managed


@dataclasses.dataclass(frozen=True, slots=True)
class Managed:
    """The managed strength on one store and one engine."""

    place: Place
    store: Any
    sessions: async_sessionmaker[AsyncSession]
    bodies: list[bytes]

    async def create(self, _subject: Any = None) -> ManagedRow:
        """Create a row."""
        row = self._row()
        async with self.sessions.begin() as session:
            session.add(row)
        return row

    async def update(self, row: ManagedRow) -> None:
        """Replace all columns; the clean-up goes on in the background."""
        async with self.sessions.begin() as session:
            session.add(row)
            for column, blob in self._blobs().items():
                setattr(row, column, blob)

    async def fail(self, row: ManagedRow) -> None:
        """Create a row whose key is taken."""
        with contextlib.suppress(sqlalchemy.exc.IntegrityError):
            async with self.sessions.begin() as session:
                session.add(ManagedRow(id=row.id, **self._blobs()))

    async def bulk(self, _subject: Any) -> None:
        """Create many rows, so many at a time."""
        for start in range(0, self.place.rows, self.place.batch_rows):
            rows = min(self.place.batch_rows, self.place.rows - start)
            async with self.sessions.begin() as session:
                session.add_all(self._row() for _ in range(rows))

    def _row(self) -> ManagedRow:
        return ManagedRow(id=uuid.uuid4().hex, **self._blobs())

    def _blobs(self) -> dict[str, Blob]:
        columns = COLUMNS[: self.place.columns]
        return {c: Blob(body) for c, body in zip(columns, self.bodies, strict=True)}


@contextlib.asynccontextmanager
async def _managed(place: Place, opening: OpenStore) -> AsyncIterator[Managed]:
    engine = await create_engine_at(place.directory, metadata=Base.metadata)
    try:
        async with opening(place) as store:
            sessions = blob_sessionmaker(engine, store, background=True)
            yield Managed(place, store, sessions, place.bodies())
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def managed_create(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Create a row."""
    async with _managed(place, opening) as own:
        yield Act(own.create)


@contextlib.asynccontextmanager
async def managed_update(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Replace all columns of a row."""
    async with _managed(place, opening) as own:
        yield Act(own.update, before=own.create, after=own.store.runtime.background.drain)


@contextlib.asynccontextmanager
async def managed_fail(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Create a row whose commit fails."""
    async with _managed(place, opening) as own:
        yield Act(own.fail, before=own.create, after=own.store.runtime.background.drain)


@contextlib.asynccontextmanager
async def managed_bulk(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Create many rows."""
    async with _managed(place, opening) as own:
        yield Act(own.bulk)


def obstore_managed_create(place: Place) -> Any:
    """Create a row."""
    return managed_create(place, on_obstore)


def obstore_managed_bulk(place: Place) -> Any:
    """Create many rows."""
    return managed_bulk(place, on_obstore)


# one object


@contextlib.asynccontextmanager
async def put(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Put one small object."""
    (body,) = place.bodies()
    async with opening(place) as store:
        yield Act(lambda _: _put(store, body))


def obstore_put(place: Place) -> Any:
    """Put one small object."""
    return put(place, on_obstore)


async def _put(store: Any, source: Any) -> str:
    calls = [PutS3ApiCall("blob", source, None)]
    result = await put_s3(calls, pk=uuid.uuid4().hex, store=store)
    return str(result.to_values()["blob"])  # as a created row takes it: nothing to clean up


@contextlib.asynccontextmanager
async def get(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Get one small object."""
    (body,) = place.bodies()
    async with opening(place) as store:
        uri = await _put(store, body)

        async def run(_subject: Any) -> None:
            async with open_blob(store, uri) as reader:
                assert await reader.read() == body

        yield Act(run)


def obstore_get(place: Place) -> Any:
    """Get one small object."""
    return get(place, on_obstore)


@contextlib.asynccontextmanager
async def upload(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Upload a large object from an async iterator."""
    async with opening(place) as store:
        await _put(store, b"opens a connection")

        async def run(_subject: Any) -> str:
            return await _put(store, stream_pattern(place.stream_bytes))

        yield Act(run)


def obstore_upload(place: Place) -> Any:
    """Upload a large object from an async iterator."""
    return upload(place, on_obstore)


@contextlib.asynccontextmanager
async def put_whole(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Put a large column whose bytes are in memory."""
    body = b"".join(iter_blocks(place.stream_bytes))
    async with opening(place) as store:
        await _put(store, b"opens a connection")
        yield Act(lambda _: _put(store, body))


def obstore_put_whole(place: Place) -> Any:
    """Put a large column whose bytes are in memory."""
    return put_whole(place, on_obstore)


@contextlib.asynccontextmanager
async def put_file(place: Place) -> AsyncIterator[Act]:
    """Put a large column from a file."""
    path = place.directory / "source"
    path.write_bytes(b"".join(iter_blocks(place.stream_bytes)))
    async with on_aiobotocore(place) as store:
        await _put(store, b"opens a connection")
        yield Act(lambda _: _put(store, path))


@contextlib.asynccontextmanager
async def download(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Read a large object chunk by chunk."""
    uri = place.uri
    assert uri is not None
    async with opening(place) as store:

        async def run(_subject: Any) -> None:
            size = 0
            async with open_blob(store, uri) as body:
                async for chunk in body:
                    size += len(chunk)
            assert size == place.stream_bytes

        yield Act(run)


def obstore_download(place: Place) -> Any:
    """Read a large object chunk by chunk."""
    return download(place, on_obstore)


@contextlib.asynccontextmanager
async def download_to_file(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Read a large object by parallel ranges into a file."""
    uri = place.uri
    assert uri is not None
    path = place.directory / "ranges"
    async with opening(place) as store:

        async def run(_subject: Any) -> None:
            await download_blob(store, uri, path)
            assert path.stat().st_size == place.stream_bytes
            path.unlink()

        yield Act(run)


def obstore_download_to_file(place: Place) -> Any:
    """Read a large object by parallel ranges into a file."""
    return download_to_file(place, on_obstore)


@contextlib.asynccontextmanager
async def open_own(place: Place, opening: OpenStore = on_aiobotocore) -> AsyncIterator[Act]:
    """Open a store."""

    async def run(_subject: Any) -> None:
        async with opening(place):
            pass

    yield Act(run)


def obstore_open(place: Place) -> Any:
    """Open a store."""
    return open_own(place, on_obstore)
