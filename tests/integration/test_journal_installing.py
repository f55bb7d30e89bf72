"""Installing the journal's triggers: what is looked at, who waits, what stands afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from support.databases import Database
from support.journal import Journaled, open_journaled

from aioblobcol import BlobType, Journal
from aioblobcol._journal import proposed_indexes
from aioblobcol.testing import MemoryStore


@pytest_asyncio.fixture
async def journaled(database: Database, memory_store: MemoryStore) -> AsyncIterator[Journaled]:
    """Give tables with the journal's triggers, on each database in turn."""
    async with open_journaled(database, memory_store) as opened:
        yield opened


@pytest_asyncio.fixture
async def on_postgres(postgres: Database, memory_store: MemoryStore) -> AsyncIterator[Journaled]:
    """Give them on PostgreSQL alone."""
    async with open_journaled(postgres, memory_store) as opened:
        yield opened


async def install(journaled: Journaled) -> None:
    async with journaled.database.engine.begin() as connection:
        await connection.run_sync(journaled.journal.create_triggers)


async def uninstall(journaled: Journaled) -> None:
    async with journaled.database.engine.begin() as connection:
        await connection.run_sync(journaled.journal.drop_triggers)


async def missing(journaled: Journaled, journal: Journal | None = None) -> list[str]:
    async with journaled.database.engine.connect() as connection:
        return await connection.run_sync((journal or journaled.journal).missing_triggers)


def blob_table(name: str, metadata: sa.MetaData, **options: Any) -> sa.Table:
    return sa.Table(
        name,
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("body", BlobType()),
        **options,
    )


@contextlib.asynccontextmanager
async def created(
    database: Database, metadata: sa.MetaData, tables: Sequence[sa.Table] | None = None
) -> AsyncIterator[None]:
    """Create tables; drop everything in the end."""
    async with database.engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all, tables)
    try:
        yield
    finally:
        async with database.engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)


