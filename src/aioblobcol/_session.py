"""SQLAlchemy's events, reported to the ledger: what one session's transactions do.

A `TransactionWatch` follows one `Session` and the connections that it uses. Listeners are
installed once per engine and per session and look the watch up, so that an unwatched session
pays a dictionary look-up and nothing else. Nothing here awaits inside an event, sends anything
by itself, or decides what is deleted. Invariant: a connection whose transactions cannot be
judged afterwards is refused before the first statement on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Insert, event, inspect
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransactionOrigin
from sqlalchemy.pool import Pool, StaticPool

from ._column import as_uri
from ._connection import (
    Mode,
    begin_and_look,
    held_connections,
    in_open_transaction,
    is_new_target,
    is_still_open,
    mode_of,
    rows_changed,
    sqlstate_of,
    total_changes,
    was_brought_along,
)
from ._frames import Frames
from ._ledger import Facts, Ledger, is_refusal, judge
from ._statements import (
    Evidence,
    Kind,
    Statement,
    assigned_marks,
    assigned_uris,
    copied_columns,
    count_sets,
    empties_a_column,
    evidence_of,
    may_copy,
    named_uris,
    placements,
    read_statement,
    sets_on_conflict,
)
from .errors import CommitOutcomeUnknown, Outcome, UnsafeTransactionError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from sqlalchemy import Column
    from sqlalchemy.engine import ExceptionContext, Transaction
    from sqlalchemy.engine.interfaces import Dialect
    from sqlalchemy.orm import SessionTransaction

K = TypeVar("K")

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
UPSERT_REFUSED = (
    "an upsert (ON CONFLICT, INSERT OR IGNORE, ...) takes no Blob: nobody could tell whether the "
    "row took it, or which object it replaced. Read the row with with_for_update() and assign to "
    "the loaded object, or add a new one in a savepoint"
)
NOT_OWNED_REFUSED = "this session is in another blob_transaction() already: use that one"
JOINED_REFUSED = (
    "blob_transaction() must know who ends its transaction, but this session is bound to a "
    "connection {what}. Bind the session to the engine, or end that transaction first "
    "(session.commit())"
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
    strangers: Collection[str]


def ignore_undone(_uris: Collection[str]) -> None:
    """Nobody wants to know which objects a savepoint has undone."""


class TransactionWatch:
    """What one session does, until `stop`. Make it with `watch` or, with books, `follow`.

    Attributes:
        books: of a managed session; then what cannot be judged is noted in ``refusal`` in place
            of being refused, for as long as nothing is at stake.
        refusal: why nothing may be put at stake.
        copying: statements that may have copied a URI from one cell to another by themselves.
        on_undone: called with the new objects whose rows were undone with a savepoint.
        on_free: of a watch that was carried over: called when its connection is done with.
        facts: of the root transaction under way.
        was_given_up: the database has rolled it back by itself.
        last_outcome: of the last root transaction that used a connection.
        is_open: a root transaction uses a connection.
        sent: how many statements were sent in it.
        cells: which loaded objects hold a URI.
        targets: the column that a statement without proof may have put a new URI into.
    """

    def __init__(self, session: Session, ledger: Ledger, books: Frames | None = None) -> None:
        self.ledger = ledger
        self.books = books
        self.refusal: str | None = None
        self.copying: dict[str, Statement] = {}
        self.on_undone: Callable[[Collection[str]], None] = ignore_undone
        self.on_free: Callable[[], None] | None = None
        self.facts = Facts()
        self.was_given_up = False
        self.last_outcome: Outcome | None = None
        self.is_open = False
        self.connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.cells: dict[str, set[Cell]] = {}
        self.targets: dict[str, Column[Any]] = {}
        self._session = weakref.ref(session)
        self._modes: weakref.WeakKeyDictionary[Connection, Mode] = weakref.WeakKeyDictionary()
        # weakly: a transaction holds its connection, which would then never be let go
        self._transactions: weakref.WeakKeyDictionary[Connection, weakref.ref[Transaction]] = (
            weakref.WeakKeyDictionary()
        )
        self._pending: dict[int, _Pending] = {}
        self._failed: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._begun_by_driver: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._is_refused = False
        self.sent = 0
        self._copies_are_seen = False

    @property
    def is_doubtful(self) -> bool:
        """A statement failed, or was not answered, and none has succeeded since."""
        return bool(self._failed or self._pending)

    def claimed_beside(self) -> set[str]:
        """Return the new URIs of the explicit strength in the session's transaction."""
        session = self._session()
        return set() if session is None else uris_claimed(session)

    def forget_failures(self) -> None:
        """Every connection has just answered: no transaction is in the failed state."""
        self._failed.clear()
        self._pending.clear()

    def stop(self) -> None:
        """Forget the session and its connections."""
        session = self._session()
        if session is not None:
            _remove(_by_session, session, self)
        for connection in self.connections:
            _remove(_by_connection, connection, self)

    @contextlib.contextmanager
    def copies_are_seen(self) -> Iterator[None]:
        """Note no copies meanwhile: whoever sends the statement reads its rows before and after."""
        self._copies_are_seen = True
        try:
            yield
        finally:
            self._copies_are_seen = False

    # --- connections

    def adopt(self, connection: Connection, transaction: SessionTransaction) -> None:
        """Follow a connection that the session uses, or refuse it."""
        mode = self._modes[connection] = mode_of(connection)
        begun = connection.get_transaction()
        if begun is not None:
            self._transactions[connection] = weakref.ref(begun)
        self.is_open = True
        self.connections.add(connection)
        self.facts.connections = len(self.connections)
        self.facts.is_sqlite |= connection.dialect.name == "sqlite"
        _add(_by_connection, connection, self)
        _listen_to_engine(connection.engine)
        if mode is Mode.AUTOCOMMIT:
            self._refuse(AUTOCOMMIT_REFUSED)
        if self.books is not None:
            return  # whoever opened the connection: its own end settles, see `carry_over`
        session = self._session()
        is_foreign = was_brought_along(connection, transaction) and (
            session is None or session.bind is not connection  # that one was looked at before
        )
        if is_foreign or connection.in_nested_transaction():
            self._is_refused = True
            raise UnsafeTransactionError(JOINED_REFUSED.format(what="that somebody else opened"))

    def _refuse(self, why: str) -> None:
        self.refusal = why
        if self.books is None or not self.books.is_empty:
            raise UnsafeTransactionError(why)

    def check_savepoint(self, connection: Connection) -> None:
        """Refuse a savepoint that might not be undone with its transaction."""
        if self._modes.get(connection) is Mode.LEGACY_SQLITE:
            raise UnsafeTransactionError(LEGACY_REFUSED.format(what="a savepoint"))

    def check_control(self, connection: Connection) -> None:
        """Note a transaction of the connection's own that is not the one the session began."""
        if self.has_left(connection):
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
        watched = self.ledger.watched
        strangers: Collection[str] = ()
        if self.books is not None:
            bound = self.books.take_bound()
            if statement.may_skip_conflicts or statement.replaces_rows:
                self._check_upsert(self.books, bound)
            strangers = self.books.strangers(
                assigned_marks(statement, parameters, text, executemany=executemany)
            )
        named = named_uris(parameters, text, watched) if watched else set()
        if statement.kind.changes_rows and mode is Mode.LEGACY_SQLITE and not is_in_transaction:
            self._check_legacy(statement)
        self.sent += 1
        self.ledger.mentioned(named)
        self._pending[id(cursor)] = _Pending(
            statement,
            text,
            frozenset(named),
            frozenset(assigned_uris(statement, parameters, text, named, executemany=executemany)),
            count_sets(parameters, executemany=executemany),
            total_changes(connection) if named else None,
            is_in_transaction,
            strangers,
        )

    def _check_upsert(self, books: Frames, carried: Collection[str]) -> None:
        if carried:
            books.withdraw(carried)
            raise UnsafeTransactionError(UPSERT_REFUSED)

    def _check_legacy(self, statement: Statement) -> None:
        # Source: sqlite3 documentation, isolation_level: BEGIN precedes these four only.
        if statement.first_word not in {"INSERT", "UPDATE", "DELETE", "REPLACE"}:
            raise UnsafeTransactionError(
                LEGACY_REFUSED.format(what=f"a change that begins with {statement.first_word}")
            )

    def answered(self, connection: Connection, cursor: Any, context: Any) -> Collection[str] | None:
        """The statement was carried out without an error.

        Returns the marks of what it has put into columns that is not of the session's own blobs;
        None of a session without books.
        """
        pending = self._pending.pop(id(cursor), None)
        if pending is None:
            return None  # reported twice: an engine made by execution_options() shares listeners
        self._failed.discard(connection)
        kind = pending.statement.kind
        # each connection of a session with several binds counts its savepoints by itself
        self._note_savepoint(kind, f"{id(connection)}:{pending.statement.name}")
        if kind.changes_rows:
            if in_open_transaction(connection) is False:
                self.facts.autocommit = True  # whatever the reason: it is durable already
            elif self._modes.get(connection) is Mode.LEGACY_SQLITE:
                self._begun_by_driver.add(connection)
            self._note_copies(pending.statement)
            if self.books is not None and pending.strangers:
                self.books.note(pending.strangers)
            if pending.named:
                self._note_write(connection, cursor, context, pending)
        return None if self.books is None else pending.strangers

    def _note_savepoint(self, kind: Kind, name: str) -> None:
        books = self.books
        if kind is Kind.SAVEPOINT:
            self.ledger.savepoint(name)
            if books is not None:
                books.savepoint(name)
        elif kind is Kind.RELEASE:
            self.ledger.release(name)
            if books is not None:
                books.release(name)
        elif kind is Kind.ROLLBACK_TO:
            self.ledger.rollback_to(name)
            if books is not None:
                self.on_undone(books.roll_back_to(name))

    def _note_copies(self, statement: Statement) -> None:
        """SQL may copy an old URI to another cell without ever naming it."""
        is_seen = self._copies_are_seen and statement.is_countable  # none that a CTE makes
        if self.books is not None and not is_seen and may_copy(statement):
            self.copying[statement.code] = statement
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
        elif pending is not None and self.books is not None:
            self.books.note(pending.strangers)  # of a list, the first ones may be there
        if pending is not None and pending.was_in_transaction:
            self._look_whether_given_up(connection)
        if error.execution_context is not None:
            return  # a statement, or fetching its rows
        if self.facts.commit_sent and not self.facts.acknowledged:
            self.facts.commit_failed = True
            original = error.original_exception
            is_open = in_open_transaction(connection)  # after a COMMIT that is refused it is
            self.facts.answered = (
                isinstance(original, Exception)
                and not error.is_disconnect
                and not (self.facts.is_sqlite and is_open is False)
            )
            self.facts.refused = self.facts.answered and is_refusal(sqlstate_of(original))
            if self.books is not None and self.facts.is_sqlite and self.facts.answered:
                self._end_refused_commit(connection)
        elif self.facts.rollback_sent and not error.is_disconnect:
            self.facts.rollback_failed = True

    def _end_refused_commit(self, connection: Connection) -> None:
        """Roll back on SQLite, which keeps the transaction open and SQLAlchemy forgets."""
        try:
            connection.connection.rollback()
        except Exception:  # as good as no answer: the outcome stays unknown
            self.facts.rollback_failed = True
            return
        self.rolled_back()

    def _look_whether_given_up(self, connection: Connection) -> None:
        if in_open_transaction(connection) is False:
            self.was_given_up = True
            self.ledger.database_gave_up()
            if self.books is not None:
                self.on_undone(self.books.roll_back_to(""))

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
            uri = as_uri(state.dict.get(attribute.key))
            if uri is not None and uri in uris:
                cell = Cell(
                    attribute.key, attribute.columns[0], state.mapper.primary_key, state.identity
                )
                self.cells.setdefault(uri, set()).add(cell)

    # --- the ends of transactions

    def sends_commit(self, connection: Connection) -> None:
        """COMMIT is on its way."""
        self.check_control(connection)
        if self.books is not None and self.books.poison is not None:
            raise self.books.poison  # of a session that has left it to the connection's owner
        if self.sent and self._was_ended_behind(connection):
            self.facts.foreign_control = True
        self.facts.doubtful |= self.is_doubtful
        self.facts.commit_sent = True

    def sends_rollback(self, connection: Connection) -> None:
        """ROLLBACK is on its way."""
        self.facts.rollback_sent = True
        if self._was_ended_behind(connection) and not self.facts.commit_sent:
            self.facts.foreign_control = True

    def _was_ended_behind(self, connection: Connection) -> bool:
        """Tell whether somebody else ended the transaction, on the same connection."""
        is_gone = in_open_transaction(connection) is False
        began = self._modes.get(connection) is Mode.EXPLICIT or connection in self._begun_by_driver
        return is_gone and began and not self.was_given_up

    def has_intruder(self) -> None:
        """Somebody else ends a transaction on the driver's connection that we use, too."""
        self.facts.foreign_control = True

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

    def unknown_commit(self) -> CommitOutcomeUnknown | None:
        """Return what a managed session's COMMIT that was not answered raises."""
        facts = self.facts
        if self.books is None or not facts.commit_failed or judge(facts) is not Outcome.UNKNOWN:
            return None
        doubt, other = self.books.settle(Outcome.UNKNOWN), self.ledger.doubt()
        created = (*doubt.undecided_created, *other.undecided_created)
        superseded = (*doubt.undecided_superseded, *other.undecided_superseded)
        return CommitOutcomeUnknown(created, superseded) if created or superseded else None

    def has_left(self, connection: Connection) -> bool:
        """Tell whether the transaction that was followed on a connection is not its own any more.

        The ``begin`` event would tell earlier, but a recipe that sends BEGIN in it gives way
        there, and listeners must not be added meanwhile.
        """
        begun = self._transactions.get(connection)
        now = connection.get_transaction()
        return now is not None if begun is None else now is None or now is not begun()

    def connection_is_free(self) -> None:
        """A connection begins anew, or is back in the pool: what it was left with is over.

        The ``commit`` event comes before COMMIT is sent, and there is none afterwards.
        """
        if self.on_free is None:
            return
        on_free, self.on_free = self.on_free, None
        if self.facts.commit_sent and not self.facts.commit_failed:
            self.acknowledged()
        on_free()

    def rolled_back(self) -> None:
        """ROLLBACK was answered; the connections are still ours."""
        for connection in self.connections:
            is_open = is_still_open(connection)
            if is_open is not None:
                self.facts.still_open = is_open

    def carry_over(self) -> bool:
        """Follow the connections alone, if the session has left their transaction to its owner.

        A session that is bound to somebody's connection ends without ending its transaction.
        """
        if self.facts.commit_sent or self.facts.rollback_sent:
            return False
        left = [
            connection
            for connection in self.connections
            if not connection.closed
            and connection.in_transaction()
            and not self.has_left(connection)
        ]
        if not left:
            return False
        session = self._session()
        if session is not None:
            _remove(_by_session, session, self)
        for connection in left:
            _carried[id(connection.connection.dbapi_connection)] = (
                *_carried.get(id(connection.connection.dbapi_connection), ()),
                self,
            )
            _listen_to_pool(connection.engine)
        return True

    def root_ended(self) -> None:
        """The root transaction is over: judge it, and expect the next one."""
        if not self.is_open:
            return  # it never used a connection, so there is nothing to judge
        self.is_open = False
        goes_on = any(not c.closed and c.in_transaction() for c in self.connections)
        if goes_on and self.sent:
            self.facts.foreign_control = True  # so it was not the session's own
        self.last_outcome = judge(self.facts)
        self.ledger.end_root(
            self.last_outcome,
            savepoints_held=not (self.facts.autocommit or self.facts.foreign_control),
        )
        for connection in self.connections:
            _remove(_by_connection, connection, self)
        self.connections = weakref.WeakSet()
        self._pending.clear()
        self._failed.clear()
        self._begun_by_driver.clear()
        self.facts = Facts()
        self.was_given_up = self._is_refused = False
        self.sent = 0


