"""The five scenarios of sqlalchemy_mate's pattern, played on two stores and judged.

Each scenario's body is what a user writes inside ``blob_transaction``; the demo shows its
source. `play` runs one and looks at both stores afterwards; it prints nothing. Invariant: a
scenario judges what is committed and stored, never what the library says about itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final

from sqlalchemy import String, delete, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from .._unit_of_work import BlobTransaction, blob_transaction
from ..aws_s3 import PutS3ApiCall, guard
from ..testing import assert_consistent
from ._samples import page, picture

if TYPE_CHECKING:
    from .._store._base import Store

RUN: Final = uuid.uuid4().hex[:12]
"""Names the table and the prefix of this process, so that nobody else's are touched."""

URL: Final = "https://example.org/"
AS_HTML: Final = {"ContentType": "text/html; charset=utf-8"}
AS_PNG: Final = {"ContentType": "image/png"}

_DRIVERS_CLASS: Final = re.compile("^<class '[^']*'>: ")  # SQLAlchemy's asyncpg dialect says it


class Base(DeclarativeBase):
    """The demo's own metadata."""


class Task(Base):
    """A crawled page: two large binary columns, of which the row holds the URIs."""

    __tablename__ = f"aioblobcol_demo_{RUN}"

    url: Mapped[str] = mapped_column(String(255), primary_key=True)
    title: Mapped[str] = mapped_column(String(255))
    html: Mapped[str | None] = mapped_column(String(1100))
    image: Mapped[str | None] = mapped_column(String(1100))


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """What a row and its objects hold together."""

    title: str
    html: bytes = dataclasses.field(repr=False)
    image: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class RowState:
    """A committed row."""

    url: str
    title: str
    html: str | None
    image: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectState:
    """An object that exists, or existed during the scenario.

    Attributes:
        uri: where it is or was.
        size: in bytes; None if it is gone.
        fate: what became of it, in words.
        named_by: column of the row that names it.
    """

    uri: str
    size: int | None
    fate: str
    named_by: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """What happened in one scenario.

    Attributes:
        title: the scenario's.
        code: what ran.
        outcome: of the transaction, in words.
        error: what reached the caller.
        rows: every committed row afterwards.
        objects: every object before, meanwhile or afterwards.
        held: what was checked and is so.
        problems: what was checked and is not so; empty if all is well.
    """

    title: str
    code: str
    outcome: str
    error: str | None
    rows: tuple[RowState, ...]
    objects: tuple[ObjectState, ...]
    held: tuple[str, ...]
    problems: tuple[str, ...]


FIRST: Final = Content("Example", page("Example", version=1), picture(version=1))
SECOND: Final = Content("Example, revised", page("Example", version=2), picture(version=2))


class SearchIndexDownError(Exception):
    """Something else that a handler does failed, after its UPDATE was sent."""


# --- what a user writes inside of `async with blob_transaction(session, store=store) as tx:` --


async def _create_fails(tx: BlobTransaction, session: AsyncSession, _old: RowState | None) -> None:
    put = await tx.put_s3(
        pk=URL,
        api_calls=[
            PutS3ApiCall("html", FIRST.html, None, AS_HTML),
            PutS3ApiCall("image", FIRST.image, None, AS_PNG),
        ],
    )
    session.add(Task(url=URL, **put.to_values()))  # no title: NOT NULL


async def _create(tx: BlobTransaction, session: AsyncSession, _old: RowState | None) -> None:
    put = await tx.put_s3(
        pk=URL,
        api_calls=[
            PutS3ApiCall("html", FIRST.html, None, AS_HTML),
            PutS3ApiCall("image", FIRST.image, None, AS_PNG),
        ],
    )
    session.add(Task(url=URL, title=FIRST.title, **put.to_values()))


async def _update_fails(tx: BlobTransaction, session: AsyncSession, old: RowState | None) -> None:
    assert old is not None
    put = await tx.put_s3(
        pk=URL,
        api_calls=[
            PutS3ApiCall("html", SECOND.html, old.html, AS_HTML),
            PutS3ApiCall("image", SECOND.image, old.image, AS_PNG),
        ],
    )
    row = update(Task).where(Task.url == URL, put.guard(Task))
    await session.execute(row.values(title=SECOND.title, **put.to_values()))
    raise SearchIndexDownError("the search index does not answer")


async def _update(tx: BlobTransaction, session: AsyncSession, old: RowState | None) -> None:
    assert old is not None
    put = await tx.put_s3(
        pk=URL,
        api_calls=[
            PutS3ApiCall("html", SECOND.html, old.html, AS_HTML),
            PutS3ApiCall("image", SECOND.image, old.image, AS_PNG),
        ],
    )
    row = update(Task).where(Task.url == URL, put.guard(Task))
    await session.execute(row.values(title=SECOND.title, **put.to_values()))


async def _delete(tx: BlobTransaction, session: AsyncSession, old: RowState | None) -> None:
    assert old is not None
    tx.delete_s3([old.html, old.image])
    unchanged = guard(Task, html=old.html, image=old.image)
    await session.execute(delete(Task).where(Task.url == URL, unchanged))


