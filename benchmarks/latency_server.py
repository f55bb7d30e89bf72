"""An S3 server that knows only how long it takes: every answer comes after a fixed latency.

A process of its own, so that its work does not count as the client's: it prints its port as the
first line and ends when its standard input does. It stores nothing. ``GET /counts`` (at once)
returns the requests since the last such call, as JSON; ``GET /peak`` the highest number of PUTs
that were under way at one time, from the head of the request to the answer.

Invariants: a client that sends ``Expect: 100-continue`` waits one latency for the 100 and
another for the answer; bodies have a ``Content-Length``, anything else is refused.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import re
import sys

_KEY = re.compile(rb"<Key>([^<]*)</Key>")


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """The head of one request."""

    method: str
    target: str
    headers: dict[str, str]

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return int(self.headers.get("content-length", "0"))

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for a 100 before it sends the body."""
        return self.headers.get("expect", "").lower() == "100-continue"

    @property
    def kind(self) -> str:
        """The name under which it is counted."""
        is_bulk_delete = self.method == "POST" and re.search(r"[?&]delete\b", self.target)
        return "DeleteObjects" if is_bulk_delete else self.method


@dataclasses.dataclass(slots=True)
class Load:
    """PUTs under way: now, and at most since somebody asked."""

    now: int = 0
    peak: int = 0

    def begin(self) -> None:
        """One more."""
        self.now += 1
        self.peak = max(self.peak, self.now)

    def end(self) -> None:
        """One less."""
        self.now -= 1

    def take_peak(self) -> int:
        """Return the highest number, and count anew."""
        peak, self.peak = self.peak, self.now
        return peak


class Connection(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(
        self, *, latency_seconds: float, counts: collections.Counter[str], load: Load
    ) -> None:
        self._latency_seconds = latency_seconds
        self._counts = counts
        self._load = load
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._request: Request | None = None  # its head was read, its body not yet
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where answers go."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        self._buffer += data
        while self._take_head() and self._take_body():
            pass

    def _take_head(self) -> bool:
        if self._request is not None:
            return True
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        method, target, _ = first.split(" ", 2)
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._request = Request(method, target, headers)
        if self._request.kind == "PUT":
            self._load.begin()
        if self._request.expects_continue:
            self._counts["Expect"] += 1
            self._send_later(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _take_body(self) -> bool:
        request = self._request
        assert request is not None
        if len(self._buffer) < request.length:
            return False
        body = bytes(self._buffer[: request.length])
        del self._buffer[: request.length]
        self._request = None
        if request.target == "/counts":
            self._send(_answer("200 OK", json.dumps(self._counts).encode()))
            self._counts.clear()
            return True
        if request.target == "/peak":
            self._send(_answer("200 OK", json.dumps(self._load.take_peak()).encode()))
            return True
        self._counts[request.kind] += 1
        self._loop.call_later(self._latency_seconds, self._finish, request, body)
        return True

    def _finish(self, request: Request, body: bytes) -> None:
        if request.kind == "PUT":
            self._load.end()
        self._send(answer_to(request, body))

    def _send_later(self, data: bytes) -> None:
        self._loop.call_later(self._latency_seconds, self._send, data)

    def _send(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


def answer_to(request: Request, body: bytes) -> bytes:
    """Return what S3 would say, if everything were always fine."""
    if "transfer-encoding" in request.headers:
        return _answer("411 Length Required", b"")
    match request.kind:
        case "PUT":
            return _answer("200 OK", b"", etag='"00000000000000000000000000000000"')
        case "DELETE":
            return b"HTTP/1.1 204 No Content\r\n\r\n"
        case "HEAD":
            return _answer("200 OK", b"", etag='"00000000000000000000000000000000"')
        case "DeleteObjects":
            keys = b"".join(b"<Deleted><Key>%s</Key></Deleted>" % key for key in _KEY.findall(body))
            return _answer("200 OK", b"<DeleteResult>%s</DeleteResult>" % keys)
        case _:
            return _answer("501 Not Implemented", b"")


def _answer(status: str, body: bytes, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def serve(*, latency_seconds: float) -> None:
    """Serve on a free port until standard input ends."""
    counts: collections.Counter[str] = collections.Counter()
    load = Load()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(latency_seconds=latency_seconds, counts=counts, load=load),
        "127.0.0.1",
        0,
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--latency-seconds", type=float, default=0.02)
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(latency_seconds=arguments.latency_seconds))


if __name__ == "__main__":
    main()
