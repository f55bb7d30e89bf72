"""``aioblobcol put``, ``get``, ``ls``, ``rm``, ``url``: what people see, and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio
import sqlalchemy as sa
import typer.main
from support.awaits import CountedTask
from support.databases import Database
from support.journal import Journaled, open_journaled
from support.s3_proxy import Forward, Request, answer, s3_proxy
from typer.testing import CliRunner, Result

from aioblobcol import BlobApp, InvalidSourceError, S3Store
from aioblobcol._sources import PART_BYTES
from aioblobcol._streams import AsyncPuller
from aioblobcol.cli._bars import shown
from aioblobcol.cli._commands import app as command_line
from aioblobcol.cli._guarding import Removal
from aioblobcol.cli._listing import objects_under
from aioblobcol.cli._moving import Source, content_type_of, upload
from aioblobcol.testing import MemoryStore, S3Server, Step, StoredObject

ID = f"id={7:032x}"
LARGE = bytes(range(256)) * (PART_BYTES // 256) + b"the second part"
ENDS = [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 1, "ended by SIGTERM"),
]
LONG_AGO = datetime(2020, 1, 1, tzinfo=timezone.utc)

pytestmark = pytest.mark.slow  # a client for each test, and for many a process

Run = Callable[..., Awaitable[Result]]
Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory."""
    directory = tmp_path.resolve() / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest_asyncio.fixture
