"""Cancellation at every await of create, update and delete: no LOSS, no orphan, never swallowed."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from support.awaits import CountedTask
from support.databases import Database
from support.models import Task, contents, load, read_row

from aioblobcol import PutS3ApiCall, blob_transaction, guard
from aioblobcol.testing import MemoryStore, Step

MANY = 400  # far more awaits than any of these programs has

Program = Callable[[AsyncSession, MemoryStore], Coroutine[Any, Any, None]]


async def create(session: AsyncSession, store: MemoryStore) -> None:
    async with blob_transaction(session, store=store) as tx:
        put = await tx.put_s3(
            pk="u",
            api_calls=[PutS3ApiCall("html", b"html 1", None), PutS3ApiCall("image", b"i", None)],
        )
        session.add(Task(url="u", **put.to_values()))


async def update(session: AsyncSession, store: MemoryStore) -> None:
    task = await load(session)
    async with blob_transaction(session, store=store) as tx:
        put = await tx.put_s3(
            pk="u",
            api_calls=[
                PutS3ApiCall("html", b"html 2", task.html),
                PutS3ApiCall("image", b"image 2", task.image),
            ],
        )
        await session.execute(
            sa.update(Task).where(Task.url == "u", put.guard(Task)).values(**put.to_values())
        )


async def delete(session: AsyncSession, store: MemoryStore) -> None:
    task = await load(session)
    async with blob_transaction(session, store=store) as tx:
        tx.delete_s3([task.html, task.image])
        await session.execute(
            sa.delete(Task).where(Task.url == "u", guard(Task, html=task.html, image=task.image))
        )


async def update_in_a_savepoint(session: AsyncSession, store: MemoryStore) -> None:
    task = await load(session)
    async with blob_transaction(session, store=store) as tx, session.begin_nested():
        put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"html 2", task.html)])
        await session.execute(
            sa.update(Task).where(Task.url == "u", put.guard(Task)).values(**put.to_values())
        )


PROGRAMS: list[tuple[Program, tuple[bytes, bytes] | None]] = [
    (create, (b"html 1", b"i")),
    (update, (b"html 2", b"image 2")),
    (delete, None),
    (update_in_a_savepoint, (b"html 2", b"i")),
]


async def prepare(database: Database, store: MemoryStore, program: Program) -> object:
    """Empty the table, or put the row there that the program works on."""
    store.hooks.clear()
    # the traceback of a cancelled statement holds its cursor, and the cursor SQLite's write lock
    gc.collect()
    async with database.session() as session:
        row = await read_row(database.engine)
        if row is not None:
            await delete(session, store)
        if program is not create:
            await create(session, store)
    return await contents(store, database.engine)


@pytest.mark.parametrize(
    ("program", "after"), PROGRAMS, ids=lambda each: getattr(each, "__name__", "")
)
class TestCancellation:
    @pytest.mark.slow
    async def test_at_every_await(
        self,
        database: Database,
        memory_store: MemoryStore,
        program: Program,
        after: tuple[bytes, bytes] | None,
    ) -> None:
        """Cancelled at any await, the row is as before or as after, and nothing else is stored."""
        seen = set()
        for moment in range(1, MANY):
            before = await prepare(database, memory_store, program)
            async with database.session() as session:
                counted = CountedTask(program(session, memory_store), cancel_at=moment)
                was_cancelled = await counted.run()
            assert memory_store.land_late() == []
            now = await contents(memory_store, database.engine)
            assert now in (before, after), f"cancelled at await {moment}"
            seen.add(now)
            if not was_cancelled:
                assert now == after
                assert moment > 5
                assert seen == {before, after}
                return
        pytest.fail("the program never ended")

    @pytest.mark.parametrize("stage", ["before", "after"])
    @pytest.mark.parametrize("operation", ["put", "delete"])
    async def test_while_a_request_is_on_the_wire(
        self,
        database: Database,
        memory_store: MemoryStore,
        program: Program,
        after: tuple[bytes, bytes] | None,
        operation: str,
        stage: str,
    ) -> None:
        """A request on the wire is run to its end although the caller was cancelled."""
        before = await prepare(database, memory_store, program)
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
        async with database.session() as session:
            task = asyncio.create_task(_run(program, session, memory_store))
            await asyncio.wait({task})

        assert task.cancelled() == bool(cancelled)
        assert memory_store.land_late() == []
        now = await contents(memory_store, database.engine)
        committed = operation == "delete" or not cancelled
        assert now == (after if committed else before)


async def _run(program: Program, session: AsyncSession, store: MemoryStore) -> None:
    await program(session, store)


class TestCancelDuringCommit:
    async def test_the_outcome_stays_known(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """COMMIT, once sent, is run to its end: committed, cleaned up, and then cancelled."""
        await prepare(database, memory_store, update)
        memory_store.calls.clear()
        task: asyncio.Task[None] | None = None

        @sa.event.listens_for(database.engine.sync_engine, "commit")
        def cancel(connection: sa.Connection) -> None:
            if task is not None and any(call[0] == "put" for call in memory_store.calls):
                task.cancel()

        async with database.session() as session:
            task = asyncio.create_task(_run(update, session, memory_store))
            await asyncio.wait({task})
        sa.event.remove(database.engine.sync_engine, "commit", cancel)

        assert task.cancelled()
        assert await contents(memory_store, database.engine) == (b"html 2", b"image 2")

    async def test_twice(self, database: Database, memory_store: MemoryStore) -> None:
        """A second and a third cancellation change nothing."""
        await prepare(database, memory_store, update)
        gate = memory_store.hold("delete")
        async with database.session() as session:
            task = asyncio.create_task(_run(update, session, memory_store))
            await gate.reached.wait()
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0)
            gate.open()
            await asyncio.wait({task})

        assert task.cancelled()
        assert await contents(memory_store, database.engine) == (b"html 2", b"image 2")
