"""The examples: each application on a real port, driven by a real HTTP client."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import socket
import sys
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import pytest_asyncio
import sqlalchemy as sa
import uvicorn
from aiohttp import web
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from support.postgres_proxy import CutMode, postgres_proxy
from support.s3_proxy import Forward, Request, S3Proxy, answer, s3_proxy

from aioblobcol import Blob, S3Store, Worker
from aioblobcol._uri import marker_uri
from aioblobcol.aws_s3 import drain
from aioblobcol.testing import S3Server, assert_consistent

pytestmark = pytest.mark.slow  # an application for each test

EXAMPLES = Path(__file__).parent.parent / "examples"

FIRST = {"html": b"<p>first</p>", "image": b"\x89PNG\r\n\x1a\nfirst"}
SECOND = {"html": b"<p>second</p>", "image": b"\x89PNG\r\n\x1a\nsecond"}
PNG = FIRST["image"]
CONTENT_TYPES = {"html": "text/html", "image": "image/png"}


def load(name: str) -> ModuleType:
    """Import an example anew, so that it reads the environment of this test."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an example keeps its rows and objects."""

    database_url: str
    s3: S3Server
    store: S3Store

    async def contents(
        self, entity: Any, *, besides: tuple[str, ...] = ()
    ) -> dict[str, dict[str, bytes | None]]:
        """Ask whether both stores agree; return the bytes of every row by its key."""
        engine = create_async_engine(self.database_url)
        key = sa.inspect(entity).primary_key[0]
        columns = [entity.html, entity.image]
        found = await assert_consistent(self.store, engine, columns, orphans=besides)
        async with engine.connect() as connection:
            rows = await connection.execute(sa.select(key, entity.html, entity.image))
        await engine.dispose()
        return {
            name: {"html": found.get(uri_of(html)), "image": found.get(uri_of(image))}
            for name, html, image in rows
        }


def uri_of(value: str | Blob | None) -> Any:
    return value.uri if isinstance(value, Blob) else value


@contextlib.asynccontextmanager
async def open_place(
    url: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    """Make a bucket, and the environment that leads there; drop the examples' tables in the end."""
    bucket = f"example-{uuid.uuid4().hex}"
    given = s3.client_arguments
    for name, value in {
        "DATABASE_URL": url,
        "S3_BUCKET": bucket,
        "S3_ENDPOINT_URL": s3.endpoint_url,
        "AWS_ACCESS_KEY_ID": given["aws_access_key_id"],
        "AWS_SECRET_ACCESS_KEY": given["aws_secret_access_key"],
        "AWS_DEFAULT_REGION": given["region_name"],
    }.items():
        monkeypatch.setenv(name, value)
    async with s3.open_store(bucket=bucket, prefix="") as store:  # the whole bucket is looked at
        await store.client.create_bucket(Bucket=bucket)
        await drop_tables(url)
        try:
            yield Place(url, s3, store)
        finally:
            await drop_tables(url)


async def drop_tables(url: str) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        for table in ("pages", "tasks", "aioblobcol_journal", "aioblobcol_journal_owner"):
            await connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
    await engine.dispose()


@pytest_asyncio.fixture(params=["sqlite", "postgresql"])
async def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Place]:
    """Give an example an empty database and an empty bucket."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'example.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    async with open_place(url, s3, monkeypatch) as opened:
        yield opened


@pytest_asyncio.fixture
async def postgres_place(
    s3: S3Server, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    """Give the same on PostgreSQL alone."""
    async with open_place(postgres_url, s3, monkeypatch) as opened:
        yield opened


@contextlib.asynccontextmanager
async def serve_fastapi(module: Any) -> AsyncIterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))  # clients queue here until it is ready
    port = listening.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(module.app, log_level="warning"))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task
        listening.close()


@contextlib.asynccontextmanager
async def serve_aiohttp(module: Any) -> AsyncIterator[str]:
    runner = web.AppRunner(module.make_app())
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


EXPLICIT = ["fastapi_app", "aiohttp_app"]


@pytest.fixture(params=[*EXPLICIT, "managed_fastapi"])
def example(request: pytest.FixtureRequest) -> str:
    """Name each application in turn."""
    name: str = request.param
    return name


@contextlib.asynccontextmanager
async def running(module: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Run an application on a free port; leaving stops it, and finishes its background work."""
    serve = serve_fastapi if hasattr(module, "app") else serve_aiohttp
    async with (
        serve(module) as base_url,
        httpx.AsyncClient(base_url=base_url, timeout=30, trust_env=False) as client,
    ):
        yield client


