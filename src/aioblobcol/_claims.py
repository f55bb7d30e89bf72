"""Claims: results of the explicit strength that one transaction answers for, and their proof.

Whoever ends the transaction holds them: a `blob_transaction` block that owns it, or the keeper
of a session that somebody else commits. The functions run in a greenlet, on the plain
`Session`, so that they serve an event and a coroutine alike (``await session.run_sync(...)``).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import literal, select
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from ._column import as_uri
from ._ledger import Ledger
from ._rows import ROWS_PER_READ, batched, is_one_of
from .aws_s3 import DeleteS3Result, PutS3BackedColumnResult, PutS3Result
from .errors import (
    BlobNotWrittenError,
    BlobSharedError,
    InvalidInputError,
    TransactionAbortedError,
)

if TYPE_CHECKING:
    from sqlalchemy import Column
    from sqlalchemy.orm import Session

    from ._journal import JournalWriter
    from ._session import Cell, TransactionWatch
    from ._store._base import Store
    from ._transfer import Attempt

ABORTED = (
    "a statement of this transaction failed and its error was swallowed, so the database has "
    "given the transaction up and COMMIT would silently roll back. Put what may fail into "
    "`async with session.begin_nested():`, or let the error through"
)
_UNWRITTEN = (
    "an uploaded object went into no row: either a column was forgotten in the statement, or "
    "the statement matched nothing (another transaction replaced or deleted the row first), or "
    "it was undone with its savepoint."
)
_UNRELEASED = (
    "delete_s3() names objects of which no statement proves that their row is gone: it matched "
    "nothing (another transaction replaced or deleted the row first), or it did not name them. "
    "Delete the loaded object, or add guard(Task, html=..., image=...) to the statement's WHERE."
)


_NOT_ADOPTED = (
    "rows name objects that no trigger of the journal has adopted, so that its worker would delete "
    "them: name the column in Journal(..., uri_columns=[...]), and install the triggers "
    "(Journal.create_triggers, or `aioblobcol ddl`)."
)
UNSTAGED = (
    "a result was uploaded without the journal of this transaction, so that no row could adopt "
    "its objects: put_s3(..., journal=journal), or upload inside of the block (tx.put_s3)"
)


class Claims:
    """Results with one ledger, and what is needed to carry its settlement out.

    Attributes:
        watch: what reports to the ledger; set by whoever holds the claims.
        stores: URI to store, of new and old objects.
        attempts: URI to attempt, of new objects.
        replaced_by: old URI to new URI.
        writer: of the journal, if there is one.
    """

    def __init__(
        self,
        session: Session,
        *,
        allow_unwritten: bool,
        writer: JournalWriter | None = None,
    ) -> None:
        self.ledger = Ledger(keeps_unwritten=allow_unwritten)
        self.watch: TransactionWatch | None = None
        self.results: list[PutS3Result | DeleteS3Result] = []
        self.stores: dict[str, Store] = {}
        self.attempts: dict[str, Attempt] = {}
        self.replaced_by: dict[str, str] = {}
        self.allow_unwritten = allow_unwritten
        self.writer = writer
        self._session = weakref.ref(session)  # whose keeper holds us

    # --- what is claimed

    def take(self, results: Sequence[PutS3Result | DeleteS3Result]) -> None:
        """Own *results* from now on; all of them or, if one is refused, none.

        Raises:
            ResultSpentError: one is spent, or taken.
            InvalidInputError: one was uploaded without being staged, and there is a journal.
        """
        writer = self._writer_of(results)
        taken: list[PutS3Result | DeleteS3Result] = []
        try:
            for result in results:
                result._life.take(self)
                taken.append(result)
        except BaseException:
            for result in taken:
                result._life.owner = None
            raise
        self.results += taken
        self.writer = writer

    def _writer_of(self, results: Sequence[PutS3Result | DeleteS3Result]) -> JournalWriter | None:
        writer = self.writer
        uploads = [each for each in results if isinstance(each, PutS3Result) and each.changed]
        for result in uploads:
            writer = writer or result._writer
        if writer is None:
            return None
        for result in uploads:
            if result._writer is None:
                raise InvalidInputError(UNSTAGED)
            if result._writer.journal is not writer.journal:
                raise InvalidInputError("results of two journals do not go into one transaction")
        return writer

    def give_back(self) -> None:
        """Leave the results to the caller: the transaction was refused."""
        for result in self.results:
            result._life.owner = None

    def enter(self, result: PutS3Result | DeleteS3Result) -> None:
        """Record a result that was made before."""
        if isinstance(result, DeleteS3Result):
            for uri in result.s3_uris:
                self.ledger.delete(uri)
                self.stores[uri] = result._store
            self._watched.look_for_cells(result.s3_uris)
            return
        for each in result._executed():
            self.record(result._store, each)
        for attempt in result._attempts:
            self.attempts[attempt.uri] = attempt

    def record(self, store: Store, result: PutS3BackedColumnResult) -> None:
        """Record one upload, before it starts."""
        self.ledger.create(
            result.new_s3_uri,
            replaces=result.old_s3_uri,
            column=result.column,
            savepoint=self._live_session.get_nested_transaction(),
        )
        self.stores[result.new_s3_uri] = store
        if result.old_s3_uri is not None:
            self.stores.setdefault(result.old_s3_uri, store)
            self.replaced_by[result.old_s3_uri] = result.new_s3_uri

    def spend(self, why: str) -> None:
        """The transaction is over: no result can be used again."""
        for result in self.results:
            result._life.settled = why

    # --- before COMMIT, in a greenlet

    def check(self) -> None:
        """Refuse a COMMIT that would not do what the results say.

        Raises:
            BlobNotWrittenError, BlobSharedError: nothing was rolled back yet.
        """
        _read_back(self._live_session, self._watched)
        self._check_adopted()
        demand = self.ledger.demand()
        if demand.shared:
            raise BlobSharedError(demand.shared)
        if self.allow_unwritten:
            return
        if demand.unwritten:
            raise BlobNotWrittenError(demand.unwritten, _UNWRITTEN)
        if demand.unreleased:
            raise BlobNotWrittenError(demand.unreleased, _UNRELEASED)

    def _check_adopted(self) -> None:
        """Find what the statements have written where the journal does not see it."""
        if self.writer is not None:
            check_adopted(self._live_session, self.writer, self.ledger.written())

    @property
    def _live_session(self) -> Session:
        session = self._session()
        assert session is not None
        return session

    @property
    def _watched(self) -> TransactionWatch:
        assert self.watch is not None
        return self.watch


def check_adopted(session: Session, writer: JournalWriter, written: Sequence[str]) -> None:
    """Find new objects that rows name and the journal lists still as staged.

    Raises:
        BlobNotWrittenError: there are some.
    """
    left = writer.still_staged(session, written) if written else ()
    if left:
        raise BlobNotWrittenError(left, _NOT_ADOPTED)


def probe(_session: Session, watched: TransactionWatch) -> None:
    """Ask once more before COMMIT, if a statement failed after which none succeeded.

    Raises:
        TransactionAbortedError: the database has given the transaction up.
    """
    if watched.was_given_up:
        raise TransactionAbortedError(ABORTED)
    if not watched.is_doubtful:
        return
    try:
        for connection in tuple(watched.connections):
            connection.execute(select(literal(1))).close()
    except (DBAPIError, PendingRollbackError) as exc:
        raise TransactionAbortedError(ABORTED) from exc
    watched.forget_failures()


def _read_back(session: Session, watched: TransactionWatch) -> None:
    """Read by primary key what the statements alone do not prove.

    Whether a new URI is in the row that it was meant for, where the driver does not tell how
    many rows were changed; whether a row still names an object that is to be deleted, where
    no statement named it.
    """
    ledger = watched.ledger
    unclear, unreleased = ledger.unclear(), ledger.demand().unreleased
    watched.look_for_cells({*unclear, *unreleased})
    written = set(ledger.written())
    loaded = [uri for uri in watched.cells if uri in written]  # changed or deleted since?
    cells = {uri: _cells_of(watched, uri) for uri in (*unclear, *unreleased, *loaded)}
    in_cells = _read_cells(session, [cell for some in cells.values() for cell in some])
    elsewhere = [uri for uri in unclear if not cells[uri]]
    found = in_cells | _read_targets(session, watched, elsewhere)
    ledger.rehomed(in_cells)  # what the rows name at the end is never deleted
    for uri in unclear:
        if uri in found:
            ledger.confirmed(uri)
    for uri in (*unreleased, *loaded):
        if not cells[uri] or uri in in_cells:
            continue  # a row that was not read tells nothing
        if ledger.replaced_by(uri) in in_cells:
            ledger.confirmed_unwritten(uri)  # a trigger, perhaps, put the old one back
        else:
            ledger.confirmed_gone(uri)


def _cells_of(watched: TransactionWatch, uri: str) -> list[Cell]:
    """Return where loaded objects hold *uri*; of a new one, in the column that it is for."""
    column = watched.ledger.column_of(uri)  # or an outbox would speak for it
    return [cell for cell in watched.cells.get(uri, ()) if column in {None, cell.attribute}]


def _read_cells(session: Session, cells: Sequence[Cell]) -> set[str]:
    """Return the URIs that these cells hold now."""
    wanted: dict[Column[Any], set[Cell]] = {}
    for cell in cells:
        wanted.setdefault(cell.column, set()).add(cell)
    found: set[str] = set()
    for column, same in wanted.items():
        for some in batched(list(same), ROWS_PER_READ):
            is_wanted = is_one_of(some[0].primary_key, [cell.identity for cell in some])
            found |= _uris(session.scalars(select(column).where(is_wanted)))
    return found


def _read_targets(session: Session, watched: TransactionWatch, uris: Sequence[str]) -> set[str]:
    """Return those of *uris* that are in the column that a bulk statement was for.

    By value, so it reads the whole table unless the column has an index.
    """
    wanted: dict[Column[Any], list[str]] = {}
    for uri in uris:
        if uri in watched.targets:
            wanted.setdefault(watched.targets[uri], []).append(uri)
    found: set[str] = set()
    for column, values in wanted.items():
        for some in batched(values, ROWS_PER_READ):
            found |= _uris(session.scalars(select(column).where(column.in_(some))))
    return found


def _uris(values: Any) -> set[str]:
    return {uri for uri in map(as_uri, values) if uri is not None}
