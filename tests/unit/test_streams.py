"""Large sources: parts, limits, hashes, and what can be read again."""

from __future__ import annotations

import asyncio
import hashlib
import io
import pickle
import re
import tempfile
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.base_protocol import BaseProtocol
from support.streams import AiohttpResponse, Chunks, PlainFile, Response, Stream, iterated

from aioblobcol._sources import MAX_OBJECT_BYTES, PART_BYTES, READ_PIECE_BYTES, Payload
from aioblobcol._streams import (
    JOINED_BYTES,
    MAX_PARTS,
    SMALL_PIECE_BYTES,
    AsyncPuller,
    PartReader,
    ReadOnce,
    fingerprint,
    open_path,
    open_source,
    part_bytes,
    size_of,
)
from aioblobcol.errors import BlobTooLargeError, InvalidSourceError, SizeMismatchError

MIB = 2**20
LARGE = bytes(range(256)) * (PART_BYTES // 256) + b"and the rest"


def reader_of(*pieces: bytes, least: int = 4, **more: Any) -> PartReader:
    """Read pieces in parts of 4 bytes."""
    stream = Stream(*pieces)
    return PartReader("page", AsyncPuller("page", stream, stream.read), least=least, **more)


class Given:
    """An async `read` that gives what an iterator gives."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces

    async def read(self, _size: int) -> bytes:
        return next(self.pieces, b"")


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def parts_of(reader: PartReader) -> list[bytes]:
    parts: list[bytes] = []
    while (part := await reader.next_part()) is not None:
        whole = b"".join(part.pieces)
        assert part.number == len(parts) + 1
        assert (part.size, part.crc32) == (len(whole), zlib.crc32(whole))
        parts.append(whole)
    return parts


class TestPartBytes:
    def test_of_what_is_known(self) -> None:
        """Parts of a known total are equal, of whole MiB, and 10,000 of them suffice."""
        for total in (1, PART_BYTES, 10**9, 80 * 10**9, 10**12, MAX_OBJECT_BYTES):
            size = part_bytes(1, total=total)
            assert size == part_bytes(MAX_PARTS, total=total) >= PART_BYTES
            assert size % MIB == 0
            assert size * MAX_PARTS >= total
        assert part_bytes(1, total=80 * 10**9) == PART_BYTES

    def test_of_what_is_unknown(self) -> None:
        """Parts grow, so that 10,000 of them hold the largest object; none is too large for S3."""
        sizes = [part_bytes(number, total=None) for number in range(1, MAX_PARTS + 1)]

        assert sizes == sorted(sizes)
        assert set(sizes[:1000]) == {PART_BYTES}
        assert sum(sizes) >= MAX_OBJECT_BYTES
        assert sizes[-1] <= 5 * 2**30


class TestParts:
    @pytest.mark.parametrize(
        ("pieces", "parts"),
        [
            ((b"0123456789",), [b"0123", b"4567", b"89"]),
            ((b"01", b"2345", b"67"), [b"0123", b"4567"]),
            ((b"0",) * 9, [b"0000", b"0000", b"0"]),
            ((b"01234",), [b"0123", b"4"]),
        ],
    )
    async def test_are_of_equal_size(self, pieces: tuple[bytes, ...], parts: list[bytes]) -> None:
        """Whatever the pieces are, the parts are of the size that was asked for, but the last."""
        reader = reader_of(*pieces)
        assert await reader.read_small() is None

        assert await parts_of(reader) == parts
        whole = b"".join(pieces)
        assert (reader.size, reader.crc32) == (len(whole), zlib.crc32(whole))
        assert reader.sha256 == hashlib.sha256(whole).hexdigest()

    async def test_the_head_is_of_the_whole(self) -> None:
        """The first bytes are there to be looked at, however small the pieces are."""
        reader = reader_of(*[b"012"] * 3000, least=8000)
        assert await reader.read_small() is None

        assert reader.head == (b"012" * 3000)[:4096]

    @pytest.mark.parametrize("pieces", [(), (b"0",), (b"0123",), (b"01", b"23")])
    async def test_what_fits_into_one_is_read_as_a_whole(self, pieces: tuple[bytes, ...]) -> None:
        """Of what is not larger than one part there is a payload."""
        payload = await reader_of(*pieces, with_md5=True).read_small()
        whole = b"".join(pieces)

        assert payload == Payload(
            whole,
            hashlib.md5(whole).hexdigest(),  # noqa: S324 - no security
            hashlib.sha256(whole).hexdigest(),
            zlib.crc32(whole),
        )

    async def test_no_more_is_read_than_is_needed(self) -> None:
        """To know whether one part is all, one byte more is read; for each part its own bytes."""
        stream = Stream(*[b"01"] * 100)
        reader = PartReader("page", AsyncPuller("page", stream, stream.read), least=4)
        await reader.read_small()
        assert len(stream.sizes) == 3
        await reader.next_part()
        await reader.next_part()

        assert len(stream.sizes) == 4

    @pytest.mark.parametrize("piece_bytes", [1, 1000, SMALL_PIECE_BYTES - 1])
    async def test_of_many_small_pieces(self, piece_bytes: int) -> None:
        """Small pieces are joined: a part has some hundreds of pieces, not millions."""
        body = LARGE[: 2 * MIB + 1]
        pieces = (body[at : at + piece_bytes] for at in range(0, len(body), piece_bytes))
        source = AsyncPuller("page", None, Given(pieces).read)
        part = await PartReader("page", source).next_part()

        assert part is not None
        assert b"".join(part.pieces) == body
        assert len(part.pieces) <= 2 * MIB // JOINED_BYTES + 1

    async def test_of_small_pieces_among_large_ones(self) -> None:
        """The order stays."""
        large = bytes(SMALL_PIECE_BYTES)
        reader = reader_of(b"a", b"b", large, b"c", large, large, b"d", least=MIB)
        part = await reader.next_part()

        assert part is not None
        assert part.pieces == [b"ab", large, b"c", large, large, b"d"]

    async def test_are_views_of_bytes_in_memory(self) -> None:
        """Immutable bytes are not copied."""
        reader = await open_source("page", LARGE)
        assert isinstance(reader, PartReader)
        part = await reader.next_part()

        assert part is not None
        assert isinstance(part.pieces[0], memoryview)
        assert part.pieces[0].obj is LARGE

    async def test_of_a_mutable_buffer_are_copies(self) -> None:
        """What was hashed is what is sent, although the caller changes its buffer."""
        source = bytearray(LARGE)
        reader = await open_source("page", source)
        assert isinstance(reader, PartReader)
        part = await reader.next_part()
        assert part is not None
        source[:4] = b"else"

        assert zlib.crc32(b"".join(part.pieces)) == part.crc32

    async def test_of_a_view_with_gaps(self) -> None:
        """A view that is not contiguous is read as its bytes."""
        reader = await open_source("page", memoryview(LARGE * 2)[::2])
        assert isinstance(reader, PartReader)

        assert b"".join(await parts_of(reader)) == (LARGE * 2)[::2]


class TestLimits:
    @pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 9, 20])
    async def test_more_than_is_allowed(self, size: int) -> None:
        """The byte that is too many is found when it is read, and nothing after it is."""
        pieces = [b"0"] * 100
        reader = reader_of(*pieces, max_bytes=size - 1)
        with pytest.raises(BlobTooLargeError, match=f"more than the {size - 1} it"):
            await reader.read_small()
            await parts_of(reader)

        assert len(reader._puller._source.sizes) == size  # type: ignore[attr-defined]

    @pytest.mark.parametrize("size", [4, 5, 8, 9])
    async def test_as_much_as_is_allowed(self, size: int) -> None:
        """The limit itself is allowed."""
        reader = reader_of(*[b"0"] * size, max_bytes=size)
        small = await reader.read_small()

        assert (small is None) == (size > 4)
        assert small is not None or sum(map(len, await parts_of(reader))) == size

    @pytest.mark.parametrize("size", [0, 3, 4, 5, 8, 9])
    @pytest.mark.parametrize("error", [-1, 1, 5])
    async def test_another_size_than_was_declared(self, size: int, error: int) -> None:
        """Too few bytes are found out at the end, too many with the first of them."""
        if size + error < 0:
            pytest.skip("no such size")
        reader = reader_of(*[b"0"] * size, total=size + error, is_declared=True)
        with pytest.raises(SizeMismatchError, match=f"the {size + error}"):
            if await reader.read_small() is None:
                await parts_of(reader)

    @pytest.mark.parametrize("size", [0, 3, 4, 5, 8])
    async def test_the_declared_size(self, size: int) -> None:
        """What was declared comes, and the reading ends."""
        reader = reader_of(*[b"0"] * size, total=size, is_declared=True)

        assert await reader.read_small() is not None or len(await parts_of(reader)) == size // 4 + (
            size % 4 > 0
        )

    async def test_a_hint_is_no_promise(self) -> None:
        """What a source says of itself may be wrong."""
        reader = reader_of(b"0123456", total=3)
        await reader.read_small()

        assert await parts_of(reader) == [b"0123", b"456"]


SOURCES: dict[str, Callable[[bytes], Any]] = {
    "bytes": lambda body: body,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "file": io.BytesIO,
    "async read": lambda body: Stream(body[:100], bytearray(body[100:])),
    "read_chunk": Chunks,
    "iterator": lambda body: iterated(body[:3], b"", memoryview(body[3:])),
    "httpx": Response,
    "aiohttp": AiohttpResponse,
}


class TestSources:
    @pytest.mark.parametrize("body", [b"", b"page", LARGE], ids=["empty", "small", "large"])
    @pytest.mark.parametrize("kind", [*SOURCES, "path", "open file"])
    async def test_of_every_kind(self, kind: str, body: bytes, tmp_path: Path) -> None:
        """Bytes come out as they went in, whatever held them."""
        path = tmp_path / "page"
        path.write_bytes(body)
        with path.open("rb") as file:
            own: dict[str, Any] = {"path": path, "open file": file}
            source = own.get(kind) or SOURCES[kind](body)
            opened = await open_source("page", source)
            if isinstance(opened, Payload):
                assert (opened.body, len(body) <= PART_BYTES) == (body, True)
                return
            assert b"".join(await parts_of(opened)) == body
            assert opened.sha256 == hashlib.sha256(body).hexdigest()
            await opened.aclose()

    @pytest.mark.parametrize(
        ("source", "hint"),
        [
            (Stream("text"), "gave str, not bytes"),
            (Stream(b"page", None), "gave NoneType, not bytes"),
            (Stream(b"page", ValueError("I/O operation on closed file")), "closed file"),
            (Stream(OSError("disk full")), "disk full"),
            (PlainFile("text"), "PlainFile gave str"),
            (PlainFile(None), "non-blocking"),
            (iterated(b"page", 5), "gave int"),
            (iterated(""), "gave str"),
        ],
    )
    async def test_what_cannot_be_read(self, source: Any, hint: str) -> None:
        """What gives no bytes is refused, and the column is named."""
        with pytest.raises(InvalidSourceError, match=f"'page'.*{hint}"):
            await open_source("page", source)

    async def test_what_a_source_raises_else_goes_through(self) -> None:
        """An error of the source's own is not taken for bad input."""
        with pytest.raises(KeyError):
            await open_source("page", Stream(KeyError("x")))

    async def test_a_file_that_gives_more_than_it_was_asked_for(self) -> None:
        """What came too much is kept for the next part, and no more is read meanwhile."""
        file = PlainFile(*[bytearray(2 * MIB)] * 20)
        reader = await open_source("page", file)
        assert isinstance(reader, PartReader)

        assert len(file.pieces) == 15
        assert b"".join(await parts_of(reader)) == bytes(40 * MIB)

    async def test_an_async_read_is_asked_for_a_mebibyte(self) -> None:
        """Pieces are neither tiny nor huge."""
        stream = Stream(bytes(READ_PIECE_BYTES), b"rest")
        await open_source("page", stream)

        assert stream.sizes == [READ_PIECE_BYTES] * 3

    @pytest.mark.parametrize("extra", [-1, 0, 1, 2, 100])
    async def test_a_part_of_a_form(self, extra: int) -> None:
        """A form of aiohttp must not be asked for a few bytes, and is not, whatever is missing."""
        body = bytes(PART_BYTES + extra)
        form = b"--edge\r\nContent-Disposition: form-data\r\n\r\n" + body + b"\r\n--edge--\r\n"
        loop = asyncio.get_running_loop()
        stream = aiohttp.StreamReader(BaseProtocol(loop), 2 * len(form), loop=loop)
        stream.feed_data(form)
        stream.feed_eof()
        headers = {"Content-Type": "multipart/form-data; boundary=edge"}
        source = await aiohttp.MultipartReader(headers, stream).next()
        assert isinstance(source, aiohttp.BodyPartReader)
        opened = await open_source("page", source, max_bytes=len(body))

        read = b"".join(await parts_of(opened)) if isinstance(opened, PartReader) else opened.body
        assert read == body

    async def test_a_file_that_grows(self, tmp_path: Path) -> None:
        """A large file that is written to while it is read is no source."""
        path = tmp_path / "page"
        path.write_bytes(LARGE)
        reader = await open_path("page", path)
        await reader.read_small()
        with path.open("ab") as file:
            file.write(b"more")

        with pytest.raises(SizeMismatchError):
            await parts_of(reader)
        await reader.aclose()

    async def test_files_are_closed(self, tmp_path: Path) -> None:
        """A file that was opened here is closed here, whatever happens; a leak would fail this."""
        path = tmp_path / "page"
        path.write_bytes(LARGE)
        with pytest.raises(BlobTooLargeError):
            await open_source("page", path, max_bytes=3)
        before = open_files()
        reader = await open_source("page", path)
        assert isinstance(reader, PartReader)
        assert open_files() == before + 1
        await reader.aclose()
        await reader.aclose()

        assert open_files() == before

    async def test_an_opening_that_is_cancelled(self, tmp_path: Path) -> None:
        """A file that a thread opens for nobody is closed."""
        path = tmp_path / "page"
        path.write_bytes(LARGE)
        before = open_files()
        task = asyncio.create_task(open_source("page", path))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})

        assert task.cancelled()
        assert open_files() == before

    async def test_the_fingerprint_of_a_file(self, tmp_path: Path) -> None:
        """A file is hashed without being kept."""
        path = tmp_path / "page"
        path.write_bytes(LARGE)
        found = await fingerprint("page", path)

        assert (found.size, found.sha256) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
        assert found.md5 == hashlib.md5(LARGE).hexdigest()  # noqa: S324 - no security


