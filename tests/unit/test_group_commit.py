"""Group commit: what gathers, what is tried again, and who hears of an error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import pytest

from aioblobcol._journal._group_commit import GroupCommit


class BadEntryError(Exception):
    pass


class Recorder:
    """Writes down what is to be written, and does what *answer* says."""

    def __init__(self, answer: Callable[[Sequence[str]], None] = lambda _: None) -> None:
        self.written: list[list[str]] = []
        self.gate: asyncio.Event | None = None
        self.has_begun = asyncio.Event()
        self._answer = answer

    async def write(self, entries: Sequence[str]) -> None:
        self.written.append(list(entries))
        self.has_begun.set()
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        self._answer(entries)

    def group(self, *, seconds: float = 5) -> GroupCommit:
        return GroupCommit(
            self.write,
            seconds=seconds,
            is_entrys_fault=lambda error: isinstance(error, BadEntryError),
        )


def refuse_bad(entries: Sequence[str]) -> None:
    if "bad" in entries:
        raise BadEntryError


async def outcomes(group: GroupCommit, *entries: str) -> list[str | None]:
    """Submit each entry in a task of its own, and return the names of the errors."""
    results = await asyncio.gather(
        *(group.submit([entry]) for entry in entries), return_exceptions=True
    )
    return [None if each is None else type(each).__name__ for each in results]


async def test_what_comes_meanwhile_gathers() -> None:
    """While one write is under way the next ones wait, and go out together."""
    recorder = Recorder()
    recorder.gate = asyncio.Event()
    group = recorder.group()
    first = asyncio.create_task(group.submit(["a"]))
    await recorder.has_begun.wait()
    others = [asyncio.create_task(group.submit([entry])) for entry in "bcd"]
    await asyncio.sleep(0)
    recorder.gate.set()
    await asyncio.gather(first, *others)

    assert recorder.written == [["a"], ["b", "c", "d"]]


async def test_a_bad_entry_is_its_own_tasks_affair() -> None:
    """The others are written without it."""
    assert await outcomes(Recorder(refuse_bad).group(), "a", "bad", "b") == [
        None,
        "BadEntryError",
        None,
    ]


async def test_a_write_in_doubt_is_made_again() -> None:
    """Once; then everybody hears of it, and it is not made for each of them."""
    failures = [OSError("cut")]

    def cut(_: Sequence[str]) -> None:
        if failures:
            raise failures.pop()

    recorder = Recorder(cut)
    assert await outcomes(recorder.group(), "a", "b") == [None, None]
    assert recorder.written == [["a", "b"], ["a", "b"]]

    def always(_: Sequence[str]) -> None:
        raise OSError("away")

    recorder = Recorder(always)
    assert await outcomes(recorder.group(), "a", "b", "c") == ["OSError"] * 3
    assert len(recorder.written) == 2


async def test_a_write_is_bounded_in_time() -> None:
    recorder = Recorder()
    recorder.gate = asyncio.Event()

    assert await outcomes(recorder.group(seconds=0.01), "a") == ["TimeoutError"]


async def test_a_cancelled_task_keeps_nobody_waiting() -> None:
    """Nor is it written, if its batch has not begun."""
    recorder = Recorder()
    recorder.gate = asyncio.Event()
    group = recorder.group()
    first = asyncio.create_task(group.submit(["a"]))
    await recorder.has_begun.wait()
    second, third = (asyncio.create_task(group.submit([entry])) for entry in "bc")
    await asyncio.sleep(0)
    second.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await second
    recorder.gate.set()
    await asyncio.gather(first, third)

    assert recorder.written == [["a"], ["c"]]


async def test_its_task_ends_with_its_work() -> None:
    """Nothing holds the event loop afterwards."""
    group = Recorder().group()
    await group.submit(["a"])
    await asyncio.sleep(0)

    assert group._task is None
    await group.submit(["b"])


async def test_a_task_that_is_cancelled_from_outside() -> None:
    """Whoever waits is cancelled too, and does not wait for ever."""
    recorder = Recorder()
    recorder.gate = asyncio.Event()
    group = recorder.group()
    waiting = asyncio.create_task(group.submit(["a"]))
    await recorder.has_begun.wait()
    assert group._task is not None
    group._task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting
