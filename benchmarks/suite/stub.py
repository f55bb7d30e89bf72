"""A fast S3 server for benchmarks: a process of its own, which spends little on each request.

It knows the verbs that S3 clients use for objects (PUT, GET with Range and If-Match, HEAD,
DELETE, DeleteObjects, multipart uploads, CopyObject, a small ListObjectsV2) and checks no
signature. It prints its URL as the first line and ends when its standard input does.

Invariants: a body of up to 1 MiB is kept, a larger one is counted and given back as `pattern`,
so only objects made of the pattern may be larger. Every answer comes one latency after the
request's last byte, and a 100 one latency after the request's head. ``--verify`` compares CRC32
values with what arrived; it costs time and is for tests.

``GET /__stats`` returns the requests by kind since the last such call, ``POST /__config?...``
sets the latency and the throughput of a connection, ``POST /__forget`` drops all objects.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import dataclasses
import importlib
import json
import re
import resource
import ssl
import sys
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape, unescape

from .pattern import crc32_of_pattern, iter_pattern

KEPT_BYTES: Final = 2**20
BUFFER_BYTES: Final = 2**18
PIECE_BYTES: Final = 2**18
MIN_PART_BYTES: Final = 5 * 2**20
"""Source: Amazon S3 User Guide, "Multipart upload limits"."""

_HEADERS: Final = (
    b"x-amz-id-2: YmVuY2htYXJrIGJlbmNobWFyayBiZW5jaG1hcmsgYmVuY2htYXJr\r\n"
    b"x-amz-request-id: 0123456789ABCDEF\r\n"
    b"Date: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
    b"Server: AmazonS3\r\n"
)
_MODIFIED: Final = b"Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nAccept-Ranges: bytes\r\n"
_NAMESPACE: Final = b'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_NO_CONTENT: Final = b"HTTP/1.1 204 No Content\r\n" + _HEADERS + b"\r\n"

_KEY: Final = re.compile(rb"<Key>([^<]*)</Key>")
_PART_NUMBER: Final = re.compile(rb"<PartNumber>\s*(\d+)\s*</PartNumber>")
_DESCRIBING: Final = re.compile(rb"\r\n((?:x-amz-meta-[^:]*|content-type):[^\r]*)", re.IGNORECASE)


@dataclasses.dataclass(slots=True)  # frozen ones take longer to make
class Head:
    """The head of one request, looked into only where somebody asks."""

    method: bytes
    path: bytes
    query: bytes
    raw: bytes
    lowered: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Head:
        """Read the first line."""
        method, target, _ = raw[: raw.find(b"\r\n")].split(b" ", 2)
        path, _, query = target.partition(b"?")
        if b"%" in path:
            path = urllib.parse.unquote_to_bytes(path)
        return cls(method, path, query, raw, raw.lower())

    def get(self, name: bytes) -> bytes:
        """Return the value of a header, whose name is given in lower case; empty if missing."""
        at = self.lowered.find(b"\r\n" + name + b":")
        if at < 0:
            return b""
        begin = at + len(name) + 3
        end = self.raw.find(b"\r\n", begin)
        return self.raw[begin : None if end < 0 else end].strip()

    def parameter(self, name: str) -> str:
        """Return a parameter of the query."""
        return dict(urllib.parse.parse_qsl(self.query.decode()))[name]

    def describing(self) -> bytes:
        """Return the headers that an object keeps, as lines."""
        return b"".join(line + b"\r\n" for line in _DESCRIBING.findall(self.raw))


class Body:
    """What is kept of the body of one request."""

    __slots__ = ("crc32", "pieces", "size", "verify")

    def __init__(self, *, verify: bool) -> None:
        self.size = 0
        self.crc32 = 0
        self.pieces: list[bytes] | None = []
        self.verify = verify

    def feed(self, piece: memoryview) -> None:
        """Take the next bytes."""
        self.size += len(piece)
        if self.verify:
            self.crc32 = zlib.crc32(piece, self.crc32)
        if self.pieces is None:
            return
        if self.size <= KEPT_BYTES:
            self.pieces.append(bytes(piece))
        else:
            self.pieces = None


class LengthFraming:
    """A body with a Content-Length."""

    __slots__ = ("_body", "_left", "is_complete")

    def __init__(self, body: Body, length: int) -> None:
        self._body = body
        self._left = length
        self.is_complete = length == 0

    def take(self, data: memoryview) -> int:
        """Take what belongs to the body; return how much that was."""
        taken = min(self._left, len(data))
        self._body.feed(data[:taken])
        self._left -= taken
        self.is_complete = self._left == 0
        return taken


class ChunkedFraming:
    """A body in HTTP chunks."""

    __slots__ = ("_body", "_ending", "_left", "_line_end", "is_complete")

    def __init__(self, body: Body) -> None:
        self._body = body
        self._left = 0  # bytes of the chunk
        self._line_end = 0  # bytes of the line end behind it
        self._ending = False
        self.is_complete = False

    def take(self, data: memoryview) -> int:
        """Take what belongs to the body; an incomplete line stays."""
        position = 0
        while position < len(data) and not self.is_complete:
            if self._left or self._line_end:
                position += self._take_chunk(data[position:])
                continue
            line_end = bytes(data[position : position + 1024]).find(b"\r\n")
            if line_end < 0:
                break
            self._take_line(bytes(data[position : position + line_end]))
            position += line_end + 2
        return position

    def _take_chunk(self, data: memoryview) -> int:
        taken = min(self._left, len(data))
        self._body.feed(data[:taken])
        self._left -= taken
        line_end = min(self._line_end, len(data) - taken)
        self._line_end -= line_end
        return taken + line_end

    def _take_line(self, line: bytes) -> None:
        if self._ending:
            self.is_complete = not line  # what comes before are trailers
            return
        self._left = int(line.partition(b";")[0], 16)
        self._ending = self._left == 0
        self._line_end = 2 if self._left else 0


@dataclasses.dataclass(slots=True)  # frozen ones take longer to make
class StoredObject:
    """An object: its bytes, or how many of the pattern."""

    size: int
    body: bytes | None
    etag: bytes
    checksum: bytes  # header lines
    describing: bytes  # header lines


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One part of an upload."""

    size: int
    body: bytes | None
    etag: bytes
    crc32: bytes
    seen_crc32: int


