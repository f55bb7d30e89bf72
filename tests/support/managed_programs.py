"""Random programs against managed sessions, a model of what must be committed, and the verdict.

A program is a list of steps, drawn as a whole and run in one event loop, in place of the rules
of a `RuleBasedStateMachine`: a cancellation falls at the n-th await of all that remains, across
steps; any step can be left out, so that failures shrink well; and no loop is entered per rule.

The model does not repeat SQLAlchemy. What a flush is about to write is read from the session
before the library sees it; when it has succeeded, and what was undone, is heard from events; and
the bytes of every `Blob` are known because the program made it, or because they were sent to
the store under its URI.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import gc
import hashlib
import json
import logging
import sqlite3
import traceback
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import get_history
from sqlalchemy.orm.base import PASSIVE_NO_INITIALIZE
from sqlalchemy.orm.exc import StaleDataError

from aioblobcol import (
    Blob,
    CommitOutcomeUnknown,
    DeleteReport,
    Journal,
    S3Store,
    StoreError,
    blob_sessionmaker,
    upload_blobs,
)
from aioblobcol._tasks import run_to_end
from aioblobcol._uri import marker_uri
from aioblobcol._worker import Worker
from aioblobcol.errors import BlobNotFoundError, BlobSharedError, StoreUnavailableError
from aioblobcol.testing import MemoryStore, StoredObject

from .managed import ArmedTask, Base, Doc, Page, Report

State = dict[str, dict[str, bytes | None]]

COLUMNS_OF = {Doc: ("body", "draft", "cover"), Page: ("scan",)}
COLUMNS_OF[Report] = (*COLUMNS_OF[Doc], "appendix")
DOCS = ("a", "b", "r", "n")
PAGES = ("a/1", "a/2", "b/1")
ROWS = (*DOCS, *PAGES)


def class_of(row: str) -> type[Base]:
    if "/" in row:
        return Page
    return Report if row == "r" else Doc


CELLS = [(row, column) for row in ROWS for column in COLUMNS_OF[class_of(row)]]
SEED: State = {
    "a": {"body": b"seed a body", "draft": b"seed a draft", "cover": b"seed a cover"},
    "b": {"body": b"seed b body", "draft": None, "cover": None},
    "r": {"body": b"seed r body", "draft": None, "cover": None, "appendix": b"seed appendix"},
    "a/1": {"scan": b"seed a/1"},
    "a/2": {"scan": b"seed a/2"},
}

# --- what a program is made of ---------------------------------------------------------------

Cell = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Assign:
    cell: Cell
    what: Literal["new", "none", "used before"]


@dataclasses.dataclass(frozen=True)
class Move:
    source: Cell
    target: Cell
    clears: bool


@dataclasses.dataclass(frozen=True)
class Swap:
    one: Cell
    other: Cell


@dataclasses.dataclass(frozen=True)
class Share:
    cells: tuple[Cell, Cell]


@dataclasses.dataclass(frozen=True)
class OnRow:
    do: Literal["add", "delete", "delete and add", "merge", "expire", "refresh", "ahead", "orphan"]
    row: str


@dataclasses.dataclass(frozen=True)
class Do:
    what: Literal[
        "flush",
        "commit",
        "rollback",
        "savepoint",
        "release",
        "roll back to savepoint",
        "expire all",
        "query",
        "failing statement",
        "close",
    ]


@dataclasses.dataclass(frozen=True)
class Read:
    cell: Cell


@dataclasses.dataclass(frozen=True)
class BulkUpdate:
    how: Literal["value", "list", "swap", "copy", "empty", "appendix"]
    rows: tuple[str, ...]
    column: str


@dataclasses.dataclass(frozen=True)
class BulkInsert:
    rows: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BulkDelete:
    row: str


@dataclasses.dataclass(frozen=True)
class Raw:
    """SQL in the session's transaction of which it knows nothing: the triggers have to see it."""

    what: Literal["delete", "empty", "exchange", "truncate"]
    row: str


@dataclasses.dataclass(frozen=True)
class Fault:
    """The n-th such request from here on fails, or its answer is lost, or it lands later."""

    operation: Literal["put", "copy", "delete"]
    how: Literal["refused", "answer lost", "late"]
    nth: int


@dataclasses.dataclass(frozen=True)
class LoseCommit:
    """The answer to the next COMMIT is lost."""

    committed: bool


@dataclasses.dataclass(frozen=True)
class Cancel:
    """Cancel at the n-th await of what remains."""

    moment: int


@dataclasses.dataclass(frozen=True)
class Other:
    """A second session does this and commits, in between."""

    steps: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """What is done, and with an error: give up, roll back and go on, or go on."""

    steps: tuple[Any, ...]
    on_error: Literal["give up", "roll back", "go on"] = "give up"
    commits: bool = True
    autoflush: bool = True
    expires: bool = False


