"""Reading as one act of many requests: resumed where a connection broke off, verified at the end.

Invariants: bytes are handed out in order, each once, and of one version of the object, as far as
the store tells versions apart; a cancelled read loses none. No upload slot is held. Nothing is
read ahead of the caller beyond the transport's own buffer, or the parts that were asked for. Every
request and task has ended when its act is left, whichever way. A file appears under its name
whole and verified, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import hashlib
import logging
import os
import re
import threading
import uuid
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from ._sources import HASH_INLINE_BYTES, PART_BYTES
from ._store._base import ByteRange, ObjectReader, check_part
from ._tasks import wait_through
from .errors import (
    BlobChangedError,
    BlobCorruptedError,
    InvalidInputError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Coroutine,
        Iterable,
        Iterator,
        Sequence,
    )
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from ._sources import OnProgress
    from ._store._base import ObjectInfo, RunningChecksum, Store

T = TypeVar("T")

logger = logging.getLogger("aioblobcol.store")

RESUMPTIONS: Final = 3
"""So often in a row a reading is resumed without that a byte came meanwhile. A choice."""

BACK_OFF_SECONDS = 0.2
"""Before the second resumption in a row; twice as long before the third. The first one waits for
nothing: a connection that was dropped says little about the next."""

# PART_BYTES serves here, too: at 90 MB/s for each connection, 8 of them read 6 times faster than
# one with parts of this size (measured); smaller ones wait for more first bytes

WRITE_BYTES = 2**20
"""So much is handed to a thread to be written; a hop costs less than a tenth of writing it."""

_HASH_BYTES = 2**20
_HASH_FILE_BYTES = 16 * 2**20  # for so long a cancellation has to wait, 13 ms
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_WHOLE: Final = ByteRange(0)


def byte_range(start: int, stop: int | None) -> ByteRange | None:
    """Return the range, or None for the whole object.

    Raises:
        InvalidInputError: a negative number, or a stop before the start.
    """
    part = ByteRange(start, stop)
    check_part(part)
    return None if part == _WHOLE else part


async def read_object(
    store: Store,
    uri: str,
    *,
    part: ByteRange | None = None,
    size: int | None = None,
    sha256: str | None = None,
) -> bytes:
    """Return an object's bytes, or a part of them; see `open_object`.

    Raises:
        InvalidInputError, StoreError, StoreClosedError: as `open_object`, and as its reader.
    """
    source = _Pull(store, uri, part or _WHOLE)
    try:
        reading = _Reading(source, await source.open(), size=size, sha256=sha256)
        chunks = []
        while chunk := await reading.chunk():
            chunks.append(chunk)
    finally:
        await source.close()
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


@contextlib.asynccontextmanager
async def open_object(
    store: Store,
    uri: str,
    *,
    part: ByteRange | None = None,
    size: int | None = None,
    sha256: str | None = None,
    on_progress: OnProgress | None = None,
    parts_at_once: int = 1,
    part_bytes: int = PART_BYTES,
) -> AsyncIterator[ObjectReader]:
    """Read an object, or a part of it, chunk by chunk; leaving the block ends its requests.

    A connection that breaks off, or brings no byte for the store's ``request_seconds``, is
    replaced by another one that reads on from the next byte, of the same version only. At the
    end of the whole object its checksum is compared: the server's if the store does that, else
    the SHA-256 if it is known.

    Args:
        store: where it is.
        uri: the object.
        part: which bytes; all by default.
        size: what the row says.
        sha256: what the row says; else what the object's own metadata say.
        on_progress: told of every chunk; its total is the part's.
        parts_at_once: with more than one, so many parts are read at the same time, ahead of the
            caller, and kept in memory: *part_bytes* each.
        part_bytes: the size of such a part.

    Raises:
        InvalidInputError: no range, or a limit that is not positive; nothing was sent.
        BlobNotFoundError: it is not there; on entering, or when it had to be resumed.
        BlobChangedError: somebody has overwritten it since the first answer.
        BlobCorruptedError: another size than the row says (on entering), or another checksum (at
            the end): what was read is not to be used.
        StoreError: it could not be read; also while its chunks are read.
    """
    _check_limits(parts_at_once, part_bytes)
    source: _Pull | _Ahead
    if parts_at_once == 1:
        source = _Pull(store, uri, part or _WHOLE)
    else:
        source = _Ahead(store, uri, part or _WHOLE, at_once=parts_at_once, part_bytes=part_bytes)
    try:
        info = await source.open()
        reading = _Reading(source, info, size=size, sha256=sha256, on_progress=on_progress)

        async def read_chunk(_size: int) -> bytes:
            return await reading.chunk()

        reader = ObjectReader(info, read_chunk)
        try:
            yield reader
        finally:
            reader.close()
    finally:
        await source.close()


async def download_object(
    store: Store,
    uri: str,
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    on_progress: OnProgress | None = None,
    part_bytes: int = PART_BYTES,
    parts_at_once: int = 8,
) -> ObjectInfo:
    """Write an object into a file, in parts at once if it is large; verified as `open_object` does.

    It is written into a file beside *path* with a name of its own, which takes *path*'s place at
    the end, and is removed if something fails. A killed process leaves it (``.aioblobcol-*``).
    In memory are 1 MiB or little more of each part that is under way.

    Args:
        store: where it is.
        uri: the object.
        path: the file; its directory exists. What it held before is replaced.
        size: what the row says. One that is larger than *part_bytes*, or not known, is first
            asked for its first *part_bytes*.
        sha256: what the row says; else what the object's own metadata say.
        on_progress: told of every chunk.
        part_bytes: the size of the parts; an object up to it is one request.
        parts_at_once: how many parts are on the wire at the same time.

    Raises:
        InvalidInputError: a limit that is not positive; nothing was sent.
        StoreError, StoreClosedError: as `open_object` and its reader; there is no new file.
        OSError: the file could not be written; the same state.
    """
    _check_limits(parts_at_once, part_bytes)
    file = _NewFile(path)
    try:
        await _in_thread(file.create)
        download = _Download(store, uri, file, size, sha256, on_progress)
        if parts_at_once == 1 or (size is not None and size <= part_bytes):
            info = await download.in_one()
        else:
            info = await download.in_parts(parts_at_once, part_bytes)
        await _in_thread(file.keep)
    except BaseException:
        await _in_thread(file.discard)
        raise
    return info


def _check_limits(parts_at_once: int, part_bytes: int) -> None:
    if parts_at_once < 1 or part_bytes < 1:
        raise InvalidInputError("parts_at_once and part_bytes are positive")


# --- one request after the other ---------------------------------------------------------


class _Source(Protocol):
    """Bytes of one object, or of a part of it, in order.

    Attributes:
        part: what was asked for.
        checksum: what is compared already when the whole object was read.
    """

    part: ByteRange
    checksum: RunningChecksum | None

    async def chunk(self) -> bytes:
        """Return the next bytes; ``b""`` at the end. A cancelled call loses none."""


class _Pull:
    """An object, or a part of it, over as many requests as it takes, one at a time.

    Attributes:
        part: what is read.
        took_part: False if the server sends the whole object each time.
        checksum: of the first answer.
    """

    def __init__(
        self, store: Store, uri: str, part: ByteRange, *, version: ObjectInfo | None = None
    ) -> None:
        check_part(part)
        self.part = part
        self.took_part = True
        self.checksum: RunningChecksum | None = None
        self._store = store
        self._uri = uri
        self._version = version
        self._context: AbstractAsyncContextManager[ObjectReader] | None = None
        self._reader: ObjectReader | None = None
        self._position = part.start
        self._stop = part.start if version is None else _end_of(part, version)
        self._failures = 0
        self._was_resumed = False

    def another(self, part: ByteRange, version: ObjectInfo) -> _Pull:
        """Return what reads another part of the same object, in the same version.

        Its first chunk sends its first request.
        """
        return _Pull(self._store, self._uri, part, version=version)

    async def open(self) -> ObjectInfo:
        """Send the first request; describe the object."""
        reader = await self._send()
        info = reader.info
        self.took_part, self.checksum = reader.took_part, reader.checksum
        self._stop = _end_of(self.part, info)
        return info

    async def chunk(self) -> bytes:
        """Return the next bytes; ``b""`` at the end."""
        while self._position < self._stop:
            try:
                return self._counted(await self._read())
            except StoreUnavailableError as exc:
                await self.close()
                self._failures += 1
                if self._failures > RESUMPTIONS:
                    raise
                await self._wait(exc)
        # not by one more read, in which the store would compare: the end may be another request's
        if self.checksum is not None and not self.checksum.is_right():
            raise BlobCorruptedError("get", self._uri, "not what the server's checksum says")
        return b""

    async def close(self) -> None:
        """End the request."""
        context, self._context, self._reader = self._context, None, None
        if context is not None:
            await context.__aexit__(None, None, None)

    async def _read(self) -> bytes:
        if self._reader is None:
            self._was_resumed = True
            await self._send()
            assert self._reader is not None
        try:
            return await self._bounded(self._reader.__anext__())
        except StopAsyncIteration:
            raise self._unavailable(f"it ended at byte {self._position} of {self._stop}") from None

    async def _send(self) -> ObjectReader:
        version = self._version
        part = self.part._replace(start=self._position)
        etag = version.etag if version is not None and self._store.capabilities.if_match else None
        context = self._store.open(self._uri, part=None if part == _WHOLE else part, etag=etag)
        reader = await self._bounded(context.__aenter__())
        self._context, self._reader = context, reader  # nothing awaits in between
        if version is None:
            self._version = reader.info
        else:
            _check_version(reader.info, version)
        return reader

    async def _bounded(self, waiting: Awaitable[T]) -> T:
        seconds = self._store.request_seconds
        try:
            async with asyncio.timeout(seconds) as limit:
                return await waiting
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise self._unavailable(f"no byte in {seconds} seconds") from exc

    async def _wait(self, exc: StoreUnavailableError) -> None:
        logger.warning(
            "reading %s goes on at byte %s: %s",
            self._uri,
            self._position,
            exc.code,
            extra={"uri": self._uri},
        )
        if self._failures > 1:
            await asyncio.sleep(BACK_OFF_SECONDS * 2 ** (self._failures - 2))

    def _counted(self, chunk: bytes) -> bytes:
        self._failures = 0
        self._position += len(chunk)
        if self._position > self._stop:
            raise BlobCorruptedError("get", self._uri, f"more than {self._stop} bytes")
        if self._was_resumed and self.checksum is not None:
            self.checksum.update(chunk)
        return chunk

    def _unavailable(self, reason: str) -> StoreUnavailableError:
        return StoreUnavailableError("get", self._uri, reason)


def _end_of(part: ByteRange, info: ObjectInfo) -> int:
    stop = info.size if part.stop is None else min(part.stop, info.size)
    return max(part.start, stop)


def _check_version(now: ObjectInfo, first: ObjectInfo) -> None:
    """Compare what the server may not have compared."""
    if now.size != first.size or (first.etag and now.etag and first.etag != now.etag):
        raise BlobChangedError(
            "get",
            now.uri,
            f"it was {first.etag} of {first.size} bytes, and is {now.etag} of {now.size}",
        )


# --- what passes by ------------------------------------------------------------------------


class _Reading:
    """What goes from a source to the caller: counted, and hashed where nobody else compares."""

    def __init__(
        self,
        source: _Source,
        info: ObjectInfo,
        *,
        size: int | None,
        sha256: str | None,
        on_progress: OnProgress | None = None,
    ) -> None:
        _check_size(info, size)
        start, end = source.part.start, _end_of(source.part, info)
        self._source = source
        self._progress = _Progress(on_progress, end - start)
        self._sum: _Sha256 | None = None
        expected = _known_sha256(info, sha256)
        if expected is not None and source.checksum is None and (start, end) == (0, info.size):
            self._sum = _Sha256(info.uri, expected)

    async def chunk(self) -> bytes:
        """Return the next bytes; ``b""`` at the end, once they are known to be right."""
        if self._sum is not None:
            await self._sum.ready()
        chunk = await self._source.chunk()
        # nothing awaits from here on, or a cancellation would lose the chunk
        if not chunk:
            if self._sum is not None:
                await self._sum.compare()
            return chunk
        if self._sum is not None:
            self._sum.add(chunk)
        self._progress.add(len(chunk))
        return chunk


class _Progress:
    """What has come so far of everything."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress = on_progress
        self._total = total
        self._done = 0

    def add(self, size: int) -> None:
        """Tell the caller of *size* more bytes."""
        self._done += size
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)