@dataclasses.dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload under way."""

    path: bytes
    describing: bytes
    is_full_object: bool
    parts: dict[int, Part]


@dataclasses.dataclass(slots=True)
class World:
    """What all connections share."""

    verify: bool
    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    objects: dict[bytes, StoredObject] = dataclasses.field(default_factory=dict)
    uploads: dict[str, Upload] = dataclasses.field(default_factory=dict)
    tags: int = 0

    def new_etag(self) -> bytes:
        """Return an ETag that no other object has."""
        self.tags += 1
        return b'"%032x"' % self.tags


class S3Error(Exception):
    """An error as S3 answers it."""

    def __init__(self, status: str, code: str) -> None:
        super().__init__(status, code)
        self.status = status
        self.code = code

    def answer(self, *, is_head: bool) -> bytes:
        """Return the response."""
        if is_head:
            return respond(self.status)
        code = self.code.encode()
        body = b"<Error><Code>%s</Code><Message>%s</Message></Error>" % (code, code)
        return respond(self.status, body)


@dataclasses.dataclass(slots=True)  # frozen ones take longer to make
class Answer:
    """A response: its bytes, and how much of the pattern follows them."""

    data: bytes
    offset: int = 0
    size: int = 0


Verb = tuple[str, Callable[[Head, Body], bytes | Answer]]


def respond(status: str, body: bytes = b"", headers: bytes = b"") -> bytes:
    """Return a whole response; of a body its type is XML."""
    kind = b"Content-Type: application/xml\r\n" if body else b""
    length = b"Content-Length: %d\r\n" % len(body)
    return b"".join(
        (b"HTTP/1.1 ", status.encode(), b"\r\n", _HEADERS, headers, kind, length, b"\r\n", body)
    )


class Verbs:
    """What S3 does, on a `World`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._object_verbs: Mapping[bytes, Verb] = {
            b"PUT": ("PUT", self._put),
            b"GET": ("GET", self._get),
            b"HEAD": ("HEAD", self._get),
            b"DELETE": ("DELETE", self._delete),
        }
        self._upload_verbs: Mapping[bytes, Verb] = {
            b"PUT": ("UploadPart", self._upload_part),
            b"POST": ("CompleteMultipartUpload", self._complete),
            b"DELETE": ("AbortMultipartUpload", self._abort),
        }

    @property
    def world(self) -> World:
        """What they work on."""
        return self._world

    def answer(self, head: Head, body: Body) -> Answer:
        """Carry out one request."""
        if head.path.startswith(b"/__"):
            return Answer(self._control(head))
        kind, act = self._verb(head)
        self._world.counts[kind] += 1
        try:
            found = act(head, body)
        except S3Error as exc:
            return Answer(exc.answer(is_head=head.method == b"HEAD"))
        return found if isinstance(found, Answer) else Answer(found)

    def _verb(self, head: Head) -> Verb:
        """Return the kind of a request, and who answers it."""
        if b"uploadId=" in head.query:
            return self._upload_verbs.get(head.method, ("other", _refuse))
        if head.method == b"PUT" and b"\r\nx-amz-copy-source:" in head.lowered:
            return "CopyObject", self._copy
        if head.method == b"GET" and b"list-type=2" in head.query:
            return "ListObjectsV2", self._list
        if head.method == b"POST" and head.query.startswith(b"uploads"):
            return "CreateMultipartUpload", self._create_upload
        if head.method == b"POST" and head.query.startswith(b"delete"):
            return "DeleteObjects", self._delete_many
        return self._object_verbs.get(head.method, ("other", _refuse))

    # one object

    def _put(self, head: Head, body: Body) -> bytes:
        world = self._world
        if b"\r\nif-none-match: *" in head.lowered and head.path in world.objects:
            raise S3Error("412 Precondition Failed", "PreconditionFailed")
        size, data, crc32 = self._received(head, body)
        if data is None and world.verify and body.crc32 != crc32_of_pattern(0, size):
            raise S3Error("400 Bad Request", "BenchmarkNotThePattern")
        etag = world.new_etag()
        checksum = _checksum_lines(crc32, b"FULL_OBJECT")
        world.objects[head.path] = StoredObject(size, data, etag, checksum, head.describing())
        return respond("200 OK", headers=b"ETag: " + etag + b"\r\n" + checksum)

    def _received(self, head: Head, body: Body) -> tuple[int, bytes | None, bytes]:
        """Return size, bytes and CRC32 of a body."""
        crc32 = head.get(b"x-amz-checksum-crc32")
        data = None if body.pieces is None else b"".join(body.pieces)
        if b"aws-chunked" in head.lowered:
            if data is None:
                return int(head.get(b"x-amz-decoded-content-length")), None, b""
            data, trailers = _decode_aws_chunks(data)
            return len(data), data, crc32 or trailers
        if self._world.verify and crc32 and crc32 != _encoded(body.crc32):
            raise S3Error("400 Bad Request", "BadDigest")
        return body.size, data, crc32

    def _get(self, head: Head, _body: Body) -> Answer:
        if head.path.count(b"/") < 2 or head.path.endswith(b"/"):  # noqa: PLR2004 - a bucket
            return Answer(respond("200 OK"))
        found = self._world.objects.get(head.path)
        if found is None:
            raise S3Error("404 Not Found", "NoSuchKey")
        wanted = head.get(b"if-match")
        if wanted and wanted != found.etag:
            raise S3Error("412 Precondition Failed", "PreconditionFailed")
        first, last, status, lines = _range(head.get(b"range"), found)
        length = last - first + 1
        if not lines and b"\r\nx-amz-checksum-mode:" in head.lowered:
            lines = found.checksum
        answer = (
            b"HTTP/1.1 %s\r\n%s%sETag: %s\r\n%s%sContent-Length: %d\r\n\r\n"
            % (status, _HEADERS, _MODIFIED, found.etag, found.describing, lines, length)
        )  # fmt: skip
        if head.method == b"HEAD":
            return Answer(answer)
        if found.body is not None:
            return Answer(answer + found.body[first : last + 1])
        return Answer(answer, first, length)

    def _copy(self, head: Head, _body: Body) -> bytes:
        source = urllib.parse.unquote_to_bytes(head.get(b"x-amz-copy-source"))
        found = self._world.objects.get(b"/" + source.lstrip(b"/"))
        if found is None:
            raise S3Error("404 Not Found", "NoSuchKey")
        etag = self._world.new_etag()
        self._world.objects[head.path] = dataclasses.replace(found, etag=etag)
        return respond(
            "200 OK",
            b"<CopyObjectResult><ETag>%s</ETag><LastModified>2026-01-01T00:00:00.000Z"
            b"</LastModified></CopyObjectResult>" % etag,
        )

    def _delete(self, head: Head, _body: Body) -> bytes:
        self._world.objects.pop(head.path, None)
        return _NO_CONTENT

    def _delete_many(self, head: Head, body: Body) -> bytes:
        _, data, _ = self._received(head, body)
        keys = _KEY.findall(data or b"")
        for key in keys:
            name = unescape(key.decode()).encode()
            self._world.objects.pop(head.path.rstrip(b"/") + b"/" + name, None)
        deleted = b"".join(b"<Deleted><Key>%s</Key></Deleted>" % key for key in keys)
        return respond("200 OK", b"<DeleteResult %s>%s</DeleteResult>" % (_NAMESPACE, deleted))

    def _list(self, head: Head, _body: Body) -> bytes:
        given = dict(urllib.parse.parse_qsl(head.query.decode()))
        bucket = head.path.strip(b"/")
        start = f"/{bucket.decode()}/{given.get('prefix', '')}".encode()
        after = given.get("continuation-token") or given.get("start-after") or ""
        after_path = f"/{bucket.decode()}/{after}".encode()
        paths = sorted(p for p in self._world.objects if p.startswith(start) and p > after_path)
        page = [p[len(bucket) + 2 :].decode() for p in paths[:1000]]
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>0</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in page
        )
        is_truncated = len(paths) > len(page)
        if is_truncated:
            rows += f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"
        return respond(
            "200 OK",
            f"<ListBucketResult {_NAMESPACE.decode()}><Name>{bucket.decode()}</Name>"
            f"<KeyCount>{len(page)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>{rows}"
            "</ListBucketResult>".encode(),
        )

    # multipart uploads

    def _create_upload(self, head: Head, _body: Body) -> bytes:
        name = self._world.new_etag().strip(b'"').decode()
        is_full = head.get(b"x-amz-checksum-type") == b"FULL_OBJECT"
        self._world.uploads[name] = Upload(head.path, head.describing(), is_full, {})
        bucket, _, key = head.path[1:].decode().partition("/")
        return respond(
            "200 OK",
            f"<InitiateMultipartUploadResult {_NAMESPACE.decode()}><Bucket>{bucket}</Bucket>"
            f"<Key>{escape(key)}</Key><UploadId>{name}</UploadId>"
            "</InitiateMultipartUploadResult>".encode(),
        )

    def _upload(self, head: Head) -> tuple[str, Upload]:
        name = head.parameter("uploadId")
        upload = self._world.uploads.get(name)
        if upload is None or upload.path != head.path:
            raise S3Error("404 Not Found", "NoSuchUpload")
        return name, upload

    def _upload_part(self, head: Head, body: Body) -> bytes:
        _, upload = self._upload(head)
        size, data, crc32 = self._received(head, body)
        etag = self._world.new_etag()
        number = int(head.parameter("partNumber"))
        upload.parts[number] = Part(size, data, etag, crc32, body.crc32)
        return respond("200 OK", headers=b"ETag: " + etag + b"\r\n" + _checksum_lines(crc32, b""))

    def _complete(self, head: Head, body: Body) -> bytes:
        name, upload = self._upload(head)
        listed = b"".join(body.pieces or ())  # a checksum in the head is that of the object
        numbers = [int(number) for number in _PART_NUMBER.findall(listed)]
        if not numbers or numbers != sorted(upload.parts.keys() & set(numbers)):
            raise S3Error("400 Bad Request", "InvalidPart")
        parts = [upload.parts[number] for number in numbers]
        self._check_parts(parts)
        size = sum(part.size for part in parts)
        self._check_whole(head, upload, size)
        bodies = [part.body for part in parts if part.body is not None]
        is_kept = size <= KEPT_BYTES and len(bodies) == len(parts)
        checksum = _checksum_of_upload(head, upload, parts)
        etag = self._world.new_etag()
        self._world.objects[head.path] = StoredObject(
            size, b"".join(bodies) if is_kept else None, etag, checksum, upload.describing
        )
        del self._world.uploads[name]
        bucket, _, key = head.path[1:].decode().partition("/")
        return respond(
            "200 OK",
            f"<CompleteMultipartUploadResult {_NAMESPACE.decode()}><Bucket>{bucket}</Bucket>"
            f"<Key>{escape(key)}</Key><ETag>{escape(etag.decode())}</ETag>"
            "</CompleteMultipartUploadResult>".encode(),
        )

    def _check_parts(self, parts: list[Part]) -> None:
        if any(part.size < MIN_PART_BYTES for part in parts[:-1]):
            raise S3Error("400 Bad Request", "EntityTooSmall")
        if not self._world.verify or sum(part.size for part in parts) <= KEPT_BYTES:
            return
        offset = 0
        for part in parts:
            if part.crc32 and part.seen_crc32 != crc32_of_pattern(offset, part.size):
                raise S3Error("400 Bad Request", "BenchmarkNotThePattern")
            offset += part.size

    def _check_whole(self, head: Head, upload: Upload, size: int) -> None:
        declared = head.get(b"x-amz-mp-object-size")
        if declared and int(declared) != size:
            raise S3Error("400 Bad Request", "InvalidRequest")
        crc32 = head.get(b"x-amz-checksum-crc32")
        is_checked = self._world.verify and upload.is_full_object and size > KEPT_BYTES
        if is_checked and crc32 and crc32 != _encoded(crc32_of_pattern(0, size)):
            raise S3Error("400 Bad Request", "BadDigest")

    def _abort(self, head: Head, _body: Body) -> bytes:
        name, _ = self._upload(head)
        del self._world.uploads[name]
        return _NO_CONTENT

    # the benchmark's own requests

    def _control(self, head: Head) -> bytes:
        world = self._world
        if head.path == b"/__config":
            given = dict(urllib.parse.parse_qsl(head.query.decode()))
            world.latency_seconds = float(given.get("latency_ms", 0)) / 1000
            world.bytes_per_second = float(given.get("megabytes_per_second", 0)) * 1e6
        elif head.path == b"/__forget":
            world.objects.clear()
            world.uploads.clear()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        stats = {
            "requests": dict(world.counts),
            "objects": len(world.objects),
            "uploads": len(world.uploads),
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }
        world.counts.clear()
        return respond("200 OK", json.dumps(stats).encode())


