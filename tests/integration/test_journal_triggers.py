"""The journal's triggers: what each statement adopts, retires and refuses, on both databases.

The reproductions of the design's review that are about triggers, and the tests that cover them:

* r03, statements: `TestStatements` (the cases "the same again", "move to another row", "twice in a
  transaction", "there and back", upserts, "copy of a row"), `test_a_swap_of_rows`, `test_merge`,
  `test_move_in_one_statement` (archive), `test_cells_of_two_tables` and `test_cells_that_share`
  (objects shared from before), `test_deletes_at_one_time`, `test_partitions`, `test_truncate*`;
  adoption bypassed is the worker's.
* r14, SQLite: `TestSqlite` (REPLACE), `test_a_swap_of_rows`, `test_a_cascade`.
* r16, statement level: `test_partitions`, `test_moves_between_partitions`, `test_merge`,
  `test_copy`, `test_a_cascade`.

How they are installed is in `test_journal_installing`.
"""

from __future__ import annotations

import asyncio
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
from support.databases import Database
from support.journal import Journaled, open_journaled

from aioblobcol import BlobType, InvalidInputError
from aioblobcol._journal import Journal
from aioblobcol._store._base import is_owned
from aioblobcol._uri import is_one_attempt
from aioblobcol.testing import MemoryStore


@pytest_asyncio.fixture
async def journaled(database: Database, memory_store: MemoryStore) -> AsyncIterator[Journaled]:
    """Do so on each database in turn."""
    async with open_journaled(database, memory_store) as opened:
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
    "copy of a row": (
        "INSERT INTO <docs> (name, body) SELECT 'z', body FROM <docs> WHERE name = 'p'",
        "live in another",
    ),
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
    async def test_what_it_adopts_and_retires(self, journaled: Journaled, case: str) -> None:
        """Rows take over what is staged for them, and let go what they named before."""
        statements, expected = CASES[case]
        await journaled.stage("d", "e")

        await journaled.run(*statements)

        assert await journaled.states() == expected

    @pytest.mark.parametrize("case", REFUSED)
    async def test_what_is_refused(self, journaled: Journaled, case: str) -> None:
        """What is not there to be taken is refused with its reason, and nothing has changed."""
        statement, message = REFUSED[case]
        await journaled.stage("d", "e")
        table = journaled.journal.table
        async with journaled.database.engine.begin() as connection:
            is_e = table.c.uri == journaled.uri("e")
            await connection.execute(sa.update(table).where(is_e).values(state="deleting"))

        with pytest.raises(DBAPIError, match=message):
            await journaled.run(statement)

        assert await journaled.states() == {"d": "staged", "e": "deleting"}

    async def test_a_swap_of_rows(self, journaled: Journaled) -> None:
        """PostgreSQL sees the whole statement; SQLite, row by row, refuses it."""
        await journaled.stage("d")
        await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <d>)")
        if journaled.database.name == "sqlite":
            with pytest.raises(DBAPIError, match="live in another"):
                await journaled.run(SWAP_ROWS)
        else:
            await journaled.run(SWAP_ROWS)

        assert await journaled.states() == {}

    async def test_a_cascade(self, journaled: Journaled) -> None:
        """Rows that go with another one retire their objects."""
        await journaled.stage("d", "e")
        await journaled.run(
            "INSERT INTO journaled_pages (doc, number, text) VALUES ('p', 1, <d>), ('p', 2, <e>)"
        )
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")

        assert await journaled.states() == dict.fromkeys("abde", "retired")

    async def test_an_owner(self, journaled: Journaled) -> None:
        """A retired entry tells whose it was, and how long it is kept."""
        before = datetime.now(timezone.utc)
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")

        table = journaled.journal.table
        async with journaled.database.engine.connect() as connection:
            entry = (
                await connection.execute(sa.select(table).where(table.c.uri == journaled.uri("b")))
            ).one()
        assert json.loads(entry.owner) == {
            "table": "journaled docs",
            "column": "scan",
            "key": ["p"],
        }
        assert entry.not_before - entry.since == timedelta(minutes=10)
        since = entry.since.replace(tzinfo=timezone.utc)
        assert timedelta(minutes=-1) < since - before < timedelta(minutes=1)

    async def test_a_key_of_several_columns(self, journaled: Journaled) -> None:
        """All of its parts are told, as text."""
        await journaled.stage("d")
        await journaled.run("INSERT INTO journaled_pages (doc, number, text) VALUES ('p', 7, <d>)")
        await journaled.run("DELETE FROM journaled_pages")

        async with journaled.database.engine.connect() as connection:
            owner = await connection.scalar(sa.select(journaled.journal.table.c.owner))
        assert json.loads(owner or "")["key"] == ["p", "7"]