# --- watching --------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Seen:
    """What the statements of one transaction did while nothing was at stake for a session.

    Attributes:
        transaction: the connection's own.
        copying: statements that may have copied a URI from one cell to another by themselves.
        noted: the `object_marks` of what they have put into columns.
    """

    transaction: weakref.ref[Transaction]
    copying: dict[str, Statement] = dataclasses.field(default_factory=dict)
    noted: set[str] = dataclasses.field(default_factory=set)


def look_on(connection: Connection) -> Seen | None:
    """Note from now on what is put into columns, and copied, in the connection's transaction.

    Sessions that share the connection share what was seen.
    """
    transaction = connection.get_transaction()
    if transaction is None:
        return None
    seen = _seen.get(connection)
    if seen is None or seen.transaction() is not transaction:
        seen = _seen[connection] = Seen(weakref.ref(transaction))
        _listen_to_engine(connection.engine)
    return seen


def owner_of(session: AsyncSession) -> str | None:
    """Say who else will end the session's transaction; None if nobody has claimed to.

    Raises:
        UnsafeTransactionError: in another `blob_transaction`, or bound to a connection in
            somebody's transaction.
    """
    sync = session.sync_session
    transaction = sync.get_transaction()
    if any(watched.books is None for watched in _by_session.get(sync, ())):
        raise UnsafeTransactionError(NOT_OWNED_REFUSED)
    if isinstance(sync.bind, Connection) and sync.bind.in_transaction():
        raise UnsafeTransactionError(JOINED_REFUSED.format(what="that is in a transaction"))
    if sync.in_nested_transaction():
        return "a savepoint (begin_nested)"
    if transaction is not None and transaction.origin is not SessionTransactionOrigin.AUTOBEGIN:
        return "a begin() block"
    return None


