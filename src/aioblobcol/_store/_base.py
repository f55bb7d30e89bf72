"""What an object store does: the protocol, its values, and the life it shares with its requests.

A store makes one request per verb; acts of many requests are built in `_transfer`. Invariants:
a store never deletes outside its own bucket and prefix; `Runtime` owns every task that outlives
a request, and a second delete that is still due when the store closes is made then.
"""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import logging
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from .._sources import Part, Payload
from .._tasks import Background, Budget, run_to_end
from .._uri import root_uri
from ..errors import (
    BlobChangedError,
    CleanUpError,
    ForeignUriError,
    InvalidInputError,
    StoreClosedError,
)

if TYPE_CHECKING:
    from typing import Self

logger = logging.getLogger("aioblobcol.store")

SLOWEST_BYTES_PER_SECOND = 256 * 1024
"""A body may take this long on top of the time limit of its request (a slow uplink, 2 Mbit/s)."""

COPY_SECONDS = 120
"""A copy may take this long on top of the time limit of its request: the server copies 5 GiB (the
most that CopyObject takes) in it at 43 MiB/s. A choice, not a measurement."""

MAX_COPY_BYTES = 5 * 2**30
"""Source: Amazon S3 API Reference, CopyObject (5 GB)."""

READ_CHUNK_BYTES = 256 * 1024

MAX_BYTES_IN_FLIGHT = 256 * 2**20
"""A default: 32 parts, as many as there are slots."""

DESCRIBING_ARGUMENTS: Final = frozenset(
    {
        "CacheControl",
        "ContentDisposition",
        "ContentEncoding",
        "ContentLanguage",
        "ContentType",
        "Expires",
        "Metadata",
    }
)
"""Arguments of ``put_object`` that a copy takes over from its source.

Source: Amazon S3 API Reference, CopyObject (``x-amz-metadata-directive: COPY``).
"""


@dataclasses.dataclass(frozen=True, slots=True)
class PutRequest:
    """One object to be stored; metadata as it stands in the headers, see `encode_metadata`."""

    column: str
    uri: str
    payload: Payload
    metadata: Mapping[str, str]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class WriteRequest:
    """One object that is written part by part; see `Store.open_writer`.

    Attributes:
        column: the column's name.
        uri: the new object.
        metadata: as it stands in the headers, see `encode_metadata`.
        arguments: named as those of ``put_object``; what a multipart upload does not take is
            left out.
        size: in bytes; None if nobody knows it yet.
    """

    column: str
    uri: str
    metadata: Mapping[str, str]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Capabilities:
    """What a store can do beyond what every store does.

    Attributes:
        parts_at_once: how many calls of a writer's ``write`` it takes at the same time; with 1
            the store sends several parts at once by itself, and holds as many as
            ``parts_held``.
        parts_held: how many parts a writer keeps in memory after ``write`` has returned.
        whole_checksum: a large object's CRC32 is sent, and compared by the server.
        metadata: content type and metadata are kept with the object, and `ObjectInfo` has them.
        put_arguments: it takes any argument of ``put_object``; otherwise ``ContentType`` and
            what its documentation names.
        if_match: a read can be tied to the version that another one has seen.
        presigned_get: `presign` works.
        presigned_post: a browser can upload by itself.
        versions: the bucket can keep old versions.
        tags: objects can have tags.
        uploads: incomplete uploads can be listed and aborted.
    """

    parts_at_once: int = 1
    parts_held: int = 0
    whole_checksum: bool = False
    metadata: bool = True
    put_arguments: bool = False
    if_match: bool = False
    presigned_get: bool = False
    presigned_post: bool = False
    versions: bool = False
    tags: bool = False
    uploads: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class IncompleteUpload:
    """Parts of an object that was neither completed nor aborted; they cost storage.

    Attributes:
        uri: what the object would be.
        upload_id: the server's name for the upload.
        started_at: aware, in UTC; None if the server does not say.
    """

    uri: str
    upload_id: str
    started_at: datetime | None = None


