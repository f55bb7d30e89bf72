"""Time, CPU, memory and loop stalls of an act, as seen from its own process.

CPU is user and system time of all threads of the process. Memory is how far the peak of the
resident set rose above where it was before the act; Linux lets a process reset that peak.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .place import Act

TICK_SECONDS: Final = 0.001
_STATUS: Final = Path("/proc/self/status")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One turn of a contender.

    Attributes:
        seconds: wall time of each act.
        cpu_seconds: of one act, on average.
        settle_seconds: how long each act's background work went on after it.
        growth_bytes: of memory; None where the system cannot tell.
        stall_seconds: the longest time that the loop did nothing else; None if not watched.
        result: what the last act returned, if that is text.
    """

    seconds: list[float]
    cpu_seconds: float
    settle_seconds: list[float]
    growth_bytes: int | None
    stall_seconds: float | None
    result: str | None


async def measure(act: Act, *, times: int, watch_loop: bool) -> Sample:
    """Do an act so many times, one after another."""
    seconds: list[float] = []
    settle: list[float] = []
    cpu = 0.0
    result: object = None
    gc.collect()
    before = _reset_peak()
    watch = LoopWatch()
    for _ in range(times):
        subject = await act.before()
        with watch.watching() if watch_loop else contextlib.nullcontext():
            cpu_started = time.process_time()
            started = time.perf_counter()
            result = await act.run(subject)
            ended = time.perf_counter()
            await act.after()
            settled = time.perf_counter()
            cpu += time.process_time() - cpu_started
        seconds.append(ended - started)
        settle.append(settled - ended)
    peak = _resident("VmHWM")
    return Sample(
        seconds=seconds,
        cpu_seconds=cpu / times,
        settle_seconds=settle,
        growth_bytes=None if before is None or peak is None else max(peak - before, 0),
        stall_seconds=watch.longest_seconds if watch_loop else None,
        result=result if isinstance(result, str) else None,
    )


class LoopWatch:
    """The longest time between two ticks of the loop, beyond the tick itself."""

    def __init__(self) -> None:
        self.longest_seconds = 0.0
        self._last = 0.0
        self._handle: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs."""
        self._last = time.perf_counter()
        self._wait()
        try:
            yield
        finally:
            assert self._handle is not None
            self._handle.cancel()
            self._take()

    def _wait(self) -> None:
        self._handle = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._take()
        self._wait()

    def _take(self) -> None:
        now = time.perf_counter()
        self.longest_seconds = max(self.longest_seconds, now - self._last - TICK_SECONDS)
        self._last = now


def _reset_peak() -> int | None:
    """Set the peak to what is resident now, and return that."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