def watch(session: AsyncSession, ledger: Ledger) -> TransactionWatch:
    """Follow *session* from now on.

    Raises:
        UnsafeTransactionError: its transactions could not be judged afterwards.
    """
    sync = session.sync_session
    held = held_connections(sync.get_transaction())
    if held is None:
        raise UnsafeTransactionError(SEVERAL_BINDS_REFUSED)
    return _start(TransactionWatch(sync, ledger), sync, held)


def follow(session: Session, ledger: Ledger, books: Frames) -> TransactionWatch:
    """Follow a managed session's root transaction, whoever ends it."""
    held = held_connections(session.get_transaction())
    watched = TransactionWatch(session, ledger, books)
    if held is None:
        watched.refusal = SEVERAL_BINDS_REFUSED
    return _start(watched, session, held or [])


def _start(
    watched: TransactionWatch, session: Session, held: Collection[Connection]
) -> TransactionWatch:
    listen_to_session(session)
    _add(_by_session, session, watched)
    transaction = session.get_transaction()
    try:
        for connection in held:
            assert transaction is not None
            watched.adopt(connection, transaction)
    except BaseException:
        watched.stop()
        raise
    return watched


def uris_claimed(session: Session) -> set[str]:
    """Return the new URIs of the explicit strength that the session's transaction answers for."""
    return {uri for watched in _by_session.get(session, ()) for uri in watched.ledger.created}