def odd(segments: str) -> str:
    return f"s3://bucket/prefix/{segments}id={'0' * 31}1"


class TestForeign:
    @pytest.mark.parametrize("segments", ["/", "x//", "./", "x/../", "..//", "x/./y/"])
    async def test_keys_that_may_be_read_otherwise(
        self, journaled: Journaled, segments: str
    ) -> None:
        """The worker would not delete an object of such a name, so it is nobody's to retire."""
        uri = odd(segments)
        await journaled.run(
            f"UPDATE <docs> SET title = 'x', body = '{uri}' WHERE name = 'q'",
            "UPDATE <docs> SET body = NULL WHERE name = 'q'",
        )

        assert not is_owned(journaled.store, uri)
        assert await journaled.states() == {}

    @pytest.mark.parametrize(
        "end", ["id=" + 31 * "1", "id=" + 33 * "1", "id=" + 31 * "1" + "A", "xid=" + 32 * "1"]
    )
    async def test_keys_without_an_id(self, journaled: Journaled, end: str) -> None:
        """What does not end in exactly an id may be shared, and is left alone."""
        await journaled.run(
            f"UPDATE <docs> SET body = 's3://bucket/prefix/x/{end}' WHERE name = 'q'",
            f"UPDATE <docs> SET body = 's3://bucket/prefix/{end}' WHERE name = 'q'",
            "UPDATE <docs> SET body = NULL WHERE name = 'q'",
        )

        assert not is_one_attempt(f"s3://bucket/prefix/x/{end}")
        assert await journaled.states() == {}

    @pytest.mark.parametrize("segments", ["", "a.b/..c/", ".../", "x/.hidden/"])
    async def test_keys_that_may_not(self, journaled: Journaled, segments: str) -> None:
        """Dots in names are nothing special."""
        uri = odd(segments)
        with pytest.raises(DBAPIError, match="never staged"):
            await journaled.run(f"UPDATE <docs> SET body = '{uri}' WHERE name = 'q'")

        assert is_owned(journaled.store, uri)


LETS_GO = "UPDATE <docs> SET body = NULL WHERE name = 'r'"
MOVES = (
    LETS_GO,
    "INSERT INTO journaled_pages (doc, number, text) VALUES ('q', 1, <d>)",
)


async def add_trigger(journaled: Journaled, event: str, *statements: str) -> None:
    """Have the user's own row trigger run on <docs>, before ours and, on SQLite, after it."""
    text = "; ".join(statements)
    condition = "OLD.name = 'p'" if event == "DELETE" else "NEW.name = 'r' AND NEW.body IS NOT NULL"
    if journaled.database.is_sqlite:
        await journaled.run(
            f"CREATE TRIGGER a_user AFTER {event} ON <docs> WHEN {condition} BEGIN {text}; END"
        )
        return
    await journaled.run(
        "CREATE OR REPLACE FUNCTION a_user() RETURNS trigger LANGUAGE plpgsql "
        f"AS $$ BEGIN {text}; RETURN NULL; END $$",
        f"CREATE TRIGGER a_user AFTER {event} ON <docs> FOR EACH ROW WHEN ({condition}) "
        "EXECUTE FUNCTION a_user()",
    )


