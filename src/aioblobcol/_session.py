"""SQLAlchemy's events, reported to the ledger: what one session's transactions do.

A `TransactionWatch` follows one `Session` and the connections that it uses. Listeners are
installed once per engine and per session and look the watch up, so that an unwatched session
pays a dictionary look-up and nothing else. Nothing here awaits inside an event, sends anything
by itself, or decides what is deleted. Invariant: a connection whose transactions cannot be
judged afterwards is refused before the first statement on it.
"""

from __future__ import annotations

import enum
import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import Select, event, inspect, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransactionOrigin
from sqlalchemy.pool import StaticPool

from ._ledger import Facts, Ledger, is_refusal, judge
from ._statements import (
    Evidence,
    Kind,
    Statement,
    count_sets,
    empties_a_column,
    evidence_of,
    named_uris,
    placements,
    read_statement,
    sets_on_conflict,
)
from .errors import Outcome, UnsafeTransactionError

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.orm import SessionTransaction


class Mode(enum.Enum):
    """How a connection's transactions work."""

    EXPLICIT = "BEGIN is sent, and COMMIT ends it"
    LEGACY_SQLITE = "the sqlite3 driver sends BEGIN by itself, but not before SAVEPOINT"
    AUTOCOMMIT = "every statement is durable at once"


AUTOCOMMIT_REFUSED = (
    "this engine or connection is in AUTOCOMMIT: every statement is durable at once and nothing "
    "can be rolled back, so no upload could be undone safely. Use another isolation level, such as "
    'create_async_engine(..., isolation_level="READ COMMITTED"); on SQLite, none.'
)
SAVEPOINT_REFUSED = (
    "a savepoint on SQLite in the driver's legacy mode can become the transaction itself and "
    "survive its rollback. Call aioblobcol.use_explicit_begin(engine) once, after "
    "create_async_engine()."
)
NOT_OWNED_REFUSED = (
    "blob_transaction() commits and settles by itself, but this session is inside {what}. Leave "
    "out session.begin() and write `async with blob_transaction(session, ...):` in its place"
)


class _Pending:
    """A statement that was sent and not answered yet."""

    __slots__ = ("changes_before", "named", "sets", "statement", "text", "was_in_transaction")

    def __init__(
        self,
        statement: Statement,
        text: str,
        named: set[str],
        sets: int,
        changes_before: int | None,
        was_in_transaction: bool,
    ) -> None:
        self.statement, self.text, self.named, self.sets = statement, text, named, sets
        self.changes_before, self.was_in_transaction = changes_before, was_in_transaction