def listen_to_session(target: Session | type[Session]) -> None:
    """Install the listeners on one session, or once on a class of sessions."""
    kind = target if isinstance(target, type) else type(target)
    if not _listening.isdisjoint(kind.__mro__):
        return
    if isinstance(target, type):
        _listening.add(target)
    elif not is_new_target(_sessions, target):
        return
    for name, listener in _SESSION_LISTENERS:
        event.listen(target, name, listener, insert=True)


async def check_isolation(session: AsyncSession, watched: TransactionWatch) -> None:
    """Refuse AUTOCOMMIT before anything is uploaded.

    Each engine is asked once, on a connection that is given back. Not asked, and refused at
    their first statement, are the other binds of a session that has several, and a `StaticPool`,
    whose one connection may be in somebody's transaction.

    Raises:
        UnsafeTransactionError: it is in AUTOCOMMIT.
    """
    await session.run_sync(check_level, watched)


def check_level(session: Session, watched: TransactionWatch) -> None:
    """Do what `check_isolation` says, in a greenlet.

    Raises:
        UnsafeTransactionError: it is in AUTOCOMMIT.
    """
    bind = session.bind
    mode: Mode | None = None
    if watched.connections:
        return  # looked at when the session began
    if isinstance(bind, Connection):
        mode = begin_and_look(bind) if not bind.in_transaction() else mode_of(bind)
    elif isinstance(bind, Engine) and not isinstance(bind.pool, StaticPool):
        level = bind.get_execution_options().get("isolation_level")
        known = _modes.setdefault(bind.pool, {})
        if level not in known:
            with bind.connect() as connection:
                known[level] = begin_and_look(connection)
        mode = known[level]
    if mode is Mode.AUTOCOMMIT:
        raise UnsafeTransactionError(AUTOCOMMIT_REFUSED)