def form(files: dict[str, bytes], **fields: str) -> dict[str, Any]:
    """Return a multipart request's body."""
    return {
        "data": {"title": "a title", **fields},
        "files": {column: (column, body, CONTENT_TYPES[column]) for column, body in files.items()},
    }


async def create(client: httpx.AsyncClient, name: str = "home") -> httpx.Response:
    return await client.post("/pages", **form(FIRST, name=name))


class TestApplications:
    async def test_create_and_read_back(self, example: str, place: Place) -> None:
        """POST answers 201, and GET returns the row and the very bytes with their types."""
        app = load(example)
        async with running(app) as client:
            created = await create(client)
            row = await client.get("/pages/home")
            html = await client.get("/pages/home/html")
            image = await client.get("/pages/home/image")

        assert (created.status_code, created.json()["name"]) == (201, "home")
        assert row.json()["title"] == "a title"
        shows_uri = f"s3://{place.store.bucket}/pages/" in row.text
        assert shows_uri == (example in EXPLICIT)
        assert (html.content, image.content) == (FIRST["html"], FIRST["image"])
        assert html.headers["content-type"].startswith("text/html")
        assert image.headers["content-type"] == "image/png"
        assert await place.contents(app.Page) == {"home": FIRST}

    async def test_second_create_conflicts(self, example: str, place: Place) -> None:
        """POST of a taken name answers 409, and its uploads do not hurt the first one's."""
        app = load(example)
        async with running(app) as client:
            await create(client)
            again = await create(client)

        assert again.status_code == 409
        assert "s3://" not in again.text
        assert await place.contents(app.Page) == {"home": FIRST}

    async def test_update_replaces_both_columns(self, example: str, place: Place) -> None:
        """PUT replaces both columns, and the superseded objects are gone when it has stopped."""
        app = load(example)
        async with running(app) as client:
            await create(client)
            updated = await client.put("/pages/home", **form(SECOND))
            html = await client.get("/pages/home/html")

        assert updated.status_code == 200
        assert html.content == SECOND["html"]
        assert await place.contents(app.Page) == {"home": SECOND}

    async def test_delete(self, example: str, place: Place) -> None:
        """DELETE answers 204 and leaves neither the row nor its objects, but those of others."""
        app = load(example)
        async with running(app) as client:
            await create(client)
            await create(client, "other")
            deleted = await client.delete("/pages/home")
            gone = await client.get("/pages/home/image")

        assert (deleted.status_code, gone.status_code) == (204, 404)
        assert await place.contents(app.Page) == {"other": FIRST}

    async def test_a_missing_page_is_404(self, example: str, place: Place) -> None:
        """Every method answers 404 for a page that is not there, and uploads nothing for it."""
        app = load(example)
        async with running(app) as client:
            answers = [
                await client.get("/pages/none"),
                await client.get("/pages/none/html"),
                await client.put("/pages/none", **form(FIRST)),
                await client.delete("/pages/none"),
            ]

        assert [each.status_code for each in answers] == [404] * 4
        assert await place.contents(app.Page) == {}

    async def test_an_incomplete_form_is_422(self, example: str, place: Place) -> None:
        """A form without its files answers 422, and uploads nothing."""
        app = load(example)
        async with running(app) as client:
            refused = await client.post("/pages", data={"name": "home", "title": "a title"})

        assert refused.status_code == 422
        assert await place.contents(app.Page) == {}

    async def test_concurrent_updates(self, example: str, place: Place) -> None:
        """Of concurrent updates the row holds one's two columns, and no orphan stays."""
        app = load(example)
        writers = [{"html": b"html %d" % n, "image": PNG + b"%d" % n} for n in range(6)]
        async with running(app) as client:
            await create(client)
            answers = await asyncio.gather(
                *(client.put("/pages/home", **form(files)) for files in writers)
            )

        saved = [
            files for files, each in zip(writers, answers, strict=True) if each.status_code == 200
        ]
        assert {each.status_code for each in answers} <= {200, 409}
        assert saved
        assert (await place.contents(app.Page))["home"] in saved

    async def test_update_against_delete(self, example: str, place: Place) -> None:
        """Whoever comes first of an update and a delete, both stores agree afterwards."""
        app = load(example)
        async with running(app) as client:
            await create(client)
            updated, deleted = await asyncio.gather(
                client.put("/pages/home", **form(SECOND)), client.delete("/pages/home")
            )

        left = await place.contents(app.Page)
        assert updated.status_code in {200, 404, 409}
        assert deleted.status_code in {204, 409}
        assert left == ({} if deleted.status_code == 204 else {"home": SECOND})


