"""`Blob`: what it takes, what it tells, and what it does without a database."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import pickle
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.uploads import Upload

from aioblobcol import Blob, ObjectInfo, Store, open_blob
from aioblobcol._blob import BlobFacts
from aioblobcol._sources import Payload
from aioblobcol._store._base import PutRequest
from aioblobcol._streams import ReadOnce
from aioblobcol.errors import (
    BlobNotFoundError,
    BlobNotUploadedError,
    BlobTooLargeError,
    BlobUnboundError,
    InvalidInputError,
    InvalidPutArgumentsError,
    InvalidS3UriError,
    InvalidSourceError,
)
from aioblobcol.testing import MemoryStore

URI = "s3://bucket/prefix/k"
FACTS = BlobFacts(size=4, content_type="text/html", sha256="ab", filename="page.html")


def pickled(blob: Blob) -> Blob:
    made: Blob = pickle.loads(pickle.dumps(blob))  # noqa: S301 - ours
    return made


def stored(uri: str = URI, *, store: Store | None = None) -> Blob:
    return Blob.from_uri(uri, store=store)


def loaded() -> Blob:
    return Blob._stored(URI, FACTS, store_name="archive")


async def put(store: Store, body: bytes, **metadata: str) -> None:
    payload = Payload(body=body, md5=None, sha256="ab", crc32=0)
    arguments = {"ContentType": "text/html"}
    await store.put(PutRequest("html", URI, payload, metadata, arguments))


class TestSources:
    @pytest.mark.parametrize("source", [b"page", bytearray(b"page"), memoryview(b"page")])
    def test_bytes_of_any_kind(self, source: bytes | bytearray | memoryview) -> None:
        """Bytes-like sources are taken, and their length is known."""
        assert Blob(source).size == 4

    def test_the_length_of_a_memoryview_is_in_bytes(self) -> None:
        """A view on larger items counts bytes."""
        assert Blob(memoryview(bytes(8)).cast("I")).size == 8

    def test_a_path(self, tmp_path: Path) -> None:
        """A file gives its name; nothing of it is read, so its size is not known."""
        path = tmp_path / "cat.png"
        path.write_bytes(b"cat")
        blob = Blob(path)

        assert (blob.filename, blob.size, blob.content_type) == ("cat.png", None, None)
        assert Blob(path, filename="other").filename == "other"

    def test_an_upload(self) -> None:
        """An object with an async `read` gives its name, type and size, unless told otherwise."""
        upload = Upload(b"cat", filename="cat.png", content_type="image/png")
        blob = Blob(upload)
        named = Blob(upload, filename="dog.gif", content_type="image/gif")

        assert (blob.filename, blob.content_type, blob.size) == ("cat.png", "image/png", 3)
        assert (named.filename, named.content_type) == ("dog.gif", "image/gif")
        assert upload.position == 0

    @pytest.mark.parametrize("said", [None, "", 5])
    def test_an_upload_that_says_nothing(self, said: Any) -> None:
        """What a client left out, or an object has another use for, is not taken over."""
        blob = Blob(Upload(b"cat", filename=said, content_type=said, size="?"))

        assert (blob.filename, blob.content_type, blob.size) == (None, None, None)

    @pytest.mark.parametrize(
        ("source", "advice"),
        [
            ("text", "text.encode"),
            ("s3://bucket/k", "text.encode"),
            (None, "NoneType"),
            (5, "int"),
            (Path("missing"), "not a file"),
            (Path(), "not a file"),
            (Upload, "type"),
            (Blob(b"page"), "blob.copy"),
        ],
    )
    def test_what_has_no_bytes(self, source: Any, advice: str) -> None:
        """Anything else is refused at once, also as a TypeError, with what to write instead."""
        with pytest.raises(InvalidSourceError, match=advice) as caught:
            Blob(source)
        assert isinstance(caught.value, TypeError)


class TestDescription:
    @pytest.mark.parametrize(
        "given",
        ["text/html", "text/html; charset=utf-8", "image/svg+xml", "application/vnd.a.b-c+json"],
    )
    def test_content_types(self, given: str) -> None:
        """A content type is kept as it was given, parameters and all."""
        assert Blob(b"page", content_type=given).content_type == given

    @pytest.mark.parametrize(
        "given",
        ["", "png", "/", "image/", "/png", "image/png\r\nx: y", "imäge/png", "a b/c", b"image/png"],
    )
    def test_what_is_no_content_type(self, given: Any) -> None:
        """What no header could carry is refused."""
        with pytest.raises(InvalidInputError, match="image/png"):
            Blob(b"page", content_type=given)

    @pytest.mark.parametrize("filename", ["Müller & Söhne.pdf", "a/b.txt", "x\ny", ""])
    def test_file_names(self, filename: str) -> None:
        """A file name is any text: it goes into metadata, never into a key."""
        assert Blob(b"page", filename=filename).filename == filename

    @pytest.mark.parametrize("filename", [5, b"x", "\ud800", "x" * 2000])
    def test_what_is_no_file_name(self, filename: Any) -> None:
        """What metadata cannot hold is refused at once."""
        with pytest.raises(InvalidInputError, match=r"filename|2048"):
            Blob(b"page", filename=filename)

    @pytest.mark.parametrize(
        "metadata",
        [
            {"": "x"},
            {"ü": "x"},
            {"a": 5},
            {5: "x"},
            {"a": "x", "A": "y"},
            {"a": "x" * 1978},  # with the SHA-256 it is a byte too much
            {"filename": "x"},
            {"SHA256": "x"},
        ],
    )
    def test_unusable_metadata(self, metadata: Any) -> None:
        """Metadata that S3 would not keep, or that the library sets, is refused at once."""
        with pytest.raises(InvalidPutArgumentsError):
            Blob(b"page", metadata=metadata)

    def test_metadata_is_copied(self) -> None:
        """What the caller does to its dict afterwards changes nothing."""
        metadata = {"a": "x" * 1977}
        blob = Blob(b"page", metadata=metadata)
        metadata.clear()

        assert blob._metadata == {"a": "x" * 1977}


class TestStates:
    def test_pending(self) -> None:
        """A new blob has no URI, and the error says how it gets one."""
        blob = Blob(b"page")

        assert not blob.is_stored
        with pytest.raises(BlobNotUploadedError, match="flush or commit"):
            blob.uri  # noqa: B018 - raises
        assert blob.sha256 is None

    def test_stored(self) -> None:
        """A loaded blob tells what its row tells."""
        blob = loaded()

        assert blob.is_stored
        assert blob.uri == URI
        assert (blob.size, blob.content_type) == (4, "text/html")
        assert (blob.sha256, blob.filename) == ("ab", "page.html")

    def test_from_uri(self) -> None:
        """A blob of a URI is stored, and knows nothing more."""
        blob = stored()

        assert blob.is_stored
        assert blob.uri == URI
        assert (blob.size, blob.content_type, blob.sha256, blob.filename) == (None,) * 4

    @pytest.mark.parametrize("uri", ["", "page", "http://x/y", "s3://bucket", b"s3://b/k", None])
    def test_from_something_else(self, uri: Any) -> None:
        """Only an S3 URI makes a stored blob."""
        with pytest.raises(InvalidS3UriError):
            Blob.from_uri(uri)

    @pytest.mark.parametrize(
        ("blob", "shown"),
        [
            (Blob(b"page"), "<Blob pending, 4 bytes>"),
            (
                Blob(b"page", content_type="text/html", filename="p.html"),
                "<Blob pending, 4 bytes, text/html, p.html>",
            ),
            (stored(), f"<Blob {URI}>"),
            (loaded(), f"<Blob {URI}, 4 bytes, text/html, page.html>"),
            (stored().copy(), f"<Blob pending copy of {URI}>"),
            (loaded().copy(), f"<Blob pending copy of {URI}, 4 bytes, text/html, page.html>"),
        ],
    )
    def test_repr(self, blob: Blob, shown: str) -> None:
        """The repr tells the state, and what is known; never the bytes."""
        assert repr(blob) == shown

    def test_repr_of_a_file(self) -> None:
        """The repr of a file tells its path."""
        assert repr(Blob(Path(__file__))) == f"<Blob pending {__file__}, test_blob.py>"


class TestEquality:
    def test_stored_ones_are_equal_by_uri(self) -> None:
        """Two stored blobs are equal if their URIs are."""
        assert stored() == loaded()
        assert stored() != stored("s3://bucket/prefix/other")

    def test_a_pending_one_equals_itself(self) -> None:
        """Pending blobs of the same bytes are two uploads."""
        blob = Blob(b"page")

        assert blob == blob  # noqa: PLR0124 - the point
        assert blob != Blob(b"page")
        assert blob != blob.copy()
        assert blob != stored()

    @pytest.mark.parametrize("other", [URI, b"page", None])
    def test_nothing_else_is_equal(self, other: object) -> None:
        """A blob equals neither its URI nor its bytes."""
        assert stored() != other

    @pytest.mark.parametrize("blob", [Blob(b"page"), stored()])
    def test_it_has_no_hash(self, blob: Blob) -> None:
        """Equality changes with the state, so a blob is no member of a set."""
        with pytest.raises(TypeError, match="unhashable"):
            hash(blob)


class TestCopy:
    def test_of_a_pending_one(self) -> None:
        """A copy of a pending blob is another upload of the same bytes, described alike."""
        blob = Blob(b"page", content_type="text/html", filename="p", metadata={"a": "x"})
        other = blob.copy()

        assert not other.is_stored
        assert (other.size, other.content_type, other.filename) == (4, "text/html", "p")
        assert other._metadata == {"a": "x"}
        assert other._metadata is not blob._metadata

    def test_of_a_stored_one(self) -> None:
        """A copy of a stored blob is pending, and tells what the original tells."""
        other = loaded().copy()

        assert not other.is_stored
        assert (other.size, other.content_type, other.filename) == (4, "text/html", "page.html")
        with pytest.raises(BlobNotUploadedError):
            other.uri  # noqa: B018 - raises

    def test_of_a_copy(self) -> None:
        """A copy of a copy that is pending still is a copy of the stored one."""
        assert repr(stored().copy().copy()) == f"<Blob pending copy of {URI}>"

    async def test_uploads_are_read_once_for_all_copies(self) -> None:
        """Copies of one upload share its bytes."""
        upload = Upload(b"cat")
        blob = Blob(upload)
        sources = [each._source for each in (blob, blob.copy())]
        read = await asyncio.gather(
            *(each.open("c", max_bytes=None) for each in sources if isinstance(each, ReadOnce))
        )

        assert [each.body for each in read if isinstance(each, Payload)] == [b"cat", b"cat"]
        assert upload.reads == 2  # the bytes, and the end

    async def test_an_upload_that_was_read_in_part(self) -> None:
        """The rest of an upload never passes for the whole."""
        source = Blob(Upload(b"0123456789", size=None, piece=4))._source
        assert isinstance(source, ReadOnce)

        with pytest.raises(BlobTooLargeError):
            await source.open("c", max_bytes=3)
        with pytest.raises(InvalidSourceError, match="at least in part"):
            await source.open("c", max_bytes=None)


class TestPickle:
    @pytest.mark.parametrize("source", [b"page", bytearray(b"page"), memoryview(b"page")])
    def test_pending_bytes(self, source: Any) -> None:
        """A pending blob travels with its bytes and its description."""
        blob = Blob(source, content_type="text/html", filename="p", metadata={"a": "x"})
        other = pickled(blob)

        assert repr(other) == "<Blob pending, 4 bytes, text/html, p>"
        assert other._source == b"page"
        assert other._metadata == {"a": "x"}

    def test_a_path(self) -> None:
        """A pending file travels as its path."""
        assert repr(pickled(Blob(Path(__file__)))) == repr(Blob(Path(__file__)))

    def test_a_pending_copy(self) -> None:
        """A pending copy travels with what it is a copy of."""
        assert repr(pickled(loaded().copy())) == repr(loaded().copy())

    async def test_an_upload(self) -> None:
        """An upload travels once it was read; before, the error says what to do."""
        blob = Blob(Upload(b"cat", filename="cat.png"))
        with pytest.raises(TypeError, match=re.escape("Blob(await upload.read())")):
            pickle.dumps(blob)
        assert isinstance(blob._source, ReadOnce)
        await blob._source.open("c", max_bytes=None)

        assert repr(pickled(blob)) == "<Blob pending, 3 bytes, cat.png>"

    @pytest.mark.parametrize("copied", [pickled, copy.copy, copy.deepcopy])
    async def test_a_stored_one(self, copied: Callable[[Blob], Blob]) -> None:
        """A stored blob travels without its store, and the error says how to read it."""
        blob = loaded()
        async with MemoryStore() as store:
            blob._store = store
            other = copied(blob)
            assert other == blob
            assert repr(other) == repr(blob)
            with pytest.raises(BlobUnboundError, match=re.escape("open_blob(store, blob)")):
                await other.read()

    def test_it_finds_its_store_again(self) -> None:
        """A session knows by the column's store name where a blob from a pickle is read."""
        archive = MemoryStore()
        other = pickled(loaded())
        other._bind({"default": MemoryStore(), "archive": archive})

        assert other._bound() is archive


