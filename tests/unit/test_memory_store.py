"""`MemoryStore`: the protocol in memory, as unreliable as a test asks it to be."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from aioblobcol._sources import read_payloads
from aioblobcol._store._base import (
    READ_CHUNK_BYTES,
    ByteRange,
    CopyRequest,
    ObjectInfo,
    PutRequest,
    is_owned,
    owned_uris,
)
from aioblobcol.errors import (
    BlobChangedError,
    BlobNotFoundError,
    ForeignUriError,
    InvalidBucketError,
    InvalidInputError,
    InvalidPrefixError,
    InvalidPutArgumentsError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
)
from aioblobcol.testing import MemoryStore, Step, StoredObject

A, B = "s3://bucket/prefix/a", "s3://bucket/prefix/b"
FOREIGN = "s3://bucket/prefixed/c"


async def request(uri: str, body: bytes = b"page", **more: Any) -> PutRequest:
    (payload,) = await read_payloads([("page", body)])
    return PutRequest(
        column="page", uri=uri, payload=payload, metadata=more.pop("metadata", {}), **more
    )


async def opened(store: MemoryStore) -> bytes:
    async with store.open(A) as reader:
        return await reader.read()


async def listed(store: MemoryStore) -> list[str]:
    return [uri async for uri in store.iter_uris()]


class TestVerbs:
    async def test_what_was_put_can_be_read(self, memory_store: MemoryStore) -> None:
        """An object comes back with its bytes, its size and its metadata decoded."""
        answered = await memory_store.put(await request(A, b"page", metadata={"Name": "ü"}))

        assert answered is True
        assert await memory_store.get(A) == b"page"
        info = await memory_store.head(A)
        assert info.modified_at is not None
        assert info == ObjectInfo(A, 4, {"name": "ü"}, modified_at=info.modified_at, etag=info.etag)

    async def test_arguments_are_kept_for_the_test(self, memory_store: MemoryStore) -> None:
        """A test can see what was sent with an object."""
        await memory_store.put(await request(A, arguments={"ContentType": "text/html"}))

        assert memory_store.objects[A] == StoredObject(b"page", {}, {"ContentType": "text/html"})

    async def test_a_put_replaces(self, memory_store: MemoryStore) -> None:
        """The last PUT of a key wins."""
        await memory_store.put(await request(A, b"one"))
        await memory_store.put(await request(A, b"two"))

        assert await memory_store.get(A) == b"two"

    @pytest.mark.parametrize("verb", ["get", "head"])
    async def test_a_missing_object_is_not_found(
        self, memory_store: MemoryStore, verb: str
    ) -> None:
        """Reading what is not there says so."""
        with pytest.raises(BlobNotFoundError, match=verb):
            await getattr(memory_store, verb)(A)

    async def test_deleting_what_is_gone_counts_as_deleted(self, memory_store: MemoryStore) -> None:
        """A delete is done when the object is not there, and each URI is deleted once."""
        await memory_store.put(await request(A))
        report = await memory_store.delete_many([A, B, A])

        assert report.deleted == (A, B)
        assert memory_store.objects == {}

    async def test_nothing_outside_is_deleted(self, memory_store: MemoryStore) -> None:
        """A URI outside of the prefix is refused before anything is deleted."""
        await memory_store.put(await request(A))

        with pytest.raises(ForeignUriError, match="prefixed"):
            await memory_store.delete_many([A, FOREIGN])
        assert list(memory_store.objects) == [A]

    async def test_the_list_is_in_the_order_of_bytes(self, memory_store: MemoryStore) -> None:
        """Listing shows what is under the prefix, by the keys' UTF-8 bytes."""
        for name in ("\U0001f600", "\uffff", "b", "B", "a"):
            await memory_store.put(await request(f"s3://bucket/prefix/{name}"))
        memory_store.objects[FOREIGN] = memory_store.objects["s3://bucket/prefix/a"]

        names = [uri.removeprefix("s3://bucket/prefix/") for uri in await listed(memory_store)]
        assert names == ["B", "a", "b", "\uffff", "\U0001f600"]

    async def test_requests_are_noted_in_order(self, memory_store: MemoryStore) -> None:
        """A test can count the requests."""
        await memory_store.put(await request(A))
        await memory_store.head(A)
        await memory_store.get(A)
        await memory_store.delete_many([A])

        assert memory_store.calls == [
            ("put", (A,)),
            ("head", (A,)),
            ("get", (A,)),
            ("delete", (A,)),
        ]

    @pytest.mark.parametrize(
        "more",
        [
            {"arguments": {"Bucket": "x"}},
            {"arguments": {"Key": "x"}},
            {"arguments": {"Body": b"x"}},
        ],
    )
    async def test_what_s3_would_refuse_is_refused(
        self, memory_store: MemoryStore, more: dict[str, Any]
    ) -> None:
        """What the library owns is refused beforehand."""
        with pytest.raises(InvalidPutArgumentsError):
            memory_store.check_put(await request(A, **more))
        assert memory_store.calls == []


