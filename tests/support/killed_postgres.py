"""Sessions whose PostgreSQL is killed in the middle of their commits, and started again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from typing import Any

from aioblobcol import CommitOutcomeUnknown

from .killed_programs import Told, churn_explicit, churn_managed
from .killing import Comparison, LastWords
from .postgres_server import PostgresServer

SESSIONS = 6
LONGEST_FUSE = 0.004
"""Seconds between a COMMIT and the kill: as long as a few statements take."""


class Fuse:
    """Kills a server a moment after so many commits have been sent."""

    def __init__(self, server: PostgresServer, *, commits: int, seconds: float) -> None:
        self._server = server
        self._commits = commits
        self._seconds = seconds

    def lay(self, engine: Any) -> None:
        """Count the commits of an engine and of its journal."""
        dialect = engine.sync_engine.dialect
        do_commit = type(dialect).do_commit

        def counted(connection: Any) -> None:
            self._commits -= 1
            if self._commits == 0 and self._seconds:
                asyncio.get_running_loop().call_later(self._seconds, self._server.kill)
            elif self._commits == 0:
                self._server.kill()
            do_commit(dialect, connection)

        dialect.do_commit = counted


async def kill_in_commits(
    server: PostgresServer, comparison: Comparison, dice: random.Random
) -> None:
    """Let sessions commit until their server is gone, start it again, and compare."""
    words, place = LastWords(), comparison.place
    seconds = dice.choice([0, dice.uniform(0, LONGEST_FUSE)])
    Fuse(server, commits=dice.randint(1, 60), seconds=seconds).lay(place.engine)

    async def session(number: int) -> None:
        told = Told(words.hear, f"{number}-")
        churn = (churn_managed, churn_explicit)[number % 2]
        with contextlib.suppress(CommitOutcomeUnknown):
            for turn in itertools.count():
                try:
                    await churn(place, told, f"{number}-{turn}")
                except Exception:
                    if not server.was_killed:
                        raise
                    return

    await asyncio.gather(*map(session, range(SESSIONS)))
    await place.engine.dispose()
    await asyncio.to_thread(server.start_again)
    del place.engine.sync_engine.dialect.do_commit
    comparison.figures.runs += 1
    comparison.figures.kills += 1
    comparison.figures.failures += await comparison.compare(words)
