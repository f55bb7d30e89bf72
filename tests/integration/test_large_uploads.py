"""Large uploads as users meet them: frameworks, sockets, and the requests that S3 sees."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
import pytest
import pytest_asyncio
import sqlalchemy as sa
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from aiohttp import web
from fastapi import FastAPI, Request, UploadFile
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from support.databases import Database
from support.s3_proxy import Request as WireRequest
from support.s3_proxy import S3Proxy, answer, s3_proxy
from support.tls import tls_before
from support.web_servers import half_a_request, serve_aiohttp, serve_asgi

from aioblobcol import (
    Blob,
    BlobType,
    BlobUploadError,
    InvalidPutArgumentsError,
    PutS3ApiCall,
    S3Store,
    SizeMismatchError,
    blob_sessionmaker,
    blob_transaction,
    put_s3,
)
from aioblobcol._sources import PART_BYTES
from aioblobcol.testing import S3Server, assert_consistent

pytestmark = pytest.mark.slow  # tens of MiB, for each test

MIB = 2**20
BODY = bytes(range(256)) * (20 * MIB // 256)
LARGE = BODY[: PART_BYTES + 1]
PARTS = 2
SHA256 = hashlib.sha256(BODY).hexdigest()

Forward = Callable[[], Awaitable[bytes]]
Factory = async_sessionmaker[AsyncSession]


class Base(DeclarativeBase):
    pass


class File(Base):
    __tablename__ = "files"

    key: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[Blob | None] = mapped_column(BlobType(format="json"))
    stored: Mapped[Blob | None] = mapped_column(
        BlobType(
            put_arguments={
                "ACL": "bucket-owner-full-control",
                "StorageClass": "STANDARD_IA",
                "Tagging": "kind=scan",
            }
        )
    )
    checked: Mapped[Blob | None] = mapped_column(
        BlobType(put_arguments={"ChecksumAlgorithm": "SHA256"})
    )
    uri: Mapped[str | None]


COLUMNS = [File.body, File.stored, File.checked, File.uri]


async def nothing_is_left(store: S3Store) -> None:
    """Look for what no row names: incomplete uploads. Objects are `assert_consistent`'s."""
    assert [upload async for upload in store.iter_uploads()] == []


@pytest_asyncio.fixture
async def sessions(sqlite: Database, s3_store: S3Store) -> AsyncIterator[Factory]:
    """Give sessions on S3, and see to it that nothing is left that no row names."""
    async with sqlite.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield blob_sessionmaker(sqlite.engine, s3_store)
    await assert_consistent(s3_store, sqlite.engine, COLUMNS)
    await nothing_is_left(s3_store)


@pytest_asyncio.fixture
async def proxy(s3: S3Server) -> AsyncIterator[S3Proxy]:
    async with s3_proxy(s3.endpoint_url) as proxy:
        yield proxy


def through(proxy: S3Proxy, s3: S3Server, s3_store: S3Store, **arguments: Any) -> S3Store:
    """Return a second store on the same bucket, through the proxy."""
    behind = dataclasses.replace(s3, endpoint_url=proxy.endpoint_url)
    return behind.open_store(bucket=s3_store.bucket, drain_seconds=0, **arguments)


@pytest_asyncio.fixture
async def watched(
    sessions: Factory, sqlite: Database, proxy: S3Proxy, s3: S3Server, s3_store: S3Store
) -> AsyncIterator[Factory]:
    """Give sessions whose requests go through the proxy."""
    async with through(proxy, s3, s3_store) as store:
        yield blob_sessionmaker(sqlite.engine, store)


async def save(sessions: Factory, key: str = "a", **values: Any) -> Blob:
    """Commit a row and return what its body became."""
    async with sessions() as session:
        session.add(file := File(key=key, **values))
        await session.commit()
    assert file.body is not None
    return file.body


