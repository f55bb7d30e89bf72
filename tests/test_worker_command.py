"""``aioblobcol worker`` as a process: signals, exit codes, lines for programs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from support.databases import Database
from support.journal import Journaled, open_journaled
from support.s3_proxy import Answer, Forward, Request, S3Proxy, answer, s3_proxy

from aioblobcol._journal import disown
from aioblobcol._store._s3 import S3Store
from aioblobcol.testing import S3Server

MODULE = """
import os
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from aioblobcol import BlobApp, Journal, open_store

metadata = sa.MetaData()
name = sa.Column("name", sa.Text, primary_key=True)
docs = sa.Table("journaled docs", metadata, name, sa.Column("URL", sa.Text))
store = open_store(
    bucket=os.environ["BUCKET"], prefix="app", endpoint_url=os.environ["ENDPOINT"],
    region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test",
)
journal = Journal(metadata, store, uri_columns=[docs.c.URL])
engine = create_async_engine(os.environ["DATABASE"])
blobs = BlobApp(engine=engine, stores=store, metadata=metadata, journal=journal)
"""

pytestmark = pytest.mark.slow  # a process for each test


class Shop:
    """Three retired objects that are due, and workers in processes of their own."""

    def __init__(self, journaled: Journaled, store: S3Store, proxy: S3Proxy, path: Path) -> None:
        self.journaled = journaled
        self.store = store
        self.proxy = proxy
        self._path = path

    @contextlib.asynccontextmanager
    async def working(self, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """Start a worker; whatever happens it does not outlive the block."""
        url = self.journaled.database.engine.url.render_as_string(hide_password=False)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "aioblobcol.cli", "worker", "--app", "worker_shop:blobs"),
            *arguments,
            cwd=self._path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                **os.environ,
                "DATABASE": url,
                "BUCKET": self.store.bucket,
                "ENDPOINT": self.proxy.endpoint_url,
            },
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()

    async def run(self, *arguments: str) -> tuple[int | None, list[Any], str]:
        """Run a worker to its end; return its code, its JSON lines and its log."""
        async with self.working(*arguments, "--json") as process:
            out, err = await process.communicate()
            return process.returncode, [*map(json.loads, out.splitlines())], err.decode()

    async def objects(self) -> str:
        """Return the short names of the objects that are there."""
        there = {uri async for uri in self.store.iter_uris()}
        return "".join(name for name in "abcdef" if self.journaled.uri(name) in there)


@pytest_asyncio.fixture
async def shop(database: Database, s3: S3Server, tmp_path: Path) -> AsyncIterator[Shop]:
    """Give the objects d, e and f, all of them retired and due."""
    (tmp_path / "worker_shop.py").write_text(MODULE)
    bucket = f"worker-{uuid.uuid4().hex}"
    await s3.create_bucket(bucket)
    store: Any = s3.open_store(bucket=bucket, prefix="app")
    async with store, s3_proxy(s3.endpoint_url) as proxy, open_journaled(database, store) as opened:
        for name in "def":
            key = opened.uri(name).removeprefix(f"s3://{bucket}/")
            await store.client.put_object(Bucket=bucket, Key=key, Body=b"x")
            values = {"uri": opened.uri(name), "state": "retired", "owner": "{}"}
            async with database.engine.begin() as connection:
                await connection.execute(sa.insert(opened.journal.table).values(values))
        yield Shop(opened, store, proxy, tmp_path)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_while_it_waits(self, shop: Shop, number: int) -> None:
        """One is enough, and is no error."""
        async with shop.working("--poll-seconds", "600") as process:
            assert process.stderr is not None
            log = ""
            while "3 done with" not in log:
                log = (await process.stderr.readline()).decode()
                assert log
            process.send_signal(number)
            _, rest = await process.communicate()

        assert process.returncode == 0
        assert rest.decode().splitlines()[-1].endswith("stopped")
        assert await shop.objects() == ""
        assert await shop.journaled.states() == {}

    async def test_in_the_middle_of_a_round(self, shop: Shop) -> None:
        """The round is finished and noted, and no other one begun."""
        reached, released = asyncio.Event(), asyncio.Event()

        async def hold(request: Request, forward: Forward) -> Answer:
            if request.method == "DELETE" or request.is_bulk_delete:
                reached.set()
                await released.wait()
            return await forward()

        shop.proxy.rule = hold
        async with shop.working("--batch-size", "1") as process:
            await reached.wait()
            process.send_signal(signal.SIGTERM)
            released.set()
            _, err = await process.communicate()

        assert process.returncode == 0
        assert "1 claimed, 1 deleted, 0 failed, 1 done with" in err.decode()
        assert len(await shop.objects()) == 2
        assert list((await shop.journaled.states()).values()) == ["retired", "retired"]


class TestOnce:
    async def test_all_that_is_due(self, shop: Shop) -> None:
        """A JSON line for each round, exit code 0; and nothing when nothing is due."""
        code, lines, _ = await shop.run("--once", "--batch-size", "2")

        assert code == 0
        assert [line["removed"] for line in lines] == [2, 1]
        assert all(line["failed"] == {} and line["lag_seconds"] >= 0 for line in lines)
        assert await shop.objects() == ""
        code, lines, log = await shop.run("--once")
        assert (code, lines) == (0, [])
        # it knows fewer columns than the triggers that stand, and nothing else is amiss
        assert [line for line in log.splitlines() if "triggers do not stand" not in line] == []

    async def test_what_cannot_be_deleted(self, shop: Shop) -> None:
        """Exit code 1, and the reason where programs and people look."""

        async def refuse(request: Request, forward: Forward) -> Answer:
            if request.is_bulk_delete:
                return answer("403 Forbidden", "AccessDenied")
            return await forward()

        shop.proxy.rule = refuse
        code, (line,), log = await shop.run("--once")

        assert code == 1
        assert set(line["failed"]) == {shop.journaled.uri(name) for name in "def"}
        assert log.count("AccessDenied") == 3
        assert "Traceback" not in log

    async def test_a_database_that_owns_nothing(self, shop: Shop) -> None:
        """Exit code 1, and what to do."""
        await disown(shop.journaled.journal, shop.journaled.database.engine)
        code, lines, log = await shop.run("--once")

        assert (code, lines) == (1, [])
        assert "aioblobcol claim --take-over" in log
        assert await shop.objects() == "def"

    async def test_a_database_that_is_not_ready(self, shop: Shop) -> None:
        """Exit code 1, one line, no traceback."""
        async with shop.journaled.database.engine.begin() as connection:
            await connection.run_sync(shop.journaled.journal.owners.drop)
        code, _, log = await shop.run("--once")

        assert code == 1
        assert "Traceback" not in log
        assert log.startswith("aioblobcol worker: stopped: ")
