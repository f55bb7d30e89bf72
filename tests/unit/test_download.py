"""Reading by many requests: resumed at the right byte, verified, in parts at once, into files."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.awaits import CountedTask

import aioblobcol._download as room
from aioblobcol import (
    Blob,
    BlobChangedError,
    BlobCorruptedError,
    BlobNotFoundError,
    BlobNotUploadedError,
    InvalidInputError,
    ObjectInfo,
    StoreError,
    StoreUnavailableError,
    download_blob,
    open_blob,
)
from aioblobcol._blob import BlobFacts
from aioblobcol._download import RESUMPTIONS, open_object, read_object
from aioblobcol._sources import HASH_INLINE_BYTES
from aioblobcol._store._base import READ_CHUNK_BYTES, ByteRange, ObjectReader
from aioblobcol.testing import MemoryStore, Step, StoredObject

URI = "s3://bucket/prefix/k"
BODY = bytes(range(256)) * 6 * 1024  # 1.5 MiB, 6 chunks
LARGE = hashlib.sha256(b"").digest() * (8 * 2**20 // 32)  # not one chunk like another, nearly
SHA256 = hashlib.sha256(BODY).hexdigest()
MANY = 1000  # far more awaits than any of these programs has

RANGES = [(0, 0), (0, 5), (5, 5), (7, READ_CHUNK_BYTES + 7), (len(BODY) - 1, None)]
BEYOND = [(0, len(BODY) + 1), (len(BODY), None), (len(BODY) + 9, None), (len(BODY) + 9, 2**62)]


class PartialStore(MemoryStore):
    """Knows what was asked for, how much of it came, and what is open.

    Attributes:
        asked: the ranges and ETags, in order.
        open_readers: requests that have not ended.
        most_readers: at the same time.
        knows_parts: False for a server that ignores Range.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[ByteRange | None, str | None]] = []
        self.open_readers = self.most_readers = 0
        self.knows_parts = True

    @asynccontextmanager
    async def open(
        self, uri: str, *, part: ByteRange | None = None, etag: str | None = None
    ) -> AsyncIterator[ObjectReader]:
        self.asked.append((part, etag))
        async with super().open(uri, part=part, etag=etag) as reader:
            reader.took_part = self.knows_parts or part is None
            self.open_readers += 1
            self.most_readers = max(self.most_readers, self.open_readers)
            try:
                yield reader
            finally:
                self.open_readers -= 1

    def holds(self, body: bytes, **metadata: str) -> StoredObject:
        self.objects[URI] = stored = StoredObject(body, metadata, {})
        return stored


@pytest.fixture
async def store(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PartialStore]:
    """Give a store that holds BODY, and whose readers lose no time."""
    monkeypatch.setattr(room, "BACK_OFF_SECONDS", 0)
    async with PartialStore() as store:
        store.holds(BODY)
        yield store
        assert store.open_readers == 0


def names_in(path: Path) -> list[str]:
    return [each.name for each in path.iterdir()]


def breaks_off(store: MemoryStore, *at: int) -> None:
    """Lose the connection before those of all chunks, counted from 1."""
    seen = 0

    def hook(step: Step) -> None:
        nonlocal seen
        if (step.operation, step.stage) == ("get", "during"):
            seen += 1
            if seen in at:
                raise StoreUnavailableError("get", step.uri, "it broke off")

    store.hooks.append(hook)


async def by_read(store: MemoryStore, **more: Any) -> bytes:
    return await read_object(store, URI, **more)


async def by_open(store: MemoryStore, **more: Any) -> bytes:
    async with open_object(store, URI, **more) as body:
        return b"".join([chunk async for chunk in body])


async def by_parts(store: MemoryStore, **more: Any) -> bytes:
    part_bytes = READ_CHUNK_BYTES * 2
    async with open_object(store, URI, parts_at_once=3, part_bytes=part_bytes, **more) as body:
        return b"".join([chunk async for chunk in body])


READS = [by_read, by_open, by_parts]
Read = Callable[..., Coroutine[Any, Any, bytes]]


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Coroutine[Any, Any, bytes]]:
    """Give a reading that goes through a file, in parts, and leaves no other one behind."""
    path = tmp_path / "file"

    async def by_file(store: MemoryStore, **more: Any) -> bytes:
        try:
            await room.download_object(
                store, URI, path, part_bytes=READ_CHUNK_BYTES * 2, parts_at_once=3, **more
            )
            return path.read_bytes()
        finally:
            assert names_in(tmp_path) in ([], [path.name])

    return by_file


@pytest.fixture(params=[*READS, None], ids=["read", "open", "parts", "file"])
def read(request: pytest.FixtureRequest, files: Read) -> Read:
    """Give each way to read the whole object in turn."""
    return request.param or files


class TestParts:
    @pytest.mark.parametrize("read", READS)
    @pytest.mark.parametrize(("start", "stop"), [*RANGES, *BEYOND])
    async def test_bytes_of_a_range(
        self, store: PartialStore, read: Read, start: int, stop: int | None
    ) -> None:
        """A range has the bytes that a slice has, and none beyond the end."""
        assert await read(store, part=ByteRange(start, stop)) == BODY[start:stop]

    @pytest.mark.parametrize("read", READS)
    async def test_of_nothing(self, store: PartialStore, read: Read) -> None:
        """An object without bytes has none in any range."""
        store.holds(b"")
        for part in (None, ByteRange(0, 5), ByteRange(5)):
            assert await read(store, part=part) == b""

    @pytest.mark.parametrize(
        ("start", "stop"), [(-1, None), (0, -1), (5, 4), (1.5, None), (0, "5"), (None, 5)]
    )
    async def test_what_is_no_range(self, store: PartialStore, start: Any, stop: Any) -> None:
        """A range that no object has is refused before anything is sent."""
        blob = Blob.from_uri(URI, store=store)
        for reading in (
            blob.read(start=start, stop=stop),
            blob.open(start=start, stop=stop).__aenter__(),
            open_blob(store, URI, start=start, stop=stop).__aenter__(),
            store.open(URI, part=ByteRange(start, stop)).__aenter__(),
        ):
            with pytest.raises(InvalidInputError, match="range of bytes"):
                await reading
        assert store.calls == []

    async def test_the_size_is_the_whole_object_s(self, store: PartialStore) -> None:
        """A part of an object is described as the whole."""
        async with open_blob(store, URI, start=5, stop=7) as body:
            assert body.info == await store.head(URI)