class ObjectWriter(Protocol):
    """An object that is being written, inside of the ``async with`` that opened it.

    Nothing is visible before the block is left without an error.
    """

    @property
    def upload_id(self) -> str | None:
        """The server's name for the upload; None where there is none."""

    async def write(self, part: Part) -> None:
        """Send one part; all but the last are of `part_bytes`' size.

        May be called for several parts at once, see `Capabilities.parts_at_once`; their numbers
        tell the order.

        Raises:
            StoreError: it could not be sent; the block has to be left with the error.
        """

    def finish(self, crc32: int) -> None:
        """Say that all parts were written, and what the CRC32 of the whole is.

        A block that is left without it, or before it, aborts the upload.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class CopyRequest:
    """One object to be copied by the server; its bytes do not travel.

    Attributes:
        column: the column's name.
        uri: the new object.
        source_uri: the object that is copied, in this or another bucket of the same server.
        arguments: named as those of ``put_object``, such as ``StorageClass``. What describes the
            content (``ContentType``, ...) and the metadata are the source's, and so are its tags
            unless ``Tagging`` is given.
    """

    column: str
    uri: str
    source_uri: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What HEAD tells of an object; metadata names are in lower case, values decoded.

    Attributes:
        uri: the object.
        size: in bytes.
        metadata: of the user.
        content_type: None if the server does not say.
        modified_at: aware, in UTC; None if the server does not say.
        etag: as it stands in the header, in its quotes; None if the server does not say.
    """

    uri: str
    size: int
    metadata: Mapping[str, str]
    content_type: str | None = None
    modified_at: datetime | None = None
    etag: str | None = None


class ByteRange(NamedTuple):
    """Bytes of an object, from ``start`` up to and without ``stop``; ``stop`` None: to its end."""

    start: int
    stop: int | None = None


class ListedObject(NamedTuple):
    """What a listing tells of an object: its URI, its size in bytes, and when it was stored.

    The time is aware, in UTC; None unless it was asked for.
    """

    uri: str
    size: int
    modified_at: datetime | None = None


class RunningChecksum(Protocol):
    """A checksum over what was read of an object so far, and what it has to become."""

    def update(self, chunk: bytes, /) -> None:
        """Take the next bytes in: those that another request brought."""

    def is_right(self) -> bool:
        """Tell, once the whole object was read, whether it is what the server knows."""


class ObjectReader:
    """An object that is being read, inside of the ``async with`` that opened it.

    Iterates over its bytes once, in chunks of 256 KiB at most. Its store makes it, and closes it
    on every way out of the block.

    Attributes:
        info: what the answer's headers tell of the object.
        took_part: False if the server does not read parts: it sends the whole object, of which
            the part is cut out on this side.
        checksum: what the store itself compares when the whole object was read, and who reads on
            by another request goes on with; None if it compares nothing.
    """

    def __init__(
        self,
        info: ObjectInfo,
        read_chunk: Callable[[int], Awaitable[bytes]],
        *,
        took_part: bool = True,
        checksum: RunningChecksum | None = None,
    ) -> None:
        self.info = info
        self.took_part = took_part
        self.checksum = checksum
        self._read_chunk: Callable[[int], Awaitable[bytes]] | None = read_chunk

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._read_chunk is None:
            raise StoreClosedError(
                f"cannot get {self.info.uri}: read it inside of the `async with` that opened it"
            )
        chunk = await self._read_chunk(READ_CHUNK_BYTES)
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def read(self) -> bytes:
        """Read what is left; ``b""`` at the end.

        Raises:
            StoreError: the object could not be read to its end.
            StoreClosedError: the block that opened it was left.
        """
        return b"".join([chunk async for chunk in self])

    def close(self) -> None:
        """Refuse what is read from now on; the store calls it."""
        self._read_chunk = None


