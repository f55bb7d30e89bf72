"""Names of objects: URIs, prefixes, primary keys, keys.

Pure text. Invariant: a key that is made here holds unreserved ASCII, ``/`` and ``=`` only
(besides the user's own prefix), its components stay within 255 bytes and the whole within
1,024, so that every S3-compatible server stores it and every file system could.

Source: Amazon S3 User Guide, "Creating object key names" (1,024 bytes); POSIX NAME_MAX (255),
which servers that map keys to files inherit.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Self

from .errors import (
    InvalidBucketError,
    InvalidColumnError,
    InvalidPrefixError,
    InvalidPrimaryKeyError,
    InvalidS3UriError,
)

MAX_KEY_BYTES = 1024
MAX_COMPONENT_BYTES = 255
MARKER_NAME = ".aioblobcol-owner"
"""The key under a store's prefix, of the object that says whose it is; a blob's ends in its id."""

SinglePrimaryKey = str | int | uuid.UUID
PrimaryKey = SinglePrimaryKey | Sequence[SinglePrimaryKey]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_SAFE = re.compile(r"[A-Za-z0-9._~=-]+")
_COLUMN = re.compile(r"[A-Za-z0-9._~-]+")
_OWN_KEY = re.compile(r"/id=[0-9a-f]{32}\Z")
_OWN_ID = re.compile(r"/id=([0-9a-f]{32})(?![0-9a-f/])")  # the last part of a key
_LITERAL = re.compile(r"'(s3://[^']*)'")


class UploadedUri(str):
    """A URI as a result of ``put_s3`` hands it out: its column's type takes no other string."""

    __slots__ = ("_check",)
    _check: Callable[[], None]

    def __new__(cls, uri: str, check: Callable[[], None]) -> Self:
        """Take the URI, and what raises once it may not be written any more."""
        made = super().__new__(cls, uri)
        made._check = check
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str.__str__(self),)

    def for_statement(self) -> str:
        """Return the plain string.

        Raises:
            ResultSpentError: its transaction ended.
        """
        self._check()
        return str.__str__(self)


def split_s3_uri(s3_uri: str) -> tuple[str, str]:
    """Split ``s3://bucket/key`` into bucket and key.

    Raises:
        InvalidS3UriError: another scheme, an empty bucket or key, or control characters.
    """
    if not isinstance(s3_uri, str):
        raise InvalidS3UriError(f"an S3 URI is a string, not {type(s3_uri).__name__}")
    _utf8(s3_uri, InvalidS3UriError)
    bucket, slash, key = s3_uri.removeprefix("s3://").partition("/")
    if not s3_uri.startswith("s3://") or not bucket or not slash or not key:
        raise InvalidS3UriError(f"not an S3 URI (s3://bucket/key): {s3_uri!r}")
    if _CONTROL.search(s3_uri):
        raise InvalidS3UriError(f"an S3 URI holds no control characters: {s3_uri!r}")
    return bucket, key


def join_s3_uri(bucket: str, key: str) -> str:
    """Join bucket and key into ``s3://bucket/key``.

    Raises:
        InvalidBucketError: not a bucket name.
        InvalidS3UriError: an empty key, or control characters in it.
    """
    s3_uri = f"s3://{check_bucket(bucket)}/{key}"
    split_s3_uri(s3_uri)
    return s3_uri


def check_bucket(bucket: str) -> str:
    """Return *bucket* if it can be one.

    Raises:
        InvalidBucketError: empty, or with characters that no S3 server takes.
    """
    if not isinstance(bucket, str) or not _BUCKET.fullmatch(bucket):
        raise InvalidBucketError(f"not a bucket name: {bucket!r}")
    return bucket


def normalize_s3_prefix(prefix: str) -> str:
    """Strip the slashes at both ends; ``""`` means the whole bucket.

    Raises:
        InvalidPrefixError: empty, ``.`` or ``..`` components, control characters, or a
            component of more than 255 bytes.
    """
    if not isinstance(prefix, str):
        raise InvalidPrefixError(f"a prefix is a string, not {type(prefix).__name__}")
    return _normalized_prefix(prefix)


