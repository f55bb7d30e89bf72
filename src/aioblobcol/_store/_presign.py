"""Presigned URLs: how long they may live, and the name under which a browser saves the object.

Pure text, the same for every store. Invariant: whatever a user calls a file, its name ends no
header and names no directory.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final
from urllib.parse import quote

from ..errors import InvalidInputError

MIN_EXPIRY: Final = timedelta(seconds=1)
MAX_EXPIRY: Final = timedelta(days=7)
"""Source: Amazon S3 API Reference, "Authenticating Requests: Using Query Parameters" (SigV4:
``X-Amz-Expires`` from 1 to 604800 seconds)."""

# Controls end headers, separators name directories, bidirectional marks disguise ".exe", and
# lone surrogates have no UTF-8.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f/\\\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NOT_PLAIN = re.compile(r'[^ -~]|["%]')
_ATTR_CHARS = "!#$&+^`|"  # and what quote() leaves alone anyway


def expiry_seconds(expires_in: timedelta) -> int:
    """Return *expires_in* in whole seconds; fractions are dropped.

    Raises:
        InvalidInputError: not a timedelta from 1 second to 7 days.
    """
    if not isinstance(expires_in, timedelta):
        raise InvalidInputError(f"expires_in is a timedelta, not {type(expires_in).__name__}")
    if not MIN_EXPIRY <= expires_in <= MAX_EXPIRY:
        raise InvalidInputError(
            f"expires_in is from 1 second to 7 days (what SigV4 allows), not {expires_in}"
        )
    return int(expires_in.total_seconds())


def content_disposition(name: str) -> str:
    """Return the header that makes a browser save the body as *name*.

    It holds the name twice: in ASCII, where other characters become ``_``, and in UTF-8.
    Control characters, ``/`` and backslashes become ``_`` in both.

    Raises:
        InvalidInputError: not a string, or empty.

    Source: RFC 6266, section 4.3 and appendix D; RFC 8187, section 3.2.1 (attr-char).
    """
    if not isinstance(name, str) or not name:
        raise InvalidInputError(f"the name of a download is a string of characters, not {name!r}")
    safe = _UNSAFE.sub("_", name)
    plain = _NOT_PLAIN.sub("_", safe)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(safe, safe=_ATTR_CHARS)}"
