"""docs/journal.md: every block runs, every table is that of the code, every claim has its test.

How blocks are named and run is said in `support.pages`. The blocks stand on the README's models.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import inspect
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
import typer.main
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import mapped_column
from support.databases import Database
from support.journaled import World, open_world
from support.pages import BUCKET, PNG, PREFIX, ROOT, Block, Page, Place, check_claims, open_place

from aioblobcol import (
    Blob,
    BlobApp,
    BlobType,
    BlobUploadError,
    Journal,
    Outcome,
    PutS3ApiCall,
    S3Store,
    Worker,
    blob_sessionmaker,
    blob_transaction,
    delete_s3,
    enlist,
    upload_blobs,
)
from aioblobcol._check import FindingKind
from aioblobcol._uri import marker_uri
from aioblobcol.cli._commands import app as command_line
from aioblobcol.testing import MemoryStore, S3Server, Step, assert_consistent

JOURNAL = Page(ROOT / "docs/journal.md")
CONSOLE = ["claim", "worker", "status", "check", "ddl", "retire-table", "disown", "ddl-drop"]


# --- where the blocks run ----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_journaled(
    *blocks: str, model: str = "managed", engine: AsyncEngine | None = None
) -> AsyncIterator[Place]:
    """Give one of the README's models with a journal, in memory but for the database.

    The store is not open. The table was there before the journal.
    """
    async with open_place(model) as place:
        names = place.names
        names |= {"page": b"<p>", "store": MemoryStore(bucket=BUCKET, prefix=PREFIX), "url": "u"}
        if engine is not None:
            names["engine"] = engine
            async with engine.begin() as connection:
                await connection.run_sync(names["Base"].metadata.create_all)
        for name in (*blocks, "create-all"):
            await place.run(JOURNAL.block(name))
        yield place
        if engine is not None:
            async with engine.begin() as connection:
                await connection.run_sync(names["Base"].metadata.drop_all)


@pytest_asyncio.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    """Give the README's managed model with a journal on a SQLite file, and an open store."""
    monkeypatch.chdir(tmp_path)
    async with open_journaled("set-up") as opened, opened.names["store"]:
        yield opened


@pytest_asyncio.fixture
async def postgres_place(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    """Give the same on PostgreSQL."""
    monkeypatch.chdir(tmp_path)
    engine = create_async_engine(postgres_url)
    async with open_journaled("set-up", engine=engine) as opened, opened.names["store"]:
        yield opened
    await engine.dispose()


@pytest_asyncio.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database) as opened:
        yield opened


async def states(place: Place) -> dict[str, str]:
    """Return what the journal lists."""
    table = place.names["journal"].table
    async with place.names["engine"].connect() as connection:
        rows = await connection.execute(sa.select(table.c.uri, table.c.state))
        return {uri: state for uri, state in rows}  # noqa: C416 - rows are no pairs for mypy


async def let_time_pass(place: Place, *, days: int = 9) -> None:
    """Let every entry be so many days older."""
    table, engine = place.names["journal"].table, place.names["engine"]
    long_ago: Any = (
        sa.func.datetime("now", f"-{days} days")
        if engine.dialect.name == "sqlite"
        else sa.func.now() - timedelta(days=days)
    )
    async with engine.begin() as connection:
        await connection.execute(sa.update(table).values(since=long_ago, not_before=long_ago))


# --- the whole ---------------------------------------------------------------------------------