def programs(*, longest: int = 14, with_raw: bool = False) -> st.SearchStrategy[Program]:
    """Draw programs; with raw SQL, only where there is a journal."""
    cells, rows = st.sampled_from(CELLS), st.sampled_from(ROWS)
    assign = st.builds(Assign, cells, st.sampled_from(["new", "new", "none", "used before"]))
    on_row = st.builds(
        OnRow,
        st.sampled_from(
            ["add", "delete", "delete and add", "merge", "expire", "refresh", "ahead", "orphan"]
        ),
        rows,
    )
    change = st.one_of(
        assign,
        st.builds(Move, cells, cells, st.booleans()),
        st.builds(Swap, cells, cells),
        st.builds(Share, st.tuples(cells, cells)),
        on_row,
        on_row,
    )
    docs = st.lists(st.sampled_from(DOCS), min_size=1, max_size=2, unique=True).map(tuple)
    bulk = st.one_of(
        st.builds(
            BulkUpdate,
            st.sampled_from(["value", "list", "swap", "copy", "empty", "appendix"]),
            docs,
            st.sampled_from(COLUMNS_OF[Doc]),
        ),
        st.builds(BulkInsert, st.lists(rows, min_size=1, max_size=2, unique=True).map(tuple)),
        st.builds(BulkDelete, rows),
    )
    control = st.builds(
        Do,
        st.sampled_from(
            [
                *("flush", "commit", "rollback", "savepoint", "savepoint", "release"),
                *("roll back to savepoint", "expire all", "query", "failing statement", "close"),
            ]
        ),
    )
    trouble = st.one_of(
        st.builds(
            Fault,
            st.sampled_from(["put", "copy", "delete"]),
            st.sampled_from(["refused", "answer lost", "late"]),
            st.integers(1, 4),
        ),
        st.builds(LoseCommit, st.booleans()),
        st.builds(Cancel, st.integers(1, 60)),
        st.builds(
            Other,
            st.lists(
                st.one_of(assign, st.builds(OnRow, st.sampled_from(["add", "delete"]), rows), bulk),
                min_size=1,
                max_size=2,
            ).map(tuple),
        ),
    )
    raw = [st.builds(Raw, st.sampled_from(["delete", "empty", "exchange", "truncate"]), rows)]
    step = st.one_of(
        *(change, change, change, bulk, control, control, st.builds(Read, cells), trouble),
        *(raw if with_raw else ()),
    )
    return st.builds(
        Program,
        st.lists(step, min_size=1, max_size=longest).map(tuple),
        st.sampled_from(["give up", "roll back", "go on"]),
        st.sampled_from([True, True, True, False]),
        st.booleans(),
        st.booleans(),
    )


# --- the databases, read and written behind everybody's back ---------------------------------


class SqliteFile:
    """A SQLite file, without the time that durability takes."""

    def __init__(self, path: Path) -> None:
        self.url = f"sqlite+aiosqlite:///{path}"
        self._raw = sqlite3.connect(path, isolation_level=None, timeout=0)
        self._raw.execute("PRAGMA journal_mode=WAL")

    def prepare(self, engine: AsyncEngine) -> None:
        @event.listens_for(engine.sync_engine, "connect")
        def set_pragmas(dbapi_connection: Any, _record: object) -> None:
            cursor = dbapi_connection.cursor()
            cursor.execute("PRAGMA synchronous=OFF")
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.execute("PRAGMA busy_timeout=50")
            cursor.close()

    long_ago = "datetime('now', '-9 days')"
    truncate = "DELETE FROM {table}"

    def engine_arguments(self) -> dict[str, Any]:
        return {}

    async def read(self) -> list[list[tuple[Any, ...]]]:
        return [self._raw.execute(query).fetchall() for query in READS]

    async def write(self, script: list[tuple[str, tuple[Any, ...]]]) -> None:
        try:
            self._write(script)
        except sqlite3.OperationalError:  # see `collect` in `managed`
            self._raw.rollback()
            gc.collect()
            for _ in range(100):  # a worker thread may still be closing its connection
                await asyncio.sleep(0.01)
                with contextlib.suppress(sqlite3.OperationalError):
                    self._write(script)
                    return
                self._raw.rollback()
            raise

    def _write(self, script: list[tuple[str, tuple[Any, ...]]]) -> None:
        self._raw.execute("BEGIN IMMEDIATE")
        for statement, values in script:
            self._raw.execute(statement, values)
        self._raw.execute("COMMIT")

    async def close(self) -> None:
        self._raw.close()


