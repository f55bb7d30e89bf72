"""Ranges of keys: how a check is shared out, and where it goes on. Pure.

Ranges are half open, so that those of one check cover every URI once whatever lies between them.
Strings are compared by code points, which is the order of their bytes in UTF-8.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class KeyRange:
    """The URIs after one and up to another, in the order of their bytes.

    Attributes:
        after: the last one that does not belong to it; None: it begins with the first of all.
        up_to: the last one that does; None: it ends with the last of all.
    """

    after: str | None = None
    up_to: str | None = None

    def __contains__(self, uri: str) -> bool:
        return (self.after is None or uri > self.after) and (
            self.up_to is None or uri <= self.up_to
        )

    def cut(self, points: Sequence[str]) -> list[KeyRange]:
        """Return the parts between *points*, which are sorted."""
        inside = [point for point in points if point in self and point != self.up_to]
        ends = [self.after, *inside, self.up_to]
        return [KeyRange(*pair) for pair in itertools.pairwise(ends)]


def share_out(ranges: Sequence[KeyRange], sample: Sequence[str], jobs: int) -> list[KeyRange]:
    """Return *ranges*, cut so that there is one for each job, if *sample* (sorted) tells how."""
    if len(ranges) >= jobs:
        return list(ranges)
    inside = [uri for uri in sample if any(uri in each for each in ranges)]
    points = sorted({inside[len(inside) * job // jobs] for job in range(1, jobs) if inside})
    return [part for each in ranges for part in each.cut(points)]


def share_within(ranges: Sequence[KeyRange], sample: Sequence[str]) -> float:
    """Return which part of *sample* (sorted, not empty) lies within *ranges*."""
    count = 0
    for each in ranges:
        first = 0 if each.after is None else bisect.bisect_right(sample, each.after)
        last = len(sample) if each.up_to is None else bisect.bisect_right(sample, each.up_to)
        count += last - first
    return count / len(sample)
