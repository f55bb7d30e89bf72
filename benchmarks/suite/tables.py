"""The rows of the benchmarks: eight columns of URIs, on a SQLite file in WAL mode."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

COLUMNS: Final = tuple(f"blob_{number}" for number in range(1, 9))


class Base(DeclarativeBase):
    """The metadata of the plain rows."""


class Row(Base):
    """A row whose program uploads."""

    __tablename__ = "rows"

    id: Mapped[str] = mapped_column(primary_key=True)
    blob_1: Mapped[str | None]
    blob_2: Mapped[str | None]
    blob_3: Mapped[str | None]
    blob_4: Mapped[str | None]
    blob_5: Mapped[str | None]
    blob_6: Mapped[str | None]
    blob_7: Mapped[str | None]
    blob_8: Mapped[str | None]


def use_wal(engine: Engine) -> None:
    """Let readers and the writer of the file go on at one time."""

    @event.listens_for(engine, "connect")
    def _connected(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.execute("PRAGMA journal_mode=WAL").close()


async def create_engine_at(
    directory: Path, *, metadata: Any = Base.metadata, name: str = "rows"
) -> AsyncEngine:
    """Return an engine on a new file that has the tables."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{directory / name}.db")
    use_wal(engine.sync_engine)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    return engine


async def commit_row(engine: AsyncEngine, uris: Sequence[str]) -> str:
    """Commit a new row with a plain session, and return its primary key."""
    row_id = uuid.uuid4().hex
    async with AsyncSession(engine, expire_on_commit=False) as session:
        session.add(Row(id=row_id, **values_of(uris)))
        await session.commit()
    return row_id


def values_of(uris: Sequence[str]) -> Mapping[str, str]:
    """Return the first columns' values."""
    return dict(zip(COLUMNS, uris, strict=False))
