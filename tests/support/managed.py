"""Mapped classes with managed columns, what is committed in them, and a task to be cancelled."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from aioblobcol import Blob, BlobType, Store
from aioblobcol.testing import MemoryStore, assert_consistent

from .awaits import CountedTask


class Base(DeclarativeBase):
    pass


class Doc(Base):
    """Blob columns in both formats; children that die with it."""

    __tablename__ = "docs"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "doc"}  # noqa: RUF012

    key: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    title: Mapped[str | None]
    body: Mapped[Blob | None] = mapped_column(BlobType(content_type="text/html"))
    draft: Mapped[Blob | None] = mapped_column(BlobType())
    cover: Mapped[Blob | None] = mapped_column(BlobType(format="json", max_bytes=2**20))
    pages: Mapped[list[Page]] = relationship(
        cascade="all, delete-orphan", back_populates="doc", order_by="Page.number"
    )


class Report(Doc):
    """Joined inheritance: its own blob is in another table."""

    __tablename__ = "reports"
    __mapper_args__ = {"polymorphic_identity": "report"}  # noqa: RUF012

    key: Mapped[str] = mapped_column(sa.ForeignKey("docs.key"), primary_key=True)
    appendix: Mapped[Blob | None] = mapped_column(BlobType())


class Page(Base):
    """A composite primary key."""

    __tablename__ = "pages"

    doc_key: Mapped[str] = mapped_column(sa.ForeignKey("docs.key"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    scan: Mapped[Blob | None] = mapped_column(BlobType())
    doc: Mapped[Doc] = relationship(back_populates="pages")


COLUMNS: list[Any] = [Doc.body, Doc.draft, Doc.cover, Report.appendix, Page.scan]

Cell = tuple[str, str]
"""A row (``a``, or ``a/1`` for a page) and the name of a column."""

Contents = dict[Cell, bytes]

SEED: Contents = {
    ("a", "body"): b"body a",
    ("a", "cover"): b"cover a",
    ("a/1", "scan"): b"scan 1",
    ("a/2", "scan"): b"scan 2",
    ("b", "body"): b"body b",
    ("b", "cover"): b"cover b",
    ("r", "body"): b"body r",
    ("r", "appendix"): b"appendix r",
}


@asynccontextmanager
async def tables(engine: AsyncEngine) -> AsyncIterator[None]:
    """Create empty tables, and drop them."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    collect()
    gc.freeze()  # what is there already need not be looked at each time
    yield
    gc.unfreeze()
    collect()
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


async def seed(factory: async_sessionmaker[AsyncSession], store: MemoryStore) -> Contents:
    """Bring both stores to where every test starts, and return what they hold."""
    store.hooks.clear()
    collect()
    async with factory.begin() as session:
        for name in ("pages", "reports", "docs"):
            await session.execute(sa.delete(Base.metadata.tables[name]))
        store.objects.clear()
        session.add_all(
            [
                Doc(
                    key="a",
                    body=Blob(b"body a"),
                    cover=Blob(b"cover a"),
                    pages=[Page(number=n, scan=Blob(b"scan %d" % n)) for n in (1, 2)],
                ),
                Doc(key="b", body=Blob(b"body b"), cover=Blob(b"cover b")),
                Report(key="r", body=Blob(b"body r"), appendix=Blob(b"appendix r")),
            ]
        )
        engine = session.bind
    assert isinstance(engine, AsyncEngine)
    assert await contents(store, engine) == SEED
    return SEED


def collect() -> None:
    """Let go of what a cancellation has left.

    The traceback of a cancelled statement holds its cursor, and the cursor SQLite's write lock.
    """
    gc.collect()


async def uris(engine: AsyncEngine) -> dict[Cell, str]:
    """Return the committed URI of every cell that is not empty."""
    found: dict[Cell, str] = {}
    async with engine.connect() as connection:
        table = Doc.__table__.c
        docs = sa.select(table.key, table.body, table.draft, table.cover)
        for key, body, draft, cover in await connection.execute(docs):
            found |= _cells(key, body=body, draft=draft, cover=cover)
        reports = sa.select(Report.__table__.c.key, Report.__table__.c.appendix)
        for key, appendix in await connection.execute(reports):
            found |= _cells(key, appendix=appendix)
        pages = sa.select(Page.doc_key, Page.number, Page.scan)
        for key, number, scan in await connection.execute(pages):
            found |= _cells(f"{key}/{number}", scan=scan)
    return found


def _cells(row: str, **columns: Blob | None) -> dict[Cell, str]:
    return {(row, name): blob.uri for name, blob in columns.items() if blob is not None}


async def contents(
    store: Store, engine: AsyncEngine, *, orphans: Collection[str] = ()
) -> dict[Cell, bytes]:
    """Return the committed bytes of every cell, after asking whether both stores agree."""
    found = await assert_consistent(store, engine, COLUMNS, orphans=orphans)
    return {cell: found[uri] for cell, uri in (await uris(engine)).items()}


class ArmedTask(CountedTask):
    """One that is cancelled some suspensions after it has said so itself."""

    def __init__(self, work: Any) -> None:
        super().__init__(work, cancel_at=2**31)

    def arm(self, moment: int) -> None:
        """Cancel at the n-th suspension from now on."""
        self._cancel_at = self.awaits + moment
