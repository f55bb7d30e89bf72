"""docs/large_uploads.md and docs/tuning.md: every block runs, every table is that of the code."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import pytest_asyncio
import sqlalchemy as sa
from fastapi import FastAPI
from support.pages import BUCKET, ROOT, Block, Page, check_claims
from support.web_servers import serve_aiohttp, serve_asgi

from aioblobcol import (
    Blob,
    BlobUploadError,
    S3Store,
    blob_sessionmaker,
    open_store,
)
from aioblobcol._sources import PART_BYTES
from aioblobcol._store._base import put_seconds
from aioblobcol._store._s3 import COMPAT, _tuned_config
from aioblobcol._streams import part_bytes
from aioblobcol.testing import MemoryStore, S3Server, assert_consistent, s3_server

pytestmark = pytest.mark.slow  # one Python is enough for the pages

UPLOADS = Page(ROOT / "docs/large_uploads.md")
TUNING = Page(ROOT / "docs/tuning.md")

MIB = 2**20
VIDEO = b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + bytes(PART_BYTES)
SHA256 = hashlib.sha256(VIDEO).hexdigest()


@dataclasses.dataclass
class Place:
    """The names that a reader has in front of them, and both stores."""

    names: dict[str, Any]

    async def run(self, block: Block, **hidden: Any) -> None:
        self.names.update(hidden)
        await block.execute(self.names)

    @property
    def store(self) -> MemoryStore:
        store: MemoryStore = self.names["store"]
        return store

    def operations(self) -> list[str]:
        return [operation for operation, _ in self.store.calls]

    async def contents(self) -> dict[str, bytes]:
        """Return the bytes of every row, after asking whether both stores agree."""
        video = self.names["Video"]
        assert self.store.uploads == {}
        found = await assert_consistent(self.store, self.names["engine"], [video.body])
        async with self.names["Session"]() as session:
            rows = await session.execute(sa.select(video.name, video.body))
            return {name: found[body.uri] for name, body in rows}


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a video into an empty directory, which is the current one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "talk.mp4"
    path.write_bytes(VIDEO)
    return path


@pytest_asyncio.fixture
async def place(talk: Path) -> AsyncIterator[Place]:
    """Give the page's model on a SQLite file, with a store in memory."""
    names: dict[str, Any] = {"__name__": "docs", "Path": Path, "chunks": chunks}
    await UPLOADS.block("model").execute(names)
    engine = names["engine"]
    async with engine.begin() as connection:
        await connection.run_sync(names["Base"].metadata.create_all)
    async with MemoryStore(bucket=BUCKET, prefix="videos") as store:
        names |= {"store": store, "Session": blob_sessionmaker(engine, store)}
        yield Place(names)
    await engine.dispose()


async def chunks() -> AsyncIterator[bytes]:
    """Give the video as a stream."""
    for start in range(0, len(VIDEO), MIB):
        yield VIDEO[start : start + MIB]


@pytest.fixture(scope="module")
def local_s3() -> Iterator[S3Server]:
    """Give moto's server; the page's bucket has a fixed name, so no shared server will do."""
    with s3_server() as server:
        yield server


@pytest_asyncio.fixture
async def bucket(local_s3: S3Server) -> AsyncIterator[S3Store]:
    async with local_s3.open_store(bucket=BUCKET, prefix="videos") as store:
        await store.client.create_bucket(Bucket=BUCKET)
        yield store
        await store.delete_many([uri async for uri in store.iter_uris()])


@pytest.mark.parametrize("page", [UPLOADS, TUNING], ids=["large_uploads", "tuning"])
class TestPages:
    def test_every_block_has_a_runner(self, page: Page) -> None:
        """No block goes untested, and no test runs a block that is not there."""
        assert sorted({*page.runners, "model"} if page is UPLOADS else page.runners) == sorted(
            block.name for block in page.blocks
        )

    def test_links_lead_somewhere(self, page: Page) -> None:
        """Every link names a file of the project, and a heading where it says so."""
        page.check_links()


