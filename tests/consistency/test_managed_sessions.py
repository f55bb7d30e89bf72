"""What a managed session does about every way to write a row and to end a transaction."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, StatementError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, make_transient
from support.databases import Database
from support.library import Album, Doc, Item, Library, Page, Photo, Song, Video, open_library
from support.postgres_proxy import postgres_proxy

from aioblobcol import (
    Blob,
    BlobNotUploadedError,
    BlobSharedError,
    BlobUploadError,
    CommitOutcomeUnknown,
    InvalidSourceError,
    PutS3ApiCall,
    S3Store,
    TransactionAbortedError,
    UnsafeTransactionError,
    blob_report,
    blob_sessionmaker,
    blob_transaction,
    enlist,
    put_s3,
    upload_blobs,
)
from aioblobcol.testing import MemoryStore


@pytest_asyncio.fixture
async def library(database: Database, memory_store: MemoryStore) -> AsyncIterator[Library]:
    async with open_library(database, memory_store) as opened:
        yield opened


class AbortError(Exception):
    """Raised by the user's code."""


def requests(library: Library, operation: str) -> int:
    return sum(name == operation for name, _ in library.store.calls)


class TestUnitOfWork:
    """Objects that are added, changed and deleted."""

    async def test_create_replace_empty_delete(self, library: Library) -> None:
        """A row's blobs are uploaded, replaced, emptied and deleted with it."""
        await library.add(doc := Doc(name="d", body=Blob(b"1"), scan=Blob(b"2")))
        assert await library.check() == [b"1", b"2"]
        async with library.session.begin() as session:
            session.add(doc)
            doc.body = Blob(b"3")
        assert await library.check() == [b"2", b"3"]
        async with library.session.begin() as session:
            session.add(doc)
            doc.scan = None
        assert await library.check() == [b"3"]
        async with library.session.begin() as session:
            await session.delete(doc)

        assert await library.check() == []

    async def test_all_uploads_of_a_flush_run_at_once(self, library: Library) -> None:
        """Over all rows and columns, and before the database hears of them."""
        await library.add(Doc(name="x", body=Blob(b"")))  # each engine is asked once for its level
        library.store.calls.clear()
        gate = library.store.hold("put")
        sent: list[str] = []
        engine = library.engine.sync_engine
        sa.event.listen(engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
        docs = [Doc(name=str(n), body=Blob(b"b"), scan=Blob(b"s")) for n in range(5)]
        task = asyncio.create_task(library.add(*docs))
        while requests(library, "put") < 10:  # noqa: ASYNC110 - they wait behind the gate
            await asyncio.sleep(0)

        assert not sent
        assert library.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        gate.open()
        await task
        assert len(await library.check()) == 11

    async def test_the_old_object_is_read_from_the_row(self, library: Library) -> None:
        """An attribute that was never loaded supersedes what the row holds."""
        await library.add(Doc(name="d", body=Blob(b"old"), notes=Blob(b"old notes")))
        async with library.session() as session:
            doc = await session.get_one(Doc, "d")
            session.expire(doc)
            doc.body = Blob(b"new")
            doc.notes = Blob(b"new notes")
            await session.commit()

        assert await library.check() == [b"new", b"new notes"]

    async def test_several_flushes(self, library: Library) -> None:
        """The same attribute assigned and flushed several times leaves its last object."""
        await library.add(Doc(name="d", body=Blob(b"0")))
        async with library.session.begin() as session:
            doc = await session.get_one(Doc, "d")
            for n in (b"1", b"2", b"3"):
                doc.body = Blob(n)
                await session.flush()

        assert await library.check() == [b"3"]

    async def test_back_to_an_earlier_blob(self, library: Library) -> None:
        """A blob that was superseded in this transaction is made anew when it is assigned again."""
        await library.add(Doc(name="d", body=Blob(b"0")))
        async with library.session.begin() as session:
            doc = await session.get_one(Doc, "d")
            loaded, first = doc.body, Blob(b"1")
            for blob in (first, Blob(b"2"), first, loaded):
                doc.body = blob
                await session.flush()

        assert await library.check() == [b"0"]

    @pytest.mark.parametrize("in_two_flushes", [False, True])
    async def test_swap_rows_and_columns(self, library: Library, in_two_flushes: bool) -> None:
        """Blobs that change places are copied, and every cell has an object of its own."""
        await library.add(
            Doc(name="a", body=Blob(b"1"), scan=Blob(b"2")), Doc(name="b", body=Blob(b"3"))
        )
        async with library.session.begin() as session:
            a, b = await session.get_one(Doc, "a"), await session.get_one(Doc, "b")
            a.body, b.body = b.body, a.body
            if in_two_flushes:
                await session.flush()
            a.body, a.scan = a.scan, a.body

        assert await library.check() == [b"1", b"2", b"3"]
        assert await library.read(Doc, "a") == b"2"
        assert await library.read(Doc, "a", "scan") == b"3"
        assert await library.read(Doc, "b") == b"1"

    async def test_move_to_another_row(self, library: Library) -> None:
        """A blob that moves to another row, in one flush or in two, is there and nowhere else."""
        await library.add(Doc(name="a", body=Blob(b"1")), Doc(name="b"), Doc(name="c"))
        async with library.session.begin() as session:
            a, b, c = [await session.get_one(Doc, name) for name in "abc"]
            b.body, a.body = a.body, None
            await session.flush()
            moved, b.body = b.body, None
            await session.flush()
            c.body = moved

        assert await library.check() == [b"1"]
        assert await library.read(Doc, "c") == b"1"

    async def test_delete_and_add_again(self, library: Library) -> None:
        """A row that is replaced under its key in one flush keeps no old object."""
        await library.add(Doc(name="d", body=Blob(b"1"), scan=Blob(b"2")))
        async with library.session.begin() as session:
            doc = await session.get_one(Doc, "d")
            await session.delete(doc)
            session.add(Doc(name="d", body=doc.body, scan=Blob(b"3")))

        assert await library.check() == [b"1", b"3"]

    async def test_one_pending_blob_for_two_cells(self, library: Library) -> None:
        """It is uploaded once for each."""
        blob = Blob(b"both")
        await library.add(Doc(name="a", body=blob, scan=blob), Doc(name="b", body=blob))
        assert await library.check() == [b"both"] * 3

        async with library.session.begin() as session:
            await session.delete(await session.get_one(Doc, "a"))
        assert await library.check() == [b"both"]

    async def test_merge(self, library: Library) -> None:
        """merge() of a detached object replaces, and leaves alone what is the same."""
        await library.add(doc := Doc(name="d", body=Blob(b"1"), scan=Blob(b"2")))
        library.store.calls.clear()
        async with library.session.begin() as session:
            await session.merge(Doc(name="d", body=Blob(b"3"), scan=doc.scan))

        assert requests(library, "put") == 1
        assert requests(library, "copy") == 0
        assert await library.check() == [b"2", b"3"]

    async def test_merge_of_a_stale_object(self, library: Library) -> None:
        """A URI that another transaction has replaced is not written back."""
        await library.add(stale := Doc(name="d", body=Blob(b"1")))
        async with library.session.begin() as session:
            (await session.get_one(Doc, "d")).body = Blob(b"2")
        with pytest.raises(BlobUploadError, match="NoSuchKey"):
            async with library.session.begin() as session:
                await session.merge(stale)

        assert await library.check() == [b"2"]

    async def test_refresh_and_expire(self, library: Library) -> None:
        """A pending blob that is refreshed or expired away is not uploaded."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        async with library.session() as session:
            doc = await session.get_one(Doc, "d")
            doc.body = Blob(b"2")
            await session.refresh(doc)
            doc.body = Blob(b"3")
            session.expire(doc, ["body"])
            await session.commit()

        assert await library.check() == [b"1"]
        assert requests(library, "put") == 1

    async def test_with_for_update(self, library: Library) -> None:
        """A row that is locked already is read and replaced as any other."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        async with library.session.begin() as session:
            doc = await session.get_one(Doc, "d", with_for_update=True)
            doc.body = Blob(b"2")

        assert await library.check() == [b"2"]

    async def test_a_changed_key(self, library: Library) -> None:
        """A row whose primary key changes with its blob leaves no old object."""
        await library.add(Doc(name="d", body=Blob(b"1"), scan=Blob(b"2")))
        async with library.session.begin() as session:
            doc = await session.get_one(Doc, "d")
            doc.name, doc.body = "e", Blob(b"3")

        assert await library.check() == [b"2", b"3"]

    async def test_composite_and_server_made_keys(self, library: Library) -> None:
        """Keys of several columns and keys of the database's are no different."""
        await library.add(Page(book="b", number=1, text=Blob(b"1")), Album(cover=Blob(b"c")))
        async with library.session.begin() as session:
            page = await session.get_one(Page, ("b", 1))
            page.text = Blob(b"2")
            album = (await session.scalars(sa.select(Album))).one()
            await session.delete(album)

        assert await library.check() == [b"2"]

    async def test_cascades_and_orphans(self, library: Library) -> None:
        """Children that are deleted with their parent, or let go by it, leave no object."""
        await library.add(
            album := Album(cover=Blob(b"c"), photos=[Photo(image=Blob(b"%d" % n)) for n in (1, 2)])
        )
        async with library.session.begin() as session:
            album = await session.get_one(Album, album.id)
            album.photos.pop(0)
        assert len(await library.check()) == 2
        async with library.session.begin() as session:
            await session.delete(await session.get_one(Album, album.id))

        assert await library.check() == []

    async def test_a_pending_child_that_is_let_go(self, library: Library) -> None:
        """A new child that its parent drops before the flush is in no row, and in no store."""
        async with library.session.begin() as session:
            album = Album(photos=[photo := Photo(image=Blob(b"1"))])
            session.add(album)
            with session.no_autoflush:
                album.photos.remove(photo)

        assert await library.check() == []

    async def test_inheritance(self, library: Library) -> None:
        """Blobs in the tables of a class and of its base are one row's."""
        await library.add(
            video := Video(preview=Blob(b"p"), film=Blob(b"f")),
            song := Song(preview=Blob(b"q"), sheet=Blob(b"s")),
        )
        assert await library.check() == [b"f", b"p", b"q", b"s"]
        async with library.session.begin() as session:
            found = await session.get_one(Item, video.id)
            assert isinstance(found, Video)
            await session.refresh(found)
            found.preview, found.film = Blob(b"P"), Blob(b"F")
            await session.delete(await session.get_one(Item, song.id))
        assert await library.check() == [b"F", b"P"]
        async with library.session.begin() as session:
            await session.delete(await session.get_one(Video, video.id))

        assert await library.check() == []

    async def test_flush_of_some_objects(self, library: Library) -> None:
        """flush([one]) touches the objects of no other."""
        await library.add(Doc(name="a", body=Blob(b"1")), Doc(name="b", body=Blob(b"2")))
        async with library.session.begin() as session:
            a, b = await session.get_one(Doc, "a"), await session.get_one(Doc, "b")
            a.body, b.body = Blob(b"3"), Blob(b"4")
            with warnings.catch_warnings():  # SQLAlchemy 2.1 calls it deprecated
                warnings.simplefilter("ignore", DeprecationWarning)
                await session.flush([a])
            session.expunge(b)

        assert await library.check() == [b"2", b"3"]

    async def test_no_change_sends_nothing(self, library: Library) -> None:
        """Assigning the blob that is there already copies and supersedes nothing."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        library.store.calls.clear()
        async with library.session.begin() as session:
            doc = await session.get_one(Doc, "d")
            doc.body, doc.title = doc.body, "new"

        assert library.store.calls == []
        assert await library.check() == [b"1"]

    async def test_a_transient_copy_of_a_row(self, library: Library) -> None:
        """An object that is added a second time under another key has objects of its own."""
        await library.add(doc := Doc(name="a", body=Blob(b"1")))
        make_transient(doc)
        doc.name = "b"
        await library.add(doc)
        async with library.session.begin() as session:
            await session.delete(await session.get_one(Doc, "a"))

        assert await library.check() == [b"1"]


class TestSavepoints:
    """Frames of the database's own savepoints."""

    async def test_released_and_committed(self, library: Library) -> None:
        """What a released savepoint replaced goes with the outermost commit, not before."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        async with library.session() as session:
            doc = await session.get_one(Doc, "d")
            async with session.begin_nested():
                doc.body = Blob(b"2")
            assert requests(library, "delete") == 0
            await session.commit()

        assert await library.check() == [b"2"]

    async def test_released_and_rolled_back(self, library: Library) -> None:
        """What a released savepoint replaced stays when the transaction is rolled back."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        async with library.session() as session:
            doc = await session.get_one(Doc, "d")
            async with session.begin_nested():
                doc.body = Blob(b"2")
            await session.rollback()

        assert await library.check() == [b"1"]

    async def test_rolled_back_and_committed(self, library: Library) -> None:
        """A rolled back savepoint takes its own uploads along and no others."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        async with library.session.begin() as session:
            doc = await session.get_one(Doc, "d")
            session.add(Doc(name="outer", body=Blob(b"outer")))
            with pytest.raises(AbortError):
                async with session.begin_nested():
                    doc.body = Blob(b"2")
                    session.add(Doc(name="inner", body=Blob(b"inner")))
                    await session.flush()
                    raise AbortError

        assert await library.check() == [b"1", b"outer"]

    async def test_three_deep(self, library: Library) -> None:
        """The middle one is rolled back, with the one that was released into it."""
        await library.add(Doc(name="d", body=Blob(b"0")))
        async with library.session.begin() as session:
            doc = await session.get_one(Doc, "d")
            async with session.begin_nested():
                doc.body = Blob(b"1")
                with pytest.raises(AbortError):
                    async with session.begin_nested():
                        doc.body = Blob(b"2")
                        async with session.begin_nested():
                            doc.body = Blob(b"3")
                            doc.scan = Blob(b"s")
                        raise AbortError

        assert await library.check() == [b"1"]

    async def test_a_savepoint_of_the_connection(self, library: Library) -> None:
        """A savepoint that the session does not know of counts all the same."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        async with library.session.begin() as session:
            doc = await session.get_one(Doc, "d")
            connection = await session.connection()
            savepoint = await connection.begin_nested()
            doc.body = Blob(b"2")
            await session.flush()
            await savepoint.rollback()
            session.expire(doc)

        assert await library.check() == [b"1"]

    async def test_the_blob_of_a_rolled_back_savepoint_is_used_again(
        self, library: Library
    ) -> None:
        """It is pending again, and uploaded under a fresh key."""
        blob = Blob(b"1")
        async with library.session.begin() as session:
            with pytest.raises(AbortError):
                async with session.begin_nested():
                    session.add(Doc(name="d", body=blob))
                    await session.flush()
                    first = blob.uri
                    raise AbortError
            assert not blob.is_stored
            session.add(Doc(name="d", body=blob))

        assert blob.uri != first
        assert await library.check() == [b"1"]


class TestEnds:
    """Every way in which a transaction can end."""

    async def test_rollback(self, library: Library) -> None:
        """New objects go, old ones stay, and the same object can be committed later."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        async with library.session() as session:
            (await session.get_one(Doc, "d")).body = Blob(b"2")
            session.add(new := Doc(name="n", body=Blob(b"3")))
            await session.flush()
            uri = new.body.uri if new.body else ""
            await session.rollback()
            assert await library.check() == [b"1"]
            session.add(new)
            await session.commit()

        assert new.body is not None
        assert new.body.uri != uri
        assert await library.check() == [b"1", b"3"]

    async def test_close_without_commit(self, library: Library) -> None:
        """Nothing is kept of a session that is closed."""
        async with library.session() as session:
            session.add(Doc(name="d", body=Blob(b"1")))
            await session.flush()

        assert await library.check() == []

    async def test_an_error_in_the_block(self, library: Library) -> None:
        """The user's error arrives, and nothing is kept."""
        with pytest.raises(AbortError):
            async with library.session.begin() as session:
                session.add(Doc(name="d", body=Blob(b"1")))
                await session.flush()
                raise AbortError

        assert await library.check() == []

    async def test_integrity_error(self, library: Library) -> None:
        """A refused row leaves no object, and the first one its own."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        with pytest.raises(IntegrityError):
            await library.add(twin := Doc(name="d", body=Blob(b"2")))
        assert await library.check() == [b"1"]
        twin.name = "e"
        await library.add(twin)

        assert await library.check() == [b"1", b"2"]

    async def test_an_upload_that_fails(self, library: Library) -> None:
        """The database hears nothing, the session goes on, and a second commit succeeds."""
        library.store.fail("put", containing="col=scan", times=1)
        async with library.session() as session:
            session.add(Doc(name="d", body=Blob(b"1"), scan=Blob(b"2")))
            with pytest.raises(BlobUploadError, match="scan"):
                await session.commit()
            assert library.store.objects == {}
            assert session.is_active
            await session.commit()

        assert await library.check() == [b"1", b"2"]

    async def test_a_dropped_session(self, library: Library) -> None:
        """A session that is garbage-collected names its objects in a warning."""

        async def drop() -> str:
            session = library.session()
            await upload_blobs(session, doc := Doc(name="d", body=Blob(b"1")))
            assert doc.body is not None
            return doc.body.uri

        with pytest.warns(ResourceWarning, match="orphans") as caught:
            uri = await drop()
            gc.collect()

        assert any(uri in str(each.message) for each in caught)
        await library.check(orphans=(uri,))

    async def test_a_swallowed_error(self, postgres: Database, memory_store: MemoryStore) -> None:
        """COMMIT of a transaction that the database has given up is refused and undone."""
        async with open_library(postgres, memory_store) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            async with library.session() as session:
                (await session.get_one(Doc, "d")).body = Blob(b"2")
                await session.flush()
                with pytest.raises(sa.exc.DBAPIError):
                    await session.execute(sa.text("SELECT 1/0"))
                with pytest.raises(TransactionAbortedError):
                    await session.commit()

            assert await library.check() == [b"1"]

    async def test_autocommit(self, database: Database, memory_store: MemoryStore) -> None:
        """An AUTOCOMMIT engine is refused before the first byte; reading from it is not."""
        async with open_library(database, memory_store) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            autocommit = database.engine.execution_options(isolation_level="AUTOCOMMIT")
            memory_store.calls.clear()
            async with blob_sessionmaker(autocommit, memory_store)() as session:
                assert (await session.get_one(Doc, "d")).body is not None
                session.add(Doc(name="e", body=Blob(b"2")))
                with pytest.raises(UnsafeTransactionError, match="AUTOCOMMIT"):
                    await session.commit()
            async with blob_sessionmaker(autocommit, memory_store)() as session:
                session.add(Doc(name="f", body=Blob(b"2")))
                with pytest.raises(UnsafeTransactionError, match="AUTOCOMMIT"):
                    await session.commit()

            assert memory_store.calls == []
            assert await library.check() == [b"1"]

    async def test_run_sync(self, library: Library) -> None:
        """Code that commits the plain session is kept like any other."""
        await library.add(Doc(name="d", body=Blob(b"1")))

        def replace(session: Session) -> None:
            session.get_one(Doc, "d").body = Blob(b"2")
            session.commit()

        async with library.session() as session:
            await session.run_sync(replace)

        assert await library.check() == [b"2"]

    async def test_async_scoped_session(self, library: Library) -> None:
        """A scoped session of our factory works as its sessions do."""
        scoped = async_scoped_session(library.session, scopefunc=asyncio.current_task)
        scoped.add(Doc(name="d", body=Blob(b"1")))
        await scoped.commit()
        scoped.add(Doc(name="e", body=Blob(b"2")))
        await scoped.flush()
        await scoped.remove()

        assert await library.check() == [b"1"]

    async def test_a_deferred_constraint(self, library: Library) -> None:
        """A COMMIT that the database refuses is certainly not committed."""
        ddl = "CREATE TABLE refs (doc VARCHAR REFERENCES docs (name) DEFERRABLE INITIALLY DEFERRED)"
        async with library.engine.begin() as connection:
            await connection.execute(sa.text("DROP TABLE IF EXISTS refs"))
            await connection.execute(sa.text(ddl))
        try:
            await library.add(Doc(name="d", body=Blob(b"1")))
            async with library.session() as session:
                (await session.get_one(Doc, "d")).body = Blob(b"2")
                await session.execute(sa.text("INSERT INTO refs VALUES ('nobody')"))
                with pytest.raises(IntegrityError):
                    await session.commit()

            assert await library.check() == [b"1"]
        finally:
            async with library.engine.begin() as connection:
                await connection.execute(sa.text("DROP TABLE refs"))


class TestLostReply:
    """The answer to COMMIT is lost: either may be true, so nothing is deleted."""

    @pytest.mark.parametrize("mode", ["before_server", "after_server"])
    @pytest.mark.parametrize("how", ["commit", "begin", "run_sync"])
    async def test_nothing_is_deleted(
        self, postgres: Database, memory_store: MemoryStore, mode: Any, how: str
    ) -> None:
        """The error names both objects, and the row has its own whichever it was."""
        async with open_library(postgres, memory_store) as library:
            await library.add(doc := Doc(name="d", body=Blob(b"1")))
            assert doc.body is not None
            old = doc.body.uri
            async with postgres_proxy(postgres.url) as proxy:
                engine = create_async_engine(proxy.url)
                sessions = blob_sessionmaker(engine, memory_store)
                with pytest.raises(CommitOutcomeUnknown) as caught:
                    await self._replace(sessions, proxy, mode, how)
                await engine.dispose()

            (new,) = caught.value.created
            assert caught.value.superseded == (old,)
            is_committed = mode == "after_server"
            await library.check(orphans=(old,) if is_committed else (new,))
            assert await library.read(Doc, "d") == (b"2" if is_committed else b"1")

    async def _replace(
        self, sessions: async_sessionmaker[AsyncSession], proxy: Any, mode: Any, how: str
    ) -> None:
        if how == "begin":
            async with sessions.begin() as session:
                (await session.get_one(Doc, "d")).body = Blob(b"2")
                proxy.mode = mode
            return
        async with sessions() as session:
            (await session.get_one(Doc, "d")).body = Blob(b"2")
            await session.flush()
            proxy.mode = mode
            if how == "commit":
                await session.commit()
            else:
                await session.run_sync(Session.commit)

    async def test_a_cancelled_commit_is_run_to_its_end(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """The caller is cancelled while COMMIT is on the wire: it is known how it ended."""
        async with open_library(postgres, memory_store) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            async with postgres_proxy(postgres.url) as proxy:
                engine = create_async_engine(proxy.url)
                sessions = blob_sessionmaker(engine, memory_store)

                async def replace() -> None:
                    async with sessions.begin() as session:
                        (await session.get_one(Doc, "d")).body = Blob(b"2")
                        proxy.mode = "hold_reply"

                task = asyncio.create_task(replace())
                await proxy.commit_arrived.wait()
                task.cancel()
                proxy.release.set()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await engine.dispose()

            assert await library.check() == [b"2"]


class TestTwoPhase:
    """After PREPARE only the acknowledgement of the second phase is certain."""

    async def test_acknowledged(self, postgres: Database, memory_store: MemoryStore) -> None:
        """A second phase that was answered is a commit: the old object goes."""
        async with open_library(postgres, memory_store, twophase=True) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            async with library.session.begin() as session:
                (await session.get_one(Doc, "d")).body = Blob(b"2")

            assert await library.check() == [b"2"]

    async def test_rolled_back(self, postgres: Database, memory_store: MemoryStore) -> None:
        """Before PREPARE a rollback undoes both stores."""
        async with open_library(postgres, memory_store, twophase=True) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            async with library.session() as session:
                (await session.get_one(Doc, "d")).body = Blob(b"2")
                await session.flush()
                await session.rollback()

            assert await library.check() == [b"1"]

    async def test_rolled_back_after_prepare(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """After it the row is undone; the objects are left alone, and the log names them."""
        async with open_library(postgres, memory_store, twophase=True) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            async with library.session() as session:
                doc = await session.get_one(Doc, "d")
                doc.body = Blob(b"2")
                await session.flush()
                left = doc.body.uri
                await session.run_sync(lambda sync: sync.prepare())
                await session.rollback()

            assert await library.check(orphans=(left,)) == [b"1"]

    async def test_the_second_phase_fails(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """Prepared, and no answer to the second phase: unknown, nothing is deleted."""

        def fail(_connection: sa.Connection, _xid: object, _is_prepared: bool) -> None:
            raise RuntimeError("wire cut")

        async with open_library(postgres, memory_store, twophase=True) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            sa.event.listen(postgres.engine.sync_engine, "commit_twophase", fail)
            try:
                async with library.session() as session:
                    (await session.get_one(Doc, "d")).body = Blob(b"2")
                    with pytest.raises(CommitOutcomeUnknown) as caught:
                        await session.commit()
            finally:
                sa.event.remove(postgres.engine.sync_engine, "commit_twophase", fail)
            engine = postgres.engine.execution_options(isolation_level="AUTOCOMMIT")
            async with engine.connect() as connection:
                left = await connection.scalars(sa.text("SELECT gid FROM pg_prepared_xacts"))
                for gid in left.all():  # as an operator does, who looks after two-phase commits
                    await connection.exec_driver_sql(f"ROLLBACK PREPARED '{gid}'")

            assert await library.check(orphans=caught.value.created) == [b"1"]

    async def test_a_driver_without_it(self, sqlite: Database, memory_store: MemoryStore) -> None:
        """It fails before anything is prepared: undone."""
        async with open_library(sqlite, memory_store, twophase=True) as library:
            with pytest.raises(NotImplementedError):
                await library.add(Doc(name="d", body=Blob(b"1")))

            assert await library.check() == []


class TestOnS3:
    """The same against a real client and a server that speaks S3."""

    async def test_a_life(self, database: Database, s3_store: S3Store) -> None:
        """Created, read, replaced, copied, swapped, rolled back, updated in bulk, deleted."""
        async with open_library(database, s3_store) as library:
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


class TestJoinedSessions:
    """Sessions bound to a connection in somebody's transaction: its owner decides."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "mode", ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]
    )
    @pytest.mark.parametrize("ends", ["commit", "close", "rollback"])
    @pytest.mark.parametrize("owner", ["commits", "rolls back"])
    @pytest.mark.parametrize("in_savepoint", [False, True])
    async def test_the_owner_settles(
        self, library: Library, mode: Any, ends: str, owner: str, in_savepoint: bool
    ) -> None:
        """Whatever the session did, the objects follow the row."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        async with library.engine.connect() as connection:
            transaction = await connection.begin()
            if in_savepoint:
                await connection.begin_nested()
            sessions = blob_sessionmaker(connection, library.store, join_transaction_mode=mode)
            async with sessions() as session:
                (await session.get_one(Doc, "d")).body = Blob(b"2")
                await session.flush()
                if ends != "close":
                    await getattr(session, ends)()
            if transaction.is_active:
                await (transaction.commit() if owner == "commits" else transaction.rollback())
        await library.store.runtime.background.drain()

        contents = await library.check()
        assert contents == [await library.read(Doc, "d")]

    async def test_several_sessions_on_one_connection(self, library: Library) -> None:
        """As a test suite does that rolls everything back in the end."""
        async with library.engine.connect() as connection:
            transaction = await connection.begin()
            sessions = blob_sessionmaker(
                connection, library.store, join_transaction_mode="create_savepoint"
            )
            for n in range(3):
                async with sessions.begin() as session:
                    session.add(Doc(name=str(n), body=Blob(b"%d" % n)))
            async with sessions.begin() as session:
                (await session.get_one(Doc, "0")).body = Blob(b"x")
            assert len(library.store.objects) == 4
            await transaction.rollback()
        await library.store.runtime.background.drain()

        assert await library.check() == []

    async def test_the_owner_rolls_a_savepoint_back(self, library: Library) -> None:
        """A savepoint around the session that its owner rolls back undoes it."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        async with library.engine.connect() as connection:
            async with connection.begin():
                savepoint = await connection.begin_nested()
                sessions = blob_sessionmaker(
                    connection, library.store, join_transaction_mode="create_savepoint"
                )
                async with sessions.begin() as session:
                    (await session.get_one(Doc, "d")).body = Blob(b"2")
                await savepoint.rollback()
        await library.store.runtime.background.drain()

        assert await library.check() == [b"1"]


