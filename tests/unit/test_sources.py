"""Bytes from anywhere: what may be uploaded, and what is read of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import os
import tempfile
import zlib
from pathlib import Path, PurePath
from typing import Any

import httpx
import pytest
from support.streams import AiohttpResponse, Chunks, PlainFile, Response, Stream, iterated

from aioblobcol._sources import (
    HASH_INLINE_BYTES,
    MAX_OBJECT_BYTES,
    BlobSource,
    Buffer,
    Payload,
    check_source,
    is_async_source,
    is_binary_file,
    read_payload,
    read_payloads,
)
from aioblobcol.errors import BlobTooLargeError, InvalidSourceError


async def read(source: Buffer | Path) -> Payload:
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

    def test_more_than_one_object_takes_is_refused_unread(self, tmp_path: Path) -> None:
        """A file of more than 5 TiB is refused by its size."""
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(MAX_OBJECT_BYTES + 1)  # a hole, no bytes

        with pytest.raises(InvalidSourceError, match="5 TiB"):
            check_source(path, column="page")

    @pytest.mark.parametrize("kind", ["text", "io", "class", "dict"])
    def test_text_files_and_the_like_are_refused(self, kind: str, tmp_path: Path) -> None:
        """A file that gives text is refused, and so is what only looks like a file."""
        path = tmp_path / "page"
        path.write_text("page")
        with path.open() as file:
            source = {"text": file, "io": io.StringIO(""), "class": io.BytesIO, "dict": {}}[kind]
            with pytest.raises(InvalidSourceError, match="'page'"):
                check_source(source, column="page")


class TestRead:
    @pytest.mark.parametrize(
        "source",
        [b"page", bytearray(b"page"), memoryview(b"page"), memoryview(b"pXaXgXeX")[::2]],
    )
    async def test_all_digests_are_of_the_same_bytes(self, source: Buffer | Path) -> None:
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
    @pytest.mark.parametrize("source", [b"page", bytearray(b"page"), memoryview(b"page")])
    async def test_without_md5(self, source: Any) -> None:
        """A payload that needs no MD5 has none, and is else the same."""
        payload = await read_payload("page", source, with_md5=False)

        assert payload == dataclasses.replace(await read(b"page"), md5=None)

    async def test_leaves_the_loop_free(self, tmp_path: Path, hops: list[Any]) -> None:
        """A file, and what takes long to hash, is read in one hop to a thread."""
        path = tmp_path / "page"
        path.write_bytes(b"page")
        half = bytes(HASH_INLINE_BYTES // 2)
        await read_payload("page", half, with_md5=False)
        assert hops == []

        for source in (path, half * 2 + b"x"):
            hops.clear()
            await read_payload("page", source, with_md5=False)
            assert len(hops) == 1

    @pytest.mark.parametrize("kind", ["bytes", "file"])
    async def test_a_limit(self, kind: str, tmp_path: Path) -> None:
        """More than the limit is refused, with the limit; as much is taken."""
        path = tmp_path / "page"
        path.write_bytes(b"12345")
        source = b"12345" if kind == "bytes" else path

        with pytest.raises(BlobTooLargeError, match="'page': 5 bytes are more than the 4 it"):
            await read_payload("page", source, with_md5=False, max_bytes=4)
        assert (await read_payload("page", source, with_md5=True, max_bytes=5)).size == 5

    async def test_a_file_that_vanished(self, tmp_path: Path) -> None:
        """A file that is not there any more is refused."""
        with pytest.raises(InvalidSourceError, match="'page'"):
            await read_payload("page", tmp_path / "missing", with_md5=False)


class TestKinds:
    @pytest.mark.parametrize(
        "source", [Stream(), Chunks(), Response(), AiohttpResponse(), iterated(b"a")]
    )
    def test_asynchronous_ones(self, source: object) -> None:
        """What is awaited or iterated piece by piece is a source, and no file."""
        assert is_async_source(source)
        assert not is_binary_file(source)
        assert check_source(source, column="page") is None

    async def test_httpx_s_own_response(self) -> None:
        """A response that was not read yet is not asked for its content, which it has none of."""
        response = httpx.Response(200, stream=httpx.ByteStream(b"page"))
        with pytest.raises(httpx.ResponseNotRead):
            _ = response.content

        assert is_async_source(response)
        assert check_source(response, column="page") is None

    async def test_the_loop_s_own_stream(self) -> None:
        """Asyncio's StreamReader is one."""
        assert is_async_source(asyncio.StreamReader())

    @pytest.mark.parametrize("kind", [PlainFile, io.BytesIO, tempfile.SpooledTemporaryFile])
    def test_files(self, kind: Any) -> None:
        """What has a `read` that gives bytes is a file."""
        with contextlib.closing(kind()) as source:
            assert is_binary_file(source)
            assert not is_async_source(source)
            assert check_source(source, column="page") is None

    @pytest.mark.parametrize("source", [b"page", "page", Stream, None, Path("page"), object()])
    def test_what_is_neither(self, source: object) -> None:
        """Bytes, paths, classes and others are neither."""
        assert not is_async_source(source)
        assert not is_binary_file(source)