class TestTriggersOfOthers:
    @pytest.fixture(params=["theirs is newer", "ours is newer"])
    def is_newer(self, request: pytest.FixtureRequest) -> bool:
        """Which one was created last, which decides on SQLite."""
        return str(request.param) == "ours is newer"

    async def _renew(self, journaled: Journaled) -> None:
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.create_triggers)

    async def test_letting_go_at_once(self, journaled: Journaled, *, is_newer: bool) -> None:
        """What their trigger empties in the same statement is retired."""
        await add_trigger(journaled, "INSERT", LETS_GO)
        if is_newer:
            await self._renew(journaled)
        await journaled.stage("d")
        await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <d>)")

        assert await journaled.states() == {"d": "retired"}

    async def test_letting_go_of_what_was_retired(
        self, journaled: Journaled, *, is_newer: bool
    ) -> None:
        """So is what was retired before and taken back; and it can be taken back once more."""
        await journaled.run("UPDATE <docs> SET body = NULL WHERE name = 'p'")
        await add_trigger(journaled, "INSERT", LETS_GO)
        if is_newer:
            await self._renew(journaled)
        await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <a>)")
        between = await journaled.states()
        await journaled.run("UPDATE <docs> SET body = <a> WHERE name = 'p'")

        assert between == {"a": "retired"}
        assert await journaled.states() == {}

    @pytest.mark.parametrize("statements", [MOVES, MOVES[::-1]])
    async def test_moving_at_once(
        self, journaled: Journaled, statements: tuple[str, ...], *, is_newer: bool
    ) -> None:
        """What their trigger moves to another row is live there, or the statement is refused."""
        await add_trigger(journaled, "INSERT", *statements)
        if is_newer:
            await self._renew(journaled)
        await journaled.stage("d")
        try:
            await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <d>)")
        except DBAPIError as exc:
            assert statements == MOVES[::-1]
            assert "live in another" in str(exc)  # noqa: PT017 - only of that case
            assert await journaled.states() == {"d": "staged"}
        else:
            assert await journaled.states() == {}

    async def test_an_archive_by_rows(self, journaled: Journaled) -> None:
        """A copy that is written before ours has run is refused with its reason."""
        await add_trigger(
            journaled, "DELETE", "INSERT INTO <docs> (name, body) VALUES ('old', OLD.body)"
        )
        with pytest.raises(DBAPIError, match="let go by the statement"):
            await journaled.run("DELETE FROM <docs> WHERE name = 'p'")

        assert await journaled.states() == {}

    async def test_an_archive_by_statements(self, journaled: Journaled) -> None:
        """One that runs after ours takes the object over."""
        if journaled.database.is_sqlite:  # where the newest trigger runs first
            await add_trigger(
                journaled, "DELETE", "INSERT INTO <docs> (name, body) VALUES ('old', OLD.body)"
            )
            await self._renew(journaled)
        else:
            await journaled.run(
                "CREATE OR REPLACE FUNCTION z_user() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "INSERT INTO <docs> (name, body) SELECT 'old', body FROM gone; RETURN NULL; END $$",
                "CREATE TRIGGER z_user AFTER DELETE ON <docs> REFERENCING OLD TABLE AS gone "
                "FOR EACH STATEMENT EXECUTE FUNCTION z_user()",
            )
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")

        assert await journaled.states() == {"b": "retired"}


