"""``aioblobcol check``: what operators see, and what programs read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import sys
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase

from aioblobcol import Blob, BlobApp, InvalidInputError, blob_sessionmaker, open_store
from aioblobcol._check import FindingKind, KeyRange
from aioblobcol.cli._check_state import CheckState
from aioblobcol.cli._servers import UsageError
from aioblobcol.testing import MemoryStore, S3Server

MODULE = """
import os
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from aioblobcol import Blob, BlobApp, BlobType, open_store

class Base(DeclarativeBase):
    pass

class Task(Base):
    __tablename__ = "tasks"
    name: Mapped[str] = mapped_column(primary_key=True)
    html: Mapped[Blob | None] = mapped_column(BlobType())

engine = create_async_engine(f"sqlite+aiosqlite:///{os.environ['DATABASE']}")
store = open_store(
    bucket=os.environ["BUCKET"], prefix="app", endpoint_url=os.environ["ENDPOINT"],
    region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test",
)
blobs = BlobApp(engine=engine, stores={"default": store, "the same": store}, metadata=Base.metadata)
"""

KINDS = (FindingKind.DANGLING, FindingKind.ORPHAN)

pytestmark = pytest.mark.slow  # a process for each test

Run = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest_asyncio.fixture
async def run(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in a directory with an application, and return code, output and errors."""
    bucket = f"check-{uuid.uuid4().hex}"
    await s3.create_bucket(bucket)
    (tmp_path / "shop_models.py").write_text(MODULE)
    (tmp_path / "broken_models.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.setenv("DATABASE", str(tmp_path / "shop.db"))
    monkeypatch.setenv("BUCKET", bucket)
    monkeypatch.setenv("ENDPOINT", s3.endpoint_url)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shop_models", raising=False)

    async def call(*arguments: str, **more: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "aioblobcol.cli", "check"),
            *arguments,
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **more},
        )
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    return call


ENDED = """
import asyncio
import signal
import aioblobcol._check._check as check

if "SIGNAL" in os.environ:  # not in the tests' own process, which imports this, too
    check.PROGRESS_EVERY = 1
all_of_it = store.iter_objects

async def iter_objects(*, start_after=""):
    number = 0
    async for each in all_of_it(start_after=start_after):
        yield each
        number += 1
        if number == 3 and "SIGNAL" in os.environ:
            os.kill(os.getpid(), signal.Signals[os.environ["SIGNAL"]])
            await asyncio.sleep(3600)

store.iter_objects = iter_objects
"""

JOURNAL = """
from aioblobcol import Journal

class Missing(Journal):
    def missing_triggers(self, connection):
        return ["tasks", "pages"]

journal = Missing(Base.metadata, store)
blobs = BlobApp(engine=engine, stores=store, metadata=Base.metadata, journal=journal)
"""


def read_all(terminal: int) -> str:
    """Return what was written to a terminal until its other end was closed."""
    shown = b""
    with contextlib.suppress(OSError):  # how Linux tells the end
        while chunk := os.read(terminal, 65536):
            shown += chunk
    os.close(terminal)
    return shown.decode()


async def fill(*names: str) -> list[str]:
    """Commit rows with a blob each, and return the URIs."""
    import shop_models  # type: ignore[import-not-found]  # noqa: PLC0415 - the fixture wrote it

    async with shop_models.store, shop_models.engine.begin() as connection:
        await connection.run_sync(shop_models.Base.metadata.create_all)
    uris = []
    async with shop_models.store:
        session_maker = blob_sessionmaker(shop_models.engine, shop_models.store)
        async with session_maker.begin() as session:
            tasks = [shop_models.Task(name=name, html=Blob(name.encode())) for name in names]
            session.add_all(tasks)
            await session.flush()
            uris = [task.html.uri for task in tasks]
    await shop_models.engine.dispose()
    return uris


async def forget(name: str) -> None:
    """Delete a row behind the library's back."""
    import shop_models  # noqa: PLC0415 - the fixture wrote it

    async with shop_models.engine.begin() as connection:
        await connection.execute(sa.text("DELETE FROM tasks WHERE name = :name"), {"name": name})
    await shop_models.engine.dispose()


