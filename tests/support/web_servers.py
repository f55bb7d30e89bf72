"""Web applications on real sockets: uvicorn's and aiohttp's servers, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from aiohttp import web


@contextlib.asynccontextmanager
async def serve_asgi(app: Any) -> AsyncIterator[str]:
    """Give the URL of an ASGI application; leaving waits for its requests."""
    listening = socket.create_server(("127.0.0.1", 0))  # clients queue here until it is ready
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listening.close()


@contextlib.asynccontextmanager
async def serve_aiohttp(app: web.Application) -> AsyncIterator[str]:
    """Give the URL of an application of aiohttp; leaving waits for its requests."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def half_a_request(url: str, head: str, body: bytes) -> AsyncIterator[None]:
    """Send a request that promises more than *body*; leaving cuts the wire."""
    target = urlsplit(url)
    _, writer = await asyncio.open_connection(target.hostname, target.port)
    start = f"POST {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\n{head}\r\n\r\n"
    writer.write(start.encode("ascii") + body)
    try:
        await writer.drain()
        yield
    finally:
        writer.transport.abort()