@dataclasses.dataclass(frozen=True, slots=True)
class DeleteReport:
    """What became of a clean-up.

    Attributes:
        deleted: URIs that are gone (also those that were gone before).
        failed: URI to reason. These objects are still there, or may be.
        kept: URI to reason. Left alone on purpose: not under this store's prefix, or shared.
    """

    deleted: tuple[str, ...] = ()
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def raise_for_failures(self) -> None:
        """Raise `CleanUpError` if something could not be deleted.

        Raises:
            CleanUpError: with ``failed``; the other objects are gone.
        """
        if self.failed:
            raise CleanUpError(self.failed)

    def merged_with(self, other: DeleteReport) -> DeleteReport:
        """Return one report of two clean-ups."""
        return DeleteReport(
            deleted=(*self.deleted, *other.deleted),
            failed={**self.failed, **other.failed},
            kept={**self.kept, **other.kept},
        )


class Store(Protocol):
    """Where the bytes live. `S3Store` is the reference, `MemoryStore` the one for unit tests."""

    @property
    def bucket(self) -> str:
        """The bucket's name."""

    @property
    def prefix(self) -> str:
        """The prefix of every key, without slashes at its ends; ``""`` for the whole bucket."""

    @property
    def request_seconds(self) -> float:
        """How long one request may take, its retries included and its body apart."""

    @property
    def runtime(self) -> Runtime:
        """What lives while the store is open.

        Raises:
            StoreClosedError: it is not open.
        """

    @property
    def capabilities(self) -> Capabilities:
        """What it can do beyond the verbs that every store has."""

    def check_put(self, request: PutRequest) -> None:
        """Refuse what ``put`` would refuse, before anything is sent.

        Raises:
            InvalidPutArgumentsError: the arguments or the metadata are unusable.
        """

    async def put(self, request: PutRequest) -> bool:
        """Store one object; tell whether the first attempt was answered (no retry was needed).

        Raises:
            StoreError: ``may_have_taken_effect`` tells whether the object may be there.
        """

    def open_writer(self, request: WriteRequest) -> AbstractAsyncContextManager[ObjectWriter]:
        """Write one object part by part: completed on leaving the block, aborted on an error.

        An abort is carried out although the caller is cancelled meanwhile, and so is a
        completion that was sent; both are bounded in time here, `ObjectWriter.write` by its
        caller. What the abort itself fails with is logged.

        Raises:
            StoreError: on entering, or on leaving; ``may_have_taken_effect`` tells whether the
                object may be there.
        """

    async def copy(self, request: CopyRequest) -> bool:
        """Copy one object inside of the server; tell whether the first attempt was answered.

        Raises:
            BlobNotFoundError: the source is missing (the error names it), or the bucket.
            StoreError: about the new object; ``may_have_taken_effect`` tells whether it may be
                there.
        """

    async def get(self, uri: str) -> bytes:
        """Read one object.

        Raises:
            BlobNotFoundError: it is not there.
            StoreError: it could not be read.
        """

    def open(
        self, uri: str, *, part: ByteRange | None = None, etag: str | None = None
    ) -> AbstractAsyncContextManager[ObjectReader]:
        """Read one object, or a part of it, chunk by chunk; leaving the block ends the request.

        Args:
            uri: the object.
            part: which bytes; all by default, none beyond the object's end. The reader's
                ``info.size`` is the whole object's.
            etag: read it only if it is still this version (`ObjectInfo.etag`), where the store
                has ``capabilities.if_match``.

        A part that begins at the object's end, or beyond it, has no bytes.

        Raises:
            InvalidInputError: no range; nothing was sent.
            BlobNotFoundError: it is not there; raised on entering.
            BlobChangedError: it is another version than *etag*; raised on entering.
            BlobCorruptedError: the whole was read, and its checksum is not the server's.
            StoreError: it could not be read; also while its chunks are read.
        """

    async def head(self, uri: str) -> ObjectInfo:
        """Describe one object, with the same errors as ``get``."""

    async def presign(
        self, uri: str, *, expires_in: timedelta, download_as: str | None = None
    ) -> str:
        """Return a URL with which anybody can GET the object, a secret therefore.

        Raises:
            InvalidInputError: ``expires_in`` is not from 1 second to 7 days.
        """

    async def delete_many(self, uris: Sequence[str]) -> DeleteReport:
        """Delete objects; failures are in the report. ``uris`` were checked by `owned_uris`."""

    def iter_uploads(self) -> AsyncGenerator[IncompleteUpload, None]:
        """List what was neither completed nor aborted under the prefix.

        Nothing where ``capabilities.uploads`` is False.

        Raises:
            StoreError: the listing could not be read to its end.
        """

    async def abort_upload(self, upload: IncompleteUpload) -> None:
        """Abort an incomplete upload, so that it cannot be completed any more.

        One that is gone, because it was completed or aborted, is no error. Does nothing where
        ``capabilities.uploads`` is False.

        Raises:
            StoreError: it may be there still.
        """

    def iter_uris(self) -> AsyncIterator[str]:
        """List every object under the prefix."""

    def iter_objects(
        self, *, start_after: str = "", with_times: bool = False
    ) -> AsyncGenerator[ListedObject, None]:
        """List the objects under the prefix in the order of the bytes of their URIs.

        Args:
            start_after: a URI under the prefix, whether it is there or not: only what comes
                after it is listed.
            with_times: tell when they were stored, which makes a listing slower.

        Raises:
            StoreError: the listing could not be read to its end.
        """


