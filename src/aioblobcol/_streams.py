"""Large sources: read once, part by part, hashed off the event loop as they are read.

A `PartReader` reads a source of any kind; of the pieces of a part only small ones are joined.
Invariants: no more is read than was asked for (of aiohttp's body parts a little more, which is
kept); what limits a source (its column's ``max_bytes``, the size that was declared for it) is found
out with the byte that breaks it, before that byte is sent; hashes are of the bytes in the order in
which they were read; when a cancelled reading has ended, no thread moves a file that can be rewound
any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import logging
import os
import weakref
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol, TypeVar

from ._crc32 import combine
from ._sources import (
    HASH_INLINE_BYTES,
    MAX_OBJECT_BYTES,
    PART_BYTES,
    READ_PIECE_BYTES,
    AsyncSource,
    BinaryFile,
    Buffer,
    Part,
    Payload,
    check_size,
    check_source,
    is_async_source,
    is_binary_file,
    read_payload,
)
from ._tasks import wait_through
from .errors import AioBlobColError, InvalidSourceError, SizeMismatchError

T = TypeVar("T")

logger = logging.getLogger("aioblobcol")

MAX_PARTS: Final = 10_000
"""Source: Amazon S3 User Guide, "Amazon S3 multipart upload limits"."""
EQUAL_PARTS: Final = 1_000
GROWTH_BYTES: Final = 144 * 1024
HEAD_BYTES: Final = 4096
LEAST_CHUNK_BYTES: Final = 8192
"""aiohttp's ``BodyPartReader.read_chunk`` takes no size below that of the form's boundary (an
assertion); this is its default."""
SMALL_PIECE_BYTES: Final = 16 * 1024
"""Smaller pieces are joined: objects of 16 bytes take five times what they hold."""
JOINED_BYTES: Final = 64 * 1024
_MIB: Final = 2**20

Pieces = list[bytes | memoryview]


class Puller(Protocol):
    """Gives the bytes of a source, some at a time."""

    async def pull(self, size: int) -> Pieces:
        """Return *size* bytes; less only at the end."""


def part_bytes(number: int, *, total: int | None, least: int = PART_BYTES) -> int:
    """Return how large a part is, so that 10,000 of them hold whatever there is to come.

    With a known total all parts are equal. Otherwise the first 1,000 have the least size, and each
    after that has 144 KiB more than the one before it: 8 GiB go in parts of 8 MiB, and 5 TiB end
    with parts of 1.2 GiB, which is then what an upload holds in memory.

    Args:
        number: of the part, from 1 on.
        total: bytes of the whole object, if they are known.
        least: bytes of a part at least.
    """
    if total is not None:
        equal = -(-total // MAX_PARTS)
        return least if equal <= least else -(-equal // _MIB) * _MIB
    return least + max(0, number - EQUAL_PARTS) * GROWTH_BYTES


class Hashes:
    """What is known of the bytes that went by.

    Attributes:
        size: of all of them.
        crc32: of all of them.
    """

    def __init__(self, *, with_sha256: bool, with_md5: bool) -> None:
        self.size = 0
        self.crc32 = 0
        self._sha256 = hashlib.sha256() if with_sha256 else None
        self._md5 = hashlib.md5(usedforsecurity=False) if with_md5 else None

    @property
    def sha256(self) -> str | None:
        """Of all of them, in hexadecimal, if it was asked for."""
        return None if self._sha256 is None else self._sha256.hexdigest()

    @property
    def md5(self) -> str | None:
        """Of all of them, in hexadecimal, if it was asked for."""
        return None if self._md5 is None else self._md5.hexdigest()

    def take(self, pieces: Sequence[bytes | memoryview]) -> int:
        """Hash the next *pieces*, and return the CRC32 of them alone."""
        size = crc32 = 0
        for piece in pieces:
            size += len(piece)
            crc32 = zlib.crc32(piece, crc32)
            for digest in filter(None, (self._sha256, self._md5)):
                digest.update(piece)
        self.crc32 = self._with(pieces, crc32, size)
        self.size += size
        return crc32

    def _with(self, pieces: Sequence[bytes | memoryview], crc32: int, size: int) -> int:
        """Return the CRC32 of all and of *pieces*."""
        if self.size == 0:
            return crc32
        if size == PART_BYTES:  # of other lengths the matrix costs more than another pass
            return combine(self.crc32, crc32, size)
        return functools.reduce(lambda so_far, piece: zlib.crc32(piece, so_far), pieces, self.crc32)


@dataclasses.dataclass(frozen=True, slots=True)
class Fingerprint:
    """What bytes are told by: their length, and hashes in hexadecimal."""

    size: int
    md5: str | None
    sha256: str


class PartReader:
    """One source that is being read.

    Attributes:
        column: its name stands in the errors.
        total: how many bytes there are, if that is known.
        head: the first bytes, once the first part was read.
        on_end: told the SHA-256 of the whole, if it was asked for, when all parts were handed out.
    """

    def __init__(
        self,
        column: str,
        puller: Puller,
        *,
        max_bytes: int | None = None,
        total: int | None = None,
        is_declared: bool = False,
        is_certain: bool = True,
        with_sha256: bool = True,
        with_md5: bool = False,
        close: Callable[[], Awaitable[None]] | None = None,
        least: int = PART_BYTES,
    ) -> None:
        """Take a source that nobody else reads.

        Args:
            column: its name stands in the errors.
            puller: gives the bytes.
            max_bytes: how much is taken.
            total: how many bytes there are, if that is known.
            is_declared: that many there must be.
            is_certain: no client has said that: parts may be made for it.
            with_sha256: compute the SHA-256 of a large source; of a small one it always is.
            with_md5: compute the MD5 too.
            close: called once, when no more is read.
            least: bytes of a part, see `part_bytes`.
        """
        self.column = column
        self.total = total
        self.head = b""
        self.on_end: Callable[[str | None], None] | None = None
        self._puller = puller
        self._max_bytes = MAX_OBJECT_BYTES if max_bytes is None else max_bytes
        self._is_declared = is_declared
        self._is_certain = is_certain
        self._hashes = Hashes(with_sha256=with_sha256, with_md5=with_md5)
        self._with_md5 = with_md5
        self._close = close
        self._least = least
        self._number = 0
        self._buffer: Pieces = []
        self._buffered = 0
        self._is_over = False

    @property
    def size(self) -> int:
        """Bytes that were handed out so far; at the end, all."""
        return self._hashes.size

    @property
    def sha256(self) -> str | None:
        """Of what was handed out so far, in hexadecimal, if it was asked for."""
        return self._hashes.sha256

    @property
    def md5(self) -> str | None:
        """Of what was handed out so far, in hexadecimal, if it was asked for."""
        return self._hashes.md5

    @property
    def crc32(self) -> int:
        """Of what was handed out so far."""
        return self._hashes.crc32

    @property
    def promised(self) -> int | None:
        """How many bytes there are at most, unless a client's header alone says so."""
        return self.total if self._is_certain or self._is_declared else None

    def next_bytes(self) -> int:
        """Return how large the next part may be."""
        total = self.total if self._is_certain else None
        return part_bytes(self._number + 1, total=total, least=self._least)

    async def read_small(self) -> Payload | None:
        """Read the first part; return it if it is the whole, or None if there is more.

        Raises:
            InvalidSourceError: the source cannot be read, has too much, or not what was declared.
        """
        limit = self.next_bytes()
        await self._fill(limit + 1)
        self.head = b"".join(piece[:HEAD_BYTES] for piece in self._buffer[:HEAD_BYTES])[:HEAD_BYTES]
        if self._buffered > limit:
            return None
        pieces = self._take(limit)
        payload = await _off_the_loop(_size_of(pieces), lambda: self._whole(pieces))
        self._check_end()
        return payload

    async def next_part(self, *, at_most: int = MAX_OBJECT_BYTES) -> Part | None:
        """Read and hash the next part, *at_most* so many bytes; None at the end.

        Raises:
            InvalidSourceError: as `read_small`.
        """
        wanted = min(self.next_bytes(), at_most)
        await self._fill(wanted)
        pieces = self._take(wanted)
        if not pieces:
            self._check_end()
            return None
        size = _size_of(pieces)
        crc32 = await _off_the_loop(size, lambda: self._hashes.take(pieces))
        self._number += 1
        return Part(self._number, pieces, size, crc32)

    async def aclose(self) -> None:
        """Read no more, and close what was opened for it."""
        close, self._close = self._close, None
        self._buffer, self._buffered, self._is_over = [], 0, True
        if close is not None:
            await close()

    async def _fill(self, size: int) -> None:
        """Read until *size* bytes are here, or one more than there may be, or all."""
        while self._buffered < size and not self._is_over:
            wanted = min(size, self._may_come() + 1) - self._buffered
            pieces = await self._puller.pull(wanted)
            found = _size_of(pieces)
            self._buffer += pieces
            self._buffered += found
            self._is_over = found < wanted
            self._check_so_far()

    def _take(self, size: int) -> Pieces:
        """Remove *size* bytes from the buffer, or all that there are."""
        count = 0
        for piece in self._buffer:
            if len(piece) > size:
                break
            count += 1
            size -= len(piece)
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        if self._buffer and size:
            view = memoryview(self._buffer[0])
            taken.append(view[:size])
            self._buffer[0] = view[size:]
        self._buffered -= _size_of(taken)
        return taken

    def _may_come(self) -> int:
        """Return how many bytes may follow those that were handed out."""
        limit = self._max_bytes
        if self._is_declared and self.total is not None:
            limit = min(limit, self.total)
        return limit - self._hashes.size

    def _check_so_far(self) -> None:
        size = self._hashes.size + self._buffered
        check_size(self.column, size, self._max_bytes)
        if self._is_declared and self.total is not None and size > self.total:
            raise SizeMismatchError(
                f"column {self.column!r}: there are more than the {self.total} bytes that were "
                "declared"
            )

    def _check_end(self) -> None:
        if self._is_declared and self.total != self.size:
            raise SizeMismatchError(
                f"column {self.column!r}: {self.size} bytes came of the {self.total} that were "
                "declared"
            )
        if self.on_end is not None:
            self.on_end(self.sha256)

    def _whole(self, pieces: Pieces) -> Payload:
        self._hashes = hashes = Hashes(with_sha256=True, with_md5=self._with_md5)
        hashes.take(pieces)
        assert hashes.sha256 is not None
        return Payload(
            body=bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces),
            md5=hashes.md5,
            sha256=hashes.sha256,
            crc32=hashes.crc32,
        )


async def _off_the_loop(size: int, work: Callable[[], T]) -> T:
    return work() if size <= HASH_INLINE_BYTES else await asyncio.to_thread(work)


def _size_of(pieces: Sequence[bytes | memoryview]) -> int:
    return sum(map(len, pieces))


# --- sources of every kind ---------------------------------------------------------------------


class BufferPuller:
    """Bytes in memory; those of a mutable buffer are copied as they are read."""

    def __init__(self, source: bytes | bytearray | memoryview) -> None:
        view = memoryview(source)
        self._view = (view if view.contiguous else memoryview(bytes(view))).cast("B")
        self._is_mutable = not view.readonly or not isinstance(view.obj, bytes)
        self._position = 0

    async def pull(self, size: int) -> Pieces:
        """Return a view of the next bytes, or a copy of them."""
        start = self._position
        found = self._view[start : start + size]
        self._position += len(found)
        if not found:
            return []
        if not self._is_mutable:
            return [found]
        return [await _off_the_loop(len(found), found.tobytes)]


class FilePuller:
    """A file, read in a thread.

    A cancelled `pull` is over when the thread is, for it moves the file, and somebody may rewind
    or close that at once. Not so of a file that cannot be rewound: a pipe may be silent for ever.
    """

    def __init__(self, column: str, file: BinaryFile) -> None:
        self._column = column
        self._file = file
        self._is_cancelled = False

    async def pull(self, size: int) -> Pieces:
        """Read in pieces of 1 MiB."""
        with reading_from(self._column, self._file):
            reading = asyncio.create_task(
                asyncio.to_thread(self._read, size), name="aioblobcol: read a file"
            )
            try:
                await asyncio.wait({reading})
            except asyncio.CancelledError:
                self._is_cancelled = True
                if _position_of(self._file) is None:
                    reading.cancel()
                await wait_through([reading])
                if not reading.cancelled():
                    reading.exception()  # the cancellation goes first
                raise
            return reading.result()

    def _read(self, size: int) -> Pieces:
        pieces: Pieces = []
        while size > 0 and not self._is_cancelled:  # it may give more than it was asked for
            found: object = self._file.read(min(size, READ_PIECE_BYTES))
            if found is None:
                raise InvalidSourceError(
                    f"column {self._column!r}: the file is non-blocking, and gave nothing"
                )
            piece = check_piece(self._column, self._file, found)
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece)
        return pieces


