"""The check: what it reports, what it does not, and what it deletes; on both databases."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from support.databases import Database
from support.journal import Journaled, open_journaled

from aioblobcol import BlobType, InvalidInputError, Journal, StoreUnavailableError
from aioblobcol._check import Check, Finding, FindingKind, KeyRange
from aioblobcol._store._base import ListedObject
from aioblobcol.testing import MemoryStore, StoredObject

OLD = datetime(2020, 1, 1, tzinfo=timezone.utc)
LONG_AGO = OLD


@pytest_asyncio.fixture
async def journaled(database: Database, memory_store: MemoryStore) -> AsyncIterator[Journaled]:
    """Give the journaled tables, and the objects of a, b and c, which rows name."""
    async with open_journaled(database, memory_store) as opened:
        for name in "abc":
            place(opened, name)
        yield opened


def place(journaled: Journaled, name: str, *, modified_at: datetime = OLD) -> None:
    """Put an object into the store that nobody has asked for."""
    stored = StoredObject(name.encode(), {}, {}, modified_at=modified_at)
    journaled.store.objects[journaled.uri(name)] = stored


def check(journaled: Journaled, *, with_journal: bool = False, **arguments: Any) -> Check:
    metadata = journaled.journal.table.metadata
    return Check(
        journaled.database.engine,
        journaled.store,
        metadata,
        uri_columns=[metadata.tables["journaled docs"].c.URL],
        journal=journaled.journal if with_journal else None,
        **arguments,
    )


async def found_by(one: Check, journaled: Journaled) -> list[tuple[str, str]]:
    """Return kind and short name of each finding."""
    names = {journaled.uri(name): name for name in "abcdef"}
    return [(each.kind.value, names[each.uri]) async for each in one.findings()]


async def without_triggers(journaled: Journaled, *statements: str) -> None:
    """Write rows as a program does that does not know the journal."""
    async with journaled.database.engine.begin() as connection:
        await connection.run_sync(journaled.journal.drop_triggers)
    await journaled.run(*statements)


def many_uri(number: int) -> str:
    return f"s3://bucket/prefix/y/id={number:032x}"


class TestFindings:
    async def test_nothing(self, journaled: Journaled) -> None:
        """Stores that agree give none, and what was compared is counted."""
        one = check(journaled)

        assert await found_by(one, journaled) == []
        assert (one.objects, one.cells, one.undecided) == (3, 3, [])

    async def test_both_directions(self, journaled: Journaled) -> None:
        """In the order of the URIs: orphans, dangling rows, and objects in two cells."""
        place(journaled, "d")
        place(journaled, "f")
        del journaled.store.objects[journaled.uri("b")]
        await without_triggers(
            journaled, "INSERT INTO <docs> (name, body, \"URL\") VALUES ('r', <c>, <e>)"
        )

        assert await found_by(check(journaled), journaled) == [
            ("dangling", "b"),
            ("shared", "c"),
            ("orphan", "d"),
            ("dangling", "e"),
            ("orphan", "f"),
        ]

    async def test_an_orphan_is_described(self, journaled: Journaled) -> None:
        """By its size and its age."""
        place(journaled, "d")

        assert [each async for each in check(journaled).findings()] == [
            Finding(FindingKind.ORPHAN, journaled.uri("d"), 1, OLD)
        ]

    async def test_what_is_young(self, journaled: Journaled) -> None:
        """Its transaction may be under way: without a journal it is not reported."""
        place(journaled, "d", modified_at=datetime.now(timezone.utc))

        assert await found_by(check(journaled), journaled) == []
        no_age = check(journaled, min_age=timedelta(0))
        assert await found_by(no_age, journaled) == [("orphan", "d")]

    async def test_what_the_journal_lists(self, journaled: Journaled) -> None:
        """It is under way, or about to be deleted; with a journal no age needs to be waited for."""
        now = datetime.now(timezone.utc)
        place(journaled, "d", modified_at=now)
        place(journaled, "e", modified_at=now)
        await journaled.stage("d")

        one = check(journaled, with_journal=True, min_age=timedelta(0))
        assert await found_by(one, journaled) == [("orphan", "e")]

    async def test_foreign(self, journaled: Journaled) -> None:
        """What lies outside of the store's bucket and prefix is somebody else's."""
        await without_triggers(
            journaled,
            "INSERT INTO <docs> (name, body) VALUES ('r', 's3://elsewhere/x'), "
            "('s', 's3://bucket/prefix2/x'), ('t', 's3://bucket/prefix/../x')",
        )

        assert await found_by(check(journaled), journaled) == []

    async def test_objects_of_others(self, journaled: Journaled) -> None:
        """What has no id in its key was not made here: it is counted, and never deleted."""
        others = [f"s3://bucket/prefix/{name}" for name in ("a.txt", "x/md5=1", "x/id=12")]
        for uri in others:
            journaled.store.objects[uri] = StoredObject(b"x", {}, {}, modified_at=OLD)
        one = check(journaled, delete=True)

        assert [each async for each in one.findings()] == []
        assert (one.objects, one.foreign) == (6, 3)
        assert journaled.store.objects.keys() >= set(others)

    async def test_more_than_are_looked_at_at_once(self, journaled: Journaled) -> None:
        """Batches of findings come out in order and complete."""
        for number in range(250):
            uri = f"s3://bucket/prefix/y/id={number:032x}"
            journaled.store.objects[uri] = StoredObject(b"x", {}, {}, modified_at=OLD)

        found = [each.uri async for each in check(journaled).findings()]

        assert len(found) == 250
        assert found == sorted(found)

    async def test_a_marker_of_ownership(self, journaled: Journaled) -> None:
        """The object that tells whose the prefix is belongs to no row: it is not even counted."""
        marker = "s3://bucket/prefix/.aioblobcol-owner"
        journaled.store.objects[marker] = StoredObject(b"x", {}, {}, modified_at=OLD)
        one = check(journaled, delete=True)

        assert await found_by(one, journaled) == []
        assert (one.objects, one.foreign) == (3, 0)
        assert marker in journaled.store.objects

    async def test_keys_that_are_never_deleted(
        self, journaled: Journaled, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An object whose key climbs out of the prefix is somebody else's, whatever its id."""
        odd = [f"s3://bucket/prefix/{way}/id={1:032x}" for way in ("..", "x/../y", "x//y", ".")]

        async def listed(**_: Any) -> AsyncGenerator[ListedObject, None]:
            for uri in sorted([*odd, *map(journaled.uri, "abc")]):
                yield ListedObject(uri, 1)

        monkeypatch.setattr(journaled.store, "iter_objects", listed)
        one = check(journaled, delete=True)

        assert await found_by(one, journaled) == []
        assert one.foreign == len(odd)

    async def test_another_size(self, journaled: Journaled) -> None:
        """Where a cell tells the size, the object has it."""
        stored = StoredObject(b"12345", {}, {}, modified_at=OLD)
        journaled.store.objects[journaled.uri("b")] = stored

        assert [each async for each in check(journaled).findings()] == [
            Finding(FindingKind.SIZE_MISMATCH, journaled.uri("b"), 5, reason="the row says 1 bytes")
        ]

    async def test_a_size_that_is_none(self, journaled: Journaled) -> None:
        """A cell that tells no size, or nonsense, is compared with nothing."""
        await without_triggers(journaled)
        update = sa.text("UPDATE \"journaled docs\" SET scan = :scan WHERE name = 'p'")
        update = update.bindparams(sa.bindparam("scan", type_=sa.JSON))
        for more in ({}, {"size": "x"}, {"size": None}, {"size": 1.5}):
            async with journaled.database.engine.begin() as connection:
                await connection.execute(update, {"scan": {"uri": journaled.uri("b"), **more}})

            assert await found_by(check(journaled), journaled) == []

    async def test_a_row_that_changed_meanwhile(self, journaled: Journaled) -> None:
        """A size is compared with what the row says on the second look."""
        journaled.store.objects[journaled.uri("b")] = StoredObject(b"12", {}, {}, modified_at=OLD)
        await without_triggers(journaled)
        head = journaled.store.head

        async def late(uri: str) -> Any:
            await journaled.run("UPDATE <docs> SET scan = NULL")
            return await head(uri)

        journaled.store.head = late  # type: ignore[method-assign]

        assert await found_by(check(journaled), journaled) == []


