"""Carrying a settlement out: both sides that may go, all stores at once, now or in background.

Never raises for storage trouble: once COMMIT has succeeded nothing about clean-up may.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from ._store._base import DeleteReport, Store
from ._transfer import Attempt, delete_all, expect_late
from .aws_s3 import why_kept

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ._ledger import Settlement

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
) -> None:
    """Delete what *settlement* says, and add what became of it to ``to.report``."""
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