@pytest_asyncio.fixture
async def proxy(place: Place, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[S3Proxy]:
    """Put a proxy between the application and S3."""
    async with s3_proxy(place.s3.endpoint_url) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint_url)
        yield proxy


class TestTrouble:
    async def test_a_refused_upload_is_502(
        self, example: str, place: Place, proxy: S3Proxy
    ) -> None:
        """If S3 refuses one of the objects the answer is 502, and the page is as it was."""

        async def refuse_images(request: Request, forward: Forward) -> bytes:
            if request.method == "PUT" and "col=image" in request.path:
                return answer("403 Forbidden", "AccessDenied")
            return await forward()

        app = load(example)
        async with running(app) as client:
            await create(client)
            proxy.rule = refuse_images
            refused = await client.put("/pages/home", **form(SECOND))

        assert refused.status_code == 502
        assert await place.contents(app.Page) == {"home": FIRST}

    async def test_no_connection_is_held_while_bytes_travel(
        self, example: str, place: Place, proxy: S3Proxy
    ) -> None:
        """While an upload waits for S3, its request holds no database connection."""
        uploading, looked = asyncio.Event(), asyncio.Event()

        async def hold_uploads(request: Request, forward: Forward) -> bytes:
            if request.method == "PUT":
                uploading.set()
                await looked.wait()
            return await forward()

        app = load(example)
        async with running(app) as client:
            await create(client)
            proxy.rule = hold_uploads
            update = asyncio.create_task(client.put("/pages/home", **form(SECOND)))
            await uploading.wait()
            held = app.engine.pool.checkedout()
            looked.set()
            updated = await update

        assert held == 0
        assert updated.status_code == 200
        assert await place.contents(app.Page) == {"home": SECOND}


@pytest.mark.parametrize(
    ("mode", "kept"), [("before_server", FIRST), ("after_server", SECOND)], ids=["lost", "saved"]
)
async def test_a_lost_answer_to_commit_is_503(
    example: str,
    postgres_place: Place,
    monkeypatch: pytest.MonkeyPatch,
    mode: CutMode,
    kept: dict[str, bytes],
) -> None:
    """If the answer to COMMIT is lost the answer is 503, and what the row names is readable."""
    async with postgres_proxy(postgres_place.database_url) as proxy:
        monkeypatch.setenv("DATABASE_URL", proxy.url)
        app = load(example)
        async with running(app) as client:
            await create(client)
            proxy.mode = mode
            lost = await client.put("/pages/home", **form(SECOND))
            proxy.mode = "pass"
            read = {column: (await client.get(f"/pages/home/{column}")).content for column in FIRST}

    assert lost.status_code == 503
    assert read == kept


