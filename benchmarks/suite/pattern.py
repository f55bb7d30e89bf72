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


async def stream_pattern(size: int) -> AsyncIterator[bytes]:
    """Yield *size* bytes in blocks, as a request's body arrives."""
    whole, rest = divmod(size, BLOCK_BYTES)
    for _ in range(whole):
        yield BLOCK
    if rest:
        yield BLOCK[:rest]


def crc32_of_pattern(offset: int, size: int) -> int:
    """Return the CRC32 of a range of the pattern."""
    crc = 0
    for piece in iter_pattern(offset, size, piece_bytes=BLOCK_BYTES):
        crc = zlib.crc32(piece, crc)
    return crc
