"""Bytes from anywhere: what may be uploaded, and what is read of it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import zlib
from pathlib import Path, PurePath
from typing import Any

import pytest

from aioblobcol._sources import (
    HASH_INLINE_BYTES,
    MAX_PUT_BYTES,
    READ_PIECE_BYTES,
    BlobSource,
    Payload,
    check_source,
    has_async_read,
    read_payload,
    read_payloads,
)
from aioblobcol.errors import BlobTooLargeError, InvalidSourceError


async def read(source: BlobSource) -> Payload:
    (payload,) = await read_payloads([("page", source)])
    return payload


def released() -> memoryview:
    view = memoryview(b"page")
    view.release()
    return view


class TestCheck:
    @pytest.mark.parametrize(
        "source", [b"", b"page", bytearray(b"page"), memoryview(b"page"), memoryview(b"pages")[::2]]
    )
    def test_bytes_like_objects_are_taken(self, source: BlobSource) -> None:
        """Bytes, bytearray and memoryview may be uploaded, empty or not."""
        check_source(source, column="page")

    def test_a_file_is_taken(self, tmp_path: Path) -> None:
        """The path of a file may be uploaded."""
        path = tmp_path / "page"
        path.write_bytes(b"page")

        check_source(path, column="page")

    @pytest.mark.parametrize(
        ("source", "hint"),
        [
            ("text", r"text\.encode\(\)"),
            (None, "NoneType"),
            (5, "int"),
            ([b"a"], "list"),
            (PurePath("page"), "PurePosixPath"),
            (released(), "released"),
        ],
    )
    def test_anything_else_is_refused(self, source: Any, hint: str) -> None:
        """Another type is refused with the column, and with what to give instead."""
        with pytest.raises(InvalidSourceError, match=hint) as caught:
            check_source(source, column="page")
        assert "'page'" in str(caught.value)

    def test_a_path_without_a_file_is_refused(self, tmp_path: Path) -> None:
        """A directory, a missing file, a pipe and an impossible name are no files."""
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        for path in (tmp_path, tmp_path / "missing", pipe, Path("a\0b"), Path("x" * 5000)):
            with pytest.raises(InvalidSourceError):
                check_source(path, column="page")

    def test_more_than_one_put_takes_is_refused_unread(self, tmp_path: Path) -> None:
        """A file of more than 5 GiB is refused by its size."""
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(MAX_PUT_BYTES + 1)  # a hole, no bytes

        with pytest.raises(InvalidSourceError, match="5 GiB"):
            check_source(path, column="page")


class TestRead:
    @pytest.mark.parametrize(
        "source",
        [b"page", bytearray(b"page"), memoryview(b"page"), memoryview(b"pXaXgXeX")[::2]],
    )
    async def test_all_digests_are_of_the_same_bytes(self, source: BlobSource) -> None:
        """A payload holds the bytes with their MD5, SHA-256, CRC32 and length."""
        assert await read(source) == Payload(
            body=b"page",
            md5="71860c77c6745379b0d44304d66b6a13",
            sha256=hashlib.sha256(b"page").hexdigest(),
            crc32=zlib.crc32(b"page"),
        )
        assert (await read(source)).size == 4

    async def test_an_empty_source_is_an_empty_object(self, tmp_path: Path) -> None:
        """No bytes are bytes too."""
        (tmp_path / "empty").touch()

        assert await read(b"") == await read(tmp_path / "empty")

    async def test_a_memoryview_of_numbers_is_its_bytes(self) -> None:
        """The size is in bytes, not in items."""
        assert (await read(memoryview(b"12345678").cast("I"))).size == 8

    async def test_a_large_source_is_the_same(self, tmp_path: Path) -> None:
        """Beyond what is hashed on the event loop the result is the same, from a file too."""
        body = bytes(range(256)) * (HASH_INLINE_BYTES // 256 + 1)
        path = tmp_path / "large"
        path.write_bytes(body)

        assert await read(body) == await read(path)
        assert (await read(body)).sha256 == hashlib.sha256(body).hexdigest()

    async def test_reading_leaves_the_loop_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Long hashing, and each file, is done in one hop to a thread for the whole row."""
        hops: list[Any] = []

        async def to_thread(function: Any, /, *args: Any) -> Any:
            hops.append(args)
            return function(*args)

        monkeypatch.setattr(asyncio, "to_thread", to_thread)
        half = bytes(HASH_INLINE_BYTES // 2)
        await read_payloads([("a", half), ("b", half)])
        await read_payloads([])
        assert hops == []

        await read_payloads([("a", half), ("b", half), ("c", b"x")])
        assert len(hops) == 1

    async def test_a_mutable_source_is_copied(self) -> None:
        """Changing the caller's buffer afterwards changes nothing."""
        source = bytearray(b"page")
        payload = await read(source)
        source[:] = b"else"

        assert payload.body == b"page"

    async def test_bytes_are_not_copied(self) -> None:
        """Immutable bytes are taken as they are."""
        source = b"page" * 1000

        assert (await read(source)).body is source

    async def test_the_order_is_kept(self, tmp_path: Path) -> None:
        """Payloads come in the order of the columns."""
        path = tmp_path / "page"
        path.write_bytes(b"two")
        payloads = await read_payloads([("a", b"one"), ("b", path), ("c", bytearray(b"three"))])

        assert [payload.body for payload in payloads] == [b"one", b"two", b"three"]

    async def test_a_file_that_vanished_is_refused(self, tmp_path: Path) -> None:
        """A file that cannot be read is bad input, and names its column."""
        with pytest.raises(InvalidSourceError, match="'page'"):
            await read(tmp_path / "missing")

    async def test_the_body_stays_out_of_the_repr(self) -> None:
        """Nobody's bytes end up in a log."""
        assert "secret" not in repr(await read(b"secret"))


class Stream:
    """What Starlette's UploadFile does: an async `read(size)` and nothing else."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces = list(pieces)
        self.sizes: list[int] = []

    async def read(self, size: int, /) -> Any:
        self.sizes.append(size)
        piece = self.pieces.pop(0) if self.pieces else b""
        if isinstance(piece, Exception):
            raise piece
        return piece


class PlainFile:
    def read(self, size: int = -1) -> bytes:
        return b"page"


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Count the hops to a thread."""
    hops: list[Any] = []

    async def to_thread(function: Any, /, *args: Any, **more: Any) -> Any:
        hops.append(function)
        return function(*args, **more)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    return hops


class TestReadOne:
    @pytest.mark.parametrize(
        "source", [b"page", bytearray(b"page"), memoryview(b"page"), Stream(b"pa", b"g", b"e")]
    )
    async def test_without_md5(self, source: Any) -> None:
        """A payload that needs no MD5 has none, and is else the same."""
        payload = await read_payload("page", source, with_md5=False)

        assert payload == Payload(
            body=b"page",
            md5=None,
            sha256=hashlib.sha256(b"page").hexdigest(),
            crc32=zlib.crc32(b"page"),
        )

    async def test_with_md5(self, tmp_path: Path) -> None:
        """One source is read as several are."""
        path = tmp_path / "page"
        path.write_bytes(b"page")
        expected = await read(b"page")

        for source in (b"page", path, Stream(b"page")):
            assert await read_payload("page", source, with_md5=True) == expected

    async def test_leaves_the_loop_free(self, tmp_path: Path, hops: list[Any]) -> None:
        """A file, and what takes long to hash, is read in one hop to a thread."""
        path = tmp_path / "page"
        path.write_bytes(b"page")
        half = bytes(HASH_INLINE_BYTES // 2)
        await read_payload("page", half, with_md5=False)
        await read_payload("page", Stream(half, half), with_md5=False)
        assert hops == []

        for source in (path, half * 2 + b"x", Stream(half, half, b"x")):
            hops.clear()
            await read_payload("page", source, with_md5=False)
            assert len(hops) == 1

    async def test_a_stream_is_read_in_pieces(self) -> None:
        """An object with an async read is asked for 1 MiB at a time, to its end."""
        stream = Stream(bytes(READ_PIECE_BYTES), b"short", b"rest")
        payload = await read_payload("page", stream, with_md5=False)

        assert payload.size == READ_PIECE_BYTES + 9
        assert stream.sizes == [READ_PIECE_BYTES] * 4

    async def test_an_empty_stream(self) -> None:
        """No bytes are bytes too."""
        assert (await read_payload("page", Stream(), with_md5=True)) == await read(b"")

    @pytest.mark.parametrize("kind", ["bytes", "file", "stream", "one piece"])
    async def test_a_limit(self, kind: str, tmp_path: Path) -> None:
        """More than the limit is refused, with the limit; as much is taken."""
        path = tmp_path / "page"
        path.write_bytes(b"12345")

        def source() -> Any:
            streams = {"stream": Stream(b"123", b"45"), "one piece": Stream(b"12345")}
            return {"bytes": b"12345", "file": path, **streams}[kind]

        with pytest.raises(BlobTooLargeError, match="'page': 5 bytes are more than the 4 it"):
            await read_payload("page", source(), with_md5=False, max_bytes=4)
        taken = await read_payload("page", source(), with_md5=False, max_bytes=5)
        assert taken.body == b"12345"

    async def test_a_stream_without_an_end(self) -> None:
        """Reading stops at the limit."""
        stream = Stream(*[b"1234"] * 1000)

        with pytest.raises(BlobTooLargeError, match="more than"):
            await read_payload("page", stream, with_md5=False, max_bytes=9)
        assert len(stream.sizes) == 3

    async def test_a_large_file_is_not_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file beyond the limit is refused before it takes memory."""
        path = tmp_path / "page"
        path.write_bytes(b"12345")

        def read_bytes(_: Path) -> bytes:
            raise AssertionError("not reached")

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        with pytest.raises(BlobTooLargeError, match="more than"):
            await read_payload("page", path, with_md5=False, max_bytes=4)

    async def test_a_file_that_grows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The limit holds for what was really read."""
        path = tmp_path / "page"
        path.write_bytes(b"1234")
        monkeypatch.setattr(Path, "read_bytes", lambda _: b"12345")

        with pytest.raises(BlobTooLargeError, match="more than"):
            await read_payload("page", path, with_md5=False, max_bytes=4)

    @pytest.mark.parametrize(
        ("source", "hint"),
        [
            (Stream("text"), "gave str, not bytes"),
            (Stream(b"page", None), "gave NoneType, not bytes"),
            (Stream(bytearray(b"page")), "gave bytearray, not bytes"),
            (Stream(b"page", ValueError("I/O operation on closed file")), "closed file"),
            (Stream(OSError("disk full")), "disk full"),
            (PlainFile(), "PlainFile"),
            ("text", "text.encode"),
            (5, "int"),
        ],
    )
    async def test_what_cannot_be_read(self, source: Any, hint: str) -> None:
        """What gives no bytes is refused, and the column is named."""
        with pytest.raises(InvalidSourceError, match=f"'page'.*{hint}"):
            await read_payload("page", source, with_md5=False)

    async def test_a_file_that_vanished(self, tmp_path: Path) -> None:
        """A file that is not there any more is refused."""
        with pytest.raises(InvalidSourceError, match="'page'"):
            await read_payload("page", tmp_path / "missing", with_md5=False)

    async def test_what_a_stream_raises_else_goes_through(self) -> None:
        """An error of the source's own is not taken for bad input."""
        with pytest.raises(KeyError):
            await read_payload("page", Stream(KeyError("x")), with_md5=False)


class TestAsyncRead:
    async def test_what_has_one(self) -> None:
        """An object with an async `read` can be read piece by piece."""
        assert has_async_read(Stream())
        assert has_async_read(asyncio.StreamReader())

    @pytest.mark.parametrize("source", [b"page", PlainFile(), Stream, None, Path("page"), object()])
    def test_what_has_none(self, source: object) -> None:
        """Bytes, files with a plain `read`, and classes cannot."""
        assert not has_async_read(source)

    def test_the_explicit_strength_takes_none(self) -> None:
        """What may be uploaded by hand has not changed."""
        with pytest.raises(InvalidSourceError, match="Stream"):
            check_source(Stream(), column="page")