class TestPostgresql:
    @pytest_asyncio.fixture
    async def journaled(
        self, postgres: Database, memory_store: MemoryStore
    ) -> AsyncIterator[Journaled]:
        """The same tables, on PostgreSQL alone."""
        async with open_journaled(postgres, memory_store) as opened:
            yield opened

    async def test_merge(self, journaled: Journaled) -> None:
        """All of its branches count as one statement."""
        await journaled.stage("d", "e")
        await journaled.run(
            "MERGE INTO <docs> AS target USING (VALUES ('p', <d>), ('r', <e>), ('q', NULL)) "
            "AS given (name, body) ON target.name = given.name "
            "WHEN MATCHED AND given.body IS NULL THEN DELETE "
            "WHEN MATCHED THEN UPDATE SET body = given.body "
            "WHEN NOT MATCHED THEN INSERT (name, body) VALUES (given.name, given.body)"
        )

        assert await journaled.states() == {"a": "retired", "c": "retired"}

    async def test_move_in_one_statement(self, journaled: Journaled) -> None:
        """A row that is deleted in a CTE and inserted under another key keeps its object."""
        await journaled.run(
            "WITH gone AS (DELETE FROM <docs> WHERE name = 'p' RETURNING body) "
            "INSERT INTO <docs> (name, body) SELECT 'z', body FROM gone"
        )

        assert await journaled.states() == {"b": "retired"}

    async def test_copy(self, journaled: Journaled) -> None:
        """COPY adopts, and is refused as a whole."""
        await journaled.stage("d")
        async with journaled.database.engine.connect() as connection:
            raw = await connection.get_raw_connection()
            driver: Any = raw.driver_connection
            columns = ["name", "body"]
            with pytest.raises(asyncpg.RaiseError, match="never staged"):
                await driver.copy_records_to_table(
                    "journaled docs",
                    records=[("r", journaled.uri("d")), ("s", journaled.uri("f"))],
                    columns=columns,
                )
            await driver.copy_records_to_table(
                "journaled docs", records=[("r", journaled.uri("d"))], columns=columns
            )

        assert await journaled.states() == {}

    async def test_truncate(self, journaled: Journaled) -> None:
        """Everything in the table is retired, and what TRUNCATE takes along."""
        await journaled.stage("d")
        await journaled.run("INSERT INTO journaled_pages (doc, number, text) VALUES ('p', 1, <d>)")
        await journaled.run("TRUNCATE <docs> CASCADE")

        assert await journaled.states() == dict.fromkeys("abcd", "retired")

    async def test_truncate_of_a_parent_alone(self, journaled: Journaled) -> None:
        """Rows of a table that inherits stay, and so do their objects."""
        await journaled.run("CREATE TABLE more_docs () INHERITS (<docs>)")
        try:
            async with journaled.database.engine.begin() as connection:
                await connection.run_sync(journaled.journal.create_triggers)
            await journaled.stage("d")
            await journaled.run(
                "INSERT INTO more_docs (name, body) VALUES ('m', <d>)",
                "DELETE FROM journaled_pages",
                "ALTER TABLE journaled_pages DROP CONSTRAINT journaled_pages_doc_fkey",
                "TRUNCATE ONLY <docs>",
            )
            first = await journaled.states()
            await journaled.run("TRUNCATE <docs>")

            assert first == dict.fromkeys("abc", "retired")
            assert await journaled.states() == dict.fromkeys("abcd", "retired")
        finally:
            await journaled.run("DROP TABLE more_docs")

    async def test_truncate_of_rows_that_are_not_seen(self, journaled: Journaled) -> None:
        """Under row-level security it is refused, for rows would be overlooked."""
        with pytest.raises(DBAPIError, match="affected by row-level security"):
            await journaled.run(
                "CREATE ROLE journal_cleaner",
                "GRANT ALL ON <docs>, journaled_pages, aioblobcol_journal TO journal_cleaner",
                "ALTER TABLE <docs> ENABLE ROW LEVEL SECURITY",
                "SET LOCAL ROLE journal_cleaner",
                "TRUNCATE <docs> CASCADE",
            )

        assert await journaled.states() == {}

    async def test_deletes_at_one_time(self, journaled: Journaled) -> None:
        """Two that let one object go, shared from before the journal, do not fail each other."""
        await journaled.run(
            "ALTER TABLE <docs> DISABLE TRIGGER USER",
            "INSERT INTO <docs> (name, body) VALUES ('r', <f>), ('s', <f>)",
            "ALTER TABLE <docs> ENABLE TRIGGER USER",
        )
        async with journaled.database.engine.connect() as first:
            await first.exec_driver_sql(journaled.filled("DELETE FROM <docs> WHERE name = 'r'"))
            second = asyncio.create_task(journaled.run("DELETE FROM <docs> WHERE name = 's'"))
            waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            while not second.done() and not await first.scalar(waiting):  # noqa: ASYNC110
                await asyncio.sleep(0)
            await first.commit()
            await second

        assert await journaled.states() == {"f": "retired"}

    async def test_json_that_is_no_text(self, journaled: Journaled) -> None:
        """What PostgreSQL's json takes and cannot turn into text does no harm."""
        metadata = sa.MetaData()
        table = sa.Table(
            "journaled_json",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("scan", sa.JSON),
        )
        Journal(metadata, journaled.store, table_name="json_journal", uri_columns=[table.c.scan])
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        try:
            uri = journaled.uri("d")
            text = rf"""{{"uri": "{uri}", "note": "\u0000 \\u0000"}}"""
            await journaled.run(
                r"""INSERT INTO journaled_json VALUES (1, '{"note": "\u0000"}'), (2, '[1]')""",
                f"INSERT INTO json_journal (uri, state) VALUES ('{uri}', 'staged')",
                f"UPDATE journaled_json SET scan = '{text}' WHERE id = 1",
            )
            async with journaled.database.engine.connect() as connection:
                entries = sa.text("SELECT count(*) FROM json_journal")
                assert await connection.scalar(entries) == 0
                await connection.exec_driver_sql("DELETE FROM journaled_json")
                assert await connection.scalar(entries) == 1
        finally:
            async with journaled.database.engine.begin() as connection:
                await connection.run_sync(metadata.drop_all)

    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    async def test_truncate_with_an_old_snapshot(self, journaled: Journaled, level: str) -> None:
        """It is refused, for rows that it does not see would go as well."""
        with pytest.raises(DBAPIError, match="needs READ COMMITTED"):
            await journaled.run(
                f"SET TRANSACTION ISOLATION LEVEL {level}", "TRUNCATE <docs> CASCADE"
            )

        assert await journaled.states() == {}

    async def test_an_old_snapshot(self, journaled: Journaled) -> None:
        """What is staged after the transaction has begun is not seen; before, it is."""
        async with journaled.database.engine.connect() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ")
            await connection.exec_driver_sql("SELECT 1")
            await journaled.stage("d")
            update = journaled.filled("UPDATE <docs> SET body = <d> WHERE name = 'p'")
            with pytest.raises(DBAPIError, match="never staged, as far as this snapshot shows"):
                await connection.exec_driver_sql(update)
            await connection.rollback()
            await connection.exec_driver_sql(update)
            await connection.commit()

        assert await journaled.states() == {"a": "retired"}

    async def test_adoption_waits_for_a_condemnation(self, journaled: Journaled) -> None:
        """Whoever has the entry's lock decides, and the other one sees what it did."""
        await journaled.stage("d")
        table, is_d = journaled.journal.table, journaled.journal.table.c.uri == journaled.uri("d")
        async with journaled.database.engine.connect() as worker:
            await worker.execute(sa.update(table).where(is_d).values(state="deleting"))
            adopts = asyncio.create_task(
                journaled.run("UPDATE <docs> SET body = <d> WHERE name = 'p'")
            )
            waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            while not await worker.scalar(waiting):  # noqa: ASYNC110 - the other one waits there
                await asyncio.sleep(0)
            await worker.commit()
            with pytest.raises(DBAPIError, match="being deleted"):
                await adopts

        assert await journaled.states() == {"d": "deleting"}

    async def test_synchronous_commit(self, journaled: Journaled) -> None:
        """synchronous_commit is on where objects are at stake."""
        async with journaled.database.engine.begin() as connection:
            await connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
            await connection.exec_driver_sql(journaled.filled("UPDATE <docs> SET title = 'x'"))
            shown = await connection.scalar(sa.text("SHOW synchronous_commit"))

        assert shown == "on"

    async def test_other_programs(self, journaled: Journaled) -> None:
        """They stage what they insert, and nothing that is not of this journal."""
        await journaled.run(
            "SELECT aioblobcol_stage(<d>)",
            "INSERT INTO <docs> (name, body) VALUES ('r', <d>)",
        )
        for foreign in ("'s3://bucket/prefix/x'", "'x'", "NULL"):
            with pytest.raises(DBAPIError, match="not an object of this journal"):
                await journaled.run(f"SELECT aioblobcol_stage({foreign})")

        assert await journaled.states() == {}

    async def test_a_role_without_rights(self, journaled: Journaled) -> None:
        """It is told which table it may not use, and its row is not written."""
        try:
            with pytest.raises(DBAPIError, match="permission denied for table aioblobcol_journal"):
                await journaled.run(
                    "CREATE ROLE journal_reader",
                    "GRANT SELECT, DELETE ON <docs> TO journal_reader",
                    "SET LOCAL ROLE journal_reader",
                    "DELETE FROM <docs>",
                )
        finally:
            assert await journaled.states() == {}

    async def test_partitions(self, journaled: Journaled) -> None:
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
        journal = Journal(metadata, journaled.store, table_name="aioblobcol_journal")
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(parts.create)
            for kind in "xy":
                await connection.exec_driver_sql(
                    f"CREATE TABLE journaled_parts_{kind} PARTITION OF journaled_parts "
                    f"FOR VALUES IN ('{kind}')"
                )
            await connection.run_sync(journal.create_triggers)
        try:
            await journaled.stage("d", "e", "f")
            await journaled.run(
                "INSERT INTO journaled_parts VALUES ('x', 1, <d>), ('y', 2, <e>)",
                "INSERT INTO journaled_parts_x VALUES ('x', 3, <f>)",
                "UPDATE journaled_parts SET kind = CASE kind WHEN 'x' THEN 'y' ELSE 'x' END",
            )
            assert await journaled.states() == {}
            await journaled.run("TRUNCATE journaled_parts_x")
            assert await journaled.states() == {"e": "retired"}
            await journaled.run("DELETE FROM journaled_parts_y WHERE number = 1")
            await journaled.run("TRUNCATE journaled_parts")
            assert await journaled.states() == dict.fromkeys("def", "retired")
        finally:
            async with journaled.database.engine.begin() as connection:
                await connection.run_sync(parts.drop)

    async def test_moves_between_partitions(self, journaled: Journaled) -> None:
        """With a new object, by an upsert, by MERGE, and on a partition by its name."""
        metadata = sa.MetaData()
        sa.Table(
            "journaled_parts",
            metadata,
            sa.Column("kind", sa.Integer, primary_key=True),
            sa.Column("number", sa.Integer, primary_key=True),
            sa.Column("body", BlobType()),
            postgresql_partition_by="LIST (kind)",
        )
        journal = Journal(metadata, journaled.store)
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(metadata.tables["journaled_parts"].create)
            for kind in (1, 2):
                await connection.exec_driver_sql(
                    f"CREATE TABLE journaled_parts_{kind} PARTITION OF journaled_parts "
                    f"FOR VALUES IN ({kind})"
                )
            await connection.run_sync(journal.create_triggers)
        try:
            await journaled.stage("d", "e", "f")
            await journaled.run("INSERT INTO journaled_parts VALUES (1, 1, <d>), (2, 2, <e>)")
            await journaled.run(
                "UPDATE journaled_parts SET kind = 3 - kind, "
                "body = CASE number WHEN 1 THEN <e> ELSE <d> END"
            )
            assert await journaled.states() == {"f": "staged"}
            await journaled.run("UPDATE journaled_parts SET kind = 1, body = <f> WHERE number = 1")
            assert await journaled.states() == {"e": "retired"}
            await journaled.run(
                "INSERT INTO journaled_parts VALUES (1, 1, <e>) "
                "ON CONFLICT (kind, number) DO UPDATE SET body = excluded.body",
                "UPDATE journaled_parts_1 SET body = <f> WHERE number = 1",
                "MERGE INTO journaled_parts AS t USING (VALUES (1, <e>), (7, <f>)) AS g (n, b) "
                "ON t.number = g.n AND t.kind = 1 WHEN MATCHED THEN UPDATE SET body = g.b "
                "WHEN NOT MATCHED THEN INSERT VALUES (2, g.n, g.b)",
            )
            assert await journaled.states() == {}
            await journaled.run("DELETE FROM journaled_parts")
            assert await journaled.states() == dict.fromkeys("def", "retired")
        finally:
            async with journaled.database.engine.begin() as connection:
                await connection.run_sync(metadata.tables["journaled_parts"].drop)

    async def test_a_plan_of_a_small_journal(self, journaled: Journaled) -> None:
        """A session that has adopted from a small journal reads no more of a large one."""
        rows, names = 10, "'s3://bucket/prefix/many/id=' || lpad(n::text, 32, '0')"
        read = (
            "SELECT idx_tup_read, seq_tup_read FROM (SELECT sum(pg_stat_get_tuples_returned("
            "indexrelid)) AS idx_tup_read FROM pg_index WHERE indrelid = 'aioblobcol_journal'"
            "::regclass) AS i, pg_stat_user_tables WHERE relname = 'aioblobcol_journal'"
        )
        fill = f"INSERT INTO <docs> (name, body) SELECT n, {names} FROM generate_series"
        stage = (
            f"INSERT INTO aioblobcol_journal (uri, state) SELECT {names}, 'staged' "
            "FROM generate_series"
        )
        async with journaled.database.engine.connect() as connection:
            for statement in (
                f"{stage}(1, 1) AS n",
                "ANALYZE aioblobcol_journal",
                f"{fill}(1, 1) AS n",
                f"{stage}(2, {200 * rows}) AS n",
            ):
                await connection.exec_driver_sql(journaled.filled(statement))
                await connection.commit()
            await connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
            await connection.commit()
            before = sum((await connection.exec_driver_sql(read)).one())
            await connection.exec_driver_sql(journaled.filled(f"{fill}(2, {rows}) AS n"))
            await connection.commit()
            await connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
            await connection.commit()
            after = sum((await connection.exec_driver_sql(read)).one())

        assert rows - 1 <= after - before < 10 * rows

    async def test_staging_is_durable(self, journaled: Journaled) -> None:
        """Other programs upload afterwards: a crash of the server must not undo the entry."""
        async with journaled.database.engine.begin() as connection:
            await connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
            await connection.exec_driver_sql(journaled.filled("SELECT aioblobcol_stage(<d>)"))
            setting = await connection.scalar(sa.text("SHOW synchronous_commit"))

        assert setting == "on"

    async def test_staging_does_not_weaken(self, journaled: Journaled) -> None:
        """Whoever waits for more than the disk goes on doing so."""
        async with journaled.database.engine.begin() as connection:
            await connection.exec_driver_sql("SET LOCAL synchronous_commit = remote_apply")
            await connection.exec_driver_sql(journaled.filled("SELECT aioblobcol_stage(<d>)"))
            setting = await connection.scalar(sa.text("SHOW synchronous_commit"))

        assert setting == "remote_apply"