async def saved(sessions: Factory, key: str = "a") -> Blob:
    async with sessions() as session:
        body = (await session.get_one(File, key)).body
    assert body is not None
    return body


async def count(sessions: Factory) -> int:
    async with sessions() as session:
        return await session.scalar(sa.select(sa.func.count()).select_from(File)) or 0


async def iterated(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), MIB):
        yield body[start : start + MIB]


# --- frameworks --------------------------------------------------------------------------------


def fastapi_app(sessions: Factory, errors: asyncio.Queue[BaseException]) -> FastAPI:
    app = FastAPI()

    async def keep(blob: Blob) -> str:
        try:
            return (await save(sessions, body=blob)).sha256 or ""
        except BaseException as exc:
            errors.put_nowait(exc)
            raise

    @app.post("/form")
    async def form(body: UploadFile) -> str:
        return await keep(Blob(body))

    @app.post("/twice")
    async def twice(body: UploadFile) -> str:
        async with sessions() as session:
            session.add(file := File(key="a", body=Blob(body)))
            await session.flush()
            await session.rollback()
            session.add(file)
            await session.commit()
        assert file.body is not None
        return file.body.sha256 or ""

    @app.post("/raw")
    async def raw(request: Request) -> str:
        return await keep(Blob(request.stream(), size=int(request.headers["content-length"])))

    return app


def aiohttp_app(sessions: Factory, errors: asyncio.Queue[BaseException]) -> web.Application:
    async def keep(blob: Blob) -> web.Response:
        try:
            return web.Response(text=(await save(sessions, body=blob)).sha256)
        except BaseException as exc:
            errors.put_nowait(exc)
            raise

    async def raw(request: web.Request) -> web.Response:
        return await keep(Blob(request.content, size=request.content_length))

    async def form(request: web.Request) -> web.Response:
        async for part in await request.multipart():
            assert isinstance(part, aiohttp.BodyPartReader)
            if part.name == "body":
                return await keep(Blob(part))
        raise web.HTTPBadRequest

    app = web.Application()
    app.router.add_post("/raw", raw)
    app.router.add_post("/form", form)
    return app


@pytest.fixture
def errors() -> asyncio.Queue[BaseException]:
    """Give what handlers raised."""
    return asyncio.Queue()


@pytest_asyncio.fixture(params=["fastapi", "aiohttp"])
async def url(
    request: pytest.FixtureRequest, sessions: Factory, errors: asyncio.Queue[BaseException]
) -> AsyncIterator[str]:
    """Give each framework's server in turn."""
    if request.param == "fastapi":
        async with serve_asgi(fastapi_app(sessions, errors)) as served:
            yield served
    else:
        async with serve_aiohttp(aiohttp_app(sessions, errors)) as served:
            yield served


@pytest_asyncio.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60, trust_env=False) as opened:
        yield opened


