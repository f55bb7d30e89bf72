"""obstore by hand: the calls of its documentation, no clean-up, no guarantee."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import obstore
from obstore.store import S3Store

from ..pattern import stream_pattern
from ..place import BUCKET, CHUNK_BYTES, PART_BYTES, PARTS_IN_FLIGHT, Act, Place


def open_s3(place: Place) -> Any:
    """Return obstore's store."""
    return S3Store(BUCKET, **place.obstore_config, client_options=place.obstore_client_options)


@contextlib.asynccontextmanager
async def put(place: Place) -> AsyncIterator[Act]:
    """Put one small object."""
    (body,) = place.bodies()
    store = open_s3(place)
    yield Act(lambda _: obstore.put_async(store, place.new_key(), body))


@contextlib.asynccontextmanager
async def get(place: Place) -> AsyncIterator[Act]:
    """Get one small object."""
    (body,) = place.bodies()
    store = open_s3(place)
    key = place.new_key()
    await obstore.put_async(store, key, body)

    async def run(_subject: Any) -> None:
        answer = await obstore.get_async(store, key)
        assert bytes(await answer.bytes_async()) == body

    yield Act(run)


@contextlib.asynccontextmanager
async def create(place: Place) -> AsyncIterator[Act]:
    """Put all columns at once, then commit the row."""
    from ..tables import commit_row, create_engine_at  # noqa: PLC0415 - the others need none

    bodies = place.bodies()
    store = open_s3(place)
    engine = await create_engine_at(place.directory)

    async def run(_subject: Any) -> None:
        keys = [place.new_key() for _ in bodies]
        puts = (obstore.put_async(store, k, b) for k, b in zip(keys, bodies, strict=True))
        await asyncio.gather(*puts)
        await commit_row(engine, [f"s3://{BUCKET}/{key}" for key in keys])

    try:
        yield Act(run)
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def upload(place: Place) -> AsyncIterator[Act]:
    """Upload a large object from an async iterator."""
    store = open_s3(place)
    await obstore.put_async(store, place.new_key(), b"opens a connection")

    async def run(_subject: Any) -> None:
        await obstore.put_async(
            store,
            place.new_key(),
            stream_pattern(place.stream_bytes),
            chunk_size=PART_BYTES,
            max_concurrency=PARTS_IN_FLIGHT,
        )

    yield Act(run)


@contextlib.asynccontextmanager
async def download(place: Place) -> AsyncIterator[Act]:
    """Read a large object chunk by chunk."""
    assert place.uri is not None
    store = open_s3(place)
    key = place.uri.removeprefix(f"s3://{BUCKET}/")

    async def run(_subject: Any) -> None:
        size = 0
        answer = await obstore.get_async(store, key)
        async for chunk in answer.stream(min_chunk_size=CHUNK_BYTES):
            size += len(chunk)
        assert size == place.stream_bytes

    yield Act(run)