class _Sha256:
    """Hashes what passes by, where it is much in a thread while the next bytes come."""

    def __init__(self, uri: str, expected: str) -> None:
        self._uri = uri
        self._expected = expected
        self._hash = hashlib.sha256()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._running: asyncio.Future[None] | None = None

    async def ready(self) -> None:
        """Wait until more may be added: no more than twice 1 MiB wait to be hashed."""
        if self._running is not None and self._pending_bytes >= _HASH_BYTES:
            await asyncio.wait({self._running})

    def add(self, chunk: bytes) -> None:
        """Take the next bytes in."""
        self._pending.append(chunk)
        self._pending_bytes += len(chunk)
        is_idle = self._running is None or self._running.done()
        if is_idle and self._pending_bytes >= _HASH_BYTES:
            self._start()

    async def compare(self) -> None:
        """Raise if all that was added is something else than it should be."""
        if self._running is None and self._pending_bytes <= HASH_INLINE_BYTES:
            _update(self._hash, self._pending)
            self._pending = []
        while self._running is not None or self._pending:
            if self._running is not None:
                await asyncio.wait({self._running})
                self._running = None
            if self._pending:
                self._start()
        _compare(self._uri, self._hash.hexdigest(), self._expected)

    def _start(self) -> None:
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        loop = asyncio.get_running_loop()
        self._running = loop.run_in_executor(None, _update, self._hash, pending)


