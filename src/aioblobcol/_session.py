"""SQLAlchemy's events, reported to the ledger: what one session's transactions do.

A `TransactionWatch` follows one `Session` and the connections that it uses. Listeners are
installed once per engine and per session and look the watch up, so that an unwatched session
pays a dictionary look-up and nothing else. Nothing here awaits inside an event, sends anything
by itself, or decides what is deleted. Invariant: a connection whose transactions cannot be
judged afterwards is refused before the first statement on it.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import Insert, event, inspect
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransactionOrigin
from sqlalchemy.pool import Pool, StaticPool

from ._connection import (
    Mode,
    begin_and_look,
    held_connections,
    in_open_transaction,
    is_still_open,
    mode_of,
    rows_changed,
    sqlstate_of,
    total_changes,
    was_brought_along,
)
from ._ledger import Facts, Ledger, is_refusal, judge
from ._statements import (
    Evidence,
    Kind,
    Statement,
    assigned_uris,
    copied_columns,
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

    from sqlalchemy import Column
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.engine.interfaces import Dialect
    from sqlalchemy.orm import SessionTransaction

AUTOCOMMIT_REFUSED = (
    "this engine or connection is in AUTOCOMMIT: every statement is durable at once and nothing "
    "can be rolled back, so no upload could be undone safely. Use another isolation level, such as "
    'create_async_engine(..., isolation_level="READ COMMITTED"); on SQLite, none.'
)
LEGACY_REFUSED = (
    "{what} on SQLite in the driver's legacy mode: the driver sends no BEGIN before it, so that it "
    "could survive a rollback. Call aioblobcol.use_explicit_begin(engine) once, after "
    "create_async_engine()."
)
NOT_OWNED_REFUSED = (
    "blob_transaction() commits and settles by itself, but this session is inside {what}. Leave "
    "out session.begin() and write `async with blob_transaction(session, ...):` in its place"
)
JOINED_REFUSED = (
    "blob_transaction() must own its transaction, but this session is bound to a connection "
    "{what}. Bind the session to the engine, or end that transaction first (session.commit())"
)
SEVERAL_BINDS_REFUSED = (
    "this session is in a transaction, and with several binds nobody can tell on which "
    "connections: end it (session.commit()) before blob_transaction()"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """Where a loaded object holds a URI: a column, in the row with this primary key."""

    attribute: str
    column: Column[Any]
    primary_key: tuple[Column[Any], ...]
    identity: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Pending:
    """A statement that was sent and not answered yet."""

    statement: Statement
    text: str
    named: frozenset[str]
    assigned: frozenset[str]
    sets: int
    changes_before: int | None
    was_in_transaction: bool


class TransactionWatch:
    """What one session does, until `stop`. Make it with `watch`.

    Attributes:
        facts: of the root transaction under way.
        was_given_up: the database has rolled it back by itself.
        last_outcome: of the last root transaction that used a connection.
        is_open: a root transaction uses a connection.
        cells: which loaded objects hold a URI.
        targets: the column that a statement without proof may have put a new URI into.
    """

    def __init__(self, session: Session, ledger: Ledger) -> None:
        self.ledger = ledger
        self.facts = Facts()
        self.was_given_up = False
        self.last_outcome: Outcome | None = None
        self.is_open = False
        self.connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.cells: dict[str, set[Cell]] = {}
        self.targets: dict[str, Column[Any]] = {}
        self._session = weakref.ref(session)
        self._modes: weakref.WeakKeyDictionary[Connection, Mode] = weakref.WeakKeyDictionary()
        self._transactions: weakref.WeakKeyDictionary[Connection, Any] = weakref.WeakKeyDictionary()
        self._pending: dict[int, _Pending] = {}
        self._failed: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._is_refused = False
        self._has_sent = False

    @property
    def is_doubtful(self) -> bool:
        """A statement failed, or was not answered, and none has succeeded since."""
        return bool(self._failed or self._pending)

    def forget_failures(self) -> None:
        """Every connection has just answered: no transaction is in the failed state."""
        self._failed.clear()
        self._pending.clear()

    def stop(self) -> None:
        """Forget the session and its connections."""
        session = self._session()
        if session is not None:
            _by_session.pop(session, None)
        for connection in self.connections:
            _by_connection.pop(connection, None)

    # --- connections

    def adopt(self, connection: Connection, transaction: SessionTransaction) -> None:
        """Follow a connection that the session uses, or refuse it."""
        mode = self._modes[connection] = mode_of(connection)
        self._transactions[connection] = connection.get_transaction()
        self.is_open = True
        self.connections.add(connection)
        self.facts.connections = len(self.connections)
        self.facts.is_sqlite |= connection.dialect.name == "sqlite"
        _by_connection[connection] = self
        _listen_to_engine(connection.engine)
        if mode is Mode.AUTOCOMMIT:
            raise UnsafeTransactionError(AUTOCOMMIT_REFUSED)
        session = self._session()
        is_foreign = was_brought_along(connection, transaction) and (
            session is None or session.bind is not connection  # that one was looked at before
        )
        if is_foreign or connection.in_nested_transaction():
            self._is_refused = True
            raise UnsafeTransactionError(JOINED_REFUSED.format(what="that somebody else opened"))

    def check_savepoint(self, connection: Connection) -> None:
        """Refuse a savepoint that might not be undone with its transaction."""
        if self._modes.get(connection) is Mode.LEGACY_SQLITE:
            raise UnsafeTransactionError(LEGACY_REFUSED.format(what="a savepoint"))

    def check_control(self, connection: Connection) -> None:
        """Note a transaction of the connection's own that is not the one the session began."""
        if connection.get_transaction() is not self._transactions.get(connection):
            self.facts.foreign_control = True

    # --- statements

    def sends(
        self, connection: Connection, cursor: Any, text: str, parameters: Any, *, executemany: bool
    ) -> None:
        """A statement is on its way."""
        statement = read_statement(text, dialect=connection.dialect.name)
        is_in_transaction = in_open_transaction(connection) is True
        mode = self._modes.get(connection)
        self.check_control(connection)
        if mode is Mode.AUTOCOMMIT:
            self.facts.autocommit = True  # somebody swallowed our refusal
        # PREPARE TRANSACTION and COMMIT PREPARED are statements, and the session's own
        is_control = statement.kind is Kind.CONTROL and not self.facts.prepared
        if is_control or self._is_refused:
            self.facts.foreign_control = True
        self._has_sent = True
        named = named_uris(parameters, text, self.ledger.watched)
        if statement.kind.changes_rows and mode is Mode.LEGACY_SQLITE and not is_in_transaction:
            self._check_legacy(statement)
        self.ledger.mentioned(named)
        self._pending[id(cursor)] = _Pending(
            statement,
            text,
            frozenset(named),
            frozenset(assigned_uris(statement, parameters, text, named)),
            count_sets(parameters, executemany=executemany),
            total_changes(connection) if named else None,
            is_in_transaction,
        )

    def _check_legacy(self, statement: Statement) -> None:
        # Source: sqlite3 documentation, isolation_level: BEGIN precedes these four only.
        if statement.first_word not in {"INSERT", "UPDATE", "DELETE", "REPLACE"}:
            raise UnsafeTransactionError(
                LEGACY_REFUSED.format(what=f"a change that begins with {statement.first_word}")
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
            if in_open_transaction(connection) is False:
                self.facts.autocommit = True  # whatever the reason: it is durable already
            self._note_copies(pending.statement)
            if pending.named:
                self._note_write(connection, cursor, context, pending)

    def _note_copies(self, statement: Statement) -> None:
        """SQL may copy an old URI to another cell without ever naming it."""
        at_stake = self.ledger.columns
        for uri in self.ledger.deletes:
            for cell in self.cells.get(uri, ()):
                at_stake.setdefault(cell.column.name, set()).add(uri)
        for name in copied_columns(statement, at_stake):
            self.ledger.rehomed(at_stake[name])
            self.ledger.placed(at_stake[name])

    def _note_write(
        self, connection: Connection, cursor: Any, context: Any, pending: _Pending
    ) -> None:
        statement = pending.statement
        if _is_plain_insert(context) and not statement.may_skip_conflicts:
            statement = dataclasses.replace(statement, may_skip_rows=False, is_countable=True)
        evidence = evidence_of(
            statement,
            rows=rows_changed(connection, cursor, pending.changes_before),
            sets=pending.sets,
        )
        if statement.kind is Kind.DELETE:
            self.ledger.wrote(pending.named, evidence, removes=True, is_delete=True)
            return
        self.ledger.rehomed(pending.assigned)
        if evidence is not Evidence.NOTHING:
            self.ledger.placed(pending.assigned)
        table = getattr(getattr(context.compiled, "statement", None), "table", None)
        places = _placements(context, table)
        for uri in pending.assigned & self.ledger.created:
            names = places.get(uri, set())
            grade = self._grade(uri, evidence, pending, names)
            if grade is Evidence.UNCLEAR and table is not None and names:
                self.targets[uri] = next(c for c in table.c if {c.key, c.name} & names)
            if grade is not None:
                self.ledger.wrote([uri], grade, removes=False)
        released = pending.named - pending.assigned - self.ledger.created
        if statement.kind is Kind.UPDATE and released:
            replaces = not self.ledger.created.isdisjoint(pending.assigned)
            parameters = context.compiled_parameters if context.compiled is not None else ()
            if replaces or empties_a_column(pending.text, parameters or ()):
                self.ledger.wrote(released, evidence, removes=True)

    def _grade(
        self, uri: str, evidence: Evidence, pending: _Pending, names: set[str]
    ) -> Evidence | None:
        """Say what a statement proves about one new URI that it assigns; None for nothing at all.

        It certainly put the URI into its column if it has a value of that name, or if it was
        guarded with the URI that is replaced. Otherwise it may be another table's, such as an
        outbox.
        """
        old = self.ledger.replaced_by(uri)
        is_guarded = old is not None and old in pending.named - pending.assigned
        if self.ledger.column_of(uri) not in names and not is_guarded:
            is_nothing = evidence in {Evidence.NOTHING, Evidence.UNCLEAR}
            return None if is_nothing else Evidence.LIKELY
        if pending.statement.may_skip_conflicts and not sets_on_conflict(pending.text, names):
            return Evidence.UNCLEAR  # an upsert that leaves this column of an old row alone
        return evidence

    def failed(self, connection: Connection, error: ExceptionContext) -> None:
        """Something on the connection raised."""
        cursor = getattr(error.execution_context, "cursor", None)
        pending = self._pending.pop(id(cursor), None)
        if not self.facts.is_sqlite:  # SQLite undoes the statement alone
            self._failed.add(connection)
        if pending is not None and pending.was_in_transaction:
            self._look_whether_given_up(connection)
        if error.execution_context is not None:
            return  # a statement, or fetching its rows
        if self.facts.commit_sent and not self.facts.acknowledged:
            self.facts.commit_failed = True
            original = error.original_exception
            self.facts.answered = isinstance(original, Exception) and not error.is_disconnect
            self.facts.refused = self.facts.answered and is_refusal(sqlstate_of(original))
        elif self.facts.rollback_sent and not error.is_disconnect:
            self.facts.rollback_failed = True

    def _look_whether_given_up(self, connection: Connection) -> None:
        if in_open_transaction(connection) is False:
            self.was_given_up = True
            self.ledger.database_gave_up()

    # --- loaded objects

    def look_for_cells(self, uris: Collection[str]) -> None:
        """Remember which loaded objects hold *uris*, so that their rows can be read again."""
        session = self._session()
        if session is not None and uris:
            for instance in tuple(session.identity_map.values()):
                self.note_cells(instance, uris)

    def note_cells(self, instance: object, uris: Collection[str]) -> None:
        """Remember which attributes of *instance* hold *uris*."""
        state = inspect(instance)
        if state.identity is None:
            return
        for attribute in state.mapper.column_attrs:
            uri = state.dict.get(attribute.key)
            if isinstance(uri, str) and uri in uris:
                cell = Cell(
                    attribute.key, attribute.columns[0], state.mapper.primary_key, state.identity
                )
                self.cells.setdefault(uri, set()).add(cell)

    # --- the ends of transactions

    def sends_commit(self, connection: Connection) -> None:
        """COMMIT is on its way."""
        self.check_control(connection)
        self.facts.doubtful |= self.is_doubtful
        self.facts.commit_sent = True

    def sends_rollback(self, connection: Connection) -> None:
        """ROLLBACK is on its way."""
        self.facts.rollback_sent = True
        is_gone = in_open_transaction(connection) is False
        began = self._modes.get(connection) is Mode.EXPLICIT
        if is_gone and began and not self.was_given_up and not self.facts.commit_sent:
            self.facts.foreign_control = True  # somebody else ended it on the same connection

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
            is_open = is_still_open(connection)
            if is_open is not None:
                self.facts.still_open = is_open

    def root_ended(self) -> None:
        """The root transaction is over: judge it, and expect the next one."""
        if not self.is_open:
            return  # it never used a connection, so there is nothing to judge
        self.is_open = False
        goes_on = any(not c.closed and c.in_transaction() for c in self.connections)
        if goes_on and self._has_sent:
            self.facts.foreign_control = True  # so it was not the session's own
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
        self.was_given_up = self._is_refused = self._has_sent = False


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
    if what is not None:
        raise UnsafeTransactionError(NOT_OWNED_REFUSED.format(what=what))
    if isinstance(sync.bind, Connection) and sync.bind.in_transaction():
        raise UnsafeTransactionError(JOINED_REFUSED.format(what="that is in a transaction"))


def watch(session: AsyncSession, ledger: Ledger) -> TransactionWatch:
    """Follow *session* from now on.

    Raises:
        UnsafeTransactionError: its transactions could not be judged afterwards.
    """
    check_ownership(session)
    sync = session.sync_session
    held = held_connections(sync.get_transaction())
    if held is None:
        raise UnsafeTransactionError(SEVERAL_BINDS_REFUSED)
    watched = TransactionWatch(sync, ledger)
    for name, listener in _SESSION_LISTENERS:
        if not event.contains(sync, name, listener):
            event.listen(sync, name, listener, insert=True)
    _by_session[sync] = watched
    try:
        for connection in held:
            transaction = sync.get_transaction()
            assert transaction is not None
            watched.adopt(connection, transaction)
    except BaseException:
        watched.stop()
        raise
    return watched


async def check_isolation(session: AsyncSession, watched: TransactionWatch) -> None:
    """Refuse AUTOCOMMIT before anything is uploaded.

    Each engine is asked once, on a connection that is given back. Not asked, and refused at
    their first statement, are the other binds of a session that has several, and a `StaticPool`,
    whose one connection may be in somebody's transaction.

    Raises:
        UnsafeTransactionError: it is in AUTOCOMMIT.
    """
    bind = session.sync_session.bind
    mode: Mode | None = None
    if watched.connections:
        return  # looked at when the session began
    if isinstance(bind, Connection):
        mode = await session.run_sync(lambda _: begin_and_look(bind))
    elif isinstance(bind, Engine) and not isinstance(bind.pool, StaticPool):
        level = bind.get_execution_options().get("isolation_level")
        known = _modes.setdefault(bind.pool, {})
        if level not in known:
            async with AsyncEngine(bind).connect() as connection:
                known[level] = await connection.run_sync(begin_and_look)
        mode = known[level]
    if mode is Mode.AUTOCOMMIT:
        raise UnsafeTransactionError(AUTOCOMMIT_REFUSED)


# --- listeners: they look the watch up and report --------------------------------------------

_by_session: weakref.WeakKeyDictionary[Session, TransactionWatch] = weakref.WeakKeyDictionary()
_by_connection: weakref.WeakKeyDictionary[Connection, TransactionWatch] = (
    weakref.WeakKeyDictionary()
)
# engines made by execution_options() share the pool, and may have a level of their own
_modes: weakref.WeakKeyDictionary[Pool, dict[Any, Mode]] = weakref.WeakKeyDictionary()
_dialects: weakref.WeakSet[Dialect] = weakref.WeakSet()


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    watched = _by_session.get(session)
    # also called for each savepoint, on the connection that is known already
    if watched is not None and connection not in watched.connections:
        watched.adopt(connection, transaction)


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


def _after_flush(session: Session, _context: Any) -> None:
    watched = _by_session.get(session)
    if watched is not None:
        for instance in session.dirty:  # they may be forgotten once they are flushed
            watched.note_cells(instance, watched.ledger.created)


def _persistent_to_deleted(session: Session, instance: object) -> None:
    watched = _by_session.get(session)
    if watched is not None:
        watched.note_cells(instance, watched.ledger.watched)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    watched = _by_session.get(session)
    if watched is not None and transaction.parent is None:
        watched.root_ended()


def _savepoint_around(savepoint: SessionTransaction) -> SessionTransaction | None:
    outer = savepoint.parent
    while outer is not None and not outer.nested:
        outer = outer.parent
    return outer


_SESSION_LISTENERS = (
    ("after_begin", _after_begin),
    ("after_commit", _after_commit),
    ("after_rollback", _after_rollback),
    ("after_flush", _after_flush),
    ("persistent_to_deleted", _persistent_to_deleted),
    ("after_transaction_end", _after_transaction_end),
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
        watched.sends_commit(connection)


def _rollback(connection: Connection) -> None:
    watched = _by_connection.get(connection)
    if watched is not None:
        watched.sends_rollback(connection)


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
    # this one is the dialect's, which engines made by execution_options() share
    if engine.dialect not in _dialects:
        _dialects.add(engine.dialect)
        event.listen(engine, "handle_error", _handle_error)


# --- what SQLAlchemy knows about a statement of its own --------------------------------------


def _placements(context: Any, table: Any) -> dict[str, set[str]]:
    """Return under which names a compiled statement takes each URI."""
    if context.compiled is None:
        return {}
    columns = None if table is None else {key: column.name for key, column in table.c.items()}
    return placements(context.compiled_parameters or (), columns)


def _is_plain_insert(context: Any) -> bool:
    """Tell whether SQLAlchemy compiled INSERT .. VALUES, in however many batches and shapes."""
    statement = getattr(context.compiled, "statement", None)
    return isinstance(statement, Insert) and statement.select is None