def is_owned(store: Store, uri: str) -> bool:
    """Tell whether *uri* lies under the store's own bucket and prefix."""
    root = root_uri(store.bucket, store.prefix)
    if not uri.startswith(root):
        return False
    # S3 takes "prefix/../other" as it stands, a proxy on the way may not
    return not {"", ".", ".."}.intersection(uri.removeprefix(root).split("/"))


def check_part(part: ByteRange) -> None:
    """Refuse a range that no object has.

    Raises:
        InvalidInputError: it is; nothing was sent.
    """
    for bound in part:
        if bound is not None and (not isinstance(bound, int) or bound < 0):
            raise InvalidInputError(f"a range of bytes has whole numbers from 0 on, not {bound!r}")
    if part.start is None or (part.stop is not None and part.stop < part.start):
        raise InvalidInputError(f"a range of bytes that ends before it starts: {part}")


def unchanged(info: ObjectInfo, etag: str | None) -> ObjectInfo:
    """Return *info* if it is of the version that was asked for, as far as anybody knows.

    Raises:
        BlobChangedError: it is of another one.
    """
    if etag is not None and info.etag is not None and info.etag != etag:
        raise BlobChangedError("get", info.uri, f"it is {info.etag}, not {etag}")
    return info


async def no_bytes(_size: int) -> bytes:
    """Read a chunk of an object, or a part, that has no bytes."""
    return b""


def named_stores(given: Store | Mapping[str, Store]) -> dict[str, Store]:
    """Return stores by their names; one without a name is ``default``.

    Raises:
        InvalidInputError: none at all, something that is none, or two of them that would take
            each other's objects for their own.
    """
    named = dict(given) if isinstance(given, Mapping) else {"default": given}
    if not named or not all(hasattr(store, "delete_many") for store in named.values()):
        raise InvalidInputError(f"a store, or a dict of stores, is needed, not {given!r}")
    for one, other in itertools.permutations(named.values(), 2):
        inner, outer = (root_uri(each.bucket, each.prefix) for each in (one, other))
        if one is not other and inner.startswith(outer):
            raise InvalidInputError(
                f"two stores own {inner}: their URIs could not be told apart. Give each a bucket, "
                "or a prefix that is not inside of the other's; or one store object two names"
            )
    return named


