"""Objects of several parts: bounded memory, nothing kept of what fails, nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from support.awaits import CountedTask
from support.databases import Database
from support.journaled import World, open_world
from support.streams import iterated

from aioblobcol import (
    Blob,
    BlobTooLargeError,
    BlobType,
    BlobUploadError,
    ContentTypeRefusedError,
    InvalidInputError,
    InvalidSourceError,
    PutS3ApiCall,
    SizeMismatchError,
    blob_sessionmaker,
    blob_transaction,
)
from aioblobcol._check import Check, FindingKind
from aioblobcol._journal import claim
from aioblobcol._sources import PART_BYTES
from aioblobcol._store._base import MAX_COPY_BYTES
from aioblobcol.testing import MemoryStore, Step, assert_consistent

MIB = 2**20
LARGE = bytes(range(256)) * (PART_BYTES // 256) * 2 + b"and the rest"
PARTS = 3
PNG = b"\x89PNG\r\n\x1a\n"


class Base(DeclarativeBase):
    pass


class File(Base):
    __tablename__ = "files"

    key: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[Blob | None] = mapped_column(BlobType(format="json"))
    other: Mapped[Blob | None] = mapped_column(BlobType())
    image: Mapped[Blob | None] = mapped_column(BlobType(accept=("image/*",), max_bytes=9 * MIB))
    uri: Mapped[str | None]


COLUMNS = [File.body, File.other, File.image, File.uri]

Factory = async_sessionmaker[AsyncSession]


@pytest_asyncio.fixture
async def sessions(sqlite: Database, memory_store: MemoryStore) -> AsyncIterator[Factory]:
    """Give sessions, and see to it that nothing is left that no row names."""
    async with sqlite.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield blob_sessionmaker(sqlite.engine, memory_store)
    memory_store.hooks.clear()
    await assert_consistent(memory_store, sqlite.engine, COLUMNS)


def large(piece_bytes: int = MIB) -> AsyncIterator[bytes]:
    """Give `LARGE` as an iterator of unknown length."""
    pieces = (LARGE[at : at + piece_bytes] for at in range(0, len(LARGE), piece_bytes))
    return iterated(*pieces)


async def save(sessions: Factory, key: str = "a", **values: Any) -> None:
    async with sessions() as session:
        session.add(File(key=key, **values))
        await session.commit()


async def keys(sessions: Factory) -> list[str]:
    async with sessions() as session:
        return list(await session.scalars(sa.select(File.key).order_by(File.key)))


class TestUploads:
    @pytest.mark.parametrize("kind", ["bytes", "bytearray", "path", "file", "iterator"])
    async def test_go_in_parts(
        self, kind: str, sessions: Factory, memory_store: MemoryStore, tmp_path: Path
    ) -> None:
        """What is larger than one part is created, written part by part, and completed."""
        path = tmp_path / "large"
        path.write_bytes(LARGE)
        source: Any = {
            "bytes": LARGE,
            "bytearray": bytearray(LARGE),
            "path": path,
            "file": io.BytesIO(LARGE),
            "iterator": large(),
        }[kind]
        await save(sessions, body=Blob(source))

        operations = [operation for operation, _ in memory_store.calls]
        assert operations == ["create", *["write"] * PARTS, "complete"]
        async with sessions() as session:
            body = (await session.get_one(File, "a")).body
            assert body is not None
            assert (body.size, body.sha256) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
            assert await body.read() == LARGE

    @pytest.mark.parametrize("size", [PART_BYTES - 1, PART_BYTES])
    async def test_of_one_part_are_one_request(
        self, size: int, sessions: Factory, memory_store: MemoryStore
    ) -> None:
        """As much as one part goes by a single PUT, also of a stream."""
        await save(sessions, body=Blob(iterated(bytes(size))), other=Blob(bytes(size)))

        assert [operation for operation, _ in memory_store.calls] == ["put", "put"]

    async def test_tell_their_progress(self, sessions: Factory) -> None:
        """The callback hears of each part, with the total where it is known."""
        heard: list[tuple[int, int | None]] = []
        await save(
            sessions,
            body=Blob(LARGE, on_progress=lambda *args: heard.append(args)),
            other=Blob(b"small", on_progress=lambda *args: heard.append(args)),
        )

        assert (5, 5) in heard
        parts = [done for done, total in heard if total == len(LARGE)]
        assert parts == sorted(parts)
        assert (len(parts), parts[-1]) == (PARTS, len(LARGE))

    async def test_a_callback_that_raises_fails_the_upload(self, sessions: Factory) -> None:
        """Nothing is kept then, and the error is the cause."""

        def fail(_done: int, _total: int | None) -> None:
            raise ZeroDivisionError

        with pytest.raises(BlobUploadError) as caught:
            await save(sessions, body=Blob(large(), on_progress=fail))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    async def test_of_the_explicit_strength(
        self, sessions: Factory, memory_store: MemoryStore, tmp_path: Path
    ) -> None:
        """`put_s3` takes them, too; the key of a stream names no MD5."""
        path = tmp_path / "large"
        path.write_bytes(LARGE)
        uris = []
        sources: dict[str, Any] = {"bytes": LARGE, "path": path, "stream": large()}
        for key, source in sources.items():
            async with sessions() as session, blob_transaction(session) as tx:
                result = await tx.put_s3(
                    api_calls=[PutS3ApiCall("uri", source, None)], pk=key, store=memory_store
                )
                uris.append(result.to_values()["uri"])
                session.add(File(key=key, uri=uris[-1]))

        md5 = hashlib.md5(LARGE).hexdigest()  # noqa: S324 - no security
        assert [f"md5={md5}" in uri for uri in uris] == [True, True, False]
        assert "md5=" not in uris[2]
        for uri in uris[:2]:
            assert (await memory_store.head(uri)).metadata["sha256"] == (
                hashlib.sha256(LARGE).hexdigest()
            )

    async def test_unchanged_files_are_left_alone(
        self, sessions: Factory, memory_store: MemoryStore, tmp_path: Path
    ) -> None:
        """`skip_unchanged` compares a large file, of which nothing is sent then."""
        path = tmp_path / "large"
        path.write_bytes(LARGE)
        old: str | None = None
        for _ in range(2):
            async with sessions() as session, blob_transaction(session) as tx:
                result = await tx.put_s3(
                    api_calls=[PutS3ApiCall("uri", path, old)],
                    pk="a",
                    store=memory_store,
                    skip_unchanged=True,
                )
                await session.merge(File(key="a", **result.to_values()))
                old = result.put_s3backed_column_results[0].new_s3_uri

        assert [operation for operation, _ in memory_store.calls].count("create") == 1

    async def test_a_file_that_is_changed_after_it_was_hashed(
        self, sessions: Factory, memory_store: MemoryStore, tmp_path: Path
    ) -> None:
        """The key's MD5 and the bytes are of one moment, or nothing is kept."""
        path = tmp_path / "large"
        path.write_bytes(LARGE)

        def change(step: Step) -> None:
            if (step.operation, step.stage) == ("create", "before"):
                path.write_bytes(LARGE[::-1])

        memory_store.hooks.append(change)
        with pytest.raises(BlobUploadError, match="was changed"):
            async with sessions() as session, blob_transaction(session) as tx:
                await tx.put_s3(
                    api_calls=[PutS3ApiCall("uri", path, None)], pk="a", store=memory_store
                )

    async def test_copies_between_stores(
        self, sessions: Factory, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """A large object of another store is streamed into this one."""
        await save(sessions, body=Blob(large()))
        async with MemoryStore(prefix="second") as second, sessions() as session:
            original = (await session.get_one(File, "a")).body
            assert original is not None
            elsewhere = blob_sessionmaker(sqlite.engine, second)
            async with elsewhere() as other:
                other.add(copy := File(key="b", other=original.copy()))
                await other.commit()
                assert copy.other is not None
                assert await second.get(copy.other.uri) == LARGE
                assert [operation for operation, _ in second.calls].count("write") == PARTS
                await other.delete(copy)
                await other.commit()

    async def test_copies_between_stores_go_on_where_a_connection_breaks_off(
        self, sessions: Factory, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """They read as everybody else does: from the next byte on, of the same version."""
        await save(sessions, body=Blob(large()))
        memory_store.fail("get", stage="during", times=1)
        async with MemoryStore(prefix="second") as second, sessions() as session:
            original = (await session.get_one(File, "a")).body
            assert original is not None
            async with blob_sessionmaker(sqlite.engine, second)() as other:
                other.add(copy := File(key="b", other=original.copy()))
                await other.commit()
                assert copy.other is not None
                assert await second.get(copy.other.uri) == LARGE
                await other.delete(copy)
                await other.commit()

        assert [operation for operation, _ in memory_store.calls].count("get") == 2

    async def test_copies_of_what_no_server_copies(
        self, sessions: Factory, memory_store: MemoryStore
    ) -> None:
        """More than 5 GiB are copied by reading them, within one store too."""
        await save(sessions, body=Blob(large()))
        async with sessions() as session:
            original = (await session.get_one(File, "a")).body
            assert original is not None
            original._facts = dataclasses.replace(original._facts, size=MAX_COPY_BYTES + 1)
            memory_store.calls.clear()
            session.add(copy := File(key="b", other=original.copy()))
            await session.commit()

        operations = [operation for operation, _ in memory_store.calls]
        assert operations == ["get", "create", *["write"] * PARTS, "complete"]
        assert copy.other is not None
        assert await copy.other.read() == LARGE


class TestTypes:
    @pytest.mark.parametrize(
        "body", [b"<html><script>", b"\x7fELF" + bytes(100), b"just text", b"GIF", b""]
    )
    async def test_bytes_that_are_not_what_they_are_said_to_be(
        self, body: bytes, sessions: Factory
    ) -> None:
        """What certainly is no image is refused by its first bytes, whatever was declared."""
        with pytest.raises(BlobUploadError) as caught:
            await save(sessions, image=Blob(iterated(body), content_type="image/png"))
        assert isinstance(caught.value.__cause__, ContentTypeRefusedError)

    @pytest.mark.parametrize(
        ("body", "declared", "stored"),
        [
            (PNG + b"...", "image/png", "image/png"),
            (PNG + b"...", None, "image/png"),
            (b"\xff\xd8\xff\xe0\x00\x10JFIF", "image/jpeg", "image/jpeg"),
            (b"<?xml version='1.0'?><svg/>", "image/svg+xml", "image/svg+xml"),
            (b"nobody knows", "image/x-of-our-own", "image/x-of-our-own"),
            (b"\x00\x00\x00\x18ftypheic", "image/heic", "image/heic"),
        ],
    )
    async def test_bytes_that_may_be(
        self, body: bytes, declared: str | None, stored: str, sessions: Factory
    ) -> None:
        """What may be an image is taken; without a declared type the bytes tell it."""
        await save(sessions, image=Blob(iterated(body), content_type=declared))
        async with sessions() as session:
            image = (await session.get_one(File, "a")).image
            assert image is not None
            assert (await image.stat()).content_type == stored

    async def test_of_large_ones(self, sessions: Factory, memory_store: MemoryStore) -> None:
        """The first part tells; nothing was sent when it does."""
        with pytest.raises(BlobUploadError, match="its first bytes are application/pdf"):
            await save(
                sessions,
                image=Blob(iterated(b"%PDF-1.7", LARGE[:PART_BYTES]), content_type="image/png"),
            )
        assert memory_store.calls == []

    async def test_unknown_ones_without_a_declaration(self, sessions: Factory) -> None:
        """What nobody knows is no image."""
        with pytest.raises(BlobUploadError, match="application/octet-stream"):
            await save(sessions, image=Blob(b"nobody knows"))


class TestFailures:
    @pytest.mark.parametrize("stage", ["before", "after"])
    @pytest.mark.parametrize("operation", ["create", "write", "complete"])
    async def test_of_each_request(
        self, operation: Any, stage: Any, sessions: Factory, memory_store: MemoryStore
    ) -> None:
        """Whatever fails, before it takes effect or after, nothing is kept and no row written."""
        memory_store.fail(operation, stage=stage, times=1)
        with pytest.raises(BlobUploadError):
            await save(sessions, body=Blob(large()), other=Blob(b"small"))

        assert await keys(sessions) == []
        assert memory_store.uploads == {}
        await save(sessions, body=Blob(LARGE))

    async def test_of_one_of_several(self, sessions: Factory, memory_store: MemoryStore) -> None:
        """A large upload is stopped when another column fails; nobody waits for its client."""
        reached = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield bytes(MIB)
                reached.set()
                await asyncio.sleep(0)

        async def fail(step: Step) -> None:
            if "col=other" in step.uri:
                await reached.wait()
                raise ZeroDivisionError

        memory_store.hooks.append(fail)
        with pytest.raises(BlobUploadError, match="other"):
            await save(sessions, body=Blob(endless()), other=Blob(b"small"))

    @pytest.mark.parametrize(
        ("source", "arguments", "error"),
        [
            (lambda: iterated(*[bytes(MIB)] * 20), {"size": 19 * MIB}, SizeMismatchError),
            (lambda: iterated(*[bytes(MIB)] * 20), {"size": 21 * MIB}, SizeMismatchError),
            (lambda: iterated(b"five."), {"size": 4}, SizeMismatchError),
            (lambda: iterated(b"five."), {"size": 6}, SizeMismatchError),
            (lambda: iterated(bytes(9 * MIB), "text"), {}, InvalidSourceError),
        ],
    )
    async def test_of_the_source(
        self, source: Any, arguments: Any, error: type[Exception], sessions: Factory
    ) -> None:
        """A source that breaks its promise in the middle leaves nothing."""
        with pytest.raises(BlobUploadError) as caught:
            await save(sessions, body=Blob(source(), **arguments))
        assert isinstance(caught.value.__cause__, error)

    async def test_a_source_that_was_cancelled(self, sessions: Factory) -> None:
        """A source that waits for what was cancelled has failed; nobody waits for the others."""
        silent, work = asyncio.Event(), asyncio.get_running_loop().create_future()
        work.cancel()

        async def pieces(wanted: asyncio.Future[bytes]) -> AsyncIterator[bytes]:
            yield LARGE
            yield await wanted

        async def silence() -> AsyncIterator[bytes]:
            yield LARGE
            await silent.wait()

        with pytest.raises(BlobUploadError, match="was cancelled"):
            await save(sessions, body=Blob(pieces(work)), other=Blob(silence()))

    async def test_too_much(self, sessions: Factory, memory_store: MemoryStore) -> None:
        """Reading stops with the byte that is too many."""
        pulled = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal pulled
            yield PNG
            while True:
                pulled += 1
                yield bytes(MIB)

        with pytest.raises(BlobUploadError) as caught:
            await save(sessions, image=Blob(endless()))
        assert isinstance(caught.value.__cause__, BlobTooLargeError)
        assert pulled == 9

    async def test_sizes_that_are_wrong_at_once(self, tmp_path: Path) -> None:
        """What can be known when the blob is made is refused then."""
        path = tmp_path / "five"
        path.write_bytes(b"five.")
        for source in (b"five.", path):
            with pytest.raises(SizeMismatchError, match="5 bytes are here, 4 were declared"):
                Blob(source, size=4)
        with pytest.raises(BlobTooLargeError):
            Blob(iterated(), size=2**63)
        for size in (-1, "4", 4.0, True):
            with pytest.raises(InvalidInputError):
                Blob(iterated(), size=size)  # type: ignore[arg-type]


class TestCancellation:
    @pytest.mark.parametrize("stage", ["before", "after"])
    @pytest.mark.parametrize("operation", ["create", "write", "complete"])
    async def test_in_each_request(
        self, operation: Any, stage: Any, sessions: Factory, memory_store: MemoryStore
    ) -> None:
        """Parts are stopped at once, a completion is run to its end; nothing is left."""
        gate = memory_store.hold(operation, stage=stage)
        task = asyncio.create_task(save(sessions, body=Blob(large()), other=Blob(b"small")))
        await gate.reached.wait()
        task.cancel()
        if operation != "write":
            gate.open()
        await asyncio.wait({task})
        gate.open()

        assert task.cancelled()
        assert await keys(sessions) == []

    async def test_while_the_source_is_slow(self, sessions: Factory) -> None:
        """Nobody waits for a client that sends nothing."""
        reached = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield LARGE
            reached.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(save(sessions, body=Blob(slow())))
        await reached.wait()
        task.cancel()
        await asyncio.wait({task})

        assert task.cancelled()

    async def test_at_every_await(self, sqlite: Database) -> None:
        """Wherever the cancellation comes, both stores agree, and nothing is incomplete."""
        async with sqlite.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        for moment in range(1, 800):
            async with MemoryStore() as store:
                sessions = blob_sessionmaker(sqlite.engine, store)
                work = save(sessions, f"{moment}", body=Blob(LARGE), other=Blob(iterated(LARGE)))
                reached = False
                with contextlib.suppress(asyncio.CancelledError):
                    reached = await CountedTask(work, cancel_at=moment).run()
                store.land_late()
                assert store.uploads == {}
                async with sessions() as session, session.begin():
                    committed = (await session.scalars(sa.select(File))).all()
                    assert len(store.objects) == 2 * len(committed)
                    for each in committed:
                        await session.delete(each)
                assert store.objects == {}
                if reached is False and committed:
                    return
        raise AssertionError("not reached")


class TestMemory:
    async def test_is_bounded_over_all_uploads(self, sqlite: Database, tmp_path: Path) -> None:
        """Together they hold no more than the store's bytes in flight, whatever they are."""
        limit = 3 * PART_BYTES
        held = most = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal held, most
            for _ in range(24):
                held += MIB
                most = max(most, held)
                yield bytes(MIB)

        def written(step: Step) -> None:
            nonlocal held
            if (step.operation, step.stage) == ("write", "after"):
                held -= PART_BYTES

        async with MemoryStore(max_bytes_in_flight=limit) as store:
            store.hooks.append(written)
            async with sqlite.engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
            sessions = blob_sessionmaker(sqlite.engine, store)
            async with sessions() as session:
                for number in range(6):
                    session.add(File(key=f"{number}", body=Blob(counted())))
                await session.commit()
            assert store.runtime.budget.used == 0

        # and each reads one piece ahead, to know whether its first part is all
        assert PART_BYTES < most <= limit + 6 * MIB

    @pytest.mark.parametrize("sources", ["streams", "bytes", "both"])
    async def test_no_deadlock(self, sources: str, sqlite: Database) -> None:
        """With room for one part and one request at a time everything is uploaded."""
        async with sqlite.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with MemoryStore(max_bytes_in_flight=PART_BYTES, max_concurrency=1) as store:
            sessions = blob_sessionmaker(sqlite.engine, store)

            def blob(number: int) -> Blob:
                as_stream = sources == "streams" or (sources == "both" and number % 2)
                return Blob(large() if as_stream else LARGE)

            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                for number in range(5):
                    group.create_task(
                        save(sessions, f"{number}", body=blob(number), other=Blob(b"small"))
                    )
            assert len(store.objects) == 10
            assert store.runtime.budget.used == 0

    async def test_is_shared_fairly(
        self, sqlite: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Uploads take turns part by part; none waits for another one's end."""
        # no threads: one that lags would leave the other one's turns to it
        monkeypatch.setattr("aioblobcol._streams.HASH_INLINE_BYTES", 2 * PART_BYTES)
        async with sqlite.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with MemoryStore(max_bytes_in_flight=2 * PART_BYTES) as store:
            sessions = blob_sessionmaker(sqlite.engine, store)
            both = asyncio.Barrier(2)

            async def start_together(step: Step) -> None:
                if step.operation == "create" and step.stage == "before":
                    await both.wait()

            store.hooks.append(start_together)
            async with asyncio.TaskGroup() as group:
                for key in ("a", "b"):
                    group.create_task(save(sessions, key, body=Blob(iterated(*[LARGE] * 4))))
            order = [uris[0] for operation, uris in store.calls if operation == "write"]

        first = {uri: order.index(uri) for uri in order}
        last = {uri: len(order) - 1 - order[::-1].index(uri) for uri in order}
        assert max(first.values()) < min(last.values())
        runs = [len(run.group()) for run in re.finditer(r"(.)\1*", _letters(order))]
        assert max(runs) <= 3

    async def test_a_client_that_sends_nothing_keeps_no_slot(
        self, sessions: Factory, sqlite: Database
    ) -> None:
        """Small uploads go on while somebody else's client is slow."""
        waiting, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"slow"
            waiting.set()
            await go_on.wait()

        async with MemoryStore(max_concurrency=1, prefix="slow") as store:
            own = blob_sessionmaker(sqlite.engine, store)
            async with asyncio.TaskGroup() as group:
                group.create_task(save(own, "slow", body=Blob(slow())))
                await waiting.wait()
                await save(own, "quick", body=Blob(b"quick"))
                go_on.set()
            async with own() as session, session.begin():
                for key in ("slow", "quick"):
                    await session.delete(await session.get_one(File, key))


def _letters(uris: list[str]) -> str:
    return "".join("ab"[sorted(set(uris)).index(uri)] for uri in uris)


class TestAfterARollback:
    @pytest.mark.parametrize("kind", ["file", "bytes"])
    async def test_what_can_be_read_again_is_uploaded_again(
        self, kind: str, sessions: Factory
    ) -> None:
        """The blob waits in its attribute, and goes under a fresh key the next time."""
        blob = Blob(io.BytesIO(LARGE) if kind == "file" else LARGE)
        async with sessions() as session:
            session.add(File(key="a", body=blob))
            await session.flush()
            first = blob.uri
            await session.rollback()
            session.add(File(key="a", body=blob))
            await session.commit()

        assert blob.uri != first
        assert await blob.read() == LARGE

    async def test_what_cannot_is_refused(self, sessions: Factory) -> None:
        """A stream that is used up does not pass for an empty one."""
        blob = Blob(large())
        async with sessions() as session:
            session.add(File(key="a", body=blob))
            await session.flush()
            await session.rollback()
            session.add(File(key="a", body=blob))
            with pytest.raises(BlobUploadError, match="cannot be rewound"):
                await session.commit()

    async def test_one_stream_in_two_cells(self, sessions: Factory) -> None:
        """A large stream goes into one cell; a small one is shared."""
        small, much = Blob(iterated(b"small")), Blob(io.BytesIO(LARGE))
        await save(sessions, "a", body=small, other=small.copy())
        with pytest.raises(BlobUploadError, match="another cell"):
            await save(sessions, "b", body=much, other=much.copy())
        await save(sessions, "c", body=much)


class TestJournal:
    @pytest_asyncio.fixture
    async def world(self, database: Database) -> AsyncIterator[World]:
        async with open_world(database) as world:
            yield world
            await world.check()

    async def test_an_upload_is_written_down_before_its_first_part(self, world: World) -> None:
        """Whoever is killed then leaves an entry that names what has to be aborted."""
        gate = world.store.hold("write")
        noted: list[Any] = []

        async def look() -> None:
            await gate.reached.wait()
            async with world.engine.connect() as connection:
                table = world.journal.table
                rows = await connection.execute(sa.select(table.c.state, table.c.upload_id))
                noted.extend(tuple(row) for row in rows)
            gate.open()

        async with asyncio.TaskGroup() as group, world.sessions() as session:
            group.create_task(look())
            session.add(world.Doc(key="a", body=Blob(LARGE)))
            await session.commit()

        assert [state for state, _ in noted] == ["staged"]
        assert len(noted[0][1]) == 32

    async def test_what_a_killed_process_leaves_is_aborted(self, world: World) -> None:
        """The worker aborts an upload before its object is deleted, and tries again."""
        uri = f"s3://bucket/app/x/col=body/id={'0' * 32}"
        upload_id = "left by a killed process"
        world.store.uploads[upload_id] = uri
        async with world.engine.begin() as connection:
            await connection.execute(
                sa.insert(world.journal.table).values(uri=uri, state="staged", upload_id=upload_id)
            )
        await world.expire_leases()
        world.store.fail("abort", times=1)
        first = await world.worker().run_once()
        assert list(first.failed) == [uri]
        assert upload_id in world.store.uploads
        await world.expire_leases()
        second = await world.worker().run_once()

        assert (second.failed, world.store.uploads) == ({}, {})

    async def test_one_that_was_condemned_meanwhile_fails(self, world: World) -> None:
        """Nothing is sent for an object that the worker has taken already."""

        async def condemn(step: Step) -> None:
            if (step.operation, step.stage) == ("create", "after"):
                async with world.engine.begin() as connection:
                    await connection.execute(
                        sa.update(world.journal.table).values(state="deleting")
                    )

        world.store.hooks.append(condemn)
        async with world.sessions() as session:
            session.add(world.Doc(key="a", body=Blob(LARGE)))
            with pytest.raises(BlobUploadError, match="was condemned"):
                await session.commit()

        assert "write" not in [operation for operation, _ in world.store.calls]

    @pytest.mark.parametrize("stage", ["before", "after"])
    @pytest.mark.parametrize("operation", ["write", "complete"])
    async def test_one_that_the_worker_takes_in_the_middle(
        self, operation: str, stage: str, world: World
    ) -> None:
        """An upload whose lease ran out, for its process stood still, gives no row an object."""
        is_done = False

        async def work(step: Step) -> None:
            nonlocal is_done
            if (step.operation, step.stage, is_done) == (operation, stage, False):
                is_done = True
                await world.expire_leases()
                await world.worker().run_once()

        world.store.hooks.append(work)
        async with world.sessions() as session:
            session.add(world.Doc(key="a", body=Blob(LARGE)))
            with pytest.raises((BlobUploadError, sa.exc.DBAPIError)):
                await session.commit()

        assert is_done

    @pytest.mark.parametrize("delete", [False, True])
    async def test_the_check_finds_what_nobody_wrote_down(self, world: World, delete: bool) -> None:
        """An upload that is not listed is nobody's; one that is listed is under way."""
        mine, lost = (f"s3://bucket/app/x/col=body/id={digit * 32}" for digit in "01")
        world.store.uploads |= {"mine": mine, "lost": lost, "foreign": "s3://bucket/app/else"}
        async with world.engine.begin() as connection:
            await connection.execute(
                sa.insert(world.journal.table).values(uri=mine, state="staged", upload_id="mine")
            )
        await claim(world.journal, world.engine)
        check = Check(
            world.engine, world.store, world.Base.metadata, journal=world.journal, delete=delete
        )
        found = [finding async for finding in check.findings()]

        assert [(each.kind, each.uri, each.is_condemned) for each in found] == [
            (FindingKind.INCOMPLETE_UPLOAD, lost, delete)
        ]
        assert ("lost" in world.store.uploads) != delete
        for name in ("lost", "foreign"):
            world.store.uploads.pop(name, None)

    async def test_the_check_goes_on_after_what_cannot_be_aborted(self, world: World) -> None:
        """An upload that the store does not give up is told of, and the next one is dealt with."""
        first, second = (f"s3://bucket/app/x/col=body/id={digit * 32}" for digit in "01")
        world.store.uploads |= {"first": first, "second": second}
        await claim(world.journal, world.engine)
        world.store.fail("abort", times=1)
        check = Check(
            world.engine, world.store, world.Base.metadata, journal=world.journal, delete=True
        )
        found = [finding async for finding in check.findings()]

        assert [(each.uri, each.is_condemned) for each in found] == [(first, False), (second, True)]
        assert "not aborted" in (found[0].reason or "")
        assert world.store.uploads.pop("first") == first
