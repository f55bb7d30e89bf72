"""The CRC32 of two pieces together, out of those of each.

Invariant: the same as `zlib.crc32` of the pieces joined, without reading any byte again.

Source: zlib's ``crc32_combine``; the CRC of bytes that zeros follow is a linear function of their
CRC, so that it is a matrix of 32 x 32 bits, one for each number of zeros.
"""

from __future__ import annotations

import functools
from typing import Final

_POLYNOMIAL: Final = 0xEDB88320  # of zlib, the lowest bit first
_BITS: Final = 32

Matrix = tuple[int, ...]


def combine(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC32 of two pieces, the second of which has *second_bytes*.

    The matrix of a length takes some milliseconds, and is kept for the last few lengths.
    """
    return _times(_zeros(second_bytes), first) ^ second


@functools.lru_cache(maxsize=4)
def _zeros(count: int) -> Matrix:
    """Return what *count* bytes of zeros do to a CRC."""
    whole: Matrix = tuple(1 << bit for bit in range(_BITS))
    power: Matrix = (_POLYNOMIAL, *(1 << bit for bit in range(_BITS - 1)))  # of one bit
    for _ in range(3):
        power = _squared(power)
    while count:
        if count & 1:
            whole = tuple(_times(power, column) for column in whole)
        count >>= 1
        if count:
            power = _squared(power)
    return whole


def _squared(matrix: Matrix) -> Matrix:
    return tuple(_times(matrix, column) for column in matrix)


def _times(matrix: Matrix, vector: int) -> int:
    product = 0
    for column in matrix:
        if not vector:
            break
        if vector & 1:
            product ^= column
        vector >>= 1
    return product
