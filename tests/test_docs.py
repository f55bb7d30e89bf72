"""The pages in docs/: every code block runs, and every row of their tables has its test.

How blocks are named and run is said in `support.pages`. The examples stand on the README's model
of managed columns.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import StaleDataError
from support.databases import Database, open_sqlite
from support.library import Album, Doc, Library, Song, open_library
from support.pages import PNG, README, ROOT, Block, Page, check_claims
from support.postgres_proxy import CutMode, postgres_proxy

from aioblobcol import (
    Blob,
    BlobNotFoundError,
    BlobType,
    CommitOutcomeUnknown,
    TransactionAbortedError,
    UnsafeTransactionError,
    blob_report,
    blob_sessionmaker,
    track_blobs,
)
from aioblobcol.testing import MemoryStore, S3Server, Step, assert_consistent

TRANSACTIONS = Page(ROOT / "docs/transactions.md")


# --- where the blocks run ----------------------------------------------------------------------


class Place:
    """The names that a reader has in front of them, and both stores."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.engine: AsyncEngine = names["engine"]
        self.store: MemoryStore = names["store"]

    async def run(self, block: Block, **hidden: Any) -> None:
        self.names.update(hidden)
        await block.execute(self.names)

    async def add(self, *urls: str, **blobs: bytes) -> None:
        """Commit rows with blobs of the given bytes."""
        async with self.names["Session"].begin() as session:
            for url in urls:
                values = {
                    column: Blob(body, content_type="image/png") for column, body in blobs.items()
                }
                session.add(self.names["Task"](url=url, **values))

    async def contents(self, *, orphans: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the bytes of every row, after asking whether both stores agree."""
        task = self.names["Task"]
        found = await assert_consistent(
            self.store, self.engine, [task.html, task.image], orphans=orphans
        )
        async with self.engine.connect() as connection:
            rows = await connection.execute(sa.select(task.url, task.html, task.image))
            return {
                url: tuple(found[each.uri] if each is not None else None for each in cells)
                for url, *cells in rows
            }

    def requests(self, operation: str) -> int:
        return sum(name == operation for name, _ in self.store.calls)


@pytest_asyncio.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    """Give the README's managed model on a SQLite file, with a store in memory."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs", "page": b"<p>", "picture": PNG, "url": "u"}
    await README.block("managed").execute(names)
    async with names["engine"].begin() as connection:
        await connection.run_sync(names["Base"].metadata.create_all)
    async with MemoryStore(bucket="my-bucket", prefix="tasks") as store:
        names["store"] = store
        names["Session"] = names["blob_sessionmaker"](names["engine"], store)
        yield Place(names)
    await names["engine"].dispose()


@pytest_asyncio.fixture
async def library(database: Database, memory_store: MemoryStore) -> AsyncIterator[Library]:
    async with open_library(database, memory_store) as opened:
        yield opened


# --- the whole ---------------------------------------------------------------------------------


class TestPage:
    def test_every_block_has_a_runner(self) -> None:
        """No block goes untested, and no test runs a block that is not there."""
        assert sorted(TRANSACTIONS.runners) == sorted(block.name for block in TRANSACTIONS.blocks)

    def test_links_lead_somewhere(self) -> None:
        """Every link names a file of the project, and a heading where it says so."""
        TRANSACTIONS.check_links()


# --- the blocks --------------------------------------------------------------------------------


class TestBlocks:
    @TRANSACTIONS.runs("again")
    async def test_again(self, block: Block, place: Place) -> None:
        """What was refused is uploaded anew, and the first row is untouched."""
        await place.add("u", html=b"1")
        await place.run(block)

        assert await place.contents() == {"u": (b"1", None), "u-2": (b"<p>", None)}

    @TRANSACTIONS.runs("unknown")
    async def test_unknown(
        self, block: Block, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The row tells whether it was committed; meanwhile nothing was deleted."""
        dialect = place.engine.sync_engine.dialect
        carry_out = dialect.do_commit

        def lose_the_answer(connection: Any) -> None:
            monkeypatch.undo()
            carry_out(connection)
            raise sqlite3.ProgrammingError("Cannot operate on a closed database.")

        cwd = Path.cwd()
        monkeypatch.setattr(dialect, "do_commit", lose_the_answer)
        await place.run(block)
        monkeypatch.chdir(cwd)

        assert place.names["was_committed"] is True
        assert not place.names["task"].html.is_stored
        assert await place.contents() == {"u": (b"<p>", None)}

    @TRANSACTIONS.runs("savepoints")
    async def test_savepoints(self, block: Block, place: Place) -> None:
        """The bad row is left out, and so is its object."""
        await place.add("b", html=b"1")
        await place.run(block, names=["a", "b", "c"])

        assert await place.contents() == {
            "a": (b"<p>", None),
            "b": (b"1", None),
            "c": (b"<p>", None),
        }
        assert place.requests("put") == 4

    @TRANSACTIONS.runs("autoflush")
    async def test_autoflush(self, block: Block, place: Place) -> None:
        """A query uploads, one without autoflush does not, and uploading ahead happens once."""
        await place.run(block)

        assert (place.names["count"], place.names["same"]) == (1, 1)
        assert place.requests("put") == 3
        assert sorted(await place.contents()) == ["a", "b", "c"]

    @TRANSACTIONS.runs("swap")
    async def test_swap(self, block: Block, place: Place) -> None:
        """Copies are made by the server, and every cell has an object of its own."""
        await place.add("a", html=b"1", image=PNG)
        await place.add("b", html=b"2")
        place.store.calls.clear()
        await place.run(block)

        assert place.requests("copy") == 3
        assert await place.contents() == {
            "a": (b"2", None),
            "b": (b"1", PNG),
            "c": (b"<p>", None),
            "d": (b"<p>", None),
        }

    @TRANSACTIONS.runs("delete-again")
    async def test_delete_again(self, block: Block, place: Place) -> None:
        """The new row has a copy; the old objects are gone."""
        await place.add("u", html=b"1", image=PNG)
        await place.run(block)

        assert place.requests("copy") == 1
        assert await place.contents() == {"u": (b"1", None)}

    @TRANSACTIONS.runs("bulk-savepoint")
    @pytest.mark.parametrize(("names", "rows"), [("ab", {"a", "b", "log"}), ("aa", {"log"})])
    async def test_bulk_savepoint(
        self, block: Block, place: Place, names: str, rows: set[str]
    ) -> None:
        """All of the rows are there, or none with its objects; the rest is committed."""
        await place.run(block, names=list(names))

        assert (await place.contents()).keys() == rows

    @TRANSACTIONS.runs("joined")
    async def test_joined(self, block: Block, place: Place) -> None:
        """The owner's rollback takes the row and its object."""
        await place.run(block)
        assert place.requests("put") == 1
        await place.store.runtime.background.drain()

        assert await place.contents() == {}

    @TRANSACTIONS.runs("enlist")
    async def test_enlist(self, block: Block, place: Place) -> None:
        """One commit for a result, a blob and a block."""
        commits: list[object] = []
        sa.event.listen(place.engine.sync_engine, "commit", commits.append)
        await place.run(block)

        assert len(commits) == 1
        assert await place.contents() == dict.fromkeys("abc", (b"<p>", None))

    @TRANSACTIONS.runs("sqlite")
    async def test_sqlite(self, block: Block, place: Place) -> None:
        """Savepoints work in what was equipped."""
        await place.run(block)
        async with place.names["Tracked"].begin() as session:
            session.add(place.names["Task"](url="a", html=Blob(b"1")))
            async with session.begin_nested() as savepoint:
                session.add(place.names["Task"](url="b", html=Blob(b"2")))
                await session.flush()
                await savepoint.rollback()

        assert await place.contents() == {"a": (b"1", None)}

    @TRANSACTIONS.runs("report")
    async def test_report(
        self, block: Block, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The old object is reported as deleted."""
        await place.add("u", html=b"1")
        await place.run(block)

        assert capsys.readouterr().out == "1 {}\n"
        assert await place.contents() == {"u": (b"<p>", None)}


class TestReport:
    async def test_in_the_background(self, library: Library) -> None:
        """The report grows; what a rolled-back transaction has made is not left for later."""
        in_background = blob_sessionmaker(library.engine, library.store, background=True)
        await library.add(Doc(name="d", body=Blob(b"1")))
        gate = library.store.hold("delete")
        async with in_background() as session:
            (await session.get_one(Doc, "d")).body = Blob(b"2")
            await session.commit()
            assert blob_report(session).deleted == ()
            gate.open()
            await library.store.runtime.background.drain()
            assert len(blob_report(session).deleted) == 1

            session.add(Doc(name="e", body=Blob(b"3")))
            await session.flush()
            await session.rollback()
            assert await library.check() == [b"2"]


class TestFastAPI:
    @TRANSACTIONS.runs("fastapi")
    async def test_commits_before_the_response(self, block: Block, place: Place) -> None:
        """With the scope of the function the row is committed before the response is sent."""
        await place.run(block)

        assert await self._order(place) == ["commit", "response"]
        assert await place.contents() == {"u": (b"<p>", None)}

    async def test_without_the_scope(self, place: Place) -> None:
        """By default the client has its answer before COMMIT, and before the upload."""
        block = TRANSACTIONS.block("fastapi")
        text = block.text.replace(', scope="function"', "")
        assert text != block.text
        await place.run(Block(block.path, block.name, block.language, text, block.line))

        assert await self._order(place) == ["response", "commit"]
        assert await place.contents() == {"u": (b"<p>", None)}

    @pytest.mark.parametrize("scope", ["function", "request"])
    async def test_an_error_in_the_handler(self, place: Place, scope: str) -> None:
        """An exception of the handler rolls back."""
        block = TRANSACTIONS.block("fastapi")
        text = block.text.replace('"function"', f'"{scope}"') + (
            "\n    await session.flush()"
            "\n    from fastapi import HTTPException"
            "\n    raise HTTPException(400)"
        )
        await place.run(Block(block.path, block.name, block.language, text, block.line))
        status = await self._post(place)

        assert status == 400
        assert place.requests("put") == 1
        assert await place.contents() == {}

    async def _order(self, place: Place) -> list[str]:
        """Send a request and tell what came first: COMMIT, or the head of the response."""
        seen: list[str] = []
        sa.event.listen(place.engine.sync_engine, "commit", lambda _: seen.append("commit"))
        assert await self._post(place, seen) == 201
        return seen

    async def _post(self, place: Place, seen: list[str] | None = None) -> int:
        app = place.names["app"]

        async def outer(scope: Any, receive: Any, send: Any) -> None:
            async def sending(message: Any) -> None:
                if seen is not None and message["type"] == "http.response.start":
                    seen.append("response")
                await send(message)

            await app(scope, receive, sending)

        transport = httpx.ASGITransport(app=outer)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answered = await client.post(
                "/tasks", params={"url": "u"}, files={"html": ("a.html", b"<p>", "text/html")}
            )
        return answered.status_code


# --- the ways to end ---------------------------------------------------------------------------

MANAGED = "consistency/test_managed_sessions.py"
CANCELLED = "consistency/test_managed_cancellation.py"
HOOKS = "consistency/test_managed_hooks.py"
HERE = "test_docs.py"
SHOWN_BY = {
    "`commit()`, or a `begin()` block that was left": [
        (MANAGED, "test_create_replace_empty_delete"),
        (MANAGED, "test_released_and_committed"),
    ],
    "`rollback()`": [(MANAGED, "test_rollback")],
    "`close()` without a commit, or the session's block was left": [
        (MANAGED, "test_close_without_commit")
    ],
    "The block raises": [(MANAGED, "test_an_error_in_the_block")],
    "The session is dropped without any of these": [(MANAGED, "test_a_dropped_session")],
    "An upload of a flush fails": [(MANAGED, "test_an_upload_that_fails")],
    "A statement of a flush fails (`IntegrityError`, ...)": [
        (MANAGED, "test_integrity_error"),
        (HERE, "test_a_flush_that_failed_is_undone_with_its_session"),
    ],
    "A statement fails and its error is swallowed (PostgreSQL)": [
        (MANAGED, "test_a_swallowed_error")
    ],
    "The database refuses COMMIT (a deferred constraint, a serialization failure)": [
        (MANAGED, "test_a_deferred_constraint"),
        (HERE, "test_a_serialization_failure"),
    ],
    "Cancelled before or during an upload, or during a statement": [
        (CANCELLED, "test_at_every_await"),
        (CANCELLED, "test_while_a_request_is_on_the_wire"),
    ],
    "Cancelled during COMMIT, ROLLBACK or the clean-up": [
        (MANAGED, "test_a_cancelled_commit_is_run_to_its_end"),
        (CANCELLED, "test_at_every_await"),
        (CANCELLED, "test_while_a_request_is_on_the_wire"),
    ],
    "The answer to COMMIT is lost": [(MANAGED, "test_nothing_is_deleted")],
    "Two-phase commit": [(HERE, "test_two_phase")],
    "Two-phase commit, prepared, and the second phase was not acknowledged": [
        (HERE, "test_the_second_phase_fails")
    ],
    "A `COMMIT` that is sent as text": [(HERE, "test_a_text_commit")],
    "The engine or connection is in AUTOCOMMIT": [(MANAGED, "test_autocommit")],
    "The plain session is committed in `run_sync`": [(MANAGED, "test_run_sync")],
    "`async_scoped_session`: `commit()`, or `remove()` without one": [
        (MANAGED, "test_async_scoped_session")
    ],
    "The process is killed before COMMIT": [(HERE, "test_a_killed_process")],
    "The process is killed after COMMIT": [(HERE, "test_a_killed_process")],
}


class TestEnds:
    def test_every_row_of_the_table_has_its_tests(self) -> None:
        """Each row is shown by tests that are there, and no row is without one."""
        shown_by = {end.strip("`"): tests for end, tests in SHOWN_BY.items()}

        check_claims(TRANSACTIONS, "The end", shown_by)

    async def test_a_flush_that_failed_is_undone_with_its_session(self, library: Library) -> None:
        """Its objects are deleted when the session is rolled back, not before."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        async with library.session() as session:
            session.add(Doc(name="d", body=Blob(b"2")))
            with pytest.raises(IntegrityError):
                await session.flush()
            assert len(library.store.objects) == 2
            await session.rollback()
            assert len(library.store.objects) == 1

        assert await library.check() == [b"1"]

    async def test_a_serialization_failure(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """PostgreSQL refuses the later one of two serializable writers: undone."""
        async with open_library(postgres, memory_store) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            engine = postgres.engine_with(isolation_level="SERIALIZABLE")
            sessions = blob_sessionmaker(engine, memory_store)
            async with sessions() as late, sessions() as early:
                one, two = await late.get_one(Doc, "d"), await early.get_one(Doc, "d")
                two.body = Blob(b"2")
                await early.commit()
                one.body = Blob(b"3")
                with pytest.raises(sa.exc.DBAPIError, match="serialize"):
                    await late.commit()
            await engine.dispose()

            assert await library.check() == [b"2"]

    async def test_two_phase(self, postgres: Database, memory_store: MemoryStore) -> None:
        """A second phase that was acknowledged is a commit."""
        async with open_library(postgres, memory_store, twophase=True) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            async with library.session.begin() as session:
                (await session.get_one(Doc, "d")).body = Blob(b"2")

            assert await library.check() == [b"2"]

    async def test_the_second_phase_fails(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """Prepared, and no answer to the second phase: unknown, nothing is deleted."""

        def fail(_connection: sa.Connection, _xid: object, _is_prepared: bool) -> None:
            raise RuntimeError("wire cut")

        async with open_library(postgres, memory_store, twophase=True) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            sa.event.listen(postgres.engine.sync_engine, "commit_twophase", fail)
            with pytest.raises(CommitOutcomeUnknown) as caught:
                async with library.session.begin() as session:
                    (await session.get_one(Doc, "d")).body = Blob(b"2")
            sa.event.remove(postgres.engine.sync_engine, "commit_twophase", fail)
            assert len(memory_store.objects) == 2
            await roll_back_prepared(postgres.engine)

            assert await library.check(orphans=caught.value.created) == [b"1"]

    async def test_prepared_and_rolled_back(
        self, postgres: Database, memory_store: MemoryStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Rolled back after PREPARE: not certain, so nothing is deleted, and the log tells."""
        async with open_library(postgres, memory_store, twophase=True) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            async with library.session() as session:
                doc = await session.get_one(Doc, "d")
                doc.body = Blob(b"2")
                await session.flush()
                uri = doc.body.uri
                await session.run_sync(lambda sync: sync.prepare())
                await session.rollback()

            assert await library.check(orphans=(uri,)) == [b"1"]
            assert [record.name for record in caplog.records if uri in record.getMessage()] == [
                "aioblobcol.session"
            ]

    async def test_a_text_commit(self, library: Library, caplog: pytest.LogCaptureFixture) -> None:
        """Nobody knows what it has committed: nothing is deleted, and the log tells."""
        await library.add(old := Doc(name="d", body=Blob(b"1")))
        async with library.session() as session:
            (await session.get_one(Doc, "d")).body = Blob(b"2")
            await session.flush()
            await session.execute(sa.text("COMMIT"))
            await session.commit()

        assert old.body is not None
        assert await library.check(orphans=(old.body.uri,)) == [b"2"]
        assert [
            record.name for record in caplog.records if old.body.uri in record.getMessage()
        ] == ["aioblobcol.session"]

    async def test_cancelled_in_run_sync(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """Code that commits the plain session is cancelled in COMMIT: unknown, none deleted."""
        async with open_library(postgres, memory_store) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            async with postgres_proxy(postgres.url) as proxy:
                engine = create_async_engine(proxy.url)
                sessions = blob_sessionmaker(engine, memory_store)

                async def replace() -> None:
                    async with sessions() as session:
                        (await session.get_one(Doc, "d")).body = Blob(b"2")
                        await session.flush()
                        proxy.mode = "hold_reply"
                        await session.run_sync(Session.commit)

                task = asyncio.create_task(replace())
                await proxy.commit_arrived.wait()
                task.cancel()
                proxy.release.set()
                with pytest.raises(asyncio.CancelledError) as caught:
                    await task
                await engine.dispose()

            unknown = caught.value.__cause__
            assert isinstance(unknown, CommitOutcomeUnknown)
            left = unknown.superseded if await library.read(Doc, "d") == b"2" else unknown.created
            await library.check(orphans=left)


async def roll_back_prepared(engine: AsyncEngine) -> None:
    """Do what an operator does, who looks after two-phase commits."""
    async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        left = await connection.scalars(sa.text("SELECT gid FROM pg_prepared_xacts"))
        for gid in left.all():
            await connection.exec_driver_sql(f"ROLLBACK PREPARED '{gid}'")


KILLED = """
import asyncio, os, signal, sys

from sqlalchemy.ext.asyncio import create_async_engine
from support.library import Doc

from aioblobcol import Blob, blob_sessionmaker, open_store

moment, url, bucket, prefix = sys.argv[1:]

def die(**_):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    engine = create_async_engine(url)
    async with open_store(bucket=bucket, prefix=prefix) as store:
        async with blob_sessionmaker(engine, store)() as session:
            (await session.get_one(Doc, "d")).body = Blob(b"new")
            await session.flush()
            if moment == "before":
                die()
            store.client.meta.events.register("before-call.s3.DeleteObject", die)
            await session.commit()

asyncio.run(main())
"""


@pytest.mark.parametrize(("moment", "kept"), [("before", b"old"), ("after", b"new")])
async def test_a_killed_process(s3: S3Server, sqlite: Database, moment: str, kept: bytes) -> None:
    """Before COMMIT the new object is an orphan, after COMMIT the old one; nothing is lost."""
    bucket = f"killed-{moment}"
    async with s3.open_store(bucket=bucket, prefix="docs") as store:
        await store.client.create_bucket(Bucket=bucket)
        async with open_library(sqlite, store) as library:
            await library.add(doc := Doc(name="d", body=Blob(b"old")))
            given = s3.client_arguments
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", KILLED, moment, sqlite.url, bucket, "docs"),
                env={
                    **os.environ,
                    "AWS_ENDPOINT_URL_S3": s3.endpoint_url,
                    "AWS_ACCESS_KEY_ID": given["aws_access_key_id"],
                    "AWS_SECRET_ACCESS_KEY": given["aws_secret_access_key"],
                    "AWS_DEFAULT_REGION": given["region_name"],
                    "NO_PROXY": "127.0.0.1",
                    "PYTHONPATH": str(ROOT / "tests"),
                },
            )
            assert await process.wait() == -signal.SIGKILL
            assert doc.body is not None
            present = {uri async for uri in store.iter_uris()}
            (new,) = present - {doc.body.uri}

            orphan = new if moment == "before" else doc.body.uri
            assert await library.check(orphans=(orphan,)) == [kept]


# --- what else is said -------------------------------------------------------------------------


class TestDeleting:
    async def test_two_in_the_place_of_one(self, library: Library) -> None:
        """Two new objects with the key of one that is deleted in the same flush are refused."""
        await library.add(song := Song(preview=Blob(b"1")))
        library.store.calls.clear()
        async with library.session() as session:
            await session.delete(await session.get_one(Song, song.id))
            session.add_all([Song(id=song.id, preview=Blob(b"%d" % n)) for n in (2, 3)])
            with pytest.raises(UnsafeTransactionError, match="flush in between"):
                await session.commit()

        assert library.store.calls == []
        assert await library.check() == [b"1"]


class TestBulk:
    async def test_a_stale_row_forbids_commit(
        self, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """StaleDataError of a list by primary key comes after the statement was carried out."""
        async with open_library(sqlite, memory_store) as library:
            await library.add(Doc(name="a", body=Blob(b"1")))
            async with library.session() as session:
                with pytest.raises(StaleDataError):
                    await session.execute(sa.update(Doc), self.rows())
                with pytest.raises(TransactionAbortedError):
                    await session.commit()
            assert await library.check() == [b"1"]
            async with library.session.begin() as session:
                session.add(Doc(name="b", body=Blob(b"3")))
                with pytest.raises(StaleDataError):
                    async with session.begin_nested():
                        await session.execute(sa.update(Doc), self.rows())

            assert await library.check() == [b"1", b"3"]

    async def test_a_stale_row_that_the_driver_does_not_tell(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """Its upload goes at the end."""
        async with open_library(postgres, memory_store) as library:
            await library.add(Doc(name="a", body=Blob(b"1")))
            async with library.session.begin() as session:
                await session.execute(sa.update(Doc), self.rows())

            assert await library.check() == [b"2"]

    def rows(self) -> list[dict[str, Any]]:
        return [{"name": name, "body": Blob(b"2")} for name in ("a", "nobody")]

    async def test_changed_keys(self, library: Library) -> None:
        """Primary keys and managed columns in one UPDATE are refused, also at COMMIT."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        async with library.session() as session:
            statement = sa.update(Doc).values(name="b", body=Blob(b"2"))
            with pytest.raises(UnsafeTransactionError, match="two statements"):
                await session.execute(statement)
            with pytest.raises(UnsafeTransactionError, match="two statements"):
                await session.commit()

        assert await library.check() == [b"1"]


class CascadeBase(DeclarativeBase):
    pass


class Owner(CascadeBase):
    __tablename__ = "docs_owners"

    name: Mapped[str] = mapped_column(primary_key=True)


class Owned(CascadeBase):
    __tablename__ = "docs_owned"

    name: Mapped[str] = mapped_column(
        sa.ForeignKey("docs_owners.name", ondelete="CASCADE"), primary_key=True
    )
    body: Mapped[Blob | None] = mapped_column(BlobType())


EMPTY_ALL = {
    "sqlite": [
        "CREATE TRIGGER empty_docs AFTER INSERT ON albums BEGIN UPDATE docs SET body = NULL; END"
    ],
    "postgresql": [
        """CREATE FUNCTION empty_docs() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN UPDATE docs SET body = NULL; RETURN NULL; END $$""",
        """CREATE TRIGGER empty_docs AFTER INSERT ON albums
        FOR EACH ROW EXECUTE FUNCTION empty_docs()""",
    ],
}
TABLE: Any = Doc.__table__


def upsert(library: Library) -> Any:
    module = __import__(f"sqlalchemy.dialects.{library.engine.dialect.name}", fromlist="x")
    insert = module.insert(Doc).values(name="d")
    return insert.on_conflict_do_update(index_elements=["name"], set_={"body": None})


class TestWhatIsNotSeen:
    @pytest.mark.parametrize(
        "statement",
        [
            lambda _: sa.delete(TABLE),
            lambda _: sa.update(TABLE).values(body=None),
            lambda _: sa.text("DELETE FROM docs"),
            lambda _: sa.text("UPDATE docs SET body = NULL"),
            upsert,
        ],
        ids=["Core delete", "Core update", "text delete", "text update", "upsert"],
    )
    async def test_statements(self, library: Library, statement: Any) -> None:
        """What they overwrite or delete becomes an orphan."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        assert doc.body is not None
        async with library.session.begin() as session:
            await session.execute(statement(library))

        assert await library.check(orphans=(doc.body.uri,)) == []

    async def test_legacy_bulk_methods(self, library: Library) -> None:
        """What they overwrite becomes an orphan."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        assert doc.body is not None
        async with library.session.begin() as session:
            await session.run_sync(
                lambda sync: sync.bulk_update_mappings(Doc, [{"name": "d", "body": None}])
            )

        assert await library.check(orphans=(doc.body.uri,)) == []

    async def test_sessions_that_do_not_upload(self, library: Library) -> None:
        """What they overwrite becomes an orphan."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        assert doc.body is not None
        async with AsyncSession(library.engine) as session:
            (await session.get_one(Doc, "d")).body = None
            await session.commit()

        assert await library.check(orphans=(doc.body.uri,)) == []

    async def test_triggers(self, library: Library) -> None:
        """What they overwrite becomes an orphan."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        assert doc.body is not None
        async with library.session.begin() as session:
            for line in EMPTY_ALL[library.engine.dialect.name]:
                await session.execute(sa.text(line))
        try:
            await library.add(Album())
        finally:
            async with library.engine.begin() as connection:
                is_sqlite = library.database.is_sqlite
                where, function = ("", "") if is_sqlite else (" ON albums", "empty_docs()")
                await connection.execute(sa.text(f"DROP TRIGGER empty_docs{where}"))
                if function:
                    await connection.execute(sa.text(f"DROP FUNCTION {function}"))

        assert await library.check(orphans=(doc.body.uri,)) == []

    async def test_cascades_of_the_database(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """What ON DELETE CASCADE deletes becomes an orphan."""
        async with database.engine.begin() as connection:
            await connection.run_sync(CascadeBase.metadata.create_all)
        try:
            sessions = blob_sessionmaker(database.engine, memory_store)
            async with sessions.begin() as session:
                session.add(Owner(name="d"))
                await session.flush()
                session.add(owned := Owned(name="d", body=Blob(b"1")))
            async with sessions.begin() as session:
                await session.delete(await session.get_one(Owner, "d"))

            assert owned.body is not None
            orphans = (owned.body.uri,)
            found = await assert_consistent(
                memory_store, database.engine, [Owned.body], orphans=orphans
            )
            assert found == {}
        finally:
            async with database.engine.begin() as connection:
                await connection.run_sync(CascadeBase.metadata.drop_all)

    async def test_text_takes_no_blob(self, library: Library) -> None:
        """The driver refuses a `Blob` in text SQL."""
        statement = sa.text("INSERT INTO docs (name, body) VALUES ('e', :body)")
        async with library.session() as session:
            with pytest.raises(sa.exc.DBAPIError):
                await session.execute(statement, {"body": Blob(b"1")})

        assert library.store.calls == []

    @pytest.mark.parametrize("flushed_before", [False, True])
    async def test_copied_by_sql(self, library: Library, flushed_before: bool) -> None:
        """A copy is seen, and the object that it may name is kept."""
        await library.add(doc := Doc(name="d", body=Blob(b"1"), scan=Blob(b"s")))
        assert doc.body is not None
        async with library.session() as session:
            doc = await session.get_one(Doc, "d")
            doc.scan = Blob(b"t")
            if flushed_before:
                await session.flush()
            with session.no_autoflush:
                await session.execute(
                    sa.text("INSERT INTO docs (name, body) SELECT 'copy', body FROM docs")
                )
            old = doc.body
            doc.body = Blob(b"2")
            await session.commit()
            assert old is not None
            assert list(blob_report(session).kept) == [old.uri]

        assert await library.check() == [b"1", b"2", b"t"]


class VersionBase(DeclarativeBase):
    pass


class Versioned(VersionBase):
    __tablename__ = "docs_versioned"

    name: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column()
    body: Mapped[Blob | None] = mapped_column(BlobType())

    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 - as SQLAlchemy documents it


class TestTwoWriters:
    async def test_sqlite_refuses_who_has_read_before(
        self, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """A transaction that read before another one wrote cannot write: undone."""
        async with open_library(sqlite, memory_store) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            async with library.session() as session:
                doc = await session.get_one(Doc, "d")
                async with library.session.begin() as other:
                    (await other.get_one(Doc, "d")).body = Blob(b"2")
                doc.body = Blob(b"3")
                with pytest.raises(OperationalError, match="locked"):
                    await session.commit()

            assert await library.check() == [b"2"]

    async def test_only_one_may_win(self, database: Database, memory_store: MemoryStore) -> None:
        """With a `version_id_col` the second one is told, and its upload is deleted."""
        async with database.engine.begin() as connection:
            await connection.run_sync(VersionBase.metadata.create_all)
        try:
            sessions = blob_sessionmaker(database.engine, memory_store)
            async with sessions.begin() as session:
                session.add(Versioned(name="d", body=Blob(b"1")))
            async with sessions() as first, sessions() as second:
                one, two = [await each.get_one(Versioned, "d") for each in (first, second)]
                await first.commit()
                await second.commit()
                one.body, two.body = Blob(b"2"), Blob(b"3")
                await first.commit()
                with pytest.raises(StaleDataError):
                    await second.commit()

            found = await assert_consistent(memory_store, database.engine, [Versioned.body])
            assert list(found.values()) == [b"2"]
        finally:
            async with database.engine.begin() as connection:
                await connection.run_sync(VersionBase.metadata.drop_all)

    async def test_a_reader_of_a_replaced_row(self, library: Library) -> None:
        """A blob whose row was replaced is not found; read again, it is."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        assert doc.body is not None
        async with library.session.begin() as session:
            (await session.get_one(Doc, "d")).body = Blob(b"2")
        with pytest.raises(BlobNotFoundError):
            await doc.body.read()
        async with library.session() as session:
            session.add(doc)
            await session.refresh(doc)

        assert await doc.body.read() == b"2"


class TestIsolation:
    @TRANSACTIONS.runs("retry")
    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    async def test_retry(self, block: Block, place: Place, postgres_url: str, level: str) -> None:
        """What PostgreSQL refuses with 40001 is repeated, with an upload of its own."""
        engine = create_async_engine(postgres_url, isolation_level=level)
        metadata = place.names["Base"].metadata
        async with engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)
            await connection.run_sync(metadata.create_all)
        place.engine = engine
        place.names["Session"] = blob_sessionmaker(engine, place.store)
        await place.add("u", html=b"1")
        place.store.calls.clear()

        async def disturb(step: Step) -> None:
            if place.requests("put") == 1 and step.stage == "after":
                async with engine.begin() as connection:
                    await connection.execute(sa.text("UPDATE tasks SET image = NULL"))

        place.store.hooks.append(disturb)
        await place.run(block)

        assert place.requests("put") == 2
        assert await place.contents() == {"u": (b"<p>", None)}
        async with engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)
        await engine.dispose()

    async def test_a_snapshot(self, postgres: Database, memory_store: MemoryStore) -> None:
        """A transaction that sees the row as it was does not find its object any more."""
        async with open_library(postgres, memory_store) as library:
            await library.add(Doc(name="d", body=Blob(b"1")))
            engine = postgres.engine_with(isolation_level="REPEATABLE READ")
            async with blob_sessionmaker(engine, memory_store)() as session:
                assert await session.scalar(sa.select(sa.func.count()).select_from(Doc)) == 1
                async with library.session.begin() as other:
                    (await other.get_one(Doc, "d")).body = Blob(b"2")
                seen = await session.get_one(Doc, "d")
                assert seen.body is not None
                with pytest.raises(BlobNotFoundError):
                    await seen.body.read()
            await engine.dispose()

            assert await library.check() == [b"2"]


class TestJoined:
    """What the session's own calls do to the outer transaction, as the table tells."""

    @pytest.mark.slow
    @pytest.mark.parametrize("in_savepoint", [False, True])
    @pytest.mark.parametrize("column", [1, 2, 3])
    @pytest.mark.parametrize(
        "mode", ["conditional_savepoint", "create_savepoint", "rollback_only", "control_fully"]
    )
    async def test_the_outer_transaction(
        self, library: Library, mode: Any, column: int, in_savepoint: bool
    ) -> None:
        """It ends what the table says; nothing is deleted while the owner's is open."""
        await library.add(Doc(name="d", body=Blob(b"1")))
        (said,) = {
            row[column]
            for row in TRANSACTIONS.table("`join_transaction_mode`")
            if is_about(row[0], mode, in_savepoint=in_savepoint)
        }
        async with library.engine.connect() as connection:
            outer = await connection.begin()
            owners = await connection.begin_nested() if in_savepoint else outer
            sessions = blob_sessionmaker(connection, library.store, join_transaction_mode=mode)
            async with sessions() as session:
                (await session.get_one(Doc, "d")).body = Blob(b"2")
                await session.flush()
                if column < 3:
                    await (session.commit, session.rollback)[column - 1]()
            is_ended = not owners.is_active
            deleted = sum(name == "delete" for name, _ in library.store.calls)
            assert not (outer.is_active and deleted)
            if outer.is_active:
                await outer.commit()
        await library.store.runtime.background.drain()

        assert is_ended == ("the owner's" in said)
        is_committed = not said.startswith("rolls")
        assert await library.check() == [b"2" if is_committed else b"1"]

    @pytest.mark.parametrize("mode", ["before_server", "after_server"])
    async def test_the_owners_commit_is_not_answered(
        self, postgres: Database, memory_store: MemoryStore, mode: CutMode
    ) -> None:
        """The owner is told that nobody knows the outcome, and nothing is deleted."""
        async with open_library(postgres, memory_store) as library:
            await library.add(old := Doc(name="d", body=Blob(b"1")))
            async with postgres_proxy(postgres.url) as proxy:
                engine = create_async_engine(proxy.url)
                with pytest.raises(CommitOutcomeUnknown) as caught:
                    async with engine.begin() as connection:
                        sessions = blob_sessionmaker(connection, memory_store)
                        async with sessions.begin() as session:
                            (await session.get_one(Doc, "d")).body = Blob(b"2")
                        proxy.mode = mode
                await engine.dispose()
            await memory_store.runtime.background.drain()

            assert old.body is not None
            assert caught.value.superseded == (old.body.uri,)
            is_committed = mode == "after_server"
            left = caught.value.superseded if is_committed else caught.value.created
            assert await library.check(orphans=left) == [b"2" if is_committed else b"1"]


def is_about(cell: str, mode: str, *, in_savepoint: bool) -> bool:
    """Tell whether a row of the table is about a mode, in or outside of a savepoint."""
    if not cell.startswith(mode):
        return False
    if "`" not in cell:  # both
        return True
    return in_savepoint == ("is in a savepoint" in cell)


class TestCosts:
    """How many statements a transaction sends beside its own."""

    async def count(self, library: Library, work: Any) -> list[str]:
        """Return what *work* sends with a session, up to its commit."""
        async with library.session() as session:
            await session.connection()  # asks the engine for its level, and begins
            docs = {doc.name: doc for doc in await session.scalars(sa.select(Doc))}
            sent: list[str] = []

            def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
                sent.append(statement.split(maxsplit=1)[0])

            engine = library.engine.sync_engine
            sa.event.listen(engine, "before_cursor_execute", note)
            try:
                await work(session, docs)
                await session.commit()
            finally:
                sa.event.remove(engine, "before_cursor_execute", note)
        return sent

    async def test_as_the_table_tells(self, library: Library) -> None:
        """The SELECT before, with SQLite's lock, and the SELECT after; or none of them."""
        await library.add(*(Doc(name=name, body=Blob(b"1"), title=name) for name in "abcd"))
        lock = ["DELETE"] if library.database.is_sqlite else []

        async def add(session: AsyncSession, _docs: Any) -> None:
            session.add(Doc(name="e", body=Blob(b"2"), scan=Blob(b"3")))

        async def replace(session: AsyncSession, docs: Any) -> None:
            docs["a"].body = Blob(b"2")

        async def delete(session: AsyncSession, docs: Any) -> None:
            await session.delete(docs["b"])

        async def rename(session: AsyncSession, docs: Any) -> None:
            docs["a"].title = "new"

        async def bulk_insert(session: AsyncSession, _docs: Any) -> None:
            await session.execute(sa.insert(Doc), {"name": "f", "body": Blob(b"4")})

        async def bulk_update(session: AsyncSession, _docs: Any) -> None:
            await session.execute(sa.update(Doc).where(Doc.name == "a").values(body=Blob(b"5")))

        async def bulk_rename(session: AsyncSession, _docs: Any) -> None:
            await session.execute(sa.update(Doc).where(Doc.name == "a").values(title="other"))

        async def bulk_delete(session: AsyncSession, _docs: Any) -> None:
            await session.execute(sa.delete(Doc).where(Doc.name == "c"))

        assert await self.count(library, add) == ["INSERT"]
        assert await self.count(library, replace) == [*lock, "SELECT", "UPDATE", "SELECT"]
        assert await self.count(library, delete) == [*lock, "SELECT", "DELETE", "SELECT"]
        assert await self.count(library, rename) == ["UPDATE"]
        assert await self.count(library, bulk_insert) == ["INSERT"]
        assert await self.count(library, bulk_update) == [*lock, "SELECT", "UPDATE", "SELECT"]
        assert await self.count(library, bulk_rename) == ["UPDATE"]
        assert await self.count(library, bulk_delete) == [*lock, "SELECT", "DELETE", "SELECT"]


class TestSQLite:
    async def test_savepoints_need_the_recipe(
        self, tmp_path: Path, memory_store: MemoryStore
    ) -> None:
        """In the driver's legacy mode a savepoint with blobs at stake is refused."""
        async with open_sqlite(tmp_path / "legacy.db", explicit_begin=False) as legacy:
            async with legacy.engine.begin() as connection:
                await connection.run_sync(Doc.metadata.create_all)
            sessions = track_blobs(async_sessionmaker(legacy.engine), memory_store)
            async with sessions() as session:
                session.add(Doc(name="a", body=Blob(b"1")))
                with pytest.raises(UnsafeTransactionError, match="use_explicit_begin"):
                    async with session.begin_nested():
                        session.add(Doc(name="b", body=Blob(b"2")))
            async with sessions.begin() as session:
                session.add(Doc(name="c", body=Blob(b"3")))

            found = await assert_consistent(memory_store, legacy.engine, [Doc.body])
            assert list(found.values()) == [b"3"]
