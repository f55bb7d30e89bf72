"""What went wrong, in one line on stderr and an exit code; the same for every command.

Exit code 1: something is wrong, or a server could not be used; 2: an option is unusable; 130:
interrupted. Only what nobody has foreseen shows a traceback.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Final

import typer
from sqlalchemy.exc import SQLAlchemyError

from ..errors import AioBlobColError
from ._scenarios import describe
from ._servers import CannotRunError, UsageError

INTERRUPTED: Final = 130
"""Source: POSIX shells, 128 plus the signal's number."""
DRIVERS: Final = frozenset({"asyncpg", "psycopg", "sqlite3"})
"""Their errors come as they are while a connection is made."""


@contextlib.contextmanager
def explaining(
    command: str, *more: type[Exception], interrupted: str = "interrupted"
) -> Iterator[None]:
    """Turn what may go wrong in a command, and *more*, into a line and an exit code."""
    try:
        yield
    except UsageError as exc:
        raise typer.BadParameter(str(exc), param_hint=exc.option) from exc
    except KeyboardInterrupt as exc:
        typer.echo(f"aioblobcol {command}: {interrupted}", err=True)
        raise typer.Exit(INTERRUPTED) from exc
    except Exception as exc:
        if not (isinstance(exc, more) or _is_foreseen(exc)):
            raise
        text = str(exc) if isinstance(exc, CannotRunError) else f"stopped: {describe(exc)}"
        typer.echo(f"aioblobcol {command}: {text}", err=True)
        raise typer.Exit(1) from exc


def _is_foreseen(exc: Exception) -> bool:
    is_ours = isinstance(exc, (CannotRunError, AioBlobColError, SQLAlchemyError, OSError))
    return is_ours or type(exc).__module__.partition(".")[0] in DRIVERS


def print_anything(*, encoding: str | None = None) -> None:
    """Escape what the terminal cannot show, instead of failing; or print in *encoding*."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
