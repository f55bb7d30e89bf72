"""botocore's errors become ours, in one place.

Invariant: an error is definite (the server answered that it did not do it) only for a 4xx
answer to the first attempt; everything else may have taken effect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

from ..errors import (
    BlobChangedError,
    BlobCorruptedError,
    BlobNotFoundError,
    InvalidPutArgumentsError,
    StoreAccessError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
)
from ._life import Translating

if TYPE_CHECKING:
    from collections.abc import Mapping

CREDENTIAL_ERRORS = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
_NOT_FOUND = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NotFound"})
_NO_ACCESS = frozenset(
    {
        "401",
        "403",
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
    }
)
# The server says that it stopped early, or asks for a repetition: not a definite no.
_TRY_AGAIN_STATUS = frozenset({408, 409, 425, 429})
_CLOSED_HINTS = ("session is closed", "connector is closed", "event loop is closed")


class translating(Translating):  # noqa: N801 - used like a function
    """Turn what aiobotocore raises inside of the block into a `StoreError` about *uri*."""

    __slots__ = ()

    def _translated(self, exc: BaseException) -> Exception | None:
        return _translated(self._operation, self._uri, exc)


def _translated(operation: str, uri: str, exc: BaseException) -> Exception | None:
    """Return our error for *exc*; None if it is to go on as it is."""
    if isinstance(exc, ClientError):
        return from_answer(operation, uri, exc)
    if isinstance(exc, ParamValidationError):
        return InvalidPutArgumentsError(f"{operation} {uri}: {exc}")
    kinds = ((CREDENTIAL_ERRORS, StoreAccessError), (FlexibleChecksumError, BlobCorruptedError))
    for raised, ours in kinds:
        if isinstance(exc, raised):
            return ours(operation, uri, f"{type(exc).__name__}: {exc}")
    is_trouble = isinstance(exc, (TimeoutError, BotoCoreError, aiohttp.ClientError, OSError))
    is_perhaps_closed = isinstance(exc, (RuntimeError, AttributeError, AssertionError))
    if (is_trouble or is_perhaps_closed) and _is_closed(exc):
        return _closed(operation, uri)
    if is_trouble:
        return StoreUnavailableError(operation, uri, f"{type(exc).__name__}: {exc}")
    return None


def from_answer(operation: str, uri: str, exc: ClientError) -> StoreError:
    """Return our error for an answer of the server."""
    answer: Mapping[str, Any] = exc.response
    error = answer.get("Error", {})
    metadata = answer.get("ResponseMetadata", {})
    status, code = int(metadata.get("HTTPStatusCode") or 0), str(error.get("Code") or "")
    text = " ".join(part for part in (code or f"HTTP {status}", error.get("Message")) if part)
    is_definite = 400 <= status < 500 and status not in _TRY_AGAIN_STATUS
    translated: StoreError
    if code in _NOT_FOUND or status == 404:
        translated = BlobNotFoundError(operation, uri, text)
    elif code in _NO_ACCESS or status in {401, 403}:
        translated = StoreAccessError(operation, uri, text)
    elif status == 412 and operation == "get":
        translated = BlobChangedError(operation, uri, text)
    elif is_definite:
        translated = StoreError(operation, uri, text)
    else:
        return StoreUnavailableError(operation, uri, text)
    # A retried request was sent more than once, and only the last attempt was refused.
    translated.may_have_taken_effect = was_retried(answer)
    return translated


def was_retried(answer: Mapping[str, Any]) -> bool:
    """Tell whether an earlier attempt of this request went unanswered or failed."""
    return bool(answer.get("ResponseMetadata", {}).get("RetryAttempts"))


def _is_closed(exc: BaseException) -> bool:
    seen: BaseException | None = exc
    while seen is not None:
        text = str(seen).lower()
        if any(hint in text for hint in _CLOSED_HINTS):
            return True
        # aiobotocore forgets its aiohttp sessions when it is closed, and then looks for them
        if isinstance(seen, AttributeError) and "'nonetype'" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _closed(operation: str, uri: str) -> StoreClosedError:
    return StoreClosedError(
        f"cannot {operation} {uri}: the S3 client is closed; keep it open (async with) for as "
        "long as handlers run"
    )