class TestPage:
    def test_every_block_has_a_runner(self) -> None:
        """No block goes untested, and no test runs a block that is not there."""
        assert sorted(JOURNAL.runners + CONSOLE) == sorted(block.name for block in JOURNAL.blocks)

    def test_links_lead_somewhere(self) -> None:
        """Every link names a file of the project, and a heading where it says so."""
        JOURNAL.check_links()

    @pytest.mark.parametrize("name", CONSOLE)
    def test_commands(self, name: str) -> None:
        """They are there, and take the options and arguments that are shown."""
        for program, command, *arguments in JOURNAL.block(name).commands:
            assert (program, command) == ("aioblobcol", name.removesuffix("-drop"))
            known = typer.main.get_group(command_line).commands[command]
            context = known.make_context(command, list(arguments))
            assert context.params["app_name"] == "myapp.models:blobs"

    def test_options(self) -> None:
        """The table has every option of `Journal` with its default."""
        times = {timedelta(hours=1): "1 hour", timedelta(minutes=10): "10 minutes"}
        parameters = inspect.signature(Journal).parameters.values()

        def default(parameter: inspect.Parameter) -> str:
            if parameter.default is parameter.empty:
                return "required"
            found = times.get(parameter.default) or repr(parameter.default)
            return found.replace("'", '"')

        assert [row[:2] for row in JOURNAL.table("`Journal`")] == [
            [each.name, default(each)] for each in parameters
        ]

    def test_findings(self) -> None:
        """The table has every kind of finding, the worst first."""
        assert [row[0] for row in JOURNAL.table("It finds")] == [kind.value for kind in FindingKind]

    def test_the_log(self) -> None:
        """What is to be watched for in the log is what the code writes."""
        watched = [row[0] for row in JOURNAL.table("Watch")]
        quoted = [cell.split('"')[1] for cell in watched if '"' in cell]
        source = "".join(
            path.read_text(encoding="utf-8") for path in (ROOT / "src/aioblobcol").rglob("*.py")
        )

        assert len(quoted) == 3
        assert all(f'"{text}' in source for text in quoted)

    def test_the_marker(self) -> None:
        """The object that is named is the one that is written."""
        name = marker_uri(BUCKET, PREFIX).rpartition("/")[2]

        assert f"`{name}`" in JOURNAL.text


# --- the blocks --------------------------------------------------------------------------------


