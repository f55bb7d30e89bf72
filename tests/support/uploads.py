"""An upload as a web framework hands it over."""

from __future__ import annotations

from typing import Any


class Upload:
    """Bytes with an async `read`, like Starlette's `UploadFile`."""

    def __init__(
        self,
        body: bytes,
        *,
        filename: Any = None,
        content_type: Any = None,
        size: Any = ...,
        piece: int = 2**20,
    ) -> None:
        self.filename = filename
        self.content_type = content_type
        self.size = len(body) if size is ... else size
        self.position = 0
        self.reads = 0
        self._body = body
        self._piece = piece

    async def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes."""
        self.reads += 1
        end = len(self._body) if size < 0 else self.position + min(size, self._piece)
        read = self._body[self.position : end]
        self.position += len(read)
        return read
