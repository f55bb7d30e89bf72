"""``aioblobcol retire-table``: let go of what a table names, before it is dropped or detached.

DROP and DETACH fire no triggers: the objects would stay, and nobody would know of them.
Invariant: rows stop naming their objects only in the transaction that enters these in the journal.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    MetaData,
    Table,
    Text,
    delete,
    false,
    func,
    insert,
    inspect,
    null,
    or_,
    select,
    text,
    union,
    update,
)
from sqlalchemy.sql.schema import RETAIN_SCHEMA

from .._journal import Journal, JournaledTable
from .._store._base import is_owned
from .._uri import is_one_attempt
from ._servers import CannotRunError, UsageError

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

ROWS_PER_FETCH = 1000
CHANGING = {"CASCADE", "SET NULL", "SET DEFAULT"}
"""What a foreign key may do, ON DELETE, to the rows that refer to one."""
CHANGED_POSTGRESQL = """
WITH RECURSIVE tree (id) AS (
    SELECT CAST(to_regclass(:name) AS oid)
    UNION SELECT inhrelid FROM pg_inherits JOIN tree ON inhparent = id
)
SELECT DISTINCT CAST(CAST(conrelid AS regclass) AS text) FROM pg_constraint
WHERE contype = 'f' AND confdeltype IN ('c', 'n', 'd')
AND confrelid IN (SELECT id FROM tree) AND conrelid NOT IN (SELECT id FROM tree)
ORDER BY 1"""


@dataclasses.dataclass(frozen=True, slots=True)
class Retirement:
    """What is, or would be, let go.

    Attributes:
        table: its name.
        rows: how many name something.
        objects: how many of the journal's objects they name; one that two cells name counts once.
        columns: with URIs.
        deletes_rows: a column takes no NULL, so that the rows have to go.
    """

    table: str
    rows: int
    objects: int
    columns: tuple[str, ...]
    deletes_rows: bool


def find_table(journal: Journal, name: str, parent: str | None) -> JournaledTable:
    """Return the table, or a partition with its parent's columns.

    Raises:
        UsageError: the journal looks after no such table.
    """
    known = {each.table.fullname: each for each in journal.journaled_tables}
    found = known.get(parent or name)
    if found is None:
        raise UsageError(
            "--partition-of" if parent else "TABLE",
            f"the journal looks after no table {parent or name!r}, but after {', '.join(known)}; "
            "of a partition, name its parent by --partition-of",
        )
    if parent is None:
        return found
    schema, _, bare = name.rpartition(".")
    table = found.table.to_metadata(MetaData(), schema=schema or RETAIN_SCHEMA, name=bare)
    columns = (dataclasses.replace(each, column=table.c[each.column.key]) for each in found.columns)
    return JournaledTable(table, tuple(columns))


async def retire(
    engine: AsyncEngine, journal: Journal, journaled: JournaledTable, *, really: bool
) -> Retirement:
    """Count, and if told so, make the rows let go of what they name.

    Raises:
        CannotRunError: the journal's triggers are not there, or rows of other tables would be
            changed along; nothing was changed.
        SQLAlchemyError: the database refused, or hides rows from this role; nothing was changed.
    """
    async with engine.connect() as connection:
        if connection.dialect.name == "postgresql":  # one snapshot: what is counted is what goes
            await connection.execution_options(isolation_level="REPEATABLE READ")
        async with connection.begin():
            if connection.dialect.name == "postgresql":  # a hidden row would keep its objects
                await connection.execute(text("SET LOCAL row_security = off"))
            if really:
                await _lock(connection, journal, journaled)
            found = await _count(connection, journal, journaled)
            if found.deletes_rows:
                await _refuse_to_change_others(connection, journaled.table)
            if really:
                await _let_go(connection, journal, journaled, found)
    return found


async def _lock(connection: AsyncConnection, journal: Journal, journaled: JournaledTable) -> None:
    """Let nobody else write, from before the snapshot on."""
    if connection.dialect.name == "sqlite":
        await connection.execute(delete(journal.table).where(false()))
        return
    name = _quoted(connection, journaled.table)
    await connection.execute(text(f"LOCK TABLE {name} IN SHARE ROW EXCLUSIVE MODE"))


async def _count(
    connection: AsyncConnection, journal: Journal, journaled: JournaledTable
) -> Retirement:
    objects = await _count_ours(connection, journal, _named(journaled))
    columns = [each.column for each in journaled.columns]
    is_naming = or_(*(column.is_not(None) for column in columns))
    rows = await connection.scalar(
        select(func.count()).select_from(journaled.table).where(is_naming)
    )
    return Retirement(
        table=journaled.table.fullname,
        rows=rows or 0,
        objects=objects,
        columns=tuple(column.name for column in columns),
        deletes_rows=not all(column.nullable for column in columns),
    )


def _named(journaled: JournaledTable) -> Any:
    """Return the SELECT of all URIs that the table names, each once."""
    return union(*(select(uri.label("uri")).where(uri.is_not(None)) for uri in journaled.uris))


async def _count_ours(connection: AsyncConnection, journal: Journal, statement: Any) -> int:
    """Return how many of the selected URIs are those of the journal's objects."""
    options = {"yield_per": ROWS_PER_FETCH}
    async with connection.stream(statement, execution_options=options) as found:
        return sum([_is_ours(journal, uri) async for uri in found.scalars()])