class AsyncPuller:
    """What is awaited piece by piece: an async ``read``, or an async iterator."""

    def __init__(
        self,
        column: str,
        source: object,
        read: Callable[[int], Awaitable[object]],
        *,
        least: int = 1,
        iterator: object = None,
    ) -> None:
        self._column = column
        self._source = source
        self._read = read
        self._least = least
        self._iterator = iterator
        self._left: bytes | memoryview = b""

    async def pull(self, size: int) -> Pieces:
        """Read until there is enough; what a piece has too much is kept for the next time."""
        pieces: Pieces = []
        small = bytearray()
        while size and (piece := self._left or await self._next(size)):
            self._left = memoryview(piece)[size:]
            if len(piece) > size:
                piece = memoryview(piece)[:size]
            size -= len(piece)
            is_small = len(piece) < SMALL_PIECE_BYTES
            if is_small:
                small += piece
            if small and (not is_small or len(small) >= JOINED_BYTES):
                pieces.append(bytes(small))
                small.clear()
                await asyncio.sleep(0)  # a source may never wait by itself
            if not is_small:
                pieces.append(piece)
        if small:
            pieces.append(bytes(small))
        return pieces

    async def aclose(self) -> None:
        """Close a generator, which nobody can read on; its trouble is logged."""
        self._left = b""
        if not inspect.isasyncgen(self._iterator):
            return
        try:
            await self._iterator.aclose()
        except Exception as exc:  # must not hide why it is not read to its end
            logger.warning("column %r: closing the source failed", self._column, exc_info=exc)

    async def _next(self, size: int) -> bytes | memoryview:
        with reading_from(self._column, self._source):
            piece = await self._read(max(self._least, min(size, READ_PIECE_BYTES)))
        return check_piece(self._column, self._source, piece)