class TestEntries:
    """What the journal lists is looked at, too."""

    async def enter(self, journaled: Journaled, name: str, state: str, **values: Any) -> None:
        """Write an entry as time would have left it."""
        values = {"since": LONG_AGO, "not_before": LONG_AGO, **values}
        insert = sa.insert(journaled.journal.table)
        async with journaled.database.engine.begin() as connection:
            row = {"uri": journaled.uri(name), "state": state, **values}
            await connection.execute(insert.values(row))

    @pytest.mark.parametrize("state", ["staged", "retired", "deleting"])
    async def test_that_are_overdue(self, journaled: Journaled, state: str) -> None:
        """A worker should have taken them long ago; it is told since when."""
        await self.enter(journaled, "d", state)
        one = check(journaled, with_journal=True)

        assert [each async for each in one.findings()] == [
            Finding(FindingKind.STUCK, journaled.uri("d"), reason=f"{state} since 2020-01-01 00:00")
        ]

    @pytest.mark.parametrize(
        "values",
        [
            {"attempts": 1, "last_error": "parked: AccessDenied"},
            {"attempts": 10, "last_error": "InternalError"},
        ],
    )
    async def test_that_cannot_be_deleted(
        self, journaled: Journaled, values: dict[str, Any]
    ) -> None:
        """Refused for good, or again and again: with the last error."""
        later = datetime(2100, 1, 1, tzinfo=timezone.utc)
        await self.enter(journaled, "d", "deleting", not_before=later, **values)

        (found,) = [each async for each in check(journaled, with_journal=True).findings()]

        assert found.kind is FindingKind.STUCK
        told = f"failed {values['attempts']} times: {values['last_error']}"
        assert (found.reason or "").endswith(told)

    async def test_that_are_on_their_way(self, journaled: Journaled) -> None:
        """What is staged within its lease, not due, or due since a moment, is as it should be."""
        now = datetime.now(timezone.utc)
        later = datetime(2100, 1, 1, tzinfo=timezone.utc)
        await self.enter(journaled, "d", "staged", since=now, not_before=now)
        await self.enter(journaled, "e", "retired", not_before=later)
        await self.enter(
            journaled, "f", "deleting", not_before=now, attempts=1, last_error="InternalError"
        )

        assert await found_by(check(journaled, with_journal=True), journaled) == []
        at_once = check(journaled, with_journal=True, grace=timedelta(0))
        assert await found_by(at_once, journaled) == [("stuck", "f")]

    async def test_that_a_worker_took_meanwhile(self, journaled: Journaled) -> None:
        """They are not stuck any more."""
        await self.enter(journaled, "d", "retired")
        one = check(journaled, with_journal=True)
        listed = journaled.store.iter_objects

        async def late(**arguments: Any) -> AsyncGenerator[ListedObject, None]:
            async for each in listed(**arguments):
                yield each
            await journaled.run("DELETE FROM aioblobcol_journal")

        journaled.store.iter_objects = late  # type: ignore[method-assign]

        assert await found_by(one, journaled) == []

    @pytest.mark.parametrize("state", ["retired", "deleting"])
    async def test_that_rows_name(self, journaled: Journaled, state: str) -> None:
        """An object in use that is about to be deleted is doomed: with the state that it has."""
        later = datetime(2100, 1, 1, tzinfo=timezone.utc)
        await self.enter(journaled, "a", state, not_before=later)
        one = check(journaled, with_journal=True)

        assert [each async for each in one.findings()] == [
            Finding(
                FindingKind.DOOMED, journaled.uri("a"), reason=f"{state} since 2020-01-01 00:00"
            )
        ]

    async def test_that_rows_let_go_meanwhile(self, journaled: Journaled) -> None:
        """An entry is compared with the rows of the same moment."""
        later = datetime(2100, 1, 1, tzinfo=timezone.utc)
        await self.enter(journaled, "a", "deleting", not_before=later)
        await without_triggers(journaled)
        listed = journaled.store.iter_objects

        async def late(**arguments: Any) -> AsyncGenerator[ListedObject, None]:
            async for each in listed(**arguments):
                yield each
            await journaled.run("UPDATE <docs> SET body = NULL")

        journaled.store.iter_objects = late  # type: ignore[method-assign]

        assert await found_by(check(journaled, with_journal=True), journaled) == []

    async def test_of_other_stores(self, journaled: Journaled) -> None:
        """What lies outside of the store's prefix is another check's."""
        async with journaled.database.engine.begin() as connection:
            uri = f"s3://elsewhere/x/id={1:032x}"
            row = {"uri": uri, "state": "staged", "since": LONG_AGO}
            await connection.execute(sa.insert(journaled.journal.table).values(row))

        assert await found_by(check(journaled, with_journal=True), journaled) == []