class TestSizeOf:
    @pytest.mark.parametrize(
        ("source", "size"),
        [
            (Stream(b"page"), None),
            (io.BytesIO(b"page"), 4),
            (PlainFile(b"page"), None),
            (Response(b"page"), None),
            (Response(b"page", headers={"Content-Length": "4"}), 4),
            (Response(b"page", headers={"Content-Length": "2", "Content-Encoding": "gzip"}), None),
            (AiohttpResponse(b"page", headers={"Content-Length": "nonsense"}), None),
            (iterated(b"page"), None),
        ],
    )
    def test_what_a_source_says(self, source: Any, size: int | None) -> None:
        """The size of what is left, where it can be known without reading."""
        assert size_of(source) == size

    def test_of_a_file_that_was_read_in_part(self) -> None:
        """It counts from where the file stands, and leaves it there."""
        file = io.BytesIO(b"0123456789")
        file.seek(4)

        assert (size_of(file), file.tell()) == (6, 4)


class Upload:
    """What Starlette's UploadFile is: an async face of a file that may be on disk."""

    def __init__(self, body: bytes) -> None:
        self.file = tempfile.SpooledTemporaryFile()  # noqa: SIM115 - as Starlette does
        self.file.write(body)
        self.file.seek(0)
        self.size = len(body)

    async def read(self, size: int = -1) -> bytes:
        return self.file.read(size)

    async def seek(self, offset: int) -> None:
        self.file.seek(offset)


