"""Many requests as one act: over several stores, with bytes that are made ready one by one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from aioblobcol._sources import MAX_OBJECT_BYTES, PART_BYTES, Part, read_payload
from aioblobcol._store import _base
from aioblobcol._store._base import (
    COPY_SECONDS,
    SLOWEST_BYTES_PER_SECOND,
    CopyRequest,
    PutRequest,
    WriteRequest,
)
from aioblobcol._streams import open_path, part_bytes
from aioblobcol._transfer import (
    LargeRequest,
    Upload,
    compensate,
    in_memory,
    upload_all,
    upload_each,
)
from aioblobcol.errors import (
    BlobNotFoundError,
    BlobUploadError,
    InvalidSourceError,
    StoreClosedError,
    StoreUnavailableError,
)
from aioblobcol.testing import MemoryStore, Step, StoredObject


@pytest_asyncio.fixture
async def left() -> AsyncIterator[MemoryStore]:
    async with MemoryStore(bucket="left") as store:
        yield store


@pytest_asyncio.fixture
async def right() -> AsyncIterator[MemoryStore]:
    async with MemoryStore(bucket="right") as store:
        yield store


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def uri_in(store: MemoryStore, name: str) -> str:
    return f"s3://{store.bucket}/prefix/{name}"


async def put_request(store: MemoryStore, name: str, body: bytes = b"page") -> PutRequest:
    payload = await read_payload(name, body, with_md5=False)
    return PutRequest(column=name, uri=uri_in(store, name), payload=payload, metadata={})


def an_upload(
    store: MemoryStore,
    name: str,
    prepare: Callable[[], Awaitable[PutRequest | CopyRequest]] | None = None,
) -> Upload:
    async def put() -> PutRequest:
        return await put_request(store, name)

    return Upload(store, name, uri_in(store, name), prepare or put)


def a_copy(store: MemoryStore, name: str, source_uri: str) -> Upload:
    async def copy() -> CopyRequest:
        return CopyRequest(name, uri_in(store, name), source_uri)

    return Upload(store, name, uri_in(store, name), copy)


def unanswered(operation: str, uri: str) -> Exception:
    return StoreUnavailableError(operation, uri, "timeout")


async def give_way() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def sent(store: MemoryStore, operation: str) -> list[str]:
    return [uri for verb, uris in store.calls if verb == operation for uri in uris]


class TestOneAct:
    async def test_over_several_stores_at_once(self, left: MemoryStore, right: MemoryStore) -> None:
        """The requests to all stores are on the wire before any is answered."""
        barrier = asyncio.Barrier(2)

        async def together(step: Step) -> None:
            if step.stage == "before":
                await barrier.wait()  # for ever, if they came one after the other

        left.hooks.append(together)
        right.hooks.append(together)
        attempts = await upload_each([an_upload(left, "a"), an_upload(right, "b")])

        assert [attempt.store for attempt in attempts] == [left, right]
        assert [attempt.begun for attempt in attempts] == [True, True]
        assert (*left.objects, *right.objects) == (uri_in(left, "a"), uri_in(right, "b"))

    async def test_copies_and_puts(self, left: MemoryStore) -> None:
        """An act may hold uploads and copies."""
        left.objects[uri_in(left, "old")] = StoredObject(b"old", {}, {})
        await upload_each([an_upload(left, "a"), a_copy(left, "b", uri_in(left, "old"))])

        assert await left.get(uri_in(left, "a")) == b"page"
        assert await left.get(uri_in(left, "b")) == b"old"

    async def test_nothing_to_do(self) -> None:
        """An act without requests is done."""
        assert await upload_each([]) == []
        assert (await compensate([])).deleted == ()

    async def test_of_one_store(self, left: MemoryStore) -> None:
        """Requests whose bytes are there already go to one store."""
        requests = [await put_request(left, "a"), await put_request(left, "b")]
        attempts = await upload_all(left, requests)

        assert [attempt.uri for attempt in attempts] == list(left.objects)
        assert not any(attempt.may_land_late for attempt in attempts)

    async def test_time_limits(self, left: MemoryStore) -> None:
        """A body has time for its real size, and the server for a copy."""
        left.objects[uri_in(left, "old")] = StoredObject(b"old", {}, {})

        async def large() -> PutRequest:
            return await put_request(left, "a", bytes(SLOWEST_BYTES_PER_SECOND * 2))

        put, copy = await upload_each(
            [an_upload(left, "a", large), a_copy(left, "b", uri_in(left, "old"))]
        )

        assert put.seconds == left.request_seconds + 2
        assert copy.seconds == left.request_seconds + COPY_SECONDS


class TestPreparing:
    async def test_as_many_bodies_as_slots(self) -> None:
        """Of 2,000 uploads only as many bodies exist as there are slots, and none afterwards."""

        class Watched(PutRequest):  # without slots, so that it can be watched
            pass

        references: list[weakref.ref[Watched]] = []
        most = 0

        def alive() -> int:
            return sum(reference() is not None for reference in references[-20:])

        def prepared(store: MemoryStore, name: str) -> Upload:
            async def prepare() -> PutRequest:
                nonlocal most
                request = await put_request(store, name)
                watched = Watched(request.column, request.uri, request.payload, {})
                references.append(weakref.ref(watched))
                most = max(most, alive())
                return watched

            return an_upload(store, name, prepare)

        gc.disable()  # what is dropped by reference counting alone
        try:
            async with MemoryStore(max_concurrency=3) as store:
                attempts = await upload_each([prepared(store, str(n)) for n in range(2000)])
            left = sum(reference() is not None for reference in references)
        finally:
            gc.enable()

        assert (len(attempts), len(references)) == (2000, 2000)
        assert most == 3
        assert left == 0

    async def test_a_source_that_fails(self, left: MemoryStore, right: MemoryStore) -> None:
        """What cannot be made ready fails with its column, was never begun, and undoes the rest."""
        gate = left.hold("put", stage="after")

        async def vanished() -> PutRequest:
            await gate.reached.wait()
            gate.open()
            raise InvalidSourceError("the file vanished")

        with pytest.raises(BlobUploadError, match="vanished") as caught:
            await upload_each([an_upload(left, "a"), an_upload(right, "b", vanished)])

        assert (caught.value.column, caught.value.uri) == ("b", uri_in(right, "b"))
        assert isinstance(caught.value.__cause__, InvalidSourceError)
        assert left.objects == {}
        assert right.calls == []

    async def test_a_reading_that_takes_too_long(self, left: MemoryStore) -> None:
        """A time limit inside of a source is not taken for one of the store's."""

        async def slow() -> PutRequest:
            raise TimeoutError("the client is slow")

        with pytest.raises(BlobUploadError, match="the client is slow") as caught:
            await upload_each([an_upload(left, "a", slow)])

        assert isinstance(caught.value.__cause__, TimeoutError)
        assert left.calls == []

    @pytest.mark.parametrize("gives_up", [True, False])
    async def test_another_one_fails_meanwhile(self, left: MemoryStore, gives_up: bool) -> None:
        """What is being made ready when another one fails is not sent any more."""
        reading = asyncio.Event()

        async def read() -> PutRequest:
            request = await put_request(left, "a")
            reading.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if gives_up:
                    raise
            return request

        async def fail() -> PutRequest:
            await reading.wait()
            raise InvalidSourceError("the file vanished")

        with pytest.raises(BlobUploadError) as caught:
            await upload_each([an_upload(left, "a", read), an_upload(left, "b", fail)])

        assert caught.value.column == "b"
        assert left.calls == []

    async def test_what_waits_for_a_slot_is_not_made_ready(self) -> None:
        """After a failure nothing more is read."""
        read: list[str] = []

        async def fail() -> PutRequest:
            raise InvalidSourceError("the file vanished")

        async with MemoryStore(max_concurrency=1) as store:

            def prepared(name: str) -> Upload:
                async def prepare() -> PutRequest:
                    read.append(name)
                    return await put_request(store, name)

                return an_upload(store, name, prepare)

            with pytest.raises(BlobUploadError):
                await upload_each([an_upload(store, "a", fail), prepared("b"), prepared("c")])

        assert read == []


