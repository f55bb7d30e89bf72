"""The body of a request: read as botocore reads it, written as aiohttp writes it, and again."""

from __future__ import annotations

import functools
import hashlib
import io
from typing import TYPE_CHECKING, Any, cast

import pytest
from botocore.awsrequest import AWSRequest
from botocore.httpchecksum import Crc32Checksum
from botocore.utils import determine_content_length
from hypothesis import given
from hypothesis import strategies as st

from aioblobcol._store._body import SLICE_BYTES, Body

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp.abc import AbstractStreamWriter

PIECES: list[bytes | memoryview] = [b"ab", b"", memoryview(b"xcdex")[1:4], b"f"]
WHOLE = b"abcdef"

pieces = st.lists(st.binary(max_size=5), max_size=5)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("seek"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("seek"), st.integers(0, 5), st.just(1)),
        st.tuples(st.just("seek"), st.integers(-5, 5), st.just(2)),
    ),
    max_size=20,
)


def body_of(*given: bytes | memoryview) -> Body:
    return Body(given, sum(map(len, given)))


class Writer:
    """Keeps what it is given, as aiohttp's writer does with what the network does not take."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    async def write(self, chunk: bytes | memoryview) -> None:
        self.written.append(bytes(chunk))


def as_writer(writer: Writer) -> AbstractStreamWriter:
    return cast("AbstractStreamWriter", writer)


class TestReading:
    def test_ends_with_nothing(self) -> None:
        """Pieces come one by one, never joined, empty ones left out, and then nothing."""
        body = body_of(*PIECES)
        read = list(iter(functools.partial(body.read, 100), b""))

        assert [bytes(piece) for piece in read] == [b"ab", b"cde", b"f"]
        assert body.read(100) == b""
        assert body.tell() == len(WHOLE)

    def test_of_no_more_than_was_asked_for(self) -> None:
        """A piece that is larger comes in several."""
        body = body_of(b"abcdef")

        assert [bytes(body.read(4)), bytes(body.read(4)), bytes(body.read(4))] == [
            b"abcd",
            b"ef",
            b"",
        ]

    def test_of_all(self) -> None:
        """Without a size the rest comes as a whole."""
        body = body_of(*PIECES)
        body.seek(1)

        assert body.read() == b"bcdef"
        assert body.read() == b""

    @given(pieces, steps)
    def test_is_that_of_a_file(self, parts: list[bytes], moves: list[tuple[str, int, int]]) -> None:
        """Wherever it is moved, it stands and reads where a file would."""
        body, file = body_of(*parts), io.BytesIO(b"".join(parts))
        for verb, number, whence in moves:
            if verb == "seek":
                end = {0: 0, 1: file.tell(), 2: len(body)}[whence]
                expected = file.seek(max(0, end + number))
                assert body.seek(number, whence) == expected
                continue
            read = bytes(body.read(number))
            assert read == file.read(len(read))
            assert read or not number or file.tell() >= len(body)
        assert body.tell() == file.tell()
        assert body.read() == file.read()

    def test_of_nothing(self) -> None:
        """An empty body is at its end."""
        for body in (body_of(), body_of(b"", b"")):
            assert (len(body), body.read(5), body.read(), body.tell()) == (0, b"", b"", 0)

    def test_of_views_of_numbers(self) -> None:
        """Sizes are bytes, whatever a view counts."""
        view = memoryview(b"abcdefgh").cast("I")
        body = Body([view], view.nbytes)

        assert (len(body), bytes(body.read(3))) == (8, b"abc")


class TestBotocore:
    """What botocore does with a body before it is sent."""

    def test_its_length(self) -> None:
        """It is known without reading it."""
        assert determine_content_length(body_of(*PIECES)) == len(WHOLE)

    def test_its_checksum(self) -> None:
        """It is computed from where the body stands, which stands there again afterwards."""
        body = body_of(*PIECES)
        expected = Crc32Checksum()
        expected.update(WHOLE)

        assert Crc32Checksum().handle(body) == expected.b64digest()
        assert body.tell() == 0

    def test_a_second_attempt(self) -> None:
        """A request that is sent again has its body from the first byte on."""
        request = AWSRequest("PUT", "https://example.com", data=body_of(*PIECES)).prepare()
        body: Any = request.body
        body.read()
        request.reset_stream()

        assert body.read() == WHOLE

    def test_its_signature(self) -> None:
        """Hashing it in pieces gives the hash of the whole."""
        body = body_of(*PIECES)
        digest = hashlib.sha256()
        for piece in iter(functools.partial(body.read, 4), b""):
            digest.update(piece)

        assert digest.hexdigest() == hashlib.sha256(WHOLE).hexdigest()


class TestWriting:
    @pytest.mark.parametrize(
        "given",
        [
            [],
            [b""],
            PIECES,
            [bytes(SLICE_BYTES)],
            [bytes(SLICE_BYTES + 1), b"x"],
            [memoryview(bytes(range(256)) * (3 * SLICE_BYTES // 256))],
        ],
        ids=["none", "empty", "small", "one slice", "two", "three"],
    )
    async def test_in_slices(self, given: Sequence[bytes | memoryview]) -> None:
        """The transport never gets more at once than one slice, and all of it in order."""
        writer = Writer()
        await body_of(*given).write(as_writer(writer))

        assert b"".join(writer.written) == b"".join(given)
        assert all(0 < len(chunk) <= SLICE_BYTES for chunk in writer.written)

    async def test_again(self) -> None:
        """An attempt may be repeated, wherever a reader has left the body."""
        body, first, second = body_of(*PIECES), Writer(), Writer()
        body.read(3)
        await body.write_with_length(as_writer(first), len(WHOLE))
        await body.write_with_length(as_writer(second), None)

        assert b"".join(first.written) == b"".join(second.written) == WHOLE

    def test_its_headers(self) -> None:
        """It tells aiohttp its length, and no type of its own."""
        body = body_of(*PIECES)

        assert dict(body.headers) == {"Content-Length": str(len(WHOLE))}
        assert body.size == len(WHOLE)

    def test_is_no_text(self) -> None:
        """Nobody decodes it by mistake."""
        with pytest.raises(TypeError, match="not decoded"):
            body_of(*PIECES).decode()
