"""The managed strength as a type checker sees it: checked by mypy and pyright, never run.

See `api.py` for the manner: a wrong use carries a ``type: ignore`` that both need.
"""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, assert_type

from fastapi import UploadFile
from pydantic import BaseModel
from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from aioblobcol import (
    Blob,
    BlobType,
    DeleteReport,
    DeleteS3Result,
    Journal,
    ObjectInfo,
    PutS3Result,
    Store,
    blob_report,
    blob_sessionmaker,
    download_blob,
    enlist,
    open_blob,
    track_blobs,
    upload_blobs,
)


class Base(DeclarativeBase):
    type_annotation_map = {Blob: BlobType()}  # noqa: RUF012 - SQLAlchemy's


class Task(Base):
    __tablename__ = "task"
    url: Mapped[str] = mapped_column(primary_key=True)
    required: Mapped[Blob]
    html: Mapped[Blob | None] = mapped_column(BlobType(content_type="text/html"))
    image: Mapped[Blob | None] = mapped_column(
        BlobType(
            format="json",
            store="archive",
            max_bytes=20 * 2**20,
            accept=("image/*",),
            prefix=lambda task: f"tenants/{task.url}",
            put_arguments={"StorageClass": "STANDARD_IA"},
        )
    )


class DataBase(MappedAsDataclass, DeclarativeBase):
    pass


class Data(DataBase):
    __tablename__ = "data"
    id: Mapped[int] = mapped_column(primary_key=True)
    html: Mapped[Blob | None] = mapped_column(BlobType(), default=None)


class TaskForm(BaseModel):
    url: str
    html: Blob | None = None


class Session(AsyncSession):
    pass


def columns() -> None:
    BlobType("json", "archive")

    BlobType(format="text")  # type: ignore[arg-type]
    BlobType(max_bytes="20M")  # type: ignore[arg-type]
    BlobType(accept=5)  # type: ignore[arg-type]
    BlobType(prefix="tenants")  # type: ignore[arg-type]
    BlobType(prefix=lambda: "tenants")  # type: ignore[arg-type, misc]
    BlobType(prefix=lambda _task: 5)  # type: ignore[arg-type, return-value]
    BlobType("uri", "archive", "text/html")  # type: ignore[call-arg]
    BlobType(size=5)  # type: ignore[call-arg]


def assigning(task: Task, upload: UploadFile, store: Store) -> None:
    task.html = Blob(b"page", content_type="text/html", filename="p", metadata={"a": "b"})
    task.html = Blob(bytearray(b"page"))
    task.html = Blob(memoryview(b"page"))
    task.html = Blob(Path("page"))
    task.html = Blob(upload)
    task.html = task.image
    task.html = None
    task.required = task.required.copy()
    task.required = Blob.from_uri("s3://b/k", store=store)
    Data(1, Blob(b"page"))
    TaskForm(url="u", html=Blob(b"page"))

    task.html = b"page"  # type: ignore[assignment]
    task.html = "s3://b/k"  # type: ignore[assignment]
    task.html = Path("page")  # type: ignore[assignment]
    task.required = None  # type: ignore[assignment]
    # `task.html = Task.image` passes, SQLAlchemy allows expressions; it is refused when it is run
    Data(1, b"page")  # type: ignore[arg-type]
    Blob("page")  # type: ignore[arg-type]
    Blob(None)  # type: ignore[arg-type]
    Blob(task.required)  # type: ignore[arg-type]
    Blob(b"page", "text/html")  # type: ignore[call-arg]
    Blob(b"page", metadata={"a": 5})  # type: ignore[dict-item]
    Blob.from_uri(b"s3://b/k")  # type: ignore[arg-type]
    task.required.uri = "s3://b/k"  # type: ignore[misc]


def progress(done_bytes: int, total_bytes: int | None, /) -> None:
    assert total_bytes is None or done_bytes <= total_bytes


def print_nothing() -> None: ...