async def read_all(source: ReadOnce) -> bytes:
    opened = await source.open("page", max_bytes=None)
    if isinstance(opened, Payload):
        return opened.body
    body = b"".join(await parts_of(opened))
    await opened.aclose()
    return body


class TestReadOnce:
    async def test_what_is_small_is_kept(self) -> None:
        """One part is kept in memory, and read from there again."""
        source = ReadOnce(iterated(b"pa", b"ge"))

        assert [await read_all(source) for _ in range(3)] == [b"page"] * 3
        assert source.size == 4
        assert pickle.loads(pickle.dumps(source)) == b"page"  # noqa: S301 - our own

    @pytest.mark.parametrize("kind", [io.BytesIO, Upload])
    async def test_what_can_be_rewound_is_read_again(self, kind: Any) -> None:
        """A large file is read again from where it stood."""
        file = kind(LARGE)
        source = ReadOnce(file)
        read = [await read_all(source) for _ in range(2)]
        getattr(file, "file", file).close()

        assert read == [LARGE] * 2

    async def test_from_where_it_stood(self) -> None:
        """What was read before it was handed over does not belong to it."""
        file = io.BytesIO(b"head" + LARGE)
        file.seek(4)
        source = ReadOnce(file)

        assert [await read_all(source) for _ in range(2)] == [LARGE] * 2

    async def test_what_cannot_is_refused(self) -> None:
        """A large stream that was read does not pass for an empty one."""
        source = ReadOnce(iterated(LARGE))
        assert await read_all(source) == LARGE

        with pytest.raises(InvalidSourceError, match="cannot be rewound"):
            await read_all(source)
        with pytest.raises(TypeError, match=re.escape("Blob(await upload.read())")):
            pickle.dumps(source)

    async def test_two_cells_at_once(self) -> None:
        """One stream is not read by two uploads at once; the error says what to do."""
        source = ReadOnce(io.BytesIO(LARGE))
        first = await source.open("page", max_bytes=None)
        assert isinstance(first, PartReader)
        with pytest.raises(InvalidSourceError, match="another cell"):
            await source.open("page", max_bytes=None)
        await first.aclose()

        assert await read_all(source) == LARGE

    @pytest.mark.parametrize("said", ["1", f"{MAX_OBJECT_BYTES}", f"{10**18}"])
    async def test_what_a_client_says(self, said: str) -> None:
        """A header makes neither parts nor memory of the size that it announces."""
        source = ReadOnce(Response(LARGE, headers={"Content-Length": said}))
        assert source.size == int(said)
        assert source.most_bytes is None
        reader = await source.open("page", max_bytes=None)
        assert isinstance(reader, PartReader)

        assert (reader.total, reader.next_bytes()) == (int(said), PART_BYTES)
        assert reader.promised is None
        await reader.aclose()

    @pytest.mark.parametrize(
        ("size", "most"), [(4, 4), (PART_BYTES, PART_BYTES), (MAX_OBJECT_BYTES, None)]
    )
    async def test_what_was_declared(self, size: int, most: int | None) -> None:
        """It is a limit, of which a client may have said that it is high."""
        source = ReadOnce(iterated(LARGE), size=size)

        assert (source.size, source.most_bytes) == (size, most)

    async def test_what_a_file_says(self) -> None:
        """A file's own size is certain."""
        assert ReadOnce(io.BytesIO(LARGE)).most_bytes == len(LARGE)
        upload = Upload(b"page")
        assert ReadOnce(upload).most_bytes == len(b"page")
        upload.file.close()

    async def test_one_file_of_two_blobs(self) -> None:
        """Two readers would take each other's bytes: the second one is refused."""
        file = io.BytesIO(LARGE)
        first, second = ReadOnce(file), ReadOnce(file)
        reader = await first.open("page", max_bytes=None)
        assert isinstance(reader, PartReader)
        with pytest.raises(InvalidSourceError, match="for another cell"):
            await second.open("page", max_bytes=None)
        await reader.aclose()
        file.seek(0)

        assert await read_all(second) == LARGE

    async def test_its_size_while_it_is_read(self) -> None:
        """A file is not moved by the question how large it is: a thread may be reading it."""
        file = io.BytesIO(LARGE)
        source = ReadOnce(file)
        reader = await source.open("page", max_bytes=None)
        assert isinstance(reader, PartReader)
        file.seek = None  # type: ignore[method-assign,assignment]

        assert source.size == len(LARGE)
        assert ReadOnce(file).size is None
        await reader.aclose()

    async def test_a_declared_size(self) -> None:
        """What is declared is compared."""
        with pytest.raises(SizeMismatchError):
            await ReadOnce(iterated(b"page"), size=5).open("page", max_bytes=None)
        with pytest.raises(SizeMismatchError):
            await ReadOnce(iterated(b"page"), size=3).open("page", max_bytes=None)
        assert await read_all(ReadOnce(iterated(b"page"), size=4)) == b"page"

    async def test_a_reading_that_is_cancelled(self) -> None:
        """A cancelled reading leaves no half of a stream for a whole one."""
        reached, go_on = asyncio.Event(), asyncio.Event()

        class Slow(Stream):
            async def read(self, size: int, /) -> Any:
                if len(self.sizes) == 1:
                    reached.set()
                    await go_on.wait()
                return await super().read(size)

        source = ReadOnce(Slow(b"pa", b"ge"))
        task = asyncio.create_task(read_all(source))
        await reached.wait()
        task.cancel()
        await asyncio.wait({task})
        go_on.set()

        with pytest.raises(InvalidSourceError, match="at least in part"):
            await read_all(source)

    async def test_a_file_whose_reading_is_cancelled(self) -> None:
        """The thread has ended with the reading, or it would move the file that is read again."""
        reached, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        class Slow(io.BytesIO):
            reads = 0

            def read(self, size: int | None = -1, /) -> bytes:
                self.reads += 1
                loop.call_soon_threadsafe(reached.set)
                go_on.wait()
                return super().read(size)

        file = Slow(LARGE)
        source = ReadOnce(file)
        task = asyncio.create_task(read_all(source))
        await reached.wait()
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        await asyncio.wait({task})

        assert task.cancelled()
        assert file.reads == 1
        assert await read_all(source) == LARGE

    async def test_a_pipe_whose_reading_is_cancelled(self) -> None:
        """Nobody waits for what may be silent for ever."""
        reached, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        class Silent(PlainFile):
            def read(self, size: int = -1) -> Any:
                loop.call_soon_threadsafe(reached.set)
                go_on.wait()
                return super().read(size)

        task = asyncio.create_task(read_all(ReadOnce(Silent(b"page"))))
        await reached.wait()
        task.cancel()
        await asyncio.wait({task})
        go_on.set()

        assert task.cancelled()

    async def test_a_generator_is_closed(self) -> None:
        """What a generator holds is let go of when no more of it is read."""
        is_closed = False

        async def pieces() -> AsyncIterator[bytes]:
            nonlocal is_closed
            try:
                while True:
                    yield bytes(MIB)
            finally:
                is_closed = True

        with pytest.raises(BlobTooLargeError):
            await ReadOnce(pieces()).open("page", max_bytes=MIB)
        assert is_closed
        is_closed = False
        reader = await ReadOnce(pieces()).open("page", max_bytes=None)
        assert isinstance(reader, PartReader)
        await reader.aclose()

        assert is_closed
