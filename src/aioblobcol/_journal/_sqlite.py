"""The triggers on SQLite: at row level, on the difference between the cells of one row.

A swap between two rows is refused, for each row is looked at by itself. ``INSERT OR REPLACE`` runs
the DELETE trigger of the row that goes only with ``PRAGMA recursive_triggers=on``.

Invariants: as on PostgreSQL. The messages cannot name the URI (SQLite takes literals only).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._columns import JournaledTable, UriColumn, literal, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from sqlalchemy import Table

OWN_ID = "*/id=" + 32 * "[0-9a-f]"
NOW = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
"""As SQLAlchemy's DateTime stores it: microseconds, UTC."""
EVENTS = ("insert", "update", "delete")


class SqliteTriggers:
    """The SQL for one journal, printed or executed by whoever asks; everything may be repeated."""

    def __init__(
        self,
        journal: Table,
        roots: Sequence[str],
        *,
        retention: timedelta,
        strict: bool,
        dialect: Any,
    ) -> None:
        self._roots = sorted(set(roots))
        self._strict = strict
        self._dialect = dialect
        self._journal = journal
        self._entries = quoted(dialect, journal.name)  # of the trigger's own database, as it must
        seconds = f"+{retention.total_seconds():f} seconds"
        self._due = f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {literal(seconds)})"

    def create_functions(self) -> list[str]:
        """SQLite has no stored functions."""
        return []

    def drop_functions(self) -> list[str]:
        """SQLite has no stored functions."""
        return []

    def create(self, journaled: JournaledTable) -> list[str]:
        """Return the statements that install the triggers of one table."""
        table = quoted(self._dialect, journaled.table.name, journaled.table.schema)
        bodies = {
            "insert": self._adopt(journaled, before=()),
            "update": self._adopt(journaled, before=journaled.columns)
            + self._retire(journaled, after=journaled.columns),
            "delete": self._retire(journaled, after=()),
        }
        statements = [self._refuse_shared(journaled, table)]
        statements += self.drop(journaled)
        for event, body in bodies.items():
            name = self._trigger_name(journaled, event)
            lines = "".join(f"    {line};\n" for line in body)
            statements.append(
                f"CREATE TRIGGER {name} AFTER {event.upper()} ON {table} FOR EACH ROW BEGIN\n"
                f"{lines}END"
            )
        return [statement for statement in statements if statement]

    def drop(self, journaled: JournaledTable) -> list[str]:
        """Return the statements that take the triggers away."""
        return [
            f"DROP TRIGGER IF EXISTS {self._trigger_name(journaled, event)}" for event in EVENTS
        ]

    def _trigger_name(self, journaled: JournaledTable, event: str) -> str:
        name = journaled.identifier(f"journal_{event}")
        return quoted(self._dialect, name, journaled.table.schema)

    def _uri(self, row: str, column: UriColumn) -> str:
        name = f"{row}{quoted(self._dialect, column.name)}"
        return f"json_extract({name}, '$.uri')" if column.is_json else name

    def _is_own(self, uri: str) -> str:
        under = " OR ".join(
            f"substr({uri}, 1, {len(root)}) = {literal(root)}" for root in self._roots
        )
        return f"({under}) AND {uri} GLOB {literal(OWN_ID)}"

    def _is_elsewhere(self, uri: str, row: str, columns: Sequence[UriColumn]) -> str:
        """Tell whether a row names *uri* in one of its cells."""
        return " OR ".join(f"coalesce({self._uri(row, each)} = {uri}, 0)" for each in columns)

    def _refuse_shared(self, journaled: JournaledTable, table: str) -> str:
        """Fail while two cells name one object: SQLite raises in triggers only, so by a NOT NULL.

        The statement inserts nothing unless there is one.
        """
        cells = " UNION ALL ".join(
            f"SELECT {self._uri('', column)} AS uri FROM {table}" for column in journaled.columns
        )
        entries = quoted(self._dialect, self._journal.name, self._journal.schema)
        return (
            f"INSERT INTO {entries} (uri, state) "
            "SELECT 'several cells name one object: ' || uri, NULL "
            f"FROM ({cells}) WHERE {self._is_own('uri')} GROUP BY uri HAVING count(*) > 1 LIMIT 1"
        )

    def _adopt(self, journaled: JournaledTable, *, before: Sequence[UriColumn]) -> list[str]:
        table = quoted(self._dialect, journaled.table.name)  # of the trigger's own database
        lines = []
        for column in journaled.columns:
            uri = self._uri("NEW.", column)
            is_new = self._is_own(uri)
            if before:
                is_new += f" AND NOT ({self._is_elsewhere(uri, 'OLD.', before)})"
            entry = f"SELECT 1 FROM {self._entries} WHERE uri = {uri}"
            if self._strict:
                named = self._is_elsewhere(uri, "", journaled.columns)
                lines.append(
                    f"SELECT CASE WHEN EXISTS ({entry} AND state <> 'deleting') THEN NULL "
                    f"WHEN EXISTS ({entry}) THEN "
                    "RAISE(ABORT, 'aioblobcol: the object is being deleted') "
                    f"WHEN (SELECT count(*) FROM {table} WHERE {named}) > 1 THEN "
                    "RAISE(ABORT, 'aioblobcol: the object is live in another row') "
                    "ELSE RAISE(ABORT, 'aioblobcol: the object was never staged, or is live in "
                    f"another cell') END WHERE {is_new}"
                )
            lines.append(
                f"DELETE FROM {self._entries} WHERE uri = {uri} AND state <> 'deleting' "
                f"AND {is_new}"
            )
            if before:  # one object in two cells of the row that it was in already
                times = self._is_elsewhere(uri, "NEW.", journaled.columns).replace(" OR ", " + ")
                was = self._is_elsewhere(uri, "OLD.", before).replace(" OR ", " + ")
                lines.append(
                    "SELECT RAISE(ABORT, 'aioblobcol: the object would be in several cells') "
                    f"WHERE {self._is_own(uri)} AND ({was}) > 0 AND ({times}) > ({was})"
                )
        return lines

    def _retire(self, journaled: JournaledTable, *, after: Sequence[UriColumn]) -> list[str]:
        names = (journaled.table.schema, journaled.table.name)
        table = literal(".".join(name for name in names if name))
        key = ", ".join(
            f"CAST(OLD.{quoted(self._dialect, name)} AS TEXT)" for name in journaled.key_names
        )
        lines = []
        for column in journaled.columns:
            uri = self._uri("OLD.", column)
            is_gone = self._is_own(uri)
            if after:
                is_gone += f" AND NOT ({self._is_elsewhere(uri, 'NEW.', after)})"
            owner = (
                f"json_object('table', {table}, 'column', {literal(column.name)}, "
                f"'key', json_array({key}))"
            )
            lines.append(
                f"INSERT INTO {self._entries} (uri, state, since, not_before, owner) "
                f"SELECT {uri}, 'retired', {NOW}, {self._due}, {owner} WHERE {is_gone} "
                f"AND NOT EXISTS (SELECT 1 FROM {self._entries} WHERE uri = {uri})"
            )
        return lines
