"""docs/serving.md: every block runs, and answers as HTTP says; every claim has its test.

How blocks are named and run is said in `support.pages`. The blocks stand on the README's model.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import httpx
import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient, TestServer
from support.pages import ROOT, Block, Page, Place, check_claims, managed_in_memory

from aioblobcol.testing import StoredObject

pytestmark = pytest.mark.slow  # one Python is enough for the pages

SERVING = Page(ROOT / "docs/serving.md")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 2000  # two chunks
SIZE = len(PNG)

SHOWN_BY = {
    "The connection breaks off, or is silent for as long as a request may take": [
        ("unit/test_download.py", "test_goes_on_at_the_right_byte"),
        ("unit/test_download.py", "test_without_progress_it_ends"),
        ("unit/test_download.py", "test_a_connection_that_falls_silent"),
    ],
    "The object is deleted while it is read: its row was replaced": [
        ("unit/test_download.py", "test_what_has_changed"),
    ],
    "The object is overwritten while it is read, by something else than this library": [
        ("unit/test_download.py", "test_what_has_changed"),
        ("integration/test_reading.py", "test_of_what_has_changed"),
    ],
    "The bytes are not those that were stored": [
        ("unit/test_download.py", "test_the_sha256_of_the_row"),
        ("integration/test_reading.py", "test_of_the_server"),
    ],
    "The client goes away, the handler is cancelled": [
        ("integration/test_reading.py", "test_none_is_left"),
    ],
}


class Client(Protocol):
    async def __call__(
        self, method: str, path: str, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]: ...


@pytest_asyncio.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    """Give the README's managed model with one row, and a store in memory."""
    monkeypatch.chdir(tmp_path)
    async with managed_in_memory() as opened:
        await opened.add_managed("u", image=PNG)
        await opened.add_managed("empty", image=PNG)
        async with opened.session() as session:
            opened.names["task"] = await session.get_one(opened.names["Task"], "u")
            empty = await session.get_one(opened.names["Task"], "empty")
        opened.names["store"].objects[empty.image.uri] = StoredObject(b"", {}, {})
        await opened.run(SERVING.block("plan"))
        yield opened


def asgi(app: Any) -> Client:
    async def request(
        method: str, path: str, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            answer = await client.request(method, path, headers=headers)
            return answer.status_code, dict(answer.headers), answer.content

    return request


async def show(client: Client, place: Place) -> None:
    """Ask for an image in all ways, and compare the answers with what HTTP says."""
    path = "/tasks/u/image"
    status, whole, body = await client("GET", path, {})
    assert (status, body) == (200, PNG)
    assert (whole["content-type"], whole["content-length"]) == ("image/png", str(SIZE))
    assert whole["accept-ranges"] == "bytes"
    etag = whole["etag"]

    status, head, body = await client("HEAD", path, {})
    assert (status, head["content-length"], head["etag"], body) == (200, str(SIZE), etag, b"")

    for asked, start, stop in (
        ("bytes=0-9", 0, 10),
        (f"bytes={SIZE - 5}-", SIZE - 5, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
        (f"bytes=5-{SIZE * 2}", 5, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
    ):
        status, headers, body = await client("GET", path, {"Range": asked})
        assert (status, body) == (206, PNG[start:stop]), asked
        assert headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
        assert headers["content-length"] == str(stop - start)

    for ignored in ("bytes=5-4", "bytes=0-1,5-6", "lines=1-2", "bytes=-", "bytes=x"):
        status, _, body = await client("GET", path, {"Range": ignored})
        assert (status, body) == (200, PNG), ignored

    place.names["store"].calls.clear()
    for unsatisfiable in (f"bytes={SIZE}-", "bytes=-0"):
        status, headers, body = await client("GET", path, {"Range": unsatisfiable})
        assert (status, headers["content-range"], body) == (416, f"bytes */{SIZE}", b"")
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        status, headers, body = await client("GET", path, {"If-None-Match": known})
        assert (status, headers["etag"], body) == (304, etag, b"")
    assert [name for name, _ in place.names["store"].calls if name == "get"] == []

    status, _, body = await client("GET", path, {"If-None-Match": '"x"'})
    assert (status, body) == (200, PNG)
    for validator, expected in ((etag, 206), ('"x"', 200)):
        asked_for = {"Range": "bytes=0-0", "If-Range": validator}
        assert (await client("GET", path, asked_for))[0] == expected

    assert (await client("GET", "/tasks/empty/image", {}))[::2] == (200, b"")
    assert (await client("GET", "/tasks/nobody/image", {}))[0] == 404
    assert (await client("HEAD", "/tasks/nobody/image", {}))[0] == 404


class TestPage:
    def test_every_block_has_a_runner(self) -> None:
        """No block goes untested, and no test runs a block that is not there."""
        names = [*SERVING.runners, "plan"]
        assert sorted(names) == sorted(block.name for block in SERVING.blocks)

    def test_links_lead_somewhere(self) -> None:
        """Every link names a file of the project, and a heading where it says so."""
        SERVING.check_links()

    def test_claims(self) -> None:
        """What is said of errors is shown by tests."""
        check_claims(SERVING, "What", SHOWN_BY)


class TestBlocks:
    @SERVING.runs("fastapi")
    async def test_fastapi(self, block: Block, place: Place) -> None:
        """FastAPI answers whole objects, ranges, HEAD and conditional requests."""
        await place.run(block)
        await show(asgi(place.names["app"]), place)

    @SERVING.runs("aiohttp")
    async def test_aiohttp(self, block: Block, place: Place) -> None:
        """So does aiohttp."""
        await place.run(block)
        async with TestClient(TestServer(place.names["app"])) as client:

            async def request(
                method: str, path: str, headers: dict[str, str]
            ) -> tuple[int, dict[str, str], bytes]:
                async with client.request(method, path, headers=headers) as answer:
                    named = {name.lower(): value for name, value in answer.headers.items()}
                    return answer.status, named, await answer.read()

            await show(request, place)

    @SERVING.runs("litestar")
    async def test_litestar(
        self, block: Block, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So does Litestar, where it is installed."""
        pytest.importorskip("litestar")
        module = place.names["__name__"]  # Litestar looks there for what annotations name
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        await place.run(block)
        await show(asgi(place.names["app"]), place)

    @SERVING.runs("redirect")
    async def test_redirect(self, block: Block, place: Place) -> None:
        """The client is sent to a URL that expires, under the user's name for the file."""
        await place.run(block)
        status, headers, _ = await asgi(place.names["app"])("GET", "/tasks/u/download", {})

        assert (status, headers["cache-control"]) == (307, "no-store")
        assert headers["location"].startswith("memory://my-bucket/tasks/")
        assert "expires_in=300" in headers["location"]

    @SERVING.runs("file")
    async def test_file(
        self, block: Block, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Both files hold the object; the progress ends at its size."""
        await place.run(block)

        assert (tmp_path / "cat.png").read_bytes() == PNG
        assert (tmp_path / "copy.png").read_bytes() == PNG
        assert capsys.readouterr().out.splitlines()[-1] == f"{SIZE} of {SIZE}"
        assert place.names["beginning"] == PNG[:16]

    @SERVING.runs("parts")
    async def test_parts(
        self, block: Block, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """All chunks come."""
        await place.run(block)

        assert sum(map(int, capsys.readouterr().out.split())) == SIZE