def _update(running: hashlib._Hash, chunks: Iterable[bytes]) -> None:
    for chunk in chunks:
        running.update(chunk)


def _compare(uri: str, found: str, expected: str) -> None:
    if found != expected:
        raise BlobCorruptedError("get", uri, f"its SHA-256 is {found}, not {expected}")


def _check_size(info: ObjectInfo, size: int | None) -> None:
    if size is not None and size != info.size:
        raise BlobCorruptedError("get", info.uri, f"it has {info.size} bytes, not {size}")


def _known_sha256(info: ObjectInfo, sha256: str | None) -> str | None:
    known = sha256 or info.metadata.get("sha256")  # anybody may have written those
    return known if known is not None and _SHA256.fullmatch(known) else None


# --- some parts ahead ----------------------------------------------------------------------


class _Lane:
    """One part that a task of its own reads into memory."""

    def __init__(self, pull: _Pull) -> None:
        self._pull = pull
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue()  # of one part at most
        self._is_over = False
        self.task = asyncio.create_task(self._fill(), name="aioblobcol: get a part")

    async def chunk(self) -> bytes:
        """Return the next bytes; ``b""`` at the end."""
        if not self._is_over:
            chunk = await self._chunks.get()
            if chunk:
                return chunk
            self._is_over = True
        await asyncio.wait({self.task})
        self.task.result()
        return b""

    async def _fill(self) -> None:
        try:
            while chunk := await self._pull.chunk():
                self._chunks.put_nowait(chunk)
        finally:
            self._chunks.put_nowait(b"")
            await self._pull.close()


