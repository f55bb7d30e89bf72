"""What the kill tests' children do: rows that say what their objects' bytes must be.

Every program tells in advance what the rows will be, and afterwards that they are, so that whoever
finds the stores after a kill knows what must be in them.
"""

from __future__ import annotations

import contextlib
import io
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aioblobcol import (
    Blob,
    BlobType,
    Journal,
    PutS3ApiCall,
    blob_sessionmaker,
    blob_transaction,
    put_s3,
    upload_blobs,
    use_explicit_begin,
)
from aioblobcol._check import Check
from aioblobcol._sources import PART_BYTES
from aioblobcol._worker import Worker

PREFIX = "app"
ALIVE = 4
"""The advisory lock that every connection of a child shares for as long as its backend lives."""

LARGE = "large "

Contents = dict[str, str]
"""Cell (``key.column``) to the text of its object; see `bytes_of`."""


def bytes_of(text: str) -> bytes:
    """Return what an object holds: its text, or more than one part of it if it is ``large ...``."""
    body = text.encode()
    return body * (PART_BYTES // len(body) + 1) if text.startswith(LARGE) else body


class AbandonedError(Exception):
    pass


class Place:
    """Tables with a journal in one database, and their one store."""

    def __init__(self, engine: AsyncEngine, store: Any) -> None:
        class Base(DeclarativeBase):
            pass

        class Doc(Base):
            __tablename__ = "killed_docs"

            key: Mapped[str] = mapped_column(primary_key=True)
            body: Mapped[Blob | None] = mapped_column(BlobType())
            body_says: Mapped[str | None]
            cover: Mapped[Blob | None] = mapped_column(BlobType(format="json"))
            cover_says: Mapped[str | None]

        class Task(Base):
            __tablename__ = "killed_tasks"

            key: Mapped[str] = mapped_column(primary_key=True)
            html: Mapped[str | None]
            html_says: Mapped[str | None]
            doc: Mapped[str | None] = mapped_column(
                sa.ForeignKey("killed_docs.key", ondelete="CASCADE")
            )

        self.Doc, self.Task, self.metadata = Doc, Task, Base.metadata
        self.engine, self.store = engine, store
        self.journal = Journal(Base.metadata, store, engine=engine, uri_columns=[Task.html])
        self.sessions = blob_sessionmaker(engine, journal=self.journal)

    def worker(self, *, quarantine: timedelta = timedelta(0)) -> Worker:
        return Worker(self.journal, self.engine, quarantine=quarantine)

    def check(self) -> Check:
        """Return one that condemns what no row names, however young."""
        return Check(
            self.engine,
            self.store,
            self.metadata,
            uri_columns=[self.Task.html],
            journal=self.journal,
            delete=True,
            min_age=timedelta(0),
        )

    def explicit(self, session: AsyncSession) -> Any:
        return blob_transaction(session, store=self.store, journal=self.journal)

    async def put(self, key: str, says: str, old: str | None = None) -> Any:
        """Upload by hand."""
        return await put_s3(
            [PutS3ApiCall("html", says.encode(), old)],
            pk=key,
            store=self.store,
            journal=self.journal,
        )

    def doc(self, key: str, **says: str) -> Any:
        """Return a new row, with objects."""
        return self.Doc(key=key, **values(**says))

    async def cells(self, connection: AsyncConnection) -> tuple[dict[str, str], Contents]:
        """Return what the rows name and what they say, by cell."""
        named: dict[str, str] = {}
        says: Contents = {}
        for model, columns in ((self.Doc, ("body", "cover")), (self.Task, ("html",))):
            for row in await connection.execute(sa.select(model.__table__)):
                for column in columns:
                    cell, value = f"{row.key}.{column}", getattr(row, column)
                    if value is not None:
                        named[cell] = value.uri if isinstance(value, Blob) else value
                    if getattr(row, f"{column}_says") is not None:
                        says[cell] = getattr(row, f"{column}_says")
        return named, says

    async def let_days_pass(self) -> None:
        """Let everything that the journal lists have been there for days."""
        long_ago: Any = (
            sa.func.datetime("now", "-9 days")
            if self.engine.dialect.name == "sqlite"
            else sa.func.now() - timedelta(days=9)
        )
        async with self.engine.begin() as connection:
            statement = sa.update(self.journal.table).values(since=long_ago, not_before=long_ago)
            await connection.execute(statement)

    async def listed(self) -> dict[str, str]:
        """Return the state of everything that the journal lists."""
        table = self.journal.table
        async with self.engine.connect() as connection:
            found = await connection.execute(sa.select(table.c.uri, table.c.state))
            return {uri: state for uri, state in found}  # noqa: C416 - rows are no pairs for mypy


def values(**says: str) -> dict[str, Any]:
    """Return columns with objects, and beside them what they must hold."""
    blobs = {column: Blob(bytes_of(text)) for column, text in says.items()}
    return {**blobs, **{f"{column}_says": text for column, text in says.items()}}


def open_engine(url: str, *, is_waited_for: bool = True, **arguments: Any) -> AsyncEngine:
    """Return an engine whose PostgreSQL backends can be waited for when their client is dead."""
    engine = create_async_engine(url, **arguments)
    use_explicit_begin(engine)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine.sync_engine, "connect", _set_pragmas)
    elif is_waited_for:
        sa.event.listen(engine.sync_engine, "connect", _hold_lock)
    return engine


