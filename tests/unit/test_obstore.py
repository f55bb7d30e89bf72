"""The store on obstore without a server: URLs, options, what its errors mean, how parts are cut."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore.exceptions as theirs
import pytest

from aioblobcol import (
    BlobChangedError,
    BlobNotFoundError,
    InvalidBucketError,
    InvalidInputError,
    InvalidPrefixError,
    InvalidPutArgumentsError,
    StoreAccessError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
)
from aioblobcol._sources import PART_BYTES, Part
from aioblobcol._store._base import CopyRequest, WriteRequest
from aioblobcol._store._obstore_backends import HttpOptions, remote, split_url
from aioblobcol._store._obstore_errors import translated, translating
from aioblobcol._store._obstore_streams import MAX_PARTS, _chunk_bytes, _pieces
from aioblobcol.obstore import open_obstore
from aioblobcol.testing.conformance import BODY, listed, put, put_request, uri_of

ANSWER = (
    "Generic S3 error: Error performing PUT http://h/b/k?token=secret in 1ms{after} - Server "
    "returned non-2xx status code: {status} Whatever: <Error><Code>{code}</Code><Message>m"
    "</Message></Error>\n\nDebug source:\nGeneric {{ retries: {retries}, max_retries: 2, }}"
)
NO_ANSWER = (
    "Generic S3 error: Error performing PUT http://h/b/k?token=secret in 1ms - HTTP error: error "
    "sending request\n\nDebug source:\nRetryErrorImpl { retries: 0, max_retries: 0, }"
)


def answer(status: int, *, code: str = "Code", retries: int = 0) -> str:
    after = f", after {retries} retries, max_retries: 2" if retries else ""
    return ANSWER.format(status=status, code=code, retries=retries, after=after)


class TestOpening:
    @pytest.mark.parametrize(
        ("url", "arguments", "root"),
        [
            ("s3://b/p/q", {}, "s3://b/p/q/"),
            ("s3://b/p/", {"prefix": "/q/"}, "s3://b/p/q/"),
            ("s3://b/a%20b", {"bucket": "b"}, "s3://b/a b/"),
            ("gs://b", {"prefix": "p"}, "s3://b/p/"),
            ("az://c/p", {}, "s3://c/p/"),
            ("file:///tmp/x", {}, "s3://local/"),
            ("file:///tmp/x", {"bucket": "docs", "prefix": "p"}, "s3://docs/p/"),
            ("memory://", {}, "s3://memory/"),
            ("memory://docs", {"prefix": "p"}, "s3://docs/p/"),
        ],
    )
    def test_urls(self, url: str, arguments: dict[str, Any], root: str) -> None:
        """Every URL gives a bucket and a prefix, from which URIs are made."""
        store = open_obstore(url, **arguments)

        assert uri_of(store, "") == root
        assert root in repr(store)
        assert "closed" in repr(store)

    @pytest.mark.parametrize(
        ("url", "arguments", "error"),
        [
            ("https://b/p", {}, InvalidInputError),
            ("/tmp/x", {}, InvalidInputError),
            (Path("/tmp/x"), {}, InvalidInputError),
            ("file://tmp/x", {}, InvalidInputError),
            ("file:x", {}, InvalidInputError),
            ("memory://b/p", {}, InvalidInputError),
            ("memory://", {"config": {"region": "x"}}, InvalidInputError),
            ("memory://", {"retry_config": {"max_retries": 1}}, InvalidInputError),
            ("file:///tmp/x", {"client_options": {"timeout": "1s"}}, InvalidInputError),
            ("s3://b?region=x", {}, InvalidInputError),
            ("s3://key:secret@b", {}, InvalidInputError),
            ("s3://b", {"bucket": "c"}, InvalidInputError),
            ("s3://", {}, InvalidBucketError),
            ("s3://b/../c", {}, InvalidPrefixError),
            ("s3://b", {"max_concurrency": 0}, InvalidInputError),
            ("s3://b", {"request_seconds": 0}, InvalidInputError),
            ("s3://b", {"drain_seconds": -1}, InvalidInputError),
            ("s3://b", {"max_bytes_in_flight": PART_BYTES - 1}, InvalidInputError),
        ],
    )
    def test_bad_input(self, url: Any, arguments: dict[str, Any], error: type[Exception]) -> None:
        """What cannot be meant is refused at once, and no secret is in the message."""
        with pytest.raises(error) as raised:
            open_obstore(url, **arguments)
        assert "secret" not in str(raised.value)

    async def test_options_that_obstore_does_not_know(self, tmp_path: Path) -> None:
        """They are refused on entering, and the store can be entered again."""
        (tmp_path / "file").touch()
        places: list[tuple[str, dict[str, Any]]] = [
            ("s3://b", {"regoin": "x"}),
            ("file:///tmp", {"fsync_": True}),
            ((tmp_path / "file").as_uri(), {}),
        ]
        for url, config in places:
            store = open_obstore(url, config=config)
            for _ in range(2):
                with pytest.raises(InvalidInputError, match="cannot open"):
                    await store.__aenter__()

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({}, {"unsigned_payload": True}),
            ({"unsigned_payload": False}, {"unsigned_payload": False}),
            ({"endpoint": "https://h"}, {"endpoint": "https://h", "unsigned_payload": True}),
            ({"AWS_ENDPOINT_URL": "http://h"}, {"AWS_ENDPOINT_URL": "http://h"}),
        ],
    )
    def test_bodies_are_signed_where_nothing_else_protects_them(
        self, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], expected: dict[str, Any]
    ) -> None:
        """Over https bodies are not hashed for the signature; over http they are."""
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
            monkeypatch.delenv(name, raising=False)
        made: list[dict[str, Any]] = []

        def make(_bucket: str, **arguments: Any) -> None:
            made.append(arguments)

        monkeypatch.setattr(
            "aioblobcol._store._obstore_backends._REMOTE", {"s3": make, "gs": make, "az": make}
        )
        backend = remote(
            split_url("s3://b"), config, HttpOptions(None, None, None), request_seconds=60
        )
        backend.make(2)
        backend.make(0)

        assert made[0]["config"] == expected
        assert made[1]["config"] == {"disable_bulk_delete": True, **expected}
        assert [each["retry_config"]["max_retries"] for each in made] == [2, 0]
        assert made[0]["client_options"].get("allow_http") is (
            True if "AWS_ENDPOINT_URL" in config else None
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "expected", "may_have_taken_effect"),
        [
            (FileNotFoundError(answer(404)), BlobNotFoundError, False),
            (theirs.PermissionDeniedError(answer(403)), StoreAccessError, False),
            (theirs.PermissionDeniedError(answer(403, retries=1)), StoreAccessError, True),
            (theirs.UnauthenticatedError(answer(401)), StoreAccessError, False),
            (PermissionError("no"), StoreAccessError, False),
            (theirs.PreconditionError(answer(412)), BlobChangedError, False),
            (theirs.AlreadyExistsError(answer(409)), StoreUnavailableError, True),
            (theirs.GenericError(answer(400)), StoreError, False),
            (theirs.GenericError(answer(400, retries=2)), StoreError, True),
            (theirs.GenericError(answer(408)), StoreUnavailableError, True),
            (theirs.GenericError(answer(429)), StoreUnavailableError, True),
            (theirs.GenericError(answer(503)), StoreUnavailableError, True),
            (theirs.GenericError(NO_ANSWER), StoreUnavailableError, True),
            (theirs.GenericError("something new"), StoreUnavailableError, True),
            (theirs.GenericError("Generic LocalFileSystem error: full"), StoreError, False),
            (theirs.InvalidPathError("x"), StoreError, False),
            (NotImplementedError("Operation `x` not yet"), StoreError, False),
            (TimeoutError(), StoreUnavailableError, True),
            (OSError(NO_ANSWER), StoreUnavailableError, True),
            (ValueError("Could not parse path"), StoreError, False),
        ],
    )
    def test_what_they_mean(
        self, error: Exception, expected: type[StoreError], may_have_taken_effect: bool
    ) -> None:
        """An error is definite only where it is known to be, and tells nobody's secret."""
        ours = translated("put", "s3://b/k", error)

        assert type(ours) is expected
        assert ours.may_have_taken_effect is may_have_taken_effect
        assert (ours.operation, ours.uri) == ("put", "s3://b/k")
        assert "secret" not in str(ours)
        assert "Debug" not in str(ours)

    def test_the_servers_own_words(self) -> None:
        """The code and message of the server are told, or the status."""
        told = translated("put", "s3://b/k", theirs.GenericError(answer(400, code="BadDigest")))
        status = "Server returned non-2xx status code: 418 I'm a teapot: "

        assert told.code == "BadDigest m"
        assert translated("put", "s3://b/k", theirs.GenericError(status)).code == "HTTP 418"

    @pytest.mark.parametrize("error", [KeyError("bug"), StoreClosedError("x"), KeyboardInterrupt()])
    def test_what_is_not_theirs_goes_on(self, error: BaseException) -> None:
        """Mistakes and errors of our own pass as they are."""
        with pytest.raises(type(error)) as raised, translating("put", "s3://b/k"):
            raise error
        assert raised.value is error

    def test_theirs_are_the_cause(self) -> None:
        """The error of obstore can be looked at."""
        error = theirs.GenericError("x")
        with pytest.raises(StoreError) as raised, translating("put", "s3://b/k"):
            raise error
        assert raised.value.__cause__ is error


