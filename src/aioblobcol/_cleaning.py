"""Carrying a settlement out: both sides that may go, all stores at once, now or in background.

Never raises for storage trouble: once COMMIT has succeeded nothing about clean-up may.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import TYPE_CHECKING, Protocol

from ._journal import LEFT_TO_WORKER
from ._store._base import DeleteReport, Store
from ._transfer import Attempt, delete_all, expect_late
from .aws_s3 import why_kept

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ._journal import JournalWriter
    from ._ledger import Settlement
    from .errors import Outcome

logger = logging.getLogger("aioblobcol.transaction")


class Reporter(Protocol):
    """Whoever keeps the report, to which background work adds later."""

    report: DeleteReport


async def clean_up(
    settlement: Settlement,
    *,
    to: Reporter,
    stores: Mapping[str, Store],
    attempts: Mapping[str, Attempt],
    replaced_by: Mapping[str, str],
    background: bool,
    writer: JournalWriter | None = None,
) -> Outcome | None:
    """Delete what *settlement* says, and add what became of it to ``to.report``.

    With a journal, new objects that no row names are condemned first, and those that their rows
    have let go are its worker's: the triggers know better than the session which ones they are.
    Those that are foreign to it (sqlalchemy_mate's keys) are nobody else's.

    Returns:
        What the journal says about an outcome that was unknown.
    """
    outcome: Outcome | None = None
    if writer is not None:
        theirs = [uri for uri in settlement.supersede if writer.looks_after(uri)]
        to.report = to.report.merged_with(DeleteReport(kept=dict.fromkeys(theirs, LEFT_TO_WORKER)))
        foreign = tuple(uri for uri in settlement.supersede if uri not in theirs)
        settlement = dataclasses.replace(settlement, supersede=foreign)
        if not writer.is_volatile:
            outcome = await _settle(settlement, writer, to=to, stores=stores, attempts=attempts)
            settlement = dataclasses.replace(settlement, compensate=())
    kept = {
        uri: reason
        for uri in settlement.supersede
        if (reason := why_kept(uri, replaced_by.get(uri))) is not None
    }
    to.report = to.report.merged_with(DeleteReport(kept=kept))
    supersede = [uri for uri in settlement.supersede if uri not in kept]
    both = (*settlement.compensate, *supersede)
    concerned = {id(stores[uri]): stores[uri] for uri in both}
    await asyncio.gather(
        *(
            _clean_up_store(
                store,
                [uri for uri in settlement.compensate if stores[uri] is store],
                [uri for uri in supersede if stores[uri] is store],
                to=to,
                attempts=attempts,
                background=background,
            )
            for store in concerned.values()
        )
    )
    return outcome


async def _settle(
    settlement: Settlement,
    writer: JournalWriter,
    *,
    to: Reporter,
    stores: Mapping[str, Store],
    attempts: Mapping[str, Attempt],
) -> Outcome | None:
    new, undecided = settlement.compensate, settlement.undecided_created
    if new:
        unanswered = [uri for uri in new if uri not in attempts or attempts[uri].may_land_late]
        report = await writer.settle({uri: stores[uri] for uri in new}, unanswered=unanswered)
        to.report = to.report.merged_with(report)
    if not undecided:
        return None
    made_at = [attempts[uri].made_at if uri in attempts else None for uri in undecided]
    report, outcome = await writer.resolve(
        {uri: stores[uri] for uri in undecided},
        staged_at=None if None in made_at else min(filter(None, made_at)),
    )
    to.report = to.report.merged_with(report)
    return outcome


async def _clean_up_store(
    store: Store,
    new: Sequence[str],
    old: Sequence[str],
    *,
    to: Reporter,
    attempts: Mapping[str, Attempt],
    background: bool,
) -> None:
    try:
        if background and old:
            work = _delete(store, old, to)
            await store.runtime.background.submit(work, seconds=3 * store.request_seconds)
            old = ()
        expect_late([attempts[uri] for uri in new if uri in attempts])
        if new or old:
            await _delete(store, [*new, *old], to)
    except Exception as exc:  # such as a store that was closed meanwhile: never decides
        logger.exception("clean-up failed")
        failed = dict.fromkeys((*new, *old), f"{type(exc).__name__}: {exc}")
        to.report = to.report.merged_with(DeleteReport(failed=failed))


async def _delete(store: Store, uris: Sequence[str], to: Reporter) -> None:
    report = await delete_all(store, uris)
    to.report = to.report.merged_with(report)