def _is_ours(journal: Journal, uri: str) -> bool:
    is_under = any(is_owned(store, uri) for store in journal.stores.values())
    return is_under and is_one_attempt(uri)


async def _refuse_to_change_others(connection: AsyncConnection, table: Table) -> None:
    """Refuse to delete rows if foreign keys would delete or change those of other tables."""
    if connection.dialect.name == "postgresql":
        values = {"name": _quoted(connection, table)}
        others = list((await connection.execute(text(CHANGED_POSTGRESQL), values)).scalars())
    else:
        others = await connection.run_sync(_changed_on_sqlite, table)
    if others:
        raise CannotRunError(
            f"all rows of {table.fullname} would have to be deleted, for a column with URIs takes "
            f"no NULL, and foreign keys would delete or change those of {', '.join(others)} along. "
            "Nothing was changed: drop these foreign keys, or NOT NULL, first"
        )


def _changed_on_sqlite(connection: Connection, table: Table) -> list[str]:
    inspector = inspect(connection)
    found = inspector.get_multi_foreign_keys(schema=table.schema)
    return sorted(
        name
        for (_, name), keys in found.items()
        if name != table.name
        and any(
            key["referred_table"].lower() == table.name.lower()
            and key["options"].get("ondelete", "").upper() in CHANGING
            for key in keys
        )
    )


async def _let_go(
    connection: AsyncConnection, journal: Journal, journaled: JournaledTable, found: Retirement
) -> None:
    """Have the triggers retire what the rows name, and see that they have."""
    noted = Table(
        "aioblobcol_let_go",
        MetaData(),
        Column("uri", Text),
        prefixes=["TEMPORARY"],
        postgresql_on_commit="DROP",
    )
    await connection.run_sync(noted.create, checkfirst=False)
    await connection.execute(insert(noted).from_select(["uri"], _named(journaled)))
    statement: Any = delete(journaled.table)
    if not found.deletes_rows:
        values = {each.column: null() for each in journaled.columns}
        statement = update(journaled.table).values(values)
    await connection.execute(statement)
    is_listed = select(journal.table.c.uri).where(journal.table.c.uri == noted.c.uri).exists()
    missed = await _count_ours(connection, journal, select(noted.c.uri).where(~is_listed))
    if missed:
        raise CannotRunError(
            f"only {found.objects - missed:,} of {found.objects:,} objects went into the journal, "
            f"so nothing was changed: are its triggers on {found.table} there? "
            "`aioblobcol ddl --no-table` prints them"
        )
    if connection.dialect.name == "sqlite":
        await connection.run_sync(noted.drop, checkfirst=False)


def _quoted(connection: AsyncConnection, table: Table) -> str:
    return connection.dialect.identifier_preparer.format_table(table)
