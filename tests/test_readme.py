"""The README: every code block runs, every table is that of the code, every claim has its test.

A block is named by a comment above it, ``<!-- block: name -->``, and run by the test that is
marked ``@runs(name)``. What a reader has in front of them from earlier blocks (the model, the
imports of the handler) is predefined; after a block both stores are asked whether they agree.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import functools
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import sqlalchemy as sa
import typer.main
from aiobotocore.session import get_session
from aiohttp.test_utils import TestClient, TestServer
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from aioblobcol import (
    BlobNotWrittenError,
    BlobTransaction,
    Outcome,
    PutS3ApiCall,
    ResultSpentError,
    S3Store,
    UnsafeTransactionError,
    blob_transaction,
    guard,
    open_store,
    put_s3,
)
from aioblobcol._sources import MAX_PUT_BYTES
from aioblobcol._store._metadata import MAX_METADATA_BYTES
from aioblobcol._store._s3 import COMPAT, KEYS_PER_REQUEST
from aioblobcol._uri import MAX_COMPONENT_BYTES, MAX_KEY_BYTES
from aioblobcol.aws_s3 import drain, encode_pk, get_s3_key
from aioblobcol.cli._commands import app as command_line
from aioblobcol.testing import MemoryStore, S3Server, Step, assert_consistent, s3_server

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUCKET, PREFIX = "my-bucket", "tasks"  # as the README calls them


# --- the blocks --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its name, its language, its text and the line on which that begins."""

    name: str
    language: str
    text: str
    line: int

    @property
    def commands(self) -> list[list[str]]:
        lines = self.text.splitlines()
        assert all(line.startswith("$ ") for line in lines)
        return [shlex.split(line.removeprefix("$ ")) for line in lines]


def read_blocks() -> Iterator[Block]:
    above, opened = "", 0
    language, lines = "", list[str]()
    for number, line in enumerate(TEXT.splitlines(), start=1):
        if not line.startswith("```") and opened:
            lines.append(line)
        elif opened:
            named = re.fullmatch(r"<!-- block: (\S+) -->", above)
            name = named[1] if named else f"the block without a name on line {opened}"
            yield Block(name, language, "\n".join(lines), opened + 1)
            opened = 0
        elif line.startswith("```"):
            language, lines, opened = line.removeprefix("```"), [], number
        else:
            above = line
    assert not opened, "the last block is not closed"


BLOCKS = list(read_blocks())
RUNNERS: list[str] = []


def runs(name: str) -> pytest.MarkDecorator:
    """Hand the README's block to a test, which is then its runner."""
    RUNNERS.append(name)
    found = [block for block in BLOCKS if block.name == name]
    return pytest.mark.parametrize("block", found or [Block(name, "", "", 0)], ids=[name])


async def execute(block: Block, names: dict[str, Any]) -> None:
    """Run a block of Python, with `await` at its top level, in *names*."""
    source = "\n" * (block.line - 1) + (block.text or "raise AssertionError('no such block')")
    code = compile(
        source, str(README), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
    )
    running = eval(code, names)  # noqa: S307 - the project's own README
    if inspect.iscoroutine(running):
        await running


def table(first_column: str) -> list[list[str]]:
    """Return the rows of the table whose first column has this title, without formatting."""
    found = re.search(
        rf"^\| {re.escape(first_column)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE
    )
    assert found is not None, f"no table {first_column!r}"
    return [
        [cell.strip().strip("`") for cell in row.strip("|").split("|")]
        for row in found[1].splitlines()
    ]


# --- where they run ----------------------------------------------------------------------------


