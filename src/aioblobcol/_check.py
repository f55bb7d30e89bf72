"""The check: the bucket's listing and the rows, side by side, in both directions.

Two sorted streams are merged, neither of which is kept. They are never of one moment, so that each
finding is looked at again (row, journal, HEAD) before it is reported. Read-only unless told
otherwise; what is told to be deleted is deleted by nobody else than the journal's worker, or,
without a journal, here. Only what is old enough is reported: that trusts clocks, and says so.

Invariants: an orphan is condemned only after the rows were asked again, and with a journal only
once nobody can adopt it any more; outside of the store's bucket and prefix nothing is reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from sqlalchemy import collate, select, text, union_all

from ._journal import Entries, Journal, JournaledTable, column_of, named_by_rows, tables_with_uris
from ._store._base import ObjectInfo, Store, is_owned
from ._uri import is_one_attempt, root_uri
from .errors import BlobNotFoundError, InvalidInputError, StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence

    from sqlalchemy import MetaData
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

VERIFIED_AT_ONCE = 100
ROWS_PER_FETCH = 1000
PROGRESS_EVERY = 1000
"""Objects between two calls of `Check.on_progress`."""


class FindingKind(enum.Enum):
    """What may be wrong with an object."""

    ORPHAN = "orphan"
    DANGLING = "dangling"
    SHARED = "shared"

    @property
    def meaning(self) -> str:
        """One sentence for people."""
        return _MEANING[self]


_MEANING = {
    FindingKind.ORPHAN: "an object that no row names",
    FindingKind.DANGLING: "a row that names an object which is not there",
    FindingKind.SHARED: "an object that several cells name",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Something that was looked at twice and is wrong.

    Attributes:
        kind: what.
        uri: of the object.
        size: in bytes, of an orphan.
        modified_at: of an orphan.
        is_condemned: it is deleted, or the journal's worker will.
    """

    kind: FindingKind
    uri: str
    size: int | None = None
    modified_at: datetime | None = None
    is_condemned: bool = False


