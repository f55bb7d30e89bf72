"""Many requests as one act: upload all or undo all, delete what may be deleted.

One act may go to several stores. Invariants (the two rules of cancellation, first half): a PUT or
a copy that is on the wire is run to its end, and only then its key is deleted; those that have
not begun are not begun. Every key that was attempted is deleted when one fails; one without a
definite answer is deleted a second time when its request can no longer take effect. Bytes are
made ready inside of a store's slot and dropped with it. Deleting never raises for storage
trouble.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from ._store._base import (
    CopyRequest,
    DeleteReport,
    ObjectInfo,
    PutRequest,
    Store,
    copy_seconds,
    is_owned,
    put_seconds,
)
from ._tasks import run_to_end, wait_through
from .errors import BlobUploadError, StoreClosedError, StoreError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

logger = logging.getLogger("aioblobcol.cleanup")

FOREIGN = "not under this store's bucket and prefix"


@dataclasses.dataclass(slots=True)
class Upload:
    """One object that is to be made: by a PUT, or by a copy inside of the server.

    Attributes:
        store: where it is made.
        column: its name stands in the errors.
        uri: the new object; the request must be about it.
        prepare: makes the request, inside of the store's slot and right before it is sent, so
            that there are never more bodies than slots. What it raises is this upload's failure,
            with nothing begun. It may be cancelled.
    """

    store: Store
    column: str
    uri: str
    prepare: Callable[[], Awaitable[PutRequest | CopyRequest]]


@dataclasses.dataclass(slots=True)
class Attempt:
    """One PUT or copy: whether it was begun, and whether its answer leaves a doubt.

    It outlives the request, whose bytes are not kept.
    """

    store: Store
    column: str
    uri: str
    seconds: float = 0.0  # how long the request may live
    begun: bool = False
    may_land_late: bool = False
    made_at: float = dataclasses.field(default_factory=time.monotonic)


class _Stop:
    """Set when an act has failed: what has not begun is not begun."""

    __slots__ = ("is_set",)

    def __init__(self) -> None:
        self.is_set = False


async def upload_all(store: Store, requests: Sequence[PutRequest]) -> list[Attempt]:
    """Upload all *requests*, whose bytes are there already, to one store; see `upload_each`."""
    return await upload_each([prepared(store, request) for request in requests])


async def upload_each(uploads: Sequence[Upload]) -> list[Attempt]:
    """Make all objects at once, bounded by each store; undo all if one fails.

    Raises:
        BlobUploadError: the first failure (also of an upload's ``prepare``, which is the cause
            then); whatever was attempted was deleted again.
        StoreClosedError: nothing was sent to that store; the same state in the others.
        asyncio.CancelledError: the same state; the upload error, if any, is its cause.
    """
    slots, stop = [upload.store.runtime.slots for upload in uploads], _Stop()
    attempts = [Attempt(upload.store, upload.column, upload.uri) for upload in uploads]
    tasks = [
        asyncio.create_task(
            _upload(upload, attempt, slot, stop), name=f"aioblobcol: put {upload.column}"
        )
        for upload, attempt, slot in zip(uploads, attempts, slots, strict=True)
    ]
    interrupted: asyncio.CancelledError | None = None
    unfinished: Collection[asyncio.Task[None]] = tasks
    try:
        if tasks:
            _, unfinished = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    except asyncio.CancelledError as exc:
        interrupted = exc
    stop.is_set = True
    if unfinished:
        for attempt, task in zip(attempts, tasks, strict=True):
            if not attempt.begun:
                task.cancel()
        interrupted = await wait_through(unfinished) or interrupted
    failed = [
        (attempt, error)
        for attempt, task in zip(attempts, tasks, strict=True)
        if not task.cancelled() and (error := task.exception()) is not None
    ]
    if not failed and interrupted is None:
        failed = _cancelled_by_others(attempts, tasks)
        if not failed:
            return attempts
    try:
        report = await compensate([attempt for attempt in attempts if attempt.begun])
    except asyncio.CancelledError as exc:
        interrupted, report = exc, DeleteReport()
    error = _upload_error(*failed[0], report) if failed else None
    if interrupted is not None:
        raise interrupted from error
    assert error is not None
    raise error


async def compensate(attempts: Sequence[Attempt]) -> DeleteReport:
    """Delete what *attempts* may have stored, now and, where an answer was lost, once more.

    All stores at once, also while the caller is cancelled; storage trouble is reported.

    Raises:
        asyncio.CancelledError: after the deletes were carried out.
    """
    expect_late(attempts)
    return await delete_everywhere({attempt.uri: attempt.store for attempt in attempts})


def expect_late(attempts: Sequence[Attempt]) -> None:
    """Have the unanswered among *attempts* deleted a second time, when they can no longer land."""
    for attempt in attempts:
        if not attempt.may_land_late:
            continue
        try:
            attempt.store.runtime.delete_again(attempt.uri, after_seconds=attempt.seconds)
        except StoreClosedError as exc:  # must not keep the others from being deleted
            logger.error("%s is not deleted a second time: %s", attempt.uri, exc)


async def delete_all(store: Store, uris: Collection[str]) -> DeleteReport:
    """Delete *uris* although the caller is cancelled meanwhile; storage trouble is reported.

    URIs outside of the store's bucket and prefix are kept.

    Raises:
        asyncio.CancelledError: after the deletes were carried out.
    """
    mine, kept = _divided(store, uris)
    if not mine:
        return DeleteReport(kept=kept)
    return await run_to_end(_delete(store, mine, kept), seconds=2 * store.request_seconds)


async def delete_everywhere(uris: Mapping[str, Store]) -> DeleteReport:
    """Do what `delete_all` does in all stores at once; of each URI its store is given.

    Raises:
        asyncio.CancelledError: after the deletes were carried out.
    """
    work: dict[int, tuple[Store, list[str]]] = {}
    for uri, store in uris.items():
        work.setdefault(id(store), (store, []))[1].append(uri)
    if not work:
        return DeleteReport()
    seconds = max(store.request_seconds for store, _ in work.values())
    return await run_to_end(_delete_each(list(work.values())), seconds=2 * seconds)


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


def prepared(store: Store, request: PutRequest) -> Upload:
    """Return the upload of a request whose bytes are there already."""

    async def prepare() -> PutRequest:
        return request

    return Upload(store, request.column, request.uri, prepare)


async def _upload(upload: Upload, attempt: Attempt, slots: asyncio.Semaphore, stop: _Stop) -> None:
    async with slots:
        try:
            if not stop.is_set:
                await _prepare_and_send(upload, attempt, stop)
        except BaseException:
            stop.is_set = True
            raise


async def _prepare_and_send(upload: Upload, attempt: Attempt, stop: _Stop) -> None:
    request = await upload.prepare()
    assert request.uri == upload.uri  # or another object would be made than the one to be deleted
    if stop.is_set:  # another one failed meanwhile
        return
    store = upload.store
    if isinstance(request, CopyRequest):
        attempt.seconds, send = copy_seconds(store), functools.partial(store.copy, request)
    else:
        seconds = put_seconds(store, request.payload.size)
        attempt.seconds, send = seconds, functools.partial(store.put, request)
    attempt.begun = attempt.may_land_late = True  # nothing awaits before the request
    try:
        async with asyncio.timeout(attempt.seconds):
            was_answered_at_once = await send()
    except StoreClosedError:  # found out before anything was sent
        attempt.begun = attempt.may_land_late = False
        raise
    except StoreError as exc:
        attempt.may_land_late = exc.may_have_taken_effect
        raise
    except TimeoutError as exc:
        verb = "copy" if isinstance(request, CopyRequest) else "put"
        raise StoreUnavailableError(verb, request.uri, "no answer in time") from exc
    attempt.may_land_late = not was_answered_at_once


def _cancelled_by_others(
    attempts: Sequence[Attempt], tasks: Sequence[asyncio.Task[None]]
) -> list[tuple[Attempt, BaseException]]:
    """Return what would otherwise be missing without any error."""
    return [
        (attempt, asyncio.CancelledError("somebody cancelled the upload's own task"))
        for attempt, task in zip(attempts, tasks, strict=True)
        if task.cancelled()
    ]


def _upload_error(attempt: Attempt, cause: BaseException, report: DeleteReport) -> BaseException:
    if isinstance(cause, StoreClosedError):
        return cause
    reason = str(cause) or type(cause).__name__
    error = BlobUploadError(attempt.column, attempt.uri, reason, report.failed)
    error.__cause__ = cause
    return error


def _divided(store: Store, uris: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Return what may be deleted, and what is kept with the reason."""
    unique = dict.fromkeys(uris)
    mine = [uri for uri in unique if is_owned(store, uri)]
    return mine, {uri: FOREIGN for uri in unique if not is_owned(store, uri)}


async def _delete_each(work: Sequence[tuple[Store, list[str]]]) -> DeleteReport:
    reports = await asyncio.gather(
        *(_delete(store, *_divided(store, uris)) for store, uris in work)
    )
    return functools.reduce(DeleteReport.merged_with, reports)


async def _delete(store: Store, uris: list[str], kept: dict[str, str]) -> DeleteReport:
    if not uris:
        return DeleteReport(kept=kept)
    try:
        async with asyncio.timeout(store.request_seconds):
            report = await store.delete_many(uris)
    except Exception as exc:  # whatever it is, it must not decide about the row
        reason = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        report = DeleteReport(failed=dict.fromkeys(uris, reason))
    for uri, reason in report.failed.items():
        logger.error(
            "cannot delete %s: %s; without a journal it is an orphan now",
            uri,
            reason,
            extra={"uri": uri},
        )
    return dataclasses.replace(report, kept={**report.kept, **kept})