class TestLookingAgain:
    """The two streams are never of one moment."""

    async def test_a_row_that_came_meanwhile(self, journaled: Journaled) -> None:
        """Its object, which was listed before, is no orphan."""
        place(journaled, "d")
        await journaled.stage("d")
        listed = journaled.store.iter_objects

        async def late(**arguments: Any) -> AsyncGenerator[ListedObject, None]:
            async for each in listed(**arguments):
                yield each
            await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <d>)")

        journaled.store.iter_objects = late  # type: ignore[method-assign]

        assert await found_by(check(journaled), journaled) == []

    async def test_a_row_that_went_meanwhile(self, journaled: Journaled) -> None:
        """Its object, which is gone, is not missed."""
        listed = journaled.store.iter_objects

        async def late(**arguments: Any) -> AsyncGenerator[ListedObject, None]:
            del journaled.store.objects[journaled.uri("a")]
            async for each in listed(**arguments):
                yield each
            await journaled.run("UPDATE <docs> SET body = NULL")

        journaled.store.iter_objects = late  # type: ignore[method-assign]

        assert await found_by(check(journaled), journaled) == []

    async def test_a_store_that_does_not_answer(self, journaled: Journaled) -> None:
        """What could not be looked at again is neither reported nor deleted, and named."""
        place(journaled, "d")
        journaled.store.fail("head")
        one = check(journaled, delete=True)

        assert await found_by(one, journaled) == []
        assert one.undecided == [journaled.uri("d")]
        assert journaled.uri("d") in journaled.store.objects

    async def test_a_bucket_that_cannot_be_listed(
        self, journaled: Journaled, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The check ends with its error, and rows are not taken for dangling ones."""

        async def broken(**_: Any) -> AsyncGenerator[ListedObject, None]:
            yield ListedObject(journaled.uri("a"), 1)
            raise StoreUnavailableError("list", "s3://bucket/prefix/", "gone")

        monkeypatch.setattr(journaled.store, "iter_objects", broken)
        with pytest.raises(StoreUnavailableError):
            await found_by(check(journaled), journaled)

    @pytest.mark.parametrize("order", ["ba", "aa"])
    async def test_a_bucket_out_of_order(
        self, journaled: Journaled, monkeypatch: pytest.MonkeyPatch, order: str
    ) -> None:
        """A listing that is not sorted by bytes would be compared wrongly."""

        async def unsorted(**_: Any) -> AsyncGenerator[ListedObject, None]:
            for name in order:
                yield ListedObject(journaled.uri(name), 1)

        monkeypatch.setattr(journaled.store, "iter_objects", unsorted)
        with pytest.raises(RuntimeError, match="does not sort by bytes"):
            await found_by(check(journaled), journaled)

    async def test_keys_beyond_ascii(self, journaled: Journaled) -> None:
        """Both sides sort by bytes, whatever the database's locale says."""
        for key in ("é", "z", "Z", "a/b", "a b", "\uffff", "\U0001f600"):
            uri = f"s3://bucket/prefix/{key}/id={1:032x}"
            journaled.store.objects[uri] = StoredObject(b"x", {}, {}, modified_at=OLD)
            await journaled.stage_uri(uri)
            async with journaled.database.engine.begin() as connection:
                insert = sa.text('INSERT INTO "journaled docs" (name, body) VALUES (:key, :uri)')
                await connection.execute(insert, {"key": key, "uri": uri})

        assert await found_by(check(journaled), journaled) == []


class TestDeleting:
    async def test_without_a_journal(self, journaled: Journaled) -> None:
        """Old orphans are deleted, young ones and everything else stay."""
        place(journaled, "d")
        place(journaled, "e", modified_at=datetime.now(timezone.utc))

        found = [each async for each in check(journaled, delete=True).findings()]

        assert [(each.uri, each.is_condemned) for each in found] == [(journaled.uri("d"), True)]
        names = [name for name in "abcdef" if journaled.uri(name) in journaled.store.objects]
        assert names == list("abce")

    async def test_with_a_journal(self, journaled: Journaled) -> None:
        """Orphans are entered, so that nobody adopts them, and the worker deletes them."""
        place(journaled, "d")
        one = check(journaled, with_journal=True, delete=True)

        assert await found_by(one, journaled) == [("orphan", "d")]
        assert await journaled.states() == {"d": "deleting"}
        assert journaled.uri("d") in journaled.store.objects
        again = check(journaled, with_journal=True, delete=True)
        assert await found_by(again, journaled) == []

    @pytest.mark.parametrize("with_journal", [True, False])
    async def test_a_row_takes_it_at_the_last_moment(
        self, journaled: Journaled, *, with_journal: bool
    ) -> None:
        """The rows are asked again after everything else, and it stays."""
        place(journaled, "d")
        await without_triggers(journaled)
        head = journaled.store.head

        async def late(uri: str) -> Any:
            info = await head(uri)
            if uri == journaled.uri("d"):
                await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <d>)")
            return info

        journaled.store.head = late  # type: ignore[method-assign]
        one = check(journaled, with_journal=with_journal, delete=True)
        found = [each async for each in one.findings()]

        assert not any(each.is_condemned for each in found)
        assert journaled.uri("d") in journaled.store.objects
        assert await journaled.states() == {}


