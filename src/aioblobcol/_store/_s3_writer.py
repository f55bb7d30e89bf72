"""One large object in S3: a multipart upload, from its creation to its completion or abort.

Invariants: what was created is completed or aborted, whatever happens in between, and the caller
is not left before that; a completion without a usable answer is followed by an abort, after which
it cannot take effect any more.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from .._sources import HASH_INLINE_BYTES, PART_BYTES
from .._tasks import run_to_end, wait_through
from .._uri import split_s3_uri
from ..errors import (
    BlobNotFoundError,
    InvalidPutArgumentsError,
    StoreError,
    StoreUnavailableError,
)
from ._base import COPY_SECONDS, WriteRequest
from ._body import Body
from ._errors import translating

if TYPE_CHECKING:
    from .._sources import Part

logger = logging.getLogger("aioblobcol.store")

ABORTS: Final = 3
"""Source: Amazon S3 API Reference, AbortMultipartUpload: parts that are being sent may outlive one
abort, so it may have to be repeated."""

DEFAULT_CHECKSUM: Final = "CRC32"
"""Source: s3transfer, which the AWS CLI and boto3 upload with: the same, for the same reason."""

PartChecksum = Literal["crc32", "md5"]

_ABOUT_THE_WHOLE: Final = frozenset({"ContentLength", "ContentMD5"})


class S3Writer:
    """One multipart upload. `create` first; then `write` and `finish`; at last `close`."""

    def __init__(
        self,
        client: Any,
        request: WriteRequest,
        *,
        checksum: PartChecksum | None,
        request_seconds: float,
    ) -> None:
        self._client = client
        self._request = request
        self._checksum = checksum
        self._request_seconds = request_seconds
        bucket, key = split_s3_uri(request.uri)
        self._name: dict[str, Any] = {"Bucket": bucket, "Key": key}
        self._arguments = dict(request.arguments)
        if checksum is None and _adds_checksums(client):
            # the parts get botocore's default one: S3 must hear of it when the upload is created
            self._arguments.setdefault("ChecksumAlgorithm", DEFAULT_CHECKSUM)
        self._own_checksum = checksum is not None and "ChecksumAlgorithm" not in self._arguments
        self._sent: dict[int, dict[str, Any]] = {}
        self._was_interrupted = False
        self._crc32: int | None = None
        self._size = 0

    @property
    def upload_id(self) -> str | None:
        """S3's name for the upload."""
        return self._name.get("UploadId")

    async def create(self) -> None:
        """Create the upload; one that the caller does not wait for is aborted.

        Raises:
            InvalidPutArgumentsError: an argument is about the whole body; nothing was sent.
            StoreError: it was not created.
        """
        self._check_arguments()
        task = asyncio.create_task(self._create(), name="aioblobcol: create upload")
        interrupted = await wait_through([task])
        if interrupted is None:
            task.result()
            return
        if not task.cancelled() and task.exception() is None:
            await self._abort_to_end()
        raise interrupted

    async def write(self, part: Part) -> None:
        """Send one part.

        Raises:
            StoreError: it could not be sent.
        """
        body = Body(part.pieces, part.size)
        try:
            with translating("put", self._request.uri):
                answer = await self._client.upload_part(
                    **self._known_arguments("UploadPart"),
                    **await self._protection(part),
                    PartNumber=part.number,
                    Body=body,
                )
            # whatever the client's own configuration made of it has to be told again at the end
            checksums = {k: v for k, v in answer.items() if k.startswith("Checksum")}
            if self._own_checksum and self._checksum == "crc32":
                checksums["ChecksumCRC32"] = _crc32(part.crc32)
            self._sent[part.number] = {
                **{k: v for k, v in checksums.items() if k != "ChecksumType"},
                "PartNumber": part.number,
                "ETag": self._etag_of(answer),
            }
            self._size += part.size
        except BaseException:
            self._was_interrupted = True
            raise

    def _etag_of(self, answer: Mapping[str, Any]) -> str:
        etag: str | None = answer.get("ETag")
        if etag is None:
            raise StoreError("put", self._request.uri, "an answer without an ETag")
        return etag

    def finish(self, crc32: int) -> None:
        """Say that all parts were written, and what the CRC32 of the whole is."""
        self._crc32 = crc32

    async def close(self, error: BaseException | None) -> None:
        """Complete the upload if it is finished and there is no *error*, else abort it.

        Raises:
            StoreError: it could not be completed, and was aborted.
            asyncio.CancelledError: after the one or the other.
        """
        if error is None and self._crc32 is not None:
            await self._complete_to_end()
        else:
            await self._abort_to_end()

    async def _create(self) -> None:
        arguments = self._known_arguments("CreateMultipartUpload")
        if self._own_checksum and self._checksum == "crc32":
            arguments |= {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
        arguments["Metadata"] = dict(self._request.metadata)
        with translating("put", self._request.uri):
            async with asyncio.timeout(self._request_seconds):
                answer = await self._client.create_multipart_upload(**arguments)
        self._name["UploadId"] = answer["UploadId"]

    async def _complete_to_end(self) -> None:
        seconds = self._request_seconds + COPY_SECONDS
        try:
            await run_to_end(self._complete(), seconds=seconds)
        except asyncio.CancelledError as exc:
            if exc.__cause__ is not None:  # it failed as well
                await self._abort_to_end()
            raise
        except BaseException as exc:
            await self._abort_to_end()
            if isinstance(exc, TimeoutError):
                uri = self._request.uri
                raise StoreUnavailableError("put", uri, "no answer in time") from exc
            raise

    async def _complete(self) -> None:
        arguments = self._known_arguments("CompleteMultipartUpload")
        if self._own_checksum and self._checksum == "crc32" and self._crc32 is not None:
            arguments |= {"ChecksumCRC32": _crc32(self._crc32), "ChecksumType": "FULL_OBJECT"}
            arguments["MpuObjectSize"] = self._size
        parts = [self._sent[number] for number in sorted(self._sent)]
        with translating("put", self._request.uri):
            await self._client.complete_multipart_upload(
                **arguments, MultipartUpload={"Parts": parts}
            )

    async def _abort_to_end(self) -> None:
        with contextlib.suppress(TimeoutError):
            await run_to_end(self._abort(), seconds=self._request_seconds)

    async def _abort(self) -> None:
        """Abort; as long as parts may arrive, until the server knows nothing of the upload."""
        try:
            for _ in range(ABORTS if self._was_interrupted else 1):
                if await abort(self._client, self._request.uri, self._abort_arguments()):
                    return
        except StoreError as exc:
            logger.error(
                "the upload %s of %s was not aborted, its parts cost storage: %s",
                self.upload_id,
                self._request.uri,
                exc,
                extra={"uri": self._request.uri, "upload_id": self.upload_id},
            )

    def _abort_arguments(self) -> dict[str, Any]:
        return self._known_arguments("AbortMultipartUpload")

    def _check_arguments(self) -> None:
        refused = sorted(
            name
            for name in self._arguments
            if name in _ABOUT_THE_WHOLE or name.removeprefix("Checksum") not in {name, "Algorithm"}
        )
        if refused:
            raise InvalidPutArgumentsError(
                f"column {self._request.column!r}: {', '.join(refused)} is about the whole body, "
                f"and more than {PART_BYTES} bytes go in parts; leave it out, each part is "
                "protected by itself (ChecksumAlgorithm says by what)"
            )

    def _known_arguments(self, operation: str) -> dict[str, Any]:
        """Return the caller's arguments that an operation takes, and the upload's name."""
        arguments = self._arguments
        if not arguments:
            return dict(self._name)
        model = self._client.meta.service_model.operation_model(operation)
        known: Collection[str] = model.input_shape.members
        return {
            **{name: value for name, value in arguments.items() if name in known},
            **self._name,
        }

    async def _protection(self, part: Part) -> Mapping[str, str]:
        if not self._own_checksum:
            return {}
        if self._checksum == "crc32":
            return {"ChecksumCRC32": _crc32(part.crc32)}
        if part.size <= HASH_INLINE_BYTES:
            return {"ContentMD5": _md5(part)}
        return {"ContentMD5": await asyncio.to_thread(_md5, part)}


async def abort(client: Any, uri: str, arguments: Mapping[str, Any]) -> bool:
    """Abort an upload; tell whether it was gone already.

    Raises:
        StoreError: it may be there still.
    """
    try:
        with translating("abort the upload of", uri):
            await client.abort_multipart_upload(**arguments)
    except BlobNotFoundError:
        return True
    return False


def _adds_checksums(client: Any) -> bool:
    """Tell whether botocore adds a checksum to each body by itself."""
    chosen = getattr(client.meta.config, "request_checksum_calculation", None)
    return bool(chosen == "when_supported")


def _crc32(value: int) -> str:
    return base64.b64encode(value.to_bytes(4, "big")).decode("ascii")


def _md5(part: Part) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for piece in part.pieces:
        digest.update(piece)
    return base64.b64encode(digest.digest()).decode("ascii")
