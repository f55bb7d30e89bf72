"""Stores through obstore: S3 at a fraction of the CPU, local files, memory, GCS and Azure.

obstore gives a store's verbs without multipart uploads, headers of one request, or listings of
incomplete uploads; `Capabilities` says so. What it does is bytes in, bytes out.

Invariants: a URI is ``s3://bucket/key`` whatever the backend, for rows, journal and triggers know
no other form: where the bucket lies is what the store says, not the row. A PUT and a copy are sent
by a client that never repeats them, and repeated here, so that it is known whether the first
attempt was answered. obstore is never given an iterator (one of them aborted the interpreter at
its exit), and a writer that was not closed is aborted. The backend is let go of with the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import obstore
from obstore.exceptions import BaseError

from .._uri import normalize_s3_prefix, root_uri, split_s3_uri
from ..errors import (
    InvalidInputError,
    InvalidPutArgumentsError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
)
from ._base import (
    COPY_SECONDS,
    MAX_BYTES_IN_FLIGHT,
    SLOWEST_BYTES_PER_SECOND,
    ByteRange,
    Capabilities,
    CopyRequest,
    DeleteReport,
    IncompleteUpload,
    ListedObject,
    ObjectInfo,
    ObjectReader,
    PutRequest,
    WriteRequest,
    check_part,
    owned_uris,
    unchanged,
)
from ._life import StoreLife, check_limits
from ._metadata import decode_metadata
from ._obstore_backends import (
    ANSWER_SECONDS,
    ATTEMPTS,
    Backend,
    HttpOptions,
    files,
    memory,
    remote,
    split_url,
)
from ._obstore_errors import is_missing, is_unanswered, translated, translating
from ._obstore_streams import PARTS_HELD, STREAM_BYTES, Chunks, ObstoreWriter
from ._obstore_threads import Watch
from ._presign import expiry_seconds

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

PARALLEL_DELETES: Final = 16
KEYS_PER_DELETE: Final = 1000
KEYS_PER_PAGE: Final = 1000

_ATTRIBUTES: Final = {
    "CacheControl": "Cache-Control",
    "ContentDisposition": "Content-Disposition",
    "ContentEncoding": "Content-Encoding",
    "ContentLanguage": "Content-Language",
    "ContentType": "Content-Type",
    "StorageClass": "Storage-Class",
}
_NOT_METADATA: Final = frozenset(_ATTRIBUTES.values())
_TAKEN_NAMES: Final = frozenset(
    spelling
    for name in _ATTRIBUTES.values()
    for spelling in (name.lower(), name.lower().replace("-", ""))
)


class ObstoreStore(StoreLife):
    """The objects under one prefix of one bucket, wherever obstore reaches.

    Made by `open_obstore`. An async context manager: it makes its clients on entering and, on
    leaving, finishes the background work and lets go of them. It can be entered again afterwards,
    also in another event loop, but not twice at the same time. What ``memory://`` holds outlives
    that.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bucket: str,
        prefix: str,
        max_concurrency: int,
        request_seconds: float,
        drain_seconds: float,
        max_bytes_in_flight: int,
    ) -> None:
        self._backend = backend
        super().__init__(
            bucket=bucket,
            prefix=prefix,
            max_concurrency=max_concurrency,
            request_seconds=request_seconds,
            drain_seconds=drain_seconds,
            max_bytes_in_flight=max_bytes_in_flight,
        )
        self._attempts = ATTEMPTS if backend.is_remote else 1
        self._client: Any = None
        self._client_once: Any = None
        self._entered = False
        self._watch = Watch(keeps_buffers=backend.name == "memory")
        self._capabilities = Capabilities(
            parts_at_once=1,
            parts_held=PARTS_HELD,
            metadata=backend.keeps_metadata,
            if_match=True,
            presigned_get=backend.signs,
        )

    def __repr__(self) -> str:
        state = "open" if self._runtime is not None else "closed"
        root = root_uri(self._bucket, self._prefix)
        return f"<ObstoreStore {root} in {self._backend.name} ({state})>"

    async def __aenter__(self) -> Self:
        if self._entered:
            raise StoreClosedError(f"{self!r} is entered already; open it once, at start-up")
        self._entered = True
        try:
            self._client, self._client_once = await asyncio.to_thread(self._make_clients)
        except BaseException:
            self._entered = False
            raise
        self._start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        runtime = self._runtime
        if runtime is None:
            return
        try:
            await runtime.close(drain_seconds=self._drain_seconds)
        finally:
            client = self._client
            self._client = self._client_once = self._runtime = None
            self._entered = False
            await self._watch.settled(client)

    @property
    def capabilities(self) -> Capabilities:
        """What it can do beyond the verbs that every store has."""
        return self._capabilities

    @property
    def client(self) -> Any:
        """The client of obstore, for everything that the library does not do.

        Its paths are keys, with the prefix.

        Raises:
            StoreClosedError: the store is not open.
        """
        if self._client is None:
            self.runtime  # noqa: B018 - raises
        return self._client

    def check_put(self, request: PutRequest) -> None:
        """Refuse arguments and metadata that cannot be stored, before anything is sent.

        Raises:
            InvalidPutArgumentsError: anything but ``CacheControl``, ``ContentDisposition``,
                ``ContentEncoding``, ``ContentLanguage``, ``ContentType`` and ``StorageClass``,
                one that is no string, or metadata named like one of them.
        """
        self.runtime  # noqa: B018 - raises when closed
        unknown = sorted(set(request.arguments) - _ATTRIBUTES.keys())
        if unknown:
            raise InvalidPutArgumentsError(
                f"column {request.column!r}: obstore takes no {', '.join(unknown)}; it takes "
                f"{', '.join(_ATTRIBUTES)}, and `open_store` all arguments of put_object"
            )
        for name, value in request.arguments.items():
            if not isinstance(value, str):
                raise InvalidPutArgumentsError(
                    f"column {request.column!r}: {name} is a string, not {type(value).__name__}"
                )
        taken = sorted(name for name in request.metadata if name.lower() in _TAKEN_NAMES)
        if taken:
            raise InvalidPutArgumentsError(
                f"column {request.column!r}: obstore would take the metadata {', '.join(taken)} "
                "for a header of that name; name them otherwise"
            )

    async def put(self, request: PutRequest) -> bool:
        """Store one object; tell whether the first attempt was answered.

        Raises:
            StoreError: ``may_have_taken_effect`` tells whether the object may be there.
        """
        client, key = self._once(), self._key("put", request.uri)
        body = request.payload.body
        attributes = self._attributes(request.metadata, request.arguments)

        def send() -> Awaitable[Any]:
            view = self._watch.view(body)
            return obstore.put_async(client, key, view, attributes=attributes, use_multipart=False)

        seconds = ANSWER_SECONDS + len(body) / SLOWEST_BYTES_PER_SECOND
        return await self._repeated("put", request.uri, send, seconds=seconds)

    @contextlib.asynccontextmanager
    async def open_writer(self, request: WriteRequest) -> AsyncIterator[ObstoreWriter]:
        """Write one object part by part, four parts on the wire at once.

        Completed on leaving the block, aborted on an error, a cancellation, and without
        `ObjectWriter.finish`. A process that is killed meanwhile leaves its parts in the bucket,
        where only a lifecycle rule finds them (of files: a hidden file beside the object).

        Raises:
            StoreError: on entering, while it is written, or on leaving.
        """
        writer = ObstoreWriter(
            self.client,
            request.uri,
            self._key("put", request.uri),
            attributes=self._attributes(request.metadata, request.arguments),
            size=request.size,
            has_part_limit=self._backend.is_remote,
            request_seconds=self._request_seconds,
            watch=self._watch,
        )
        try:
            yield writer
        except BaseException:
            await writer.abort()
            raise
        if writer.is_finished:
            await writer.complete()
        else:
            await writer.abort()

    async def copy(self, request: CopyRequest) -> bool:
        """Copy one object inside of the bucket; tell whether the first attempt was answered.

        All of it is the source's: content type, metadata, and what else the backend copies. A
        copy of a file is another name of it (a hard link).

        Raises:
            BlobNotFoundError: the source is missing (the error names it).
            StoreError: about the new object; also for a source in another bucket.
        """
        client, key = self._once(), self._key("copy", request.uri)
        source_bucket, source = split_s3_uri(request.source_uri)
        if source_bucket != self._bucket:
            raise StoreError(
                "copy",
                request.uri,
                f"{request.source_uri} is in another bucket, and obstore copies inside of one; "
                "read it and store its bytes",
            )

        def send() -> Awaitable[Any]:
            return obstore.copy_async(client, source, key)

        seconds = ANSWER_SECONDS + COPY_SECONDS
        try:
            return await self._repeated("copy", request.uri, send, seconds=seconds)
        except StoreError as exc:
            if not is_missing(exc) or exc.may_have_taken_effect:
                raise
            raise translated("copy", request.source_uri, exc.__cause__ or exc) from exc.__cause__

    async def get(self, uri: str) -> bytes:
        """Read one object.

        Raises:
            BlobNotFoundError: it is not there.
            StoreError: it could not be read.
        """
        key = self._key("get", uri)
        with translating("get", uri):
            answer = await self._watch.over(obstore.get_async(self.client, key))
            return bytes(await self._watch.over(answer.bytes_async()))

    @contextlib.asynccontextmanager
    async def open(
        self, uri: str, *, part: ByteRange | None = None, etag: str | None = None
    ) -> AsyncIterator[ObjectReader]:
        """Read one object, or a part of it, chunk by chunk; leaving early ends the request.

        A connection that drops is taken up again by obstore, at the byte where it broke and only
        if the object is still the same. A part that begins at the object's end, or beyond it, or
        has no length, is described by a HEAD and has no bytes.

        Raises:
            InvalidInputError: no range; nothing was sent.
            BlobNotFoundError, BlobChangedError: raised on entering.
            StoreError: it could not be read; also while its chunks are read.
        """
        info, chunks = await self._open(uri, part, etag)
        reader = ObjectReader(info, chunks.read)
        try:
            yield reader
        finally:
            reader.close()
            chunks.close()

    async def head(self, uri: str) -> ObjectInfo:
        """Describe one object.

        Raises:
            BlobNotFoundError: it is not there.
            StoreError: the server did not say.
        """
        key = self._key("head", uri)
        with translating("head", uri):
            # obstore.head_async tells no metadata
            answer = await self._watch.over(
                obstore.get_async(self.client, key, options={"head": True})
            )
        return _info(uri, answer)

    async def presign(
        self, uri: str, *, expires_in: timedelta, download_as: str | None = None
    ) -> str:
        """Return a URL with which anybody can GET the object, a secret therefore. Sends nothing.

        Raises:
            InvalidInputError: ``expires_in`` is out of bounds; the backend has no URLs; or
                ``download_as`` is given, which obstore does not sign (store a
                ``ContentDisposition`` with the object instead).
            StoreAccessError: there are no credentials to sign with.
        """
        seconds = expiry_seconds(expires_in)
        key = self._key("presign", uri)
        if not self._backend.signs:
            raise InvalidInputError(f"{self!r} has no URLs; serve the bytes from the application")
        if download_as is not None:
            raise InvalidInputError(
                "obstore does not sign download_as: store the object with ContentDisposition, or "
                "use `open_store`"
            )
        with translating("presign", uri):
            return await self._watch.over(
                obstore.sign_async(self.client, "GET", key, expires_in=timedelta(seconds=seconds))
            )

    async def delete_many(self, uris: Sequence[str]) -> DeleteReport:
        """Delete objects; where a request for many failed, one by one.

        Args:
            uris: under this store's bucket and prefix; any other is refused before the first
                request.

        Returns:
            ``deleted`` (also what was gone already) and ``failed`` with the reason.

        Raises:
            ForeignUriError: a URI lies outside; nothing was sent.
            StoreClosedError: the store is not open.
        """
        mine = owned_uris(self, uris)
        client = self.client
        slots = asyncio.Semaphore(PARALLEL_DELETES)
        step = KEYS_PER_DELETE if self._backend.deletes_in_bulk else 1
        parts = [mine[start : start + step] for start in range(0, len(mine), step)]

        async def delete(part: list[str]) -> dict[str, str]:
            if len(part) > 1:
                async with slots:
                    refused = await self._delete_bulk(client, part)
                if refused is not None:
                    return dict(refused)
            return await self._delete_each(part, slots)

        failed: dict[str, str] = {}
        for refused in await asyncio.gather(*(delete(part) for part in parts)):
            failed |= refused
        return DeleteReport(tuple(uri for uri in mine if uri not in failed), failed)

    async def iter_uploads(self) -> AsyncGenerator[IncompleteUpload, None]:
        """List nothing: obstore cannot list incomplete uploads."""
        self.runtime  # noqa: B018 - raises when closed
        nothing: tuple[IncompleteUpload, ...] = ()
        for upload in nothing:
            yield upload

    async def abort_upload(self, upload: IncompleteUpload) -> None:  # noqa: ARG002 - the protocol's
        """Do nothing: obstore cannot abort the uploads of others."""
        self.runtime  # noqa: B018 - raises when closed

    async def iter_objects(
        self, *, start_after: str = "", with_times: bool = False
    ) -> AsyncGenerator[ListedObject, None]:
        """List the objects under the prefix that come after a URI, 1,000 per request.

        Files are listed by the directory and sorted, so that all their names are held at once.

        Raises:
            StoreError: the listing could not be read to its end; also for a key that obstore
                cannot name (with ``//`` in it, such as other programs write).
        """
        async with contextlib.aclosing(
            self._iter_pages(start_after, with_times=with_times)
        ) as pages:
            if self._backend.is_sorted:
                async for page in pages:
                    for each in page:
                        yield each
                return
            collected = [each async for page in pages for each in page]
        for each in sorted(collected, key=lambda listed: listed.uri.encode()):
            yield each

    async def _open(
        self, uri: str, part: ByteRange | None, etag: str | None
    ) -> tuple[ObjectInfo, Chunks]:
        if part is not None:
            check_part(part)
        if part is not None and part.start == part.stop:
            return unchanged(await self.head(uri), etag), Chunks(uri, None, self._watch)
        key, options = self._key("get", uri), _get_options(part, etag)
        try:
            with translating("get", uri):
                answer = await self._watch.over(
                    obstore.get_async(self.client, key, options=options)  # type: ignore[arg-type]  # a TypedDict
                )
                info = unchanged(_info(uri, answer), etag)
                return info, Chunks(uri, answer.stream(STREAM_BYTES), self._watch)
        except StoreError as exc:
            if part is None or type(exc) is not StoreError:
                raise
            info = unchanged(await self.head(uri), etag)
            if part.start < info.size:
                raise
            return info, Chunks(uri, None, self._watch)

    async def _iter_pages(
        self, start_after: str, *, with_times: bool
    ) -> AsyncGenerator[list[ListedObject], None]:
        root, base = root_uri(self._bucket, self._prefix), f"s3://{self._bucket}/"
        first = start_after.encode()
        offset = start_after.removeprefix(base) or None
        with translating("list", root):
            pages = obstore.list(
                self.client, self._prefix or None, offset=offset, chunk_size=KEYS_PER_PAGE
            )
        while True:
            with translating("list", root):
                try:
                    page = await self._watch.over(anext(pages))
                except StopAsyncIteration:
                    return
            listed = [
                ListedObject(
                    base + each["path"],
                    each["size"],
                    each["last_modified"] if with_times else None,
                )
                for each in page
            ]
            # a backend may filter by names that it has normalized
            yield [each for each in listed if each.uri.encode() > first]

    async def _delete_bulk(self, client: Any, uris: list[str]) -> Mapping[str, str] | None:
        """Return what could not be deleted and why; None if obstore does not tell which."""
        try:
            with translating("delete", uris[0]):
                keys = [self._key("delete", uri) for uri in uris]
                await self._watch.over(obstore.delete_async(client, keys))
        except StoreError as exc:
            # an answer is about one key of many, or about the request: one by one it is told
            return dict.fromkeys(uris, exc.code) if is_unanswered(exc) else None
        return {}

    async def _delete_each(self, uris: list[str], slots: asyncio.Semaphore) -> dict[str, str]:
        client = self._once()  # of S3 the other one makes a request for many even for one key

        async def delete(uri: str) -> str | None:
            key = self._key("delete", uri)
            try:
                async with slots:
                    await self._repeated(
                        "delete",
                        uri,
                        lambda: obstore.delete_async(client, key),
                        seconds=ANSWER_SECONDS,
                    )
            except StoreError as exc:
                return None if is_missing(exc) else exc.code
            return None

        reasons = await asyncio.gather(*(delete(uri) for uri in uris))
        return {
            uri: reason for uri, reason in zip(uris, reasons, strict=True) if reason is not None
        }

    def _make_clients(self) -> tuple[Any, Any]:
        """Make one client that repeats requests, and one that does not."""
        try:
            client = self._backend.make(ATTEMPTS - 1)
            return client, self._backend.make(0) if self._backend.is_remote else client
        except (BaseError, OSError, ValueError, TypeError) as exc:
            raise InvalidInputError(f"cannot open {self!r}: {exc}".partition("\n")[0]) from exc

    def _once(self) -> Any:
        client = self._client_once
        if client is None:
            self.runtime  # noqa: B018 - raises
        return client

    def _key(self, operation: str, uri: str) -> str:
        bucket, key = split_s3_uri(uri)
        if bucket != self._bucket:
            raise StoreError(operation, uri, f"this store's bucket is {self._bucket!r}")
        if key[0] == "/" or key[-1] == "/":  # obstore would drop it and take another object
            raise StoreError(operation, uri, "obstore names no keys with a slash at their ends")
        return key

    def _attributes(
        self, metadata: Mapping[str, str], arguments: Mapping[str, Any]
    ) -> dict[str, str] | None:
        if not self._backend.keeps_metadata:
            return None
        attributes = dict(metadata)
        for name, value in arguments.items():
            known = _ATTRIBUTES.get(name)
            if known is not None:
                attributes[known] = value
        return attributes

    async def _repeated(
        self, operation: str, uri: str, send: Callable[[], Awaitable[Any]], *, seconds: float
    ) -> bool:
        """Send until there is a definite answer; tell whether it was the first attempt's."""
        for attempt in range(1, self._attempts + 1):
            try:
                with translating(operation, uri):
                    async with asyncio.timeout(seconds):
                        await self._watch.over(send())
            except StoreUnavailableError:
                if attempt == self._attempts:
                    raise
            except StoreError as exc:
                exc.may_have_taken_effect |= attempt > 1
                raise
            else:
                return attempt == 1
            # Source: AWS guidance, exponential back-off with jitter
            await asyncio.sleep(random.uniform(0.05, 0.1) * 2**attempt)  # noqa: S311 - no secret
        raise AssertionError("unreachable")


