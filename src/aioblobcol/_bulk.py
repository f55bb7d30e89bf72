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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

from sqlalchemy import Insert
from sqlalchemy.exc import DBAPIError

from ._blob import Blob
from ._column import BlobAttribute, blob_attributes
from ._keeper import Keeper, Unit, keeper_of
from ._placing import Placement, store_of
from ._rows import Rows
from ._session import uris_claimed
from .errors import (
    BlobSharedError,
    TransactionAbortedError,
    TransactionError,
    UnsafeTransactionError,
)

if TYPE_CHECKING:
    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper, ORMExecuteState
    from sqlalchemy.sql.compiler import SQLCompiler

_SEVERAL_VALUES = re.compile(r"_m\d+\Z")

ROWS_ADDED = (
    "a bulk statement changed rows that another transaction added meanwhile; their objects are "
    "not known. Roll the transaction back and repeat it"
)
FAILED = (
    "a bulk statement failed half-way, and nobody knows which of its rows it has changed: put it "
    "into `async with session.begin_nested():`, or let the error through"
)
SELECT_REFUSED = (
    "INSERT .. SELECT would put the object of one row into another one: load the rows and assign "
    "blob.copy()"
)


def on_orm_execute(execute: ORMExecuteState) -> Result[Any] | None:
    """Carry a bulk statement on a class with managed columns out; leave any other alone."""
    keeper, mapper = keeper_of(execute.session), execute.bind_mapper
    if keeper is None or mapper is None or not blob_attributes(mapper):
        return None
    if execute.session.autoflush and not execute.is_select:
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
        self._attributes = blob_attributes(mapper)
        self._placements: list[Placement] = []
        parameters = execute.parameters
        self._is_list = isinstance(parameters, Sequence)
        rows: Any = parameters if self._is_list else [parameters or {}]
        self._rows: list[dict[str, Any]] = [dict(row) for row in rows]

    def insert(self) -> Result[Any] | None:
        """Upload the blobs of all rows at once, and insert them."""
        statement = self._execute.statement
        assert isinstance(statement, Insert)
        self._place_rows()
        if not self._execute.parameters:
            compiled = self._compile()
            if statement.select is not None and self._names_a_blob_column(str(compiled)):
                raise UnsafeTransactionError(SELECT_REFUSED)
            self._place_values(compiled)
        if not self._placements:
            return None
        unit = self._begin()
        try:
            return self._invoke(unit)
        finally:
            unit.dismiss()

    def change(self) -> Result[Any] | None:
        """Upload, lock and read the rows, send the statement, and read the rows again."""
        if self._execute.is_update:
            compiled = None if self._is_list else self._compile()
            if not self._may_touch_blobs(compiled):
                return None
            self._place_rows()
            if compiled is not None:
                self._place_values(compiled)
        unit = self._begin()
        try:
            unit.rows = Rows()
            self._lock(unit.rows)
            self._check_single(unit.rows)
            if self._execute.is_delete:
                unit.rows.expect_all_deleted()
            with unit.watch.copies_are_seen():
                result = self._invoke(unit)
            self._look_again(unit, unit.rows, result)
        finally:
            unit.dismiss()
        return result

    # --- what it carries

    def _place_rows(self) -> None:
        for row in self._rows:
            for attribute in self._attributes:
                blob = row.get(attribute.key)
                if isinstance(blob, Blob):
                    row[attribute.key] = self._place(blob, attribute, row)

    def _place_values(self, compiled: SQLCompiler) -> None:
        """Find what stands in the statement itself; it can be uploaded, but not replaced."""
        names = {}
        for attribute in self._attributes:
            names[attribute.column.key] = names[attribute.column.name] = attribute
        for name, value in compiled.params.items():
            target = names.get(name) or names.get(_SEVERAL_VALUES.sub("", name))
            is_new = isinstance(value, Blob) and not value.is_stored and value._cell is None
            if target is not None and is_new:
                self._place(value, target, dict(compiled.params))

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
            unit.dismiss()
            unit.upload(self._placements)
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
            return self._execute.invoke_statement(params=params)
        except Exception as exc:
            is_undone = isinstance(exc, DBAPIError) and not (self._is_list or self._placements)
            if unit.watch.sent == sent_before:
                unit.books.withdraw(placement.uri for placement in self._placements)
            elif not is_undone:  # SQLAlchemy may find fault after the statement was carried out
                unit.forbid_commit(TransactionAbortedError(FAILED))
            raise

    # --- what it changes

    def _lock(self, rows: Rows) -> None:
        if self._is_list and self._execute.is_update:  # by primary key
            names = set(self._key_names)
            complete = [row for row in self._rows if names <= row.keys()]  # SQLAlchemy will say so
            rows.lock(self._session, self._mapper, map(self._identity, complete))
            return
        condition = getattr(self._execute.statement, "whereclause", None)
        for row in self._rows:
            rows.lock_where(self._session, self._mapper, condition, row)

    @property
    def _key_names(self) -> list[str]:
        mapper = self._mapper
        return [mapper.get_property_by_column(column).key for column in mapper.primary_key]

    def _identity(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key_names)

    def _check_single(self, rows: Rows) -> None:
        if self._placements and not self._is_list and rows.count(self._mapper) > 1:
            uris = [placement.uri for placement in self._placements]
            for placement in self._placements:
                placement.blob._reset()
            raise BlobSharedError(uris)

    def _look_again(self, unit: Unit, rows: Rows, result: Result[Any]) -> None:
        rows.read_again(self._session)
        self._keeper.supersede(unit, rows)
        self._withdraw_unused(unit, rows, result)
        shared = rows.shared({*unit.books.created, *uris_claimed(self._session)})
        if shared:
            self._forbid(unit, BlobSharedError(shared))
        changed = getattr(result, "rowcount", -1)
        if not self._is_list and changed > rows.count(self._mapper):
            self._forbid(unit, UnsafeTransactionError(ROWS_ADDED))

    def _withdraw_unused(self, unit: Unit, rows: Rows, result: Result[Any]) -> None:
        """Take back what the statement wrote into no row, because it matched none."""
        if not self._is_list:
            is_unused = getattr(result, "rowcount", -1) == 0
            unused = self._placements if is_unused else []
        else:
            unused = [
                placement
                for placement in self._placements
                if not rows.finds(self._mapper, self._identity(placement.subject))
            ]
        unit.books.withdraw(placement.uri for placement in unused)
        for placement in unused:
            placement.blob._reset()

    def _forbid(self, unit: Unit, error: TransactionError) -> NoReturn:
        unit.forbid_commit(error)
        raise error

    # --- what its text tells

    def _compile(self) -> SQLCompiler:
        """Compile the statement to look at it; SQLAlchemy cannot, of one with a list of rows."""
        bind = self._session.get_bind(mapper=self._mapper)
        statement: Any = self._execute.statement
        return cast("SQLCompiler", statement.compile(dialect=bind.dialect))

    def _may_touch_blobs(self, compiled: SQLCompiler | None) -> bool:
        if compiled is None:
            return any(attribute.key in row for row in self._rows for attribute in self._attributes)
        return self._names_a_blob_column(str(compiled))

    def _names_a_blob_column(self, text: str) -> bool:
        names = {attribute.column.name for attribute in self._attributes}
        return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names)


__all__ = ["on_orm_execute"]
