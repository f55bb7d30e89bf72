"""``aioblobcol check``: what operators see, and what programs read."""

from __future__ import annotations

import asyncio
import json
import os
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
        assert out.splitlines()[-1].endswith(
            "app/: 2 objects, 2 cells: 0 orphan, 0 dangling, 0 shared"
        )
        assert len(out.splitlines()) == 1

    async def test_findings(self, run: Run) -> None:
        """A line for each, and exit code 1; the application's name may come by environment."""
        first, second = await fill("a", "b")
        await forget("a")
        import shop_models  # noqa: PLC0415 - the fixture wrote it

        async with shop_models.store:
            await shop_models.store.delete_many([second])
        code, out, _ = await run("--min-age-hours", "0", AIOBLOBCOL_APP="shop_models:blobs")

        assert code == 1
        *findings, summary = out.splitlines()
        assert {tuple(line.split()[:2]) for line in findings} == {
            ("orphan", first),
            ("dangling", second),
        }
        assert "1 orphan, 1 dangling, 0 shared" in summary

    async def test_what_is_young(self, run: Run) -> None:
        """By default an object of today is no orphan."""
        await fill("a")
        await forget("a")
        code, out, _ = await run("--app", "shop_models:blobs")

        assert code == 0
        assert "1 objects, 0 cells: 0 orphan" in out

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

            assert (code, err) == (1, "")
            assert out.isascii()
            assert "app/\\" in out

    async def test_deleting(self, run: Run) -> None:
        """Orphans go, what is deleted is not wrong any more, and a second look finds nothing."""
        await fill("a", "b")
        await forget("a")
        arguments = ("--app", "shop_models:blobs", "--min-age-hours", "0")
        code, out, _ = await run(*arguments, "--delete")

        assert code == 0
        assert "1 orphan, 0 dangling, 0 shared, 1 deleted" in out
        code, out, _ = await run(*arguments)
        assert code == 0
        assert "1 objects, 1 cells: 0 orphan" in out


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
