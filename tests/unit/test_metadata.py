"""User metadata: what is sent comes back, and what no header carries is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioblobcol._store._metadata import MAX_METADATA_BYTES, decode_metadata, encode_metadata
from aioblobcol.errors import InvalidPutArgumentsError

names = st.from_regex(r"[a-z0-9_.-]{1,10}", fullmatch=True)
values = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


class TestRoundTrip:
    @settings(max_examples=300, deadline=None)
    @given(st.dictionaries(names, values, max_size=4))
    def test_every_value_comes_back(self, metadata: dict[str, str]) -> None:
        """Any text survives, as headers of visible ASCII without spaces at the ends."""
        headers = encode_metadata(metadata)

        assert decode_metadata(headers) == metadata
        for value in headers.values():
            assert re.fullmatch(r"[ -~]*", value)
            assert value.strip() == value

    @pytest.mark.parametrize(
        "value", ["", "plain", "a b", "2026-01-01T00:00:00+00:00", "=?", "a=?UTF-8?B?eA==?="]
    )
    def test_plain_values_are_sent_as_they_are(self, value: str) -> None:
        """A value that a header carries is not encoded."""
        assert encode_metadata({"a": value}) == {"a": value}

    @pytest.mark.parametrize(
        "value", ["ü", " a", "a ", "a\nb", "\t", "\x00", "=?UTF-8?B?eA==?=", "=?utf-8?b?eA==?="]
    )
    def test_others_become_one_encoded_word(self, value: str) -> None:
        """A value that would not survive, or looks like an encoded word, becomes one."""
        (sent,) = encode_metadata({"a": value}).values()

        assert re.fullmatch(r"=\?UTF-8\?B\?[A-Za-z0-9+/=]*\?=", sent)
        assert decode_metadata({"a": sent}) == {"a": value}

    def test_names_come_back_in_lower_case(self) -> None:
        """Servers return names in lower case, and so do we."""
        assert decode_metadata(encode_metadata({"Content-Hash": "x"})) == {"content-hash": "x"}

    @pytest.mark.parametrize("value", ["=?UTF-8?B?a?=", "=?UTF-8?B?/w==?=", "=?UTF-8?Q?a?=", "ü"])
    def test_what_others_wrote_is_left_alone(self, value: str) -> None:
        """A value that we cannot have written comes back as it is."""
        assert decode_metadata({"a": value}) == {"a": value}

    def test_the_callers_dict_is_left_alone(self) -> None:
        """Encoding changes no argument."""
        metadata = {"a": "ü"}
        encode_metadata(metadata)

        assert metadata == {"a": "ü"}


class TestRefusals:
    @pytest.mark.parametrize(
        "metadata",
        [
            {"": "x"},
            {"a b": "x"},
            {"ü": "x"},
            {"a:b": "x"},
            {"a\n": "x"},
            {5: "x"},
            {None: "x"},
            {"a": None},
            {"a": 5},
            {"a": b"x"},
            {"a": "\ud800"},
        ],
    )
    def test_unusable_names_and_values(self, metadata: Any) -> None:
        """A name is visible ASCII, a value is text that can be written as UTF-8."""
        with pytest.raises(InvalidPutArgumentsError):
            encode_metadata(metadata)

    def test_two_kibibytes_are_the_limit(self) -> None:
        """Names and values together have 2 KiB, counted as they are sent."""
        encode_metadata({"name": "x" * (MAX_METADATA_BYTES - 4)})

        with pytest.raises(InvalidPutArgumentsError, match="2049 bytes"):
            encode_metadata({"name": "x" * (MAX_METADATA_BYTES - 3)})
        with pytest.raises(InvalidPutArgumentsError):
            encode_metadata({"name": "ü" * 800})
