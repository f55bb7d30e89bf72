"""The journal's triggers: what each statement adopts, retires and refuses, on both databases."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from support.databases import Database

from aioblobcol import Blob, BlobType, InvalidInputError
from aioblobcol._journal import Journal
from aioblobcol.testing import MemoryStore


class Base(DeclarativeBase):
    pass


class Doc(Base):
    __tablename__ = "journaled docs"  # quoted everywhere

    name: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[Blob | None] = mapped_column(BlobType())
    scan: Mapped[Blob | None] = mapped_column(BlobType(format="json"))
    url: Mapped[str | None] = mapped_column("URL")
    title: Mapped[str | None]


class Page(Base):
    __tablename__ = "journaled_pages"

    doc: Mapped[str] = mapped_column(
        sa.ForeignKey("journaled docs.name", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[Blob | None] = mapped_column(BlobType())


class Ledger:
    """A database with the journal's triggers, and short names for objects."""

    def __init__(self, database: Database, store: MemoryStore, journal: Journal) -> None:
        self.database = database
        self.store = store
        self.journal = journal

    def uri(self, name: str) -> str:
        """Return a URI for a short name; the same one each time."""
        return f"s3://{self.store.bucket}/{self.store.prefix}/x/id={name.encode().hex():0>32}"

    def filled(self, statement: str) -> str:
        """Write URIs for ``<a>``, and JSON with one for ``{a}``."""
        statement = statement.replace("<docs>", '"journaled docs"')
        for name in "abcdef":
            as_json = json.dumps({"uri": self.uri(name), "size": 1})
            statement = statement.replace(f"<{name}>", f"'{self.uri(name)}'")
            statement = statement.replace(f"{{{name}}}", f"'{as_json}'")
        return statement

    async def run(self, *statements: str) -> None:
        """Run statements in one transaction."""
        async with self.database.engine.begin() as connection:
            for statement in statements:
                await connection.exec_driver_sql(self.filled(statement))

    async def stage(self, *names: str) -> None:
        async with self.database.engine.begin() as connection:
            for name in names:
                values = {"uri": self.uri(name), "state": "staged"}
                await connection.execute(sa.insert(self.journal.table).values(values))

    async def states(self) -> dict[str, str]:
        """Return the state of each object that the journal lists, by its short name."""
        names = {self.uri(name): name for name in "abcdef"}
        table = self.journal.table
        async with self.database.engine.connect() as connection:
            rows = await connection.execute(sa.select(table.c.uri, table.c.state))
            return {names[uri]: state for uri, state in rows}


@contextlib.asynccontextmanager
async def open_ledger(
    database: Database, store: MemoryStore, *, strict: bool = True
) -> AsyncIterator[Ledger]:
    """Give empty tables, their triggers, and two live rows: p names a and b, q names c."""
    metadata = sa.MetaData()
    for table in Base.metadata.tables.values():
        table.to_metadata(metadata)
    url = metadata.tables["journaled docs"].c.URL
    journal = Journal(metadata, store, uri_columns=[url], strict=strict)
    async with database.engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all)
    ledger = Ledger(database, store, journal)
    await ledger.stage("a", "b", "c")
    await ledger.run(
        "INSERT INTO <docs> (name, body, scan) VALUES ('p', <a>, {b})",
        "INSERT INTO <docs> (name, \"URL\") VALUES ('q', <c>)",
    )
    assert await ledger.states() == {}
    yield ledger
    async with database.engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)


@pytest_asyncio.fixture
async def ledger(database: Database, memory_store: MemoryStore) -> AsyncIterator[Ledger]:
    """Do so on each database in turn."""
    async with open_ledger(database, memory_store) as opened:
        yield opened


SWAP_ROWS = (
    "UPDATE <docs> SET body = CASE name WHEN 'p' THEN <d> ELSE <a> END WHERE name IN ('p', 'r')"
)

