"""Pages of documentation whose code blocks and tables the tests look at, and where they run.

A block is named by a comment above it, ``<!-- block: name -->``, and run by the test that is
marked ``@page.runs(name)``. All pages use the models of the README.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import re
import shlex
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from aioblobcol import Blob, PutS3ApiCall, blob_transaction, guard
from aioblobcol.testing import MemoryStore, assert_consistent

ROOT = Path(__file__).parent.parent.parent
BUCKET, PREFIX = "my-bucket", "tasks"  # as the README calls them
PNG = b"\x89PNG\r\n\x1a\n"  # columns look at the first bytes


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its page, name, language, text and the line on which that begins."""

    path: Path
    name: str
    language: str
    text: str
    line: int

    @property
    def commands(self) -> list[list[str]]:
        lines = self.text.splitlines()
        assert all(line.startswith("$ ") for line in lines)
        return [shlex.split(line.removeprefix("$ ")) for line in lines]

    async def execute(self, names: dict[str, Any]) -> None:
        """Run a block of Python, with `await` at its top level, in *names*."""
        source = "\n" * (self.line - 1) + (self.text or "raise AssertionError('no such block')")
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, str(self.path), "exec", flags=flags, dont_inherit=True)
        running = eval(code, names)  # noqa: S307 - the project's own documentation
        if inspect.iscoroutine(running):
            await running


class Page:
    """A Markdown file, and which of its blocks have a runner."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.blocks = list(self._read_blocks())
        self.runners: list[str] = []

    def runs(self, name: str) -> pytest.MarkDecorator:
        """Hand a block to a test, which is then its runner."""
        self.runners.append(name)
        found = [block for block in self.blocks if block.name == name]
        missing = [Block(self.path, name, "", "", 0)]
        return pytest.mark.parametrize("block", found or missing, ids=[name])

    def block(self, name: str) -> Block:
        """Return a block that is not tested by itself here."""
        (found,) = (block for block in self.blocks if block.name == name)
        return found

    def table(self, first_column: str) -> list[list[str]]:
        """Return the rows of the table whose first column has this title, without formatting."""
        found = re.search(
            rf"^\| {re.escape(first_column)} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)",
            self.text,
            re.MULTILINE,
        )
        assert found is not None, f"no table {first_column!r}"
        return [
            [cell.strip().strip("`") for cell in row.strip("|").split("|")]
            for row in found[1].splitlines()
        ]

    def check_links(self) -> None:
        """Every link names a file of the project, and a heading where it says so."""
        targets = re.findall(r"\]\(([^)]+)\)", self.text)
        assert targets
        for target in targets:
            name, _, anchor = target.partition("#")
            path = (self.path.parent / name).resolve() if name else self.path
            assert path.exists(), target
            assert path.is_relative_to(ROOT), target
            assert not anchor or anchor in headings(path), target

    def _read_blocks(self) -> Iterator[Block]:
        above, opened = "", 0
        language, lines = "", list[str]()
        for number, line in enumerate(self.text.splitlines(), start=1):
            if not line.startswith("```") and opened:
                lines.append(line)
            elif opened:
                named = re.fullmatch(r"<!-- block: (\S+) -->", above)
                name = named[1] if named else f"the block without a name on line {opened}"
                yield Block(self.path, name, language, "\n".join(lines), opened + 1)
                opened = 0
            elif line.startswith("```"):
                language, lines, opened = line.removeprefix("```"), [], number
            else:
                above = line
        assert not opened, "the last block is not closed"


def headings(path: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


README = Page(ROOT / "README.md")


# --- where the blocks run ----------------------------------------------------------------------


def uri(value: str | Blob | None) -> Any:
    return value.uri if isinstance(value, Blob) else value


@dataclasses.dataclass
class Place:
    """The names that a reader has in front of them, and both stores."""

    names: dict[str, Any]

    async def run(self, block: Block, **hidden: Any) -> None:
        self.names.update(hidden)
        await block.execute(self.names)

    def session(self) -> AsyncSession:
        session: AsyncSession = self.names["Session"]()
        return session

    def use(self, engine: AsyncEngine) -> None:
        """Give the managed model another engine."""
        names = self.names
        names["engine"] = engine
        names["Session"] = names["blob_sessionmaker"](engine, names["store"])

    async def add(self, url: str = "u", **binaries: bytes) -> Any:
        """Create a row in the explicit way and return it."""
        task_class, store = self.names["Task"], self.names["store"]
        calls = [PutS3ApiCall(column, binary, None) for column, binary in binaries.items()]
        async with self.session() as session, blob_transaction(session, store=store) as tx:
            put = await tx.put_s3(pk=url, api_calls=calls)
            session.add(task := task_class(url=url, **put.to_values()))
        return task

    async def add_managed(self, *urls: str, **blobs: bytes) -> None:
        """Create rows in the managed way."""
        types = {"html": "text/html", "image": "image/png"}
        async with self.names["Session"].begin() as session:
            for url in urls:
                values = {
                    name: Blob(data, content_type=types[name]) for name, data in blobs.items()
                }
                session.add(self.names["Task"](url=url, **values))

    async def contents(
        self, store: Any = None, *, orphans: tuple[str, ...] = ()
    ) -> dict[str, tuple[bytes | None, bytes | None]]:
        """Return the bytes of every row, after asking whether both stores agree."""
        task = self.names["Task"]
        found = await assert_consistent(
            store or self.names["store"],
            self.names["engine"],
            [task.html, task.image],
            orphans=orphans,
        )
        async with self.names["engine"].connect() as connection:
            rows = await connection.execute(sa.select(task.url, task.html, task.image))
            return {url: (found.get(uri(html)), found.get(uri(image))) for url, html, image in rows}


@contextlib.asynccontextmanager
async def open_place(model: str = "model") -> AsyncIterator[Place]:
    """Run one of the README's models, and make its table in the current directory."""
    names: dict[str, Any] = {
        "__name__": "readme",
        "PutS3ApiCall": PutS3ApiCall,
        "blob_transaction": blob_transaction,
        "delete": sa.delete,
        "guard": guard,
        "update": sa.update,
    }
    await README.block(model).execute(names)
    async with names["engine"].begin() as connection:
        await connection.run_sync(names["Base"].metadata.create_all)
    engine = names["engine"]
    yield Place(names)
    await engine.dispose()


@contextlib.asynccontextmanager
async def managed_in_memory() -> AsyncIterator[Place]:
    """Give the README's managed model, with a store in memory and what a reader has at hand."""
    async with MemoryStore(bucket=BUCKET, prefix=PREFIX) as store, open_place("managed") as opened:
        opened.names |= {
            "other_url": "other",
            "page": b"<p>",
            "select": sa.select,
            "store": store,
            "url": "u",
        }
        opened.use(opened.names["engine"])
        yield opened


# --- tables that make claims -------------------------------------------------------------------


@functools.cache
def names_of_tests(path: str) -> frozenset[str]:
    """Return the tests of a file."""
    text = (ROOT / "tests" / path).read_text(encoding="utf-8")
    return frozenset(re.findall(r"^ *(?:async )?def (test_\w+)\(", text, re.MULTILINE))


def check_claims(
    page: Page,
    first_column: str,
    shown_by: dict[str, list[tuple[str, str]]],
    *,
    rows: list[str] | None = None,
) -> None:
    """Each row of a table, or each of *rows*, is shown by tests that are there."""
    if rows is None:
        rows = [row[0] for row in page.table(first_column)]
    assert rows == list(shown_by)
    for path, name in (each for tests in shown_by.values() for each in tests):
        assert name in names_of_tests(path), f"{path} has no {name}"
