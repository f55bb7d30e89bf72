"""The demo: what it prints, what it leaves behind, and how it fails."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import struct
import sys
import threading
import uuid
import zlib
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from support.s3_proxy import Forward, Request, answer, s3_proxy

from aioblobcol import S3Store
from aioblobcol.cli._commands import app
from aioblobcol.cli._running import run_in_loop
from aioblobcol.cli._samples import picture
from aioblobcol.cli._scenarios import SCENARIOS, Base, Scene, play
from aioblobcol.testing import MemoryStore, S3Server, Step

TITLES = ["create fails", "create succeeds", "update fails", "update succeeds", "delete succeeds"]
DEMO = ("-m", "aioblobcol.cli", "demo")


@dataclasses.dataclass(frozen=True)
class Finished:
    """A process that ended."""

    code: int
    out: str
    err: str


async def start(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


async def finish(process: asyncio.subprocess.Process) -> Finished:
    out, err = await process.communicate()
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(), err.decode())


async def run(*arguments: str, **environment: str) -> Finished:
    return await finish(await start(*arguments, **environment))


def on(server: S3Server) -> dict[str, str]:
    """Return the environment in which the demo has the server's credentials."""
    given = server.client_arguments
    return {
        "AWS_ACCESS_KEY_ID": given["aws_access_key_id"],
        "AWS_SECRET_ACCESS_KEY": given["aws_secret_access_key"],
    }


async def tables_of(url: str) -> list[str]:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        names = await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names())
    await engine.dispose()
    return [name for name in names if name.startswith("aioblobcol_demo")]


async def keys_in(store: S3Store) -> list[str]:
    """Return every key of the bucket, whatever its prefix."""
    page = await store.client.list_objects_v2(Bucket=store.bucket)
    return [each["Key"] for each in page.get("Contents", ())]


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> Finished:
    """Run the command in this process, which is faster than another Python."""
    with pytest.raises(SystemExit) as ended:
        app(["demo", *arguments], prog_name="aioblobcol")
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return Finished(ended.value.code, captured.out, captured.err)


class TestSuccess:
    async def test_runs_on_embedded_defaults(self) -> None:
        """Without options the five scenarios hold, readable in 80 columns; the exit code is 0."""
        ended = await run(*DEMO)

        assert (ended.code, ended.err) == (0, "")
        for number, title in enumerate(TITLES, start=1):
            assert f"{number} of 5: {title}" in ended.out
        assert "All 5 scenarios held" in ended.out
        assert "BAD" not in ended.out
        assert "\x1b" not in ended.out
        assert max(len(line) for line in ended.out.splitlines()) <= 80
        # the old objects survive a failing update, and the new ones are gone
        scene = ended.out.partition("3 of 5")[2].partition("4 of 5")[0]
        assert scene.count("│ kept") == 2
        assert scene.count("│ uploaded, deleted again") == 2
        assert "put.guard(Task)" in scene

    async def test_runs_on_real_servers_and_leaves_nothing(
        self, s3_store: S3Store, s3: S3Server, postgres_url: str
    ) -> None:
        """On PostgreSQL and a bucket of one's own, only the demo's own things come and go."""
        await s3_store.client.put_object(
            Bucket=s3_store.bucket, Key="aioblobcol-demo/somebody", Body=b"else's"
        )

        ended = await run(
            *DEMO,
            *("--database-url", postgres_url),
            *("--s3-endpoint", s3.endpoint_url, "--bucket", s3_store.bucket),
            *("--region", "us-east-1"),
            **on(s3),
        )

        assert (ended.code, ended.err) == (0, "")
        assert "All 5 scenarios held" in ended.out
        assert await tables_of(postgres_url) == []
        assert await keys_in(s3_store) == ["aioblobcol-demo/somebody"]

    def test_tells_its_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        """``--version`` prints name and version."""
        with pytest.raises(SystemExit, match="0"):
            app(["--version"], prog_name="aioblobcol")

        assert capsys.readouterr().out == f"aioblobcol {version('aioblobcol')}\n"