class TestRaces:
    """A check condemns what a program takes into use at the same time; PostgreSQL."""

    @pytest_asyncio.fixture
    async def journaled(
        self, postgres: Database, memory_store: MemoryStore
    ) -> AsyncIterator[Journaled]:
        async with open_journaled(postgres, memory_store) as opened:
            for name in "abcd":
                place(opened, name)
            yield opened

    async def somebody_waits(self, journaled: Journaled) -> None:
        """Return when a transaction waits for another one."""
        waiting = sa.text(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        async with journaled.database.engine.connect() as connection:
            while not (await connection.execute(waiting)).scalar_one():
                await connection.rollback()  # its view of the activity is of one moment

    @pytest.mark.parametrize("ends", ["commit", "rollback"])
    async def test_an_adoption_that_came_first(self, journaled: Journaled, ends: str) -> None:
        """It is waited for: committed, the row keeps its object; or else the entry is the old."""
        one = check(journaled, with_journal=True, delete=True)
        assert one._entries is not None
        enter_orphan = one._entries.enter_orphan

        async def meanwhile(connection: AsyncConnection, uri: str) -> bool:
            await journaled.stage("d")
            async with journaled.database.engine.connect() as writer:
                insert = journaled.filled("INSERT INTO <docs> (name, body) VALUES ('r', <d>)")
                await writer.exec_driver_sql(insert)
                entering = asyncio.create_task(enter_orphan(connection, uri))
                await self.somebody_waits(journaled)
                await getattr(writer, ends)()
            return await entering

        one._entries.enter_orphan = meanwhile  # type: ignore[method-assign]

        assert await found_by(one, journaled) == []
        assert journaled.uri("d") in journaled.store.objects
        assert await journaled.states() == ({} if ends == "commit" else {"d": "staged"})

    async def test_an_adoption_that_came_second(self, journaled: Journaled) -> None:
        """It waits for the check, and is refused: no row ever names what will be deleted."""
        one = check(journaled, with_journal=True, delete=True)
        assert one._entries is not None
        enter_orphan = one._entries.enter_orphan
        writers: list[asyncio.Task[None]] = []

        async def write() -> None:
            async with journaled.database.engine.begin() as writer:
                values = {"uri": journaled.uri("d"), "state": "staged"}
                insert = postgresql.insert(journaled.journal.table).values(values)
                await writer.execute(insert.on_conflict_do_nothing())
                row = "INSERT INTO <docs> (name, body) VALUES ('r', <d>)"
                await writer.exec_driver_sql(journaled.filled(row))

        async def meanwhile(connection: AsyncConnection, uri: str) -> bool:
            is_entered = await enter_orphan(connection, uri)
            writers.append(asyncio.create_task(write()))
            await self.somebody_waits(journaled)
            return is_entered

        one._entries.enter_orphan = meanwhile  # type: ignore[method-assign]

        assert await found_by(one, journaled) == [("orphan", "d")]
        with pytest.raises(DBAPIError, match="being deleted"):
            await writers[0]
        assert await journaled.states() == {"d": "deleting"}

    async def test_an_adoption_without_staging(self, journaled: Journaled) -> None:
        """It is refused also while the check has not committed yet."""
        one = check(journaled, with_journal=True, delete=True)
        assert one._entries is not None
        enter_orphan = one._entries.enter_orphan

        async def meanwhile(connection: AsyncConnection, uri: str) -> bool:
            is_entered = await enter_orphan(connection, uri)
            with pytest.raises(DBAPIError, match="never staged"):
                await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <d>)")
            return is_entered

        one._entries.enter_orphan = meanwhile  # type: ignore[method-assign]

        assert await found_by(one, journaled) == [("orphan", "d")]
        assert await journaled.states() == {"d": "deleting"}


