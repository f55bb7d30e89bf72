"""A TCP proxy before PostgreSQL that cuts the wire around COMMIT."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Literal

from sqlalchemy.engine import make_url

CutMode = Literal["pass", "before_server", "in_server", "after_server", "hold_reply"]


class PostgresProxy:
    """Passes bytes on, until ``mode`` says what to do with the next COMMIT.

    ``before_server``: the wire is cut in place of sending it. ``in_server``: it is sent, and the
    client's wire is cut at once. ``after_server``: it is sent, PostgreSQL answers, and the answer
    is lost. ``hold_reply``: the answer waits for ``release``.

    Attributes:
        is_once: the mode is ``pass`` again after a cut.
    """

    def __init__(self, url: str) -> None:
        self._target = make_url(url)
        self.mode: CutMode = "pass"
        self.is_once = False
        self.commit_arrived = asyncio.Event()
        self.release = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        url = self._target.set(host="127.0.0.1", port=port, query={})
        return url.render_as_string(hide_password=False)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        directory = self._target.query.get("host")
        if isinstance(directory, str) and directory.startswith("/"):
            return await asyncio.open_unix_connection(f"{directory}/.s.PGSQL.5432")
        return await asyncio.open_connection(self._target.host, self._target.port or 5432)

    async def _serve(  # noqa: C901 - two directions of one wire
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        up_reader, up_writer = await self._connect()
        is_held = False

        def cut() -> None:
            if self.is_once:
                self.mode = "pass"
            for each in (writer, up_writer):
                each.transport.abort()

        async def to_server() -> None:
            nonlocal is_held
            while data := await reader.read(65536):
                # BEGIN ISOLATION LEVEL READ COMMITTED is none
                if b"COMMIT" in data.replace(b"COMMITTED", b"") and self.mode != "pass":
                    if self.mode == "before_server":
                        self.commit_arrived.set()
                        cut()
                        return
                    is_held = True
                up_writer.write(data)
                await up_writer.drain()
                if is_held and self.mode == "in_server":
                    self.mode = "pass"
                    self.commit_arrived.set()
                    writer.transport.abort()
                    await self.release.wait()
                    return
            up_writer.close()

        async def to_client() -> None:
            nonlocal is_held
            while data := await up_reader.read(65536):
                if is_held:
                    self.commit_arrived.set()
                    if self.mode == "after_server":
                        cut()
                        return
                    await self.release.wait()
                    is_held = False
                writer.write(data)
                await writer.drain()
            writer.close()

        try:
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await asyncio.gather(to_server(), to_client())
        finally:
            cut()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def postgres_proxy(url: str) -> AsyncIterator[PostgresProxy]:
    proxy = PostgresProxy(url)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
