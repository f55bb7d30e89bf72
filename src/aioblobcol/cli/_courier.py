"""Standard input and output, and other files that may keep their reader or writer waiting.

A read of a terminal or a write into a pipe can block for ever, and so does the end of a program
whose event loop waits for the thread in which it does: that is what threads of the loop's own
executor would do to Ctrl-C. Here they are daemons, which nobody waits for.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")

READ_BYTES: Final = 256 * 1024


class Courier:
    """Carries out calls that may block, one after the other, in a thread of its own."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._work, name="aioblobcol: courier", daemon=True).start()

    async def call(self, function: Callable[[], T]) -> T:
        """Return what *function* returns; when we are cancelled, it may go on."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.put((future, function))
        return await future

    def close(self) -> None:
        """Let the thread end, after the call that it is carrying out."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            result, error = None, None
            try:
                result = function()
            except BaseException as exc:  # any: whoever waits is told
                error = exc
            try:
                future.get_loop().call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return


class BlockingReader:
    """A file descriptor as an object with an async ``read``."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._courier = Courier()

    async def read(self, size: int = READ_BYTES, /) -> bytes:
        """Return *size* bytes at most, ``b""`` at the end."""
        return await self._courier.call(lambda: os.read(self._descriptor, min(size, READ_BYTES)))

    def close(self) -> None:
        """Let the thread end; the descriptor stays open."""
        self._courier.close()


class BlockingWriter:
    """A file descriptor that is written to."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._courier = Courier()

    async def write(self, data: bytes) -> None:
        """Write all of *data*.

        Raises:
            OSError: it could not be written; of a pipe that nobody reads, a `BrokenPipeError`.
        """
        await self._courier.call(lambda: self._write_all(data))

    def close(self) -> None:
        """Let the thread end; the descriptor stays open."""
        self._courier.close()

    def _write_all(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]


def _settle(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.done():  # whoever waited was cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
