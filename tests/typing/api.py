"""The public API as a type checker sees it: checked by mypy and pyright, never run.

Right uses pass. A wrong use carries a ``type: ignore``, which both honour; as both also report
one that is not needed, it proves that both reject the use.
"""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, assert_type

from sqlalchemy import ColumnElement, String, delete, update
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import aioblobcol
from aioblobcol import (
    BlobApp,
    BlobTransaction,
    CommitOutcomeUnknown,
    DeleteReport,
    DeleteS3Result,
    Journal,
    JournalStatus,
    ObjectInfo,
    Outcome,
    PutS3ApiCall,
    PutS3Result,
    S3Store,
    Store,
    StoreError,
    Worker,
    WorkReport,
    blob_transaction,
    delete_s3,
    guard,
    journal_status,
    open_store,
    put_s3,
    use_explicit_begin,
)
from aioblobcol.aws_s3 import (
    PutS3BackedColumnResult,
    b64decode_str,
    b64encode_str,
    batch_delete_s3_objects,
    clean_up_created_s3_object_when_create_or_update_row_failed,
    clean_up_old_s3_object_when_update_row_succeeded,
    encode_pk,
    get_md5,
    get_s3_key,
    get_sha256,
    is_s3_object_exists,
    join_s3_uri,
    normalize_s3_prefix,
    put_s3backed_column,
    split_s3_uri,
)
from aioblobcol.testing import Gate, MemoryStore, Step, StoredObject, assert_consistent


class Base(DeclarativeBase):
    pass


class Task(Base):
    __tablename__ = "task"
    url: Mapped[str] = mapped_column(primary_key=True)
    html: Mapped[str | None] = mapped_column(String)


async def stores() -> None:
    store = open_store(bucket="b", prefix="p", compat="generic", aws_access_key_id="x")
    assert_type(store, S3Store)
    async with store as opened:
        assert_type(opened, S3Store)
        assert_type(await store.get("s3://b/p/k"), bytes)
        assert_type(await store.head("s3://b/p/k"), ObjectInfo)
        assert_type(await store.delete_many(["s3://b/p/k"]), DeleteReport)
        async for uri in store.iter_uris():
            assert_type(uri, str)
        async for each in store.iter_objects(start_after="s3://b/p/k"):
            assert_type(each.size, int)
    a_store: Store = store
    a_store = MemoryStore()
    assert_type(a_store.bucket, str)

    open_store()  # type: ignore[call-arg]
    open_store("b")  # type: ignore[call-arg]
    open_store(bucket="b", compat="minio")  # type: ignore[arg-type]
    open_store(bucket="b", max_concurrency="8")  # type: ignore[arg-type]
    a_store = object()  # type: ignore[assignment]
    async with store.get("s3://b/p/k"):  # type: ignore[attr-defined]
        pass


async def api_calls(path: Path, extra: Mapping[str, Any]) -> None:
    call = PutS3ApiCall("html", b"page", None)
    assert_type(call.column, str)
    assert_type(call.old_s3_uri, str | None)
    PutS3ApiCall("html", bytearray(b"page"), "s3://b/p/old", {"ContentType": "text/html"})
    PutS3ApiCall("html", memoryview(b"page"), None, extra_put_object_kwargs=extra)
    PutS3ApiCall(column="html", binary=path, old_s3_uri=None)

    PutS3ApiCall("html", "page", None)  # type: ignore[arg-type]
    PutS3ApiCall("html", b"page")  # type: ignore[call-arg]
    PutS3ApiCall("html", None, None)  # type: ignore[arg-type]
    call.column = "image"  # type: ignore[misc]


