"""What the journal's triggers cost the writer: INSERT and UPDATE of rows with two blob columns.

Each act is done to a table with triggers and to the same table without, in turns, on PostgreSQL
and on SQLite: all rows in one statement, and each row in a statement of its own; every act is one
transaction. Objects are staged before the clock runs. The journal holds many other entries, as it
does where objects are retained for long.

Exit code 0: a ratio is for people to judge, since a busy machine is no defect.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import asyncpg
import sqlalchemy as sa
from create_row import print_machine
from own_postgresql import own_postgresql
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from aioblobcol import BlobType, Journal
from aioblobcol.testing import MemoryStore

TABLES: Final = ("plain", "guarded")
ROOT: Final = "s3://benchmark/rows/"


def declared() -> tuple[Journal, Sequence[sa.Table]]:
    """Return a journal for one of two tables that are the same but for it."""
    made = []
    metadata = sa.MetaData()
    for name, of in (("plain", sa.MetaData()), ("guarded", metadata)):
        made.append(
            sa.Table(
                name,
                of,
                sa.Column("id", sa.Integer, primary_key=True),
                sa.Column("scan", BlobType()),
                sa.Column("page", BlobType()),
                sa.Column("title", sa.Text),
            )
        )
    store = MemoryStore(bucket="benchmark", prefix="rows")
    return Journal(metadata, store), made


class Connection(Protocol):
    """What both drivers can do."""

    async def run(self, statement: str) -> None:
        """Run one statement."""

    async def run_each(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Run a statement for each row, one after the other."""


class Postgresql:
    """One asyncpg connection."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    async def run(self, statement: str) -> None:
        """Run one statement."""
        await self._driver.execute(statement)

    async def run_each(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Run a prepared statement for each row."""
        prepared = await self._driver.prepare(statement)
        for row in rows:
            await prepared.fetch(*row)