class TestSqlite:
    @pytest_asyncio.fixture
    async def journaled(
        self, sqlite: Database, memory_store: MemoryStore
    ) -> AsyncIterator[Journaled]:
        """The same tables, on SQLite alone."""
        async with open_journaled(sqlite, memory_store) as opened:
            yield opened

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE OR REPLACE <docs> SET body = NULL WHERE name = 'q'",
            "UPDATE OR REPLACE <docs> SET name = 'p' WHERE name = 'q'",
            "INSERT OR REPLACE INTO <docs> (name, body) VALUES ('q', NULL)",
            "INSERT OR REPLACE INTO <docs> (name, body) VALUES ('p', NULL)",
        ],
    )
    async def test_replacing_what_is_condemned(self, journaled: Journaled, statement: str) -> None:
        """A statement's REPLACE does not reach the journal: what is being deleted stays so."""
        table = journaled.journal.table
        await journaled.run(
            *journaled.journal.drop_ddl(journaled.database.engine.dialect),
            "UPDATE <docs> SET body = <e> WHERE name IN ('p', 'q')",
        )
        async with journaled.database.engine.begin() as connection:
            values = {"uri": journaled.uri("e"), "state": "deleting", "claim": "w"}
            await connection.execute(sa.insert(table).values(values))
        await journaled.run("UPDATE <docs> SET body = NULL WHERE name = 'p'")
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.create_triggers)
        await journaled.run("PRAGMA recursive_triggers = on", statement)

        async with journaled.database.engine.connect() as connection:
            is_e = table.c.uri == journaled.uri("e")
            found = (await connection.execute(sa.select(table).where(is_e))).one()
        assert (found.state, found.claim) == ("deleting", "w")

    @pytest.mark.parametrize("verb", ["INSERT OR REPLACE", "REPLACE"])
    async def test_replacing_by_what_is_condemned(self, journaled: Journaled, verb: str) -> None:
        """Nobody takes over what is being deleted, whatever the conflict clause."""
        table = journaled.journal.table
        async with journaled.database.engine.begin() as connection:
            values = {"uri": journaled.uri("e"), "state": "deleting"}
            await connection.execute(sa.insert(table).values(values))
        for statement in (
            f"{verb} INTO <docs> (name, body) VALUES ('p', <e>)",
            "UPDATE OR REPLACE <docs> SET body = <e> WHERE name = 'p'",
        ):
            with pytest.raises(DBAPIError, match="being deleted"):
                await journaled.run(statement)

        assert await journaled.states() == {"e": "deleting"}

    async def test_replacing_a_row(self, journaled: Journaled) -> None:
        """With the pragma that the library sets, the row that goes retires its objects."""
        await journaled.stage("d")
        await journaled.run(
            "PRAGMA recursive_triggers = on",
            "INSERT OR REPLACE INTO <docs> (name, body) VALUES ('p', <d>)",
        )

        assert await journaled.states() == {"a": "retired", "b": "retired"}

    @pytest.mark.parametrize("text", ["{broken", "", "[1, 2]", '"x"', "5"])
    async def test_json_that_is_none(self, journaled: Journaled, text: str) -> None:
        """Text that is no JSON, or no object, names nothing and does no harm."""
        await journaled.run(
            f"UPDATE <docs> SET scan = '{text}' WHERE name = 'q'",
            "UPDATE <docs> SET title = 'x', scan = NULL WHERE name = 'q'",
            f"INSERT INTO <docs> (name, scan) VALUES ('r', '{text}')",
            "DELETE FROM <docs> WHERE name = 'r'",
        )
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.create_triggers)

        assert await journaled.states() == {}

    async def test_a_nul_character(self, journaled: Journaled) -> None:
        """A name with one is no object's."""
        uri = journaled.uri("d")
        await journaled.run(
            f"UPDATE <docs> SET body = '{uri}' || char(0) || 'x' WHERE name = 'q'",
            "UPDATE <docs> SET body = NULL WHERE name = 'q'",
        )

        assert await journaled.states() == {}

    async def test_a_column_of_any_name(self, sqlite: Database, memory_store: MemoryStore) -> None:
        """Its name is nothing that the triggers read."""
        metadata = sa.MetaData()
        sa.Table(
            "odd",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("a OR b", BlobType()),
            sa.Column("{0} -- '", BlobType()),
        )
        journaled = Journaled(sqlite, memory_store, Journal(metadata, memory_store))
        async with sqlite.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        await journaled.stage("a", "b")
        await journaled.run("""INSERT INTO odd VALUES (1, <a>, NULL), (2, NULL, <b>)""")
        with pytest.raises(DBAPIError, match="several cells"):
            await journaled.run("""UPDATE odd SET "{0} -- '" = "a OR b" WHERE id = 1""")
        await journaled.run("""UPDATE odd SET "a OR b" = "{0} -- '", "{0} -- '" = "a OR b" """)
        assert await journaled.states() == {}
        await journaled.run("DELETE FROM odd")

        assert await journaled.states() == {"a": "retired", "b": "retired"}


