"""What first bytes tell: what is certainly something else is refused, and nothing else is."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable

import pytest

from aioblobcol._sniffing import SIGNED, sniff

OLE = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(500)
ELF = b"\x7fELF\x02\x01\x01" + bytes(9)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
GIF = b"GIF89a" + bytes(10)
PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj"
HTML = b"<!DOCTYPE html><html><script>"
RIFF = b"RIFF\x24\0\0\0"


def zipped(name: str, text: str = "") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), text)  # of no time: it stands in tests' names
    return file.getvalue()


DOCX = zipped("[Content_Types].xml", "<Types/>")
ODT = zipped("mimetype", "application/vnd.oasis.opendocument.text")


def only(content_type: str) -> Callable[[str], bool]:
    """Accept one type, as a column does that names it."""
    return content_type.__eq__


GENUINE = [
    ("application/dicom", bytes(128) + b"DICM"),
    ("application/epub+zip", zipped("mimetype", "application/epub+zip")),
    ("application/gzip", gzip.compress(b"page", mtime=0)),
    ("application/java-archive", zipped("META-INF/MANIFEST.MF")),
    ("application/json", b'{"type": "FeatureCollection"}'),
    ("application/json", b'{"rtf": 1}'),
    ("application/msword", OLE),
    ("application/pdf", PDF),
    ("application/pdf", b"\xef\xbb\xbf" + PDF),
    ("application/pdf", b"\n" + PDF),
    ("application/rtf", b"{\\rtf1"),
    ("application/vnd.apache.parquet", b"PAR1\x15\x04\x15"),
    ("application/vnd.ms-excel", OLE),
    ("application/vnd.ms-excel", b"a,b\n1,2\n"),
    ("application/vnd.oasis.opendocument.text", ODT),
    ("application/vnd.openxmlformats-officedocument.wordprocessingml.document", DOCX),
    ("application/vnd.sqlite3", b"SQLite format 3\0"),
    ("application/x-gzip", gzip.compress(b"page", mtime=0)),
    ("application/x-ndjson", b'{"a": 1}\n{"a": 2}\n'),
    ("application/x-ndjson", b""),
    ("application/xhtml+xml", b"<?xml version='1.0'?><html/>"),
    ("application/zip", zipped("a")),
    ("audio/mp4", b"\0\0\0\x18ftypM4A "),
    ("audio/mpeg", b"ID3\x03\0\0\0\0\0\x21"),
    ("audio/mpeg", b"\xff\xfb\x90\x44" + bytes(100)),
    ("audio/wav", RIFF + b"WAVEfmt "),
    ("font/woff2", b"wOF2\0\1\0\0"),
    ("image/avif", b"\0\0\0\x18ftypavif\0\0\0\0"),
    ("image/gif", GIF),
    ("image/heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
    ("image/jpeg", b"\xff\xd8\xff\xdb\0C"),
    ("image/jpeg", b"\xff\xd8\xff\xe1\0\x10Exif\0\0"),
    ("image/jpg", b"\xff\xd8\xff\xe0\0\x10JFIF\0"),
    ("image/png", PNG),
    ("image/svg+xml", b"<!-- made by hand --><svg/>"),
    ("image/svg+xml", b"<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN' ''><svg/>"),
    ("image/svg+xml", b"<?xml version='1.0'?><!-- --><svg/>"),
    ("image/svg+xml", b"\xef\xbb\xbf<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ("image/tiff", b"II*\0\x08\0\0\0"),
    ("image/tiff", b"II+\0\x08\0\0\0"),
    ("image/tiff", b"MM\0*\0\0\0\x08"),
    ("image/vnd.microsoft.icon", b"\0\0\x01\0\x01\0"),
    ("image/webp", RIFF + b"WEBPVP8 "),
    ("image/x-adobe-dng", b"II*\0\x08\0\0\0"),
    ("image/x-of-our-own", b"nobody knows"),
    ("message/rfc822", b"From: a@example.com\r\n"),
    ("text/calendar", b"BEGIN:VCALENDAR\r\n"),
    ("text/csv", "\ufeffName;Größe\n".encode()),
    ("text/csv", b"BM,GIF\n1,2\n"),
    ("text/csv", b"ID3,Name\n1,2\n"),
    ("text/csv", "Größe;Preis\n".encode("latin-1")),
    ("text/csv", "a\tb\n".encode("utf-16")),
    ("text/html", HTML),
    ("text/html", b"<?xml version='1.0'?><html/>"),
    ("text/javascript", b"import x from 'y'"),
    ("text/markdown", b"# Title\n"),
    ("text/plain", b""),
    ("text/plain", b"%PDF-1.7 is how such a file begins"),
    ("text/plain", b"FORM 10-K"),
    ("text/plain", b"Rar! said the cat"),
    ("text/plain", b"From: a character that was cut: \xc3"),
    ("text/plain; charset=utf-8", b"BEGIN:VCARD\n"),
    ("video/mp4", b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2"),
    ("video/quicktime", b"\0\0\0\x08wide\0\0\0\x08mdat"),
    ("video/quicktime", b"\0\0\0\x14ftypqt  \0\0\0\0qt  "),
    ("video/quicktime", b"\0\0\x10\0moov\0\0\0lmvhd"),
    ("video/x-matroska", b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\x23B\x82\x88matroska"),
]

FORGED = [
    ("application/gzip", b"plain"),
    ("application/pdf", HTML),
    ("application/pdf", b"\0\0\0\x18ftypM4A "),
    ("application/vnd.apache.parquet", PDF),
    ("application/zip", PDF),
    ("audio/mpeg", PDF),
    ("font/woff2", DOCX),
    ("image/gif", PNG),
    ("image/jpeg", b"\0\0\0\x18ftypheic"),
    ("image/jpeg", HTML),
    ("image/png", ELF),
    ("image/png", GIF),
    ("image/png", b"just text"),
    ("image/svg+xml", HTML),
    ("image/svg+xml", b"just text"),
    ("image/x-of-our-own", HTML),
    ("image/x-of-our-own", b"<?xml version='1.0'?><a/>"),
    ("text/csv", DOCX),
    ("text/csv", OLE),
    ("text/plain", PDF),
    ("text/plain", PNG),
    ("video/mp4", ELF),
    ("video/mp4", HTML),
    ("video/mp4", ODT),
]


class TestContradicts:
    @pytest.mark.parametrize(("declared", "body"), GENUINE)
    async def test_what_it_may_be(self, declared: str, body: bytes) -> None:
        """What may be what it was declared to be is taken, by a column that takes only that."""
        assert not (await sniff(body)).contradicts(declared, only(declared))

    @pytest.mark.parametrize(("declared", "body"), FORGED)
    async def test_what_it_cannot_be(self, declared: str, body: bytes) -> None:
        """What is certainly something else is refused."""
        assert (await sniff(body)).contradicts(declared, only(declared))

    @pytest.mark.parametrize("declared", sorted(SIGNED))
    async def test_an_empty_body(self, declared: str) -> None:
        """Nothing at all is nothing that begins with a signature."""
        assert (await sniff(b"")).contradicts(declared, only(declared))

    @pytest.mark.parametrize("body", [PNG, ELF, HTML, OLE, b"", b"text"])
    async def test_what_says_nothing(self, body: bytes) -> None:
        """A column that takes application/octet-stream takes anything."""
        assert not (await sniff(body)).contradicts("application/octet-stream", only("a/b"))

    async def test_another_type_that_is_accepted(self) -> None:
        """A wrong declaration does no harm where the column takes the right one, too."""
        assert not (await sniff(PNG)).contradicts("image/gif", lambda t: t.startswith("image/"))


class TestLikely:
    @pytest.mark.parametrize(
        ("body", "likely"),
        [
            (PNG, "image/png"),
            (PDF, "application/pdf"),
            (gzip.compress(b"page", mtime=0), "application/gzip"),
            (zipped("a"), "application/zip"),
            (ODT, "application/vnd.oasis.opendocument.text"),
            (OLE, "application/x-ole-storage"),
            (b"just text", None),
            (b"", None),
        ],
    )
    async def test_without_a_wish(self, body: bytes, likely: str | None) -> None:
        """What is known best comes first; of a container, that it is one."""
        assert (await sniff(body)).likely() == likely

    async def test_what_is_accepted(self) -> None:
        """Of what it may be, a column is told what it takes."""
        docx = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"

        assert (await sniff(DOCX)).likely(only(docx)) == docx
        assert (await sniff(PNG)).likely(only(docx)) == "image/png"
