"""The table of the seed's example, and how the tests write it."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aioblobcol import Store
from aioblobcol.testing import assert_consistent


class Base(DeclarativeBase):
    pass


class Task(Base):
    __tablename__ = "tasks"

    url: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    html: Mapped[str | None]
    image: Mapped[str | None]


TASKS = Base.metadata.tables["tasks"]
COLUMNS = [Task.html, Task.image]


async def read_row(engine: AsyncEngine, url: str = "u") -> tuple[str | None, str | None] | None:
    """Return the committed (html, image) of a row, on a connection of its own."""
    async with engine.connect() as connection:
        found = await connection.execute(sa.select(Task.html, Task.image).where(Task.url == url))
        row = found.one_or_none()
    return None if row is None else (row.html, row.image)


async def contents(
    store: Store, engine: AsyncEngine, url: str = "u", *, orphans: tuple[str, ...] = ()
) -> tuple[bytes | None, bytes | None] | None:
    """Return the committed bytes of a row, after asking whether both stores agree."""
    found = await assert_consistent(store, engine, COLUMNS, orphans=orphans)
    row = await read_row(engine, url)
    if row is None:
        return None
    html, image = (found[uri] if uri is not None else None for uri in row)
    return html, image


async def load(session: AsyncSession, url: str = "u") -> Task:
    """Read a row and end the transaction, as a handler does before bytes travel."""
    task = await session.get_one(Task, url, populate_existing=True)
    await session.commit()
    return task
