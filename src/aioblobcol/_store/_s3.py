"""S3 through aiobotocore: one request per verb, and the tuned client of `open_store`.

`S3Store` works with a client of its own (opened by ``async with``) or with a borrowed one,
which it never closes. Invariants: botocore's answers end here; per-key errors of DeleteObjects
are read, and a key that the answer does not mention counts as not deleted.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import re
import weakref
from contextvars import ContextVar
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Literal

from aiobotocore.config import AioConfig
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator

from .._sources import HASH_INLINE_BYTES, Payload
from .._tasks import run_in_thread
from .._uri import root_uri, split_s3_uri
from ..errors import (
    BlobChangedError,
    InvalidInputError,
    InvalidPutArgumentsError,
    StoreClosedError,
    StoreError,
)
from ._base import (
    DESCRIBING_ARGUMENTS,
    MAX_BYTES_IN_FLIGHT,
    ByteRange,
    Capabilities,
    CopyRequest,
    DeleteReport,
    IncompleteUpload,
    ListedObject,
    ObjectInfo,
    ObjectReader,
    PutRequest,
    RunningChecksum,
    Runtime,
    WriteRequest,
    check_part,
    no_bytes,
    owned_uris,
    unchanged,
)
from ._body import Body
from ._errors import from_answer, translating, was_retried
from ._life import StoreLife, check_limits
from ._metadata import decode_metadata
from ._models import new_session
from ._presign import content_disposition, expiry_seconds
from ._s3_writer import S3Writer, abort

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Mapping,
        Sequence,
    )
    from types import TracebackType
    from typing import Self

    from aiobotocore.session import AioSession

KEYS_PER_REQUEST: Final = 1000
"""Source: Amazon S3 API Reference, DeleteObjects (keys per request)."""

SMALL_BODY_BYTES: Final = 64 * 1024
"""Up to here a body is handed to the socket at once: aiohttp sends files in pieces of this size."""

DELETE_ROUNDS: Final = 3
PARALLEL_DELETES: Final = 16

_NOT_FOUND: Final = 404
_RANGE_NOT_SATISFIABLE: Final = 416

_OWNED_ARGUMENTS: Final = frozenset({"Bucket", "Key", "Body"})
_RETRYABLE: Final = frozenset(
    {"InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
)
# What servers without a usable DeleteObjects answer to it (research: R2, B2, old MinIO, Ceph, GCS).
_NO_BULK_DELETE: Final = frozenset(
    {
        "InvalidArgument",
        "InvalidDigest",
        "InvalidRequest",
        "MalformedXML",
        "MethodNotAllowed",
        "MissingContentLength",
        "MissingContentMD5",
        "NotImplemented",
        "XNotImplemented",
    }
)

_CAPABILITIES: Final = Capabilities(
    parts_at_once=4,
    whole_checksum=True,
    put_arguments=True,
    if_match=True,
    presigned_get=True,
    presigned_post=True,
    versions=True,
    tags=True,
    uploads=True,
)
_CAPABILITIES_ELSEWHERE: Final = dataclasses.replace(_CAPABILITIES, whole_checksum=False)

CompatName = Literal["aws", "generic", "r2", "b2"]


@dataclasses.dataclass(frozen=True, slots=True)
class Compat:
    """What a family of servers understands.

    Attributes:
        checksum: what protects the body of one PUT.
        part_checksum: what protects a part; ``crc32`` only where the server takes one CRC32 of the
            whole object as well.
        response_checksums: of botocore's configuration.
        addressing_style: of botocore's configuration.
        region_name: if none is given; None: what the environment says.
    """

    checksum: Literal["crc32", "md5"]
    part_checksum: Literal["crc32", "md5"]
    response_checksums: Literal["when_supported", "when_required"]
    addressing_style: Literal["path", "auto"]
    region_name: str | None


COMPAT: Final[Mapping[str, Compat]] = {
    "aws": Compat("crc32", "crc32", "when_supported", "auto", None),
    # no default checksum trailers: over https they break servers; Content-MD5 is what they verify
    "generic": Compat("md5", "md5", "when_required", "path", "us-east-1"),
    "r2": Compat("crc32", "md5", "when_supported", "path", "auto"),
    "b2": Compat("md5", "md5", "when_required", "path", None),
}


class S3Store(StoreLife):
    """The objects under one prefix of one bucket, in S3 or a compatible server.

    Made by `open_store`. An async context manager: it opens a client on entering and, on
    leaving, finishes the background work and closes it. It can be entered again afterwards,
    also in another event loop, but not twice at the same time.
    """

    def __init__(
        self,
        *,
        bucket: str,
        prefix: str,
        compat: Compat,
        client_arguments: Mapping[str, Any],
        config: AioConfig | None,
        max_concurrency: int,
        request_seconds: float,
        drain_seconds: float,
        max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
    ) -> None:
        super().__init__(
            bucket=bucket,
            prefix=prefix,
            max_concurrency=max_concurrency,
            request_seconds=request_seconds,
            drain_seconds=drain_seconds,
            max_bytes_in_flight=max_bytes_in_flight,
        )
        self._compat: Compat | None = compat
        self._client_arguments = dict(client_arguments)
        self._config = config
        self._client: Any = None
        self._stack: contextlib.AsyncExitStack | None = None

    def __repr__(self) -> str:
        state = "open" if self._runtime is not None else "closed"
        return f"<S3Store {root_uri(self._bucket, self._prefix)} ({state})>"

    @classmethod
    def borrow(cls, client: Any, *, bucket: str, prefix: str) -> S3Store:
        """Wrap a client that somebody else opened and will close."""
        store = cls(
            bucket=bucket,
            prefix=prefix,
            compat=COMPAT["aws"],
            client_arguments={},
            config=None,
            max_concurrency=32,
            request_seconds=60,
            drain_seconds=10,
        )
        store._compat = None  # its checksums are its owner's choice
        store._client = client
        store._runtime = _runtime_of(client)
        return store

    async def __aenter__(self) -> Self:
        if self._stack is not None:
            raise StoreClosedError(f"{self!r} is entered already; open it once, at start-up")
        self._stack = stack = contextlib.AsyncExitStack()
        try:
            with translating("open", root_uri(self._bucket, self._prefix)):
                self._client = await run_in_thread(lambda: self._open_client(stack))
        except BaseException as exc:
            self._stack = None
            await stack.aclose()
            if isinstance(exc, ValueError) and not isinstance(exc, InvalidInputError):
                raise InvalidInputError(f"cannot open {self!r}: {exc}") from exc  # an endpoint
            raise
        self._start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        runtime, stack = self._runtime, self._stack
        if runtime is None or stack is None:
            return
        try:
            await runtime.close(drain_seconds=self._drain_seconds)
        finally:
            self._client = self._runtime = self._stack = None
            await stack.aclose()

    @property
    def capabilities(self) -> Capabilities:
        """What S3 can do; what a compatible server lacks of it is in its own documentation."""
        return _CAPABILITIES if self._part_checksum == "crc32" else _CAPABILITIES_ELSEWHERE

    @property
    def client(self) -> Any:
        """The aiobotocore client, for everything that the library does not do.

        Raises:
            StoreClosedError: the store is not open.
        """
        self.runtime  # noqa: B018 - raises when closed
        return self._client

    def check_put(self, request: PutRequest) -> None:
        """Refuse arguments that ``put_object`` does not take, before anything is sent.

        Raises:
            InvalidPutArgumentsError: unknown, wrongly typed, or owned by the library.
        """
        client = self.client
        if not request.arguments:
            return  # what is left is the library's own
        owned = sorted(_OWNED_ARGUMENTS.intersection(request.arguments))
        if owned:
            raise InvalidPutArgumentsError(
                f"column {request.column!r}: {', '.join(owned)} is set by the library"
            )
        model = client.meta.service_model.operation_model("PutObject")
        report = ParamValidator().validate(self._put_arguments(request), model.input_shape)
        unknown = sorted(set(request.arguments) - set(model.input_shape.members))
        if unknown or report.has_errors():
            reason = report.generate_report() or f"put_object does not take {', '.join(unknown)}"
            raise InvalidPutArgumentsError(f"column {request.column!r}: {reason}")

    async def put(self, request: PutRequest) -> bool:
        """Store one object; tell whether the first attempt was answered.

        Raises:
            StoreError: ``may_have_taken_effect`` tells whether the object may be there.
        """
        with translating("put", request.uri):
            arguments = self._put_arguments(request)
            await self._protect(request, arguments)
            answer = await self.client.put_object(**arguments)
        return not was_retried(answer)

    @contextlib.asynccontextmanager
    async def open_writer(self, request: WriteRequest) -> AsyncIterator[S3Writer]:
        """Write one object part by part, in a multipart upload; see `Store.open_writer`.

        Arguments of ``put_object`` are sent with those of the upload's requests that take them.
        ``ChecksumAlgorithm`` among them has botocore compute that checksum of each part, in place
        of our own.

        Raises:
            StoreError: the upload could not be created, or completed.

        Source: Amazon S3 User Guide, "Uploading and copying objects using multipart upload".
        """
        writer = S3Writer(
            self.client,
            request,
            checksum=self._part_checksum,
            request_seconds=self._request_seconds,
        )
        await writer.create()
        try:
            yield writer
        except BaseException as exc:
            await writer.close(exc)
            raise
        await writer.close(None)

    async def iter_uploads(self) -> AsyncGenerator[IncompleteUpload, None]:
        """List what was neither completed nor aborted under the prefix, 1,000 per request.

        Raises:
            StoreError: the listing could not be read to its end.
        """
        root = root_uri(self._bucket, self._prefix)
        arguments: dict[str, Any] = {"Bucket": self._bucket}
        if self._prefix:
            arguments["Prefix"] = f"{self._prefix}/"
        while True:
            with translating("list the uploads under", root):
                page = await self.client.list_multipart_uploads(**arguments)
            for entry in page.get("Uploads", ()):
                yield IncompleteUpload(
                    f"s3://{self._bucket}/{entry['Key']}",
                    entry["UploadId"],
                    _in_utc(entry.get("Initiated")),
                )
            if not page.get("IsTruncated"):
                return
            arguments["KeyMarker"] = page["NextKeyMarker"]
            arguments["UploadIdMarker"] = page["NextUploadIdMarker"]

    async def abort_upload(self, upload: IncompleteUpload) -> None:
        """Abort an incomplete upload; one that is gone is no error.

        Raises:
            StoreError: it may be there still.
        """
        bucket, key = split_s3_uri(upload.uri)
        arguments = {"Bucket": bucket, "Key": key, "UploadId": upload.upload_id}
        await abort(self.client, upload.uri, arguments)

    async def copy(self, request: CopyRequest) -> bool:
        """Copy one object inside of the server; tell whether the first attempt was answered.

        The content's type and its like, the metadata and the tags are the source's (tags unless
        ``Tagging`` is among the arguments, the others always); everything else is as it would be
        for a new object. Arguments that only ``put_object`` takes are left out. The source's
        bucket may be another one that the same client reaches.

        Raises:
            BlobNotFoundError: the source is missing (the error names it), or a bucket.
            StoreAccessError: one of the two may not be used; without s3:ListBucket, AWS answers
                this for a source that is missing.
            StoreError: about the new object, such as for a source of more than 5 GiB;
                ``may_have_taken_effect`` tells whether it may be there.

        Source: Amazon S3 API Reference, CopyObject (5 GB, directives).
        """
        with translating("copy", request.uri):
            try:
                answer = await self.client.copy_object(**self._copy_arguments(request))
            except ClientError as exc:
                if not _misses_source(exc, request):
                    raise
                raise from_answer("copy", request.source_uri, exc) from exc
        return not was_retried(answer)

    async def get(self, uri: str) -> bytes:
        """Read one object.

        Raises:
            BlobNotFoundError: it is not there.
            StoreError: it could not be read.
        """
        bucket, key = split_s3_uri(uri)
        with translating("get", uri):
            answer = await self.client.get_object(Bucket=bucket, Key=key)
            async with answer["Body"] as body:
                data: bytes = await body.read()
        return data

    @contextlib.asynccontextmanager
    async def open(
        self, uri: str, *, part: ByteRange | None = None, etag: str | None = None
    ) -> AsyncIterator[ObjectReader]:
        """Read one object, or a part of it, chunk by chunk; leaving the block ends the request.

        A block that is left early drops the connection. A part that begins at the object's end
        or beyond it, or has no length, is described by a HEAD and has no bytes. From a server
        that does not know ranges the whole is read, and the part is cut out.

        Args:
            uri: the object.
            part: which bytes; all by default. ``info.size`` is the whole object's.
            etag: of the version that it has to be; compared here, too, for not every server
                knows ``If-Match``.

        Raises:
            InvalidInputError: no range; nothing was sent.
            BlobNotFoundError: it is not there; raised on entering.
            BlobChangedError: it is another version; raised on entering.
            BlobCorruptedError: the whole was read, and is not what the server's checksum says.
            StoreError: it could not be read; also while its chunks are read.

        Source: Amazon S3 API Reference, GetObject (Range, If-Match).
        """
        if part is not None:
            check_part(part)
            part = None if part == (0, None) else part
        answer = await self._get_part(uri, part, etag)
        if answer is None:
            assert part is not None
            yield ObjectReader(_without(part, unchanged(await self.head(uri), etag)), no_bytes)
            return
        async with answer["Body"] as body:

            async def read_chunk(size: int) -> bytes:
                with translating("get", uri):
                    chunk: bytes = await body.read(size)
                return chunk

            reader = _reader(uri, answer, part, read_chunk)
            unchanged(reader.info, etag)
            try:
                yield reader
            finally:
                reader.close()

    async def _get_part(self, uri: str, part: ByteRange | None, etag: str | None) -> Any:
        """Return the answer; None if the object has no such bytes."""
        bucket, key = split_s3_uri(uri)
        arguments = {"Bucket": bucket, "Key": key}
        if part is not None:
            if part.start == part.stop:
                return None
            last = "" if part.stop is None else part.stop - 1
            arguments["Range"] = f"bytes={part.start}-{last}"
        # a weak one never matches; proxies make them when they compress
        if etag is not None and not etag.startswith("W/"):
            arguments["IfMatch"] = etag
        with translating("get", uri):
            try:
                return await self.client.get_object(**arguments)
            except ClientError as exc:
                if _status(exc.response) == _RANGE_NOT_SATISFIABLE and part is not None:
                    return None
                raise

    async def head(self, uri: str) -> ObjectInfo:
        """Describe one object.

        Raises:
            BlobNotFoundError: it is not there.
            StoreError: the server did not say.
        """
        bucket, key = split_s3_uri(uri)
        with translating("head", uri):
            answer = await self.client.head_object(Bucket=bucket, Key=key)
        return _info(uri, answer)

    async def presign(
        self, uri: str, *, expires_in: timedelta, download_as: str | None = None
    ) -> str:
        """Return a URL with which anybody can GET the object until it expires. Sends nothing.

        It is not checked that the object exists. The URL is a secret, and is not logged. A URL
        that was signed with temporary credentials expires with them, if that is earlier. A
        borrowed client signs as it was configured: in the regions that once knew SigV2 botocore
        presigns with that, unless ``signature_version="s3v4"`` is in its configuration.

        Args:
            uri: the object.
            expires_in: from 1 second to 7 days; fractions of a second are dropped.
            download_as: the name under which a browser saves the object, in any script. Control
                characters and separators in it become ``_``.

        Raises:
            InvalidInputError: ``expires_in`` is out of bounds, or the name is empty.
            StoreAccessError: there are no credentials to sign with.

        Source: Amazon S3 API Reference, "Authenticating Requests: Using Query Parameters" (SigV4:
        7 days at most).
        """
        seconds = expiry_seconds(expires_in)
        bucket, key = split_s3_uri(uri)
        arguments = {"Bucket": bucket, "Key": key}
        if download_as is not None:
            arguments["ResponseContentDisposition"] = content_disposition(download_as)
        with translating("presign", uri):
            url: str = await self.client.generate_presigned_url(
                "get_object", Params=arguments, ExpiresIn=seconds
            )
        return url

    async def delete_many(self, uris: Sequence[str]) -> DeleteReport:
        """Delete objects, 1,000 per request, requests in parallel; refused keys are tried again.

        Args:
            uris: under this store's bucket and prefix; any other is refused before the first
                request. One URI is one DeleteObject; a server that refuses DeleteObjects gets
                single requests from then on.

        Returns:
            ``deleted`` (also what was gone already) and ``failed`` with S3's reason.

        Raises:
            ForeignUriError: a URI lies outside; nothing was sent.
            StoreClosedError: the store or the client is not open.
        """
        left = owned_uris(self, uris)
        failed: dict[str, str] = {}
        for attempt in range(DELETE_ROUNDS):
            if attempt:
                await asyncio.sleep(0.1 * 2**attempt)  # Source: AWS guidance, exponential back-off
            failed, again = await self._delete_round(left, failed)
            if not again:
                break
            left = again
        return DeleteReport(
            deleted=tuple(uri for uri in dict.fromkeys(uris) if uri not in failed), failed=failed
        )

    async def iter_objects(
        self, *, start_after: str = "", with_times: bool = False
    ) -> AsyncGenerator[ListedObject, None]:
        """List the objects under the prefix that come after a URI, 1,000 per request.

        In the order of the keys' bytes, as S3 has it; directory buckets have no order.

        Raises:
            StoreError: the listing could not be read to its end.

        Source: Amazon S3 API Reference, ListObjectsV2 (StartAfter, order of the answer).
        """
        root = root_uri(self._bucket, self._prefix)
        arguments: dict[str, Any] = {"Bucket": self._bucket}
        if self._prefix:
            arguments["Prefix"] = f"{self._prefix}/"
        if start_after:
            # any key that was listed, also one that the library would refuse
            arguments["StartAfter"] = start_after.removeprefix(f"s3://{self._bucket}/")
        while True:
            token = _keys_and_sizes_suffice.set(not with_times)
            try:
                with translating("list", root):
                    page = await self.client.list_objects_v2(**arguments)
            finally:
                _keys_and_sizes_suffice.reset(token)
            for entry in page.get("Contents", ()):
                at: datetime | None = entry["LastModified"] if with_times else None
                yield ListedObject(
                    f"s3://{self._bucket}/{entry['Key']}",
                    entry["Size"],
                    None if at is None else at.astimezone(timezone.utc),
                )
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    async def _open_client(self, stack: contextlib.AsyncExitStack) -> Any:
        """Make the client; takes 100 ms of CPU, so that `run_in_thread` runs it.

        aiohttp's session, which does belong to a loop, is made with the first request.
        """
        assert self._compat is not None
        session = new_session()
        given = str(self._client_arguments.get("endpoint_url", "https:"))
        sign_payload = not given.startswith("https:")
        context = self._new_client(session, self._compat, sign_payload=sign_payload)
        client = await stack.enter_async_context(context)
        if not sign_payload and not client.meta.endpoint_url.startswith("https:"):
            # the environment or a profile names an http endpoint, where nothing else protects
            # a body: only the client could tell
            context = self._new_client(session, self._compat, sign_payload=True)
            client = await stack.enter_async_context(context)
        client.meta.events.register_last("before-call.s3", _no_expect)
        client.meta.events.register_first("choose-signer.s3.GetObject", _presign_with_v4)
        client.meta.events.register_first("before-parse.s3.ListObjectsV2", _drop_unread)
        if self._compat.checksum == "md5":
            client.meta.events.register_last("before-call.s3.DeleteObjects", _content_md5)
        return client

    def _new_client(self, session: AioSession, compat: Compat, *, sign_payload: bool) -> Any:
        config = _tuned_config(compat, sign_payload=sign_payload)
        if self._config is not None:
            config = config.merge(self._config)
        arguments = {"region_name": compat.region_name, **self._client_arguments}
        return session.create_client("s3", **arguments, config=config)

    def _put_arguments(self, request: PutRequest) -> dict[str, Any]:
        bucket, _, key = request.uri.removeprefix("s3://").partition("/")  # we have made it
        return {
            **request.arguments,
            "Bucket": bucket,
            "Key": key,
            "Body": _body_of(request.payload),
            "Metadata": dict(request.metadata),
        }

    def _copy_arguments(self, request: CopyRequest) -> dict[str, Any]:
        source_bucket, source_key = split_s3_uri(request.source_uri)
        bucket, key = split_s3_uri(request.uri)
        model = self.client.meta.service_model.operation_model("CopyObject")
        known = set(model.input_shape.members) - DESCRIBING_ARGUMENTS
        kept = {name: value for name, value in request.arguments.items() if name in known}
        return {
            **({"TaggingDirective": "REPLACE"} if "Tagging" in kept else {}),
            **kept,
            "Bucket": bucket,
            "Key": key,
            # as a dict: botocore would take "?versionId=" in a string for a version
            "CopySource": {"Bucket": source_bucket, "Key": source_key},
            "MetadataDirective": "COPY",
        }

    @property
    def _part_checksum(self) -> Literal["crc32", "md5"] | None:
        return None if self._compat is None else self._compat.part_checksum

    async def _protect(self, request: PutRequest, arguments: dict[str, Any]) -> None:
        """Add the argument that protects the body, unless the caller gave one."""
        if self._compat is None:
            return
        for name in request.arguments:
            if name == "ContentMD5" or name.startswith("Checksum"):
                return
        payload = request.payload
        if self._compat.checksum == "crc32":
            arguments["ChecksumCRC32"] = _base64(payload.crc32.to_bytes(4, "big"))
            return
        if payload.md5 is not None:
            md5 = bytes.fromhex(payload.md5)
        elif payload.size <= HASH_INLINE_BYTES:
            md5 = _md5(payload.body)
        else:
            md5 = await asyncio.to_thread(_md5, payload.body)
        arguments["ContentMD5"] = _base64(md5)

    async def _delete_round(
        self, uris: list[str], failed_before: Mapping[str, str]
    ) -> tuple[dict[str, str], list[str]]:
        """Try all of *uris* once; return what failed for good or again, and what to try again."""
        slots = asyncio.Semaphore(PARALLEL_DELETES)
        size = 1 if self.client in _without_bulk_delete else KEYS_PER_REQUEST

        async def chunk(part: list[str]) -> dict[str, tuple[str, bool]]:
            async with slots:
                if len(part) == 1:
                    return await self._delete_one(part[0])
                return await self._delete_bulk(part)

        parts = [uris[start : start + size] for start in range(0, len(uris), size)]
        failed = {uri: reason for uri, reason in failed_before.items() if uri not in uris}
        again: list[str] = []
        for refused in await asyncio.gather(*(chunk(part) for part in parts)):
            for uri, (reason, is_worth_retrying) in refused.items():
                failed[uri] = reason
                if is_worth_retrying:
                    again.append(uri)
        return failed, again

    async def _delete_one(self, uri: str) -> dict[str, tuple[str, bool]]:
        bucket, key = split_s3_uri(uri)
        try:
            with translating("delete", uri):
                await self.client.delete_object(Bucket=bucket, Key=key)
        except StoreError as exc:
            if exc.code.split(" ")[0] in {"NoSuchKey", "404"}:
                return {}
            return {uri: (exc.code, exc.may_have_taken_effect)}
        return {}

    async def _delete_bulk(self, uris: list[str]) -> dict[str, tuple[str, bool]]:
        keys = {split_s3_uri(uri)[1]: uri for uri in uris}
        request = {"Objects": [{"Key": key} for key in keys]}
        try:
            with translating("delete", uris[0]):
                answer = await self._delete_objects(request)
        except StoreError as exc:
            return dict.fromkeys(uris, (exc.code, exc.may_have_taken_effect))
        if answer is None:
            _without_bulk_delete.add(self.client)
            return dict.fromkeys(uris, ("DeleteObjects is not supported", True))
        refused = {
            error["Key"]: error.get("Code", "unknown")
            for error in answer.get("Errors", ())
            if error.get("Code") != "NoSuchKey"
        }
        confirmed = {entry["Key"] for entry in answer.get("Deleted", ())}
        confirmed.update(e["Key"] for e in answer.get("Errors", ()) if e.get("Code") == "NoSuchKey")
        outcome = {keys[key]: (code, code in _RETRYABLE) for key, code in refused.items()}
        for key, uri in keys.items():
            if key not in refused and key not in confirmed:
                outcome[uri] = ("the server did not mention this key", True)
        return outcome

    async def _delete_objects(self, request: Mapping[str, Any]) -> Any:
        """Return the answer, or None from a server that does not take the bulk request."""
        try:
            return await self.client.delete_objects(Bucket=self._bucket, Delete=request)
        except ClientError as exc:
            status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = exc.response.get("Error", {}).get("Code")
            if code in _NO_BULK_DELETE or status in {405, 411, 501}:
                return None
            raise


def open_store(
    *,
    bucket: str,
    prefix: str = "",
    endpoint_url: str | None = None,
    region_name: str | None = None,
    compat: CompatName = "aws",
    max_concurrency: int = 32,
    max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
    request_seconds: float = 60,
    drain_seconds: float = 10,
    config: AioConfig | None = None,
    **client_arguments: Any,
) -> S3Store:
    """Describe a store; does no I/O, so it may stand at module level.

    ``async with store:`` opens a tuned client: a pool of 64 connections, no
    ``Expect: 100-continue`` round trip, our own checksum of each body, three attempts. It is
    made in a thread, which takes a tenth of a second: enter the store once per process, when
    the application starts, and not for each request.

    Args:
        bucket: the bucket's name; it must exist.
        prefix: of every key; slashes at its ends are ignored. Nothing outside is ever deleted.
        endpoint_url: of an S3-compatible server; by default AWS, or what the environment says.
        region_name: by default what the environment or the profile says.
        compat: what the server understands: ``aws`` (own CRC32), ``generic`` (Ceph, MinIO,
            Swift, ...: Content-MD5, path addressing, no checksum trailers), ``r2`` or ``b2``.
        max_concurrency: PUTs and parts on the wire at once, over all requests of the application.
        max_bytes_in_flight: what all uploads of the application hold in memory together, in
            bytes, apart from the bytes that were assigned as such; who needs more waits for its
            turn. At least one part (8 MiB).
        request_seconds: how long one request may take with its retries; a body has one second
            more per 256 KiB.
        drain_seconds: how long closing waits for second deletes of unanswered uploads to fall
            due; then they are made at once.
        config: an `AioConfig` whose options go over ours.
        client_arguments: whatever else aiobotocore's ``create_client`` takes (credentials,
            ``verify``, ``use_ssl``, ...). Credentials come from the environment by default.

    Raises:
        InvalidBucketError, InvalidPrefixError: unusable names.
        InvalidInputError: an unknown ``compat``, or a limit that is not positive.
    """
    if compat not in COMPAT:
        raise InvalidInputError(f"compat is one of {', '.join(COMPAT)}, not {compat!r}")
    check_limits(
        max_concurrency=max_concurrency,
        max_bytes_in_flight=max_bytes_in_flight,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
    )
    given = {"endpoint_url": endpoint_url, "region_name": region_name}
    return S3Store(
        bucket=bucket,
        prefix=prefix,
        compat=COMPAT[compat],
        client_arguments={
            **{name: value for name, value in given.items() if value is not None},
            **client_arguments,
        },
        config=config,
        max_concurrency=max_concurrency,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
        max_bytes_in_flight=max_bytes_in_flight,
    )


def _tuned_config(compat: Compat, *, sign_payload: bool) -> AioConfig:
    return AioConfig(
        max_pool_connections=64,  # the default of 10 makes the 11th request wait
        user_agent=f"aioblobcol/{version('aioblobcol')}",  # the default costs 13 % of a request
        retries={"mode": "standard", "total_max_attempts": 3},
        connect_timeout=5,
        read_timeout=30,
        request_checksum_calculation="when_required",  # we send our own, see Compat
        response_checksum_validation=compat.response_checksums,
        s3={
            "addressing_style": compat.addressing_style,
            **({} if sign_payload else {"payload_signing_enabled": False}),
        },
    )


def _info(uri: str, answer: Mapping[str, Any]) -> ObjectInfo:
    return ObjectInfo(
        uri=uri,
        size=_whole_size(uri, answer),
        metadata=decode_metadata(answer.get("Metadata", {})),
        content_type=answer.get("ContentType"),
        modified_at=_in_utc(answer.get("LastModified")),
        etag=answer.get("ETag"),
    )


def _whole_size(uri: str, answer: Mapping[str, Any]) -> int:
    given: str | None = answer.get("ContentRange")
    if given is None:
        return int(answer["ContentLength"])
    return _content_range(uri, given)[1]


def _content_range(uri: str, given: str) -> tuple[int, int]:
    """Return the first byte of a partial answer, and the size of the whole object."""
    read = _CONTENT_RANGE.fullmatch(given)
    if read is None:
        raise StoreError("get", uri, f"an answer with Content-Range: {given}")
    return int(read[1]), int(read[2])


def _reader(
    uri: str,
    answer: Mapping[str, Any],
    part: ByteRange | None,
    read_chunk: Callable[[int], Awaitable[bytes]],
) -> ObjectReader:
    info = _info(uri, answer)
    if part is None:
        return ObjectReader(info, read_chunk, checksum=_checksum_of(answer))
    given = answer.get("ContentRange")
    if given is None:  # a server that does not know ranges
        return ObjectReader(info, _cut(read_chunk, part), took_part=False)
    if _content_range(uri, given)[0] != part.start:
        raise StoreError("get", uri, f"asked for {part}, and got Content-Range: {given}")
    return ObjectReader(info, read_chunk)


def _without(part: ByteRange, info: ObjectInfo) -> ObjectInfo:
    """Refuse a description of an object that has bytes in *part* after all."""
    if part.start < info.size and part.start != part.stop:
        raise BlobChangedError("get", info.uri, f"it had no {part}, and has {info.size} bytes now")
    return info


def _cut(
    read_chunk: Callable[[int], Awaitable[bytes]], part: ByteRange
) -> Callable[[int], Awaitable[bytes]]:
    """Read on until *part* begins, and not beyond its end."""
    position = 0

    async def read_cut(size: int) -> bytes:
        nonlocal position
        while part.stop is None or position < part.stop:
            chunk = await read_chunk(size)
            before, position = position, position + len(chunk)
            stop = None if part.stop is None else part.stop - before
            wanted = chunk[max(part.start - before, 0) : stop]
            if wanted or not chunk:
                return wanted
        return b""

    return read_cut


class _BotocoreChecksum:
    """What botocore compares at the end of a body; it goes on where the body broke off."""

    def __init__(self, running: Any, expected: frozenset[str]) -> None:
        self._running = running
        self._expected = expected

    def update(self, chunk: bytes, /) -> None:
        self._running.update(chunk)

    def is_right(self) -> bool:
        return self._running.b64digest() in self._expected


def _checksum_of(answer: Mapping[str, Any]) -> RunningChecksum | None:
    running = getattr(answer["Body"], "checksum", None)  # of a body that botocore checks
    if running is None:
        return None
    named = (value for name, value in answer.items() if name.startswith("Checksum"))
    return _BotocoreChecksum(running, frozenset(named))


def _status(answer: Mapping[str, Any]) -> int:
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def _misses_source(exc: ClientError, request: CopyRequest) -> bool:
    """Tell whether a copy failed because there is nothing to copy."""
    answer: Mapping[str, Any] = exc.response
    error: Mapping[str, Any] = answer.get("Error", {})
    if error.get("Code") == "NoSuchBucket":  # either one; the answer names it, on AWS at least
        source_bucket, _ = split_s3_uri(request.source_uri)
        bucket, _ = split_s3_uri(request.uri)
        return bool(bucket != source_bucket == error.get("BucketName"))
    return bool(answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == _NOT_FOUND)


def _in_utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.astimezone(timezone.utc)


def _body_of(payload: Payload) -> bytearray | Body:
    # botocore wraps bytes into a file, and what it and aiohttp do for files costs 6 % of a request.
    # Larger bodies are worth it: they are sent piece by piece, and are not there twice.
    if payload.size <= SMALL_BODY_BYTES:
        return bytearray(payload.body)
    return Body([payload.body], payload.size)


_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+)")


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _md5(body: bytes) -> bytes:
    return hashlib.md5(body, usedforsecurity=False).digest()


def _no_expect(params: dict[str, Any], **_: Any) -> None:
    # Returns None on purpose: anything else is taken as the response (botocore).
    params["headers"].pop("Expect", None)


_keys_and_sizes_suffice: ContextVar[bool] = ContextVar("_keys_and_sizes_suffice", default=False)
_UNREAD: Final = re.compile(
    rb"<(LastModified|ETag|StorageClass|ChecksumAlgorithm|ChecksumType)>[^<]*</\1>"
)


def _drop_unread(response_dict: dict[str, Any], **_: Any) -> None:
    # Most of a listing's cost is botocore's parsing of it, and most of that is of timestamps. What
    # users ask the same client for is left whole. A "<" in a key is written "&lt;".
    if _keys_and_sizes_suffice.get() and isinstance(response_dict.get("body"), bytes):
        response_dict["body"] = _UNREAD.sub(b"", response_dict["body"])


def _content_md5(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["Content-MD5"] = _base64(_md5(params["body"]))
    params["context"].pop("checksum", None)  # or botocore adds its CRC32 as well


def _presign_with_v4(signature_version: Any, **_: Any) -> str | None:
    # botocore presigns with SigV2 in the regions that once knew it, which their new buckets refuse
    return "s3v4-query" if signature_version in {"v4-query", "s3v4-query"} else None


# Clients whose server refused DeleteObjects: remembered for as long as the client lives.
_without_bulk_delete: weakref.WeakSet[Any] = weakref.WeakSet()

_runtimes: weakref.WeakKeyDictionary[Any, tuple[asyncio.AbstractEventLoop, Runtime]] = (
    weakref.WeakKeyDictionary()
)


def _runtime_of(client: Any) -> Runtime:
    """Return the one runtime of a borrowed client (in this loop), so that its limits hold."""
    loop = asyncio.get_running_loop()
    known = _runtimes.get(client)
    if known is None or known[0] is not loop:
        reference = weakref.ref(client)  # the dictionary's value must not keep its key alive

        async def delete(uris: Sequence[str]) -> DeleteReport:
            return await _delete_anywhere(reference(), uris)

        runtime = Runtime(delete, max_concurrency=32, request_seconds=60)
        known = _runtimes[client] = (loop, runtime)
    return known[1]


async def drain(s3_client: Any) -> None:
    """Finish the background work that borrowing *s3_client* left behind; call it before closing.

    Uploads that were never answered are deleted a second time now. `open_store` does this by
    itself when it closes.
    """
    known = _runtimes.get(s3_client)
    if known is not None:
        await known[1].close(drain_seconds=0)
        del _runtimes[s3_client]


async def _delete_anywhere(client: Any, uris: Sequence[str]) -> DeleteReport:
    if client is None:
        raise StoreClosedError("the S3 client is gone")
    report = DeleteReport()
    for bucket in dict.fromkeys(split_s3_uri(uri)[0] for uri in uris):
        mine = [uri for uri in uris if split_s3_uri(uri)[0] == bucket]
        store = S3Store.borrow(client, bucket=bucket, prefix="")
        report = report.merged_with(await store.delete_many(mine))
    return report
