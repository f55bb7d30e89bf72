"""The suite's command: which groups to run, how long, and where the report goes."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .driver import Machine, Results, machine, run_group
from .goals import Goal, goals_of
from .plan import GROUPS, REPEATED, Group, smoke
from .plot import draw
from .report import as_json, goal_table, group_table, machine_lines, markdown

ROOT: Final = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return 1 if a contender failed, or made other requests in a smoke test."""
    given = _parser().parse_args(arguments)
    groups = _chosen(given)
    schemes = sorted({group.scheme for group in groups})
    environments = dict(each.split("=", 1) for each in given.environment)
    pins = not given.no_pinning and not given.smoke and _has_two_cores()
    results: Results = {}
    about = machine_lines()
    print("\n".join(about), flush=True)
    try:
        with machine(
            schemes=schemes, environments=environments, pins=pins, is_smoke=given.smoke
        ) as on:
            _run_all(groups, on, results)
    except KeyboardInterrupt:
        print("interrupted; what was measured is reported", file=sys.stderr)
    goals = goals_of(results)
    if given.smoke:
        goals = [goal for goal in goals if goal.is_exact]  # its times say nothing
    if given.only:
        goals = [goal for goal in goals if goal.is_met is not None]
    print("\n" + "\n".join(goal_table(goals)))
    if given.output is not None:
        _write(given.output, groups, results, goals, about)
    if given.plot is not None:
        draw(results, given.plot, machine="; ".join(about))
    has_failed = _complain(results)
    has_missed = given.smoke and any(goal.is_met is False for goal in goals)
    is_whole = len(results) == len(groups)
    return 0 if is_whole and not has_failed and not has_missed else 1


def _write(
    directory: Path,
    groups: Sequence[Group],
    results: Results,
    goals: Sequence[Goal],
    about: Sequence[str],
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(as_json(groups, results, goals, machine=about))
    (directory / "RESULTS.md").write_text(markdown(groups, results, goals, machine=about))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare aioblobcol with its peers.")
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny")
    parser.add_argument("--only", action="append", default=[], help="a group; more than once")
    parser.add_argument("--without-https", action="store_true", help="leave those groups out")
    parser.add_argument(
        "--own", action="store_true", help="only aioblobcol, and what it stands on by hand"
    )
    parser.add_argument("--rounds", type=float, default=1, help="times the usual number")
    parser.add_argument("--no-pinning", action="store_true", help="let the system choose cores")
    parser.add_argument(
        "--environment",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="the interpreter of a peer that needs other versions",
    )
    parser.add_argument("--output", type=Path, help="directory of results.json and RESULTS.md")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    return parser


def _chosen(given: argparse.Namespace) -> list[Group]:
    names = {group.name for group in GROUPS}
    unknown = sorted(set(given.only) - names)
    if unknown:
        sys.exit(f"no such group: {', '.join(unknown)}; there are {', '.join(sorted(names))}")
    groups = [group for group in GROUPS if not given.only or group.name in given.only]
    if given.without_https:
        groups = [group for group in groups if group.scheme != "https"]
    if given.own:
        groups = [_own(group) for group in groups]
    if given.smoke:
        return [smoke(group) for group in groups if group.name not in REPEATED]
    return [
        dataclasses.replace(group, rounds=max(round(group.rounds * given.rounds), 1))
        for group in groups
    ]


def _own(group: Group) -> Group:
    kept = [each for each in group.contenders if each.act.startswith(("own:", "raw_"))]
    return dataclasses.replace(group, contenders=kept)


def _has_two_cores() -> bool:
    return hasattr(os, "sched_setaffinity") and {0, 1} <= os.sched_getaffinity(0)


def _run_all(groups: Sequence[Group], on: Machine, results: Results) -> None:
    for group in groups:
        started = time.perf_counter()
        results[group.name] = run_group(group, on)
        seconds = time.perf_counter() - started
        print(f"\n{group.name}: {group.title} ({seconds:.1f} s)", flush=True)
        print("\n".join(group_table(group, results[group.name])), flush=True)


def _complain(results: Results) -> bool:
    """Print what failed; tell whether anything did."""
    failed = [
        (group, name, result.error)
        for group, contenders in results.items()
        for name, result in contenders.items()
        if result.error is not None
    ]
    for group, name, error in failed:
        print(f"\nFAILED {group}: {name}\n{error}", file=sys.stderr)
    return bool(failed)
