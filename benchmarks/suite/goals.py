"""The goals, judged from one run: ratios of contenders that took turns in the same rounds.

A ratio is the median of the rounds' ratios, so that what slows a whole round down does not
count. A goal whose contenders did not all run is neither met nor missed.
"""

from __future__ import annotations

import dataclasses
import operator
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from .driver import Result, Results
from .plan import MIB

EXPLICIT: Final = "aioblobcol, explicit"
MANAGED: Final = "aioblobcol, managed"
OBSTORE_EXPLICIT: Final = "aioblobcol on obstore, explicit"
OBSTORE_MANAGED: Final = "aioblobcol on obstore, managed"
OWN: Final = "aioblobcol"
OWN_OBSTORE: Final = "aioblobcol on obstore"
HAND_TUNED: Final = "aiobotocore by hand, tuned"
HAND_DEFAULT: Final = "aiobotocore by hand, default"
HAND_OBSTORE: Final = "obstore by hand"
MIN_FOR_QUARTILES: Final = 4
FLOOR: Final = "one PUT + commit"


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """One line of the table of goals.

    Attributes:
        number: of the goal it belongs to.
        text: what is measured.
        limit: the bound, as text.
        measured: what came out, as text, with the quartiles of the rounds.
        is_met: None if it was not measured.
    """

    number: str
    text: str
    limit: str
    measured: str
    is_met: bool | None

    @property
    def is_exact(self) -> bool:
        """Whether it counts, so that no busy machine can miss it."""
        return self.number == "3"

    @property
    def verdict(self) -> str:
        """Say it in a word."""
        if self.is_met is None:
            return "-"
        return "met" if self.is_met else "MISSED"


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """A median, and the quartiles around it: a busy machine shows in how far they are apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure | None:
        """Return what some values come to."""
        if not values:
            return None
        if len(values) < MIN_FOR_QUARTILES:
            return cls(statistics.median(values), min(values), max(values))
        low, median, high = statistics.quantiles(values, n=4)
        return cls(median, low, high)


@dataclasses.dataclass(frozen=True, slots=True)
class Judge:
    """Looks results up and compares them with limits."""

    results: Results

    def ratio(
        self, group: str, name: str, base: str, values: Callable[[Result], Sequence[float]]
    ) -> Figure | None:
        """Return the rounds' ratios."""
        ours, theirs = self._found(group, name), self._found(group, base)
        if ours is None or theirs is None:
            return None
        return Figure.of([a / b for a, b in zip(values(ours), values(theirs), strict=False) if b])

    def median(
        self, group: str, name: str, values: Callable[[Result], Sequence[float]]
    ) -> Figure | None:
        """Return what the rounds gave."""
        found = self._found(group, name)
        return None if found is None else Figure.of(values(found))

    def highest(
        self, group: str, name: str, values: Callable[[Result], Sequence[float]]
    ) -> Figure | None:
        """Return the highest of all rounds."""
        found = self._found(group, name)
        return Figure.of([max(values(found))]) if found is not None and values(found) else None

    def requests(self, group: str, name: str) -> dict[str, int] | None:
        """Return the requests of one act."""
        found = self._found(group, name)
        return None if found is None else found.requests

    def columns(self, group: str) -> int:
        """Return how many columns a group has, as its one PUT for each tells."""
        found = self.requests(group, HAND_TUNED) or {}
        return found.get("PUT", 8)

    def _found(self, group: str, name: str) -> Result | None:
        found = self.results.get(group, {}).get(name)
        return found if found is not None and found.is_running and found.wall else None


def _at_most(number: str, text: str, limit: float, found: Figure | None, unit: str = "") -> Goal:
    return _goal(number, text, f"<= {limit:g}{unit}", found, unit, operator.le, limit)


def _at_least(number: str, text: str, limit: float, found: Figure | None, unit: str = "") -> Goal:
    return _goal(number, text, f">= {limit:g}{unit}", found, unit, operator.ge, limit)


def _goal(
    number: str,
    text: str,
    limit_text: str,
    found: Figure | None,
    unit: str,
    holds: Callable[[float, float], bool],
    limit: float,
) -> Goal:
    if found is None:
        return Goal(number, text, limit_text, "not measured", None)
    measured = f"{found.median:.2f}{unit}"
    quartiles = (f"{found.low:.2f}", f"{found.high:.2f}")
    if quartiles[0] != quartiles[1]:
        measured += f" ({' to '.join(quartiles)})"
    return Goal(number, text, limit_text, measured, holds(found.median, limit))


def goals_of(results: Results) -> list[Goal]:
    """Judge a run."""
    judge = Judge(results)
    steps = (_rows, _requests, _cpu, _small, _up, _down, _loop, _bulk)
    return [goal for step in steps for goal in step(judge)]


def _wall(result: Result) -> Sequence[float]:
    return result.wall


def _cpu_of(result: Result) -> Sequence[float]:
    return result.cpu


def _speed(result: Result) -> Sequence[float]:
    return [1 / seconds for seconds in result.wall]


def _growth_mib(result: Result) -> Sequence[float]:
    return [growth / MIB for growth in result.growth]


def _stall_ms(result: Result) -> Sequence[float]:
    return [1000 * seconds for seconds in result.stall]


def _settle_latencies(result: Result) -> Sequence[float]:
    return [seconds / 0.020 for seconds in result.settle]