class TestManaged:
    """What only the application with managed columns does."""

    async def test_the_list_describes(self, place: Place, proxy: S3Proxy) -> None:
        """GET of all pages tells size, type and file name, no URI, and asks S3 for nothing."""
        app = load("managed_fastapi")
        async with running(app) as client:
            await create(client, "b")
            await client.post(
                "/pages",
                data={"name": "a", "title": "t"},
                files={"html": ("ä.html", b"<p>", "text/html")},
            )
            asked: list[str] = []

            async def note(request: Request, forward: Forward) -> bytes:
                asked.append(request.method)
                return await forward()

            proxy.rule = note
            listed = await client.get("/pages")

        html = {"size": 3, "content_type": "text/html", "filename": "ä.html"}
        assert listed.json()[0] == {"name": "a", "title": "t", "html": html, "image": None}
        assert listed.json()[1]["image"]["size"] == len(FIRST["image"])
        assert asked == []

    async def test_an_image_is_emptied(self, place: Place) -> None:
        """PUT without a picture deletes the old one."""
        app = load("managed_fastapi")
        async with running(app) as client:
            await create(client)
            emptied = await client.put("/pages/home", **form({"html": b"<p>"}))
            gone = await client.get("/pages/home/image")

        assert (emptied.status_code, gone.status_code) == (200, 404)
        assert await place.contents(app.Page) == {"home": {"html": b"<p>", "image": None}}

    @pytest.mark.parametrize(
        ("file", "status"),
        [
            (("a.exe", b"MZ", "application/x-msdownload"), 415),
            (("a.png", b"<html>", "image/png"), 415),
            (("a.png", b"0" * (10 * 2**20 + 1), "image/png"), 413),
        ],
        ids=["type", "bytes", "size"],
    )
    async def test_what_the_column_refuses(
        self, place: Place, file: tuple[str, bytes, str], status: int
    ) -> None:
        """A picture that is none, or too large, is refused, and the page is as it was."""
        app = load("managed_fastapi")
        async with running(app) as client:
            await create(client)
            files = {"html": ("a.html", b"<p>", "text/html"), "image": file}
            refused = await client.put("/pages/home", data={"title": "t"}, files=files)

        assert refused.status_code == status
        assert await place.contents(app.Page) == {"home": FIRST}

    async def test_deleted_while_it_is_uploaded(self, place: Place, proxy: S3Proxy) -> None:
        """PUT of a page that another request deletes meanwhile answers 409, and leaves nothing."""
        uploading, deleted = asyncio.Event(), asyncio.Event()

        async def hold_uploads(request: Request, forward: Forward) -> bytes:
            if request.method == "PUT":
                uploading.set()
                await deleted.wait()
            return await forward()

        app = load("managed_fastapi")
        async with running(app) as client:
            await create(client)
            proxy.rule = hold_uploads
            update = asyncio.create_task(client.put("/pages/home", **form(SECOND)))
            await uploading.wait()
            assert (await client.delete("/pages/home")).status_code == 204
            deleted.set()
            late = await update

        assert late.status_code == 409
        assert await place.contents(app.Page) == {}

    async def test_replaced_before_it_is_read(self, place: Place, proxy: S3Proxy) -> None:
        """GET of an object that was replaced after its row was read answers 503."""

        async def gone(request: Request, forward: Forward) -> bytes:
            if request.method == "GET":
                return answer("404 Not Found", "NoSuchKey")
            return await forward()

        app = load("managed_fastapi")
        async with running(app) as client:
            await create(client)
            proxy.rule = gone
            read = await client.get("/pages/home/html")

        assert read.status_code == 503