async def reading(task: Task, store: Store) -> None:
    blob = task.required
    assert_type(task.html, Blob | None)
    assert_type(blob, Blob)
    assert_type(blob.is_stored, bool)
    assert_type(blob.uri, str)
    assert_type(blob.size, int | None)
    assert_type(blob.content_type, str | None)
    assert_type(blob.filename, str | None)
    assert_type(blob.sha256, str | None)
    assert_type(await blob.read(), bytes)
    assert_type(await blob.stat(), ObjectInfo)
    assert_type(await blob.presigned_url(expires_in=timedelta(1), download_as="x"), str)
    async with blob.open() as body:
        async for chunk in body:
            assert_type(chunk, bytes)
        assert_type(await body.read(), bytes)
    async with open_blob(store, blob) as body:
        assert_type(body.info, ObjectInfo)
    async with open_blob(store, "s3://b/k", start=5, stop=7, parts_at_once=4):
        pass
    async with blob.open(start=5, on_progress=progress):
        pass
    assert_type(await blob.read(start=5, stop=7), bytes)
    assert_type(await blob.download_to("file", on_progress=progress), ObjectInfo)
    assert_type(await download_blob(store, "s3://b/k", Path("file")), ObjectInfo)
    await download_blob(store, blob, "file", part_bytes=2**20, parts_at_once=2)

    await blob.read(5)  # type: ignore[call-arg]
    blob.open(stop="7")  # type: ignore[arg-type]
    await blob.download_to(b"file")  # type: ignore[arg-type]
    await download_blob(blob, "file")  # type: ignore[call-arg, arg-type]
    await blob.download_to("file", on_progress=print_nothing)  # type: ignore[arg-type]
    await task.html.read()  # type: ignore[union-attr]
    blob.read().decode()  # type: ignore[attr-defined]
    await blob.presigned_url(timedelta(1))  # type: ignore[call-arg]
    open_blob(store, b"s3://b/k")  # type: ignore[arg-type]


def comparing(blob: Blob) -> None:
    condition: ColumnElement[bool] = Task.html == "s3://b/k"
    condition = Task.html == blob
    condition = Task.html.is_(None)
    select(Task).where(condition, Task.html.in_(["s3://b/k", blob])).order_by(Task.html)
    assert_type(Task.html.uri, Any)
    assert_type(Task.image.size, Any)
    select(Task.image.uri).where(Task.image.size > 5)


async def sessions(engine: AsyncEngine, store: Store, journal: Journal) -> None:
    assert_type(blob_sessionmaker(engine, store), async_sessionmaker[AsyncSession])
    assert_type(
        blob_sessionmaker(engine, store, class_=Session, autoflush=False),
        async_sessionmaker[Session],
    )
    blob_sessionmaker(
        engine, stores={"default": store, "archive": store}, background=True, commit_seconds=5
    )
    blob_sessionmaker(store=store, binds={})
    assert_type(blob_sessionmaker(engine, journal=journal), async_sessionmaker[AsyncSession])
    assert_type(
        blob_sessionmaker(engine, store, class_=Session, journal=journal),
        async_sessionmaker[Session],
    )
    async with blob_sessionmaker(engine, store, class_=Session).begin() as session:
        assert_type(session, Session)

    blob_sessionmaker(store)  # type: ignore[call-overload]
    blob_sessionmaker(engine, "bucket")  # type: ignore[call-overload]
    blob_sessionmaker(engine, stores=[store])  # type: ignore[call-overload]
    blob_sessionmaker(engine, journal="journal")  # type: ignore[call-overload]


def tracking(
    store: Store,
    factory: async_sessionmaker[Session],
    scoped: async_scoped_session[Session],
    journal: Journal,
) -> None:
    assert_type(track_blobs(Session, store), type[Session])
    assert_type(track_blobs(factory, store), async_sessionmaker[Session])
    assert_type(track_blobs(scoped, stores={"default": store}), async_scoped_session[Session])
    assert_type(track_blobs(Session, journal=journal), type[Session])
    assert_type(track_blobs(factory, journal=journal), async_sessionmaker[Session])
    assert_type(track_blobs(scoped, journal=journal), async_scoped_session[Session])

    track_blobs(int, store)  # type: ignore[type-var]
    track_blobs(store)  # type: ignore[call-overload]
    track_blobs(factory, factory)  # type: ignore[call-overload]
    track_blobs(factory, journal=store)  # type: ignore[call-overload]


async def verbs(
    session: AsyncSession,
    scoped: async_scoped_session[AsyncSession],
    task: Task,
    put: PutS3Result,
    deleted: DeleteS3Result,
    factory: async_sessionmaker[Any],
) -> None:
    await upload_blobs(session, task, task)
    await upload_blobs(scoped, task)
    await enlist(session, put, deleted, allow_unwritten=True)
    await enlist(scoped, put)
    assert_type(blob_report(session), DeleteReport)

    await upload_blobs(factory, task)  # type: ignore[arg-type]
    await enlist(session, task)  # type: ignore[arg-type]
    await enlist(put)  # type: ignore[arg-type]
    upload_blobs(session, task).close(1)  # type: ignore[call-arg]
