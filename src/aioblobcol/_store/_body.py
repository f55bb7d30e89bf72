"""The body of a request: pieces of bytes, as botocore reads them and as aiohttp writes them.

Invariants: nothing is joined or copied; the transport is given slices, for of one large write it
copies what the network does not take at once (64 MiB: 96 ms of a standing event loop, measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from aiohttp.payload import Payload as AiohttpPayload

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter

SLICE_BYTES: Final = 256 * 1024

Piece = bytes | memoryview


class Body(AiohttpPayload):
    """Pieces of bytes that can be read again, for an attempt may be repeated.

    botocore takes it for a file that it can seek in (it reads it to sign it, where it has to);
    aiohttp for a payload that writes itself.
    """

    _autoclose = True  # there is nothing to close

    def __init__(self, pieces: Sequence[Piece], size: int) -> None:
        super().__init__(pieces)
        self.headers.clear()  # the request's own say what it is; aiohttp wants one here
        self.headers["Content-Length"] = str(size)
        self._size = size
        self._views = [memoryview(piece).cast("B") for piece in pieces]
        self._position = 0

    def __len__(self) -> int:
        return self._size or 0

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Write all of it, slice by slice."""
        for view in self._views:
            for start in range(0, len(view), SLICE_BYTES):
                await writer.write(view[start : start + SLICE_BYTES])

    async def write_with_length(
        self,
        writer: AbstractStreamWriter,
        content_length: int | None,  # noqa: ARG002 - it is always ours
    ) -> None:
        """Write all of it, slice by slice."""
        await self.write(writer)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Refuse: for aiohttp's debugging only, and bytes are no text."""
        raise TypeError(f"bytes are not decoded ({encoding}, {errors})")

    # --- the file that botocore sees

    def read(self, size: int = -1) -> Piece:
        """Return up to *size* bytes from where it stands, of one piece at most unless negative."""
        start, view = self._position, memoryview(b"")
        if size < 0:
            self._position = len(self)
            return b"".join(self._views)[start:]
        for view in self._views:
            if start < len(view):
                break
            start -= len(view)
        else:
            return b""
        found = view[start : start + size]
        self._position += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move, as files do."""
        base = (0, self._position, len(self))[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """Return where it stands."""
        return self._position
