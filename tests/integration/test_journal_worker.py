"""The worker: what it deletes, when, and what it leaves alone; on both databases."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import create_async_engine
from support.databases import Database
from support.journal import Journaled, open_journaled
from support.postgres_proxy import CutMode, postgres_proxy
from support.s3_proxy import Answer, Forward, Request, s3_proxy

from aioblobcol import (
    BlobType,
    DeleteReport,
    InvalidInputError,
    StoreClosedError,
    Worker,
    WorkReport,
)
from aioblobcol._check import Check
from aioblobcol._journal import Journal, back_off, claim
from aioblobcol.testing import MemoryStore, S3Server, Step, StoredObject


@pytest_asyncio.fixture
async def journaled(database: Database, memory_store: MemoryStore) -> AsyncIterator[Journaled]:
    """Give the journaled tables, and an object for each of the six short names."""
    async with open_journaled(database, memory_store) as opened:
        for name in "abcdef":
            memory_store.objects[opened.uri(name)] = StoredObject(name.encode(), {}, {})
        yield opened


def worker(journaled: Journaled, **arguments: Any) -> Worker:
    return Worker(journaled.journal, journaled.database.engine, **arguments)


def objects(journaled: Journaled) -> str:
    """Return the short names of the objects that are there."""
    return "".join(name for name in "abcdef" if journaled.uri(name) in journaled.store.objects)


async def pass_time(journaled: Journaled, *, hours: float) -> None:
    """Move every entry into the past, as if so much time had gone by."""
    table = journaled.journal.table
    async with journaled.database.engine.begin() as connection:
        for row in (await connection.execute(sa.select(table))).all():
            delta = timedelta(hours=hours)
            values = {"since": row.since - delta, "not_before": row.not_before - delta}
            await connection.execute(sa.update(table).where(table.c.uri == row.uri).values(values))


class TestRounds:
    async def test_triggers_that_do_not_stand(
        self, journaled: Journaled, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The first round says so: what rows let go would never be deleted."""
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.drop_triggers)
        await worker(journaled).run_once()

        assert "journaled docs" in caplog.text
        assert "aioblobcol ddl" in caplog.text

    async def test_they_are_looked_at_again(
        self,
        journaled: Journaled,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """An hour later: partitions are made, and tables changed, while a worker runs."""
        at_work = worker(journaled)
        await at_work.run_once()
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.drop_triggers)
        await at_work.run_once()
        assert "aioblobcol ddl" not in caplog.text
        real = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + 3601)
        await at_work.run_once()

        assert "aioblobcol ddl" in caplog.text

    async def test_a_table_that_this_database_does_not_have(self, journaled: Journaled) -> None:
        """Of another database, or not there yet: it names nothing, and stops nobody."""
        metadata = journaled.journal.table.metadata
        sa.Table(
            "elsewhere",
            metadata,
            sa.Column("key", sa.Text, primary_key=True),
            sa.Column("body", BlobType()),
        )
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")
        await pass_time(journaled, hours=1)
        await worker(journaled).run_once()

        assert objects(journaled) == "cdef"

    async def test_all_columns_are_asked_in_one_statement(self, journaled: Journaled) -> None:
        """Between two an object could move from one column to the other, and be seen in none."""
        asked: list[str] = []

        def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if statement.startswith("SELECT") and "body" in statement and "scan" in statement:
                asked.append(statement)

        sync = journaled.database.engine.sync_engine
        sa.event.listen(sync, "before_cursor_execute", note)
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")
        await pass_time(journaled, hours=1)
        await worker(journaled).run_once()
        sa.event.remove(sync, "before_cursor_execute", note)

        assert len(asked) == 1
        assert '"URL"' in asked[0]
        assert "journaled_pages" in asked[0]

    async def test_rows_that_are_hidden_from_its_role(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """It deletes nothing and says so: a hidden row would be taken for none."""
        async with open_journaled(postgres, memory_store) as journaled:
            await journaled.stage("d")
            await pass_time(journaled, hours=2)
            async with postgres.engine.begin() as connection:
                for statement in (
                    "CREATE ROLE blind LOGIN PASSWORD 'x'",
                    "GRANT ALL ON ALL TABLES IN SCHEMA public TO blind",
                    'ALTER TABLE "journaled docs" ENABLE ROW LEVEL SECURITY',
                ):
                    await connection.exec_driver_sql(statement)
            url = sa.make_url(postgres.url).set(username="blind", password="x")
            engine = create_async_engine(url)
            with pytest.raises(sa.exc.DBAPIError, match="row-level security"):
                await Worker(journaled.journal, engine).run_once()
            await engine.dispose()
            async with postgres.engine.begin() as connection:
                await connection.exec_driver_sql("DROP OWNED BY blind CASCADE")
                await connection.exec_driver_sql("DROP ROLE blind")

            assert await journaled.states() == {"d": "staged"}

    async def test_truncate_and_the_worker_do_not_block_each_other(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """Both take the tables before the entries."""
        async with open_journaled(postgres, memory_store) as journaled:
            await journaled.stage("d", "e")
            await pass_time(journaled, hours=2)
            async with postgres.engine.connect() as connection:
                await connection.exec_driver_sql(
                    journaled.filled("TRUNCATE <docs>, journaled_pages")
                )
                working = asyncio.create_task(worker(journaled).run_once())
                async with postgres.engine.connect() as asking:
                    waits = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
                    async with asyncio.timeout(20):
                        while not await asking.scalar(waits):  # noqa: ASYNC110 - nobody tells
                            await asyncio.sleep(0.01)
                await connection.exec_driver_sql(
                    journaled.filled("INSERT INTO <docs> (name, body) VALUES ('x', <d>)")
                )
                await connection.commit()
            await working

            assert (await journaled.states()).get("d") is None  # adopted

    async def test_what_a_row_let_go(self, journaled: Journaled) -> None:
        """It is deleted when its retention is over, and its entry goes."""
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")

        assert await worker(journaled).run_once() == WorkReport()
        assert objects(journaled) == "abcdef"
        await pass_time(journaled, hours=1)
        assert await worker(journaled).run_once() == WorkReport(claimed=2, deleted=2, removed=2)
        assert objects(journaled) == "cdef"
        assert await journaled.states() == {}

    async def test_what_no_row_took_over(self, journaled: Journaled) -> None:
        """It is deleted after its lease, and once more when its upload can no longer land."""
        await journaled.stage("d")

        assert await worker(journaled).run_once() == WorkReport()
        await pass_time(journaled, hours=1)
        assert await worker(journaled).run_once() == WorkReport(claimed=1, deleted=1)
        assert await journaled.states() == {"d": "deleting"}
        journaled.store.objects[journaled.uri("d")] = StoredObject(b"late", {}, {})
        assert await worker(journaled).run_once() == WorkReport()
        await pass_time(journaled, hours=1)
        assert await worker(journaled).run_once() == WorkReport(claimed=1, deleted=1, removed=1)
        assert objects(journaled) == "abcef"
        assert await journaled.states() == {}

    async def test_what_is_renewed(self, journaled: Journaled) -> None:
        """An upload that takes longer keeps its entry, and is told what it has lost."""
        await journaled.stage("d", "e")
        await pass_time(journaled, hours=2)
        entries = worker(journaled)._entries
        async with journaled.database.engine.begin() as connection:
            lost = await entries.renew(connection, [journaled.uri("d"), journaled.uri("f")])

        assert lost == [journaled.uri("f")]
        await worker(journaled).run_once()
        assert await journaled.states() == {"d": "staged", "e": "deleting"}

    async def test_a_row_that_was_written_past_the_triggers(
        self, journaled: Journaled, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its object stays, and the log says that something went past them."""
        await journaled.stage("d", "e", "f")
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.drop_triggers)
        await journaled.run(
            "INSERT INTO <docs> (name, body, scan) VALUES ('r', <d>, {e})",
        )
        await pass_time(journaled, hours=1)

        assert await worker(journaled).run_once() == WorkReport(claimed=1, deleted=1)
        assert objects(journaled) == "abcde"
        assert await journaled.states() == {"f": "deleting"}
        assert journaled.uri("d") in caplog.text
        assert journaled.uri("e") in caplog.text

    async def test_a_batch_of_nothing_but_live_ones_is_not_the_end(
        self, journaled: Journaled
    ) -> None:
        """What is due after it is deleted all the same."""
        await journaled.stage("d", "e")
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.drop_triggers)
        await journaled.run("INSERT INTO <docs> (name, body, scan) VALUES ('r', <d>, {e})")
        await pass_time(journaled, hours=1)
        await journaled.stage("f")
        await pass_time(journaled, hours=1)
        await worker(journaled, batch_size=2).drain()

        assert objects(journaled) == "abcde"
        assert await journaled.states() == {"f": "deleting"}

    async def test_a_retired_one_that_a_row_names_again(self, journaled: Journaled) -> None:
        """A row that was restored past the triggers keeps its object."""
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.drop_triggers)
        await journaled.run("INSERT INTO <docs> (name, body) VALUES ('p', <a>)")
        await pass_time(journaled, hours=1)

        assert await worker(journaled).run_once() == WorkReport(claimed=1, deleted=1, removed=1)
        assert objects(journaled) == "acdef"
        assert await journaled.states() == {}

    async def test_other_names_and_types(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A column with a key of its own, one that pads its text, JSON behind a decorator."""

        class Wrapped(sa.types.TypeDecorator[Any]):
            impl = sa.JSON
            cache_ok = True

        metadata = sa.MetaData()
        table = sa.Table(
            "journaled_odd",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("URL", sa.CHAR(200), key="url"),
            sa.Column("wrapped", Wrapped),
        )
        uri_columns = [table.c.url, table.c.wrapped]
        journal = Journal(metadata, memory_store, table_name="odd", uri_columns=uri_columns)
        uris = [f"s3://bucket/prefix/odd/id={n:032x}" for n in range(3)]
        engine = database.engine
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            for uri in uris:
                await connection.execute(sa.insert(journal.table).values(uri=uri, state="staged"))
                memory_store.objects[uri] = StoredObject(b"x", {}, {})
            await connection.run_sync(journal.drop_triggers)
            row = {"id": 1, "url": uris[0], "wrapped": {"uri": uris[1]}}
            await connection.execute(sa.insert(table).values(row))
            past = datetime(2020, 1, 1)  # noqa: DTZ001 - as SQLite stores it
            when = past if database.is_sqlite else past.replace(tzinfo=timezone.utc)
            await connection.execute(sa.update(journal.table).values(since=when))
        report = await Worker(journal, engine).run_once()
        async with engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)

        assert report == WorkReport(claimed=1, deleted=1)
        assert memory_store.objects.keys() >= set(uris[:2])
        assert uris[2] not in memory_store.objects

    async def test_json_that_cannot_be_read(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """One such row stops neither the worker nor the check, which see all the others."""
        metadata = sa.MetaData()
        table = sa.Table(
            "journaled_notes",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("meta", sa.JSON),
            sa.Column("body", BlobType(format="json")),
        )
        journal = Journal(metadata, memory_store, uri_columns=[table.c.meta])
        live, lost = (f"s3://bucket/prefix/notes/id={n:032x}" for n in range(2))
        unreadable = "not json" if database.is_sqlite else '{"note": "a\\u0000b"}'
        async with database.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            for uri in (live, lost):
                await connection.execute(sa.insert(journal.table).values(uri=uri, state="staged"))
                memory_store.objects[uri] = StoredObject(b"x", {}, {})
            await connection.execute(sa.insert(table).values(id=1, meta={"uri": live, "n": "é"}))
            columns = "meta, body" if database.is_sqlite else "meta"
            values = f"'{unreadable}', '{unreadable}'" if database.is_sqlite else f"'{unreadable}'"
            await connection.exec_driver_sql(
                f"INSERT INTO journaled_notes (id, {columns}) VALUES (2, {values})"
            )
            past = datetime(2020, 1, 1)  # noqa: DTZ001 - as SQLite stores it
            when = past if database.is_sqlite else past.replace(tzinfo=timezone.utc)
            await connection.execute(sa.update(journal.table).values(since=when))
        report = await Worker(journal, database.engine).run_once()
        check = Check(database.engine, memory_store, metadata, uri_columns=[table.c.meta])
        findings = [each async for each in check.findings()]
        async with database.engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)

        assert report == WorkReport(claimed=1, deleted=1)
        assert live in memory_store.objects
        assert lost not in memory_store.objects
        assert (findings, check.cells) == ([], 1)

    async def test_staging_twice(self, journaled: Journaled) -> None:
        """A batch whose commit is in doubt may be sent again, and changes nothing by it."""
        entries = worker(journaled)._entries
        for _ in range(2):
            async with journaled.database.engine.begin() as connection:
                await entries.stage(connection, [journaled.uri("d")])
                await entries.stage(connection, [])

        assert await journaled.states() == {"d": "staged"}

    async def test_in_batches(self, journaled: Journaled) -> None:
        """So many at a time, until nothing is due."""
        await journaled.stage("d", "e", "f")
        await pass_time(journaled, hours=1)

        reports = await worker(journaled, batch_size=2).drain()

        assert [report.claimed for report in reports] == [2, 1]


class TestFailures:
    async def test_is_tried_again(self, journaled: Journaled) -> None:
        """Later and later, with the reason in the journal; it is never adopted again."""
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")
        await pass_time(journaled, hours=1)
        journaled.store.fail("delete", times=2)

        report = await worker(journaled).run_once()

        assert set(report.failed) == {journaled.uri("a"), journaled.uri("b")}
        assert await journaled.states() == {"a": "deleting", "b": "deleting"}
        assert await worker(journaled).run_once() == WorkReport()
        await pass_time(journaled, hours=1)
        assert await worker(journaled).run_once() == WorkReport(claimed=2, deleted=2, removed=2)
        assert objects(journaled) == "cdef"

    async def test_refused_for_good(
        self, journaled: Journaled, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Parked for a day, with a reason that an operator can read."""

        async def refuse(uris: list[str]) -> DeleteReport:
            return DeleteReport(failed=dict.fromkeys(uris, "AccessDenied"))

        monkeypatch.setattr(journaled.store, "delete_many", refuse)
        await journaled.run("UPDATE <docs> SET body = NULL WHERE name = 'p'")
        await pass_time(journaled, hours=1)
        await worker(journaled).run_once()
        await pass_time(journaled, hours=23)

        assert await worker(journaled).run_once() == WorkReport()
        table = journaled.journal.table
        async with journaled.database.engine.connect() as connection:
            entry = (await connection.execute(sa.select(table))).one()
        assert (entry.attempts, entry.last_error) == (1, "parked: AccessDenied")
        assert entry.claim is None

    async def test_outside_of_every_store(self, journaled: Journaled) -> None:
        """An entry under none of its stores is another worker's: it is left as it was."""
        table = journaled.journal.table
        foreign = "s3://elsewhere/x/id=00000000000000000000000000000001"
        async with journaled.database.engine.begin() as connection:
            await connection.execute(sa.insert(table).values(uri=foreign, state="retired"))

        assert await worker(journaled).run_once() == WorkReport()
        async with journaled.database.engine.connect() as connection:
            entry = (await connection.execute(sa.select(table))).one()
        assert (entry.uri, entry.state, entry.attempts) == (foreign, "retired", 0)

    async def test_a_key_that_is_none_of_ours(self, journaled: Journaled) -> None:
        """One that a proxy may take for another prefix's is never deleted; the entry says why."""
        table = journaled.journal.table
        outside = "s3://bucket/prefix/../id=00000000000000000000000000000001"
        async with journaled.database.engine.begin() as connection:
            await connection.execute(sa.insert(table).values(uri=outside, state="retired"))

        report = await worker(journaled).run_once()

        assert report.failed == {outside: "under no store's bucket and prefix"}

    async def test_a_worker_that_was_killed(self, journaled: Journaled) -> None:
        """What it had claimed is taken over when its claim has run out."""
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")
        await pass_time(journaled, hours=1)
        entries = worker(journaled)._entries
        async with journaled.database.engine.begin() as connection:
            claimed = await entries.condemn(
                connection, claim="gone", limit=10, lease=timedelta(minutes=15)
            )
        assert len(claimed) == 2

        assert await worker(journaled).run_once() == WorkReport()
        await pass_time(journaled, hours=1)
        assert await worker(journaled).run_once() == WorkReport(claimed=2, deleted=2, removed=2)

    async def test_one_that_was_only_slow(self, journaled: Journaled) -> None:
        """Whoever has claimed an entry last removes it; the slow one removes nothing."""
        await journaled.run("UPDATE <docs> SET body = NULL WHERE name = 'p'")
        await pass_time(journaled, hours=1)
        entries = worker(journaled)._entries
        lease = timedelta(minutes=15)
        async with journaled.database.engine.begin() as connection:
            slow = await entries.condemn(connection, claim="slow", limit=10, lease=lease)
        await pass_time(journaled, hours=1)
        async with journaled.database.engine.begin() as connection:
            await entries.condemn(connection, claim="other", limit=10, lease=lease)
        async with journaled.database.engine.begin() as connection:
            removed = await entries.forget(connection, slow, claim="slow", quarantine=timedelta(0))

        assert removed == 0
        assert await journaled.states() == {"a": "deleting"}

    async def test_cancelled(self, journaled: Journaled) -> None:
        """What was deleted is noted first."""
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")
        await pass_time(journaled, hours=1)
        gate = journaled.store.hold("delete", stage="after")
        task = asyncio.create_task(worker(journaled).run_once())
        await gate.reached.wait()
        task.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert await journaled.states() == {}

    @pytest.mark.parametrize("attempts", [0, 1, 5, 1000])
    def test_back_off(self, attempts: int) -> None:
        """Twice as long each time, an hour at most."""
        assert back_off(attempts) == timedelta(seconds=min(2**attempts, 3600))

    def test_impossible_figures(self, journaled: Journaled) -> None:
        """They are refused."""
        for figures in ({"batch_size": 0}, {"claim_for": timedelta(0)}):
            with pytest.raises(InvalidInputError):
                worker(journaled, **figures)


class TestRun:
    async def test_until_it_is_stopped(self, journaled: Journaled) -> None:
        """It goes on with what becomes due, and ends after the round that is under way."""
        stop = asyncio.Event()
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")
        await pass_time(journaled, hours=1)
        gate = journaled.store.hold("delete", stage="after")
        task = asyncio.create_task(worker(journaled).run(stop))
        await gate.reached.wait()
        stop.set()
        gate.open()
        await task

        assert await journaled.states() == {}

    async def test_in_an_application(self, database: Database) -> None:
        """It shares the application's loop, and ends with it; as its docstring shows."""
        store = MemoryStore()
        async with open_journaled(database, store) as journaled:
            uri = journaled.uri("a")
            store.objects[uri] = StoredObject(b"x", {}, {})
            removed = asyncio.Event()

            @contextlib.asynccontextmanager
            async def lifespan(_: FastAPI) -> AsyncIterator[None]:
                stop = asyncio.Event()
                async with store, asyncio.TaskGroup() as group:
                    on_round: Any = lambda _report: removed.set()  # noqa: E731
                    group.create_task(worker(journaled, on_round=on_round).run(stop))
                    yield
                    stop.set()

            app = FastAPI(lifespan=lifespan)
            await journaled.run("UPDATE <docs> SET body = NULL WHERE name = 'p'")
            await pass_time(journaled, hours=1)
            async with app.router.lifespan_context(app):
                await removed.wait()

            assert uri not in store.objects
            assert await journaled.states() == {}

    async def test_stores_that_are_closed(self, database: Database, s3: S3Server) -> None:
        """That is no trouble of a server: it is raised at once."""
        store: Any = s3.open_store(bucket="bucket", prefix="prefix")
        async with open_journaled(database, store) as journaled:
            with pytest.raises(StoreClosedError, match="enter it first"):
                await worker(journaled).run(asyncio.Event())

    async def test_a_database_that_is_away(
        self, journaled: Journaled, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is asked again later."""
        stop = asyncio.Event()
        engine = journaled.database.engine
        failures = 0

        @sa.event.listens_for(engine.sync_engine, "before_cursor_execute")
        def fail(*_: object) -> None:
            nonlocal failures
            failures += 1
            if failures == 1:
                raise OSError("connection refused")
            stop.set()

        await worker(journaled, poll_every=timedelta(milliseconds=1)).run(stop)
        sa.event.remove(engine.sync_engine, "before_cursor_execute", fail)

        assert failures > 1
        assert "trying again later" in caplog.text

    async def test_many_workers(self, postgres: Database, memory_store: MemoryStore) -> None:
        """Each object is deleted by one of them, and none that is live."""
        async with open_journaled(postgres, memory_store) as journaled:
            uris = [f"s3://bucket/prefix/many/id={n:032x}" for n in range(300)]
            for uri in [*uris, *map(journaled.uri, "abc")]:
                memory_store.objects[uri] = StoredObject(b"x", {}, {})
            async with postgres.engine.begin() as connection:
                await connection.execute(
                    sa.insert(journaled.journal.table),
                    [{"uri": uri, "state": "retired", "owner": "{}"} for uri in uris],
                )
            memory_store.calls.clear()
            workers = [worker(journaled, batch_size=20) for _ in range(4)]
            rounds = await asyncio.gather(*(each.drain() for each in workers))

            assert sum(report.removed for each in rounds for report in each) == 300
            assert objects(journaled) == "abc"
            assert await journaled.states() == {}
            calls = [uris for operation, uris in memory_store.calls if operation == "delete"]
            deleted = [uri for call in calls for uri in call]
            assert sorted(deleted) == uris


class TestLostServers:
    @pytest.mark.parametrize("commit", ["the claim's", "the note's"])
    @pytest.mark.parametrize("mode", ["before_server", "after_server"])
    async def test_the_database(
        self, postgres: Database, memory_store: MemoryStore, mode: CutMode, commit: str
    ) -> None:
        """The wire is cut around a COMMIT, and the object is gone in the end all the same."""
        async with (
            postgres_proxy(postgres.engine.url.render_as_string(hide_password=False)) as proxy,
            open_journaled(postgres, memory_store) as journaled,
        ):
            memory_store.objects[journaled.uri("a")] = StoredObject(b"x", {}, {})
            await journaled.run("UPDATE <docs> SET body = NULL WHERE name = 'p'")
            await pass_time(journaled, hours=1)
            engine = create_async_engine(proxy.url)
            await claim(journaled.journal, engine)
            stop = asyncio.Event()

            def cut_the_second(step: Step) -> None:
                if step.operation == "delete" and not proxy.commit_arrived.is_set():
                    proxy.mode = mode

            if commit == "the claim's":
                proxy.mode = mode
            else:
                memory_store.hooks.append(cut_the_second)
            poll = timedelta(milliseconds=10)
            working = Worker(journaled.journal, engine, poll_every=poll).run(stop)
            task = asyncio.create_task(working)
            await proxy.commit_arrived.wait()
            proxy.mode = "pass"
            while await journaled.states():  # until its claim has run out
                await pass_time(journaled, hours=1)
            stop.set()
            await task
            await engine.dispose()

            assert journaled.uri("a") not in memory_store.objects
            assert await journaled.states() == {}

    async def test_the_store(self, database: Database, s3: S3Server) -> None:
        """No answer from S3: noted, tried again, and gone in the end."""
        bucket = f"lost-{uuid.uuid4().hex}"
        await s3.create_bucket(bucket)
        is_down = True
        failed, removed = asyncio.Event(), asyncio.Event()

        async def cut(request: Request, forward: Forward) -> Answer:
            is_delete = request.is_bulk_delete or request.method == "DELETE"
            return None if is_down and is_delete else await forward()

        def note(report: WorkReport) -> None:
            (failed if report.failed else removed).set()

        async with s3_proxy(s3.endpoint_url) as proxy:
            proxy.rule = cut
            behind = S3Server(proxy.endpoint_url)
            store: Any = behind.open_store(bucket=bucket, prefix="app")
            async with store, open_journaled(database, store) as journaled:
                key = journaled.uri("a").removeprefix(f"s3://{bucket}/")
                await store.client.put_object(Bucket=bucket, Key=key, Body=b"x")
                await journaled.run("UPDATE <docs> SET body = NULL WHERE name = 'p'")
                await pass_time(journaled, hours=1)
                stop = asyncio.Event()
                poll = timedelta(milliseconds=10)
                working = worker(journaled, poll_every=poll, on_round=note).run(stop)
                task = asyncio.create_task(working)
                await failed.wait()
                assert await journaled.states() == {"a": "deleting"}
                is_down = False
                await pass_time(journaled, hours=1)
                await removed.wait()
                stop.set()
                await task

                assert journaled.uri("a") not in [uri async for uri in store.iter_uris()]
                assert await journaled.states() == {}