async def bucket(s3: S3Server, here: Path, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """Give an empty bucket of a server that the environment names, not open."""
    given = s3.client_arguments
    monkeypatch.setenv("AWS_ENDPOINT_URL", given["endpoint_url"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", given["region_name"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", given["aws_access_key_id"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", given["aws_secret_access_key"])
    monkeypatch.delenv("AIOBLOBCOL_APP", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    name = f"people-{uuid.uuid4().hex}"
    await s3.create_bucket(name)
    return s3.open_store(bucket=name, prefix="")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, in a loop of its own."""

    async def call(*arguments: str, charset: str = "utf-8") -> Result:
        monkeypatch.setenv("COLUMNS", "200")
        runner = CliRunner(charset)
        return await asyncio.to_thread(lambda: runner.invoke(command_line, list(arguments)))

    return call


@pytest.fixture
def start() -> Start:
    """Start a command in a process of its own."""

    async def call(*arguments: str, **more: Any) -> asyncio.subprocess.Process:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
        command = (sys.executable, "-m", "aioblobcol.cli", *arguments)
        return await asyncio.create_subprocess_exec(*command, **{**streams, **more})

    return call


async def fill(store: S3Store, *keys: str, body: bytes = b"body") -> list[str]:
    async with store:
        await asyncio.gather(
            *(store.client.put_object(Bucket=store.bucket, Key=key, Body=body) for key in keys)
        )
    return [f"s3://{store.bucket}/{key}" for key in keys]


async def contents(store: S3Store) -> dict[str, bytes]:
    """Return what the bucket holds, by key; no upload may be left incomplete."""
    async with store:
        uris = [uri async for uri in store.iter_uris()]
        bodies = [await store.get(uri) for uri in uris]
        left = await store.client.list_multipart_uploads(Bucket=store.bucket)
    assert left.get("Uploads", []) == []
    return {uri.split("/", 3)[3]: body for uri, body in zip(uris, bodies, strict=True)}


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def told(result: Result) -> str:
    """Return what a box on stderr says, without its frame."""
    return " ".join(result.stderr.replace("│", " ").split())


async def waiting(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


class TestPut:
    async def test_a_file(self, run: Run, bucket: S3Store, here: Path) -> None:
        """Goes up under its name; its URI is all that stdout gets, the figures are on stderr."""
        (here / "photo.jpg").write_bytes(b"pixels")
        result = await run("put", "photo.jpg", f"s3://{bucket.bucket}/of/may/")

        uri = f"s3://{bucket.bucket}/of/may/photo.jpg"
        assert (result.exit_code, result.stdout) == (0, f"{uri}\n")
        assert result.stderr == "6 bytes, image/jpeg\n"
        assert await contents(bucket) == {"of/may/photo.jpg": b"pixels"}
        async with bucket:
            assert (await bucket.head(uri)).content_type == "image/jpeg"

    async def test_in_a_bucket(self, run: Run, bucket: S3Store, here: Path) -> None:
        """With --bucket a key is enough, or none at all; --quiet says nothing."""
        (here / "ünï cödé.txt").write_bytes(b"1")
        for arguments in ((), ("b/ß?#%+&.txt",)):
            options = ("--bucket", bucket.bucket, "--quiet")
            result = await run("put", "ünï cödé.txt", *arguments, *options)
            assert (result.exit_code, result.stderr) == (0, "")

        assert set(await contents(bucket)) == {"ünï cödé.txt", "b/ß?#%+&.txt"}

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (("a.png", "b.html"), "image/png"),
            (("a", "s3://bucket/x/b.html"), "text/html"),
            (("page.html.gz",), "application/gzip"),
            (("a.tar.br",), "application/x-brotli"),
            (("a.b/c", "-"), None),
        ],
    )
    def test_content_types(self, names: tuple[str, ...], expected: str | None) -> None:
        """Are guessed from the first name that tells; what is packed is not what is in it."""
        assert content_type_of(*names) == expected

    async def test_a_content_type(self, run: Run, bucket: S3Store, here: Path) -> None:
        """May be given; what is no header is refused."""
        (here / "a.txt").write_bytes(b"1")
        good = await run("put", "a.txt", "--bucket", bucket.bucket, "--content-type", "x/y; z=1")
        bad = await run("put", "a.txt", "--bucket", bucket.bucket, "--content-type", "x/y\r\nA: b")

        assert (good.exit_code, bad.exit_code) == (0, 2)
        async with bucket:
            info = await bucket.head(f"s3://{bucket.bucket}/a.txt")
            assert info.content_type == "x/y; z=1"

    async def test_a_large_file(self, run: Run, bucket: S3Store, here: Path) -> None:
        """Goes up in parts."""
        (here / "large").write_bytes(LARGE)
        result = await run("put", "large", "--bucket", bucket.bucket)

        assert (result.exit_code, result.stderr) == (0, "8,388,623 bytes, of no content type\n")
        assert await contents(bucket) == {"large": LARGE}
        async with bucket:
            info = await bucket.head(f"s3://{bucket.bucket}/large")
            assert str(info.etag).endswith('-2"')

    @pytest.mark.parametrize("size", [0, PART_BYTES + 1])
    @pytest.mark.parametrize("is_file", [True, False])
    async def test_standard_input(
        self, start: Start, bucket: S3Store, here: Path, size: int, is_file: bool
    ) -> None:
        """Is taken from a pipe or a file, however much there is, from where it stands on."""
        uri = f"s3://{bucket.bucket}/from-stdin"
        (here / "body").write_bytes(b"before" + LARGE[:size])
        with (here / "body").open("rb", buffering=0) as file:
            file.seek(6)
            process = await start("put", "-", uri, **{"stdin": file} if is_file else {})
            out, err = await process.communicate(None if is_file else LARGE[:size])

        assert (process.returncode, out.decode()) == (0, f"{uri}\n"), err
        assert await contents(bucket) == {"from-stdin": LARGE[:size]}

    async def test_what_is_there(self, run: Run, bucket: S3Store, here: Path) -> None:
        """Is replaced only if that was asked for."""
        (here / "a").write_bytes(b"new")
        (uri,) = await fill(bucket, "a", body=b"old")
        refused = await run("put", "a", uri)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "is there already; --overwrite replaces it" in told(refused)
        assert await contents(bucket) == {"a": b"old"}

        assert (await run("put", "a", uri, "--overwrite")).exit_code == 0
        assert await contents(bucket) == {"a": b"new"}

    async def test_without_permission_to_look(
        self, run: Run, bucket: S3Store, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who may only put is told how."""
        (here / "a").write_bytes(b"1")

        async def refuse(request: Request, forward: Forward) -> bytes:
            if request.method == "HEAD":
                return b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
            return await forward()

        async with s3_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            proxy.rule = refuse
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
            refused = await run("put", "a", "--bucket", bucket.bucket)
            forced = await run("put", "a", "--bucket", bucket.bucket, "--overwrite")

        assert refused.exit_code == 1
        assert "--overwrite does not ask" in refused.stderr
        assert forced.exit_code == 0

    @pytest.mark.parametrize(
        ("method", "text"),
        [
            ("POST", "uploads"),
            ("PUT", "partNumber"),
            ("PUT", "partNumber=2"),
            ("POST", "uploadId"),
        ],
    )
    async def test_a_request_that_fails(
        self,
        run: Run,
        bucket: S3Store,
        here: Path,
        monkeypatch: pytest.MonkeyPatch,
        method: str,
        text: str,
    ) -> None:
        """Leaves no part behind, and what was there before; it is told in one line."""
        (here / "large").write_bytes(LARGE)
        (uri,) = await fill(bucket, "large", body=b"old")

        is_sent = asyncio.Event()  # or an abort would come before the part, which moto cannot do

        async def refuse(request: Request, forward: Forward) -> bytes:
            query = request.path.partition("?")[2]
            if text == "partNumber=2" and text in query:
                await is_sent.wait()
            if request.method == method and text in query:
                return answer("403 Forbidden", "AccessDenied")
            reply = await forward()
            if "partNumber=1" in query:
                is_sent.set()
            return reply

        async with s3_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            proxy.rule = refuse
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
            result = await run("put", "large", uri, "--overwrite")

        assert (result.exit_code, result.stdout) == (1, "")
        assert "AccessDenied" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert await contents(bucket) == {"large": b"old"}

    @pytest.mark.parametrize(("number", "expected", "text"), ENDS)
    async def test_a_signal(
        self, start: Start, bucket: S3Store, here: Path, number: int, expected: int, text: str
    ) -> None:
        """Aborts the upload: neither an object nor a part is left; of Ctrl-C the code is 130."""
        (here / "large").write_bytes(LARGE)
        sending, never = asyncio.Event(), asyncio.Event()

        async def hold(request: Request, forward: Forward) -> bytes:
            if "partNumber=2" in request.path:
                sending.set()
                await never.wait()
            return await forward()

        async with s3_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            proxy.rule = hold
            process = await start(
                *("put", "large", "--bucket", bucket.bucket),
                env={**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint_url},
            )
            await sending.wait()
            process.send_signal(number)
            code, out, err = await waiting(process)

        assert (code, out, err) == (expected, "", f"aioblobcol put: {text}\n")
        assert await contents(bucket) == {}

    async def test_ctrl_c_while_nobody_writes(
        self, start: Start, bucket: S3Store, s3: S3Server
    ) -> None:
        """Ends the command though standard input stays open."""
        sending = asyncio.Event()

        async def note(request: Request, forward: Forward) -> bytes:
            if "partNumber=1" in request.path:
                sending.set()
            return await forward()

        async with s3_proxy(s3.endpoint_url) as proxy:
            proxy.rule = note
            process = await start(
                *("put", "-", f"s3://{bucket.bucket}/a"),
                env={**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint_url},
            )
            assert process.stdin is not None
            process.stdin.write(LARGE)
            await process.stdin.drain()
            await sending.wait()
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            process.stdin.close()

        assert await contents(bucket) == {}

    @pytest.mark.parametrize("size", [3, PART_BYTES + 3])
    @pytest.mark.parametrize("more", [-2, 2])
    async def test_a_file_that_changes(
        self, memory_store: MemoryStore, size: int, more: int
    ) -> None:
        """What has another size than before is not stored."""
        reader = asyncio.StreamReader(limit=2 * PART_BYTES)
        reader.feed_data(b"x" * (size + more))
        reader.feed_eof()
        uri = "s3://bucket/elsewhere"
        source = Source("file", AsyncPuller("file", reader, reader.read), size)
        with pytest.raises(InvalidSourceError, match="was changed while it was read"):
            await upload(memory_store, uri, source, arguments={}, on_progress=lambda *_: None)

        assert memory_store.objects == {}

    async def test_memory_for_a_stream_without_end(
        self, memory_store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where its parts have become large, fewer of them are in memory together."""
        monkeypatch.setattr("aioblobcol._streams.EQUAL_PARTS", 1)
        monkeypatch.setattr("aioblobcol._streams.GROWTH_BYTES", PART_BYTES)
        monkeypatch.setattr("aioblobcol.cli._moving.HELD_BYTES", 2 * PART_BYTES)
        on_the_wire: list[int] = [0]

        async def count(step: Step) -> None:
            if step.operation == "write":
                change = {"before": 1, "after": -1}.get(step.stage, 0)
                on_the_wire.append(on_the_wire[-1] + change)
                await asyncio.sleep(0)

        memory_store.hooks.append(count)
        reader = asyncio.StreamReader(limit=8 * PART_BYTES)
        reader.feed_data(bytes(6 * PART_BYTES))  # in parts of 1, 2 and 3
        reader.feed_eof()
        source = Source("file", AsyncPuller("file", reader, reader.read), None)
        await upload(
            memory_store, "s3://bucket/other", source, arguments={}, on_progress=lambda *_: None
        )

        assert on_the_wire == [0, 1, 0, 1, 0, 1, 0]

    @pytest.mark.parametrize("body", [b"small", LARGE])
    async def test_cancelled_at_any_await(self, body: bytes) -> None:
        """The object is the old one or the new one, and no part is left."""
        uri = "s3://bucket/elsewhere"
        for moment in range(1, 400):
            async with MemoryStore() as store:
                store.objects[uri] = StoredObject(b"old", {}, {})
                reader = asyncio.StreamReader(limit=2 * len(body))
                reader.feed_data(body)
                reader.feed_eof()
                source = Source("file", AsyncPuller("file", reader, reader.read), None)
                work = upload(store, uri, source, arguments={}, on_progress=lambda *_: None)
                was_reached = await CountedTask(work, cancel_at=moment).run()
                assert store.uploads == {}
                assert store.runtime.slots._value == 32
                found = store.objects[uri].body
            assert found in ({b"old", body} if was_reached else {body})
            if not was_reached:
                return
        pytest.fail("this never ends")

    async def test_a_terminal_that_knows_ascii_only(
        self, run: Run, bucket: S3Store, here: Path
    ) -> None:
        """The URI is escaped, and the object is there."""
        (here / "ü").write_bytes(b"1")
        result = await run("put", "ü", "--bucket", bucket.bucket, charset="ascii")

        assert (result.exit_code, result.stdout) == (0, f"s3://{bucket.bucket}/\\xfc\n")
        assert set(await contents(bucket)) == {"ü"}

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (("nowhere", "s3://bucket/a"), "No such file or directory"),
            ((".", "s3://bucket/a"), "directory"),
            (("-", "s3://bucket/"), "standard input has no name"),
            (("file",), "no --bucket"),
            (("file", "http://bucket/a"), "is not s3://bucket/key"),
            (("file", "s3://b:c/d"), "not a bucket name"),
            (("file", "s3://bucket/\x1b[1m"), "no control characters"),
            (("file", "a", "--bucket", "b", "--endpoint-url", "localhost"), "is a URL such as"),
            (("file", "a", "--bucket", "b", "--compat", "ceph"), "is one of aws, generic"),
            (("file", f"s3://bucket/x/{ID}"), "those of the objects of rows"),
            (("file", f"s3://bucket/x/col=a/md5={7:032x}"), "those of the objects of rows"),
            (("file", "s3://bucket/x/.aioblobcol-owner"), "claim"),
        ],
    )
    async def test_what_cannot_be(
        self, run: Run, here: Path, arguments: tuple[str, ...], reason: str
    ) -> None:
        """Is refused with exit code 2, before anything is sent."""
        (here / "file").write_bytes(b"1")
        result = await run("put", *arguments)

        assert (result.exit_code, result.stdout) == (2, "")
        assert reason in told(result)


class TestGet:
    async def test_into_a_file(self, run: Run, bucket: S3Store, here: Path) -> None:
        """Under the key's last part, in a directory, or under another name."""
        (uri,) = await fill(bucket, "x/ünï cödé?.txt")
        (here / "directory").mkdir()
        for arguments in ((), ("directory",), ("other",)):
            result = await run("get", uri, *arguments)
            assert (result.exit_code, result.stdout) == (0, "")
            assert result.stderr.startswith(f"4 bytes to {here}/")

        names = ("ünï cödé?.txt", "directory/ünï cödé?.txt", "other")
        assert [(here / name).read_bytes() for name in names] == [b"body"] * 3
        assert len(names_in(here)) == 3
        assert len(names_in(here / "directory")) == 1

    async def test_to_standard_output(self, start: Start, bucket: S3Store) -> None:
        """The bytes and nothing else; --quiet says nothing."""
        (uri,) = await fill(bucket, "a", body=LARGE)
        process = await start("get", uri, "-", "--quiet")
        out, err = await process.communicate()

        assert (process.returncode, out, err) == (0, LARGE, b"")

    async def test_a_file_that_is_there(self, run: Run, bucket: S3Store, here: Path) -> None:
        """Is replaced only if that was asked for; a link stays one."""
        (uri,) = await fill(bucket, "a")
        (here / "a").write_bytes(b"old")
        (here / "link").symlink_to(here / "a")
        for name in ("a", "link"):
            refused = await run("get", uri, name)
            assert (refused.exit_code, "is there already" in told(refused)) == (2, True)
        assert (here / "a").read_bytes() == b"old"

        assert (await run("get", uri, "link", "--overwrite")).exit_code == 0
        assert (here / "a").read_bytes() == b"body"
        assert (here / "link").is_symlink()

    async def test_into_a_pipe(self, start: Start, bucket: S3Store, here: Path) -> None:
        """What is no plain file is written to, and stays what it is."""
        (uri,) = await fill(bucket, "a")
        os.mkfifo(here / "pipe")
        process = await start("get", uri, "pipe")
        body = await asyncio.to_thread((here / "pipe").read_bytes)

        assert (await process.wait(), body) == (0, b"body")
        assert (here / "pipe").is_fifo()

    @pytest.mark.parametrize("there", [True, False])
    async def test_an_object_that_is_missing(
        self, run: Run, bucket: S3Store, here: Path, there: bool
    ) -> None:
        """One line, and no file; what was there stays."""
        if there:
            (here / "a").write_bytes(b"old")
        for uri in (f"s3://{bucket.bucket}/a", f"s3://no-{bucket.bucket}/a"):
            result = await run("get", uri, "--overwrite")
            assert (result.exit_code, result.stdout) == (1, "")
            assert result.stderr.startswith(f"aioblobcol get: cannot get {uri}: NoSuch")
            assert len(result.stderr.splitlines()) == 1

        assert names_in(here) == (["a"] if there else [])
        assert not there or (here / "a").read_bytes() == b"old"

    @pytest.mark.parametrize("target", ["file", "-"])
    async def test_a_connection_that_breaks_off(
        self,
        start: Start,
        bucket: S3Store,
        here: Path,
        target: str,
    ) -> None:
        """Is taken up where it was: the bytes are those of the object."""
        (uri,) = await fill(bucket, "a", body=LARGE)
        cut = 0

        async def cut_once(request: Request, forward: Forward) -> bytes:
            nonlocal cut
            reply = await forward()
            if request.method == "GET" and cut < 1:
                cut += 1
                return reply[: len(reply) // 2]
            return reply

        async with s3_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            proxy.rule = cut_once
            environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint_url}
            process = await start("get", uri, target, env=environment)
            out, err = await process.communicate()

        assert (process.returncode, cut) == (0, 1), err
        assert (out if target == "-" else (here / "file").read_bytes()) == LARGE

    async def test_into_no_directory(self, run: Run, here: Path) -> None:
        """Is refused before anything is sent."""
        result = await run("get", "s3://bucket/a", "nowhere/a")

        assert (result.exit_code, result.stdout) == (2, "")
        assert "there is no directory" in told(result)

    @pytest.mark.parametrize("key", ["a/", "a/..", "..", "a/."])
    async def test_keys_that_name_no_file(
        self, run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, key: str
    ) -> None:
        """Nothing is written anywhere else than where it seems."""
        result = await run("get", f"s3://bucket/{key}")

        assert result.exit_code == 2
        assert "is no name for a file" in told(result)

    @pytest.mark.parametrize(("number", "expected", "text"), ENDS)
    async def test_a_signal(
        self, start: Start, bucket: S3Store, here: Path, number: int, expected: int, text: str
    ) -> None:
        """Leaves no part of a file; of Ctrl-C the exit code is 130."""
        (uri,) = await fill(bucket, "a", body=LARGE)
        asked, never = asyncio.Event(), asyncio.Event()

        async def hold(request: Request, forward: Forward) -> bytes:
            asked.set()
            await never.wait()
            return await forward()

        async with s3_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            proxy.rule = hold
            environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint_url}
            process = await start("get", uri, env=environment)
            await asked.wait()
            process.send_signal(number)
            code, out, err = await waiting(process)

        assert (code, out, err) == (expected, "", f"aioblobcol get: {text}\n")
        assert names_in(here) == []

    async def test_a_reader_that_goes(self, start: Start, bucket: S3Store) -> None:
        """Ends it quietly, as any command at the head of a pipe."""
        (uri,) = await fill(bucket, "a", body=LARGE)
        process = await start("get", uri, "-")
        assert process.stdout is not None
        assert process.stderr is not None
        await process.stdout.readexactly(1)
        process.stdout._transport.close()  # type: ignore[attr-defined]  # no other way
        assert await process.wait() == 141
        assert await process.stderr.read() == b""


class TestLs:
    async def test_lines(self, run: Run, bucket: S3Store) -> None:
        """Size, time and URI, in the order of the keys' bytes; counts at the end on stderr."""
        uris = await fill(bucket, "b", "a/ü", "a/z", "\U0001f600", "\uffee", body=b"x" * 1234)
        result = await run("ls", f"s3://{bucket.bucket}")

        assert result.exit_code == 0
        assert result.stderr == "5 objects, 6,170 bytes\n"
        lines = [line.split() for line in result.stdout.splitlines()]
        assert [line[-1] for line in lines] == sorted(uris, key=str.encode)
        size, day, hour, _ = lines[0]
        at = datetime.fromisoformat(f"{day}T{hour}+00:00")
        assert size == "1,234"
        assert abs(datetime.now(timezone.utc) - at) < timedelta(hours=1)

    async def test_for_programs(self, run: Run, bucket: S3Store) -> None:
        """A JSON object per line."""
        (uri,) = await fill(bucket, "ü")
        result = await run("ls", "--json", "--bucket", bucket.bucket, "--quiet")

        assert (result.exit_code, result.stderr) == (0, "")
        fields = json.loads(result.stdout)
        assert (fields["uri"], fields["size"]) == (uri, 4)
        assert datetime.fromisoformat(fields["modified_at"]).tzinfo is not None

    async def test_a_prefix(self, run: Run, bucket: S3Store) -> None:
        """Is what URIs begin with, be it a part of a name or a whole key."""
        await fill(bucket, "a", "ab", "ab/c", "abd", "ac", "b")
        for prefix, count in (("ab", 3), ("ab/", 1), ("abd", 1), ("z", 0), ("", 6)):
            result = await run("ls", f"s3://{bucket.bucket}/{prefix}")
            assert (result.exit_code, len(result.stdout.splitlines())) == (0, count)

    async def test_is_that_of_plain_text(self, memory_store: MemoryStore) -> None:
        """Whatever the characters, all that begins with a prefix is listed and nothing else."""
        parts = ["!", "a", "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff"]
        keys = [one + other for one in parts for other in ("", *parts)]
        memory_store.prefix = ""
        body = StoredObject(b"", {}, {})
        memory_store.objects.update({f"s3://bucket/{key}": body for key in keys})
        for prefix in keys:
            under = f"s3://bucket/{prefix}"
            found = [each.uri async for each in objects_under(memory_store, under)]
            assert set(found) == {uri for uri in memory_store.objects if uri.startswith(under)}

    async def test_names_that_are_no_text(self, run: Run, bucket: S3Store) -> None:
        """Do nothing to a terminal, and take one line each."""
        await fill(bucket, "a\x1b[31mred\u202etxt")
        plain = await run("ls", f"s3://{bucket.bucket}")
        ascii_only = await run("ls", f"s3://{bucket.bucket}", charset="ascii")

        for result in (plain, ascii_only):
            (line,) = result.stdout.splitlines()
            assert line.endswith(r"/a\x1b[31mred\u202etxt")
        assert shown("ü 😀\n\x85") == r"ü 😀\n\x85"

    async def test_many(self, run: Run, start: Start, bucket: S3Store) -> None:
        """Pages follow each other; a reader that goes ends it quietly."""
        await fill(bucket, *(f"some/rather/long/name/of/an/object/{n:06}" for n in range(1200)))
        result = await run("ls", f"s3://{bucket.bucket}/some/rather")
        assert result.stderr == "1,200 objects, 4,800 bytes\n"

        process = await start("ls", f"s3://{bucket.bucket}")
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout._transport.close()  # type: ignore[attr-defined]  # no other way
        assert await process.wait() == 141
        assert await process.stderr.read() == b""

    async def test_a_bucket_that_is_missing(self, run: Run, bucket: S3Store) -> None:
        """One line, exit code 1."""
        result = await run("ls", f"s3://no-{bucket.bucket}")

        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("aioblobcol ls: cannot list s3://no-")
        assert len(result.stderr.splitlines()) == 1

    async def test_without_permission(
        self, run: Run, bucket: S3Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One line that names the code, exit code 1."""

        async def refuse(request: Request, forward: Forward) -> bytes:
            return answer("403 Forbidden", "AccessDenied")

        async with s3_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            proxy.rule = refuse
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
            result = await run("ls", f"s3://{bucket.bucket}")

        assert (result.exit_code, result.stdout) == (1, "")
        assert "StoreAccessError" in result.stderr
        assert "AccessDenied" in result.stderr
        assert len(result.stderr.splitlines()) == 1

    async def test_of_nothing(self, run: Run, here: Path) -> None:
        """What is to be listed has to be said."""
        result = await run("ls")

        assert result.exit_code == 2
        assert "what is to be listed?" in told(result)


class TestUrl:
    async def test_leads_to_the_object(self, run: Run, bucket: S3Store) -> None:
        """The URL is on stdout, when it ends on stderr; a browser saves it under the name."""
        (uri,) = await fill(bucket, "ü")
        result = await run("url", uri, "--expires-minutes", "5", "--download-as", "Mai.txt")

        assert result.exit_code == 0
        assert result.stderr.startswith("whoever has it can read the object until 20")
        async with httpx.AsyncClient(trust_env=False) as client:
            response = await client.get(result.stdout.strip())
        assert response.content == b"body"
        assert 'filename="Mai.txt"' in response.headers["content-disposition"]
        assert "X-Amz-Expires=300" in result.stdout

    async def test_of_nothing(self, run: Run, bucket: S3Store) -> None:
        """An object that is not there has no URL."""
        result = await run("url", f"s3://{bucket.bucket}/a")

        assert (result.exit_code, result.stdout) == (1, "")

    @pytest.mark.parametrize("minutes", ["0", "10081", "nan"])
    async def test_that_lives_too_long(self, run: Run, minutes: str) -> None:
        """What no signature allows is refused."""
        result = await run("url", "s3://bucket/a", "--expires-minutes", minutes)

        assert (result.exit_code, result.stdout) == (2, "")


class TestRmWithoutAnApplication:
    async def test_only_says_what(self, run: Run, bucket: S3Store) -> None:
        """Without --delete nothing goes."""
        uris = await fill(bucket, "a", "ü")
        result = await run("rm", *uris, uris[0])

        assert result.exit_code == 0
        assert result.stderr == "Nothing was deleted; --delete does it.\n"
        lines = result.stdout.splitlines()
        assert [line.startswith("would delete  4 bytes  20") for line in lines] == [True] * 2
        assert [line.split()[-1] for line in lines] == uris
        assert set(await contents(bucket)) == {"a", "ü"}

    async def test_deletes(self, run: Run, bucket: S3Store) -> None:
        """With --delete, exactly those."""
        uris = await fill(bucket, "a", "b", "ab")
        result = await run("rm", "--delete", "--bucket", bucket.bucket, uris[0], "b")

        assert (result.exit_code, result.stderr) == (0, "")
        assert [line.split()[0] for line in result.stdout.splitlines()] == ["deleted"] * 2
        assert set(await contents(bucket)) == {"ab"}

    @pytest.mark.parametrize(
        ("key", "reason"),
        [
            ("missing", "it is not there"),
            (f"x/{ID}", "only with --app it can be told"),
            (f"x/col=a/md5={7:032x}", "only with --app it can be told"),
            ("app/.aioblobcol-owner", "it says whose the prefix is"),
            ("app/sub/thing", "app/ belongs to a database"),
        ],
    )
    async def test_what_is_refused(self, run: Run, bucket: S3Store, key: str, reason: str) -> None:
        """What may be a row's, or cannot be; none of the others is deleted then."""
        await fill(bucket, "good", f"x/{ID}", "app/.aioblobcol-owner", "app/sub/thing")
        result = await run("rm", "--delete", "--bucket", bucket.bucket, "good", key)

        assert (result.exit_code, result.stdout) == (1, "")
        refusal, end = result.stderr.splitlines()
        assert f"{key} is not deleted: " in refusal
        assert reason in refusal
        assert end == "Nothing was deleted."
        assert len(await contents(bucket)) == 4

    async def test_put_beside_an_owners_marker(self, run: Run, bucket: S3Store, here: Path) -> None:
        """An application's prefix is known by its marker, though the application is not."""
        (here / "a").write_bytes(b"1")
        await fill(bucket, "app/.aioblobcol-owner")
        refused = await run("put", "a", f"s3://{bucket.bucket}/app/b/c/")
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "app/ belongs to the database of an application" in told(refused)

        assert (await run("put", "a", f"s3://{bucket.bucket}/apple/")).exit_code == 0
        await fill(bucket, ".aioblobcol-owner")
        assert (await run("put", "a", f"s3://{bucket.bucket}/pear/")).exit_code == 2

    @pytest.mark.parametrize("method", ["HEAD", "DELETE", "POST"])
    async def test_what_the_server_refuses(
        self, run: Run, bucket: S3Store, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        """Is told with its reason, a line for each; exit code 1."""
        uris = await fill(bucket, *("abc" if method == "POST" else "a"))

        async def refuse(request: Request, forward: Forward) -> bytes:
            if request.method == method:
                return answer("403 Forbidden", "AccessDenied")
            return await forward()

        async with s3_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            proxy.rule = refuse
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
            result = await run("rm", "--delete", *uris)

        assert (result.exit_code, result.stdout) == (1, "")
        told = [line for line in result.stderr.splitlines() if " is not deleted: " in line]
        assert len(told) == len(uris)
        assert len(await contents(bucket)) == len(uris)


class Operated:
    """An application with a journal, and the command line on it."""

    def __init__(self, journaled: Journaled, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
        self.journaled = journaled
        self.store = journaled.store
        self._monkeypatch = monkeypatch
        self._run = run

    def put(self, uri: str, *, is_old: bool = True) -> str:
        """Store an object past everything."""
        at = LONG_AGO if is_old else datetime.now(timezone.utc)
        self.store.objects[uri] = StoredObject(b"body", {}, {}, modified_at=at)
        return uri

    async def run(self, *arguments: str, **changes: Any) -> Result:
        """Run a command with an engine of its own."""
        given: dict[str, Any] = {
            "engine": self.journaled.database.engine_with(),
            "stores": self.store,
            "metadata": self.journaled.journal.table.metadata,
            "journal": self.journaled.journal,
            **changes,
        }
        self._monkeypatch.setitem(sys.modules, "shop", SimpleNamespace(blobs=BlobApp(**given)))
        self._monkeypatch.setenv("AIOBLOBCOL_APP", "shop:blobs")
        return await self._run(*arguments)


@pytest_asyncio.fixture
async def operated(
    database: Database, monkeypatch: pytest.MonkeyPatch, run: Run, here: Path
) -> AsyncIterator[Operated]:
    """Give two live rows with three objects, in a prefix that their database owns."""
    async with open_journaled(database, MemoryStore()) as journaled:
        operated = Operated(journaled, monkeypatch, run)
        for name in "abc":
            operated.put(journaled.uri(name))
        assert (await operated.run("claim")).exit_code == 0
        yield operated


class TestWithAnApplication:
    @pytest.mark.parametrize(
        ("name", "column"),
        [("a", "body"), ("b", "scan"), ("c", "URL")],
        ids=["text", "json", "uri"],
    )
    async def test_what_a_row_names(self, operated: Operated, name: str, column: str) -> None:
        """Is not deleted; the column is named."""
        uri = operated.journaled.uri(name)
        result = await operated.run("rm", "--delete", uri)

        assert (result.exit_code, result.stdout) == (1, "")
        assert f"{uri} is not deleted: journaled docs.{column} names it" in result.stderr
        assert uri in operated.store.objects

    @pytest.mark.parametrize(
        ("state", "reason"),
        [
            ("staged", "its transaction may be under way"),
            ("retired", "lists it as retired: its worker deletes it"),
            ("deleting", "lists it as deleting: its worker deletes it"),
        ],
    )
    async def test_what_the_journal_lists(
        self, operated: Operated, state: str, reason: str
    ) -> None:
        """Is the worker's."""
        uri = operated.put(operated.journaled.uri("d"))
        await operated.journaled.stage("d")
        async with operated.journaled.database.engine.begin() as connection:
            table = operated.journaled.journal.table
            await connection.execute(sa.update(table).values(state=state))
        result = await operated.run("rm", "--delete", uri)

        assert (result.exit_code, result.stdout) == (1, "")
        assert reason in result.stderr
        assert uri in operated.store.objects

    async def test_what_nobody_names(self, operated: Operated) -> None:
        """Is left to the check, which excludes that a row takes it in the same moment."""
        uri = operated.put(operated.journaled.uri("e"))
        result = await operated.run("rm", "--delete", uri)

        assert result.exit_code == 1
        assert "`aioblobcol check --delete` sees to it that none will" in result.stderr
        assert uri in operated.store.objects

    async def test_what_the_library_has_not_made(self, operated: Operated) -> None:
        """May go when it is old enough, for the journal lets no row adopt it."""
        old = operated.put("s3://bucket/prefix/readme.txt")
        young = operated.put("s3://bucket/prefix/new.txt", is_old=False)
        refused = await operated.run("rm", "--delete", old, young)
        assert "younger than 24 hours" in refused.stderr
        assert {old, young} <= set(operated.store.objects)

        result = await operated.run("rm", "--delete", old, young, "--min-age-hours", "0")
        assert (result.exit_code, result.stderr) == (0, "")
        assert {old, young}.isdisjoint(operated.store.objects)
        assert len(operated.store.objects) == 4  # the rows', and the marker

    async def test_a_row_that_comes_in_between(
        self, operated: Operated, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The rows are asked again right before the delete."""
        named = operated.put("s3://bucket/prefix/seeds.txt")
        free = operated.put("s3://bucket/prefix/free.txt")
        journaled = operated.journaled
        loop = asyncio.get_running_loop()  # the command has another one
        judge = Removal.judge

        async def judge_and_wait(self: Removal, uris: Any) -> Any:
            found = await judge(self, uris)
            update = journaled.run(f"UPDATE <docs> SET \"URL\" = '{named}' WHERE name = 'p'")  # noqa: S608
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(update, loop))
            return found

        monkeypatch.setattr(Removal, "judge", judge_and_wait)
        result = await operated.run("rm", "--delete", named, free)

        assert result.exit_code == 1
        assert f"{named} is not deleted: journaled docs.URL names it" in result.stderr
        assert free in result.stdout
        assert named in operated.store.objects
        assert free not in operated.store.objects

    async def test_a_copy_of_the_database(self, operated: Operated) -> None:
        """What another database owns is not deleted, whatever the rows here say."""
        uri = operated.put("s3://bucket/prefix/readme.txt")
        assert (await operated.run("disown")).exit_code == 0
        result = await operated.run("rm", "--delete", uri)

        assert (result.exit_code, result.stdout) == (1, "")
        assert "was given up by `aioblobcol disown`" in result.stderr
        assert uri in operated.store.objects

    async def test_a_prefix_within(self, operated: Operated) -> None:
        """Another owner's marker further down keeps what is beside it."""
        operated.put("s3://bucket/prefix/staging/.aioblobcol-owner")
        uri = operated.put("s3://bucket/prefix/staging/x/readme.txt")
        result = await operated.run("rm", "--delete", uri)

        assert (result.exit_code, result.stdout) == (1, "")
        assert "s3://bucket/prefix/staging/ belongs to a database" in result.stderr

    async def test_a_marker_that_cannot_be_read(self, operated: Operated) -> None:
        """On doubt nothing is deleted."""
        uri = operated.put("s3://bucket/prefix/x/readme.txt")
        operated.store.fail("head", containing="/x/.aioblobcol-owner")
        result = await operated.run("rm", "--delete", uri)

        assert (result.exit_code, result.stdout) == (1, "")
        assert "it cannot be told whether a database owns the prefix" in result.stderr
        assert uri in operated.store.objects

    async def test_its_marker(self, operated: Operated) -> None:
        """Is neither deleted nor written by hand."""
        marker = "s3://bucket/prefix/.aioblobcol-owner"
        result = await operated.run("rm", "--delete", marker)

        assert result.exit_code == 1
        assert "see `aioblobcol claim`" in result.stderr
        assert marker in operated.store.objects

    async def test_put_under_its_prefix(self, operated: Operated, here: Path) -> None:
        """Is refused, for nothing would name it; beside it, it is not."""
        (here / "a").write_bytes(b"1")
        refused = await operated.run("put", "a", "s3://bucket/prefix/x/")
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "one that no row names is an orphan" in told(refused)
        assert "Blob(Path(" in told(refused)

        beside = await operated.run("put", "a", "s3://bucket/prefixed/x/")
        assert (beside.exit_code, beside.stdout) == (0, "s3://bucket/prefixed/x/a\n")
        assert operated.store.objects["s3://bucket/prefixed/x/a"].body == b"1"

    async def test_reading(self, operated: Operated, here: Path) -> None:
        """Its stores know where they are: URIs are all that is needed."""
        uri = operated.journaled.uri("a")
        listed = await operated.run("ls")
        assert listed.stderr.startswith("4 objects, ")
        assert uri in listed.stdout
        assert (await operated.run("get", uri, "file")).exit_code == 0
        assert (here / "file").read_bytes() == b"body"
        url = await operated.run("url", uri)
        assert url.stdout.startswith("memory://bucket/prefix/")

    async def test_a_prefix_of_it(self, operated: Operated) -> None:
        """A part of a store is listed; what is outside is refused, and so are other buckets."""
        inside = await operated.run("ls", "s3://bucket/prefix/x/")
        assert len(inside.stdout.splitlines()) == 3
        assert (await operated.run("ls", "s3://bucket/prefix")).exit_code == 0
        for prefix in ("s3://bucket", "s3://bucket/pre", "s3://other/prefix/"):
            outside = await operated.run("ls", prefix)
            assert (outside.exit_code, outside.stdout) == (2, "")
            assert "leave --app out" in told(outside)
        for command in (("get", "s3://other/a"), ("rm", "s3://bucket/b"), ("url", "s3://other/a")):
            refused = await operated.run(*command)
            assert (refused.exit_code, "leave --app out" in told(refused)) == (2, True)

    async def test_other_options(self, operated: Operated) -> None:
        """What the stores know is not said twice."""
        result = await operated.run("ls", "--endpoint-url", "http://127.0.0.1:1")

        assert result.exit_code == 2
        assert "the application's stores say that already" in told(result)

    async def test_that_is_left_out(
        self, run: Run, bucket: S3Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An empty --app goes without the one that the environment names."""
        await fill(bucket, "a")
        monkeypatch.setenv("AIOBLOBCOL_APP", "no_such_module:blobs")
        assert (await run("ls", f"s3://{bucket.bucket}")).exit_code == 2

        result = await run("ls", f"s3://{bucket.bucket}", "--app", "")
        assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1)

    async def test_without_a_journal(
        self, database: Database, monkeypatch: pytest.MonkeyPatch, run: Run, here: Path
    ) -> None:
        """What is old and in no row may go; what a row names stays."""
        metadata, store = sa.MetaData(), MemoryStore()
        table = sa.Table(
            "plain_docs",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("url", sa.Text),
            sa.Column("other", sa.Text),
        )
        async with database.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        named, orphan, young = (f"s3://bucket/prefix/{n}/{ID}" for n in range(3))
        for uri in (named, orphan, young):
            at = datetime.now(timezone.utc) if uri is young else LONG_AGO
            store.objects[uri] = StoredObject(b"1", {}, {}, modified_at=at)
        async with database.engine.begin() as connection:
            await connection.execute(sa.insert(table).values(url=named, other=named))

        async def call(*arguments: str) -> Result:
            blobs = BlobApp(
                engine=database.engine_with(),
                stores=store,
                metadata=metadata,
                uri_columns=[table.c.url, table.c.other],
            )
            monkeypatch.setitem(sys.modules, "shop", SimpleNamespace(blobs=blobs))
            return await run(*arguments, "--app", "shop:blobs")

        refused = await call("rm", "--delete", named, orphan, young)
        assert refused.exit_code == 1
        assert "plain_docs.other and plain_docs.url name it" in refused.stderr
        assert "younger than 24 hours" in refused.stderr
        assert len(store.objects) == 3
        result = await call("rm", "--delete", orphan)
        assert (result.exit_code, result.stderr) == (0, "")
        assert set(store.objects) == {named, young}
        async with database.engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)
        gone = await call("rm", "--delete", young, "--min-age-hours", "0")
        assert (gone.exit_code, gone.stdout) == (1, "")  # nobody knows what the rows said
        assert young in store.objects


class TestBars:
    """On a terminal there is a bar while bytes travel, and nowhere else."""

    async def shown_by(self, start: Start, *arguments: str) -> tuple[int, str]:
        """Return the exit code, and what stderr's terminal shows."""
        main, end = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
        process = await start(*arguments, stderr=end, env=environment)
        os.close(end)
        await process.communicate()
        shown = b""
        try:
            while chunk := os.read(main, 65536):
                shown += chunk
        except OSError:  # how Linux tells the end
            pass
        os.close(main)
        return process.returncode or 0, shown.decode()

    async def test_on_a_terminal(self, start: Start, bucket: S3Store, here: Path) -> None:
        """Name, bytes of how many, and speed; it goes at the end."""
        (here / "large[1]").write_bytes(LARGE)
        uri = f"s3://{bucket.bucket}/large"
        for arguments in (("put", "large[1]", uri), ("get", uri)):
            code, text = await self.shown_by(start, *arguments)
            assert code == 0
            assert "large" in text
            assert "8.0/8.0 MiB" in text
            assert text.splitlines()[-1].endswith(("content type", "/large"))

    async def test_quiet(self, start: Start, bucket: S3Store, here: Path) -> None:
        """Nothing at all."""
        (uri,) = await fill(bucket, "a")

        assert await self.shown_by(start, "get", uri, "--quiet") == (0, "")


class TestHelp:
    @pytest.mark.parametrize("name", ["put", "get", "ls", "rm", "url"])
    async def test_teaches(self, run: Run, name: str) -> None:
        """Each command has examples, whose options are its own."""
        command = typer.main.get_group(command_line).commands[name]
        result = await run(name, "--help")

        assert result.exit_code == 0
        assert f"aioblobcol {name}" in str(command.epilog)
        known = {option for each in command.params for option in each.opts}
        for text in str(command.epilog).split("`")[1::2]:
            if text.startswith(f"aioblobcol {name} "):
                mine = text.partition(" | ")[0].split()
                assert {word for word in mine if word.startswith("--")} <= known

    async def test_options_read_alike(self, run: Run) -> None:
        """All of them say where in the same words."""
        for name in ("put", "get", "ls", "rm", "url"):
            options = {
                each.name for each in typer.main.get_group(command_line).commands[name].params
            }
            assert {"app_name", "bucket", "endpoint_url", "region", "compat"} <= options
