"""``Blob``: the value of a managed column, first to be uploaded and then stored.

One class for both, because it stays in the attribute: the session uploads it, the row gets its
URI, and when the transaction is rolled back it is to be uploaded again, under a fresh key. Knows
stores and nothing of SQLAlchemy; what the session does to a blob is in the methods with a
leading underscore. Invariants: a blob that has a URI has exactly one, that of its own object; it
is admitted into a statement only by the session that uploaded it, for the cell it was meant for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mimetypes
import re
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from ._download import byte_range, download_object, open_object, read_object
from ._sources import (
    MAX_OBJECT_BYTES,
    PART_BYTES,
    BlobSource,
    OnProgress,
    check_size,
    check_source,
    is_async_source,
    is_binary_file,
)
from ._store._metadata import encode_metadata
from ._streams import ReadOnce
from ._uri import split_s3_uri
from .errors import (
    BlobNotUploadedError,
    BlobUnboundError,
    InvalidInputError,
    InvalidPutArgumentsError,
    InvalidSourceError,
    SizeMismatchError,
    UnsafeTransactionError,
)

if TYPE_CHECKING:
    from ._store._base import ObjectInfo, ObjectReader, Store

PRESIGNED_FOR = timedelta(minutes=15)

_CONTENT_TYPE = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+-]+(?: *;[ -~]*)?", re.ASCII)
_OWN_METADATA = frozenset({"filename", "sha256"})


@dataclasses.dataclass(frozen=True, slots=True)
class BlobFacts:
    """What is known of a stored object without asking for it; None where it is not."""

    size: int | None = None
    content_type: str | None = None
    sha256: str | None = None
    filename: str | None = None


NO_FACTS: Final = BlobFacts()


class Owner(Protocol):
    """The transaction that has uploaded a blob and not ended yet."""

    def sends(self, blob: Blob) -> None:
        """A statement that names the blob is on its way."""


class Blob:
    """Bytes to be uploaded by the session's flush, or an object that is stored already.

    ::

        task.html = Blob(b"<html>", content_type="text/html")
        task.image = Blob(Path("cat.png"))
        task.image = None                       # the object goes after the commit
        data = await task.html.read()           # of a row that was loaded

    A stored blob belongs to the cell (row and column) that it was read from. Assigned to
    another one, or back to its own after it was replaced, it is copied by the server to a fresh
    key when the session is flushed; the same holds for one pending blob that is assigned twice.
    Two stored blobs are equal if their URIs are; a pending one equals only itself.

    A loaded blob knows its store: the session binds it by the column's store name when it
    loads the row, and it can be read after the session is closed. One that came another way (a
    plain session, ``select(Task.html)``, a pickle, `from_uri`) is read with `open_blob` or
    `download_blob`.
    """

    __slots__ = (
        "__weakref__",
        "_admitted_by",
        "_cell",
        "_content_type",
        "_copy_of",
        "_facts",
        "_filename",
        "_metadata",
        "_on_progress",
        "_owner",
        "_source",
        "_store",
        "_store_name",
        "_uri",
    )
    __hash__ = None  # type: ignore[assignment]  # equality changes with the state

    def __init__(
        self,
        source: BlobSource,
        *,
        content_type: str | None = None,
        filename: str | None = None,
        metadata: Mapping[str, str] | None = None,
        size: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Take bytes to be uploaded later; nothing is read or sent now.

        Args:
            source: bytes, bytearray, memoryview, the `pathlib.Path` of a file, a file that is
                open in binary mode, an async iterator of bytes, an object with an async ``read``
                (Starlette's ``UploadFile``, aiohttp's streams and body parts), or a response of
                httpx or aiohttp. Content type and file name of an upload are taken over. More
                than 8 MiB are uploaded part by part, and never in memory as a whole. What can be
                read only once is kept until the commit if it is not larger, so that it can be
                uploaded again after a rollback; what is larger has to be rewound, or assigned
                anew.
            content_type: such as ``image/png``; else the column's, else guessed from the file
                name, else ``application/octet-stream``.
            filename: the user's name for it; goes into the object's metadata, never into its
                key. By default that of a path or an upload.
            metadata: more of the object's metadata, 2 KiB in all; not the library's own
                ``filename`` and ``sha256``.
            size: bytes that there have to be, such as the request's ``Content-Length``; the upload
                fails if there are others.
            on_progress: told of what was sent.

        Raises:
            InvalidSourceError: nothing that has bytes, or another number of them than *size*.
            InvalidInputError: an unusable content type, file name or metadata.
        """
        if isinstance(source, Blob):
            raise InvalidSourceError("this is a Blob already; blob.copy() makes another one")
        self._source: BlobSource | ReadOnce | None
        known = check_source(source, column="Blob")
        if size is not None:
            check_declared(size, known)
        if is_async_source(source) or is_binary_file(source):
            self._source = ReadOnce(source, size=size)  # type: ignore[arg-type]  # just checked
            filename = filename or _text_of(source, "filename")
            content_type = content_type or _content_type_of(source)
        else:
            self._source = source
            if filename is None and isinstance(source, Path):
                filename = source.name
        self._on_progress = on_progress
        self._copy_of: Blob | None = None
        self._content_type = checked_content_type(content_type)
        self._filename = filename
        self._metadata = dict(metadata or {})
        if self._metadata:
            own = [name for name in self._metadata if str(name).lower() in _OWN_METADATA]
            if own:
                raise InvalidPutArgumentsError(f"metadata: {', '.join(own)} is set by the library")
        object_metadata(self._metadata, filename=filename, sha256="0" * 64)  # may refuse it
        self._reset()

    def _reset(self) -> None:
        """Become pending (again): whatever was uploaded is not this blob's any more."""
        self._uri: str | None = None
        self._facts = NO_FACTS
        self._store: Store | None = None
        self._store_name: str | None = None
        self._owner: Owner | None = None
        self._admitted_by: Owner | None = None
        self._cell: object = None

    @classmethod
    def _stored(cls, uri: str, facts: BlobFacts, *, store_name: str | None = None) -> Blob:
        blob = cls.__new__(cls)
        blob._source = blob._copy_of = blob._content_type = blob._filename = None
        blob._on_progress = None
        blob._metadata = {}
        blob._reset()
        blob._uri, blob._facts, blob._store_name = uri, facts, store_name
        return blob

    @classmethod
    def from_uri(cls, uri: str, *, store: Store | None = None) -> Blob:
        """Return a stored blob for a URI that your own code vouches for, never a client's.

        Assigned to a column it is copied, like every stored blob.

        Args:
            uri: ``s3://bucket/key``.
            store: to read it from.

        Raises:
            InvalidS3UriError: not an S3 URI.
        """
        split_s3_uri(uri)
        blob = cls._stored(uri, NO_FACTS)
        blob._store = store
        return blob

    # --- what it is

    @property
    def is_stored(self) -> bool:
        """Whether it has an object, and so a URI: of a row, or uploaded by a running session."""
        return self._uri is not None

    @property
    def uri(self) -> str:
        """``s3://bucket/key``.

        Raises:
            BlobNotUploadedError: it gets one when the session is flushed.
        """
        if self._uri is None:
            raise BlobNotUploadedError(
                "this Blob is not uploaded yet and has no URI: add its row to a session and "
                "flush or commit it. (After a rollback it waits to be uploaded again.)"
            )
        return self._uri

    @property
    def size(self) -> int | None:
        """Length in bytes; None of a file, and of a row with a plain URI (ask `stat`)."""
        if self._uri is not None:
            return self._facts.size
        if self._copy_of is not None:
            return self._copy_of.size
        source = self._source
        if isinstance(source, ReadOnce):
            return source.size
        if isinstance(source, (bytes, bytearray, memoryview)):
            return memoryview(source).nbytes
        return None

    @property
    def content_type(self) -> str | None:
        """What it was given, or what the row tells; None if neither does (ask `stat`)."""
        if self._uri is None and self._copy_of is not None:
            return self._copy_of.content_type
        return self._facts.content_type or self._content_type

    @property
    def filename(self) -> str | None:
        """What it was given, or what the row tells; None if neither does (ask `stat`)."""
        if self._uri is None and self._copy_of is not None:
            return self._copy_of.filename
        return self._facts.filename or self._filename

    @property
    def sha256(self) -> str | None:
        """Of its bytes, in hexadecimal, as they were uploaded; None if the row does not tell."""
        return self._facts.sha256

    # --- what it does

    async def read(self, *, start: int = 0, stop: int | None = None) -> bytes:
        """Return the object's bytes, or a part of them.

        A connection that breaks off is replaced by one that reads on where it stopped. Of the
        whole object size and checksum are compared with what was stored.

        Args:
            start: the first byte.
            stop: the one after the last; to the end by default. What lies beyond it is left out.

        Raises:
            BlobNotUploadedError: there is none yet.
            BlobUnboundError: it does not know its store.
            InvalidInputError: a negative number, or a stop before the start; nothing was sent.
            BlobNotFoundError: it is gone: the row was replaced or deleted since.
            BlobChangedError: somebody has overwritten it while it was read.
            BlobCorruptedError: it is not what was stored.
            StoreError: it could not be read.
        """
        facts = self._facts
        return await read_object(
            self._bound(),
            self.uri,
            part=byte_range(start, stop),
            size=facts.size,
            sha256=facts.sha256,
        )

    @contextlib.asynccontextmanager
    async def open(
        self,
        *,
        start: int = 0,
        stop: int | None = None,
        parts_at_once: int = 1,
        on_progress: OnProgress | None = None,
    ) -> AsyncIterator[ObjectReader]:
        """Stream the object: ``async with blob.open() as body: async for chunk in body: ...``.

        Nothing is read ahead of the loop but what the connection holds. Leaving the block early
        closes the connection. A checksum that differs is an error after the last chunk: what
        must not be used unverified is not used before the loop has ended.

        Args:
            start: the first byte.
            stop: the one after the last; to the end by default.
            parts_at_once: with more than one, so many parts of 8 MiB are read at the same time,
                ahead of the loop, and kept in memory; they come in order.
            on_progress: told of every chunk.

        Errors are those of `read`; those of the checksum and of the connection come from the
        loop.
        """
        store, uri = self._bound(), self.uri
        async with open_object(
            store,
            uri,
            part=byte_range(start, stop),
            size=self._facts.size,
            sha256=self._facts.sha256,
            parts_at_once=parts_at_once,
            on_progress=on_progress,
        ) as body:
            yield body

    async def download_to(
        self,
        path: Path | str,
        *,
        on_progress: OnProgress | None = None,
        parts_at_once: int = 8,
    ) -> ObjectInfo:
        """Write the object into a file, and describe it; see `download_blob`.

        Errors are those of `read`, and OSError if the file could not be written.
        """
        return await download_blob(
            self._bound(), self, path, on_progress=on_progress, parts_at_once=parts_at_once
        )

    async def stat(self) -> ObjectInfo:
        """Ask S3 about the object: size, content type, metadata (one HEAD).

        Errors are those of `read`.
        """
        return await self._bound().head(self.uri)

    async def presigned_url(
        self, *, expires_in: timedelta = PRESIGNED_FOR, download_as: str | None = None
    ) -> str:
        """Return a URL with which whoever has it can read the object for a while.

        It is a key: do not log it.

        Args:
            expires_in: a second at least, seven days at most.
            download_as: make a browser save it under this name.

        Raises:
            BlobNotUploadedError, BlobUnboundError: as `read`.
            InvalidInputError: an unusable time.
        """
        return await self._bound().presign(self.uri, expires_in=expires_in, download_as=download_as)

    def copy(self) -> Blob:
        """Return a pending blob with the same contents; nothing is read or sent now.

        Of a stored blob the server makes the copy when the session is flushed, and the
        transaction owns it like an upload.
        """
        blob = Blob.__new__(Blob)
        blob._source, blob._copy_of = self._source, self._copy_of
        if self._source is None and self._copy_of is None:
            blob._copy_of = self
        blob._content_type, blob._filename = self._content_type, self._filename
        blob._metadata = dict(self._metadata)
        blob._on_progress = None
        blob._reset()
        return blob

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Blob):
            return NotImplemented
        return self is other or (self._uri is not None and self._uri == other._uri)

    def __repr__(self) -> str:
        if self._uri is not None:
            what = [self._uri]
        elif self._copy_of is not None:
            what = [f"pending copy of {self._copy_of._uri}"]
        else:
            name = str(self._source) if isinstance(self._source, Path) else ""
            what = ["pending" + (f" {name}" if name else "")]
        if self.size is not None:
            what.append(f"{self.size} bytes")
        what += [text for text in (self.content_type, self.filename) if text]
        return f"<Blob {', '.join(what)}>"

    def __getstate__(self) -> dict[str, Any]:
        """Pickle what it is, not the store and not the transaction that it is in."""
        if self._uri is not None:
            return {"uri": self._uri, "facts": self._facts, "store_name": self._store_name}
        source = self._source
        return {
            "source": bytes(source) if isinstance(source, memoryview) else source,
            "copy_of": self._copy_of,
            "content_type": self._content_type,
            "filename": self._filename,
            "metadata": self._metadata,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._source, self._copy_of = state.get("source"), state.get("copy_of")
        self._content_type, self._filename = state.get("content_type"), state.get("filename")
        self._metadata = state.get("metadata", {})
        self._on_progress = None
        self._reset()
        if "uri" in state:
            self._uri, self._facts = state["uri"], state["facts"]
            self._store_name = state["store_name"]

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> Any:
        from ._pydantic import blob_schema  # noqa: PLC0415 - only where pydantic is

        return blob_schema()

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: Any, handler: Any) -> dict[str, Any]:
        from ._pydantic import blob_json_schema  # noqa: PLC0415 - only where pydantic is

        return blob_json_schema(handler.mode)

    # --- what the session does to it

    def _was_uploaded(self, uri: str, facts: BlobFacts, *, store: Store, owner: Owner) -> None:
        self._uri, self._facts, self._store, self._owner = uri, facts, store, owner

    def _is_settled(self) -> None:
        """The row that names it is committed: what it was made of is not needed any more."""
        self._source = self._copy_of = self._owner = self._admitted_by = None
        self._on_progress = None

    def _uri_for_statement(self) -> str:
        """Return the URI for a row, if its session has admitted it into this statement."""
        if self._uri is None:
            raise BlobNotUploadedError(
                "a Blob was sent to the database before it was uploaded: this session does not "
                "upload (make it with blob_sessionmaker() or track_blobs()), or the statement is "
                "one in which the session does not see it (Core on the table, an upsert, a bulk "
                "method of the legacy kind, a bindparam() or an expression in a bulk statement, "
                "an event that assigned it after the uploads)"
            )
        if self._admitted_by is None:
            raise UnsafeTransactionError(
                f"{self._uri} belongs to the cell that it was read from, and another one would "
                "share its object: assign blob.copy() to the attribute of a mapped object"
            )
        self._admitted_by.sends(self)
        return self._uri

    def _bind(self, stores: Mapping[str, Store]) -> None:
        """Learn where it is read, of a session's stores."""
        if self._uri is not None and self._store is None and self._store_name is not None:
            self._store = stores.get(self._store_name)

    def _bound(self) -> Store:
        self.uri  # noqa: B018 - raises when it is pending
        if self._store is None:
            raise BlobUnboundError(
                f"{self!r} does not know its store: it was not loaded as an attribute of a mapped "
                "object by a session of blob_sessionmaker() or track_blobs(). Read it with "
                "`async with open_blob(store, blob) as body:`"
            )
        return self._store


