"""What the S3 store does beside put, get and delete: copy, open, presign, and describe."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
import pytest_asyncio
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from support.s3_proxy import Request, S3Proxy, answer, s3_proxy

from aioblobcol import (
    BlobCorruptedError,
    BlobNotFoundError,
    BlobUploadError,
    InvalidInputError,
    InvalidS3UriError,
    S3Store,
    StoreAccessError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
    open_store,
)
from aioblobcol._sources import HASH_INLINE_BYTES, read_payload
from aioblobcol._store._base import READ_CHUNK_BYTES, CopyRequest, PutRequest
from aioblobcol._store._metadata import encode_metadata
from aioblobcol._transfer import Upload, upload_each
from aioblobcol.testing import MemoryStore, S3Server, StoredObject

Forward = Callable[[], Awaitable[bytes]]

ONE_ATTEMPT = AioConfig(retries={"mode": "standard", "total_max_attempts": 1}, proxies={})
ONE_CONNECTION = AioConfig(max_pool_connections=1, proxies={})
ODD_KEYS = [
    "a b",
    "a+b",
    "a%20b",
    "a%",
    "a?versionId=null",
    "a#b",
    "a&b=c",
    "é/\U0001f600",
    "'\"<>",
]


@pytest_asyncio.fixture
async def proxy(s3: S3Server) -> AsyncIterator[S3Proxy]:
    async with s3_proxy(s3.endpoint_url) as proxy:
        yield proxy


def through(proxy: S3Proxy, s3: S3Server, s3_store: S3Store, **arguments: Any) -> S3Store:
    """Return a second store on the same bucket, through the proxy."""
    behind = dataclasses.replace(s3, endpoint_url=proxy.endpoint_url)
    return behind.open_store(bucket=s3_store.bucket, **{"config": ONE_ATTEMPT, **arguments})


@pytest_asyncio.fixture
async def store(proxy: S3Proxy, s3: S3Server, s3_store: S3Store) -> AsyncIterator[S3Store]:
    """Give an open store through the proxy, without retries."""
    async with through(proxy, s3, s3_store, request_seconds=10, drain_seconds=0) as store:
        yield store


def uri_in(store: S3Store, name: str) -> str:
    return f"s3://{store.bucket}/prefix/{name}"


async def put(store: S3Store, name: str, body: bytes = b"page", **more: Any) -> str:
    payload = await read_payload("page", body, with_md5=False)
    metadata = encode_metadata(more.pop("metadata", {}))
    request = PutRequest("page", uri_in(store, name), payload, metadata, more)
    await store.put(request)
    return request.uri


async def other_bucket(store: S3Store) -> str:
    bucket = f"other-{uuid.uuid4().hex}"
    await store.client.create_bucket(Bucket=bucket)
    return bucket


async def raw_head(store: S3Store, name: str) -> Any:
    return await store.client.head_object(Bucket=store.bucket, Key=f"prefix/{name}")


class TestHead:
    async def test_describes(self, s3_store: S3Store) -> None:
        """HEAD tells size, metadata, type, time in UTC and ETag."""
        uri = await put(s3_store, "a", ContentType="text/html", metadata={"name": "ü"})
        info = await s3_store.head(uri)

        assert (info.uri, info.size, info.metadata) == (uri, 4, {"name": "ü"})
        assert info.content_type == "text/html"
        assert info.etag == f'"{hashlib.md5(b"page").hexdigest()}"'  # noqa: S324 - moto's ETag
        assert info.modified_at is not None
        assert info.modified_at.tzinfo is timezone.utc
        assert abs(datetime.now(timezone.utc) - info.modified_at) < timedelta(minutes=2)


class TestChecksum:
    @pytest.mark.parametrize("size", [4, HASH_INLINE_BYTES + 1])
    async def test_md5_is_computed_where_it_is_needed(
        self, proxy: S3Proxy, s3: S3Server, s3_store: S3Store, size: int
    ) -> None:
        """A preset that sends Content-MD5 computes it of a payload that has none."""
        async with through(proxy, s3, s3_store, compat="generic") as store:
            await put(store, "a", bytes(size))

        digest = base64.b64encode(hashlib.md5(bytes(size)).digest()).decode()  # noqa: S324 - the protocol's
        assert proxy.requests[0].headers["content-md5"] == digest


class TestCopy:
    async def test_is_made_by_the_server(self, proxy: S3Proxy, store: S3Store) -> None:
        """One request without a body; type and metadata are the source's."""
        source = await put(store, "a", ContentType="text/html", metadata={"name": "ü"})
        proxy.requests.clear()
        request = CopyRequest(
            "page", uri_in(store, "b"), source, {"ContentType": "text/plain", "CacheControl": "x"}
        )
        answered = await store.copy(request)
        info = await store.head(request.uri)

        assert answered is True
        assert [(request.method, request.body) for request in proxy.requests[:1]] == [("PUT", b"")]
        assert proxy.requests[0].headers["x-amz-metadata-directive"] == "COPY"
        assert "cache-control" not in proxy.requests[0].headers
        assert await store.get(request.uri) == b"page"
        assert (info.content_type, info.metadata) == ("text/html", {"name": "ü"})

    async def test_arguments(self, proxy: S3Proxy, store: S3Store) -> None:
        """What CopyObject knows is sent, what only put_object knows is left out."""
        source = await put(store, "a")
        arguments = {
            "StorageClass": "STANDARD_IA",
            "ContentMD5": "x",
            "ChecksumSHA256": "x",
            "ContentLength": 4,
        }
        await store.copy(CopyRequest("page", uri_in(store, "b"), source, arguments))

        assert (await raw_head(store, "b"))["StorageClass"] == "STANDARD_IA"
        assert arguments["ContentMD5"] == "x"
        assert "content-md5" not in proxy.requests[1].headers

    async def test_the_library_decides_what_is_copied(self, store: S3Store) -> None:
        """Arguments never change source, target or directive."""
        source = await put(store, "a", metadata={"x": "y"})
        arguments = {
            "Key": "elsewhere",
            "Bucket": "elsewhere",
            "CopySource": "elsewhere/x",
            "MetadataDirective": "REPLACE",
            "Metadata": {"x": "z"},
        }
        await store.copy(CopyRequest("page", uri_in(store, "b"), source, arguments))

        assert (await store.head(uri_in(store, "b"))).metadata == {"x": "y"}

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [({}, [{"Key": "a", "Value": "1"}]), ({"Tagging": "b=2"}, [{"Key": "b", "Value": "2"}])],
    )
    async def test_tags(
        self, store: S3Store, arguments: dict[str, Any], expected: list[dict[str, str]]
    ) -> None:
        """Tags are the source's, unless the copy is given its own."""
        source = await put(store, "a", Tagging="a=1")
        await store.copy(CopyRequest("page", uri_in(store, "b"), source, arguments))
        answer = await store.client.get_object_tagging(Bucket=store.bucket, Key="prefix/b")

        assert answer["TagSet"] == expected

    @pytest.mark.parametrize("key", ODD_KEYS)
    async def test_odd_keys(self, proxy: S3Proxy, store: S3Store, key: str) -> None:
        """Any character may stand in the keys of both."""
        source = await put(store, key, key.encode())
        target = uri_in(store, f"{key}/copy")
        await store.copy(CopyRequest("page", target, source))

        assert await store.get(target) == key.encode()
        assert "?" not in proxy.requests[1].headers["x-amz-copy-source"]

    async def test_from_another_bucket(self, store: S3Store) -> None:
        """The source may be in any bucket that the client reaches."""
        bucket = await other_bucket(store)
        await store.client.put_object(Bucket=bucket, Key="k", Body=b"there")
        await store.copy(CopyRequest("page", uri_in(store, "b"), f"s3://{bucket}/k"))

        assert await store.get(uri_in(store, "b")) == b"there"

    async def test_of_a_missing_source(self, store: S3Store) -> None:
        """A missing source is not found by its own URI, and certainly nothing was made."""
        source = uri_in(store, "missing")
        with pytest.raises(BlobNotFoundError, match="cannot copy") as caught:
            await store.copy(CopyRequest("page", uri_in(store, "b"), source))

        assert caught.value.uri == source
        assert caught.value.may_have_taken_effect is False
        assert caught.value.__cause__ is not None

    @pytest.mark.parametrize("missing", ["source", "target"])
    async def test_a_missing_bucket(self, store: S3Store, missing: str) -> None:
        """Of two buckets the error names the one that is missing."""
        there = await put(store, "a")
        gone = f"s3://gone-{uuid.uuid4().hex}/k"
        request = (
            CopyRequest("page", uri_in(store, "b"), gone)
            if missing == "source"
            else CopyRequest("page", gone, there)
        )
        with pytest.raises(BlobNotFoundError, match="NoSuchBucket") as caught:
            await store.copy(request)

        assert caught.value.uri == gone

    async def test_that_is_refused(self, proxy: S3Proxy, store: S3Store) -> None:
        """A refusal is about the new object, and definite."""
        source = await put(store, "a")

        async def deny(_request: Request, _forward: Forward) -> bytes:
            return answer("403 Forbidden", "AccessDenied")

        proxy.rule = deny
        with pytest.raises(StoreAccessError, match="cannot copy") as caught:
            await store.copy(CopyRequest("page", uri_in(store, "b"), source))

        assert caught.value.uri == uri_in(store, "b")
        assert caught.value.may_have_taken_effect is False

    async def test_whose_answer_is_lost(
        self, proxy: S3Proxy, store: S3Store, s3_store: S3Store
    ) -> None:
        """Without an answer the copy may be there, and here it is."""
        source = await put(store, "a")

        async def lose(_request: Request, forward: Forward) -> None:
            await forward()

        proxy.rule = lose
        with pytest.raises(StoreUnavailableError) as caught:
            await store.copy(CopyRequest("page", uri_in(store, "b"), source))

        assert (caught.value.uri, caught.value.may_have_taken_effect) == (uri_in(store, "b"), True)
        assert await s3_store.get(uri_in(store, "b")) == b"page"

    async def test_an_error_inside_of_a_200(self, proxy: S3Proxy, store: S3Store) -> None:
        """CopyObject may fail after it has answered 200: that is an error without a definite no."""
        source = await put(store, "a")

        async def late(_request: Request, _forward: Forward) -> bytes:
            return answer("200 OK", "InternalError")

        proxy.rule = late
        with pytest.raises(StoreUnavailableError, match="InternalError") as caught:
            await store.copy(CopyRequest("page", uri_in(store, "b"), source))
        assert caught.value.may_have_taken_effect is True

    async def test_that_was_retried(self, proxy: S3Proxy, s3: S3Server, s3_store: S3Store) -> None:
        """A copy that needed a second attempt says so: its first one may land late."""
        source = await put(s3_store, "a")
        answers = [answer("503 Slow Down", "SlowDown")]

        async def once(_request: Request, forward: Forward) -> bytes:
            return answers.pop() if answers else await forward()

        proxy.rule = once
        async with through(proxy, s3, s3_store, config=AioConfig(proxies={})) as store:
            answered = await store.copy(CopyRequest("page", uri_in(store, "b"), source))

        assert answered is False
        assert await s3_store.get(uri_in(s3_store, "b")) == b"page"

    async def test_bad_uris(self, proxy: S3Proxy, store: S3Store) -> None:
        """A source that is no URI is refused before anything is sent."""
        with pytest.raises(InvalidS3UriError):
            await store.copy(CopyRequest("page", uri_in(store, "b"), "s3://bucket"))
        assert proxy.requests == []