class Check:
    """One look at a store and the database that names its objects.

    Attributes:
        objects: how many were listed so far.
        cells: how many URIs of this store the rows had so far.
        foreign: how many of the objects are named by no row and have no id of their own in the
            key: this library has not made them, so they are neither reported nor deleted.
        undecided: URIs that could not be looked at again, for the store did not answer.
        on_progress: called now and then, when the counts have changed.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        store: Store,
        metadata: MetaData,
        *,
        uri_columns: Iterable[Any] = (),
        journal: Journal | None = None,
        delete: bool = False,
        min_age: timedelta = timedelta(hours=24),
    ) -> None:
        """Describe a check; nothing is sent yet.

        Args:
            engine: of the database; two connections of its pool are used at a time.
            store: open while the check runs.
            metadata: its tables with managed columns are read. All of the store's objects have to
                be named by tables of it, or they are taken for orphans.
            uri_columns: more columns with URIs, as strings.
            journal: what it lists is no orphan.
            delete: condemn orphans: with a journal by entering them into it, for its worker;
                without one by deleting those that are old enough.
            min_age: younger objects are not reported as orphans, since their transactions may
                still be under way. It is compared with this machine's clock; with a journal whose
                triggers are strict, 0 is safe.

        Raises:
            InvalidInputError: no column with URIs, or a negative age.
        """
        columns = [column_of(column) for column in uri_columns]
        self._tables: Sequence[JournaledTable] = tables_with_uris(metadata, columns)
        if not self._tables:
            raise InvalidInputError(
                "no table has a column with URIs; have all models been imported?"
            )
        if min_age < timedelta(0):
            raise InvalidInputError("min_age is not negative")
        self.objects = 0
        self.cells = 0
        self.foreign = 0
        self.undecided: list[str] = []
        self.on_progress: Callable[[], None] = lambda: None
        self._is_postgresql = engine.dialect.name == "postgresql"
        self._engine = engine
        self._store = store
        self._delete = delete
        self._min_age = min_age
        self._entries = None if journal is None else Entries(journal, engine.dialect.name)

    async def findings(self) -> AsyncIterator[Finding]:
        """Yield what is wrong, in the order of the URIs.

        Raises:
            StoreError: the bucket could not be listed to its end.
            RuntimeError: the bucket or the database does not sort by bytes.
            SQLAlchemyError: the rows could not be read.
        """
        suspects: list[Finding] = []
        async with self._connect() as connection:
            async for suspect in self._compare(connection):
                suspects.append(suspect)
                if len(suspects) == VERIFIED_AT_ONCE:
                    async for finding in self._verify(suspects):
                        yield finding
                    suspects = []
        async for finding in self._verify(suspects):
            yield finding

    @contextlib.asynccontextmanager
    async def _connect(self) -> AsyncIterator[AsyncConnection]:
        """Give a connection that sees all rows, or fails."""
        async with self._engine.connect() as connection:
            if self._is_postgresql:
                # each look is to see what is committed by then, whatever the engine's level is
                await connection.execution_options(isolation_level="READ COMMITTED")
                # hidden rows would make their objects orphans
                await connection.execute(text("SET LOCAL row_security = off"))
            yield connection

    # --- both streams

    async def _compare(self, connection: AsyncConnection) -> AsyncIterator[Finding]:
        rows = _in_order(self._uris_of_rows(connection), "the database", may_repeat=True)
        listed = _in_order(self._store.iter_uris(), "the bucket's listing", may_repeat=False)
        async with contextlib.aclosing(rows), contextlib.aclosing(listed):
            cell, thing = await anext(rows, None), await anext(listed, None)
            before = None
            while cell is not None or thing is not None:
                if cell is not None and cell == before:
                    yield Finding(FindingKind.SHARED, cell)
                    self.cells += 1
                    cell = await anext(rows, None)
                elif cell is None or (thing is not None and thing.encode() < cell.encode()):
                    assert thing is not None
                    self.objects += 1
                    if self.objects % PROGRESS_EVERY == 0:
                        self.on_progress()
                    if thing != before and is_one_attempt(thing):
                        yield Finding(FindingKind.ORPHAN, thing)
                    elif thing != before:
                        self.foreign += 1
                    thing = await anext(listed, None)
                else:
                    self.cells += 1
                    if thing != cell:
                        yield Finding(FindingKind.DANGLING, cell)
                    before, cell = cell, await anext(rows, None)

    async def _uris_of_rows(self, connection: AsyncConnection) -> AsyncIterator[str]:
        root = root_uri(self._store.bucket, self._store.prefix)
        parts = [
            select(uri.label("uri")).where(uri.startswith(root, autoescape=True))
            for table in self._tables
            for uri in table.uris
        ]
        cells = union_all(*parts).subquery()
        is_sqlite = self._engine.dialect.name == "sqlite"
        by_bytes = collate(cells.c.uri, "BINARY" if is_sqlite else "C")
        statement = select(cells.c.uri).order_by(by_bytes)
        options = {"yield_per": ROWS_PER_FETCH}
        async with connection.stream(statement, execution_options=options) as result:
            async for uri in result.scalars():
                if is_owned(self._store, uri):
                    yield uri

    # --- looking again

    async def _verify(self, suspects: Sequence[Finding]) -> AsyncIterator[Finding]:
        """Yield what still holds, each as soon as it was dealt with.

        The store is asked first, then the journal, then the rows: an object that a row names
        later than that was staged before, and one that is missing was missing while its row was
        there.
        """
        uris = list(dict.fromkeys(suspect.uri for suspect in suspects))
        heads = dict(zip(uris, await asyncio.gather(*map(self._head, uris)), strict=True))
        async with self._connect() as connection:
            listed = (
                set() if self._entries is None else await self._entries.listed(connection, uris)
            )
            named = await named_by_rows(connection, self._tables, uris)
        for suspect in suspects:
            uri, head = suspect.uri, heads[suspect.uri]
            if suspect.kind is FindingKind.SHARED:
                if await self._is_shared(uri):
                    yield suspect
            elif head is None:
                self.undecided.append(uri)
            elif suspect.kind is FindingKind.DANGLING:
                if uri in named and not isinstance(head, ObjectInfo):
                    yield suspect
            elif isinstance(head, ObjectInfo) and uri not in named and uri not in listed:
                orphan = await self._orphan(head)
                if orphan is not None:
                    yield orphan

    async def _head(self, uri: str) -> ObjectInfo | BlobNotFoundError | None:
        """Return what is there, that nothing is, or None if the store does not tell."""
        try:
            async with self._store.runtime.slots, asyncio.timeout(self._store.request_seconds):
                return await self._store.head(uri)
        except BlobNotFoundError as exc:
            return exc
        except (StoreError, TimeoutError):
            return None

    async def _is_shared(self, uri: str) -> bool:
        cells = 0
        async with self._connect() as connection:
            for table in self._tables:
                for column in table.uris:
                    found = await connection.execute(select(column).where(column == uri))
                    cells += len(found.all())
        return cells > 1

    async def _orphan(self, info: ObjectInfo) -> Finding | None:
        """Report an orphan, and condemn it if that was asked for."""
        if not self._is_old(info):
            return None
        is_condemned = self._delete and await self._condemn(info.uri)
        if self._delete and not is_condemned and self._entries is not None:
            return None  # a row has taken it meanwhile
        return Finding(FindingKind.ORPHAN, info.uri, info.size, info.modified_at, is_condemned)

    def _is_old(self, info: ObjectInfo) -> bool:
        now = datetime.now(timezone.utc)
        return info.modified_at is not None and now - info.modified_at >= self._min_age

    async def _condemn(self, uri: str) -> bool:
        if self._entries is None:
            async with self._connect() as connection:
                if await named_by_rows(connection, self._tables, [uri]):
                    return False
            return not (await self._store.delete_many([uri])).failed
        async with self._connect() as connection:
            is_entered = await self._entries.enter_orphan(connection, uri)
            await (connection.commit() if is_entered else connection.rollback())
        return is_entered


async def _in_order(
    uris: AsyncIterator[str], whose: str, *, may_repeat: bool
) -> AsyncGenerator[str, None]:
    """Pass *uris* on as long as they come in the order of their bytes."""
    last = b""
    async for uri in uris:
        key = uri.encode()
        if key < last or (key == last and not may_repeat):
            raise RuntimeError(f"{whose} does not sort by bytes: {uri} came after {last.decode()}")
        last = key
        yield uri


__all__ = ["Check", "Finding", "FindingKind"]