class TestCopy:
    async def test_takes_over_what_describes_the_content(self, memory_store: MemoryStore) -> None:
        """Bytes, metadata, type and tags are the source's; how it is kept is the copy's."""
        given = {"ContentType": "text/html", "StorageClass": "GLACIER", "Tagging": "a=b"}
        await memory_store.put(await request(A, metadata={"x": "y"}, arguments=given))
        asked = {"ContentType": "text/plain", "StorageClass": "STANDARD_IA"}
        answered = await memory_store.copy(CopyRequest("page", B, A, asked))

        assert answered is True
        assert memory_store.objects[B] == StoredObject(
            b"page",
            {"x": "y"},
            {"ContentType": "text/html", "StorageClass": "STANDARD_IA", "Tagging": "a=b"},
        )
        assert memory_store.calls[-1] == ("copy", (B,))

    async def test_tags_of_its_own(self, memory_store: MemoryStore) -> None:
        """Tags that are given replace the source's."""
        await memory_store.put(await request(A, arguments={"Tagging": "a=b"}))
        await memory_store.copy(CopyRequest("page", B, A, {"Tagging": "c=d"}))

        assert memory_store.objects[B].arguments == {"Tagging": "c=d"}

    async def test_of_what_is_missing(self, memory_store: MemoryStore) -> None:
        """A missing source is not found, by its own URI, and certainly nothing was made."""
        with pytest.raises(BlobNotFoundError, match="copy") as caught:
            await memory_store.copy(CopyRequest("page", B, A))

        assert caught.value.uri == A
        assert caught.value.may_have_taken_effect is False
        assert memory_store.objects == {}

    async def test_may_land_late(self, memory_store: MemoryStore) -> None:
        """A copy without an answer may take effect later, with the bytes of when it was asked."""
        await memory_store.put(await request(A, b"then"))
        memory_store.fail(
            "copy", error=lambda verb, uri: StoreUnavailableError(verb, uri, "timeout")
        )
        with pytest.raises(StoreUnavailableError):
            await memory_store.copy(CopyRequest("page", B, A))
        await memory_store.put(await request(A, b"now"))

        assert B not in memory_store.objects
        assert memory_store.land_late() == [B]
        assert await memory_store.get(B) == b"then"

    async def test_that_is_cancelled_may_land_late(self, memory_store: MemoryStore) -> None:
        """Cancelling a copy on the wire does not take it back, even if its source goes."""
        await memory_store.put(await request(A))
        gate = memory_store.hold("copy")
        copying = asyncio.create_task(memory_store.copy(CopyRequest("page", B, A)))
        await gate.reached.wait()
        await memory_store.delete_many([A])
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying

        assert memory_store.objects == {}
        assert memory_store.land_late() == [B]

    async def test_whose_answer_is_lost_is_there(self, memory_store: MemoryStore) -> None:
        """A copy whose answer is lost has taken effect."""
        await memory_store.put(await request(A))
        memory_store.fail("copy", stage="after")

        with pytest.raises(StoreUnavailableError) as caught:
            await memory_store.copy(CopyRequest("page", B, A))
        assert caught.value.uri == B
        assert set(memory_store.objects) == {A, B}