def _set_pragmas(dbapi_connection: Any, _record: object) -> None:
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA busy_timeout=20000")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _hold_lock(dbapi_connection: Any, _record: object) -> None:
    statement = f"SELECT pg_advisory_lock_shared({ALIVE})"
    dbapi_connection.run_async(lambda driver: driver.execute(statement))


class Told:
    """What a program has told about the rows that are its own.

    Attributes:
        who: the program.
        rows: what is committed for certain.
    """

    def __init__(self, send: Callable[[Mapping[str, Any]], None], who: str = "") -> None:
        self.who = who
        self.rows: Contents = {}
        self._send = send

    @contextlib.contextmanager
    def committing(self, changes: Mapping[str, str | None]) -> Iterator[None]:
        """Tell what will be committed by the end of the block, and then that it is."""
        after = {**self.rows, **changes}
        rows = {cell: text for cell, text in after.items() if text is not None}
        self._send({"who": self.who, "maybe": rows})
        yield
        self.rows = rows
        self._send({"who": self.who, "committed": rows})

    def planted(self, uris: list[str]) -> None:
        """Tell that these objects are made past the journal."""
        self._send({"planted": uris})

    def begin(self) -> None:
        """Tell that from now on the program may be killed."""
        self._send({"begun": True})


Program = Callable[[Place, Told], Awaitable[None]]


async def managed(place: Place, told: Told) -> None:
    """Objects of mapped attributes, through the unit of work."""
    sessions, doc = place.sessions, place.Doc
    told.begin()
    with told.committing({"d1.body": "one", "d1.cover": "front"}):
        async with sessions.begin() as session:
            session.add(place.doc("d1", body="one", cover="front"))
    with told.committing({"d1.body": "two", "d3.body": "three"}):
        async with sessions.begin() as session:
            first = await session.get_one(doc, "d1")
            first.body, first.body_says = Blob(b"two"), "two"
            with contextlib.suppress(AbandonedError):
                async with session.begin_nested():
                    session.add(place.doc("d2", body="undone"))
                    await session.flush()
                    raise AbandonedError
            session.add(place.doc("d3", body="three"))
    with contextlib.suppress(AbandonedError):
        async with sessions.begin() as session:
            session.add(place.doc("d4", body="failed", cover="failed"))
            await session.flush()
            raise AbandonedError
    with told.committing({"d5.body": "ahead"}):
        async with sessions() as session:
            ahead = place.doc("d5", body="ahead")
            await upload_blobs(session, ahead)
            session.add(ahead)
            await session.commit()
    with told.committing({"d6.body": "ahead"}):
        async with sessions.begin() as session:
            source = await session.get_one(doc, "d5")
            session.add(doc(key="d6", body=source.body, body_says="ahead"))  # is copied
    with told.committing({"d1.body": None, "d1.cover": None}):
        async with sessions.begin() as session:
            await session.delete(await session.get_one(doc, "d1"))


