"""ORM bulk statements of a managed session: ``insert()``, ``update()`` and ``delete()``.

They upload, supersede and clean up as the unit of work does. What an UPDATE or DELETE lets go is
the difference between the rows before, under a lock, and after; so expressions, swaps and
RETURNING come out right without reading the statement. What would put one object into two
cells is refused. (Upserts that carry blobs are refused by `_session` when they are sent: nobody
could tell which branch ran.) Not seen here, and refused by the column's type: Core on the
table, legacy bulk methods.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

from sqlalchemy import CTE, BindParameter, ClauseElement, Insert, Null
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import visitors
from sqlalchemy.sql.dml import UpdateBase

from ._blob import Blob
from ._column import BlobAttribute, blob_attributes, row_attributes
from ._keeper import Keeper, Unit, is_flushing, keeper_of
from ._placing import Placement, store_of
from ._rows import Rows
from ._uri import UploadedUri
from .errors import (
    BlobSharedError,
    TransactionAbortedError,
    TransactionError,
    UnsafeTransactionError,
)

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper, ORMExecuteState
    from sqlalchemy.sql.compiler import SQLCompiler

# otherwise nobody counts if SQLAlchemy adds a RETURNING of its own
_COUNTED = {"preserve_rowcount": True}
_SEVERAL_VALUES = re.compile(r"_m\d+\Z")

ROWS_ADDED = (
    "a bulk statement changed rows that another transaction added meanwhile; their objects are "
    "not known. Roll the transaction back and repeat it"
)
FAILED = (
    "a bulk statement failed half-way, and nobody knows which of its rows it has changed: put it "
    "into `async with session.begin_nested():`, or let the error through"
)
KEYS_CHANGED = (
    "a bulk UPDATE changed primary keys and managed columns at once, so that its rows cannot be "
    "told apart: do it in two statements, or load the objects. Roll the transaction back"
)
CTE_REFUSED = (
    "this statement changes rows in a CTE, and its condition is asked twice: once to lock and read "
    "the rows whose objects it lets go. Send the CTE as a statement of its own"
)
SELECT_REFUSED = (
    "INSERT .. SELECT would put the object of one row into another one: load the rows and assign "
    "blob.copy()"
)


def on_orm_execute(execute: ORMExecuteState) -> Result[Any] | None:
    """Carry a bulk statement on a class with managed columns out; leave any other alone."""
    keeper, mapper = keeper_of(execute.session), execute.bind_mapper
    if keeper is None or mapper is None or execute.is_select or not row_attributes(mapper):
        return None
    wants_flush = execute.session.autoflush and execute.execution_options.get("autoflush", True)
    if wants_flush and not is_flushing(execute.session):
        execute.session.flush()  # now: a flush in the middle of what follows would be another one
    if execute.is_insert:
        return _Bulk(keeper, execute, mapper).insert()
    if execute.is_update or execute.is_delete:
        return _Bulk(keeper, execute, mapper).change()
    return None


class _Bulk:
    """One bulk statement."""

    def __init__(self, keeper: Keeper, execute: ORMExecuteState, mapper: Mapper[Any]) -> None:
        self._keeper = keeper
        self._execute = execute
        self._mapper = mapper
        self._session = execute.session
        # select(..).from_statement(update(..)) wraps it
        self._statement: Any = getattr(execute.statement, "element", execute.statement)
        self._attributes = blob_attributes(mapper)
        self._placements: list[Placement] = []
        self._assigned: set[str] = set()  # of the explicit strength
        parameters = execute.parameters
        self._is_list = isinstance(parameters, Sequence)
        rows: Any = parameters if self._is_list else [parameters or {}]
        self._rows: list[dict[str, Any]] = [dict(row) for row in rows]

    def insert(self) -> Result[Any] | None:
        """Upload the blobs of all rows at once, and insert them."""
        statement = self._statement
        assert isinstance(statement, Insert)
        self._place_rows()
        if not self._execute.parameters:
            compiled = self._compile()
            if statement.select is not None and self._names_a_blob_column(compiled):
                raise UnsafeTransactionError(SELECT_REFUSED)
            self._place_values(compiled)
        self._check_expressions()
        if not self._placements:
            return None
        unit = self._begin()
        try:
            return self._invoke(unit)
        finally:
            unit.dismiss(self._placed)

    def change(self) -> Result[Any] | None:
        """Upload, lock and read the rows, send the statement, and read the rows again."""
        if self._execute.is_update:
            has_values = bool(getattr(self._statement, "_values", None))
            compiled = self._compile() if has_values or not self._is_list else None
            if not self._may_touch_blobs(compiled):
                return None
            self._place_rows()
            if compiled is not None:
                self._place_values(compiled)
        if _changes_rows_in_a_cte(self._statement.whereclause):
            raise UnsafeTransactionError(CTE_REFUSED)
        unit = self._begin()
        rows = Rows(self._execute.bind_arguments, self._execute.execution_options)
        try:
            self._lock(rows)
            if self._execute.is_delete:
                rows.expect_all_deleted(self._mapper.local_table)
            with unit.watch.copies_are_seen():
                result = self._invoke(unit)
            result, changed = _count(result)
            self._look_again(unit, rows, changed)
        finally:
            unit.dismiss(self._placed)
        return result

    # --- what it carries

    def _place_rows(self) -> None:
        for row in self._rows:
            for attribute in self._attributes:
                blob = row.get(attribute.key)
                if isinstance(blob, UploadedUri):
                    self._assigned.add(blob)
                if isinstance(blob, Blob):
                    row[attribute.key] = self._place(blob, attribute, row)

    def _place_values(self, compiled: SQLCompiler) -> None:
        """Find what stands in the statement itself; it can be uploaded, but not replaced."""
        names = {}
        for attribute in self._attributes:
            names[attribute.column.key] = names[attribute.column.name] = attribute
        # some characters cannot stand in the name of a parameter
        escaped = {to: name for name, to in (compiled.escaped_bind_names or {}).items()}
        for bound, value in compiled.params.items():
            if isinstance(value, UploadedUri):
                self._assigned.add(value)
            name = escaped.get(bound, bound)
            target = names.get(name) or names.get(_SEVERAL_VALUES.sub("", name))
            is_new = isinstance(value, Blob) and not value.is_stored and value._cell is None
            if target is not None and is_new:
                self._place(value, target, dict(compiled.params))

    def _check_expressions(self) -> None:
        """Refuse an INSERT that takes a managed column's value from an expression."""
        values: Mapping[Any, Any] = getattr(self._statement, "_values", None) or {}
        managed = {attribute.column for attribute in self._attributes}
        for column, value in values.items():
            is_plain = isinstance(value, (BindParameter, Null)) or not _is_sql(value)
            if column in managed and not is_plain:
                raise UnsafeTransactionError(SELECT_REFUSED)

    def _place(self, blob: Blob, attribute: BlobAttribute, subject: Mapping[str, Any]) -> Blob:
        if blob.is_stored or blob._cell is not None:
            blob = blob.copy()  # one object, one cell
        blob._cell = self
        store = store_of(attribute, self._keeper.stores)
        self._placements.append(Placement(blob, attribute, subject, store))
        return blob

    def _begin(self) -> Unit:
        unit = self._keeper.open_unit(self._session)
        try:
            unit.check(self._session)
            unit.upload(self._session, self._placements)
        except BaseException:
            for placement in self._placements:
                if not placement.blob.is_stored:
                    placement.blob._cell = None
            raise
        return unit

    def _invoke(self, unit: Unit) -> Result[Any]:
        params: Any = None
        if self._placements:
            params = self._rows if self._is_list else self._rows[0]
        sent_before = unit.watch.sent
        try:
            return self._execute.invoke_statement(params=params, execution_options=_COUNTED)
        except Exception as exc:
            is_undone = isinstance(exc, DBAPIError) and not (self._is_list or self._placements)
            if unit.watch.sent == sent_before:
                unit.books.withdraw(placement.uri for placement in self._placements)
            elif not is_undone:  # SQLAlchemy may find fault after the statement was carried out
                unit.books.forbid_commit(TransactionAbortedError(FAILED))
            raise

    # --- what it changes

    def _lock(self, rows: Rows) -> None:
        if self._is_list and self._execute.is_update:  # by primary key
            names = set(self._key_names)
            complete = [row for row in self._rows if names <= row.keys()]  # SQLAlchemy will say so
            rows.lock(self._session, self._mapper, map(self._identity, complete))
            return
        condition = self._statement.whereclause
        for row in self._rows:
            rows.lock_where(self._session, self._mapper, condition, row)

    @property
    def _key_names(self) -> list[str]:
        mapper = self._mapper
        return [mapper.get_property_by_column(column).key for column in mapper.primary_key]

    def _identity(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key_names)

    def _look_again(self, unit: Unit, rows: Rows, changed: int) -> None:
        rows.read_again(self._session)
        gone = rows.count_gone(self._mapper)
        if self._execute.is_delete and 0 <= changed < gone:  # some of them are not gone
            rows.look_elsewhere(self._session)
        self._keeper.supersede(unit, rows)
        self._withdraw_unused(unit, rows, changed)
        self._supersede_overwritten(unit, rows)
        if self._execute.is_update and rows.vanished(self._mapper):
            self._forbid(unit, UnsafeTransactionError(KEYS_CHANGED))
        shared = rows.shared({*(each.uri for each in self._placements), *self._assigned})
        if shared:
            self._forbid(unit, BlobSharedError(shared))
        known = gone if self._execute.is_delete else rows.count(self._mapper)
        if not self._is_list and changed > known:
            self._forbid(unit, UnsafeTransactionError(ROWS_ADDED))

    def _withdraw_unused(self, unit: Unit, rows: Rows, changed: int) -> None:
        """Take back what the statement wrote into no row, because it matched none."""
        named = rows.named()  # a key may be written otherwise than it was asked for
        unused = [
            placement
            for placement in self._placements
            if placement.uri not in named and self._is_without_row(placement, rows, changed)
        ]
        unit.books.withdraw(placement.uri for placement in unused)
        for placement in unused:
            placement.blob._reset()

    def _is_without_row(self, placement: Placement, rows: Rows, changed: int) -> bool:
        if self._is_list:
            return not rows.finds(self._mapper, self._identity(placement.subject))
        return changed == 0

    def _supersede_overwritten(self, unit: Unit, rows: Rows) -> None:
        """Find what a list has written into a row that comes again in it."""
        if not (self._is_list and self._execute.is_update and self._placements):
            return
        times, named = Counter(map(self._identity, self._rows)), rows.named()
        for placement in self._placements:
            if times[self._identity(placement.subject)] > 1 and placement.uri not in named:
                unit.supersede(placement.uri, placement.attribute, placement.store)

    def _forbid(self, unit: Unit, error: TransactionError) -> NoReturn:
        unit.books.forbid_commit(error)
        raise error

    @property
    def _placed(self) -> list[Blob]:
        return [placement.blob for placement in self._placements]

    # --- what its text tells

    def _compile(self) -> SQLCompiler:
        """Compile the statement to look at it; not one that has nothing but a list of rows."""
        bind = self._session.get_bind(mapper=self._mapper, clause=self._statement)
        return cast("SQLCompiler", self._statement.compile(dialect=bind.dialect))

    def _may_touch_blobs(self, compiled: SQLCompiler | None) -> bool:
        keys = {attribute.key for attribute in self._attributes}
        in_rows = any(not keys.isdisjoint(row) for row in self._rows)
        return in_rows or (compiled is not None and self._names_a_blob_column(compiled))

    def _names_a_blob_column(self, compiled: SQLCompiler) -> bool:
        text = str(compiled)
        names = {attribute.column.name for attribute in row_attributes(self._mapper)}
        return any(
            compiled.preparer.quote_identifier(name) in text
            or re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)
            for name in names
        )


def _count(result: Result[Any]) -> tuple[Result[Any], int]:
    """Return how many rows a statement has changed, with the same result; -1 if nobody says.

    With RETURNING some drivers tell only by what is returned, so it is fetched.
    """
    count: int = getattr(result, "rowcount", -1)
    if count >= 0 or not getattr(result, "returns_rows", True):
        return result, count
    frozen = result.freeze()
    return frozen(), sum(1 for _ in frozen())


def _changes_rows_in_a_cte(condition: ColumnElement[bool] | None) -> bool:
    """Tell whether a condition changes rows by itself."""
    return condition is not None and any(
        isinstance(each, CTE) and isinstance(each.element, UpdateBase)
        for each in visitors.iterate(condition)
    )


def _is_sql(value: object) -> bool:
    return isinstance(value, ClauseElement) or hasattr(value, "__clause_element__")


__all__ = ["on_orm_execute"]
