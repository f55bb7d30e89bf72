"""An object store in memory that is as unreliable as you ask it to be.

It behaves like the worst server that the design allows for: a PUT or a copy that is cancelled,
or whose answer is lost, may still take effect later (``land_late``).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import uuid
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlencode

from .._store._base import (
    DESCRIBING_ARGUMENTS,
    MAX_BYTES_IN_FLIGHT,
    ByteRange,
    Capabilities,
    CopyRequest,
    DeleteReport,
    IncompleteUpload,
    ListedObject,
    ObjectInfo,
    ObjectReader,
    PutRequest,
    Runtime,
    WriteRequest,
    check_part,
    is_owned,
    owned_uris,
)
from .._store._metadata import decode_metadata
from .._store._presign import content_disposition, expiry_seconds
from .._tasks import run_to_end
from .._uri import check_bucket, normalize_s3_prefix, root_uri
from ..errors import (
    BlobChangedError,
    BlobNotFoundError,
    InvalidPutArgumentsError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from .._sources import Part

Operation = Literal[
    "put", "copy", "create", "write", "complete", "abort", "get", "head", "presign", "delete"
]
Stage = Literal["before", "during", "after"]


_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A moment of one request: ``before`` it takes effect, or ``after``, with no answer yet.

    Large objects are written by ``create``, ``write`` (each part) and ``complete`` or ``abort``.
    A copy's ``uri`` is the new object's. Of an object that is read chunk by chunk, ``after`` comes
    when its last chunk was read.
    A copy's ``uri`` is the new object's. Of an object that is read chunk by chunk, ``during``
    comes between any two of its chunks, and ``after`` when its last one was read.
    """

    operation: Operation
    stage: Stage
    uri: str


@dataclasses.dataclass(frozen=True, slots=True)
class StoredObject:
    """What the store holds of one object; metadata as it was sent.

    Each one has an ETag of its own, also where its bytes are those of another one.
    """

    body: bytes
    metadata: Mapping[str, str]
    arguments: Mapping[str, Any]
    modified_at: datetime = dataclasses.field(
        default_factory=lambda: datetime.now(timezone.utc), compare=False
    )
    etag: str = dataclasses.field(default_factory=lambda: f'"{next(_numbers):032x}"', compare=False)


@dataclasses.dataclass(slots=True)
class Gate:
    """A place where requests wait until the test opens it."""

    reached: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    opened: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def open(self) -> None:
        """Let everybody pass, also those who come later."""
        self.opened.set()


Hook = Callable[[Step], Awaitable[None] | None]