class TestSetUp:
    @JOURNAL.runs("set-up")
    async def test_set_up(self, block: Block, place: Place) -> None:
        """Rows adopt their objects; `BlobApp` knows the journal, and sessions its stores."""
        assert block.language == "python"
        app = place.names["blobs"]
        await place.add_managed("u", html=b"1", image=PNG)

        assert isinstance(app, BlobApp)
        assert app.journal is place.names["journal"]
        assert await states(place) == {}
        assert await place.contents() == {"u": (b"1", PNG)}

    @JOURNAL.runs("create-all")
    async def test_create_all(self, block: Block, place: Place) -> None:
        """The triggers stand on the table that was there before; to repeat it changes nothing."""
        await place.run(block)
        async with place.names["engine"].connect() as connection:
            missing = await connection.run_sync(place.names["journal"].missing_triggers)

        assert missing == []

    @JOURNAL.runs("explicit-journal")
    async def test_explicit_journal(
        self, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Columns of strings are looked after once they are named."""
        monkeypatch.chdir(tmp_path)
        async with open_journaled(block.name, model="model") as place:
            ((table),) = place.names["journal"].journaled_tables

            assert [column.name for column in table.columns] == ["html", "image"]

    @JOURNAL.runs("explicit")
    async def test_explicit(
        self, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A block and a result that was made before it: both rows adopt their objects."""
        monkeypatch.chdir(tmp_path)
        async with open_journaled("explicit-journal", model="model") as place:
            async with place.names["store"]:
                await place.run(block)

                assert await states(place) == {}
                assert await place.contents() == dict.fromkeys("ab", (b"<p>", None))


class TestOutcome:
    @JOURNAL.runs("outcome")
    @pytest.mark.parametrize("became", [Outcome.COMMITTED, Outcome.ROLLED_BACK])
    async def test_outcome(self, block: Block, place: Place, became: Outcome) -> None:
        """The branch that is taken tells the truth, and nothing is left."""
        await place.add_managed("other", html=b"1")  # the first one looks for triggers
        dialect = place.names["engine"].sync_engine.dialect
        carry_out = dialect.do_commit
        commits = []

        def lose_the_answer(connection: Any) -> None:
            commits.append(connection)
            is_lost = len(commits) == 2  # the first is the staging's
            if not is_lost or became is Outcome.COMMITTED:
                carry_out(connection)
            if is_lost:
                raise sqlite3.ProgrammingError("Cannot operate on a closed database.")

        dialect.do_commit = lose_the_answer
        branches = ["rolled back", "committed", "unknown"]
        parts = block.text.split("...")
        assert len(parts) == 4
        text = "".join(
            part + (f"told.append({branch!r})" if branch else "")
            for part, branch in zip(parts, [*branches, ""], strict=True)
        )
        told: list[str] = []
        try:
            await place.run(dataclasses.replace(block, text=text), told=told)
        finally:
            dialect.do_commit = carry_out

        assert told == [became.value.replace("_", " ")]
        rows = await place.contents()
        assert rows.pop("other") == (b"1", None)
        assert rows == ({"u": (b"<p>", None)} if became is Outcome.COMMITTED else {})


class TestIsolation:
    @JOURNAL.runs("ahead")
    async def test_ahead(self, block: Block, postgres_place: Place) -> None:
        """A serializable transaction adopts what was uploaded before it began."""
        await postgres_place.run(block)

        assert await states(postgres_place) == {}
        assert await postgres_place.contents() == {"u": (b"<p>", None)}


class TestOtherPrograms:
    @JOURNAL.runs("other-postgresql")
    async def test_on_postgresql(self, block: Block, postgres_place: Place) -> None:
        """What was staged by the function goes into a row, and is retired when that goes."""
        await self.insert_and_delete(block, postgres_place)

    @JOURNAL.runs("other-sqlite")
    async def test_on_sqlite(self, block: Block, place: Place) -> None:
        """What was staged by the INSERT goes into a row, and is retired when that goes."""
        await self.insert_and_delete(block, place)

    @staticmethod
    async def insert_and_delete(block: Block, place: Place) -> None:
        assert block.language == "sql"
        engine = place.names["engine"]
        async with engine.begin() as connection:
            await connection.exec_driver_sql(block.text)
        ((uri, state),) = (await states(place)).items()
        assert state == "staged"
        async with engine.begin() as connection:
            await connection.exec_driver_sql(
                f"INSERT INTO tasks (url, html) VALUES ('u', '{uri}')"  # noqa: S608 - ours
            )
        assert await states(place) == {}
        async with engine.begin() as connection:
            await connection.exec_driver_sql("DELETE FROM tasks")

        assert await states(place) == {uri: "retired"}


class TestProduction:
    @JOURNAL.runs("worker-in-app")
    async def test_worker_in_an_application(
        self, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It deletes while the application serves, and ends with it."""
        monkeypatch.chdir(tmp_path)
        async with open_journaled("set-up") as place:
            store, app_names = place.names["store"], place.names
            async with store:
                await place.add_managed("u", html=b"1")
                async with place.session() as session, session.begin():
                    await session.execute(sa.delete(app_names["Task"]))
            await let_time_pass(place)
            await place.run(block)
            is_deleted = asyncio.Event()

            def look(step: Step) -> None:
                if (step.operation, step.stage) == ("delete", "after"):
                    is_deleted.set()

            store.hooks.append(look)
            async with asyncio.timeout(20), app_names["app"].router.lifespan_context(None):
                await is_deleted.wait()
            async with store:
                assert await place.contents() == {}

    @JOURNAL.runs("privileges")
    async def test_privileges(self, block: Block, postgres_place: Place, postgres_url: str) -> None:
        """They are enough for what sessions and the worker do."""
        place, roles = postgres_place, ("app", "worker")
        journal, task = place.names["journal"], place.names["Task"]
        admin: AsyncEngine = place.names["engine"]

        def engine_of(role: str) -> AsyncEngine:
            arguments = {"server_settings": {"role": role}}
            return create_async_engine(postgres_url, connect_args=arguments)

        async with admin.begin() as connection:
            for role in roles:
                await connection.exec_driver_sql(f"CREATE ROLE {role}")
            await connection.exec_driver_sql("GRANT ALL ON tasks TO app")
            for statement in block.text.split(";"):
                if statement.strip():
                    await connection.exec_driver_sql(statement)
        app, worker = map(engine_of, roles)
        try:
            sessions = blob_sessionmaker(app, journal=journal)
            async with sessions.begin() as session:
                session.add_all([task(url=url, html=Blob(url.encode())) for url in "abc"])
            async with sessions() as session:
                session.add(task(url="never", html=Blob(b"2")))
                await session.flush()
                await session.rollback()
            async with sessions.begin() as session:
                (await session.get_one(task, "a")).html = Blob(b"new")
                await session.delete(await session.get_one(task, "b"))
                await upload_blobs(session, task(url="left", html=Blob(b"3")))
            assert len(await states(place)) == 2
            await let_time_pass(place)
            reports = await Worker(journal, worker).drain()

            assert [report.left_out for report in reports] == [{}]
            assert await states(place) == {}
            assert await place.contents() == {"a": (b"new", None), "c": (b"c", None)}
        finally:
            await app.dispose()
            await worker.dispose()
            async with admin.begin() as connection:
                for role in roles:
                    await connection.exec_driver_sql(f"DROP OWNED BY {role} CASCADE")
                    await connection.exec_driver_sql(f"DROP ROLE {role}")


class TestMigrations:
    @JOURNAL.runs("alembic")
    async def test_alembic(
        self, block: Block, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rows adopt objects through the column that was added to a table made anew."""
        names, models = place.names, ModuleType("myapp.models")
        models.journal = names["journal"]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "myapp", ModuleType("myapp"))
        monkeypatch.setitem(sys.modules, "myapp.models", models)
        names["Task"].thumb = mapped_column(BlobType())
        await place.run(block)

        def migrate(connection: sa.Connection) -> list[str]:
            with Operations.context(MigrationContext.configure(connection)):
                names["upgrade"]()
            missing: list[str] = names["journal"].missing_triggers(connection)
            return missing

        async with names["engine"].begin() as connection:
            missing = await connection.run_sync(migrate)
        await place.add_managed("u", html=b"1")
        async with place.session() as session, session.begin():
            (await session.get_one(names["Task"], "u")).thumb = Blob(b"2")

        assert missing == []
        assert await states(place) == {}
        async with names["engine"].begin() as connection:
            await connection.exec_driver_sql("UPDATE tasks SET thumb = NULL")
        assert list((await states(place)).values()) == ["retired"]


# --- what changes ------------------------------------------------------------------------------

HERE, WORKER = "test_journal_docs.py", "integration/test_journal_worker.py"
SESSIONS, OUTCOMES = "integration/test_journal_sessions.py", "integration/test_journal_outcomes.py"
TRIGGERS = "integration/test_journal_triggers.py"
KILLED_ANYWHERE = "consistency/test_killed.py"
SHOWN_BY = {
    "The process is killed before COMMIT": [
        (HERE, "test_a_killed_process"),
        (KILLED_ANYWHERE, "test_somewhere"),
    ],
    "The process is killed after COMMIT": [
        (HERE, "test_a_killed_process"),
        (KILLED_ANYWHERE, "test_somewhere"),
    ],
    "The answer to COMMIT is lost": [
        (OUTCOMES, "test_it_was_never_carried_out"),
        (OUTCOMES, "test_it_was_carried_out"),
        (OUTCOMES, "test_it_is_still_being_carried_out"),
        (OUTCOMES, "test_a_database_that_does_not_answer"),
        (HERE, "test_outcome"),
    ],
    "A delete fails, or S3 is down": [
        (WORKER, "test_is_tried_again"),
        (WORKER, "test_the_store"),
        (HERE, "test_an_upload_that_could_not_be_undone"),
    ],
    "A session is dropped, or a result never written": [
        (HERE, "test_a_dropped_session"),
        (SESSIONS, "test_by_hand_and_forgotten"),
    ],
    "An upload takes effect after it was given up": [
        (WORKER, "test_what_no_row_took_over"),
        (HERE, "test_an_upload_that_lands_late"),
    ],
    "Rows are changed by Core, text SQL, cascades, TRUNCATE, COPY, other programs": [
        (SESSIONS, "test_writes_past_the_session_are_seen"),
        (TRIGGERS, "test_what_it_adopts_and_retires"),
        (TRIGGERS, "test_a_cascade"),
        (TRIGGERS, "test_truncate"),
        (TRIGGERS, "test_copy"),
    ],
    "An object is replaced, or its row is deleted": [
        (SESSIONS, "test_what_a_row_lets_go_is_the_workers"),
        (WORKER, "test_what_a_row_let_go"),
    ],
    "Two writers update one row, not guarded": [(HERE, "test_updates_without_a_guard")],
    "A row takes a URI that nobody has staged": [
        (SESSIONS, "test_the_row_of_an_unstaged_result_is_refused"),
        (TRIGGERS, "test_what_is_refused"),
    ],
    "A second cell takes the URI of a first one": [(TRIGGERS, "test_what_is_refused")],
    "The journal cannot be written": [(SESSIONS, "test_no_table_of_the_journal")],
}


class TestWhatChanges:
    def test_every_row_of_the_table_has_its_tests(self) -> None:
        """Each row is shown by tests that are there, and no row is without one."""
        check_claims(JOURNAL, "What happens", SHOWN_BY)

    async def test_a_dropped_session(self, world: World) -> None:
        """The worker removes its objects when their lease is over; before, they stay."""

        async def drop() -> None:
            session = world.sessions()
            await upload_blobs(session, world.Doc(key="a", body=Blob(b"1")))

        with pytest.warns(ResourceWarning, match="orphans"):
            await drop()
            gc.collect()
        await world.worker().drain()
        assert list((await world.states()).values()) == ["staged"]

        assert await world.check() == {}

    async def test_an_upload_that_could_not_be_undone(self, world: World) -> None:
        """What the session could not delete is deleted by the worker, later."""
        world.store.fail("put", containing="col=cover")
        world.store.fail("delete", times=1)
        with pytest.raises(BlobUploadError):
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="a", body=Blob(b"1"), cover=Blob(b"2")))

        assert set((await world.states()).values()) == {"deleting"}
        assert await world.check() == {}

    async def test_an_upload_that_lands_late(self, world: World) -> None:
        """Its entry outlives the delete, so that the worker deletes once more."""
        world.store.fail("put", stage="after", containing="col=body")
        with pytest.raises(BlobUploadError):
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="a", body=Blob(b"1")))
        ((uri, state),) = (await world.states()).items()
        assert (state, uri in world.store.objects) == ("deleting", False)
        world.store.land_late()

        assert await world.check() == {}

    async def test_updates_without_a_guard(self, world: World) -> None:
        """The first one's object is retired by the second one's statement."""

        async def write(data: bytes, old: str | None) -> None:
            async with AsyncSession(world.engine) as session:
                async with blob_transaction(
                    session, store=world.store, journal=world.journal
                ) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", data, old)])
                    await session.execute(sa.update(world.Task).values(**put.to_values()))

        async with world.engine.begin() as connection:
            await connection.execute(sa.insert(world.Task).values(url="u"))
        await write(b"1", None)
        await write(b"2", None)  # has not seen the first one

        assert list((await world.check()).values()) == [b"2"]

    async def test_a_store_that_closes(self, database: Database) -> None:
        """A row that lets go while no store is open leaves its object to the worker."""
        async with open_world(database) as world:
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="a", body=Blob(b"1")))
            async with world.sessions() as session:
                await session.delete(await session.get_one(world.Doc, "a"))
                await world.store.__aexit__(None, None, None)
                await session.commit()
            async with world.store:
                assert await world.check() == {}
            await world.store.__aenter__()


