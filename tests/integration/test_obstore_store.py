"""The store on obstore over HTTP: repeated requests, lost answers, uploads that are given up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.awaits import CountedTask
from support.obstores import PLACES, Place, open_in, open_on
from support.s3_proxy import Answer, Forward, Request, Rule, S3Proxy, answer, s3_proxy

from aioblobcol import (
    BlobNotFoundError,
    InvalidInputError,
    S3Store,
    Store,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
)
from aioblobcol._sources import PART_BYTES
from aioblobcol._store._base import CopyRequest, WriteRequest
from aioblobcol.obstore import ObstoreStore
from aioblobcol.testing import S3Server
from aioblobcol.testing.conformance import (
    BODY,
    listed,
    noise,
    parts_of,
    put,
    same,
    uri_of,
)

pytestmark = pytest.mark.slow  # a server for each test


class Wire:
    """The store behind a proxy, the same bucket by another client, and what was sent."""

    def __init__(self, store: ObstoreStore, proxy: S3Proxy, direct: S3Store) -> None:
        self.store, self.proxy, self.direct = store, proxy, direct

    def sent(self) -> list[str]:
        """Return the methods of all requests since the last call."""
        methods = [request.method for request in self.proxy.requests]
        self.proxy.requests.clear()
        return methods

    async def uploads(self) -> list[str]:
        """Return the URIs of what was neither completed nor aborted."""
        return [each.uri async for each in self.direct.iter_uploads()]


@pytest_asyncio.fixture
async def wire(s3: S3Server) -> AsyncIterator[Wire]:
    bucket = f"test-{uuid.uuid4().hex}"
    await s3.create_bucket(bucket)
    async with (
        s3_proxy(s3.endpoint_url) as proxy,
        open_on(S3Server(proxy.endpoint_url), bucket) as store,
        s3.open_store(bucket=bucket) as direct,
    ):
        yield Wire(store, proxy, direct)


def first(times: int, reply: Callable[[Forward], Awaitable[Answer]]) -> Rule:
    """Return a rule for the first requests; all others are served."""
    left = [times]

    async def rule(_request: Request, forward: Forward) -> Answer:
        left[0] -= 1
        return await (reply(forward) if left[0] >= 0 else forward())

    return rule


async def cut_before(_forward: Forward) -> Answer:
    return None


async def cut_after(forward: Forward) -> Answer:
    await forward()
    return None


def refuse(status: str, code: str) -> Callable[[Forward], Awaitable[Answer]]:
    async def reply(_forward: Forward) -> Answer:
        return answer(status, code)

    return reply


async def copied(store: Store) -> bool:
    return await store.copy(CopyRequest("c", uri_of(store, "copy/id=2"), uri_of(store)))


async def put_one(store: Store) -> bool:
    return await put(store, uri_of(store), BODY)


class TestRepeating:
    """The library has to know whether an earlier attempt may still take effect."""

    @pytest.mark.parametrize("verb", [put_one, copied], ids=["put", "copy"])
    @pytest.mark.parametrize(
        "trouble", [cut_before, cut_after, refuse("503 Slow Down", "SlowDown")]
    )
    async def test_a_second_attempt_is_told(
        self, wire: Wire, verb: Callable[[Store], Awaitable[bool]], trouble: Any
    ) -> None:
        """What succeeds at the second attempt was not answered at once."""
        await put_one(wire.store)
        assert await verb(wire.store) is True
        wire.sent()
        wire.proxy.rule = first(1, trouble)

        assert await verb(wire.store) is False
        assert wire.sent() == ["PUT", "PUT"]

    @pytest.mark.parametrize("verb", [put_one, copied], ids=["put", "copy"])
    async def test_three_attempts(
        self, wire: Wire, verb: Callable[[Store], Awaitable[bool]]
    ) -> None:
        """A request that is never answered may have taken effect."""
        wire.proxy.rule = first(9, cut_before)
        with pytest.raises(StoreUnavailableError) as raised:
            await verb(wire.store)

        assert raised.value.may_have_taken_effect
        assert wire.sent() == ["PUT"] * 3

    @pytest.mark.parametrize(
        ("status", "code", "error"),
        [
            ("403 Forbidden", "AccessDenied", StoreAccessError),
            ("400 Bad Request", "EntityTooLarge", StoreError),
            ("404 Not Found", "NoSuchBucket", BlobNotFoundError),
        ],
    )
    async def test_a_definite_no(
        self, wire: Wire, status: str, code: str, error: type[StoreError]
    ) -> None:
        """It is not repeated, and nothing took effect; unless an earlier attempt was lost."""
        wire.proxy.rule = first(1, refuse(status, code))
        with pytest.raises(error, match=code) as raised:
            await put_one(wire.store)
        assert not raised.value.may_have_taken_effect
        assert wire.sent() == ["PUT"]

        replies = iter([cut_after, refuse(status, code)])

        async def one_after_another(forward: Forward) -> Answer:
            return await next(replies)(forward)

        wire.proxy.rule = first(2, one_after_another)
        with pytest.raises(error, match=code) as raised:
            await put_one(wire.store)
        assert raised.value.may_have_taken_effect

    async def test_reading(self, wire: Wire) -> None:
        """Reads and listings are repeated, too."""
        await put_one(wire.store)
        verbs: list[Callable[[], Awaitable[Any]]] = [
            lambda: wire.store.get(uri_of(wire.store)),
            lambda: wire.store.head(uri_of(wire.store)),
            lambda: listed(wire.store),
            lambda: wire.store.delete_many([uri_of(wire.store)]),
        ]
        for verb in verbs:
            wire.proxy.rule = first(1, refuse("503 Slow Down", "SlowDown"))
            await verb()

        assert await listed(wire.store) == []

    async def test_a_download_goes_on_where_it_broke(self, wire: Wire) -> None:
        """A connection that drops is taken up again at the right byte."""
        uri, body = uri_of(wire.store), noise(3 * 2**20)
        await put(wire.store, uri, body)
        wire.sent()

        async def half(forward: Forward) -> Answer:
            whole = await forward()
            return whole[: len(whole) // 2]

        wire.proxy.rule = first(1, half)
        async with wire.store.open(uri) as reader:
            assert same(await reader.read(), body)
        again = wire.proxy.requests[-1].headers
        assert again["range"].startswith("bytes=1")
        assert wire.sent() == ["GET", "GET"]

    async def test_a_download_that_breaks_for_good(self, wire: Wire) -> None:
        """It ends in an error, never in fewer bytes."""
        uri = uri_of(wire.store)
        await put(wire.store, uri, noise(2**20))

        async def half(forward: Forward) -> Answer:
            whole = await forward()
            return whole[: len(whole) // 2]

        wire.proxy.rule = first(9, half)
        with pytest.raises(StoreUnavailableError):
            await wire.store.get(uri)
        with pytest.raises(StoreUnavailableError):
            async with wire.store.open(uri) as reader:
                await reader.read()


class TestDeleting:
    async def put_three(self, store: Store) -> list[str]:
        uris = [uri_of(store, f"items/id={number}") for number in range(3)]
        for uri in uris:
            await put(store, uri, BODY)
        return uris

    async def test_one_request(self, wire: Wire) -> None:
        """Many objects go by one request."""
        uris = await self.put_three(wire.store)
        wire.sent()
        await wire.store.delete_many(uris)

        assert wire.sent() == ["POST"]
        assert await listed(wire.store) == []

    async def test_a_server_without_it(self, wire: Wire) -> None:
        """Where a request for many is refused, they are deleted one by one."""
        uris = await self.put_three(wire.store)

        async def rule(request: Request, forward: Forward) -> Answer:
            if request.is_bulk_delete:
                return answer("501 Not Implemented", "NotImplemented")
            return await forward()

        wire.proxy.rule = rule
        report = await wire.store.delete_many(uris)

        assert set(report.deleted) == set(uris)
        assert await listed(wire.store) == []

    async def test_one_key_is_refused(self, wire: Wire) -> None:
        """The key that the server does not delete is reported, and the others are gone."""
        uris = await self.put_three(wire.store)
        result = (
            b"<DeleteResult><Error><Key>prefix/items/id=1</Key><Code>AccessDenied</Code>"
            b"<Message>no</Message></Error></DeleteResult>"
        )

        async def rule(request: Request, forward: Forward) -> Answer:
            if request.is_bulk_delete and b"id=1<" in request.body:
                head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(result)
                return head + result
            if request.path.endswith("id=1"):
                return answer("403 Forbidden", "AccessDenied")
            return await forward()

        wire.proxy.rule = rule
        report = await wire.store.delete_many(uris)
        wire.proxy.rule = None

        assert set(report.deleted) == {uris[0], uris[2]}
        assert report.failed == {uris[1]: "AccessDenied injected"}
        assert await listed(wire.store) == [uris[1]]

    async def test_no_answer(self, wire: Wire) -> None:
        """Without an answer all of them are reported, and not sent again one by one."""
        uris = await self.put_three(wire.store)
        wire.sent()
        wire.proxy.rule = first(9, cut_before)
        report = await wire.store.delete_many(uris)

        assert set(report.failed) == set(uris)
        assert set(wire.sent()) == {"POST"}

    async def test_a_missing_bucket(self, s3: S3Server) -> None:
        """An object in a bucket that is not there is not known to be deleted."""
        async with open_on(s3, "nobody-has-made-it") as store:
            uris = [uri_of(store, f"items/id={number}") for number in range(2)]
            for some in (uris, uris[:1]):
                assert set((await store.delete_many(some)).failed) == set(some)


class TestWriting:
    async def test_an_upload_that_was_refused(self, wire: Wire) -> None:
        """The first part's error arrives, and neither parts nor object are there."""

        async def rule(request: Request, forward: Forward) -> Answer:
            if "partNumber" in request.path:
                return answer("403 Forbidden", "AccessDenied")
            return await forward()

        wire.proxy.rule = rule
        with pytest.raises(StoreAccessError):
            await write(wire.store, parts=3)

        assert await wire.uploads() == []
        assert await listed(wire.store) == []

    async def test_a_completion_without_an_answer(self, wire: Wire) -> None:
        """Nobody knows whether the object is there, and the error says so."""

        async def rule(request: Request, forward: Forward) -> Answer:
            if request.method == "POST" and "uploadId" in request.path:
                await forward()
                return None
            return await forward()

        wire.proxy.rule = rule
        with pytest.raises(StoreError) as raised:
            await write(wire.store, parts=2)

        assert raised.value.may_have_taken_effect
        assert await listed(wire.store) == [uri_of(wire.store)]

    async def test_an_abort_that_fails(self, wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
        """What the abort fails with is logged, and hides nothing."""

        async def rule(request: Request, forward: Forward) -> Answer:
            if request.method == "DELETE":
                return answer("403 Forbidden", "AccessDenied")
            return await forward()

        wire.proxy.rule = rule
        with pytest.raises(KeyError):
            async with wire.store.open_writer(WriteRequest("c", uri_of(wire.store), {})) as writer:
                await writer.write(parts_of(noise(PART_BYTES))[0])
                raise KeyError

        assert await wire.uploads() == [uri_of(wire.store)]
        assert "cannot abort the upload" in caplog.text

    @pytest.mark.slow
    @pytest.mark.parametrize("place", PLACES)
    async def test_cancelled_at_every_await(
        self, place: Place, tmp_path: Path, s3: S3Server
    ) -> None:
        """Wherever it is cancelled, nothing or the whole object is left, and no parts."""
        async with contextlib.AsyncExitStack() as stack:
            store = await stack.enter_async_context(open_in(place, tmp_path, s3))
            direct: Any = None
            if place == "s3":
                opened = s3.open_store(bucket=store.bucket)
                direct = await stack.enter_async_context(opened)
            reached, moment = True, 0
            while reached:
                moment += 1
                task = CountedTask(write(store, parts=6), cancel_at=moment)
                reached = await task.run()
                found = await listed(store)
                assert found in ([], [uri_of(store)])
                if found:
                    assert (await store.head(found[0])).size == 6 * PART_BYTES
                    await store.delete_many(found)
                if direct is not None:
                    assert [each async for each in direct.iter_uploads()] == []
                assert await asyncio.to_thread(hidden_files, tmp_path) == []

            assert moment > 6


def hidden_files(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*#*")]


async def write(store: Store, *, parts: int) -> None:
    body = noise(parts * PART_BYTES)
    async with store.open_writer(WriteRequest("c", uri_of(store), {})) as writer:
        for part in parts_of(body):
            await writer.write(part)
        writer.finish(zlib.crc32(body))


class TestPresigning:
    async def test_no_other_name(self, wire: Wire) -> None:
        """The name of a download is not signed, and the store says what to do."""
        with pytest.raises(InvalidInputError, match="ContentDisposition"):
            await wire.store.presign(
                uri_of(wire.store), expires_in=timedelta(minutes=1), download_as="a.txt"
            )


class TestAmongOthers:
    async def test_both_stores_share_a_bucket(self, wire: Wire) -> None:
        """What one store writes the other reads, with its metadata."""
        uri, other = uri_of(wire.store, "a=1/sp ace/id=1"), uri_of(wire.store, "b/id=2")
        metadata = {"title": "Gr\u00fc\u00dfe", "plain": "x"}
        arguments = {"ContentType": "text/html", "CacheControl": "no-cache"}
        await put(wire.store, uri, BODY, metadata=metadata, arguments=arguments)
        await put(wire.direct, other, BODY, metadata=metadata, arguments=arguments)

        for each in (uri, other):
            one, two = await wire.store.head(each), await wire.direct.head(each)
            assert one == two
            assert await wire.store.get(each) == await wire.direct.get(each) == BODY
        assert await listed(wire.store) == await listed(wire.direct) == [uri, other]


PROGRAM = """
import asyncio, sys, zlib
from aioblobcol._sources import PART_BYTES, Part
from aioblobcol._store._base import WriteRequest
from aioblobcol.obstore import open_obstore

async def main(url, endpoint, how):
    config = {"endpoint": endpoint, "region": "us-east-1",
              "access_key_id": "testing", "secret_access_key": "testing"} if endpoint else None
    async with open_obstore(url, prefix="prefix", config=config) as store:
        request = WriteRequest("c", f"s3://{store.bucket}/prefix/id=1", {})
        async with store.open_writer(request) as writer:
            for number in range(1, 9):
                piece = bytes([number]) * PART_BYTES
                await writer.write(Part(number, [piece], PART_BYTES, zlib.crc32(piece)))
            if how == "cancelled":
                asyncio.current_task().cancel()
                await asyncio.sleep(60)
            writer.finish(0)
        async with store.open(request.uri) as reader:  # left early
            assert await anext(reader)

try:
    asyncio.run(main(*sys.argv[1:]))
except asyncio.CancelledError:
    assert sys.argv[3] == "cancelled"
"""

CREATED = "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
COMPLETED = "<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"


async def take_everything(request: Request, _forward: Forward) -> Answer:
    """Answer as S3 does, and keep nothing: moto would take minutes for 3 GiB."""
    body = b""
    if request.method == "POST":
        body = (CREATED if "uploads" in request.path else COMPLETED).encode()
    elif request.method == "GET":
        body = bytes(2 * PART_BYTES)
    head = (
        f"HTTP/1.1 200 OK\r\nETag: e\r\nContent-Length: {len(body)}\r\n"
        "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n"
    )
    return head.encode() + body


class TestExit:
    """A program that streams through obstore ends as others do."""

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize(
        ("place", "how", "runs"),
        [
            pytest.param("s3", "finished", 50, marks=pytest.mark.long),
            ("s3", "finished", 5),
            ("s3", "cancelled", 5),
            ("files", "finished", 5),
        ],
    )
    async def test_every_run_exits_cleanly(
        self, tmp_path: Path, place: str, how: str, runs: int
    ) -> None:
        """64 MiB are streamed: exit code 0 each time, and not a word on stderr."""
        async with s3_proxy("http://127.0.0.1:9") as stub:
            stub.rule = take_everything
            where = ("s3://bucket", stub.endpoint_url) if place == "s3" else (tmp_path.as_uri(), "")
            slots = asyncio.Semaphore(2)

            async def run() -> tuple[int | None, bytes]:
                async with slots:
                    stub.requests.clear()
                    process = await asyncio.create_subprocess_exec(
                        sys.executable,
                        *("-X", "faulthandler", "-W", "error", "-c", PROGRAM, *where, how),
                        stderr=asyncio.subprocess.PIPE,
                        env={**os.environ, "NO_PROXY": "127.0.0.1"},
                    )
                    _, stderr = await process.communicate()
                    return process.returncode, stderr

            results = await asyncio.gather(*(run() for _ in range(runs)))

        assert [each for each in results if each != (0, b"")] == []