class TestResuming:
    async def test_goes_on_at_the_right_byte(self, store: PartialStore, read: Read) -> None:
        """However often it breaks off between chunks, each byte comes once."""
        breaks_off(store, 1, 3)
        store.holds(BODY, sha256=SHA256)

        assert await read(store) == BODY

    async def test_asks_for_the_rest_of_the_same_version(self, store: PartialStore) -> None:
        """The second request is one for the bytes that are missing, if nothing has changed."""
        etag = store.objects[URI].etag
        breaks_off(store, 2)
        await read_object(store, URI)

        rest = ByteRange(2 * READ_CHUNK_BYTES)
        assert store.asked == [(None, None), (rest, etag)]

    async def test_of_a_range(self, store: PartialStore) -> None:
        """The rest of a range ends where the range ends."""
        breaks_off(store, 1)
        part = ByteRange(10, 2 * READ_CHUNK_BYTES)

        assert await read_object(store, URI, part=part) == BODY[slice(*part)]
        assert store.asked[1][0] == ByteRange(10 + READ_CHUNK_BYTES, 2 * READ_CHUNK_BYTES)

    async def test_progress_makes_it_patient(self, store: PartialStore, read: Read) -> None:
        """It may break off after every single chunk."""
        breaks_off(store, *range(1, 20, 2))

        assert await read(store) == BODY

    async def test_without_progress_it_ends(self, store: PartialStore, read: Read) -> None:
        """A few times in a row without one byte more, and the error is told."""
        store.fail("get", stage="during")
        opened = 0

        def refuse(step: Step) -> None:
            nonlocal opened
            if (step.operation, step.stage) == ("get", "before"):
                opened += 1
                if opened > 3:
                    raise StoreUnavailableError("get", step.uri, "SlowDown")

        store.hooks.append(refuse)
        with pytest.raises(StoreUnavailableError):
            await read(store)
        assert opened <= 3 * (2 + RESUMPTIONS)

    async def test_that_cannot_begin_is_not_resumed(self, store: PartialStore, read: Read) -> None:
        """The store itself has retried what was never answered: once is enough here."""
        store.fail("get", error=lambda verb, uri: StoreUnavailableError(verb, uri, "SlowDown"))
        with pytest.raises(StoreUnavailableError, match="SlowDown"):
            await read(store)
        assert len(store.asked) == 1

    async def test_a_later_part_without_an_answer(self, store: PartialStore, files: Read) -> None:
        """Once the object is known to be there, each part is as patient as any reading."""
        seen = 0

        def refuse(step: Step) -> None:
            nonlocal seen
            if step.stage == "before":
                seen += 1
                if seen in {2, 3, 5}:
                    raise StoreUnavailableError("get", step.uri, "SlowDown")

        store.hooks.append(refuse)
        for reading in (files, by_parts):
            seen = 0
            assert await reading(store) == BODY
            assert seen >= 6

    @pytest.mark.parametrize("ending", ["overwritten", "deleted", "shortened"])
    async def test_what_has_changed(self, store: PartialStore, read: Read, ending: str) -> None:
        """Bytes of two versions are never mixed, and what is gone is not found."""

        def change(step: Step) -> None:
            if step.stage == "during" and URI in store.objects:
                if ending == "deleted":
                    del store.objects[URI]
                else:
                    store.holds(BODY[:-1] if ending == "shortened" else BODY[::-1])
                raise StoreUnavailableError("get", step.uri, "it broke off")

        store.hooks.append(change)
        with pytest.raises(BlobNotFoundError if ending == "deleted" else BlobChangedError):
            await read(store)

    async def test_a_store_that_knows_no_conditions(
        self, store: PartialStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where no If-Match can be sent, the answers' own ETags and sizes are compared."""
        capabilities = store.capabilities.__class__()
        monkeypatch.setattr(PartialStore, "capabilities", capabilities)

        def change(step: Step) -> None:
            if step.stage == "during" and len(store.asked) == 1:
                store.holds(BODY[::-1])
                raise StoreUnavailableError("get", step.uri, "it broke off")

        store.hooks.append(change)
        with pytest.raises(BlobChangedError):
            await read_object(store, URI)
        assert [etag for _, etag in store.asked] == [None, None]

    async def test_other_refusals_are_not_resumed(self, store: PartialStore, read: Read) -> None:
        """What was refused for good is told at once."""
        store.fail(
            "get", stage="during", error=lambda verb, uri: StoreError(verb, uri, "no more of it")
        )
        with pytest.raises(StoreError, match="no more of it"):
            await read(store)

    async def test_a_connection_that_falls_silent(self, store: PartialStore, read: Read) -> None:
        """No byte for the time of a request: another connection reads on."""
        store.request_seconds = 0.05
        silent = [True]

        async def fall_silent(step: Step) -> None:
            if step.stage == "during" and silent:
                silent.clear()
                await asyncio.Event().wait()

        store.hooks.append(fall_silent)

        assert await read(store) == BODY
        assert silent == []

    async def test_a_body_that_ends_too_early(
        self, store: PartialStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A body that ends before its announced end is one that broke off."""
        monkeypatch.setattr(store, "open", shortening(store.open, by=10))
        with pytest.raises(StoreUnavailableError, match="ended at byte"):
            await read_object(store, URI)

    async def test_it_is_logged(
        self, store: PartialStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Somebody who looks for slow reads finds where they broke off."""
        breaks_off(store, 1)
        await read_object(store, URI)

        assert [each.levelname for each in caplog.records] == ["WARNING"]
        assert f"{URI} goes on at byte {READ_CHUNK_BYTES}" in caplog.text


def shortening(open_whole: Any, *, by: int) -> Any:
    """Make a store's bodies end early, without an error."""

    @asynccontextmanager
    async def open_short(uri: str, **more: Any) -> AsyncIterator[ObjectReader]:
        async with open_whole(uri, **more) as reader:
            body = await reader.read()
            left = [body[: len(body) // 2], b""]

            async def read_chunk(_size: int) -> bytes:
                return left.pop(0) if left else b""

            yield ObjectReader(reader.info, read_chunk)

    return open_short


class TestVerifying:
    async def test_the_sha256_of_the_row(self, store: PartialStore, read: Read) -> None:
        """Other bytes than those that the row names are an error at the end."""
        assert await read(store, sha256=SHA256) == BODY
        store.holds(BODY[:-1] + b"x")
        with pytest.raises(BlobCorruptedError, match="SHA-256"):
            await read(store, sha256=SHA256)

    async def test_the_sha256_of_the_object(self, store: PartialStore, read: Read) -> None:
        """Where the row does not know it, the object's own metadata do."""
        store.holds(BODY, sha256=SHA256)
        assert await read(store) == BODY
        store.holds(BODY[:-1] + b"x", sha256=SHA256)
        with pytest.raises(BlobCorruptedError, match=SHA256):
            await read(store)

    async def test_the_size_of_the_row(self, store: PartialStore, read: Read) -> None:
        """Another size than the row's is an error before the first byte."""
        with pytest.raises(BlobCorruptedError, match=f"{len(BODY)} bytes, not 5"):
            await read(store, size=5)
        assert await read(store, size=len(BODY)) == BODY

    @pytest.mark.parametrize("size", [0, 1, HASH_INLINE_BYTES, HASH_INLINE_BYTES + 1, 2**20 + 1])
    async def test_objects_of_any_size(self, store: PartialStore, read: Read, size: int) -> None:
        """In one step or in slices, the hash is that of all bytes."""
        body = BODY[:size]
        store.holds(body, sha256=hashlib.sha256(body).hexdigest())
        assert await read(store) == body
        store.holds(body, sha256=SHA256)
        with pytest.raises(BlobCorruptedError):
            await read(store)

    async def test_a_part_is_not_compared(self, store: PartialStore) -> None:
        """A part has no checksum of its own; one that is the whole object has."""
        store.holds(BODY, sha256="0" * 64)
        assert await read_object(store, URI, part=ByteRange(1)) == BODY[1:]
        assert await read_object(store, URI, part=ByteRange(0, 5)) == BODY[:5]
        with pytest.raises(BlobCorruptedError):
            await read_object(store, URI, part=ByteRange(0, len(BODY)))

    @pytest.mark.parametrize("named", ["", "ab", "x" * 64])
    async def test_what_is_no_sha256(self, store: PartialStore, read: Read, named: str) -> None:
        """Metadata under the same name that hold something else are left alone."""
        store.holds(BODY, sha256=named)
        assert await read(store) == BODY

    async def test_the_error_comes_each_time(self, store: PartialStore) -> None:
        """Whoever reads on after the error gets it again, and no clean end."""
        store.holds(BODY, sha256="0" * 64)
        async with open_object(store, URI) as body:
            for _ in range(2):
                with pytest.raises(BlobCorruptedError):
                    await body.read()

    async def test_blobs_know_what_to_expect(self, store: PartialStore, tmp_path: Path) -> None:
        """A blob's own size and SHA-256 are compared, whichever way it is read."""
        for facts in (BlobFacts(size=5), BlobFacts(sha256="0" * 64)):
            blob = Blob._stored(URI, facts)
            blob._store = store
            with pytest.raises(BlobCorruptedError):
                await blob.read()
            with pytest.raises(BlobCorruptedError):
                async with blob.open() as body:
                    await body.read()
            with pytest.raises(BlobCorruptedError):
                async with open_blob(store, blob) as body:
                    await body.read()
            with pytest.raises(BlobCorruptedError):
                await blob.download_to(tmp_path / "file")
        assert names_in(tmp_path) == []


class TestBackPressure:
    async def test_nothing_is_read_ahead(self, store: PartialStore) -> None:
        """A chunk is asked for when its caller wants it."""
        steps: list[Step] = []
        store.hooks.append(steps.append)
        async with open_object(store, URI) as body:
            for count in range(3):
                assert len(steps) == 1 + max(count - 1, 0)
                await anext(body)
                await asyncio.sleep(0)

    async def test_as_many_parts_as_were_asked_for(self, store: PartialStore) -> None:
        """Ahead of the caller are so many parts, and no more."""
        part_bytes = READ_CHUNK_BYTES
        async with open_object(store, URI, parts_at_once=3, part_bytes=part_bytes) as body:
            assert len(store.asked) == 1
            await anext(body)
            for _ in range(50):
                await asyncio.sleep(0)
            assert [part for part, _ in store.asked] == [
                ByteRange(each * part_bytes, (each + 1) * part_bytes) for each in range(3)
            ]
            assert body.info.size == len(BODY)

    async def test_no_upload_slot_is_held(self, store: PartialStore, read: Read) -> None:
        """Reads go on while all slots are taken by uploads."""
        slots = store.runtime.slots
        taken = 0
        while not slots.locked():
            await slots.acquire()
            taken += 1
        async with asyncio.timeout(10):
            assert await read(store) == BODY
        for _ in range(taken):
            slots.release()

    async def test_small_objects_are_one_request(self, store: PartialStore, read: Read) -> None:
        """What fits into one part is one GET, whether its size was known or not."""
        store.holds(b"page")
        for size in (None, 4):
            store.calls.clear()
            assert await read(store, size=size) == b"page"
            assert store.calls == [("get", (URI,))]

    async def test_a_server_that_ignores_ranges(self, store: PartialStore, read: Read) -> None:
        """It is read by one request for the whole, and not by one for each part."""
        store.knows_parts = False
        assert await read(store) == BODY
        assert len(store.asked) <= 2
        assert store.asked[-1] == (None, None)


class TestProgress:
    async def test_is_told_per_chunk(self, store: PartialStore, read: Read) -> None:
        """It grows to the total, and never falls, also where a connection breaks off."""
        if read is by_read:
            pytest.skip("it has none")
        breaks_off(store, 2)
        told: list[tuple[int, int | None]] = []
        await read(store, on_progress=lambda *given: told.append(given))

        assert told[-1] == (len(BODY), len(BODY))
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert len(told) == 6

    async def test_of_a_part(self, store: PartialStore) -> None:
        """The total of a part is the part's."""
        told: list[tuple[int, int | None]] = []
        await by_open(store, part=ByteRange(5, 15), on_progress=lambda *given: told.append(given))

        assert told == [(10, 10)]

    async def test_what_it_raises(self, store: PartialStore, read: Read) -> None:
        """An error of the callback ends the transfer."""
        if read is by_read:
            pytest.skip("it has none")

        def fail(_done: int, _total: int | None) -> None:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            await read(store, on_progress=fail)


class TestFiles:
    async def test_describes(self, store: PartialStore, tmp_path: Path) -> None:
        """The file has the bytes, and the answer's description is returned."""
        path = tmp_path / "file"
        for given in (path, str(path)):
            info = await download_blob(store, URI, given)

            assert info == await store.head(URI)
            assert path.read_bytes() == BODY
        assert isinstance(await Blob.from_uri(URI, store=store).download_to(path), ObjectInfo)
        assert names_in(tmp_path) == ["file"]

    async def test_in_parts(self, store: PartialStore, tmp_path: Path) -> None:
        """A large object is read by ranges of one version, so many at once."""
        etag = store.objects[URI].etag
        part_bytes = len(BODY) // 5 - 1
        await download_blob(store, URI, tmp_path / "file", part_bytes=part_bytes, parts_at_once=3)

        assert (tmp_path / "file").read_bytes() == BODY
        assert store.most_readers == 3
        assert [part.start for part, _ in store.asked if part] == [
            each * part_bytes for each in range(6)
        ]
        assert {tag for _, tag in store.asked[1:]} == {etag}

    async def test_parts_come_in_any_order(self, store: PartialStore, tmp_path: Path) -> None:
        """A part that is late is written to its own place."""
        first = asyncio.Event()

        async def hold(step: Step) -> None:
            if step.stage == "during" and len(store.asked) < 3:
                await first.wait()
            if len(store.asked) == 3:
                first.set()

        store.hooks.append(hold)
        await download_blob(
            store, URI, tmp_path / "file", part_bytes=2 * READ_CHUNK_BYTES, parts_at_once=3
        )

        assert (tmp_path / "file").read_bytes() == BODY

    async def test_with_one_at_once(self, store: PartialStore, tmp_path: Path) -> None:
        """One part at once is one request for the whole."""
        await download_blob(store, URI, tmp_path / "file", part_bytes=5, parts_at_once=1)

        assert store.asked == [(None, None)]

    @pytest.mark.parametrize("failing", ["first", "later", "bytes"])
    async def test_an_error_leaves_what_was_there(
        self, store: PartialStore, files: Read, tmp_path: Path, failing: str
    ) -> None:
        """The old file stays, and no other one is left."""
        path = tmp_path / "file"
        path.write_bytes(b"old")
        if failing == "bytes":
            store.holds(BODY, sha256="0" * 64)
        else:
            store.fail("get", stage="before" if failing == "first" else "during", error=StoreError_)
        with pytest.raises(StoreError):
            await files(store)

        assert path.read_bytes() == b"old"

    @pytest.mark.parametrize(
        ("name", "error"), [("missing/file", FileNotFoundError), (".", IsADirectoryError)]
    )
    async def test_a_place_that_is_none(
        self, store: PartialStore, tmp_path: Path, name: str, error: type[OSError]
    ) -> None:
        """A file that cannot be made is found out before anything is sent."""
        with pytest.raises(error):
            await download_blob(store, URI, tmp_path / name)
        assert store.calls == []

    async def test_a_full_disk(
        self, store: PartialStore, files: Read, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file that cannot be written is the system's own error, and is removed."""

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="no space"):
            await files(store)

    async def test_where_no_write_has_a_position(
        self, store: PartialStore, files: Read, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without `pwrite` parts are written one after the other, each to its place."""
        monkeypatch.delattr(os, "pwrite")
        store.holds(BODY, sha256=SHA256)

        assert await files(store) == BODY

    async def test_writes_that_take_less(
        self, store: PartialStore, files: Read, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A write that takes some of the bytes is followed by one for the rest."""
        pwrite = os.pwrite
        monkeypatch.setattr(
            os, "pwrite", lambda fd, data, position: pwrite(fd, data[:100_000], position)
        )

        assert await files(store) == BODY

    @pytest.mark.parametrize("limit", [{"parts_at_once": 0}, {"part_bytes": 0}])
    async def test_limits(self, store: PartialStore, tmp_path: Path, limit: dict[str, Any]) -> None:
        """Limits that are not positive are refused before anything."""
        with pytest.raises(InvalidInputError, match="positive"):
            await download_blob(store, URI, tmp_path / "file", **limit)
        assert (store.calls, names_in(tmp_path)) == ([], [])

    async def test_of_what_is_not_stored(self, store: PartialStore, tmp_path: Path) -> None:
        """A pending blob has nothing to download."""
        with pytest.raises(BlobNotUploadedError):
            await download_blob(store, Blob(b"x"), tmp_path / "file")


def StoreError_(operation: str, uri: str) -> Exception:  # noqa: N802 - in its place
    return StoreError(operation, uri, "InvalidRequest")


class TestMemory:
    @pytest.mark.parametrize("way", ["stream", "file", "parts"])
    async def test_is_bounded(self, tmp_path: Path, way: str) -> None:
        """64 MiB pass through a few: those of the parts that are ahead, or of what is written."""
        size, part_bytes = 64 * 2**20, 2**20
        async with MemoryStore() as store:
            body = bytes(size)
            digest = hashlib.sha256(body).hexdigest()
            store.objects[URI] = StoredObject(body, {"sha256": digest}, {})
            tracemalloc.start()
            try:
                if way == "file":
                    await download_blob(store, URI, tmp_path / "file", part_bytes=8 * 2**20)
                else:
                    at_once = {"stream": 1, "parts": 4}[way]
                    async with open_object(
                        store, URI, parts_at_once=at_once, part_bytes=part_bytes
                    ) as stream:
                        async for _ in stream:
                            pass
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()

        # what others allocate meanwhile (threads, imports) counts as well: 1 MiB, on a busy machine
        bound = {"stream": 4, "parts": 4 + 4, "file": 8 * 1.5 + 4}[way] + 4
        assert peak < bound * 2**20


class TestLeaving:
    @pytest.mark.parametrize("parts_at_once", [1, 3])
    @pytest.mark.parametrize("how", ["break", "unread", "raise", "cancel"])
    async def test_early(self, store: PartialStore, parts_at_once: int, how: str) -> None:
        """However the block is left, no request and no task is left behind."""

        async def leave() -> None:
            async with open_object(
                store, URI, parts_at_once=parts_at_once, part_bytes=READ_CHUNK_BYTES
            ) as body:
                if how == "unread":
                    return
                async for _ in body:
                    if how == "break":
                        break
                    if how == "raise":
                        raise KeyError
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                    await asyncio.sleep(0)

        (outcome,) = await asyncio.gather(asyncio.create_task(leave()), return_exceptions=True)

        expected = {"raise": KeyError, "cancel": asyncio.CancelledError}.get(how, type(None))
        assert type(outcome) is expected
        assert store.open_readers == 0
        assert len(asyncio.all_tasks()) == 1

    @pytest.mark.parametrize("parts_at_once", [1, 3])
    async def test_a_cancelled_chunk_is_not_lost(
        self, store: PartialStore, parts_at_once: int
    ) -> None:
        """Who gives up waiting for a chunk, wherever, gets it with the next call."""
        store.holds(BODY, sha256=SHA256)
        for moment in range(1, MANY):
            store.hooks.clear()
            breaks_off(store, 2)
            got: list[bytes] = []
            async with open_object(
                store, URI, parts_at_once=parts_at_once, part_bytes=READ_CHUNK_BYTES * 2
            ) as body:
                reached = await CountedTask(_append(body, got), cancel_at=moment).run()
                got.append(await body.read())

            assert b"".join(got) == BODY
            if not reached:
                break

    @pytest.mark.slow
    async def test_cancelled_at_every_await(self, store: PartialStore, read: Read) -> None:
        """Cancelled anywhere, it ends with no request, no task and no file but a whole one."""
        store.holds(BODY, sha256=SHA256)
        for moment in range(1, MANY):
            store.hooks.clear()
            breaks_off(store, 2)
            reached = await CountedTask(read(store), cancel_at=moment).run()
            assert store.open_readers == 0
            assert len(asyncio.all_tasks()) == 1
            if not reached:
                break
        else:
            raise AssertionError("it never ended")


async def _append(body: ObjectReader, got: list[bytes]) -> None:
    async for chunk in body:
        got.append(chunk)  # noqa: PERF401 - it may be cancelled
