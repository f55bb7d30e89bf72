"""Every hook crossed with {error, cancel}, at each of its occurrences: no LOSS, no orphan.

A hook is a place where somebody else's code runs, or where a request is on the wire: events of
SQLAlchemy's sessions, mappers and connections, and the steps of the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Mapper, Session
from support.databases import Database
from support.managed import Contents, Doc, Report, collect, contents, seed, tables, uris

from aioblobcol import Blob, CommitOutcomeUnknown, blob_report, blob_sessionmaker
from aioblobcol.testing import MemoryStore, Step

MANY = 400  # far more occurrences than any hook has in this program

Factory = async_sessionmaker[AsyncSession]
What = Literal["error", "cancel"]

AFTER: Contents = {
    ("a", "body"): b"body 2",
    ("a", "cover"): b"cover a",
    ("a/1", "scan"): b"scan 1",
    ("b", "body"): b"body b",
    ("b", "cover"): b"cover b",
    ("b", "draft"): b"cover a",
    ("n", "body"): b"body n",
    ("n", "appendix"): b"appendix n",
}


class HookError(Exception):
    """Raised by somebody else's code."""


async def everything(session: AsyncSession, *, commits: bool) -> None:
    """Create, replace, copy, delete, orphan; in savepoints that are kept and undone; in bulk."""
    async with session:
        a, b = await session.get_one(Doc, "a"), await session.get_one(Doc, "b")
        session.add(Report(key="n", body=Blob(b"body n"), appendix=Blob(b"appendix n")))
        async with session.begin_nested():
            a.body = Blob(b"body 1")
        undone = await session.begin_nested()
        b.body = Blob(b"never")
        await session.flush()
        await undone.rollback()
        await session.refresh(a, ["pages"])
        a.pages.pop()
        b.draft = a.cover
        await session.execute(sa.update(Doc).where(Doc.key == "a").values(body=Blob(b"body 2")))
        await session.delete(await session.get_one(Report, "r"))
        await (session.commit() if commits else session.rollback())


@dataclasses.dataclass
class Trap:
    """Does *what* at the n-th occurrence of a hook."""

    what: What
    moment: int
    count: int = 0
    task: asyncio.Task[None] | None = None

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count != self.moment:
            return
        if self.what == "error":
            raise HookError
        assert self.task is not None
        self.task.cancel()

    @property
    def was_reached(self) -> bool:
        return self.count >= self.moment


Install = Callable[[Trap, Database, MemoryStore], contextlib.AbstractContextManager[None]]


def of_sessions(name: str) -> Install:
    @contextlib.contextmanager
    def install(trap: Trap, database: Database, store: MemoryStore) -> Iterator[None]:
        with listening(Session, name, trap):
            yield

    return install


def of_mappers(name: str) -> Install:
    @contextlib.contextmanager
    def install(trap: Trap, database: Database, store: MemoryStore) -> Iterator[None]:
        with listening(Mapper, name, trap):
            yield

    return install


def of_attributes(trap: Trap, database: Database, store: MemoryStore) -> Any:
    return listening(Doc.body, "set", trap)


def of_engines(name: str) -> Install:
    @contextlib.contextmanager
    def install(trap: Trap, database: Database, store: MemoryStore) -> Iterator[None]:
        with listening(database.engine.sync_engine, name, trap):
            yield

    return install


def of_stores(operation: str, stage: str) -> Install:
    @contextlib.contextmanager
    def install(trap: Trap, database: Database, store: MemoryStore) -> Iterator[None]:
        def hook(step: Step) -> None:
            if (step.operation, step.stage) == (operation, stage):
                trap()

        store.hooks.append(hook)
        yield
        store.hooks.remove(hook)

    return install


@contextlib.contextmanager
def listening(target: Any, name: str, trap: Trap) -> Iterator[None]:
    def listener(*arguments: Any) -> None:
        trap()

    event.listen(target, name, listener)
    try:
        yield
    finally:
        event.remove(target, name, listener)


HOOKS: dict[str, Install] = {
    **{
        f"session {name}": of_sessions(name)
        for name in (
            *("before_flush", "after_flush", "after_flush_postexec", "after_begin"),
            *("before_commit", "after_commit", "after_rollback", "after_soft_rollback"),
            *("after_transaction_create", "after_transaction_end", "do_orm_execute"),
            *("pending_to_persistent", "persistent_to_deleted"),
        )
    },
    **{
        f"mapper {name}": of_mappers(name)
        for name in (
            *("before_insert", "after_insert", "before_update", "after_update"),
            *("before_delete", "after_delete"),
        )
    },
    "attribute set": of_attributes,
    **{
        f"engine {name}": of_engines(name)
        for name in (
            *("before_cursor_execute", "after_cursor_execute", "begin", "commit", "rollback"),
            *("savepoint", "rollback_savepoint", "release_savepoint"),
        )
    },
    **{
        f"store {operation} {stage}": of_stores(operation, stage)
        for operation in ("put", "copy", "delete")
        for stage in ("before", "after")
    },
}

OF_ROLLBACKS = {"engine rollback", "session after_rollback"}


@pytest_asyncio.fixture
async def factory(database: Database, memory_store: MemoryStore) -> Any:
    """Give sessions that upload, on both databases."""
    async with tables(database.engine):
        yield blob_sessionmaker(database.engine, memory_store)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["error", "cancel"])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda name: name.replace(" ", "-"))
async def test_hook(
    database: Database, memory_store: MemoryStore, factory: Factory, hook: str, what: What
) -> None:
    """Whatever happens in a hook, the rows are as before or as after, and nothing else is stored.

    What may be left is named: what the storage refuses to delete by the report, what an
    unanswered COMMIT leaves in doubt by the error.
    """
    commits = hook not in OF_ROLLBACKS
    for moment in range(1, MANY):
        before = await seed(factory, memory_store)
        after = AFTER if commits else before
        trap, session = Trap(what, moment), factory()
        caught: BaseException | None = None
        with HOOKS[hook](trap, database, memory_store):
            task = trap.task = asyncio.create_task(everything(session, commits=commits))
            await asyncio.wait({task})
            caught = asyncio.CancelledError() if task.cancelled() else task.exception()
            if caught is not None:
                traceback.clear_frames(caught.__traceback__)
        del task
        trap.task = None  # its traceback, see `collect`
        collect()
        assert memory_store.land_late() == []
        named = set(blob_report(session).failed)
        if isinstance(caught, CommitOutcomeUnknown):
            named.update(caught.uris)
        left = named & memory_store.objects.keys() - (await uris_of(database))
        now = await contents(memory_store, database.engine, orphans=tuple(left))
        assert now in (before, after), f"{what} at occurrence {moment}"
        if not trap.was_reached:
            assert caught is None
            assert now == after
            assert moment > 1, "the program never comes by"
            return
        if what == "cancel" and caught is not None:
            assert isinstance(caught, asyncio.CancelledError)
        assert "store delete" in hook or what == "cancel" or caught is not None
    pytest.fail("the program never ended")


async def uris_of(database: Database) -> set[str]:
    return set((await uris(database.engine)).values())