async def explicit(place: Place, told: Told) -> None:
    """``put_s3``, in blocks and by hand."""
    task = place.Task
    told.begin()
    async with AsyncSession(place.engine, expire_on_commit=False) as session:
        with told.committing({"t1.html": "one"}):
            async with place.explicit(session) as tx:
                put = await tx.put_s3(pk="t1", api_calls=[PutS3ApiCall("html", b"one", None)])
                session.add(row := task(key="t1", html_says="one", **put.to_values()))
        with told.committing({"t1.html": "two"}):
            async with place.explicit(session) as tx:
                await session.refresh(row)
                put = await tx.put_s3(pk="t1", api_calls=[PutS3ApiCall("html", b"two", row.html)])
                row.html, row.html_says = put.to_values()["html"], "two"
        with contextlib.suppress(AbandonedError):
            async with place.explicit(session) as tx:
                put = await tx.put_s3(pk="t2", api_calls=[PutS3ApiCall("html", b"failed", None)])
                session.add(task(key="t2", html_says="failed", **put.to_values()))
                await session.flush()
                raise AbandonedError
    with told.committing({"t3.html": "by hand"}):
        put = await place.put("t3", "by hand")
        async with AsyncSession(place.engine) as session:
            session.add(task(key="t3", html_says="by hand", **put.to_values()))
            await session.commit()
        await put.clean_up_old_s3_object_when_update_row_succeeded()
    put = await place.put("t4", "failed")
    await put.clean_up_created_s3_object_when_create_or_update_row_failed()
    with told.committing({"t1.html": None}):
        async with AsyncSession(place.engine) as session, place.explicit(session) as tx:
            row = await session.get_one(task, "t1")
            tx.delete_s3([row.html])
            await session.delete(row)


async def bulk(place: Place, told: Told) -> None:
    """Statements that the unit of work does not see."""
    doc, task, sessions = place.Doc, place.Task, place.sessions
    told.begin()
    with told.committing({f"d{n}.body": f"body {n}" for n in range(4)}):
        async with sessions.begin() as session:
            rows = [{"key": f"d{n}", **values(body=f"body {n}")} for n in range(4)]
            await session.execute(sa.insert(doc), rows)
    puts = [await place.put(key, key) for key in ("t1", "t2")]
    with told.committing({"t1.html": "t1", "t2.html": "t2"}):
        async with place.engine.begin() as connection:
            rows = [
                {"key": key, "html_says": key, "doc": "d1", **put.to_values()}
                for key, put in zip(("t1", "t2"), puts, strict=True)
            ]
            await connection.execute(sa.insert(task), rows)
    for put in puts:
        await put.clean_up_old_s3_object_when_update_row_succeeded()
    with told.committing({"d2.body": "new", "d3.body": None}):
        async with sessions.begin() as session:
            statement = sa.update(doc).where(doc.key == "d2").values(**values(body="new"))
            await session.execute(statement)
            await session.execute(sa.delete(doc).where(doc.key == "d3"))
    with told.committing({"d0.body": None}):
        async with place.engine.begin() as connection:
            emptied = "UPDATE killed_docs SET body = NULL, body_says = NULL WHERE key = 'd0'"
            await connection.execute(sa.text(emptied))
    with told.committing({"d1.body": None, "t1.html": None, "t2.html": None}):
        async with place.engine.begin() as connection:
            await connection.execute(sa.text("DELETE FROM killed_docs WHERE key = 'd1'"))


