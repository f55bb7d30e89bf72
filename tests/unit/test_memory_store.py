"""`MemoryStore`: the protocol in memory, as unreliable as a test asks it to be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aioblobcol._sources import read_payloads
from aioblobcol._store._base import ObjectInfo, PutRequest, is_owned, owned_uris
from aioblobcol.errors import (
    BlobNotFoundError,
    ForeignUriError,
    InvalidBucketError,
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


async def listed(store: MemoryStore) -> list[str]:
    return [uri async for uri in store.iter_uris()]


class TestVerbs:
    async def test_what_was_put_can_be_read(self, memory_store: MemoryStore) -> None:
        """An object comes back with its bytes, its size and its metadata decoded."""
        answered = await memory_store.put(await request(A, b"page", metadata={"Name": "ü"}))

        assert answered is True
        assert await memory_store.get(A) == b"page"
        assert await memory_store.head(A) == ObjectInfo(A, 4, {"name": "ü"})

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
            store.get(A),
            store.head(A),
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
        await memory_store.get(A)
        await memory_store.head(A)
        await memory_store.delete_many([A])

        assert steps == awaited
        assert steps == [
            Step(operation, stage, A)
            for operation in ("put", "get", "head", "delete")
            for stage in ("before", "after")
        ]

    async def test_every_request_gives_way(self, memory_store: MemoryStore) -> None:
        """Like a real request, one in memory lets other tasks run."""
        ran = asyncio.Event()
        asyncio.get_running_loop().call_soon(ran.set)
        await memory_store.put(await request(A))

        assert ran.is_set()