CASES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "insert": (("INSERT INTO <docs> (name, body) VALUES ('r', <d>)",), {"e": "staged"}),
    "insert json": (("INSERT INTO <docs> (name, scan) VALUES ('r', {d})",), {"e": "staged"}),
    "insert plain": (("INSERT INTO <docs> (name, \"URL\") VALUES ('r', <d>)",), {"e": "staged"}),
    "insert several": (
        ("INSERT INTO <docs> (name, body) VALUES ('r', <d>), ('s', <e>), ('t', NULL)",),
        {},
    ),
    "insert nothing": (
        ("INSERT INTO <docs> (name, body) SELECT 'r', 'x' WHERE 1 = 0",),
        {"d": "staged", "e": "staged"},
    ),
    "replace": (
        ("UPDATE <docs> SET body = <d> WHERE name = 'p'",),
        {"a": "retired", "e": "staged"},
    ),
    "empty": (
        ("UPDATE <docs> SET body = NULL, scan = NULL",),
        {"a": "retired", "b": "retired", "d": "staged", "e": "staged"},
    ),
    "other columns": (("UPDATE <docs> SET title = 'x'",), {"d": "staged", "e": "staged"}),
    "the same again": (
        ("UPDATE <docs> SET body = body, scan = scan",),
        {"d": "staged", "e": "staged"},
    ),
    "rename": (
        ("UPDATE <docs> SET name = 'z' WHERE name = 'p'",),
        {"d": "staged", "e": "staged"},
    ),
    "swap of columns": (
        ('UPDATE <docs> SET body = "URL", "URL" = body',),
        {"d": "staged", "e": "staged"},
    ),
    "delete": (
        ("DELETE FROM <docs> WHERE name = 'p'",),
        {"a": "retired", "b": "retired", "d": "staged", "e": "staged"},
    ),
    "twice in a transaction": (
        (
            "UPDATE <docs> SET body = <d> WHERE name = 'p'",
            "UPDATE <docs> SET body = <e> WHERE name = 'p'",
        ),
        {"a": "retired", "d": "retired"},
    ),
    "there and back": (
        (
            "UPDATE <docs> SET body = <d> WHERE name = 'p'",
            "UPDATE <docs> SET body = <a> WHERE name = 'p'",
        ),
        {"d": "retired", "e": "staged"},
    ),
    "move to another row": (
        (
            "UPDATE <docs> SET body = NULL WHERE name = 'p'",
            "UPDATE <docs> SET body = <a> WHERE name = 'q'",
        ),
        {"d": "staged", "e": "staged"},
    ),
    "upsert, new": (
        (
            (
                "INSERT INTO <docs> (name, body) VALUES ('r', <d>) "
                "ON CONFLICT (name) DO UPDATE SET body = excluded.body"
            ),
        ),
        {"e": "staged"},
    ),
    "upsert, there": (
        (
            (
                "INSERT INTO <docs> (name, body) VALUES ('p', <d>) "
                "ON CONFLICT (name) DO UPDATE SET body = excluded.body"
            ),
        ),
        {"a": "retired", "e": "staged"},
    ),
    "upsert that does nothing": (
        ("INSERT INTO <docs> (name, body) VALUES ('p', <d>) ON CONFLICT DO NOTHING",),
        {"d": "staged", "e": "staged"},
    ),
    "savepoint rolled back": (
        (
            "SAVEPOINT one",
            "UPDATE <docs> SET body = <d> WHERE name = 'p'",
            "ROLLBACK TO SAVEPOINT one",
        ),
        {"d": "staged", "e": "staged"},
    ),
    "foreign": (
        (
            (
                "UPDATE <docs> SET body = 's3://elsewhere/id=00000000000000000000000000000001' "
                "WHERE name = 'q'"
            ),
            "UPDATE <docs> SET body = 's3://bucket/prefix/x/md5=1' WHERE name = 'q'",
            "UPDATE <docs> SET body = NULL WHERE name = 'q'",
        ),
        {"d": "staged", "e": "staged"},
    ),
}

