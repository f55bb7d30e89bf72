"""aiobotocore by hand: with a client as it comes, and with the one that the library tunes.

The calls on the tuned client are those that the library makes: the same headers, with the
checksums in them computed. No clean-up, no guarantee.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import uuid
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aiobotocore.session import get_session
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from aioblobcol import open_store, use_explicit_begin

from ..pattern import iter_blocks
from ..place import BUCKET, CHUNK_BYTES, PART_BYTES, PARTS_IN_FLIGHT, Act, Place
from ..tables import COLUMNS, Row, commit_row, create_engine_at


@dataclasses.dataclass(frozen=True, slots=True)
class Hand:
    """A client, and the calls by hand."""

    client: Any
    is_tuned: bool

    async def put(self, key: str, body: bytes) -> str:
        """Put one object; return its URI."""
        if self.is_tuned:
            await self.client.put_object(
                Bucket=BUCKET,
                Key=key,
                Body=body,
                ChecksumCRC32=_crc32(body),
                ContentType="application/octet-stream",
                Metadata={"sha256": hashlib.sha256(body).hexdigest()},
            )
        else:
            await self.client.put_object(Bucket=BUCKET, Key=key, Body=body)
        return f"s3://{BUCKET}/{key}"

    async def get(self, key: str) -> bytes:
        """Get one object."""
        answer = await self.client.get_object(Bucket=BUCKET, Key=key)
        async with answer["Body"] as body:
            data: bytes = await body.read()
        return data

    async def upload_large(self, key: str, size: int) -> str:
        """Upload *size* bytes of unknown length in parts, so many at a time."""
        options = {"ChecksumAlgorithm": "CRC32"} if self.is_tuned else {}
        created = await self.client.create_multipart_upload(Bucket=BUCKET, Key=key, **options)
        slots = asyncio.Semaphore(PARTS_IN_FLIGHT)
        names = {"Bucket": BUCKET, "Key": key, "UploadId": created["UploadId"]}

        async def put_part(number: int, blocks: list[bytes]) -> dict[str, Any]:
            try:
                part: dict[str, Any] = {"PartNumber": number}
                body = b"".join(blocks)
                if self.is_tuned:
                    part["ChecksumCRC32"] = await asyncio.to_thread(_crc32, body)
                answer = await self.client.upload_part(**names, **part, Body=body)
                return {**part, "ETag": answer["ETag"]}
            finally:
                slots.release()

        tasks: list[asyncio.Task[dict[str, Any]]] = []
        async with asyncio.TaskGroup() as group:
            for start in range(0, size, PART_BYTES):
                await slots.acquire()
                blocks = list(iter_blocks(min(PART_BYTES, size - start)))
                tasks.append(group.create_task(put_part(len(tasks) + 1, blocks)))
        parts = {"Parts": [task.result() for task in tasks]}
        await self.client.complete_multipart_upload(**names, MultipartUpload=parts)
        return f"s3://{BUCKET}/{key}"


def _crc32(body: bytes) -> str:
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode("ascii")


@contextlib.asynccontextmanager
async def default_client(place: Place) -> AsyncIterator[Hand]:
    """Open a client as it comes."""
    async with get_session().create_client("s3", **place.client_arguments) as client:
        yield Hand(client, is_tuned=False)


@contextlib.asynccontextmanager
async def tuned_client(place: Place) -> AsyncIterator[Hand]:
    """Open the client that the library's store opens."""
    async with open_store(bucket=BUCKET, prefix="rows", **place.client_arguments) as store:
        yield Hand(store.client, is_tuned=True)


@contextlib.asynccontextmanager
async def _engine(place: Place) -> AsyncIterator[AsyncEngine]:
    engine = await create_engine_at(place.directory)
    use_explicit_begin(engine)
    try:
        yield engine
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def _put(place: Place, opening: Any) -> AsyncIterator[Act]:
    (body,) = place.bodies()
    async with opening as hand:
        yield Act(lambda _: hand.put(place.new_key(), body))


def put_default(place: Place) -> Any:
    """Put one small object."""
    return _put(place, default_client(place))


def put_tuned(place: Place) -> Any:
    """Put one small object."""
    return _put(place, tuned_client(place))


@contextlib.asynccontextmanager
async def _get(place: Place, opening: Any) -> AsyncIterator[Act]:
    (body,) = place.bodies()
    key = place.new_key()
    async with opening as hand:
        await hand.put(key, body)

        async def run(_subject: Any) -> None:
            assert await hand.get(key) == body

        yield Act(run)


def get_default(place: Place) -> Any:
    """Get one small object."""
    return _get(place, default_client(place))