def _rows(judge: Judge) -> Iterator[Goal]:
    for name in (EXPLICIT, MANAGED, OBSTORE_EXPLICIT):
        found = judge.ratio("create-8", name, FLOOR, _wall)
        yield _at_most("1", f"create 8 columns, wall to one PUT + commit: {name}", 1.2, found, "x")
    for name in (EXPLICIT, MANAGED, OBSTORE_EXPLICIT):
        found = judge.ratio("update-8", name, FLOOR, _wall)
        yield _at_most("2", f"update 8 columns, wall to one PUT + commit: {name}", 1.2, found, "x")
        found = judge.median("update-8", name, _settle_latencies)
        yield _at_most("2", f"clean-up after that, in latencies: {name}", 2, found)


def _requests(judge: Judge) -> Iterator[Goal]:
    puts = {"PUT": judge.columns("create-8")}
    wanted = {
        "a create": ("create-8", puts),
        "an update": ("update-8", {**puts, "DeleteObjects": 1}),
        "a failed commit": ("fail-8", {**puts, "DeleteObjects": 1}),
    }
    for what, (group, expected) in wanted.items():
        for name in (EXPLICIT, MANAGED, OBSTORE_EXPLICIT):
            found = judge.requests(group, name)
            yield Goal(
                "3",
                f"requests of {what}: {name}",
                _requests_text(expected),
                "not measured" if found is None else _requests_text(found),
                None if found is None else found == expected,
            )


def _requests_text(requests: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(requests.items(), reverse=True))


def _cpu(judge: Judge) -> Iterator[Goal]:
    for group, scheme in (("cpu-4", "http"), ("cpu-4-https", "https")):
        for name in (EXPLICIT, MANAGED):
            text = f"create 4 columns, CPU to the same calls by hand, {scheme}: {name}"
            yield _at_most("4", text, 1.1, judge.ratio(group, name, HAND_TUNED, _cpu_of), "x")
    for group, scheme in (("cpu-4", "http"), ("cpu-4-https", "https")):
        for name in (EXPLICIT, MANAGED, OBSTORE_EXPLICIT, OBSTORE_MANAGED):
            limit = 0.45 if "obstore" in name else 0.8
            text = f"create 4 columns, CPU to a default client, {scheme}: {name}"
            yield _at_most("5", text, limit, judge.ratio(group, name, HAND_DEFAULT, _cpu_of), "x")


def _small(judge: Judge) -> Iterator[Goal]:
    for group, scheme in (("put", "http"), ("put-https", "https")):
        found = judge.ratio(group, OWN_OBSTORE, HAND_OBSTORE, _cpu_of)
        yield _at_most(
            "6", f"put 16 KiB on obstore, CPU to obstore by hand, {scheme}", 1.5, found, "x"
        )


def _up(judge: Judge) -> Iterator[Goal]:
    for name in (OWN, OWN_OBSTORE):
        found = judge.highest("upload", name, _growth_mib)
        yield _at_most("7", f"1 GiB up, growth of memory: {name}", 64, found, " MiB")
    small = judge.highest("upload", f"{OWN}, a quarter of the size", _growth_mib)
    whole = judge.highest("upload", OWN, _growth_mib)
    found = None
    if small is not None and whole is not None and small.median:
        found = Figure.of([whole.median / small.median])
    yield _at_most("7", "growth of memory at 1 GiB to that at 256 MiB", 1.1, found, "x")
    for group, scheme, limit in (("upload", "http", 0.9), ("upload-https", "https", 0.8)):
        found = judge.ratio(group, OWN, HAND_OBSTORE, _speed)
        yield _at_least("7", f"1 GiB up, speed to obstore by hand, {scheme}", limit, found, "x")
        found = judge.ratio(group, OWN_OBSTORE, HAND_OBSTORE, _speed)
        text = f"1 GiB up on obstore, speed to obstore by hand, {scheme}"
        yield _at_least("7", text, 0.95, found, "x")


def _down(judge: Judge) -> Iterator[Goal]:
    found = judge.highest("download", OWN, _growth_mib)
    yield _at_most("8", "1 GiB down, growth of memory", 16, found, " MiB")
    found = judge.ratio("download", OWN, HAND_TUNED, _speed)
    yield _at_least("8", "1 GiB down, speed to the same client by hand", 0.9, found, "x")
    for name in (OWN, OWN_OBSTORE):
        found = judge.ratio("ranges", name, "one GET", _speed)
        yield _at_least("8", f"ranges in parallel, speed to one GET: {name}", 5, found, "x")


def _loop(judge: Judge) -> Iterator[Goal]:
    for source in ("bytes", "file", "stream"):
        found = judge.median("stall", f"{OWN}, {source}", _stall_ms)
        yield _at_most("9", f"longest stall while 64 MiB go up, {source}", 15, found, " ms")
    found = judge.median("stall", f"{OWN_OBSTORE}, bytes", _stall_ms)
    yield _at_most("9", "longest stall while 64 MiB go up on obstore, bytes", 15, found, " ms")
    found = judge.median("open", OWN, _stall_ms)
    yield _at_most("-", "longest stall while a store is opened", 20, found, " ms")


def _bulk(judge: Judge) -> Iterator[Goal]:
    base = "aiobotocore by hand, tuned, and one INSERT"
    for name in (MANAGED, OBSTORE_MANAGED):
        found = judge.ratio("bulk", name, base, _speed)
        yield _at_least(
            "10", f"10,000 rows, rows/s to calls and INSERT by hand: {name}", 0.9, found, "x"
        )
