"""Sources that are read piece by piece, in every shape in which frameworks hand them out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any


class Stream:
    """What Starlette's UploadFile does: an async `read(size)` and nothing else."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces = list(pieces)
        self.sizes: list[int] = []

    async def read(self, size: int, /) -> Any:
        self.sizes.append(size)
        piece = self.pieces.pop(0) if self.pieces else b""
        if isinstance(piece, Exception):
            raise piece
        return piece


class Chunks(Stream):
    """What aiohttp's BodyPartReader does: its `read()` takes no size, `read_chunk(size)` does."""

    async def read_chunk(self, size: int = 8192, /) -> Any:
        return await super().read(size)

    async def read(self, *, decode: bool = False) -> Any:  # type: ignore[override]
        raise AssertionError(f"would read all of it (decode={decode})")


class Response:
    """What httpx's Response does: `aiter_bytes()`, and a `read()` that does not wait."""

    encoding = "utf-8"

    def __init__(self, *pieces: bytes, headers: dict[str, str] | None = None) -> None:
        self.pieces = pieces
        self.headers = headers or {}

    async def aiter_bytes(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece

    def read(self) -> bytes:
        raise AssertionError("not for streams")


class AiohttpResponse:
    """What aiohttp's ClientResponse does: its `content` is a stream, its `read()` reads it all."""

    def __init__(self, *pieces: bytes, headers: dict[str, str] | None = None) -> None:
        self.content = Stream(*pieces)
        self.headers = headers or {}

    async def read(self) -> bytes:
        raise AssertionError("would read all of it")


class PlainFile:
    """An object that has a `read(size)` and nothing else."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces = list(pieces)

    def read(self, size: int = -1) -> Any:
        assert size >= 0
        return self.pieces.pop(0) if self.pieces else b""

    def close(self) -> None:
        pass


async def iterated(*pieces: Any) -> AsyncIterator[Any]:
    """Yield pieces."""
    for piece in pieces:
        yield piece
