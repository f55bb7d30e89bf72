"""From a blob and the cell that it is for to one upload: what is checked, its key, its request.

Invariant: everything that can be refused without reading the bytes is refused before the first
byte of the flush is sent; the rest is refused before the upload's own request, or in the middle of
it, with nothing kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._blob import NO_FACTS, Blob, BlobFacts, guess_content_type, object_metadata
from ._download import open_object
from ._sniffing import sniff
from ._sources import PART_BYTES, Payload, check_size, check_source
from ._store._base import MAX_COPY_BYTES, CopyRequest, ObjectInfo, PutRequest, Store, WriteRequest
from ._streams import HEAD_BYTES, PartReader, ReadOnce, iterable_reader, open_source, started
from ._transfer import LargeRequest, Request, Upload, in_memory
from ._uri import (
    attempt_key,
    content_key,
    encode_column,
    join_s3_uri,
    new_object_id,
    normalize_s3_prefix,
)
from .errors import ContentTypeRefusedError, InvalidInputError, InvalidPrefixError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._column import BlobAttribute, BlobType

DEFAULT_CONTENT_TYPE = "application/octet-stream"


@dataclasses.dataclass(slots=True, eq=False)
class Placement:
    """One blob on its way to one cell.

    Attributes:
        subject: the mapped object, or the dict of a bulk statement's values.
        uri: of the object that is made for it.
    """

    blob: Blob
    attribute: BlobAttribute
    subject: Any
    store: Store
    uri: str = ""
    _facts: BlobFacts = NO_FACTS
    _reader: PartReader | None = None

    @property
    def facts(self) -> BlobFacts:
        """What is known of the object once it is uploaded; of a large one, not before."""
        if self._reader is None:
            return self._facts
        return dataclasses.replace(self._facts, size=self._reader.size, sha256=self._reader.sha256)

    def plan(self) -> Upload:
        """Check the blob and give it a key; nothing is read or sent.

        Raises:
            InvalidInputError: refused; the subclass tells what.
            StoreClosedError: the store is not open.
        """
        store, attribute = self.store, self.attribute
        store.runtime  # noqa: B018 - raises when closed
        root = _root_of(store, attribute)
        size = self._source_size()
        self._check_size(size)
        if self._original is None and attribute.type.accept and self._declared_type is not None:
            self._check_content_type(self._declared_type)
        if attribute.type.prefix is not None:
            root = _root(store, attribute, self._own_prefix(attribute.type.prefix(self.subject)))
        self.uri = f"{root}{new_object_id()}"
        return Upload(
            store,
            attribute.column.name,
            self.uri,
            self._request,
            size=in_memory(store, self._most_bytes(size)),
            waits=self._has_to_wait(size),
            on_progress=self.blob._on_progress,
        )

    @property
    def _type(self) -> BlobType:
        return self.attribute.type

    @property
    def _original(self) -> Blob | None:
        """The stored blob that is to be copied; None if there are bytes to upload."""
        return self.blob._copy_of if self.blob._source is None else None

    @property
    def _declared_type(self) -> str | None:
        return (
            self.blob._content_type
            or self._type.content_type
            or guess_content_type(self.blob._filename)
        )

    def _source_size(self) -> int | None:
        """Return the size of what is to be read; 0 of what the server copies."""
        source = self.blob._source
        if isinstance(source, Path):
            return check_source(source, column=self.attribute.label)
        if source is None and not self._comes_from_elsewhere:
            return 0
        return self.blob.size

    def _most_bytes(self, size: int | None) -> int | None:
        source = self.blob._source
        if not isinstance(source, ReadOnce):
            return size
        if self.store.capabilities.parts_held and source.is_declared:  # it makes parts of its own
            return size
        return source.most_bytes

    @property
    def _comes_from_elsewhere(self) -> bool:
        """Whether the bytes travel: they are another server's, or more than a server copies."""
        original = self._original
        if original is None or original._store is None:
            return False
        is_too_large = (original._facts.size or 0) > MAX_COPY_BYTES
        return is_too_large or original._store is not self.store

    def _has_to_wait(self, size: int | None) -> bool:
        is_small = size is not None and size <= PART_BYTES
        return not is_small or isinstance(self.blob._source, ReadOnce) or self._comes_from_elsewhere

    def _check_size(self, size: int | None) -> None:
        limit = self._type.max_bytes
        if limit is not None and size is not None:
            check_size(self.attribute.label, size, limit)

    def _check_content_type(self, content_type: str | None) -> None:
        if not self._type.accepts(content_type or DEFAULT_CONTENT_TYPE):
            raise ContentTypeRefusedError(
                f"column {self.attribute.label!r} accepts {', '.join(self._type.accept)}, not "
                f"{content_type}; say Blob(..., content_type=...) if that is wrong"
            )

    def _own_prefix(self, given: str) -> str:
        try:
            prefix = normalize_s3_prefix(given)
        except InvalidPrefixError as exc:
            raise InvalidPrefixError(f"prefix= of column {self.attribute.label!r}: {exc}") from exc
        if not prefix:
            raise InvalidPrefixError(
                f"prefix= of column {self.attribute.label!r} returned {given!r}"
            )
        return prefix

    # --- within the store's budget

    async def _request(self) -> Request:
        original = self._original
        if original is not None and not self._comes_from_elsewhere:
            return await self._copy_request(original)
        self._facts = NO_FACTS
        if original is not None:
            opened, metadata = await self._open_elsewhere(original)
        else:
            opened, metadata = await self._open(), self.blob._metadata
        if isinstance(opened, Payload):
            await self._look_at(opened.body)
            return self._put_request(opened, metadata)
        try:
            await self._look_at(opened.head)
            return self._large_request(opened, metadata)
        except BaseException:
            await opened.aclose()
            raise

    @property
    def _keeps_sha256(self) -> bool:
        """Of a large object the row alone can: metadata is sent before the bytes are known."""
        return self._type.format == "json"

    async def _open(self) -> Payload | PartReader:
        """Read what is small; of what is large, the first part."""
        source, label, limit = self.blob._source, self.attribute.label, self._type.max_bytes
        assert source is not None
        if isinstance(source, ReadOnce):
            return await source.open(label, max_bytes=limit, with_sha256=self._keeps_sha256)
        return await open_source(label, source, max_bytes=limit, with_sha256=self._keeps_sha256)

    async def _open_elsewhere(
        self, original: Blob
    ) -> tuple[Payload | PartReader, Mapping[str, str]]:
        """Open a stored blob of another server, perhaps."""
        assert original._store is not None
        async with contextlib.AsyncExitStack() as stack:
            body = await stack.enter_async_context(open_object(original._store, original.uri))
            self._learn(original, body.info)
            self._check_facts()
            reader = iterable_reader(
                self.attribute.label,
                body,
                max_bytes=self._type.max_bytes,
                total=body.info.size,
                with_sha256=self._keeps_sha256,
                close=stack.pop_all().aclose,
            )
        return await started(reader), body.info.metadata

    async def _copy_request(self, original: Blob) -> CopyRequest:
        self._facts = known = original._facts
        if self._type.max_bytes or self._type.accept or self._type.format == "json":
            if known.size is None or known.content_type is None:
                self._learn(original, await self.store.head(original.uri))
            self._check_facts()
        return CopyRequest(
            column=self.attribute.column.name,
            uri=self.uri,
            source_uri=original.uri,
            arguments=self._type.put_arguments,
        )

    def _learn(self, original: Blob, info: ObjectInfo) -> None:
        known = original._facts
        self._facts = BlobFacts(
            size=info.size,
            content_type=info.content_type,
            sha256=known.sha256 or info.metadata.get("sha256"),
            filename=known.filename or info.metadata.get("filename"),
        )

    def _check_facts(self) -> None:
        self._check_size(self._facts.size)
        self._check_content_type(self._facts.content_type)

    async def _look_at(self, body: bytes) -> None:
        """Compare what the bytes are with what the column accepts.

        Raises:
            ContentTypeRefusedError: they are something else.
        """
        if not self._type.accept:
            return
        declared = self._facts.content_type or self._declared_type
        found = await sniff(body[:HEAD_BYTES])
        if declared is None:
            declared = found.likely(self._type.accepts) or DEFAULT_CONTENT_TYPE
            self._check_content_type(declared)
            self._facts = dataclasses.replace(self._facts, content_type=declared)
        if found.contradicts(declared, self._type.accepts):
            raise ContentTypeRefusedError(
                f"column {self.attribute.label!r} accepts {', '.join(self._type.accept)}; this "
                f"was declared as {declared}, and its first bytes are "
                f"{found.likely() or 'something else'}"
            )

    def _describe(self, size: int | None, sha256: str | None) -> None:
        content_type = self._facts.content_type or self._declared_type or DEFAULT_CONTENT_TYPE
        filename = self._facts.filename or self.blob._filename
        self._facts = BlobFacts(size, content_type, sha256, filename)

    @property
    def _arguments(self) -> dict[str, Any]:
        return {**self._type.put_arguments, "ContentType": self._facts.content_type}

    def _put_request(self, payload: Payload, metadata: Mapping[str, str]) -> PutRequest:
        self._describe(payload.size, payload.sha256)
        return PutRequest(
            column=self.attribute.column.name,
            uri=self.uri,
            payload=payload,
            metadata=object_metadata(
                metadata, filename=self._facts.filename, sha256=payload.sha256
            ),
            arguments=self._arguments,
        )

    def _large_request(self, reader: PartReader, metadata: Mapping[str, str]) -> LargeRequest:
        self._describe(reader.total, None)
        self._reader = reader
        # its SHA-256 is known when all was sent, and metadata goes before: the row has it
        return LargeRequest(
            WriteRequest(
                column=self.attribute.column.name,
                uri=self.uri,
                metadata=object_metadata(metadata, filename=self._facts.filename, sha256=None),
                arguments=self._arguments,
                size=reader.promised,
            ),
            reader,
        )