class TestInstalling:
    async def test_it_may_be_repeated(self, journaled: Journaled) -> None:
        """The printed statements but the table's change nothing the second time."""
        for _ in range(2):
            dialect = journaled.database.engine.dialect
            await journaled.run(*journaled.journal.ddl(dialect, with_table=False))
        await journaled.stage("d", "e")
        await journaled.run("UPDATE <docs> SET body = <d> WHERE name = 'p'")

        assert await journaled.states() == {"a": "retired", "e": "staged"}

    async def test_all_of_it_is_printed(self, journaled: Journaled) -> None:
        """An empty database gets everything from the printed statements."""
        journal = journaled.journal
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journal.table.drop)
        await journaled.run(*journal.ddl(journaled.database.engine.dialect))
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")

        assert await journaled.states() == {"a": "retired", "b": "retired"}

    async def test_cells_that_share(self, journaled: Journaled) -> None:
        """Nothing is installed while two cells name one object; the message names it."""
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.drop_triggers)
        await journaled.run("UPDATE <docs> SET body = <c> WHERE name = 'q'")

        with pytest.raises(DBAPIError) as caught:
            async with journaled.database.engine.begin() as connection:
                await connection.run_sync(journaled.journal.create_triggers)
        if journaled.database.name == "postgresql":
            assert journaled.uri("c") in str(caught.value)

    async def test_taken_away(self, journaled: Journaled) -> None:
        """Afterwards nobody adopts or retires, and nothing of it is left."""
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.drop_triggers)
        await journaled.run("UPDATE <docs> SET body = <f>, scan = NULL WHERE name = 'p'")

        assert await journaled.states() == {}

    async def test_not_strict(self, database: Database, memory_store: MemoryStore) -> None:
        """A rolling deployment: old programs write what they did not stage, the rest works."""
        async with open_journaled(database, memory_store, strict=False) as journaled:
            await journaled.stage("d")
            await journaled.run(
                "UPDATE <docs> SET body = <f> WHERE name = 'p'",
                "INSERT INTO <docs> (name, body) VALUES ('r', <d>)",
            )

            assert await journaled.states() == {"a": "retired"}

    @pytest.mark.parametrize(
        "statement",
        [
            "INSERT INTO <docs> (name, body) VALUES ('r', <d>)",
            "INSERT INTO <docs> (name, scan) VALUES ('r', {d})",
            "INSERT INTO <docs> (name, body) VALUES ('r', <d>), ('s', <d>), ('t', <e>)",
            "UPDATE <docs> SET body = <d>",
        ],
    )
    async def test_not_strict_about_what_is_being_deleted(
        self, database: Database, memory_store: MemoryStore, statement: str
    ) -> None:
        """Nobody takes over an object that is being deleted, however lenient the journal is."""
        async with open_journaled(database, memory_store, strict=False) as journaled:
            table = journaled.journal.table
            async with database.engine.begin() as connection:
                values = {"uri": journaled.uri("d"), "state": "deleting"}
                await connection.execute(sa.insert(table).values(values))
            with pytest.raises(DBAPIError, match="being deleted"):
                await journaled.run(statement)

            assert await journaled.states() == {"d": "deleting"}

    async def test_not_strict_about_several_cells(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """An object that is let into two cells at once is adopted: nobody may condemn it now."""
        async with open_journaled(database, memory_store, strict=False) as journaled:
            await journaled.stage("d")
            await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <d>), ('s', <d>)")

            assert await journaled.states() == {}

    def test_what_is_refused(self, memory_store: MemoryStore) -> None:
        """A journal without a store, with impossible times, or for columns that are none."""
        impossible: list[dict[str, Any]] = [
            {"stores": {}},
            {"stores": "s3://bucket"},
            {"lease": timedelta(0)},
            {"retention": timedelta(seconds=-1)},
            {"retention": timedelta.max},
            {"uri_columns": ["url"]},
        ]
        for arguments in impossible:
            with pytest.raises(InvalidInputError):
                Journal(sa.MetaData(), **{"stores": memory_store, **arguments})

        metadata = sa.MetaData()
        Journal(metadata, memory_store)
        with pytest.raises(InvalidInputError, match="already"):
            Journal(metadata, memory_store, table_name="other")

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
