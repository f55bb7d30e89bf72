"""Mapped classes with managed columns, of every shape that the unit of work treats differently."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from aioblobcol import Blob, BlobType, Store, blob_sessionmaker
from aioblobcol.testing import assert_consistent

from .databases import Database


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {Blob: BlobType()}


class Doc(Base):
    """A key of the user's, two blobs, one more that is not loaded by default."""

    __tablename__ = "docs"

    name: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str | None] = mapped_column(unique=True)
    body: Mapped[Blob | None]
    scan: Mapped[Blob | None]
    notes: Mapped[Blob | None] = mapped_column(deferred=True)


class Album(Base):
    """A key of the database's, and children that are deleted when they are let go."""

    __tablename__ = "albums"

    id: Mapped[int] = mapped_column(primary_key=True)
    cover: Mapped[Blob | None]
    photos: Mapped[list[Photo]] = relationship(cascade="all, delete-orphan", lazy="selectin")


class Photo(Base):
    __tablename__ = "photos"

    id: Mapped[int] = mapped_column(primary_key=True)
    album_id: Mapped[int] = mapped_column(sa.ForeignKey("albums.id"))
    image: Mapped[Blob | None] = mapped_column(BlobType(format="json"))


class Page(Base):
    """A key of two columns."""

    __tablename__ = "pages"

    book: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[Blob | None]


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    preview: Mapped[Blob | None]

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}  # noqa: RUF012 - as SQLAlchemy documents it


class Video(Item):
    """Joined-table inheritance: blobs in two tables."""

    __tablename__ = "videos"

    id: Mapped[int] = mapped_column(sa.ForeignKey("items.id"), primary_key=True)
    film: Mapped[Blob | None]

    __mapper_args__ = {"polymorphic_identity": "video"}  # noqa: RUF012 - as SQLAlchemy documents it


class Song(Item):
    """Single-table inheritance: one more blob in the table of the base."""

    sheet: Mapped[Blob | None]

    __mapper_args__ = {"polymorphic_identity": "song"}  # noqa: RUF012 - as SQLAlchemy documents it


COLUMNS: list[Any] = [
    Doc.body,
    Doc.scan,
    Doc.notes,
    Album.cover,
    Photo.image,
    Page.text,
    Item.preview,
    Video.__table__.c.film,
    Item.__table__.c.sheet,
]


class Library:
    """A database with these tables, a store, and a factory of sessions."""

    def __init__(self, database: Database, store: Any, **arguments: Any) -> None:
        self.database = database
        self.engine: AsyncEngine = database.engine
        self.store = store
        self.session: async_sessionmaker[AsyncSession] = blob_sessionmaker(
            database.engine, store, **arguments
        )

    async def add(self, *instances: object) -> None:
        """Commit new objects."""
        async with self.session.begin() as session:
            session.add_all(instances)

    async def read(self, model: Any, key: Any, attribute: str = "body") -> bytes | None:
        """Return the committed bytes of one cell, of a session of its own."""
        async with self.session() as session:
            found = await session.get_one(model, key)
            blob: Blob | None = await session.scalar(
                sa.select(getattr(model, attribute)).where(_is(found))
            )
        return None if blob is None else await self.store.get(blob.uri)

    async def check(self, *, orphans: tuple[str, ...] = ()) -> list[bytes]:
        """Ask both stores whether they agree, and return the contents of all rows, sorted."""
        found = await assert_consistent(self.store, self.engine, COLUMNS, orphans=orphans)
        return sorted(found.values())


def _is(instance: Any) -> Any:
    state = sa.inspect(instance)
    pairs = zip(state.mapper.primary_key, state.identity, strict=True)
    return sa.and_(*(column == value for column, value in pairs))


@contextlib.asynccontextmanager
async def open_library(
    database: Database, store: Store, **arguments: Any
) -> AsyncIterator[Library]:
    async with database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    yield Library(database, store, **arguments)
    gc.collect()  # what a cancellation has left may hold locks
    async with database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
