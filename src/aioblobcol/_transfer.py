"""Many requests as one act: upload all or undo all, delete what may be deleted.

One act may go to several stores. Invariants (the two rules of cancellation, first half): a PUT or
a copy that is on the wire is run to its end, and only then its key is deleted; those that have
not begun are not begun. A large object is stopped at once, for nothing of it is visible before its
completion, which counts as a PUT. Every key that was attempted is deleted when one fails; one
without a definite answer is deleted a second time when its request can no longer take effect.
Bytes are made ready within the store's budget, taken before they are read. Deleting never raises
for storage trouble.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from ._sources import OnProgress, Part
from ._store._base import (
    CopyRequest,
    DeleteReport,
    ObjectInfo,
    ObjectWriter,
    PutRequest,
    Store,
    WriteRequest,
    copy_seconds,
    is_owned,
    put_seconds,
)
from ._streams import PartReader, part_bytes
from ._tasks import Budget, run_to_end, wait_through
from .errors import (
    BlobUploadError,
    InvalidSourceError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

logger = logging.getLogger("aioblobcol.cleanup")

FOREIGN = "not under this store's bucket and prefix"


@dataclasses.dataclass(slots=True)
class LargeRequest:
    """One object that is written part by part.

    Attributes:
        write: what it is to be.
        reader: gives the parts; closed when it is over.
    """

    write: WriteRequest
    reader: PartReader


Request = PutRequest | CopyRequest | LargeRequest


@dataclasses.dataclass(slots=True)
class Upload:
    """One object that is to be made: by a PUT, part by part, or by a copy inside of the server.

    Attributes:
        store: where it is made.
        column: its name stands in the errors.
        uri: the new object; the request must be about it.
        prepare: makes the request, right before it is sent. What it raises is this upload's
            failure, with nothing begun. It may be cancelled.
        size: bytes that it takes into memory, of one part at most; they are taken from the store's
            budget before.
        waits: it reads from somebody who may be slow, and must not keep a slot meanwhile.
        on_progress: told of what was sent.
        note_upload: told the server's name of a large upload, before its first part is sent.
    """

    store: Store
    column: str
    uri: str
    prepare: Callable[[], Awaitable[Request]]
    size: int = 0
    waits: bool = False
    on_progress: OnProgress | None = None
    note_upload: Callable[[str], Awaitable[None]] | None = None


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
    if not uris:
        return {}

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


def in_memory(store: Store, size: int | None) -> int:
    """Return how many bytes an upload takes into memory before its first request is sent.

    Args:
        store: where it goes.
        size: of the whole; None if it is not known.
    """
    first = part_bytes(1, total=size)
    if size is not None and size <= first:
        return size
    return first * (1 + store.capabilities.parts_held)


def prepared(store: Store, request: PutRequest) -> Upload:
    """Return the upload of a request whose bytes are there already."""

    async def prepare() -> PutRequest:
        return request

    return Upload(store, request.column, request.uri, prepare, size=request.payload.size)


class _Hold:
    """Bytes of a store's budget, given back once."""

    __slots__ = ("_amount", "_budget")

    def __init__(self, budget: Budget, amount: int) -> None:
        self._budget = budget
        self._amount = amount

    @classmethod
    async def of(cls, store: Store, size: int) -> _Hold:
        budget = store.runtime.budget
        return cls(budget, await budget.acquire(size))

    def shrink(self, size: int) -> None:
        if size < self._amount:
            self._budget.release(self._amount - size)
            self._amount = size

    def release(self) -> None:
        self.shrink(0)


async def _upload(upload: Upload, attempt: Attempt, slots: asyncio.Semaphore, stop: _Stop) -> None:
    hold = await _Hold.of(upload.store, upload.size)
    try:
        if stop.is_set:
            return
        if upload.waits:
            await _prepare_and_send(upload, attempt, slots, stop, hold)
        else:
            async with slots:
                if not stop.is_set:
                    await _send(upload, await upload.prepare(), attempt, stop)
    except asyncio.CancelledError as exc:
        if stop.is_set:
            raise
        # not by `upload_each`, which would not notice that a task was cancelled
        stop.is_set = True
        raise InvalidSourceError(
            f"column {upload.column!r}: what it was read from was cancelled, or the upload's own "
            "task by somebody else"
        ) from exc
    except BaseException:
        stop.is_set = True
        raise
    finally:
        hold.release()