class TestRanges:
    """A check of some keys, of all keys in parts, and one that goes on where another stopped."""

    @pytest_asyncio.fixture
    async def many(self, journaled: Journaled) -> Journaled:
        """Give 300 rows with objects, every tenth of which is missing, and 30 orphans between."""
        await without_triggers(journaled)
        insert = sa.text('INSERT INTO "journaled docs" (name, body) VALUES (:name, :body)')
        async with journaled.database.engine.begin() as connection:
            for number in range(330):
                uri = many_uri(number)
                if number % 10 or number % 11 == 0:
                    stored = StoredObject(b"x", {}, {}, modified_at=OLD)
                    journaled.store.objects[uri] = stored
                if number % 11:
                    await connection.execute(insert, {"name": f"n{number}", "body": uri})
        return journaled

    EXPECTED = frozenset(number for number in range(330) if number % 11 == 0 or number % 10 == 0)

    async def test_one(self, many: Journaled) -> None:
        """It begins after its first end and includes its last one."""
        one = check(many, ranges=[KeyRange(many_uri(10), many_uri(20))])

        found = [each.uri async for each in one.findings()]

        assert found == [many_uri(11), many_uri(20)]
        assert (one.objects, one.cells) == (9, 9)

    @pytest.mark.parametrize("jobs", [2, 3, 8])
    async def test_that_cover_everything(self, many: Journaled, jobs: int) -> None:
        """Any number of jobs finds the same, each thing once, and uses one connection more."""
        in_use: list[int] = [0]
        pool = many.database.engine.sync_engine.pool
        sa.event.listen(pool, "checkout", lambda *_: in_use.append(in_use[-1] + 1))
        sa.event.listen(pool, "checkin", lambda *_: in_use.append(in_use[-1] - 1))
        one = check(many, jobs=jobs)
        found = sorted([each.uri async for each in one.findings()])

        assert max(in_use) <= jobs + 1
        assert found == sorted(map(many_uri, self.EXPECTED))
        assert (one.objects, one.cells, one.left) == (300 + 3, 300 + 3, [])

    async def test_are_shared_out_by_the_rows(self, many: Journaled) -> None:
        """Ranges hold about as many rows each."""
        one = check(many, jobs=3)
        async with contextlib.aclosing(one.findings()) as findings:
            await anext(findings)
            ends = [each.up_to for each in one.left]

        assert ends == [many_uri(number) for number in (108, 219)] + [None]

    @pytest.mark.parametrize("jobs", [1, 3])
    async def test_that_are_left(
        self, many: Journaled, monkeypatch: pytest.MonkeyPatch, jobs: int
    ) -> None:
        """Wherever a check is stopped, another one that goes on with what is left misses nothing.

        What was found after the last position may be found again, and nothing else is.
        """
        monkeypatch.setattr("aioblobcol._check._check.PROGRESS_EVERY", 20)
        for stop_after in range(0, len(self.EXPECTED), 7):
            first = check(many, jobs=jobs)
            found: list[str] = []
            left = first.left
            async with contextlib.aclosing(first.findings()) as findings:
                async for each in findings:
                    if len(found) == stop_after:
                        left = first.left
                        break
                    found.append(each.uri)
            rest = check(many, jobs=jobs, ranges=left)
            again = [each.uri async for each in rest.findings()]

            assert {*found, *again} == set(map(many_uri, self.EXPECTED))
            assert len(found) + len(again) <= len(self.EXPECTED) + 4 * jobs
            assert rest.left == []

    async def test_tell_how_far_it_is(
        self, many: Journaled, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Which part of the rows is behind grows from 0 to 1."""
        monkeypatch.setattr("aioblobcol._check._check.PROGRESS_EVERY", 20)
        one = check(many)
        assert one.fraction is None
        told: list[float] = []
        one.on_progress = lambda: told.append(one.fraction or 0)
        assert [each async for each in one.findings()]

        assert len(told) > 10
        assert told == sorted(told)
        assert told[0] < 0.1
        assert told[-1] == 1

    async def test_without_rows(self, journaled: Journaled) -> None:
        """There is nothing to share out, and the orphans are found."""
        await without_triggers(journaled, "DELETE FROM <docs>")
        one = check(journaled, jobs=4)

        assert await found_by(one, journaled) == [("orphan", name) for name in "abc"]
        assert one.fraction is None

    async def test_an_error_in_one(self, many: Journaled, monkeypatch: pytest.MonkeyPatch) -> None:
        """It ends all of them, and none is taken for done."""
        listed = many.store.iter_objects

        async def broken(*, start_after: str) -> AsyncGenerator[ListedObject, None]:
            if start_after:
                raise StoreUnavailableError("list", "s3://bucket/prefix/", "gone")
            async for each in listed(start_after=start_after):
                yield each

        monkeypatch.setattr(many.store, "iter_objects", broken)
        one = check(many, jobs=2)
        with pytest.raises(StoreUnavailableError):
            assert [each async for each in one.findings()]
        assert one.left[-1].up_to is None


class TestMemory:
    async def test_does_not_grow_with_what_is_compared(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ten times as many objects and rows take no more of it."""
        metadata = sa.MetaData()
        table = sa.Table("compared", metadata, sa.Column("url", sa.Text, primary_key=True))
        async with database.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)

        class Endless(MemoryStore):
            async def iter_objects(
                self, *, start_after: str = "", with_times: bool = False
            ) -> AsyncGenerator[ListedObject, None]:
                for number in range(count):
                    yield ListedObject(many_uri(number), 1)

        peaks = []
        async with Endless() as store:
            for count in (2_000, 2_000, 20_000):  # the first one fills caches
                async with database.engine.begin() as connection:
                    await connection.execute(sa.delete(table))
                    values = [{"url": many_uri(number)} for number in range(count)]
                    await connection.execute(sa.insert(table), values)
                del values
                one = Check(database.engine, store, metadata, uri_columns=[table.c.url])
                gc.collect()
                tracemalloc.start()
                found = [each async for each in one.findings()]
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()

                assert found == []
                assert (one.objects, one.cells) == (count, count)
        async with database.engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)

        assert peaks[2] < peaks[1] + 500_000


