"""One event loop per command, closed only when nobody posts to it any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

THREAD_SECONDS: Final = 5
LOOPS_OWN: Final = "asyncio_"
"""What the threads of a loop's executor are called; the loop joins them itself."""


def run_in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Do what `asyncio.run` does, and wait for the threads that *work* leaves.

    aiosqlite ends the thread of a connection that could not be made without waiting for it. If
    the loop is closed before, that thread dies with a traceback on stderr.
    """
    before = set(threading.enumerate())
    with asyncio.Runner() as runner:
        try:
            return runner.run(work)
        finally:
            for thread in set(threading.enumerate()) - before:
                if not thread.daemon and not thread.name.startswith(LOOPS_OWN):
                    thread.join(THREAD_SECONDS)