class TestTheCheck:
    @pytest.mark.parametrize("how", ["called", "printed"])
    async def test_cells_of_two_tables(self, journaled: Journaled, how: str) -> None:
        """Two tables that name one object are refused, and the object is named."""
        await uninstall(journaled)
        await journaled.run("INSERT INTO journaled_pages (doc, number, text) VALUES ('p', 1, <c>)")

        with pytest.raises(DBAPIError, match=f"several cells.*{journaled.uri('c')}"):
            if how == "called":
                await install(journaled)
            else:
                dialect = journaled.database.engine.dialect
                await journaled.run(*journaled.journal.ddl(dialect, with_table=False))
        assert await missing(journaled) != []

    async def test_a_new_table_with_rows(self, journaled: Journaled) -> None:
        """To install triggers on some tables, all are looked at."""
        await uninstall(journaled)
        await journaled.run("INSERT INTO journaled_pages (doc, number, text) VALUES ('p', 1, <c>)")
        pages = journaled.journal.table.metadata.tables["journaled_pages"]

        with pytest.raises(DBAPIError, match="several cells"):
            async with journaled.database.engine.begin() as connection:
                await connection.run_sync(
                    lambda sync: journaled.journal.create_triggers(sync, only=[pages])
                )

    async def test_open_writers(self, on_postgres: Journaled) -> None:
        """It waits for those who have written already, and sees what they wrote."""
        journaled = on_postgres
        await uninstall(journaled)
        async with journaled.database.engine.connect() as writer:
            await writer.exec_driver_sql(
                journaled.filled(
                    "INSERT INTO journaled_pages (doc, number, text) VALUES ('p', 1, <c>)"
                )
            )
            installs = asyncio.create_task(install(journaled))
            waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            while not installs.done() and not await writer.scalar(waiting):  # noqa: ASYNC110
                await asyncio.sleep(0)
            await writer.commit()
            with pytest.raises(DBAPIError, match="several cells"):
                await installs

    async def test_several_at_one_time(self, on_postgres: Journaled) -> None:
        """Processes that start together may each install; one waits for the other."""
        await asyncio.gather(*(install(on_postgres) for _ in range(4)))

        assert await missing(on_postgres) == []

    async def test_an_old_snapshot(self, on_postgres: Journaled) -> None:
        """Rows that it would not see are a reason to refuse; empty tables have none."""
        journaled = on_postgres
        metadata = journaled.journal.table.metadata
        async with journaled.database.engine.connect() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ")
            with pytest.raises(DBAPIError, match="needs READ COMMITTED"):
                await connection.run_sync(journaled.journal.create_triggers)
            await connection.rollback()
            await connection.run_sync(metadata.drop_all)
            await connection.run_sync(metadata.create_all)
            await connection.commit()

        assert await missing(journaled) == []

    async def test_rows_that_are_not_seen(self, on_postgres: Journaled) -> None:
        """Under row-level security it is refused, rather than half done."""
        journaled = on_postgres
        await uninstall(journaled)
        async with journaled.database.engine.connect() as connection:
            for statement in (
                "CREATE ROLE journal_owner",
                "GRANT ALL ON SCHEMA public TO journal_owner",
                "ALTER TABLE aioblobcol_journal OWNER TO journal_owner",
                "ALTER TABLE <docs> OWNER TO journal_owner",
                "ALTER TABLE journaled_pages OWNER TO journal_owner",
                "ALTER TABLE <docs> FORCE ROW LEVEL SECURITY",
                "ALTER TABLE <docs> ENABLE ROW LEVEL SECURITY",
                "DROP FUNCTION aioblobcol_stage",
                "SET LOCAL ROLE journal_owner",
            ):
                await connection.exec_driver_sql(journaled.filled(statement))
            with pytest.raises(DBAPIError, match="affected by row-level security"):
                await connection.run_sync(journaled.journal.create_triggers)

    async def test_no_journal(self, journaled: Journaled) -> None:
        """Without the journal's own table nothing is installed."""
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.table.drop)
        with pytest.raises(DBAPIError, match=r"no (such )?table.*aioblobcol_journal"):
            await install(journaled)

    async def test_some_tables_without_the_journal(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A journaled table is not created without its triggers, nor they without the journal."""
        metadata = sa.MetaData()
        table = blob_table("early", metadata)
        Journal(metadata, memory_store, table_name="late_journal")
        with pytest.raises(DBAPIError, match=r"no (such )?table.*late_journal"):
            async with created(database, metadata, [table]):
                pass


class TestMissingTriggers:
    async def test_none(self, journaled: Journaled) -> None:
        """After `create_all`, and after installing again, none is missing."""
        before = await missing(journaled)
        await install(journaled)

        assert before == await missing(journaled) == []

    async def test_taken_away(self, journaled: Journaled) -> None:
        """A table that has lost one is named, and no other."""
        if journaled.database.is_sqlite:
            await journaled.run("DROP TRIGGER aioblobcol_journal_update_journaled_pages")
        else:
            await journaled.run("DROP TRIGGER aioblobcol_journal_update ON journaled_pages")
        lost = await missing(journaled)
        await install(journaled)

        assert lost == ["journaled_pages"]
        assert await missing(journaled) == []

    async def test_out_of_date(self, journaled: Journaled) -> None:
        """A journal that is made otherwise finds all triggers out of date."""
        metadata = sa.MetaData()
        for name in ("journaled docs", "journaled_pages"):
            journaled.journal.table.metadata.tables[name].to_metadata(metadata)
        url = metadata.tables["journaled docs"].c.URL
        same = Journal(metadata, journaled.store, uri_columns=[url])
        metadata.info.clear()
        metadata.remove(same.table)
        metadata.remove(same.owners)
        other = Journal(metadata, journaled.store, uri_columns=[url], strict=False)

        assert await missing(journaled, same) == []
        assert sorted(name.strip('"') for name in await missing(journaled, other)) == [
            "journaled docs",
            "journaled_pages",
        ]

    async def test_a_table_made_anew(self, journaled: Journaled) -> None:
        """A copy that took a table's place has none; one that is gone is not named."""
        await journaled.run(
            "CREATE TABLE made_anew AS SELECT * FROM journaled_pages",
            "DROP TABLE journaled_pages",
        )
        gone = await missing(journaled)
        await journaled.run("ALTER TABLE made_anew RENAME TO journaled_pages")

        assert gone == []
        assert await missing(journaled) == ["journaled_pages"]

    async def test_a_table_made_by_itself(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """One that was not created by `create_all` has none, and `create_all` gives it none."""
        metadata = sa.MetaData()
        journal = Journal(metadata, memory_store)
        journaled = Journaled(database, memory_store, journal)
        async with created(database, metadata):
            table = blob_table("alone", metadata)
            async with database.engine.begin() as connection:
                await connection.run_sync(table.create)
                await connection.run_sync(metadata.create_all)
            lost = await missing(journaled)
            await install(journaled)

            assert lost == ["alone"]
            assert await missing(journaled) == []

    @pytest.mark.parametrize(
        ("how", "expected"),
        [("DISABLE", True), ("ENABLE REPLICA", True), ("ENABLE ALWAYS", False)],
    )
    async def test_disabled(self, on_postgres: Journaled, how: str, *, expected: bool) -> None:
        """One that does not fire for everybody is missing."""
        await on_postgres.run(
            f"ALTER TABLE journaled_pages {how} TRIGGER aioblobcol_journal_delete"
        )

        assert await missing(on_postgres) == ["journaled_pages"] * expected

    async def test_a_new_partition(self, on_postgres: Journaled, memory_store: MemoryStore) -> None:
        """A partition without triggers of its own is named."""
        metadata = sa.MetaData()
        blob_table("journaled_parts", metadata, postgresql_partition_by="RANGE (id)")
        journal = Journal(metadata, memory_store, table_name="parts_journal")
        async with created(on_postgres.database, metadata):
            new = "CREATE TABLE {} PARTITION OF journaled_parts FOR VALUES FROM ({}) TO ({})"
            await on_postgres.run(new.format("parts_a", 0, 9))
            async with on_postgres.database.engine.begin() as connection:
                await connection.run_sync(journal.create_triggers)
            await on_postgres.run(new.format("parts_b", 10, 19))

            assert await missing(on_postgres, journal) == ["parts_b"]


class TestWhatIsThere:
    async def test_some_tables(self, database: Database, memory_store: MemoryStore) -> None:
        """Tables that are created later get their triggers later."""
        metadata = sa.MetaData()
        early, _late = blob_table("early", metadata), blob_table("late", metadata)
        journal = Journal(metadata, memory_store)
        journaled = Journaled(database, memory_store, journal)
        async with created(database, metadata, [early, journal.table]):
            await journaled.stage("a", "b")
            await journaled.run("INSERT INTO early (id, body) VALUES (1, <a>)")
            async with database.engine.begin() as connection:
                await connection.run_sync(metadata.create_all)
            await journaled.run("INSERT INTO late (id, body) VALUES (1, <b>)")

            assert await journaled.states() == {}
            assert await missing(journaled) == []

    async def test_some_columns(self, database: Database, memory_store: MemoryStore) -> None:
        """A migration meets tables that will get more columns later."""
        metadata = sa.MetaData()
        table = blob_table("growing", metadata)
        journal = Journal(metadata, memory_store)
        journaled = Journaled(database, memory_store, journal)
        async with created(database, metadata):
            table.append_column(sa.Column("more", BlobType()))
            await install(journaled)
            assert await missing(journaled) == []
            await journaled.run("ALTER TABLE growing ADD COLUMN more TEXT")
            assert await missing(journaled) == ["growing"]
            await install(journaled)
            await journaled.stage("a")
            await journaled.run("INSERT INTO growing (id, more) VALUES (1, <a>)")

            assert await journaled.states() == {}
            assert await missing(journaled) == []

    async def test_a_view(self, database: Database, memory_store: MemoryStore) -> None:
        """A view among the mapped tables is passed over."""
        metadata = sa.MetaData()
        table = blob_table("seen", metadata)
        journal = Journal(metadata, memory_store)
        journaled = Journaled(database, memory_store, journal)
        async with created(database, metadata):
            view = blob_table("seen_view", metadata)
            await journaled.stage("a")
            await journaled.run(
                "CREATE VIEW seen_view AS SELECT * FROM seen",
                "INSERT INTO seen (id, body) VALUES (1, <a>)",
            )
            await install(journaled)
            if not database.is_sqlite:
                await journaled.run(*journal.ddl(database.engine.dialect, with_table=False))
            lost = await missing(journaled)
            await journaled.run("DROP VIEW seen_view")
            metadata.remove(view)

            assert lost == []
            assert table in [each.table for each in journal.journaled_tables]

    async def test_another_schema(self, database: Database, memory_store: MemoryStore) -> None:
        """The connection's `schema_translate_map` says where triggers go."""
        metadata = sa.MetaData()
        blob_table("rented", metadata)
        journal = Journal(metadata, memory_store)
        journaled = Journaled(database, memory_store, journal)
        async with database.engine.connect() as connection:
            make = "ATTACH ':memory:' AS tenant" if database.is_sqlite else "CREATE SCHEMA tenant"
            await connection.exec_driver_sql(make)
            await connection.execution_options(schema_translate_map={None: "tenant"})
            await connection.run_sync(metadata.create_all)
            assert await connection.run_sync(journal.missing_triggers) == []
            values = {"uri": journaled.uri("a"), "state": "staged"}
            await connection.execute(sa.insert(journal.table).values(values))
            for statement in (
                "INSERT INTO tenant.rented (id, body) VALUES (1, <a>)",
                "DELETE FROM tenant.rented",
            ):
                await connection.exec_driver_sql(journaled.filled(statement))
            states = await connection.scalars(sa.select(journal.table.c.state))
            assert states.all() == ["retired"]
            await connection.run_sync(metadata.drop_all)
            await connection.rollback()

    async def test_percent_signs(self, journaled: Journaled) -> None:
        """No driver takes those in the statements for parameters."""
        plain: list[str] = []

        def listen(_cursor: Any, statement: str, _context: Any) -> None:
            plain.append(statement)

        engine = journaled.database.engine.sync_engine
        sa.event.listen(engine, "do_execute_no_params", listen)
        try:
            await uninstall(journaled)
            await install(journaled)
        finally:
            sa.event.remove(engine, "do_execute_no_params", listen)

        printed = journaled.journal.ddl(engine.dialect, with_table=False)
        assert set(printed) <= set(plain)
        assert set(journaled.journal.drop_ddl(engine.dialect)) <= set(plain)


class TestNames:
    async def test_a_temporary_table(self, on_postgres: Journaled) -> None:
        """One that is called as the journal does not take its place."""
        await on_postgres.run(
            "CREATE TEMPORARY TABLE aioblobcol_journal (LIKE aioblobcol_journal) ON COMMIT DROP",
            "DELETE FROM <docs> WHERE name = 'p'",
        )

        assert await on_postgres.states() == {"a": "retired", "b": "retired"}

    async def test_another_search_path(self, on_postgres: Journaled) -> None:
        """The journal is the one that was meant when the triggers were installed."""
        await on_postgres.run(
            "CREATE SCHEMA elsewhere",
            "CREATE TABLE elsewhere.aioblobcol_journal (LIKE aioblobcol_journal)",
            "SET LOCAL search_path = elsewhere, public",
            "DELETE FROM <docs> WHERE name = 'p'",
            "DROP SCHEMA elsewhere CASCADE",
        )

        assert await on_postgres.states() == {"a": "retired", "b": "retired"}

    async def test_two_journals(self, on_postgres: Journaled) -> None:
        """Each has a function of its own by which other programs stage."""
        metadata = sa.MetaData()
        blob_table("others", metadata)
        journal = Journal(
            metadata, MemoryStore(bucket="other", prefix="p"), table_name="other_journal"
        )
        async with created(on_postgres.database, metadata):
            uri = f"s3://other/p/id={'0' * 32}"
            await on_postgres.run(
                "SELECT aioblobcol_stage(<d>)",
                f"SELECT other_journal_stage('{uri}')",
                f"INSERT INTO others (id, body) VALUES (1, '{uri}')",
            )
            with pytest.raises(DBAPIError, match="not an object of this journal"):
                await on_postgres.run("SELECT other_journal_stage(<d>)")

        assert await on_postgres.states() == {"d": "staged"}
        assert journal.table.name == "other_journal"


class TestTruncate:
    async def test_a_new_partition(self, on_postgres: Journaled, memory_store: MemoryStore) -> None:
        """It is refused while a partition would lose its rows unseen."""
        metadata = sa.MetaData()
        blob_table("journaled_parts", metadata, postgresql_partition_by="RANGE (id)")
        journal = Journal(metadata, memory_store, table_name="of_parts")
        table = journal.table
        uri = on_postgres.uri("d")
        async with created(on_postgres.database, metadata):
            parts = "PARTITION OF journaled_parts FOR VALUES FROM"
            await on_postgres.run(
                f"CREATE TABLE parts_new {parts} (0) TO (9)",
                f"INSERT INTO of_parts (uri, state) VALUES ('{uri}', 'staged')",
                f"INSERT INTO journaled_parts (id, body) VALUES (1, '{uri}')",
            )
            with pytest.raises(DBAPIError, match="a partition of journaled_parts has no triggers"):
                await on_postgres.run("TRUNCATE journaled_parts")
            async with on_postgres.database.engine.begin() as connection:
                await connection.run_sync(journal.create_triggers)
            await on_postgres.run("TRUNCATE journaled_parts")
            async with on_postgres.database.engine.connect() as connection:
                found = await connection.execute(sa.select(table.c.uri, table.c.state))
                states = [tuple(row) for row in found]

        assert states == [(uri, "retired")]


class TestIndexes:
    async def test_they_are_of_use(self, postgres: Database, memory_store: MemoryStore) -> None:
        """What is proposed for JSON is what the worker and the check ask for."""
        metadata = sa.MetaData()
        table = sa.Table(
            "journaled_notes",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("meta", sa.JSON),
            sa.Column("body", BlobType(format="json")),
        )
        journal = Journal(metadata, memory_store, uri_columns=[table.c.meta])
        dialect = postgres.engine.dialect
        plans = []
        async with created(postgres, metadata), postgres.engine.begin() as connection:
            for statement in proposed_indexes(journal, dialect):
                await connection.exec_driver_sql(statement)
            await connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            for column in journal.journaled_tables[0].columns:
                question = sa.select(column.uri).where(column.uri == "s3://bucket/a")
                compiled = question.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
                plan = await connection.exec_driver_sql(f"EXPLAIN {compiled}")
                plans.append(str(plan.all()))

        for text, name in zip(plans, ("meta", "body"), strict=True):
            assert f"aioblobcol_uri_{name}_" in text
            assert "Index Cond" in text
