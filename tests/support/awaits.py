"""Cancellation at a counted await: the same moment in every run."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any


class CountedTask:
    """Runs a coroutine in a task that is cancelled at its n-th suspension.

    Attributes:
        awaits: how often the coroutine has given way so far.
    """

    def __init__(self, work: Coroutine[Any, Any, Any], *, cancel_at: int) -> None:
        self.awaits = 0
        self._work = work
        self._cancel_at = cancel_at

    async def run(self) -> bool:
        """Run to the end; tell whether the moment of cancellation was reached."""
        task = asyncio.create_task(self._drive())
        await asyncio.wait({task})
        self._work.close()
        reached = self.awaits >= self._cancel_at
        if reached:
            error = None if task.cancelled() else task.exception()
            if not task.cancelled() and error is None:
                raise AssertionError(f"the cancellation at await {self._cancel_at} was swallowed")
            if error is not None:
                raise error
            return True
        task.result()
        return False

    async def _drive(self) -> None:
        await self._steps()

    @types.coroutine
    def _steps(self) -> Generator[Any, Any, Any]:
        steps = self._work.__await__()
        send: Any = None
        error: BaseException | None = None
        while True:
            try:
                waiting_for = steps.send(send) if error is None else steps.throw(error)
            except StopIteration as stop:
                return stop.value
            self.awaits += 1
            if self.awaits == self._cancel_at:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            send, error = None, None
            try:
                send = yield waiting_for
            except BaseException as exc:  # handed on to the work
                error = exc
