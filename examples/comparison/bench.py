"""The workbench: one library on an empty database and storage, what goes wrong, and the verdict.

The scenarios know only `Lab`; each library has a subclass of its own in a module of its own.
Everything goes wrong in two places: where the storage takes a request, and where COMMIT is sent.
The verdict does not ask the library: it reads the SQLite file and the storage by itself.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol
from unittest import mock

from sqlalchemy import Connection, Engine, event

Operation = Literal["put", "delete"]


class Abort(Exception):  # noqa: N818 - it reads as what the program does
    """What a program raises by itself."""


class StorageRefused(Exception):  # noqa: N818 - it reads as what happened
    """The storage refused a request; it did not take effect."""


@dataclasses.dataclass(slots=True)
class Gate:
    """A place where requests wait until it is opened."""

    reached: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    opened: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def open(self) -> None:
        """Let everybody pass."""
        self.opened.set()


class Faults:
    """What the storage does wrong. Every request meets it before it takes effect."""

    def __init__(self) -> None:
        self._granted: dict[Operation, int] = {}  # how many more succeed; all if not in there
        self._gates: dict[Operation, Gate] = {}
        self._seconds: dict[Operation, float] = {}

    def refuse(self, operation: Operation, *, after: int = 0) -> None:
        """From now on refuse it, but for the first ones."""
        self._granted[operation] = after

    def hold(self, operation: Operation) -> Gate:
        """From now on let it wait at a gate."""
        return self._gates.setdefault(operation, Gate())

    def slow(self, operation: Operation, *, seconds: float) -> None:
        """From now on let it take this long."""
        self._seconds[operation] = seconds

    def meet_now(self, operation: Operation) -> None:
        """Meet a request that is synchronous: waiting would stop everything, so it never waits."""
        if operation in self._granted:
            if self._granted[operation] == 0:
                raise StorageRefused(operation)
            self._granted[operation] -= 1

    async def meet(self, operation: Operation) -> None:
        """Meet a request."""
        self.meet_now(operation)
        await asyncio.sleep(self._seconds.get(operation, 0))
        if gate := self._gates.get(operation):
            gate.reached.set()
            await gate.opened.wait()


class DocSession(Protocol):
    """What the scenarios use of an `AsyncSession`."""

    def add(self, instance: object) -> None:
        """Add a new row."""

    def expire(self, instance: object) -> None:
        """Forget what was loaded of a row."""

    def begin(self) -> AbstractAsyncContextManager[Any]:
        """Open a block that commits, or rolls back when it raises."""

    def begin_nested(self) -> AbstractAsyncContextManager[Any]:
        """Open a savepoint that is released, or rolled back when its block raises."""

    async def get_one(self, entity: Any, ident: Any) -> Any:
        """Load a row."""

    async def delete(self, instance: object) -> None:
        """Delete a row."""

    async def execute(self, statement: Any) -> Any:
        """Send a statement."""

    async def flush(self) -> None:
        """Send what changed."""

    async def commit(self) -> None:
        """Commit."""

    async def rollback(self) -> None:
        """Roll back."""


class Lab(abc.ABC):
    """One library, set up as its documentation tells, on an empty database and storage.

    Attributes:
        distribution: its name on PyPI.
        cannot_play: scenario to the reason why it makes no sense here.
        Doc: its mapped class: ``id``, ``says``, ``file``, ``thumb``, ``folder_id``. What the
            objects of a row should hold follows from ``says``.
        Folder: a mapped class with ``docs``, which is ``cascade="all, delete-orphan"``.
    """

    distribution: ClassVar[str]
    cannot_play: ClassVar[dict[str, str]] = {}
    Doc: ClassVar[type[Any]]
    Folder: ClassVar[type[Any]]

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.database = directory / "rows.db"
        self.faults = Faults()

    # --- what a library has to bring along

    @abc.abstractmethod
    def open(self) -> AbstractAsyncContextManager[None]:
        """Live as long as the program does: make the tables and the storage, close them."""

    @property
    @abc.abstractmethod
    def engine(self) -> Engine:
        """The engine below all sessions."""

    @abc.abstractmethod
    def session(self) -> AbstractAsyncContextManager[DocSession]:
        """Open a session, and close it."""

    @abc.abstractmethod
    def file(self, content: bytes, *, name: str | None = None) -> object:
        """Return what is assigned to a column; ``name`` is the name that a client sent."""

    @abc.abstractmethod
    def key(self, value: str) -> str:
        """Return the key that the text in a column names."""

    @abc.abstractmethod
    def objects(self) -> dict[str, bytes]:
        """Return what the storage holds."""

    async def settle(self) -> None:  # noqa: B027 - most leave nothing running
        """Wait for whatever the library does in the background."""

    # --- what the scenarios use

    def doc(self, says: str, *, name: str | None = None, **columns: Any) -> Any:
        """Return a new row with a file."""
        return self.Doc(says=says, file=self.file(says.encode(), name=name), **columns)

    def rewrite(self, doc: Any, says: str) -> None:
        """Assign another file to a row."""
        doc.says, doc.file = says, self.file(says.encode())

    async def seed(self, says: str) -> int:
        """Commit a row with a file while nothing goes wrong; return its primary key."""
        async with self.session() as session, session.begin():
            session.add(doc := self.doc(says))
        await self.settle()
        return int(doc.id)

    @contextlib.contextmanager
    def commit_fault(self, send: Callable[[Callable[[], None]], None]) -> Iterator[None]:
        """Let ``send`` stand where the next COMMIT is sent; it is given the sending of it."""
        dialect = self.engine.dialect
        do_commit = dialect.do_commit
        faults = iter([send])

        def commit(raw: Any) -> None:
            fault = next(faults, None)
            if fault is None:
                do_commit(raw)
            else:
                fault(lambda: do_commit(raw))

        with mock.patch.object(dialect, "do_commit", commit):
            yield

    def lost_reply(self) -> contextlib.AbstractContextManager[None]:
        """COMMIT is carried out, and then the connection is gone."""

        def send(carry_out: Callable[[], None]) -> None:
            carry_out()
            # the driver's words for it: SQLAlchemy knows by them that the connection is gone
            gone = "Cannot operate on a closed database."
            raise self.engine.dialect.loaded_dbapi.ProgrammingError(gone)

        return self.commit_fault(send)

    def refused_commit(self) -> contextlib.AbstractContextManager[None]:
        """COMMIT is not carried out."""

        def send(_carry_out: Callable[[], None]) -> None:
            raise self.engine.dialect.loaded_dbapi.OperationalError("database is locked")

        return self.commit_fault(send)

    def cancelled_commit(
        self, task: Callable[[], asyncio.Task[None]]
    ) -> contextlib.AbstractContextManager[None]:
        """Cancel a task when its COMMIT is on its way to the driver's thread."""

        def send(carry_out: Callable[[], None]) -> None:
            task().cancel()
            carry_out()

        return self.commit_fault(send)


