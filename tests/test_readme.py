"""The README: every code block runs, every table is that of the code, every claim has its test.

How blocks are named and run is said in `support.pages`. What a reader has in front of them from
earlier blocks (the model, the imports of the handler) is predefined; after a block both stores
are asked whether they agree.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import pytest_asyncio
import sqlalchemy as sa
import typer.main
from aiobotocore.session import get_session
from aiohttp.test_utils import TestClient, TestServer
from alembic.autogenerate.api import render_python_code
from alembic.operations.ops import CreateTableOp, UpgradeOps
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from support.pages import (
    BUCKET,
    PNG,
    PREFIX,
    README,
    ROOT,
    Block,
    Page,
    Place,
    check_claims,
    managed_in_memory,
    open_place,
)
from typer.testing import CliRunner

from aioblobcol import (
    Blob,
    BlobApp,
    BlobNotUploadedError,
    BlobNotWrittenError,
    BlobSharedError,
    BlobTransaction,
    BlobType,
    BlobUnboundError,
    Outcome,
    PutS3ApiCall,
    ResultSpentError,
    S3Store,
    UnsafeTransactionError,
    Worker,
    blob_transaction,
    open_store,
    put_s3,
)
from aioblobcol._check import Check
from aioblobcol._sources import MAX_OBJECT_BYTES
from aioblobcol._store._metadata import MAX_METADATA_BYTES
from aioblobcol._store._s3 import COMPAT, KEYS_PER_REQUEST
from aioblobcol._uri import MAX_COMPONENT_BYTES, MAX_KEY_BYTES
from aioblobcol.aws_s3 import drain, encode_pk, get_s3_key
from aioblobcol.cli._commands import app as command_line
from aioblobcol.testing import MemoryStore, S3Server, Step, assert_consistent, s3_server

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# --- where they run ----------------------------------------------------------------------------


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
        assert sorted(README.runners) == sorted(block.name for block in README.blocks)

    def test_links_lead_somewhere(self) -> None:
        """Every link names a file of the project, and a heading where it says so."""
        README.check_links()


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
    @README.runs("make")
    def test_make_has_the_targets(self, block: Block, tmp_path: Path) -> None:
        """Both targets are there."""
        assert block.commands == [["make", "demo"], ["make", "test"]]
        assert steps_of("demo", tmp_path)
        assert steps_of("test", tmp_path)

    @README.runs("plain-demo")
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

    @README.runs("plain-test")
    def test_the_tests_plain_commands(self, block: Block, tmp_path: Path) -> None:
        """They are those that `make test` runs."""
        assert block.commands == steps_of("test", tmp_path)

    @README.runs("demo-on-servers")
    def test_the_demos_options(self, block: Block) -> None:
        """The demo takes every option that is shown."""
        ((program, command, *arguments),) = block.commands
        found = typer.main.get_group(command_line).commands[command]
        context = found.make_context(command, list(arguments))

        assert Path(program).name == "aioblobcol"
        assert set(arguments[1::2]) <= {str(value) for value in context.params.values()}

    @README.runs("install")
    def test_the_extras_are_there(self, block: Block) -> None:
        """The extra that is shown exists, and the table lists all of them."""
        ((*command, requirement),) = block.commands
        extras = set(PROJECT["optional-dependencies"])

        assert command == ["python3", "-m", "pip", "install"]
        assert extras_named(requirement) <= extras
        assert [row[0] for row in README.table("Extra")] == list(PROJECT["optional-dependencies"])


# --- the handlers ------------------------------------------------------------------------------


class TestHandlers:
    @README.runs("model")
    async def test_the_model(self, block: Block, bucket: S3Store, s3_place: Place) -> None:
        """The model's columns take URIs, and its store opens from the environment alone."""
        assert block.language == "python"
        async with s3_place.names["store"]:
            await s3_place.add(html=b"<p>", image=PNG)

        assert await s3_place.contents(bucket) == {"u": (b"<p>", PNG)}

    @README.runs("fastapi")
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

    @README.runs("aiohttp")
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


# --- managed columns ---------------------------------------------------------------------------


@pytest_asyncio.fixture
async def managed_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    """Give the README's managed model on a SQLite file, with a store in memory."""
    monkeypatch.chdir(tmp_path)
    async with managed_in_memory() as opened:
        yield opened