class TestOpen:
    async def test_reads_chunk_by_chunk(self, s3_store: S3Store) -> None:
        """An object is read in chunks of 256 KiB at most, and described before."""
        body = bytes(range(256)) * 10_000
        uri = await put(s3_store, "a", body, ContentType="text/html")
        async with s3_store.open(uri) as reader:
            chunks = [chunk async for chunk in reader]

        assert max(len(chunk) for chunk in chunks) <= READ_CHUNK_BYTES
        assert b"".join(chunks) == body
        assert reader.info == await s3_store.head(uri)

    async def test_reads_the_rest(self, s3_store: S3Store) -> None:
        """`read` gives what was not read yet, and then nothing."""
        body = bytes(range(256)) * 4000
        uri = await put(s3_store, "a", body)
        async with s3_store.open(uri) as reader:
            first = await anext(reader)

            assert first + await reader.read() == body
            assert await reader.read() == b""

    async def test_an_empty_object(self, s3_store: S3Store) -> None:
        """No bytes are no chunks."""
        uri = await put(s3_store, "a", b"")
        async with s3_store.open(uri) as reader:
            assert [chunk async for chunk in reader] == []

    @pytest.mark.parametrize("how", ["break", "unread", "raise", "cancel"])
    async def test_leaving_early_leaks_no_connection(
        self, s3: S3Server, s3_store: S3Store, how: str
    ) -> None:
        """However its block is left, the connection is free for the next request."""
        uri = await put(s3_store, "a", bytes(2_000_000))

        async def leave(store: S3Store) -> None:
            async with store.open(uri) as reader:
                if how == "unread":
                    return
                async for _ in reader:
                    if how == "break":
                        break
                    if how == "raise":
                        raise KeyError
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()

        async with s3.open_store(bucket=s3_store.bucket, config=ONE_CONNECTION) as store:
            for _ in range(3):
                (outcome,) = await asyncio.gather(
                    asyncio.create_task(leave(store)), return_exceptions=True
                )
            async with asyncio.timeout(10):
                assert (await store.head(uri)).size == 2_000_000

        expected = {"raise": KeyError, "cancel": asyncio.CancelledError}.get(how, type(None))
        assert type(outcome) is expected

    async def test_of_a_missing_object(self, s3_store: S3Store) -> None:
        """Entering says that an object is missing."""
        with pytest.raises(BlobNotFoundError, match="prefix/missing"):
            async with s3_store.open(uri_in(s3_store, "missing")):
                raise AssertionError("not reached")

    async def test_that_breaks_off(self, proxy: S3Proxy, store: S3Store) -> None:
        """A connection that is lost on the way is our error, whichever way it is read."""
        uri = await put(store, "a", bytes(1_000_000))

        async def cut(_request: Request, forward: Forward) -> bytes:
            return (await forward())[:-500_000]

        proxy.rule = cut
        for read_on in (False, True):
            with pytest.raises(StoreUnavailableError, match=f"cannot get {uri}"):
                async with store.open(uri) as reader:
                    if read_on:
                        await reader.read()
                    async for _ in reader:
                        pass

    async def test_bytes_that_are_not_those(self, proxy: S3Proxy, store: S3Store) -> None:
        """A body that does not match the server's checksum is an error at its end."""
        uri = await put(store, "a", b"page", ChecksumAlgorithm="CRC32")

        async def change(_request: Request, forward: Forward) -> bytes:
            return (await forward()).removesuffix(b"page") + b"pawn"

        async with store.open(uri) as reader:
            assert await reader.read() == b"page"
        assert proxy.requests[-1].headers["x-amz-checksum-mode"] == "ENABLED"
        proxy.rule = change
        with pytest.raises(BlobCorruptedError, match="checksum"):
            async with store.open(uri) as reader:
                await reader.read()

    async def test_errors_of_the_block_are_the_users(self, s3_store: S3Store) -> None:
        """What the block raises is not translated, whatever it is."""
        uri = await put(s3_store, "a")
        for error in (OSError("disk full"), TimeoutError("mine"), RuntimeError("mine")):
            with pytest.raises(type(error)) as caught:
                async with s3_store.open(uri):
                    raise error
            assert caught.value is error

    async def test_is_closed_afterwards(self, s3_store: S3Store) -> None:
        """A reader is used inside of its block only."""
        uri = await put(s3_store, "a")
        async with s3_store.open(uri) as reader:
            pass

        with pytest.raises(StoreClosedError, match="inside of"):
            await reader.read()

    async def test_of_a_closed_store(self, s3: S3Server) -> None:
        """A store that was not entered says how to enter it, at every verb."""
        closed = s3.open_store(bucket="bucket")
        with pytest.raises(StoreClosedError, match="async with store"):
            async with closed.open("s3://bucket/prefix/a"):
                raise AssertionError("not reached")
        with pytest.raises(StoreClosedError, match="async with store"):
            await closed.copy(CopyRequest("page", "s3://bucket/b", "s3://bucket/a"))
        with pytest.raises(StoreClosedError, match="async with store"):
            await closed.presign("s3://bucket/a", expires_in=timedelta(minutes=5))


