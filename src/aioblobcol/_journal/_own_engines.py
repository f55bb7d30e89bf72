"""Connections of the journal's own: to stage and settle without the application's pool.

A request that holds a connection of the application's pool and waits for a second one there would
be a deadlock under load. Each event loop has engines of its own, made from the same connection
factory; they are disposed of with the application's, and forgotten with their loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine

from .._connection import pool_like, root_engine, use_explicit_begin
from ._group_commit import GroupCommit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

STAGE_SECONDS = 30
SETTLED_AT_ONCE = 2
"""Settlements of one process that ask the database at a time; and one that waits for others."""
CONNECTIONS = 6
"""Of the journal's own, at most: stagings, settlements, what they note later, renewals."""
SETTLE_BUSY_MILLISECONDS = 500
"""How long a settlement waits for SQLite's lock; what it leaves is the worker's."""


class Side:
    """What belongs to one event loop.

    Attributes:
        staging: an engine.
        autocommitting: the same one; each statement is a transaction.
        settling: an engine; on SQLite one that does not wait long.
        group: writes what is staged.
        slots: for settlements; those of unknown outcomes (True) wait for others.
        has_looked: whether the triggers stand.
    """

    def __init__(
        self,
        staging: AsyncEngine,
        settling: AsyncEngine,
        write: Callable[[Sequence[str]], Awaitable[None]],
    ) -> None:
        self.staging = staging
        self.autocommitting = staging.execution_options(isolation_level="AUTOCOMMIT")
        self.settling = settling
        self.group = GroupCommit(write, seconds=STAGE_SECONDS, is_entrys_fault=_is_entrys_fault)
        self.slots = {False: asyncio.Semaphore(SETTLED_AT_ONCE), True: asyncio.Semaphore(1)}
        self.has_looked = False


class OwnEngines:
    """The engines beside one of the application's."""

    def __init__(self, origin: Engine, write: Callable[[Sequence[str]], Awaitable[None]]) -> None:
        """Make none yet.

        Args:
            origin: the application's.
            write: what group commit does.
        """
        self._origin = root_engine(origin)
        self._write = write
        self._is_sqlite = origin.dialect.name == "sqlite"
        self._sides: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Side] = (
            weakref.WeakKeyDictionary()
        )
        event.listen(self._origin, "engine_disposed", self._origin_was_disposed)

    def __len__(self) -> int:
        return len(self._sides)

    @property
    def here(self) -> Side:
        """What belongs to the running event loop."""
        loop = asyncio.get_running_loop()
        side = self._sides.get(loop)
        if side is None:
            for other in [other for other in self._sides if other.is_closed()]:
                del self._sides[other]
            staging = settling = self._make()
            if self._is_sqlite:
                settling = self._make()
                event.listen(settling.sync_engine.pool, "connect", _be_impatient)
            side = self._sides[loop] = Side(staging, settling, self._write)
        return side

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """Begin a transaction that sees what is committed, on a connection of our own."""
        async with begin_read_committed(self.here.settling) as connection:
            yield connection

    def _make(self) -> AsyncEngine:
        pool = pool_like(self._origin.pool, at_least=CONNECTIONS)
        engine = AsyncEngine(Engine(pool, self._origin.dialect, self._origin.url))
        use_explicit_begin(engine)
        return engine

    def _origin_was_disposed(self, _engine: Engine) -> None:
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        sides, self._sides = dict(self._sides), weakref.WeakKeyDictionary()
        for loop, side in sides.items():
            for engine in {side.staging, side.settling}:
                engine.sync_engine.dispose(close=loop is here)


@contextlib.asynccontextmanager
async def begin_read_committed(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Begin a transaction that sees what is committed, whatever the engine's level is."""
    async with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            await connection.execution_options(isolation_level="READ COMMITTED")
        async with connection.begin():
            yield connection


def _be_impatient(dbapi_connection: Any, _record: object) -> None:
    """Do not wait for SQLite's lock for as long as the application does.

    A statement that was cancelled holds it until its connection is collected.
    """
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA busy_timeout")
    (milliseconds,) = cursor.fetchone()
    cursor.execute(f"PRAGMA busy_timeout = {min(milliseconds, SETTLE_BUSY_MILLISECONDS)}")
    cursor.close()


def _is_entrys_fault(error: Exception) -> bool:
    """Tell whether other entries could be written although this failed."""
    is_ours = isinstance(error, StatementError) and not isinstance(error, DBAPIError)
    return is_ours or isinstance(error, (DataError, IntegrityError))
