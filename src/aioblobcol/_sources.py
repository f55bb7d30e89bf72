"""Bytes from anywhere: what may be uploaded, read and hashed off the event loop.

Invariants: a mutable source is copied, so that the hash and the upload see the same bytes;
sources of one explicit call are checked before any is read. Nothing here knows of S3. What is
read part by part is in `_streams`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import inspect
import io
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol, TypeGuard

from .errors import BlobTooLargeError, InvalidSourceError


class BinaryFile(Protocol):
    """A file that was opened in binary mode, from where it stands on; read in a thread."""

    def read(self, size: int, /) -> bytes:
        """Return *size* bytes at most, ``b""`` at the end."""


class AsyncReadable(Protocol):
    """A source that is read piece by piece, such as Starlette's ``UploadFile``."""

    async def read(self, size: int, /) -> bytes:
        """Return *size* bytes at most, ``b""`` at the end."""


class AsyncChunks(Protocol):
    """A part of a multipart form in aiohttp (``BodyPartReader``)."""

    async def read_chunk(self, size: int = ..., /) -> bytes:
        """Return *size* bytes at most, ``b""`` at the end."""


class AsyncResponse(Protocol):
    """A response of httpx."""

    def aiter_bytes(self) -> AsyncIterator[bytes]:
        """Return its body."""


class AsyncContent(Protocol):
    """A response of aiohttp."""

    @property
    def content(self) -> AsyncReadable:
        """Its body."""


AsyncSource = AsyncReadable | AsyncChunks | AsyncResponse | AsyncContent | AsyncIterable[bytes]
BlobSource = bytes | bytearray | memoryview | Path | BinaryFile | AsyncSource
Buffer = bytes | bytearray | memoryview


class OnProgress(Protocol):
    """Told how far a transfer is, in the event loop: once per part, or per chunk that was read.

    It should return at once. What it raises fails the transfer.
    """

    def __call__(self, done_bytes: int, total_bytes: int | None, /) -> None:
        """Take notice.

        Args:
            done_bytes: of this blob, sent or received; never falls within one attempt.
            total_bytes: of this blob; None if nobody knows it.
        """


READ_PIECE_BYTES = 2**20
MAX_OBJECT_BYTES = 5 * 2**40
"""Source: Amazon S3 User Guide, "Amazon S3 multipart upload limits" (one object)."""

PART_BYTES = 8 * 2**20
"""What is larger is sent in parts of this size at least (measured: larger parts are not faster,
smaller ones cost more requests). S3 takes no part below 5 MiB, but the last."""

HASH_INLINE_BYTES = 256 * 1024
"""Up to here hashing costs the event loop less than a hop to a thread and back (measured)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Payload:
    """The bytes of one object, with what names and protects them.

    Attributes:
        body: the bytes.
        md5: hexadecimal; None where no key is made of it. A store that needs it computes it.
        sha256: hexadecimal.
        crc32: as an unsigned integer.
    """

    body: bytes = dataclasses.field(repr=False)
    md5: str | None
    sha256: str
    crc32: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.body)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A part of a large object.

    Attributes:
        number: from 1 on.
        pieces: its bytes, in this order.
        size: of all pieces together, in bytes.
        crc32: of all pieces together, as an unsigned integer.
    """

    number: int
    pieces: Sequence[bytes | memoryview] = dataclasses.field(repr=False)
    size: int
    crc32: int


def is_async_source(source: object) -> bool:
    """Tell whether *source* is one of `AsyncSource`."""
    if isinstance(source, (type, bytes, bytearray, memoryview, str, Path)):
        return False
    content = getattr(source, "content", None)
    return (
        callable(getattr(source, "aiter_bytes", None))
        or hasattr(source, "__aiter__")
        or any(
            inspect.iscoroutinefunction(read)
            for read in (
                getattr(source, "read_chunk", None),
                getattr(source, "read", None),
                getattr(content, "read", None),
            )
        )
    )


def is_binary_file(source: object) -> TypeGuard[BinaryFile]:
    """Tell whether *source* is a file that is open in binary mode, or looks like one."""
    if isinstance(source, (type, bytes, bytearray, memoryview, str, Path)):
        return False
    return (
        not _gives_text(source)
        and not is_async_source(source)
        and callable(getattr(source, "read", None))
    )


def _gives_text(source: object) -> bool:
    return isinstance(source, io.TextIOBase) or isinstance(getattr(source, "encoding", None), str)


