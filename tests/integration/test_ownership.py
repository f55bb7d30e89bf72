"""Whose objects they are: one database's, and never a copy's; on both databases."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from support.databases import Database
from support.journal import Journaled, open_journaled

from aioblobcol import Journal, OwnershipError, OwnershipState, Worker, WorkReport
from aioblobcol._check import Check
from aioblobcol._journal import _ownership, check_ownership, claim, disown
from aioblobcol._uri import marker_uri
from aioblobcol.testing import MemoryStore, StoredObject

MARKER = "s3://bucket/prefix/.aioblobcol-owner"
AGREED = {"default": OwnershipState.AGREED}


@pytest_asyncio.fixture
async def journaled(database: Database, memory_store: MemoryStore) -> AsyncIterator[Journaled]:
    """Give the journaled tables, and a retired object that is due."""
    async with open_journaled(database, memory_store) as opened:
        memory_store.objects[opened.uri("d")] = StoredObject(b"d", {}, {})
        async with database.engine.begin() as connection:
            await connection.execute(
                sa.insert(opened.journal.table).values(
                    uri=opened.uri("d"), state="retired", owner="{}"
                )
            )
        yield opened


async def look(journaled: Journaled, engine: AsyncEngine | None = None) -> OwnershipState:
    """Return what is so now, remembering nothing."""
    states = await check_ownership(
        journaled.journal, engine or journaled.database.engine, for_seconds=0
    )
    return states["default"]


async def work(journaled: Journaled, engine: AsyncEngine | None = None) -> WorkReport:
    return await Worker(journaled.journal, engine or journaled.database.engine).run_once()


async def say(journaled: Journaled, **values: str) -> None:
    """Change what the database says about who owns the prefix."""
    async with journaled.database.engine.begin() as connection:
        await connection.execute(sa.update(journaled.journal.owners).values(values))


def forget(journaled: Journaled) -> None:
    """Begin as a process that has asked nobody yet."""
    _ownership._memories.pop(journaled.journal, None)


def is_there(journaled: Journaled) -> bool:
    return journaled.uri("d") in journaled.store.objects


class TestFirstWorker:
    async def test_claims(self, journaled: Journaled) -> None:
        """A prefix that nobody owns is claimed by the first worker, in both places."""
        assert await look(journaled) is OwnershipState.UNCLAIMED
        assert (await work(journaled)).left_out == {}
        assert not is_there(journaled)
        assert marker_uri("bucket", "prefix") == MARKER
        assert MARKER in journaled.store.objects
        assert await look(journaled) is OwnershipState.AGREED

    async def test_killed_while_claiming(self, journaled: Journaled) -> None:
        """The next one goes on with the same identity."""
        journaled.store.fail("put", times=1)
        report = await work(journaled)
        assert report.left_out == {"default": OwnershipState.UNKNOWN}
        assert is_there(journaled)
        forget(journaled)

        assert await look(journaled) is OwnershipState.UNMARKED
        assert (await work(journaled)).left_out == {}
        assert not is_there(journaled)

    async def test_is_remembered(self, journaled: Journaled) -> None:
        """The store is asked once a minute, however many rounds there are."""
        worker = Worker(journaled.journal, journaled.database.engine)
        await worker.run_once()
        journaled.store.calls.clear()
        for _ in range(5):
            await worker.run_once()

        assert not [call for call in journaled.store.calls if call[0] == "get"]


class TestDoubt:
    @pytest.mark.parametrize(
        ("state", "values"),
        [
            (OwnershipState.TAKEN, {"identity": "another"}),
            (OwnershipState.COPIED, {"fingerprint": "another"}),
            (OwnershipState.MISCONFIGURED, {"owner": "another"}),
        ],
    )
    async def test_nothing_is_deleted(
        self,
        journaled: Journaled,
        caplog: pytest.LogCaptureFixture,
        state: OwnershipState,
        values: dict[str, str],
    ) -> None:
        """Nor condemned, while one of the three differs; the log says once what to do."""
        await claim(journaled.journal, journaled.database.engine)
        await say(journaled, **values)
        for _ in range(2):
            assert (await work(journaled)).left_out == {"default": state}

        assert await journaled.states() == {"d": "retired"}
        assert is_there(journaled)
        errors = [record for record in caplog.records if record.levelname == "ERROR"]
        assert len(errors) == 1
        assert "aioblobcol claim --take-over" in errors[0].message
        with pytest.raises(OwnershipError, match="take-over"):
            await claim(journaled.journal, journaled.database.engine)
        await claim(journaled.journal, journaled.database.engine, take_over=True)
        assert (await work(journaled)).left_out == {}
        assert not is_there(journaled)

    async def test_a_marker_that_cannot_be_read(self, journaled: Journaled) -> None:
        """Nothing is deleted while the store does not say whose it is."""
        await claim(journaled.journal, journaled.database.engine)
        journaled.store.fail("get", times=1)

        assert await look(journaled) is OwnershipState.UNKNOWN
        forget(journaled)
        assert await look(journaled) is OwnershipState.AGREED

    async def test_a_marker_that_is_none(self, journaled: Journaled) -> None:
        """An object of somebody else under its name is another owner's."""
        await claim(journaled.journal, journaled.database.engine)
        journaled.store.objects[MARKER] = StoredObject(b"[]", {}, {})

        assert await look(journaled) is OwnershipState.TAKEN

    async def test_a_lost_marker(self, journaled: Journaled) -> None:
        """The database that had claimed the prefix writes it anew, a copy of it does not."""
        await claim(journaled.journal, journaled.database.engine)
        del journaled.store.objects[MARKER]
        await say(journaled, fingerprint="another")
        assert (await work(journaled)).left_out == {"default": OwnershipState.COPIED}
        assert MARKER not in journaled.store.objects
        forget(journaled)
        with pytest.raises(OwnershipError, match="copy"):
            await claim(journaled.journal, journaled.database.engine)
        await claim(journaled.journal, journaled.database.engine, take_over=True)

        assert await look(journaled) is OwnershipState.AGREED

    async def test_what_was_true_a_minute_ago(
        self, journaled: Journaled, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It allows nothing, if nobody can tell whether it still is."""
        engine = journaled.database.engine
        await check_ownership(journaled.journal, engine, claims=True)
        real = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + 3600)
        async with engine.begin() as connection:
            await connection.run_sync(journaled.journal.owners.drop)
        for _ in range(2):
            with pytest.raises(sa.exc.DBAPIError):
                await check_ownership(journaled.journal, engine)


class TestCheck:
    async def test_condemns_only_what_is_its_own(self, journaled: Journaled) -> None:
        """Of another database's prefix it condemns nothing, and says so before it begins."""
        journaled.store.objects[journaled.uri("d")] = StoredObject(b"d", {}, {})
        await claim(journaled.journal, journaled.database.engine)
        await say(journaled, fingerprint="another")
        forget(journaled)
        check = Check(
            journaled.database.engine,
            journaled.store,
            journaled.journal.table.metadata,
            journal=journaled.journal,
            delete=True,
            min_age=timedelta(0),
        )
        with pytest.raises(OwnershipError, match="copy"):
            [each async for each in check.findings()]

        assert await journaled.states() == {"d": "retired"}

    async def test_leaves_a_prefix_within_its_own_alone(self, journaled: Journaled) -> None:
        """A folder with an owner's marker is somebody else's."""
        root = "s3://bucket/prefix/"
        objects = journaled.store.objects
        theirs, ours = f"{root}sub/x/id={1:032x}", f"{root}x/y/id={2:032x}"
        for uri in (theirs, ours, f"{root}sub/.aioblobcol-owner"):
            objects[uri] = StoredObject(b"{}", {}, {})
        check = Check(
            journaled.database.engine,
            journaled.store,
            journaled.journal.table.metadata,
            uri_columns=journaled.journal.uri_columns,
            journal=journaled.journal,
            delete=True,
            min_age=timedelta(0),
        )
        found = [each.uri async for each in check.findings() if each.is_condemned]

        assert found == [ours]


class TestDisown:
    async def test_deletes_nothing_from_then_on(self, journaled: Journaled) -> None:
        """Whether it had claimed the prefix or not, and although the marker is gone."""
        for _ in range(2):
            await disown(journaled.journal, journaled.database.engine)
            assert (await work(journaled)).left_out == {"default": OwnershipState.DISOWNED}
            assert MARKER not in journaled.store.objects
            await claim(journaled.journal, journaled.database.engine)
            journaled.store.objects.pop(MARKER)

        assert is_there(journaled)


class TestCopies:
    async def test_a_copied_file(
        self, sqlite: Database, memory_store: MemoryStore, tmp_path: Path
    ) -> None:
        """Deletes nothing, until it takes over; then the original deletes nothing any more."""
        async with open_journaled(sqlite, memory_store) as journaled:
            await work(journaled)
            async with sqlite.engine.connect() as connection:
                await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            shutil.copy(tmp_path / "test.db", tmp_path / "copy.db")
            async with another(f"sqlite+aiosqlite:///{tmp_path / 'copy.db'}") as copy:
                assert await look(journaled, copy) is OwnershipState.COPIED
                assert await look(journaled) is OwnershipState.AGREED
                await claim(journaled.journal, copy, take_over=True)
                assert await look(journaled, copy) is OwnershipState.AGREED
                assert await look(journaled) is OwnershipState.TAKEN

    async def test_a_database_made_from_a_template(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """It has the same rows in the same server, and deletes nothing."""
        async with open_journaled(postgres, memory_store) as journaled:
            await work(journaled)
            name = postgres.engine.url.database
            await postgres.engine.dispose()
            admin = create_async_engine(
                postgres.engine.url.set(database="template1"), isolation_level="AUTOCOMMIT"
            )
            async with admin.connect() as connection:
                await connection.exec_driver_sql("DROP DATABASE IF EXISTS the_copy")
                await connection.exec_driver_sql(f'CREATE DATABASE the_copy TEMPLATE "{name}"')
                try:
                    async with another(postgres.engine.url.set(database="the_copy")) as copy:
                        assert await look(journaled, copy) is OwnershipState.COPIED
                    assert await look(journaled) is OwnershipState.AGREED
                finally:
                    await connection.exec_driver_sql("DROP DATABASE the_copy")
            await admin.dispose()

    async def test_a_role_that_may_not_ask(self, postgres: Database) -> None:
        """It is known by the database's number alone."""
        function = "EXECUTE ON FUNCTION pg_control_system()"
        async with postgres.engine.connect() as connection:
            known = await _ownership._fingerprint(connection, None)
            await connection.exec_driver_sql(f"REVOKE {function} FROM PUBLIC")
            await connection.exec_driver_sql("CREATE ROLE may_not_ask")
            await connection.exec_driver_sql("SET LOCAL ROLE may_not_ask")
            unknown = await _ownership._fingerprint(connection, None)
            await connection.rollback()

        kind, cluster, number = known.split(":")
        assert cluster.isdigit()
        assert unknown == f"{kind}:?:{number}"

    async def test_a_configuration(self, database: Database, memory_store: MemoryStore) -> None:
        """What cannot be told from its copy by itself is told apart by its configuration."""
        async with open_journaled(database, memory_store) as journaled:
            engine = database.engine
            production = Journal(sa.MetaData(), memory_store, owner="production")
            await Worker(production, engine).run_once()
            staging = Journal(sa.MetaData(), memory_store, owner="staging")

            assert await check_ownership(production, engine) == AGREED
            states = await check_ownership(staging, engine, claims=True)
            assert states == {"default": OwnershipState.MISCONFIGURED}
            assert await look(journaled) is OwnershipState.MISCONFIGURED


@contextlib.asynccontextmanager
async def another(url: str | sa.URL) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url)
    try:
        yield engine
    finally:
        await engine.dispose()