REFUSED: dict[str, tuple[str, str]] = {
    "never staged": ("UPDATE <docs> SET body = <f> WHERE name = 'p'", "never staged"),
    "live in another row": ("UPDATE <docs> SET body = <c> WHERE name = 'p'", "live in another"),
    "live in the same row": (
        "UPDATE <docs> SET scan = {a} WHERE name = 'p'",
        "several cells|live",
    ),
    "being deleted": ("UPDATE <docs> SET body = <e> WHERE name = 'p'", "being deleted"),
    "two cells of a new row": (
        "INSERT INTO <docs> (name, body, \"URL\") VALUES ('r', <d>, <d>)",
        "several cells|another cell|live",
    ),
    "two rows": (
        "INSERT INTO <docs> (name, body) VALUES ('r', <d>), ('s', <d>)",
        "several cells|another|live",
    ),
}


class TestStatements:
    @pytest.mark.parametrize("case", CASES)
    async def test_what_it_adopts_and_retires(self, ledger: Ledger, case: str) -> None:
        """Rows take over what is staged for them, and let go what they named before."""
        statements, expected = CASES[case]
        await ledger.stage("d", "e")

        await ledger.run(*statements)

        assert await ledger.states() == expected

    @pytest.mark.parametrize("case", REFUSED)
    async def test_what_is_refused(self, ledger: Ledger, case: str) -> None:
        """What is not there to be taken is refused with its reason, and nothing has changed."""
        statement, message = REFUSED[case]
        await ledger.stage("d", "e")
        table = ledger.journal.table
        async with ledger.database.engine.begin() as connection:
            is_e = table.c.uri == ledger.uri("e")
            await connection.execute(sa.update(table).where(is_e).values(state="deleting"))

        with pytest.raises(DBAPIError, match=message):
            await ledger.run(statement)

        assert await ledger.states() == {"d": "staged", "e": "deleting"}

    async def test_a_swap_of_rows(self, ledger: Ledger) -> None:
        """PostgreSQL sees the whole statement; SQLite, row by row, refuses it."""
        await ledger.stage("d")
        await ledger.run("INSERT INTO <docs> (name, body) VALUES ('r', <d>)")
        if ledger.database.name == "sqlite":
            with pytest.raises(DBAPIError, match="live in another"):
                await ledger.run(SWAP_ROWS)
        else:
            await ledger.run(SWAP_ROWS)

        assert await ledger.states() == {}

    async def test_a_cascade(self, ledger: Ledger) -> None:
        """Rows that go with another one retire their objects."""
        await ledger.stage("d", "e")
        await ledger.run(
            "INSERT INTO journaled_pages (doc, number, text) VALUES ('p', 1, <d>), ('p', 2, <e>)"
        )
        async with ledger.database.engine.connect() as connection:
            if ledger.database.name == "sqlite":  # a PRAGMA of the connection, outside of BEGIN
                raw: Any = (await connection.get_raw_connection()).driver_connection
                await raw.execute("PRAGMA foreign_keys = ON")
            await connection.exec_driver_sql(ledger.filled("DELETE FROM <docs> WHERE name = 'p'"))
            await connection.commit()

        assert await ledger.states() == dict.fromkeys("abde", "retired")

    async def test_an_owner(self, ledger: Ledger) -> None:
        """A retired entry tells whose it was, and how long it is kept."""
        before = datetime.now(timezone.utc)
        await ledger.run("DELETE FROM <docs> WHERE name = 'p'")

        table = ledger.journal.table
        async with ledger.database.engine.connect() as connection:
            entry = (
                await connection.execute(sa.select(table).where(table.c.uri == ledger.uri("b")))
            ).one()
        assert json.loads(entry.owner) == {
            "table": "journaled docs",
            "column": "scan",
            "key": ["p"],
        }
        assert entry.not_before - entry.since == timedelta(minutes=10)
        since = entry.since.replace(tzinfo=timezone.utc)
        assert timedelta(minutes=-1) < since - before < timedelta(minutes=1)

    async def test_a_key_of_several_columns(self, ledger: Ledger) -> None:
        """All of its parts are told, as text."""
        await ledger.stage("d")
        await ledger.run("INSERT INTO journaled_pages (doc, number, text) VALUES ('p', 7, <d>)")
        await ledger.run("DELETE FROM journaled_pages")

        async with ledger.database.engine.connect() as connection:
            owner = await connection.scalar(sa.select(ledger.journal.table.c.owner))
        assert json.loads(owner or "")["key"] == ["p", "7"]


