"""The guarantees do not depend on the store: the same programs on obstore, in every place."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from support.awaits import CountedTask
from support.databases import Database
from support.journaled import World
from support.library import Doc, Library, open_library
from support.models import Task, contents, load
from support.obstores import PLACES, open_in

from aioblobcol import (
    Blob,
    BlobUploadError,
    PutS3ApiCall,
    blob_transaction,
    guard,
    upload_blobs,
)
from aioblobcol._check import Check
from aioblobcol._sources import PART_BYTES
from aioblobcol._store._base import PutRequest
from aioblobcol.obstore import ObstoreStore
from aioblobcol.testing import S3Server, assert_consistent
from aioblobcol.testing.conformance import noise, put_request, same

pytestmark = pytest.mark.slow  # the same as elsewhere, on three more stores

MANY = 400  # far more awaits than any of these programs has


class UserError(Exception):
    pass


@pytest_asyncio.fixture(params=PLACES)
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server
) -> AsyncIterator[ObstoreStore]:
    """Give each place in turn."""
    async with open_in(request.param, tmp_path, s3) as opened:
        yield opened


def calls(old: Task | None = None, *, number: int = 1) -> list[PutS3ApiCall]:
    html, image = (old.html, old.image) if old else (None, None)
    return [
        PutS3ApiCall("html", b"html %d" % number, html, {"ContentType": "text/html"}),
        PutS3ApiCall("image", b"image %d" % number, image, {"ContentType": "image/png"}),
    ]


async def create(session: AsyncSession, store: ObstoreStore) -> None:
    async with blob_transaction(session, store=store) as tx:
        put = await tx.put_s3(pk="u", api_calls=calls())
        session.add(Task(url="u", **put.to_values()))


async def fail_to_create(session: AsyncSession, store: ObstoreStore) -> None:
    with pytest.raises(UserError):
        async with blob_transaction(session, store=store) as tx:
            put = await tx.put_s3(pk="u", api_calls=calls())
            session.add(Task(url="u", **put.to_values()))
            raise UserError


async def update(session: AsyncSession, store: ObstoreStore) -> None:
    task = await load(session)
    async with blob_transaction(session, store=store) as tx:
        put = await tx.put_s3(pk="u", api_calls=calls(task, number=2))
        await session.execute(sa.update(Task).where(put.guard(Task)).values(**put.to_values()))


async def delete(session: AsyncSession, store: ObstoreStore) -> None:
    task = await load(session)
    async with blob_transaction(session, store=store) as tx:
        tx.delete_s3([task.html, task.image])
        await session.execute(
            sa.delete(Task).where(Task.url == "u", guard(Task, html=task.html, image=task.image))
        )


Program = Callable[[AsyncSession, ObstoreStore], Coroutine[Any, Any, None]]


class TestExplicit:
    async def test_a_life(self, sqlite: Database, store: ObstoreStore) -> None:
        """Failed create, create, update, delete: the row and the objects agree after each."""
        async with sqlite.session() as session:
            await fail_to_create(session, store)
            assert await contents(store, sqlite.engine) is None
            await create(session, store)
            assert await contents(store, sqlite.engine) == (b"html 1", b"image 1")
            await update(session, store)
            assert await contents(store, sqlite.engine) == (b"html 2", b"image 2")
            await delete(session, store)
            assert await contents(store, sqlite.engine) is None

    @pytest.mark.long
    @pytest.mark.parametrize("program", [create, update, delete], ids=lambda each: each.__name__)
    async def test_cancelled_at_every_await(
        self, sqlite: Database, store: ObstoreStore, program: Program
    ) -> None:
        """Wherever it is cancelled, both stores agree, and nothing is left over."""
        one, two = (b"html 1", b"image 1"), (b"html 2", b"image 2")
        before = None if program is create else one
        after = one if program is create else two if program is update else None
        async with sqlite.session() as session:
            for moment in range(1, MANY):
                async with sqlite.engine.begin() as connection:
                    await connection.execute(sa.delete(Task))
                await store.delete_many([uri async for uri in store.iter_uris()])
                session.expunge_all()
                if program is not create:
                    await create(session, store)
                reached = await CountedTask(program(session, store), cancel_at=moment).run()
                await session.rollback()
                gc.collect()  # the traceback of a cancelled statement holds SQLite's write lock
                found = await contents(store, sqlite.engine)
                assert found in {before, after}
                if not reached:
                    assert found == after
                    return
        raise AssertionError("it never came to its end")


class TestManaged:
    @pytest_asyncio.fixture
    async def library(self, sqlite: Database, store: ObstoreStore) -> AsyncIterator[Library]:
        async with open_library(sqlite, store) as opened:
            yield opened

    async def test_a_life(self, library: Library) -> None:
        """Created, read, copied, swapped, rolled back, updated in bulk, deleted."""
        await library.add(
            Doc(name="a", body=Blob(b"1"), scan=Blob(b"2")), Doc(name="b", body=Blob(b"3"))
        )
        async with library.session() as session:
            a, b = await session.get_one(Doc, "a"), await session.get_one(Doc, "b")
            assert a.body is not None
            assert await a.body.read() == b"1"
            a.body, b.body, b.scan = b.body, a.body, a.scan
            await session.commit()
            assert await library.check() == [b"1", b"2", b"2", b"3"]
            a.body = Blob(b"never")
            await session.flush()
            await session.rollback()
            assert await library.check() == [b"1", b"2", b"2", b"3"]
            await session.execute(
                sa.update(Doc).where(Doc.name == "b").values(body=Blob(b"4"), scan=None)
            )
            await session.delete(a)
            await session.commit()

        assert await library.check() == [b"4"]

    async def test_savepoints(self, library: Library) -> None:
        """What a savepoint made goes with it, and what it replaced stays."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        async with library.session.begin() as session:
            doc = await session.get_one(Doc, "a")
            doc.scan = Blob(b"kept")
            await session.flush()
            savepoint = await session.begin_nested()
            doc.body = Blob(b"never")
            await session.flush()
            await savepoint.rollback()

        assert await library.check() == [b"1", b"kept"]

    async def test_uploads_that_fail(
        self, library: Library, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One upload that the store refuses undoes the others, and no row is written."""
        carry_out = ObstoreStore.put

        async def refuse_scans(store: ObstoreStore, request: PutRequest) -> bool:
            if request.column == "scan":
                request = put_request(request.uri + "/", b"")  # a key that obstore does not name
            return await carry_out(store, request)

        monkeypatch.setattr(ObstoreStore, "put", refuse_scans)
        with pytest.raises(BlobUploadError):
            await library.add(Doc(name="a", body=Blob(b"1"), scan=Blob(b"2")))

        assert await library.check() == []


class TestLargeObjects:
    """What does not fit into one part goes through obstore's writer, and comes back in parts."""

    @pytest_asyncio.fixture
    async def library(self, sqlite: Database, store: ObstoreStore) -> AsyncIterator[Library]:
        async with open_library(sqlite, store) as opened:
            yield opened

    async def test_up_and_down(self, library: Library, tmp_path: Path) -> None:
        """A file and a stream of unknown length are committed, and arrive whole."""
        body = noise(2 * PART_BYTES + 17)
        source = tmp_path / "source"
        await asyncio.to_thread(source.write_bytes, body)
        await library.add(Doc(name="a", body=Blob(source), scan=Blob(stream(body))))
        async with library.session() as session:
            doc = await session.get_one(Doc, "a")
            assert doc.body is not None
            assert doc.scan is not None
            await doc.body.download_to(tmp_path / "target")
            assert same(await doc.scan.read(), body)
            async with doc.body.open() as chunks:
                assert same(b"".join([chunk async for chunk in chunks]), body)

        assert same(await asyncio.to_thread((tmp_path / "target").read_bytes), body)
        assert [len(each) for each in await library.check()] == [len(body)] * 2

    async def test_a_source_that_breaks(self, library: Library) -> None:
        """A stream that fails in the middle leaves nothing, and no row."""
        with pytest.raises(BlobUploadError):
            await library.add(Doc(name="a", body=Blob(stream(noise(PART_BYTES + 1), breaks=True))))

        assert await library.check() == []

    async def test_a_row_that_is_refused(self, library: Library) -> None:
        """A large object whose row is refused is deleted again."""
        body = noise(PART_BYTES + 1)
        await library.add(Doc(name="a", title="t", body=Blob(b"1")))
        with pytest.raises(IntegrityError):
            await library.add(Doc(name="b", title="t", body=Blob(stream(body))))

        assert await library.check() == [b"1"]


async def stream(body: bytes, *, breaks: bool = False) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 2**20):
        yield body[start : start + 2**20]
    if breaks:
        raise UserError