class TransactionWatch:
    """What one session does, until `stop`. Make it with `watch`."""

    def __init__(self, session: Session, ledger: Ledger) -> None:
        self.ledger = ledger
        self.facts = Facts()
        self.was_given_up = False  # the database rolled back by itself
        self.last_outcome: Outcome | None = None
        self.is_open = False  # a root transaction uses a connection
        self.connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        # URI to attribute and identity of the objects that hold it, with a SELECT of their cell
        self.cells: dict[str, dict[tuple[str, Any], Select[Any]]] = {}
        self._session = weakref.ref(session)
        self._modes: weakref.WeakKeyDictionary[Connection, Mode] = weakref.WeakKeyDictionary()
        self._pending: dict[int, _Pending] = {}
        self._failed: weakref.WeakSet[Connection] = weakref.WeakSet()

    @property
    def is_doubtful(self) -> bool:
        """A statement failed, or was not answered, and none has succeeded since."""
        return bool(self._failed or self._pending)

    def stop(self) -> None:
        """Forget the session and its connections."""
        session = self._session()
        if session is not None:
            _by_session.pop(session, None)
        for connection in self.connections:
            _by_connection.pop(connection, None)

    # --- what the session and its connections report

    def adopt(self, connection: Connection) -> None:
        """Follow a connection that the session uses, or refuse it."""
        mode = self._modes[connection] = mode_of(connection)
        self.is_open = True
        self.connections.add(connection)
        self.facts.connections = len(self.connections)
        self.facts.is_sqlite |= connection.dialect.name == "sqlite"
        _by_connection[connection] = self
        _listen_to_engine(connection.engine)
        if mode is Mode.AUTOCOMMIT:
            raise UnsafeTransactionError(AUTOCOMMIT_REFUSED)
        if connection.in_nested_transaction():
            self.facts.foreign_control = True
            raise UnsafeTransactionError(NOT_OWNED_REFUSED.format(what="another savepoint"))

    def look_for_cells(self, uris: Collection[str]) -> None:
        """Remember which loaded objects hold *uris*, so that their rows can be read again."""
        session = self._session()
        if session is not None and uris:
            for instance in tuple(session.identity_map.values()):
                self.note_cells(instance, uris)

    def note_cells(self, instance: object, uris: Collection[str]) -> None:
        """Remember which attributes of *instance* hold *uris*."""
        state = inspect(instance)
        for attribute in state.mapper.column_attrs:
            uri = state.dict.get(attribute.key)
            if isinstance(uri, str) and uri in uris and state.identity is not None:
                keys = zip(state.mapper.primary_key, state.identity, strict=True)
                row = select(attribute.columns[0]).where(*(key == value for key, value in keys))
                self.cells.setdefault(uri, {})[attribute.key, state.key] = row

    def check_savepoint(self, connection: Connection) -> None:
        """Refuse a savepoint that might not be undone with its transaction."""
        if self._modes.get(connection) is Mode.LEGACY_SQLITE:
            raise UnsafeTransactionError(SAVEPOINT_REFUSED)

    def sends(
        self, connection: Connection, cursor: Any, text: str, parameters: Any, *, executemany: bool
    ) -> None:
        """A statement is on its way."""
        statement = read_statement(text, dialect=connection.dialect.name)
        named: set[str] = set()
        changes_before: int | None = None
        if self._modes.get(connection) is Mode.AUTOCOMMIT:
            self.facts.autocommit = True  # somebody swallowed our refusal
        if statement.kind is Kind.CONTROL:
            self.facts.foreign_control = True
        elif statement.kind.changes_rows:
            named = named_uris(parameters, text, self.ledger.watched)
            changes_before = _total_changes(connection)
        self._pending[id(cursor)] = _Pending(
            statement,
            text,
            named,
            count_sets(parameters, executemany=executemany),
            changes_before,
            _in_transaction(connection) is True,
        )

    def answered(self, connection: Connection, cursor: Any, context: Any) -> None:
        """The statement was carried out without an error."""
        pending = self._pending.pop(id(cursor), None)
        if pending is None:
            return  # reported twice: an engine made by execution_options() shares listeners
        self._failed.discard(connection)
        kind = pending.statement.kind
        # each connection of a session with several binds counts its savepoints by itself
        name = f"{id(connection)}:{pending.statement.name}"
        if kind is Kind.SAVEPOINT:
            self.ledger.savepoint(name)
        elif kind is Kind.RELEASE:
            self.ledger.release(name)
        elif kind is Kind.ROLLBACK_TO:
            self.ledger.rollback_to(name)
        elif kind.changes_rows:
            self._note_write(connection, cursor, context, pending)

    def _note_write(
        self, connection: Connection, cursor: Any, context: Any, pending: _Pending
    ) -> None:
        if self.was_given_up and pending.named:
            self.facts.foreign_control = True  # it ran outside of the transaction that is gone
        if not pending.named:
            return
        evidence = evidence_of(
            pending.statement,
            rows=_rows_changed(connection, cursor, pending),
            sets=pending.sets,
        )
        kind = pending.statement.kind
        if kind is Kind.DELETE:
            self.ledger.wrote(pending.named, evidence, removes=True, is_delete=True)
            return
        places, is_table = _placements(context)
        if is_table:
            self.ledger.rehomed(places)
        for uri in pending.named & self.ledger.created:
            grade = self._grade(uri, evidence, pending, places)
            if grade is not None:
                self.ledger.wrote([uri], grade, removes=False)
        named_old = pending.named - self.ledger.created
        if kind is Kind.UPDATE and named_old:
            self._note_removal(named_old, evidence, pending, context, places)

    def _grade(
        self, uri: str, evidence: Evidence, pending: _Pending, places: dict[str, set[str]]
    ) -> Evidence | None:
        """Say what a statement proves about one new URI that it names; None for nothing at all.

        It certainly put the URI into its column if it has a value of that name, or if it was
        guarded with the URI that is replaced. Otherwise it may be another table's, such as an
        outbox, or a condition.
        """
        names = places.get(uri, set())
        is_for_its_column = (
            self.ledger.column_of(uri) in names or self.ledger.replaced_by(uri) in pending.named
        )
        if not is_for_its_column:
            is_nothing = evidence in {Evidence.NOTHING, Evidence.UNCLEAR}
            return None if is_nothing else Evidence.LIKELY
        if pending.statement.may_skip_rows and not sets_on_conflict(pending.text, names):
            return Evidence.UNCLEAR  # an upsert that leaves this column of an old row alone
        return evidence

    def _note_removal(
        self,
        named_old: set[str],
        evidence: Evidence,
        pending: _Pending,
        context: Any,
        places: dict[str, set[str]],
    ) -> None:
        """An UPDATE that names old URIs in its condition, and empties or replaces a column."""
        parameters = context.compiled_parameters if context.compiled is not None else ()
        replaces = not self.ledger.created.isdisjoint(pending.named)
        if replaces or empties_a_column(pending.text, parameters or ()):
            self.ledger.wrote(named_old - places.keys(), evidence, removes=True)

    def failed(self, connection: Connection, error: ExceptionContext) -> None:
        """Something on the connection raised."""
        cursor = getattr(error.execution_context, "cursor", None)
        pending = self._pending.pop(id(cursor), None)
        self._failed.add(connection)
        if pending is not None and pending.was_in_transaction and not _in_transaction(connection):
            self.was_given_up = True
            self.ledger.database_gave_up()
        if error.execution_context is not None:
            return  # a statement, or fetching its rows
        if self.facts.commit_sent and not self.facts.acknowledged:
            self.facts.commit_failed = True
            original = error.original_exception
            self.facts.answered = isinstance(original, Exception) and not error.is_disconnect
            self.facts.refused = self.facts.answered and is_refusal(_sqlstate(original))
        elif self.facts.rollback_sent:
            self.facts.rollback_failed = True

    def acknowledged(self) -> None:
        """COMMIT was answered, on every connection."""
        if self.facts.commit_sent:
            self.facts.acknowledged = True
            self.facts.doubtful |= self.was_given_up

    def look_for_acknowledgement(self) -> None:
        """Find a COMMIT that was answered although a listener of the user's raised before ours.

        SQLAlchemy forgets a connection's transaction when COMMIT was answered without an error,
        and keeps it otherwise.
        """
        if not self.facts.commit_sent or self.facts.acknowledged or self.facts.commit_failed:
            return
        if self.connections and all(
            not c.closed and not c.invalidated and c.get_transaction() is None
            for c in self.connections
        ):
            self.acknowledged()

    def rolled_back(self) -> None:
        """ROLLBACK was answered; the connections are still ours."""
        for connection in self.connections:
            is_open = _in_transaction(connection)
            if is_open is not None:
                self.facts.still_open = is_open

    def root_ended(self) -> None:
        """The root transaction is over: judge it, and expect the next one."""
        if not self.is_open:
            return  # it never used a connection, so there is nothing to judge
        self.is_open = False
        self.last_outcome = judge(self.facts)
        self.ledger.end_root(
            self.last_outcome,
            savepoints_held=not (self.facts.autocommit or self.facts.foreign_control),
        )
        for connection in self.connections:
            _by_connection.pop(connection, None)
        self.connections = weakref.WeakSet()
        self._pending.clear()
        self._failed.clear()
        self.facts = Facts()
        self.was_given_up = False