def _refuse(_head: Head, _body: Body) -> bytes:
    raise S3Error("405 Method Not Allowed", "MethodNotAllowed")


def _encoded(crc32: int) -> bytes:
    return base64.b64encode(crc32.to_bytes(4, "big"))


def _checksum_lines(crc32: bytes, kind: bytes) -> bytes:
    if not crc32:
        return b""
    lines = b"x-amz-checksum-crc32: %s\r\n" % crc32
    return lines + (b"x-amz-checksum-type: %s\r\n" % kind if kind else b"")


def _checksum_of_upload(head: Head, upload: Upload, parts: list[Part]) -> bytes:
    """Return what S3 says of the whole: the client's own value, or one made of the parts'."""
    if upload.is_full_object:
        return _checksum_lines(head.get(b"x-amz-checksum-crc32"), b"FULL_OBJECT")
    if not all(part.crc32 for part in parts):
        return b""
    joined = b"".join(base64.b64decode(part.crc32) for part in parts)
    return _checksum_lines(b"%s-%d" % (_encoded(zlib.crc32(joined)), len(parts)), b"COMPOSITE")


def _range(header: bytes, found: StoredObject) -> tuple[int, int, bytes, bytes]:
    """Return first and last byte, the status and the header line of a GET."""
    if not header or not found.size:
        return 0, found.size - 1, b"200 OK", b""
    begin, _, end = header.removeprefix(b"bytes=").partition(b"-")
    first = int(begin) if begin else max(found.size - int(end), 0)
    last = min(int(end), found.size - 1) if begin and end else found.size - 1
    if first > last:
        raise S3Error("416 Range Not Satisfiable", "InvalidRange")
    line = b"Content-Range: bytes %d-%d/%d\r\n" % (first, last, found.size)
    return first, last, b"206 Partial Content", line