@contextlib.contextmanager
def reading_from(column: str, source: object) -> Iterator[None]:
    """Turn what reading raises into our error; what somebody else means to raise goes on."""
    try:
        yield
    except AioBlobColError:
        raise
    except (OSError, ValueError) as exc:  # ValueError: a file that was closed
        raise InvalidSourceError(
            f"column {column!r}: cannot read {type(source).__name__}: {exc}"
        ) from exc


def check_piece(column: str, source: object, piece: object) -> bytes:
    """Return a piece as bytes that nobody changes any more.

    Raises:
        InvalidSourceError: it is no bytes.
    """
    if isinstance(piece, bytes):
        return piece
    if isinstance(piece, (bytearray, memoryview)):
        return bytes(piece)
    raise InvalidSourceError(
        f"column {column!r}: {type(source).__name__} gave {type(piece).__name__}, not bytes; "
        "open a file in binary mode"
    )


def async_puller(column: str, source: object) -> AsyncPuller | None:
    """Return what reads an asynchronous source; None if it is none.

    In this order: ``aiter_bytes()`` (httpx's responses), ``content`` (aiohttp's responses),
    ``read_chunk()`` (aiohttp's body parts), ``read(size)`` (Starlette's uploads, asyncio's and
    aiohttp's streams), async iteration.
    """
    if not is_async_source(source):
        return None
    if callable(iterate := getattr(source, "aiter_bytes", None)):
        return _iterating(column, source, iterate())
    content: Any = getattr(source, "content", None)
    if inspect.iscoroutinefunction(getattr(content, "read", None)):
        return AsyncPuller(column, source, content.read)
    for name, least in (("read_chunk", LEAST_CHUNK_BYTES), ("read", 1)):
        read = getattr(source, name, None)
        if inspect.iscoroutinefunction(read):
            return AsyncPuller(column, source, read, least=least)
    return _iterating(column, source, source)


def size_of(source: object) -> int | None:
    """Return what a source says about its own size; it may be wrong, and None if it is silent."""
    size: object = getattr(source, "size", None)  # Starlette's uploads
    if isinstance(size, int):
        return size
    headers = getattr(source, "headers", None)
    if headers is not None and hasattr(headers, "get"):  # responses, body parts
        length = str(headers.get("Content-Length", ""))
        is_plain = str(headers.get("Content-Encoding", "identity")) == "identity"
        return int(length) if is_plain and length.isascii() and length.isdigit() else None
    if not is_binary_file(source):
        return None
    file: Any = source
    try:
        start = int(file.tell())
        end = int(file.seek(0, io.SEEK_END))
        file.seek(start)
    except (AttributeError, OSError, TypeError, ValueError):  # a pipe, or closed
        return None
    return max(0, end - start)


