"""The journal's table, as a part of the user's `MetaData`, and the triggers that go with it.

A live object is not in the journal, an object in the journal is not live: rows adopt an object's
entry and retire what they replace, and this is done by triggers and by nobody else.

Invariants: a journaled table is created with its triggers in the same transaction (`create_all`),
and printed with them; everything that is printed may be run again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import (
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    event,
    func,
    text,
    update,
)
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.schema import CreateIndex, CreateTable, DDLElement

from .._store._base import Store, named_stores
from .._uri import root_uri
from ..errors import InvalidColumnError, InvalidInputError
from ._columns import JournaledTable, Place, column_of, present, tables_with_uris
from ._ownership import owners_table
from ._postgresql import PostgresqlTriggers
from ._sqlite import SqliteTriggers
from ._writer import JournalWriter, check_schemas

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Dialect, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import Session

TABLE_NAME = "aioblobcol_journal"
INFO_KEY = "aioblobcol.journal"
LONGEST = timedelta(days=36_525)
STATES = ("staged", "retired", "deleting")


class Triggers(Protocol):
    """What a dialect writes: statements that may be run again."""

    def create_functions(self) -> list[str]:
        """Install what other programs call."""

    def drop_functions(self) -> list[str]:
        """Take it away."""

    def create(self, tables: Sequence[JournaledTable], only: Sequence[JournaledTable]) -> list[str]:
        """Install the triggers of some *tables*, unless two cells of all name one object."""

    def drop(self, journaled: JournaledTable) -> list[str]:
        """Take those of one table away."""

    def missing(self, connection: Connection, tables: Sequence[JournaledTable]) -> list[str]:
        """Name the tables on which a trigger does not stand, or is out of date."""


class Journal:
    """What is written down about objects that no row names: made once, beside the `MetaData`.

    Its table is one of the user's, which ``create_all`` sees. ``create_all`` creates the triggers
    with the tables that it creates, and those of all tables with the journal's own; for tables
    that were there before, call `create_triggers` (in a migration, `aioblobcol.alembic` has it).

    Triggers go unnoticed: with ``DROP TABLE``, which is how Alembic's batch mode changes tables
    on SQLite, or by ``ALTER TABLE ... DISABLE TRIGGER``. `missing_triggers` finds that.

    Attributes:
        table: the journal's own.
        stores: by name.
        lease: after how long an object that is staged and that nobody has adopted is deleted.
        retention: how long an object is kept after the statement by which its row let it go; a
            transaction that goes on for longer than that leaves nothing of it at its commit.
        owner: what the configuration says whose objects they are.
        owners: the table that says under which prefixes this database may delete.
    """

    def __init__(
        self,
        metadata: MetaData,
        stores: Store | Mapping[str, Store],
        *,
        table_name: str = TABLE_NAME,
        schema: str | None = None,
        engine: AsyncEngine | None = None,
        uri_columns: Iterable[Any] = (),
        lease: timedelta = timedelta(hours=1),
        retention: timedelta = timedelta(minutes=10),
        strict: bool = True,
        owner: str | None = None,
    ) -> None:
        """Add the journal's table to *metadata*.

        Args:
            metadata: of the mapped classes; their tables may be declared later.
            stores: one, or several by name. What lies outside of their buckets and prefixes, and
                keys without an id of their own, are foreign: nobody adopts, retires or deletes
                them.
            engine: of its database, for `put_s3` outside of any session. Its connections are not
                used, its connection factory is.
            table_name: of the journal. Other programs stage with ``aioblobcol_stage(uri)``, or
                with ``<table_name>_stage(uri)`` if you give another name (PostgreSQL).
            schema: of the journal; by default that of *metadata*.
            uri_columns: columns of strings with URIs, of the explicit strength; managed columns
                are found by their type.
            lease: see the attribute.
            retention: see the attribute; longer than a replica may lag.
            strict: False records a warning where a statement would be refused (PostgreSQL), or
                nothing (SQLite): for a rolling deployment, as long as old programs write rows.
                What is being deleted is refused all the same.
            owner: of the objects, such as ``os.environ["DEPLOYMENT"]``. A copy of the database
                that cannot be told from it otherwise (a promoted replica, a SQLite file under
                the same path) deletes nothing where this is another one.

        Raises:
            InvalidInputError: no store, two of them in one place, or times that are none.
        """
        is_possible = timedelta(0) < lease <= LONGEST and timedelta(0) <= retention <= LONGEST
        if not is_possible:
            raise InvalidInputError("lease and retention are from no time to a hundred years")
        if INFO_KEY in metadata.info:
            raise InvalidInputError("this MetaData has a Journal already; give it all stores")
        self.stores: Mapping[str, Store] = named_stores(stores)
        self.lease = lease
        self.retention = retention
        self._strict = strict
        self._engine = engine
        self._known_columns: tuple[int, frozenset[Column[Any]]] | None = None
        self._writers: weakref.WeakKeyDictionary[Dialect, JournalWriter] = (
            weakref.WeakKeyDictionary()
        )
        self._uri_columns = [column_of(column) for column in uri_columns]
        self._metadata = metadata
        metadata.info[INFO_KEY] = self
        self.owner = owner
        self.table = _journal_table(metadata, table_name, schema or metadata.schema)
        self.owners = owners_table(metadata, self.table)
        self._writing = update(self.table)
        event.listen(metadata, "after_create", self._after_create)
        event.listen(metadata, "before_drop", self._before_drop)

    @staticmethod
    def of(metadata: MetaData) -> Journal | None:
        """Return the journal of a `MetaData`."""
        return metadata.info.get(INFO_KEY)

    @property
    def uri_columns(self) -> Sequence[Column[Any]]:
        """The columns of strings with URIs, of the explicit strength."""
        return tuple(self._uri_columns)

    @property
    def journaled_tables(self) -> list[JournaledTable]:
        """The tables whose objects it looks after, as far as they are declared by now.

        Raises:
            InvalidInputError: one of them has no primary key.
        """
        found = tables_with_uris(self._metadata, self._uri_columns)
        for journaled in found:
            if not journaled.table.primary_key.columns:
                raise InvalidInputError(f"{journaled.table}: a table with URIs needs a primary key")
        return found

    def check_column(self, column: Column[Any]) -> None:
        """Refuse a column whose rows the journal would not see.

        Raises:
            InvalidInputError: its table is in another `MetaData`.
        """
        if column not in self._columns:
            raise InvalidInputError(
                f"{column} is in none of the journal's tables, so that no row of it would adopt an "
                "object: the Journal belongs to the MetaData of the mapped classes"
            )

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse uploads for columns that the journal would not see; only their names are known.

        Raises:
            InvalidColumnError: there is none of such a name.
        """
        own = {name for column in self._columns for name in (column.name, column.key)}
        for name in names:
            if name not in own:
                known = ", ".join(sorted(map(str, self._columns))) or "none"
                raise InvalidColumnError(
                    f"{name!r} is none of the journal's columns ({known}): name it in "
                    "Journal(..., uri_columns=[Task.html, ...]), or no row would adopt its object"
                )

    @property
    def _columns(self) -> frozenset[Column[Any]]:
        count = len(self._metadata.tables)
        if self._known_columns is None or self._known_columns[0] != count:
            columns = (each.column for table in self.journaled_tables for each in table.columns)
            self._known_columns = count, frozenset(columns)
        return self._known_columns[1]

    def writer(self, engine: Engine | None = None) -> JournalWriter:
        """Return what stages and settles in the database of an engine.

        Raises:
            InvalidInputError: without *engine*, and the journal has none.
        """
        if engine is None:
            if self._engine is None:
                raise InvalidInputError(
                    "which database? Journal(metadata, stores, engine=engine) tells for sessions "
                    "with binds=..., and for put_s3() outside of blob_transaction()"
                )
            engine = self._engine.sync_engine
        writer = self._writers.get(engine.dialect)
        if writer is None:
            self.triggers(engine.dialect)  # or there is no journal on it
            writer = self._writers[engine.dialect] = JournalWriter(self, engine)
        return writer

    def writer_of(self, session: Session) -> JournalWriter:
        """Return what stages and settles for a session.

        Raises:
            InvalidInputError: nobody can tell its database, or its tables are others.
        """
        try:  # with a statement that writes: some sessions read from replicas
            bind = session.get_bind(clause=self._writing)
        except UnboundExecutionError:
            return self.writer()
        check_schemas(bind)
        return self.writer(bind.engine)

    def triggers(
        self, dialect: Dialect, *, schemas: Mapping[str | None, str | None] | None = None
    ) -> Triggers:
        """Return what writes the SQL of a dialect.

        Args:
            dialect: of the database.
            schemas: a connection's ``schema_translate_map``.

        Raises:
            InvalidInputError: another database than PostgreSQL or SQLite.
        """
        kinds: dict[str, Any] = {"postgresql": PostgresqlTriggers, "sqlite": SqliteTriggers}
        if dialect.name not in kinds:
            raise InvalidInputError(
                f"there is no journal on {dialect.name} yet: PostgreSQL and SQLite have it"
            )
        roots = [root_uri(store.bucket, store.prefix) for store in self.stores.values()]
        place = Place(dialect, self.table, schemas or {})
        made: Triggers = kinds[dialect.name](
            place, roots, retention=self.retention, strict=self._strict
        )
        return made

    def ddl(self, dialect: Dialect, *, with_table: bool = True) -> list[str]:
        """Return the statements that install the journal, for any migration tool.

        They are run in one transaction, which ends at the first error. All but the table's own
        (``with_table``) may be run again, and have to be when columns with URIs, partitions or
        what a `Journal` is made with were changed, and after a table was made anew. What is
        printed for PostgreSQL passes over tables that are not there and views; on SQLite all
        tables have to be there.
        """
        statements: list[str] = []
        if with_table:
            created: list[DDLElement] = [CreateTable(self.table)]
            created += map(CreateIndex, self.table.indexes)
            created.append(CreateTable(self.owners, if_not_exists=True))
            statements += [str(each.compile(dialect=dialect)).strip() for each in created]
        tables, triggers = self.journaled_tables, self.triggers(dialect)
        return statements + triggers.create_functions() + triggers.create(tables, tables)

    def drop_ddl(self, dialect: Dialect) -> list[str]:
        """Return the statements that take the triggers away; they may be run again."""
        return _drop(self.triggers(dialect), self.journaled_tables)

    def create_triggers(self, connection: Connection, *, only: Sequence[Table] = ()) -> None:
        """Install, or renew, the triggers in the connection's transaction.

        Nobody writes to the tables from now to the end of the transaction. Tables and columns
        that the database does not have are passed over, and so are views. The connection's
        ``schema_translate_map`` counts.

        Raises:
            DBAPIError: two cells name one object, which the message names; or there is no table
                of the journal; or other transactions have locked the tables.
        """
        triggers, tables = self._present(connection)
        chosen = [each for each in tables if not only or each.table in only]
        statements = triggers.create_functions() + triggers.create(tables, chosen)
        _execute(connection, statements)

    def drop_triggers(self, connection: Connection, *, only: Sequence[Table] = ()) -> None:
        """Take the triggers away: from now on nobody adopts or retires."""
        triggers = self.triggers(connection.dialect, schemas=_schemas(connection))
        _execute(connection, _drop(triggers, self.journaled_tables, only=only))

    def missing_triggers(self, connection: Connection) -> list[str]:
        """Return the tables on which not all triggers stand, are enabled and up to date.

        Partitions are named too (PostgreSQL). `create_triggers` helps. Tables that the database
        does not have are left out.
        """
        triggers, tables = self._present(connection)
        return triggers.missing(connection, tables) if tables else []

    def _present(self, connection: Connection) -> tuple[Triggers, list[JournaledTable]]:
        """Return what writes SQL for a connection, and the tables that are there."""
        schemas = _schemas(connection)
        place = Place(connection.dialect, self.table, schemas)
        tables = present(connection, self.journaled_tables, place)
        return self.triggers(connection.dialect, schemas=schemas), tables

    def _after_create(
        self, _target: MetaData, connection: Connection, tables: Sequence[Table] = (), **_: Any
    ) -> None:
        created = [table for table in tables if table not in {self.table, self.owners}]
        if self.table in tables:
            self.create_triggers(connection)
        elif created:
            self.create_triggers(connection, only=created)

    def _before_drop(
        self, _target: MetaData, connection: Connection, tables: Sequence[Table] = (), **_: Any
    ) -> None:
        if not tables:
            return
        self.drop_triggers(connection, only=tables)
        if self.table in tables:
            triggers = self.triggers(connection.dialect, schemas=_schemas(connection))
            _execute(connection, triggers.drop_functions())


def _journal_table(metadata: MetaData, name: str, schema: str | None) -> Table:
    uri = Text().with_variant(Text(collation="C"), "postgresql")  # compared as bytes
    states = ", ".join(f"'{state}'" for state in STATES)
    return Table(
        name,
        metadata,
        Column("uri", uri, primary_key=True),
        Column("state", Text, nullable=False),
        Column("since", DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column("not_before", DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column("owner", Text),
        Column("claim", Text),
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        Column("last_error", Text),
        Column("upload_id", Text),
        CheckConstraint(f"state IN ({states})", name=f"{name}_state"),
        Index(f"{name}_due", "state", "not_before"),
        schema=schema,
    )


def _schemas(connection: Connection) -> Mapping[str | None, str | None]:
    return connection.get_execution_options().get("schema_translate_map") or {}


def _drop(
    triggers: Triggers, tables: Iterable[JournaledTable], *, only: Sequence[Table] = ()
) -> list[str]:
    chosen = (each for each in tables if not only or each.table in only)
    return [statement for each in chosen for statement in triggers.drop(each)]


def _execute(connection: Connection, statements: Iterable[str]) -> None:
    for statement in statements:  # some drivers would take % for a parameter
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
