"""The bytes of large benchmark objects: one block, again and again.

Both sides know it: a client need not hold what it sends, and the stub need not keep what it was
sent to give it back. It looks random, so that nothing between the two can shorten it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Final

BLOCK_BYTES: Final = 2**20
BLOCK: Final = random.Random(5).randbytes(BLOCK_BYTES)  # noqa: S311 - need not be secret
_TWICE: Final = memoryview(BLOCK + BLOCK)


def iter_pattern(offset: int, size: int, *, piece_bytes: int) -> Iterator[memoryview]:
    """Yield *size* bytes of the pattern from *offset*, in pieces of at most a block."""
    end = offset + size
    while offset < end:
        length = min(piece_bytes, BLOCK_BYTES, end - offset)
        start = offset % BLOCK_BYTES
        yield _TWICE[start : start + length]
        offset += length


def iter_blocks(size: int) -> Iterator[bytes]:
    """Yield *size* bytes in blocks. Each is new, as what arrives from a socket is.

    One and the same block would cost those clients no memory that copy nothing.
    """
    for piece in iter_pattern(0, size, piece_bytes=BLOCK_BYTES):
        yield bytes(piece)


async def stream_pattern(size: int) -> AsyncIterator[bytes]:
    """Yield the same, as a request's body arrives."""
    for block in iter_blocks(size):
        yield block


def crc32_of_pattern(offset: int, size: int) -> int:
    """Return the CRC32 of a range of the pattern."""
    crc = 0
    for piece in iter_pattern(offset, size, piece_bytes=BLOCK_BYTES):
        crc = zlib.crc32(piece, crc)
    return crc
