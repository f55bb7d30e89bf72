"""The keeper: what one managed session does with blobs, from its flushes to its transactions' ends.

A `Keeper` lives as long as its session; a `Unit` is one root transaction of it, from the first
blob on. Listeners are installed once per class of sessions and look the keeper up. `_session`
says what became of a transaction and `_frames` what that means; here blobs are uploaded, rows
are read, and settlements are carried out. Invariants: nothing is sent to the database before
the uploads of a flush are complete; a unit is settled once, after its connection went back to
the pool; a blob whose object is deleted, or in doubt, is pending again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, inspect
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.orm import Mapper, Session, SessionTransaction, object_session
from sqlalchemy.orm.attributes import get_history, instance_state
from sqlalchemy.orm.base import PASSIVE_NO_INITIALIZE
from sqlalchemy.orm.exc import StaleDataError

from ._blob import Blob
from ._claims import ABORTED, Claims, check_adopted, probe
from ._cleaning import clean_up
from ._column import (
    STORES_OF_SESSION,
    BlobAttribute,
    as_uri,
    blob_attributes,
    describe_refusal,
)
from ._connection import is_new_target
from ._frames import Frames
from ._greenlet import MissingGreenlet, wait_for
from ._journal import SETTLE_SECONDS, Staging, undo
from ._ledger import Ledger, Settlement
from ._placing import Placement, store_of
from ._rows import Rows
from ._session import (
    Seen,
    check_level,
    follow,
    ignore_undone,
    listen_to_session,
    look_on,
    uris_claimed,
)
from ._statements import copied_columns
from ._store._base import DeleteReport, Store
from ._tasks import run_to_end
from ._transfer import Attempt
from .errors import (
    BlobSharedError,
    BlobUploadError,
    CommitOutcomeUnknown,
    InvalidSourceError,
    Outcome,
    StoreClosedError,
    TransactionAbortedError,
    UnsafeTransactionError,
)

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import InstanceState

    from ._journal import Journal, JournalWriter
    from .aws_s3 import DeleteS3Result, PutS3Result

logger = logging.getLogger("aioblobcol.session")

ENDED_MEANWHILE = (
    "another task has ended the session's transaction while this one uploaded; a session belongs "
    "to one task"
)
NOT_PROVED = "another row may name it, or nothing proved that it is in one, or gone from its own"


class Unit:
    """One root transaction of a managed session.

    Attributes:
        outcome: None while it is under way.
        report: what the clean-up did; in background, later.
        writer: of the journal, if there is one.
    """

    def __init__(self, session: Session, writer: JournalWriter | None = None) -> None:
        self.is_settled = False
        self.writer = writer
        self.books = Frames()
        self.claims: list[Claims] = []
        self.report = DeleteReport()
        self.outcome: Outcome | None = None
        self.rows: Rows | None = None
        self.changed: dict[InstanceState[Any], None] = {}
        self.stores: dict[str, Store] = {}
        self.attempts: dict[str, Attempt] = {}
        # weakly: a blob that nobody has any more need not be told, nor its bytes be kept
        self.blobs: weakref.WeakValueDictionary[str, Blob] = weakref.WeakValueDictionary()
        self.columns: dict[str, str] = {}
        self.string_cells: dict[str, tuple[Any, str]] = {}
        self._admitted: dict[int, Blob] = {}  # by id: blobs are not hashable
        self._sent: set[int] = set()
        self.watch = follow(session, Ledger(), self.books)
        self.watch.on_undone = self._undo

    @property
    def is_idle(self) -> bool:
        """Nothing is at stake."""
        return self.books.is_empty and not self.claims

    def take_over(self, seen: Seen) -> None:
        """Count what was done on a connection before anything was at stake."""
        self.watch.copying.update(seen.copying)
        self.books.note_before(seen.noted)

    # --- putting something at stake

    def check(self, session: Session) -> None:
        """Refuse a transaction that could not be judged afterwards, before the first byte.

        Raises:
            UnsafeTransactionError: AUTOCOMMIT, or connections that nobody can name.
        """
        if self.watch.refusal is not None:
            raise UnsafeTransactionError(self.watch.refusal)
        check_level(session, self.watch)

    def upload(self, session: Session, placements: Collection[Placement]) -> None:
        """Upload all of them at once and admit them into the next statements, or undo all.

        Raises:
            InvalidInputError, StoreClosedError, UnsafeTransactionError: refused; nothing was sent.
            BlobUploadError: nothing was kept.
            JournalError: the journal could not be written; nothing was sent.
        """
        placed: list[Placement] = []
        staging = Staging(self.writer)
        try:
            uploads = []
            for placement in placements:
                uploads.append(placement.plan())
                placed.append(placement)
                self.books.create(placement.uri)
                self.stores[placement.uri] = placement.store
            self._check_columns(placements)
            staging.begin(session, [placement.uri for placement in placed])
            attempts = wait_for(staging.upload(uploads))
            self._check_alive(attempts)
            for attempt in attempts:
                self.attempts[attempt.uri] = attempt
        except BaseException as exc:
            if not staging.is_begun:
                self._forget(placed, exc)
            raise
        for placement in placed:
            placement.blob._was_uploaded(
                placement.uri, placement.facts, store=placement.store, owner=self
            )
            self.blobs[placement.uri] = placement.blob
            self.admit(placement.blob)

    def stage_again(self, session: Session, blobs: Collection[Blob]) -> None:
        """A savepoint may have undone what was staged in the session's own transaction."""
        if self.writer is not None and blobs and self.writer.stages_inside(session):
            self.writer.stage_inside(session, [blob.uri for blob in blobs])

    def _check_columns(self, placements: Collection[Placement]) -> None:
        if self.writer is not None:
            for placement in placements:
                self.writer.journal.check_column(placement.attribute.column)

    def check_adopted(self, session: Session) -> None:
        """Find rows that the journal has not seen: its worker would delete their objects.

        Raises:
            BlobNotWrittenError: there are some.
        """
        if self.writer is not None:
            check_adopted(session, self.writer, sorted(self.books.written))

    def _check_alive(self, attempts: Collection[Attempt]) -> None:
        if self.is_settled:
            wait_for(undo(list(attempts), self.writer))
            raise UnsafeTransactionError(ENDED_MEANWHILE)

    def _forget(self, placements: Collection[Placement], error: BaseException) -> None:
        """The uploads failed and were undone; what is not certainly gone is deleted later."""
        left = error.not_deleted if isinstance(error, BlobUploadError) else {}
        for placement in placements:
            is_certain = not isinstance(error, asyncio.CancelledError)
            if is_certain and placement.uri not in left:
                self.books.forget(placement.uri)

    def admit(self, blob: Blob) -> None:
        """Let a blob into the statements of this flush."""
        blob._admitted_by = self
        self._admitted[id(blob)] = blob

    def dismiss(self, blobs: Collection[Blob]) -> None:
        """The statements that these were admitted into are over, one way or the other."""
        for blob in blobs:
            blob._admitted_by = None
            self._admitted.pop(id(blob), None)
            self._sent.discard(id(blob))

    def end_flush(self) -> None:
        """The flush is over, one way or the other."""
        self.dismiss(list(self._admitted.values()))
        self.rows = None
        self.changed.clear()

    def sends(self, blob: Blob) -> None:
        """A statement that names *blob* is on its way.

        Raises:
            BlobSharedError: it is in another cell already.
        """
        if id(blob) in self._sent:
            raise BlobSharedError([blob.uri])
        self._sent.add(id(blob))
        self.books.write(blob.uri)

    def supersede(self, uri: str, attribute: BlobAttribute, store: Store) -> None:
        """A row has let *uri* go."""
        self.books.supersede(uri)
        self.stores.setdefault(uri, store)
        self.columns[uri] = attribute.column.name

    def claim(
        self,
        session: Session,
        results: Collection[PutS3Result | DeleteS3Result],
        *,
        allow_unwritten: bool,
        writer: JournalWriter | None = None,
    ) -> Claims:
        """Answer for results of the explicit strength.

        Raises:
            ResultSpentError: one belongs to another transaction, or to one that ended.
            UnsafeTransactionError: see `check`.
        """
        self.check(session)
        claims = Claims(session, allow_unwritten=allow_unwritten, writer=writer or self.writer)
        claims.take(list(results))
        claims.watch = follow(session, claims.ledger, Frames())
        for result in claims.results:
            claims.enter(result)
        self.claims.append(claims)
        return claims

    # --- the end

    def judge(self) -> list[Verdict]:
        """Judge the transaction, which is over, and say what may be deleted."""
        self.end_flush()
        self.is_settled = True
        claimed = self.watch.claimed_beside()
        claimed.update(uri for each in self.claims for uri in each.ledger.created)
        self.watch.root_ended()
        self.watch.stop()
        self.watch.on_undone = ignore_undone  # a cycle less, so that no collection is needed
        self.outcome = self.watch.last_outcome or Outcome.ROLLED_BACK
        self._keep_what_sql_copied()
        # of the explicit strength: its own books tell what of them is needed
        self.books.keep_noted(unless=claimed)
        own = self.books.settle(self.outcome)
        self._conclude_blobs(own)
        verdicts = [Verdict(own, self.stores, self.attempts, {}, self.writer)]
        for claims in self.claims:
            assert claims.watch is not None
            claims.watch.root_ended()
            claims.watch.stop()
            claims.spend(f"its transaction ended: {self.outcome.value}")
            settlement = claims.ledger.settle()
            verdicts.append(
                Verdict(
                    settlement, claims.stores, claims.attempts, claims.replaced_by, claims.writer
                )
            )
        return verdicts

    def _keep_what_sql_copied(self) -> None:
        names = set(self.columns.values())
        copied = {
            name
            for statement in self.watch.copying.values()
            for name in copied_columns(statement, names)
        }
        self.books.keep(uri for uri, column in self.columns.items() if column in copied)

    def _conclude_blobs(self, settlement: Settlement) -> None:
        gone = {*settlement.compensate, *settlement.supersede}
        for uri, blob in list(self.blobs.items()):
            if blob._uri != uri:
                continue  # a savepoint took it back, and it may be another transaction's by now
            if self.outcome is Outcome.COMMITTED and uri not in gone:
                blob._is_settled()
            else:
                blob._reset()
        self.blobs.clear()

    def _undo(self, uris: Collection[str]) -> None:
        """The rows that name these were undone with a savepoint."""
        for uri in uris:
            blob = self.blobs.get(uri)
            if blob is not None and blob._uri == uri:
                blob._reset()

    def __del__(self) -> None:
        if not self.is_settled and self.books.created:
            warnings.warn(
                "a session was dropped without commit, rollback or close; unless a committed row "
                f"names them, these are orphans: {', '.join(self.books.created)}",
                ResourceWarning,
                stacklevel=2,
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What may be deleted, and what is needed to do it."""

    settlement: Settlement
    stores: Mapping[str, Store]
    attempts: Mapping[str, Attempt]
    replaced_by: Mapping[str, str]
    writer: JournalWriter | None

    @property
    def is_empty(self) -> bool:
        """Nothing is to be deleted, reported or found out."""
        found = self.settlement
        is_resolvable = self.writer is not None and found.undecided_created
        return not (found.compensate or found.supersede or found.kept or is_resolvable)


class Keeper:
    """What a managed session is kept with.

    Attributes:
        stores: by name.
        unit: the root transaction under way, once something is at stake in it.
        last: the same, or the last one that has ended.
        unknown: of the last transaction, if the answer to its COMMIT was lost.
    """

    def __init__(
        self,
        session: Session,
        stores: Mapping[str, Store],
        *,
        background: bool,
        commit_seconds: float,
        journal: Journal | None = None,
    ) -> None:
        self.stores = stores
        self.journal = journal
        self.background = background
        self.commit_seconds = commit_seconds
        self.unit: Unit | None = None
        self.last: Unit | None = None
        self.unknown: CommitOutcomeUnknown | None = None
        self._is_preparing = False
        self._seen: list[Seen] = []
        session.info[STORES_OF_SESSION] = stores
        _keepers[session] = self

    def open_unit(self, session: Session) -> Unit:
        """Return the unit of the root transaction under way, or of the next one."""
        if self.unit is None:
            self.unknown = None
            self.unit = self.last = Unit(session, self._writer(session))
            for seen in self._seen:
                self.unit.take_over(seen)
        return self.unit

    def _writer(self, session: Session) -> JournalWriter | None:
        if self.journal is None:
            return None
        return self.journal.writer_of(session)

    def begins(self, connection: Connection) -> None:
        """Look at what is sent from now on, although nothing is at stake yet."""
        seen = look_on(connection)
        if seen is None or any(each is seen for each in self._seen):
            return
        self._seen.append(seen)
        if self.unit is not None:
            self.unit.take_over(seen)

    @property
    def settle_seconds(self) -> float:
        """The sum of the bounds of what a settlement does."""
        requests = max((store.request_seconds for store in self.stores.values()), default=60.0)
        journal = 0 if self.journal is None else 2 * SETTLE_SECONDS
        return 3 * self.commit_seconds + 3 * requests + journal

    # --- flush

    def before_flush(self, session: Session, instances: Collection[object] | None) -> None:
        """Upload what is pending, all at once, then lock and read the rows that change."""
        if self.unit is not None:
            self.unit.end_flush()
        flush = _Flush()
        self._is_preparing = True
        try:
            self._collect(session, flush, instances)
            if flush.is_empty:
                return
            unit = self.open_unit(session)
            unit.check(session)
            unit.upload(session, flush.placements)
        except BaseException:
            flush.unclaim()
            raise
        finally:
            self._is_preparing = False
        unit.stage_again(session, flush.in_place)
        for blob in flush.in_place:
            unit.admit(blob)
        unit.rows, unit.changed = Rows(), flush.changed
        unit.rows.keys_change = flush.keys_change
        for mapper, identities in _by_mapper((*flush.changed, *flush.deleted)).items():
            unit.rows.lock(session, mapper, identities)
        for mapper, identities in _by_mapper(flush.deleted).items():
            unit.rows.expect_deleted(mapper, identities)

    def _collect(
        self, session: Session, flush: _Flush, instances: Collection[object] | None
    ) -> None:
        """Find what a flush of the session, or of some *instances* only, does about blobs."""
        chosen = None if not instances else {id(instance) for instance in instances}
        for instance in (*session.new, *session.dirty):
            state = _state_with_blobs(instance, chosen)
            if state is not None:
                for attribute, value in _changes(state):
                    self._place(session, flush, state, attribute, value)
        for instance in session.deleted:
            state = _state_with_blobs(instance, chosen)
            if state is not None:
                flush.deleted[state] = None
        if flush.deleted:
            _check_row_switches(flush, session.new)
            flush.keys_change = any(map(_changes_its_key, session.dirty))

    def _place(
        self,
        session: Session,
        flush: _Flush,
        state: InstanceState[Any],
        attribute: BlobAttribute,
        value: object,
    ) -> None:
        """Say what is to be done about one changed attribute."""
        if state.identity is not None:
            flush.changed[state] = None
        if isinstance(value, str) and value not in uris_claimed(session):
            raise InvalidSourceError(f"{attribute.column}: {describe_refusal(value)}")
        if isinstance(value, str):
            self._check_string(session, str(value), (state, attribute.key))
        if not isinstance(value, Blob):
            return
        cell, instance, unit = (state, attribute.key), state.obj(), self.unit
        is_here = value._owner is not None and value._owner is unit and value._cell == cell
        # one that was written already may stand elsewhere by now: in another row, if its state is
        # new again (make_transient), or in another column after a bulk UPDATE
        if is_here and unit is not None and value.uri not in unit.books.written:
            flush.in_place.append(value)  # uploaded ahead
            return
        if value.is_stored or value._cell is not None:
            value = value.copy()  # one object, one cell
            setattr(instance, attribute.key, value)
        value._cell = cell
        store = store_of(attribute, self.stores)
        flush.placements.append(Placement(value, attribute, instance, store))

    def _check_string(self, session: Session, uri: str, cell: tuple[Any, str]) -> None:
        """Refuse one result of the explicit strength in two cells.

        It may be written anew elsewhere, once the object that had it was undone or let it go.
        """
        cells = self.open_unit(session).string_cells
        state, key = cells.get(uri, cell)
        is_held = state.session is session and as_uri(state.dict.get(key)) == uri
        if is_held and (state, key) != cell:
            raise BlobSharedError([uri])
        cells[uri] = cell

    def before_delete(self, session: Session, state: InstanceState[Any]) -> None:
        """Read a row that a cascade deletes and nobody has announced."""
        self._read_late(session, state).expect_deleted(state.mapper, [tuple(state.identity or ())])

    def changes_late(self, session: Session, state: InstanceState[Any]) -> None:
        """Read a row of which somebody's listener changes a blob in the middle of the flush."""
        if self._is_preparing:
            return  # we do, and the row is read afterwards
        self._read_late(session, state)
        self.open_unit(session).changed[state] = None

    def _read_late(self, session: Session, state: InstanceState[Any]) -> Rows:
        unit = self.open_unit(session)
        rows = unit.rows = unit.rows or Rows()
        if not rows.knows(state.mapper, tuple(state.identity or ())):
            unit.check(session)
            rows.lock(session, state.mapper, [tuple(state.identity or ())])
        return rows

    def after_flush(self, session: Session) -> None:
        """Read the rows again: what none of them names any more was let go."""
        unit = self.unit
        if unit is None:
            return
        if unit.rows is not None:
            for state in unit.changed:
                old, new = tuple(state.identity or ()), _key_of(state)
                if new != old:
                    unit.rows.expect_renamed(state.mapper, old, new)
            # listeners and relationships change keys in the middle of a flush, too
            changes = unit.rows.expects_deletes and any(map(_changes_its_key, session.dirty))
            unit.rows.keys_change |= changes
            unit.rows.read_again(session)
            self._check_found(unit, unit.rows)
            self.supersede(unit, unit.rows)
        unit.end_flush()

    def _check_found(self, unit: Unit, rows: Rows) -> None:
        """Find a row that is gone where the driver does not count what a list of them changes.

        Raises:
            StaleDataError: as where it does.
        """
        named = rows.named()
        for state in unit.changed:
            if rows.expects_deleted(state.mapper, tuple(state.identity or ())):
                continue  # an orphan, which was changed before it was let go
            blobs = [state.dict.get(each.key) for each in blob_attributes(state.mapper)]
            own = {blob._uri for blob in blobs if isinstance(blob, Blob) and blob._owner is unit}
            is_there = rows.finds(state.mapper, _key_of(state)) or not own.isdisjoint(named)
            if own and not is_there:
                raise StaleDataError(
                    f"{state.class_.__name__} {state.identity}: the row is not there any more"
                )

    def supersede(self, unit: Unit, rows: Rows) -> None:
        """Note what the rows that were read again have let go."""
        for uri, attribute in rows.let_go():
            unit.supersede(uri, attribute, store_of(attribute, self.stores))

    def upload_ahead(self, session: Session, instances: Iterable[object]) -> None:
        """Upload the pending blobs of *instances* before their flush."""
        flush = _Flush()
        try:
            for instance in instances:
                state = _managed_state(instance)
                for attribute in blob_attributes(state.mapper):
                    value = state.dict.get(attribute.key)
                    if isinstance(value, Blob) and (not value.is_stored or _is_new(state)):
                        self._place(session, flush, state, attribute, value)
            if not flush.placements:
                return
            unit = self.open_unit(session)
            unit.check(session)
            unit.upload(session, flush.placements)
        except BaseException:
            flush.unclaim()
            raise
        unit.dismiss([placement.blob for placement in flush.placements])

    # --- ends

    def before_commit(self, session: Session) -> None:
        """Refuse a COMMIT that would not do what it seems to.

        Raises:
            TransactionAbortedError: the database has given the transaction up.
            BlobNotWrittenError: of claims, or the journal has not seen a row.
            BlobSharedError: of claims.
            TransactionError: a bulk statement forbids it, see `Frames.forbid_commit`.
        """
        try:
            session.flush()
        except PendingRollbackError as exc:
            if self.unit is None:
                raise
            raise TransactionAbortedError(ABORTED) from exc
        unit = self.unit
        if unit is None:
            return
        if unit.books.poison is not None:
            raise unit.books.poison
        if unit.is_idle:
            return
        probe(session, unit.watch)
        unit.check_adopted(session)
        for claims in unit.claims:
            assert claims.watch is not None
            claims.watch.forget_failures()
            claims.check()

    def root_ended(self) -> None:
        """Settle, or leave it to the end of the connection's transaction."""
        unit, self.unit = self.unit, None
        if unit is None:
            self._seen = []
            return
        if unit.watch.carry_over():
            for claims in unit.claims:
                assert claims.watch is not None
                claims.watch.carry_over()
            unit.watch.on_free = lambda: self._start(unit, self._judge(unit))
            return
        self._seen = []
        verdicts = self._judge(unit)
        if not verdicts:
            return
        try:
            wait_for(self._carry_out(unit, verdicts))
        except MissingGreenlet:  # the session was closed outside of one, as a plain session is
            self._start(unit, verdicts)

    async def settle_leftovers(self) -> None:
        """Settle what no event has: a cancelled reset of the connection swallows the last one."""
        unit, self.unit = self.unit, None
        if unit is not None:
            await self._carry_out(unit, self._judge(unit))

    def _judge(self, unit: Unit) -> list[Verdict]:
        verdicts = unit.judge()
        created = [uri for each in verdicts for uri in each.settlement.undecided_created]
        superseded = [uri for each in verdicts for uri in each.settlement.undecided_superseded]
        if created or superseded:
            self.unknown = CommitOutcomeUnknown(created, superseded)
            logger.error("%s", self.unknown)
        kept = {uri: NOT_PROVED for each in verdicts for uri in each.settlement.kept}
        unit.report = DeleteReport(kept=kept)
        return [verdict for verdict in verdicts if not verdict.is_empty]

    async def _carry_out(self, unit: Unit, verdicts: Collection[Verdict]) -> None:
        """Delete what may be deleted, although the caller is cancelled meanwhile."""
        try:
            await run_to_end(self._clean_up(unit, verdicts), seconds=self.settle_seconds)
        except TimeoutError:  # each of its parts is bounded, so this is a store that is not
            logger.error("settling was given up; what it had not deleted is left alone")

    async def _clean_up(self, unit: Unit, verdicts: Collection[Verdict]) -> None:
        found = await asyncio.gather(
            *(
                clean_up(
                    verdict.settlement,
                    to=unit,
                    stores=verdict.stores,
                    attempts=verdict.attempts,
                    replaced_by=verdict.replaced_by,
                    background=self.background,
                    writer=verdict.writer,
                )
                for verdict in verdicts
            )
        )
        for outcome in found:
            is_surer = outcome is Outcome.COMMITTED or unit.outcome is Outcome.UNKNOWN
            if outcome is not None and outcome is not Outcome.UNKNOWN and is_surer:
                unit.outcome = outcome
                if self.unknown is not None:
                    self.unknown.outcome = outcome

    def _start(self, unit: Unit, verdicts: Collection[Verdict]) -> None:
        """Do the same without waiting for it: an event of a pool, or no greenlet to wait in."""
        uris = [uri for each in verdicts for uri in each.settlement.compensate]
        uris += [uri for each in verdicts for uri in each.settlement.supersede]
        uris += [
            uri for each in verdicts if each.writer for uri in each.settlement.undecided_created
        ]
        if not uris:
            return
        stores = {uri: store for each in verdicts for uri, store in each.stores.items()}
        try:
            stores[uris[0]].runtime.background.start(
                self._clean_up(unit, verdicts), seconds=self.settle_seconds
            )
        except (RuntimeError, StoreClosedError) as exc:  # no event loop, or no store any more
            logger.error("nobody deletes these but a journal's worker (%s): %s", exc, uris)


@dataclasses.dataclass(slots=True)
class _Flush:
    """What a flush will do about blobs."""

    placements: list[Placement] = dataclasses.field(default_factory=list)
    changed: dict[InstanceState[Any], None] = dataclasses.field(default_factory=dict)
    deleted: dict[InstanceState[Any], None] = dataclasses.field(default_factory=dict)
    in_place: list[Blob] = dataclasses.field(default_factory=list)
    keys_change: bool = False

    @property
    def is_empty(self) -> bool:
        return not (self.placements or self.changed or self.deleted or self.in_place)

    def unclaim(self) -> None:
        """It was refused: the blobs are free for another cell."""
        for placement in self.placements:
            if not placement.blob.is_stored:
                placement.blob._cell = None


# --- listeners -------------------------------------------------------------------------------

_keepers: weakref.WeakKeyDictionary[Session, Keeper] = weakref.WeakKeyDictionary()
_listened: weakref.WeakSet[Session] = weakref.WeakSet()


def keeper_of(session: Session) -> Keeper | None:
    """Return the keeper of a managed session."""
    return _keepers.get(session)


def listen(target: Session | type[Session]) -> None:
    """Install the listeners on one session, or once on a class of sessions."""
    listen_to_session(target)
    if isinstance(target, type) or is_new_target(_listened, target):
        for name, listener in _LISTENERS:
            event.listen(target, name, listener)


def _before_flush(session: Session, _context: object, instances: Collection[object] | None) -> None:
    keeper = _keepers.get(session)
    if keeper is not None:
        keeper.before_flush(session, instances)


def _after_flush(session: Session, _context: object) -> None:
    keeper = _keepers.get(session)
    if keeper is not None:
        keeper.after_flush(session)


def _before_commit(session: Session) -> None:
    keeper = _keepers.get(session)
    if keeper is not None and not session.in_nested_transaction():  # also of a savepoint
        keeper.before_commit(session)


def _after_begin(
    session: Session, _transaction: SessionTransaction, connection: Connection
) -> None:
    keeper = _keepers.get(session)
    if keeper is not None:
        keeper.begins(connection)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    keeper = _keepers.get(session)
    if keeper is not None and transaction.parent is None:
        keeper.root_ended()


_LISTENERS = (
    ("after_begin", _after_begin),
    ("before_flush", _before_flush),
    ("after_flush", _after_flush),
    ("before_commit", _before_commit),
    ("after_transaction_end", _after_transaction_end),
)


@event.listens_for(Mapper, "mapper_configured")
def _watch(mapper: Mapper[Any], mapped_class: type[Any]) -> None:
    attributes = blob_attributes(mapper)
    if attributes:
        event.listen(mapper, "before_delete", _before_delete)
    for attribute in attributes:
        event.listen(getattr(mapped_class, attribute.key), "set", _set_in_flush)


def _set_in_flush(target: object, _value: object, _old: object, _initiator: object) -> None:
    session = object_session(target)
    if session is None or not is_flushing(session):
        return
    keeper, state = _keepers.get(session), inspect(target)
    if keeper is not None and state is not None and state.identity is not None:
        keeper.changes_late(session, state)


def is_flushing(session: Session) -> bool:
    """Tell whether a flush is under way, the listeners that come before it included."""
    return bool(getattr(session, "_flushing", False))  # there is no public name for it


def _before_delete(_mapper: Mapper[Any], _connection: Connection, target: object) -> None:
    session, state = object_session(target), inspect(target)
    keeper = _keepers.get(session) if session is not None else None
    if keeper is not None and session is not None and state is not None:
        keeper.before_delete(session, state)


# --- what the unit of work knows -------------------------------------------------------------


def _state_with_blobs(
    instance: object, chosen: Collection[int] | None
) -> InstanceState[Any] | None:
    if chosen is not None and id(instance) not in chosen:
        return None
    state = instance_state(instance)
    return state if blob_attributes(state.mapper) else None


def _check_row_switches(flush: _Flush, new: Iterable[object]) -> None:
    """Refuse two new objects in the place of one that is deleted: SQLAlchemy updates it twice.

    Raises:
        UnsafeTransactionError: nothing was sent.
    """
    states = (_state_with_blobs(instance, None) for instance in new)
    keys = Counter((s.mapper.base_mapper, _key_of(s)) for s in states if s is not None)
    for deleted in flush.deleted:
        if keys[deleted.mapper.base_mapper, tuple(deleted.identity or ())] > 1:
            raise UnsafeTransactionError(
                f"two new {deleted.class_.__name__} have the primary key {deleted.identity} of one "
                "that is deleted in the same flush: add one, or flush in between"
            )


def _by_mapper(
    states: Iterable[InstanceState[Any]],
) -> dict[Mapper[Any], list[tuple[Any, ...]]]:
    found: dict[Mapper[Any], list[tuple[Any, ...]]] = {}
    for state in states:
        assert state.identity is not None
        found.setdefault(state.mapper, []).append(tuple(state.identity))
    return found


def _managed_state(instance: object) -> InstanceState[Any]:
    state: InstanceState[Any] | None = inspect(instance)
    if state is None or not blob_attributes(state.mapper):
        raise InvalidSourceError(f"{type(instance).__name__} has no managed columns")
    return state


def _key_of(state: InstanceState[Any]) -> tuple[Any, ...]:
    """Return the primary key as the attributes say."""
    return tuple(state.mapper.primary_key_from_instance(state.obj()))


def _changes_its_key(instance: object) -> bool:
    state: InstanceState[Any] | None = inspect(instance)
    if state is None:
        return False
    keys = (state.mapper.get_property_by_column(each).key for each in state.mapper.primary_key)
    return any(get_history(instance, key, PASSIVE_NO_INITIALIZE).has_changes() for key in keys)


def _is_new(state: InstanceState[Any]) -> bool:
    return state.key is None


def _changes(state: InstanceState[Any]) -> Iterator[tuple[BlobAttribute, object]]:
    """Return the managed attributes that the flush will write, with their values."""
    for attribute in blob_attributes(state.mapper):
        value = state.dict.get(attribute.key)
        if _is_new(state):
            if value is not None:
                yield attribute, value
        elif get_history(state.obj(), attribute.key, PASSIVE_NO_INITIALIZE).has_changes():
            yield attribute, value