@dataclasses.dataclass
class Place:
    """The names that a reader has in front of them, and both stores."""

    names: dict[str, Any]

    async def run(self, block: Block, **hidden: Any) -> None:
        self.names.update(hidden)
        await execute(block, self.names)

    def session(self) -> AsyncSession:
        session: AsyncSession = self.names["Session"]()
        return session

    async def add(self, url: str = "u", **binaries: bytes) -> Any:
        """Create a row and return it."""
        task_class, store = self.names["Task"], self.names["store"]
        calls = [PutS3ApiCall(column, binary, None) for column, binary in binaries.items()]
        async with self.session() as session, blob_transaction(session, store=store) as tx:
            put = await tx.put_s3(pk=url, api_calls=calls)
            session.add(task := task_class(url=url, **put.to_values()))
        return task

    async def contents(
        self, store: Any = None, *, orphans: tuple[str, ...] = ()
    ) -> dict[str, tuple[bytes | None, bytes | None]]:
        """Return the bytes of every row, after asking whether both stores agree."""
        task = self.names["Task"]
        found = await assert_consistent(
            store or self.names["store"],
            self.names["engine"],
            [task.html, task.image],
            orphans=orphans,
        )
        async with self.names["engine"].connect() as connection:
            rows = await connection.execute(sa.select(task.url, task.html, task.image))
            return {url: (found.get(html), found.get(image)) for url, html, image in rows}


@contextlib.asynccontextmanager
async def open_place() -> AsyncIterator[Place]:
    """Run the README's model and make its table, in the current directory."""
    (model,) = (block for block in BLOCKS if block.name == "model")
    names: dict[str, Any] = {
        "__name__": "readme",
        "PutS3ApiCall": PutS3ApiCall,
        "blob_transaction": blob_transaction,
        "delete": sa.delete,
        "guard": guard,
        "update": sa.update,
    }
    await execute(model, names)
    async with names["engine"].begin() as connection:
        await connection.run_sync(names["Base"].metadata.create_all)
    engine = names["engine"]
    yield Place(names)
    await engine.dispose()


@pytest_asyncio.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    """Give the README's model on a SQLite file, with a store in memory."""
    monkeypatch.chdir(tmp_path)
    async with open_place() as opened, MemoryStore(bucket=BUCKET, prefix=PREFIX) as store:
        opened.names["store"] = store
        yield opened


@pytest.fixture(scope="module")
def local_s3() -> Iterator[S3Server]:
    """Give moto's server; the README's bucket has a fixed name, so no shared server will do."""
    with s3_server() as server:
        yield server