class TestFrameworks:
    async def test_a_field_of_a_form(
        self, url: str, client: httpx.AsyncClient, sessions: Factory
    ) -> None:
        """FastAPI's `UploadFile` and aiohttp's body part are sources of any size."""
        files = {"body": ("scan.png", BODY, "image/png")}
        answered = await client.post(f"{url}/form", files=files)

        assert (answered.status_code, answered.text.strip('"')) == (200, SHA256)
        body = await saved(sessions)
        assert (body.size, body.filename, body.content_type) == (len(BODY), "scan.png", "image/png")
        assert await body.read() == BODY

    @pytest.mark.parametrize("extra", [0, 1, 3])
    async def test_a_field_about_as_large_as_a_part(
        self, url: str, client: httpx.AsyncClient, sessions: Factory, extra: int
    ) -> None:
        """The last bytes of a part are read, however few they are."""
        body = BODY[: PART_BYTES + extra]
        answered = await client.post(f"{url}/form", files={"body": ("scan", body)})

        assert answered.status_code == 200
        assert await (await saved(sessions)).read() == body

    async def test_the_request_itself(
        self, url: str, client: httpx.AsyncClient, sessions: Factory
    ) -> None:
        """So are Starlette's `request.stream()` and aiohttp's `request.content`."""
        answered = await client.post(f"{url}/raw", content=BODY)

        assert (answered.status_code, answered.text.strip('"')) == (200, SHA256)
        assert await (await saved(sessions)).read() == BODY

    async def test_a_client_that_disconnects(
        self, url: str, errors: asyncio.Queue[BaseException], sessions: Factory, s3_store: S3Store
    ) -> None:
        """A client that goes away in the middle leaves no row, no object, no upload."""
        head = f"Content-Type: application/octet-stream\r\nContent-Length: {len(BODY)}"
        async with half_a_request(f"{url}/raw", head, BODY[: 2 * PART_BYTES + 5]):
            pass
        error = await errors.get()

        assert isinstance(error, BlobUploadError)
        assert await count(sessions) == 0
        await nothing_is_left(s3_store)

    async def test_after_a_rollback(
        self, client: httpx.AsyncClient, sessions: Factory, errors: asyncio.Queue[BaseException]
    ) -> None:
        """An `UploadFile` is rewound, and goes up again under another key."""
        async with serve_asgi(fastapi_app(sessions, errors)) as url:
            answered = await client.post(f"{url}/twice", files={"body": ("scan", BODY)})

        assert (answered.status_code, answered.text.strip('"')) == (200, SHA256)
        assert await (await saved(sessions)).read() == BODY


