"""What the first bytes of a body are, whatever they were declared to be.

puremagic knows the signatures. Invariant: bytes are refused only if they are certainly something
else; what has no signature (text, CSV, ...) is what it was declared to be.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Final

import puremagic

LEAST_CONFIDENCE: Final = 0.3
"""Three bytes: a text may begin with two that mean something else."""

SIGNED: Final = frozenset(
    {
        "application/gzip",
        "application/pdf",
        "application/zip",
        "image/gif",
        "image/jpeg",
        "image/png",
        "image/tiff",
        "image/webp",
    }
)
"""Types whose bytes always begin with a signature: without one they are something else."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sniffed:
    """What bytes may be.

    Attributes:
        types: content types, the likeliest first; empty if nothing is known of them.
        family: of containers that many types are made of: ``zip``, ``xml``, ``ole``, ``ftyp``.
    """

    types: tuple[str, ...] = ()
    family: str | None = None

    @property
    def likely(self) -> str | None:
        """The likeliest type; None if nothing is known."""
        return self.types[0] if self.types else None

    def contradicts(self, declared: str, accepts: Callable[[str], bool]) -> bool:
        """Tell whether the bytes are certainly not what was declared and accepted."""
        essence = declared.partition(";")[0].strip().lower()
        if any(map(accepts, self.types)):
            return False
        if self.family == "xml":
            return not essence.endswith("xml")
        if self.family in {"zip", "ole"}:
            return not essence.startswith("application/")
        if self.family == "ftyp":  # MP4, QuickTime, HEIC, AVIF, ...
            return not essence.startswith(("audio/", "image/", "video/"))
        return bool(self.types) or essence in SIGNED


async def sniff(head: bytes) -> Sniffed:
    """Look at the first bytes of a body, off the event loop.

    Args:
        head: 4 KiB suffice.
    """
    return await asyncio.to_thread(_sniff, head)


def _sniff(head: bytes) -> Sniffed:
    try:
        found = puremagic.magic_string(head)
    except (puremagic.PureError, ValueError):  # nothing known, or nothing at all
        return Sniffed(family=_family(head))
    types = [each.mime_type for each in found if each.confidence >= LEAST_CONFIDENCE]
    return Sniffed(tuple(dict.fromkeys(filter(None, types))), _family(head))


def _family(head: bytes) -> str | None:
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(bytes.fromhex("d0cf11e0a1b11ae1")):
        return "ole"
    if head[4:8] == b"ftyp":
        return "ftyp"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"<?xml", b"<svg")):
        return "xml"
    return None
