"""From a blob and the cell that it is for to one upload: what is checked, its key, its request.

Invariant: everything that can be refused without reading the bytes is refused before the first
byte of the flush is sent; the rest is refused in the upload's own slot, before its request.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._blob import NO_FACTS, Blob, BlobFacts, ReadOnce, guess_content_type, object_metadata
from ._sources import Payload, check_size, check_source, read_payload
from ._store._base import CopyRequest, ObjectInfo, PutRequest, Store
from ._transfer import Upload
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
        facts: what is known of it once it is uploaded.
    """

    blob: Blob
    attribute: BlobAttribute
    subject: Any
    store: Store
    uri: str = ""
    facts: BlobFacts = NO_FACTS

    def plan(self) -> Upload:
        """Check the blob and give it a key; nothing is read or sent.

        Raises:
            InvalidInputError: refused; the subclass tells what.
            StoreClosedError: the store is not open.
        """
        store, attribute = self.store, self.attribute
        store.runtime  # noqa: B018 - raises when closed
        root = _root_of(store, attribute)
        if attribute.type.max_bytes is not None or isinstance(self.blob._source, Path):
            self._check_size(self._source_size())
        if self._original is None and attribute.type.accept:
            self._check_content_type(self._content_type)
        if attribute.type.prefix is not None:
            root = _root(store, attribute, self._own_prefix(attribute.type.prefix(self.subject)))
        self.uri = f"{root}{new_object_id()}"
        return Upload(store, attribute.column.name, self.uri, self._request)

    @property
    def _type(self) -> BlobType:
        return self.attribute.type

    @property
    def _original(self) -> Blob | None:
        """The stored blob that is to be copied; None if there are bytes to upload."""
        return self.blob._copy_of if self.blob._source is None else None

    @property
    def _content_type(self) -> str:
        return (
            self.blob._content_type
            or self._type.content_type
            or guess_content_type(self.blob._filename)
            or DEFAULT_CONTENT_TYPE
        )

    def _source_size(self) -> int | None:
        source = self.blob._source
        if isinstance(source, Path):
            return check_source(source, column=self.attribute.label)
        return self.blob.size

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

    # --- in the upload's slot

    async def _request(self) -> PutRequest | CopyRequest:
        original = self._original
        if original is None:
            return self._put_request(await self._read())
        if original._store is None or original._store is self.store:
            return await self._copy_request(original)
        async with original._store.open(original.uri) as body:  # of another server, perhaps
            self._learn(original, body.info)
            self._check_facts()
            payload = await read_payload(self.attribute.label, await body.read(), with_md5=False)
        return self._put_request(payload, metadata=body.info.metadata)

    async def _read(self) -> Payload:
        source = self.blob._source
        assert source is not None
        if isinstance(source, ReadOnce):
            source = await source.body(self.attribute.label, max_bytes=self._type.max_bytes)
        return await read_payload(
            self.attribute.label, source, with_md5=False, max_bytes=self._type.max_bytes
        )

    async def _copy_request(self, original: Blob) -> CopyRequest:
        self.facts = known = original._facts
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
        self.facts = BlobFacts(
            size=info.size,
            content_type=info.content_type,
            sha256=known.sha256 or info.metadata.get("sha256"),
            filename=known.filename or info.metadata.get("filename"),
        )

    def _check_facts(self) -> None:
        self._check_size(self.facts.size)
        self._check_content_type(self.facts.content_type)

    def _put_request(
        self, payload: Payload, *, metadata: Mapping[str, str] | None = None
    ) -> PutRequest:
        content_type = self.facts.content_type or self._content_type
        filename = self.facts.filename or self.blob._filename
        self.facts = BlobFacts(payload.size, content_type, payload.sha256, filename)
        return PutRequest(
            column=self.attribute.column.name,
            uri=self.uri,
            payload=payload,
            metadata=object_metadata(
                metadata or self.blob._metadata, filename=filename, sha256=payload.sha256
            ),
            arguments={**self._type.put_arguments, "ContentType": content_type},
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
