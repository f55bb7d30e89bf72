"""botocore's errors become ours, in one place.

Invariant: an error is definite (the server answered that it did not do it) only for a 4xx
answer to the first attempt; everything else may have taken effect.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

from ..errors import (
    BlobNotFoundError,
    InvalidPutArgumentsError,
    StoreAccessError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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


@contextlib.contextmanager
def translating(operation: str, uri: str) -> Iterator[None]:
    """Turn what aiobotocore raises into a `StoreError` about *uri*, chained."""
    try:
        yield
    except ClientError as exc:
        raise from_answer(operation, uri, exc) from exc
    except CREDENTIAL_ERRORS as exc:
        raise StoreAccessError(operation, uri, f"{type(exc).__name__}: {exc}") from exc
    except ParamValidationError as exc:
        raise InvalidPutArgumentsError(f"{operation} {uri}: {exc}") from exc
    except (TimeoutError, BotoCoreError, aiohttp.ClientError, OSError) as exc:
        if _is_closed(exc):
            raise _closed(operation, uri) from exc
        raise StoreUnavailableError(operation, uri, f"{type(exc).__name__}: {exc}") from exc
    except (RuntimeError, AttributeError, AssertionError) as exc:
        if not _is_closed(exc):
            raise
        raise _closed(operation, uri) from exc


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
