"""obstore's errors become ours, in one place.

obstore's classes say little (a full disk, a refused connection and a 500 are all `GenericError`);
the text says the rest: the server's status and code, and how often the request was repeated.

Invariants: an error is definite (it was not done) only for a 4xx answer to a request that was sent
once, and for what obstore refuses by itself; everything else may have taken effect. What is not
found in the text counts as not known, so that a new wording makes errors less definite, never more.
"""

from __future__ import annotations

import re
from typing import Final

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from ..errors import (
    AioBlobColError,
    BlobChangedError,
    BlobNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
)
from ._life import Translating

MISSING_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")

_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]+)</Code>(?:<Message>([^<]*)</Message>)?")
_RETRIES = re.compile(r"\bretries: (\d+),|, after (\d+) retries")
_URL = re.compile(r"\b(https?://[^\s?]+)\?\S*")
_LOCAL = re.compile(r"^Generic (?:LocalFileSystem|InMemory) error|^Operation ")
# The server says that it stopped early, or asks for a repetition: not a definite no.
_TRY_AGAIN_STATUS = frozenset({408, 409, 425, 429})


class translating(Translating):  # noqa: N801 - used like a function
    """Turn what obstore raises inside of the block into a `StoreError` about *uri*."""

    __slots__ = ()

    def _translated(self, exc: BaseException) -> Exception | None:
        if not isinstance(exc, _OURS_TO_TRANSLATE) or isinstance(exc, AioBlobColError):
            return None
        return translated(self._operation, self._uri, exc)


def translated(operation: str, uri: str, exc: BaseException) -> StoreError:
    """Return our error for one of obstore's."""
    text = str(exc)
    error = _known_kind(operation, uri, exc, text)
    if not isinstance(error, StoreUnavailableError):
        # Of a repeated request only the last attempt was refused.
        error.may_have_taken_effect = _was_repeated(text)
    return error


def is_missing(error: BaseException | None) -> bool:
    """Tell whether an object is certainly not there (and not its bucket)."""
    return isinstance(error, BlobNotFoundError) and not any(
        hint in error.code for hint in MISSING_BUCKET
    )


def is_unanswered(error: StoreError) -> bool:
    """Tell whether no server answered at all."""
    text = str(error.__cause__)
    return (
        isinstance(error, StoreUnavailableError)
        and not _STATUS.search(text)
        and ("HTTP error" in text or isinstance(error.__cause__, TimeoutError))
    )


def _known_kind(operation: str, uri: str, exc: BaseException, text: str) -> StoreError:
    reason, status = _reason(exc, text), _status(text)  # of a writer all are plain OSErrors
    if isinstance(exc, FileNotFoundError) or status == 404:
        return BlobNotFoundError(operation, uri, reason)
    no_access = (PermissionDeniedError, UnauthenticatedError, PermissionError)
    if isinstance(exc, no_access) or status in {401, 403}:
        return StoreAccessError(operation, uri, reason)
    if isinstance(exc, PreconditionError):
        return BlobChangedError(operation, uri, reason)
    if isinstance(exc, (InvalidPathError, NotSupportedError, NotImplementedError, ValueError)):
        return StoreError(operation, uri, reason)
    is_definite = 400 <= status < 500 and status not in _TRY_AGAIN_STATUS
    if not isinstance(exc, AlreadyExistsError) and (is_definite or _LOCAL.search(text)):
        return StoreError(operation, uri, reason)
    return StoreUnavailableError(operation, uri, reason)


def _reason(exc: BaseException, text: str) -> str:
    """Return the server's own code and message, or the first line without what a URL may hide."""
    code = _CODE.search(text)
    if code is not None:
        return " ".join(part for part in code.groups() if part)
    status = _status(text)
    if status:
        return f"HTTP {status}"
    line = text.partition("\n")[0].strip()
    return _URL.sub(r"\1", line) or type(exc).__name__


def _status(text: str) -> int:
    found = _STATUS.search(text)
    return int(found[1]) if found else 0


def _was_repeated(text: str) -> bool:
    return any(int(one or other) > 0 for one, other in _RETRIES.findall(text))


_OURS_TO_TRANSLATE = (BaseError, OSError, NotImplementedError, ValueError)