class TestBrokenInvariant:
    async def test_makes_the_demo_fail(self, s3_store: S3Store, s3: S3Server) -> None:
        """Where S3 refuses deletes, the demo names the orphans and the exit code is 1."""

        async def refuse_deletes(request: Request, forward: Forward) -> bytes:
            if request.method == "DELETE" or request.is_bulk_delete:
                return answer("403 Forbidden", "AccessDenied")
            return await forward()

        async with s3_proxy(s3.endpoint_url) as proxy:
            proxy.rule = refuse_deletes
            ended = await run(
                *DEMO,
                *("--s3-endpoint", proxy.endpoint_url, "--bucket", s3_store.bucket),
                **on(s3),
            )

        assert ended.code == 1
        assert "BAD not so: every object that a row names is there, and no other" in ended.out
        assert "LEAK" in ended.out
        assert "an invariant does not hold in 'create fails'" in ended.err
        assert "objects may be left under s3://" in ended.err
        assert "Traceback" not in ended.err

    @pytest_asyncio.fixture
    async def engine(self, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'demo.db'}")
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield engine
        await engine.dispose()

    async def play_until_a_problem(self, engine: AsyncEngine, store: MemoryStore) -> Scene:
        for scenario in SCENARIOS:
            scene = await play(scenario, engine=engine, store=store)
            if scene.problems:
                break
        return scene

    async def test_nothing_is_found_where_nothing_is_wrong(
        self, engine: AsyncEngine, memory_store: MemoryStore
    ) -> None:
        """The scenarios find no problem on a store that works."""
        scene = await self.play_until_a_problem(engine, memory_store)

        assert (scene.title, scene.problems) == ("delete succeeds", ())

    async def test_a_lost_object_is_found(
        self, engine: AsyncEngine, memory_store: MemoryStore
    ) -> None:
        """A store that forgets an object after it took it is found out."""

        def forget(step: Step) -> None:
            if step.operation == "put" and step.stage == "after":
                del memory_store.objects[step.uri]

        memory_store.hooks.append(forget)

        scene = await self.play_until_a_problem(engine, memory_store)

        assert scene.title == "create succeeds"
        assert any("LOSS" in problem for problem in scene.problems)

    async def test_wrong_bytes_are_found(
        self, engine: AsyncEngine, memory_store: MemoryStore
    ) -> None:
        """A store that returns other bytes than it was given is found out."""

        def spoil(step: Step) -> None:
            if step.operation == "put" and step.stage == "after":
                stored = memory_store.objects[step.uri]
                memory_store.objects[step.uri] = dataclasses.replace(stored, body=b"spoiled")

        memory_store.hooks.append(spoil)

        scene = await self.play_until_a_problem(engine, memory_store)

        assert scene.title == "create succeeds"
        assert any("other bytes" in problem for problem in scene.problems)

    async def test_a_superseded_object_that_stays_is_found(
        self, engine: AsyncEngine, memory_store: MemoryStore
    ) -> None:
        """A store that keeps what an update superseded is found out."""
        for scenario in SCENARIOS[:3]:
            assert (await play(scenario, engine=engine, store=memory_store)).problems == ()
        memory_store.fail("delete")

        scene = await play(SCENARIOS[3], engine=engine, store=memory_store)

        assert any("LEAK" in problem for problem in scene.problems)