class TestFailures:
    async def test_undoes_all_stores(self, left: MemoryStore, right: MemoryStore) -> None:
        """When one request is refused, everything in every store is deleted again."""
        right.fail("put", containing="/c")
        uploads = [an_upload(left, "a"), an_upload(right, "b"), an_upload(right, "c")]

        with pytest.raises(BlobUploadError, match="InvalidRequest") as caught:
            await upload_each(uploads)

        assert (caught.value.column, caught.value.not_deleted) == ("c", {})
        assert (left.objects, right.objects) == ({}, {})

    async def test_a_missing_source(self, left: MemoryStore) -> None:
        """A copy of what is not there fails with its column; the cause names the source."""
        gone = uri_in(left, "gone")

        with pytest.raises(BlobUploadError, match="prefix/gone") as caught:
            await upload_each([an_upload(left, "a"), a_copy(left, "b", gone)])

        assert isinstance(caught.value.__cause__, BlobNotFoundError)
        assert (caught.value.column, caught.value.__cause__.uri) == ("b", gone)
        assert left.objects == {}

    async def test_lost_answers(self, left: MemoryStore, right: MemoryStore) -> None:
        """What was not answered is deleted a second time, each in its own store."""
        right.objects[uri_in(right, "old")] = StoredObject(b"old", {}, {})
        left.fail("put", error=unanswered)
        right.fail("copy", error=unanswered)
        uploads = [an_upload(left, "a"), a_copy(right, "b", uri_in(right, "old"))]

        barrier = asyncio.Barrier(2)

        async def together(step: Step) -> None:
            if step.operation in {"put", "copy"}:
                await barrier.wait()

        left.hooks.insert(0, together)
        right.hooks.insert(0, together)
        with pytest.raises(BlobUploadError):
            await upload_each(uploads)

        assert left.runtime.second_deletes == (uri_in(left, "a"),)
        assert right.runtime.second_deletes == (uri_in(right, "b"),)
        assert (sent(left, "delete"), sent(right, "delete")) == (
            [uri_in(left, "a")],
            [uri_in(right, "b")],
        )

    async def test_no_answer_in_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A copy that is not answered in time is given up, and may land late."""
        monkeypatch.setattr(_base, "COPY_SECONDS", 0)
        async with MemoryStore(request_seconds=0.05) as store:
            store.objects[uri_in(store, "old")] = StoredObject(b"old", {}, {})
            store.hold("copy")
            with pytest.raises(BlobUploadError, match=r"cannot copy .*in time") as caught:
                await upload_each([a_copy(store, "a", uri_in(store, "old"))])

            assert isinstance(caught.value.__cause__, StoreUnavailableError)
            assert store.runtime.second_deletes == (uri_in(store, "a"),)
            assert store.land_late() == [uri_in(store, "a")]
        assert list(store.objects) == [uri_in(store, "old")]

    async def test_a_store_that_is_not_open(self, left: MemoryStore) -> None:
        """One closed store among them, and nothing is sent to any."""
        closed = MemoryStore(bucket="right")

        with pytest.raises(StoreClosedError, match="async with"):
            await upload_each([an_upload(left, "a"), an_upload(closed, "b")])
        assert left.calls == []

    async def test_a_store_that_is_found_closed(
        self, left: MemoryStore, right: MemoryStore
    ) -> None:
        """A client that was closed behind the store's back says so; the others are undone."""
        right.fail("put", error=lambda verb, uri: StoreClosedError(f"cannot {verb} {uri}"))
        gate = right.hold("put")
        right.hooks.reverse()
        left.hooks.append(lambda step: gate.open() if step.stage == "after" else None)

        with pytest.raises(StoreClosedError, match="cannot put"):
            await upload_each([an_upload(left, "a"), an_upload(right, "b")])

        assert (left.objects, sent(left, "delete")) == ({}, [uri_in(left, "a")])
        assert sent(right, "delete") == []

    async def test_cancelled_by_somebody_else(self, left: MemoryStore) -> None:
        """An upload whose task somebody cancelled is no success."""

        async def suicide() -> PutRequest:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
            raise AssertionError("not reached")

        with pytest.raises(BlobUploadError, match="cancelled") as caught:
            await upload_each([an_upload(left, "a"), an_upload(left, "b", suicide)])

        assert caught.value.column == "b"
        assert left.objects == {}


