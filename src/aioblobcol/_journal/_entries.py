"""What is done with the journal's entries: stage, renew, condemn, forget.

Each is one transaction's work on a connection that the caller has begun and commits; nothing here
touches an object store.

Invariants: ``deleting`` is terminal, only removal of the entry leads out of it; an entry is removed
by whoever claimed it last. Before an entry is condemned the rows are asked, in the same
transaction: one that is named after all (adoption was bypassed) is let go with a warning, and its
object stays. Times are the database's, and delay deletes; they decide nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Row,
    Text,
    bindparam,
    delete,
    false,
    inspect,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from ._columns import JournaledTable
from ._due import database_time, is_condemnable, is_unadopted, is_under

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncConnection

    from .._store._base import Store
    from ._table import Journal

logger = logging.getLogger("aioblobcol.journal")

URIS_PER_STATEMENT = 500
PARAMETERS = 32_000
"""Source: PostgreSQL's protocol (16-bit count, which drivers take as signed), and SQLite's
SQLITE_MAX_VARIABLE_NUMBER, 32,766 by default."""
SHORTEST_BACK_OFF = timedelta(seconds=1)
LONGEST_BACK_OFF = timedelta(hours=1)
PARKED_FOR = timedelta(days=1)
PARKED = "parked: "
REFUSED_FOR_GOOD = frozenset(
    {"AccessDenied", "AllAccessDisabled", "InvalidObjectState", "NoSuchBucket", "ObjectLocked"}
)
"""Source: Amazon S3 API Reference, "Error responses"."""
DURABLE = """
SELECT set_config('synchronous_commit', 'on', true)
WHERE current_setting('synchronous_commit') = 'off'"""
"""For the transaction; where the server's default waits for more than its own disk, it stays."""


@dataclasses.dataclass(frozen=True, slots=True)
class Condemned:
    """An object that nobody may adopt any more, claimed to be deleted.

    Attributes:
        uri: the object.
        attempts: how often deleting it has failed.
        needs_second_delete: it was never in a row, so that its upload may still be under way.
        upload_id: of the multipart upload that was to make it; to be aborted before.
    """

    uri: str
    attempts: int
    needs_second_delete: bool
    upload_id: str | None = None


@dataclasses.dataclass(slots=True)
class Unneeded:
    """What became of new objects whose transaction is over.

    Attributes:
        condemned: to be deleted.
        were_staged: among them, those that no row has adopted: the transaction was rolled back,
            or did not write them.
        were_adopted: named by a row, or were, and let go.
        are_gone: not listed any more; on PostgreSQL, where staging is durable, they were adopted,
            or condemned long ago.
    """

    condemned: list[str] = dataclasses.field(default_factory=list)
    were_staged: list[str] = dataclasses.field(default_factory=list)
    were_adopted: list[str] = dataclasses.field(default_factory=list)
    are_gone: list[str] = dataclasses.field(default_factory=list)