class TestCutting:
    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            (None, PART_BYTES),
            (0, PART_BYTES),
            (PART_BYTES * MAX_PARTS, PART_BYTES),
            (PART_BYTES * MAX_PARTS + 1, PART_BYTES + 2**20),
            (5 * 2**40, 525 * 2**20),
        ],
    )
    def test_ten_thousand_parts_are_enough(self, size: int | None, expected: int) -> None:
        """Parts grow with the size, so that S3's greatest object has 10,000 at most."""
        assert _chunk_bytes(size) == expected
        assert (size or 0) <= MAX_PARTS * expected

    def test_small_pieces_are_joined(self) -> None:
        """No byte is lost, and there are few pieces."""
        body = bytes(range(256)) * 12_000
        sizes = [1, 0, 100_000, 400_000, 300_000, 17] * 4
        pieces, at = [], 0
        for size in sizes:
            pieces.append(memoryview(body)[at : at + size])
            at += size
        joined = list(_pieces(pieces))

        assert b"".join(joined) == body[:at]
        assert len(joined) < len(sizes) / 2

    def test_large_pieces_are_not_copied(self) -> None:
        """A large piece is handed over as it is."""
        large = bytes(2**20)

        assert [each is large for each in _pieces([large, large])] == [True, True]


class TestRefusals:
    """What this store cannot do it says, before anything is sent."""

    @pytest.mark.parametrize(
        ("metadata", "arguments"),
        [
            ({}, {"Tagging": "a=b"}),
            ({}, {"ChecksumAlgorithm": "SHA256"}),
            ({}, {"ContentType": 1}),
            ({"content-type": "x"}, {}),
            ({"CacheControl": "x"}, {}),
        ],
    )
    async def test_arguments(self, metadata: dict[str, str], arguments: dict[str, Any]) -> None:
        """Arguments that obstore has no place for, and metadata that it would mistake."""
        async with open_obstore("memory://", prefix="p") as store:
            request = put_request(uri_of(store), b"", metadata=metadata, arguments=arguments)

            with pytest.raises(InvalidPutArgumentsError, match=r"obstore|string"):
                store.check_put(request)

    async def test_other_buckets(self) -> None:
        """Objects elsewhere are neither read, written, nor copied."""
        async with open_obstore("memory://", prefix="p") as store:
            for verb in (store.get, store.head):
                with pytest.raises(StoreError, match="this store's bucket"):
                    await verb("s3://other/p/id=1")
            with pytest.raises(StoreError, match="this store's bucket"):
                await put(store, "s3://other/p/id=1", BODY)
            with pytest.raises(StoreError, match="another bucket"):
                await store.copy(CopyRequest("c", uri_of(store), "s3://other/p/id=1"))
            assert await listed(store) == []

    @pytest.mark.parametrize("key", ["p/id=1/", "/p/id=1", "p//id=1", "p/../id=1"])
    async def test_keys_that_would_be_another(self, key: str) -> None:
        """Keys are normalized by obstore; one that would change names no object here."""
        async with open_obstore("memory://", prefix="p") as store:
            await put(store, "s3://memory/p/id=1", BODY)
            for verb in (store.get, store.head):
                with pytest.raises(StoreError):
                    await verb(f"s3://memory/{key}")

    async def test_urls_of_files(self) -> None:
        """Where there is no server there are no URLs."""
        async with open_obstore("memory://", prefix="p") as store:
            assert not store.capabilities.presigned_get
            with pytest.raises(InvalidInputError, match="no URLs"):
                await store.presign(uri_of(store), expires_in=timedelta(minutes=1))

    async def test_parts_in_another_order(self) -> None:
        """A part out of its order is refused, and nothing is left."""
        async with open_obstore("memory://", prefix="p") as store:
            with pytest.raises(InvalidInputError, match="in order"):
                async with store.open_writer(WriteRequest("c", uri_of(store), {})) as writer:
                    await writer.write(Part(2, [b"x"], 1, 0))
            assert await listed(store) == []