@functools.lru_cache(maxsize=256)
def _normalized_prefix(prefix: str) -> str:
    """Return a prefix as it stands in keys: those of an application are few."""
    stripped = prefix.strip("/")
    if not stripped:
        return ""
    if _CONTROL.search(stripped):
        raise InvalidPrefixError(f"a prefix holds no control characters: {prefix!r}")
    for component in stripped.split("/"):
        if component in {"", ".", ".."}:
            raise InvalidPrefixError(f"a prefix has no empty, '.' or '..' component: {prefix!r}")
        if len(_utf8(component, InvalidPrefixError)) > MAX_COMPONENT_BYTES:
            raise InvalidPrefixError(f"a prefix's components have 255 bytes at most: {prefix!r}")
    return stripped


def b64encode_str(s: str) -> str:
    """URL-safe base64 of the UTF-8 bytes of *s*."""
    return base64.urlsafe_b64encode(s.encode()).decode("ascii")


def b64decode_str(s: str) -> str:
    """Undo `b64encode_str`."""
    return base64.urlsafe_b64decode(s.encode("ascii")).decode()


def get_md5(b: bytes | bytearray | memoryview) -> str:
    """Hexadecimal MD5: it names content, it secures nothing."""
    return hashlib.md5(b, usedforsecurity=False).hexdigest()


def get_sha256(b: bytes | bytearray | memoryview) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(b).hexdigest()


def encode_pk(pk: PrimaryKey, is_pk_url_safe: bool, delimiter: str = "/") -> str:
    """Write a primary key as one component of a key for each of its parts.

    Args:
        pk: a string, an integer, a UUID, or a sequence of them (a composite key).
        is_pk_url_safe: False (the default everywhere) encodes each part as URL-safe base64;
            True takes the parts as they are.
        delimiter: stands between the parts.

    Returns:
        The parts, joined. A part whose encoding is empty or longer than 255 bytes becomes
        ``sha256=<hex>``.

    Raises:
        InvalidPrimaryKeyError: another type, no part at all, or, with *is_pk_url_safe*, a part
            with anything but ``A-Z a-z 0-9 . _ ~ = -`` or one that contains the delimiter.
    """
    is_single = isinstance(pk, (str, bytes, bytearray, memoryview)) or not isinstance(pk, Sequence)
    parts: Sequence[object] = (pk,) if is_single else pk  # type: ignore[assignment]  # just told
    if not parts:
        raise InvalidPrimaryKeyError("a primary key has at least one part")
    return delimiter.join(_encode_part(part, is_pk_url_safe, delimiter) for part in parts)


def _encode_part(part: object, is_pk_url_safe: bool, delimiter: str) -> str:
    if isinstance(part, bool) or not isinstance(part, (str, int, uuid.UUID)):
        raise InvalidPrimaryKeyError(
            f"a primary key is made of str, int and UUID, not {type(part).__name__}"
        )
    text = _text_of(part)
    raw = _utf8(text, InvalidPrimaryKeyError)
    if is_pk_url_safe:
        if delimiter in text or not _SAFE.fullmatch(text) or text in {".", ".."}:
            raise InvalidPrimaryKeyError(
                f"{text!r} is not URL-safe: leave is_pk_url_safe off, or use A-Z a-z 0-9 . _ ~ = -"
            )
        encoded = text
    else:
        encoded = base64.urlsafe_b64encode(raw).decode("ascii")
    if not 0 < len(encoded) <= MAX_COMPONENT_BYTES:
        return f"sha256={get_sha256(raw)}"
    return encoded


