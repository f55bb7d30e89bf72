"""Cancellation at every await of what managed sessions do: no LOSS, no orphan, never swallowed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from support.awaits import CountedTask
from support.databases import Database
from support.managed import (
    SEED,
    Contents,
    Doc,
    Page,
    Report,
    collect,
    contents,
    seed,
    tables,
)

from aioblobcol import Blob, blob_sessionmaker, upload_blobs
from aioblobcol.testing import MemoryStore, Step

MANY = 800  # far more awaits than any of these programs has

Factory = async_sessionmaker[AsyncSession]
Program = Callable[[Factory], Coroutine[Any, Any, None]]


async def create(factory: Factory) -> None:
    async with factory() as session:
        session.add(
            Report(
                key="n",
                body=Blob(b"body n"),
                appendix=Blob(b"appendix n"),
                pages=[Page(number=1, scan=Blob(b"scan n"))],
            )
        )
        await session.commit()


async def update(factory: Factory) -> None:
    async with factory() as session:
        doc = await session.get_one(Doc, "a")
        doc.body, doc.cover = Blob(b"body 2"), Blob(b"cover 2")
        await session.commit()


async def delete(factory: Factory) -> None:
    async with factory() as session:
        await session.delete(await session.get_one(Doc, "a"))
        await session.delete(await session.get_one(Doc, "r"))
        await session.commit()


async def orphan_a_child(factory: Factory) -> None:
    async with factory() as session:
        doc = await session.get_one(Doc, "a")
        await session.refresh(doc, ["pages"])
        doc.pages.pop()
        await session.commit()


async def update_in_a_savepoint(factory: Factory) -> None:
    async with factory() as session:
        doc = await session.get_one(Doc, "a")
        async with session.begin_nested():
            doc.body = Blob(b"body 2")
        await session.commit()


async def update_in_a_savepoint_rolled_back(factory: Factory) -> None:
    async with factory() as session:
        doc = await session.get_one(Doc, "a")
        savepoint = await session.begin_nested()
        doc.body = Blob(b"never")
        await session.flush()
        await savepoint.rollback()
        doc.cover = Blob(b"cover 2")
        await session.commit()


async def bulk_update(factory: Factory) -> None:
    async with factory() as session:
        await session.execute(sa.update(Doc).where(Doc.key == "a").values(body=Blob(b"body 2")))
        await session.execute(
            sa.update(Doc), [{"key": key, "cover": Blob(key.encode())} for key in "ab"]
        )
        await session.commit()


async def bulk_insert_and_delete(factory: Factory) -> None:
    async with factory() as session:
        await session.execute(
            sa.insert(Page),
            [{"doc_key": "b", "number": n, "scan": Blob(b"%d" % n)} for n in range(3)],
        )
        await session.execute(sa.delete(Page).where(Page.doc_key == "a"))
        await session.commit()


async def copy_and_swap(factory: Factory) -> None:
    async with factory() as session:
        a, b = await session.get_one(Doc, "a"), await session.get_one(Doc, "b")
        a.body, b.body = b.body, a.body
        b.cover = a.cover
        await session.commit()


async def upload_ahead(factory: Factory) -> None:
    async with factory() as session:
        doc = await session.get_one(Doc, "a")
        await session.commit()
        doc.body, doc.cover = Blob(b"body 2"), Blob(b"cover 2")
        await upload_blobs(session, doc)
        await session.commit()


async def begin_block(factory: Factory) -> None:
    async with factory() as session, session.begin():
        doc = await session.get_one(Doc, "a")
        doc.body = Blob(b"body 2")


async def factory_begin_block(factory: Factory) -> None:
    async with factory.begin() as session:
        doc = await session.get_one(Doc, "a")
        doc.body = Blob(b"body 2")


async def two_flushes(factory: Factory) -> None:
    async with factory() as session:
        doc = await session.get_one(Doc, "a")
        doc.body = Blob(b"first")
        await session.flush()
        doc.body = Blob(b"body 2")
        await session.flush()
        await session.commit()


async def close_without_commit(factory: Factory) -> None:
    async with factory() as session:
        doc = await session.get_one(Doc, "a")
        doc.body = Blob(b"never")
        await session.flush()


def without(*rows: str) -> Contents:
    return {cell: body for cell, body in SEED.items() if cell[0] not in rows}


BODY_2: Contents = {**SEED, ("a", "body"): b"body 2"}
PROGRAMS: list[tuple[Program, Contents]] = [
    (
        create,
        {
            **SEED,
            ("n", "body"): b"body n",
            ("n", "appendix"): b"appendix n",
            ("n/1", "scan"): b"scan n",
        },
    ),
    (update, {**BODY_2, ("a", "cover"): b"cover 2"}),
    (delete, without("a", "a/1", "a/2", "r")),
    (orphan_a_child, without("a/2")),
    (update_in_a_savepoint, BODY_2),
    (update_in_a_savepoint_rolled_back, {**SEED, ("a", "cover"): b"cover 2"}),
    (bulk_update, {**BODY_2, ("a", "cover"): b"a", ("b", "cover"): b"b"}),
    (
        bulk_insert_and_delete,
        {**without("a/1", "a/2"), **{(f"b/{n}", "scan"): b"%d" % n for n in range(3)}},
    ),
    (
        copy_and_swap,
        {
            **SEED,
            ("a", "body"): b"body b",
            ("b", "body"): b"body a",
            ("b", "cover"): b"cover a",
        },
    ),
    (upload_ahead, {**BODY_2, ("a", "cover"): b"cover 2"}),
    (begin_block, BODY_2),
    (factory_begin_block, BODY_2),
    (two_flushes, BODY_2),
    (close_without_commit, SEED),
]


@pytest_asyncio.fixture
async def factory(database: Database, memory_store: MemoryStore) -> AsyncIterator[Factory]:
    """Give sessions that upload, on both databases."""
    async with tables(database.engine):
        yield blob_sessionmaker(database.engine, memory_store)


@pytest.mark.parametrize(
    ("program", "after"), PROGRAMS, ids=lambda each: getattr(each, "__name__", "")
)
class TestCancellation:
    @pytest.mark.slow
    async def test_at_every_await(
        self,
        database: Database,
        memory_store: MemoryStore,
        factory: Factory,
        program: Program,
        after: Contents,
    ) -> None:
        """Cancelled at any await, the rows are as before or as after, and no more is stored."""
        seen: list[Contents] = []
        for moment in range(1, MANY):
            if not seen or seen[-1] != SEED:
                await seed(factory, memory_store)
            counted = CountedTask(program(factory), cancel_at=moment)
            was_cancelled = await counted.run()
            collect()
            assert memory_store.land_late() == []
            now = await contents(memory_store, database.engine)
            assert now in (SEED, after), f"cancelled at await {moment}"
            seen.append(now)
            if not was_cancelled:
                assert now == after
                assert moment > 5
                assert SEED in seen
                return
        pytest.fail("the program never ended")

    @pytest.mark.slow
    @pytest.mark.parametrize("stage", ["before", "after"])
    @pytest.mark.parametrize("operation", ["put", "copy", "delete"])
    async def test_while_a_request_is_on_the_wire(
        self,
        database: Database,
        memory_store: MemoryStore,
        factory: Factory,
        program: Program,
        after: Contents,
        operation: str,
        stage: str,
    ) -> None:
        """A request on the wire is run to its end although the caller was cancelled."""
        await seed(factory, memory_store)
        task: asyncio.Task[None] | None = None
        cancelled = []

        async def cancel(step: Step) -> None:
            if (step.operation, step.stage) == (operation, stage):
                assert task is not None
                cancelled.append(step)
                task.cancel()
                for _ in range(5):  # the cancellation arrives while we are still on the wire
                    await asyncio.sleep(0)

        memory_store.hooks.append(cancel)
        task = asyncio.create_task(program(factory))
        await asyncio.wait({task})
        collect()

        assert task.cancelled() == bool(cancelled)
        assert memory_store.land_late() == []
        now = await contents(memory_store, database.engine)
        if not cancelled:
            assert now == after
        elif operation == "delete":
            assert now in (SEED, after)  # a savepoint's uploads may be deleted before COMMIT
        else:
            assert now == SEED