@contextlib.asynccontextmanager
async def open_blob(
    store: Store,
    blob: Blob | str,
    *,
    start: int = 0,
    stop: int | None = None,
    parts_at_once: int = 1,
    on_progress: OnProgress | None = None,
) -> AsyncIterator[ObjectReader]:
    """Stream an object from *store*: for blobs that do not know their own, and for plain URIs.

    ::

        async with open_blob(store, task.html) as body:
            async for chunk in body: ...

    Args:
        store: open.
        blob: stored, or an ``s3://bucket/key``.
        start: the first byte.
        stop: the one after the last; to the end by default.
        parts_at_once: as of `Blob.open`.
        on_progress: told of every chunk.

    Raises:
        BlobNotUploadedError: the blob is pending.
        InvalidS3UriError: not an S3 URI.
        InvalidInputError: a negative number, or a stop before the start; nothing was sent.
        BlobNotFoundError, BlobChangedError, BlobCorruptedError, StoreError: on entering or while
            reading, as of `Blob.read`.
    """
    uri, facts = _named(blob)
    async with open_object(
        store,
        uri,
        part=byte_range(start, stop),
        size=facts.size,
        sha256=facts.sha256,
        parts_at_once=parts_at_once,
        on_progress=on_progress,
    ) as body:
        yield body