class TestPostgresql:
    @pytest_asyncio.fixture
    async def ledger(self, postgres: Database, memory_store: MemoryStore) -> AsyncIterator[Ledger]:
        """The same tables, on PostgreSQL alone."""
        async with open_ledger(postgres, memory_store) as opened:
            yield opened

    async def test_merge(self, ledger: Ledger) -> None:
        """All of its branches count as one statement."""
        await ledger.stage("d", "e")
        await ledger.run(
            "MERGE INTO <docs> AS target USING (VALUES ('p', <d>), ('r', <e>), ('q', NULL)) "
            "AS given (name, body) ON target.name = given.name "
            "WHEN MATCHED AND given.body IS NULL THEN DELETE "
            "WHEN MATCHED THEN UPDATE SET body = given.body "
            "WHEN NOT MATCHED THEN INSERT (name, body) VALUES (given.name, given.body)"
        )

        assert await ledger.states() == {"a": "retired", "c": "retired"}

    async def test_move_in_one_statement(self, ledger: Ledger) -> None:
        """A row that is deleted in a CTE and inserted under another key keeps its object."""
        await ledger.run(
            "WITH gone AS (DELETE FROM <docs> WHERE name = 'p' RETURNING body) "
            "INSERT INTO <docs> (name, body) SELECT 'z', body FROM gone"
        )

        assert await ledger.states() == {"b": "retired"}

    async def test_copy(self, ledger: Ledger) -> None:
        """COPY adopts, and is refused as a whole."""
        await ledger.stage("d")
        async with ledger.database.engine.connect() as connection:
            raw = await connection.get_raw_connection()
            driver: Any = raw.driver_connection
            columns = ["name", "body"]
            with pytest.raises(asyncpg.RaiseError, match="never staged"):
                await driver.copy_records_to_table(
                    "journaled docs",
                    records=[("r", ledger.uri("d")), ("s", ledger.uri("f"))],
                    columns=columns,
                )
            await driver.copy_records_to_table(
                "journaled docs", records=[("r", ledger.uri("d"))], columns=columns
            )

        assert await ledger.states() == {}

    async def test_truncate(self, ledger: Ledger) -> None:
        """Everything in the table is retired, and what TRUNCATE takes along."""
        await ledger.stage("d")
        await ledger.run("INSERT INTO journaled_pages (doc, number, text) VALUES ('p', 1, <d>)")
        await ledger.run("TRUNCATE <docs> CASCADE")

        assert await ledger.states() == dict.fromkeys("abcd", "retired")

    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    async def test_truncate_with_an_old_snapshot(self, ledger: Ledger, level: str) -> None:
        """It is refused, for rows that it does not see would go as well."""
        with pytest.raises(DBAPIError, match="needs READ COMMITTED"):
            await ledger.run(f"SET TRANSACTION ISOLATION LEVEL {level}", "TRUNCATE <docs> CASCADE")

        assert await ledger.states() == {}

    async def test_an_old_snapshot(self, ledger: Ledger) -> None:
        """What is staged after the transaction has begun is not seen; before, it is."""
        async with ledger.database.engine.connect() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ")
            await connection.exec_driver_sql("SELECT 1")
            await ledger.stage("d")
            update = ledger.filled("UPDATE <docs> SET body = <d> WHERE name = 'p'")
            with pytest.raises(DBAPIError, match="never staged, as far as this snapshot shows"):
                await connection.exec_driver_sql(update)
            await connection.rollback()
            await connection.exec_driver_sql(update)
            await connection.commit()

        assert await ledger.states() == {"a": "retired"}

    async def test_adoption_waits_for_a_condemnation(self, ledger: Ledger) -> None:
        """Whoever has the entry's lock decides, and the other one sees what it did."""
        await ledger.stage("d")
        table, is_d = ledger.journal.table, ledger.journal.table.c.uri == ledger.uri("d")
        async with ledger.database.engine.connect() as worker:
            await worker.execute(sa.update(table).where(is_d).values(state="deleting"))
            adopts = asyncio.create_task(
                ledger.run("UPDATE <docs> SET body = <d> WHERE name = 'p'")
            )
            waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            while not await worker.scalar(waiting):  # noqa: ASYNC110 - the other one waits there
                await asyncio.sleep(0)
            await worker.commit()
            with pytest.raises(DBAPIError, match="being deleted"):
                await adopts

        assert await ledger.states() == {"d": "deleting"}

    async def test_synchronous_commit(self, ledger: Ledger) -> None:
        """synchronous_commit is on where objects are at stake."""
        async with ledger.database.engine.begin() as connection:
            await connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
            await connection.exec_driver_sql(ledger.filled("UPDATE <docs> SET title = 'x'"))
            shown = await connection.scalar(sa.text("SHOW synchronous_commit"))

        assert shown == "on"

    async def test_other_programs(self, ledger: Ledger) -> None:
        """They stage what they insert, and nothing that is not of this journal."""
        await ledger.run(
            "SELECT aioblobcol_stage(<d>)",
            "INSERT INTO <docs> (name, body) VALUES ('r', <d>)",
        )
        for foreign in ("'s3://bucket/prefix/x'", "'x'", "NULL"):
            with pytest.raises(DBAPIError, match="not an object of this journal"):
                await ledger.run(f"SELECT aioblobcol_stage({foreign})")

        assert await ledger.states() == {}

    async def test_a_role_without_rights(self, ledger: Ledger) -> None:
        """It is told which table it may not use, and its row is not written."""
        try:
            with pytest.raises(DBAPIError, match="permission denied for table aioblobcol_journal"):
                await ledger.run(
                    "CREATE ROLE journal_reader",
                    "GRANT SELECT, DELETE ON <docs> TO journal_reader",
                    "SET LOCAL ROLE journal_reader",
                    "DELETE FROM <docs>",
                )
        finally:
            assert await ledger.states() == {}

    async def test_partitions(self, ledger: Ledger) -> None:
        """Rows move between partitions with their objects; each leaf has its triggers."""
        metadata = sa.MetaData()
        parts = sa.Table(
            "journaled_parts",
            metadata,
            sa.Column("kind", sa.Text, primary_key=True),
            sa.Column("number", sa.Integer, primary_key=True),
            sa.Column("body", BlobType()),
            postgresql_partition_by="LIST (kind)",
        )
        journal = Journal(metadata, ledger.store, table_name="aioblobcol_journal")
        async with ledger.database.engine.begin() as connection:
            await connection.run_sync(parts.create)
            for kind in "xy":
                await connection.exec_driver_sql(
                    f"CREATE TABLE journaled_parts_{kind} PARTITION OF journaled_parts "
                    f"FOR VALUES IN ('{kind}')"
                )
            await connection.run_sync(journal.create_triggers)
        try:
            await ledger.stage("d", "e", "f")
            await ledger.run(
                "INSERT INTO journaled_parts VALUES ('x', 1, <d>), ('y', 2, <e>)",
                "INSERT INTO journaled_parts_x VALUES ('x', 3, <f>)",
                "UPDATE journaled_parts SET kind = CASE kind WHEN 'x' THEN 'y' ELSE 'x' END",
            )
            assert await ledger.states() == {}
            await ledger.run("TRUNCATE journaled_parts_x")
            assert await ledger.states() == {"e": "retired"}
            await ledger.run("DELETE FROM journaled_parts_y WHERE number = 1")
            await ledger.run("TRUNCATE journaled_parts")
            assert await ledger.states() == dict.fromkeys("def", "retired")
        finally:
            async with ledger.database.engine.begin() as connection:
                await connection.run_sync(parts.drop)