# --- listeners: they look the watch up and report --------------------------------------------

Watches = tuple[TransactionWatch, ...]

_by_session: weakref.WeakKeyDictionary[Session, Watches] = weakref.WeakKeyDictionary()
_by_connection: weakref.WeakKeyDictionary[Connection, Watches] = weakref.WeakKeyDictionary()
_seen: weakref.WeakKeyDictionary[Connection, Seen] = weakref.WeakKeyDictionary()
# by the id of the driver's connection, which the pool's events hand out
_carried: dict[int, Watches] = {}
_listening: set[type] = set()
# engines made by execution_options() share the pool, and may have a level of their own
_modes: weakref.WeakKeyDictionary[Pool, dict[Any, Mode]] = weakref.WeakKeyDictionary()
# which have our listeners
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_static_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_dialects: weakref.WeakSet[Dialect] = weakref.WeakSet()


def _add(known: weakref.WeakKeyDictionary[K, Watches], key: K, watched: TransactionWatch) -> None:
    if watched not in known.get(key, ()):
        known[key] = (*known.get(key, ()), watched)


def _remove(
    known: weakref.WeakKeyDictionary[K, Watches], key: K, watched: TransactionWatch
) -> None:
    left = tuple(each for each in known.get(key, ()) if each is not watched)
    if left:
        known[key] = left
    else:
        known.pop(key, None)


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    for watched in _by_session.get(session, ()):
        # also called for each savepoint, on the connection that is known already
        if connection not in watched.connections:
            watched.adopt(connection, transaction)