class TestOutput:
    async def test_stores_that_agree(self, run: Run) -> None:
        """A summary, and exit code 0; a store that is there twice is looked at once."""
        await fill("a", "b")
        code, out, err = await run("--app", "shop_models:blobs")

        assert (code, err) == (0, "")
        assert out.splitlines()[-1].endswith("app/: 2 objects, 2 cells: nothing wrong")
        assert len(out.splitlines()) == 1

    async def test_findings(self, run: Run) -> None:
        """A line for each, and exit code 1; the application's name may come by environment."""
        first, second = await fill("a", "b")
        await forget("a")
        import shop_models  # noqa: PLC0415 - the fixture wrote it

        async with shop_models.store:
            await shop_models.store.delete_many([second])
        code, out, err = await run("--min-age-hours", "0", AIOBLOBCOL_APP="shop_models:blobs")

        assert code == 1
        *findings, summary = out.splitlines()
        assert {tuple(line.split()[:2]) for line in findings} == {
            ("orphan", first),
            ("dangling", second),
        }
        assert "1 orphan" in summary
        assert "1 dangling" in summary
        meanings = [f"{kind.value}: {kind.meaning}" for kind in KINDS]
        assert err.splitlines() == meanings  # the worst first

    async def test_what_is_young(self, run: Run) -> None:
        """By default an object of today is no orphan."""
        await fill("a")
        await forget("a")
        code, out, _ = await run("--app", "shop_models:blobs")

        assert code == 0
        assert "1 objects, 0 cells: nothing wrong" in out

    async def test_for_programs(self, run: Run) -> None:
        """JSON lines: findings with all that is known, the summary last."""
        first, _ = await fill("a", "b")
        await forget("a")
        arguments = ("--app", "shop_models:blobs", "--json", "--min-age-hours", "0")
        code, out, _ = await run(*arguments)

        assert code == 1
        finding, summary = map(json.loads, out.splitlines())
        assert (finding["kind"], finding["uri"], finding["size"]) == ("orphan", first, 1)
        assert finding["modified_at"].startswith("20")
        counts = summary["summary"]
        assert (counts["objects"], counts["cells"], counts["orphan"]) == (2, 1, 1)

    async def test_a_terminal_that_knows_ascii_only(self, run: Run) -> None:
        """What it cannot show is escaped, and nothing is lost of the report."""
        import shop_models  # noqa: PLC0415 - the fixture wrote it

        await fill("a")
        async with shop_models.store as store:
            key = f"app/ü/id={1:032x}"
            await store.client.put_object(Bucket=store.bucket, Key=key, Body=b"1")
        for more in ((), ("--json",)):
            arguments = ("--app", "shop_models:blobs", "--min-age-hours", "0", *more)
            code, out, err = await run(*arguments, PYTHONIOENCODING="ascii")

            assert code == 1
            assert "Traceback" not in err
            assert out.isascii()
            assert "app/\\" in out

    async def test_deleting(self, run: Run) -> None:
        """Orphans go, what is deleted is not wrong any more, and a second look finds nothing."""
        await fill("a", "b")
        await forget("a")
        arguments = ("--app", "shop_models:blobs", "--min-age-hours", "0")
        code, out, _ = await run(*arguments, "--delete")

        assert code == 0
        assert "1 orphan, 1 deleted" in out
        code, out, _ = await run(*arguments)
        assert code == 0
        assert "1 objects, 1 cells: nothing wrong" in out


