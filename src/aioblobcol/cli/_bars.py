"""Progress bars on stderr, with a terminal only; and names as a terminal may see them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from .._sources import OnProgress

NAME_LENGTH: Final = 30
# Controls change the terminal, line ends split a line, marks of direction disguise what follows.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """Return *text* in one line that does nothing to a terminal: other characters are escaped."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


@contextlib.contextmanager
def transfer_bar(name: str, *, is_quiet: bool) -> Iterator[OnProgress]:
    """Give what moves a bar: how much of how much, how fast, how long still."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        expand=True,
        disable=is_quiet or not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    text = shown(name)
    if len(text) > NAME_LENGTH:
        text = f"…{text[1 - NAME_LENGTH :]}"
    with bar:
        task = bar.add_task(escape(text), total=None)

        def move(done_bytes: int, total_bytes: int | None, /) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield move
