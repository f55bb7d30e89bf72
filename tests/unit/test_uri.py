"""Names of objects: URIs, prefixes, primary keys, keys."""

from __future__ import annotations

import enum
import hashlib
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioblobcol._uri import (
    MAX_KEY_BYTES,
    PrimaryKey,
    attempt_key,
    b64decode_str,
    b64encode_str,
    check_bucket,
    content_key,
    encode_column,
    encode_pk,
    get_md5,
    get_s3_key,
    get_sha256,
    is_one_attempt,
    join_s3_uri,
    new_object_id,
    normalize_s3_prefix,
    root_uri,
    split_s3_uri,
)
from aioblobcol.errors import (
    InvalidBucketError,
    InvalidColumnError,
    InvalidPrefixError,
    InvalidPrimaryKeyError,
    InvalidS3UriError,
)

SURROGATE = "\ud800"
KEY_CHARACTERS = re.compile(r"[A-Za-z0-9._~/=-]+")

parts = st.text(max_size=40) | st.integers() | st.uuids()
buckets = st.from_regex(r"[a-z0-9][a-z0-9.-]{2,20}", fullmatch=True)
keys = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60)


class Kind(str, enum.Enum):  # noqa: UP042 - str() of these is not their value
    PAGE = "page"


class Level(int, enum.Enum):
    HIGH = 3


class TestS3Uri:
    @pytest.mark.parametrize(
        ("uri", "bucket", "key"),
        [
            ("s3://bucket/key", "bucket", "key"),
            ("s3://bucket/a/b/c", "bucket", "a/b/c"),
            ("s3://bucket//a//", "bucket", "/a//"),
            ("s3://bucket/ü ?#%", "bucket", "ü ?#%"),
            ("s3://bucket/s3://bucket/x", "bucket", "s3://bucket/x"),
        ],
    )
    def test_it_splits_at_the_first_slash(self, uri: str, bucket: str, key: str) -> None:
        """The bucket ends at the first slash, the rest is the key as it is."""
        assert split_s3_uri(uri) == (bucket, key)

    @settings(deadline=None)
    @given(bucket=buckets, key=keys)
    def test_splitting_undoes_joining(self, bucket: str, key: str) -> None:
        """What was joined splits into the same bucket and key."""
        assert split_s3_uri(join_s3_uri(bucket, key)) == (bucket, key)

    @pytest.mark.parametrize(
        "uri",
        [
            "",
            "key",
            "s3://",
            "s3://bucket",
            "s3://bucket/",
            "s3:///key",
            "S3://bucket/key",
            "s3:/bucket/key",
            "http://bucket/key",
            " s3://bucket/key",
            "s3://bucket/a\nb",
            "s3://bucket/a\x00",
            "s3://bucket/\x7f",
            "s3://bucket/\x85",
            f"s3://bucket/{SURROGATE}",
            None,
            b"s3://bucket/key",
            5,
        ],
    )
    def test_anything_else_is_refused(self, uri: Any) -> None:
        """Another scheme, a missing part, control characters or no string is no S3 URI."""
        with pytest.raises(InvalidS3UriError):
            split_s3_uri(uri)

    @pytest.mark.parametrize("key", ["", "a\nb", "\x00", SURROGATE])
    def test_an_unusable_key_is_not_joined(self, key: str) -> None:
        """An empty key, and one with control characters or a lone surrogate, is refused."""
        with pytest.raises(InvalidS3UriError):
            join_s3_uri("bucket", key)

    @pytest.mark.parametrize("bucket", ["", "a b", "a/b", "-a", ".a", "ü", "a" * 256, None, b"a"])
    def test_an_unusable_bucket_is_refused(self, bucket: Any) -> None:
        """A bucket's name is what some S3 server takes, and never empty."""
        with pytest.raises(InvalidBucketError):
            join_s3_uri(bucket, "key")

    @pytest.mark.parametrize("bucket", ["bucket", "My_Bucket.1", "0-0", "a" * 255])
    def test_buckets_of_all_servers_are_taken(self, bucket: str) -> None:
        """Names that older regions and other servers allow are allowed."""
        assert check_bucket(bucket) == bucket

    @pytest.mark.parametrize(
        ("prefix", "root"), [("", "s3://bucket/"), ("a/b", "s3://bucket/a/b/")]
    )
    def test_the_root_ends_in_a_slash(self, prefix: str, root: str) -> None:
        """What every URI of a store starts with ends in a slash, so that `a` is not `ab`."""
        assert root_uri("bucket", prefix) == root


