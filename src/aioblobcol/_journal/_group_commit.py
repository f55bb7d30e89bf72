"""Group commit: what many tasks want written goes out together, one write at a time.

While one write is under way the next ones gather, so that a busy application pays one statement
and one COMMIT for all of them. Invariants: a task whose wait was cancelled does not keep the
others' from being written; a write in doubt is made again; what is still refused then is written
task by task, so that only the one with the bad entry hears of it. Writing twice must be harmless.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Batch = list[tuple[Sequence[str], asyncio.Future[None]]]


class GroupCommit:
    """One writer for all tasks of one event loop."""

    def __init__(
        self,
        write: Callable[[Sequence[str]], Awaitable[None]],
        *,
        seconds: float,
        is_entrys_fault: Callable[[Exception], bool],
    ) -> None:
        """Gather for *write*.

        Args:
            write: may take so many *seconds*.
            seconds: see there.
            is_entrys_fault: tells of an error of *write* whether other entries could be written.
        """
        self._write = write
        self._is_entrys_fault = is_entrys_fault
        self._seconds = seconds
        self._waiting: Batch = []
        self._task: asyncio.Task[None] | None = None

    async def submit(self, entries: Sequence[str]) -> None:
        """Return once *entries* are written durably.

        Raises:
            TimeoutError, Exception: of the write; whether it took effect is not known.
            asyncio.CancelledError: they may be written all the same.
        """
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((entries, written))
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="aioblobcol: group commit")
        await written

    async def _run(self) -> None:
        batch: Batch = []
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._write_batch(batch)
        finally:
            self._task = None
            for _, written in (*batch, *self._waiting):  # the loop is shut down
                written.cancel()

    async def _write_batch(self, batch: Batch) -> None:
        wanted = [each for each in batch if not each[1].done()]
        if not wanted:
            return
        error = await self._attempt(wanted)
        if error is not None and not self._is_entrys_fault(error):
            error = await self._attempt(wanted)  # its connection was stale, or lost on the way
        if error is None or len(wanted) == 1 or not self._is_entrys_fault(error):
            _tell(wanted, error)
            return
        for one in wanted:
            _tell([one], await self._attempt([one]))

    async def _attempt(self, batch: Batch) -> Exception | None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._write([entry for entries, _ in batch for entry in entries])
        except Exception as exc:  # whoever waits for it raises it
            return exc
        return None


def _tell(batch: Batch, error: Exception | None) -> None:
    for _, written in batch:
        if written.done():  # its task was cancelled meanwhile
            continue
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(error)
