"""An HTTP proxy before an S3 server: down, slow, 503, answers lost, requests that land late."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import unquote, urlsplit


@dataclasses.dataclass(frozen=True)
class Request:
    """One HTTP request, whole."""

    method: str
    path: str
    headers: dict[str, str]
    head: bytes
    body: bytes

    @property
    def is_bulk_delete(self) -> bool:
        return self.method == "POST" and self.path.endswith("?delete")


Answer = bytes | None
Forward = Callable[[], Awaitable[bytes]]
Rule = Callable[[Request, Forward], Awaitable[Answer]]


def answer(status: str, code: str) -> bytes:
    """Return an S3 error as it stands on the wire."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


class S3Proxy:
    """Forwards every request, unless ``rule`` (awaited with it) says otherwise.

    A rule returns the bytes to answer, or None to cut the wire.
    """

    def __init__(self, endpoint_url: str) -> None:
        target = urlsplit(endpoint_url)
        self._host, self._port = target.hostname or "127.0.0.1", target.port or 80
        self.rule: Rule | None = None
        self.requests: list[Request] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def endpoint_url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def count(self, method: str) -> int:
        return sum(request.method == method for request in self.requests)

    async def _forward(self, request: Request) -> bytes:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        lines = [
            line
            for line in request.head.split(b"\r\n")
            if line and not line.lower().startswith((b"connection:", b"expect:"))
        ]
        try:
            writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + request.body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            with contextlib.suppress(
                asyncio.CancelledError, ConnectionError, asyncio.IncompleteReadError
            ):
                request = await self._read(reader, writer)
                self.requests.append(request)

                async def forward() -> bytes:
                    return await self._forward(request)

                reply = await (self.rule(request, forward) if self.rule else forward())
                if reply is not None:
                    writer.write(reply)
                    await writer.drain()
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in rest if line)
        }
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Request(method, unquote(path), headers, head, body)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def settled(self) -> None:
        """Return once nothing is under way of all that was sent until now, though by the dead."""
        port = urlsplit(self.endpoint_url).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await reader.read()  # it is served after those that have connected before
        writer.close()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def s3_proxy(endpoint_url: str) -> AsyncIterator[S3Proxy]:
    proxy = S3Proxy(endpoint_url)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
