"""The worker: what it deletes, when, and what it leaves alone; on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from support.databases import Database
from support.journal import Journaled, open_journaled

from aioblobcol import DeleteReport, InvalidInputError
from aioblobcol._journal import Journal, back_off
from aioblobcol._worker import Worker, WorkReport
from aioblobcol.testing import MemoryStore, StoredObject


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
        """An entry that somebody else has written is never deleted through these stores."""
        table = journaled.journal.table
        foreign = "s3://elsewhere/x/id=00000000000000000000000000000001"
        async with journaled.database.engine.begin() as connection:
            await connection.execute(sa.insert(table).values(uri=foreign, state="retired"))

        report = await worker(journaled).run_once()

        assert report.failed == {foreign: "under no store's bucket and prefix"}

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
            deleted = [uri for call in memory_store.calls for uri in call[1]]
            assert sorted(deleted) == uris
