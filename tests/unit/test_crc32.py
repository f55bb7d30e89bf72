"""CRC32s that are combined."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from aioblobcol._crc32 import combine


class TestCombine:
    @given(first=st.binary(max_size=300), second=st.binary(max_size=300))
    def test_is_that_of_both(self, first: bytes, second: bytes) -> None:
        """It is what zlib says of the two joined, also if one is empty."""
        whole = zlib.crc32(first + second)

        assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == whole

    def test_of_large_ones(self) -> None:
        """The number of bytes may be anything."""
        first, second = b"head", bytes(range(256)) * 40_000 + b"tail"

        assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(
            first + second
        )
