"""Large objects through obstore: its writer, and its stream in chunks of our size.

Invariants: a writer that was not completed is aborted before its caller is left; obstore is handed
bytes, never an iterator; what it holds of a part it lets go of before the writer is left.

What its writer does, and this file relies on: it buffers up to one chunk, sends that by one PUT if
nothing more comes, and else begins a multipart upload (of a file: writes beside it and renames at
the end); it sends several chunks at once, waits where too many are under way, and raises a part's
error at a later call. Leaving it with an error aborts, dropping it does not.

Source: developmentseed/obstore, obstore/src/buffered.rs; apache/arrow-rs-object-store,
src/buffered.rs and src/upload.rs.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

import obstore

from .._sources import PART_BYTES
from .._tasks import run_to_end
from ..errors import InvalidInputError, StoreError
from ._base import COPY_SECONDS, SLOWEST_BYTES_PER_SECOND
from ._obstore_errors import translating

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator, Mapping, Sequence

    from .._sources import Part

logger = logging.getLogger("aioblobcol.store")

PARTS_HELD: Final = 4
MAX_PARTS: Final = 10_000
"""Source: Amazon S3 User Guide, "Amazon S3 multipart upload limits"."""

STREAM_BYTES: Final = 2**20
"""What is fetched from obstore's threads at a time: smaller pieces cost more hops than bytes."""

STALLED_SECONDS: Final = 60
SMALL_PIECE_BYTES: Final = 256 * 1024


class ObstoreWriter:
    """An object that is being written through obstore's writer."""

    def __init__(
        self,
        client: Any,
        uri: str,
        key: str,
        *,
        attributes: Mapping[str, str] | None,
        size: int | None,
        has_part_limit: bool,
        request_seconds: float,
    ) -> None:
        self._uri = uri
        self._chunk_bytes = _chunk_bytes(size)
        self._has_part_limit = has_part_limit
        self._request_seconds = request_seconds
        self._sent = 0
        self._next = 1
        self.is_finished = False
        with translating("put", uri):
            self._file = obstore.open_writer_async(
                client,
                key,
                attributes=attributes,  # type: ignore[arg-type]  # a TypedDict with any keys
                buffer_size=self._chunk_bytes,
                max_concurrency=PARTS_HELD,
            )

    @property
    def upload_id(self) -> None:
        """There is one, perhaps, but obstore does not tell it."""
        return

    async def write(self, part: Part) -> None:
        """Hand one part over; returns once fewer than four are on the wire.

        Raises:
            InvalidInputError: the parts do not come one after another, in their order.
            StoreError: this or an earlier part could not be sent.
        """
        if part.number != self._next:
            raise InvalidInputError(
                f"part {part.number} of {self._uri} came where {self._next} was due: this store "
                "takes them in order, one at a time (`capabilities.parts_at_once`)"
            )
        self._next += 1
        before, self._sent = self._sent, self._sent + part.size
        if self._has_part_limit and self._sent > MAX_PARTS * self._chunk_bytes:
            raise StoreError(
                "put",
                self._uri,
                f"more than {MAX_PARTS} parts of {self._chunk_bytes} bytes; say its size "
                "beforehand, for larger parts",
            )
        if before < self._chunk_bytes <= self._sent:
            # The upload begins now. One that was begun without us knowing could not be aborted.
            with translating("put", self._uri):
                await run_to_end(self._hand_over(part), seconds=self._request_seconds)
            return
        with translating("put", self._uri):
            await self._hand_over(part)

    def finish(self, crc32: int) -> None:  # noqa: ARG002 - obstore has no place for it
        """Say that all parts were written."""
        self.is_finished = True

    async def complete(self) -> None:
        """Make the object visible, although the caller is cancelled meanwhile.

        Raises:
            StoreError: the upload was aborted, or the answer is not known.
        """
        held = PARTS_HELD * self._chunk_bytes
        seconds = self._request_seconds + held / SLOWEST_BYTES_PER_SECOND + COPY_SECONDS
        try:
            with translating("put", self._uri):
                await run_to_end(_awaited(self._file.close()), seconds=seconds)
        except StoreError as exc:
            # obstore aborts after a failure, and tells of the abort's own in its place
            exc.may_have_taken_effect |= self._sent >= self._chunk_bytes
            raise

    async def abort(self) -> None:
        """Give up what was sent, although the caller is cancelled; trouble is logged.

        Raises:
            asyncio.CancelledError: after it was carried out.
        """
        error = asyncio.CancelledError()  # any: with one, obstore's writer aborts
        try:
            await run_to_end(
                _awaited(self._file.__aexit__(type(error), error, None)),
                seconds=self._request_seconds,
            )
        except Exception as exc:  # must not hide why it was given up
            logger.error(
                "cannot abort the upload of %s, its parts stay until a lifecycle rule removes "
                "them: %s",
                self._uri,
                str(exc).partition("\n")[0] or type(exc).__name__,
                extra={"uri": self._uri},
            )

    async def _hand_over(self, part: Part) -> None:
        for piece in _pieces(part.pieces):
            await self._file.write(piece)


class Chunks:
    """obstore's stream, in chunks of the size that is asked for."""

    def __init__(self, uri: str, stream: Any) -> None:
        self._uri = uri
        self._stream: Any = stream
        self._left = memoryview(b"")

    async def read(self, size: int) -> bytes:
        """Return *size* bytes at most, ``b""`` at the end."""
        if not self._left and self._stream is not None:
            with translating("get", self._uri):
                async with asyncio.timeout(STALLED_SECONDS):
                    try:
                        self._left = memoryview(await anext(self._stream))
                    except StopAsyncIteration:
                        self._stream = None
        chunk, self._left = bytes(self._left[:size]), self._left[size:]
        return chunk

    def close(self) -> None:
        """Let go of the stream, and of its connection with it."""
        self._stream, self._left = None, memoryview(b"")


def _chunk_bytes(size: int | None) -> int:
    """Return how large parts are; of an unknown size, such that it may have 78 GiB."""
    mebibytes = -(-(size or 0) // (MAX_PARTS * 2**20))
    return max(PART_BYTES, mebibytes * 2**20)


def _pieces(pieces: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Join what is small: each piece costs a hop to obstore's threads."""
    small: list[bytes | memoryview] = []
    held = 0
    for piece in pieces:
        if len(piece) >= SMALL_PIECE_BYTES and not small:
            yield piece
            continue
        small.append(piece)
        held += len(piece)
        if held >= STREAM_BYTES:
            yield b"".join(small)
            small, held = [], 0
    if small:
        yield b"".join(small)


async def _awaited(work: Awaitable[Any]) -> None:
    """Make a coroutine of obstore's futures."""
    await work