@pytest_asyncio.fixture
async def bucket(local_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[S3Store]:
    """Give the README's bucket, empty, and the environment that leads to its server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", local_s3.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with local_s3.open_store(bucket=BUCKET, prefix="") as store:
        await store.client.create_bucket(Bucket=BUCKET)
        yield store
        await store.delete_many([uri async for uri in store.iter_uris()])


@pytest_asyncio.fixture
async def s3_place(
    bucket: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    """Give the README's model as it stands there: a SQLite file, and S3 from the environment."""
    monkeypatch.chdir(tmp_path)
    async with open_place() as opened:
        yield opened


# --- the whole ---------------------------------------------------------------------------------


class TestBlocks:
    def test_every_block_has_a_runner(self) -> None:
        """No block of the README goes untested, and no test runs a block that is not there."""
        assert sorted(RUNNERS) == sorted(block.name for block in BLOCKS)

    def test_links_lead_somewhere(self) -> None:
        """Every link names a file of the project or a heading of the README."""
        headings = {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
        }
        targets = re.findall(r"\]\(([^)]+)\)", TEXT)

        assert targets
        for target in targets:
            path, _, anchor = target.partition("#")
            assert (ROOT / path).exists(), target
            assert not anchor or anchor in headings, target


# --- commands ----------------------------------------------------------------------------------


def steps_of(target: str, directory: Path) -> list[list[str]]:
    """Return what make would run for a target in a fresh clone, without pip's quiet options."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, directory)
    ours = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS", "PYTHON"}
    printed = subprocess.run(  # noqa: S603
        ["make", "--dry-run", "--no-print-directory", target],  # noqa: S607 - the command shown
        cwd=directory,
        env={name: value for name, value in os.environ.items() if name not in ours},
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    ).stdout
    quiet = {"-qq", "--disable-pip-version-check"}
    lines = [line for line in printed.splitlines() if line.startswith((".venv", "python3 -m"))]
    return [[word for word in shlex.split(line) if word not in quiet] for line in lines]


def extras_named(requirement: str) -> set[str]:
    found = re.fullmatch(r"\.\[([\w,]+)\]", requirement)
    assert found is not None
    return set(found[1].split(","))


class TestCommands:
    @runs("make")
    def test_make_has_the_targets(self, block: Block, tmp_path: Path) -> None:
        """Both targets are there."""
        assert block.commands == [["make", "demo"], ["make", "test"]]
        assert steps_of("demo", tmp_path)
        assert steps_of("test", tmp_path)

    @runs("plain-demo")
    def test_the_demos_plain_commands(self, block: Block, tmp_path: Path) -> None:
        """They are those that `make demo` runs, and the demo succeeds."""
        assert block.commands == steps_of("demo", tmp_path)

        program, *arguments = block.commands[-1]
        assert Path(program).name == "aioblobcol"
        finished = subprocess.run(  # noqa: S603 - the README's own command
            [sys.executable, "-m", "aioblobcol.cli", *arguments],
            cwd=tmp_path,
            check=False,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert finished.returncode == 0, finished.stderr

    @runs("plain-test")
    def test_the_tests_plain_commands(self, block: Block, tmp_path: Path) -> None:
        """They are those that `make test` runs."""
        assert block.commands == steps_of("test", tmp_path)

    @runs("demo-on-servers")
    def test_the_demos_options(self, block: Block) -> None:
        """The demo takes every option that is shown."""
        ((program, command, *arguments),) = block.commands
        found = typer.main.get_group(command_line).commands[command]
        context = found.make_context(command, list(arguments))

        assert Path(program).name == "aioblobcol"
        assert set(arguments[1::2]) <= {str(value) for value in context.params.values()}

    @runs("install")
    def test_the_extras_are_there(self, block: Block) -> None:
        """The extra that is shown exists, and the table lists all of them."""
        ((*command, requirement),) = block.commands
        extras = set(PROJECT["optional-dependencies"])

        assert command == ["python3", "-m", "pip", "install"]
        assert extras_named(requirement) <= extras
        assert [row[0] for row in table("Extra")] == list(PROJECT["optional-dependencies"])


# --- the handlers ------------------------------------------------------------------------------


class TestHandlers:
    @runs("model")
    async def test_the_model(self, block: Block, bucket: S3Store, s3_place: Place) -> None:
        """The model's columns take URIs, and its store opens from the environment alone."""
        assert block.language == "python"
        async with s3_place.names["store"]:
            await s3_place.add(html=b"<p>", image=b"PNG")

        assert await s3_place.contents(bucket) == {"u": (b"<p>", b"PNG")}

    @runs("fastapi")
    async def test_fastapi(self, block: Block, bucket: S3Store, s3_place: Place) -> None:
        """Over HTTP: create, create again, replace, replace at the same time, delete."""
        await s3_place.run(block)
        app = s3_place.names["app"]
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        seen = []

        async def send(method: str, html: bytes | None = None, url: str = "u") -> int:
            files = None if html is None else {"html": ("a.html", html)}
            answered = await client.request(method, "/tasks", params={"url": url}, files=files)
            return answered.status_code

        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            assert await send("POST", b"1") == 201
            assert await send("POST", b"1") == 500  # no answer for IntegrityError in this one
            seen.append(await s3_place.contents(bucket))
            assert await send("PUT", b"2") == 200
            seen.append(await s3_place.contents(bucket))
            statuses = await asyncio.gather(send("PUT", b"3"), send("PUT", b"4"))
            seen.append(await s3_place.contents(bucket))
            assert await send("PUT", b"5", url="nobody") == 404
            assert await send("DELETE") == 204
            assert await send("DELETE") == 404

        assert seen[:2] == [{"u": (b"1", None)}, {"u": (b"2", None)}]
        winners = [b"34"[n : n + 1] for n, status in enumerate(statuses) if status == 200]
        assert winners
        assert seen[2]["u"][0] in winners
        assert await s3_place.contents(bucket) == {}

    @runs("aiohttp")
    async def test_aiohttp(self, block: Block, bucket: S3Store, s3_place: Place) -> None:
        """Over HTTP, on a real port: create, create again, replace, delete."""
        await s3_place.run(block)
        seen = []
        async with TestClient(TestServer(s3_place.names["app"])) as client:

            async def send(method: str, html: bytes = b"") -> int:
                answered = await client.request(method, "/tasks", params={"url": "u"}, data=html)
                return answered.status

            assert await send("POST", b"1") == 201
            assert await send("POST", b"1") == 500
            seen.append(await s3_place.contents(bucket))
            assert await send("PUT", b"2") == 200
            seen.append(await s3_place.contents(bucket))
            assert await send("DELETE") == 204
            assert await send("DELETE") == 404

        assert seen == [{"u": (b"1", None)}, {"u": (b"2", None)}]
        assert await s3_place.contents(bucket) == {}


# --- what is guaranteed ------------------------------------------------------------------------

FAILURES, OUTCOMES = "consistency/test_failures.py", "consistency/test_outcomes.py"
CANCELLED, S3 = "consistency/test_cancellation.py", "integration/test_s3_store.py"
SHOWN_BY = {
    "An upload is refused": [
        (S3, "test_access_denied"),
        (FAILURES, "test_one_of_several_uploads_fails"),
    ],
    "One of several uploads fails": [
        (FAILURES, "test_one_of_several_uploads_fails"),
        (FAILURES, "test_uploads_that_have_not_begun_are_not_begun"),
        (FAILURES, "test_a_put_on_the_wire_is_run_to_its_end"),
    ],
    "An upload fails and undoing it fails too": [
        (FAILURES, "test_an_upload_that_could_not_be_undone_is_tried_again")
    ],
    "Cancelled before or during an upload": [
        (CANCELLED, "test_at_every_await"),
        (CANCELLED, "test_while_a_request_is_on_the_wire"),
    ],
    "Cancelled during a statement": [(CANCELLED, "test_at_every_await")],
    "Cancelled during COMMIT": [
        (CANCELLED, "test_the_outcome_stays_known"),
        (OUTCOMES, "test_cancelled_while_the_answer_is_under_way"),
        (OUTCOMES, "test_cancelled_and_then_the_answer_is_lost"),
    ],
    "Cancelled during the clean-up": [
        (CANCELLED, "test_while_a_request_is_on_the_wire"),
        (CANCELLED, "test_twice"),
    ],
    "The handler raises": [
        ("integration/test_five_scenarios.py", "test_create_fails"),
        (FAILURES, "test_new_objects_of_a_failed_block_are_not_left_to_the_background"),
    ],
    "A flush or a statement fails": [(FAILURES, "test_double_submit")],
    "A statement fails and its error is swallowed, on PostgreSQL": [
        (OUTCOMES, "test_a_swallowed_error_before_commit_is_found")
    ],
    "An upload goes into no row": [
        (FAILURES, "test_a_forgotten_column"),
        (FAILURES, "test_an_update_that_matched_nothing"),
        (FAILURES, "test_written_in_a_savepoint_that_was_rolled_back"),
    ],
    "One UPDATE puts an upload into several rows": [(FAILURES, "test_one_upload_in_several_rows")],
    "A row that `delete_s3` speaks of is not proved to be gone": [
        (FAILURES, "test_a_delete_that_matched_nothing"),
        (FAILURES, "test_a_delete_that_missed_beside_another_change"),
    ],
    "The server refuses COMMIT": [
        (OUTCOMES, "test_a_deferred_constraint"),
        (OUTCOMES, "test_serialization_failure_and_the_retry_loop"),
    ],
    "The answer to COMMIT is lost": [
        (OUTCOMES, "test_before_the_server_committed"),
        (OUTCOMES, "test_after_the_server_committed"),
        (OUTCOMES, "test_the_new_row_of_a_create"),
        (OUTCOMES, "test_commit_takes_too_long"),
    ],
    "The delete of a replaced object fails": [
        (FAILURES, "test_the_delete_of_the_old_object_fails"),
        (FAILURES, "test_every_delete_raises"),
    ],
    "Two requests create the same row": [(FAILURES, "test_double_submit")],
    "The same bytes are submitted twice": [(FAILURES, "test_double_submit")],
    "Two requests change one row, guarded": [
        (FAILURES, "test_two_updates_of_one_row"),
        (FAILURES, "test_update_against_delete"),
    ],
    "Two requests change one row, not guarded": [
        (FAILURES, "test_unguarded_updates_leave_the_documented_orphan")
    ],
    "A savepoint in the block is rolled back": [
        (FAILURES, "test_an_import_that_skips_bad_rows"),
        (FAILURES, "test_three_deep"),
        (FAILURES, "test_replaced_in_a_rolled_back_savepoint"),
    ],
    "S3 is down": [(S3, "test_down")],
    "S3 answers 503": [(S3, "test_503"), (S3, "test_503_and_then_well")],
    "S3 gives no answer in time": [(S3, "test_slow")],
    "S3 stores an object and its answer is lost": [
        (S3, "test_the_answer_is_lost_after_it_was_stored")
    ],
    "S3 stores an object after it was given up": [
        (S3, "test_stored_after_it_was_given_up"),
        (FAILURES, "test_a_put_that_lands_after_its_delete"),
    ],
    "The store is not open": [(S3, "test_a_closed_store")],
    "The store is closed while a block is open": [
        (S3, "test_a_store_that_closes_while_a_block_is_open")
    ],
    "The process is killed before COMMIT": [("test_readme.py", "test_a_killed_process")],
    "The process is killed after COMMIT": [("test_readme.py", "test_a_killed_process")],
}


class TestGuarantees:
    def test_every_row_of_the_table_has_its_tests(self) -> None:
        """Each row is shown by tests that are there, and no row is without one."""
        assert [row[0] for row in table("What fails")] == list(SHOWN_BY)

        for path, name in (each for tests in SHOWN_BY.values() for each in tests):
            assert name in names_of_tests(path), f"{path} has no {name}"


@functools.cache
def names_of_tests(path: str) -> frozenset[str]:
    text = (ROOT / "tests" / path).read_text(encoding="utf-8")
    return frozenset(re.findall(r"^ *(?:async )?def (test_\w+)\(", text, re.MULTILINE))


KILLED = """
import asyncio, os, signal, sys

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from aioblobcol import PutS3ApiCall, blob_transaction, open_store

moment, old = sys.argv[1:]

def die(**_):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    engine = create_async_engine("sqlite+aiosqlite:///tasks.db")
    async with open_store(bucket="my-bucket", prefix="tasks") as store, AsyncSession(engine) as s:
        async with blob_transaction(s, store=store) as tx:
            put = await tx.put_s3(pk=moment, api_calls=[PutS3ApiCall("html", b"new", old)])
            row = text("UPDATE tasks SET html = :html WHERE url = :url")
            await s.execute(row, {**put.to_values(), "url": moment})
            if moment == "before":
                die()
            store.client.meta.events.register("before-call.s3.DeleteObject", die)

asyncio.run(main())
"""


async def kill(moment: str, old: str) -> None:
    """Replace an object in a process of its own, which dies before or after COMMIT."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, moment, old)
    assert await process.wait() == -signal.SIGKILL


async def test_a_killed_process(bucket: S3Store, s3_place: Place) -> None:
    """Before COMMIT the new object is an orphan, after COMMIT the old one; no row is dangling."""
    moments = ("before", "after")
    async with s3_place.names["store"]:
        old = {url: (await s3_place.add(url, html=b"old")).html for url in moments}
    await asyncio.gather(*(kill(moment, old[moment]) for moment in moments))

    present = [uri async for uri in bucket.iter_uris()]
    (new,) = (uri for uri in present if encode_pk("before", False) in uri and uri != old["before"])  # noqa: FBT003
    assert len(present) == 4
    assert await s3_place.contents(bucket, orphans=(new, old["after"])) == {
        "before": (b"old", None),
        "after": (b"new", None),
    }


class TestNotGuaranteed:
    @runs("orphans")
    async def test_finding_orphans(self, block: Block, place: Place) -> None:
        """What no row names and is old enough is found, and nothing else."""
        task = await place.add(html=b"1")
        store = place.names["store"]
        content = task.html.rpartition("/")[0]
        a_year_ago = int((datetime.now(timezone.utc).timestamp() - 365 * 86400) * 1000)
        in_use, left_over = (
            f"{content}/id={a_year_ago:012x}{uuid.uuid4().hex[12:]}" for _ in range(2)
        )
        foreign = f"{content.rpartition('=')[0]}={0:032x}"
        store.objects |= dict.fromkeys([in_use, left_over, foreign], store.objects[task.html])
        async with place.names["engine"].begin() as connection:
            await connection.execute(sa.update(place.names["Task"]).values(html=in_use))
        await place.run(block)

        assert place.names["orphans"] == [left_over]
        assert place.names["listed"] == {in_use, left_over, foreign, task.html}

    async def test_raw_driver_connection(self, place: Place) -> None:
        """What the raw driver connection writes is not seen, and can be opted out of."""

        async def write(tx: BlobTransaction, session: AsyncSession) -> None:
            put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"1", None)])
            raw = await (await session.connection()).get_raw_connection()
            assert raw.driver_connection is not None
            await raw.driver_connection.execute(
                "INSERT INTO tasks (url, html) VALUES ('u', ?)", (put.to_values()["html"],)
            )

        store = place.names["store"]
        async with place.session() as session:
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=store) as tx:
                    await write(tx, session)
        assert await place.contents() == {}
        async with place.session() as session:
            async with blob_transaction(session, store=store, allow_unwritten=True) as tx:
                await write(tx, session)
        assert await place.contents() == {"u": (b"1", None)}

    async def test_rows_that_go_by_themselves(self, place: Place) -> None:
        """Rows deleted without delete_s3 leave their objects behind."""
        task = await place.add(html=b"1")
        async with place.session() as session:
            async with blob_transaction(session, store=place.names["store"]):
                await session.execute(sa.text("DELETE FROM tasks"))

        assert await place.contents(orphans=(task.html,)) == {}


# --- more of the block -------------------------------------------------------------------------


class TestMoreOfTheBlock:
    @runs("background")
    async def test_background(self, block: Block, place: Place) -> None:
        """The block is left before the replaced object is deleted, and the store finishes it."""
        old = await place.add(html=b"1")
        store = place.names["store"]
        gate = store.hold("delete")
        await place.run(block, url="u", html=b"2", old=old)
        still_there = old.html in store.objects
        gate.open()
        await store.runtime.background.drain()

        assert still_there
        assert await place.contents() == {"u": (b"2", None)}

    @runs("skip-unchanged")
    @pytest.mark.parametrize(("html", "uploads"), [(b"1", 0), (b"2", 1)])
    async def test_skip_unchanged(
        self, block: Block, place: Place, html: bytes, uploads: int
    ) -> None:
        """Only what differs is uploaded; when nothing does, nothing is written."""
        old = await place.add(html=b"1", image=b"i")
        store = place.names["store"]
        store.calls.clear()
        await place.run(block, url="u", html=html, image=b"i", old=old)

        operations = [operation for operation, _ in store.calls]
        assert (operations.count("head"), operations.count("put")) == (2, uploads)
        assert place.names["put"].changed == bool(uploads)
        assert await place.contents() == {"u": (html, b"i")}

    @runs("several")
    async def test_several_results(self, block: Block, place: Place, tmp_path: Path) -> None:
        """One block takes new rows and a deleted one, and results that were made before."""
        old = await place.add(html=b"1", image=b"i")
        (tmp_path / "a.png").write_bytes(b"PNG")
        await place.run(block, html=b"<p>", old=old)

        assert place.names["tx"].outcome is Outcome.COMMITTED
        assert await place.contents() == {"a": (None, b"PNG"), "b": (b"<p>", None)}

    @runs("savepoints")
    async def test_savepoints(self, block: Block, place: Place) -> None:
        """The second row of one name goes with its savepoint, the others are committed."""
        await place.names["engine"].dispose()  # no connection from before use_explicit_begin()
        await place.run(block, html=b"<p>")

        assert await place.contents() == {"a": (b"<p>", None), "b": (b"<p>", None)}
        assert len([call for call in place.names["store"].calls if call[0] == "put"]) == 3

    async def test_savepoints_need_explicit_begin(self, place: Place) -> None:
        """On a plain SQLite engine a savepoint in the block is refused, and nothing is left."""
        async with place.session() as session:
            with pytest.raises(UnsafeTransactionError, match="use_explicit_begin"):
                async with blob_transaction(session, store=place.names["store"]) as tx:
                    await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"1", None)])
                    async with session.begin_nested():
                        await session.execute(sa.select(1))

        assert await place.contents() == {}

    @runs("retry")
    async def test_retry_loop(self, block: Block, place: Place, postgres_url: str) -> None:
        """A transaction that PostgreSQL refuses with 40001 is repeated with uploads of its own."""
        engine = create_async_engine(postgres_url, isolation_level="SERIALIZABLE")
        metadata = place.names["Base"].metadata
        async with engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)
            await connection.run_sync(metadata.create_all)
        maker = async_sessionmaker(engine, expire_on_commit=False)
        place.names |= {"engine": engine, "Session": maker}
        await place.add(html=b"1")
        store = place.names["store"]
        store.calls.clear()

        async def disturb(step: Step) -> None:
            if [call[0] for call in store.calls].count("put") == 1 and step.stage == "after":
                async with engine.begin() as connection:
                    await connection.execute(sa.text("UPDATE tasks SET image = NULL"))

        store.hooks.append(disturb)
        await place.run(block, url="u", html=b"2")

        puts = [uri for operation, uris in store.calls if operation == "put" for uri in uris]
        assert len(set(puts)) == 2
        assert await place.contents() == {"u": (b"2", None)}
        async with engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)
        await engine.dispose()


# --- by hand -----------------------------------------------------------------------------------


class TestByHand:
    @runs("by-hand")
    async def test_by_hand(self, block: Block, bucket: S3Store, s3_place: Place) -> None:
        """The row is replaced and the old object gone; if the guard fails, nothing has changed."""
        async with s3_place.names["store"]:
            old = await s3_place.add(html=b"1")
        await s3_place.run(block, html=b"2", old=old)
        assert await s3_place.contents(bucket) == {"u": (b"2", None)}

        with pytest.raises(sa.exc.NoResultFound):
            await s3_place.run(block, html=b"3", old=old)
        assert await s3_place.contents(bucket) == {"u": (b"2", None)}
        with pytest.raises(ResultSpentError):
            await s3_place.names["put"].clean_up_old_s3_object_when_update_row_succeeded()

    @runs("diff")
    async def test_coming_from_sqlalchemy_mate(
        self, block: Block, bucket: S3Store, s3_place: Place
    ) -> None:
        """Both sides are Python; the new one commits, and undoes what the database refuses."""
        lines = block.text.splitlines()
        before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        after = "\n".join("" if line.startswith("-") else line[1:] for line in lines)
        ast.parse(before)
        new = dataclasses.replace(block, language="python", text=after)
        async with get_session().create_client("s3") as s3_client:
            given = {
                "AsyncSession": AsyncSession,
                "html": b"<p>",
                "image": b"PNG",
                "s3_client": s3_client,
                "url": "u",
                "utc_now": datetime.now(timezone.utc),
            }
            await s3_place.run(new, **given)
            with pytest.raises(sa.exc.IntegrityError):
                await s3_place.run(new, **given)
            await drain(s3_client)

        assert await s3_place.contents(bucket) == {"u": (b"<p>", b"PNG")}

    @pytest.mark.parametrize(("pk", "is_kept"), [("dQ==", False), ("b3RoZXI=", True)])
    async def test_keys_of_sqlalchemy_mate(self, place: Place, pk: str, is_kept: bool) -> None:
        """They are read, and deleted only when their own primary key and column replaces them."""
        store = place.names["store"]
        await place.add(html=b"1")
        (new, stored) = store.objects.popitem()
        old = f"s3://{BUCKET}/{get_s3_key(pk, 'html', b'1', PREFIX)}"
        store.objects[old] = stored
        async with place.names["engine"].begin() as connection:
            await connection.execute(sa.update(place.names["Task"]).values(html=old))
        assert await store.get(old) == b"1"
        async with place.session() as session:
            async with blob_transaction(session, store=store) as tx:
                put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"2", old)])
                row = sa.update(place.names["Task"]).where(put.guard(place.names["Task"]))
                await session.execute(row.values(**put.to_values()))

        assert list(tx.report.kept) == ([old] if is_kept else [])
        orphans = (old,) if is_kept else ()
        assert await place.contents(orphans=orphans) == {"u": (b"2", None)}
        assert new not in store.objects


# --- the store, keys, limits -------------------------------------------------------------------


def default_of(parameter: inspect.Parameter) -> str:
    if parameter.default is not parameter.empty:
        return repr(parameter.default).replace("'", '"')
    return "none" if parameter.kind is parameter.VAR_KEYWORD else "required"


class TestStore:
    @runs("open-store")
    async def test_open_store(
        self, block: Block, bucket: S3Store, local_s3: S3Server, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A store with its endpoint and credentials opens, and its client works."""
        shown = "http://127.0.0.1:9000"
        here = dataclasses.replace(block, text=block.text.replace(shown, local_s3.endpoint_url))
        assert here != block
        await execute(here, {"open_store": open_store})

        assert BUCKET in capsys.readouterr().out

    def test_options(self) -> None:
        """The table has every option with its default."""
        rows = {name: default for name, default, _ in table("Option")}
        parameters = inspect.signature(open_store).parameters.values()

        assert rows == {
            str(each).partition(":")[0].partition(" ")[0]: default_of(each) for each in parameters
        }

    def test_presets(self) -> None:
        """The table says what each preset sets."""
        checksums = {"crc32": "CRC32", "md5": "Content-MD5"}

        assert table("`compat`") == [
            [
                name,
                checksums[each.checksum],
                each.response_checksums.replace("_", " "),
                each.addressing_style,
                each.region_name or "from the environment",
            ]
            for name, each in COMPAT.items()
        ]

    @runs("keys")
    async def test_keys(
        self, block: Block, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The key is as it is printed there, and metadata come back as they were sent."""
        await place.run(block, put_s3=put_s3)
        shown = next(line for line in block.text.splitlines() if line.startswith("# s3://"))
        start = shown.removeprefix("# ").removesuffix("...")
        printed, described = capsys.readouterr().out.splitlines()

        assert re.fullmatch(r"s3://.*/id=[0-9a-f]{32}", printed)
        assert printed.rpartition("=")[0] == start.rpartition("=")[0]
        assert described.startswith("5 Grüße 20")

    def test_limits(self) -> None:
        """The table has the limits of the code."""
        assert {name: limit for name, limit, _ in table("Limit")} == {
            "An object": f"{MAX_PUT_BYTES // 2**30} GiB",
            "A key": f"{MAX_KEY_BYTES:,} bytes",
            "A part of a key": f"{MAX_COMPONENT_BYTES} bytes",
            "Metadata of an object": f"{MAX_METADATA_BYTES // 1024} KiB",
            "Keys in one delete request": f"{KEYS_PER_REQUEST:,}",
        }


# --- testing your own code ---------------------------------------------------------------------

USERS_ENGINE = """
import pytest_asyncio
from sqlalchemy.ext.asyncio import create_async_engine
from model import Base

@pytest_asyncio.fixture
async def engine(tmp_path):
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/users.db")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()
"""


@runs("conftest")
def test_the_fixtures_plugin(block: Block) -> None:
    """The plugin that conftest.py names is there, with the fixtures that the README names."""
    (name,) = ast.literal_eval(block.text.removeprefix("pytest_plugins = "))
    module = __import__(name, fromlist=["fixtures"])

    assert {"memory_store", "s3_store", "s3"} <= set(vars(module))


@runs("test")
def test_a_users_own_test(block: Block, tmp_path: Path) -> None:
    """The README's conftest.py and its test pass in a project of their own."""
    given = {each.name: each.text for each in BLOCKS}
    (tmp_path / "model.py").write_text(given["model"], encoding="utf-8")
    (tmp_path / "conftest.py").write_text(given["conftest"] + USERS_ENGINE, encoding="utf-8")
    test = f"from model import Task\n{block.text}\n"
    (tmp_path / "test_users.py").write_text(test, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n", encoding="utf-8")
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "pytest_asyncio.plugin",
            "-p",
            "no:cacheprovider",
        ],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # it takes seconds
        },
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert finished.returncode == 0, finished.stdout
    assert "1 passed" in finished.stdout
