"""``aioblobcol status``, ``ddl``, ``retire-table``, ``claim``, ``disown``: on both databases."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from support.databases import Database
from support.journal import Journaled, open_journaled
from typer.testing import CliRunner, Result

from aioblobcol import BlobApp, Journal, StoreError, open_store
from aioblobcol.cli._commands import app as command_line
from aioblobcol.cli._status_report import span
from aioblobcol.testing import MemoryStore

MARKER = "s3://bucket/prefix/.aioblobcol-owner"


class Operated:
    """Journaled tables, and the command line on them."""

    def __init__(self, journaled: Journaled, monkeypatch: pytest.MonkeyPatch) -> None:
        self.journaled = journaled
        self._monkeypatch = monkeypatch

    async def run(self, *arguments: str, charset: str = "utf-8", **changes: Any) -> Result:
        """Run a command in a loop of its own, with an engine of its own."""
        given: dict[str, Any] = {
            "engine": self.journaled.database.engine_with(),
            "stores": self.journaled.store,
            "metadata": self.journaled.journal.table.metadata,
            "journal": self.journaled.journal,
            **changes,
        }
        self._monkeypatch.setitem(sys.modules, "shop", SimpleNamespace(blobs=BlobApp(**given)))
        self._monkeypatch.setenv("AIOBLOBCOL_APP", "shop:blobs")
        self._monkeypatch.setenv("COLUMNS", "80")
        return await asyncio.to_thread(lambda: CliRunner(charset).invoke(command_line, arguments))

    async def enter(self, name: str, state: str, **values: object) -> None:
        """Enter an object that was due for an hour."""
        is_sqlite = self.journaled.database.is_sqlite
        hour_ago = "datetime('now', '-1 hour')" if is_sqlite else "now() - interval '1 hour'"
        moment = sa.text(hour_ago)
        table = self.journaled.journal.table
        async with self.journaled.database.engine.begin() as connection:
            await connection.execute(
                sa.insert(table).values(
                    {
                        "uri": self.journaled.uri(name),
                        "state": state,
                        "since": moment,
                        "not_before": moment,
                        **values,
                    }
                )
            )


@pytest_asyncio.fixture
async def operated(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Operated]:
    """Give two live rows with three objects, and an empty journal."""
    async with open_journaled(database, MemoryStore()) as journaled:
        yield Operated(journaled, monkeypatch)


class TestStatus:
    async def test_an_empty_journal(self, operated: Operated) -> None:
        """Says so in a table, with exit code 0."""
        result = await operated.run("status")

        assert (result.exit_code, result.stderr) == (0, "")
        assert "the worker is 0 s behind" in result.stdout
        assert "retired" in result.stdout

    async def test_what_is_parked(self, operated: Operated) -> None:
        """Is told with its reason, and alarms by exit code 1."""
        await operated.enter("d", "deleting", attempts=2, last_error="parked: AccessDenied")
        result = await operated.run("status")

        assert result.exit_code == 1
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("parked")]
        assert operated.journaled.uri("d") in line
        assert "AccessDenied, 2 attempts, next " in line

    async def test_an_alarm_on_the_lag(self, operated: Operated) -> None:
        """Exit code 1 beyond the limit, and only if there is one."""
        await operated.enter("d", "retired")

        assert (await operated.run("status")).exit_code == 0
        assert (await operated.run("status", "--max-lag-minutes", "61")).exit_code == 0
        result = await operated.run("status", "--max-lag-minutes", "59")
        assert result.exit_code == 1
        assert "the worker is 1 h 0 min behind" in result.stdout

    async def test_everything_at_once(self, operated: Operated) -> None:
        """Each line that there may be, and all of it for programs."""
        for number, name in enumerate("abcdef"):
            await operated.enter(name, ("staged", "retired", "deleting")[number % 3], attempts=1)
        for number in range(21):
            uri = f"s3://elsewhere/id={number:032x}"
            reason = {"attempts": 1, "last_error": "parked: AccessDenied"}
            await operated.enter("a", "deleting", uri=uri, **reason)
        text = (await operated.run("status")).stdout
        fields = json.loads((await operated.run("status", "--json")).stdout)

        assert f"the oldest upload without a row: {operated.journaled.uri('a')}" in text
        assert "21 parked" in text
        assert "21 under no store of this journal" in text
        assert "parked  1 more" in text
        assert fields["deleting"]["count"] == 23
        assert fields["staged"]["count"] == 2
        assert 3590 < fields["retired"]["oldest_seconds"] < 3700
        assert (fields["parked_count"], len(fields["parked"])) == (21, 20)
        assert fields["elsewhere"] == 21

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(-1, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7260, "2 h 1 min"), (90_000, "1 d 1 h")],
    )
    def test_spans(self, seconds: int, text: str) -> None:
        """A time is told in its two largest units."""
        assert span(timedelta(seconds=seconds)) == text


class TestDdl:
    @pytest.mark.parametrize("indexes", [(), ("--indexes",)])
    async def test_installs_everything(self, operated: Operated, indexes: tuple[str, ...]) -> None:
        """The script runs as it is printed, and then what was never staged is refused."""
        journaled = operated.journaled
        journal, database = journaled.journal, journaled.database
        async with database.engine.begin() as connection:
            await connection.run_sync(journal.drop_triggers)
            await connection.run_sync(journal.table.drop)
            await connection.run_sync(journal.owners.drop)
        printed = await operated.run("ddl", "--dialect", database.name, *indexes)
        assert printed.exit_code == 0
        await self.execute(database, printed.stdout)
        again = await operated.run("ddl", "--no-table", *indexes)
        await self.execute(database, again.stdout)

        with pytest.raises(DBAPIError, match="never staged"):
            await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <f>)")
        await journaled.stage("f")
        await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <f>)")
        assert await journaled.states() == {}
        assert bool(indexes) == ("\nCREATE INDEX IF NOT" in printed.stdout)
        assert bool(indexes) == (await self.indexes(database) != set())

    async def test_takes_it_out_again(self, operated: Operated) -> None:
        """Triggers go at once; the tables stay for the worker, and go as the comments say."""
        journaled = operated.journaled
        database, journal = journaled.database, journaled.journal
        await journaled.run("DELETE FROM <docs> WHERE name = 'p'")
        for _ in range(2):
            printed = await operated.run("ddl", "--drop")
            assert (printed.exit_code, printed.stderr) == (0, "")
            await self.execute(database, printed.stdout)
        await journaled.run("UPDATE <docs> SET body = <f>")  # staged by nobody, seen by nobody
        async with database.engine.connect() as connection:
            assert "journaled docs" in str(await connection.run_sync(journal.missing_triggers))
        assert await journaled.states() == {"a": "retired", "b": "retired"}
        rest = printed.stdout.partition("shows nothing:")[2].replace("\n-- ", "\n")
        await self.execute(database, rest)

        async with database.engine.connect() as connection:
            left = await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names())
            assert [name for name in left if name.startswith("aioblobcol")] == []
            if not database.is_sqlite:
                functions = (
                    "SELECT proname FROM pg_proc "
                    "WHERE pronamespace = current_schema()::regnamespace"
                )
                found = set(await connection.scalars(sa.text(functions)))
                own = tuple(
                    f"aioblobcol_journal_{each.table.name}" for each in journal.journaled_tables
                )  # other tests leave those of their own tables
                assert [name for name in found if name.startswith(own)] == []
                assert "aioblobcol_stage" not in found

    async def test_takes_out_no_half(self, operated: Operated) -> None:
        """What only goes with an installation is refused."""
        for option in ("--no-table", "--indexes"):
            result = await operated.run("ddl", "--drop", option)
            assert (result.exit_code, result.stdout) == (2, "")

    async def execute(self, database: Database, script: str) -> None:
        """Run a script as a whole, with the driver alone."""
        if database.is_sqlite:
            with contextlib.closing(sqlite3.connect(database.engine.url.database or "")) as plain:
                plain.executescript(script)
            return
        async with database.engine.connect() as connection:
            raw = await connection.get_raw_connection()
            driver: Any = raw.driver_connection
            await driver.execute(script)

    async def indexes(self, database: Database) -> set[str]:
        """Return the names of the proposed indexes that are there."""
        async with database.engine.connect() as connection:
            found = await connection.run_sync(
                lambda sync: sync.dialect.get_indexes(sync, "journaled docs")
            )
        return {each["name"] or "" for each in found if "uri" in (each["name"] or "")}

    async def test_the_indexes_are_of_use(self, postgres: Database) -> None:
        """PostgreSQL takes them for the worker's question."""
        async with open_journaled(postgres, MemoryStore()) as journaled:
            from aioblobcol._journal import proposed_indexes  # noqa: PLC0415

            await journaled.run(*proposed_indexes(journaled.journal, postgres.engine.dialect))
            for table in journaled.journal.journaled_tables:
                for column in table.columns:
                    uri = column.uri
                    question = sa.select(uri).where(uri.in_(["s3://bucket/a", "s3://bucket/b"]))
                    async with postgres.engine.begin() as connection:
                        await connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
                        compiled = question.compile(
                            dialect=postgres.engine.dialect,
                            compile_kwargs={"render_postcompile": True},
                        )
                        names = compiled.positiontup or ()
                        values = tuple(compiled.params[name] for name in names)
                        plan = await connection.exec_driver_sql(f"EXPLAIN {compiled}", values)
                        lines = str(plan.all())
                        assert f"aioblobcol_uri_{column.name}_" in lines
                        assert "Index Cond" in lines

    async def test_another_dialect(self, operated: Operated) -> None:
        """Exit code 2, and those that there are."""
        result = await operated.run("ddl", "--dialect", "mysql")

        assert result.exit_code == 2
        assert "postgresql, sqlite" in result.stderr