class TestCancellation:
    async def test_over_two_stores(self) -> None:
        """A PUT on the wire is run to its end, then deleted, in both; what waits never begins."""
        async with (
            MemoryStore(bucket="left", max_concurrency=1) as left,
            MemoryStore(bucket="right", max_concurrency=1) as right,
        ):
            gates = [left.hold("put"), right.hold("put")]
            uploads = [an_upload(store, name) for store in (left, right) for name in ("a", "b")]
            task = asyncio.create_task(upload_each(uploads))
            for gate in gates:
                await gate.reached.wait()
            task.cancel()
            await give_way()
            was_waiting = not task.done()
            for gate in gates:
                gate.open()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task

            assert was_waiting
            assert caught.value.__cause__ is None
            for store in (left, right):
                first = uri_in(store, "a")
                assert store.calls == [("put", (first,)), ("delete", (first,))]
                assert store.land_late() == []
                assert store.objects == {}

    async def test_of_a_copy(self, left: MemoryStore) -> None:
        """A copy on the wire is run to its end, then deleted."""
        old = uri_in(left, "old")
        left.objects[old] = StoredObject(b"old", {}, {})
        gate = left.hold("copy")
        task = asyncio.create_task(upload_each([a_copy(left, "a", old)]))
        await gate.reached.wait()
        task.cancel()
        await give_way()
        was_waiting = not task.done()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert was_waiting
        assert left.calls == [("copy", (uri_in(left, "a"),)), ("delete", (uri_in(left, "a"),))]
        assert (left.land_late(), list(left.objects)) == ([], [old])

    async def test_of_the_reading(self, left: MemoryStore) -> None:
        """Reading a source is given up at once: nothing is on the wire yet."""
        reading = asyncio.Event()

        async def read() -> PutRequest:
            reading.set()
            await asyncio.Event().wait()
            raise AssertionError("not reached")

        task = asyncio.create_task(upload_each([an_upload(left, "a", read)]))
        await reading.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task

        assert caught.value.__cause__ is None
        assert left.calls == []

    async def test_of_the_deletes(self, left: MemoryStore, right: MemoryStore) -> None:
        """Undoing is run to its end in both stores, then the cancellation goes on."""
        attempts = await upload_each([an_upload(left, "a"), an_upload(right, "b")])
        gates = [left.hold("delete"), right.hold("delete")]
        task = asyncio.create_task(compensate(attempts))
        for gate in gates:
            await gate.reached.wait()  # both at once
        task.cancel()
        for gate in gates:
            gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert (left.objects, right.objects) == ({}, {})


