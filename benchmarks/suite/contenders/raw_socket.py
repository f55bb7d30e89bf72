"""The limit: one request written to a socket, unsigned, and its answer read from it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

from ..place import BUCKET, Act, Place


class Client(asyncio.Protocol):
    """One connection that sends a request and waits for its answer."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._answered: asyncio.Future[bytes] | None = None
        self._received = bytearray()
        self._awaited = 0  # bytes of the whole answer, once its head was read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where requests go."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take a piece of the answer."""
        self._received += data
        if not self._awaited:
            self._awaited = self._length()
        if self._awaited and len(self._received) >= self._awaited:
            assert self._answered is not None
            answer = bytes(self._received)
            self._received.clear()
            self._awaited = 0
            self._answered.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail who waits."""
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(exc or ConnectionResetError())

    def _length(self) -> int:
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return 0
        _, _, behind = bytes(self._received[:end]).lower().partition(b"content-length:")
        return end + 4 + int(behind.split(b"\r\n", 1)[0])

    async def ask(self, head: bytes, body: bytes = b"") -> bytes:
        """Send one request."""
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(head + body)
        answer = await self._answered
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(answer[:200])
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()


@contextlib.asynccontextmanager
async def _client(place: Place) -> AsyncIterator[Client]:
    url = urllib.parse.urlsplit(place.endpoint_url)
    context = None
    if place.ca_file is not None:
        context = ssl.create_default_context(cafile=str(place.ca_file))
    loop = asyncio.get_running_loop()
    assert url.hostname is not None
    assert url.port is not None
    _, client = await loop.create_connection(Client, url.hostname, url.port, ssl=context)
    try:
        yield client
    finally:
        client.close()


def _put_head(key: str, size: int) -> bytes:
    return f"PUT /{BUCKET}/{key} HTTP/1.1\r\nHost: s3\r\nContent-Length: {size}\r\n\r\n".encode()


@contextlib.asynccontextmanager
async def put(place: Place) -> AsyncIterator[Act]:
    """Put one small object."""
    (body,) = place.bodies()

    async with _client(place) as client:

        async def run(_subject: Any) -> None:
            await client.ask(_put_head(place.new_key(), len(body)), body)

        yield Act(run)


@contextlib.asynccontextmanager
async def get(place: Place) -> AsyncIterator[Act]:
    """Get one small object."""
    (body,) = place.bodies()

    async with _client(place) as client:
        key = place.new_key()
        await client.ask(_put_head(key, len(body)), body)
        head = f"GET /{BUCKET}/{key} HTTP/1.1\r\nHost: s3\r\n\r\n".encode()

        async def run(_subject: Any) -> None:
            answer = await client.ask(head)
            assert answer.endswith(body)

        yield Act(run)