def _text_of(part: str | int | uuid.UUID) -> str:
    if isinstance(part, str):
        return str.__str__(part)  # str() of a member of `class Kind(str, Enum)` is its name
    try:
        return int.__repr__(part) if isinstance(part, int) else str(part)
    except ValueError as exc:  # Python writes integers of 4,300 digits at most
        raise InvalidPrimaryKeyError("a primary key's integer is too long") from exc


def get_s3_key(pk: str, column: str, binary: bytes | bytearray | memoryview, prefix: str) -> str:
    """Return the content part of an object's key: ``{prefix}/{pk}/col={column}/md5={md5}``.

    The library appends ``/id=<UUIDv7>`` to it, a fresh one for each attempt.

    Args:
        pk: the primary key as `encode_pk` returns it.
        column: the column's name.
        binary: the bytes.
        prefix: the store's prefix.
    """
    return content_key(prefix=prefix, encoded_pk=pk, column=column, md5=get_md5(binary))


def content_key(*, prefix: str, encoded_pk: str, column: str, md5: str | None) -> str:
    """Join the parts of a key that do not change from one attempt to the next."""
    parts = [normalize_s3_prefix(prefix), encoded_pk, f"col={encode_column(column)}"]
    if md5 is not None:
        parts.append(f"md5={md5}")
    return "/".join(part for part in parts if part)


def attempt_key(content: str) -> str:
    """Append a fresh id, and refuse what no server would take.

    Raises:
        InvalidPrimaryKeyError: the whole key would exceed 1,024 bytes.
    """
    key = f"{content}/id={new_object_id()}"
    if len(key.encode()) > MAX_KEY_BYTES:
        raise InvalidPrimaryKeyError(
            f"the object's key would have {len(key.encode())} bytes, S3 takes {MAX_KEY_BYTES}: "
            "use a shorter prefix or a primary key with fewer parts"
        )
    return key


def encode_column(column: str) -> str:
    """Return the name as it stands in a key: as it is if it is plain ASCII, else ``b64=<base64>``.

    ``=`` stands in no plain name, so that two columns never share one.

    Raises:
        InvalidColumnError: not a string, empty, too long, or with control characters.
    """
    if not isinstance(column, str) or not column or _CONTROL.search(column):
        raise InvalidColumnError(f"not a column name: {column!r}")
    encoded = (
        column
        if _COLUMN.fullmatch(column)
        else f"b64={base64.urlsafe_b64encode(_utf8(column, InvalidColumnError)).decode('ascii')}"
    )
    if len(encoded) > MAX_COMPONENT_BYTES - len("col="):
        raise InvalidColumnError(f"a column's name is too long for a key: {column!r}")
    return encoded


def new_object_id() -> str:
    """Return a fresh UUIDv7 as 32 hexadecimal digits; ids sort by the time they were made.

    Source: RFC 9562, section 5.7 (48 bits of Unix time in ms, version, 74 random bits).
    """
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return f"{value:032x}"


def root_uri(bucket: str, prefix: str) -> str:
    """Return what every URI under this bucket and prefix starts with."""
    return f"s3://{bucket}/{prefix}/" if prefix else f"s3://{bucket}/"


def marker_uri(bucket: str, prefix: str) -> str:
    """Return the object that says which database owns what is under this bucket and prefix."""
    return root_uri(bucket, prefix) + MARKER_NAME


def is_one_attempt(s3_uri: str) -> bool:
    """Tell whether the key ends in an id of its own; sqlalchemy_mate's keys do not."""
    return _OWN_KEY.search(s3_uri) is not None


def object_marks(text: str) -> list[str]:
    """Return what tells which objects *text* names: their ids, however the rest is written.

    Of a URI without an id of its own, if it is all of the text or a literal in SQL, the URI.
    """
    if text.startswith("s3://"):
        return _OWN_ID.findall(text) or [text]
    return [*_OWN_ID.findall(text), *_LITERAL.findall(text)]


def _utf8(text: str, error: type[Exception]) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:  # a lone surrogate
        raise error(f"cannot be written as UTF-8: {text!r}") from exc