class TestOpen:
    async def test_reads_chunk_by_chunk(self, memory_store: MemoryStore) -> None:
        """An object is read in chunks of 256 KiB at most, and described before."""
        body = bytes(range(256)) * 2500
        await memory_store.put(await request(A, body, arguments={"ContentType": "text/html"}))
        async with memory_store.open(A) as reader:
            chunks = [chunk async for chunk in reader]

        info = dataclasses.replace(reader.info, modified_at=None, etag=None)
        assert info == ObjectInfo(A, len(body), {}, content_type="text/html")
        assert reader.info == await memory_store.head(A)
        assert [len(chunk) for chunk in chunks] == [READ_CHUNK_BYTES, READ_CHUNK_BYTES, 115_712]
        assert b"".join(chunks) == body

    async def test_reads_the_rest(self, memory_store: MemoryStore) -> None:
        """`read` gives what was not read yet, and then nothing."""
        await memory_store.put(await request(A, bytes(READ_CHUNK_BYTES) + b"rest"))
        async with memory_store.open(A) as reader:
            await anext(reader)

            assert await reader.read() == b"rest"
            assert await reader.read() == b""

    @pytest.mark.parametrize(
        ("part", "body"),
        [((1, 3), b"ag"), ((0, 9), b"page"), ((2, None), b"ge"), ((4, 5), b""), ((2, 2), b"")],
    )
    async def test_a_part(
        self, memory_store: MemoryStore, part: tuple[int, int | None], body: bytes
    ) -> None:
        """A part has the bytes of a slice; it is described as the whole object."""
        await memory_store.put(await request(A))
        async with memory_store.open(A, part=ByteRange(*part)) as reader:
            assert await reader.read() == body
            assert reader.info == await memory_store.head(A)

    async def test_what_is_no_part(self, memory_store: MemoryStore) -> None:
        """A range that no object has is refused, and asks for nothing."""
        with pytest.raises(InvalidInputError):
            async with memory_store.open(A, part=ByteRange(2, 1)):
                raise AssertionError("not reached")
        assert memory_store.calls == []

    async def test_one_version(self, memory_store: MemoryStore) -> None:
        """Overwritten, also with the same bytes, an object is another version."""
        await memory_store.put(await request(A))
        etag = (await memory_store.head(A)).etag
        async with memory_store.open(A, etag=etag) as reader:
            assert await reader.read() == b"page"
        await memory_store.put(await request(A))

        with pytest.raises(BlobChangedError, match="not"):
            async with memory_store.open(A, etag=etag):
                raise AssertionError("not reached")

    async def test_breaks_off_in_the_middle(self, memory_store: MemoryStore) -> None:
        """A connection may be lost between any two chunks."""
        await memory_store.put(await request(A, bytes(2 * READ_CHUNK_BYTES)))
        memory_store.fail("get", stage="during", times=1)
        async with memory_store.open(A) as reader:
            assert len(await anext(reader)) == READ_CHUNK_BYTES
            with pytest.raises(StoreUnavailableError, match="broke off"):
                await anext(reader)

            assert len(await reader.read()) == READ_CHUNK_BYTES

    async def test_is_closed_afterwards(self, memory_store: MemoryStore) -> None:
        """A reader is used inside of its block only."""
        await memory_store.put(await request(A))
        async with memory_store.open(A) as reader:
            pass

        with pytest.raises(StoreClosedError, match="inside of"):
            await reader.read()
        with pytest.raises(StoreClosedError, match="inside of"):
            await anext(reader)

    async def test_of_what_is_missing(self, memory_store: MemoryStore) -> None:
        """Entering says that an object is missing."""
        with pytest.raises(BlobNotFoundError):
            async with memory_store.open(A):
                raise AssertionError("not reached")

    async def test_may_break_off(self, memory_store: MemoryStore) -> None:
        """A connection may be lost after the last chunk and before the end."""
        await memory_store.put(await request(A))
        memory_store.fail("get", stage="after")
        chunks: list[bytes] = []

        with pytest.raises(StoreUnavailableError, match="get"):
            async with memory_store.open(A) as reader:
                async for chunk in reader:
                    chunks.append(chunk)  # noqa: PERF401 - it breaks off
        assert chunks == [b"page"]


class TestPresign:
    async def test_a_url_that_nobody_answers(self, memory_store: MemoryStore) -> None:
        """The URL tells its arguments; it cannot be opened."""
        url = await memory_store.presign(
            f"{A} é", expires_in=timedelta(minutes=5), download_as="a b.html"
        )

        assert url == (
            "memory://bucket/prefix/a%20%C3%A9?expires_in=300&response-content-disposition="
            "attachment%3B+filename%3D%22a+b.html%22%3B+filename%2A%3DUTF-8%27%27a%2520b.html"
        )
        assert memory_store.calls == [("presign", (f"{A} é",))]

    async def test_can_fail(self, memory_store: MemoryStore) -> None:
        """A test can make it fail, as for lack of credentials."""
        memory_store.fail("presign")

        with pytest.raises(StoreError, match="presign"):
            await memory_store.presign(A, expires_in=timedelta(minutes=5))

    @pytest.mark.parametrize(
        "expires_in",
        [timedelta(0), timedelta(seconds=-1), timedelta(seconds=0.9), timedelta(days=7, seconds=1)],
    )
    async def test_what_sigv4_refuses_is_refused(
        self, memory_store: MemoryStore, expires_in: timedelta
    ) -> None:
        """A URL lives from one second to seven days."""
        with pytest.raises(InvalidInputError, match="7 days"):
            await memory_store.presign(A, expires_in=expires_in)
        assert memory_store.calls == []