class TestUploads:
    @UPLOADS.runs("first")
    async def test_first(self, block: Block, place: Place) -> None:
        """A file goes up in parts."""
        await place.run(block)

        assert await place.contents() == {"talk": VIDEO}
        assert place.operations()[:4] == ["create", "write", "write", "complete"]

    @UPLOADS.runs("limits")
    @pytest.mark.parametrize("extra", [-1, 0, 1])
    async def test_limits(
        self, block: Block, place: Place, extra: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What was declared has to come, or nothing is kept."""
        await place.run(block, declared=len(VIDEO) + extra)

        if extra:
            assert capsys.readouterr().out == "SizeMismatchError\n"
            assert place.names["another_length"] is True
            assert await place.contents() == {}
        else:
            assert await place.contents() == {"stream": VIDEO}

    async def test_what_is_certainly_something_else(self, place: Place) -> None:
        """A PNG with the name of a video is refused before the upload is created."""
        png = b"\x89PNG\r\n\x1a\n" + bytes(PART_BYTES)
        with pytest.raises(BlobUploadError, match="image/png"):
            async with place.names["Session"].begin() as session:
                blob = Blob(png, content_type="video/mp4")
                session.add(place.names["Video"](name="a", body=blob))

        assert place.operations() == []

    @UPLOADS.runs("progress")
    async def test_progress(
        self, block: Block, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It is called for each part."""
        await place.run(block)
        lines = capsys.readouterr().out.splitlines()

        assert len(lines) == 2
        assert lines[-1] == f"{len(VIDEO)} of {len(VIDEO)}"

    @UPLOADS.runs("again")
    async def test_again(self, block: Block, place: Place) -> None:
        """What can be rewound goes up twice, and stays once."""
        await place.run(block, source=io.BytesIO(VIDEO))

        assert await place.contents() == {"again": VIDEO}
        assert place.operations().count("complete") == 2

    @UPLOADS.runs("put-s3")
    async def test_put_s3(
        self, block: Block, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The key of a path names its MD5, that of a stream does not."""
        await place.run(block)
        path, stream = capsys.readouterr().out.splitlines()

        assert f"md5={hashlib.md5(VIDEO).hexdigest()}" in path  # noqa: S324 - a name
        assert "md5=" not in stream
        assert sorted(place.store.objects) == sorted([path, stream])

    @UPLOADS.runs("sha256")
    async def test_sha256(
        self, block: Block, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The row has it, the object's metadata do not."""
        await place.run(UPLOADS.block("first"))
        await place.run(block)

        assert capsys.readouterr().out == f"{SHA256}\nNone\n"

    @UPLOADS.runs("lifecycle")
    async def test_lifecycle(self, block: Block, bucket: S3Store) -> None:
        """S3 takes the rule."""
        await block.execute({"store": bucket})
        found = await bucket.client.get_bucket_lifecycle_configuration(Bucket=BUCKET)

        assert found["Rules"][0]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}

    @UPLOADS.runs("policy")
    def test_policy(self, block: Block) -> None:
        """It allows what the page says, and nothing else."""
        objects, whole = json.loads(block.text)["Statement"]

        assert set(objects["Action"]) == {
            f"s3:{verb}"
            for verb in ("PutObject", "GetObject", "DeleteObject", "AbortMultipartUpload")
        }
        assert set(whole["Action"]) == {"s3:ListBucket", "s3:ListBucketMultipartUploads"}
        assert objects["Resource"] == f"{whole['Resource']}/videos/*"


class TestHandlers:
    @UPLOADS.runs("fastapi")
    async def test_fastapi(self, block: Block, place: Place) -> None:
        """Bodies and forms end in rows, and what is refused has a status of its own."""
        await place.run(block)
        app: FastAPI = place.names["app"]
        form = {"body": ("talk.mp4", VIDEO, "video/mp4")}
        async with serve_asgi(app) as url, httpx.AsyncClient(trust_env=False) as client:
            raw = await client.put(
                f"{url}/videos/a", content=VIDEO, headers={"Content-Type": "video/mp4"}
            )
            posted = await client.post(f"{url}/videos/b", files=form)
            text = await client.put(
                f"{url}/videos/c", content=b"text", headers={"Content-Type": "text/plain"}
            )
            png = await client.put(
                f"{url}/videos/d",
                content=b"\x89PNG\r\n\x1a\n",
                headers={"Content-Type": "video/mp4"},
            )
            large = await client.put(
                f"{url}/videos/e",
                content=chunks(),
                headers={"Content-Type": "video/mp4", "Content-Length": str(len(VIDEO))},
            )

        statuses = [each.status_code for each in (raw, posted, text, png, large)]
        assert statuses == [201, 201, 415, 415, 201]
        assert await place.contents() == dict.fromkeys("abe", VIDEO)

    @UPLOADS.runs("aiohttp")
    async def test_aiohttp(self, block: Block, place: Place) -> None:
        """Bodies and parts of forms end in rows."""
        await place.run(block)
        form = aiohttp.FormData()
        form.add_field("title", "A talk")
        form.add_field("body", io.BytesIO(VIDEO), filename="talk.mp4", content_type="video/mp4")
        async with (
            serve_aiohttp(place.names["application"]) as url,
            aiohttp.ClientSession() as client,
        ):
            headers = {"Content-Type": "video/mp4"}
            raw = await client.put(f"{url}/videos/a", data=chunks(), headers=headers)
            posted = await client.post(f"{url}/videos/b", data=form)

        assert (raw.status, posted.status) == (201, 201)
        assert await place.contents() == dict.fromkeys("ab", VIDEO)


STREAMS = "unit/test_streams.py"
LARGE = "integration/test_large_uploads.py"
KEPT = (STREAMS, "test_what_is_small_is_kept")
REWOUND = (STREAMS, "test_what_can_be_rewound_is_read_again")
EVERY_KIND = (STREAMS, "test_of_every_kind")


class TestTables:
    def test_sources(self) -> None:
        """Each source has its test."""
        response = (LARGE, "test_are_sources")
        check_claims(
            UPLOADS,
            "Source",
            {
                "bytes": [(STREAMS, "test_are_views_of_bytes_in_memory")],
                "bytearray`, `memoryview": [(STREAMS, "test_of_a_mutable_buffer_are_copies")],
                "pathlib.Path": [(STREAMS, "test_a_file_that_grows")],
                "a file that is open in binary mode": [(STREAMS, "test_from_where_it_stood")],
                "UploadFile` of FastAPI and Starlette": [(LARGE, "test_after_a_rollback")],
                "request.stream()` of Starlette": [(LARGE, "test_the_request_itself"), KEPT],
                "request.content` of aiohttp": [(LARGE, "test_the_request_itself"), KEPT],
                "BodyPartReader` of aiohttp": [(LARGE, "test_a_field_of_a_form"), KEPT],
                "a response of httpx, streamed": [response, KEPT],
                "a response of aiohttp": [response, KEPT],
                "any async iterator of bytes": [EVERY_KIND, KEPT],
                "any object with `async def read(size)": [EVERY_KIND, REWOUND],
            },
        )

    def test_parts(self) -> None:
        """Each size has as many parts as the table says."""
        units = {"GiB": 2**30, "TiB": 2**40}
        for size, is_known, parts, largest in UPLOADS.table("Size"):
            number, unit = size.split()
            left = total = int(number) * units[unit]
            count = last = 0
            while left > 0:
                count += 1
                last = part_bytes(count, total=total if is_known == "yes" else None)
                left -= last
            assert f"{count:,}" == parts
            assert f"{last // MIB:,} MiB" == largest

    def test_options(self) -> None:
        """The defaults are those of the code."""
        parameters = inspect.signature(open_store).parameters
        for name, default, _, _ in TUNING.table("Option"):
            number, _, unit = default.partition(" ")
            assert parameters[name].default == int(number) * (MIB if unit else 1)

    def test_presets(self) -> None:
        """Each preset has its row."""
        text = " ".join(row[0] + row[1] for row in TUNING.table("Where"))
        for name, compat in COMPAT.items():
            assert f'"{name}"' in text or f'"{name}' in text
            assert (compat.checksum == "md5") == (name in {"generic", "b2"})

    def test_figures(self) -> None:
        """The figures in the text are those of the code."""
        store = open_store(bucket="my-bucket")
        config = _tuned_config(COMPAT["aws"], sign_payload=True)

        assert store.capabilities.parts_at_once == 4
        assert put_seconds(store, PART_BYTES) == 92
        assert config.max_pool_connections == 64
        assert (config.connect_timeout, config.read_timeout) == (5, 30)


class TestTuning:
    @TUNING.runs("lifespan")
    async def test_lifespan(self, block: Block, place: Place) -> None:
        """The store is open while the application runs, and only then."""
        store = MemoryStore(bucket=BUCKET, prefix="videos")
        await place.run(block, store=store)
        app: FastAPI = place.names["app"]
        async with app.router.lifespan_context(app):
            assert store.runtime is not None

        with pytest.raises(Exception, match="enter it first"):
            _ = store.runtime

    @TUNING.runs("options")
    async def test_the_options(self, block: Block) -> None:
        """They are taken."""
        names: dict[str, Any] = {}
        await block.execute(names)

        assert names["store"]._config.max_pool_connections == 128
        assert names["store"]._max_bytes_in_flight == 512 * MIB

    @TUNING.runs("small")
    async def test_small(self, block: Block) -> None:
        """A process can be bounded more tightly."""
        names: dict[str, Any] = {"open_store": open_store}
        await block.execute(names)

        assert names["store"]._max_bytes_in_flight == 32 * MIB
