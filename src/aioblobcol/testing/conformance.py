"""What every store must do, as tests: for the stores here, and for one of your own.

::

    import pytest_asyncio

    from aioblobcol.testing.conformance import StoreConformance


    class TestMyStore(StoreConformance):
        @pytest_asyncio.fixture
        async def store(self):
            async with MyStore(bucket="bucket", prefix="conformance") as store:
                yield store

The fixture gives an open store with a prefix, under which nothing is. What a store's
`Capabilities` do not claim is not tested. Needs pytest and pytest-asyncio; say
``pytest.register_assert_rewrite("aioblobcol.testing.conformance")`` in ``conftest.py`` to see the
values of what failed.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import zlib
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, Final

import aiohttp
import pytest

from .._sources import PART_BYTES, Part, Payload
from .._store._base import (
    READ_CHUNK_BYTES,
    ByteRange,
    CopyRequest,
    PutRequest,
    Store,
    WriteRequest,
)
from .._store._metadata import encode_metadata
from .._uri import root_uri
from ..errors import (
    BlobChangedError,
    BlobNotFoundError,
    ForeignUriError,
    InvalidInputError,
    InvalidPutArgumentsError,
    StoreClosedError,
    StoreError,
)

BODY: Final = b"0123456789"
COLUMN: Final = "body"
HANDFUL: Final = 1001
"""More keys than one request of S3 deletes."""

# Each lies in another place by bytes, by UTF-16 and by the alphabet.
SORTED_NAMES: Final = (
    "Z/id=1",
    "a-b/id=1",
    "a/id=1",
    "a/id=12",
    "a/id=2",
    "a0/id=1",
    "\u00e4/id=1",
    "\uffee/id=1",
    "\U0001f600/id=1",
)
ODD_NAMES: Final = (
    "col=c/md5=0/id=1",
    "sp ace/id=1",
    "per%20cent/id=1",
    "pl+us/id=1",
    "quest?ion/id=1",
    "ha#sh/id=1",
    "am&p/id=1",
    "quo'te/id=1",
    "ti~lde/id=1",
    "\u00fc \u2603/id=1",
)


class AbortedOnPurpose(Exception):  # noqa: N818 - what a test raises is not an error of its own
    """Raised inside of a block that must undo its work."""


@pytest.mark.asyncio
class StoreConformance:
    """Subclass it, with a fixture ``store``."""

    # --- whole objects

    async def test_what_is_put_is_read(self, store: Store) -> None:
        """An object has the bytes that were put, and the first attempt's answer is told."""
        uri = uri_of(store)

        assert await put(store, uri, BODY) is True
        assert await store.get(uri) == BODY

    async def test_an_empty_object(self, store: Store) -> None:
        """An object may have no bytes."""
        uri = uri_of(store)
        await put(store, uri, b"")

        assert await store.get(uri) == b""
        assert (await store.head(uri)).size == 0
        async with store.open(uri) as reader:
            assert await reader.read() == b""

    async def test_put_again(self, store: Store) -> None:
        """A PUT that is repeated replaces the object as a whole."""
        uri = uri_of(store)
        await put(store, uri, BODY)
        await put(store, uri, b"new")

        assert await store.get(uri) == b"new"

    @pytest.mark.parametrize("name", ODD_NAMES)
    async def test_names_arrive_as_they_are(self, store: Store, name: str) -> None:
        """Whatever characters stand in a prefix or a primary key, the object has that name."""
        uri = uri_of(store, name)
        await put(store, uri, BODY)

        assert await store.get(uri) == BODY
        assert await listed(store) == [uri]
        assert (await store.delete_many([uri])).deleted == (uri,)
        assert await listed(store) == []

    async def test_head(self, store: Store) -> None:
        """HEAD tells the size, and an aware time in UTC if it tells one."""
        uri = uri_of(store)
        await put(store, uri, BODY)
        info = await store.head(uri)

        assert (info.uri, info.size) == (uri, len(BODY))
        assert info.modified_at is None or info.modified_at.utcoffset() == timedelta(0)
        assert info.modified_at is None or (
            abs(info.modified_at - datetime.now(timezone.utc)) < timedelta(minutes=15)
        )

    async def test_metadata(self, store: Store) -> None:
        """Metadata come back in lower case, in any script, and so does the content type."""
        if not store.capabilities.metadata:
            pytest.skip("the store keeps no metadata")
        given = {"title": "Gr\u00fc\u00dfe \u2603", "plain": "text", "Upper": "=?UTF-8?B?eA==?="}
        uri = uri_of(store)
        await put(store, uri, BODY, metadata=given, arguments={"ContentType": "text/x-test"})
        async with store.open(uri) as reader:
            opened = reader.info

        for info in (await store.head(uri), opened):
            assert dict(info.metadata) == {name.lower(): value for name, value in given.items()}
            assert info.content_type == "text/x-test"

    @pytest.mark.parametrize("name", ["Body", "Bucket", "Key"])
    async def test_the_librarys_own_arguments_are_refused(self, store: Store, name: str) -> None:
        """What names the object and its bytes is no argument of a column's."""
        request = put_request(uri_of(store), BODY, arguments={name: "x"})

        with pytest.raises(InvalidPutArgumentsError):
            store.check_put(request)

    async def test_what_is_not_there(self, store: Store) -> None:
        """Reading a missing object says that it is missing, and names it."""
        uri = uri_of(store)

        for verb in (store.get, store.head, read_all(store)):
            with pytest.raises(BlobNotFoundError) as raised:
                await verb(uri)
            assert raised.value.uri == uri
            assert not raised.value.may_have_taken_effect

    # --- reading

    async def test_chunks(self, store: Store) -> None:
        """A large object is read in chunks of a bounded size, and is complete."""
        uri, body = uri_of(store), noise(3 * READ_CHUNK_BYTES + 17)
        await put(store, uri, body)
        async with store.open(uri) as reader:
            assert reader.info.size == len(body)
            chunks = [chunk async for chunk in reader]

        assert b"".join(chunks) == body
        assert max(map(len, chunks)) <= READ_CHUNK_BYTES

    async def test_leaving_early(self, store: Store) -> None:
        """A reader that is left early is of no use any more, and the store is."""
        uri = uri_of(store)
        await put(store, uri, noise(4 * READ_CHUNK_BYTES))
        async with store.open(uri) as reader:
            await anext(reader)

        with pytest.raises(StoreClosedError):
            await reader.read()
        assert (await store.head(uri)).size == 4 * READ_CHUNK_BYTES

    @pytest.mark.parametrize(
        "part", [ByteRange(0, 1), ByteRange(3, 8), ByteRange(4), ByteRange(0), ByteRange(8, 99)]
    )
    async def test_a_part(self, store: Store, part: ByteRange) -> None:
        """A part has these bytes, as far as there are any, and the size is the whole object's."""
        uri = uri_of(store)
        await put(store, uri, BODY)
        async with store.open(uri, part=part) as reader:
            assert reader.info.size == len(BODY)
            assert await reader.read() == BODY[part.start : part.stop]

    @pytest.mark.parametrize(
        "part", [ByteRange(10), ByteRange(10, 12), ByteRange(99), ByteRange(3, 3)]
    )
    async def test_a_part_without_bytes(self, store: Store, part: ByteRange) -> None:
        """A part at the object's end, beyond it, or of no length has no bytes."""
        uri = uri_of(store)
        await put(store, uri, BODY)
        async with store.open(uri, part=part) as reader:
            assert (reader.info.size, await reader.read()) == (len(BODY), b"")

        with pytest.raises(BlobNotFoundError):
            async with store.open(uri_of(store, "missing/id=1"), part=part):
                pass

    async def test_a_part_of_an_empty_object(self, store: Store) -> None:
        """An empty object has an empty part."""
        uri = uri_of(store)
        await put(store, uri, b"")
        async with store.open(uri, part=ByteRange(0, 5)) as reader:
            assert (reader.info.size, await reader.read()) == (0, b"")

    @pytest.mark.parametrize("part", [ByteRange(-1), ByteRange(3, 2), ByteRange(0, -1)])
    async def test_no_part(self, store: Store, part: ByteRange) -> None:
        """A range that no object has is refused."""
        with pytest.raises(InvalidInputError):
            async with store.open(uri_of(store), part=part):
                pass

    async def test_the_same_version(self, store: Store) -> None:
        """A read can be tied to a version: it is refused once the object was overwritten."""
        if not store.capabilities.if_match:
            pytest.skip("the store has no versions to be tied to")
        uri = uri_of(store)
        await put(store, uri, BODY)
        etag = (await store.head(uri)).etag
        assert etag is not None
        async with store.open(uri, part=ByteRange(5), etag=etag) as reader:
            assert (reader.info.etag, await reader.read()) == (etag, BODY[5:])
        await put(store, uri, b"another body")

        with pytest.raises(BlobChangedError):
            async with store.open(uri, part=ByteRange(5), etag=etag):
                pass

    async def test_presigned_urls(self, store: Store) -> None:
        """Anybody can GET the object by a URL that was signed for it."""
        if not store.capabilities.presigned_get:
            pytest.skip("the store signs no URLs")
        uri = uri_of(store, "a=b/sp ace/id=1")
        await put(store, uri, BODY)
        url = await store.presign(uri, expires_in=timedelta(minutes=5))
        if not url.startswith("http"):
            pytest.skip("nothing answers under the store's URLs")
        async with aiohttp.ClientSession() as http, http.get(url) as answer:
            assert (answer.status, await answer.read()) == (200, BODY)

    @pytest.mark.parametrize("expires_in", [timedelta(0), timedelta(days=8)])
    async def test_presigned_urls_expire(self, store: Store, expires_in: timedelta) -> None:
        """No URL lives for no time, or for more than 7 days."""
        with pytest.raises(InvalidInputError):
            await store.presign(uri_of(store), expires_in=expires_in)

    # --- deleting and copying

    async def test_delete(self, store: Store) -> None:
        """Exactly the named objects go, however many are named; missing ones count as deleted."""
        there = [uri_of(store, f"a/id={number}") for number in (1, 2, 12)]
        for uri in there:
            await put(store, uri, BODY)
        missing = [uri_of(store, f"missing/id={number}") for number in range(HANDFUL)]
        report = await store.delete_many([there[0], *missing, there[1], there[0]])

        assert set(report.deleted) == {there[0], there[1], *missing}
        assert report.failed == {}
        assert await listed(store) == [there[2]]

    async def test_delete_nothing(self, store: Store) -> None:
        """No URI, no request, no failure."""
        report = await store.delete_many([])

        assert (report.deleted, dict(report.failed)) == ((), {})

    async def test_delete_only_ones_own(self, store: Store) -> None:
        """One URI outside of the prefix, and nothing at all is deleted."""
        uri = uri_of(store)
        await put(store, uri, BODY)
        foreign = [
            f"s3://{store.bucket}/{store.prefix}x/id=1",
            f"s3://{store.bucket}x/{store.prefix}/id=1",
            f"{root_uri(store.bucket, store.prefix)}../id=1",
        ]

        for each in foreign:
            with pytest.raises(ForeignUriError):
                await store.delete_many([uri, each])
        assert await listed(store) == [uri]

    async def test_copy(self, store: Store) -> None:
        """A copy has the bytes and the metadata, and outlives its source."""
        source, copy = uri_of(store, "a=1/id=1"), uri_of(store, "new/sp ace/id=2")
        await put(
            store, source, BODY, metadata={"k": "v"}, arguments={"ContentType": "text/x-test"}
        )

        assert await store.copy(CopyRequest(COLUMN, copy, source)) is True
        await store.delete_many([source])
        info = await store.head(copy)
        assert await store.get(copy) == BODY
        if store.capabilities.metadata:
            assert (dict(info.metadata), info.content_type) == ({"k": "v"}, "text/x-test")

    async def test_copy_of_nothing(self, store: Store) -> None:
        """A missing source is what the error is about, and nothing is made."""
        source, copy = uri_of(store, "a/id=1"), uri_of(store, "b/id=1")

        with pytest.raises(BlobNotFoundError) as raised:
            await store.copy(CopyRequest(COLUMN, copy, source))
        assert raised.value.uri == source
        assert await listed(store) == []

    # --- listing

    async def test_the_order_of_listings(self, store: Store) -> None:
        """Objects are listed in the order of the bytes of their URIs, with their sizes."""
        for size, name in reversed(list(enumerate(SORTED_NAMES))):
            await put(store, uri_of(store, name), b"x" * size)
        found = [(each.uri, each.size) async for each in store.iter_objects()]

        assert found == [(uri_of(store, name), size) for size, name in enumerate(SORTED_NAMES)]
        assert await listed(store) == [uri_of(store, name) for name in SORTED_NAMES]
        times = [each.modified_at async for each in store.iter_objects(with_times=True)]
        assert len(times) == len(SORTED_NAMES)
        assert all(at is not None and at.utcoffset() == timedelta(0) for at in times)

    async def test_listings_from_somewhere_on(self, store: Store) -> None:
        """A listing can begin after any URI, whether the object is there or not."""
        names = SORTED_NAMES
        for name in names:
            await put(store, uri_of(store, name), b"")

        for number, name in enumerate(names):
            found = [o.uri async for o in store.iter_objects(start_after=uri_of(store, name))]
            assert found == [uri_of(store, each) for each in names[number + 1 :]]
        between = uri_of(store, "a/id=10")
        found = [each.uri async for each in store.iter_objects(start_after=between)]
        assert found == [uri_of(store, each) for each in names[3:]]

    async def test_an_empty_listing(self, store: Store) -> None:
        """Where nothing was put nothing is listed."""
        assert await listed(store) == []

    # --- writers

    async def test_write_in_parts(self, store: Store) -> None:
        """Parts become one object, which is not visible before the block is left."""
        uri = uri_of(store)
        body = noise(2 * PART_BYTES + 17)
        request = WriteRequest(
            COLUMN, uri, encode_metadata({"k": "\u00fc"}), {"ContentType": "text/x-test"}
        )
        async with store.open_writer(request) as writer:
            for part in parts_of(body):
                await writer.write(part)
            writer.finish(zlib.crc32(body))
            assert await listed(store) == []

        info = await store.head(uri)
        assert info.size == len(body)
        assert same(await store.get(uri), body)
        if store.capabilities.metadata:
            assert (dict(info.metadata), info.content_type) == ({"k": "\u00fc"}, "text/x-test")

    async def test_write_in_any_order(self, store: Store) -> None:
        """Parts that are sent at once are put together by their numbers."""
        if store.capabilities.parts_at_once == 1:
            pytest.skip("the store takes one part after another")
        uri, body = uri_of(store), noise(2 * PART_BYTES + 17)
        async with store.open_writer(WriteRequest(COLUMN, uri, {}, size=len(body))) as writer:
            await asyncio.gather(*(writer.write(part) for part in reversed(parts_of(body))))
            writer.finish(zlib.crc32(body))

        assert same(await store.get(uri), body)

    @pytest.mark.parametrize("size", [0, 1, PART_BYTES])
    async def test_write_one_part(self, store: Store, size: int) -> None:
        """One part is enough, and may be short."""
        uri, body = uri_of(store), noise(size)
        part = Part(1, [body], size, zlib.crc32(body))
        async with store.open_writer(WriteRequest(COLUMN, uri, {}, size=size)) as writer:
            await writer.write(part)
            writer.finish(part.crc32)

        assert same(await store.get(uri), body)

    async def test_write_pieces(self, store: Store) -> None:
        """A part may come in pieces of any size, and of memory that is not theirs."""
        uri, body = uri_of(store), noise(PART_BYTES + 100_000)
        view = memoryview(body)
        cuts = [0, 1, 70_000, 5 * 2**20, PART_BYTES]
        pieces = [view[start:stop] for start, stop in itertools.pairwise(cuts)]
        last = bytes(view[PART_BYTES:])
        async with store.open_writer(WriteRequest(COLUMN, uri, {})) as writer:
            await writer.write(Part(1, pieces, PART_BYTES, zlib.crc32(view[:PART_BYTES])))
            await writer.write(Part(2, [last], len(last), zlib.crc32(last)))
            writer.finish(zlib.crc32(body))

        assert same(await store.get(uri), body)

    @pytest.mark.parametrize("written", [0, 1, PART_BYTES, 2 * PART_BYTES + 17])
    async def test_an_error_aborts(self, store: Store, written: int) -> None:
        """An error in the block leaves nothing behind, finished or not, and goes on."""
        uri, body = uri_of(store), noise(written)
        with pytest.raises(AbortedOnPurpose):
            async with store.open_writer(WriteRequest(COLUMN, uri, {})) as writer:
                for part in parts_of(body):
                    await writer.write(part)
                writer.finish(zlib.crc32(body))
                raise AbortedOnPurpose

        await nothing_is_left(store)

    async def test_what_is_not_finished_is_aborted(self, store: Store) -> None:
        """A block that is left without `finish` leaves nothing behind."""
        async with store.open_writer(WriteRequest(COLUMN, uri_of(store), {})) as writer:
            await writer.write(parts_of(noise(PART_BYTES))[0])

        await nothing_is_left(store)

    async def test_a_cancellation_aborts(self, store: Store) -> None:
        """A cancellation in the block leaves nothing behind, and goes on."""
        written = asyncio.Event()

        async def write() -> None:
            async with store.open_writer(WriteRequest(COLUMN, uri_of(store), {})) as writer:
                await writer.write(parts_of(noise(PART_BYTES))[0])
                written.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(write())
        await written.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await nothing_is_left(store)

    async def test_incomplete_uploads(self, store: Store) -> None:
        """An upload under way is listed, and cannot be completed once somebody aborted it."""
        if not store.capabilities.uploads:
            assert [each async for each in store.iter_uploads()] == []
            return
        uri, body = uri_of(store), noise(PART_BYTES)
        with pytest.raises(StoreError):
            async with store.open_writer(WriteRequest(COLUMN, uri, {})) as writer:
                await writer.write(parts_of(body)[0])
                (upload,) = [each async for each in store.iter_uploads()]
                assert (upload.uri, upload.upload_id) == (uri, writer.upload_id)
                await store.abort_upload(upload)
                writer.finish(zlib.crc32(body))

        await nothing_is_left(store)

    # --- its life

    async def test_closing_and_opening_again(self, store: Store) -> None:
        """A closed store says so, for every verb; opened again it has what it had."""
        uri, other = uri_of(store, "a/id=1"), uri_of(store, "b/id=1")
        await put(store, uri, BODY)
        opened: Any = store  # entering is not the protocol's
        await opened.__aexit__(None, None, None)
        for use in uses(store, uri, other):
            with pytest.raises(StoreClosedError):
                await use()
        await opened.__aenter__()

        assert await store.get(uri) == BODY
        assert await listed(store) == [uri]

    async def test_it_is_entered_once(self, store: Store) -> None:
        """A store that is open refuses to be entered again."""
        opened: Any = store
        with pytest.raises(StoreClosedError):
            await opened.__aenter__()

    async def test_capabilities(self, store: Store) -> None:
        """What a store can do makes sense."""
        can = store.capabilities

        assert can.parts_at_once >= 1
        assert can.parts_held >= 0


