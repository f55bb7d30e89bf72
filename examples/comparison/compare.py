"""Play the same scenarios against three libraries and print who loses and who leaks.

    python examples/comparison/compare.py

LOSS: a committed row names an object that is missing or holds the bytes of another row.
LEAK: an object that no row names. README.md says how to install what this needs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import logging
import platform
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench import Abort, Lab, Verdict, judge
from scenarios import SCENARIOS, program_ends

Scenario = Callable[[Lab], Awaitable[None]]

COLUMNS = {  # the module that has it, and the head of its column
    "with_advanced_alchemy": "advanced-alchemy",
    "with_sqlalchemy_file": "sqlalchemy-file",
    "with_aioblobcol": "aioblobcol",
}
NOT_AVAILABLE = "not available"
TIME_LIMIT_SECONDS = 20  # of a scenario; most take milliseconds
ENVIRONMENT = ("SQLAlchemy", "aiosqlite", "obstore", "apache-libcloud")


def main() -> None:
    """Print the table, its footnotes and what was seen where a cell is not ok."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="names of scenarios; all by default")
    parser.add_argument("--all", action="store_true", help="tell what was seen where it is ok, too")
    arguments = parser.parse_args()
    wanted = arguments.only
    scenarios = [each for each in SCENARIOS if not wanted or each.__name__ in wanted]
    logging.disable()  # the libraries' own; the table says what happened
    labs = {head: load(module) for module, head in COLUMNS.items()}
    table = Table(labs, tell_all=arguments.all)
    for scenario in scenarios:
        table.add(scenario)
    sys.stdout.write("\n".join(table.lines()) + "\n")


def load(module: str) -> type[Lab] | None:
    """Import a library's side of the comparison, if the library is there."""
    try:
        lab: type[Lab] = importlib.import_module(module).LAB
    except ImportError:
        return None
    return lab


def play(scenario: Scenario, lab: Lab) -> Verdict:
    """Run a scenario as a program of its own, and look at both stores when it has ended."""
    return judge(lab, asyncio.run(_run(scenario, lab)))


async def _run(scenario: Scenario, lab: Lab) -> Exception | None:
    error: Exception | None = None
    async with lab.open():
        try:
            async with asyncio.timeout(TIME_LIMIT_SECONDS):
                await scenario(lab)
        except Abort:
            pass  # the program's own
        except Exception as exc:
            error = exc
        if scenario is not program_ends:
            await lab.settle()
    return error


class Table:
    """A Markdown table, a scenario a line, a library a column."""

    def __init__(self, labs: dict[str, type[Lab] | None], *, tell_all: bool) -> None:
        self._labs = labs
        self._tell_all = tell_all
        self._rows: list[list[str]] = []
        self._footnotes: list[str] = []
        self._seen: list[str] = []

    def add(self, scenario: Scenario) -> None:
        """Play a scenario with every library."""
        sentence = (scenario.__doc__ or "").strip()
        cells = [self._cell(scenario, head, lab) for head, lab in self._labs.items()]
        self._rows.append([sentence, *cells])

    def _cell(self, scenario: Scenario, head: str, lab: type[Lab] | None) -> str:
        name = getattr(scenario, "__name__", "")
        if lab is None:
            return NOT_AVAILABLE
        if reason := lab.cannot_play.get(name):
            self._footnotes.append(reason)
            return f"n/a [^{len(self._footnotes)}]"
        with tempfile.TemporaryDirectory() as directory:
            verdict = play(scenario, lab(Path(directory)))
        if self._tell_all or not verdict.cell.startswith("ok"):
            self._seen.append(f"- `{name}`, {head}: {verdict}.")
        return verdict.cell

    def lines(self) -> Iterator[str]:
        """Give the table, the footnotes, the versions and the details."""
        yield from _table(["Scenario", *map(_with_version, self._labs)], self._rows)
        yield ""
        for number, reason in enumerate(self._footnotes, start=1):
            yield f"[^{number}]: {reason}."
        yield ""
        yield f"Python {platform.python_version()}, {', '.join(map(_with_version, ENVIRONMENT))}."
        yield ""
        yield from self._seen


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


def _with_version(distribution: str) -> str:
    with contextlib.suppress(PackageNotFoundError):
        return f"{distribution} {version(distribution)}"
    return distribution


if __name__ == "__main__":
    main()
