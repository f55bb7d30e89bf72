"""A server of one object on a raw socket: cuts, falls silent, changes, ignores what it is asked."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator

PIECE = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asked for; None where it did not."""

    method: str
    range: str | None
    if_match: str | None


@dataclasses.dataclass
class ObjectServer:
    """Answers every GET and HEAD with the same object, whatever its name.

    Attributes:
        body: of the object.
        etag: of the object; None for a server that has none.
        next_etag: what it becomes with the first answer.
        headers: more of each answer.
        knows_range, knows_if_match: False for a server that ignores them.
        content_range: what it says in place of the truth.
        cuts: after how many bytes of its body each answer, in order, breaks off; None: it does not.
        falls_silent: whether it keeps such a connection open, and sends nothing more.
        asked: all requests.
        sent: bytes of bodies, all together.
        connections: that are open.
        ended: set when one has ended.
    """

    body: bytes = b""
    etag: str | None = '"one"'
    next_etag: str | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    knows_range: bool = True
    knows_if_match: bool = True
    content_range: str | None = None
    cuts: list[int | None] = dataclasses.field(default_factory=list)
    falls_silent: bool = False
    asked: list[Asked] = dataclasses.field(default_factory=list)
    sent: int = 0
    connections: int = 0
    port: int = 0

    ended: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    async def until(self, *, connections: int) -> None:
        """Return once no more than so many are open."""
        while self.connections > connections:
            self.ended.clear()
            await self.ended.wait()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._answer((await reader.readuntil(b"\r\n\r\n")).decode(), writer):
                    pass
        finally:
            self.connections -= 1
            self.ended.set()
            writer.close()

    async def _answer(self, head: str, writer: asyncio.StreamWriter) -> bool:
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:] if line)
        }
        asked = Asked(head.split(" ", maxsplit=1)[0], headers.get("range"), headers.get("if-match"))
        self.asked.append(asked)
        status, more, body = self._reply(asked)
        self.etag, self.next_etag = self.next_etag or self.etag, None
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in more.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        cut = self.cuts.pop(0) if self.cuts and asked.method == "GET" else None
        if asked.method == "GET":
            await self._send(body[:cut], writer)
        if cut is not None and self.falls_silent:
            await asyncio.Event().wait()
        return cut is None

    def _reply(self, asked: Asked) -> tuple[str, dict[str, str], bytes]:
        size = len(self.body)
        tagged = {"ETag": self.etag} if self.etag else {}
        if self.knows_if_match and asked.if_match not in {None, self.etag}:
            return "412 Precondition Failed", {}, b"<Error><Code>PreconditionFailed</Code></Error>"
        if asked.range is None or not self.knows_range:
            return "200 OK", {**tagged, **self.headers}, self.body
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.range)
        assert found is not None
        start, last = int(found[1]), min(int(found[2] or size), size - 1)
        if start >= size:
            error = b"<Error><Code>InvalidRange</Code></Error>"
            return "416 Range Not Satisfiable", {}, error
        content_range = self.content_range or f"bytes {start}-{last}/{size}"
        return (
            "206 Partial Content",
            {**tagged, **self.headers, "Content-Range": content_range},
            self.body[start : last + 1],
        )

    async def _send(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(body), PIECE):
            writer.write(body[start : start + PIECE])
            await writer.drain()
            self.sent += min(PIECE, len(body) - start)


@contextlib.asynccontextmanager
async def object_server() -> AsyncIterator[ObjectServer]:
    served, tasks = ObjectServer(), set[asyncio.Task[None]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        with contextlib.suppress(asyncio.CancelledError):  # at the end
            await served.serve(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