# --- what else is said -------------------------------------------------------------------------


class TestTakingItOut:
    async def test_in_this_order(self, database: Database) -> None:
        """Sessions without the journal write, then without triggers; the worker clears the rest."""
        async with open_world(database, strict=False) as world:
            async with world.sessions.begin() as session:
                session.add_all([world.Doc(key=key, body=Blob(b"1")) for key in "abc"])
            async with world.sessions.begin() as session:
                await session.delete(await session.get_one(world.Doc, "a"))
            without = blob_sessionmaker(world.engine, world.store)
            async with without.begin() as session:
                (await session.get_one(world.Doc, "b")).body = Blob(b"2")
            async with world.engine.begin() as connection:
                await connection.run_sync(world.journal.drop_triggers)
            async with without.begin() as session:
                (await session.get_one(world.Doc, "b")).body = Blob(b"3")
                await session.delete(await session.get_one(world.Doc, "c"))

            assert list((await world.check()).values()) == [b"3"]


class TestWhatTriggersCannotSee:
    async def test_columns_that_a_parent_lacks(self, postgres: Database) -> None:
        """DELETE from the parent retires what its own columns name, from the child everything."""
        metadata = sa.MetaData()
        parent, child = (
            sa.Table(
                name,
                metadata,
                sa.Column("id", sa.Integer, primary_key=True),
                sa.Column("url", sa.Text),
            )
            for name in ("parent", "child")
        )
        child.append_column(sa.Column("more", sa.Text))
        columns = [parent.c.url, child.c.url, child.c.more]
        store = MemoryStore(bucket=BUCKET, prefix=PREFIX)
        journal = Journal(metadata, store, uri_columns=columns)
        uris = [f"s3://{BUCKET}/{PREFIX}/x/id={number:032x}" for number in range(4)]
        async with postgres.engine.connect() as connection:
            await connection.run_sync(metadata.create_all)
            await connection.exec_driver_sql("ALTER TABLE child INHERIT parent")
            await connection.run_sync(journal.create_triggers)
            for number, statement in ((0, "DELETE FROM parent"), (2, "DELETE FROM child")):
                url, more = uris[number : number + 2]
                for uri in (url, more):
                    await connection.execute(
                        sa.insert(journal.table).values(uri=uri, state="staged")
                    )
                await connection.execute(sa.insert(child).values(id=1, url=url, more=more))
                await connection.exec_driver_sql(statement)
            rows = await connection.execute(sa.select(journal.table.c.uri, journal.table.c.state))
            found = {uri: state for uri, state in rows}  # noqa: C416 - rows are no pairs for mypy

            assert found == dict.fromkeys([uris[0], *uris[2:]], "retired")
            await connection.rollback()


