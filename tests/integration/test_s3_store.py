"""The S3 store: what goes over the wire, and what becomes of every kind of answer."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import get_session
from support.databases import Database
from support.models import Task, contents, load
from support.s3_proxy import Request, S3Proxy, answer, s3_proxy

from aioblobcol import (
    BlobNotFoundError,
    BlobUploadError,
    CleanUpError,
    ForeignUriError,
    InvalidInputError,
    PutS3ApiCall,
    S3Store,
    StoreAccessError,
    StoreClosedError,
    StoreUnavailableError,
    blob_transaction,
    open_store,
    put_s3,
)
from aioblobcol.aws_s3 import batch_delete_s3_objects, is_s3_object_exists
from aioblobcol.testing import S3Server

Forward = Callable[[], Awaitable[bytes]]

ONE_ATTEMPT = AioConfig(retries={"mode": "standard", "total_max_attempts": 1})


def calls(html: bytes = b"1", image: bytes = b"i", old: Task | None = None) -> list[PutS3ApiCall]:
    return [
        PutS3ApiCall("html", html, getattr(old, "html", None)),
        PutS3ApiCall("image", image, getattr(old, "image", None)),
    ]


@pytest_asyncio.fixture
async def proxy(s3: S3Server) -> AsyncIterator[S3Proxy]:
    async with s3_proxy(s3.endpoint_url) as proxy:
        yield proxy


def through(proxy: S3Proxy, s3: S3Server, s3_store: S3Store, **arguments: Any) -> S3Store:
    """Return a second store on the same bucket, through the proxy."""
    behind = dataclasses.replace(s3, endpoint_url=proxy.endpoint_url)
    return behind.open_store(bucket=s3_store.bucket, **arguments)


@pytest_asyncio.fixture
async def store(proxy: S3Proxy, s3: S3Server, s3_store: S3Store) -> AsyncIterator[S3Store]:
    """Give an open store through the proxy, without retries and with little patience."""
    async with through(
        proxy, s3, s3_store, config=ONE_ATTEMPT, request_seconds=10, drain_seconds=0
    ) as store:
        yield store


async def create(database: Database, store: S3Store) -> None:
    async with database.session() as session, blob_transaction(session, store=store) as tx:
        put = await tx.put_s3(pk="u", api_calls=calls())
        session.add(Task(url="u", **put.to_values()))


class TestRequests:
    async def test_counts(self, sqlite: Database, proxy: S3Proxy, store: S3Store) -> None:
        """Create: one PUT a column. Update: those and one bulk delete. No HEAD, no Expect."""
        await create(sqlite, store)
        created = [request.method for request in proxy.requests]
        proxy.requests.clear()
        async with sqlite.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"2", b"j", task))
                await session.execute(sa.update(Task).values(**put.to_values()))
        updated = [request.method for request in proxy.requests]
        proxy.requests.clear()
        async with sqlite.session() as session:
            with pytest.raises(KeyError):
                async with blob_transaction(session, store=store) as tx:
                    await tx.put_s3(pk="u", api_calls=calls(b"3", b"k"))
                    raise KeyError
        failed = [request.method for request in proxy.requests]

        assert created == ["PUT", "PUT"]
        assert updated == ["PUT", "PUT", "POST"]
        assert failed == ["PUT", "PUT", "POST"]
        assert not any("expect" in request.headers for request in proxy.requests)

    async def test_uploads_are_concurrent(
        self, sqlite: Database, proxy: S3Proxy, store: S3Store
    ) -> None:
        """Both PUTs are on the wire before either is answered."""
        barrier = asyncio.Barrier(2)

        async def together(request: Request, forward: Forward) -> bytes:
            if request.method == "PUT":
                await barrier.wait()  # for ever, if they came one after the other
            return await forward()

        proxy.rule = together
        await create(sqlite, store)

        assert await contents(store, sqlite.engine) == (b"1", b"i")

    async def test_the_body_is_protected(self, proxy: S3Proxy, store: S3Store) -> None:
        """A PUT carries our CRC32, and is neither chunked nor trailed."""
        put = await put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"body", None)], store=store)
        put.to_values()
        headers = proxy.requests[0].headers

        crc = base64.b64encode(zlib.crc32(b"body").to_bytes(4, "big")).decode()
        assert headers["x-amz-checksum-crc32"] == crc
        assert headers["content-length"] == "4"
        assert "x-amz-trailer" not in headers
        assert headers["user-agent"].startswith("aioblobcol/")

    @pytest.mark.parametrize(("size", "is_file"), [(0, False), (65_536, False), (65_537, True)])
    async def test_a_small_body_is_sent_at_once(
        self, s3_store: S3Store, size: int, *, is_file: bool
    ) -> None:
        """Up to 64 KiB a body reaches the socket as it is; a larger one as a file, in pieces."""
        bodies: list[Any] = []

        def note(params: dict[str, Any], **_: Any) -> None:
            bodies.append(params["body"])

        s3_store.client.meta.events.register("before-call.s3.PutObject", note)
        call = PutS3ApiCall("html", bytes(size), None)
        put = await put_s3(pk="u", api_calls=[call], store=s3_store)

        assert [hasattr(body, "read") for body in bodies] == [is_file]
        assert await s3_store.get(put.to_values()["html"]) == bytes(size)

    async def test_compat_generic(self, proxy: S3Proxy, s3: S3Server, s3_store: S3Store) -> None:
        """The preset `generic` sends Content-MD5 with PUT and DeleteObjects, no new checksums."""
        async with through(proxy, s3, s3_store, compat="generic") as store:
            put = await put_s3(pk="u", api_calls=calls(b"body", b"other"), store=store)
            await put.clean_up_created_s3_object_when_create_or_update_row_failed()

        assert [request.method for request in proxy.requests] == ["PUT", "PUT", "POST"]
        for request in proxy.requests:
            digest = base64.b64encode(hashlib.md5(request.body).digest()).decode()  # noqa: S324 - the protocol's
            assert request.headers["content-md5"] == digest
            assert not [name for name in request.headers if name.startswith("x-amz-checksum")]
        assert [uri async for uri in s3_store.iter_uris()] == []

    async def test_a_checksum_of_the_users_own(self, proxy: S3Proxy, store: S3Store) -> None:
        """A checksum among the extra arguments is passed through, and ours is left out."""
        digest = base64.b64encode(hashlib.sha256(b"body").digest()).decode()
        call = PutS3ApiCall("html", b"body", None, {"ChecksumSHA256": digest})
        put = await put_s3(pk="u", api_calls=[call], store=store)
        put.to_values()
        headers = proxy.requests[0].headers

        assert headers["x-amz-checksum-sha256"] == digest
        assert "x-amz-checksum-crc32" not in headers

    @pytest.mark.parametrize(
        ("endpoint_url", "signs"), [("http://127.0.0.1:9", True), ("https://127.0.0.1:9", False)]
    )
    async def test_payloads_are_signed_where_nothing_else_protects_them(
        self, s3: S3Server, endpoint_url: str, signs: bool
    ) -> None:
        """Over http the signature covers the body; over https TLS and the checksum do."""
        store = dataclasses.replace(s3, endpoint_url=endpoint_url).open_store(bucket="bucket")
        async with store:
            config = store.client.meta.config.s3

        assert config.get("payload_signing_enabled", True) is signs

    async def test_an_http_endpoint_from_the_environment(
        self, monkeypatch: pytest.MonkeyPatch, s3: S3Server, s3_store: S3Store
    ) -> None:
        """An endpoint that only the environment names is found, and its bodies are signed."""
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint_url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        async with open_store(bucket=s3_store.bucket, prefix="prefix") as store:
            put = await put_s3(pk="u", api_calls=calls(), store=store)
            put.to_values()
            config = store.client.meta.config.s3

        assert "payload_signing_enabled" not in config
        assert len([uri async for uri in s3_store.iter_uris()]) == 2


class TestSkipUnchanged:
    async def test_equal_bytes_are_left_alone(
        self, sqlite: Database, proxy: S3Proxy, store: S3Store
    ) -> None:
        """One HEAD for each old object; equal columns are not uploaded, written or deleted."""
        await create(sqlite, store)
        proxy.requests.clear()
        async with sqlite.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=store) as tx:
                put = await tx.put_s3(
                    pk="u", api_calls=calls(b"1", b"new", task), skip_unchanged=True
                )
                await session.execute(
                    sa.update(Task).where(put.guard(Task)).values(**put.to_values())
                )
        html, image = put.put_s3backed_column_results

        assert sorted(r.method for r in proxy.requests) == ["DELETE", "HEAD", "HEAD", "PUT"]
        assert (html.executed, html.new_s3_uri) == (False, html.old_s3_uri)
        assert image.executed
        assert await contents(store, sqlite.engine) == (b"1", b"new")

    async def test_nothing_changed(self, sqlite: Database, store: S3Store) -> None:
        """When nothing changed there is nothing to write, and nothing is deleted."""
        await create(sqlite, store)
        async with sqlite.session() as session:
            task = await load(session)
            put = await put_s3(pk="u", api_calls=calls(old=task), store=store, skip_unchanged=True)
            assert not put.changed
            assert put.to_values() == {}
            report = await put.clean_up_old_s3_object_when_update_row_succeeded()

        assert report.deleted == ()
        assert await contents(store, sqlite.engine) == (b"1", b"i")

    async def test_an_old_object_that_was_lost(self, sqlite: Database, store: S3Store) -> None:
        """The same bytes are uploaded anew when the old object is not there any more."""
        await create(sqlite, store)
        async with sqlite.session() as session:
            task = await load(session)
            assert task.html is not None
            await store.delete_many([task.html])
            async with blob_transaction(session, store=store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(old=task), skip_unchanged=True)
                await session.execute(sa.update(Task).values(**put.to_values()))

        assert await contents(store, sqlite.engine) == (b"1", b"i")


class TestTrouble:
    async def test_down(self, sqlite: Database, s3: S3Server, s3_store: S3Store) -> None:
        """Nobody listens: one clear error, no row."""
        nobody = dataclasses.replace(s3, endpoint_url="http://127.0.0.1:9")
        async with nobody.open_store(
            bucket=s3_store.bucket, config=ONE_ATTEMPT, drain_seconds=0
        ) as store:
            with pytest.raises(BlobUploadError) as caught:
                await create(sqlite, store)

        assert isinstance(caught.value.__cause__, StoreUnavailableError)
        assert caught.value.not_deleted
        assert await contents(s3_store, sqlite.engine) is None

    async def test_503(
        self, sqlite: Database, proxy: S3Proxy, store: S3Store, s3_store: S3Store
    ) -> None:
        """503 for one column: the other one is undone, the error names the code."""

        async def unavailable(request: Request, forward: Forward) -> bytes:
            if request.method == "PUT" and "col=image" in request.path:
                return answer("503 Slow Down", "SlowDown")
            return await forward()

        proxy.rule = unavailable
        with pytest.raises(BlobUploadError, match="SlowDown") as caught:
            await create(sqlite, store)

        assert caught.value.column == "image"
        assert await contents(s3_store, sqlite.engine) is None

    async def test_503_and_then_well(
        self, sqlite: Database, proxy: S3Proxy, s3: S3Server, s3_store: S3Store
    ) -> None:
        """A passing 503 is retried, and nobody notices."""
        answers = [answer("503 Slow Down", "SlowDown")]

        async def once(_request: Request, forward: Forward) -> bytes:
            return answers.pop() if answers else await forward()

        proxy.rule = once
        async with through(proxy, s3, s3_store) as store:
            await create(sqlite, store)

        assert await contents(s3_store, sqlite.engine) == (b"1", b"i")

    async def test_the_answer_is_lost_after_it_was_stored(
        self, sqlite: Database, proxy: S3Proxy, store: S3Store, s3_store: S3Store
    ) -> None:
        """The object was stored, its answer was not received: it is deleted, twice."""

        async def lose(request: Request, forward: Forward) -> bytes | None:
            reply = await forward()
            return None if request.method == "PUT" and "col=image" in request.path else reply

        proxy.rule = lose
        with pytest.raises(BlobUploadError) as caught:
            await create(sqlite, store)

        assert isinstance(caught.value.__cause__, StoreUnavailableError)
        assert store.runtime.second_deletes == (caught.value.uri,)
        assert await contents(s3_store, sqlite.engine) is None

    async def test_stored_after_it_was_given_up(
        self, sqlite: Database, proxy: S3Proxy, s3: S3Server, s3_store: S3Store
    ) -> None:
        """A PUT that a proxy delivers after its delete is deleted when its time is over."""
        late: list[Forward] = []

        async def hold(request: Request, forward: Forward) -> bytes | None:
            if request.method != "PUT":
                return await forward()
            late.append(forward)
            return None

        proxy.rule = hold
        async with through(proxy, s3, s3_store, config=ONE_ATTEMPT, drain_seconds=0) as store:
            with pytest.raises(BlobUploadError):
                await create(sqlite, store)
            await asyncio.gather(*(forward() for forward in late))
            landed = [uri async for uri in s3_store.iter_uris()]

        assert len(landed) == 2
        assert await contents(s3_store, sqlite.engine) is None

    async def test_slow(
        self, sqlite: Database, proxy: S3Proxy, s3: S3Server, s3_store: S3Store
    ) -> None:
        """An answer that does not come in time is given up, and the object deleted."""
        stop = asyncio.Event()

        async def slow(request: Request, forward: Forward) -> bytes:
            reply = await forward()
            if request.method == "PUT":
                await stop.wait()
            return reply

        proxy.rule = slow
        async with through(
            proxy, s3, s3_store, config=ONE_ATTEMPT, request_seconds=1.5, drain_seconds=0
        ) as store:
            with pytest.raises(BlobUploadError, match="in time"):
                await create(sqlite, store)
            stop.set()

        assert await contents(s3_store, sqlite.engine) is None

    async def test_no_bucket(self, sqlite: Database, s3: S3Server) -> None:
        """A bucket that is not there: the error says so."""
        async with s3.open_store(bucket="nobody-made-this") as store:
            with pytest.raises(BlobUploadError, match="NoSuchBucket"):
                await create(sqlite, store)

    async def test_access_denied(
        self, sqlite: Database, proxy: S3Proxy, store: S3Store, s3_store: S3Store
    ) -> None:
        """403 is an access error that names the permissions needed."""

        async def deny(_request: Request, _forward: Forward) -> bytes:
            return answer("403 Forbidden", "AccessDenied")

        proxy.rule = deny
        with pytest.raises(BlobUploadError, match="s3:PutObject") as caught:
            await create(sqlite, store)

        assert isinstance(caught.value.__cause__, StoreAccessError)
        assert await contents(s3_store, sqlite.engine) is None

    async def test_get_of_a_missing_object(self, s3_store: S3Store) -> None:
        """Reading what is not there raises BlobNotFoundError with the URI."""
        uri = f"s3://{s3_store.bucket}/prefix/missing"
        with pytest.raises(BlobNotFoundError, match="prefix/missing"):
            await s3_store.get(uri)
        with pytest.raises(BlobNotFoundError):
            await s3_store.head(uri)


class TestDeleteMany:
    async def _fill(self, store: S3Store, count: int) -> list[str]:
        slots = asyncio.Semaphore(16)

        async def one(number: int) -> str:
            key = f"prefix/{number:05}"
            async with slots:
                await store.client.put_object(Bucket=store.bucket, Key=key, Body=b"")
            return f"s3://{store.bucket}/{key}"

        return list(await asyncio.gather(*(one(number) for number in range(count))))

    async def test_more_than_a_thousand(
        self, proxy: S3Proxy, store: S3Store, s3_store: S3Store
    ) -> None:
        """1,000 keys a request, and none is forgotten."""
        real = await self._fill(s3_store, 5)
        missing = [f"s3://{s3_store.bucket}/prefix/missing/{number}" for number in range(996)]
        uris = [*real[:4], *missing, real[4]]
        report = await store.delete_many(uris)

        assert (len(report.deleted), dict(report.failed)) == (1001, {})
        assert [request.method for request in proxy.requests].count("POST") == 1
        assert [request.method for request in proxy.requests].count("DELETE") == 1
        assert [uri async for uri in s3_store.iter_uris()] == []

    async def test_partial_errors_are_read_and_tried_again(
        self, proxy: S3Proxy, store: S3Store, s3_store: S3Store
    ) -> None:
        """A key that S3 refuses inside of a 200 answer is tried again, then reported."""
        uris = await self._fill(s3_store, 3)
        key = uris[1].removeprefix(f"s3://{s3_store.bucket}/")
        posts = 0

        async def refuse(request: Request, forward: Forward) -> bytes:
            nonlocal posts
            if request.method == "POST":
                posts += 1
                body = (
                    "<DeleteResult>"
                    f"<Deleted><Key>{uris[0].removeprefix(f's3://{s3_store.bucket}/')}</Key></Deleted>"
                    f"<Deleted><Key>{uris[2].removeprefix(f's3://{s3_store.bucket}/')}</Key></Deleted>"
                    f"<Error><Key>{key}</Key><Code>InternalError</Code></Error></DeleteResult>"
                )
                head = (
                    f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                )
                return (head + body).encode()
            if request.method == "DELETE":
                return answer("500 Internal Error", "InternalError")
            return await forward()

        proxy.rule = refuse
        report = await store.delete_many(uris)

        assert posts == 1
        assert proxy.count("DELETE") == 2
        assert list(report.failed) == [uris[1]]
        assert "InternalError" in report.failed[uris[1]]
        with pytest.raises(CleanUpError, match="InternalError"):
            report.raise_for_failures()

    async def test_a_key_that_the_answer_does_not_mention(
        self, proxy: S3Proxy, store: S3Store, s3_store: S3Store
    ) -> None:
        """Silence about a key is no confirmation: it is deleted by itself."""
        uris = await self._fill(s3_store, 3)

        async def forget(request: Request, forward: Forward) -> bytes:
            if request.method == "POST":
                body = "<DeleteResult></DeleteResult>"
                head = (
                    f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                )
                return (head + body).encode()
            return await forward()

        proxy.rule = forget
        report = await store.delete_many(uris)

        assert len(report.failed) == 3
        assert "did not mention" in report.failed[uris[0]]

    @pytest.mark.parametrize(
        "refusal",
        [
            answer("501 Not Implemented", "NotImplemented"),
            answer("400 Bad Request", "MissingContentMD5"),
            answer("411 Length Required", "MissingContentLength"),
        ],
        ids=["501", "MissingContentMD5", "411"],
    )
    async def test_a_server_without_bulk_delete(
        self, proxy: S3Proxy, store: S3Store, s3_store: S3Store, refusal: bytes
    ) -> None:
        """A server that refuses the bulk call gets single requests, from then on at once."""

        async def refuse(request: Request, forward: Forward) -> bytes:
            return refusal if request.method == "POST" else await forward()

        proxy.rule = refuse
        first = await store.delete_many(await self._fill(s3_store, 3))
        again = await store.delete_many(await self._fill(s3_store, 3))

        assert (len(first.deleted), len(again.deleted)) == (3, 3)
        assert (proxy.count("POST"), proxy.count("DELETE")) == (1, 6)
        assert [uri async for uri in s3_store.iter_uris()] == []

    async def test_foreign_uris_are_refused(self, proxy: S3Proxy, store: S3Store) -> None:
        """One URI outside of the prefix and nothing at all is deleted."""
        inside = f"s3://{store.bucket}/prefix/a"
        for outside in (f"s3://{store.bucket}/other/a", "s3://elsewhere/prefix/a", inside[:-2]):
            with pytest.raises(ForeignUriError):
                await store.delete_many([inside, outside])

        assert proxy.requests == []

    async def test_batch_delete_over_buckets(self, s3: S3Server, s3_store: S3Store) -> None:
        """batch_delete_s3_objects takes URIs of several buckets."""
        other = f"{s3_store.bucket[:50]}-other"
        await s3_store.client.create_bucket(Bucket=other)
        await s3_store.client.put_object(Bucket=other, Key="k", Body=b"")
        uris = [*await self._fill(s3_store, 2), f"s3://{other}/k"]
        report = await batch_delete_s3_objects(s3_store.client, uris)

        assert sorted(report.deleted) == sorted(uris)
        assert not await is_s3_object_exists(s3_store.client, other, "k")


class TestLifetimes:
    async def test_a_closed_store(self, s3: S3Server) -> None:
        """A store that was not entered says how to enter it."""
        store = s3.open_store(bucket="bucket")
        with pytest.raises(StoreClosedError, match="async with store"):
            await put_s3(pk="u", api_calls=calls(), store=store)
        with pytest.raises(StoreClosedError):
            _ = store.client

    async def test_entered_twice(self, s3_store: S3Store) -> None:
        """A store is open once at a time."""
        with pytest.raises(StoreClosedError, match="entered already"):
            async with s3_store:
                raise AssertionError("not reached")

    def test_one_loop_after_the_other(self, s3: S3Server) -> None:
        """A store at module level can be opened in one event loop after another."""
        store = s3.open_store(bucket="loops")

        async def use() -> int:
            async with store:
                if not await is_s3_object_exists(store.client, "loops", "x"):
                    await store.client.create_bucket(Bucket="loops")
                put = await put_s3(pk="u", api_calls=calls(), store=store)
                put.to_values()
                return len([uri async for uri in store.iter_uris()])

        assert [asyncio.run(use()), asyncio.run(use())] == [2, 4]

    async def test_a_borrowed_client_that_was_closed(self, s3: S3Server) -> None:
        """The first call on a closed client of the user's own gives our error."""
        async with get_session().create_client("s3", **s3.client_arguments) as s3_client:
            pass
        with pytest.raises(StoreClosedError, match="closed"):
            await put_s3(calls(), s3_client, "u", "bucket", "prefix")

    async def test_something_that_is_no_client(self) -> None:
        """Anything else in place of a client is refused at once."""
        with pytest.raises(InvalidInputError, match="aiobotocore"):
            await put_s3(calls(), object(), "u", "bucket", "prefix")

    async def test_a_store_that_closes_while_a_block_is_open(
        self, sqlite: Database, s3_store: S3Store, s3: S3Server
    ) -> None:
        """The commit stands; what could not be deleted is reported."""
        await create(sqlite, s3_store)
        async with sqlite.session() as session:
            task = await load(session)
            old = task.html
            async with s3.open_store(bucket=s3_store.bucket, prefix="prefix") as store:
                transaction = blob_transaction(session, store=store)
                tx = await transaction.__aenter__()
                put = await tx.put_s3(pk="u", api_calls=calls(b"2", b"j", task)[:1])
                await session.execute(sa.update(Task).values(**put.to_values()))
            await transaction.__aexit__(None, None, None)

        assert list(tx.report.failed) == [old]
        assert await contents(s3_store, sqlite.engine, orphans=(old or "",)) == (b"2", b"i")