# --- the scenarios ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario and what must be there when it is over.

    Attributes:
        title: what the reader sees.
        body: runs inside the block.
        raises: the error that must reach the caller.
        leaves: what the row must hold afterwards; None for no row.
        claim: the same in words.
    """

    title: str
    body: Callable[[BlobTransaction, AsyncSession, RowState | None], Awaitable[None]]
    raises: type[Exception] | None
    leaves: Content | None
    claim: str

    @property
    def code(self) -> str:
        """The block as a user would write it."""
        source = inspect.getsource(self.body).split("\n", 1)[1]  # without its `async def`
        lines = textwrap.dedent(source).replace("assert old is not None\n", "")
        block = "async with blob_transaction(session, store=store) as tx:"
        return f"{block}\n{textwrap.indent(lines, '    ')}".rstrip()


SCENARIOS: Final = (
    Scenario("create fails", _create_fails, IntegrityError, None, "there is no row"),
    Scenario("create succeeds", _create, None, FIRST, "the row names the new objects"),
    Scenario(
        "update fails",
        _update_fails,
        SearchIndexDownError,
        FIRST,
        "the row still names the old objects",
    ),
    Scenario("update succeeds", _update, None, SECOND, "the row names the new objects"),
    Scenario("delete succeeds", _delete, None, None, "there is no row"),
)


async def play(scenario: Scenario, *, engine: AsyncEngine, store: Store) -> Scene:
    """Run one scenario, look at both stores, and say what is there and whether that is right.

    Raises:
        StoreError: the object store could not be asked afterwards.
        sqlalchemy.exc.SQLAlchemyError: nor could the database.
    """
    before = await _sizes(store)
    old = next(iter(await _rows(engine)), None)
    error: Exception | None = None
    async with AsyncSession(engine) as session:
        tx = blob_transaction(session, store=store)
        try:
            async with tx:
                await scenario.body(tx, session, old)
        except Exception as exc:  # every scenario says which one it expects; `_judge` compares
            error = exc
    rows = await _rows(engine)
    after = await _sizes(store)
    contents: dict[str, bytes] = {}
    inconsistency: str | None = None
    try:
        contents = await assert_consistent(store, engine, [Task.html, Task.image])
    except AssertionError as exc:
        inconsistency = str(exc)
    held, problems = _judge(
        scenario, error=error, rows=rows, contents=contents, inconsistency=inconsistency
    )
    return Scene(
        title=scenario.title,
        code=scenario.code,
        outcome=tx.outcome.value.replace("_", " ") if tx.outcome is not None else "never begun",
        error=None if error is None else describe(error),
        rows=rows,
        objects=_objects(
            before, after, meanwhile=(*tx.report.deleted, *tx.report.failed), rows=rows
        ),
        held=held,
        problems=problems,
    )


def describe(error: BaseException) -> str:
    """Return an error in one line, without the SQL and its parameters."""
    text = str(error.orig if isinstance(error, DBAPIError) else error)
    line = _DRIVERS_CLASS.sub("", text.partition("\n")[0])
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _judge(
    scenario: Scenario,
    *,
    error: Exception | None,
    rows: tuple[RowState, ...],
    contents: Mapping[str, bytes],
    inconsistency: str | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare what is there with what must be there; return what holds and what does not."""
    found = [
        (row.title, contents.get(row.html or ""), contents.get(row.image or "")) for row in rows
    ]
    wanted = scenario.leaves
    expected = [] if wanted is None else [(wanted.title, wanted.html, wanted.image)]
    raised = type(error) if error is not None else None
    checks = (
        (
            f"{scenario.raises.__name__} reached the caller"
            if scenario.raises is not None
            else "no error reached the caller",
            raised is scenario.raises,
            f"instead: {describe(error)}" if error is not None else "instead: none",
        ),
        (f"{scenario.claim}, byte for byte" if wanted else scenario.claim, found == expected, ""),
        (
            "every object that a row names is there, and no other",
            inconsistency is None,
            inconsistency or "",
        ),
    )
    held = tuple(claim for claim, is_so, _ in checks if is_so)
    problems = tuple(
        f"not so: {claim}" + (f" ({detail})" if detail else "")
        for claim, is_so, detail in checks
        if not is_so
    )
    return held, problems


def _objects(
    before: Mapping[str, int],
    after: Mapping[str, int],
    *,
    meanwhile: tuple[str, ...],
    rows: tuple[RowState, ...],
) -> tuple[ObjectState, ...]:
    """Say of every object what became of it, the oldest first."""
    named = {
        uri: column
        for row in rows
        for column, uri in (("html", row.html), ("image", row.image))
        if uri is not None
    }
    fates = {  # there before, there after
        (True, True): "kept",
        (True, False): "superseded, deleted" if rows else "deleted with its row",
        (False, True): "uploaded",
        (False, False): "uploaded, deleted again",
    }
    return tuple(
        ObjectState(uri, after.get(uri), fates[uri in before, uri in after], named.get(uri))
        for uri in dict.fromkeys((*before, *after, *meanwhile))
    )


async def _rows(engine: AsyncEngine) -> tuple[RowState, ...]:
    """Read every committed row, on a connection of its own."""
    async with engine.connect() as connection:
        found = await connection.execute(select(Task.url, Task.title, Task.html, Task.image))
        return tuple(RowState(*row) for row in found)


async def _sizes(store: Store) -> dict[str, int]:
    """Ask for every object under the prefix."""
    return {uri: (await store.head(uri)).size async for uri in store.iter_uris()}