class _Ahead:
    """An object, or a part of it, in order, while the next parts of it are read already."""

    def __init__(
        self, store: Store, uri: str, part: ByteRange, *, at_once: int, part_bytes: int
    ) -> None:
        check_part(part)
        self.part = part
        self.checksum: RunningChecksum | None = None
        self._store = store
        self._uri = uri
        self._at_once = at_once
        self._part_bytes = part_bytes
        self._first = _Pull(store, uri, _first_part(part, part_bytes))
        self._left: Iterator[_Pull] | None = None  # None: the first is all
        self._lanes: deque[_Lane] = deque()

    async def open(self) -> ObjectInfo:
        """Ask for the first part, which may be all; describe the object."""
        info = await self._first.open()
        later = _starts_after(self._first.part, self.part, info.size, self._part_bytes)
        if not later:
            return info
        if self._first.took_part:
            self._left = _pulls(self._first, later, self.part, info)
            return info
        await self._first.close()
        self._first = _Pull(self._store, self._uri, self.part)
        info = await self._first.open()
        self.checksum = self._first.checksum
        return info

    async def chunk(self) -> bytes:
        """Return the next bytes; ``b""`` at the end."""
        if self._left is None:
            return await self._first.chunk()
        while lane := self._next_lane(self._left):
            if chunk := await lane.chunk():
                return chunk
            self._lanes.popleft()
        return b""

    async def close(self) -> None:
        """End all requests."""
        lanes = [lane.task for lane in self._lanes]
        for task in lanes:
            task.cancel()
        interrupted = await wait_through(lanes)
        for task in lanes:
            if not task.cancelled():
                task.exception()  # of a part that nobody asked for
        await self._first.close()
        if interrupted is not None:
            raise interrupted

    def _next_lane(self, left: Iterator[_Pull]) -> _Lane | None:
        while len(self._lanes) < self._at_once and (pull := next(left, None)) is not None:
            self._lanes.append(_Lane(pull))
        return self._lanes[0] if self._lanes else None