class TestCompensate:
    async def test_a_store_that_was_closed_meanwhile(self, left: MemoryStore) -> None:
        """What lies in a closed store is reported, and does not keep the others."""
        async with MemoryStore(bucket="right") as right:
            attempts = await upload_each([an_upload(right, "b"), an_upload(left, "a")])
        for attempt in attempts:
            attempt.may_land_late = True
        report = await compensate(attempts)

        assert report.deleted == (uri_in(left, "a"),)
        assert list(report.failed) == [uri_in(right, "b")]
        assert left.objects == {}
        assert left.runtime.second_deletes == (uri_in(left, "a"),)

    async def test_a_store_that_breaks(self, left: MemoryStore, right: MemoryStore) -> None:
        """One store's trouble is reported and does not keep the others."""
        attempts = await upload_each([an_upload(left, "a"), an_upload(right, "b")])

        def burn(step: Step) -> None:
            raise RuntimeError(f"{step.operation} burns")

        left.hooks.append(burn)
        report = await compensate(attempts)

        assert report.failed == {uri_in(left, "a"): "RuntimeError: delete burns"}
        assert report.deleted == (uri_in(right, "b"),)

    async def test_what_is_foreign_is_kept(self, left: MemoryStore) -> None:
        """A URI outside of its store's prefix is never deleted."""
        (attempt,) = await upload_each([an_upload(left, "a")])
        attempt.uri = "s3://left/elsewhere/a"
        calls: list[Any] = list(left.calls)
        report = await compensate([attempt])

        assert list(report.kept) == ["s3://left/elsewhere/a"]
        assert left.calls == calls


