"""The check: what it reports, what it does not, and what it deletes; on both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from support.databases import Database
from support.journal import Journaled, open_journaled

from aioblobcol import BlobType, InvalidInputError, StoreUnavailableError
from aioblobcol._check import Check, Finding, FindingKind
from aioblobcol.testing import MemoryStore, StoredObject

OLD = datetime(2020, 1, 1, tzinfo=timezone.utc)


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


class TestLookingAgain:
    """The two streams are never of one moment."""

    async def test_a_row_that_came_meanwhile(self, journaled: Journaled) -> None:
        """Its object, which was listed before, is no orphan."""
        place(journaled, "d")
        await journaled.stage("d")
        listed = journaled.store.iter_uris

        async def late() -> AsyncIterator[str]:
            async for uri in listed():
                yield uri
            await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <d>)")

        journaled.store.iter_uris = late  # type: ignore[method-assign]

        assert await found_by(check(journaled), journaled) == []

    async def test_a_row_that_went_meanwhile(self, journaled: Journaled) -> None:
        """Its object, which is gone, is not missed."""
        listed = journaled.store.iter_uris

        async def late() -> AsyncIterator[str]:
            del journaled.store.objects[journaled.uri("a")]
            async for uri in listed():
                yield uri
            await journaled.run("UPDATE <docs> SET body = NULL")

        journaled.store.iter_uris = late  # type: ignore[method-assign]

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

        async def broken() -> AsyncIterator[str]:
            yield journaled.uri("a")
            raise StoreUnavailableError("list", "s3://bucket/prefix/", "gone")

        monkeypatch.setattr(journaled.store, "iter_uris", broken)
        with pytest.raises(StoreUnavailableError):
            await found_by(check(journaled), journaled)

    @pytest.mark.parametrize("order", ["ba", "aa"])
    async def test_a_bucket_out_of_order(
        self, journaled: Journaled, monkeypatch: pytest.MonkeyPatch, order: str
    ) -> None:
        """A listing that is not sorted by bytes would be compared wrongly."""

        async def unsorted() -> AsyncIterator[str]:
            for name in order:
                yield journaled.uri(name)

        monkeypatch.setattr(journaled.store, "iter_uris", unsorted)
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
            listed = memory_store.iter_uris

            async def late() -> AsyncIterator[str]:
                async for uri in listed():
                    yield uri
                await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <d>)")

            memory_store.iter_uris = late  # type: ignore[method-assign]
            for level in ("REPEATABLE READ", "AUTOCOMMIT"):
                engine = postgres.engine.execution_options(isolation_level=level)
                metadata = journaled.journal.table.metadata
                url = metadata.tables["journaled docs"].c.URL
                one = Check(engine, memory_store, metadata, uri_columns=[url], delete=True)
                assert await found_by(one, journaled) == []
                memory_store.iter_uris = listed  # type: ignore[method-assign]


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

    def test_meanings(self) -> None:
        """Each kind is told in a sentence."""
        assert all(kind.meaning for kind in FindingKind)