class TestRowsThatAreHidden:
    async def test_by_the_database(self, postgres: Database, memory_store: MemoryStore) -> None:
        """A role that may not see all rows is told so, in place of finding orphans."""
        async with open_journaled(postgres, memory_store) as journaled:
            for name in "abc":
                place(journaled, name)
            await journaled.run(
                "ALTER TABLE <docs> ENABLE ROW LEVEL SECURITY",
                "DROP ROLE IF EXISTS check_reader",
                "CREATE ROLE check_reader LOGIN",
                "GRANT SELECT ON <docs>, journaled_pages, aioblobcol_journal TO check_reader",
            )
            role = {"server_settings": {"role": "check_reader"}}
            engine = postgres.engine_with(connect_args=role)
            metadata = journaled.journal.table.metadata
            one = Check(engine, memory_store, metadata, delete=True, min_age=timedelta(0))
            with pytest.raises(DBAPIError, match="row-level security"):
                await found_by(one, journaled)
            await engine.dispose()
            await journaled.run(
                "REVOKE ALL ON <docs>, journaled_pages, aioblobcol_journal FROM check_reader",
                "DROP ROLE check_reader",
            )

            assert set("abc") == {n for n in "abc" if journaled.uri(n) in memory_store.objects}

    async def test_by_its_isolation(self, postgres: Database, memory_store: MemoryStore) -> None:
        """Whatever level the application's engine has, each look is at what is committed."""
        async with open_journaled(postgres, memory_store) as journaled:
            for name in "abcd":
                place(journaled, name)
            await journaled.stage("d")
            listed = memory_store.iter_objects

            async def late(**arguments: Any) -> AsyncGenerator[ListedObject, None]:
                async for each in listed(**arguments):
                    yield each
                await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <d>)")

            memory_store.iter_objects = late  # type: ignore[method-assign]
            for level in ("REPEATABLE READ", "AUTOCOMMIT"):
                engine = postgres.engine.execution_options(isolation_level=level)
                metadata = journaled.journal.table.metadata
                url = metadata.tables["journaled docs"].c.URL
                one = Check(engine, memory_store, metadata, uri_columns=[url], delete=True)
                assert await found_by(one, journaled) == []
                memory_store.iter_objects = listed  # type: ignore[method-assign]