class TestPrefix:
    @pytest.mark.parametrize(
        ("prefix", "normalized"),
        [
            ("", ""),
            ("/", ""),
            ("///", ""),
            ("a", "a"),
            ("/a/", "a"),
            ("//a/b//", "a/b"),
            ("ü/ß", "ü/ß"),
            ("a b", "a b"),
            ("...", "..."),
            ("a" * 255, "a" * 255),
        ],
    )
    def test_slashes_at_both_ends_go(self, prefix: str, normalized: str) -> None:
        """Slashes at the ends do not count, everything else is kept."""
        assert normalize_s3_prefix(prefix) == normalized

    @pytest.mark.parametrize(
        "prefix",
        [
            "a//b",
            ".",
            "..",
            "a/../b",
            "a/./b",
            "a\nb",
            "a\x7f",
            SURROGATE,
            "a" * 256,
            "ü" * 128,
            None,
            b"a",
        ],
    )
    def test_what_servers_would_change_is_refused(self, prefix: Any) -> None:
        """Empty and dot components, control characters and long components are refused."""
        with pytest.raises(InvalidPrefixError):
            normalize_s3_prefix(prefix)


class TestEncodePk:
    @pytest.mark.parametrize(
        ("pk", "encoded"),
        [
            ("https://example.com", "aHR0cHM6Ly9leGFtcGxlLmNvbQ=="),
            (1, "MQ=="),
            (-5, "LTU="),
            (uuid.UUID(int=7), b64encode_str("00000000-0000-0000-0000-000000000007")),
            (("a", 1), "YQ==/MQ=="),
            (["a", 1], "YQ==/MQ=="),
            (("a",), "YQ=="),
            ("ü>?", "w7w-Pw=="),
            ("", f"sha256={hashlib.sha256(b'').hexdigest()}"),
            (("", "a"), f"sha256={hashlib.sha256(b'').hexdigest()}/YQ=="),
            ("x" * 192, f"sha256={hashlib.sha256(b'x' * 192).hexdigest()}"),
            ("x" * 189, b64encode_str("x" * 189)),
            (Kind.PAGE, "cGFnZQ=="),
            (Level.HIGH, "Mw=="),
        ],
    )
    def test_each_part_becomes_url_safe_base64(self, pk: PrimaryKey, encoded: str) -> None:
        """Parts are base64 of their text; an empty one or a long one is hashed."""
        assert encode_pk(pk, is_pk_url_safe=False) == encoded

    @pytest.mark.parametrize(
        ("pk", "encoded"),
        [
            ("a.b_c~d=e-f", "a.b_c~d=e-f"),
            ("...", "..."),
            (12, "12"),
            (("tenant", uuid.UUID(int=1)), "tenant/00000000-0000-0000-0000-000000000001"),
            ("x" * 255, "x" * 255),
            ("x" * 256, f"sha256={hashlib.sha256(b'x' * 256).hexdigest()}"),
        ],
    )
    def test_url_safe_parts_stand_as_they_are(self, pk: PrimaryKey, encoded: str) -> None:
        """With is_pk_url_safe the parts are not encoded."""
        assert encode_pk(pk, is_pk_url_safe=True) == encoded

    @pytest.mark.parametrize(
        "pk",
        [
            "a/b",
            "a b",
            "ü",
            "a%2F",
            "a?b",
            "a#b",
            "a+b",
            "",
            ".",
            "..",
            "a\n",
            ("a", ""),
            SURROGATE,
        ],
    )
    def test_unsafe_parts_are_refused(self, pk: PrimaryKey) -> None:
        """With is_pk_url_safe a part that would need an encoding is refused."""
        with pytest.raises(InvalidPrimaryKeyError):
            encode_pk(pk, is_pk_url_safe=True)

    def test_the_delimiter_stands_in_no_safe_part(self) -> None:
        """A part that contains the delimiter would be read as two."""
        with pytest.raises(InvalidPrimaryKeyError):
            encode_pk(("a-b", "c"), is_pk_url_safe=True, delimiter="-")

    @pytest.mark.parametrize("is_pk_url_safe", [True, False])
    @pytest.mark.parametrize(
        "pk",
        [
            None,
            True,
            False,
            1.5,
            b"a",
            bytearray(b"a"),
            (),
            [],
            (None,),
            ("a", True),
            (("a",), "b"),
            {"a": 1},
            {"a"},
            object(),
            SURROGATE,
            ("a", SURROGATE),
            pytest.param(10**5000, id="an integer of 5,000 digits"),
        ],
    )
    def test_other_types_are_refused(self, pk: Any, is_pk_url_safe: bool) -> None:
        """A primary key is str, int, UUID or a sequence of them, and can be written down."""
        with pytest.raises(InvalidPrimaryKeyError):
            encode_pk(pk, is_pk_url_safe)

    def test_any_sequence_is_a_composite_key(self) -> None:
        """A row of a result is a sequence, and as good as a tuple."""

        class Row(Sequence[Any]):
            def __getitem__(self, index: Any) -> Any:
                return ("a", 1)[index]

            def __len__(self) -> int:
                return 2

        assert encode_pk(Row(), is_pk_url_safe=False) == encode_pk(("a", 1), is_pk_url_safe=False)

    @settings(max_examples=300, deadline=None)
    @given(
        one=st.lists(st.text(max_size=300), min_size=1, max_size=4),
        other=st.lists(st.text(max_size=300), min_size=1, max_size=4),
    )
    def test_different_keys_never_collide(self, one: list[str], other: list[str]) -> None:
        """Two composite keys have one encoding only if they are equal."""
        is_same = encode_pk(one, is_pk_url_safe=False) == encode_pk(other, is_pk_url_safe=False)

        assert is_same is (one == other)