class TestOpening:
    """The loop goes on meanwhile; what is wrong with the configuration is said in our words."""

    async def test_an_endpoint_that_is_none(self, s3: S3Server) -> None:
        """An endpoint without a scheme is bad input."""
        store = dataclasses.replace(s3, endpoint_url="localhost").open_store(bucket="bucket")
        with pytest.raises(InvalidInputError, match="localhost"):
            async with store:
                raise AssertionError("not reached")

    async def test_a_profile_that_is_none(
        self, s3: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A profile that does not exist is an access error."""
        monkeypatch.setenv("AWS_PROFILE", "nobody-made-this")
        with pytest.raises(StoreAccessError, match="nobody-made-this"):
            async with s3.open_store(bucket="bucket"):
                raise AssertionError("not reached")

    async def test_no_credentials(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without credentials nothing is sent, and the error says so."""
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "not-there")
        monkeypatch.setenv("AWS_CONFIG_FILE", "not-there")
        async with open_store(
            bucket="bucket", endpoint_url=s3.endpoint_url, region_name="us-east-1"
        ) as store:
            with pytest.raises(BlobUploadError, match="NoCredentials") as caught:
                await put_s3(pk="u", api_calls=calls(), store=store)

            assert isinstance(caught.value.__cause__, StoreAccessError)
            assert store.runtime.second_deletes == ()

    async def test_cancelled_while_credentials_are_asked_for(
        self, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A cancellation ends the opening, though it waits for somebody else's answer."""
        asked, unanswered = asyncio.Event(), asyncio.Event()

        async def rule(_request: Request, _forward: Forward) -> None:
            asked.set()
            await unanswered.wait()

        proxy.rule = rule
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "not-there")
        monkeypatch.setenv("AWS_CONFIG_FILE", "not-there")
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{proxy.endpoint_url}/keys")
        store = open_store(bucket="bucket", region_name="us-east-1")
        opening = asyncio.create_task(store.__aenter__())
        await asked.wait()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

        assert "closed" in repr(store)

    async def test_the_event_loop_goes_on(self, s3: S3Server, s3_store: S3Store) -> None:
        """The client is made in another thread; its requests are sent by the loop's own."""
        made_in: list[int] = []
        sent_in: list[int] = []

        class Connections(AIOHTTPSession):  # type: ignore[misc]  # aiobotocore has no types
            def __init__(self, **arguments: Any) -> None:
                made_in.append(threading.get_ident())
                super().__init__(**arguments)

            async def send(self, request: Any) -> Any:
                sent_in.append(threading.get_ident())
                return await super().send(request)

        config = AioConfig(proxies={}, http_session_cls=Connections)
        if AioConfig().merge(config).http_session_cls is not Connections:
            pytest.skip("this aiobotocore forgets the class when it merges configurations")
        async with s3.open_store(bucket=s3_store.bucket, config=config) as store:
            assert [uri async for uri in store.iter_uris()] == []

        assert threading.get_ident() not in made_in
        assert len(made_in) == 1
        assert sent_in == [threading.get_ident()]