def get_tuned(place: Place) -> Any:
    """Get one small object."""
    return _get(place, tuned_client(place))


@contextlib.asynccontextmanager
async def _create(place: Place, opening: Any, puts: int) -> AsyncIterator[Act]:
    bodies = place.bodies()
    async with opening as hand, _engine(place) as engine:

        async def run(_subject: Any) -> None:
            uris = await asyncio.gather(
                *(hand.put(place.new_key(), body) for body in bodies[:puts])
            )
            await commit_row(engine, [*uris, *uris[:1] * (place.columns - puts)])

        yield Act(run)


def create_floor(place: Place) -> Any:
    """Put one column, then commit the row."""
    return _create(place, tuned_client(place), 1)


def create_default(place: Place) -> Any:
    """Put all columns at once, then commit the row."""
    return _create(place, default_client(place), place.columns)


def create_tuned(place: Place) -> Any:
    """Put all columns at once, then commit the row."""
    return _create(place, tuned_client(place), place.columns)


@contextlib.asynccontextmanager
async def _upload(place: Place, opening: Any) -> AsyncIterator[Act]:
    async with opening as hand:
        await hand.put(place.new_key(), b"opens a connection")
        yield Act(lambda _: hand.upload_large(place.new_key(), place.stream_bytes))


def upload_default(place: Place) -> Any:
    """Upload a large object."""
    return _upload(place, default_client(place))


def upload_tuned(place: Place) -> Any:
    """Upload a large object."""
    return _upload(place, tuned_client(place))


@contextlib.asynccontextmanager
async def put_whole_default(place: Place) -> AsyncIterator[Act]:
    """Put a large object in one piece, as the simplest code does."""
    body = b"".join(iter_blocks(place.stream_bytes))
    async with default_client(place) as hand:
        yield Act(lambda _: hand.put(place.new_key(), body))


@contextlib.asynccontextmanager
async def download_tuned(place: Place) -> AsyncIterator[Act]:
    """Read a large object chunk by chunk."""
    async with tuned_client(place) as hand:

        async def run(_subject: Any) -> None:
            size = 0
            async for chunk in _chunks(hand, place):
                size += len(chunk)
            assert size == place.stream_bytes

        yield Act(run)


@contextlib.asynccontextmanager
async def download_to_file(place: Place) -> AsyncIterator[Act]:
    """Read a large object by one GET into a file."""
    async with tuned_client(place) as hand:

        async def run(_subject: Any) -> None:
            path = place.directory / "one-get"
            with path.open("wb") as file:
                async for chunk in _chunks(hand, place):
                    await asyncio.to_thread(file.write, chunk)
            _check_and_remove(path, place.stream_bytes)

        yield Act(run)


async def _chunks(hand: Hand, place: Place) -> AsyncIterator[bytes]:
    assert place.uri is not None
    key = place.uri.removeprefix(f"s3://{BUCKET}/")
    answer = await hand.client.get_object(Bucket=BUCKET, Key=key)
    async with answer["Body"] as body:
        async for chunk in body.iter_chunks(CHUNK_BYTES):
            yield chunk


def _check_and_remove(path: Path, size: int) -> None:
    assert path.stat().st_size == size
    path.unlink()


@contextlib.asynccontextmanager
async def bulk_tuned(place: Place) -> AsyncIterator[Act]:
    """Put the columns of many rows, 32 at a time, then one insert of all rows of a batch."""
    bodies = place.bodies()
    async with tuned_client(place) as hand, _engine(place) as engine:
        slots = asyncio.Semaphore(32)

        async def put(body: bytes) -> str:
            async with slots:
                return await hand.put(place.new_key(), body)

        async def insert_batch(rows: int) -> None:
            uris = await asyncio.gather(*(put(body) for _ in range(rows) for body in bodies))
            async with engine.begin() as connection:
                await connection.execute(insert(Row), _rows_of(uris, len(bodies)))

        async def run(_subject: Any) -> None:
            for start in range(0, place.rows, place.batch_rows):
                await insert_batch(min(place.batch_rows, place.rows - start))

        yield Act(run)


def _rows_of(uris: Sequence[str], columns: int) -> list[dict[str, str]]:
    return [
        {
            "id": uuid.uuid4().hex,
            **dict(zip(COLUMNS, uris[start : start + columns], strict=False)),
        }
        for start in range(0, len(uris), columns)
    ]


@contextlib.asynccontextmanager
async def open_default(place: Place) -> AsyncIterator[Act]:
    """Open a client."""

    async def run(_subject: Any) -> None:
        async with default_client(place):
            pass

    yield Act(run)
