"""An object store in memory that is as unreliable as you ask it to be.

It behaves like the worst server that the design allows for: a PUT that is cancelled, or whose
answer is lost, may still take effect later (``land_late``).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .._store._base import DeleteReport, ObjectInfo, PutRequest, Runtime, is_owned, owned_uris
from .._store._metadata import decode_metadata
from .._uri import check_bucket, normalize_s3_prefix, root_uri
from ..errors import (
    BlobNotFoundError,
    InvalidPutArgumentsError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

Operation = Literal["put", "get", "head", "delete"]
Stage = Literal["before", "after"]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A moment of one request: ``before`` it takes effect, or ``after``, with no answer yet."""

    operation: Operation
    stage: Stage
    uri: str


@dataclasses.dataclass(frozen=True, slots=True)
class StoredObject:
    """What the store holds of one object; metadata as it was sent."""

    body: bytes
    metadata: Mapping[str, str]
    arguments: Mapping[str, Any]


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
    """

    def __init__(
        self,
        *,
        bucket: str = "bucket",
        prefix: str = "prefix",
        max_concurrency: int = 32,
        request_seconds: float = 5,
        drain_seconds: float = 0,
    ) -> None:
        self.bucket = check_bucket(bucket)
        self.prefix = normalize_s3_prefix(prefix)
        self.request_seconds = request_seconds
        self.objects: dict[str, StoredObject] = {}
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        self.hooks: list[Hook] = []
        self.refuses: dict[str, str] = {}
        self._late: list[tuple[PutRequest, StoredObject]] = []
        self._max_concurrency = max_concurrency
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
            stage: ``before`` they take effect, or ``after`` (the answer is lost).
            containing: only URIs with this text.
            times: how often; always by default.
            error: makes the error from operation and URI. By default a definite refusal
                ``before``, and an unanswered request ``after``.
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
        """Let every PUT that was cancelled or unanswered take effect now; return their URIs."""
        landed = [request.uri for request, _ in self._late]
        for request, stored in self._late:
            self.objects[request.uri] = stored
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
        try:
            await self._step("put", "before", request.uri)
        except StoreError as exc:
            if exc.may_have_taken_effect:
                self._late.append((request, stored))
            raise
        except asyncio.CancelledError:
            self._late.append((request, stored))  # the bytes are on their way
            raise
        self.objects[request.uri] = stored
        await self._step("put", "after", request.uri)
        return True

    async def get(self, uri: str) -> bytes:
        """Read one object."""
        self._note("get", [uri])
        await self._step("get", "before", uri)
        stored = self._found("get", uri)
        await self._step("get", "after", uri)
        return stored.body

    async def head(self, uri: str) -> ObjectInfo:
        """Describe one object."""
        self._note("head", [uri])
        await self._step("head", "before", uri)
        stored = self._found("head", uri)
        await self._step("head", "after", uri)
        return ObjectInfo(uri, len(stored.body), decode_metadata(stored.metadata))

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
        self.runtime  # noqa: B018 - raises when closed
        for uri in sorted(self.objects, key=str.encode):
            if is_owned(self, uri):
                yield uri

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
