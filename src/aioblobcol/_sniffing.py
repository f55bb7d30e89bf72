"""What the first bytes of a body are, whatever they were declared to be.

puremagic knows the signatures. Invariant: bytes are refused only if they are certainly something
else; what has no signature (text, CSV, ...) is what it was declared to be, and so is what has the
signature of a family that many types belong to.
"""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
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

UNSAID: Final = "application/octet-stream"
PDF_WITHIN: Final = 1024
"""Source: Adobe's implementation notes to PDF 1.7 (H.13): the header may stand that far behind."""

_MEDIA: Final = frozenset({"audio", "font", "image", "video"})
_OTHER_NAMES: Final = {
    "application/x-gzip": "application/gzip",
    "application/x-pdf": "application/pdf",
    "application/x-zip": "application/zip",
    "application/x-zip-compressed": "application/zip",
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/x-png": "image/png",
}
_IMPOSSIBLE: Final[Mapping[str | None, frozenset[str]]] = {
    "ftyp": frozenset({"application", "font", "text"}),  # MP4, QuickTime, HEIC, AVIF, ...
    "ole": _MEDIA | {"text"},
    "zip": _MEDIA | {"text"},
}
_CONTAINERS: Final = {"ole": "application/x-ole-storage", "zip": "application/zip"}
_TIFF: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ZIPPED_TYPE: Final = re.compile(rb"PK\x03\x04.{26}mimetype([a-z]+/[\w.+-]+?)PK", re.DOTALL)
_NO_TEXT: Final = bytes({*range(32)} - {*b"\a\b\t\n\f\r\x1b"})


@dataclasses.dataclass(frozen=True, slots=True)
class Sniffed:
    """What bytes may be.

    Attributes:
        types: content types, the likeliest first; empty if nothing is known of them.
        family: what many types are made of: ``text``, ``xml``, ``zip``, ``ole``, ``ftyp``.
    """

    types: tuple[str, ...] = ()
    family: str | None = None

    def likely(self, accepts: Callable[[str], bool] = bool) -> str | None:
        """Return the likeliest type, one that is accepted if there is any; None if all is open."""
        return next(filter(accepts, self.types), self.types[0] if self.types else None)

    def contradicts(self, declared: str, accepts: Callable[[str], bool]) -> bool:
        """Tell whether the bytes are certainly not what was declared and accepted."""
        essence = _usual(declared.partition(";")[0].strip().lower())
        if essence == UNSAID or any(map(accepts, self.types)):
            return False
        if essence in SIGNED:
            return essence not in self.types
        if _name(essence) in map(_name, self.types):
            return False
        kind = essence.partition("/")[0]
        if self.family in {"text", "xml"}:
            return self._contradicts_as_text(essence, kind)
        return self._contradicts_as_binary(kind)

    def _contradicts_as_text(self, essence: str, kind: str) -> bool:
        if essence.endswith("xml"):
            return kind in _MEDIA and self.family != "xml"
        is_known = self.family == "xml" or bool(self.types)
        return kind in _MEDIA and is_known and not self._has_kind(kind)

    def _contradicts_as_binary(self, kind: str) -> bool:
        if self.family in _IMPOSSIBLE:
            return kind in _IMPOSSIBLE[self.family]
        if kind == "application":  # many are registered there, by many names
            return not SIGNED.isdisjoint(self.types)
        return bool(self.types) and not self._has_kind(kind)

    def _has_kind(self, kind: str) -> bool:
        return any(each.startswith(f"{kind}/") for each in self.types)


async def sniff(head: bytes) -> Sniffed:
    """Look at the first bytes of a body, off the event loop.

    Args:
        head: 4 KiB suffice.
    """
    return await asyncio.to_thread(_sniff, head)


def _sniff(head: bytes) -> Sniffed:
    family = _family(head)
    return Sniffed(tuple(dict.fromkeys(_types(head, family))), family)


def _types(head: bytes, family: str | None) -> Iterator[str]:
    zipped = _ZIPPED_TYPE.match(head)  # OpenDocument, EPUB
    if zipped is not None:
        yield zipped[1].decode("ascii", "replace")
    if family in _CONTAINERS:
        yield _CONTAINERS[family]
    if family is None and b"%PDF-" in head[:PDF_WITHIN]:
        yield "application/pdf"
    if head.startswith(_TIFF):
        yield "image/tiff"
    try:
        found = puremagic.magic_string(head)
    except (puremagic.PureError, ValueError):  # nothing known, or nothing at all
        return
    for each in found:
        if each.mime_type and each.confidence >= LEAST_CONFIDENCE:
            yield _usual(each.mime_type)


def _family(head: bytes) -> str | None:
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(bytes.fromhex("d0cf11e0a1b11ae1")):
        return "ole"
    if head[4:8] == b"ftyp":
        return "ftyp"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<?xml", b"<svg", b"<!doctype svg")):
        return "xml"
    if text.startswith(b"<!--") and b"<svg" in text:
        return "xml"
    return "text" if _is_text(head) else None


def _is_text(head: bytes) -> bool:
    if not head or len(head.translate(None, _NO_TEXT)) < len(head):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut
    except UnicodeDecodeError:
        return False
    return True


def _usual(content_type: str) -> str:
    return _OTHER_NAMES.get(content_type, content_type)


def _name(content_type: str) -> str:
    """Return what a type is called, wherever it was registered, or was not."""
    return re.sub(r"^(x-|vnd\.|x\.)+", "", content_type.partition("/")[2])
