"""With a journal, cancelled at every await: nothing is lost, and nothing is left."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from support.awaits import CountedTask
from support.databases import Database
from support.journaled import World, open_world

from aioblobcol import Blob, PutS3ApiCall, blob_transaction, put_s3, upload_blobs

Work = Callable[[World, str], Awaitable[None]]


async def managed(world: World, key: str) -> None:
    async with world.sessions.begin() as session:
        session.add(world.Doc(key=key, body=Blob(b"1"), cover=Blob(b"2")))
    async with world.sessions.begin() as session:
        doc = await session.get_one(world.Doc, key)
        doc.body = Blob(b"3")


async def uploaded_ahead(world: World, key: str) -> None:
    async with world.sessions() as session:
        doc = world.Doc(key=key, body=Blob(b"1"))
        await upload_blobs(session, doc)
        session.add(doc)
        await session.commit()


async def in_a_savepoint(world: World, key: str) -> None:
    async with world.sessions.begin() as session:
        savepoint = await session.begin_nested()
        session.add(world.Doc(key=f"{key} never", body=Blob(b"1")))
        await session.flush()
        await savepoint.rollback()
        session.add(world.Doc(key=key, body=Blob(b"2")))


async def in_a_block(world: World, key: str) -> None:
    async with AsyncSession(world.engine) as session:
        async with blob_transaction(session, store=world.store, journal=world.journal) as tx:
            put = await tx.put_s3(pk=key, api_calls=[PutS3ApiCall("html", b"1", None)])
            session.add(world.Task(url=key, **put.to_values()))


async def by_hand(world: World, key: str) -> None:
    calls = [PutS3ApiCall("html", b"1", None)]
    put = await put_s3(calls, pk=key, store=world.store, journal=world.journal)
    async with AsyncSession(world.engine) as session:
        session.add(world.Task(url=key, **put.to_values()))
        await session.commit()
    await put.clean_up_old_s3_object_when_update_row_succeeded()


@pytest.mark.slow
@pytest.mark.parametrize(
    "work", [managed, uploaded_ahead, in_a_savepoint, in_a_block, by_hand], ids=lambda w: w.__name__
)
async def test_at_every_await(database: Database, work: Work) -> None:
    """Whatever the journal lists afterwards, time and a worker remove it."""
    async with open_world(database) as world:
        await work(world, "warm")
        moment, was_reached = 0, True
        while was_reached:
            moment += 1
            task = CountedTask(work(world, str(moment)), cancel_at=moment)  # type: ignore[arg-type]
            was_reached = await task.run()
            gc.collect()  # the traceback of a cancelled statement holds SQLite's write lock
            await world.check()

        assert moment > 5
