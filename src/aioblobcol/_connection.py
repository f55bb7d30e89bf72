"""What a connection and its driver tell about a transaction, without a round trip.

Knows SQLAlchemy's drivers and nothing of ours. Private attributes are read in this room only,
and their absence is met.
"""

from __future__ import annotations

import enum
import sqlite3
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import SessionTransaction
    from sqlalchemy.pool import Pool


T = TypeVar("T")


class Mode(enum.Enum):
    """How a connection's transactions work."""

    EXPLICIT = "BEGIN is sent, and COMMIT ends it"
    LEGACY_SQLITE = "the sqlite3 driver sends BEGIN by itself, before some statements"
    AUTOCOMMIT = "every statement is durable at once"


def mode_of(connection: Connection) -> Mode:
    """Say how transactions work on a connection that has just begun one."""
    if connection.dialect.name == "sqlite":
        return _sqlite_mode(connection)
    dbapi: Any = connection.connection.dbapi_connection
    try:
        autocommit = connection.dialect.detect_autocommit_setting(dbapi)
    except NotImplementedError:  # this driver does not tell; the isolation level is what is left
        autocommit = connection.get_isolation_level() == "AUTOCOMMIT"
    return Mode.AUTOCOMMIT if autocommit else Mode.EXPLICIT


def begin_and_look(connection: Connection) -> Mode:
    """Say how transactions work on a connection that is free; it is free again afterwards."""
    with connection.begin() as transaction:
        mode = mode_of(connection)
        transaction.rollback()
    return mode


def _sqlite_mode(connection: Connection) -> Mode:
    driver = _driver(connection)
    if driver.in_transaction:
        return Mode.EXPLICIT
    if driver.isolation_level is None or _modern_autocommit(driver) is True:
        return Mode.AUTOCOMMIT
    return Mode.LEGACY_SQLITE


def _modern_autocommit(driver: Any) -> bool | None:
    """Return what Python 3.12 gave to sqlite3 connections; aiosqlite does not pass it on.

    None of a connection that only its own thread may ask, as of a database in memory.
    """
    try:
        autocommit = getattr(getattr(driver, "_conn", driver), "autocommit", None)
    except sqlite3.ProgrammingError:
        return None
    return autocommit if isinstance(autocommit, bool) else None


def use_explicit_begin(engine: AsyncEngine) -> None:
    """Make savepoints work on a SQLite engine: send BEGIN ourselves, not the driver.

    Call it once, after ``create_async_engine``. It does nothing on other databases, and
    respects a recipe of your own: BEGIN is sent only where no transaction is open yet.

    Source: SQLAlchemy documentation, SQLite, "Enabling Non-Legacy SQLite Transactional Modes".
    """
    sync = engine.sync_engine
    if sync.dialect.name == "sqlite" and is_new_target(_explicit, sync):
        event.listen(sync, "connect", _disable_driver_begin)
        event.listen(sync, "begin", _send_begin)


def is_new_target(known: weakref.WeakSet[T], target: T) -> bool:
    """Tell whether *target* still needs its listeners, and count it as having them from now on.

    ``event.contains`` goes by the target's ``id()``, and what another engine or pool has left
    under it: the listeners of a pool outlive it when its engine is disposed of.
    """
    if target in known:
        return False
    known.add(target)
    return True


_explicit: weakref.WeakSet[Engine] = weakref.WeakSet()


def _disable_driver_begin(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.isolation_level = None


def _send_begin(connection: Connection) -> None:
    wants_none = connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
    if not wants_none and not _driver(connection).in_transaction:
        connection.exec_driver_sql("BEGIN")


def root_engine(engine: Engine) -> Engine:
    """Return the engine that ``execution_options()`` was called on: it hears of ``dispose()``."""
    root = getattr(engine, "_proxied", engine)
    return root if isinstance(root, Engine) else engine


def pool_like(pool: Pool, *, at_least: int) -> Pool:
    """Return an empty pool of the same kind and factory, for at least so many connections."""
    made = pool.recreate()
    overflow = getattr(made, "_max_overflow", None)
    if isinstance(overflow, int) and 0 <= overflow < at_least:
        made._max_overflow = at_least  # type: ignore[attr-defined]  # noqa: SLF001 - see the header
    return made


def held_connections(transaction: SessionTransaction | None) -> list[Connection] | None:
    """Return the connections that a session's transaction uses; None if nobody can tell.

    SQLAlchemy has no public way to ask without taking a connection from the pool.
    """
    held = getattr(transaction, "_connections", None)
    if transaction is None or not isinstance(held, dict):
        return [] if transaction is None else None
    return [key for key in held if isinstance(key, Connection)]


def was_brought_along(connection: Connection, transaction: SessionTransaction) -> bool:
    """Tell whether somebody else opened this connection and bound the session to it."""
    held = getattr(transaction, "_connections", None)
    entry = held.get(connection) if isinstance(held, dict) else None
    return isinstance(entry, tuple) and entry[-1] is False  # "autoclose"


def in_open_transaction(connection: Connection) -> bool | None:
    """Return SQLite's own word; None from other databases, or when the connection is gone."""
    if connection.dialect.name != "sqlite" or connection.closed or connection.invalidated:
        return None
    return bool(_driver(connection).in_transaction)


def is_still_open(connection: Connection) -> bool | None:
    """Tell, after a successful ROLLBACK on SQLite, whether the transaction is open all the same."""
    is_open = in_open_transaction(connection)
    if is_open and _modern_autocommit(_driver(connection)) is False:
        return False  # PEP 249 mode begins the next one at once
    return is_open


def total_changes(connection: Connection) -> int | None:
    """Return how many rows a SQLite connection has changed so far; None from other databases."""
    if connection.dialect.name != "sqlite":
        return None
    return int(_driver(connection).total_changes)


def rows_changed(connection: Connection, cursor: Any, changes_before: int | None) -> int:
    """Return how many rows a statement changed; negative if the driver does not tell."""
    rows = int(cursor.rowcount)
    if rows < 0 and changes_before is not None:  # SQLite with RETURNING
        rows = int(_driver(connection).total_changes) - changes_before
    return rows


def sqlstate_of(error: BaseException) -> str | None:
    """Return the five characters of SQLSTATE, if the driver passes them on."""
    for name in ("sqlstate", "pgcode"):
        value = getattr(error, name, None)
        if isinstance(value, str):
            return value
    return None


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection
