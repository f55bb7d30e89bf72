"""Bytes from anywhere: what may be uploaded, read and hashed off the event loop.

Invariants: a mutable source is copied, so that the hash and the upload see the same bytes;
sources of one explicit call are checked before any is read, and all are read before anything is
sent; `read_payload` reads one by itself. Nothing here knows of S3. Streams get their place beside
`Payload` when large objects come.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import inspect
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeGuard

from .errors import BlobTooLargeError, InvalidSourceError

if TYPE_CHECKING:
    from collections.abc import Sequence

BlobSource = bytes | bytearray | memoryview | Path


class AsyncReadable(Protocol):
    """A source that is read piece by piece, such as Starlette's ``UploadFile``."""

    async def read(self, size: int, /) -> bytes:
        """Return *size* bytes at most, ``b""`` at the end."""


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
MAX_PUT_BYTES = 5 * 2**30
"""Source: Amazon S3 User Guide, "Uploading objects" (one PUT: 5 GiB)."""

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


def check_source(source: object, *, column: str) -> int:
    """Refuse what has no bytes to upload, without reading any; return how many there are.

    Raises:
        InvalidSourceError: another type, or a path that is not a file of at most 5 GiB.
    """
    if isinstance(source, Path):
        size = _file_size(source, column)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        size = _buffer_size(source, column)
    elif isinstance(source, str):
        raise InvalidSourceError(
            f"column {column!r}: text is not bytes, write text.encode(); for a file, Path(...)"
        )
    else:
        raise InvalidSourceError(
            f"column {column!r}: cannot upload {type(source).__name__}, "
            "give bytes, bytearray, memoryview or pathlib.Path"
        )
    if size > MAX_PUT_BYTES:
        raise InvalidSourceError(f"column {column!r}: {size} bytes, one PUT takes 5 GiB at most")
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


async def read_payloads(sources: Sequence[tuple[str, BlobSource]]) -> list[Payload]:
    """Read and hash the sources of one row (column, source), off the loop when it takes long.

    Raises:
        InvalidSourceError: a file that cannot be read.
    """
    sizes = [
        None if isinstance(source, Path) else memoryview(source).nbytes for _, source in sources
    ]
    if any(size is None for size in sizes) or sum(filter(None, sizes)) > HASH_INLINE_BYTES:
        return await asyncio.to_thread(_read_all, sources)  # one hop for the whole row
    return _read_all(sources)


def has_async_read(source: object) -> TypeGuard[AsyncReadable]:
    """Tell whether *source* has an ``async def read``, as Starlette's ``UploadFile`` has."""
    if isinstance(source, bytes):
        return False
    read = getattr(source, "read", None)
    return not isinstance(source, type) and inspect.iscoroutinefunction(read)


async def read_payload(
    column: str,
    source: BlobSource | AsyncReadable,
    *,
    with_md5: bool,
    max_bytes: int | None = None,
) -> Payload:
    """Read and hash one source, off the loop when it takes long.

    An object with an async ``read`` is read from where it stands to its end, in pieces of 1 MiB;
    what was read of it is not put back, whatever happens.

    Args:
        column: its name stands in the errors.
        source: bytes, a file's path, or an object with an async ``read``.
        with_md5: compute the MD5 too, which only keys of the explicit strength are made of.
        max_bytes: how much is taken; never more than the 5 GiB of one PUT.

    Raises:
        BlobTooLargeError: more than *max_bytes*; of a ``read``, no more than that was read.
        InvalidSourceError: another type, a file that cannot be read, or a ``read`` that gives
            something else than bytes.
    """
    limit = MAX_PUT_BYTES if max_bytes is None else min(max_bytes, MAX_PUT_BYTES)
    if isinstance(source, Path):
        return await asyncio.to_thread(_read_file, column, source, limit, with_md5=with_md5)
    if isinstance(source, (bytes, bytearray, memoryview)):
        size = _buffer_size(source, column)
        check_size(column, size, limit)
        if size > HASH_INLINE_BYTES:
            return await asyncio.to_thread(_read, column, source, with_md5=with_md5)
        return _read(column, source, with_md5=with_md5)
    if not has_async_read(source):
        check_source(source, column=column)  # refuses it, and says what may be given
    pieces, size = await _read_pieces(column, source, limit)
    if size > HASH_INLINE_BYTES:
        return await asyncio.to_thread(_join, pieces, with_md5=with_md5)
    return _join(pieces, with_md5=with_md5)


def _read_all(sources: Sequence[tuple[str, BlobSource]]) -> list[Payload]:
    return [_read(column, source, with_md5=True) for column, source in sources]


def _read_file(column: str, path: Path, limit: int, *, with_md5: bool) -> Payload:
    check_source(path, column=column)
    check_size(column, _file_size(path, column), limit)  # before it takes the memory
    payload = _read(column, path, with_md5=with_md5)
    check_size(column, payload.size, limit)  # it may have grown
    return payload


def _read(column: str, source: BlobSource, *, with_md5: bool) -> Payload:
    if isinstance(source, Path):
        try:
            body = source.read_bytes()
        except OSError as exc:
            raise InvalidSourceError(f"column {column!r}: cannot read {source}: {exc}") from exc
    else:
        body = bytes(source)  # copies what is mutable, returns bytes as they are
    return _hash(body, with_md5=with_md5)


async def _read_pieces(column: str, source: AsyncReadable, limit: int) -> tuple[list[bytes], int]:
    pieces: list[bytes] = []
    size = 0
    while True:
        try:
            piece: object = await source.read(READ_PIECE_BYTES)
        except (OSError, ValueError) as exc:  # ValueError: a file that was closed
            raise InvalidSourceError(
                f"column {column!r}: cannot read {type(source).__name__}: {exc}"
            ) from exc
        if not isinstance(piece, bytes):
            raise InvalidSourceError(
                f"column {column!r}: read() of {type(source).__name__} gave "
                f"{type(piece).__name__}, not bytes; open a file in binary mode"
            )
        if not piece:
            return pieces, size
        size += len(piece)
        check_size(column, size, limit)
        pieces.append(piece)


def _join(pieces: list[bytes], *, with_md5: bool) -> Payload:
    return _hash(pieces[0] if len(pieces) == 1 else b"".join(pieces), with_md5=with_md5)


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
