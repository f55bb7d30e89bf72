"""An S3 server with very many objects, none of which it holds: it lists them, and answers HEAD.

A process of its own, so that its work does not count as the client's: it prints its port as the
first line and ends when its standard input does. The keys are the prefix and ``id=`` with the
objects' numbers, so that every page is made when it is asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from email.utils import formatdate
from urllib.parse import parse_qs, unquote, urlsplit

KEYS_PER_PAGE = 1000
ID_DIGITS = 32
OLD = "2020-01-01T00:00:00.000Z"
OLD_IN_HEADERS = formatdate(1577836800, usegmt=True)
ENTRY = (
    "<Contents><Key>{key}</Key><LastModified>" + OLD + "</LastModified>"
    "<ETag>&quot;0cc175b9c0f1b6a831c399e269772661&quot;</ETag>"
    "<ChecksumAlgorithm>CRC32</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>"
    "<Size>1</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


class Bucket:
    """What is listed."""

    def __init__(self, prefix: str, count: int, missing: set[int], latency_seconds: float) -> None:
        self._start = f"{prefix}/id="
        self._count = count
        self._missing = missing
        self._latency_seconds = latency_seconds

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, target, _ = head.split(b" ", 2)
                url = urlsplit(target.decode("ascii"))
                await asyncio.sleep(self._latency_seconds)
                writer.write(self._head(url.path) if method == b"HEAD" else self._page(url.query))
                await writer.drain()
        writer.close()

    def _head(self, path: str) -> bytes:
        is_there = self._number(unquote(path.split("/", 2)[2])) not in self._missing
        status = "200 OK" if is_there else "404 Not Found"
        lines = (f"HTTP/1.1 {status}", "Content-Length: 1", f"Last-Modified: {OLD_IN_HEADERS}")
        return "".join(f"{line}\r\n" for line in (*lines, "")).encode("ascii")

    def _page(self, query: str) -> bytes:
        given = {name: values[0] for name, values in parse_qs(query).items()}
        after = given.get("continuation-token") or given.get("start-after")
        first = 0 if after is None else self._number(after) + 1
        end = min(first + KEYS_PER_PAGE, self._count)
        start = self._start.replace("=", "%3D")  # encoding-type=url, as every botocore asks for
        entries = [
            ENTRY.format(key=f"{start}{number:0{ID_DIGITS}x}")
            for number in range(first, end)
            if number not in self._missing
        ]
        is_truncated = end < self._count
        more = f"{self._start}{end - 1:0{ID_DIGITS}x}" if is_truncated else ""
        body = (
            "<?xml version='1.0' encoding='UTF-8'?>"
            "<ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
            "<EncodingType>url</EncodingType>"
            f"<KeyCount>{len(entries)}</KeyCount><IsTruncated>{str(is_truncated).lower()}"
            f"</IsTruncated><NextContinuationToken>{more}</NextContinuationToken>"
            f"{''.join(entries)}</ListBucketResult>"
        ).encode("ascii")
        head = (
            "HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode("ascii") + body

    def _number(self, key: str) -> int:
        return int(key.removeprefix(self._start), 16)


async def serve(bucket: Bucket) -> None:
    """Serve until standard input ends."""
    server = await asyncio.start_server(bucket.serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--missing", type=int, nargs="*", default=[])
    parser.add_argument("--latency-seconds", type=float, default=0)
    given = parser.parse_args()
    bucket = Bucket(given.prefix, given.count, set(given.missing), given.latency_seconds)
    asyncio.run(serve(bucket))


if __name__ == "__main__":
    main()