class Sqlite:
    """One connection of the standard library's driver."""

    def __init__(self, driver: sqlite3.Connection) -> None:
        self._driver = driver

    async def run(self, statement: str) -> None:
        """Run one statement."""
        self._driver.execute(statement).close()

    async def run_each(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Run a statement for each row; SQLite's numbered parameters are those of PostgreSQL."""
        statement = statement.replace("$", "?")
        for row in rows:
            self._driver.execute(statement, row).close()


def uris(generation: int, column: int, count: int) -> Iterator[str]:
    """Return what the rows name."""
    return (
        f"{ROOT}table=guarded/pk={n}/id={generation:08x}{column:08x}{n:016x}" for n in range(count)
    )


class Bench:
    """Both tables in one database."""

    def __init__(self, connection: Connection, *, rows: int) -> None:
        self._connection = connection
        self._count = rows
        self._generation = 0

    async def prepare(self, dialect: sa.Dialect, *, entries: int) -> None:
        """Create the tables, the journal with so many entries of others, and where URIs wait."""
        journal, tables = declared()
        statements = [str(CreateTable(table).compile(dialect=dialect)) for table in tables]
        statements += journal.ddl(dialect)
        statements.append("CREATE TABLE next (id INTEGER PRIMARY KEY, scan TEXT, page TEXT)")
        for statement in statements:
            await self._connection.run(statement)
        await self._stage(list(uris(2**32 - 1, 0, entries)))
        await self._connection.run("ANALYZE")

    async def next_rows(self, table: str) -> list[tuple[int, str, str]]:
        """Stage new objects for all rows, where it matters; return them."""
        self._generation += 1
        columns = [list(uris(self._generation, each, self._count)) for each in (1, 2)]
        if table == "guarded":
            await self._stage(columns[0] + columns[1])
        rows = [(n, *pair) for n, pair in enumerate(zip(*columns, strict=True))]
        await self._connection.run("DELETE FROM next")
        await self._in_transaction(
            self._connection.run_each("INSERT INTO next VALUES ($1, $2, $3)", rows)
        )
        return rows

    async def clear(self, table: str) -> None:
        """Empty the table, and forget what it retired."""
        await self._connection.run(f"DELETE FROM {table}")
        await self._connection.run("DELETE FROM aioblobcol_journal WHERE state = 'retired'")

    async def timed(self, table: str, act: str, rows: Sequence[tuple[Any, ...]]) -> float:
        """Do one act in one transaction; return the seconds it took."""
        titles = [(row[0],) for row in rows]
        connection = self._connection
        acts: dict[str, Callable[[], Awaitable[None]]] = {
            "INSERT, one statement": lambda: connection.run(
                f"INSERT INTO {table} SELECT id, scan, page, 'x' FROM next"
            ),
            "INSERT, single rows": lambda: connection.run_each(
                f"INSERT INTO {table} VALUES ($1, $2, $3, 'x')", rows
            ),
            "UPDATE of URIs, one statement": lambda: connection.run(
                f"UPDATE {table} SET scan = next.scan, page = next.page "
                f"FROM next WHERE next.id = {table}.id"
            ),
            "UPDATE of URIs, single rows": lambda: connection.run_each(
                f"UPDATE {table} SET scan = $2, page = $3 WHERE id = $1", rows
            ),
            "UPDATE of a title, one statement": lambda: connection.run(
                f"UPDATE {table} SET title = 'y'"
            ),
            "UPDATE of a title, single rows": lambda: connection.run_each(
                f"UPDATE {table} SET title = 'z' WHERE id = $1", titles
            ),
        }
        started = time.perf_counter()
        await self._in_transaction(acts[act]())
        return time.perf_counter() - started

    async def _stage(self, staged: list[str]) -> None:
        rows = [(uri,) for uri in staged]
        statement = "INSERT INTO aioblobcol_journal (uri, state) VALUES ($1, 'staged')"
        await self._in_transaction(self._connection.run_each(statement, rows))

    async def _in_transaction(self, work: Awaitable[None]) -> None:
        await self._connection.run("BEGIN")
        await work
        await self._connection.run("COMMIT")


async def compare(bench: Bench, *, rounds: int) -> None:
    """Measure all acts on both tables, and print the table of medians."""
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(-1, rounds):  # the first one fills caches
        for table in TABLES if number % 2 else reversed(TABLES):
            for how in ("one statement", "single rows"):
                await bench.clear(table)
                for what in ("INSERT", "UPDATE of URIs", "UPDATE of a title"):
                    act = f"{what}, {how}"
                    rows = await bench.next_rows(table)
                    seconds = await bench.timed(table, act, rows)
                    if number >= 0:
                        found.setdefault(act, {}).setdefault(table, []).append(seconds)
    print(f"{'act':<36}{'without':>12}{'with':>12}{'ratio':>8}")
    for act, by_table in found.items():
        plain, guarded = (statistics.median(by_table[table]) for table in TABLES)
        print(f"{act:<36}{plain * 1e3:>9.1f} ms{guarded * 1e3:>9.1f} ms{guarded / plain:>8.2f}")
    print()


async def run(*, rounds: int, rows: int, entries: int) -> None:
    """Measure on both databases."""
    print_machine()
    print(f"{rows} rows with 2 blob columns, {entries} other entries, medians of {rounds} rounds\n")
    await _on_postgresql(rounds=rounds, rows=rows, entries=entries)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        with sqlite3.connect(Path(directory) / "rows.db", isolation_level=None) as driver:
            driver.execute("PRAGMA journal_mode=WAL").close()
            bench = Bench(Sqlite(driver), rows=rows)
            await bench.prepare(sqlite.dialect(), entries=entries)
            print(f"SQLite {sqlite3.sqlite_version}")
            await compare(bench, rounds=rounds)
        driver.close()


async def _on_postgresql(*, rounds: int, rows: int, entries: int) -> None:
    with own_postgresql() as url:
        plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
        driver = await asyncpg.connect(plain)
        bench = Bench(Postgresql(driver), rows=rows)
        await bench.prepare(postgresql.dialect(), entries=entries)  # type: ignore[no-untyped-call]
        print(f"PostgreSQL {await driver.fetchval('SHOW server_version')}")
        await compare(bench, rounds=rounds)
        await driver.close()


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--entries", type=int, default=100_000)
    arguments = parser.parse_args()
    asyncio.run(run(rounds=arguments.rounds, rows=arguments.rows, entries=arguments.entries))


if __name__ == "__main__":
    main()