@pytest_asyncio.fixture
async def managed_s3_place(
    bucket: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    """Give the README's managed model as it stands there."""
    monkeypatch.chdir(tmp_path)
    async with open_place("managed") as opened:
        yield opened


class TestManaged:
    @README.runs("managed")
    async def test_the_model(self, block: Block, bucket: S3Store, managed_s3_place: Place) -> None:
        """The model's columns take blobs, and its store opens from the environment alone."""
        assert block.language == "python"
        async with managed_s3_place.names["store"]:
            await managed_s3_place.add_managed("u", html=b"<p>", image=PNG)

        assert await managed_s3_place.contents(bucket) == {"u": (b"<p>", PNG)}

    @README.runs("managed-create")
    async def test_create(
        self, block: Block, bucket: S3Store, managed_s3_place: Place, tmp_path: Path
    ) -> None:
        """Two uploads and a row; and the bytes are read after the session was closed."""
        (tmp_path / "cat.png").write_bytes(PNG)
        await managed_s3_place.run(block, url="u", page=b"<p>")

        assert managed_s3_place.names["data"] == b"<p>"
        assert await managed_s3_place.contents(bucket) == {"u": (b"<p>", PNG)}

    @README.runs("managed-replace")
    async def test_replace(self, block: Block, managed_place: Place) -> None:
        """One row has the new object only, the other one is gone with its objects."""
        await managed_place.add_managed("u", "other", html=b"1", image=PNG)
        await managed_place.run(block)

        assert await managed_place.contents() == {"u": (b"<p>", None)}

    @README.runs("managed-copy")
    async def test_copy(self, block: Block, managed_place: Place) -> None:
        """The copy has an object of its own, and so has what was moved; nothing was read."""
        await managed_place.add_managed("u", html=b"1")
        await managed_place.add_managed("other", html=b"2")
        store = managed_place.names["store"]
        store.calls.clear()
        await managed_place.run(block)

        assert sorted(operation for operation, _ in store.calls) == ["copy", "copy", "delete"]
        assert await managed_place.contents() == {
            "u": (None, None),
            "other": (b"1", None),
            "third": (b"1", None),
        }

    @README.runs("managed-read")
    async def test_read(
        self, block: Block, managed_place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Streams, a description and a link of a loaded blob; and one that is not bound."""
        await managed_place.add_managed("u", html=b"12345")
        async with managed_place.session() as session:
            task = await session.get_one(managed_place.names["Task"], "u")
        await managed_place.run(block, task=task)

        assert capsys.readouterr().out.split() == ["5", "text/html"]
        assert managed_place.names["data"] == b"12345"
        assert managed_place.names["link"].endswith("?expires_in=300")
        with pytest.raises(BlobUnboundError):
            await managed_place.names["html"].read()

    @README.runs("managed-bulk")
    async def test_bulk(self, block: Block, managed_place: Place) -> None:
        """Every row has an object of its own, and deleted rows leave none."""
        await managed_place.add_managed("u", "old/1", html=b"1")
        await managed_place.add_managed("old/2", html=b"1", image=PNG)
        async with managed_place.session() as session:
            task = await session.get_one(managed_place.names["Task"], "old/2")
        await managed_place.run(block, task=task, names=["a", "b"])

        assert await managed_place.contents() == {
            "u": (b"<p>", None),
            "a": (b"<p>", None),
            "b": (b"<p>", None),
            "old/2": (b"1", PNG),
        }

    async def test_one_object_for_several_rows(self, managed_place: Place) -> None:
        """An UPDATE that would put one object into several rows is refused."""
        await managed_place.add_managed("a", "b", html=b"1")
        async with managed_place.session() as session:
            with pytest.raises(BlobSharedError):
                await session.execute(
                    sa.update(managed_place.names["Task"]).values(html=Blob(b"2"))
                )

        assert await managed_place.contents() == {"a": (b"1", None), "b": (b"1", None)}

    @README.runs("managed-ahead")
    async def test_upload_ahead(self, block: Block, managed_place: Place) -> None:
        """No connection is held while the bytes travel, unlike in the plain flush."""
        await managed_place.add_managed("u", html=b"1")
        held = []
        pool = managed_place.names["engine"].pool

        async def look(step: Step) -> None:
            if step.operation == "put":
                held.append(pool.checkedout())

        managed_place.names["store"].hooks.append(look)
        await managed_place.run(block)
        async with managed_place.session() as session:
            task = await session.get_one(managed_place.names["Task"], "u")
            task.html = Blob(b"2")
            await session.commit()

        assert held == [0, 0, 1, 1]
        assert await managed_place.contents() == {"u": (b"2", None)}

    @README.runs("managed-fastapi")
    async def test_fastapi(self, block: Block, bucket: S3Store, managed_s3_place: Place) -> None:
        """Over HTTP: create, create again, replace, read, delete."""
        place = managed_s3_place
        await place.run(block)
        app = place.names["app"]
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        seen = []

        async def send(method: str, html: bytes | None = None) -> httpx.Response:
            files = None if html is None else {"html": ("a.html", html, "text/html")}
            return await client.request(method, "/tasks", params={"url": "u"}, files=files)

        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            assert (await send("PUT", b"0")).status_code == 404
            assert (await send("POST", b"1")).status_code == 201
            assert (await send("POST", b"2")).status_code == 500  # no answer for IntegrityError
            seen.append(await place.contents(bucket))
            assert (await send("PUT", b"3")).status_code == 200
            seen.append(await place.contents(bucket))
            assert (await send("GET")).content == b"3"
            assert (await send("DELETE")).status_code == 204
            assert (await send("GET")).status_code == 404

        assert seen == [{"u": (b"1", None)}, {"u": (b"3", None)}]
        assert await place.contents(bucket) == {}

    @README.runs("managed-pydantic")
    async def test_pydantic(self, block: Block, managed_place: Place) -> None:
        """A form with a file is taken and described; a URI in its place is refused."""
        place = managed_place
        await place.run(block, app=(app := FastAPI()))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            files = {"html": ("a.html", b"<p>", "text/html")}
            created = await client.post("/forms", data={"url": "u"}, files=files)
            fields = {"url": "v", "html": "s3://my-bucket/tasks/x"}
            refused = await client.post("/forms", data=fields, files={"other": b""})
        async with place.session() as session:
            task = await session.get_one(place.names["Task"], "u")
        loaded = place.names["TaskOut"].model_validate(task)

        html = {"size": 3, "content_type": "text/html", "filename": "a.html"}
        assert (created.status_code, created.json()) == (201, {"url": "u", "html": html})
        assert refused.status_code == 422
        assert json.loads(loaded.model_dump_json())["html"] == dict.fromkeys(html)
        with_uri = json.loads(loaded.model_dump_json(context={"blob_uri": True}))
        assert with_uri["html"]["uri"] == task.html.uri
        assert await place.contents() == {"u": (b"<p>", None)}

    async def test_from_uri(self, managed_place: Place) -> None:
        """An object that is there already is copied into a row, and stays."""
        await managed_place.add_managed("u", html=b"1")
        async with managed_place.session() as session:
            task = await session.get_one(managed_place.names["Task"], "u")
            blob = Blob.from_uri(task.html.uri)
            session.add(managed_place.names["Task"](url="v", html=blob))
            await session.commit()

        assert await managed_place.contents() == {"u": (b"1", None), "v": (b"1", None)}

    @README.runs("managed-columns")
    async def test_columns(self, block: Block, managed_place: Place) -> None:
        """Each blob is in its store, under its prefix; size and URI can be asked for."""
        place = managed_place
        async with MemoryStore(bucket="my-archive", prefix="") as archive:
            await place.run(block, open_store=lambda bucket: archive)
            async with place.names["engine"].begin() as connection:
                await connection.run_sync(place.names["Base"].metadata.create_all)
            async with place.session() as session:
                for size in (1, 2**20 + 1):
                    page, original = Blob(bytes(size)), Blob(b"TIFF")
                    session.add(place.names["Scan"](tenant="42", page=page, original=original))
                await session.commit()
                large = (await session.scalars(place.names["large"])).one()
                uris = (await session.scalars(place.names["uris"])).all()

            assert large.page.size == 2**20 + 1
            assert sorted(uris) == sorted(place.names["store"].objects)
            assert len(archive.objects) == 2
            for uri, stored in archive.objects.items():
                assert uri.startswith("s3://my-archive/tenants/42/scans/col=original/id=")
                assert stored.arguments["StorageClass"] == "STANDARD_IA"

    def test_options_of_a_column(self) -> None:
        """The table has every option with its default."""
        rows = {name: default for name, default, _ in README.table("`BlobType`")}
        parameters = inspect.signature(BlobType).parameters.values()

        assert rows == {each.name: default_of(each) for each in parameters}

    async def test_a_type_annotation_map(self, managed_place: Place) -> None:
        """`Mapped[Blob]` alone makes a managed column."""

        class Mapping(DeclarativeBase):
            type_annotation_map: ClassVar = {Blob: BlobType()}

        class Note(Mapping):
            __tablename__ = "notes"
            id: Mapped[int] = mapped_column(primary_key=True)
            text: Mapped[Blob]

        async with managed_place.names["engine"].begin() as connection:
            await connection.run_sync(Mapping.metadata.create_all)
        async with managed_place.session() as session:
            session.add(Note(text=Blob(b"1")))
            await session.commit()

        store, engine = managed_place.names["store"], managed_place.names["engine"]
        assert list((await assert_consistent(store, engine, [Note.text])).values()) == [b"1"]

    @README.runs("managed-sessions")
    async def test_sessions_that_are_there_already(
        self, block: Block, managed_place: Place
    ) -> None:
        """Each of them uploads."""
        place = managed_place
        await place.run(block)
        factories = {
            "a": place.names["yours"],
            "b": place.names["scoped"],
            "c": place.names["of_sqlmodel"],
            "d": place.names["of_advanced_alchemy"].get_session,
        }
        for url, factory in factories.items():
            async with factory() as session:
                session.add(place.names["Task"](url=url, html=Blob(b"1")))
                await session.commit()
        await place.names["scoped"].remove()

        assert await place.contents() == dict.fromkeys(factories, (b"1", None))

    @README.runs("managed-enlist")
    async def test_enlist(self, block: Block, managed_place: Place) -> None:
        """Both ways are committed at once, and the old object is gone."""
        await managed_place.add_managed("u", html=b"1")
        (old_uri,) = managed_place.names["store"].objects
        await managed_place.run(block, old_uri=old_uri, update=sa.update)

        assert await managed_place.contents() == {"u": (b"<p>", None), "b": (b"<p>", None)}

    @README.runs("managed-alembic")
    async def test_alembic(
        self, block: Block, managed_place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What env.py configures renders plain types."""
        given: dict[str, Any] = {}
        monkeypatch.setattr("alembic.context.configure", given.update, raising=False)
        metadata = managed_place.names["Base"].metadata
        await managed_place.run(block, connection=None)
        create = CreateTableOp.from_table(given["target_metadata"].tables["tasks"])
        text = render_python_code(UpgradeOps([create]), render_item=given["render_item"])

        assert given["target_metadata"] is metadata
        assert "sa.Column('html', sa.Text(), nullable=True)" in text
        assert "aioblobcol" not in text
        assert "Blob" not in text

    async def test_a_session_that_does_not_upload(self, managed_place: Place) -> None:
        """It refuses a pending blob, and drops no bytes in silence."""
        async with AsyncSession(managed_place.names["engine"]) as session:
            session.add(managed_place.names["Task"](url="u", html=Blob(b"1")))
            with pytest.raises(sa.exc.StatementError) as caught:
                await session.commit()

        assert isinstance(caught.value.orig, BlobNotUploadedError)
        assert await managed_place.contents() == {}


# --- compared with others ----------------------------------------------------------------------

COMPARISON = Page(ROOT / "examples/comparison/README.md")


class TestComparison:
    def test_the_figures_are_those_of_the_run(self) -> None:
        """They count the cells of the table that the last run has printed."""
        head = re.search(r"^\| Scenario \|(.*)\|$", COMPARISON.text, re.MULTILINE)
        assert head is not None
        columns = [name.strip() for name in head[1].split("|")]
        cells = [row[1:] for row in COMPARISON.table("Scenario")]
        counted = [
            [name, *(str([verdict(row[n]) for row in cells].count(what)) for what in VERDICTS)]
            for n, name in enumerate(columns)
        ]

        said = [[row[0].partition(" (")[0], *row[1:]] for row in README.table("Library")]
        assert said == counted
        assert f"plays {len(cells)} programs" in README.text

    def test_the_scenarios_are_those_that_are_there(self) -> None:
        """The last run has played every scenario that the comparison has now."""
        tree = ast.parse((ROOT / "examples/comparison/scenarios.py").read_text(encoding="utf-8"))
        functions = {
            each.name: ast.get_docstring(each)
            for each in tree.body
            if isinstance(each, ast.AsyncFunctionDef) and not each.name.startswith("_")
        }

        assert [row[0] for row in COMPARISON.table("Scenario")] == list(functions.values())

    @pytest.mark.slow
    def test_our_column_is_printed_today(self) -> None:
        """The comparison prints for this library what stands there, without its peers, too."""
        finished = subprocess.run(
            [sys.executable, "compare.py"],
            cwd=ROOT / "examples/comparison",
            check=True,
            capture_output=True,
            text=True,
            timeout=100,
        )
        printed = dict.fromkeys(row[0] for row in COMPARISON.table("Scenario"))
        for line in finished.stdout.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[0] in printed:
                printed[cells[0]] = cells[-1]

        assert printed == {row[0]: row[-1] for row in COMPARISON.table("Scenario")}


VERDICTS = ("ok", "LEAK", "LOSS", "n/a")


def verdict(cell: str) -> str:
    """Return the worst thing that a cell tells."""
    return next(what for what in ("LOSS", "LEAK", "n/a", "ok") if what in cell)


# --- what is guaranteed ------------------------------------------------------------------------

FAILURES, OUTCOMES = "consistency/test_failures.py", "consistency/test_outcomes.py"
CANCELLED, S3 = "consistency/test_cancellation.py", "integration/test_s3_store.py"
MANAGED = "consistency/test_managed_sessions.py"
FACTORIES = "integration/test_session_factories.py"
MANAGED_CANCELLED = "consistency/test_managed_cancellation.py"
SHOWN_BY = {
    "An upload is refused": [
        (S3, "test_access_denied"),
        (FAILURES, "test_one_of_several_uploads_fails"),
        (MANAGED, "test_an_upload_that_fails"),
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
        (MANAGED_CANCELLED, "test_at_every_await"),
        (MANAGED_CANCELLED, "test_while_a_request_is_on_the_wire"),
    ],
    "Cancelled during a statement": [
        (CANCELLED, "test_at_every_await"),
        (MANAGED_CANCELLED, "test_at_every_await"),
    ],
    "Cancelled during COMMIT": [
        (CANCELLED, "test_the_outcome_stays_known"),
        (OUTCOMES, "test_cancelled_while_the_answer_is_under_way"),
        (OUTCOMES, "test_cancelled_and_then_the_answer_is_lost"),
        (MANAGED, "test_a_cancelled_commit_is_run_to_its_end"),
    ],
    "Cancelled during the clean-up": [
        (CANCELLED, "test_while_a_request_is_on_the_wire"),
        (CANCELLED, "test_twice"),
    ],
    "The handler raises": [
        ("integration/test_five_scenarios.py", "test_create_fails"),
        (FAILURES, "test_new_objects_of_a_failed_block_are_not_left_to_the_background"),
        (MANAGED, "test_an_error_in_the_block"),
    ],
    "A flush or a statement fails": [
        (FAILURES, "test_double_submit"),
        (MANAGED, "test_integrity_error"),
    ],
    "A statement fails and its error is swallowed, on PostgreSQL": [
        (OUTCOMES, "test_a_swallowed_error_before_commit_is_found"),
        (MANAGED, "test_a_swallowed_error"),
    ],
    "Explicit: an upload goes into no row": [
        (FAILURES, "test_a_forgotten_column"),
        (FAILURES, "test_an_update_that_matched_nothing"),
        (FAILURES, "test_written_in_a_savepoint_that_was_rolled_back"),
    ],
    "One UPDATE puts an upload into several rows": [
        (FAILURES, "test_one_upload_in_several_rows"),
        (MANAGED, "test_update_that_shares"),
    ],
    "Managed: an upload goes into no row (expunged, or WHERE matched nothing)": [
        (MANAGED, "test_never_written"),
        (MANAGED, "test_update_that_matches_nothing"),
    ],
    "Managed: the session is closed without a commit": [(MANAGED, "test_close_without_commit")],
    "Managed: the session is dropped without being closed": [(MANAGED, "test_a_dropped_session")],
    "Explicit: a row that `delete_s3` speaks of is not proved to be gone": [
        (FAILURES, "test_a_delete_that_matched_nothing"),
        (FAILURES, "test_a_delete_that_missed_beside_another_change"),
    ],
    "The server refuses COMMIT": [
        (OUTCOMES, "test_a_deferred_constraint"),
        (OUTCOMES, "test_serialization_failure_and_the_retry_loop"),
        (MANAGED, "test_a_deferred_constraint"),
    ],
    "The answer to COMMIT is lost": [
        (OUTCOMES, "test_before_the_server_committed"),
        (OUTCOMES, "test_after_the_server_committed"),
        (OUTCOMES, "test_the_new_row_of_a_create"),
        (OUTCOMES, "test_commit_takes_too_long"),
        (MANAGED, "test_nothing_is_deleted"),
    ],
    "The delete of a replaced object fails": [
        (FAILURES, "test_the_delete_of_the_old_object_fails"),
        (FAILURES, "test_every_delete_raises"),
        (MANAGED, "test_a_delete_that_fails"),
    ],
    "Two requests create the same row": [
        (FAILURES, "test_double_submit"),
        (MANAGED, "test_integrity_error"),
    ],
    "The same bytes are submitted twice": [(FAILURES, "test_double_submit")],
    "Explicit: two requests change one row, guarded": [
        (FAILURES, "test_two_updates_of_one_row"),
        (FAILURES, "test_update_against_delete"),
    ],
    "Managed: two requests change one row": [
        (MANAGED, "test_one_order_or_the_other"),
        (MANAGED, "test_replace_beside_delete"),
    ],
    "Explicit: two requests change one row, not guarded": [
        (FAILURES, "test_unguarded_updates_leave_the_documented_orphan")
    ],
    "A savepoint in the block is rolled back": [
        (FAILURES, "test_an_import_that_skips_bad_rows"),
        (FAILURES, "test_three_deep"),
        (FAILURES, "test_replaced_in_a_rolled_back_savepoint"),
        (MANAGED, "test_rolled_back_and_committed"),
        (MANAGED, "test_three_deep"),
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
    "The process is killed before COMMIT": [
        ("test_readme.py", "test_a_killed_process"),
        ("test_docs.py", "test_a_killed_process"),
    ],
    "The process is killed after COMMIT": [
        ("test_readme.py", "test_a_killed_process"),
        ("test_docs.py", "test_a_killed_process"),
    ],
}

JOURNAL_DOCS, WORKER = "test_journal_docs.py", "integration/test_journal_worker.py"
JOURNALED = "integration/test_journal_sessions.py"
JOURNALED_OUTCOMES = "integration/test_journal_outcomes.py"
KILLED_ANYWHERE = "consistency/test_killed.py"
JOURNALED_BY = {
    "An upload fails and undoing it fails too": [
        (JOURNAL_DOCS, "test_an_upload_that_could_not_be_undone")
    ],
    "Managed: the session is dropped without being closed": [
        (JOURNAL_DOCS, "test_a_dropped_session")
    ],
    "The answer to COMMIT is lost": [
        (JOURNALED_OUTCOMES, "test_it_was_never_carried_out"),
        (JOURNALED_OUTCOMES, "test_it_was_carried_out"),
        (JOURNALED_OUTCOMES, "test_a_database_that_does_not_answer"),
    ],
    "The delete of a replaced object fails": [(WORKER, "test_is_tried_again")],
    "Explicit: two requests change one row, not guarded": [
        (JOURNAL_DOCS, "test_updates_without_a_guard")
    ],
    "S3 stores an object and its answer is lost": [
        (JOURNAL_DOCS, "test_an_upload_that_lands_late")
    ],
    "S3 stores an object after it was given up": [
        (JOURNAL_DOCS, "test_an_upload_that_lands_late"),
        (WORKER, "test_what_no_row_took_over"),
    ],
    "The store is closed while a block is open": [(JOURNAL_DOCS, "test_a_store_that_closes")],
    "The process is killed before COMMIT": [
        (JOURNAL_DOCS, "test_a_killed_process"),
        (KILLED_ANYWHERE, "test_somewhere"),
    ],
    "The process is killed after COMMIT": [
        (JOURNAL_DOCS, "test_a_killed_process"),
        (KILLED_ANYWHERE, "test_somewhere"),
    ],
}
"""What a journal changes, of the rows that say so."""
NOTHING = "\N{EN DASH}"

REFUSED_BY = {
    "Bytes or an SQL expression, when it is assigned": [
        ("unit/test_column.py", "test_what_is_no_blob")
    ],
    "A string, when it is flushed; unless it is the URI of an enlisted result": [
        (MANAGED, "test_a_string"),
        (MANAGED, "test_enlisted_attributes"),
    ],
    "Something too large, or of a type that is not accepted": [
        (FACTORIES, "test_nothing_is_sent"),
        (FACTORIES, "test_an_upload_that_turns_out_too_large"),
    ],
    "A pending `Blob` in Core, a legacy bulk method or a session that does not upload": [
        (MANAGED, "test_core_and_legacy_bulk"),
        (MANAGED, "test_a_plain_session"),
    ],
    "An upsert that carries a `Blob`, and INSERT .. SELECT of a managed column": [
        (MANAGED, "test_upsert"),
        (MANAGED, "test_insert_from_select"),
    ],
    "A bulk statement with a condition that changes rows itself (a DELETE in a CTE)": [
        ("consistency/test_managed_regressions.py", "test_a_condition_that_changes_rows")
    ],
    "A bulk UPDATE that puts one object into two cells": [(MANAGED, "test_update_that_shares")],
    "An engine in AUTOCOMMIT; without `use_explicit_begin`, a savepoint on SQLite": [
        (MANAGED, "test_autocommit"),
        ("test_docs.py", "test_savepoints_need_the_recipe"),
    ],
    "A store that the session was not given": [
        (FACTORIES, "test_a_store_that_the_session_does_not_have")
    ],
    "A managed column with `onupdate`, `server_onupdate` or `server_default`, when it is mapped": [
        ("unit/test_column.py", "test_values_that_nobody_assigned")
    ],
    "With a journal: an upload in a REPEATABLE READ or SERIALIZABLE transaction that has read "
    "before (PostgreSQL)": [
        (JOURNALED, "test_a_snapshot_that_is_too_old_is_refused"),
        (JOURNALED, "test_uploads_ahead_of_the_transaction_are_the_way_out"),
        (JOURNALED, "test_the_explicit_strength_is_refused_too"),
    ],
    "With a journal: a `schema_translate_map`, a table of another `MetaData`, a store that the "
    "journal does not know": [
        (JOURNALED, "test_a_table_of_another_metadata_is_refused"),
        (JOURNALED, "test_a_store_that_the_journal_does_not_know_is_refused"),
        (JOURNALED, "test_a_translated_schema_is_refused"),
    ],
    "With a journal: a result of `put_s3` that was uploaded without it, or with another one": [
        (JOURNALED, "test_a_result_that_was_not_staged_is_refused"),
        (JOURNALED, "test_results_of_two_journals_are_refused"),
    ],
    "With a journal: a row that no trigger of it has seen": [
        (JOURNALED, "test_no_triggers"),
        (JOURNALED, "test_a_row_that_no_trigger_has_seen_is_not_committed"),
    ],
}


class TestGuarantees:
    def test_every_refusal_has_its_tests(self) -> None:
        """Each row of what managed columns refuse is shown by tests that are there."""
        check_claims(README, "What is refused", REFUSED_BY)

    def test_every_row_of_the_table_has_its_tests(self) -> None:
        """Each row is shown by tests that are there, and no row is without one."""
        check_claims(README, "What fails", SHOWN_BY)

    def test_every_row_that_a_journal_changes_has_its_tests(self) -> None:
        """Each row whose last cell says something is shown by tests with a journal."""
        said = [row[0] for row in README.table("What fails") if row[-1] != NOTHING]
        check_claims(README, "What fails", JOURNALED_BY, rows=said)


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
    @README.runs("blob-app")
    async def test_finding_orphans(self, block: Block, place: Place) -> None:
        """What no row names and is old enough is found, and nothing else."""
        task = await place.add(html=b"1")
        store = place.names["store"]
        content = task.html.rpartition("/")[0]
        left_over, young = (f"{content}/id={n:032x}" for n in (1, 2))
        foreign = f"{content.rpartition('=')[0]}={0:032x}"
        stored = store.objects[task.html]
        year_ago = datetime.now(timezone.utc) - timedelta(days=365)
        old = dataclasses.replace(stored, modified_at=year_ago)
        store.objects |= {
            young: stored,
            **dict.fromkeys((left_over, foreign), old),
        }
        await place.run(block)
        blobs: BlobApp = place.names["blobs"]
        check = Check(blobs.engine, store, blobs.metadata, uri_columns=blobs.uri_columns)
        found = [(each.kind.value, each.uri) async for each in check.findings()]

        assert found == [("orphan", left_over)]
        assert (check.objects, check.cells, check.foreign) == (4, 1, 1)

    @README.runs("check")
    def test_the_command(self, block: Block) -> None:
        """Its options are those of the examples."""
        command: Any = typer.main.get_command(command_line)
        known = {option for each in command.commands["check"].params for option in each.opts}
        for line in block.text.splitlines():
            prompt, name, what, *options = shlex.split(line)
            assert (prompt, name, what) == ("$", "aioblobcol", "check")
            assert {each for each in options if each.startswith("--")} <= known
        assert "--min-age-hours" in known

    @README.runs("journal-worker")
    def test_the_worker_command(self, block: Block) -> None:
        """It takes the options that are shown."""
        ((program, name, *arguments),) = block.commands
        command = typer.main.get_group(command_line).commands[name]

        assert program == "aioblobcol"
        assert command.make_context(name, arguments).params["app_name"] == "myapp.models:blobs"

    @README.runs("objects")
    async def test_objects_by_hand(
        self, block: Block, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An object goes up, is seen, comes down, and goes, by the commands that are shown."""
        given = s3.client_arguments
        for name, value in (
            ("AWS_ENDPOINT_URL", given["endpoint_url"]),
            ("AWS_DEFAULT_REGION", given["region_name"]),
            ("AWS_ACCESS_KEY_ID", given["aws_access_key_id"]),
            ("AWS_SECRET_ACCESS_KEY", given["aws_secret_access_key"]),
        ):
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AIOBLOBCOL_APP", raising=False)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "report.pdf").write_bytes(b"a report")
        await s3.create_bucket(BUCKET)
        outputs = []
        for program, *arguments in block.commands:
            assert program == "aioblobcol"
            result = await asyncio.to_thread(CliRunner().invoke, command_line, arguments)
            assert result.exit_code == 0, result.stderr
            outputs.append(result.stdout)

        uri = "s3://my-bucket/reports/report.pdf"
        assert outputs[0] == f"{uri}\n"
        assert outputs[1].endswith(f"{uri}\n")
        assert (tmp_path / "copy.pdf").read_bytes() == b"a report"
        assert "X-Amz-Expires=86400" in outputs[3]
        assert outputs[4].startswith("deleted")

    def test_the_commands(self) -> None:
        """The table has every command."""
        commands = typer.main.get_group(command_line).commands

        assert sorted(row[0] for row in README.table("Command")) == sorted(commands)

    @README.runs("journal")
    async def test_the_journal(self, block: Block, managed_place: Place) -> None:
        """Text SQL leaves nothing behind, once the worker has worked."""
        place = managed_place
        await place.run(block)
        await place.add_managed("u", "v", html=b"1")
        async with place.names["engine"].begin() as connection:
            await connection.execute(sa.text("DELETE FROM tasks WHERE url = 'u'"))
            await connection.execute(
                sa.update(place.names["journal"].table).values(not_before=datetime(2000, 1, 1))  # noqa: DTZ001 - SQLite
            )
        await Worker(place.names["journal"], place.names["engine"]).drain()

        assert place.names["blobs"].journal is place.names["journal"]
        assert await place.contents() == {"v": (b"1", None)}

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
    @README.runs("background")
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

    @README.runs("skip-unchanged")
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

    @README.runs("several")
    async def test_several_results(self, block: Block, place: Place, tmp_path: Path) -> None:
        """One block takes new rows and a deleted one, and results that were made before."""
        old = await place.add(html=b"1", image=b"i")
        (tmp_path / "a.png").write_bytes(PNG)
        await place.run(block, html=b"<p>", old=old)

        assert place.names["tx"].outcome is Outcome.COMMITTED
        assert await place.contents() == {"a": (None, PNG), "b": (b"<p>", None)}

    @README.runs("savepoints")
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

    @README.runs("retry")
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
    @README.runs("by-hand")
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

    @README.runs("diff")
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
                "image": PNG,
                "s3_client": s3_client,
                "url": "u",
                "utc_now": datetime.now(timezone.utc),
            }
            await s3_place.run(new, **given)
            with pytest.raises(sa.exc.IntegrityError):
                await s3_place.run(new, **given)
            await drain(s3_client)

        assert await s3_place.contents(bucket) == {"u": (b"<p>", PNG)}

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
    @README.runs("open-store")
    async def test_open_store(
        self, block: Block, bucket: S3Store, local_s3: S3Server, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A store with its endpoint and credentials opens, and its client works."""
        shown = "http://127.0.0.1:9000"
        here = dataclasses.replace(block, text=block.text.replace(shown, local_s3.endpoint_url))
        assert here != block
        await here.execute({"open_store": open_store})

        assert BUCKET in capsys.readouterr().out

    def test_options(self) -> None:
        """The table has every option with its default."""
        rows = {name: default for name, default, _ in README.table("Option")}
        parameters = inspect.signature(open_store).parameters.values()

        assert rows == {
            str(each).partition(":")[0].partition(" ")[0]: default_of(each) for each in parameters
        }

    def test_presets(self) -> None:
        """The table says what each preset sets."""
        checksums = {"crc32": "CRC32", "md5": "Content-MD5"}

        assert README.table("`compat`") == [
            [
                name,
                checksums[each.checksum],
                each.response_checksums.replace("_", " "),
                each.addressing_style,
                each.region_name or "from the environment",
            ]
            for name, each in COMPAT.items()
        ]

    @README.runs("keys")
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
        assert {name: limit for name, limit, _ in README.table("Limit")} == {
            "An object": f"{MAX_OBJECT_BYTES // 2**40} TiB",
            "A key": f"{MAX_KEY_BYTES:,} bytes",
            "A part of a key": f"{MAX_COMPONENT_BYTES} bytes",
            "Metadata of an object": f"{MAX_METADATA_BYTES // 1024} KiB",
            "Keys in one delete request": f"{KEYS_PER_REQUEST:,}",
        }


# --- how fast it is ----------------------------------------------------------------------------


class TestSpeed:
    def test_the_table_is_of_the_run(self) -> None:
        """Every figure is that of the run that is in the repository."""
        report = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
        group = report.split("## Create a row of 8 x 16 KiB, 20 ms away")[1].split("##")[0]
        measured = [
            [cell.strip() for cell in line.strip("|").split("|")][:4]
            for line in group.strip().splitlines()[2:]
        ]

        assert README.table("Create a row with 8 columns, S3 20 ms away") == measured

    def test_the_run_names_its_machine(self) -> None:
        """The machine and the versions stand beside the figures, and no path and no host."""
        run = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))

        assert "cores" in run["machine"][0]
        assert "botocore" in run["machine"][1]
        assert "/" not in "".join(run["machine"]).replace("aioblobcol", "")


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


@README.runs("conftest")
def test_the_fixtures_plugin(block: Block) -> None:
    """The plugin that conftest.py names is there, with the fixtures that the README names."""
    (name,) = ast.literal_eval(block.text.removeprefix("pytest_plugins = "))
    module = __import__(name, fromlist=["fixtures"])

    assert {"memory_store", "s3_store", "s3"} <= set(vars(module))


@README.runs("test")
def test_a_users_own_test(block: Block, tmp_path: Path) -> None:
    """The README's conftest.py and its test pass in a project of their own."""
    given = {each.name: each.text for each in README.blocks}
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