class TestJournaled:
    """The application with a journal."""

    async def test_nothing_is_left(
        self, place: Place, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its own worker removes what was replaced, and what SQL has deleted."""
        monkeypatch.setenv("RETENTION_SECONDS", "0")
        app: Any = load("journaled_fastapi")
        app.worker = Worker(app.journal, app.engine, poll_every=timedelta(milliseconds=100))
        left, is_done = 6, asyncio.Event()  # two of the page that was refused

        async def count_deletes(request: Request, forward: Forward) -> bytes:
            nonlocal left
            answered = await forward()
            if request.is_bulk_delete:
                left -= request.body.count(b"<Key>")
                if left <= 0:
                    is_done.set()
            return answered

        proxy.rule = count_deletes
        async with running(app) as client:
            for name in ("old-1", "home"):
                assert (await create(client, name)).status_code == 204
            assert (await create(client)).status_code == 409
            assert (await client.put("/pages/home", **form(SECOND))).status_code == 204
            read = await client.get("/pages/home")
            deleted = await client.delete("/pages", params={"prefix": "old"})
            async with asyncio.timeout(30):
                await is_done.wait()
            health = await client.get("/health")

        assert (read.content, deleted.status_code) == (SECOND["html"], 204)
        assert health.json()["parked"] == 0
        marker = marker_uri(place.store.bucket, "pages")
        assert await place.contents(app.Page, besides=(marker,)) == {"home": SECOND}

    @pytest.mark.parametrize(
        ("mode", "status", "kept"), [("before_server", 503, FIRST), ("after_server", 204, SECOND)]
    )
    async def test_a_lost_answer_to_commit(
        self,
        postgres_place: Place,
        monkeypatch: pytest.MonkeyPatch,
        mode: CutMode,
        status: int,
        kept: dict[str, bytes],
    ) -> None:
        """The client is told what became of it."""
        async with postgres_proxy(postgres_place.database_url) as proxy:
            monkeypatch.setenv("DATABASE_URL", proxy.url)
            app: Any = load("journaled_fastapi")
            app.worker = Idle()
            async with running(app) as client:
                await create(client)
                proxy.is_once, proxy.mode = True, mode
                lost = await client.put("/pages/home", **form(SECOND))
                read = await client.get("/pages/home")

        assert lost.status_code == status
        assert read.content == kept["html"]


class Idle:
    """A worker that does nothing."""

    async def run(self, stop: asyncio.Event) -> None:
        await stop.wait()


class TestHandWritten:
    @pytest_asyncio.fixture
    async def module(self, place: Place) -> Any:
        return load("hand_written")

    @pytest_asyncio.fixture
    async def engine(self, module: Any, place: Place) -> AsyncIterator[AsyncEngine]:
        engine = create_async_engine(place.database_url)
        async with engine.begin() as connection:
            await connection.run_sync(module.Base.metadata.create_all)
        yield engine
        await engine.dispose()

    @pytest_asyncio.fixture
    async def s3_client(self, place: Place) -> AsyncIterator[Any]:
        yield place.store.client
        await drain(place.store.client)

    async def test_each_scenario(
        self, module: Any, engine: AsyncEngine, s3_client: Any, place: Place
    ) -> None:
        """After each of the five scenarios both stores agree, and hold what the scenario says."""
        first = {module.PAGE: {"html": b"<p>1</p>", "image": b"image 1"}}
        second = {module.PAGE: {"html": b"<p>2</p>", "image": b"image 2"}}

        with pytest.raises(IntegrityError):
            await module.create_fails(engine, s3_client)
        assert await place.contents(module.Task) == {}
        await module.create_succeeds(engine, s3_client)
        assert await place.contents(module.Task) == first
        with pytest.raises(IntegrityError):
            await module.update_fails(engine, s3_client)
        assert await place.contents(module.Task) == first
        await module.update_succeeds(engine, s3_client)
        assert await place.contents(module.Task) == second
        await module.delete_succeeds(engine, s3_client)
        assert await place.contents(module.Task) == {}

    async def test_concurrent_updates(
        self, module: Any, engine: AsyncEngine, s3_client: Any, place: Place
    ) -> None:
        """Of two concurrent updates one is told that the row was replaced; no orphan stays."""
        await module.create_succeeds(engine, s3_client)
        old = await module.read(engine)
        put = await module.upload(s3_client, html=b"late", image=b"late", old=old)
        await module.update_succeeds(engine, s3_client)

        row = sa.update(module.Task).where(put.guard(module.Task)).returning(module.Task.url)
        async with AsyncSession(engine) as session:
            changed = await session.execute(row.values(**put.to_values()))
            assert changed.scalar_one_or_none() is None
        await put.clean_up_created_s3_object_when_create_or_update_row_failed()
        assert await place.contents(module.Task) == {
            module.PAGE: {"html": b"<p>2</p>", "image": b"image 2"}
        }

    async def test_runs_as_a_script(self, module: Any, place: Place) -> None:
        """The example runs from the environment alone, and leaves nothing."""
        await module.main()

        assert await place.contents(module.Task) == {}