def _decode_aws_chunks(data: bytes) -> tuple[bytes, bytes]:
    """Return the bytes of a small body, and the CRC32 that trails it."""
    pieces: list[bytes] = []
    position = 0
    while True:
        line_end = data.index(b"\r\n", position)
        length = int(data[position:line_end].partition(b";")[0], 16)
        position = line_end + 2
        if not length:
            break
        pieces.append(data[position : position + length])
        position += length + 2
    name, _, value = data[position:].strip().partition(b":")
    return b"".join(pieces), value.strip() if name.lower() == b"x-amz-checksum-crc32" else b""


class Connection(asyncio.BufferedProtocol):
    """One keep-alive connection. One request at a time: clients of S3 do not pipeline."""

    def __init__(self, verbs: Verbs) -> None:
        self._world = verbs.world
        self._verbs = verbs
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._head: Head | None = None
        self._body = Body(verify=False)
        self._framing: LengthFraming | ChunkedFraming = LengthFraming(self._body, 0)
        self._pieces: Iterator[memoryview] | None = None  # what is left to be sent
        self._is_writable = True
        self._paced_since = 0.0
        self._paced_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where answers go."""
        self._transport = transport  # type: ignore[assignment] # uvloop's is no asyncio.Transport
        self._world.counts["connections"] += 1

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Forget what was to be sent."""
        self._transport = self._pieces = None

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's
        """Return where the next bytes go."""
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take what arrived."""
        self._end += nbytes
        if self._world.bytes_per_second:
            self._pace_reading(nbytes)
        while self._start < self._end and self._advance():
            pass
        rest = self._end - self._start
        if rest and self._start:
            self._buffer[:rest] = self._buffer[self._start : self._end]
        self._start, self._end = 0, rest

    def _advance(self) -> bool:
        """Take one step; tell whether there was enough for it."""
        if self._head is None:
            if not self._take_head():
                return False
        else:
            taken = self._framing.take(self._view[self._start : self._end])
            self._start += taken
            if not taken:
                return False
        if self._framing.is_complete:
            self._finish()
        return True

    def _take_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", self._start, self._end)
        if end < 0:
            return False
        self._head = head = Head.parse(bytes(self._view[self._start : end]))
        self._start = end + 4
        self._body = Body(verify=self._world.verify)
        if b"\r\ntransfer-encoding: chunked" in head.lowered:
            self._framing = ChunkedFraming(self._body)
        else:
            self._framing = LengthFraming(self._body, int(head.get(b"content-length") or 0))
        if b"\r\nexpect:" in head.lowered:
            self._world.counts["Expect"] += 1
            self._send_later(Answer(_CONTINUE))
        return True

    def _finish(self) -> None:
        head, self._head = self._head, None
        assert head is not None
        answer = self._verbs.answer(head, self._body)
        if head.path.startswith(b"/__"):
            self._send(answer)
        else:
            self._send_later(answer)

    def _send_later(self, answer: Answer) -> None:
        if self._world.latency_seconds:
            self._loop.call_later(self._world.latency_seconds, self._send, answer)
        else:
            self._send(answer)

    def _send(self, answer: Answer) -> None:
        if self._transport is None:
            return
        self._transport.write(answer.data)
        if answer.size:
            self._pieces = iter_pattern(answer.offset, answer.size, piece_bytes=PIECE_BYTES)
            self._paced_since, self._paced_bytes = self._loop.time(), 0
            self._send_pieces()

    def pause_writing(self) -> None:
        """Wait: the client is slower."""
        self._is_writable = False

    def resume_writing(self) -> None:
        """Go on."""
        self._is_writable = True
        self._send_pieces()

    def _send_pieces(self) -> None:
        while self._pieces is not None and self._is_writable and self._transport is not None:
            ahead = self._seconds_ahead()
            if ahead > 0:
                self._loop.call_later(ahead, self._send_pieces)
                return
            piece = next(self._pieces, None)
            if piece is None:
                self._pieces = None
                return
            self._paced_bytes += len(piece)
            self._transport.write(piece)

    def _pace_reading(self, nbytes: int) -> None:
        if self._head is None:  # a new request
            self._paced_since, self._paced_bytes = self._loop.time(), 0
        self._paced_bytes += nbytes
        ahead = self._seconds_ahead()
        if ahead > 0 and self._transport is not None:
            self._transport.pause_reading()
            self._loop.call_later(ahead, self._resume_reading)

    def _resume_reading(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def _seconds_ahead(self) -> float:
        """Return how long to wait, if more bytes went through than the throughput allows."""
        if not self._world.bytes_per_second:
            return 0.0
        due = self._paced_bytes / self._world.bytes_per_second
        return due - (self._loop.time() - self._paced_since)


async def serve(world: World, *, certificate: Path | None) -> None:
    """Serve on a free port until standard input ends."""
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    verbs = Verbs(world)
    server = await loop.create_server(
        lambda: Connection(verbs), "127.0.0.1", 0, ssl=context, backlog=1024
    )
    scheme = "https" if context else "http"
    print(f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    async with server:
        await asyncio.to_thread(sys.stdin.read)


def _runner() -> Callable[[Any], None]:
    try:
        run: Callable[[Any], None] = importlib.import_module("uvloop").run
    except ImportError:  # not everybody has it
        return asyncio.run
    return run


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--latency-ms", type=float, default=0)
    parser.add_argument("--megabytes-per-second", type=float, default=0, help="of a connection")
    parser.add_argument("--certificate", type=Path, help="PEM with key and chain: serve https")
    parser.add_argument("--verify", action="store_true", help="compare CRC32 values")
    given = parser.parse_args()
    world = World(
        verify=given.verify,
        latency_seconds=given.latency_ms / 1000,
        bytes_per_second=given.megabytes_per_second * 1e6,
    )
    with contextlib.suppress(KeyboardInterrupt):
        _runner()(serve(world, certificate=given.certificate))


if __name__ == "__main__":
    main()