class TestOwnership:
    @pytest.mark.parametrize(
        ("uri", "expected"),
        [
            ("s3://bucket/prefix/a", True),
            ("s3://bucket/prefix/", False),
            ("s3://bucket/prefix", False),
            ("s3://bucket/prefixed/a", False),
            ("s3://other/prefix/a", False),
            ("S3://bucket/prefix/a", False),
            ("", False),
        ],
    )
    def test_own_is_what_lies_under_the_prefix(self, uri: str, expected: bool) -> None:
        """A store owns the keys under its own bucket and prefix, and no others."""
        assert is_owned(MemoryStore(), uri) is expected

    def test_without_a_prefix_it_owns_the_bucket(self) -> None:
        """An empty prefix means the whole bucket."""
        store = MemoryStore(prefix="/")

        assert owned_uris(store, ["s3://bucket/a", "s3://bucket/b", "s3://bucket/a"]) == [
            "s3://bucket/a",
            "s3://bucket/b",
        ]

    def test_bad_names_are_refused_when_it_is_made(self) -> None:
        """Bucket and prefix are checked without any request."""
        with pytest.raises(InvalidBucketError):
            MemoryStore(bucket="")
        with pytest.raises(InvalidPrefixError):
            MemoryStore(prefix="a//b")


class TestLife:
    @pytest.mark.parametrize("was_open", [False, True])
    async def test_a_closed_store_refuses_everything(self, was_open: bool) -> None:
        """Before it was entered, and after it was left, every request is refused."""
        store = MemoryStore()
        if was_open:
            async with store:
                pass
        requests = [
            store.put(await request(A)),
            store.copy(CopyRequest("page", B, A)),
            store.get(A),
            opened(store),
            store.head(A),
            store.presign(A, expires_in=timedelta(minutes=5)),
            store.delete_many([A]),
            listed(store),
        ]

        for each in requests:
            with pytest.raises(StoreClosedError, match="async with"):
                await each
        with pytest.raises(StoreClosedError):
            _ = store.runtime
        assert store.calls == []

    async def test_objects_outlive_closing(self) -> None:
        """A store can be entered again, with what it held."""
        store = MemoryStore()
        async with store:
            await store.put(await request(A))
        async with store:
            assert await store.get(A) == b"page"

    async def test_it_is_entered_once_at_a_time(self, memory_store: MemoryStore) -> None:
        """Entering a store that is open is refused, and leaves it open."""
        with pytest.raises(StoreClosedError, match="entered already"):
            await memory_store.__aenter__()
        assert await listed(memory_store) == []

    async def test_closing_makes_second_deletes(self) -> None:
        """A second delete that is still due is made when the store closes."""
        async with MemoryStore() as store:
            store.runtime.delete_again(A, after_seconds=3600)

        assert store.calls == [("delete", (A,))]

    def test_its_repr_says_where_it_is(self) -> None:
        """A store shows its root and how much it holds."""
        assert repr(MemoryStore()) == "<MemoryStore s3://bucket/prefix/ (0 objects)>"


