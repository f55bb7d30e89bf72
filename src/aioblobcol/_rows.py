"""What rows name before and after a change: the one way in which old objects are found.

The attribute's history is no source for them: it is empty for an expired attribute and stale
when another transaction was faster. So the rows are read under a lock before the first
statement, read again in the same transaction afterwards, and what is gone from all of them was
let go. Statements are sent on the session's connection and not through the session, so that no
criteria of the user's hide a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import false, select, tuple_, update

from ._blob import Blob
from ._column import BlobAttribute, blob_attributes

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import Mapper, Session

Identity = tuple[Any, ...]
T = TypeVar("T")

ROWS_PER_READ = 500


Cells = dict[BlobAttribute, str]


class Rows:
    """The rows that one flush or bulk statement changes."""

    def __init__(self) -> None:
        self._before: dict[Mapper[Any], dict[Identity, Cells]] = {}
        self._after: dict[Mapper[Any], dict[Identity, Cells]] = {}
        self._renamed: dict[Mapper[Any], dict[Identity, Identity]] = {}
        self._to_delete: set[tuple[Mapper[Any], Identity]] = set()

    def knows(self, mapper: Mapper[Any], identity: Identity) -> bool:
        """Tell whether a row was read already."""
        return identity in self._before.get(mapper, {})

    def count(self, mapper: Mapper[Any]) -> int:
        """Return how many rows of a class were found."""
        return len(self._before.get(mapper, {}))

    # --- before

    def lock(
        self,
        session: Session,
        mapper: Mapper[Any],
        identities: Iterable[Identity],
    ) -> None:
        """Read rows by primary key, under the lock that changing them takes."""
        wanted = [key for key in dict.fromkeys(identities) if not self.knows(mapper, key)]
        if not wanted:
            return
        connection = _begin_writing(session, mapper)
        rows = self._before.setdefault(mapper, {})
        for some in batched(wanted, ROWS_PER_READ):
            statement = _locking(_select(mapper).where(_is_one_of(mapper, some)), mapper)
            rows.update(_read(mapper, connection.execute(statement)))
        for key in wanted:
            rows.setdefault(key, {})  # not there; do not ask again

    def lock_where(
        self,
        session: Session,
        mapper: Mapper[Any],
        condition: ColumnElement[bool] | None,
        parameters: Mapping[str, Any],
    ) -> None:
        """Read the rows that a bulk statement will match, under the same lock.

        Through the session: it adds to the statement what it will add to the bulk statement.
        """
        _begin_writing(session, mapper)
        key = [mapper.get_property_by_column(column) for column in mapper.primary_key]
        blobs = [mapper.attrs[attribute.key] for attribute in blob_attributes(mapper)]
        statement = _locking(select(*(prop.class_attribute for prop in (*key, *blobs))), mapper)
        if condition is not None:
            statement = statement.where(condition)
        found = session.execute(statement, parameters, execution_options={"autoflush": False})
        self._before.setdefault(mapper, {}).update(_read(mapper, found))

    def expect_deleted(self, mapper: Mapper[Any], identities: Iterable[Identity]) -> None:
        """Say which rows are to be deleted; another one that is gone may have a new key."""
        self._to_delete.update((mapper, identity) for identity in identities)

    def expect_all_deleted(self) -> None:
        """Say that of all rows that were read."""
        for mapper, rows in self._before.items():
            self.expect_deleted(mapper, rows)

    def expect_renamed(self, mapper: Mapper[Any], old: Identity, new: Identity) -> None:
        """Say under which primary key a row stands afterwards."""
        self._renamed.setdefault(mapper, {})[old] = new

    # --- after

    def read_again(self, session: Session) -> None:
        """Read what the rows name now."""
        for mapper, rows in self._before.items():
            renamed = self._renamed.get(mapper, {})
            identities = dict.fromkeys(renamed.get(key, key) for key in rows)
            connection = session.connection(bind_arguments={"mapper": mapper})
            now = self._after[mapper] = {}
            for some in batched(list(identities), ROWS_PER_READ):
                statement = _select(mapper).where(_is_one_of(mapper, some))
                now.update(_read(mapper, connection.execute(statement)))

    def let_go(self) -> list[tuple[str, BlobAttribute]]:
        """Return the objects that certainly none of the rows names any more."""
        named = set(self._named_now())
        return [
            (uri, attribute)
            for mapper, identity, cells in self._rows_before()
            if self._is_known_now(mapper, identity)
            for attribute, uri in cells.items()
            if uri not in named
        ]

    def finds(self, mapper: Mapper[Any], identity: Identity) -> bool:
        """Tell whether a row is there now."""
        return identity in self._after.get(mapper, {})

    def shared(self, own: Iterable[str]) -> list[str]:
        """Return what the rows name twice now, or have from rows that were not read.

        Args:
            own: the transaction's own uploads.
        """
        before = {uri for _, _, cells in self._rows_before() for uri in cells.values()}
        known = before.union(own)
        named = Counter(self._named_now())
        return sorted(uri for uri, times in named.items() if times > 1 or uri not in known)

    def _rows_before(self) -> Iterator[tuple[Mapper[Any], Identity, Cells]]:
        for mapper, rows in self._before.items():
            for identity, cells in rows.items():
                yield mapper, identity, cells

    def _is_known_now(self, mapper: Mapper[Any], identity: Identity) -> bool:
        now = self._renamed.get(mapper, {}).get(identity, identity)
        return now in self._after[mapper] or (mapper, identity) in self._to_delete

    def _named_now(self) -> Iterator[str]:
        for rows in self._after.values():
            for cells in rows.values():
                yield from cells.values()


def _begin_writing(session: Session, mapper: Mapper[Any]) -> Connection:
    """Return the session's connection; on SQLite, with the one lock for writing that it has.

    Otherwise the read would take a snapshot, and the write after it would fail at once if
    somebody wrote in between, in place of waiting for its turn.
    """
    connection = session.connection(bind_arguments={"mapper": mapper})
    if connection.dialect.name == "sqlite":
        key = mapper.primary_key[0]
        connection.execute(update(key.table).values({key: key}).where(false()))
    return connection


def _locking(statement: Select[Any], mapper: Mapper[Any]) -> Select[Any]:
    """Lock as an UPDATE does, in one order everywhere, so that deadlocks are few."""
    return statement.order_by(*mapper.primary_key).with_for_update(key_share=True)


def _select(mapper: Mapper[Any]) -> Select[Any]:
    columns = [attribute.column for attribute in blob_attributes(mapper)]
    return select(*mapper.primary_key, *columns).select_from(mapper.persist_selectable)


def _is_one_of(mapper: Mapper[Any], identities: Sequence[Identity]) -> ColumnElement[bool]:
    key = mapper.primary_key
    if len(key) == 1:
        return key[0].in_([identity[0] for identity in identities])
    return tuple_(*key).in_(identities)


def _read(mapper: Mapper[Any], found: Iterable[Any]) -> Iterator[tuple[Identity, Cells]]:
    attributes, size = blob_attributes(mapper), len(mapper.primary_key)
    for row in found:
        cells = zip(attributes, row[size:], strict=True)
        yield (
            tuple(row[:size]),
            {attribute: blob.uri for attribute, blob in cells if isinstance(blob, Blob)},
        )


def batched(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut *values* into pieces of *size* at most."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