async def _prepare_and_send(
    upload: Upload, attempt: Attempt, slots: asyncio.Semaphore, stop: _Stop, hold: _Hold
) -> None:
    request = await upload.prepare()
    if isinstance(request, LargeRequest):
        try:
            await _Writing(upload, request, attempt, stop).run(hold)
        finally:
            await request.reader.aclose()
        return
    if isinstance(request, PutRequest):
        hold.shrink(request.payload.size)
    async with slots:
        await _send(upload, request, attempt, stop)


class _Writing:
    """A large object on its way: the next part is read when there is room for it."""

    def __init__(
        self, upload: Upload, request: LargeRequest, attempt: Attempt, stop: _Stop
    ) -> None:
        assert request.write.uri == upload.uri
        self._upload = upload
        self._store = upload.store
        self._write = request.write
        self._reader = request.reader
        self._attempt = attempt
        self._stop = stop
        self._done = 0
        self._holds: set[_Hold] = set()  # a task that is cancelled before it runs gives none back

    async def run(self, hold: _Hold) -> None:
        """Write all parts and complete the object; *hold* is for the first part."""
        attempt = self._attempt
        try:
            async with self._store.open_writer(self._write) as writer:
                if writer.upload_id is not None and self._upload.note_upload is not None:
                    await self._upload.note_upload(writer.upload_id)
                await self._send_parts(writer, hold)
                if self._stop.is_set:  # another one failed meanwhile; this one is aborted
                    return
                writer.finish(self._reader.crc32)
                attempt.seconds = copy_seconds(self._store)
                attempt.begun = attempt.may_land_late = True  # the completion is sent from here on
        except StoreError as exc:
            attempt.may_land_late = attempt.begun and exc.may_have_taken_effect
            raise
        attempt.may_land_late = False

    async def _send_parts(self, writer: ObjectWriter, first: _Hold) -> None:
        known = self._store.capabilities
        room = asyncio.Semaphore(known.parts_at_once)
        next_hold: _Hold | None = first
        try:
            async with asyncio.TaskGroup() as group:
                while not self._stop.is_set:
                    await room.acquire()
                    hold = next_hold or await _Hold.of(self._store, self._reader.next_bytes())
                    part = await self._next_part(hold)
                    if part is None:
                        break  # the first hold of a store that keeps parts is for those under way
                    # where the store keeps parts by itself, the first hold is for all of them
                    next_hold = first if known.parts_held else None
                    if next_hold is None:
                        self._holds.add(hold)
                    group.create_task(
                        self._send_part(writer, part, hold, room),
                        name=f"aioblobcol: part {part.number} of {self._upload.column}",
                    )
                    del part  # or it would be in memory beside those that are paid for
        except BaseExceptionGroup as exc:
            raise exc.exceptions[0]  # noqa: B904 - its own cause says more
        finally:
            for hold in tuple(self._holds):
                hold.release()

    async def _next_part(self, hold: _Hold) -> Part | None:
        part: Part | None = None
        try:
            part = await self._reader.next_part()
        finally:
            if part is None and not self._store.capabilities.parts_held:
                hold.release()
        return part

    async def _send_part(
        self, writer: ObjectWriter, part: Part, hold: _Hold, room: asyncio.Semaphore
    ) -> None:
        try:
            async with self._store.runtime.slots:
                async with asyncio.timeout(put_seconds(self._store, part.size)):
                    await writer.write(part)
        except TimeoutError as exc:
            raise StoreUnavailableError("put", self._write.uri, "no answer in time") from exc
        finally:
            if hold in self._holds:
                self._holds.discard(hold)
                hold.release()
            room.release()
        self._done += part.size
        if self._upload.on_progress is not None:
            self._upload.on_progress(self._done, self._reader.total)


async def _send(upload: Upload, request: Request, attempt: Attempt, stop: _Stop) -> None:
    if isinstance(request, LargeRequest):
        await request.reader.aclose()
        raise InvalidSourceError(
            f"column {upload.column!r}: the source has more than the {upload.size} bytes that it "
            "had when it was checked; it was changed meanwhile"
        )
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
    if upload.on_progress is not None and isinstance(request, PutRequest):
        upload.on_progress(request.payload.size, request.payload.size)


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