# --- watching --------------------------------------------------------------------------------


def check_ownership(session: AsyncSession) -> None:
    """Refuse a session whose transaction somebody else will end.

    Raises:
        UnsafeTransactionError: inside ``begin()``, a savepoint, another connection's
            transaction, or another `blob_transaction`.
    """
    sync = session.sync_session
    transaction = sync.get_transaction()
    what: str | None = None
    if sync in _by_session:
        what = "another blob_transaction()"
    elif sync.in_nested_transaction():
        what = "a savepoint (begin_nested)"
    elif transaction is not None and transaction.origin is not SessionTransactionOrigin.AUTOBEGIN:
        what = "a begin() block"
    elif isinstance(sync.bind, Connection) and transaction is None and sync.bind.in_transaction():
        what = "a transaction of the connection that it is bound to"
    if what is not None:
        raise UnsafeTransactionError(NOT_OWNED_REFUSED.format(what=what))


async def watch(session: AsyncSession, ledger: Ledger) -> TransactionWatch:
    """Follow *session* from now on.

    Raises:
        UnsafeTransactionError: its transactions could not be judged afterwards.
    """
    check_ownership(session)
    sync = session.sync_session
    watched = TransactionWatch(sync, ledger)
    for name, listener in _SESSION_LISTENERS:
        if not event.contains(sync, name, listener):
            event.listen(sync, name, listener, insert=True)
    _by_session[sync] = watched
    try:
        if session.in_transaction() and sync.bind is not None:
            # it has read something already, so this returns the connection that it holds
            watched.adopt((await session.connection()).sync_connection)  # type: ignore[arg-type]  # is set while open
    except BaseException:
        watched.stop()
        raise
    return watched