async def puts(store: Store, client: Any) -> None:
    calls = (PutS3ApiCall("html", b"page", None),)
    put = await put_s3(calls, client, "pk", "bucket", "prefix", datetime.now(timezone.utc), False)  # noqa: FBT003 - the seed's order
    assert_type(put, PutS3Result)
    await put_s3(api_calls=[*calls], s3_client=client, pk=1, bucket="b", prefix="p")
    await put_s3(calls, pk=("a", 1, uuid.uuid4()), store=store, skip_unchanged=True)
    assert_type(put.changed, bool)
    assert_type(put.to_values(), dict[str, str])
    assert_type(put.guard(Task), ColumnElement[bool])
    assert_type(put.put_s3backed_column_results, tuple[PutS3BackedColumnResult, ...])
    assert_type(put.put_s3backed_column_results[0].executed, bool)
    report = await put.clean_up_old_s3_object_when_update_row_succeeded()
    assert_type(report, DeleteReport)
    assert_type(report.deleted, tuple[str, ...])
    assert_type(report.failed, Mapping[str, str])
    assert_type(report.raise_for_failures(), None)
    assert_type(
        await put.clean_up_created_s3_object_when_create_or_update_row_failed(), DeleteReport
    )

    await put_s3(calls, pk=1.5, store=store)  # type: ignore[arg-type]
    await put_s3(calls, pk=None, store="b")  # type: ignore[arg-type]
    await put_s3(calls[0], pk=1, store=store)  # type: ignore[arg-type]
    await put_s3([b"page"], pk=1, store=store)  # type: ignore[list-item]
    await put_s3(calls, client, 1, "b", "p", "2026-01-01")  # type: ignore[arg-type]
    await put_s3(calls, client, 1, "b", "p", None, False, store)  # type: ignore[call-arg]  # noqa: FBT003
    put_s3(calls, pk=1, store=store).to_values()  # type: ignore[attr-defined]
    put.clean_up_old_s3_object_when_update_row_succeeded().deleted  # type: ignore[attr-defined]  # noqa: B018
    report.deleted = ()  # type: ignore[misc]


async def single_columns(store: Store, client: Any) -> None:
    result = await put_s3backed_column(
        "html", b"page", None, client, "pk", "bucket", "prefix", datetime.now(timezone.utc)
    )
    assert_type(result, PutS3BackedColumnResult)
    assert_type(result.new_s3_uri, str)
    await put_s3backed_column(
        column="html", binary=b"x", old_s3_uri=None, pk=1, store=store, is_pk_url_safe=True
    )
    assert_type(
        await clean_up_created_s3_object_when_create_or_update_row_failed(
            s3_client=client, new_s3_uri=result.new_s3_uri, executed=result.executed
        ),
        DeleteReport,
    )
    await clean_up_old_s3_object_when_update_row_succeeded(
        old_s3_uri=result.old_s3_uri, executed=result.executed, store=store
    )

    await put_s3backed_column("html", b"page", pk=1, store=store)  # type: ignore[call-arg]


async def deletes(store: Store, client: Any, task: Task) -> None:
    result = delete_s3([task.html, None], store=store)
    assert_type(result, DeleteS3Result)
    assert_type(result.s3_uris, tuple[str, ...])
    delete_s3([task.html], client, "bucket", "prefix")
    assert_type(await result.clean_up_s3_objects_when_delete_row_succeeded(), DeleteReport)
    assert_type(await batch_delete_s3_objects(client, ["s3://b/k"]), DeleteReport)
    delete(Task).where(Task.url == task.url, guard(Task, html=task.html))

    delete_s3([5], store=store)  # type: ignore[list-item]
    delete_s3(None, store=store)  # type: ignore[arg-type]
    guard(Task, html=5)  # type: ignore[arg-type]


async def transactions(
    session: AsyncSession,
    scoped: async_scoped_session[AsyncSession],
    sessions: async_sessionmaker[AsyncSession],
    store: Store,
) -> None:
    calls = [PutS3ApiCall("html", b"page", None)]
    async with sessions() as mine, blob_transaction(mine, store=store, background=True) as tx:
        assert_type(tx, BlobTransaction)
        put = await tx.put_s3(pk="url", api_calls=calls)
        assert_type(put, PutS3Result)
        mine.add(Task(url="url", **put.to_values()))
        await mine.execute(
            update(Task).where(Task.url == "url", put.guard(Task)).values(**put.to_values())
        )
        assert_type(tx.delete_s3(["s3://b/p/k", None]), DeleteS3Result)
        async with mine.begin_nested():
            await tx.put_s3(pk=1, api_calls=calls, store=store)
    assert_type(tx.outcome, Outcome | None)
    assert_type(tx.report, DeleteReport)
    async with blob_transaction(scoped, put, delete_s3([], store=store), commit_seconds=5):
        pass

    blob_transaction(sessions, store=store)  # type: ignore[arg-type]
    blob_transaction(session, "s3://b/p/k")  # type: ignore[arg-type]
    blob_transaction(session, store)  # type: ignore[arg-type]
    with blob_transaction(session):  # type: ignore[attr-defined]
        pass
    await tx.put_s3("url", calls)  # type: ignore[call-arg]
    await tx.put_s3(pk="url")  # type: ignore[call-arg]


async def journal(
    engine: AsyncEngine, store: Store, session: AsyncSession, calls: list[PutS3ApiCall]
) -> None:
    a_journal = Journal(Base.metadata, store)
    a_journal = Journal(
        Base.metadata,
        {"default": store, "archive": store},
        table_name="journal",
        schema="files",
        engine=engine,
        uri_columns=[Task.html, Task.__table__.c.html],
        lease=timedelta(hours=2),
        retention=timedelta(0),
        strict=False,
        owner="production",
    )
    assert_type(a_journal.lease, timedelta)
    assert_type(a_journal.ddl(engine.dialect, with_table=False), list[str])
    async with engine.begin() as connection:
        await connection.run_sync(a_journal.create_triggers)
        assert_type(await connection.run_sync(a_journal.missing_triggers), list[str])
    BlobApp(engine=engine, stores=store, metadata=Base.metadata, journal=a_journal)

    put = await put_s3(calls, pk="url", store=store, journal=a_journal)
    async with blob_transaction(session, put, store=store, journal=a_journal) as tx:
        assert_type(await tx.put_s3(pk="url", api_calls=calls), PutS3Result)

    def note(report: WorkReport) -> None:
        assert_type(report.claimed, int)
        assert_type(report.lag, timedelta)

    worker = Worker(a_journal, engine, batch_size=5, poll_every=timedelta(1), on_round=note)
    assert_type(await worker.run_once(), WorkReport)
    assert_type(await worker.drain(), list[WorkReport])
    assert_type(await worker.lag(), timedelta)
    await worker.run(asyncio.Event())
    status = await journal_status(engine, a_journal, max_parked=5)
    assert_type(status, JournalStatus)
    assert_type(status.staged.oldest, timedelta | None)
    assert_type([each.next_try for each in status.parked], list[datetime])

    Journal(Base, store)  # type: ignore[arg-type]
    Journal(Base.metadata, "bucket")  # type: ignore[arg-type]
    Journal(Base.metadata, store, "journal")  # type: ignore[call-arg]
    Journal(Base.metadata, store, lease=3600)  # type: ignore[arg-type]
    Worker(engine, a_journal)  # type: ignore[arg-type]
    Worker(a_journal, engine, poll_every=5)  # type: ignore[arg-type]
    await worker.run()  # type: ignore[call-arg]
    await journal_status(a_journal)  # type: ignore[call-arg, arg-type]
    blob_transaction(session, journal=store)  # type: ignore[arg-type]
    BlobApp(engine=engine, stores=store, metadata=Base.metadata, journal=store)  # type: ignore[arg-type]


def errors(error: aioblobcol.AioBlobColError) -> None:
    if isinstance(error, CommitOutcomeUnknown):
        assert_type(error.uris, tuple[str, ...])
        assert_type(error.outcome, Outcome)
    if isinstance(error, StoreError):
        assert_type(error.may_have_taken_effect, bool)
    if isinstance(error, aioblobcol.BlobUploadError):
        assert_type(error.not_deleted, dict[str, str])
    if isinstance(error, aioblobcol.InvalidInputError):
        value_error: ValueError = error
        assert value_error

    error.uris  # type: ignore[attr-defined]  # noqa: B018


def engines(engine: AsyncEngine) -> None:
    use_explicit_begin(engine)

    use_explicit_begin(engine.sync_engine)  # type: ignore[arg-type]


async def helpers(client: Any) -> None:
    assert_type(split_s3_uri("s3://b/k"), tuple[str, str])
    assert_type(join_s3_uri("b", "k"), str)
    assert_type(normalize_s3_prefix("/p/"), str)
    assert_type(encode_pk(("a", 1), is_pk_url_safe=False), str)
    assert_type(get_s3_key("pk", "html", b"page", "p"), str)
    assert_type(get_md5(b"page") + get_sha256(memoryview(b"page")), str)
    assert_type(b64decode_str(b64encode_str("a")), str)
    assert_type(await is_s3_object_exists(client, "b", "k"), bool)

    split_s3_uri(b"s3://b/k")  # type: ignore[arg-type]
    get_md5("page")  # type: ignore[arg-type]
    encode_pk(None, is_pk_url_safe=False)  # type: ignore[arg-type]


async def testing(engine: AsyncEngine) -> None:
    store = MemoryStore(bucket="b", prefix="p")
    store.fail("put", stage="after", containing="x", times=1, error=OSError)
    assert_type(store.hold("delete"), Gate)
    assert_type(store.land_late(), list[str])
    assert_type(store.objects, dict[str, StoredObject])

    def plain(step: Step) -> None:
        assert_type(step.uri, str)

    async def awaited(step: Step) -> None:
        assert_type(step.uri, str)

    store.hooks += [plain, awaited]
    found = await assert_consistent(store, engine, [Task.html], orphans=["s3://b/p/k"])
    assert_type(found, dict[str, bytes])

    store.fail("list")  # type: ignore[arg-type]
    store.fail("get", stage="during", times=1)
    store.fail("put", stage="midway")  # type: ignore[arg-type]