async def open_path(
    column: str,
    path: Path,
    *,
    max_bytes: int | None = None,
    with_sha256: bool = True,
    with_md5: bool = False,
) -> PartReader:
    """Return what reads a file, opened here and closed by the reader.

    Raises:
        InvalidSourceError: it cannot be opened, or has too much.
    """

    def open_file() -> tuple[io.BufferedReader, int]:
        size = check_source(path, column=column)
        if size is not None and max_bytes is not None:
            check_size(column, size, max_bytes)
        file = path.open("rb")
        return file, os.fstat(file.fileno()).st_size

    opening = asyncio.create_task(asyncio.to_thread(open_file), name="aioblobcol: open a file")
    interrupted = await wait_through([opening])
    if interrupted is not None:
        if not opening.cancelled() and opening.exception() is None:
            opening.result()[0].close()
        raise interrupted
    with reading_from(column, path):
        file, size = opening.result()

    async def close() -> None:
        file.close()

    return PartReader(
        column,
        FilePuller(column, file),
        max_bytes=max_bytes,
        total=size,
        is_declared=True,
        with_sha256=with_sha256,
        with_md5=with_md5,
        close=close,
    )


def iterable_reader(
    column: str,
    source: AsyncIterable[bytes],
    *,
    max_bytes: int | None,
    total: int | None,
    with_sha256: bool,
    close: Callable[[], Awaitable[None]],
) -> PartReader:
    """Return what reads an async iterable whose size is known, closed by the reader."""
    return PartReader(
        column,
        _iterating(column, source, source),
        max_bytes=max_bytes,
        total=total,
        is_declared=total is not None,
        with_sha256=with_sha256,
        close=close,
    )


async def started(reader: PartReader) -> Payload | PartReader:
    """Read the first part: return it, and close the reader, if it is the whole.

    Raises:
        InvalidSourceError: as `PartReader.read_small`; the reader is closed.
    """
    try:
        payload = await reader.read_small()
    except BaseException:
        await reader.aclose()
        raise
    if payload is None:
        return reader
    await reader.aclose()
    return payload