class TestExplicit:
    async def test_a_block_on_sessions_with_the_journal(self, world: World) -> None:
        """It needs to be told of no journal: the object is staged."""
        async with world.sessions() as session:
            async with blob_transaction(session, store=world.store) as tx:
                call = PutS3ApiCall("html", b"1", None)
                put = await tx.put_s3(pk="u", api_calls=[call])
                session.add(world.Task(url="u", **put.to_values()))

        assert list((await world.check()).values()) == [b"1"]

    async def test_deletes_of_a_session_without_the_journal(self, world: World) -> None:
        """They are carried out at once; told of the journal, the object is the worker's."""
        for sessions, are_left in ((world.database.session, False), (world.sessions, True)):
            async with world.sessions() as session:
                async with blob_transaction(session, store=world.store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"1", None)])
                    session.add(task := world.Task(url="u", **put.to_values()))
                uri = task.html
            async with sessions.begin() as session:
                await enlist(session, delete_s3([uri], store=world.store))
                await session.delete(await session.get_one(world.Task, "u"))

            assert (uri in world.store.objects) == are_left
        assert await world.check() == {}

    async def test_a_savepoint_that_took_the_staging(self, sqlite: Database) -> None:
        """On SQLite what was uploaded in it cannot be written outside of it."""
        async with open_world(sqlite) as world:
            async with world.sessions() as session:
                with pytest.raises(sa.exc.IntegrityError, match="never staged"):
                    async with blob_transaction(session, store=world.store) as tx:
                        await session.execute(sa.select(world.Task.url))
                        async with session.begin_nested() as savepoint:
                            call = PutS3ApiCall("html", b"1", None)
                            put = await tx.put_s3(pk="u", api_calls=[call])
                            await savepoint.rollback()
                        session.add(world.Task(url="u", **put.to_values()))

            assert await world.check() == {}


