"""User metadata that arrives as it was sent: names and values that every server keeps.

S3 carries metadata in HTTP headers: ASCII only, 2 KiB in all, spaces at the ends lost. A value
that would not survive is sent as one RFC 2047 encoded word, ``=?UTF-8?B?<base64>?=``, and
decoded when it is read. A plain value that looks like an encoded word is encoded too, so that
what comes back is what was sent.

Source: RFC 2047, section 2; Amazon S3 User Guide, "User-defined object metadata" (2 KB).
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING

from ..errors import InvalidPutArgumentsError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_METADATA_BYTES = 2048

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_PLAIN = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")
_WORD = re.compile(r"=\?UTF-8\?B\?([A-Za-z0-9+/=]*)\?=", re.IGNORECASE)


def encode_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the headers' values for *metadata*.

    Raises:
        InvalidPutArgumentsError: a name that is not ASCII letters, digits, ``_``, ``.`` and
            ``-``, a value that is not a string, or more than 2 KiB in all.
    """
    encoded: dict[str, str] = {}
    if len({name.lower() for name in metadata if isinstance(name, str)}) < len(metadata):
        raise InvalidPutArgumentsError(
            "two metadata names differ in case only, or are not strings: headers do not tell "
            f"them apart: {sorted(map(str, metadata))}"
        )
    for name, value in metadata.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidPutArgumentsError(f"not a metadata name: {name!r}")
        if not isinstance(value, str):
            raise InvalidPutArgumentsError(
                f"metadata {name!r} is a string, not {type(value).__name__}"
            )
        encoded[name] = _encode_value(name, value)
    size = sum(len(name) + len(value) for name, value in encoded.items())
    if size > MAX_METADATA_BYTES:
        raise InvalidPutArgumentsError(
            f"{size} bytes of metadata, S3 takes {MAX_METADATA_BYTES}: keep it in the row instead"
        )
    return encoded


def decode_metadata(headers: Mapping[str, str]) -> dict[str, str]:
    """Undo `encode_metadata`. Names come back in lower case, as servers return them.

    Ceph turns ``_`` in names into ``-``; the library's own name is found all the same.
    """
    decoded = {name.lower(): _decode_value(value) for name, value in headers.items()}
    if "update-at" in decoded:
        decoded.setdefault("update_at", decoded["update-at"])
    return decoded


def _encode_value(name: str, value: str) -> str:
    if _PLAIN.fullmatch(value) and not _WORD.fullmatch(value):
        return value
    try:
        raw = value.encode()
    except UnicodeEncodeError as exc:
        raise InvalidPutArgumentsError(f"metadata {name!r} is not valid Unicode") from exc
    return f"=?UTF-8?B?{base64.b64encode(raw).decode('ascii')}?="


def _decode_value(value: str) -> str:
    word = _WORD.fullmatch(value)
    if word is None:
        return value
    try:
        return base64.b64decode(word[1], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):  # somebody else's
        return value