class MemoryStore:
    """A `Store` in memory with fault hooks; opens no socket.

    Attributes:
        objects: URI to `StoredObject`. They outlive closing, so that tests can look.
        calls: every request in order, as ``(operation, uris)``.
        hooks: called at every `Step`, in order; one that raises makes the request fail there.
        refuses: URI to reason; their deletes fail.
        uploads: upload id to URI of what was neither completed nor aborted.
    """

    capabilities = Capabilities(
        parts_at_once=4,
        whole_checksum=True,
        put_arguments=True,
        if_match=True,
        uploads=True,
    )

    def __init__(
        self,
        *,
        bucket: str = "bucket",
        prefix: str = "prefix",
        max_concurrency: int = 32,
        request_seconds: float = 5,
        drain_seconds: float = 0,
        max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
    ) -> None:
        self.bucket = check_bucket(bucket)
        self.prefix = normalize_s3_prefix(prefix)
        self.request_seconds = request_seconds
        self.objects: dict[str, StoredObject] = {}
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        self.hooks: list[Hook] = []
        self.refuses: dict[str, str] = {}
        self.uploads: dict[str, str] = {}
        self._late: list[tuple[str, StoredObject]] = []
        self._max_concurrency = max_concurrency
        self._max_bytes_in_flight = max_bytes_in_flight
        self._drain_seconds = drain_seconds
        self._runtime: Runtime | None = None

    def __repr__(self) -> str:
        return f"<MemoryStore {root_uri(self.bucket, self.prefix)} ({len(self.objects)} objects)>"

    async def __aenter__(self) -> Self:
        if self._runtime is not None:
            raise StoreClosedError(f"{self!r} is entered already")
        self._runtime = Runtime(
            self.delete_many,
            max_concurrency=self._max_concurrency,
            request_seconds=self.request_seconds,
            max_bytes_in_flight=self._max_bytes_in_flight,
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        runtime = self.runtime
        try:
            await runtime.close(drain_seconds=self._drain_seconds)
        finally:
            self._runtime = None

    @property
    def runtime(self) -> Runtime:
        """What lives while the store is open.

        Raises:
            StoreClosedError: it is not open.
        """
        if self._runtime is None:
            raise StoreClosedError(f"{self!r}: enter it first, `async with store:`")
        return self._runtime

    # --- faults

    def fail(
        self,
        operation: Operation,
        *,
        stage: Stage = "before",
        containing: str = "",
        times: int | None = None,
        error: Callable[[str, str], Exception] | None = None,
    ) -> None:
        """Make requests fail.

        Args:
            operation: which ones.
            stage: ``before`` they take effect, ``during`` a reading (the connection is lost
                between two chunks), or ``after`` (the answer is lost).
            containing: only URIs with this text.
            times: how often; always by default.
            error: makes the error from operation and URI. By default a definite refusal
                ``before``, and an unanswered request else.
        """
        left = [times]

        def hook(step: Step) -> None:
            if step.operation != operation or step.stage != stage or containing not in step.uri:
                return
            if left[0] is not None:
                if left[0] == 0:
                    return
                left[0] -= 1
            if error is not None:
                raise error(operation, step.uri)
            if stage == "during":
                raise StoreUnavailableError(operation, step.uri, "it broke off (injected)")
            if stage == "after":
                raise StoreUnavailableError(operation, step.uri, "the answer was lost (injected)")
            raise StoreError(operation, step.uri, "InvalidRequest (injected)")

        self.hooks.append(hook)

    def hold(self, operation: Operation, *, stage: Stage = "before", containing: str = "") -> Gate:
        """Make requests wait at a step until the returned gate is opened."""
        gate = Gate()

        async def hook(step: Step) -> None:
            if step.operation == operation and step.stage == stage and containing in step.uri:
                gate.reached.set()
                await gate.opened.wait()

        self.hooks.append(hook)
        return gate

    def land_late(self) -> list[str]:
        """Let all that was cancelled or unanswered take effect now, and return the URIs.

        PUTs and copies; a copy has the bytes that its source held when it was asked for.
        """
        landed = [uri for uri, _ in self._late]
        self.objects.update(self._late)
        self._late.clear()
        return landed

    # --- the protocol

    def check_put(self, request: PutRequest) -> None:
        """Refuse what the library owns."""
        owned = {"Bucket", "Key", "Body"}.intersection(request.arguments)
        if owned:
            raise InvalidPutArgumentsError(f"{', '.join(sorted(owned))} is set by the library")

    async def put(self, request: PutRequest) -> bool:
        """Store one object."""
        self._note("put", [request.uri])
        stored = StoredObject(request.payload.body, dict(request.metadata), dict(request.arguments))
        return await self._store("put", request.uri, stored)

    @contextlib.asynccontextmanager
    async def open_writer(self, request: WriteRequest) -> AsyncIterator[MemoryWriter]:
        """Write one object part by part."""
        self._note("create", [request.uri])
        await self._step("create", "before", request.uri)
        writer = MemoryWriter(self, request)
        self.uploads[writer.upload_id] = request.uri
        try:
            await self._step("create", "after", request.uri)
            yield writer
            crc32 = writer.crc32
            if crc32 is not None:
                await self._complete(writer, crc32)
        finally:  # of a completed one there is nothing to abort
            if writer.upload_id in self.uploads:
                await run_to_end(self._abort(writer), seconds=self.request_seconds)

    async def iter_uploads(self) -> AsyncGenerator[IncompleteUpload, None]:
        """List what was neither completed nor aborted."""
        self.runtime  # noqa: B018 - raises when closed
        for upload_id, uri in list(self.uploads.items()):
            if is_owned(self, uri):
                yield IncompleteUpload(uri, upload_id)

    async def abort_upload(self, upload: IncompleteUpload) -> None:
        """Abort an incomplete upload."""
        self._note("abort", [upload.uri])
        await self._step("abort", "before", upload.uri)
        self.uploads.pop(upload.upload_id, None)
        await self._step("abort", "after", upload.uri)

    async def copy(self, request: CopyRequest) -> bool:
        """Copy one object, as it is at this moment; see `Store.copy` for what it takes over."""
        self._note("copy", [request.uri])
        source = self.objects.get(request.source_uri)
        if source is None:
            await self._step("copy", "before", request.uri)
            raise BlobNotFoundError("copy", request.source_uri, "NoSuchKey")
        stored = StoredObject(source.body, source.metadata, _copied_arguments(source, request))
        return await self._store("copy", request.uri, stored)

    async def get(self, uri: str) -> bytes:
        """Read one object."""
        self._note("get", [uri])
        await self._step("get", "before", uri)
        stored = self._found("get", uri)
        await self._step("get", "after", uri)
        return stored.body

    @contextlib.asynccontextmanager
    async def open(
        self, uri: str, *, part: ByteRange | None = None, etag: str | None = None
    ) -> AsyncIterator[ObjectReader]:
        """Read one object, or a part of it, chunk by chunk, as it is at this moment."""
        if part is not None:
            check_part(part)
        start, stop = part or ByteRange(0)
        self._note("get", [uri])
        await self._step("get", "before", uri)
        stored = self._found("get", uri)
        if etag is not None and etag != stored.etag:
            raise BlobChangedError("get", uri, f"it is {stored.etag}, not {etag}")
        position, end = start, len(stored.body) if stop is None else min(stop, len(stored.body))

        async def read_chunk(size: int) -> bytes:
            nonlocal position
            if start < position < end:
                await self._step("get", "during", uri)
            chunk = stored.body[position : min(position + size, end)]
            position += len(chunk)
            if not chunk:
                await self._step("get", "after", uri)
            return chunk

        reader = ObjectReader(_info(uri, stored), read_chunk)
        try:
            yield reader
        finally:
            reader.close()

    async def head(self, uri: str) -> ObjectInfo:
        """Describe one object."""
        self._note("head", [uri])
        await self._step("head", "before", uri)
        stored = self._found("head", uri)
        await self._step("head", "after", uri)
        return _info(uri, stored)

    async def presign(
        self, uri: str, *, expires_in: timedelta, download_as: str | None = None
    ) -> str:
        """Return ``memory://...`` with the same arguments. Nothing answers under such a URL."""
        seconds = expiry_seconds(expires_in)
        query = {"expires_in": str(seconds)}
        if download_as is not None:
            query["response-content-disposition"] = content_disposition(download_as)
        self._note("presign", [uri])
        await self._step("presign", "before", uri)
        await self._step("presign", "after", uri)
        return f"memory://{quote(uri.removeprefix('s3://'))}?{urlencode(query)}"

    async def delete_many(self, uris: Sequence[str]) -> DeleteReport:
        """Delete objects; what ``refuses`` names, or a hook fails, is reported."""
        mine = owned_uris(self, uris)
        self._note("delete", mine)
        deleted: list[str] = []
        failed: dict[str, str] = {}
        for uri in mine:
            try:
                await self._step("delete", "before", uri)
                if uri in self.refuses:
                    failed[uri] = self.refuses[uri]
                    continue
                self.objects.pop(uri, None)
                await self._step("delete", "after", uri)
            except StoreError as exc:
                failed[uri] = exc.code
            else:
                deleted.append(uri)
        return DeleteReport(tuple(deleted), failed)

    async def iter_uris(self) -> AsyncIterator[str]:
        """List every object under the prefix, in the order of the keys' bytes."""
        async for each in self.iter_objects():
            yield each.uri

    async def iter_objects(
        self, *, start_after: str = "", with_times: bool = False
    ) -> AsyncGenerator[ListedObject, None]:
        """List the objects under the prefix that come after a URI, as they are at this moment."""
        self.runtime  # noqa: B018 - raises when closed
        found = dict(self.objects)
        for uri in sorted(found, key=str.encode):
            if uri > start_after and is_owned(self, uri):
                at = found[uri].modified_at if with_times else None
                yield ListedObject(uri, len(found[uri].body), at)

    async def _store(
        self,
        operation: Literal["put", "copy", "complete"],
        uri: str,
        stored: StoredObject,
        *,
        upload_id: str | None = None,
    ) -> bool:
        try:
            await self._step(operation, "before", uri)
        except StoreError as exc:
            if exc.may_have_taken_effect:
                self._late.append((uri, stored))
            raise
        except asyncio.CancelledError:
            self._late.append((uri, stored))  # the request is on its way
            raise
        if upload_id is not None and upload_id not in self.uploads:  # aborted meanwhile
            raise BlobNotFoundError("put", uri, "NoSuchUpload")
        self.objects[uri] = stored
        await self._step(operation, "after", uri)
        return True

    async def _complete(self, writer: MemoryWriter, crc32: int) -> None:
        request = writer.request
        self._note("complete", [request.uri])
        if zlib.crc32(writer.body) != crc32:
            raise StoreError("put", request.uri, "BadDigest")
        stored = StoredObject(writer.body, dict(request.metadata), dict(request.arguments))
        await run_to_end(
            self._store("complete", request.uri, stored, upload_id=writer.upload_id),
            seconds=2 * self.request_seconds,
        )
        self.uploads.pop(writer.upload_id, None)

    async def _abort(self, writer: MemoryWriter) -> None:
        with contextlib.suppress(StoreError):
            await self.abort_upload(IncompleteUpload(writer.request.uri, writer.upload_id))

    def _note(self, operation: str, uris: Sequence[str]) -> None:
        self.runtime  # noqa: B018 - raises when closed
        self.calls.append((operation, tuple(uris)))

    def _found(self, operation: str, uri: str) -> StoredObject:
        try:
            return self.objects[uri]
        except KeyError:
            raise BlobNotFoundError(operation, uri, "NoSuchKey") from None

    async def _step(self, operation: Operation, stage: Stage, uri: str) -> None:
        await asyncio.sleep(0)  # a real request always gives way
        for hook in tuple(self.hooks):
            waiting = hook(Step(operation, stage, uri))
            if waiting is not None:
                await waiting


class MemoryWriter:
    """An object that is being written into a `MemoryStore`.

    Attributes:
        request: what it is to be.
        upload_id: a name for the upload.
        crc32: of the whole, once all parts were written.
    """

    def __init__(self, store: MemoryStore, request: WriteRequest) -> None:
        self.request = request
        self.upload_id = uuid.uuid4().hex
        self.crc32: int | None = None
        self._store = store
        self._parts: dict[int, bytes] = {}

    @property
    def body(self) -> bytes:
        """All parts in their order."""
        return b"".join(self._parts[number] for number in sorted(self._parts))

    async def write(self, part: Part) -> None:
        """Store one part."""
        uri = self.request.uri
        self._store._note("write", [uri])
        await self._store._step("write", "before", uri)
        if self.upload_id not in self._store.uploads:
            raise BlobNotFoundError("put", uri, "NoSuchUpload")
        self._parts[part.number] = b"".join(part.pieces)
        await self._store._step("write", "after", uri)

    def finish(self, crc32: int) -> None:
        """Say that all parts were written."""
        self.crc32 = crc32


def _info(uri: str, stored: StoredObject) -> ObjectInfo:
    return ObjectInfo(
        uri,
        len(stored.body),
        decode_metadata(stored.metadata),
        content_type=stored.arguments.get("ContentType"),
        modified_at=stored.modified_at,
        etag=stored.etag,
    )


def _copied_arguments(source: StoredObject, request: CopyRequest) -> dict[str, Any]:
    taken_over = {*DESCRIBING_ARGUMENTS, "Tagging"}
    return {
        **{name: value for name, value in source.arguments.items() if name in taken_over},
        **{
            name: value
            for name, value in request.arguments.items()
            if name not in DESCRIBING_ARGUMENTS
        },
    }
