"""The worker: deletes what the journal says nobody will want any more.

Any number of them may run, on any number of machines; the database is their only coordinator. An
entry is claimed in one transaction, its object deleted, its entry removed in another one; killed
anywhere in between, the claim runs out and another worker does the same again.

Invariant: nothing is condemned in a store that this database does not own for certain.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from ._journal import (
    Condemned,
    Entries,
    Journal,
    OwnershipState,
    begin_read_committed,
    check_ownership,
    lag_of,
    warn_of_missing_triggers,
)
from ._store._base import DeleteReport, IncompleteUpload, Store, is_owned
from ._tasks import run_to_end
from .errors import InvalidInputError, StoreClosedError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

logger = logging.getLogger("aioblobcol.worker")

LOOKS_EVERY_SECONDS = 3600
"""For triggers: partitions are made, and tables changed, while a worker runs."""
FOREIGN = "under no store's bucket and prefix"


@dataclasses.dataclass(frozen=True, slots=True)
class WorkReport:
    """What one round did.

    Attributes:
        claimed: entries.
        deleted: objects; those that are deleted once more later are among them.
        removed: entries that are done with.
        failed: URI to reason; tried again later.
        left_out: stores that this database does not own, by name; nothing was done in them.
        lag: for how long the oldest entry had been due when the round began.
    """

    claimed: int = 0
    deleted: int = 0
    removed: int = 0
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, OwnershipState] = dataclasses.field(default_factory=dict)
    lag: timedelta = dataclasses.field(default=timedelta(0), compare=False)


class Worker:
    """Deletes what is due, in rounds, until it is stopped.

    ``aioblobcol worker`` runs one in a process of its own. It can run in an application's event
    loop as well; here is FastAPI's ``lifespan``::

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            stop = asyncio.Event()
            async with store, asyncio.TaskGroup() as group:
                group.create_task(Worker(journal, engine).run(stop))
                yield  # while the application runs
                stop.set()

    Any number of workers may share one journal on PostgreSQL; on SQLite they take turns.
    """

    def __init__(
        self,
        journal: Journal,
        engine: AsyncEngine,
        *,
        batch_size: int = 500,
        quarantine: timedelta = timedelta(hours=1),
        claim_for: timedelta = timedelta(minutes=15),
        poll_every: timedelta = timedelta(seconds=5),
        on_round: Callable[[WorkReport], None] | None = None,
    ) -> None:
        """Describe a worker; nothing is sent yet.

        Args:
            journal: its stores are open while the worker runs. Entries that lie elsewhere are
                left alone. A prefix that nobody owns is claimed (see `aioblobcol claim --help`).
            engine: of the database with the journal; at most one connection is used at a time.
            batch_size: entries per round.
            quarantine: how long a request may live; an object that was never in a row is deleted
                again after it, for its upload may have been late.
            claim_for: when another worker may take over what this one has claimed.
            poll_every: how long to wait when nothing is due, and after an error.
            on_round: called by `run` after each round that did something.

        Raises:
            InvalidInputError: something is not positive.
        """
        times = (claim_for, poll_every)
        if batch_size < 1 or quarantine < timedelta(0) or any(t <= timedelta(0) for t in times):
            raise InvalidInputError("batch_size, claim_for and poll_every are positive")
        self._engine = engine
        self._journal = journal
        self._entries = Entries(journal, engine.dialect.name)
        self._batch_size = batch_size
        self._quarantine = quarantine
        self._claim_for = claim_for
        self._poll_every = poll_every
        self._on_round = on_round
        self._looks_again = 0.0

    async def run_once(self) -> WorkReport:
        """Do one round: claim, delete, and note what became of it.

        What was deleted is noted although the caller is cancelled meanwhile.

        Raises:
            SQLAlchemyError, OSError: the database could not be asked; what was claimed is tried
                again when the claim has run out.
        """
        claim = uuid.uuid4().hex
        states = await check_ownership(self._journal, self._engine, claims=True)
        left_out = {name: s for name, s in states.items() if s is not OwnershipState.AGREED}
        stores = [each for name, each in self._journal.stores.items() if name not in left_out]
        async with begin_read_committed(self._engine) as connection:
            if time.monotonic() >= self._looks_again:
                await warn_of_missing_triggers(self._journal, connection)
                self._looks_again = time.monotonic() + LOOKS_EVERY_SECONDS
            lag = await lag_of(connection, self._journal)
            condemned = await self._entries.condemn(
                connection,
                claim=claim,
                limit=self._batch_size,
                lease=self._claim_for,
                stores=stores,
            )
        report = WorkReport()
        if condemned:
            seconds = self._claim_for.total_seconds()
            report = await run_to_end(self._carry_out(claim, condemned), seconds=seconds)
        return dataclasses.replace(report, left_out=left_out, lag=lag)

    async def lag(self) -> timedelta:
        """Return for how long the oldest entry has been due; 0 if none is. For alarms.

        Entries in stores that are left out count, for somebody has to act.

        Raises:
            SQLAlchemyError, OSError: the database could not be asked.
        """
        async with begin_read_committed(self._engine) as connection:
            return await lag_of(connection, self._journal)

    async def drain(self, stop: asyncio.Event | None = None) -> list[WorkReport]:
        """Do rounds until nothing is due, or *stop* is set; return what did something.

        What failed in one round is not due in the next.

        Raises:
            SQLAlchemyError, OSError: as `run_once`.
        """
        reports = []
        while stop is None or not stop.is_set():
            report = await self.run_once()
            if not report.claimed:
                break
            self._tell(report)
            reports.append(report)
        return reports

    async def run(self, stop: asyncio.Event) -> None:
        """Do rounds until *stop* is set; the round under way is finished first.

        A database or a store that cannot be reached is logged and asked again later.

        Raises:
            StoreClosedError: a store is not open.
        """
        while not stop.is_set():
            report = WorkReport()
            try:
                report = await self.run_once()
            except StoreClosedError:
                raise  # it would not be open later, either
            except Exception as exc:  # drivers raise what they like while a server starts up
                logger.warning(
                    "the journal could not be asked, trying again later: %s: %s",
                    type(exc).__name__,
                    exc,
                    exc_info=logger.isEnabledFor(logging.DEBUG),
                )
            if report.claimed:
                self._tell(report)
            if report.claimed < self._batch_size:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_every.total_seconds()):
                        await stop.wait()

    def _tell(self, report: WorkReport) -> None:
        logger.info(
            "%d claimed, %d deleted, %d failed, %d done with; %.0f seconds behind",
            report.claimed,
            report.deleted,
            len(report.failed),
            report.removed,
            report.lag.total_seconds(),
        )
        if self._on_round is not None:
            self._on_round(report)

    async def _carry_out(self, claim: str, condemned: Sequence[Condemned]) -> WorkReport:
        left = await self._abort_uploads(condemned)
        report = await self._delete([each.uri for each in condemned if each.uri not in left])
        report = report.merged_with(DeleteReport(failed=left))
        known = {each.uri: each for each in condemned}
        deleted = [each for each in condemned if each.uri not in report.failed]
        async with begin_read_committed(self._engine) as connection:
            removed = await self._entries.forget(
                connection, deleted, claim=claim, quarantine=self._quarantine
            )
            failed = {uri: (known[uri], reason) for uri, reason in report.failed.items()}
            await self._entries.postpone(connection, failed, claim=claim)
        for uri, reason in report.failed.items():
            logger.error("cannot delete %s: %s", uri, reason, extra={"uri": uri})
        return WorkReport(len(condemned), len(deleted), removed, report.failed)

    async def _abort_uploads(self, condemned: Sequence[Condemned]) -> dict[str, str]:
        """Abort what may still be completed, and return what could not be, with the reason.

        A completion that comes after the object was deleted would bring it back.
        """
        uploads = [
            (store, IncompleteUpload(each.uri, each.upload_id))
            for each in condemned
            if each.upload_id is not None
            for store in self._journal.stores.values()
            if is_owned(store, each.uri)
        ]
        reasons = await asyncio.gather(*(_abort(store, upload) for store, upload in uploads))
        return {
            upload.uri: reason
            for (_, upload), reason in zip(uploads, reasons, strict=True)
            if reason is not None
        }

    async def _delete(self, uris: Sequence[str]) -> DeleteReport:
        """Delete objects of all stores at once."""
        failed = dict.fromkeys(uris, FOREIGN)  # such as prefix/../other
        work: list[tuple[Store, list[str]]] = []
        for store in self._journal.stores.values():
            own = [uri for uri in failed if is_owned(store, uri)]
            work.append((store, own))
            for uri in own:
                del failed[uri]
        reports = await asyncio.gather(*(_delete(store, own) for store, own in work if own))
        whole = DeleteReport(failed=failed)
        for report in reports:
            whole = whole.merged_with(report)
        return whole


async def _abort(store: Store, upload: IncompleteUpload) -> str | None:
    try:
        async with asyncio.timeout(store.request_seconds):
            await store.abort_upload(upload)
    except StoreError as exc:
        return exc.code
    except Exception as exc:  # the others' entries have to be noted all the same
        return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
    return None


async def _delete(store: Store, uris: list[str]) -> DeleteReport:
    try:
        async with asyncio.timeout(store.request_seconds):
            return await store.delete_many(uris)
    except Exception as exc:  # the others' entries have to be noted all the same
        reason = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        return DeleteReport(failed=dict.fromkeys(uris, reason))


__all__ = ["WorkReport", "Worker"]