def _first_part(part: ByteRange, part_bytes: int) -> ByteRange:
    stop = part.start + part_bytes
    return part._replace(stop=stop if part.stop is None else min(stop, part.stop))


def _starts_after(first: ByteRange, whole: ByteRange, size: int, part_bytes: int) -> range:
    """Return where the parts after the *first* one begin."""
    assert first.stop is not None
    end = size if whole.stop is None else min(whole.stop, size)
    return range(first.stop, end, part_bytes)


def _pulls(first: _Pull, starts: range, whole: ByteRange, info: ObjectInfo) -> Iterator[_Pull]:
    """Give *first* and what reads each later part, of the same version: 650,000 for 5 TiB."""
    yield first
    for start in starts:
        stop = start + starts.step
        if whole.stop is not None:
            stop = min(stop, whole.stop)
        yield first.another(ByteRange(start, stop), info)


# --- into a file ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Download:
    """One object on its way into a file."""

    store: Store
    uri: str
    file: _NewFile
    size: int | None
    sha256: str | None
    on_progress: OnProgress | None

    async def in_one(self) -> ObjectInfo:
        """Read it by one request."""
        source = _Pull(self.store, self.uri, _WHOLE)
        try:
            info = await source.open()
            await self._write_all(source, info)
        finally:
            await source.close()
        return info

    async def in_parts(self, at_once: int, part_bytes: int) -> ObjectInfo:
        """Read its first part, and if there is more the others at the same time."""
        first = _Pull(self.store, self.uri, ByteRange(0, part_bytes))
        try:
            info = await first.open()
            if info.size <= part_bytes:
                await self._write_all(first, info)
                return info
            if first.took_part:
                await self._write_parts(first, info, at_once, part_bytes)
                return info
        finally:
            await first.close()
        return await self.in_one()

    async def _write_all(self, source: _Pull, info: ObjectInfo) -> None:
        reading = _Reading(
            source, info, size=self.size, sha256=self.sha256, on_progress=self.on_progress
        )
        await self._write(reading.chunk, position=0)

    async def _write_parts(
        self, first: _Pull, info: ObjectInfo, at_once: int, part_bytes: int
    ) -> None:
        _check_size(info, self.size)
        progress = _Progress(self.on_progress, info.size)
        later = _starts_after(first.part, _WHOLE, info.size, part_bytes)
        left = _pulls(first, later, _WHOLE, info)

        async def work() -> None:
            for pull in left:
                await self._write_part(pull, progress)

        await _all_of([work() for _ in range(min(at_once, 1 + len(later)))])
        expected = _known_sha256(info, self.sha256)
        if expected is not None:
            _compare(self.uri, await self._file_sha256(), expected)

    async def _write_part(self, pull: _Pull, progress: _Progress) -> None:
        async def chunk() -> bytes:
            read = await pull.chunk()
            if read:
                progress.add(len(read))
            return read

        try:
            await self._write(chunk, position=pull.part.start)
        finally:
            await pull.close()

    async def _write(self, chunk: Callable[[], Awaitable[bytes]], *, position: int) -> None:
        while True:
            pieces, size = [], 0
            while size < WRITE_BYTES and (piece := await chunk()):
                pieces.append(piece)
                size += len(piece)
            if not pieces:
                return
            await _in_thread(functools.partial(self.file.write, pieces, position))
            position += size

    async def _file_sha256(self) -> str:
        running = hashlib.sha256()
        position = 0
        while True:
            hash_on = functools.partial(self.file.hash_on, running, position)
            hashed = await _in_thread(hash_on)
            if not hashed:
                return running.hexdigest()
            position += hashed