class TestReading:
    async def test_with_its_store(self, memory_store: MemoryStore) -> None:
        """A bound blob is read, streamed, described and presigned."""
        await put(memory_store, b"page", filename="p.html")
        blob = stored(store=memory_store)

        assert await blob.read() == b"page"
        async with blob.open() as body:
            assert [chunk async for chunk in body] == [b"page"]
        assert dataclasses.replace(await blob.stat(), modified_at=None, etag=None) == ObjectInfo(
            URI, 4, {"filename": "p.html"}, content_type="text/html"
        )
        url = await blob.presigned_url(expires_in=timedelta(minutes=1), download_as="x.html")
        assert "expires_in=60" in url
        assert "x.html" in url

    async def test_presigned_for_a_quarter_of_an_hour(self, memory_store: MemoryStore) -> None:
        """A presigned URL lives 15 minutes by default, and not for no time at all."""
        blob = stored(store=memory_store)

        assert "expires_in=900" in await blob.presigned_url()
        with pytest.raises(InvalidInputError):
            await blob.presigned_url(expires_in=timedelta(0))

    async def test_an_object_that_is_gone(self, memory_store: MemoryStore) -> None:
        """Reading what was deleted tells so."""
        blob = stored(store=memory_store)
        for read in (blob.read(), blob.stat(), blob.open().__aenter__()):
            with pytest.raises(BlobNotFoundError):
                await read

    @pytest.mark.parametrize(
        "read",
        [Blob.read, Blob.stat, Blob.presigned_url, lambda blob: blob.open().__aenter__()],
    )
    @pytest.mark.parametrize(
        ("blob", "error", "advice"),
        [
            (Blob(b"page"), BlobNotUploadedError, "flush or commit"),
            (stored().copy(), BlobNotUploadedError, "flush or commit"),
            (stored(), BlobUnboundError, "open_blob(store, blob)"),
        ],
        ids=["pending", "pending copy", "unbound"],
    )
    async def test_what_cannot_be_read(
        self, read: Callable[[Blob], Any], blob: Blob, error: type[Exception], advice: str
    ) -> None:
        """A pending or unbound blob cannot be read, and the error says what to do."""
        with pytest.raises(error, match=re.escape(advice)):
            await read(blob)

    @pytest.mark.parametrize("blob", [stored(), URI])
    async def test_with_any_store(self, memory_store: MemoryStore, blob: Blob | str) -> None:
        """`open_blob` reads a blob, or a URI, from the store that it is given."""
        await put(memory_store, b"page")

        async with open_blob(memory_store, blob) as body:
            assert await body.read() == b"page"

    async def test_open_blob_of_nothing(self, memory_store: MemoryStore) -> None:
        """`open_blob` of a pending blob, of other text, or of a missing object raises."""
        for blob, error in (
            (Blob(b"page"), BlobNotUploadedError),
            (URI, BlobNotFoundError),
        ):
            with pytest.raises(error):
                await open_blob(memory_store, blob).__aenter__()