class TestBulk:
    """ORM bulk statements."""

    async def test_insert(self, library: Library) -> None:
        """Lists, single sets, values in the statement, and RETURNING."""
        async with library.session.begin() as session:
            await session.execute(
                sa.insert(Doc), [{"name": n, "body": Blob(n.encode())} for n in "ab"]
            )
            await session.execute(sa.insert(Doc), {"name": "c", "body": Blob(b"c")})
            await session.execute(sa.insert(Doc).values(name="d", body=Blob(b"d")))
            found = await session.scalars(
                sa.insert(Doc).returning(Doc), [{"name": "e", "body": Blob(b"e")}]
            )
            doc = found.one()
            assert doc.body is not None
            assert await doc.body.read() == b"e"

        assert await library.check() == [b"a", b"b", b"c", b"d", b"e"]

    async def test_insert_rolled_back(self, library: Library) -> None:
        """Nothing is kept."""
        async with library.session() as session:
            await session.execute(sa.insert(Doc), [{"name": "a", "body": Blob(b"a")}])

        assert await library.check() == []

    async def test_one_blob_for_many_rows(self, library: Library) -> None:
        """It is uploaded for each."""
        blob = Blob(b"x")
        async with library.session.begin() as session:
            await session.execute(
                sa.insert(Doc), [{"name": n, "body": blob, "scan": blob} for n in "ab"]
            )

        assert await library.check() == [b"x"] * 4

    async def test_update(self, library: Library) -> None:
        """By condition, by primary key, with expressions, and to NULL."""
        await library.add(*(Doc(name=n, body=Blob(n.encode())) for n in "abcd"))
        async with library.session.begin() as session:
            await session.execute(
                sa.update(Doc).where(Doc.name == "a").values(body=Blob(b"A"), title="t")
            )
            await session.execute(sa.update(Doc), [{"name": "b", "body": Blob(b"B")}])
            await session.execute(sa.update(Doc).where(Doc.name == "c").values(body=None))
            await session.execute(
                sa.update(Doc)
                .where(Doc.name == "d")
                .values(body=sa.case((Doc.title.is_(None), sa.null()), else_=Doc.body))
            )

        assert await library.check() == [b"A", b"B"]

    async def test_update_of_something_else(self, library: Library) -> None:
        """A statement that names no managed column costs nothing more."""
        await library.add(Doc(name="a", body=Blob(b"a")))
        sent: list[str] = []
        engine = library.engine.sync_engine
        async with library.session.begin() as session:
            await session.connection()
            sa.event.listen(engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
            await session.execute(sa.update(Doc).values(title="t"))

        assert len(sent) == 1

    async def test_swap_of_two_columns(self, library: Library) -> None:
        """An UPDATE that swaps two columns loses nothing."""
        await library.add(Doc(name="a", body=Blob(b"1"), scan=Blob(b"2")))
        async with library.session.begin() as session:
            await session.execute(sa.update(Doc).values(body=Doc.scan, scan=Doc.body))

        assert await library.check() == [b"1", b"2"]
        assert await library.read(Doc, "a") == b"2"

    async def test_update_that_shares(self, library: Library) -> None:
        """One object in two cells is refused, also at COMMIT if the error is swallowed."""
        await library.add(Doc(name="a", body=Blob(b"1")), Doc(name="b"))
        async with library.session() as session:
            with pytest.raises(BlobSharedError):
                await session.execute(sa.update(Doc).values(scan=Doc.body))
            with pytest.raises(BlobSharedError):
                await session.commit()
        async with library.session() as session:
            with pytest.raises(BlobSharedError):
                await session.execute(sa.update(Doc).values(body=Blob(b"2")))
            await session.rollback()
            session.add(Doc(name="c", body=Blob(b"3")))
            await session.commit()

        assert await library.check() == [b"1", b"3"]

    async def test_update_in_a_savepoint_that_is_rolled_back(self, library: Library) -> None:
        """What it refused there does not keep the rest from being committed."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        async with library.session.begin() as session:
            session.add(Doc(name="b", body=Blob(b"2")))
            with pytest.raises(BlobSharedError):
                async with session.begin_nested():
                    await session.execute(sa.update(Doc).values(scan=Doc.body))

        assert await library.check() == [b"1", b"2"]

    async def test_update_that_matches_nothing(self, library: Library) -> None:
        """Its upload is in no row, and goes at the end."""
        async with library.session.begin() as session:
            session.add(Doc(name="other", body=Blob(b"1")))
            await session.execute(
                sa.update(Doc).where(Doc.name == "nobody").values(body=Blob(b"2"))
            )

        assert await library.check() == [b"1"]

    async def test_delete(self, library: Library) -> None:
        """By condition, with RETURNING, and rolled back."""
        await library.add(*(Doc(name=n, body=Blob(n.encode())) for n in "abc"))
        async with library.session() as session:
            await session.execute(sa.delete(Doc))
            await session.rollback()
            await session.execute(sa.delete(Doc).where(Doc.name == "a"))
            found = await session.scalars(sa.delete(Doc).where(Doc.name == "b").returning(Doc.name))
            assert found.all() == ["b"]
            await session.commit()

        assert await library.check() == [b"c"]

    async def test_single_table_inheritance(self, library: Library) -> None:
        """A bulk statement on a subclass touches its own rows only."""
        await library.add(Song(sheet=Blob(b"s")), Item(preview=Blob(b"p")))
        async with library.session.begin() as session:
            await session.execute(sa.delete(Song))

        assert await library.check() == [b"p"]

    async def test_upsert(self, library: Library) -> None:
        """An upsert that carries a blob is refused before it is sent."""
        module = __import__(f"sqlalchemy.dialects.{library.engine.dialect.name}", fromlist="x")
        await library.add(Doc(name="a", body=Blob(b"1")))
        async with library.session() as session:
            statement = module.insert(Doc).on_conflict_do_nothing()
            with pytest.raises(UnsafeTransactionError, match="upsert"):
                await session.execute(statement, [{"name": "a", "body": Blob(b"2")}])
            await session.commit()

        assert await library.check() == [b"1"]

    async def test_insert_from_select(self, library: Library) -> None:
        """INSERT .. SELECT of a managed column is refused."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        async with library.session() as session:
            select = sa.select(Doc.name + "2", Doc.body)
            with pytest.raises(UnsafeTransactionError, match="SELECT"):
                await session.execute(sa.insert(Doc).from_select(["name", "body"], select))

        assert await library.check() == [b"1"]

    async def test_a_failed_insert_is_not_committed(self, library: Library) -> None:
        """A bulk statement that failed with uploads in it forbids COMMIT, unless undone."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        rows = [{"name": "b", "body": Blob(b"2")}, {"name": "a", "body": Blob(b"3")}]
        async with library.session() as session:
            with pytest.raises(IntegrityError):
                await session.execute(sa.insert(Doc), rows)
            with pytest.raises(TransactionAbortedError):
                await session.commit()
        assert await library.check() == [b"1"]
        async with library.session.begin() as session:
            session.add(Doc(name="c", body=Blob(b"4")))
            with pytest.raises(IntegrityError):
                async with session.begin_nested():
                    await session.execute(sa.insert(Doc), rows)

        assert await library.check() == [b"1", b"4"]

    @pytest.mark.parametrize("body", [b"2", None])
    async def test_a_missing_row(self, library: Library, body: bytes | None) -> None:
        """SQLAlchemy may find fault when the other rows are changed: then COMMIT is forbidden."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        rows = [{"name": name, "body": body and Blob(body)} for name in ("a", "missing")]
        async with library.session() as session:
            if library.database.name == "postgresql":  # its driver counts no rows of a list
                await session.execute(sa.update(Doc), rows)
                await session.commit()
                assert await library.check() == ([body] if body else [])
                return
            with pytest.raises(sa.orm.exc.StaleDataError):
                await session.execute(sa.update(Doc), rows)
            with pytest.raises(TransactionAbortedError, match="half-way"):
                await session.commit()

        assert await library.check() == [b"1"]

    async def test_an_error_before_it_was_sent(self, library: Library) -> None:
        """A statement that never reached the database forbids nothing, and keeps nothing."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        rows: list[dict[str, Any]] = [
            {"name": "a", "body": Blob(b"2")},
            {"name": "b", "body": "a string"},
        ]
        async with library.session() as session:
            with pytest.raises(StatementError, match="a string"):
                await session.execute(sa.insert(Doc), rows)
            session.add(Doc(name="c", body=Blob(b"3")))
            await session.commit()

        assert await library.check() == [b"1", b"3"]

    async def test_a_row_without_its_key(self, library: Library) -> None:
        """The error is SQLAlchemy's, and nothing is kept."""
        async with library.session.begin() as session:
            with pytest.raises(sa.exc.InvalidRequestError, match="primary key"):
                await session.execute(sa.update(Doc), [{"body": Blob(b"1")}])

        assert await library.check() == []

    async def test_a_swap_keeps_nothing_of_other_rows(self, library: Library) -> None:
        """What a bulk UPDATE copies is seen, so that other rows' old objects go."""
        await library.add(
            Doc(name="a", body=Blob(b"1")), Doc(name="b", body=Blob(b"2"), scan=Blob(b"3"))
        )
        async with library.session.begin() as session:
            (await session.get_one(Doc, "a")).body = Blob(b"4")
            await session.execute(
                sa.update(Doc).where(Doc.name == "b").values(body=Doc.scan, scan=Doc.body)
            )

        assert await library.check() == [b"2", b"3", b"4"]


class TestRefusals:
    """What would store a value that was not uploaded."""

    async def test_a_plain_session(self, library: Library) -> None:
        """A session that does not upload fails loudly."""
        async with AsyncSession(library.engine) as session:
            session.add(Doc(name="d", body=Blob(b"1")))
            with pytest.raises(StatementError, match="blob_sessionmaker") as caught:
                await session.commit()

        assert isinstance(caught.value.orig, BlobNotUploadedError)
        assert await library.check() == []

    async def test_core_and_legacy_bulk(self, library: Library) -> None:
        """Paths that pass the session by are refused by the column's type."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        table: Any = Doc.__table__
        async with library.session() as session:
            for value in (Blob(b"2"), doc.body, "s3://bucket/prefix/x", b"bytes"):
                with pytest.raises(StatementError):
                    await session.execute(sa.insert(table), {"name": "e", "body": value})
            with pytest.raises(StatementError):
                await session.run_sync(
                    lambda sync: sync.bulk_save_objects([Doc(name="f", body=Blob(b"3"))])
                )

        assert await library.check() == [b"1"]

    async def test_two_new_objects_in_place_of_a_deleted_one(self, library: Library) -> None:
        """SQLAlchemy would update the row twice, and nobody would know the first one's object."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        async with library.session() as session:
            await session.delete(await session.get_one(Doc, "d"))
            session.add_all([Doc(name="d", body=Blob(b"2")), Doc(name="d", body=Blob(b"3"))])
            with pytest.raises(UnsafeTransactionError, match="primary key"):
                await session.commit()

        assert await library.check() == [b"1"]

    async def test_a_string(self, library: Library) -> None:
        """A string is refused at the flush; nothing is sent."""
        async with library.session() as session:
            session.add(Doc(name="d", body="s3://bucket/prefix/x", scan=Blob(b"1")))
            with pytest.raises(InvalidSourceError, match="to_values"):
                await session.commit()

        assert library.store.calls == []

    async def test_an_event_that_assigns_after_the_uploads(self, library: Library) -> None:
        """A blob that a mapper's event assigns is refused, and the flush undone."""

        def assign(_mapper: object, _connection: object, target: Doc) -> None:
            target.scan = Blob(b"late")

        sa.event.listen(Doc, "before_insert", assign)
        try:
            with pytest.raises(StatementError, match="an event"):
                await library.add(Doc(name="d", body=Blob(b"1")))
        finally:
            sa.event.remove(Doc, "before_insert", assign)

        assert await library.check() == []


class TestUploadAhead:
    """``upload_blobs``: before the transaction, with the same ownership."""

    async def test_written_by_the_next_transaction(self, library: Library) -> None:
        """The flush does not upload again."""
        async with library.session() as session:
            doc = Doc(name="d", body=Blob(b"1"), scan=Blob(b"2"))
            await upload_blobs(session, doc)
            assert requests(library, "put") == 2
            assert not session.in_transaction()
            session.add(doc)
            await session.commit()

        assert requests(library, "put") == 2
        assert await library.check() == [b"1", b"2"]

    async def test_never_written(self, library: Library) -> None:
        """A session that is closed, or commits something else, keeps nothing of it."""
        async with library.session() as session:
            await upload_blobs(session, Doc(name="d", body=Blob(b"1")))
        assert await library.check() == []
        async with library.session() as session:
            await upload_blobs(session, doc := Doc(name="d", body=Blob(b"1")))
            session.add(Doc(name="e", body=Blob(b"2")))
            await session.commit()
            assert await library.check() == [b"2"]
            assert doc.body is not None
            assert not doc.body.is_stored
            session.add(doc)
            await session.commit()

        assert await library.check() == [b"1", b"2"]

    async def test_assigned_elsewhere_afterwards(self, library: Library) -> None:
        """A blob that was uploaded for one cell and lands in another is made anew."""
        async with library.session() as session:
            doc = Doc(name="d", body=Blob(b"1"))
            await upload_blobs(session, doc)
            doc.scan, doc.body = doc.body, None
            session.add(doc)
            await session.commit()

        assert await library.check() == [b"1"]

    async def test_replaces_a_loaded_one(self, library: Library) -> None:
        """Of a row that is there already the old object goes with the commit."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        doc.body = Blob(b"2")
        async with library.session() as session:
            await upload_blobs(session, doc)
            session.add(doc)
            await session.commit()

        assert await library.check() == [b"2"]


class TestExplicitBeside:
    """The explicit strength on the same rows."""

    async def test_enlist(self, library: Library) -> None:
        """A result is settled by whoever commits the session, beside managed blobs."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        assert doc.body is not None
        put = await put_s3(
            pk="d", api_calls=[PutS3ApiCall("body", b"2", doc.body.uri)], store=library.store
        )
        async with library.session.begin() as session:
            await enlist(session, put)
            await session.execute(sa.update(Doc).where(Doc.name == "d").values(**put.to_values()))
            session.add(Doc(name="e", body=Blob(b"3")))

        assert await library.check() == [b"2", b"3"]

    async def test_enlisted_attributes(self, library: Library) -> None:
        """The strings of an enlisted result may be assigned to managed attributes."""
        put = await put_s3(
            pk="d", api_calls=[PutS3ApiCall("body", b"2", None)], store=library.store
        )
        async with library.session() as session:
            await enlist(session, put)
            session.add(Doc(name="d", **put.to_values()))
            await session.rollback()
        assert await library.check() == []
        put = await put_s3(
            pk="d", api_calls=[PutS3ApiCall("body", b"2", None)], store=library.store
        )
        async with library.session.begin() as session:
            await enlist(session, put)
            session.add(Doc(name="d", **put.to_values()))

        assert await library.check() == [b"2"]

    async def test_blob_transaction_on_a_managed_session(self, library: Library) -> None:
        """The block commits both strengths at once."""
        await library.add(doc := Doc(name="d", body=Blob(b"1"), scan=Blob(b"s")))
        assert doc.body is not None
        async with library.session() as session:
            async with blob_transaction(session, store=library.store) as tx:
                put = await tx.put_s3(pk="d", api_calls=[PutS3ApiCall("body", b"2", doc.body.uri)])
                found = await session.get_one(Doc, "d")
                found.scan = Blob(b"t")
                await session.execute(
                    sa.update(Doc).where(put.guard(Doc)).values(**put.to_values())
                )

        assert await library.check() == [b"2", b"t"]

    async def test_a_failed_block_on_a_managed_session(self, library: Library) -> None:
        """The block rolls both back."""
        await library.add(Doc(name="d", scan=Blob(b"s")))
        async with library.session() as session:
            with pytest.raises(AbortError):
                async with blob_transaction(session, store=library.store) as tx:
                    put = await tx.put_s3(pk="d", api_calls=[PutS3ApiCall("body", b"2", None)])
                    found = await session.get_one(Doc, "d")
                    found.scan = Blob(b"t")
                    await session.execute(sa.update(Doc).values(**put.to_values()))
                    raise AbortError

        assert await library.check() == [b"s"]


class TestTwoSessions:
    """Two sessions that replace the same row at the same time."""

    async def test_one_order_or_the_other(self, library: Library) -> None:
        """Both succeed, one after the other, and one object is left."""
        await library.add(Doc(name="d", body=Blob(b"0")))

        async def replace(body: bytes) -> None:
            async with library.session.begin() as session:
                await session.execute(sa.text("SELECT 1"))
                doc = Doc(name="d")
                sa.orm.make_transient_to_detached(doc)
                session.add(doc)
                doc.body = Blob(body)

        await asyncio.gather(*(replace(b"%d" % n) for n in range(1, 9)))

        assert len(await library.check()) == 1

    async def test_replace_beside_delete(self, library: Library) -> None:
        """A row that was deleted meanwhile leaves neither object."""
        await library.add(Doc(name="d", body=Blob(b"0")))
        async with library.session() as first, library.session() as second:
            one, two = await first.get_one(Doc, "d"), await second.get_one(Doc, "d")
            await first.commit()
            await second.commit()
            one.body = Blob(b"1")
            await second.delete(two)
            await second.commit()
            with pytest.raises(sa.orm.exc.StaleDataError):
                await first.commit()

        assert await library.check() == []


class TestReports:
    """What the clean-up did."""

    async def test_a_delete_that_fails(self, library: Library) -> None:
        """The commit succeeds, and the report names the object."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        assert doc.body is not None
        old = doc.body.uri
        library.store.refuses[old] = "AccessDenied"
        async with library.session() as session:
            session.add(doc)
            doc.body = Blob(b"2")
            await session.commit()
            assert blob_report(session).failed == {old: "AccessDenied"}

        assert await library.check(orphans=(old,)) == [b"2"]

    async def test_background(self, database: Database) -> None:
        """Superseded objects go after the commit has returned; closing the store waits for it."""
        async with MemoryStore() as store, open_library(database, store) as warm:
            await warm.add(Doc(name="d", body=Blob(b"1")))
            library = Library(database, store, background=True)
            gate = store.hold("delete")
            async with library.session.begin() as session:
                (await session.get_one(Doc, "d")).body = Blob(b"2")
            assert len(store.objects) == 2
            gate.open()
        assert len(store.objects) == 1