class _NewFile:
    """A file that takes another one's place once it is whole; its methods are run in threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside = path.parent / f".aioblobcol-{uuid.uuid4().hex}"
        self._descriptor: int | None = None
        self._lock = threading.Lock()  # of the position, where a write has none of its own

    def create(self) -> None:
        """Make it, beside its place."""
        if self._path.is_dir():  # found out before it was downloaded
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self._path))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self._beside, flags, 0o666)

    def write(self, pieces: Iterable[bytes], position: int) -> None:
        """Write one piece after the other, from *position* on."""
        for piece in pieces:
            left = memoryview(piece)
            while left:
                written = self._write_some(left, position)
                left, position = left[written:], position + written

    def hash_on(self, running: hashlib._Hash, position: int) -> int:
        """Hash a slice of what was written; tell how long it was, 0 at the end."""
        assert self._descriptor is not None
        hashed = 0
        os.lseek(self._descriptor, position, os.SEEK_SET)
        while hashed < _HASH_FILE_BYTES and (read := os.read(self._descriptor, _HASH_BYTES)):
            running.update(read)
            hashed += len(read)
        return hashed

    def keep(self) -> None:
        """Put it into its place."""
        self._close()
        self._beside.replace(self._path)

    def discard(self) -> None:
        """Remove it, if it is not in its place; trouble is logged, for another error is raised."""
        try:
            self._close()
            self._beside.unlink(missing_ok=True)
        except OSError as exc:
            logger.error("cannot remove %s: %s", self._beside, exc)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _write_some(self, data: memoryview, position: int) -> int:
        assert self._descriptor is not None
        if hasattr(os, "pwrite"):
            return os.pwrite(self._descriptor, data, position)
        with self._lock:  # Windows
            os.lseek(self._descriptor, position, os.SEEK_SET)
            return os.write(self._descriptor, data)


async def _in_thread(work: Callable[[], T]) -> T:
    """Run *work* to its end, also while we are cancelled: the file must not be closed under it."""
    running = asyncio.get_running_loop().run_in_executor(None, work)
    interrupted = await wait_through([running])
    if interrupted is not None:
        raise interrupted from running.exception()
    return running.result()


async def _all_of(works: Sequence[Coroutine[object, object, None]]) -> None:
    """Do all at once; if one fails, or we are cancelled, the others have ended before it is told.

    Raises:
        asyncio.CancelledError: we were cancelled; what failed, if anything, is its cause.
    """
    tasks = [asyncio.create_task(work, name="aioblobcol: get a part") for work in works]
    interrupted: asyncio.CancelledError | None = None
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    except asyncio.CancelledError as exc:
        interrupted = exc
    for task in tasks:
        task.cancel()
    interrupted = await wait_through(tasks) or interrupted
    failed = [error for task in tasks if not task.cancelled() and (error := task.exception())]
    if interrupted is not None:
        raise interrupted from (failed[0] if failed else None)
    if failed:
        raise failed[0]
    for task in tasks:
        task.result()  # somebody else cancelled it
