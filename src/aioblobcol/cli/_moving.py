"""Files into objects and objects into files: what ``put`` and ``get`` do, once it is decided.

Invariants: an object is there as a whole or not at all, and so is a file, whatever interrupts;
what was there before stays until then. Nothing is deleted to undo an upload: the key is the
user's, and may have held another object before. Memory holds a few parts, however large the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import mimetypes
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from .._download import download_object, open_object
from .._sources import OnProgress, Part, Payload
from .._store._base import ObjectWriter, PutRequest, Store, WriteRequest, put_seconds
from .._streams import AsyncPuller, FilePuller, PartReader, Puller
from .._tasks import Budget
from ..errors import InvalidSourceError, SizeMismatchError, StoreUnavailableError
from ._courier import BlockingReader, BlockingWriter

if TYPE_CHECKING:
    from collections.abc import Mapping

STANDARD: Final = "-"
"""Stands for standard input or output, where a file may stand."""
HELD_BYTES: Final = 64 * 2**20
"""Parts in memory together, unless one alone is larger."""
READ_AHEAD: Final = 4
"""Parts of 8 MiB that are read at the same time, for what takes them in order."""

_TYPES: Final = mimetypes.MimeTypes()
_COMPRESSED: Final = {
    "br": "application/x-brotli",
    "bzip2": "application/x-bzip2",
    "compress": "application/x-compress",
    "gzip": "application/gzip",
    "xz": "application/x-xz",
}


class ReaderGoneError(Exception):
    """Nobody reads standard output any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What is uploaded; its size is None if nobody knows it."""

    name: str
    puller: Puller
    size: int | None


def content_type_of(*names: str) -> str | None:
    """Guess a content type from the first name that tells one; the same on every machine.

    A compressed file is what it is, and not what is in it: a browser would unpack it.
    """
    for name in names:
        found, packed = _TYPES.guess_type(name.rpartition("/")[2])
        if packed is not None:
            return _COMPRESSED.get(packed, "application/octet-stream")
        if found is not None:
            return found
    return None


@contextlib.contextmanager
def open_source(file: str) -> Iterator[Source]:
    """Open a file, a device or a pipe, or standard input.

    Raises:
        OSError: it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        name = Path(file).name
        if file == STANDARD:
            descriptor = descriptor_of(sys.stdin)
            opened = stack.enter_context(open(descriptor, "rb", buffering=0, closefd=False))
        else:
            opened = stack.enter_context(Path(file).open("rb", buffering=0))
        status = os.fstat(opened.fileno())
        if stat.S_ISREG(status.st_mode):
            left = max(0, status.st_size - opened.tell())
            yield Source(name, FilePuller(name, opened), left)
            return
        reader = BlockingReader(opened.fileno())
        stack.callback(reader.close)
        yield Source(name, AsyncPuller(name, reader, reader.read), None)


def descriptor_of(stream: TextIO | None) -> int:
    """Return the descriptor of standard input or output.

    Raises:
        OSError: it was closed before the program began.
    """
    if stream is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return stream.fileno()


async def upload(
    store: Store,
    uri: str,
    source: Source,
    *,
    arguments: Mapping[str, Any],
    on_progress: OnProgress,
) -> int:
    """Store *source* as one object, in parts if it is large; return its size in bytes.

    Args:
        store: reaches *uri*, which need not be under its prefix.
        uri: the object; what is there already is replaced.
        source: read once.
        arguments: named as those of ``put_object``.
        on_progress: told after each part.

    Raises:
        InvalidSourceError: the source was changed while it was read, or cannot be read.
        StoreError: what was there before is still there, unless ``may_have_taken_effect``.
    """
    on_progress(0, source.size)
    reader = PartReader(
        source.name, source.puller, total=source.size, is_declared=source.size is not None
    )
    try:
        payload = await reader.read_small()
        if payload is None:
            request = WriteRequest(source.name, uri, {}, arguments, source.size)
            await _write(store, request, reader, on_progress)
        else:
            await _put(store, uri, payload, arguments)
            on_progress(payload.size, payload.size)
    except SizeMismatchError as exc:
        raise InvalidSourceError(
            f"{source.name} was changed while it was read, and is not stored"
        ) from exc
    return reader.size


async def download(store: Store, uri: str, path: Path, *, on_progress: OnProgress) -> int:
    """Write one object into a file, which is there when it is whole; return its size in bytes.

    Raises:
        StoreError: it could not be read; the file is as it was before.
        OSError: the file cannot be written; the same state.
    """
    return (await download_object(store, uri, path, on_progress=on_progress)).size


async def copy_out(store: Store, uri: str, descriptor: int, *, on_progress: OnProgress) -> int:
    """Write one object into an open file, in order; return its size in bytes.

    Raises:
        StoreError: it could not be read; a part of it may have been written.
        ReaderGoneError: nobody reads it any more.
        OSError: it cannot be written.
    """
    writer = BlockingWriter(descriptor)
    try:
        reading = open_object(store, uri, on_progress=on_progress, parts_at_once=READ_AHEAD)
        async with reading as reader:
            async for chunk in reader:
                await writer.write(chunk)
    except BrokenPipeError as exc:
        raise ReaderGoneError from exc
    finally:
        writer.close()
    return reader.info.size


async def _put(store: Store, uri: str, payload: Payload, arguments: Mapping[str, Any]) -> None:
    request = PutRequest("file", uri, payload, {}, arguments)
    store.check_put(request)
    try:
        async with store.runtime.slots, asyncio.timeout(put_seconds(store, payload.size)):
            await store.put(request)
    except TimeoutError as exc:
        raise StoreUnavailableError("put", uri, "no answer in time") from exc


async def _write(
    store: Store, request: WriteRequest, reader: PartReader, on_progress: OnProgress
) -> None:
    """Write one object part by part; nothing of it is there if a part fails."""
    room = asyncio.Semaphore(store.capabilities.parts_at_once)
    memory = Budget(HELD_BYTES)  # of a stream without end the parts become larger
    sent = 0

    async def send(writer: ObjectWriter, part: Part, held: int) -> None:
        nonlocal sent
        try:
            async with store.runtime.slots, asyncio.timeout(put_seconds(store, part.size)):
                await writer.write(part)
        except TimeoutError as exc:
            raise StoreUnavailableError("put", request.uri, "no answer in time") from exc
        sent += part.size
        memory.release(held)
        room.release()
        on_progress(sent, request.size)

    async with store.open_writer(request) as writer:
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await room.acquire()
                    held = await memory.acquire(reader.next_bytes())  # before it is in memory
                    part = await reader.next_part()
                    if part is None:
                        break
                    group.create_task(send(writer, part, held))
                    del part
        except ExceptionGroup as exc:
            raise exc.exceptions[0]  # noqa: B904 - its own cause says more
        writer.finish(reader.crc32)