class PostgresDatabase:
    """PostgreSQL; whoever waits for a lock of somebody else gives up soon."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._raw: Any = None

    def prepare(self, engine: AsyncEngine) -> None:
        """Nothing to do."""

    long_ago = "now() - interval '9 days'"
    truncate = "TRUNCATE {table}"

    def engine_arguments(self) -> dict[str, Any]:
        settings = {"lock_timeout": "300", "synchronous_commit": "off"}
        return {"connect_args": {"server_settings": settings}}

    async def _connection(self) -> Any:
        import asyncpg  # noqa: PLC0415 - only here

        if self._raw is None:
            plain = make_url(self.url).set(drivername="postgresql")
            self._raw = await asyncpg.connect(plain.render_as_string(hide_password=False))
        return self._raw

    async def read(self) -> list[list[tuple[Any, ...]]]:
        raw = await self._connection()
        return [[tuple(row) for row in await raw.fetch(query)] for query in READS]

    async def write(self, script: list[tuple[str, tuple[Any, ...]]]) -> None:
        raw = await self._connection()
        async with raw.transaction():
            for statement, values in script:
                marks = iter(range(1, 99))
                parts = statement.split("?")
                numbered = parts[0] + "".join(f"${next(marks)}{part}" for part in parts[1:])
                await raw.execute(numbered, *values)

    async def close(self) -> None:
        if self._raw is not None:
            await self._raw.close()


READS = (
    (
        "SELECT d.key, d.body, d.draft, d.cover, r.appendix, d.kind"
        " FROM docs d LEFT JOIN reports r ON r.key = d.key"
    ),
    "SELECT doc_key, number, scan FROM pages",
)

# --- the world that a program runs in --------------------------------------------------------


class Watched(Session):
    """Tells the actor in its ``info`` what happens, before the library hears of it."""


def _actor(session: Session) -> Actor:
    return session.info["actor"]  # type: ignore[no-any-return]


@event.listens_for(Watched, "before_flush")
def _before_flush(session: Session, _context: object, _instances: object) -> None:
    _actor(session).plan_flush(session)


@event.listens_for(Watched, "after_flush_postexec")
def _after_flush(session: Session, _context: object) -> None:
    _actor(session).flushed()


@event.listens_for(Watched, "after_transaction_create")
def _after_create(session: Session, transaction: Any) -> None:
    if transaction.nested:
        actor = _actor(session)
        actor.snapshots[transaction] = copy.deepcopy(actor.rows)


@event.listens_for(Watched, "after_soft_rollback")
def _after_rollback(session: Session, transaction: Any) -> None:
    actor = _actor(session)
    if transaction.nested:
        actor.rows = copy.deepcopy(actor.snapshots.get(transaction, actor.rows))
    elif transaction.parent is None:
        actor.start_over()


class World:
    """Both stores, what must be in them, and what went wrong on purpose.

    Attributes:
        committed: what the rows hold.
        sent: URI to the bytes that were sent to the store under it.
        blobs: the bytes of every blob that the program made; kept, so that ids stay unique.
        count: how many programs were run.
    """

    def __init__(
        self,
        database: SqliteFile | PostgresDatabase,
        store: MemoryStore | S3Store,
        *,
        is_journaled: bool = False,
    ) -> None:
        self.database, self.store, self.is_journaled = database, store, is_journaled
        self.journal: Journal | None = None
        self.committed: State = {}
        self.sent: dict[str, bytes] = {}
        self.blobs: dict[int, tuple[Blob, bytes]] = {}
        self.faults: list[list[Any]] = []
        self.late: list[Any] = []
        self.refused: set[str] = set()
        self.unknown: set[str] = set()
        self.was_lost = False
        self.lose_commit: LoseCommit | None = None
        self.main: Actor | None = None
        self.count = 0
        self.statistics: dict[str, int] = {}
        self.complaints: list[str] = []
        self._intercept()

    # --- life

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[World]:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self._note_complaint(context)
        )
        self.engine = create_async_engine(self.database.url, **self.database.engine_arguments())
        self.database.prepare(self.engine)
        self._lose_answers()
        if self.is_journaled:
            self.journal = _install_journal(self.store)
        self.sessions = blob_sessionmaker(
            self.engine,
            self.store,
            journal=self.journal,
            sync_session_class=Watched,
            commit_seconds=10,
        )
        handler = _Unknown(self)
        for name in ("aioblobcol.session", "aioblobcol.cleanup", "aioblobcol.transaction"):
            logging.getLogger(name).addHandler(handler)
        try:
            async with self.engine.begin() as connection:
                await connection.run_sync(Base.metadata.drop_all)
                await connection.run_sync(Base.metadata.create_all)
            yield self
        finally:
            self.main = self.lose_commit = None  # of the last program
            gc.unfreeze()
            gc.collect()
            async with self.engine.begin() as connection:
                await connection.run_sync(Base.metadata.drop_all)
            if self.journal is not None:
                _remove_journal(self.journal)
            for name in ("aioblobcol.session", "aioblobcol.cleanup", "aioblobcol.transaction"):
                logging.getLogger(name).removeHandler(handler)
            await self.engine.dispose()
            await self.database.close()

    def _intercept(self) -> None:
        put, copy_, delete = self.store.put, self.store.copy, self.store.delete_many

        async def sends(operation: str, request: Any, send: Any) -> bool:
            if operation == "put":
                self.sent[request.uri] = bytes(request.payload.body)
            else:
                self.sent[request.uri] = self.sent.get(request.source_uri, b"?")
            how = self._fault(operation)
            if how == "refused":
                raise StoreError(operation, request.uri, "InvalidRequest (injected)")
            if how == "late":
                self.late.append((send, request))
                await asyncio.sleep(0)
                raise StoreUnavailableError(operation, request.uri, "no answer (injected)")
            answered: bool = await send(request)
            if how == "answer lost":
                raise StoreUnavailableError(operation, request.uri, "answer lost (injected)")
            return answered

        async def sends_delete(uris: Sequence[str]) -> DeleteReport:
            how = self._fault("delete")
            if how is None:
                return await delete(uris)
            if how != "answer lost":
                self.refused.update(uris)
                if how == "late":
                    raise StoreUnavailableError("delete", uris[0], "no answer (injected)")
                return DeleteReport(failed=dict.fromkeys(uris, "AccessDenied (injected)"))
            await delete(uris)
            raise StoreUnavailableError("delete", uris[0], "answer lost (injected)")

        self.store.put = lambda request: sends("put", request, put)  # type: ignore[method-assign]
        self.store.copy = lambda request: sends("copy", request, copy_)  # type: ignore[method-assign]
        self.store.delete_many = sends_delete  # type: ignore[method-assign]

    def _fault(self, operation: str) -> str | None:
        for fault in self.faults:
            if fault[0] == operation:
                fault[2] -= 1
                if fault[2] == 0:
                    self.faults.remove(fault)
                    return str(fault[1])
        return None

    def _lose_answers(self) -> None:
        """Have the dialect lose the answer to COMMIT, before or after it took effect."""
        dialect: Any = self.engine.sync_engine.dialect
        commit = dialect.do_commit
        sync = self.engine.sync_engine

        @event.listens_for(sync, "commit")
        def note(connection: sa.Connection) -> None:
            if self.main is not None:
                self.main.candidate = copy.deepcopy(self.main.rows)

        def do_commit(connection: Any) -> None:
            lose, self.lose_commit = self.lose_commit, None
            if lose is None:
                commit(connection)
                return
            self.was_lost = True
            if lose.committed:
                commit(connection)
            if dialect.name == "postgresql":
                connection._connection.terminate()
                raise dialect.loaded_dbapi.InterfaceError("connection is closed")
            raise dialect.loaded_dbapi.OperationalError("connection closed")

        dialect.do_commit = do_commit

    # --- one program

    def make_blob(self) -> Blob:
        body = b"blob %d" % len(self.blobs)
        blob = Blob(body)
        self.blobs[id(blob)] = (blob, body)
        return blob

    def bytes_of(self, value: object) -> bytes | None:
        """Return what a value of an attribute stands for."""
        if not isinstance(value, Blob):
            return None
        if id(value) in self.blobs:
            return self.blobs[id(value)][1]
        if value._uri is not None:
            return self.sent.get(value._uri, b"?")
        if value._source is not None:
            return bytes(value._source)  # type: ignore[arg-type]  # programs use bytes only
        return self.bytes_of(value._copy_of)

    async def _reset(self) -> None:
        self.sent.clear()
        self.blobs.clear()
        self.faults.clear()
        self.late.clear()
        self.refused.clear()
        self.unknown.clear()
        self.was_lost, self.lose_commit, self.main = False, None, None
        self.committed = copy.deepcopy(SEED)
        uris: dict[Cell, str] = {}
        for row, columns in SEED.items():
            for column, body in columns.items():
                if body is not None:
                    uri = f"s3://{self.store.bucket}/{self.store.prefix}/seed/id={uuid.uuid4().hex}"
                    uris[row, column] = uri
                    self.sent[uri] = body
        await self._put_seed(uris)
        await self.database.write(_seed_script(uris, is_journaled=self.is_journaled))

    async def _put_seed(self, uris: dict[Cell, str]) -> None:
        if isinstance(self.store, MemoryStore):
            self.store.objects.clear()
            self.store.calls.clear()
            for uri in uris.values():
                body = self.sent[uri]
                metadata = {"sha256": hashlib.sha256(body).hexdigest()}
                self.store.objects[uri] = StoredObject(body, metadata, {})
            return
        store: S3Store = self.store
        async with store:
            left = [uri async for uri in store.iter_uris()]
            if left:
                await S3Store.delete_many(store, left)
            for uri in uris.values():
                bucket, _, key = uri.removeprefix("s3://").partition("/")
                await store.client.put_object(Bucket=bucket, Key=key, Body=self.sent[uri])

    async def run(self, program: Program) -> None:
        """Run one program and ask both stores.

        Raises:
            AssertionError: what is wrong.
        """
        if not self.count:  # and not earlier: Hypothesis asks for the referrers of its own objects
            gc.collect()
            gc.freeze()  # so that collecting after a cancellation is quick
        self.count += 1
        await self._reset()
        task: ArmedTask | None = None
        async with self.store:
            task = ArmedTask(self._play(program, lambda moment: task.arm(moment)))  # type: ignore[union-attr]  # noqa: PLW0108
            try:
                await task.run()
            except asyncio.CancelledError:
                raise
            except AssertionError:
                raise
            except Exception as exc:
                self.note_error(exc)
                traceback.clear_frames(exc.__traceback__)
            await self.land_late()
            if self.journal is not None:
                await self._let_worker_work(self.journal)
        self.main = None
        await asyncio.sleep(0)
        await self.verify()

    async def _let_worker_work(self, journal: Journal) -> None:
        """Let days pass: whatever the journal lists is due, and no request is refused any more."""
        self.faults.clear()
        self.refused.clear()
        gc.collect()
        worker = Worker(journal, self.engine, quarantine=timedelta(0))
        long_ago = self.database.long_ago
        self.main = self.lose_commit = None
        async with self.engine.begin() as connection:
            past = f"UPDATE {journal.table.name} SET since = {long_ago}, not_before = {long_ago}"  # noqa: S608
            await connection.exec_driver_sql(past)
        await worker.drain()
        async with self.engine.connect() as connection:
            left = (await connection.execute(sa.select(journal.table))).all()
        if left:
            raise AssertionError(f"the journal lists what is done with: {left}")

    async def land_late(self) -> None:
        for send, request in self.late:
            with contextlib.suppress(BlobNotFoundError):
                await send(request)
        self.late.clear()
        if isinstance(self.store, MemoryStore):
            self.store.land_late()

    async def _play(self, program: Program, arm: Any) -> None:
        session = self.sessions(
            autoflush=program.autoflush, expire_on_commit=program.expires, info={}
        )
        actor = Actor(self, session, program.on_error, arm)
        self.main = actor
        async with session:
            for step in program.steps:
                await actor.take(step)
            if program.commits:
                await actor.take(Do("commit"))

    def _note_complaint(self, context: dict[str, Any]) -> None:
        # of a connection that was cancelled: SQLAlchemy closes it in a task of its own, and
        # collecting what the cancellation has left may take that
        if "_terminate_graceful_close" not in repr(context):
            self.complaints.append(repr(context))

    def note_error(self, error: BaseException) -> None:
        name = type(error).__name__
        self.statistics[name] = self.statistics.get(name, 0) + 1
        seen: set[int] = set()
        queue: list[BaseException | None] = [error]
        while queue:
            each = queue.pop()
            if each is None or id(each) in seen:
                continue
            seen.add(id(each))
            queue += [each.__cause__, each.__context__]
            if isinstance(each, CommitOutcomeUnknown):
                self.unknown.update(each.uris)

    # --- the verdict

    async def read(self) -> tuple[State, dict[Cell, str]]:
        """Return what is committed, as bytes that were sent, and as URIs."""
        state: State = {}
        uris: dict[Cell, str] = {}

        def take(row: str, **columns: Any) -> None:
            state[row] = {}
            for name, value in columns.items():
                uri = json.loads(value)["uri"] if value and value.startswith("{") else value
                state[row][name] = None if uri is None else self.sent.get(uri, b"?")
                if uri is not None:
                    uris[row, name] = uri

        docs, pages = await self.database.read()
        for key, body, draft, cover, appendix, kind in docs:
            more = {"appendix": appendix} if kind == "report" else {}
            take(key, body=body, draft=draft, cover=cover, **more)
        for key, number, scan in pages:
            take(f"{key}/{number}", scan=scan)
        return state, uris

    async def resolve(self, *possible: State | None) -> None:
        """Find out what is committed, of what may be, although the program is cancelled now."""
        await run_to_end(self._resolve(*possible), seconds=30)

    async def _resolve(self, *possible: State | None) -> None:
        found, uris = await self.read()
        candidates = [each for each in possible if each is not None]
        if found not in candidates:
            differences = [_difference(found, each) for each in candidates]
            raise AssertionError(f"WRONG ROWS: (found, expected) {differences}")
        self.committed = found
        await self.check_loss(uris)

    async def check_loss(self, uris: dict[Cell, str]) -> None:
        twice = {uri for uri in uris.values() if list(uris.values()).count(uri) > 1}
        if twice:
            raise AssertionError(f"SHARED: {twice}")
        for cell, uri in uris.items():
            if isinstance(self.store, MemoryStore):
                stored = self.store.objects.get(uri)
                body = None if stored is None else stored.body
            else:
                body = await self._get(uri)
            if body is None:
                raise AssertionError(f"LOSS: {cell} names {uri}, which is not there")
            if body != self.sent[uri]:
                raise AssertionError(f"LOSS: {cell} names {uri}, which holds {body!r}")

    async def _get(self, uri: str) -> bytes | None:
        try:
            return await self.store.get(uri)
        except BlobNotFoundError:
            return None

    async def verify(self) -> None:
        """Ask both stores whether they agree, when all is quiet."""
        found, uris = await self.read()
        if found != self.committed:
            raise AssertionError(f"WRONG ROWS at the end: {_difference(found, self.committed)}")
        if isinstance(self.store, MemoryStore):
            await self.check_loss(uris)
            present = set(self.store.objects)
            present.discard(marker_uri(self.store.bucket, self.store.prefix))
        else:
            async with self.store:
                await self.check_loss(uris)
                present = {uri async for uri in self.store.iter_uris()}
        if self.unknown and not self.was_lost:
            raise AssertionError(f"no answer was lost, and yet unknown: {self.unknown}")
        unknown = set() if self.is_journaled else self.unknown
        orphans = present - set(uris.values()) - self.refused - unknown
        if orphans:
            raise AssertionError(f"LEAK: {[(uri, self.sent.get(uri)) for uri in orphans]}")
        left = asyncio.all_tasks() - {asyncio.current_task()}
        mine = [task for task in left if "aioblobcol" in task.get_name()]
        if mine:
            raise AssertionError(f"tasks are left: {mine}")
        pool: Any = self.engine.sync_engine.pool
        if pool.checkedout():
            raise AssertionError("a connection was not given back")
        if self.complaints:
            raise AssertionError(self.complaints.pop())


def _difference(found: State, expected: State) -> dict[str, Any]:
    return {
        row: (found.get(row), expected.get(row))
        for row in (*found, *expected)
        if found.get(row) != expected.get(row)
    }


def _install_journal(store: Any) -> Journal:
    for constraint in _foreign_keys():
        constraint.ondelete = "CASCADE"
    return Journal(Base.metadata, store, retention=timedelta(0))


def _remove_journal(journal: Journal) -> None:
    """Give the metadata back, which other tests use without one."""
    for constraint in _foreign_keys():
        constraint.ondelete = None
    event.remove(Base.metadata, "after_create", journal._after_create)
    event.remove(Base.metadata, "before_drop", journal._before_drop)
    Base.metadata.remove(journal.table)
    Base.metadata.remove(journal.owners)
    Base.metadata.info.clear()


def _foreign_keys() -> list[Any]:
    tables = [Base.metadata.tables[name] for name in ("reports", "pages")]
    return [each for table in tables for each in table.foreign_key_constraints]


def _seed_script(uris: dict[Cell, str], *, is_journaled: bool) -> list[tuple[str, tuple[Any, ...]]]:
    script: list[tuple[str, tuple[Any, ...]]] = [
        (f"DELETE FROM {table}", ())  # noqa: S608 - our own names
        for table in ("pages", "reports", "docs")
    ]
    if is_journaled:
        script.append(("DELETE FROM aioblobcol_journal", ()))
        stage = "INSERT INTO aioblobcol_journal (uri, state) VALUES (?, 'staged')"
        script += [(stage, (uri,)) for uri in uris.values()]
    for row in SEED:
        if "/" in row:
            key, _, number = row.partition("/")
            script.append(
                (
                    "INSERT INTO pages (doc_key, number, scan) VALUES (?, ?, ?)",
                    (key, int(number), uris.get((row, "scan"))),
                )
            )
            continue
        cover = uris.get((row, "cover"))
        script.append(
            (
                "INSERT INTO docs (key, kind, body, draft, cover) VALUES (?, ?, ?, ?, ?)",
                (
                    row,
                    "report" if row == "r" else "doc",
                    uris.get((row, "body")),
                    uris.get((row, "draft")),
                    None if cover is None else json.dumps({"uri": cover}),
                ),
            )
        )
        if row == "r":
            script.append(
                (
                    "INSERT INTO reports (key, appendix) VALUES (?, ?)",
                    (row, uris.get((row, "appendix"))),
                )
            )
    return script


class _Unknown(logging.Handler):
    """Takes the URIs from the log that says what is in doubt."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        for argument in record.args if isinstance(record.args, tuple) else ():
            if isinstance(argument, CommitOutcomeUnknown):
                self._world.unknown.update(argument.uris)
        if record.exc_info:
            self._world.complaints.append(record.getMessage() + repr(record.exc_info[1]))