class TestResponses:
    """What other servers answer is a source."""

    @pytest_asyncio.fixture
    async def origin(self) -> AsyncIterator[str]:
        """Give a server that has the body, also compressed, and one that breaks off."""

        async def plain(_request: web.Request) -> web.Response:
            return web.Response(body=BODY, content_type="image/png")

        async def compressed(_request: web.Request) -> web.Response:
            response = web.Response(body=BODY)
            response.enable_compression(web.ContentCoding.gzip)
            return response

        async def broken(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": str(len(BODY))})
            await response.prepare(request)
            await response.write(BODY[: PART_BYTES + 5])
            assert request.transport is not None
            request.transport.abort()
            return response

        app = web.Application()
        app.router.add_get("/plain", plain)
        app.router.add_get("/gzip", compressed)
        app.router.add_get("/broken", broken)
        async with serve_aiohttp(app) as served:
            yield served

    @pytest.mark.parametrize("path", ["plain", "gzip"])
    @pytest.mark.parametrize("library", ["httpx", "aiohttp"])
    async def test_are_sources(
        self, library: str, path: str, origin: str, client: httpx.AsyncClient, sessions: Factory
    ) -> None:
        """A response goes to S3 as it arrives, decoded."""
        url = f"{origin}/{path}"
        if library == "httpx":
            async with client.stream("GET", url) as response:
                await save(sessions, body=Blob(response))
        else:
            async with aiohttp.ClientSession() as session, session.get(url) as other:
                await save(sessions, body=Blob(other))
        body = await saved(sessions)

        assert (body.size, body.sha256) == (len(BODY), SHA256)
        if path == "plain":
            assert body.content_type == "image/png"

    @pytest.mark.parametrize("library", ["httpx", "aiohttp"])
    async def test_that_break_off(
        self, library: str, origin: str, client: httpx.AsyncClient, sessions: Factory
    ) -> None:
        """Half a response makes no row."""
        url = f"{origin}/broken"
        with pytest.raises(BlobUploadError):
            if library == "httpx":
                async with client.stream("GET", url) as response:
                    await save(sessions, body=Blob(response))
            else:
                async with aiohttp.ClientSession() as session, session.get(url) as other:
                    await save(sessions, body=Blob(other))

        assert await count(sessions) == 0


# --- what S3 sees ------------------------------------------------------------------------------


def kinds(proxy: S3Proxy) -> list[str]:
    """Return what was asked for, parts in the order of their arrival."""
    return [_kind(request) for request in proxy.requests]


def _kind(request: WireRequest) -> str:
    query = urlsplit(request.path).query
    names = {
        ("POST", "uploads"): "create",
        ("PUT", "partNumber"): "part",
        ("POST", "uploadId"): "complete",
        ("DELETE", "uploadId"): "abort",
        ("POST", "delete"): "delete",
    }
    for (method, name), kind in names.items():
        if request.method == method and name in query:
            return kind
    return request.method


def crc32(body: bytes) -> str:
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode("ascii")


class TestRequests:
    @pytest.mark.parametrize("size", [0, 1, PART_BYTES])
    async def test_of_one_part(self, size: int, watched: Factory, proxy: S3Proxy) -> None:
        """What fits into one part is one PUT, whatever it is read from."""
        await save(watched, body=Blob(iterated(LARGE[:size])))

        assert kinds(proxy) == ["PUT"]
        assert "expect" not in proxy.requests[0].headers

    async def test_of_several(self, watched: Factory, proxy: S3Proxy) -> None:
        """Create, parts, complete: no HEAD, no Expect, every part and the whole protected."""
        await save(watched, body=Blob(iterated(LARGE)))

        assert kinds(proxy) == ["create", *["part"] * PARTS, "complete"]
        assert not any("expect" in request.headers for request in proxy.requests)
        create, *parts, complete = proxy.requests
        assert create.headers["x-amz-checksum-algorithm"] == "CRC32"
        assert create.headers["x-amz-checksum-type"] == "FULL_OBJECT"
        for part in parts:
            assert part.headers["x-amz-checksum-crc32"] == crc32(part.body)
            assert "x-amz-trailer" not in part.headers
        assert complete.headers["x-amz-checksum-crc32"] == crc32(LARGE)
        assert complete.headers["x-amz-mp-object-size"] == str(len(LARGE))

    async def test_parts_are_concurrent(self, watched: Factory, proxy: S3Proxy) -> None:
        """Several parts are on the wire before any is answered."""
        barrier = asyncio.Barrier(PARTS)

        async def together(request: WireRequest, forward: Forward) -> bytes:
            if _kind(request) == "part":
                await barrier.wait()  # for ever, if they came one after the other
            return await forward()

        proxy.rule = together
        await save(watched, body=Blob(iterated(LARGE)))

    async def test_compat_generic(
        self, proxy: S3Proxy, s3: S3Server, s3_store: S3Store, sqlite: Database, sessions: Factory
    ) -> None:
        """The preset `generic` sends Content-MD5 with each part, and no new checksums at all."""
        async with through(proxy, s3, s3_store, compat="generic") as store:
            await save(blob_sessionmaker(sqlite.engine, store), body=Blob(iterated(LARGE)))

        assert kinds(proxy) == ["create", *["part"] * PARTS, "complete"]
        for request in proxy.requests:
            assert not any("checksum" in name for name in request.headers)
            assert "x-amz-trailer" not in request.headers
            if _kind(request) == "part":
                digest = hashlib.md5(request.body).digest()  # noqa: S324 - the protocol's
                assert request.headers["content-md5"] == base64.b64encode(digest).decode()

    @pytest.mark.parametrize("preset", ["aws", "generic"])
    async def test_arguments_of_the_column(
        self,
        preset: Any,
        proxy: S3Proxy,
        s3: S3Server,
        s3_store: S3Store,
        sqlite: Database,
        sessions: Factory,
    ) -> None:
        """Each argument of `put_object` goes with the request that takes it."""
        async with through(proxy, s3, s3_store, compat=preset, region_name="us-east-1") as store:
            await save(blob_sessionmaker(sqlite.engine, store), body=Blob(b""), stored=Blob(LARGE))
        create = next(each for each in proxy.requests if _kind(each) == "create")
        others = [each for each in proxy.requests if _kind(each) in {"part", "complete"}]
        async with sessions() as session:
            stored = (await session.get_one(File, "a")).stored
        assert stored is not None
        key = stored.uri.partition(s3_store.bucket + "/")[2]
        tags = await s3_store.client.get_object_tagging(Bucket=s3_store.bucket, Key=key)

        assert create.headers["x-amz-acl"] == "bucket-owner-full-control"
        assert create.headers["x-amz-storage-class"] == "STANDARD_IA"
        assert tags["TagSet"] == [{"Key": "kind", "Value": "scan"}]
        for each in others:
            assert not {"x-amz-acl", "x-amz-storage-class", "x-amz-tagging"} & each.headers.keys()

    async def test_another_checksum(self, watched: Factory, proxy: S3Proxy) -> None:
        """With `ChecksumAlgorithm` S3 gets that checksum of each part, in place of ours."""
        await save(watched, body=Blob(b""), checked=Blob(iterated(LARGE)))
        create, *parts, complete = (each for each in proxy.requests if _kind(each) != "PUT")

        assert create.headers["x-amz-checksum-algorithm"] == "SHA256"
        assert "x-amz-checksum-type" not in create.headers
        for part in parts:
            digest = base64.b64encode(hashlib.sha256(part.body).digest()).decode()
            assert part.headers["x-amz-checksum-sha256"] == digest
            assert "x-amz-checksum-crc32" not in part.headers
            assert digest.encode() in complete.body
        assert "x-amz-checksum-crc32" not in complete.headers


# --- a client of the user's own ----------------------------------------------------------------


async def put(client: Any, store: S3Store, sessions: Factory, **extra: Any) -> str:
    """Commit a row with a large object through a client that was borrowed, and return its key."""
    result = await put_s3(
        [PutS3ApiCall("uri", iterated(LARGE), None, extra)],
        client,
        "a",
        store.bucket,
        store.prefix,
    )
    values = result.to_values()
    async with sessions() as session, blob_transaction(session, result):
        session.add(File(key="a", **values))
    return values["uri"].removeprefix(f"s3://{store.bucket}/")


BORROWED: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "botocore's defaults": ({}, {}),
    "no checksums": ({"request_checksum_calculation": "when_required"}, {}),
    "a checksum of the caller's": ({}, {"ChecksumAlgorithm": "SHA256"}),
    "that one alone": (
        {"request_checksum_calculation": "when_required"},
        {"ChecksumAlgorithm": "SHA256"},
    ),
}


