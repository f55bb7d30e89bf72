"""Bytes from anywhere: what may be uploaded, read and hashed off the event loop.

Invariants: a mutable source is copied, so that the hash and the upload see the same bytes;
sources are checked before any is read, and all are read before anything is sent. Nothing here
knows of S3. Streams get their place beside `Payload` when large objects come.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InvalidSourceError

if TYPE_CHECKING:
    from collections.abc import Sequence

BlobSource = bytes | bytearray | memoryview | Path

MAX_PUT_BYTES = 5 * 2**30
"""Source: Amazon S3 User Guide, "Uploading objects" (one PUT: 5 GiB)."""

HASH_INLINE_BYTES = 256 * 1024
"""Up to here hashing costs the event loop less than a hop to a thread and back (measured)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Payload:
    """The bytes of one object, with what names and protects them."""

    body: bytes = dataclasses.field(repr=False)
    md5: str
    sha256: str
    crc32: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.body)


def check_source(source: object, *, column: str) -> None:
    """Refuse what has no bytes to upload, without reading any.

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


def _read_all(sources: Sequence[tuple[str, BlobSource]]) -> list[Payload]:
    return [_read(column, source) for column, source in sources]


def _read(column: str, source: BlobSource) -> Payload:
    if isinstance(source, Path):
        try:
            body = source.read_bytes()
        except OSError as exc:
            raise InvalidSourceError(f"column {column!r}: cannot read {source}: {exc}") from exc
    else:
        body = bytes(source)  # copies what is mutable, returns bytes as they are
    return Payload(
        body=body,
        md5=hashlib.md5(body, usedforsecurity=False).hexdigest(),
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