def check_source(source: object, *, column: str) -> int | None:
    """Refuse what has no bytes to upload, without reading any; return how many there are.

    Returns:
        The size of a file or of bytes; None of a stream.

    Raises:
        InvalidSourceError: another type, or a path that is no file.
    """
    if isinstance(source, Path):
        size: int | None = _file_size(source, column)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        size = _buffer_size(source, column)
    elif isinstance(source, str):
        raise InvalidSourceError(
            f"column {column!r}: text is not bytes, write text.encode(); for a file, Path(...)"
        )
    elif is_async_source(source) or is_binary_file(source):
        size = None
    elif _gives_text(source):
        raise InvalidSourceError(
            f"column {column!r}: {type(source).__name__} gives text, open the file in binary mode"
        )
    else:
        raise InvalidSourceError(
            f"column {column!r}: cannot upload {type(source).__name__}, give bytes, bytearray, "
            "memoryview, pathlib.Path, a binary file, an async iterator of bytes, or an object "
            "with an async read()"
        )
    if size is not None and size > MAX_OBJECT_BYTES:
        raise InvalidSourceError(f"column {column!r}: {size} bytes, S3 takes 5 TiB at most")
    return size


def check_size(column: str, size: int, limit: int) -> None:
    """Refuse more bytes than are allowed.

    Raises:
        BlobTooLargeError: it is more.
    """
    if size > limit:
        raise BlobTooLargeError(
            f"column {column!r}: {size} bytes are more than the {limit} it takes"
        )


async def read_payloads(sources: Sequence[tuple[str, Buffer | Path]]) -> list[Payload]:
    """Read and hash sources of one row (column, source) with one hop to a thread, or none.

    Raises:
        InvalidSourceError: a file that cannot be read.
    """
    sizes = [
        None if isinstance(source, Path) else memoryview(source).nbytes for _, source in sources
    ]
    if any(size is None for size in sizes) or sum(filter(None, sizes)) > HASH_INLINE_BYTES:
        return await asyncio.to_thread(_read_all, sources)
    return _read_all(sources)


async def read_payload(
    column: str,
    source: Buffer | Path,
    *,
    with_md5: bool,
    max_bytes: int | None = None,
) -> Payload:
    """Read and hash one source as a whole, off the loop when it takes long.

    Args:
        column: its name stands in the errors.
        source: bytes, or a file's path.
        with_md5: compute the MD5 too, which only keys of the explicit strength are made of.
        max_bytes: how much is taken.

    Raises:
        BlobTooLargeError: more than *max_bytes*; a file was not read then.
        InvalidSourceError: a file that cannot be read.
    """
    limit = MAX_OBJECT_BYTES if max_bytes is None else max_bytes
    if isinstance(source, Path):
        return await asyncio.to_thread(_read_file, column, source, limit, with_md5=with_md5)
    size = _buffer_size(source, column)
    check_size(column, size, limit)
    if size > HASH_INLINE_BYTES:
        return await asyncio.to_thread(_read, column, source, with_md5=with_md5)
    return _read(column, source, with_md5=with_md5)


def _read_all(sources: Sequence[tuple[str, Buffer | Path]]) -> list[Payload]:
    return [_read(column, source, with_md5=True) for column, source in sources]


def _read_file(column: str, path: Path, limit: int, *, with_md5: bool) -> Payload:
    check_size(column, _file_size(path, column), limit)  # before it takes the memory
    payload = _read(column, path, with_md5=with_md5)
    check_size(column, payload.size, limit)  # it may have grown
    return payload


def _read(column: str, source: Buffer | Path, *, with_md5: bool) -> Payload:
    if isinstance(source, Path):
        try:
            body = source.read_bytes()
        except OSError as exc:
            raise InvalidSourceError(f"column {column!r}: cannot read {source}: {exc}") from exc
    else:
        body = bytes(source)  # copies what is mutable, returns bytes as they are
    return _hash(body, with_md5=with_md5)


def _hash(body: bytes, *, with_md5: bool) -> Payload:
    return Payload(
        body=body,
        md5=hashlib.md5(body, usedforsecurity=False).hexdigest() if with_md5 else None,
        sha256=hashlib.sha256(body).hexdigest(),
        crc32=zlib.crc32(body),
    )


def _buffer_size(source: bytes | bytearray | memoryview, column: str) -> int:
    try:
        return memoryview(source).nbytes
    except ValueError as exc:  # a memoryview that was released
        raise InvalidSourceError(f"column {column!r}: cannot read the bytes: {exc}") from exc


def _file_size(path: Path, column: str) -> int:
    try:
        if not path.is_file():
            raise InvalidSourceError(f"column {column!r}: not a file: {path}")
        return path.stat().st_size
    except OSError as exc:
        raise InvalidSourceError(f"column {column!r}: cannot read {path}: {exc}") from exc