class TestFiles:
    async def test_where_they_are(self, tmp_path: Path) -> None:
        """An object is a file of its name under the directory, which is made."""
        url = (tmp_path / "sp ace").as_uri()
        async with open_obstore(url, prefix="p") as store:
            await put(store, uri_of(store, "a=1/id=1"), BODY)

        assert (tmp_path / "sp ace/p/a=1/id=1").read_bytes() == BODY

    async def test_what_a_killed_process_leaves(self, tmp_path: Path) -> None:
        """A file that is being written is hidden from listings, and its object is not there."""
        async with open_obstore(tmp_path.as_uri(), prefix="p") as store:
            uri = uri_of(store, "id=1")
            async with store.open_writer(WriteRequest("c", uri, {})) as writer:
                await writer.write(Part(1, [bytes(PART_BYTES)], PART_BYTES, 0))
                (hidden,) = (tmp_path / "p").iterdir()
                assert hidden.name.startswith("id=1#")
                assert await listed(store) == []
            assert list((tmp_path / "p").iterdir()) == []

    async def test_nothing_outside(self, tmp_path: Path) -> None:
        """Files beside the prefix are not listed, and its name is no mere beginning."""
        async with open_obstore(tmp_path.as_uri(), prefix="p") as store:
            await put(store, "s3://local/p2/id=1", BODY)
            await put(store, "s3://local/other/id=1", BODY)
            await put(store, uri_of(store, "id=1"), BODY)

            assert await listed(store) == [uri_of(store, "id=1")]


def test_it_works_in_one_loop_after_another() -> None:
    """A store at module level serves program after program; memory keeps what it has."""
    store = open_obstore("memory://", prefix="p")

    async def run() -> bool:
        async with store:
            there = await listed(store)
            await put(store, uri_of(store), BODY)
            return bool(there)

    assert [asyncio.run(run()) for _ in range(2)] == [False, True]