# --- short words for the tests -----------------------------------------------------------------


def uri_of(store: Store, name: str = "items/col=body/id=1") -> str:
    """Return the URI of a name under the store's prefix."""
    return root_uri(store.bucket, store.prefix) + name


def put_request(
    uri: str,
    body: bytes,
    *,
    metadata: Mapping[str, str] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> PutRequest:
    """Return a request with all that a store may look at."""
    payload = Payload(
        body,
        hashlib.md5(body, usedforsecurity=False).hexdigest(),
        hashlib.sha256(body).hexdigest(),
        zlib.crc32(body),
    )
    return PutRequest(COLUMN, uri, payload, encode_metadata(metadata or {}), arguments or {})


async def put(
    store: Store,
    uri: str,
    body: bytes,
    *,
    metadata: Mapping[str, str] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> bool:
    """Store an object as the library does."""
    request = put_request(uri, body, metadata=metadata, arguments=arguments)
    store.check_put(request)
    return await store.put(request)


def read_all(store: Store) -> Callable[[str], Awaitable[bytes]]:
    """Return a verb that reads by `Store.open`."""

    async def read(uri: str) -> bytes:
        async with store.open(uri) as reader:
            return await reader.read()

    return read


async def listed(store: Store) -> list[str]:
    """Return all URIs, in the order in which they are listed."""
    return [uri async for uri in store.iter_uris()]


async def nothing_is_left(store: Store) -> None:
    """Assert that neither objects nor parts of them are there."""
    assert await listed(store) == []
    assert [each async for each in store.iter_uploads()] == []


def noise(size: int) -> bytes:
    """Return bytes that differ from one place to the next, the same ones each time."""
    block = hashlib.shake_128(b"conformance").digest(min(size, 2**16 - 1))
    return (block * (size // len(block) + 1))[:size] if size else b""


def parts_of(body: bytes) -> list[Part]:
    """Cut *body* into parts."""
    pieces = [body[start : start + PART_BYTES] for start in range(0, len(body), PART_BYTES)]
    return [
        Part(number, [piece], len(piece), zlib.crc32(piece))
        for number, piece in enumerate(pieces, start=1)
    ]


def same(one: bytes, other: bytes) -> bool:
    """Tell whether two large bodies are equal, without printing them where they are not."""
    return len(one) == len(other) and one == other


def uses(store: Store, uri: str, other: str) -> list[Callable[[], Awaitable[Any]]]:
    """Return one use of every verb."""

    async def write() -> None:
        async with store.open_writer(WriteRequest(COLUMN, other, {})):
            raise AssertionError("opened a writer")

    return [
        lambda: put(store, other, BODY),
        lambda: store.put(put_request(other, BODY)),
        lambda: store.copy(CopyRequest(COLUMN, other, uri)),
        lambda: store.get(uri),
        lambda: read_all(store)(uri),
        lambda: store.head(uri),
        lambda: store.delete_many([uri]),
        lambda: listed(store),
        write,
    ]