class TestExpectedErrors:
    @pytest.fixture
    def credentials(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
        for name, value in on(s3).items():
            monkeypatch.setenv(name, value)
        return s3

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--database-url", "nonsense"], "--database-url"),
            (["--database-url", "postgresql://u:hidden@h/d"], "asynchronous driver"),
            (["--s3-endpoint", "http://127.0.0.1:9000"], "--bucket"),
            (["--s3-endpoint", "127.0.0.1:9000", "--bucket", "bucket"], "--s3-endpoint"),
            (["--bucket", ""], "--bucket"),
            (["--prefix", "a\nb"], "--prefix"),
            (["--no-such-option"], "--no-such-option"),
        ],
    )
    def test_unusable_options_are_refused(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
    ) -> None:
        """An unusable option is named, and the exit code is 2."""
        ended = run_here(capsys, *arguments)

        assert (ended.code, ended.out) == (2, "")
        assert said in ended.err
        assert "hidden" not in ended.err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (
                ["--database-url", "postgresql+asyncpg://u:hidden@127.0.0.1:1/d"],
                "cannot use the database postgresql+asyncpg://u:***@127.0.0.1:1/d",
            ),
            (["--database-url", "sqlite+aiosqlite:////no/such/file.db"], "cannot use the database"),
            (["--database-url", "mysql+aiomysql://u:hidden@h/d"], "the module aiomysql is missing"),
            (
                ["--s3-endpoint", "http://127.0.0.1:1", "--bucket", "bucket"],
                "cannot use the bucket 'bucket' at http://127.0.0.1:1",
            ),
        ],
    )
    def test_servers_that_cannot_be_used_are_named(
        self,
        capsys: pytest.CaptureFixture[str],
        credentials: S3Server,
        arguments: list[str],
        said: str,
    ) -> None:
        """A database or S3 out of reach is one line on stderr without passwords, and code 1."""
        ended = run_here(capsys, *arguments)

        assert (ended.code, ended.out) == (1, "")
        assert said in ended.err
        assert len(ended.err.splitlines()) == 1
        assert "hidden" not in ended.err

    def test_a_missing_bucket_is_named(
        self, capsys: pytest.CaptureFixture[str], credentials: S3Server
    ) -> None:
        """A bucket that does not exist is one line on stderr, and code 1."""
        bucket = f"missing-{uuid.uuid4().hex}"

        ended = run_here(capsys, "--s3-endpoint", credentials.endpoint_url, "--bucket", bucket)

        assert ended.code == 1
        assert f"cannot use the bucket {bucket!r}" in ended.err
        assert "NoSuchBucket" in ended.err
        assert len(ended.err.splitlines()) == 1

    @pytest.mark.parametrize("module", ["typer", "rich"])
    async def test_missing_packages_are_one_line(self, module: str) -> None:
        """Without Typer or rich the command says what to install."""
        ended = await run(
            "-c",
            f"import sys; sys.modules[{module!r}] = None\nfrom aioblobcol.cli import main\nmain()",
        )

        assert ended.code == 1
        assert 'pip install "aioblobcol[demo]"' in ended.err
        assert len(ended.err.splitlines()) == 1

    async def test_an_interrupted_demo_tidies_up(
        self, s3_store: S3Store, s3: S3Server, tmp_path: Path
    ) -> None:
        """Ctrl-C during an upload leaves no object and no table, and the exit code is 130."""
        uploading, interrupted = asyncio.Event(), asyncio.Event()

        async def hold_uploads(request: Request, forward: Forward) -> bytes:
            if request.method == "PUT":
                uploading.set()
                await interrupted.wait()
            return await forward()

        url = f"sqlite+aiosqlite:///{tmp_path / 'demo.db'}"
        async with s3_proxy(s3.endpoint_url) as proxy:
            proxy.rule = hold_uploads
            process = await start(
                *DEMO,
                *("--s3-endpoint", proxy.endpoint_url, "--bucket", s3_store.bucket),
                *("--database-url", url),
                **on(s3),
            )
            await uploading.wait()
            process.send_signal(signal.SIGINT)
            interrupted.set()
            ended = await finish(process)

        assert ended.code == 130
        assert ended.err == "aioblobcol demo: interrupted, and tidied up\n"
        assert await keys_in(s3_store) == []
        assert await tables_of(url) == []


class TestSamples:
    def test_the_picture_is_a_png(self) -> None:
        """The picture's chunks have the right checksums and as many pixels as they say."""
        data = picture(version=1, width=7, height=5)
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        position, chunks = 8, {}
        while position < len(data):
            (size,) = struct.unpack(">I", data[position : position + 4])
            body = data[position + 4 : position + 8 + size]
            (checksum,) = struct.unpack(">I", data[position + 8 + size : position + 12 + size])
            assert checksum == zlib.crc32(body)
            chunks[body[:4]] = body[4:]
            position += 12 + size

        assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
        assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (7, 5)
        assert len(zlib.decompress(chunks[b"IDAT"])) == 5 * (1 + 3 * 7)


class TestTheLoop:
    def test_is_closed_after_the_threads_that_post_to_it(self) -> None:
        """A driver's thread that is not waited for can still post to the loop as it ends."""
        posted: list[bool] = []

        async def leave_a_thread() -> None:
            loop, task, is_over = (
                asyncio.get_running_loop(),
                asyncio.current_task(),
                threading.Event(),
            )
            assert task is not None
            task.add_done_callback(lambda _: is_over.set())

            def post() -> None:
                is_over.wait()
                sum(range(1_000_000))  # longer than it takes to close a loop
                posted.append(not loop.is_closed())

            threading.Thread(target=post).start()

        run_in_loop(leave_a_thread())

        assert posted == [True]