class Actor:
    """One session and the model of its transaction.

    Attributes:
        rows: what the transaction's rows hold, flushed changes included.
        candidate: what is committed if the COMMIT that was sent last took effect.
    """

    def __init__(self, world: World, session: AsyncSession, on_error: str, arm: Any) -> None:
        self.world, self.session, self.on_error, self._arm = world, session, on_error, arm
        self.rows = copy.deepcopy(world.committed)
        self.snapshots: dict[Any, State] = {}
        self.candidate: State | None = None
        self.has_written = False
        self.savepoints: list[Any] = []
        self._planned: list[tuple[str, str, dict[str, bytes | None]]] = []
        session.sync_session.info["actor"] = self

    def start_over(self) -> None:
        self.rows = copy.deepcopy(self.world.committed)
        self.snapshots.clear()
        self.has_written = False

    # --- the model of a flush

    def plan_flush(self, session: Session) -> None:
        """Read what the flush will write, from what the session holds."""
        self.has_written = True
        self._planned = []
        deleted = [*session.deleted]
        for instance in (*session.new, *session.dirty):
            state = sa.inspect(instance)
            is_orphan = state.mapper._is_orphan(state)
            if is_orphan and state.key is not None:
                deleted.append(instance)
                continue
            if is_orphan and state._orphaned_outside_of_session:
                continue
            row = row_of(instance)
            columns = {}
            for column in COLUMNS_OF[type(instance)]:
                if column not in state.dict:
                    continue
                if (
                    state.key is None
                    or get_history(instance, column, PASSIVE_NO_INITIALIZE).has_changes()
                ):
                    columns[column] = self.world.bytes_of(state.dict[column])
            self._planned.append(("add" if state.key is None else "set", row, columns))
        self._planned += [("delete", row_of(instance), {}) for instance in deleted]

    def flushed(self) -> None:
        planned, self._planned = self._planned, []
        added = {row for what, row, _ in planned if what == "add"}
        for what, row, columns in planned:
            if what == "delete" and row not in added:
                self._drop(row)
            elif what == "add" or columns:
                self.rows.setdefault(row, dict.fromkeys(COLUMNS_OF[class_of(row)]))
                self.rows[row].update(columns)

    def _drop(self, row: str) -> None:
        """The row is gone and, where the foreign keys say so, its pages are."""
        self.rows.pop(row, None)
        if self.world.is_journaled:
            for page in [each for each in self.rows if each.startswith(f"{row}/")]:
                self.rows.pop(page)

    # --- steps

    async def take(self, step: Any) -> None:
        """Take one step, and do about an error what the program does."""
        try:
            await self._do(step)
        except AssertionError:
            raise
        except Exception as exc:
            self.world.note_error(exc)
            traceback.clear_frames(exc.__traceback__)
            if self.on_error == "give up":
                raise
            if self.on_error == "roll back":
                await self._roll_back()

    async def _do(self, step: Any) -> None:  # noqa: C901, PLR0912 - one line for each step
        if isinstance(step, Assign):
            await self._set(step.cell, self._value(step.what))
        elif isinstance(step, Move):
            value = await self._get(step.source)
            if value is not None and step.source != step.target:
                await self._set(step.target, value)
                if step.clears:
                    await self._set(step.source, None)
        elif isinstance(step, Swap):
            one, other = await self._get(step.one), await self._get(step.other)
            if await self._find(step.one[0]) and await self._find(step.other[0]):
                await self._set(step.one, other)
                await self._set(step.other, one)
        elif isinstance(step, Share):
            blob = self.world.make_blob()
            for cell in step.cells:
                await self._set(cell, blob)
        elif isinstance(step, OnRow):
            await self._on_row(step.do, step.row)
        elif isinstance(step, Do):
            await self._control(step.what)
        elif isinstance(step, Read):
            await self._read(step.cell)
        elif isinstance(step, BulkUpdate):
            await self._bulk_update(step)
        elif isinstance(step, BulkInsert):
            await self._bulk_insert(step.rows)
        elif isinstance(step, BulkDelete):
            await self._bulk_delete(step.row)
        elif isinstance(step, Raw):
            await self._raw(step.what, step.row)
        elif isinstance(step, Fault):
            self.world.faults.append([step.operation, step.how, step.nth])
        elif isinstance(step, LoseCommit):
            self.world.lose_commit = step
        elif isinstance(step, Cancel):
            self._arm(step.moment)
        elif isinstance(step, Other):
            await self._let_other(step.steps)

    def _value(self, what: str) -> Blob | None:
        if what == "none":
            return None
        if what == "used before" and self.world.blobs:
            return list(self.world.blobs.values())[-1][0]
        return self.world.make_blob()

    async def _find(self, row: str) -> Any:
        for instance in self.session.new:
            if row_of(instance) == row:
                return instance
        class_ = class_of(row)
        found: Any
        if class_ is Page:
            key, _, number = row.partition("/")
            found = await self.session.get(Page, (key, int(number)))
        else:
            found = await self.session.get(Doc, row)
        return None if found is None or found in self.session.deleted else found

    async def _get(self, cell: Cell) -> Blob | None:
        instance = await self._find(cell[0])
        if instance is None:
            return None
        state = sa.inspect(instance)
        if cell[1] not in state.dict and state.key is not None:
            await self.session.refresh(instance, [cell[1]])
        value: Blob | None = state.dict.get(cell[1])
        return value

    async def _set(self, cell: Cell, value: Blob | None) -> None:
        instance = await self._find(cell[0])
        if instance is not None:
            setattr(instance, cell[1], value)

    async def _make(self, row: str) -> Any:
        first, *others = COLUMNS_OF[class_of(row)]
        values: dict[str, Any] = {first: self.world.make_blob(), **dict.fromkeys(others)}
        if class_of(row) is not Page:
            return class_of(row)(key=row, **values)
        key, _, number = row.partition("/")
        doc = await self._find(key)
        return None if doc is None else Page(doc=doc, doc_key=key, number=int(number), **values)

    async def _on_row(self, do: str, row: str) -> None:  # noqa: C901, PLR0912 - as `_do`
        instance = await self._find(row)
        if do == "merge":
            made = class_of(row)(
                **_key(row), **{COLUMNS_OF[class_of(row)][0]: self.world.make_blob()}
            )
            await self.session.merge(made)
        elif do == "add":
            made = await self._make(row)
            if made is not None:
                self.session.add(made)
        elif instance is None:
            return
        elif do in {"delete", "delete and add"}:
            if instance in self.session.new:
                self.session.expunge(instance)
            else:
                await self.session.delete(instance)
            if do == "delete and add":
                made = await self._make(row)
                if made is not None:
                    self.session.add(made)
        elif do == "ahead":
            await upload_blobs(self.session, instance)
        elif instance in self.session.new:
            return
        elif do == "expire":
            self.session.expire(instance)
        elif do == "refresh":
            await self.session.refresh(instance)
        elif do == "orphan" and isinstance(instance, Page):
            doc = await self._find(instance.doc_key)
            if doc is not None:
                await self.session.refresh(doc, ["pages"])
                if instance in doc.pages:
                    doc.pages.remove(instance)

    async def _control(self, what: str) -> None:  # noqa: C901 - as `_do`
        session = self.session
        if what == "flush":
            await session.flush()
        elif what == "commit":
            await self._commit()
        elif what == "rollback":
            self.savepoints.clear()
            await session.rollback()
        elif what == "close":
            self.savepoints.clear()
            await session.close()
            self.start_over()
        elif what == "savepoint" and len(self.savepoints) < 3:
            self.savepoints.append(await session.begin_nested())
        elif what == "release" and self.savepoints:
            await self.savepoints.pop().commit()
        elif what == "roll back to savepoint" and self.savepoints:
            await self.savepoints.pop().rollback()
        elif what == "expire all":
            session.expire_all()
        elif what == "query":
            await session.scalars(sa.select(Doc))
        elif what == "failing statement":
            await session.execute(sa.text("INSERT INTO docs (key) VALUES (NULL)"))

    async def _commit(self) -> None:
        before, self.candidate = self.world.committed, None
        self.savepoints.clear()
        try:
            await self.session.commit()
        except BaseException:
            await self.world.resolve(before, self.candidate)
            if not self.session.in_transaction():  # it goes on if the flush could not upload
                self.start_over()
            raise
        await self.world.resolve(before if self.candidate is None else self.candidate)
        self.start_over()

    async def _roll_back(self) -> None:
        if self.savepoints:
            await self.savepoints.pop().rollback()
        else:
            await self.session.rollback()

    async def _read(self, cell: Cell) -> None:
        blob = await self._get(cell)
        if blob is None or not blob.is_stored:
            return
        expected = self.world.bytes_of(blob)
        body = await blob.read()
        if body != expected:
            raise AssertionError(f"{cell} was read as {body!r}, and was {expected!r}")

    async def _bulk_update(self, step: BulkUpdate) -> None:
        session, column = self.session, step.column
        if step.how == "list":
            blobs = {row: self.world.make_blob() for row in step.rows}
            values = {row: {column: self.world.bytes_of(blob)} for row, blob in blobs.items()}
            try:
                await session.execute(
                    sa.update(Doc), [{"key": row, column: blob} for row, blob in blobs.items()]
                )
            except StaleDataError:  # and yet it was sent
                self._bulk_updated(values)
                raise
            self._bulk_updated(values)
        elif step.how == "value":
            row, blob = step.rows[0], self.world.make_blob()
            await session.execute(sa.update(Doc).where(Doc.key == row).values({column: blob}))
            self._bulk_updated({row: {column: self.world.bytes_of(blob)}})
        elif step.how == "appendix":
            blob = self.world.make_blob()
            await session.execute(sa.update(Report).where(Report.key == "r").values(appendix=blob))
            self._bulk_updated({"r": {"appendix": self.world.bytes_of(blob)}})
        elif step.how == "empty":
            await session.execute(
                sa.update(Doc).where(Doc.key.in_(step.rows)).values({column: None})
            )
            self._bulk_updated({row: {column: None} for row in step.rows})
        elif step.how == "swap":
            await session.execute(
                sa.update(Doc).where(Doc.key.in_(step.rows)).values(body=Doc.draft, draft=Doc.body)
            )
            now = {row: self.rows[row] for row in step.rows if row in self.rows}
            self._bulk_updated(
                {row: {"body": old["draft"], "draft": old["body"]} for row, old in now.items()}
            )
        elif step.how == "copy":
            try:
                await session.execute(
                    sa.update(Doc).where(Doc.key.in_(step.rows)).values(draft=Doc.body)
                )
            except BlobSharedError:
                self._copied(step.rows)
                raise
            self._copied(step.rows)

    def _copied(self, rows: Sequence[str]) -> None:
        now = {row: self.rows[row] for row in rows if row in self.rows}
        self._bulk_updated({row: {"draft": old["body"]} for row, old in now.items()})

    def _bulk_updated(self, values: dict[str, dict[str, bytes | None]]) -> None:
        self.has_written = True
        for row, columns in values.items():
            if row in self.rows:
                self.rows[row] |= columns

    async def _bulk_insert(self, rows: Sequence[str]) -> None:
        class_ = class_of(rows[0])
        column = COLUMNS_OF[class_][0]
        values, made = [], {}
        for row in rows:
            if class_of(row) is class_ and class_ is not Report:
                blob = self.world.make_blob()
                kind = {} if class_ is Page else {"kind": "doc"}
                values.append({**_key(row), **kind, column: blob})
                made[row] = {
                    **dict.fromkeys(COLUMNS_OF[class_]),
                    column: self.world.bytes_of(blob),
                }
        if values:
            self.has_written = True
            await self.session.execute(sa.insert(class_), values)
            self.rows |= made

    async def _bulk_delete(self, row: str) -> None:
        self.has_written = True
        if class_of(row) is Page:
            key, _, number = row.partition("/")
            await self.session.execute(
                sa.delete(Page).where(Page.doc_key == key, Page.number == int(number))
            )
            self.rows.pop(row, None)
        elif row != "r":
            await self.session.execute(sa.delete(Page).where(Page.doc_key == row))
            for page in [each for each in self.rows if each.startswith(f"{row}/")]:
                self.rows.pop(page)
            await self.session.execute(sa.delete(Doc).where(Doc.key == row))
            self.rows.pop(row, None)

    async def _raw(self, what: str, row: str) -> None:
        self.has_written = True
        key, _, number = row.partition("/")
        where = f"key = '{key}'" if not number else f"doc_key = '{key}' AND number = {number}"
        table, column = ("pages", "scan") if number else ("docs", "body")
        if what == "delete":
            await self.session.execute(sa.text(f"DELETE FROM {table} WHERE {where}"))  # noqa: S608
            self._drop(row)
        elif what == "empty":
            update = f"UPDATE {table} SET {column} = NULL WHERE {where}"  # noqa: S608
            await self.session.execute(sa.text(update))
            self._bulk_updated({row: {column: None}})
        elif what == "exchange" and not number:
            update = f"UPDATE docs SET body = draft, draft = body WHERE {where}"  # noqa: S608
            await self.session.execute(sa.text(update))
            old = self.rows.get(row, {"body": None, "draft": None})
            self._bulk_updated({row: {"body": old["draft"], "draft": old["body"]}})
        elif what == "truncate":
            empty = self.world.database.truncate.format(table="pages")
            await self.session.execute(sa.text(empty))
            for page in [each for each in self.rows if "/" in each]:
                self.rows.pop(page)

    async def _let_other(self, steps: Sequence[Any]) -> None:
        """Have a second session do something, unless it would wait for this one."""
        if self.has_written:
            return
        world, lose = self.world, self.world.lose_commit
        world.lose_commit = None
        try:
            async with world.sessions() as session:
                other = Actor(world, session, "give up", lambda _: None)
                world.main = other
                try:
                    for step in steps:
                        await other.take(step)
                    await other.take(Do("commit"))
                except AssertionError:
                    raise
                except Exception as exc:
                    world.note_error(exc)
                    traceback.clear_frames(exc.__traceback__)
        finally:
            world.main, world.lose_commit = self, lose
        self.rows = copy.deepcopy(world.committed)
        for savepoint in self.snapshots:
            self.snapshots[savepoint] = copy.deepcopy(world.committed)


def row_of(instance: Any) -> str:
    """Return the name of an object's row."""
    values = sa.inspect(instance)
    if isinstance(instance, Page):
        if values.identity is not None:
            return f"{values.identity[0]}/{values.identity[1]}"
        return f"{values.dict.get('doc_key')}/{values.dict.get('number')}"
    return str(values.identity[0] if values.identity is not None else instance.key)


def _key(row: str) -> dict[str, Any]:
    if "/" not in row:
        return {"key": row}
    key, _, number = row.partition("/")
    return {"doc_key": key, "number": int(number)}