async def open_source(
    column: str,
    source: Buffer | Path | BinaryFile | AsyncSource,
    *,
    max_bytes: int | None = None,
    with_sha256: bool = True,
) -> Payload | PartReader:
    """Read a source of one part at most; open what is larger, with its first part read.

    The SHA-256 of what is larger is computed only if it is asked for.

    Raises:
        InvalidSourceError: it cannot be read, or has too much.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        size = check_source(source, column=column)
        assert size is not None
        if size <= PART_BYTES:
            return await read_payload(column, source, with_md5=False, max_bytes=max_bytes)
        check_size(column, size, MAX_OBJECT_BYTES if max_bytes is None else max_bytes)
        reader = PartReader(
            column,
            BufferPuller(source),
            total=size,
            is_declared=True,
            with_sha256=with_sha256,
        )
    elif isinstance(source, Path):
        reader = await open_path(column, source, max_bytes=max_bytes, with_sha256=with_sha256)
    else:
        return await ReadOnce(source).open(column, max_bytes=max_bytes, with_sha256=with_sha256)
    return await started(reader)


async def fingerprint(column: str, path: Path) -> Fingerprint:
    """Hash a file without keeping it.

    Raises:
        InvalidSourceError: it cannot be read, or changes meanwhile.
    """
    reader = await open_path(column, path, with_md5=True)
    try:
        while await reader.next_part(at_most=READ_PIECE_BYTES) is not None:
            pass
    finally:
        await reader.aclose()
    assert reader.sha256 is not None
    return Fingerprint(reader.size, reader.md5, reader.sha256)


class _Claim:
    """That a source is being read, for as long as this object lives, or until it is given up.

    Of two readers of one source each would get a part of its bytes, and neither would know.
    """

    __slots__ = ("__weakref__", "_source")

    _all: ClassVar[weakref.WeakValueDictionary[int, _Claim]] = weakref.WeakValueDictionary()

    def __init__(self, source: object) -> None:
        self._source = source  # kept, or its identity would become another one's
        self._all[id(source)] = self

    @classmethod
    def is_on(cls, source: object) -> bool:
        """Tell whether somebody reads *source*."""
        return id(source) in cls._all

    def give_up(self) -> None:
        """Let others read it."""
        if self._all.get(id(self._source)) is self:
            del self._all[id(self._source)]


class ReadOnce:
    """A source that is used up by reading it, and what is kept of it to read it again.

    What fits into one part is kept in memory once it was read; a larger one can be read again if
    it can be rewound to where it stood. Copies of one blob share it.
    """

    __slots__ = ("_body", "_is_read", "_lock", "_seen", "_size", "_source", "_start")

    def __init__(self, source: BinaryFile | AsyncSource, *, size: int | None = None) -> None:
        self._source: Any = source
        self._size = size
        self._body: bytes | None = None
        self._seen: int | None = None
        self._is_read = False
        self._start: int | None = None
        self._lock = asyncio.Lock()

    @property
    def size(self) -> int | None:
        """Length in bytes; before it is read, what was declared, or what the source itself says."""
        if self._body is not None:
            return len(self._body)
        if self._size is not None:
            return self._size
        if self._is_being_read:  # to ask a file is to move it, under the thread that reads it
            return self._seen
        return size_of(self._source)

    @property
    def is_declared(self) -> bool:
        """Whether its size was declared."""
        return self._size is not None

    @property
    def most_bytes(self) -> int | None:
        """How many bytes are read at most; None where a client alone says how many there are.

        A header that announces 5 TiB must not make parts, and take memory, for as much; one that
        announces 1 byte is no promise.
        """
        if self._body is None and self._size is None and not self._tells_its_size:
            return None
        size = self.size
        is_a_promise = self._size is None or size is None or size <= PART_BYTES
        return size if is_a_promise else None

    @property
    def _tells_its_size(self) -> bool:
        return isinstance(getattr(self._source, "size", None), int) or is_binary_file(self._source)

    @property
    def _is_being_read(self) -> bool:
        return _Claim.is_on(self._source)

    def __reduce__(self) -> Any:
        if self._body is None:
            raise TypeError("this upload was not read yet: pickle Blob(await upload.read())")
        return bytes, (self._body,)

    async def open(
        self, column: str, *, max_bytes: int | None, with_sha256: bool = True
    ) -> Payload | PartReader:
        """Read the first part; return the whole if it is all, else what reads the rest.

        Raises:
            InvalidSourceError: it cannot be read, or not again; or it has too much, or not what
                was declared.
        """
        async with self._lock:
            if self._body is not None:
                return await read_payload(column, self._body, with_md5=False, max_bytes=max_bytes)
            self._check_may_read(column)
            claim = _Claim(self._source)
            try:
                payload = await self._read(
                    column, claim, max_bytes=max_bytes, with_sha256=with_sha256
                )
            except BaseException:
                claim.give_up()
                raise
            if isinstance(payload, Payload):
                self._body, self._source = payload.body, None
            return payload

    async def _read(
        self, column: str, claim: _Claim, *, max_bytes: int | None, with_sha256: bool
    ) -> Payload | PartReader:
        await self._rewind(column)
        self._seen = size_of(self._source) if self._size is None else self._size
        puller = self._puller(column)

        async def close() -> None:
            claim.give_up()
            if isinstance(puller, AsyncPuller):
                await puller.aclose()

        reader = PartReader(
            column,
            puller,
            max_bytes=max_bytes,
            total=self._seen,
            is_declared=self._size is not None,
            is_certain=self._size is None and self._tells_its_size,
            with_sha256=with_sha256,
            close=close,
        )
        self._is_read = True
        return await started(reader)

    def _check_may_read(self, column: str) -> None:
        if self._is_being_read:
            raise InvalidSourceError(
                f"column {column!r}: this stream is being uploaded for another cell; commit that "
                "one and assign blob.copy()"
            )
        if self._is_read and self._start is None:  # the rest of it must not pass for the whole
            raise InvalidSourceError(
                f"column {column!r}: this stream was read, at least in part, by an attempt that "
                "failed, and cannot be rewound; make another Blob"
            )

    async def _rewind(self, column: str) -> None:
        if not self._is_read:
            self._start = _position_of(self._source)
            return
        with reading_from(column, self._source):
            if inspect.iscoroutinefunction(self._source.seek):
                await self._source.seek(self._start)
            else:
                await asyncio.to_thread(self._source.seek, self._start)

    def _puller(self, column: str) -> Puller:
        puller = async_puller(column, self._source)
        return FilePuller(column, self._source) if puller is None else puller


def _position_of(source: Any) -> int | None:
    """Return where a source stands, if it can be put there again."""
    file = getattr(source, "file", source)  # of Starlette's uploads, the file behind them
    try:
        if callable(getattr(source, "seek", None)) and file.seekable():
            return int(file.tell())
    except (AttributeError, OSError, ValueError):
        return None
    return None


def _iterating(column: str, source: object, iterable: Any) -> AsyncPuller:
    iterator: AsyncIterator[object] = aiter(iterable)

    async def read(_size: int) -> object:
        async for piece in iterator:
            if piece or not isinstance(piece, (bytes, bytearray, memoryview)):
                return piece
        return b""

    return AsyncPuller(column, source, read, iterator=iterator)
