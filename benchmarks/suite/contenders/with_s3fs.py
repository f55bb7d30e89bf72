"""s3fs: its asynchronous methods for small objects, its file object for large ones."""

# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import s3fs

from ..pattern import iter_blocks
from ..place import BUCKET, KEY_ID, PART_BYTES, REGION, SECRET, Act, Place


def _file_system(place: Place, *, is_asynchronous: bool) -> Any:
    client_arguments = {"region_name": REGION}
    if place.ca_file is not None:
        client_arguments["verify"] = str(place.ca_file)
    return s3fs.S3FileSystem(
        key=KEY_ID,
        secret=SECRET,
        endpoint_url=place.endpoint_url,
        client_kwargs=client_arguments,
        asynchronous=is_asynchronous,
        use_listings_cache=False,
        skip_instance_cache=True,
    )


@contextlib.asynccontextmanager
async def _opened(place: Place) -> AsyncIterator[Any]:
    file_system = _file_system(place, is_asynchronous=True)
    session = await file_system.set_session()
    try:
        yield file_system
    finally:
        await session.close()


@contextlib.asynccontextmanager
async def put(place: Place) -> AsyncIterator[Act]:
    """Put one small object."""
    (body,) = place.bodies()
    async with _opened(place) as file_system:
        yield Act(lambda _: file_system._pipe_file(f"{BUCKET}/{place.new_key()}", body))  # noqa: SLF001 - s3fs documents its coroutines under these names


@contextlib.asynccontextmanager
async def get(place: Place) -> AsyncIterator[Act]:
    """Get one small object."""
    (body,) = place.bodies()
    path = f"{BUCKET}/{place.new_key()}"
    async with _opened(place) as file_system:
        await file_system._pipe_file(path, body)  # noqa: SLF001 - see above

        async def run(_subject: Any) -> None:
            assert await file_system._cat_file(path) == body  # noqa: SLF001 - see above

        yield Act(run)


@contextlib.asynccontextmanager
async def upload(place: Place) -> AsyncIterator[Act]:
    """Write a large object through a file object, in a thread."""
    file_system = _file_system(place, is_asynchronous=False)

    def write() -> None:
        path = f"{BUCKET}/{place.new_key()}"
        with file_system.open(path, "wb", block_size=PART_BYTES) as file:
            for block in iter_blocks(place.stream_bytes):
                file.write(block)

    yield Act(lambda _: asyncio.to_thread(write))