async def worker(place: Place, told: Told) -> None:
    """Retired objects, and staged ones beyond their lease, are deleted, and deleted again."""
    with told.committing({"d1.body": "kept", "d1.cover": "kept"}):
        async with place.sessions.begin() as session:
            session.add(place.doc("d1", body="kept", cover="kept"))
            session.add_all([place.doc(key, body="x", cover="y") for key in ("d2", "d3")])
            await session.flush()
            await session.execute(sa.text("DELETE FROM killed_docs WHERE key <> 'd1'"))
    await place.put("t1", "forgotten")
    async with place.engine.begin() as connection:
        never_sent = f"s3://{place.store.bucket}/{PREFIX}/x/id={uuid.uuid4().hex}"
        staged = sa.insert(place.journal.table).values(uri=never_sent, state="staged")
        await connection.execute(staged)
    await place.let_days_pass()
    told.begin()
    await place.worker(quarantine=timedelta(hours=1)).drain()
    await place.let_days_pass()
    await place.worker().drain()


async def check(place: Place, told: Told) -> None:
    """Objects that nothing knows are condemned, and deleted by a worker."""
    with told.committing({"d1.body": "kept", "d2.cover": "kept"}):
        async with place.sessions.begin() as session:
            session.add_all([place.doc("d1", body="kept"), place.doc("d2", cover="kept")])
    await place.put("t1", "staged")
    keys = [f"{PREFIX}/x/id={uuid.uuid4().hex}" for _ in range(4)]
    told.planted([f"s3://{place.store.bucket}/{key}" for key in keys])
    for key in keys:
        await place.store.client.put_object(Bucket=place.store.bucket, Key=key, Body=b"orphan")
    told.begin()
    async for finding in place.check().findings():
        assert finding.is_condemned
    await place.worker().drain()


async def large(place: Place, told: Told) -> None:
    """Objects of several parts, beside small ones; of bytes, of a stream, and for nothing."""
    one, two = f"{LARGE}one", f"{LARGE}two"
    told.begin()
    with told.committing({"d1.body": one, "d1.cover": "front"}):
        async with place.sessions.begin() as session:
            session.add(place.doc("d1", body=one, cover="front"))
    with contextlib.suppress(AbandonedError):
        async with place.sessions.begin() as session:
            session.add(place.doc("d2", body=f"{LARGE}failed"))
            await session.flush()
            raise AbandonedError
    with told.committing({"d1.body": two}):
        async with place.sessions.begin() as session:
            first = await session.get_one(place.Doc, "d1")
            first.body, first.body_says = Blob(io.BytesIO(bytes_of(two))), two


async def churn_managed(place: Place, told: Told, key: str) -> None:
    """Create, replace and delete a row of one's own."""
    doc, sessions = place.Doc, place.sessions
    with told.committing({f"{key}.body": "one", f"{key}.cover": "front"}):
        async with sessions.begin() as session:
            session.add(place.doc(key, body="one", cover="front"))
    with told.committing({f"{key}.body": "two"}):
        async with sessions.begin() as session:
            row = await session.get_one(doc, key)
            row.body, row.body_says = Blob(b"two"), "two"
    with told.committing({f"{key}.body": None, f"{key}.cover": None}):
        async with sessions.begin() as session:
            await session.delete(await session.get_one(doc, key))


async def churn_explicit(place: Place, told: Told, key: str) -> None:
    """Create, replace and delete a row of one's own."""
    task, cell = place.Task, f"{key}.html"
    async with AsyncSession(place.engine, expire_on_commit=False) as session:
        with told.committing({cell: "one"}):
            async with place.explicit(session) as tx:
                put = await tx.put_s3(pk=key, api_calls=[PutS3ApiCall("html", b"one", None)])
                session.add(row := task(key=key, html_says="one", **put.to_values()))
        with told.committing({cell: "two"}):
            async with place.explicit(session) as tx:
                put = await tx.put_s3(pk=key, api_calls=[PutS3ApiCall("html", b"two", row.html)])
                row.html, row.html_says = put.to_values()["html"], "two"
        with told.committing({cell: None}):
            async with place.explicit(session) as tx:
                tx.delete_s3([row.html])
                await session.delete(row)


PROGRAMS: Mapping[str, Program] = {
    each.__name__: each for each in (managed, explicit, bulk, large, worker, check)
}