def _after_commit(session: Session) -> None:
    savepoint = session.get_nested_transaction()
    for watched in _by_session.get(session, ()):
        if savepoint is None:
            watched.acknowledged()
        else:  # also called when a savepoint is released
            watched.ledger.savepoint_released(savepoint, parent=_savepoint_around(savepoint))


def _after_rollback(session: Session) -> None:
    savepoint = session.get_nested_transaction()
    for watched in _by_session.get(session, ()):
        if savepoint is None:
            watched.rolled_back()
        else:
            watched.ledger.savepoint_rolled_back(savepoint)


def _after_flush(session: Session, _context: Any) -> None:
    for watched in _by_session.get(session, ()):
        created = watched.ledger.created
        for instance in session.dirty if created else ():
            watched.note_cells(instance, created)  # they may be forgotten once they are flushed


def _persistent_to_deleted(session: Session, instance: object) -> None:
    for watched in _by_session.get(session, ()):
        watched.note_cells(instance, watched.ledger.watched)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        for watched in _by_session.get(session, ()):
            if watched.books is None:  # of a managed session, see `_keeper`
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
    for watched in _by_connection.get(connection, ()):
        if watched.on_free is not None and watched.has_left(connection):
            watched.connection_is_free()
            continue
        watched.sends(connection, cursor, text, parameters, executemany=many)


def _after_cursor_execute(
    connection: Connection, cursor: Any, text: str, parameters: Any, context: Any, many: bool
) -> None:
    strangers: set[str] | None = None
    for watched in _by_connection.get(connection, ()):
        found = watched.answered(connection, cursor, context)
        if found is not None:  # those that are no session's own blobs
            strangers = set(found) if strangers is None else strangers.intersection(found)
    seen = _seen.get(connection) if text[:6] != "SELECT" else None
    if seen is None:
        return
    if strangers is not None:
        seen.noted.update(strangers)
        return
    statement = read_statement(text, dialect=connection.dialect.name)
    if may_copy(statement):
        seen.copying[statement.code] = statement
    seen.noted.update(assigned_marks(statement, parameters, text, executemany=many))