def store_of(attribute: BlobAttribute, stores: Mapping[str, Store]) -> Store:
    """Return the store of a column.

    Raises:
        InvalidInputError: the session was given none of that name.
    """
    try:
        return stores[attribute.type.store]
    except KeyError:
        known = ", ".join(map(repr, stores)) or "none"
        raise InvalidInputError(
            f"{attribute.column} wants the store {attribute.type.store!r}, this session has "
            f"{known}: blob_sessionmaker(engine, stores={{{attribute.type.store!r}: ...}})"
        ) from None


def _root(store: Store, attribute: BlobAttribute, own_prefix: str) -> str:
    """Return what the URIs of a column begin with: all but the id of each attempt."""
    column = attribute.column
    content = content_key(
        prefix=f"{store.prefix}/{own_prefix}",
        encoded_pk=encode_column(str(getattr(column.table, "name", "table"))),
        column=column.name,
        md5=None,
    )
    uri = join_s3_uri(store.bucket, attempt_key(content))  # looks at the whole of it
    return uri.removesuffix(uri.rpartition("=")[2])


def _root_of(store: Store, attribute: BlobAttribute) -> str:
    """Have a store look at a column's arguments, once, and return the column's `_root`."""
    known = attribute.roots.get(store)
    if known is not None:
        return known
    empty = Payload(body=b"", md5=None, sha256="", crc32=0)
    store.check_put(
        PutRequest(
            column=attribute.column.name,
            uri=join_s3_uri(store.bucket, "check"),
            payload=empty,
            metadata={},
            arguments={**attribute.type.put_arguments, "ContentType": DEFAULT_CONTENT_TYPE},
        )
    )
    attribute.roots[store] = root = _root(store, attribute, "")
    return root