class Entries:
    """The journal's entries in one kind of database."""

    def __init__(self, journal: Journal, dialect_name: str) -> None:
        self._journal = journal
        self._table = journal.table
        self._dialect_name = dialect_name
        self._is_sqlite = dialect_name == "sqlite"

    async def stage(self, connection: AsyncConnection, uris: Iterable[str]) -> None:
        """Write objects down before they can exist. To repeat it changes nothing."""
        values = [{"uri": uri, "state": "staged"} for uri in uris]
        if values:
            await connection.execute(self._insert_new(), values)

    async def renew(self, connection: AsyncConnection, uris: Collection[str]) -> list[str]:
        """Begin the lease of staged objects anew; return those that were not staged any more."""
        left: list[str] = []
        for some in _batched(list(uris)):
            found = await connection.execute(
                update(self._table)
                .where(self._table.c.uri.in_(some), self._table.c.state == "staged")
                .values(since=self._after(timedelta(0)))
                .returning(self._table.c.uri)
            )
            renewed = set(found.scalars())
            left += [uri for uri in some if uri not in renewed]
        return left

    async def note_upload(self, connection: AsyncConnection, uri: str, upload_id: str) -> bool:
        """Write down what has to be aborted; False if the object is not staged any more."""
        noted = await connection.execute(
            update(self._table)
            .where(self._table.c.uri == uri, self._table.c.state == "staged")
            .values(upload_id=upload_id)
        )
        return bool(noted.rowcount)

    async def condemn(
        self,
        connection: AsyncConnection,
        *,
        claim: str,
        limit: int,
        lease: timedelta,
        stores: Collection[Store] | None = None,
    ) -> list[Condemned]:
        """Claim what is due: retired, staged and never adopted, or condemned and not deleted yet.

        Args:
            connection: in a READ COMMITTED transaction.
            claim: whose they are from now on.
            limit: how many at most.
            lease: when another worker may take them over.
            stores: in which they lie; all of the journal's by default. What lies elsewhere is
                another worker's.
        """
        await self._begin_condemning(connection, reads_rows=True)
        chosen = self._journal.stores.values() if stores is None else stores
        due = await self._lock_due(connection, limit, chosen)
        while due and not (mine := await self._without_live(connection, due)):
            due = await self._lock_due(connection, limit, chosen)  # all of those were let go
        if not due:
            return []
        table = self._table
        for some in _batched([entry.uri for entry in mine]):
            await connection.execute(
                update(table)
                .where(table.c.uri.in_(some), table.c.state != "deleting")
                .values(state="deleting", since=self._after(timedelta(0)))
            )
            await connection.execute(
                update(table)
                .where(table.c.uri.in_(some))
                .values(claim=claim, not_before=self._after(lease))
            )
        return [Condemned(e.uri, e.attempts, e.owner is None, e.upload_id) for e in mine]

    async def _lock_due(
        self, connection: AsyncConnection, limit: int, stores: Iterable[Store]
    ) -> Sequence[Row[Any]]:
        """Lock what is due and return it, but for what another worker has locked."""
        table = self._table
        is_due = or_(
            is_condemnable(table, self._dialect_name),
            is_unadopted(table, self._dialect_name, self._journal.lease),
        )
        due = (
            select(table)
            .where(is_due, is_under(table.c.uri, stores))
            .order_by(table.c.not_before)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        return (await connection.execute(due)).all()

    async def _without_live(
        self, connection: AsyncConnection, due: Sequence[Row[Any]]
    ) -> list[Row[Any]]:
        """Let go what rows name, and return the others."""
        asked = [entry.uri for entry in due if entry.state != "deleting"]
        live = await self._named_by_rows(connection, asked)
        if live:
            logger.warning(
                "adopted late: rows name objects that the journal lists; did something write rows "
                "past the triggers? %s",
                ", ".join(sorted(live)),
            )
            await self._remove(connection, live)
        return [entry for entry in due if entry.uri not in live]

    async def condemn_unneeded(
        self,
        connection: AsyncConnection,
        uris: Sequence[str],
        *,
        claim: str,
        claimed_for: timedelta,
        is_doubtful: bool,
    ) -> Unneeded:
        """Claim new objects whose transaction is over and that no row names.

        What is staged is claimed, and what is not listed is left alone: it was adopted. On SQLite
        it may also have been staged in a transaction that was undone: it is entered first, so that
        nobody can adopt it any more, and then the rows are asked. What is retired or condemned is
        somebody else's.

        Args:
            connection: in a READ COMMITTED transaction.
            uris: new objects of one transaction.
            claim: whose they are from now on.
            claimed_for: when a worker may take them over.
            is_doubtful: nobody knows how the transaction ended: wait until it has, and ask the
                rows of all of them.
        """
        await self._begin_condemning(connection, reads_rows=is_doubtful)
        whole = Unneeded()
        for some in _batched(uris):
            entered = await self._enter(connection, some) if self._is_sqlite else []
            listed = await self._listed_states(connection, some, skip_locked=not is_doubtful)
            staged = [uri for uri in some if listed.get(uri) == "staged"]
            asked = [*entered, *staged] if is_doubtful else entered
            named = await self._named_by_rows(connection, asked)
            await self._remove(connection, named)
            whole.condemned += [uri for uri in (*entered, *staged) if uri not in named]
            whole.were_staged += [uri for uri in staged if uri not in named]
            whole.were_adopted += [*named, *(uri for uri in some if listed.get(uri) == "retired")]
            whole.are_gone += [uri for uri in some if uri not in listed and uri not in entered]
        for some in _batched(whole.condemned):
            await connection.execute(
                update(self._table)
                .where(self._table.c.uri.in_(some))
                .values(
                    state="deleting",
                    since=self._after(timedelta(0)),
                    claim=claim,
                    not_before=self._after(claimed_for),
                )
            )
        return whole

    async def _enter(self, connection: AsyncConnection, uris: Sequence[str]) -> list[str]:
        """Condemn those that are not listed, and return them."""
        new = [{"uri": uri, "state": "deleting"} for uri in uris]
        inserted = self._insert_new().values(new).returning(self._table.c.uri)
        return list((await connection.execute(inserted)).scalars())

    async def _listed_states(
        self, connection: AsyncConnection, uris: Sequence[str], *, skip_locked: bool
    ) -> dict[str, str]:
        """Lock the entries of *uris* and return their states."""
        found = await connection.execute(
            select(self._table.c.uri, self._table.c.state)
            .where(self._table.c.uri.in_(uris))
            .with_for_update(skip_locked=skip_locked)
        )
        return {uri: state for uri, state in found}  # noqa: C416 - rows are no pairs for mypy

    async def forget(
        self,
        connection: AsyncConnection,
        deleted: Collection[Condemned],
        *,
        claim: str,
        quarantine: timedelta,
    ) -> int:
        """Remove the entries of objects that are gone; return how many were.

        One whose upload may still be under way stays condemned for *quarantine*, counted from
        when it was condemned, and is deleted once more then.
        """
        gone = [each.uri for each in deleted if not each.needs_second_delete]
        again = [each.uri for each in deleted if each.needs_second_delete]
        removed = await self._remove(connection, gone, self._table.c.claim == claim)
        is_over = self._table.c.since <= self._after(-quarantine)
        removed += await self._remove(connection, again, self._table.c.claim == claim, is_over)
        for some in _batched(again):
            await connection.execute(
                update(self._table)
                .where(self._table.c.uri.in_(some), self._table.c.claim == claim)
                .values(claim=None, attempts=0, not_before=self._after(quarantine))
            )
        return removed

    async def postpone(
        self,
        connection: AsyncConnection,
        failed: Mapping[str, tuple[Condemned, str]],
        *,
        claim: str,
    ) -> None:
        """Note why objects could not be deleted, and when to try again."""
        for uri, (condemned, reason) in failed.items():
            is_parked = reason.partition(" ")[0].rstrip(":") in REFUSED_FOR_GOOD
            delay = PARKED_FOR if is_parked else back_off(condemned.attempts)
            await connection.execute(
                update(self._table)
                .where(self._table.c.uri == uri, self._table.c.claim == claim)
                .values(
                    claim=None,
                    attempts=self._table.c.attempts + 1,
                    last_error=f"{PARKED if is_parked else ''}{reason}",
                    not_before=self._after(delay),
                )
            )

    async def enter_orphan(self, connection: AsyncConnection, uri: str) -> bool:
        """Condemn an object that no row seems to name; tell whether it may be deleted.

        It is entered first, so that nobody can adopt it any more, and then the rows are asked
        again. If it returns False, the caller rolls back.
        """
        is_entered = bool(await self._enter(connection, [uri]))
        return is_entered and not await self._named_by_rows(connection, [uri])

    async def staged(self, connection: AsyncConnection, uris: Sequence[str]) -> list[str]:
        """Return those of *uris* that are staged."""
        states = await self._listed_states(connection, uris, skip_locked=True)
        return [uri for uri, state in states.items() if state == "staged"]

    async def listed(self, connection: AsyncConnection, uris: Sequence[str]) -> set[str]:
        """Return those of *uris* that the journal lists, in whatever state."""
        found: set[str] = set()
        for some in _batched(uris):
            column = self._table.c.uri
            found.update(
                (await connection.execute(select(column).where(column.in_(some)))).scalars()
            )
        return found

    async def _begin_condemning(self, connection: AsyncConnection, *, reads_rows: bool) -> None:
        """Take SQLite's one lock for writing; have PostgreSQL's COMMIT be durable.

        If a crash of the server could undo it, a row might adopt an object that is deleted. The
        tables are locked before the entries, as somebody does who truncates a table, or writes
        rows and then takes their entries.
        """
        if self._is_sqlite:
            await connection.execute(delete(self._table).where(false()))
            return
        await connection.execute(text(DURABLE))
        if not reads_rows:
            return
        format_table = connection.dialect.identifier_preparer.format_table
        names = [format_table(each.table) for each in await self._tables_there(connection)]
        if names:
            await connection.execute(text(f"LOCK TABLE {', '.join(names)} IN ACCESS SHARE MODE"))

    async def _tables_there(self, connection: AsyncConnection) -> list[JournaledTable]:
        """Return the journaled tables that this database has by now: one that has none names none.

        A worker may be deployed before its migration, or the metadata be of several databases.
        """
        tables = self._journal.journaled_tables
        if self._is_sqlite:
            there = await connection.run_sync(lambda sync: set(inspect(sync).get_table_names()))
            return [each for each in tables if each.table.schema or each.table.name in there]
        format_table = connection.dialect.identifier_preparer.format_table
        found = await connection.execute(
            text(
                "SELECT name FROM unnest(:names) AS name WHERE to_regclass(name) IS NOT NULL"
            ).bindparams(bindparam("names", type_=ARRAY(Text))),
            {"names": [format_table(each.table) for each in tables]},
        )
        there = set(found.scalars())
        return [each for each in tables if format_table(each.table) in there]

    def _insert_new(self) -> Any:
        return insert_new(self._table, self._dialect_name)

    async def _remove(
        self, connection: AsyncConnection, uris: Collection[str], *conditions: ColumnElement[bool]
    ) -> int:
        removed = 0
        for some in _batched(list(uris)):
            result = await connection.execute(
                delete(self._table).where(self._table.c.uri.in_(some), *conditions)
            )
            removed += result.rowcount
        return removed

    async def _named_by_rows(self, connection: AsyncConnection, uris: Sequence[str]) -> set[str]:
        """Return those of *uris* that a row names."""
        if not uris:
            return set()
        return await named_by_rows(connection, await self._tables_there(connection), uris)

    def _after(self, delay: timedelta) -> ColumnElement[Any]:
        """Return the database's time, so much later."""
        return database_time(self._dialect_name, delay)


def insert_new(table: Table, dialect_name: str) -> Any:
    """Return an INSERT that leaves alone what is there already."""
    dialect: Any = sqlite if dialect_name == "sqlite" else postgresql
    return dialect.insert(table).on_conflict_do_nothing()


async def named_by_rows(
    connection: AsyncConnection, tables: Iterable[JournaledTable], uris: Sequence[str]
) -> set[str]:
    """Return those of *uris* that a row of *tables* names.

    All columns are asked in one statement, which has one snapshot: between two of them an object
    could move from one column to the other. Where policies of PostgreSQL hide rows from this role,
    it raises, for a hidden row would be taken for none.

    Raises:
        SQLAlchemyError: the rows could not be read, or not all of them.
    """
    columns = [uri for each in tables for uri in each.uris]
    if not columns or not uris:
        return set()
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SET LOCAL row_security = off"))
    wanted: Any = bindparam("uris", expanding=True)
    statement = union_all(*(select(uri.label("uri")).where(uri.in_(wanted)) for uri in columns))
    named: set[str] = set()
    for some in _batched(uris, size=max(1, min(URIS_PER_STATEMENT, PARAMETERS // len(columns)))):
        found = await connection.execute(statement, {"uris": list(some)})
        named.update(found.scalars())
    return named


def back_off(attempts: int) -> timedelta:
    """Return how long to wait after so many failures and one more: twice as long each time."""
    seconds = SHORTEST_BACK_OFF.total_seconds() * 2.0 ** min(attempts, 20)
    return min(timedelta(seconds=seconds), LONGEST_BACK_OFF)


def _batched(uris: Sequence[str], *, size: int = URIS_PER_STATEMENT) -> Iterable[Sequence[str]]:
    for start in range(0, len(uris), size):
        yield uris[start : start + size]