class TestBorrowedClients:
    @pytest.mark.parametrize("case", BORROWED)
    @pytest.mark.parametrize("scheme", ["http", "https"])
    async def test_checksums_are_the_client_s_own(
        self,
        case: str,
        scheme: str,
        proxy: S3Proxy,
        s3: S3Server,
        s3_store: S3Store,
        sessions: Factory,
        tmp_path: Path,
    ) -> None:
        """Whatever a client makes of checksums, over http or https, the object is complete."""
        options, extra = BORROWED[case]
        config = AioConfig(proxies={}, retries={"total_max_attempts": 1}, **options)
        async with contextlib.AsyncExitStack() as stack:
            arguments: dict[str, Any] = {"endpoint_url": proxy.endpoint_url}
            if scheme == "https":
                behind = tls_before(s3.endpoint_url, tmp_path)
                endpoint, certificate = await stack.enter_async_context(behind)
                arguments = {"endpoint_url": endpoint, "verify": certificate}
            client = await stack.enter_async_context(
                get_session().create_client(
                    "s3", **{**s3.client_arguments, **arguments}, config=config
                )
            )
            key = await put(client, s3_store, sessions, **extra)

        assert await s3_store.get(f"s3://{s3_store.bucket}/{key}") == LARGE
        if scheme == "http":
            assert kinds(proxy) == ["create", *["part"] * PARTS, "complete"]
            create, *parts, complete = proxy.requests
            named = {
                name: value
                for name, value in parts[0].headers.items()
                if name.startswith("x-amz-checksum-")
            }
            algorithm = extra.get("ChecksumAlgorithm", None if options else "CRC32")
            assert create.headers.get("x-amz-checksum-algorithm") == algorithm
            assert (algorithm is not None) == bool(named)
            for value in named.values():
                assert value.encode() in complete.body


class TestArguments:
    @pytest.mark.parametrize(
        "extra",
        [
            {"ContentMD5": "1B2M2Y8AsgTpgAmY7PhCfg=="},
            {"ContentLength": len(LARGE)},
            {"ChecksumCRC32": "AAAAAA=="},
            {"ChecksumSHA256": "A" * 43 + "="},
        ],
    )
    async def test_about_the_whole_body(
        self, extra: Any, proxy: S3Proxy, s3: S3Server, s3_store: S3Store, sessions: Factory
    ) -> None:
        """What tells S3 about the whole body is refused, for no part is the whole."""
        async with through(proxy, s3, s3_store) as store:
            with pytest.raises(BlobUploadError, match=next(iter(extra))) as caught:
                await put_s3(
                    [PutS3ApiCall("uri", iterated(LARGE), None, extra)], pk="a", store=store
                )

        assert isinstance(caught.value.__cause__, InvalidPutArgumentsError)
        assert proxy.requests == []


# --- trouble on the way ------------------------------------------------------------------------


def once(kind: str, *, is_lost: bool) -> Any:
    """Cut the wire at the first request of a kind: before it is carried out, or after."""
    left = [kind]

    async def cut(request: WireRequest, forward: Forward) -> bytes | None:
        if _kind(request) not in left:
            return await forward()
        left.clear()
        if is_lost:
            await forward()
        return None

    return cut


