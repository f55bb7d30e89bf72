"""What stores with clients of their own share: where they are, their limits, their life.

Invariant: the runtime is there exactly while the store is open.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TYPE_CHECKING

from .._sources import PART_BYTES
from .._uri import check_bucket, normalize_s3_prefix
from ..errors import InvalidInputError, StoreClosedError
from ._base import MAX_BYTES_IN_FLIGHT, DeleteReport, ListedObject, Runtime

if TYPE_CHECKING:
    from types import TracebackType


class StoreLife:
    """A store that somebody opens and closes; not the verbs that it has."""

    def __init__(
        self,
        *,
        bucket: str,
        prefix: str,
        max_concurrency: int,
        request_seconds: float,
        drain_seconds: float,
        max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
    ) -> None:
        self._bucket = check_bucket(bucket)
        self._prefix = normalize_s3_prefix(prefix)
        self._max_concurrency = max_concurrency
        self._request_seconds = request_seconds
        self._drain_seconds = drain_seconds
        self._max_bytes_in_flight = max_bytes_in_flight
        self._runtime: Runtime | None = None

    @property
    def bucket(self) -> str:
        """The bucket's name, as it stands in the URIs."""
        return self._bucket

    @property
    def prefix(self) -> str:
        """The prefix, without slashes at its ends."""
        return self._prefix

    @property
    def request_seconds(self) -> float:
        """How long one request may take, its retries included and its body apart."""
        return self._request_seconds

    @property
    def runtime(self) -> Runtime:
        """What lives while the store is open.

        Raises:
            StoreClosedError: it is not open.
        """
        if self._runtime is None:
            raise StoreClosedError(
                f"{self!r}: enter it first, `async with store:` around the application's life"
            )
        return self._runtime

    async def iter_uris(self) -> AsyncIterator[str]:
        """List every object under the prefix, in the order of the keys' bytes."""
        async with contextlib.aclosing(self.iter_objects()) as listed:
            async for each in listed:
                yield each.uri

    def iter_objects(
        self, *, start_after: str = "", with_times: bool = False
    ) -> AsyncGenerator[ListedObject, None]:
        """List the objects; the store does."""
        raise NotImplementedError

    async def delete_many(self, uris: Sequence[str]) -> DeleteReport:
        """Delete objects; the store does."""
        raise NotImplementedError

    def _start(self) -> None:
        """Begin its life: the clients are there."""
        self._runtime = Runtime(
            self.delete_many,
            max_concurrency=self._max_concurrency,
            request_seconds=self._request_seconds,
            max_bytes_in_flight=self._max_bytes_in_flight,
        )


class Translating:
    """Turn what a client raises inside of the block into our error about *uri*, chained.

    A class, for it is on the path of every request, where a generator costs three times as much.
    """

    __slots__ = ("_operation", "_uri")

    def __init__(self, operation: str, uri: str) -> None:
        self._operation = operation
        self._uri = uri

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        translated = None if exc is None else self._translated(exc)
        if translated is not None:
            raise translated from exc

    def _translated(self, exc: BaseException) -> Exception | None:
        """Return our error for *exc*; None if it is to go on as it is."""
        raise NotImplementedError


def check_limits(
    *, max_concurrency: int, max_bytes_in_flight: int, request_seconds: float, drain_seconds: float
) -> None:
    """Refuse limits with which nothing could be sent.

    Raises:
        InvalidInputError: one is not positive, or less than one part.
    """
    if max_bytes_in_flight < PART_BYTES:
        raise InvalidInputError(f"max_bytes_in_flight is one part at least, {PART_BYTES} bytes")
    if max_concurrency < 1 or request_seconds <= 0 or drain_seconds < 0:
        raise InvalidInputError("max_concurrency and request_seconds are positive")