def check_declared(declared: int, known: int | None) -> None:
    """Refuse a size that was declared for a source and is not its own.

    Raises:
        SizeMismatchError: it is another one.
        BlobTooLargeError: no store has objects of that size.
        InvalidInputError: it is no size.
    """
    if type(declared) is not int or declared < 0:
        raise InvalidInputError(f"size is a number of bytes, not {declared!r}")
    check_size("Blob", declared, MAX_OBJECT_BYTES)
    if known is not None and known != declared:
        raise SizeMismatchError(f"{known} bytes are here, {declared} were declared")


async def download_blob(
    store: Store,
    blob: Blob | str,
    path: Path | str,
    *,
    on_progress: OnProgress | None = None,
    part_bytes: int = PART_BYTES,
    parts_at_once: int = 8,
) -> ObjectInfo:
    """Write an object into a file: a small one by one request, a large one in parts at once.

    The file appears under its name when it is whole and verified, in place of what was there;
    until then it is beside it, and an error or a cancellation removes it. A killed process
    leaves it there, as ``.aioblobcol-*``. Memory holds little more than 1 MiB of each part that
    is under way, whatever its size.

    Args:
        store: open.
        blob: stored, or an ``s3://bucket/key``.
        path: the file; its directory exists.
        on_progress: told of every chunk.
        part_bytes: the size of the parts.
        parts_at_once: on the wire at the same time, each with a connection of its own; with 1
            the object is read by one request.

    Returns:
        What the first answer tells of the object.

    Raises:
        BlobNotUploadedError: the blob is pending.
        InvalidS3UriError, InvalidInputError: no S3 URI, or a limit that is not positive; nothing
            was sent.
        BlobNotFoundError, BlobChangedError, BlobCorruptedError, StoreError: as of `Blob.read`;
            the file is as it was.
        OSError: the file could not be written; the same state.
    """
    uri, facts = _named(blob)
    return await download_object(
        store,
        uri,
        Path(path),
        size=facts.size,
        sha256=facts.sha256,
        on_progress=on_progress,
        part_bytes=part_bytes,
        parts_at_once=parts_at_once,
    )