class TestFaults:
    async def test_a_refused_put_stores_nothing(self, memory_store: MemoryStore) -> None:
        """A request that fails before it takes effect is a definite no."""
        memory_store.fail("put")

        with pytest.raises(StoreError) as caught:
            await memory_store.put(await request(A))
        assert caught.value.may_have_taken_effect is False
        assert memory_store.objects == {}
        assert memory_store.land_late() == []

    async def test_a_lost_answer_leaves_the_object(self, memory_store: MemoryStore) -> None:
        """A request whose answer is lost has taken effect."""
        memory_store.fail("put", stage="after")

        with pytest.raises(StoreUnavailableError):
            await memory_store.put(await request(A))
        assert list(memory_store.objects) == [A]

    async def test_an_unanswered_put_may_land_late(self, memory_store: MemoryStore) -> None:
        """A PUT without an answer may take effect after the delete that was to undo it."""
        memory_store.fail(
            "put", error=lambda verb, uri: StoreUnavailableError(verb, uri, "timeout")
        )
        with pytest.raises(StoreUnavailableError):
            await memory_store.put(await request(A))
        await memory_store.delete_many([A])

        assert memory_store.objects == {}
        assert memory_store.land_late() == [A]
        assert list(memory_store.objects) == [A]
        assert memory_store.land_late() == []

    async def test_a_cancelled_put_may_land_late(self, memory_store: MemoryStore) -> None:
        """Cancelling a PUT on the wire does not take it back."""
        gate = memory_store.hold("put")
        putting = asyncio.create_task(memory_store.put(await request(A)))
        await gate.reached.wait()
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting

        assert memory_store.objects == {}
        assert memory_store.land_late() == [A]

    async def test_a_put_cancelled_after_it_took_effect_is_there(
        self, memory_store: MemoryStore
    ) -> None:
        """Cancelling while the answer is awaited leaves the object."""
        gate = memory_store.hold("put", stage="after")
        putting = asyncio.create_task(memory_store.put(await request(A)))
        await gate.reached.wait()
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting

        assert list(memory_store.objects) == [A]
        assert memory_store.land_late() == []

    async def test_faults_are_aimed(self, memory_store: MemoryStore) -> None:
        """A fault meets only the URIs with its text, and only as often as asked for."""
        memory_store.fail("put", containing="/a", times=1)

        await memory_store.put(await request(B))
        with pytest.raises(StoreError):
            await memory_store.put(await request(A))
        await memory_store.put(await request(A))
        assert set(memory_store.objects) == {A, B}

    @pytest.mark.parametrize("stage", ["before", "after"])
    @pytest.mark.parametrize("verb", ["get", "head"])
    async def test_reads_fail_at_both_stages(
        self, memory_store: MemoryStore, verb: Any, stage: Any
    ) -> None:
        """A read can be refused, and its answer can be lost."""
        await memory_store.put(await request(A))
        memory_store.fail(verb, stage=stage)

        with pytest.raises(StoreError) as caught:
            await getattr(memory_store, verb)(A)
        assert caught.value.may_have_taken_effect is (stage == "after")

    async def test_a_delete_may_be_refused(self, memory_store: MemoryStore) -> None:
        """A delete that is refused is reported with its reason, the others are carried out."""
        for uri in (A, B):
            await memory_store.put(await request(uri))
        memory_store.refuses[A] = "AccessDenied"
        report = await memory_store.delete_many([A, B])

        assert (report.deleted, report.failed) == ((B,), {A: "AccessDenied"})
        assert list(memory_store.objects) == [A]

    @pytest.mark.parametrize(("stage", "is_left"), [("before", True), ("after", False)])
    async def test_a_delete_may_fail_at_both_stages(
        self, memory_store: MemoryStore, stage: Any, is_left: bool
    ) -> None:
        """A delete that fails is reported; whether it took effect is the stage's."""
        await memory_store.put(await request(A))
        memory_store.fail("delete", stage=stage)
        report = await memory_store.delete_many([A])

        assert list(report.failed) == [A]
        assert (A in memory_store.objects) is is_left

    async def test_a_gate_holds_until_it_is_opened(self, memory_store: MemoryStore) -> None:
        """Requests wait at a gate, and those that come after it was opened pass."""
        gate = memory_store.hold("put", containing="/a")
        putting = asyncio.create_task(memory_store.put(await request(A)))
        await gate.reached.wait()
        await memory_store.put(await request(B))

        assert list(memory_store.objects) == [B]
        gate.open()
        await putting
        await memory_store.put(await request(A, b"again"))
        assert await memory_store.get(A) == b"again"

    async def test_hooks_see_every_step(self, memory_store: MemoryStore) -> None:
        """A hook, plain or a coroutine, is told each step of each request in order."""
        steps: list[Step] = []
        awaited: list[Step] = []

        async def hook(step: Step) -> None:
            awaited.append(step)

        memory_store.hooks += [steps.append, hook]
        await memory_store.put(await request(A))
        await memory_store.copy(CopyRequest("page", A, A))
        await memory_store.get(A)
        await opened(memory_store)
        await memory_store.head(A)
        await memory_store.presign(A, expires_in=timedelta(minutes=5))
        await memory_store.delete_many([A])

        assert steps == awaited
        assert steps == [
            Step(operation, stage, A)
            for operation in ("put", "copy", "get", "get", "head", "presign", "delete")
            for stage in ("before", "after")
        ]

    async def test_every_request_gives_way(self, memory_store: MemoryStore) -> None:
        """Like a real request, one in memory lets other tasks run."""
        ran = asyncio.Event()
        asyncio.get_running_loop().call_soon(ran.set)
        await memory_store.put(await request(A))

        assert ran.is_set()