async def check_isolation(session: AsyncSession, watched: TransactionWatch) -> None:
    """Refuse an AUTOCOMMIT engine; ask each engine once, on a connection that is given back.

    Raises:
        UnsafeTransactionError: it is in AUTOCOMMIT.
    """
    engine = session.sync_session.bind
    if watched.connections or not isinstance(engine, Engine):
        return  # what the session holds was looked at when it began, other binds will be
    if isinstance(engine.pool, StaticPool):
        return  # one connection for everybody: looking at it would end somebody's transaction
    if engine not in _modes:
        async with AsyncEngine(engine).connect() as connection:
            _modes[engine] = await connection.run_sync(_begin_and_look)
    if _modes[engine] is Mode.AUTOCOMMIT:
        raise UnsafeTransactionError(AUTOCOMMIT_REFUSED)


def _begin_and_look(connection: Connection) -> Mode:
    with connection.begin() as transaction:
        mode = mode_of(connection)
        transaction.rollback()
    return mode


def mode_of(connection: Connection) -> Mode:
    """Say how transactions work on a connection that has just begun one."""
    if connection.dialect.name == "sqlite":
        return _sqlite_mode(connection)
    try:
        autocommit = connection.dialect.detect_autocommit_setting(_dbapi(connection))
    except NotImplementedError:  # this driver does not tell; the isolation level is what is left
        autocommit = connection.get_isolation_level() == "AUTOCOMMIT"
    return Mode.AUTOCOMMIT if autocommit else Mode.EXPLICIT


def _sqlite_mode(connection: Connection) -> Mode:
    driver = _driver(connection)
    if driver.in_transaction:
        return Mode.EXPLICIT
    # aiosqlite does not pass on the attribute that Python 3.12 gave to sqlite3 connections
    autocommit = getattr(getattr(driver, "_conn", driver), "autocommit", None)
    if driver.isolation_level is None or autocommit is True:
        return Mode.AUTOCOMMIT
    return Mode.LEGACY_SQLITE


def use_explicit_begin(engine: AsyncEngine) -> None:
    """Make savepoints work on a SQLite engine: send BEGIN ourselves, not the driver.

    Call it once, after ``create_async_engine``. It does nothing on other databases, and
    respects a recipe of your own: BEGIN is sent only where no transaction is open yet.

    Source: SQLAlchemy documentation, SQLite, "Enabling Non-Legacy SQLite Transactional Modes".
    """
    sync = engine.sync_engine
    if sync.dialect.name == "sqlite" and not event.contains(sync, "begin", _send_begin):
        event.listen(sync, "connect", _disable_driver_begin)
        event.listen(sync, "begin", _send_begin)