def _named(blob: Blob | str) -> tuple[str, BlobFacts]:
    return (blob.uri, blob._facts) if isinstance(blob, Blob) else (blob, NO_FACTS)


def guess_content_type(filename: str | None) -> str | None:
    """Guess from the ending of a file's name."""
    return mimetypes.guess_type(filename)[0] if filename else None


def checked_content_type(content_type: str | None) -> str | None:
    """Return it if it can be one.

    Raises:
        InvalidInputError: it cannot.
    """
    if content_type is None:
        return None
    if not isinstance(content_type, str) or not _CONTENT_TYPE.fullmatch(content_type):
        raise InvalidInputError(f"not a content type, such as image/png: {content_type!r}")
    return content_type


def object_metadata(
    metadata: Mapping[str, str], *, filename: str | None, sha256: str | None
) -> dict[str, str]:
    """Add the library's own to *metadata*, and return all as it stands in the headers.

    What came with a copy may have a ``sha256`` already, which is the same bytes'.

    Raises:
        InvalidPutArgumentsError: unusable, or too much.
    """
    if not metadata and filename is None and sha256 is not None:
        return {"sha256": sha256}
    own = {"filename": filename, "sha256": sha256}
    known = {name: value for name, value in own.items() if value is not None}
    return encode_metadata({**metadata, **known})


def _text_of(source: object, name: str) -> str | None:
    """Return what an upload says about itself; its client may have said anything, or nothing."""
    text = getattr(source, name, None)
    return text if isinstance(text, str) and text else None


def _content_type_of(source: object) -> str | None:
    """Return an upload's content type; of httpx's responses and aiohttp's parts, their header."""
    headers: Any = getattr(source, "headers", None)
    header = headers.get("Content-Type") if hasattr(headers, "get") else None
    return _text_of(source, "content_type") or (header if isinstance(header, str) else None)
