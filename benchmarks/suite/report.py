"""Writing a run down: tables for people, JSON for machines. No host name and no path."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from .driver import Result, Results
from .goals import Goal
from .plan import MIB, Group

PACKAGES: Final = (
    "aioblobcol",
    "aiobotocore",
    "botocore",
    "aiohttp",
    "boto3",
    "obstore",
    "s3fs",
    "SQLAlchemy",
    "aiosqlite",
    "advanced-alchemy",
    "sqlalchemy-file",
    "uvloop",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column of a table of a group."""

    title: str
    text: Callable[[Result, Group, Result | None], str]


def _ms(values: Sequence[float]) -> str:
    milliseconds = 1000 * statistics.median(values)
    return f"{milliseconds:.2f}" if milliseconds < 10 else f"{milliseconds:.1f}"  # noqa: PLR2004


def _ratio(values: Sequence[float], base: Sequence[float] | None) -> str:
    if not base or not statistics.median(base):
        return ""
    return f"{statistics.median(values) / statistics.median(base):.2f}"


COLUMNS: Final = {
    "wall": (
        Column("wall ms", lambda r, _g, _b: _ms(r.wall)),
        Column("x", lambda r, _g, b: _ratio(r.wall, b.wall if b else None)),
    ),
    "cpu": (
        Column("CPU ms", lambda r, _g, _b: _ms(r.cpu)),
        Column("x", lambda r, _g, b: _ratio(r.cpu, b.cpu if b else None)),
    ),
    "settle": (Column("then ms", lambda r, _g, _b: _ms(r.settle)),),
    "throughput": (
        Column("MiB/s", lambda r, g, _b: f"{g.stream_bytes / MIB / statistics.median(r.wall):.0f}"),
        Column("server busy", lambda r, _g, _b: f"{statistics.median(r.server_share):.0%}"),
    ),
    "rows": (Column("rows/s", lambda r, g, _b: f"{g.rows / statistics.median(r.wall):.0f}"),),
    "growth": (
        Column("memory MiB", lambda r, _g, _b: f"{max(r.growth) / MIB:.1f}" if r.growth else "?"),
    ),
    "stall": (Column("stall ms", lambda r, _g, _b: _ms(r.stall)),),
    "requests": (
        Column(
            "requests",
            lambda r, _g, _b: ", ".join(f"{n} {k}" for k, n in sorted((r.requests or {}).items())),
        ),
    ),
}


def machine_lines() -> list[str]:
    """Return what the figures depend on."""
    return [
        f"{_cpu_model()}, {os.cpu_count()} cores; {platform.system()} {platform.machine()}",
        f"{platform.python_implementation()} {platform.python_version()}; "
        + ", ".join(f"{name} {found}" for name, found in versions().items()),
        f"Load when it began (of other programs): {os.getloadavg()[0]:.1f}",
    ]


def versions() -> dict[str, str]:
    """Return the versions of what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or "unknown CPU")


def goal_table(goals: Sequence[Goal]) -> list[str]:
    """Return the goals as a Markdown table."""
    rows = [(g.number, g.text, g.limit, g.measured, g.verdict) for g in goals]
    return _table(("#", "goal", "limit", "measured", "verdict"), rows)


def group_table(group: Group, results: dict[str, Result]) -> list[str]:
    """Return a group as a Markdown table; ratios are to its first contender."""
    measures = (*group.measures, *(("requests",) if group.counts else ()))
    columns = [column for name in measures for column in COLUMNS[name]]
    first = results[group.contenders[0].name]
    base = first if first.wall else None
    rows = []
    for contender in group.contenders:
        own = group
        if contender.stream_bytes:
            own = dataclasses.replace(group, stream_bytes=contender.stream_bytes)
        result = results[contender.name]
        if result.wall:
            rows.append((contender.name, *(c.text(result, own, base) for c in columns)))
        else:
            why = result.absent or "FAILED"
            rows.append((contender.name, why, *("" for _ in columns[1:])))
    return _table(("", *(column.title for column in columns)), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        filled = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(filled)} |"

    return [line(head), line(["-" * width for width in widths]), *(line(row) for row in rows)]


def markdown(
    groups: Sequence[Group], results: Results, goals: Sequence[Goal], *, machine: Sequence[str]
) -> str:
    """Return the whole report."""
    return "\n".join(_markdown_lines(groups, results, goals, machine)) + "\n"


def _markdown_lines(
    groups: Sequence[Group], results: Results, goals: Sequence[Goal], machine: Sequence[str]
) -> Iterator[str]:
    yield from ("# Results of `make bench`", "")
    for line in machine:
        yield from (line, "")
    yield (
        "Client and server have a core each. Figures are medians of interleaved rounds, memory is "
        "the highest growth of the resident set, and ratios (x) are to the first line. CPU is that "
        "of the client's process, all threads. A goal's ratio is the median of the rounds' ratios, "
        "its quartiles beside it. Where the server is busy nearly all the time, it is the limit. "
        "Everything is from one run; only ratios travel."
    )
    yield from ("", "## Goals", "", *goal_table(goals))
    for group in groups:
        if group.name in results:
            title = group.title[0].upper() + group.title[1:]
            yield from ("", f"## {title}", "", *group_table(group, results[group.name]))


def as_json(
    groups: Sequence[Group], results: Results, goals: Sequence[Goal], *, machine: Sequence[str]
) -> str:
    """Return everything that was measured, in seconds and bytes."""
    found: dict[str, Any] = {
        "machine": list(machine),
        "goals": [{**dataclasses.asdict(goal), "verdict": goal.verdict} for goal in goals],
        "groups": {
            group.name: {
                "title": group.title,
                "contenders": {n: dataclasses.asdict(r) for n, r in results[group.name].items()},
            }
            for group in groups
            if group.name in results
        },
    }
    return json.dumps(found, indent=1) + "\n"
