"""Reading from real servers: ranges, versions, connections that break off, and none that leaks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiobotocore.config import AioConfig
from support.awaits import CountedTask
from support.object_server import Asked, ObjectServer, object_server

import aioblobcol._download as room
from aioblobcol import (
    Blob,
    BlobChangedError,
    BlobCorruptedError,
    BlobNotFoundError,
    InvalidInputError,
    S3Store,
    StoreError,
    StoreUnavailableError,
    download_blob,
    open_blob,
)
from aioblobcol._download import open_object, read_object
from aioblobcol._store._base import ByteRange
from aioblobcol.testing import S3Server

pytestmark = pytest.mark.slow  # a server for each test

URI = "s3://bucket/prefix/k"
BODY = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(BODY).hexdigest()
CRC32 = base64.b64encode(zlib.crc32(BODY).to_bytes(4, "big")).decode()
ONE_CONNECTION = AioConfig(
    max_pool_connections=1,
    proxies={},
    retries={"mode": "standard", "total_max_attempts": 1},
)
MANY = 1000

Read = Callable[..., Coroutine[Any, Any, bytes]]


@pytest_asyncio.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ObjectServer]:
    """Give a server of BODY, and readers that lose no time."""
    monkeypatch.setattr(room, "BACK_OFF_SECONDS", 0)
    async with object_server() as server:
        server.body = BODY
        yield server


@pytest_asyncio.fixture
async def store(server: ObjectServer) -> AsyncIterator[S3Store]:
    """Give an open store on it, with one attempt for each request."""
    config = ONE_CONNECTION.merge(AioConfig(max_pool_connections=8))
    async with S3Server(server.endpoint_url).open_store(bucket="bucket", config=config) as store:
        yield store


def names_in(path: Path) -> list[str]:
    return [each.name for each in path.iterdir()]


async def by_read(store: S3Store, **more: Any) -> bytes:
    return await read_object(store, URI, **more)


async def by_open(store: S3Store, **more: Any) -> bytes:
    async with open_object(store, URI, **more) as body:
        return b"".join([chunk async for chunk in body])


async def by_parts(store: S3Store, **more: Any) -> bytes:
    async with open_object(store, URI, parts_at_once=3, part_bytes=300_000, **more) as body:
        return b"".join([chunk async for chunk in body])


@pytest.fixture(params=[by_read, by_open, by_parts, None], ids=["read", "open", "parts", "file"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Read:
    """Give each way to read the whole object in turn."""
    path = tmp_path / "file"

    async def by_file(store: S3Store, **more: Any) -> bytes:
        try:
            await room.download_object(
                store, URI, path, part_bytes=300_000, parts_at_once=3, **more
            )
            return path.read_bytes()
        finally:
            assert names_in(tmp_path) in ([], [path.name])

    return request.param or by_file


class TestRanges:
    @pytest.mark.parametrize("knows_range", [True, False])
    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, 5), (5, 5), (7, 700_007), (len(BODY) - 1, None), (0, None), (0, 2**40)],
    )
    async def test_bytes_of_a_range(
        self,
        server: ObjectServer,
        store: S3Store,
        knows_range: bool,
        start: int,
        stop: int | None,
    ) -> None:
        """A range has its bytes and the whole object's size, also if the server sends it all."""
        server.knows_range = knows_range
        async with store.open(URI, part=ByteRange(start, stop)) as reader:
            assert await reader.read() == BODY[start:stop]
            assert (reader.info.size, reader.info.etag) == (len(BODY), '"one"')

    @pytest.mark.parametrize(("body", "start"), [(b"", 0), (b"page", 4), (b"page", 99)])
    async def test_beyond_the_end(
        self, server: ObjectServer, store: S3Store, body: bytes, start: int
    ) -> None:
        """A range that begins at the end has no bytes, and is no error."""
        server.body = body
        async with store.open(URI, part=ByteRange(start, start + 5)) as reader:
            assert await reader.read() == b""
            assert reader.info.size == len(body)
        assert [each.method for each in server.asked] == ["GET", "HEAD"]

    async def test_that_appears_meanwhile(
        self, server: ObjectServer, store: S3Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bytes that were not there, and are now, are another version."""
        server.body = b""
        head = store.head

        async def written_meanwhile(uri: str) -> Any:
            server.body = BODY
            return await head(uri)

        monkeypatch.setattr(store, "head", written_meanwhile)
        with pytest.raises(BlobChangedError):
            async with store.open(URI, part=ByteRange(0, 5)):
                raise AssertionError("not reached")

    @pytest.mark.parametrize("said", ["bytes 1-5/1024000", "bytes */5", "bytes 0-4/*", "x"])
    async def test_another_one_than_asked_for(
        self, server: ObjectServer, store: S3Store, said: str
    ) -> None:
        """An answer with other bytes is an error, and no bytes at the wrong place."""
        server.content_range = said
        with pytest.raises(StoreError, match="Content-Range"):
            async with store.open(URI, part=ByteRange(0, 5)):
                raise AssertionError("not reached")

    async def test_what_is_no_range(self, server: ObjectServer, store: S3Store) -> None:
        """A range that no object has is refused before anything is sent."""
        for start, stop in ((-1, None), (5, 4)):
            with pytest.raises(InvalidInputError):
                async with store.open(URI, part=ByteRange(start, stop)):
                    raise AssertionError("not reached")
        assert server.asked == []

    async def test_on_the_wire(self, server: ObjectServer, store: S3Store) -> None:
        """The last byte of a Range header belongs to it; the whole object needs none."""
        for part in (None, ByteRange(0), ByteRange(5), ByteRange(5, 7)):
            async with store.open(URI, part=part, etag='"one"'):
                pass

        assert [each.range for each in server.asked] == [None, None, "bytes=5-", "bytes=5-6"]
        assert {each.if_match for each in server.asked} == {'"one"'}


class TestVersions:
    async def test_another_one(self, server: ObjectServer, store: S3Store) -> None:
        """The server's refusal says that the object was overwritten."""
        with pytest.raises(BlobChangedError, match="PreconditionFailed"):
            async with store.open(URI, etag='"two"'):
                raise AssertionError("not reached")

    @pytest.mark.parametrize("etag", ['"two"', 'W/"one"'])
    async def test_where_nobody_compares(
        self, server: ObjectServer, store: S3Store, etag: str
    ) -> None:
        """A server that ignores If-Match is found out by its ETag; a weak one is not sent."""
        server.knows_if_match = False
        with pytest.raises(BlobChangedError):
            async with store.open(URI, etag=etag):
                raise AssertionError("not reached")
        assert server.asked[0].if_match == (None if etag.startswith("W/") else etag)

    async def test_of_what_has_no_bytes(self, server: ObjectServer, store: S3Store) -> None:
        """Also a range without bytes is one of a version."""
        for part in (ByteRange(5, 5), ByteRange(2**30)):
            with pytest.raises(BlobChangedError):
                async with store.open(URI, part=part, etag='"two"'):
                    raise AssertionError("not reached")


class TestResuming:
    async def test_goes_on_at_the_right_byte(
        self, server: ObjectServer, store: S3Store, read: Read
    ) -> None:
        """Connections that are cut in the middle cost no byte and repeat none."""
        server.cuts = [100_000, 0, 1, 99_999]
        server.headers = {"x-amz-meta-sha256": SHA256}

        assert await read(store) == BODY

    async def test_asks_for_the_rest(self, server: ObjectServer, store: S3Store) -> None:
        """The next request is one for what is missing, of the same version."""
        server.cuts = [100_000]
        await read_object(store, URI)

        assert server.asked == [
            Asked("GET", None, None),
            Asked("GET", "bytes=100000-", '"one"'),
        ]

    async def test_without_etags(self, server: ObjectServer, store: S3Store, read: Read) -> None:
        """Where there is no ETag the size alone tells a version."""
        server.etag, server.cuts = None, [100_000]

        assert await read(store) == BODY
        assert {each.if_match for each in server.asked} == {None}

    @pytest.mark.parametrize("knows_if_match", [True, False])
    async def test_of_what_has_changed(
        self, server: ObjectServer, store: S3Store, read: Read, knows_if_match: bool
    ) -> None:
        """Two versions are never mixed, whether the server compares them or not."""
        server.knows_if_match = knows_if_match
        server.cuts, server.next_etag = [100_000], '"two"'
        with pytest.raises(BlobChangedError):
            await read(store)

    async def test_a_server_that_ignores_ranges(
        self, server: ObjectServer, store: S3Store, read: Read
    ) -> None:
        """What has come already is skipped in the second answer; no part is asked for."""
        server.knows_range, server.cuts = False, [500_000, 500_000]

        assert await read(store) == BODY
        assert len(server.asked) <= 4

    async def test_a_server_that_falls_silent(
        self, server: ObjectServer, store: S3Store, read: Read
    ) -> None:
        """A connection that brings nothing for the time of a request is given up for another."""
        store._request_seconds = 0.2
        server.falls_silent, server.cuts = True, [100_000]

        assert await read(store) == BODY

    async def test_gives_up(self, server: ObjectServer, store: S3Store, read: Read) -> None:
        """Connections that bring nothing, one after the other, are an error in the end."""
        server.cuts = [100_000, *[0] * 100]
        with pytest.raises(StoreUnavailableError):
            await read(store)
        assert len(server.asked) <= 3 * (1 + room.RESUMPTIONS)


class TestChecksums:
    @pytest.mark.parametrize("cuts", [[], [100_000], [1, 500_000]])
    async def test_of_the_server(
        self, server: ObjectServer, store: S3Store, cuts: list[int | None]
    ) -> None:
        """The server's checksum is compared at the end, also if that is another request's."""
        server.headers = {"x-amz-checksum-crc32": CRC32}
        for read in (by_read, by_open):
            server.cuts = list(cuts)
            assert await read(store) == BODY
        server.headers = {"x-amz-checksum-crc32": "AAAAAA=="}
        for read in (by_read, by_open):
            server.cuts = list(cuts)
            with pytest.raises(BlobCorruptedError, match="checksum"):
                await read(store)

    async def test_one_is_enough(self, server: ObjectServer, store: S3Store) -> None:
        """Where the server's is compared, no SHA-256 is computed."""
        server.headers = {"x-amz-checksum-crc32": CRC32, "x-amz-meta-sha256": "0" * 64}

        assert await read_object(store, URI) == BODY

    @pytest.mark.parametrize("named", [SHA256, "0" * 64])
    async def test_of_the_object(
        self, server: ObjectServer, store: S3Store, read: Read, named: str
    ) -> None:
        """Without one the SHA-256 in the object's metadata is."""
        server.headers = {"x-amz-meta-sha256": named}
        if named == SHA256:
            assert await read(store) == BODY
        else:
            with pytest.raises(BlobCorruptedError, match="SHA-256"):
                await read(store)


class TestConnections:
    @pytest.mark.parametrize("parts_at_once", [1, 3])
    @pytest.mark.parametrize("how", ["break", "unread", "raise", "cancel", "read"])
    async def test_none_is_left(self, server: ObjectServer, how: str, parts_at_once: int) -> None:
        """However a reading ends, its connections are closed, or back in the pool."""
        server.body = bytes(4_000_000)
        config = ONE_CONNECTION.merge(AioConfig(max_pool_connections=parts_at_once))
        opened = S3Server(server.endpoint_url).open_store(bucket="bucket", config=config)

        async def leave(store: S3Store) -> None:
            async with open_object(
                store, URI, parts_at_once=parts_at_once, part_bytes=600_000
            ) as body:
                if how == "unread":
                    return
                async for _ in body:
                    if how == "break":
                        break
                    if how == "raise":
                        raise KeyError
                    if how == "cancel":
                        task = asyncio.current_task()
                        assert task is not None
                        task.cancel()

        async with opened as store, asyncio.timeout(20):
            for _ in range(3):
                await asyncio.gather(asyncio.create_task(leave(store)), return_exceptions=True)
            assert (await store.head(URI)).size == 4_000_000
            await server.until(connections=parts_at_once)

    @pytest.mark.slow
    async def test_cancelled_at_every_await(self, server: ObjectServer, read: Read) -> None:
        """Cancelled anywhere, the only connection of the pool is free for the next request."""
        server.body = BODY[:320_000]
        server.headers = {"x-amz-meta-sha256": hashlib.sha256(server.body).hexdigest()}
        opened = S3Server(server.endpoint_url).open_store(bucket="bucket", config=ONE_CONNECTION)
        async with opened as store:
            for moment in range(1, MANY):
                server.cuts = [100_000]
                reached = await CountedTask(read(store), cancel_at=moment).run()
                server.cuts = []
                async with asyncio.timeout(20):
                    assert (await store.head(URI)).size == len(server.body)
                if not reached:
                    break
            else:
                raise AssertionError("it never ended")

    async def test_of_fewer_than_parts(self, server: ObjectServer, read: Read) -> None:
        """Parts that find no free connection wait for one, and do not wait for each other."""
        opened = S3Server(server.endpoint_url).open_store(bucket="bucket", config=ONE_CONNECTION)
        async with opened as store, asyncio.timeout(20):
            assert await read(store) == BODY

    async def test_back_pressure(self, server: ObjectServer, store: S3Store) -> None:
        """A server cannot send what its reader does not take, but what the system buffers."""
        server.body = bytes(64 * 2**20)
        async with open_object(store, URI) as body:
            await anext(body)
            for _ in range(20):
                await store.head(URI)

            assert server.sent < 24 * 2**20


class TestRealServer:
    @pytest_asyncio.fixture
    async def uri(self, s3_store: S3Store) -> str:
        await s3_store.client.put_object(
            Bucket=s3_store.bucket, Key="prefix/k", Body=BODY, Metadata={"sha256": SHA256}
        )
        return f"s3://{s3_store.bucket}/prefix/k"

    async def test_ranges_of_a_blob(self, s3_store: S3Store, uri: str) -> None:
        """A blob is read in parts, streamed in parts, and written into a file."""
        blob = Blob.from_uri(uri, store=s3_store)
        async with blob.open(start=10, stop=500_000) as body:
            streamed = await body.read()

        assert await blob.read() == BODY
        assert await blob.read(start=5, stop=10) == BODY[5:10]
        assert await blob.read(start=len(BODY)) == b""
        assert streamed == BODY[10:500_000]

    @pytest.mark.parametrize("part_bytes", [100_000, len(BODY) - 1, len(BODY), len(BODY) + 1])
    async def test_into_a_file(
        self, s3_store: S3Store, uri: str, tmp_path: Path, part_bytes: int
    ) -> None:
        """Whatever the size of its parts, the file has the object's bytes."""
        info = await download_blob(s3_store, uri, tmp_path / "file", part_bytes=part_bytes)

        assert (tmp_path / "file").read_bytes() == BODY
        assert info == await s3_store.head(uri)

    async def test_of_nothing(self, s3_store: S3Store, tmp_path: Path) -> None:
        """An object without bytes makes a file without bytes."""
        await s3_store.client.put_object(Bucket=s3_store.bucket, Key="prefix/e", Body=b"")
        await download_blob(s3_store, f"s3://{s3_store.bucket}/prefix/e", tmp_path / "file")

        assert (tmp_path / "file").read_bytes() == b""

    async def test_one_version(self, s3_store: S3Store, uri: str) -> None:
        """If-Match holds a reading to the version that was seen."""
        etag = (await s3_store.head(uri)).etag
        async with s3_store.open(uri, part=ByteRange(0, 5), etag=etag) as reader:
            assert await reader.read() == BODY[:5]
        await s3_store.client.put_object(Bucket=s3_store.bucket, Key="prefix/k", Body=BODY[::-1])
        with pytest.raises(BlobChangedError):
            async with s3_store.open(uri, part=ByteRange(0, 5), etag=etag):
                raise AssertionError("not reached")

    async def test_a_missing_object(self, s3_store: S3Store, tmp_path: Path) -> None:
        """What is missing is not found, in whichever way, and leaves no file."""
        uri = f"s3://{s3_store.bucket}/prefix/missing"
        with pytest.raises(BlobNotFoundError):
            await read_object(s3_store, uri, part=ByteRange(5))
        with pytest.raises(BlobNotFoundError):
            await download_blob(s3_store, uri, tmp_path / "file")
        with contextlib.suppress(BlobNotFoundError):
            async with open_blob(s3_store, uri, parts_at_once=4):
                raise AssertionError("not reached")
        assert names_in(tmp_path) == []