class TestColumn:
    @pytest.mark.parametrize("column", ["html", "a.b_c~d-e", "x" * 251])
    def test_plain_names_stand_as_they_are(self, column: str) -> None:
        """A plain ASCII name is not encoded."""
        assert encode_column(column) == column

    @pytest.mark.parametrize("column", ["größe", "日", "a/b", "a b", "a=b", "b64=eA=="])
    def test_other_names_are_base64(self, column: str) -> None:
        """A name that is not plain is marked as base64, and decodes to itself."""
        marker, _, encoded = encode_column(column).partition("=")

        assert (marker, b64decode_str(encoded)) == ("b64", column)

    @pytest.mark.parametrize("column", ["", "a\nb", "x" * 252, "ü" * 120, SURROGATE, None, 5])
    def test_unusable_names_are_refused(self, column: Any) -> None:
        """A column's name is a string, not empty, not too long, without control characters."""
        with pytest.raises(InvalidColumnError):
            encode_column(column)

    @settings(max_examples=200, deadline=None)
    @given(one=keys, other=keys)
    def test_different_columns_never_collide(self, one: str, other: str) -> None:
        """Two columns have one encoding only if they are the same."""
        assert (encode_column(one) == encode_column(other)) is (one == other)

    def test_base64_of_one_is_not_the_name_of_another(self) -> None:
        """The column 日 and a column that is called like its base64 stay apart."""
        assert encode_column("日") != encode_column(b64encode_str("日"))


