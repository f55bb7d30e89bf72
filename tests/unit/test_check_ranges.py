"""Ranges of keys: whatever is cut where, each URI belongs to one part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aioblobcol._check._ranges import KeyRange, share_out, share_within

uris = st.text("abé\U0001f600", max_size=3)
samples = st.lists(uris, max_size=12).map(sorted)


class TestShareOut:
    @given(sample=samples, jobs=st.integers(1, 6), uri=uris)
    def test_covers_each_uri_once(self, sample: list[str], jobs: int, uri: str) -> None:
        """The parts of everything are everything, and do not overlap."""
        parts = share_out([KeyRange()], sample, jobs)

        assert sum(uri in part for part in parts) == 1
        assert len(parts) <= jobs

    @given(sample=samples, jobs=st.integers(1, 6), ends=st.tuples(uris, uris, uris), uri=uris)
    def test_covers_what_was_left(
        self, sample: list[str], jobs: int, ends: tuple[str, str, str], uri: str
    ) -> None:
        """The parts of some ranges hold the same as these."""
        first, second, third = sorted(ends)
        ranges = [KeyRange(first, second), KeyRange(third, None)]
        parts = share_out(ranges, sample, jobs)

        assert sum(uri in part for part in parts) == sum(uri in each for each in ranges)

    def test_halves(self) -> None:
        """Each part holds as much of the sample as the others."""
        assert share_out([KeyRange()], list("abcdef"), 3) == [
            KeyRange(None, "c"),
            KeyRange("c", "e"),
            KeyRange("e", None),
        ]


class TestShareWithin:
    @given(sample=samples.filter(len), ends=st.tuples(uris, uris))
    def test_counts_the_sample(self, sample: list[str], ends: tuple[str, str]) -> None:
        """Which part of the sample lies in a range is counted without looking at each."""
        key_range = KeyRange(*sorted(ends))
        inside = [uri for uri in sample if uri in key_range]

        assert share_within([key_range], sample) == len(inside) / len(sample)