class TestGrownFiles:
    async def test_are_refused_and_closed(self, left: MemoryStore, tmp_path: Path) -> None:
        """A file that was small when it was checked, and is not any more, leaves nothing open."""
        path = tmp_path / "page"
        path.write_bytes(bytes(PART_BYTES + 1))
        before = open_files()
        uri = uri_in(left, "page")

        async def prepare() -> LargeRequest:
            reader = await open_path("page", path)
            return LargeRequest(WriteRequest("page", uri, {}, {}, reader.total), reader)

        with pytest.raises(BlobUploadError, match="changed meanwhile"):
            await upload_each([Upload(left, "page", uri, prepare, size=5)])

        assert open_files() == before
        assert left.runtime.budget.used == 0


class Endless:
    """A reader of an object of a given size that has no bytes, only their number."""

    def __init__(self, total: int, *, is_known: bool) -> None:
        self.total = total if is_known else None
        self.crc32 = 0
        self._left = total
        self._number = 0

    def next_bytes(self) -> int:
        return part_bytes(self._number + 1, total=self.total)

    async def next_part(self) -> Part | None:
        size = min(self.next_bytes(), self._left)
        if size == 0:
            return None
        self._left -= size
        self._number += 1
        return Part(self._number, [], size, 0)

    async def aclose(self) -> None:
        pass


class Counting(MemoryStore):
    """A store that counts parts in place of keeping them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[int] = []

    @contextlib.asynccontextmanager
    async def open_writer(self, request: WriteRequest) -> AsyncIterator[Any]:
        counted = self.parts

        class Writer:
            upload_id = None

            async def write(self, part: Part) -> None:
                assert part.number == len(counted) + 1
                counted.append(part.size)

            def finish(self, crc32: int) -> None:
                pass

        yield Writer()


class TestTheLargest:
    @pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
    @pytest.mark.parametrize("size", [MAX_OBJECT_BYTES, 10**12, 100 * 2**30 + 1])
    async def test_fits_into_10_000_parts(self, size: int, is_known: bool) -> None:
        """5 TiB go in 10,000 parts at most, none larger than S3 takes, known before or not."""
        async with Counting() as store:
            uri = f"s3://bucket/prefix/c/id={0:032x}"

            async def prepare() -> LargeRequest:
                reader: Any = Endless(size, is_known=is_known)
                return LargeRequest(WriteRequest("c", uri, {}), reader)

            upload = Upload(
                store,
                "c",
                uri,
                prepare,
                size=in_memory(store, size if is_known else None),
                waits=True,
            )
            await upload_each([upload])
            assert store.runtime.budget.used == 0

        assert sum(store.parts) == size
        assert len(store.parts) <= 10_000
        assert max(store.parts) <= 5 * 2**30
        assert min(store.parts[:-1]) >= PART_BYTES