def _disable_driver_begin(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.isolation_level = None


def _send_begin(connection: Connection) -> None:
    wants_none = connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
    if not wants_none and not _driver(connection).in_transaction:
        connection.exec_driver_sql("BEGIN")


# --- listeners: they look the watch up and report --------------------------------------------

_by_session: weakref.WeakKeyDictionary[Session, TransactionWatch] = weakref.WeakKeyDictionary()
_by_connection: weakref.WeakKeyDictionary[Connection, TransactionWatch] = (
    weakref.WeakKeyDictionary()
)
_modes: weakref.WeakKeyDictionary[Engine, Mode] = weakref.WeakKeyDictionary()


def _after_begin(session: Session, _transaction: Any, connection: Connection) -> None:
    watched = _by_session.get(session)
    # also called for each savepoint, on the connection that is known already
    if watched is not None and connection not in watched.connections:
        watched.adopt(connection)


def _after_commit(session: Session) -> None:
    watched = _by_session.get(session)
    if watched is None:
        return
    savepoint = session.get_nested_transaction()
    if savepoint is None:
        watched.acknowledged()
    else:  # also called when a savepoint is released
        watched.ledger.savepoint_released(savepoint, parent=_savepoint_around(savepoint))


def _after_rollback(session: Session) -> None:
    watched = _by_session.get(session)
    if watched is None:
        return
    savepoint = session.get_nested_transaction()
    if savepoint is None:
        watched.rolled_back()
    else:
        watched.ledger.savepoint_rolled_back(savepoint)


def _persistent_to_deleted(session: Session, instance: object) -> None:
    watched = _by_session.get(session)
    if watched is not None:
        watched.note_cells(instance, watched.ledger.watched)


def _savepoint_around(savepoint: SessionTransaction) -> SessionTransaction | None:
    outer = savepoint.parent
    while outer is not None and not outer.nested:
        outer = outer.parent
    return outer


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    watched = _by_session.get(session)
    if watched is not None and transaction.parent is None:
        watched.root_ended()


_SESSION_LISTENERS = (
    ("after_begin", _after_begin),
    ("after_commit", _after_commit),
    ("after_rollback", _after_rollback),
    ("after_transaction_end", _after_transaction_end),
    ("persistent_to_deleted", _persistent_to_deleted),
)


def _before_cursor_execute(
    connection: Connection, cursor: Any, text: str, parameters: Any, _context: Any, many: bool
) -> None:
    watched = _by_connection.get(connection)
    if watched is not None:
        watched.sends(connection, cursor, text, parameters, executemany=many)


def _after_cursor_execute(
    connection: Connection, cursor: Any, _text: str, _parameters: Any, context: Any, _many: bool
) -> None:
    watched = _by_connection.get(connection)
    if watched is not None:
        watched.answered(connection, cursor, context)


def _handle_error(error: ExceptionContext) -> None:
    connection = error.connection
    watched = _by_connection.get(connection) if connection is not None else None
    if watched is not None and connection is not None:
        watched.failed(connection, error)


def _commit(connection: Connection) -> None:
    watched = _by_connection.get(connection)
    if watched is not None:
        watched.facts.doubtful |= watched.is_doubtful
        watched.facts.commit_sent = True


def _rollback(connection: Connection) -> None:
    watched = _by_connection.get(connection)
    if watched is not None:
        watched.facts.rollback_sent = True


def _commit_twophase(connection: Connection, _xid: Any, _is_prepared: bool) -> None:
    _commit(connection)


def _prepare_twophase(connection: Connection, _xid: Any) -> None:
    watched = _by_connection.get(connection)
    if watched is not None:
        watched.facts.prepared = True


def _savepoint(connection: Connection, _name: str) -> None:
    watched = _by_connection.get(connection)
    if watched is not None:
        watched.check_savepoint(connection)


_ENGINE_LISTENERS = (
    ("before_cursor_execute", _before_cursor_execute),
    ("after_cursor_execute", _after_cursor_execute),
    ("handle_error", _handle_error),
    ("commit", _commit),
    ("rollback", _rollback),
    ("commit_twophase", _commit_twophase),
    ("prepare_twophase", _prepare_twophase),
    ("savepoint", _savepoint),
)


def _listen_to_engine(engine: Engine) -> None:
    for name, listener in _ENGINE_LISTENERS:
        if not event.contains(engine, name, listener):
            event.listen(engine, name, listener)


# --- what drivers tell without a round trip --------------------------------------------------


def _dbapi(connection: Connection) -> Any:
    return connection.connection.dbapi_connection


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


def _in_transaction(connection: Connection) -> bool | None:
    """Return SQLite's own word; None from other databases, or when the connection is gone."""
    if connection.dialect.name != "sqlite" or connection.closed or connection.invalidated:
        return None
    return bool(_driver(connection).in_transaction)


def _total_changes(connection: Connection) -> int | None:
    if connection.dialect.name != "sqlite":
        return None
    return int(_driver(connection).total_changes)


def _rows_changed(connection: Connection, cursor: Any, pending: _Pending) -> int:
    rows = int(cursor.rowcount)
    if rows < 0 and pending.changes_before is not None:  # SQLite with RETURNING
        rows = int(_driver(connection).total_changes) - pending.changes_before
    return rows


def _placements(context: Any) -> tuple[dict[str, set[str]], bool]:
    """Return under which names the URIs are put, and whether these are a table's columns."""
    compiled = context.compiled
    if compiled is None:
        return {}, False
    table = getattr(getattr(compiled, "statement", None), "table", None)
    columns = None if table is None else {key: column.name for key, column in table.c.items()}
    return placements(context.compiled_parameters or (), columns), table is not None


def _sqlstate(error: BaseException) -> str | None:
    for name in ("sqlstate", "pgcode"):
        value = getattr(error, name, None)
        if isinstance(value, str):
            return value
    return None
