"""Tables with the journal's triggers, and short names for objects."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aioblobcol import Blob, BlobType
from aioblobcol._journal import Journal
from aioblobcol.testing import MemoryStore

from .databases import Database


class Base(DeclarativeBase):
    pass


class Doc(Base):
    __tablename__ = "journaled docs"  # quoted everywhere

    name: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[Blob | None] = mapped_column(BlobType())
    scan: Mapped[Blob | None] = mapped_column(BlobType(format="json"))
    url: Mapped[str | None] = mapped_column("URL")
    title: Mapped[str | None]


class Page(Base):
    __tablename__ = "journaled_pages"

    doc: Mapped[str] = mapped_column(
        sa.ForeignKey("journaled docs.name", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[Blob | None] = mapped_column(BlobType())


class Journaled:
    """A database with the journal's triggers, and short names for objects."""

    def __init__(self, database: Database, store: MemoryStore, journal: Journal) -> None:
        self.database = database
        self.store = store
        self.journal = journal

    def uri(self, name: str) -> str:
        """Return a URI for a short name; the same one each time."""
        return f"s3://{self.store.bucket}/{self.store.prefix}/x/id={name.encode().hex():0>32}"

    def filled(self, statement: str) -> str:
        """Write URIs for ``<a>``, and JSON with one for ``{a}``."""
        statement = statement.replace("<docs>", '"journaled docs"')
        for name in "abcdef":
            as_json = json.dumps({"uri": self.uri(name), "size": 1})
            statement = statement.replace(f"<{name}>", f"'{self.uri(name)}'")
            statement = statement.replace(f"{{{name}}}", f"'{as_json}'")
        return statement

    async def run(self, *statements: str) -> None:
        """Run statements in one transaction."""
        async with self.database.engine.begin() as connection:
            for statement in statements:
                await connection.exec_driver_sql(self.filled(statement))

    async def stage(self, *names: str) -> None:
        for name in names:
            await self.stage_uri(self.uri(name))

    async def stage_uri(self, uri: str) -> None:
        async with self.database.engine.begin() as connection:
            values = {"uri": uri, "state": "staged"}
            await connection.execute(sa.insert(self.journal.table).values(values))

    async def states(self) -> dict[str, str]:
        """Return the state of each object that the journal lists, by its short name."""
        names = {self.uri(name): name for name in "abcdef"}
        table = self.journal.table
        async with self.database.engine.connect() as connection:
            rows = await connection.execute(sa.select(table.c.uri, table.c.state))
            return {names[uri]: state for uri, state in rows}


@contextlib.asynccontextmanager
async def open_journaled(
    database: Database, store: MemoryStore, *, strict: bool = True
) -> AsyncIterator[Journaled]:
    """Give empty tables, their triggers, and two live rows: p names a and b, q names c."""
    metadata = sa.MetaData()
    for table in Base.metadata.tables.values():
        table.to_metadata(metadata)
    url = metadata.tables["journaled docs"].c.URL
    journal = Journal(metadata, store, uri_columns=[url], strict=strict)
    async with database.engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all)
    journaled = Journaled(database, store, journal)
    await journaled.stage("a", "b", "c")
    await journaled.run(
        "INSERT INTO <docs> (name, body, scan) VALUES ('p', <a>, {b})",
        "INSERT INTO <docs> (name, \"URL\") VALUES ('q', <c>)",
    )
    assert await journaled.states() == {}
    yield journaled
    async with database.engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
