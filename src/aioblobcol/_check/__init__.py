"""The check's room: what may be wrong, the ranges of keys, what the database knows, the merge."""

from ._check import Check
from ._findings import Finding, FindingKind
from ._ranges import KeyRange

__all__ = ["Check", "Finding", "FindingKind", "KeyRange"]