class TestArguments:
    def test_columns_that_would_be_overlooked(self, journaled: Journaled) -> None:
        """Of other tables than those of the metadata, or of types that hold no URI."""
        metadata = sa.MetaData()
        table = sa.Table(
            "t",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("body", BlobType()),
        )
        for column in (table.c.id, sa.Table("u", sa.MetaData(), sa.Column("url", sa.Text)).c.url):
            with pytest.raises(InvalidInputError, match="uri_columns"):
                Check(journaled.database.engine, journaled.store, metadata, uri_columns=[column])

    def test_no_column(self, journaled: Journaled) -> None:
        """Models that were not imported would make every object an orphan."""
        with pytest.raises(InvalidInputError, match="imported"):
            Check(journaled.database.engine, journaled.store, sa.MetaData())
        with pytest.raises(InvalidInputError, match="uri_columns"):
            Check(journaled.database.engine, journaled.store, sa.MetaData(), uri_columns=["x"])

    def test_an_impossible_age(self, journaled: Journaled) -> None:
        """It is refused."""
        with pytest.raises(InvalidInputError):
            check(journaled, min_age=timedelta(seconds=-1))
        with pytest.raises(InvalidInputError):
            check(journaled, grace=timedelta(seconds=-1))

    def test_no_job(self, journaled: Journaled) -> None:
        """Nobody would do it."""
        with pytest.raises(InvalidInputError, match="jobs"):
            check(journaled, jobs=0)

    def test_meanings(self) -> None:
        """Each kind is told in a sentence."""
        assert all(kind.meaning for kind in FindingKind)


async def test_sqlite_without_a_log_is_refused(tmp_path: Path, memory_store: MemoryStore) -> None:
    """To read and to condemn at one time it would lock itself out: nothing is begun."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'plain.db'}")
    metadata = sa.MetaData()
    sa.Table("t", metadata, sa.Column("k", sa.Text, primary_key=True), sa.Column("b", BlobType()))
    journal = Journal(metadata, memory_store)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    memory_store.objects[f"s3://bucket/prefix/x/id={1:032x}"] = StoredObject(
        b"x", {}, {}, modified_at=OLD
    )
    with pytest.raises(RuntimeError, match="journal_mode=WAL"):
        to_delete = Check(engine, memory_store, metadata, journal=journal, delete=True)
        [each async for each in to_delete.findings()]
    only_looking = Check(engine, memory_store, metadata, journal=journal)
    assert len([each async for each in only_looking.findings()]) == 1
    await engine.dispose()