class TestJournaled:
    @pytest_asyncio.fixture
    async def world(self, database: Database, store: ObstoreStore) -> AsyncIterator[World]:
        world: World = World(database, store)
        async with database.engine.begin() as connection:
            await connection.run_sync(world.Base.metadata.drop_all)
            await connection.run_sync(world.Base.metadata.create_all)
        yield world
        async with database.engine.begin() as connection:
            await connection.run_sync(world.Base.metadata.drop_all)

    async def test_the_worker_and_the_check(self, world: World) -> None:
        """What the journal lists the worker deletes, and the check finds what nobody names."""
        async with world.sessions.begin() as session:
            session.add_all(
                [world.Doc(key=key, body=Blob(key.encode()), cover=Blob(b"c")) for key in "abc"]
            )
        async with world.engine.begin() as connection:  # as a program without the library
            await connection.execute(sa.text("DELETE FROM world_docs WHERE key = 'b'"))
        async with world.sessions() as session:
            await upload_blobs(session, world.Doc(key="never", body=Blob(b"never")))
            await session.rollback()
        await world.expire_leases()
        await world.worker().drain()
        columns = [world.Doc.body, world.Doc.cover, world.Task.html]
        found = await assert_consistent(world.store, world.engine, columns)
        assert sorted(found.values()) == [b"a", b"c", b"c", b"c"]
        assert await world.states() == {}

        orphan = f"s3://{world.store.bucket}/prefix/x/id={'0' * 32}"
        await world.store.put(put_request(orphan, b"orphan"))
        gone, *_ = found
        await world.store.delete_many([gone])
        check = Check(
            world.engine,
            world.store,
            world.Base.metadata,
            uri_columns=[world.Task.html],
            journal=world.journal,
            min_age=timedelta(0),
        )
        findings = {(each.uri, each.kind.value) async for each in check.findings()}
        assert findings == {(orphan, "orphan"), (gone, "dangling")}
