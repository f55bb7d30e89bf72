"""``blob_transaction``: one block that uploads, writes, commits and cleans up.

`_session` says what happened and `_ledger` what it is worth; here it is carried out.
Invariants (the two rules of cancellation, second half): COMMIT, once sent, is run to its end,
then the clean-up that its outcome asks for, then the cancellation goes on. The clean-up never
raises, and never replaces the error that the user should see.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING

from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

from ._claims import ABORTED, Claims, probe
from ._cleaning import clean_up
from ._journal import SETTLE_SECONDS, Staging, undo
from ._keeper import Unit, keeper_of
from ._ledger import Settlement
from ._managed import managing_keeper
from ._session import TransactionWatch, check_isolation, owner_of, watch
from ._store._base import DeleteReport, Store
from ._tasks import run_to_end
from .aws_s3 import (
    DeleteS3Result,
    PutS3ApiCall,
    PutS3BackedColumnResult,
    PutS3Result,
    delete_s3,
    put_row,
)
from .errors import (
    BlobUploadError,
    CommitOutcomeUnknown,
    InvalidInputError,
    Outcome,
    ResultSpentError,
    TransactionAbortedError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from types import TracebackType
    from typing import Self

    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import Session

    from ._journal import Journal, JournalWriter
    from ._transfer import Attempt, Upload
    from ._uri import PrimaryKey

logger = logging.getLogger("aioblobcol.transaction")

NOT_PROVED = "no statement proved that it is in a row, or that its row is gone"


def blob_transaction(
    session: AsyncSession | async_scoped_session[AsyncSession],
    *results: PutS3Result | DeleteS3Result,
    store: Store | None = None,
    journal: Journal | None = None,
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
        journal: stage every upload there before it can exist; what rows let go is deleted by its
            worker. By default that of the session's factory, or of the results.
        background: let the store delete superseded objects after the block was left, so that
            the request does not wait for it. The store finishes them when it closes.
        allow_unwritten: commit although a new URI went into no row that could be seen, because
            something else writes it. Such objects, and those they supersede, are left alone, and
            named in ``report.kept``.
        commit_seconds: how long COMMIT, and separately ROLLBACK, may take.

    Raises:
        UnsafeTransactionError: on entering, or before the first byte: the transaction could not
            be judged afterwards. Results that were handed in stay the caller's.
        InvalidInputError: a result was uploaded without the journal; the same.
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
        journal=journal,
        background=background,
        allow_unwritten=allow_unwritten,
        commit_seconds=commit_seconds,
    )


class BlobTransaction:
    """The block of `blob_transaction`, used once.

    Attributes:
        report: what the clean-up did, once it is over (with ``background``, later); of a block
            that joined, see `blob_report`.
    """

    def __init__(
        self,
        session: AsyncSession,
        results: Sequence[PutS3Result | DeleteS3Result],
        *,
        store: Store | None,
        journal: Journal | None,
        background: bool,
        allow_unwritten: bool,
        commit_seconds: float,
    ) -> None:
        if not isinstance(session, AsyncSession):
            raise InvalidInputError(f"an AsyncSession is needed, not {type(session).__name__}")
        self.report = DeleteReport()
        self._outcome: Outcome | None = None
        self._session = session
        self._results = list(results)
        self._claims: Claims | None = None
        self._unit: Unit | None = None
        self._store = store
        self._journal = journal
        self._background = background
        self._allow_unwritten = allow_unwritten
        self._commit_seconds = commit_seconds
        self._unknown: CommitOutcomeUnknown | None = None
        self._is_entered = self._is_left = False

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise ResultSpentError("a blob_transaction() is used once")
        self._is_entered = True
        if owner_of(self._session) is not None:
            await self._join()
            return self
        claims = Claims(
            self._session.sync_session,
            allow_unwritten=self._allow_unwritten,
            writer=self._writer(),
        )
        claims.take(self._results)
        try:
            claims.watch = watch(self._session, claims.ledger)
            for result in self._results:
                claims.enter(result)
            await check_isolation(self._session, claims.watch)
        except BaseException:
            if claims.watch is not None:
                claims.watch.stop()
            claims.give_back()
            raise
        self._claims = claims
        return self

    def _writer(self) -> JournalWriter | None:
        session = self._session.sync_session
        keeper = keeper_of(session)
        journal = self._journal or (keeper.journal if keeper is not None else None)
        if journal is None:
            return None
        return journal.writer_of(session)

    async def _join(self) -> None:
        """Leave commit and settlement to whoever has begun the session's transaction."""
        keeper = managing_keeper(self._session.sync_session)
        self._unit = keeper.open_unit(self._session.sync_session)
        writer = self._writer()
        self._claims = await self._session.run_sync(
            lambda session: self._open_unit.claim(
                session, self._results, allow_unwritten=self._allow_unwritten, writer=writer
            )
        )

    @property
    def _open_unit(self) -> Unit:
        assert self._unit is not None
        return self._unit

    @property
    def outcome(self) -> Outcome | None:
        """None until the block was left; of one that joined, until its owner has ended."""
        return self._outcome if self._unit is None else self._unit.outcome

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
        chosen, claims = self._check_inside(store)
        recorded: list[str] = []

        def record(results: Sequence[PutS3BackedColumnResult]) -> None:
            for result in results:
                claims.record(chosen, result)
                recorded.append(result.new_s3_uri)

        try:
            result = await put_row(
                store=chosen,
                api_calls=api_calls,
                pk=pk,
                update_at=update_at,
                is_pk_url_safe=is_pk_url_safe,
                skip_unchanged=skip_unchanged,
                writer=claims.writer,
                upload=functools.partial(self._upload, claims.writer),
                on_attempt=record,
            )
        except BlobUploadError as exc:
            for uri in recorded:
                if uri in exc.not_deleted or claims.writer is not None:
                    claims.ledger.give_up(uri)
                else:
                    claims.ledger.forget(uri)
            raise
        except BaseException:  # cancelled: what was deleted is deleted once more on leaving
            for uri in recorded:
                claims.ledger.give_up(uri)
            raise
        claims.take([result])
        for attempt in result._attempts:
            claims.attempts[attempt.uri] = attempt
        if self._is_left or self.outcome is not None:  # a task of its own nobody waited for
            await undo(result._attempts, claims.writer)
            result._life.settled = "its block was left before it was uploaded"
            raise ResultSpentError("the blob_transaction() was left while put_s3() was running")
        return result

    async def _upload(
        self, writer: JournalWriter | None, uploads: Sequence[Upload]
    ) -> list[Attempt]:
        staging = Staging(writer)
        if writer is not None:
            uris = [upload.uri for upload in uploads]
            await self._session.run_sync(staging.begin, uris)
        return await staging.upload(uploads)

    def delete_s3(
        self, s3_uris: Sequence[str | None], *, store: Store | None = None
    ) -> DeleteS3Result:
        """Note the objects of a row that this transaction deletes; they go after the commit.

        Raises:
            InvalidS3UriError, ForeignUriError: as `aioblobcol.aws_s3.delete_s3`.
        """
        chosen, claims = self._check_inside(store)
        result = delete_s3(s3_uris, store=chosen)
        claims.take([result])
        claims.enter(result)
        return result

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        claims = self._claims
        assert claims is not None
        assert claims.watch is not None
        if self._unit is not None:
            self._leave_to_owner(claims, exc)
            return
        error = exc
        if error is None:
            try:
                await self._commit(claims)
            except BaseException as raised:  # raised again below, after the clean-up
                error = raised
        self._is_left = True
        try:
            await run_to_end(self._settle(claims, error), seconds=self._settle_seconds(claims))
        except TimeoutError:  # each of its parts is bounded, so this is a store that is not
            logger.error("settling was given up; what it had not deleted is left alone")
        except asyncio.CancelledError as interrupted:
            if not isinstance(error, asyncio.CancelledError):
                raise interrupted from (self._unknown or error)
        self._raise(error, self._unknown, is_from_block=exc is not None)

    def _leave_to_owner(self, claims: Claims, error: BaseException | None) -> None:
        self._is_left = True
        if error is not None:  # whatever the owner makes of it, nothing demands these any more
            claims.ledger.doom(claims.ledger.created)

    # --- leaving

    async def _commit(self, claims: Claims) -> None:
        """Send COMMIT, if nothing speaks against it, and wait for what it says."""
        try:
            await self._session.flush()
        except PendingRollbackError as exc:
            raise TransactionAbortedError(ABORTED) from exc
        assert claims.watch is not None
        await self._session.run_sync(probe, claims.watch)
        await self._session.run_sync(lambda _: claims.check())
        await run_to_end(self._session.commit(), seconds=self._commit_seconds)

    def _settle_seconds(self, claims: Claims) -> float:
        """Return the sum of the bounds of what `_settle` does."""
        requests = max((store.request_seconds for store in claims.stores.values()), default=0.0)
        journal = 0 if claims.writer is None else 2 * SETTLE_SECONDS
        return 3 * self._commit_seconds + 3 * requests + journal

    async def _settle(self, claims: Claims, error: BaseException | None) -> None:
        """Roll back what is left, judge, and delete what may be deleted. Raises nothing."""
        watched = claims.watch
        assert watched is not None
        await self._end_transaction(watched)
        watched.stop()
        if error is None and watched.last_outcome is None:  # nothing was sent, and nothing failed
            claims.ledger.end_root(Outcome.COMMITTED)
        settlement = claims.ledger.settle()
        undecided = settlement.undecided_created or settlement.undecided_superseded
        nothing_sent = Outcome.COMMITTED if error is None else Outcome.ROLLED_BACK
        self._outcome = Outcome.UNKNOWN if undecided else watched.last_outcome or nothing_sent
        claims.spend(f"its transaction ended: {self._outcome.value}")
        if undecided:
            self._unknown = CommitOutcomeUnknown(
                settlement.undecided_created, settlement.undecided_superseded
            )
        await self._clean_up(claims, settlement)
        if self._unknown is not None:
            self._unknown.outcome = self._outcome or Outcome.UNKNOWN
            logger.error("%s", self._unknown)

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

    async def _clean_up(self, claims: Claims, settlement: Settlement) -> None:
        """Delete both sides that may go, all stores at once."""
        if self._outcome is Outcome.COMMITTED:
            self.report = DeleteReport(kept=dict.fromkeys(settlement.kept, NOT_PROVED))
        found = await clean_up(
            settlement,
            to=self,
            stores=claims.stores,
            attempts=claims.attempts,
            replaced_by=claims.replaced_by,
            background=self._background,
            writer=claims.writer,
        )
        self._outcome = found or self._outcome

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

    def _check_inside(self, store: Store | None) -> tuple[Store, Claims]:
        if self._claims is None or self._is_left or self.outcome is not None:
            raise ResultSpentError("use it inside of its `async with blob_transaction(...):`")
        chosen = store or self._store
        if chosen is None:
            raise InvalidInputError("which store? blob_transaction(session, store=...)")
        return chosen, self._claims


def _roll_back(_session: Session, connection: Connection) -> None:
    connection.connection.rollback()