class TestPresign:
    async def get(self, url: str) -> tuple[int, bytes, str | None]:
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            disposition = answer.headers.get("Content-Disposition")
            return answer.status, await answer.read(), disposition

    @pytest.mark.parametrize("key", ["a", *ODD_KEYS])
    async def test_anybody_can_read(self, proxy: S3Proxy, store: S3Store, key: str) -> None:
        """The URL gives the object to whoever has it, and making it sends nothing."""
        uri = await put(store, key, key.encode())
        proxy.requests.clear()
        url = await store.presign(uri, expires_in=timedelta(minutes=5))

        assert proxy.requests == []
        assert await self.get(url) == (200, key.encode(), None)

    async def test_is_signed_with_v4(self, store: S3Store) -> None:
        """The signature is SigV4, also in regions where botocore would take the old one."""
        url = await store.presign(uri_in(store, "a"), expires_in=timedelta(days=7))
        query = parse_qs(urlsplit(url).query)

        assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
        assert query["X-Amz-Expires"] == ["604800"]
        assert "AWSAccessKeyId" not in query

    async def test_a_borrowed_client_signs_in_its_own_way(
        self, s3: S3Server, s3_store: S3Store
    ) -> None:
        """A client of the user's own is left as it was configured."""
        uri = await put(s3_store, "a")
        config = AioConfig(signature_version="s3v4", proxies={})
        async with get_session().create_client(
            "s3", **s3.client_arguments, config=config
        ) as client:
            borrowed = S3Store.borrow(client, bucket=s3_store.bucket, prefix="prefix")
            url = await borrowed.presign(uri, expires_in=timedelta(seconds=1.9))

        assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["1"]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("a b.pdf", "attachment; filename=\"a b.pdf\"; filename*=UTF-8''a%20b.pdf"),
            ("é.pdf", "attachment; filename=\"_.pdf\"; filename*=UTF-8''%C3%A9.pdf"),
            ("a\"%;'.b", "attachment; filename=\"a__;'.b\"; filename*=UTF-8''a%22%25%3B%27.b"),
            ("../a\\b", "attachment; filename=\".._a_b\"; filename*=UTF-8''.._a_b"),
            ("a\r\nX: y\x00", "attachment; filename=\"a__X: y_\"; filename*=UTF-8''a__X%3A%20y_"),
            ("a\u202efdp.exe", "attachment; filename=\"a_fdp.exe\"; filename*=UTF-8''a_fdp.exe"),
            ("\udcff.pdf", "attachment; filename=\"_.pdf\"; filename*=UTF-8''_.pdf"),
        ],
    )
    async def test_the_name_of_a_download(self, store: S3Store, name: str, expected: str) -> None:
        """The object is saved under the name, in ASCII and in full; nothing ends the header."""
        uri = await put(store, "a")
        url = await store.presign(uri, expires_in=timedelta(minutes=5), download_as=name)

        assert await self.get(url) == (200, b"page", expected)

    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            ({"expires_in": timedelta(0)}, "7 days"),
            ({"expires_in": timedelta(seconds=-5)}, "7 days"),
            ({"expires_in": timedelta(days=7, microseconds=1)}, "7 days"),
            ({"expires_in": 300}, "timedelta, not int"),
            ({"expires_in": timedelta(hours=1), "download_as": ""}, "name of a download"),
            ({"expires_in": timedelta(hours=1), "download_as": 5}, "name of a download"),
        ],
    )
    async def test_bad_arguments(
        self, proxy: S3Proxy, store: S3Store, arguments: dict[str, Any], hint: str
    ) -> None:
        """What no URL could hold is refused before anything."""
        with pytest.raises(InvalidInputError, match=hint):
            await store.presign(uri_in(store, "a"), **arguments)
        assert proxy.requests == []

    async def test_no_credentials(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without credentials there is nothing to sign with."""
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "not-there")
        monkeypatch.setenv("AWS_CONFIG_FILE", "not-there")
        async with open_store(
            bucket="bucket", endpoint_url=s3.endpoint_url, region_name="us-east-1"
        ) as store:
            with pytest.raises(StoreAccessError, match="cannot presign"):
                await store.presign("s3://bucket/a", expires_in=timedelta(hours=1))


class TestListing:
    @pytest_asyncio.fixture
    async def listed(self, s3_store: S3Store) -> S3Store:
        for number, key in enumerate(("prefix/a", "prefix/b", "prefix/b/c", "prefix/é", "other")):
            await s3_store.client.put_object(Bucket=s3_store.bucket, Key=key, Body=b"x" * number)
        return s3_store

    async def test_tells_sizes(self, listed: S3Store) -> None:
        """The objects under the prefix, sorted by bytes, with their sizes."""
        found = [each async for each in listed.iter_objects()]

        names = ("a", "b", "b/c", "é")
        assert [each[:2] for each in found] == [
            (uri_in(listed, name), size) for size, name in enumerate(names)
        ]

    @pytest.mark.parametrize(
        ("after", "left"), [("b", ["b/c", "é"]), ("aa", ["b", "b/c", "é"]), ("é", [])]
    )
    async def test_after_a_uri(self, listed: S3Store, after: str, left: list[str]) -> None:
        """It goes on after any URI, whether that is there or not; in memory, too."""
        in_memory = MemoryStore(bucket=listed.bucket)
        in_memory.objects = {uri: StoredObject(b"", {}, {}) async for uri in listed.iter_uris()}
        async with in_memory:
            for store in (listed, in_memory):
                after_uri = uri_in(listed, after)
                found = [each.uri async for each in store.iter_objects(start_after=after_uri)]

                assert found == [uri_in(listed, name) for name in left]

    async def test_page_after_page(self, listed: S3Store, s3: S3Server) -> None:
        """Of more than one page none is lost or repeated."""
        pages = []

        def two_at_once(params: dict[str, Any], **_: Any) -> None:
            pages.append(params)
            params["url"] += "&max-keys=2"

        async with s3.open_store(bucket=listed.bucket) as store:
            event = "before-call.s3.ListObjectsV2"
            store.client.meta.events.register(event, two_at_once)
            found = [each async for each in store.iter_objects(start_after=uri_in(store, "a"))]

        assert [each.uri for each in found] == [uri_in(store, name) for name in ("b", "b/c", "é")]
        assert len(pages) == 2

    async def test_leaves_out_what_nobody_reads(self, s3_store: S3Store) -> None:
        """Only for itself: whoever asks the same client gets all, and no key is changed by it."""
        odd = "prefix/<ETag>x</ETag>&lt;"
        await s3_store.client.put_object(Bucket=s3_store.bucket, Key=odd, Body=b"xx")
        answers: list[set[str]] = []

        def note(parsed: dict[str, Any], **_: Any) -> None:
            answers.append(set(parsed["Contents"][0]))

        s3_store.client.meta.events.register("after-call.s3.ListObjectsV2", note)
        found = [each async for each in s3_store.iter_objects()]
        page = await s3_store.client.list_objects_v2(Bucket=s3_store.bucket)

        assert [each[:2] for each in found] == [(f"s3://{s3_store.bucket}/{odd}", 2)]
        assert answers[0] == {"Key", "Size"}
        assert answers[1] >= {"Key", "Size", "LastModified", "ETag", "StorageClass"}
        assert page["Contents"][0]["Key"] == odd


class TestOneAct:
    async def test_over_two_buckets(self, proxy: S3Proxy, s3: S3Server, store: S3Store) -> None:
        """Cancelled with a PUT and a copy on the wire to two buckets: both are made, then gone."""
        source = await put(store, "old")
        bucket = await other_bucket(store)
        on_the_wire, go_on = asyncio.Barrier(3), asyncio.Event()

        async def hold(request: Request, forward: Forward) -> bytes:
            if request.method == "PUT":
                await on_the_wire.wait()
                await go_on.wait()
            return await forward()

        async def upload() -> PutRequest:
            payload = await read_payload("page", b"new", with_md5=False)
            return PutRequest("page", uri_in(store, "a"), payload, {})

        target = f"s3://{bucket}/prefix/b"

        async def copy() -> CopyRequest:
            return CopyRequest("image", target, source)

        behind = dataclasses.replace(s3, endpoint_url=proxy.endpoint_url)
        async with behind.open_store(bucket=bucket, config=ONE_ATTEMPT) as other:
            proxy.rule = hold
            proxy.requests.clear()
            task = asyncio.create_task(
                upload_each(
                    [
                        Upload(store, "page", uri_in(store, "a"), upload),
                        Upload(other, "image", target, copy),
                    ]
                )
            )
            await on_the_wire.wait()
            task.cancel()
            await asyncio.sleep(0)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task

            assert [request.method for request in proxy.requests] == ["PUT"] * 2 + ["DELETE"] * 2
            assert [uri async for uri in store.iter_uris()] == [source]
            assert [uri async for uri in other.iter_uris()] == []

    async def test_a_missing_source(self, store: S3Store) -> None:
        """A copy that fails undoes the upload beside it; the error names column and source."""
        missing = uri_in(store, "missing")

        async def upload() -> PutRequest:
            payload = await read_payload("page", b"new", with_md5=False)
            return PutRequest("page", uri_in(store, "a"), payload, {})

        async def copy() -> CopyRequest:
            return CopyRequest("image", uri_in(store, "b"), missing)

        with pytest.raises(BlobUploadError, match="prefix/missing") as caught:
            await upload_each(
                [
                    Upload(store, "page", uri_in(store, "a"), upload),
                    Upload(store, "image", uri_in(store, "b"), copy),
                ]
            )

        assert caught.value.column == "image"
        assert isinstance(caught.value.__cause__, StoreError)
        assert [uri async for uri in store.iter_uris()] == []