class TestRetireTable:
    async def test_only_says_what(self, operated: Operated) -> None:
        """Without --yes nothing is changed."""
        result = await operated.run("retire-table", "journaled docs")

        assert result.exit_code == 0
        assert "journaled docs: 3 objects in 2 rows would be retired" in result.stdout
        assert "body, scan, URL would be NULL" in result.stdout
        assert await operated.journaled.states() == {}

    async def test_lets_go(self, operated: Operated) -> None:
        """Everything that it names is retired, its rows stay and name nothing."""
        result = await operated.run("retire-table", "journaled docs", "--yes")

        assert (result.exit_code, result.stderr) == (0, "")
        assert "3 objects in 2 rows were retired" in result.stdout
        assert await operated.journaled.states() == dict.fromkeys("abc", "retired")
        async with operated.journaled.database.engine.connect() as connection:
            rows = await connection.exec_driver_sql(
                'SELECT name, body, scan, "URL" FROM "journaled docs"'
            )
            assert sorted(tuple(row) for row in rows) == [
                ("p", None, None, None),
                ("q", None, None, None),
            ]

    async def test_without_triggers(self, operated: Operated) -> None:
        """Nothing is changed if nobody would know of the objects afterwards."""
        journaled = operated.journaled
        async with journaled.database.engine.begin() as connection:
            await connection.run_sync(journaled.journal.drop_triggers)
        result = await operated.run("retire-table", "journaled docs", "--yes")

        assert result.exit_code == 1
        assert "only 0 of 3 objects" in result.stderr
        again = await operated.run("retire-table", "journaled docs")
        assert "3 objects in 2 rows" in again.stdout

    async def test_columns_that_take_no_null(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The rows are deleted, as it says before."""
        metadata, store = sa.MetaData(), MemoryStore()
        table = sa.Table(
            "strict_docs",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("url", sa.Text, nullable=False),
        )
        journal = Journal(metadata, store, table_name="strict_journal", uri_columns=[table.c.url])
        operated = Operated(Journaled(database, store, journal), monkeypatch)
        async with database.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        await operated.journaled.stage("a")
        await operated.journaled.run("INSERT INTO strict_docs VALUES (1, <a>)")
        said = await operated.run("retire-table", "strict_docs")
        assert "all its rows would be deleted" in said.stdout
        await operated.run("retire-table", "strict_docs", "--yes")

        assert await operated.journaled.states() == {"a": "retired"}
        async with database.engine.begin() as connection:
            assert (await connection.execute(sa.select(table))).all() == []
            await connection.run_sync(metadata.drop_all)

    @pytest.mark.parametrize("ondelete", ["CASCADE", "SET NULL", "SET DEFAULT"])
    async def test_rows_of_other_tables(
        self, database: Database, monkeypatch: pytest.MonkeyPatch, ondelete: str
    ) -> None:
        """Rows are not deleted where others would be deleted or changed along; these are named."""
        metadata, store = sa.MetaData(), MemoryStore()
        table = sa.Table(
            "strict_docs",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("above", sa.ForeignKey("strict_docs.id", ondelete="CASCADE")),
            sa.Column("url", sa.Text, nullable=False),
        )
        for name, action in (("strict pages", ondelete), ("strict_notes", "RESTRICT")):
            key = sa.ForeignKey("strict_docs.id", ondelete=action)
            sa.Table(name, metadata, sa.Column("doc", key))
        journal = Journal(metadata, store, table_name="strict_journal", uri_columns=[table.c.url])
        operated = Operated(Journaled(database, store, journal), monkeypatch)
        async with database.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        await operated.journaled.stage("a", "b")
        await operated.journaled.run(
            "INSERT INTO strict_docs VALUES (1, NULL, <a>), (2, 1, <b>)",
            'INSERT INTO "strict pages" VALUES (1)',
        )
        for arguments in ((), ("--yes",)):
            result = await operated.run("retire-table", "strict_docs", *arguments)
            assert result.exit_code == 1
            assert "strict pages" in result.stderr
            assert "strict_notes" not in result.stderr
        assert await operated.journaled.states() == {}

        async with database.engine.begin() as connection:
            await connection.run_sync(metadata.tables["strict pages"].drop)
        assert (await operated.run("retire-table", "strict_docs", "--yes")).exit_code == 0
        assert await operated.journaled.states() == {"a": "retired", "b": "retired"}
        async with database.engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)

    async def test_an_object_of_two_cells(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It counts once, and goes once."""
        async with open_journaled(database, MemoryStore(), strict=False) as journaled:
            await journaled.run("INSERT INTO <docs> (name, body) VALUES ('r', <a>)")
            result = await Operated(journaled, monkeypatch).run(
                "retire-table", "journaled docs", "--yes"
            )

            assert (result.exit_code, result.stderr) == (0, "")
            assert "3 objects in 3 rows were retired" in result.stdout
            assert await journaled.states() == dict.fromkeys("abc", "retired")

    async def test_rows_that_are_hidden(
        self, postgres: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where policies hide rows it refuses, for their objects would stay."""
        async with open_journaled(postgres, MemoryStore()) as journaled:
            operated = Operated(journaled, monkeypatch)
            await journaled.run(
                "ALTER TABLE <docs> ENABLE ROW LEVEL SECURITY",
                "CREATE POLICY hidden ON <docs> USING (name = 'p')",
                "CREATE ROLE retiring",
                "GRANT ALL ON <docs>, aioblobcol_journal TO retiring",
            )
            try:
                for arguments in ((), ("--yes",)):
                    engine = create_async_engine(
                        postgres.url, connect_args={"server_settings": {"role": "retiring"}}
                    )
                    result = await operated.run(
                        "retire-table", "journaled docs", *arguments, engine=engine
                    )
                    assert result.exit_code == 1
                    assert "row-level security" in result.stderr
                assert await journaled.states() == {}
            finally:
                await journaled.run("DROP OWNED BY retiring CASCADE", "DROP ROLE retiring")

    async def test_a_partition(self, postgres: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        """One partition lets go, the others keep what they name."""
        metadata, store = sa.MetaData(), MemoryStore()
        table = sa.Table(
            "by_year",
            metadata,
            sa.Column("year", sa.Integer, primary_key=True),
            sa.Column("url", sa.Text),
            postgresql_partition_by="LIST (year)",
        )
        journal = Journal(metadata, store, table_name="year_journal", uri_columns=[table.c.url])
        operated = Operated(Journaled(postgres, store, journal), monkeypatch)
        async with postgres.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            for year in (2019, 2020):
                await connection.exec_driver_sql(
                    f"CREATE TABLE by_year_{year} PARTITION OF by_year FOR VALUES IN ({year})"
                )
            await connection.run_sync(journal.create_triggers)
        await operated.journaled.stage("a", "b")
        await operated.journaled.run("INSERT INTO by_year VALUES (2019, <a>), (2020, <b>)")
        unknown = await operated.run("retire-table", "by_year_2019")
        assert (unknown.exit_code, "--partition-of" in unknown.stderr) == (2, True)
        arguments = ("by_year_2019", "--partition-of", "by_year", "--yes")
        result = await operated.run("retire-table", *arguments)

        assert result.exit_code == 0
        assert await operated.journaled.states() == {"a": "retired"}
        async with postgres.engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)


class TestOwnership:
    async def test_claim_and_disown(self, operated: Operated) -> None:
        """Claimed, given up, refused, taken over; exit codes 0 and 1."""
        claimed = await operated.run("claim")
        assert (claimed.exit_code, claimed.stderr) == (0, "")
        assert claimed.stdout == "s3://bucket/prefix/ is owned by this database.\n"
        assert MARKER in operated.journaled.store.objects
        assert (await operated.run("claim")).exit_code == 0
        given_up = await operated.run("disown")
        assert "deletes nothing there" in given_up.stdout
        refused = await operated.run("claim")
        assert refused.exit_code == 1
        assert len(refused.stderr.splitlines()) == 1
        assert "claim --take-over" in refused.stderr
        taken = await operated.run("claim", "--take-over", "--json")
        assert json.loads(taken.stdout)["state"] == "agreed"


class TestTrouble:
    @pytest.mark.parametrize(
        "command", [["worker"], ["status"], ["ddl"], ["retire-table", "x"], ["claim"], ["disown"]]
    )
    async def test_no_journal(self, operated: Operated, command: list[str]) -> None:
        """Exit code 2, and how to make one."""
        result = await operated.run(*command, metadata=sa.MetaData(), journal=None)

        assert result.exit_code == 2
        message = " ".join(result.stderr.replace("│", " ").split())
        assert "this application has no journal. Make one beside its models" in message

    @pytest.mark.parametrize("command", [["status"], ["retire-table", "journaled docs"]])
    async def test_a_database_that_is_away(self, operated: Operated, command: list[str]) -> None:
        """Exit code 1 and one line."""
        engine = create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/none")
        result = await operated.run(*command, engine=engine)

        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
        assert f"aioblobcol {command[0]}: stopped: " in result.stderr

    async def test_a_database_that_does_not_exist(
        self, postgres: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So it is, although the driver's error comes as it is."""
        async with open_journaled(postgres, MemoryStore()) as journaled:
            engine = create_async_engine(postgres.engine.url.set(database="no_such_database"))
            result = await Operated(journaled, monkeypatch).run("status", engine=engine)

        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
        assert '"no_such_database" does not exist' in result.stderr

    async def test_a_store_that_is_away(self, operated: Operated) -> None:
        """So is a store: exit code 1 and one line."""
        away: Callable[[str, str], Exception] = lambda operation, uri: StoreError(  # noqa: E731
            operation, uri, "SlowDown"
        )
        operated.journaled.store.fail("get", error=away)
        result = await operated.run("claim")

        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
        assert "SlowDown" in result.stderr

    async def test_a_real_store_that_is_away(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So is S3 when nobody listens there."""
        nowhere: Any = open_store(
            bucket="bucket",
            prefix="prefix",
            endpoint_url="http://127.0.0.1:1",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        async with open_journaled(database, nowhere) as journaled:
            result = await Operated(journaled, monkeypatch).run("claim")

        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
        assert "cannot get s3://bucket/prefix/.aioblobcol-owner" in result.stderr


class TestTerminals:
    async def test_one_that_knows_few_characters(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What it cannot show is escaped; SQL is UTF-8 always, for psql and sqlite3 read that."""
        async with open_journaled(database, MemoryStore(prefix="ü")) as journaled:
            operated = Operated(journaled, monkeypatch)
            await operated.enter("d", "staged")
            result = await operated.run("status", charset="ascii")
            assert (result.exit_code, "s3://bucket/\\xfc/" in result.stdout) == (0, True)
            result = await operated.run("ddl", charset="latin-1")
            assert "'s3://bucket/ü/'".encode() in result.stdout_bytes
            for command in ("retire-table", "claim", "disown"):
                arguments = ["journaled docs"] if command == "retire-table" else []
                result = await operated.run(command, *arguments, charset="ascii")
                assert result.exit_code == 0


class TestHelp:
    def test_shows_examples(self) -> None:
        """Every command of the journal's shows how it is called."""
        for command in ("worker", "status", "ddl", "retire-table", "claim", "disown"):
            result = CliRunner().invoke(command_line, [command, "--help"])

            assert result.exit_code == 0
            assert f"aioblobcol {command}" in result.stdout

    @pytest.mark.slow
    async def test_completion(self) -> None:
        """A shell that asks gets the commands."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "aioblobcol.cli"),
            stdout=asyncio.subprocess.PIPE,
            env={
                **os.environ,
                "_AIOBLOBCOL_COMPLETE": "complete_bash",
                "COMP_WORDS": "aioblobcol re",
                "COMP_CWORD": "1",
            },
        )
        out, _ = await process.communicate()

        assert out.decode().split() == ["retire-table"]
