"""Real bytes for the demo: an HTML page and a PNG picture, made here.

Pure. No file is shipped and nothing is downloaded.
"""

from __future__ import annotations

import struct
import zlib

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>{title}</title>
</head>
<body>
  <h1>{title}</h1>
  <p>Version {version} of a page whose row lives in a database and whose bytes live in S3.</p>
  <ol>
{items}
  </ol>
</body>
</html>
"""


def page(title: str, *, version: int) -> bytes:
    """Return a small HTML page, different for each version."""
    items = "\n".join(f"    <li>Line {n} of version {version}</li>" for n in range(1, 61))
    return _PAGE.format(title=title, version=version, items=items).encode()


def picture(*, version: int, width: int = 160, height: int = 100) -> bytes:
    """Return a PNG with a colour gradient, different for each version.

    Source: PNG (Portable Network Graphics) Specification, W3C, sections 5 (chunks) and 11 (IHDR).
    """
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    rows = (
        b"\0"  # each row begins with its filter: none
        + bytes(
            value
            for x in range(width)
            for value in (255 * x // width, 255 * y // height, 97 * version % 256)
        )
        for y in range(height)
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