class TestState:
    """A file that keeps how far a check is."""

    @pytest.fixture
    def arguments(self, tmp_path: Path) -> tuple[str, ...]:
        path = str(tmp_path / "check.json")
        return ("--app", "shop_models:blobs", "--min-age-hours", "0", "--state", path)

    def root(self) -> str:
        return f"s3://{os.environ['BUCKET']}/app/"

    def kept(self, tmp_path: Path) -> CheckState:
        """Give the state of the checks of these tests."""
        options = {
            "app": "shop_models:blobs",
            "database": f"sqlite+aiosqlite:///{os.environ.get('DATABASE')}",
            "delete": False,
            "min_age_hours": 0.0,
        }
        return CheckState(tmp_path / "check.json", options)

    async def test_goes_when_all_is_done(
        self, run: Run, arguments: tuple[str, ...], tmp_path: Path
    ) -> None:
        """A check that comes to its end leaves nothing, whatever it has found."""
        await fill("a", "b")
        await forget("a")
        code, out, err = await run(*arguments, "--jobs", "3")

        assert code == 1
        assert "1 orphan" in out
        assert "going on" not in err
        assert not (tmp_path / "check.json").exists()

    async def test_goes_on(self, run: Run, arguments: tuple[str, ...], tmp_path: Path) -> None:
        """Only what is left is looked at; what was wrong before still makes the exit code 1."""
        first, second, third = sorted(await fill("a", "b", "c"))
        for name in "abc":
            await forget(name)
        left = [KeyRange(first, second), KeyRange(third, None)]
        self.kept(tmp_path).note(self.root(), left, wrong=1)
        code, out, err = await run(*arguments, "--json")

        assert code == 1
        finding, summary = map(json.loads, out.splitlines()[1:])
        assert finding["uri"] == second
        assert summary["summary"]["found_before"] == 1
        assert summary["summary"]["objects"] == 1
        assert "1 found before are not printed again" in err

        self.kept(tmp_path).note(self.root(), [KeyRange(third, None)], wrong=1)
        code, out, _ = await run(*arguments)
        assert code == 1
        assert out.endswith("0 objects, 0 cells: 1 found before\n")

    @pytest.mark.parametrize(("name", "expected"), [("SIGINT", 130), ("SIGKILL", -9)])
    async def test_is_there_after(
        self, run: Run, arguments: tuple[str, ...], tmp_path: Path, name: str, expected: int
    ) -> None:
        """However a check is ended, the next one goes on, and both together find everything."""
        with (tmp_path / "shop_models.py").open("a") as module:
            module.write(ENDED)
        uris = await fill("a", "b", "c", "d")
        for each in "abcd":
            await forget(each)
        code, out, err = await run(*arguments, "--json", SIGNAL=name)
        before = [json.loads(line)["uri"] for line in out.splitlines()]

        assert code == expected
        assert "Traceback" not in err
        assert len(before) < len(uris)
        assert (tmp_path / "check.json").exists()
        if expected == 130:
            assert "run it again" in err

        code, out, _ = await run(*arguments, "--json")
        lines = [json.loads(line) for line in out.splitlines()]
        after = [line["uri"] for line in lines if "uri" in line]
        assert code == 1
        assert {*before, *after} == set(uris)
        assert not (tmp_path / "check.json").exists()

    async def test_stays_when_it_is_stopped(
        self, run: Run, arguments: tuple[str, ...], tmp_path: Path
    ) -> None:
        """After an error the file is there, and the next run takes it up."""
        await fill("a")
        code, _, err = await run(*arguments, BUCKET="no-such-bucket-at-all")
        assert (code, (tmp_path / "check.json").exists()) == (1, True)
        assert "Traceback" not in err

        code, out, _ = await run(*arguments)
        assert code == 0
        assert "1 objects, 1 cells: nothing wrong" in out
        assert not (tmp_path / "check.json").exists()

    @pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1, "stores": 3}'])
    def test_that_is_none(self, tmp_path: Path, text: str) -> None:
        """A file of something else is refused, and left as it is."""
        path = tmp_path / "check.json"
        path.write_text(text)
        with pytest.raises(UsageError, match=r"check\.json"):
            CheckState.load(path, {})

        assert path.read_text() == text

    async def test_of_another_check(
        self, run: Run, arguments: tuple[str, ...], tmp_path: Path
    ) -> None:
        """A check that deletes does not go on where one that only reads was."""
        self.kept(tmp_path).note(self.root(), [KeyRange()], wrong=0)
        code, out, err = await run(*arguments, "--delete")

        assert (code, out) == (2, "")
        assert "other options" in " ".join(err.split())
        assert "Traceback" not in err

    async def test_of_another_application(
        self, run: Run, arguments: tuple[str, ...], tmp_path: Path
    ) -> None:
        """Neither another application nor another database goes on where this one was."""
        with (tmp_path / "shop_models.py").open("a") as module:
            module.write("\nothers = blobs\n")
        self.kept(tmp_path).note(self.root(), [], wrong=0)
        text = (tmp_path / "check.json").read_text()
        other = str(tmp_path / "other.db")

        for more, changes in ((("--app", "shop_models:others"), {}), ((), {"DATABASE": other})):
            code, out, err = await run(*arguments, *more, **changes)
            assert (code, out) == (2, "")
            assert "another application or database" in " ".join(err.replace("│", " ").split())
            assert (tmp_path / "check.json").read_text() == text

    async def test_keeps_no_password(
        self, run: Run, arguments: tuple[str, ...], tmp_path: Path
    ) -> None:
        """What is compared is the database's URL without its password, wherever that stands."""
        with (tmp_path / "shop_models.py").open("a") as module:
            module.write(
                'url = "postgresql+asyncpg://me:secret@127.0.0.1:1/db?password=secret"\n'
                "engine = create_async_engine(url)\n"
                "blobs = BlobApp(engine=engine, stores=store, metadata=Base.metadata)\n"
            )
        code, _, _ = await run(*arguments)
        text = (tmp_path / "check.json").read_text()

        assert code == 1
        assert "me:***@127.0.0.1:1/db" in text
        assert "secret" not in text

    def test_that_cannot_be_written(self, tmp_path: Path) -> None:
        """It is told before anything is looked at."""
        with pytest.raises(UsageError, match="cannot write"):
            CheckState.load(tmp_path / "no such directory" / "check.json", {})

    def test_that_is_half_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever happens while it is written, the file is the one before."""
        kept = self.kept(tmp_path)
        kept.note("s3://bucket/", [KeyRange("s3://bucket/a")], wrong=2)

        def full(_: int) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("os.fsync", full)
        kept.note("s3://bucket/", [], wrong=3)  # so soon it is kept, and not written
        with pytest.raises(UsageError, match="no space left"):
            kept.write()
        read = CheckState.load(kept.path, kept.options)

        assert read.left("s3://bucket/") == [KeyRange("s3://bucket/a")]
        assert (read.wrong("s3://bucket/"), read.wrong_before) == (2, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["check.json"]


class TestTerminal:
    async def test_a_bar(self, run: Run, tmp_path: Path) -> None:
        """It is on stderr, and findings are on stdout alone, whole in one line."""
        first, _ = await fill("a", "b")
        await forget("a")
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "aioblobcol.cli", "check", "--app", "shop_models:blobs"]
        process = await asyncio.create_subprocess_exec(
            *command,
            *("--min-age-hours", "0"),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(theirs)
        shown = asyncio.create_task(asyncio.to_thread(read_all, ours))
        out, _ = await process.communicate()
        err = await shown

        assert process.returncode == 1
        assert [line.split()[:2] for line in out.decode().splitlines()[:-1]] == [["orphan", first]]
        assert "\x1b" not in out.decode()
        assert "default" in err
        assert "100% 2 objects, 1 cells" in re.sub(r"\x1b\[[0-9;]*m", "", err)


class TestTriggers:
    @pytest.mark.parametrize("arguments", [(), ("--json",)])
    async def test_that_are_missing(
        self, run: Run, tmp_path: Path, arguments: tuple[str, ...]
    ) -> None:
        """Tables that write past the journal are named, and are no finding."""
        with (tmp_path / "shop_models.py").open("a") as module:
            module.write(JOURNAL)
        await fill()
        code, out, err = await run("--app", "shop_models:blobs", *arguments)

        assert (code, "tasks, pages" in err) == (0, True)
        if arguments:
            warning = json.loads(out.splitlines()[0])["warning"]
            assert "tasks, pages" in warning


class TestTrouble:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("shop_models", "--app: 'shop_models' is not module:attribute"),
            (":blobs", "not module:attribute"),
            ("no_such_module:blobs", "no module"),
            ("shop_models:engine", "not a BlobApp"),
            ("shop_models:nothing", "not a BlobApp"),
        ],
    )
    async def test_no_application(self, run: Run, name: str, message: str) -> None:
        """Exit code 2 and a reason, no traceback."""
        code, out, err = await run("--app", name)

        assert (code, out) == (2, "")
        assert message in " ".join(err.split())
        assert "Traceback" not in err

    async def test_an_application_that_breaks(self, run: Run) -> None:
        """What is wrong inside of the user's module is shown as Python shows it."""
        code, _, err = await run("--app", "broken_models:blobs")

        assert code == 1
        assert "No module named 'no_such_module_anywhere'" in err

    async def test_servers_that_are_away(self, run: Run) -> None:
        """One line for a bucket or a table that is not there, and exit code 1."""
        code, _, err = await run("--app", "shop_models:blobs")  # no table yet
        assert (code, len(err.splitlines())) == (1, 1)
        assert "no such table" in err

        await fill("a")
        code, _, err = await run("--app", "shop_models:blobs", BUCKET="no-such-bucket-at-all")
        assert (code, len(err.splitlines())) == (1, 1)
        assert "NoSuchBucket" in err


class TestBlobApp:
    def test_what_is_refused(self, memory_store: MemoryStore) -> None:
        """What no command could work with."""
        engine = create_async_engine("sqlite+aiosqlite://")
        right = {"engine": engine, "stores": memory_store, "metadata": sa.MetaData()}
        wrong: dict[str, object] = {
            "engine": engine.sync_engine,
            "stores": {},
            "metadata": DeclarativeBase,
            "uri_columns": ["url"],
        }
        BlobApp(**right)  # type: ignore[arg-type]
        for name, value in wrong.items():
            with pytest.raises(InvalidInputError, match=name.rstrip("s")):
                BlobApp(**{**right, name: value})  # type: ignore[arg-type]

    def test_stores_by_name(self) -> None:
        """One store without a name is the default one."""
        engine, store = create_async_engine("sqlite+aiosqlite://"), open_store(bucket="data")
        one = BlobApp(engine=engine, stores=store, metadata=sa.MetaData())

        assert one.stores_by_name == {"default": store}