KILLED = """
import asyncio, os, signal, sys

from sqlalchemy.ext.asyncio import create_async_engine
from support.databases import Database
from support.journaled import World

from aioblobcol import Blob, open_store, upload_blobs

moment, name, url, bucket = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    engine = create_async_engine(url)
    async with open_store(bucket=bucket, prefix="docs") as store:
        world = World(Database(name, url, engine), store)
        async with world.sessions() as session:
            doc = await session.get_one(world.Doc, "d")
            await session.commit()
            doc.body = Blob(b"new")
            await upload_blobs(session, doc)
            await session.flush()
            if moment == "before":
                die()
            carry_out = engine.sync_engine.dialect.do_commit
            engine.sync_engine.dialect.do_commit = lambda c: (carry_out(c), die())
            await session.commit()

asyncio.run(main())
"""


@pytest.mark.parametrize(("moment", "kept"), [("before", b"old"), ("after", b"new")])
async def test_a_killed_process(s3: S3Server, database: Database, moment: str, kept: bytes) -> None:
    """The worker removes the new object, or the old one; the row has the other one."""
    bucket = f"killed-{moment}-{database.name}"
    async with s3.open_store(bucket=bucket, prefix="docs") as store:
        await store.client.create_bucket(Bucket=bucket)
        world = World(database, store)  # type: ignore[arg-type]
        async with database.engine.begin() as connection:
            await connection.run_sync(world.Base.metadata.create_all)
        try:
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="d", body=Blob(b"old")))
            await kill(moment, database, bucket, s3)
            left = {"before": "staged", "after": "retired"}[moment]
            assert list((await world.states()).values()) == [left]
            assert len(await listed(store)) == 2

            await world.expire_leases()
            await world.worker().drain()
            found = await assert_consistent(store, database.engine, [world.Doc.body])
            assert list(found.values()) == [kept]
            assert await world.states() == {}
        finally:
            async with database.engine.begin() as connection:
                await connection.run_sync(world.Base.metadata.drop_all)


async def kill(moment: str, database: Database, bucket: str, s3: S3Server) -> None:
    """Replace an object in a process of its own, which dies before or after COMMIT."""
    given = s3.client_arguments
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED, moment, database.name, database.url, bucket),
        env={
            **os.environ,
            "AWS_ENDPOINT_URL_S3": s3.endpoint_url,
            "AWS_ACCESS_KEY_ID": given["aws_access_key_id"],
            "AWS_SECRET_ACCESS_KEY": given["aws_secret_access_key"],
            "AWS_DEFAULT_REGION": given["region_name"],
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]),
        },
    )
    assert await process.wait() == -signal.SIGKILL


async def listed(store: S3Store) -> list[str]:
    return [uri async for uri in store.iter_uris() if "/id=" in uri]
