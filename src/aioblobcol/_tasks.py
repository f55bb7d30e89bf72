"""Reflexes of asyncio: what must be finished is finished, and every task has an owner.

Invariants: a cancellation is never swallowed, it goes on once the work is done; the work is
bounded in time; a `Background` knows its tasks until they have ended.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

T = TypeVar("T")

logger = logging.getLogger("aioblobcol")


async def wait_through(tasks: Iterable[asyncio.Future[Any]]) -> asyncio.CancelledError | None:
    """Wait until all *tasks* (or futures) have ended, also while we are being cancelled.

    Returns the cancellation that arrived meanwhile, for the caller to raise; the tasks
    themselves are left alone.
    """
    waiting = set(tasks)
    interrupted: asyncio.CancelledError | None = None
    while waiting:
        try:
            # asyncio.wait, unlike `await task`, does not hand our cancellation on to the task
            _, waiting = await asyncio.wait(waiting)
        except asyncio.CancelledError as exc:
            interrupted = exc
            waiting = {task for task in waiting if not task.done()}
    return interrupted


async def run_to_end(work: Coroutine[Any, Any, T], *, seconds: float) -> T:
    """Finish *work* although the caller is cancelled meanwhile, then let the cancel through.

    Raises:
        TimeoutError: the work took longer than *seconds* and was cancelled.
        asyncio.CancelledError: the caller was cancelled; what the work raised is its cause.
    """
    task = asyncio.create_task(work, name="aioblobcol: run to end")
    is_late: list[bool] = []
    bound = task.get_loop().call_later(seconds, lambda: is_late.append(task.cancel()))
    interrupted = await wait_through([task])
    bound.cancel()
    error = TimeoutError() if is_late and task.cancelled() else None
    if interrupted is not None:
        raise interrupted from (error or (None if task.cancelled() else task.exception()))
    if error is not None:
        raise error
    return task.result()


class Budget:
    """An amount that is shared: whoever needs more than is left waits for its turn.

    First come, first served: a large demand is not overtaken by small ones. One that is larger
    than the whole is granted the whole, so that it goes alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._left = limit
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @property
    def used(self) -> int:
        """What is granted at this moment."""
        return self.limit - self._left

    async def acquire(self, amount: int) -> int:
        """Wait until *amount* is left, take it, and return what has to be given back."""
        amount = min(amount, self.limit)
        if not self._waiting and amount <= self._left:
            self._left -= amount
            return amount
        turn = asyncio.get_running_loop().create_future()
        entry = (amount, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was granted in the same moment
                self.release(amount)
            else:
                with contextlib.suppress(ValueError):  # `_grant` may have seen it cancelled
                    self._waiting.remove(entry)
                self._grant()  # it may have stood before smaller ones
            raise
        return amount

    def release(self, amount: int) -> None:
        """Give back what `acquire` returned, or a part of it."""
        self._left += amount
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._left:
            amount, turn = self._waiting.popleft()
            if not turn.done():  # else its task was cancelled, and has not run since
                self._left -= amount
                turn.set_result(None)


async def run_in_thread(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Call and await *work* in a thread, in an event loop of its own, so that ours stays free.

    What it returns must not belong to that loop, which is closed then. A cancellation is handed
    on and its end waited for: afterwards nothing of the work runs any more.

    Raises:
        asyncio.CancelledError: the caller was cancelled; what the work raised is its cause, what
            it returned is lost.
    """
    begun: Future[Callable[[], object]] = Future()

    async def main() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        begun.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        return await work()

    thread = asyncio.create_task(asyncio.to_thread(_run, main), name="aioblobcol: in a thread")
    interrupted: asyncio.CancelledError | None = None
    while not thread.done():
        try:
            await asyncio.wait({thread})
        except asyncio.CancelledError as exc:
            interrupted = exc
            begun.add_done_callback(_cancel)
    if interrupted is not None:
        raise interrupted from (None if thread.cancelled() else thread.exception())
    return thread.result()


def _run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with asyncio.Runner() as runner:
        return runner.run(main())


def _cancel(begun: Future[Callable[[], object]]) -> None:
    with contextlib.suppress(RuntimeError):  # its loop is closed: it has ended
        begun.result()()


class Background:
    """Work that outlives the request that asked for it; owned here, drained at the end."""

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    async def submit(self, work: Coroutine[Any, Any, None], *, seconds: float) -> None:
        """Start *work*, or, with *limit* tasks under way already, do it before returning."""
        is_full = len(self._tasks) >= self._limit
        task = self.start(work, seconds=seconds)
        if is_full:  # back-pressure: the caller pays
            interrupted = await wait_through([task])
            if interrupted is not None:
                raise interrupted

    def start(self, work: Coroutine[Any, Any, None], *, seconds: float) -> asyncio.Task[None]:
        """Start *work*, however much is under way: for callers that cannot wait.

        Raises:
            RuntimeError: no event loop is running; *work* was closed.
        """
        bounded = _bounded(work, seconds)
        try:
            task = asyncio.create_task(bounded, name="aioblobcol: background")
        except RuntimeError:
            bounded.close()
            work.close()
            raise
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # see run_to_end
        return task

    async def drain(self) -> None:
        """Wait for everything that was submitted; each is bounded in time by itself.

        Raises:
            asyncio.CancelledError: after everything has ended.
        """
        interrupted: asyncio.CancelledError | None = None
        while self._tasks:
            interrupted = await wait_through(tuple(self._tasks)) or interrupted
        if interrupted is not None:
            raise interrupted


async def _bounded(work: Coroutine[Any, Any, None], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await _logged(work)
    except TimeoutError:
        logger.error("background work was given up after %s seconds", seconds)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:  # nobody awaits the result: the log is where it can be seen
        logger.exception("background work failed")
