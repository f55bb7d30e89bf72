"""``aioblobcol worker``: run a worker until a signal stops it, or until nothing is due.

A line for each round that did something: in the log on stderr for people, in JSON on stdout for
programs. Invariant: a signal never interrupts a round, it is the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from .._app import BlobApp
from .._journal import OwnershipState, check_ownership
from .._worker import Worker, WorkReport
from ._opening import opened

logger = logging.getLogger("aioblobcol.worker")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What the command line said."""

    once: bool
    batch_size: int
    poll_every: timedelta
    quarantine: timedelta
    as_json: bool


async def run_worker(app: BlobApp, options: WorkerOptions) -> bool:
    """Work; return whether all went well, which only ``once`` can deny.

    Raises:
        UsageError: the application has no journal.
        SQLAlchemyError, OSError: the database could not be asked; with ``once`` only.
    """
    _log_to_stderr()
    async with opened(app) as journal:
        worker = Worker(
            journal,
            app.engine,
            batch_size=options.batch_size,
            quarantine=options.quarantine,
            poll_every=options.poll_every,
            on_round=_print_json if options.as_json else None,
        )
        with _stopped_by_signals() as stop:
            if not options.once:
                logger.info("working; SIGTERM or Ctrl-C stops it after the round under way")
                await worker.run(stop)
                logger.info("stopped")
                return True
            reports = await worker.drain(stop)
        states = await check_ownership(journal, app.engine)
        is_owned = set(states.values()) == {OwnershipState.AGREED}
        return is_owned and not any(report.failed for report in reports)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[asyncio.Event]:
    """Give an event that SIGTERM and SIGINT set."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    handled = (signal.SIGTERM, signal.SIGINT)
    with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C cancels, as in any program
        for number in handled:
            loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        with contextlib.suppress(NotImplementedError):
            for number in handled:
                loop.remove_signal_handler(number)


def _log_to_stderr() -> None:
    """Show what the library logs, unless the application has set up its own."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    ours = logging.getLogger("aioblobcol")
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)


def _print_json(report: WorkReport) -> None:
    fields: dict[str, Any] = {
        "claimed": report.claimed,
        "deleted": report.deleted,
        "removed": report.removed,
        "failed": dict(report.failed),
        "left_out": {name: state.value for name, state in report.left_out.items()},
        "lag_seconds": report.lag.total_seconds(),
    }
    print(json.dumps(fields), flush=True)  # noqa: T201 - this is what it is for