class TestTrouble:
    @pytest.mark.parametrize("is_lost", [False, True], ids=["dropped", "answer lost"])
    @pytest.mark.parametrize("kind", ["create", "part"])
    async def test_is_survived(
        self,
        kind: str,
        is_lost: bool,
        watched: Factory,
        proxy: S3Proxy,
        s3_store: S3Store,
        sessions: Factory,
    ) -> None:
        """A create or a part whose connection drops is sent again, from its first byte."""
        proxy.rule = once(kind, is_lost=is_lost)
        body = await save(watched, body=Blob(iterated(LARGE)))

        assert kinds(proxy).count(kind) == (PARTS if kind == "part" else 1) + 1
        assert await s3_store.get(body.uri) == LARGE
        uploads = [upload async for upload in s3_store.iter_uploads()]
        assert len(uploads) == (kind == "create" and is_lost)  # its name was never heard
        for upload in uploads:
            await s3_store.abort_upload(upload)

    async def test_complete_dropped(
        self, watched: Factory, proxy: S3Proxy, s3_store: S3Store
    ) -> None:
        """A completion that never arrived is sent again."""
        proxy.rule = once("complete", is_lost=False)
        body = await save(watched, body=Blob(iterated(LARGE)))

        assert kinds(proxy).count("complete") == 2
        assert await s3_store.get(body.uri) == LARGE

    async def test_complete_lost(
        self, watched: Factory, proxy: S3Proxy, s3_store: S3Store, sessions: Factory
    ) -> None:
        """A completion whose answer is lost leaves either both, or neither row nor object."""
        proxy.rule = once("complete", is_lost=True)
        try:
            body = await save(watched, body=Blob(iterated(LARGE)))
        except BlobUploadError:
            assert await count(sessions) == 0
            assert {"abort", "DELETE"} <= set(kinds(proxy))
        else:
            assert await s3_store.get(body.uri) == LARGE

    async def test_no_answer_to_complete_at_all(
        self, watched: Factory, proxy: S3Proxy, s3_store: S3Store, sessions: Factory
    ) -> None:
        """If no completion is ever answered, the object is deleted, and no row is written."""

        async def cut(request: WireRequest, forward: Forward) -> bytes | None:
            reply = await forward()
            return None if _kind(request) == "complete" else reply

        proxy.rule = cut
        with pytest.raises(BlobUploadError):
            await save(watched, body=Blob(iterated(LARGE)))

        assert await count(sessions) == 0
        assert kinds(proxy)[-2:] == ["abort", "DELETE"]

    async def test_an_abort_that_fails(
        self,
        watched: Factory,
        proxy: S3Proxy,
        s3_store: S3Store,
        sessions: Factory,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The user sees the first error; the log names the upload that was left."""

        async def refuse(request: WireRequest, forward: Forward) -> bytes:
            if _kind(request) == "part":
                return answer("403 Forbidden", "AccessDenied")
            if _kind(request) == "abort":
                return answer("500 Internal Error", "InternalError")
            return await forward()

        proxy.rule = refuse
        with pytest.raises(BlobUploadError, match="AccessDenied"):
            await save(watched, body=Blob(iterated(LARGE)))

        (left,) = [upload async for upload in s3_store.iter_uploads()]
        assert left.upload_id in caplog.text
        assert await count(sessions) == 0
        await s3_store.abort_upload(left)

    async def test_an_answer_without_an_etag(
        self, watched: Factory, proxy: S3Proxy, sessions: Factory
    ) -> None:
        """A part that cannot be named at the end fails, and the error tells why."""

        async def cut(request: WireRequest, forward: Forward) -> bytes:
            reply = await forward()
            return (
                re.sub(rb"(?i)\r\nETag:[^\r]*", b"", reply) if _kind(request) == "part" else reply
            )

        proxy.rule = cut
        with pytest.raises(BlobUploadError, match="without an ETag"):
            await save(watched, body=Blob(iterated(LARGE)))

        assert "abort" in kinds(proxy)
        assert await count(sessions) == 0

    @pytest.mark.parametrize("status", ["200 OK", "503 Slow Down"])
    async def test_a_completion_that_fails(
        self, status: str, watched: Factory, proxy: S3Proxy, sessions: Factory
    ) -> None:
        """An error may come with any status; S3 sends 200 before it has joined the parts."""

        async def refuse(request: WireRequest, forward: Forward) -> bytes:
            if _kind(request) == "complete":
                return answer(status, "InternalError")
            return await forward()

        proxy.rule = refuse
        with pytest.raises(BlobUploadError, match="InternalError"):
            await save(watched, body=Blob(iterated(LARGE)))

        assert kinds(proxy)[-2:] == ["abort", "DELETE"]
        assert await count(sessions) == 0

    async def test_a_size_that_is_not_kept(
        self, watched: Factory, proxy: S3Proxy, sessions: Factory
    ) -> None:
        """A stream that ends early is aborted, and nothing is completed."""
        with pytest.raises(BlobUploadError) as caught:
            await save(watched, body=Blob(iterated(LARGE), size=len(LARGE) + 1))

        assert isinstance(caught.value.__cause__, SizeMismatchError)
        assert "complete" not in kinds(proxy)
        assert "abort" in kinds(proxy)

    @pytest.mark.parametrize("kind", ["create", "part", "complete"])
    async def test_a_cancellation(
        self, kind: str, watched: Factory, proxy: S3Proxy, sessions: Factory
    ) -> None:
        """Whatever is on the wire when the handler is cancelled, nothing is kept."""
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def hold(request: WireRequest, forward: Forward) -> bytes:
            if _kind(request) == kind:
                reached.set()
                await go_on.wait()
            return await forward()

        proxy.rule = hold
        saving = asyncio.create_task(save(watched, body=Blob(iterated(LARGE))))
        await reached.wait()
        saving.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await saving

        assert await count(sessions) == 0
