"""Many requests as one act: upload all or undo all, delete what may be deleted.

Invariants (the two rules of cancellation, first half): a PUT that is on the wire is run to its
end, and only then its key is deleted; PUTs that have not begun are not begun. Every key that
was attempted is deleted when one fails; one without a definite answer is deleted a second time
when its request can no longer take effect. Deleting never raises for storage trouble.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import TYPE_CHECKING

from ._store._base import (
    DeleteReport,
    ObjectInfo,
    PutRequest,
    Store,
    is_owned,
    put_seconds,
)
from ._tasks import run_to_end, wait_through
from .errors import BlobUploadError, StoreClosedError, StoreError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

logger = logging.getLogger("aioblobcol.cleanup")

FOREIGN = "not under this store's bucket and prefix"


@dataclasses.dataclass(slots=True)
class Attempt:
    """One PUT: whether it was begun, and whether its answer leaves a doubt.

    It outlives the request, whose bytes are not kept.
    """

    column: str
    uri: str
    seconds: float  # how long the request may live
    begun: bool = False
    may_land_late: bool = False


class _Stop:
    """Set when an act has failed: what has not begun is not begun."""

    __slots__ = ("is_set",)

    def __init__(self) -> None:
        self.is_set = False


async def upload_all(store: Store, requests: Sequence[PutRequest]) -> list[Attempt]:
    """Upload all *requests* at once, bounded by the store; undo all if one fails.

    Raises:
        BlobUploadError: the first failure; whatever was attempted was deleted again.
        StoreClosedError: nothing was sent.
        asyncio.CancelledError: the same state; the upload error, if any, is its cause.
    """
    slots, stop = store.runtime.slots, _Stop()
    attempts = [
        Attempt(request.column, request.uri, put_seconds(store, request)) for request in requests
    ]
    tasks = [
        asyncio.create_task(
            _put(store, request, attempt, slots, stop), name=f"aioblobcol: put {request.column}"
        )
        for request, attempt in zip(requests, attempts, strict=True)
    ]
    interrupted: asyncio.CancelledError | None = None
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    except asyncio.CancelledError as exc:
        interrupted = exc
    stop.is_set = True
    for attempt, task in zip(attempts, tasks, strict=True):
        if not attempt.begun:
            task.cancel()
    interrupted = await wait_through(tasks) or interrupted
    error: BaseException | None = None
    failed = [
        (attempt, task.exception())
        for attempt, task in zip(attempts, tasks, strict=True)
        if not task.cancelled() and task.exception() is not None
    ]
    if not failed and interrupted is None:
        return attempts
    try:
        report = await compensate(store, [attempt for attempt in attempts if attempt.begun])
    except asyncio.CancelledError as exc:
        interrupted, report = exc, DeleteReport()
    if failed:
        error = _upload_error(*failed[0], report)
    if interrupted is not None:
        raise interrupted from error
    assert error is not None
    raise error


async def compensate(store: Store, attempts: Sequence[Attempt]) -> DeleteReport:
    """Delete what *attempts* may have stored, now and, where an answer was lost, once more."""
    expect_late(store, attempts)
    return await delete_all(store, [attempt.uri for attempt in attempts])


def expect_late(store: Store, attempts: Sequence[Attempt]) -> None:
    """Have the unanswered among *attempts* deleted a second time, when they can no longer land."""
    for attempt in attempts:
        if attempt.may_land_late:
            store.runtime.delete_again(attempt.uri, after_seconds=attempt.seconds)


async def delete_all(store: Store, uris: Collection[str]) -> DeleteReport:
    """Delete *uris* although the caller is cancelled meanwhile; storage trouble is reported.

    URIs outside of the store's bucket and prefix are kept.

    Raises:
        asyncio.CancelledError: after the deletes were carried out.
    """
    mine = [uri for uri in dict.fromkeys(uris) if is_owned(store, uri)]
    kept = {uri: FOREIGN for uri in dict.fromkeys(uris) if not is_owned(store, uri)}
    if not mine:
        return DeleteReport(kept=kept)
    return await run_to_end(_delete(store, mine, kept), seconds=2 * store.request_seconds)


async def head_all(store: Store, uris: Collection[str]) -> dict[str, ObjectInfo]:
    """HEAD all *uris* at once; those without a usable answer are left out."""

    async def head(uri: str) -> ObjectInfo | None:
        try:
            async with store.runtime.slots, asyncio.timeout(store.request_seconds):
                return await store.head(uri)
        except (StoreError, TimeoutError):
            return None

    found: dict[str, ObjectInfo] = {}
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(head(uri)) for uri in dict.fromkeys(uris)]
    for task in tasks:
        info = task.result()
        if info is not None:
            found[info.uri] = info
    return found


async def _put(
    store: Store, request: PutRequest, attempt: Attempt, slots: asyncio.Semaphore, stop: _Stop
) -> None:
    async with slots:
        if stop.is_set:
            return
        attempt.begun = attempt.may_land_late = True  # nothing awaits before the request
        try:
            async with asyncio.timeout(attempt.seconds):
                was_answered_at_once = await store.put(request)
        except BaseException as exc:
            stop.is_set = True
            if isinstance(exc, StoreClosedError):  # found out before anything was sent
                attempt.begun = attempt.may_land_late = False
            elif isinstance(exc, StoreError):
                attempt.may_land_late = exc.may_have_taken_effect
            elif isinstance(exc, TimeoutError):
                raise StoreUnavailableError("put", request.uri, "no answer in time") from exc
            raise
        attempt.may_land_late = not was_answered_at_once


def _upload_error(
    attempt: Attempt, cause: BaseException | None, report: DeleteReport
) -> BaseException:
    if isinstance(cause, StoreClosedError):
        return cause
    error = BlobUploadError(attempt.column, attempt.uri, str(cause), report.failed)
    error.__cause__ = cause
    return error


async def _delete(store: Store, uris: list[str], kept: dict[str, str]) -> DeleteReport:
    try:
        async with asyncio.timeout(store.request_seconds):
            report = await store.delete_many(uris)
    except Exception as exc:  # whatever it is, it must not decide about the row
        reason = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        report = DeleteReport(failed=dict.fromkeys(uris, reason))
    for uri, reason in report.failed.items():
        logger.error("cannot delete %s: %s; it is an orphan now", uri, reason, extra={"uri": uri})
    return dataclasses.replace(report, kept={**report.kept, **kept})
