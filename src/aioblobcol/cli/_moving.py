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
import secrets
import stat
import sys
import zlib
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from .._sources import AsyncReadable, OnProgress, Part, read_payload
from .._store._base import PutRequest, Store, WriteRequest, put_seconds
from ..errors import InvalidSourceError, StoreUnavailableError
from ._courier import BlockingReader, BlockingWriter

if TYPE_CHECKING:
    from collections.abc import Mapping

STANDARD: Final = "-"
"""Stands for standard input or output, where a file may stand."""
PART_BYTES: Final = 8 * 2**20
MAX_PARTS: Final = 10_000
"""Source: Amazon S3 User Guide, "Amazon S3 multipart upload limits"."""
GROWING_EVERY: Final = 1000
"""Parts of an unknown number; after so many they are twice as large. 10,000 have 8 TiB together."""
HELD_BYTES: Final = 64 * 2**20
"""Parts in memory together, unless one alone is larger."""

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
    reader: AsyncReadable
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
        if file == STANDARD:
            descriptor = descriptor_of(sys.stdin)
        else:
            descriptor = stack.enter_context(Path(file).open("rb", buffering=0)).fileno()
        name, status = Path(file).name, os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            left = max(0, status.st_size - os.lseek(descriptor, 0, os.SEEK_CUR))
            yield Source(name, _FileReader(descriptor), left)
            return
        reader = BlockingReader(descriptor)
        stack.callback(reader.close)
        yield Source(name, reader, None)


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
    parts = _Parts(source)
    first = await parts.next()
    if parts.is_at_end:
        parts.check_size()
        await _put(store, uri, first, arguments)
        on_progress(parts.size, parts.size)
        return parts.size
    request = WriteRequest(source.name, uri, {}, arguments, source.size)
    async with store.open_writer(request) as writer:
        sent = 0

        async def write(part: Part, slots: asyncio.Semaphore) -> None:
            nonlocal sent
            try:
                async with asyncio.timeout(put_seconds(store, part.size)):
                    await writer.write(part)
            except TimeoutError as exc:
                raise StoreUnavailableError("put", uri, "no answer in time") from exc
            sent += part.size
            slots.release()
            on_progress(sent, source.size)

        at_once = max(1, min(store.capabilities.parts_at_once, HELD_BYTES // first.size))
        slots = asyncio.Semaphore(at_once)
        try:
            async with asyncio.TaskGroup() as group:
                part = first
                del first
                await slots.acquire()
                while part.size:
                    group.create_task(write(part, slots))
                    del part
                    await slots.acquire()  # before the next part is in memory
                    part = await parts.next()
        except ExceptionGroup as exc:
            raise exc.exceptions[0] from exc
        parts.check_size()
        writer.finish(parts.crc32)
    return parts.size


async def download(store: Store, uri: str, path: Path, *, on_progress: OnProgress) -> int:
    """Write one object into a file, which is there when it is whole; return its size in bytes.

    Raises:
        StoreError: it could not be read; the file is as it was before.
        OSError: the file cannot be written; the same state.
    """
    # named apart from the target, whose name may be as long as names can be
    beside = path.with_name(f".aioblobcol-{secrets.token_hex(8)}.part")
    try:
        with beside.open("xb") as file:
            async with contextlib.aclosing(_chunks(store, uri, on_progress)) as chunks:
                size = 0
                async for chunk in chunks:
                    await asyncio.to_thread(file.write, chunk)
                    size += len(chunk)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return size


async def copy_out(store: Store, uri: str, descriptor: int, *, on_progress: OnProgress) -> int:
    """Write one object into an open file, in order; return its size in bytes.

    Raises:
        StoreError: it could not be read; a part of it may have been written.
        ReaderGoneError: nobody reads it any more.
        OSError: it cannot be written.
    """
    writer = BlockingWriter(descriptor)
    size = 0
    try:
        async with contextlib.aclosing(_chunks(store, uri, on_progress)) as chunks:
            async for chunk in chunks:
                await writer.write(chunk)
                size += len(chunk)
    except BrokenPipeError as exc:
        raise ReaderGoneError from exc
    finally:
        writer.close()
    return size


async def _chunks(store: Store, uri: str, on_progress: OnProgress) -> AsyncGenerator[bytes, None]:
    async with store.open(uri) as reader:
        total, done = reader.info.size, 0
        on_progress(0, total)
        async for chunk in reader:
            yield chunk
            done += len(chunk)
            on_progress(done, total)


async def _put(store: Store, uri: str, part: Part, arguments: Mapping[str, Any]) -> None:
    body = part.pieces[0] if len(part.pieces) == 1 else b"".join(part.pieces)
    payload = await read_payload("file", body, with_md5=False)
    request = PutRequest("file", uri, payload, {}, arguments)
    store.check_put(request)
    try:
        async with store.runtime.slots, asyncio.timeout(put_seconds(store, part.size)):
            await store.put(request)
    except TimeoutError as exc:
        raise StoreUnavailableError("put", uri, "no answer in time") from exc


class _FileReader:
    """A regular file, which is read in threads: it keeps nobody waiting for long."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    async def read(self, size: int, /) -> bytes:
        return await asyncio.to_thread(os.read, self._descriptor, size)


class _Parts:
    """A source part by part, with what is known of all that was read so far."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._number = 0
        self.size = 0
        self.crc32 = 0
        self.is_at_end = False

    async def next(self) -> Part:
        """Read one part; an empty one at the end."""
        self._number += 1
        wanted = self._part_bytes()
        pieces, size, crc32 = [], 0, 0
        while size < wanted and not self.is_at_end:
            try:
                piece = await self._source.reader.read(wanted - size)
            except OSError as exc:
                raise InvalidSourceError(f"cannot read {self._source.name}: {exc}") from exc
            self.is_at_end = not piece
            size += len(piece)
            pieces.append(piece)
            crc32, self.crc32 = await asyncio.to_thread(_crc32s, piece, crc32, self.crc32)
        self.size += size
        self.is_at_end |= self._source.size is not None and self.size == self._source.size
        return Part(self._number, pieces, size, crc32)

    def check_size(self) -> None:
        """Refuse a file that has become another one.

        Raises:
            InvalidSourceError: there were more or fewer bytes than it had.
        """
        if self._source.size is not None and self.size != self._source.size:
            raise InvalidSourceError(
                f"{self._source.name} was changed while it was read: {self.size:,} bytes instead "
                f"of {self._source.size:,}; nothing was stored"
            )

    def _part_bytes(self) -> int:
        """Return how large the next part is: all alike, or growing if nobody knows how many."""
        if self._source.size is not None:
            least = -(-self._source.size // MAX_PARTS)
            return max(PART_BYTES, -(-least // 2**20) * 2**20)
        doublings: int = (self._number - 1) // GROWING_EVERY
        return PART_BYTES << doublings


def _crc32s(piece: bytes, *values: int) -> tuple[int, ...]:
    return tuple(zlib.crc32(piece, value) for value in values)