def open_obstore(
    url: str,
    *,
    bucket: str | None = None,
    prefix: str = "",
    config: Mapping[str, Any] | None = None,
    client_options: Mapping[str, Any] | None = None,
    retry_config: Mapping[str, Any] | None = None,
    credential_provider: Any = None,
    max_concurrency: int = 32,
    max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
    request_seconds: float = 60,
    drain_seconds: float = 10,
) -> ObstoreStore:
    """Describe a store that obstore reaches; does no I/O, so it may stand at module level.

    URIs are ``s3://bucket/key`` for every backend: that is the name of the object in the row, and
    where the bucket lies is what *url* says.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``,
            ``file:///directory`` (made if it is missing) or ``memory://``.
        bucket: the bucket's name in the URIs of files (``local`` by default) and memory
            (``memory``). Two stores of one application need two names or prefixes.
        prefix: of every key, after the URL's own; slashes at its ends are ignored. Nothing
            outside is ever deleted.
        config: obstore's options of the backend, such as ``region``, ``endpoint`` (of an
            S3-compatible server), ``access_key_id``, ``checksum_algorithm`` (``SHA256``). Over
            https bodies are not hashed for the signature (``unsigned_payload``) unless it says
            so. Of files, ``automatic_cleanup`` removes empty directories.
        client_options: obstore's options of its HTTP client, over ours.
        retry_config: obstore's, over ours (three attempts), for all but PUT and copy.
        credential_provider: obstore's, such as ``obstore.auth.boto3.Boto3CredentialProvider``:
            by itself obstore reads the environment and the machine's role, and no profiles.
        max_concurrency: PUTs and parts on the wire at once, over all requests of the application.
        max_bytes_in_flight: what all uploads of the application hold in memory together, in
            bytes; see `open_store`.
        request_seconds: how long one request may take with its retries; a body has one second
            more per 256 KiB.
        drain_seconds: how long closing waits for second deletes of unanswered uploads to fall
            due; then they are made at once.

    Raises:
        InvalidBucketError, InvalidPrefixError: unusable names.
        InvalidInputError: another URL, options that the URL has no use for, or a limit that is
            not positive. Options that obstore does not know are refused on entering.
    """
    check_limits(
        max_concurrency=max_concurrency,
        max_bytes_in_flight=max_bytes_in_flight,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
    )
    parts = split_url(url)
    http = HttpOptions(client_options, retry_config, credential_provider)
    if parts.scheme in {"s3", "gs", "az"}:
        if bucket is not None and bucket != parts.netloc:
            raise InvalidInputError(f"the bucket is in the URL already: {url!r}")
        name = parts.netloc
        both = normalize_s3_prefix(unquote(parts.path)), normalize_s3_prefix(prefix)
        prefix = "/".join(filter(None, both))
        backend = remote(parts, config or {}, http, request_seconds=request_seconds)
    else:
        if http.given:
            raise InvalidInputError(f"{url!r} sends no requests: no {', '.join(http.given)}")
        backend = (files if parts.scheme == "file" else memory)(parts, config or {})
        name = bucket or ("local" if parts.scheme == "file" else parts.netloc or "memory")
    return ObstoreStore(
        backend,
        bucket=name,
        prefix=prefix,
        max_concurrency=max_concurrency,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
        max_bytes_in_flight=max_bytes_in_flight,
    )


def _get_options(part: ByteRange | None, etag: str | None) -> dict[str, Any] | None:
    options: dict[str, Any] = {}
    if part is not None and part != (0, None):
        options["range"] = {"offset": part.start} if part.stop is None else tuple(part)
    if etag is not None and not etag.startswith("W/"):  # a weak one never matches
        options["if_match"] = etag
    return options or None


def _info(uri: str, answer: Any) -> ObjectInfo:
    meta, attributes = answer.meta, answer.attributes
    return ObjectInfo(
        uri=uri,
        size=meta["size"],
        metadata=decode_metadata(
            {name: value for name, value in attributes.items() if name not in _NOT_METADATA}
        ),
        content_type=attributes.get("Content-Type"),
        modified_at=meta["last_modified"],
        etag=meta["e_tag"],
    )
