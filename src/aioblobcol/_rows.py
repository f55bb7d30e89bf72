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

from sqlalchemy import delete, false, select, tuple_

from ._blob import Blob
from ._column import BlobAttribute, row_attributes

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Executable, FromClause, Select
    from sqlalchemy.engine import Connection, CursorResult
    from sqlalchemy.orm import Mapper, Session

Identity = tuple[Any, ...]
T = TypeVar("T")

ROWS_PER_READ = 500


Cells = dict[BlobAttribute, str]


class Rows:
    """The rows that one flush or bulk statement changes.

    Attributes:
        keys_change: so that a row which is gone may have another key (ON UPDATE CASCADE) in place
            of being deleted: then its objects are looked up by value.
    """

    keys_change = False

    def __init__(
        self,
        routing: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a bulk statement's ``bind_arguments`` and execution options."""
        self._routing = dict(routing or {})
        known = options or {}
        self._options = {k: known[k] for k in ("schema_translate_map",) if k in known}
        self._before: dict[Mapper[Any], dict[Identity, Cells]] = {}
        self._after: dict[Mapper[Any], dict[Identity, Cells]] = {}
        self._renamed: dict[Mapper[Any], dict[Identity, Identity]] = {}
        self._asked: dict[Mapper[Any], set[Identity]] = {}
        self._absent: dict[Mapper[Any], set[Identity]] = {}
        self._to_delete: dict[Mapper[Any], set[Identity]] = {}
        self._deleted_from: FromClause | None = None
        self._elsewhere: set[str] = set()

    def knows(self, mapper: Mapper[Any], identity: Identity) -> bool:
        """Tell whether a row was read already."""
        return identity in self._before.get(mapper, {})

    def count(self, mapper: Mapper[Any]) -> int:
        """Return how many rows of a class were found."""
        return len(self._before.get(mapper, {}))

    def count_gone(self, mapper: Mapper[Any]) -> int:
        """Return how many of them are not found under their keys any more."""
        now = self._after.get(mapper, {})
        return sum(1 for key in self._before.get(mapper, {}) if key not in now)

    @property
    def expects_deletes(self) -> bool:
        """Whether a row is to be deleted."""
        return any(self._to_delete.values())

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
        connection = self._begin_writing(session, mapper)
        rows = self._before.setdefault(mapper, {})
        absent = set(wanted)
        for _ in range(2):  # whom we waited for may have put another row in the place of one
            for some in batched([key for key in wanted if key in absent], ROWS_PER_READ):
                statement = _locking(
                    _select(mapper).where(is_one_of(mapper.primary_key, some)), mapper
                )
                rows.update(_read(mapper, self._execute(connection, statement)))
            absent -= rows.keys()
        self._asked.setdefault(mapper, set()).update(wanted)
        self._absent.setdefault(mapper, set()).update(absent)
        rows.update((key, {}) for key in absent)  # do not ask again

    def lock_where(
        self,
        session: Session,
        mapper: Mapper[Any],
        condition: ColumnElement[bool] | None,
        parameters: Mapping[str, Any],
    ) -> None:
        """Read the rows that a bulk statement will match, under the same lock.

        More than these, if the session adds criteria to the statement: not through the session,
        whose listeners may add others to a SELECT.
        """
        connection = self._begin_writing(session, mapper)
        statement = _locking(_select(mapper), mapper)
        if mapper.single and mapper.polymorphic_on is not None:
            kinds = [each.polymorphic_identity for each in mapper.self_and_descendants]
            statement = statement.where(mapper.polymorphic_on.in_(kinds))
        if condition is not None:
            statement = statement.where(condition)
        found = self._execute(connection, statement, parameters)
        self._before.setdefault(mapper, {}).update(_read(mapper, found))

    def expect_deleted(self, mapper: Mapper[Any], identities: Iterable[Identity]) -> None:
        """Say which rows are to be deleted; another one that is gone may have a new key."""
        self._to_delete.setdefault(mapper, set()).update(identities)

    def expect_all_deleted(self, table: FromClause) -> None:
        """Say that of all rows that were read; of joined tables, only *table* loses its row."""
        self._deleted_from = table
        for mapper, rows in self._before.items():
            self.expect_deleted(mapper, rows)

    def expects_deleted(self, mapper: Mapper[Any], identity: Identity) -> bool:
        """Tell whether somebody has said so of a row."""
        return identity in self._to_delete.get(mapper, set())

    def expect_renamed(self, mapper: Mapper[Any], old: Identity, new: Identity) -> None:
        """Say under which primary key a row stands afterwards."""
        self._renamed.setdefault(mapper, {})[old] = new

    # --- after

    def read_again(self, session: Session) -> None:
        """Read what the rows name now."""
        for mapper, rows in self._before.items():
            renamed = self._renamed.get(mapper, {})
            identities = dict.fromkeys(renamed.get(key, key) for key in rows)
            connection = self._connection(session, mapper)
            now = self._after[mapper] = {}
            for some in batched(list(identities), ROWS_PER_READ):
                statement = _select(mapper).where(is_one_of(mapper.primary_key, some))
                now.update(_read(mapper, self._execute(connection, statement)))
            if self.keys_change:
                self._look_elsewhere(connection, mapper)

    def look_elsewhere(self, session: Session) -> None:
        """Find what rows name that were deleted, it seems, and are perhaps not found again."""
        for mapper in self._before:
            self._look_elsewhere(self._connection(session, mapper), mapper)

    def _look_elsewhere(self, connection: Connection, mapper: Mapper[Any]) -> None:
        """Find what rows under other keys name, by value: without an index this reads the table."""
        wanted: dict[BlobAttribute, list[str]] = {}
        for key in self._to_delete.get(mapper, set()):
            for attribute, uri in self._before[mapper].get(key, {}).items():
                wanted.setdefault(attribute, []).append(uri)
        for attribute, uris in wanted.items():
            for some in batched(uris, ROWS_PER_READ):
                statement = select(attribute.column).where(attribute.column.in_(some))
                found = self._execute(connection, statement).scalars()
                self._elsewhere.update(blob.uri for blob in found if isinstance(blob, Blob))

    def let_go(self) -> list[tuple[str, BlobAttribute]]:
        """Return the objects that certainly none of the rows names any more."""
        named = self._elsewhere.union(self._named_now())
        return [
            (uri, attribute)
            for mapper, identity, cells in self._rows_before()
            for attribute, uri in cells.items()
            if uri not in named and self._is_known_now(mapper, identity, attribute)
        ]

    def finds(self, mapper: Mapper[Any], identity: Identity) -> bool:
        """Tell whether a row is there now, under a key that is written like this."""
        return identity in self._after.get(mapper, {})

    def vanished(self, mapper: Mapper[Any]) -> bool:
        """Tell whether a row that was found is not there under its key any more."""
        before, absent = self._before.get(mapper, {}), self._absent.get(mapper, set())
        return any(key not in self._after[mapper] for key in before.keys() - absent)

    def named(self) -> set[str]:
        """Return every object that the rows name now."""
        return set(self._named_now())

    def shared(self, own: Iterable[str]) -> list[str]:
        """Return what the rows name twice now, or have from rows that were not read.

        Args:
            own: the transaction's own uploads.
        """
        before = Counter(uri for _, _, cells in self._rows_before() for uri in cells.values())
        known, named = {*before, *own}, Counter(self._named_now())
        return sorted(
            uri for uri, times in named.items() if times > max(1, before[uri]) or uri not in known
        )

    # --- how

    def _connection(self, session: Session, mapper: Mapper[Any]) -> Connection:
        return session.connection(bind_arguments={"mapper": mapper, **self._routing})

    def _begin_writing(self, session: Session, mapper: Mapper[Any]) -> Connection:
        """Return the session's connection; on SQLite, with the one lock for writing that it has.

        Otherwise the read would take a snapshot, and the write after it would fail at once if
        somebody wrote in between, in place of waiting for its turn.
        """
        connection = self._connection(session, mapper)
        if connection.dialect.name == "sqlite":
            self._execute(connection, delete(mapper.primary_key[0].table).where(false()))
        return connection

    def _execute(
        self,
        connection: Connection,
        statement: Executable,
        parameters: Mapping[str, Any] | None = None,
    ) -> CursorResult[Any]:
        return connection.execute(statement, parameters, execution_options=self._options)

    def _rows_before(self) -> Iterator[tuple[Mapper[Any], Identity, Cells]]:
        for mapper, rows in self._before.items():
            for identity, cells in rows.items():
                yield mapper, identity, cells

    def _is_known_now(
        self, mapper: Mapper[Any], identity: Identity, attribute: BlobAttribute
    ) -> bool:
        now = self._renamed.get(mapper, {}).get(identity, identity)
        if now in self._after[mapper]:
            return True
        if self._deleted_from is not None and attribute.column.table is not self._deleted_from:
            return False  # the other half of the row stays
        return self._is_to_be_deleted(mapper, identity)

    def _is_to_be_deleted(self, mapper: Mapper[Any], identity: Identity) -> bool:
        if self.expects_deleted(mapper, identity):
            return True
        if identity in self._asked.get(mapper, set()):
            return False
        # the database writes this key otherwise than whoever asked for it: 1, of "1"
        absent = self._absent.get(mapper, set())
        return bool(absent) and absent <= self._to_delete.get(mapper, set())

    def _named_now(self) -> Iterator[str]:
        for rows in self._after.values():
            for cells in rows.values():
                yield from cells.values()


def _locking(statement: Select[Any], mapper: Mapper[Any]) -> Select[Any]:
    """Lock as an UPDATE does, in one order everywhere, so that deadlocks are few."""
    return statement.order_by(*mapper.primary_key).with_for_update(key_share=True)


def _select(mapper: Mapper[Any]) -> Select[Any]:
    columns = [attribute.column for attribute in row_attributes(mapper)]
    return select(*mapper.primary_key, *columns).select_from(mapper.persist_selectable)


def is_one_of(
    key: Sequence[ColumnElement[Any]], identities: Sequence[Identity]
) -> ColumnElement[bool]:
    """Return the condition that the primary *key* is one of *identities*."""
    if len(key) == 1:
        return key[0].in_([identity[0] for identity in identities])
    return tuple_(*key).in_(identities)


def _read(mapper: Mapper[Any], found: Iterable[Any]) -> Iterator[tuple[Identity, Cells]]:
    attributes, size = row_attributes(mapper), len(mapper.primary_key)
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