def owned_uris(store: Store, uris: Collection[str]) -> list[str]:
    """Return *uris* without repetitions.

    Raises:
        ForeignUriError: one lies outside; nothing was sent.
    """
    foreign = [uri for uri in uris if not is_owned(store, uri)]
    if foreign:
        raise ForeignUriError(
            f"not under {root_uri(store.bucket, store.prefix)}, so never deleted through this "
            f"store: {', '.join(foreign)}"
        )
    return list(dict.fromkeys(uris))


def put_seconds(store: Store, size: int) -> float:
    """Return how long one PUT may take with its body of *size* bytes."""
    return store.request_seconds + size / SLOWEST_BYTES_PER_SECOND


def copy_seconds(store: Store) -> float:
    """Return how long one copy may take."""
    return store.request_seconds + COPY_SECONDS


class Runtime:
    """What lives while a store is open: its slots, its background work, its second deletes.

    Bound to the event loop in which it was made.

    Attributes:
        slots: one for each request with a body that is on the wire.
        budget: the bytes that uploads hold in memory.
        background: work that outlives the request that asked for it.
    """

    def __init__(
        self,
        delete: Callable[[Sequence[str]], Awaitable[DeleteReport]],
        *,
        max_concurrency: int,
        request_seconds: float,
        max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
    ) -> None:
        self.slots = asyncio.Semaphore(max_concurrency)
        self.budget = Budget(max_bytes_in_flight)
        self.background = Background(limit=4 * max_concurrency)
        self._delete = delete
        self._request_seconds = request_seconds
        self._due: list[tuple[float, int, str]] = []
        self._number = itertools.count()
        self._wake = asyncio.Event()
        self._closing = False
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def second_deletes(self) -> tuple[str, ...]:
        """URIs that will be deleted once more, because their upload was never answered."""
        return tuple(uri for _, _, uri in self._due)

    def delete_again(self, uri: str, *, after_seconds: float) -> None:
        """Delete *uri* once more after *after_seconds*: its lost PUT may take effect until then."""
        heapq.heappush(self._due, (time.monotonic() + after_seconds, next(self._number), uri))
        self._wake.set()
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep(), name="aioblobcol: second deletes")

    async def close(self, *, drain_seconds: float) -> None:
        """Finish what is under way; wait *drain_seconds* at most for second deletes to fall due.

        Those that are not due by then are made at once.
        """
        interrupted: asyncio.CancelledError | None = None
        try:
            await self.background.drain()
        except asyncio.CancelledError as exc:
            interrupted = exc
        try:
            await run_to_end(
                self._finish_sweeping(drain_seconds),
                seconds=drain_seconds + 3 * self._request_seconds,
            )
        except TimeoutError:
            logger.error("given up at closing, orphans perhaps: %s", ", ".join(self.second_deletes))
        await self.background.drain()  # what was submitted meanwhile
        if interrupted is not None:
            raise interrupted

    async def _finish_sweeping(self, drain_seconds: float) -> None:
        sweeper = self._sweeper
        if sweeper is None or sweeper.done():
            return
        await asyncio.wait({sweeper}, timeout=drain_seconds)
        self._closing = True
        self._wake.set()
        await sweeper

    async def _sweep(self) -> None:
        while self._due:
            now = time.monotonic()
            due = []
            while self._due and (self._closing or self._due[0][0] <= now):
                due.append(heapq.heappop(self._due)[2])
            if due:
                await self._delete_now(due)
                continue
            self._wake.clear()
            try:
                async with asyncio.timeout(self._due[0][0] - now):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _delete_now(self, uris: list[str]) -> None:
        try:
            async with asyncio.timeout(self._request_seconds):
                report = await self._delete(uris)
            failed = dict(report.failed)
        except Exception as exc:  # any: the loop must go on with the others
            failed = dict.fromkeys(uris, f"{type(exc).__name__}: {exc}")
        for uri, reason in failed.items():
            logger.error("second delete of %s failed: %s", uri, reason, extra={"uri": uri})
