"""How ``aioblobcol status`` looks: a table for people, one JSON object for programs.

Reads well in 80 columns, without colours too.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._status import JournalStatus, StateStatus

MEANING = {
    "staged": "uploads that no row names yet",
    "retired": "let go by their rows, kept for the retention",
    "deleting": "condemned, nobody can bring them back",
}


def show_status(status: JournalStatus, console: Console) -> None:
    """Print the status for people."""
    table = Table("state", "entries", "due", "oldest", "what they are", box=box.ROUNDED)
    for column in table.columns[1:4]:
        column.justify = "right"
    for name, meaning in MEANING.items():
        state: StateStatus = getattr(status, name)
        oldest = "" if state.oldest is None else span(state.oldest)
        table.add_row(name, f"{state.count:,}", f"{state.due:,}", oldest, meaning)
    console.print(table)
    console.print(f"the worker is {span(status.lag)} behind", highlight=False)
    if status.oldest_staged is not None:
        _line(console, f"the oldest upload without a row: {status.oldest_staged}")
    if status.deleting.count:
        _line(
            console,
            f"of the condemned: {status.claimed:,} being deleted now, {status.quarantined:,} "
            f"deleted once more later, {status.backing_off:,} failed and tried again, "
            f"{status.parked_count:,} parked",
        )
    if status.elsewhere:
        _line(console, f"{status.elsewhere:,} under no store of this journal: no worker's")
    for each in status.parked:
        _line(
            console,
            f"parked  {each.uri}  {each.reason}, {each.attempts:,} attempts, "
            f"next {each.next_try:%Y-%m-%d %H:%M} UTC",
        )
    if status.parked_count > len(status.parked):
        _line(console, f"parked  {status.parked_count - len(status.parked):,} more")


def as_json(status: JournalStatus) -> str:
    """Return the status for programs; times in seconds, moments in ISO 8601."""
    fields: dict[str, Any] = {
        **{name: _state(getattr(status, name)) for name in MEANING},
        "lag_seconds": status.lag.total_seconds(),
        "oldest_staged": status.oldest_staged,
        "claimed": status.claimed,
        "quarantined": status.quarantined,
        "backing_off": status.backing_off,
        "elsewhere": status.elsewhere,
        "parked_count": status.parked_count,
        "parked": [
            {
                "uri": each.uri,
                "reason": each.reason,
                "attempts": each.attempts,
                "next_try": each.next_try.isoformat(),
            }
            for each in status.parked
        ],
    }
    return json.dumps(fields)


def span(given: timedelta) -> str:
    """Write a time as people say it, in its two largest units."""
    seconds = max(int(given.total_seconds()), 0)
    days, hours, minutes = seconds // 86_400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def _state(state: StateStatus) -> dict[str, Any]:
    oldest = None if state.oldest is None else state.oldest.total_seconds()
    return {"count": state.count, "due": state.due, "oldest_seconds": oldest}


def _line(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