def _handle_error(error: ExceptionContext) -> BaseException | None:
    connection = error.connection
    if connection is None:
        return None
    context, seen = error.execution_context, _seen.get(connection)
    if seen is not None and context is not None and connection.dialect.name == "sqlite":
        # of a list, the first ones may be there
        text = str(error.statement or "")
        statement = read_statement(text, dialect="sqlite")
        many = bool(context.executemany)
        marks = assigned_marks(statement, error.parameters, text, executemany=many)
        if not _by_connection.get(connection):
            seen.noted.update(marks)
    unknown: CommitOutcomeUnknown | None = None
    for watched in _by_connection.get(connection, ()):
        watched.failed(connection, error)
        unknown = watched.unknown_commit() or unknown
    return unknown if isinstance(error.original_exception, Exception) else None


def _commit(connection: Connection) -> None:
    _warn_others(connection)
    for watched in _by_connection.get(connection, ()):
        watched.sends_commit(connection)


def _rollback(connection: Connection) -> None:
    _warn_others(connection)
    for watched in _by_connection.get(connection, ()):
        watched.sends_rollback(connection)


def _warn_others(connection: Connection) -> None:
    """Tell whoever else uses the one connection of a `StaticPool`: its transaction ends as well."""
    if not isinstance(connection.engine.pool, StaticPool):
        return
    for other, watches in tuple(_by_connection.items()):
        if other is not connection and other.engine.pool is connection.engine.pool:
            for watched in watches:
                if not watched.has_left(other):
                    watched.has_intruder()


def _reset(dbapi_connection: Any, _record: Any, state: Any) -> None:
    """Do so for a connection that is given back: the pool rolls back what may be another one's."""
    if getattr(state, "transaction_was_reset", False):
        return  # its own ROLLBACK was told of
    for other, watches in tuple(_by_connection.items()):
        if isinstance(other.engine.pool, StaticPool) and not other.closed:
            for watched in watches:
                is_shared = other.connection.dbapi_connection is dbapi_connection
                if is_shared and not watched.has_left(other):
                    watched.has_intruder()


def _set_options(connection: Connection, options: Any) -> None:
    if "isolation_level" in options:  # the driver commits when it is set
        _warn_others(connection)


def _commit_twophase(connection: Connection, _xid: Any, _is_prepared: bool) -> None:
    _commit(connection)


def _prepare_twophase(connection: Connection, _xid: Any) -> None:
    for watched in _by_connection.get(connection, ()):
        watched.facts.prepared = True


def _savepoint(connection: Connection, _name: str) -> None:
    for watched in _by_connection.get(connection, ()):
        watched.check_savepoint(connection)


def _checkin(dbapi_connection: Any, _record: Any) -> None:
    for watched in _carried.pop(id(dbapi_connection), ()):
        watched.connection_is_free()


def _invalidate(dbapi_connection: Any, _record: Any, _error: Any) -> None:
    _checkin(dbapi_connection, _record)


_ENGINE_LISTENERS = (
    ("before_cursor_execute", _before_cursor_execute),
    ("after_cursor_execute", _after_cursor_execute),
    ("commit", _commit),
    ("rollback", _rollback),
    ("commit_twophase", _commit_twophase),
    ("prepare_twophase", _prepare_twophase),
    ("savepoint", _savepoint),
    ("set_connection_execution_options", _set_options),
)


def _listen_to_engine(engine: Engine) -> None:
    if is_new_target(_engines, engine):
        for name, listener in _ENGINE_LISTENERS:
            event.listen(engine, name, listener)
        # this one is the dialect's, which engines made by execution_options() share
        if is_new_target(_dialects, engine.dialect):
            event.listen(engine, "handle_error", _handle_error)
    if isinstance(engine.pool, StaticPool) and is_new_target(_static_pools, engine.pool):
        event.listen(engine.pool, "reset", _reset)


def _listen_to_pool(engine: Engine) -> None:
    if is_new_target(_pools, engine.pool):
        event.listen(engine.pool, "checkin", _checkin)
        event.listen(engine.pool, "invalidate", _invalidate)


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
