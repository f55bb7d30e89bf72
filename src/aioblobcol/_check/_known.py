"""What the database knows of objects: the cells that name them, and the journal's entries.

Both are read by one statement, sorted by bytes, so that they are of one moment: an object whose
entry and whose row are seen together has both.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    DateTime,
    Text,
    and_,
    cast,
    collate,
    false,
    func,
    literal,
    null,
    or_,
    select,
    type_coerce,
    union_all,
)

from .._column import BlobType
from .._journal._columns import JsonMember
from .._journal._entries import PARKED

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence

    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from .._journal import Journal, JournaledTable
    from ._ranges import KeyRange

ROWS_PER_FETCH = 1000
LONGEST_SIZE = 20
HOPELESS_AFTER = 10
"""Failures to delete one object, after which somebody should look: a quarter of an hour."""


@dataclasses.dataclass(slots=True)
class Known:
    """What the database says of one object.

    Attributes:
        uri: the object.
        cells: how many name it.
        sizes: that the cells tell, in bytes.
        state: of the journal's entry, if there is one.
        is_stuck: the entry should have been dealt with.
    """

    uri: str
    cells: int = 0
    sizes: frozenset[int] = frozenset()
    state: str | None = None
    is_stuck: bool = False

    def add(self, size: object, state: str | None, *, is_stuck: bool) -> None:
        """Count one cell, or note the entry, which has a state."""
        if state is not None:
            self.state, self.is_stuck = state, is_stuck
            return
        self.cells += 1
        if size is not None:
            self.sizes |= _integers(size)


class Knowledge:
    """Asks one kind of database about the objects of one store."""

    def __init__(
        self,
        dialect_name: str,
        root: str,
        tables: Sequence[JournaledTable],
        journal: Journal | None,
        *,
        grace: timedelta,
    ) -> None:
        self._is_sqlite = dialect_name == "sqlite"
        self._root = root
        self._tables = tables
        self._journal = journal
        self._grace = grace

    async def stream(
        self, connection: AsyncConnection, key_range: KeyRange, owns: Callable[[str], bool]
    ) -> AsyncGenerator[Known, None]:
        """Give what is known of the objects in a range, in the order of the URIs' bytes.

        Raises:
            RuntimeError: the database does not sort by bytes.
        """
        options = {"yield_per": ROWS_PER_FETCH}
        statement = self._in_order(key_range)
        current: Known | None = None
        result = await connection.stream(statement, execution_options=options)
        try:  # `async with` would swallow the GeneratorExit of whoever stops listening
            async for rows in result.partitions():
                for uri, size, state, is_stuck in rows:
                    if current is None or uri != current.uri:
                        if current is not None:
                            if uri < current.uri:
                                raise RuntimeError(
                                    f"the database does not sort by bytes: {uri} came after "
                                    f"{current.uri}"
                                )
                            if owns(current.uri):
                                yield current
                        current = Known(uri)
                    current.add(size, state, is_stuck=bool(is_stuck))
            if current is not None and owns(current.uri):
                yield current
        finally:
            await result.close()

    async def sample(self, connection: AsyncConnection, limit: int) -> list[str]:
        """Return some URIs of the cells at random, sorted by bytes."""
        uris = self._below_root([select(uri.label("uri")) for uri, _ in self._cells()])
        found = await connection.execute(
            select(union_all(*uris).subquery().c.uri).order_by(func.random()).limit(limit)
        )
        return sorted(found.scalars())

    async def cells(
        self, connection: AsyncConnection, uris: Sequence[str]
    ) -> Mapping[str, Sequence[frozenset[int]]]:
        """Return for each URI what the cells that name it tell of its size."""
        parts = [
            select(uri.label("uri"), size.label("size")).where(uri.in_(uris))
            for uri, size in self._cells()
        ]
        found: dict[str, list[frozenset[int]]] = defaultdict(list)
        for uri, size in await connection.execute(union_all(*parts)):
            found[uri].append(frozenset() if size is None else _integers(size))
        return found

    async def doomed(self, connection: AsyncConnection, uris: Sequence[str]) -> Mapping[str, str]:
        """Return the objects that a row names and the journal will have deleted, and their state.

        One statement: what is adopted or retired meanwhile is seen before or after, never halfway.
        """
        assert self._journal is not None
        table = self._journal.table
        named = [select(literal(1)).where(uri == table.c.uri).exists() for uri, _ in self._cells()]
        found = await connection.execute(
            select(table.c.uri, table.c.state, table.c.since).where(
                table.c.uri.in_(uris), table.c.state != "staged", or_(*named)
            )
        )
        return {uri: f"{state} since {since:%Y-%m-%d %H:%M}" for uri, state, since in found}

    async def stuck(self, connection: AsyncConnection, uris: Sequence[str]) -> Mapping[str, str]:
        """Return the objects whose entries should have been dealt with, and what is known of it."""
        assert self._journal is not None
        table = self._journal.table
        columns = (table.c.uri, table.c.state, table.c.since, table.c.attempts, table.c.last_error)
        found = await connection.execute(
            select(*columns).where(table.c.uri.in_(uris), self._is_stuck(self._journal))
        )
        stuck = {}
        for uri, state, since, attempts, error in found:
            failed = f", failed {attempts} times: {error}" if attempts else ""
            stuck[uri] = f"{state} since {since:%Y-%m-%d %H:%M}{failed}"
        return stuck

    # --- statements

    def _cells(self) -> Iterator[tuple[ColumnElement[str], ColumnElement[Any]]]:
        """Give the URI and the size of each column, as expressions."""
        for table in self._tables:
            for each in table.columns:
                of_json = isinstance(each.column.type, BlobType) and each.is_json
                size = JsonMember(each.column, "size") if of_json else cast(null(), Text)
                yield each.uri, size

    def _below_root(self, selects: Sequence[Select[Any]]) -> list[Select[Any]]:
        return [
            each.where(each.selected_columns.uri.startswith(self._root, autoescape=True))
            for each in selects
        ]

    def _in_order(self, key_range: KeyRange) -> Select[Any]:
        no_state, no_stuck = cast(null(), Text), false()
        parts = [
            select(
                uri.label("uri"), size.label("size"), no_state.label("state"), no_stuck.label("s")
            )
            for uri, size in self._cells()
        ]
        if self._journal is not None:
            table = self._journal.table
            is_stuck = self._is_stuck(self._journal).label("s")
            parts.append(
                select(table.c.uri, cast(null(), Text).label("size"), table.c.state, is_stuck)
            )
        known = union_all(*self._below_root(parts)).subquery()
        by_bytes = collate(known.c.uri, "BINARY" if self._is_sqlite else "C")
        statement = select(known).order_by(by_bytes)
        if key_range.after is not None:
            statement = statement.where(by_bytes > key_range.after)
        if key_range.up_to is not None:
            statement = statement.where(by_bytes <= key_range.up_to)
        return statement

    def _is_stuck(self, journal: Journal) -> ColumnElement[bool]:
        """Tell that a worker should have dealt with an entry, or has given up on it for now."""
        c = journal.table.c
        return or_(
            and_(c.state != "staged", c.not_before <= self._ago(self._grace)),
            and_(c.state == "staged", c.since <= self._ago(journal.lease + self._grace)),
            c.attempts >= HOPELESS_AFTER,
            and_(c.attempts > 0, func.coalesce(c.last_error, "").startswith(PARKED)),
        )

    def _ago(self, delay: timedelta) -> ColumnElement[Any]:
        """Return the database's time, so much earlier."""
        if self._is_sqlite:
            seconds = f"{-delay.total_seconds():+f} seconds"
            moment = func.strftime("%Y-%m-%d %H:%M:%f000", "now", seconds)
            return type_coerce(moment, DateTime())
        return func.clock_timestamp(type_=DateTime(timezone=True)) - delay


def _integers(size: object) -> frozenset[int]:
    """Return a size as a set of one; nothing of what is no number."""
    text = str(size)
    is_one = len(text) < LONGEST_SIZE and text.isascii() and text.isdigit()
    return frozenset([int(text)]) if is_one else frozenset()