class TestKey:
    def test_up_to_md5_it_is_the_seeds_key(self) -> None:
        """The content part is {prefix}/{pk}/col={column}/md5={md5}, as in sqlalchemy_mate."""
        key = get_s3_key(pk="MQ==", column="html", binary=b"x", prefix="/a/b/")

        assert key == f"a/b/MQ==/col=html/md5={hashlib.md5(b'x').hexdigest()}"  # noqa: S324 - names

    def test_without_prefix_it_starts_with_the_primary_key(self) -> None:
        """An empty prefix leaves no slash at the start, an unknown MD5 no segment."""
        key = content_key(prefix="", encoded_pk="MQ==", column="html", md5=None)

        assert key == "MQ==/col=html"

    @settings(deadline=None)
    @given(pk=parts | st.lists(parts, min_size=1, max_size=3), column=keys, binary=st.binary())
    def test_it_holds_unreserved_ascii(self, pk: PrimaryKey, column: str, binary: bytes) -> None:
        """A key holds unreserved ASCII, `/` and `=` only, in components of 255 bytes at most."""
        encoded = encode_pk(pk, is_pk_url_safe=False)
        key = attempt_key(get_s3_key(pk=encoded, column=column, binary=binary, prefix="p"))

        assert KEY_CHARACTERS.fullmatch(key)
        assert max(map(len, key.split("/"))) <= 255
        assert is_one_attempt(f"s3://bucket/{key}")

    def test_1024_bytes_are_the_limit(self) -> None:
        """A key of 1,024 bytes is made, one more is refused, counted in UTF-8."""
        room = MAX_KEY_BYTES - len("/id=") - 32

        assert len(attempt_key("a" * room)) == MAX_KEY_BYTES
        with pytest.raises(InvalidPrimaryKeyError, match="shorter prefix"):
            attempt_key("a" * (room + 1))
        with pytest.raises(InvalidPrimaryKeyError):
            attempt_key("a" * (room - 1) + "ü")

    @pytest.mark.parametrize(
        "uri",
        [
            "s3://bucket/p/MQ==/col=html/md5=0123456789abcdef0123456789abcdef",
            "s3://bucket/p/id=0123456789abcdef0123456789abcde",
            "s3://bucket/p/id=0123456789abcdef0123456789abcdef0",
            "s3://bucket/p/id=0123456789ABCDEF0123456789ABCDEF",
            "s3://bucket/p/id=0123456789abcdef0123456789abcdef\n",
            "s3://bucket/p/id=0123456789abcdef0123456789abcdef/x",
            "s3://bucket/p/grid=0123456789abcdef0123456789abcdef",
        ],
    )
    def test_the_seeds_keys_are_no_single_attempts(self, uri: str) -> None:
        """A key that does not end in an id of its own may be shared."""
        assert not is_one_attempt(uri)


class TestObjectId:
    def test_it_is_a_uuid_of_version_7(self) -> None:
        """Version 7, RFC 9562's variant, and the time in milliseconds in the first 48 bits."""
        before = time.time_ns() // 1_000_000
        text = new_object_id()
        after = time.time_ns() // 1_000_000
        parsed = uuid.UUID(hex=text)

        assert re.fullmatch(r"[0-9a-f]{32}", text)
        assert parsed.version == 7
        assert parsed.variant == uuid.RFC_4122
        assert before <= parsed.int >> 80 <= after

    def test_every_attempt_has_its_own(self) -> None:
        """Ids of one millisecond differ."""
        assert len({new_object_id() for _ in range(10_000)}) == 10_000

    def test_keys_sort_by_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An id that was made a millisecond later sorts later."""
        moments = [1, 2, 1_700_000_000_000, 1_700_000_000_001, (1 << 48) - 1]
        ids = []
        for moment in moments:
            monkeypatch.setattr(time, "time_ns", lambda moment=moment: moment * 1_000_000)
            ids.append(new_object_id())

        assert ids == sorted(ids)


class TestHelpers:
    @settings(deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_base64_comes_back(self, text: str) -> None:
        """Decoding undoes encoding, for every text."""
        assert b64decode_str(b64encode_str(text)) == text

    @pytest.mark.parametrize("binary", [b"page", bytearray(b"page"), memoryview(b"page")])
    def test_digests_are_hexadecimal(self, binary: bytes | bytearray | memoryview) -> None:
        """MD5 and SHA-256 of any bytes-like object, in lower-case hexadecimal."""
        assert get_md5(binary) == "71860c77c6745379b0d44304d66b6a13"
        assert get_sha256(binary) == hashlib.sha256(b"page").hexdigest()
