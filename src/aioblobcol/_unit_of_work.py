"""``blob_transaction``: one block that uploads, writes, commits and cleans up.

`_session` says what happened and `_ledger` what it is worth; here it is carried out.
Invariants (the two rules of cancellation, second half): COMMIT, once sent, is run to its end,
then the clean-up that its outcome asks for, then the cancellation goes on. The clean-up never
raises, and never replaces the error that the user should see.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import literal, select, tuple_
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

from ._ledger import Ledger, Settlement
from ._session import Cell, TransactionWatch, check_isolation, watch
from ._store._base import DeleteReport, Store
from ._tasks import run_to_end
from ._transfer import Attempt, compensate, delete_all, expect_late
from .aws_s3 import (
    DeleteS3Result,
    PutS3ApiCall,
    PutS3BackedColumnResult,
    PutS3Result,
    delete_s3,
    put_row,
    why_kept,
)
from .errors import (
    BlobNotWrittenError,
    BlobSharedError,
    BlobUploadError,
    CommitOutcomeUnknown,
    InvalidInputError,
    Outcome,
    ResultSpentError,
    TransactionAbortedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime
    from types import TracebackType
    from typing import Self

    from sqlalchemy import Column, Select
    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import Session

    from ._uri import PrimaryKey

T = TypeVar("T")

logger = logging.getLogger("aioblobcol.transaction")

_ROWS_PER_READ = 500
_ABORTED = (
    "a statement of this transaction failed and its error was swallowed, so the database has "
    "given the transaction up and COMMIT would silently roll back. Put what may fail into "
    "`async with session.begin_nested():`, or let the error through"
)
_UNWRITTEN = (
    "an uploaded object went into no row: either a column was forgotten in the statement, or "
    "the statement matched nothing (another transaction replaced or deleted the row first), or "
    "it was undone with its savepoint."
)
_NOT_PROVED = "no statement proved that it is in a row, or that its row is gone"
_UNRELEASED = (
    "delete_s3() names objects of which no statement proves that their row is gone: it matched "
    "nothing (another transaction replaced or deleted the row first), or it did not name them. "
    "Delete the loaded object, or add guard(Task, html=..., image=...) to the statement's WHERE."
)


def blob_transaction(
    session: AsyncSession | async_scoped_session[AsyncSession],
    *results: PutS3Result | DeleteS3Result,
    store: Store | None = None,
    background: bool = False,
    allow_unwritten: bool = False,
    commit_seconds: float = 60,
) -> BlobTransaction:
    """Own uploads and their transaction: commit on leaving, and clean up the right side.

    ::

        async with blob_transaction(session, store=store) as tx:
            put = await tx.put_s3(pk=url, api_calls=[PutS3ApiCall("html", page, None)])
            session.add(Task(url=url, **put.to_values()))

    The session is committed when the block ends, and superseded objects are deleted. If the
    block raises, or is cancelled, the session is rolled back, the new objects are deleted and
    the exception goes on. Entering takes no connection unless the session is in a transaction.

    Args:
        session: not inside ``begin()`` or a savepoint; savepoints inside the block are fine.
        results: of ``put_s3`` and ``delete_s3``, made before; the block owns them from now on.
        store: for the block's own ``put_s3`` and ``delete_s3``.
        background: let the store delete superseded objects after the block was left, so that
            the request does not wait for it. The store finishes them when it closes.
        allow_unwritten: commit although a new URI went into no row that could be seen, because
            something else writes it. Such objects, and those they supersede, are left alone, and
            named in ``report.kept``.
        commit_seconds: how long COMMIT, and separately ROLLBACK, may take.

    Raises:
        UnsafeTransactionError: on entering, or before the first byte: the transaction could not
            be judged afterwards. Results that were handed in stay the caller's.
        BlobNotWrittenError: on leaving: an upload went into no row, or a row that ``delete_s3``
            speaks of is not proved to be gone; rolled back and undone.
        BlobSharedError: on leaving: an UPDATE put one upload into several rows; the same.
        TransactionAbortedError: on leaving: the database had given up; rolled back and undone.
        CommitOutcomeUnknown: on leaving: the answer to COMMIT was lost; nothing was deleted.
    """
    return BlobTransaction(
        session() if isinstance(session, async_scoped_session) else session,
        results,
        store=store,
        background=background,
        allow_unwritten=allow_unwritten,
        commit_seconds=commit_seconds,
    )


class BlobTransaction:
    """The block of `blob_transaction`, used once.

    Attributes:
        outcome: None until the block was left.
        report: what the clean-up did, once it is over (with ``background``, later).
    """

    def __init__(
        self,
        session: AsyncSession,
        results: Sequence[PutS3Result | DeleteS3Result],
        *,
        store: Store | None,
        background: bool,
        allow_unwritten: bool,
        commit_seconds: float,
    ) -> None:
        if not isinstance(session, AsyncSession):
            raise InvalidInputError(f"an AsyncSession is needed, not {type(session).__name__}")
        self.outcome: Outcome | None = None
        self.report = DeleteReport()
        self._session = session
        self._results = list(results)
        self._store = store
        self._background = background
        self._allow_unwritten = allow_unwritten
        self._commit_seconds = commit_seconds
        self._ledger = Ledger(keeps_unwritten=allow_unwritten)
        self._watch: TransactionWatch | None = None
        self._stores: dict[str, Store] = {}
        self._attempts: dict[str, Attempt] = {}
        self._replaced_by: dict[str, str] = {}
        self._unknown: CommitOutcomeUnknown | None = None
        self._is_entered = self._is_left = False

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise ResultSpentError("a blob_transaction() is used once")
        self._is_entered = True
        taken: list[PutS3Result | DeleteS3Result] = []
        try:
            for result in self._results:
                result._life.take(self)
                taken.append(result)
            self._watch = watch(self._session, self._ledger)
            for result in taken:
                self._enter_in_ledger(self._watch, result)
            await check_isolation(self._session, self._watch)
        except BaseException:
            if self._watch is not None:
                self._watch.stop()
            for result in taken:
                result._life.owner = None
            raise
        return self

    async def put_s3(
        self,
        *,
        pk: PrimaryKey,
        api_calls: Sequence[PutS3ApiCall],
        update_at: datetime | None = None,
        is_pk_url_safe: bool = False,
        skip_unchanged: bool = False,
        store: Store | None = None,
    ) -> PutS3Result:
        """Upload the columns of one row; this block owns the objects from before they exist.

        Arguments, errors and result are those of `aioblobcol.aws_s3.put_s3`. If it raises,
        nothing was kept, and the block may go on.
        """
        chosen = self._check_inside(store)
        recorded: list[str] = []

        def record(results: Sequence[PutS3BackedColumnResult]) -> None:
            for result in results:
                self._record(chosen, result)
                recorded.append(result.new_s3_uri)

        try:
            result = await put_row(
                store=chosen,
                api_calls=api_calls,
                pk=pk,
                update_at=update_at,
                is_pk_url_safe=is_pk_url_safe,
                skip_unchanged=skip_unchanged,
                on_attempt=record,
            )
        except BlobUploadError as exc:
            for uri in recorded:
                if uri in exc.not_deleted:
                    self._ledger.give_up(uri)
                else:
                    self._ledger.forget(uri)
            raise
        except BaseException:  # cancelled: what was deleted is deleted once more on leaving
            for uri in recorded:
                self._ledger.give_up(uri)
            raise
        result._life.take(self)
        self._results.append(result)
        for attempt in result._attempts:
            self._attempts[attempt.uri] = attempt
        if self._is_left:  # a task of its own that nobody waited for
            await compensate(chosen, result._attempts)
            result._life.settled = "its block was left before it was uploaded"
            raise ResultSpentError("the blob_transaction() was left while put_s3() was running")
        return result

    def delete_s3(
        self, s3_uris: Sequence[str | None], *, store: Store | None = None
    ) -> DeleteS3Result:
        """Note the objects of a row that this transaction deletes; they go after the commit.

        Raises:
            InvalidS3UriError, ForeignUriError: as `aioblobcol.aws_s3.delete_s3`.
        """
        result = delete_s3(s3_uris, store=self._check_inside(store))
        assert self._watch is not None
        result._life.take(self)
        self._results.append(result)
        self._enter_in_ledger(self._watch, result)
        return result

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._watch is not None
        error = exc
        if error is None:
            try:
                await self._commit(self._watch)
            except BaseException as raised:  # raised again below, after the clean-up
                error = raised
        self._is_left = True
        try:
            await run_to_end(self._settle(self._watch, error), seconds=self._settle_seconds())
        except TimeoutError:  # each of its parts is bounded, so this is a store that is not
            logger.error("settling was given up; what it had not deleted is left alone")
        except asyncio.CancelledError as interrupted:
            if not isinstance(error, asyncio.CancelledError):
                raise interrupted from (self._unknown or error)
        self._raise(error, self._unknown, is_from_block=exc is not None)

    # --- leaving

    async def _commit(self, watched: TransactionWatch) -> None:
        """Send COMMIT, if nothing speaks against it, and wait for what it says."""
        try:
            await self._session.flush()
        except PendingRollbackError as exc:
            raise TransactionAbortedError(_ABORTED) from exc
        await self._probe(watched)
        await self._read_back(watched)
        self._check_demand()
        await run_to_end(self._session.commit(), seconds=self._commit_seconds)

    async def _read_back(self, watched: TransactionWatch) -> None:
        """Read by primary key what the statements alone do not prove.

        Whether a new URI is in the row that it was meant for, where the driver does not tell how
        many rows were changed; whether a row still names an object that is to be deleted, where
        no statement named it.
        """
        ledger = self._ledger
        unclear, unreleased = ledger.unclear(), ledger.demand().unreleased
        watched.look_for_cells({*unclear, *unreleased})
        written = set(ledger.written())
        loaded = [uri for uri in watched.cells if uri in written]  # changed or deleted since?
        cells = {uri: self._cells_of(watched, uri) for uri in (*unclear, *unreleased, *loaded)}
        in_cells = await self._read_cells([cell for some in cells.values() for cell in some])
        elsewhere = [uri for uri in unclear if not cells[uri]]
        found = in_cells | await self._read_targets(watched, elsewhere)
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

    def _cells_of(self, watched: TransactionWatch, uri: str) -> list[Cell]:
        """Return where loaded objects hold *uri*; of a new one, in the column that it is for."""
        column = self._ledger.column_of(uri)  # or an outbox would speak for it
        return [cell for cell in watched.cells.get(uri, ()) if column in {None, cell.attribute}]

    async def _read_cells(self, cells: Sequence[Cell]) -> set[str]:
        """Return the URIs that these cells hold now."""
        wanted: dict[Column[Any], set[Cell]] = {}
        for cell in cells:
            wanted.setdefault(cell.column, set()).add(cell)
        found: set[str] = set()
        for column, same in wanted.items():
            for some in batched(list(same), _ROWS_PER_READ):
                key = some[0].primary_key
                is_wanted = (
                    key[0].in_([cell.identity[0] for cell in some])
                    if len(key) == 1
                    else tuple_(*key).in_([cell.identity for cell in some])
                )
                values = await self._session.scalars(select(column).where(is_wanted))
                found.update(value for value in values if value is not None)
        return found

    async def _read_targets(self, watched: TransactionWatch, uris: Sequence[str]) -> set[str]:
        """Return those of *uris* that are in the column that a bulk statement was for.

        By value, so it reads the whole table unless the column has an index.
        """
        wanted: dict[Column[Any], list[str]] = {}
        for uri in uris:
            if uri in watched.targets:
                wanted.setdefault(watched.targets[uri], []).append(uri)
        found: set[str] = set()
        for column, values in wanted.items():
            for some in batched(values, _ROWS_PER_READ):
                found.update(await self._session.scalars(select(column).where(column.in_(some))))
        return found

    def _check_demand(self) -> None:
        demand = self._ledger.demand()
        if demand.shared:
            raise BlobSharedError(demand.shared)
        if self._allow_unwritten:
            return
        if demand.unwritten:
            raise BlobNotWrittenError(demand.unwritten, _UNWRITTEN)
        if demand.unreleased:
            raise BlobNotWrittenError(demand.unreleased, _UNRELEASED)

    async def _probe(self, watched: TransactionWatch) -> None:
        """Ask once more before COMMIT, if a statement failed after which none succeeded."""
        if watched.was_given_up:
            raise TransactionAbortedError(_ABORTED)
        if not watched.is_doubtful:
            return
        probe = select(literal(1))
        try:
            for connection in tuple(watched.connections):
                await self._session.run_sync(_execute, connection, probe)
        except (DBAPIError, PendingRollbackError) as exc:
            raise TransactionAbortedError(_ABORTED) from exc
        watched.forget_failures()

    def _settle_seconds(self) -> float:
        """Return the sum of the bounds of what `_settle` does."""
        requests = max((store.request_seconds for store in self._stores.values()), default=0.0)
        return 3 * self._commit_seconds + 3 * requests

    async def _settle(self, watched: TransactionWatch, error: BaseException | None) -> None:
        """Roll back what is left, judge, and delete what may be deleted. Raises nothing."""
        await self._end_transaction(watched)
        watched.stop()
        if error is None and watched.last_outcome is None:  # nothing was sent, and nothing failed
            self._ledger.end_root(Outcome.COMMITTED)
        settlement = self._ledger.settle()
        undecided = settlement.undecided_created or settlement.undecided_superseded
        nothing_sent = Outcome.COMMITTED if error is None else Outcome.ROLLED_BACK
        self.outcome = Outcome.UNKNOWN if undecided else watched.last_outcome or nothing_sent
        for result in self._results:
            result._life.settled = f"its transaction ended: {self.outcome.value}"
        if undecided:
            self._unknown = CommitOutcomeUnknown(
                settlement.undecided_created, settlement.undecided_superseded
            )
            logger.error("%s", self._unknown)
        await self._clean_up(settlement)

    async def _end_transaction(self, watched: TransactionWatch) -> None:
        """Leave the session without a transaction, and the ledger with a verdict."""
        facts = watched.facts
        watched.look_for_acknowledgement()
        try:
            async with asyncio.timeout(self._commit_seconds):
                if facts.is_sqlite and facts.commit_sent and not facts.acknowledged:
                    await self._roll_back_sqlite(watched)
                if self._session.in_transaction():
                    await self._session.rollback()
        except Exception as exc:  # whatever it is: the connection must not be used again
            logger.warning("rollback failed, the connection is given up: %s", exc)
            await self._give_connection_up(was_committed=facts.acknowledged)
        if watched.is_open:  # a cancelled reset of the connection swallows the session's event
            watched.root_ended()

    async def _roll_back_sqlite(self, watched: TransactionWatch) -> None:
        # After a refused COMMIT SQLAlchemy sends no ROLLBACK, and the transaction is still open.
        for connection in tuple(watched.connections):
            if connection.closed or connection.invalidated:
                continue
            await self._session.run_sync(_roll_back, connection)
        watched.rolled_back()
        if watched.facts.still_open is not False:
            await self._session.invalidate()

    async def _give_connection_up(self, *, was_committed: bool) -> None:
        try:
            async with asyncio.timeout(self._commit_seconds):
                if was_committed:
                    await self._session.close()
                else:
                    await self._session.invalidate()
        except Exception:
            logger.exception("the session's connection could not be given up")

    async def _clean_up(self, settlement: Settlement) -> None:
        """Delete both sides that may go, all stores at once."""
        kept = {
            uri: reason
            for uri in settlement.supersede
            if (reason := why_kept(uri, self._replaced_by.get(uri))) is not None
        }
        supersede = [uri for uri in settlement.supersede if uri not in kept]
        if self.outcome is Outcome.COMMITTED:
            kept.update(dict.fromkeys(settlement.kept, _NOT_PROVED))
        self.report = DeleteReport(kept=kept)
        work = [
            self._clean_up_store(
                store,
                [uri for uri in settlement.compensate if self._stores[uri] is store],
                [uri for uri in supersede if self._stores[uri] is store],
            )
            for store in {id(store): store for store in self._stores.values()}.values()
        ]
        await asyncio.gather(*work)

    async def _clean_up_store(self, store: Store, new: Sequence[str], old: Sequence[str]) -> None:
        try:
            if self._background and old:
                await store.runtime.background.submit(
                    self._delete(store, old), seconds=3 * store.request_seconds
                )
                old = ()
            expect_late(store, [self._attempts[uri] for uri in new if uri in self._attempts])
            await self._delete(store, [*new, *old])
        except Exception as exc:  # such as a store that was closed meanwhile: never decides
            logger.exception("clean-up failed")
            failed = dict.fromkeys((*new, *old), f"{type(exc).__name__}: {exc}")
            self.report = self.report.merged_with(DeleteReport(failed=failed))

    async def _delete(self, store: Store, uris: Sequence[str]) -> None:
        self.report = self.report.merged_with(await delete_all(store, uris))

    def _raise(
        self,
        error: BaseException | None,
        unknown: CommitOutcomeUnknown | None,
        *,
        is_from_block: bool,
    ) -> None:
        if unknown is not None:
            if isinstance(error, asyncio.CancelledError):
                raise error from unknown
            raise unknown from error
        if error is not None and not is_from_block:
            raise error

    # --- bookkeeping

    def _check_inside(self, store: Store | None) -> Store:
        if not self._is_entered or self._is_left or self._watch is None:
            raise ResultSpentError("use it inside of its `async with blob_transaction(...):`")
        chosen = store or self._store
        if chosen is None:
            raise InvalidInputError("which store? blob_transaction(session, store=...)")
        return chosen

    def _enter_in_ledger(
        self, watched: TransactionWatch, result: PutS3Result | DeleteS3Result
    ) -> None:
        if isinstance(result, DeleteS3Result):
            for uri in result.s3_uris:
                self._ledger.delete(uri)
                self._stores[uri] = result._store
            watched.look_for_cells(result.s3_uris)
            return
        for each in result._executed():
            self._record(result._store, each)
        for attempt in result._attempts:
            self._attempts[attempt.uri] = attempt

    def _record(self, store: Store, result: PutS3BackedColumnResult) -> None:
        self._ledger.create(
            result.new_s3_uri,
            replaces=result.old_s3_uri,
            column=result.column,
            savepoint=self._session.sync_session.get_nested_transaction(),
        )
        self._stores[result.new_s3_uri] = store
        if result.old_s3_uri is not None:
            self._stores.setdefault(result.old_s3_uri, store)
            self._replaced_by[result.old_s3_uri] = result.new_s3_uri


def batched(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut *values* into pieces of *size* at most."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _execute(_session: Session, connection: Connection, statement: Select[Any]) -> None:
    connection.execute(statement).close()


def _roll_back(_session: Session, connection: Connection) -> None:
    connection.connection.rollback()