class TestInstalling:
    async def test_it_may_be_repeated(self, ledger: Ledger) -> None:
        """The printed statements but the table's change nothing the second time."""
        for _ in range(2):
            dialect = ledger.database.engine.dialect
            await ledger.run(*ledger.journal.ddl(dialect, with_table=False))
        await ledger.stage("d", "e")
        await ledger.run("UPDATE <docs> SET body = <d> WHERE name = 'p'")

        assert await ledger.states() == {"a": "retired", "e": "staged"}

    async def test_all_of_it_is_printed(self, ledger: Ledger) -> None:
        """An empty database gets everything from the printed statements."""
        journal = ledger.journal
        async with ledger.database.engine.begin() as connection:
            await connection.run_sync(journal.table.drop)
        await ledger.run(*journal.ddl(ledger.database.engine.dialect))
        await ledger.run("DELETE FROM <docs> WHERE name = 'p'")

        assert await ledger.states() == {"a": "retired", "b": "retired"}

    async def test_cells_that_share(self, ledger: Ledger) -> None:
        """Nothing is installed while two cells name one object; the message names it."""
        async with ledger.database.engine.begin() as connection:
            await connection.run_sync(ledger.journal.drop_triggers)
        await ledger.run("UPDATE <docs> SET body = <c> WHERE name = 'q'")

        with pytest.raises(DBAPIError) as caught:
            async with ledger.database.engine.begin() as connection:
                await connection.run_sync(ledger.journal.create_triggers)
        if ledger.database.name == "postgresql":
            assert ledger.uri("c") in str(caught.value)

    async def test_taken_away(self, ledger: Ledger) -> None:
        """Afterwards nobody adopts or retires, and nothing of it is left."""
        async with ledger.database.engine.begin() as connection:
            await connection.run_sync(ledger.journal.drop_triggers)
        await ledger.run("UPDATE <docs> SET body = <f>, scan = NULL WHERE name = 'p'")

        assert await ledger.states() == {}

    async def test_not_strict(self, database: Database, memory_store: MemoryStore) -> None:
        """A rolling deployment: old programs write what they did not stage, the rest works."""
        async with open_ledger(database, memory_store, strict=False) as ledger:
            await ledger.stage("d")
            await ledger.run(
                "UPDATE <docs> SET body = <f> WHERE name = 'p'",
                "INSERT INTO <docs> (name, body) VALUES ('r', <d>)",
            )

            assert await ledger.states() == {"a": "retired"}

    def test_what_is_refused(self, memory_store: MemoryStore) -> None:
        """A journal without a store, with impossible times, or for columns that are none."""
        impossible: list[dict[str, Any]] = [
            {"stores": {}},
            {"stores": "s3://bucket"},
            {"lease": timedelta(0)},
            {"retention": timedelta(seconds=-1)},
            {"uri_columns": ["url"]},
        ]
        for arguments in impossible:
            with pytest.raises(InvalidInputError):
                Journal(sa.MetaData(), **{"stores": memory_store, **arguments})

        metadata = sa.MetaData()
        sa.Table("no_key", metadata, sa.Column("body", BlobType()))
        journal = Journal(metadata, memory_store)
        with pytest.raises(InvalidInputError, match="primary key"):
            journal.ddl(sa.create_mock_engine("sqlite://", lambda *_: None).dialect)
        with pytest.raises(InvalidInputError, match="no journal on mysql"):
            journal.triggers(mysql.dialect())

    def test_names_that_are_long(self, memory_store: MemoryStore) -> None:
        """They stay within the database's limit, and tables with one beginning stay apart."""
        metadata = sa.MetaData()
        for end in ("1", "2"):
            sa.Table(
                60 * "é" + end,
                metadata,
                sa.Column("id", sa.Integer, primary_key=True),
                sa.Column("body", BlobType()),
            )
        tables = Journal(metadata, memory_store).journaled_tables
        names = {table.identifier("journal_insert") for table in tables}

        assert len(names) == 2
        assert all(len(name.encode()) <= 63 for name in names)