def use_explicit_begin(engine: Engine) -> None:
    """Make savepoints work on SQLite.

    Source: SQLAlchemy documentation, SQLite, "Enabling Non-Legacy SQLite Transactional Modes".
    """

    @event.listens_for(engine, "connect")
    def disable_driver_begin(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def send_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")


@contextlib.asynccontextmanager
async def awaited(block: contextlib.AbstractContextManager[object]) -> AsyncIterator[None]:
    """Enter a plain ``with`` by ``async with``."""
    with block:
        yield


# --- the verdict


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What was found in both stores when the program had ended, and what had reached it."""

    rows: int
    missing: int
    foreign: int
    unnamed: int
    error: Exception | None

    @property
    def cell(self) -> str:
        """What stands in the table."""
        found = ["LOSS"] * bool(self.missing + self.foreign) + ["LEAK"] * bool(self.unnamed)
        return (" + ".join(found) or "ok") + " (error)" * (self.error is not None)

    def __str__(self) -> str:
        found = [_count(self.rows, "committed row")]
        if self.missing:
            found.append(f"{_count(self.missing, 'object')} named and missing")
        if self.foreign:
            found.append(f"{_count(self.foreign, 'object')} with the bytes of another row")
        if self.unnamed:
            found.append(f"{_count(self.unnamed, 'object')} named by no row")
        if self.error is not None:
            found.append(f"the program got {type(self.error).__name__}")
        return ", ".join(found)


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"


def judge(lab: Lab, error: Exception | None) -> Verdict:
    """Compare what the committed rows name with what the storage holds."""
    with contextlib.closing(sqlite3.connect(lab.database)) as connection:
        rows = connection.execute("SELECT says, file, thumb FROM docs").fetchall()
    named = [
        (lab.key(value), expected.encode())
        for says, file, thumb in rows
        for value, expected in ((file, says), (thumb, thumb_of(says)))
        if value not in {None, "null"}  # a JSON column's way to say NULL
    ]
    objects = lab.objects()
    return Verdict(
        rows=len(rows),
        missing=sum(key not in objects for key, _ in named),
        foreign=sum(objects.get(key, expected) != expected for key, expected in named),
        unnamed=len(objects.keys() - {key for key, _ in named}),
        error=error,
    )


def thumb_of(says: str) -> str:
    """Return what the second file of a row should hold."""
    return f"{says}, small"
