"""The command line: ``aioblobcol demo`` for newcomers, all other commands for operators.

The only door for people without a program of their own. Typer and rich are optional, so they
are imported when the command runs, and their absence is one line and not a traceback.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

MISSING = 'the command line needs more packages: pip install "aioblobcol[demo]"'


def main() -> None:
    """Run the command line."""
    try:
        from ._commands import app  # noqa: PLC0415 - Typer and rich are optional
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.exit(f"aioblobcol: {MISSING} ({exc.name} is missing)")
    app(prog_name="aioblobcol")
