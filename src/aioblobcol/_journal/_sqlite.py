"""The triggers on SQLite: at row level, on the difference between the cells of one row.

A swap between two rows is refused, for each row is looked at by itself. ``INSERT OR REPLACE`` runs
the DELETE trigger of the row that goes only with ``PRAGMA recursive_triggers=on``. Of several
triggers the newest runs first, so that an archive which is written by a newer one is refused.

Invariants: as on PostgreSQL. What a trigger raises cannot name the URI (it is a literal).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from ._columns import LET_GO, JournaledTable, Place, UriColumn, literal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from sqlalchemy.engine import Connection

OWN_ID = "*/id=" + 32 * "[0-9a-f]"
NO_SEGMENTS = ("//", "/./", "/../")
NOW = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
"""As SQLAlchemy's DateTime stores it: microseconds, UTC; the same all through one statement."""
EVENTS = ("insert", "update", "delete")
ABSENT = (
    "aioblobcol: the object was never staged, or is live in another cell, or is let go by the "
    "statement whose trigger names it"
)


class SqliteTriggers:
    """The SQL for one journal, printed or executed by whoever asks; everything may be repeated."""

    def __init__(
        self,
        place: Place,
        roots: Sequence[str],
        *,
        retention: timedelta,
        strict: bool,
    ) -> None:
        self._place = place
        self._roots = sorted(set(roots))
        self._strict = strict
        # a trigger names tables of its own database, and without it
        self._entries = place.quoted(place.journal.name)
        seconds = f"+{retention.total_seconds():f} seconds"
        self._due = f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {literal(seconds)})"

    def create_functions(self) -> list[str]:
        """SQLite has no stored functions."""
        return []

    def drop_functions(self) -> list[str]:
        """SQLite has no stored functions."""
        return []

    def create(self, tables: Sequence[JournaledTable], only: Sequence[JournaledTable]) -> list[str]:
        """Return the statements that install the triggers of the tables in *only*."""
        if not only:
            return []
        journal = self._place.name_of(self._place.journal)
        # takes the lock for writing, also where a driver begins with the first change only
        lock = f"DELETE FROM {journal} WHERE 0 /* in one transaction with all that follows */"
        statements = [lock]
        statements.append(self._refuse_shared(tables))
        for journaled in only:
            statements += self.drop(journaled)
            statements += [self._trigger(journaled, event) for event in EVENTS]
        return statements

    def drop(self, journaled: JournaledTable) -> list[str]:
        """Return the statements that take the triggers away."""
        return [
            f"DROP TRIGGER IF EXISTS {self._trigger_name(journaled, event)}" for event in EVENTS
        ]

    def missing(self, connection: Connection, tables: Sequence[JournaledTable]) -> list[str]:
        """Return the tables on which a trigger is not as it should be."""
        found = []
        for each in tables:
            master = self._place.quoted("sqlite_master", each.table)
            rows = connection.exec_driver_sql(
                f"SELECT sql FROM {master} WHERE type = 'trigger' AND tbl_name = ?",
                (each.table.name,),
            )
            texts = [text for (text,) in rows]
            stamps = [self._stamp(self._body(each, event)) for event in EVENTS]
            if not all(any(stamp in text for text in texts) for stamp in stamps):
                found.append(self._place.plain_name_of(each.table))
        return found

    def _trigger(self, journaled: JournaledTable, event: str) -> str:
        body = self._body(journaled, event)
        return (
            f"CREATE TRIGGER {self._trigger_name(journaled, event)} AFTER {event.upper()} "
            f"ON {self._place.quoted(journaled.table.name)} FOR EACH ROW "
            f"WHEN {self._is_about_uris(journaled, event)} BEGIN\n"
            f"    {self._stamp(body)}\n{body}END"
        )

    def _is_about_uris(self, journaled: JournaledTable, event: str) -> str:
        """Tell whether a statement changed a cell; most are about other columns."""
        names = [self._place.quoted(column.name) for column in journaled.columns]
        test = {
            "insert": "NEW.{0} IS NOT NULL",
            "update": "OLD.{0} IS NOT NEW.{0}",
            "delete": "OLD.{0} IS NOT NULL",
        }[event]
        return " OR ".join(test.replace("{0}", name) for name in names)

    def _body(self, journaled: JournaledTable, event: str) -> str:
        columns = journaled.columns
        lines = {
            "insert": lambda: self._adopt(journaled, before=()),
            "update": lambda: (
                self._adopt(journaled, before=columns) + self._retire(journaled, after=columns)
            ),
            "delete": lambda: self._retire(journaled, after=()),
        }[event]()
        return "".join(f"    {line};\n" for line in lines)

    def _stamp(self, body: str) -> str:
        """Return what tells whether a trigger is up to date."""
        return f"/* aioblobcol {hashlib.sha256(body.encode()).hexdigest()[:16]} */"

    def _trigger_name(self, journaled: JournaledTable, event: str) -> str:
        return self._place.quoted(journaled.identifier(f"journal_{event}"), journaled.table)

    def _uri(self, row: str, column: UriColumn) -> str:
        name = f"{row}{self._place.quoted(column.name)}"
        return column.json_member(name, self._place.dialect) if column.is_json else name

    def _is_own(self, uri: str) -> str:
        """Write what `is_owned` and `is_one_attempt` say."""
        under = " OR ".join(self._is_under(uri, root) for root in self._roots)
        return f"({under}) AND {uri} GLOB {literal(OWN_ID)} AND instr({uri}, char(0)) = 0"

    def _is_under(self, uri: str, root: str) -> str:
        key = f"substr({uri}, {len(root)})"
        conditions = [f"substr({uri}, 1, {len(root)}) = {literal(root)}"]
        conditions += [f"instr({key}, {literal(segment)}) = 0" for segment in NO_SEGMENTS]
        return f"({' AND '.join(conditions)})"

    def _times(self, uri: str, row: str, columns: Sequence[UriColumn]) -> str:
        """Count the cells of a row that name *uri*."""
        return " + ".join(f"coalesce(({self._uri(row, each)}) = {uri}, 0)" for each in columns)

    def _refuse_shared(self, tables: Sequence[JournaledTable]) -> str:
        """Fail while two cells name one object.

        SQLite raises in triggers only, and literals only; but it tells which path it cannot read.
        """
        cells = " UNION ALL ".join(
            f"SELECT {self._uri('', column)} AS uri FROM {self._place.name_of(each.table)}"
            for each in tables
            for column in each.columns
        )
        return (
            "SELECT json_extract('{}', 'several cells name one object: ' || uri) "
            f"FROM ({cells}) WHERE {self._is_own('uri')} GROUP BY uri HAVING count(*) > 1"
        )

    def _adopt(self, journaled: JournaledTable, *, before: Sequence[UriColumn]) -> list[str]:
        table = self._place.quoted(journaled.table.name)
        lines = []
        for column in journaled.columns:
            uri = f"({self._uri('NEW.', column)})"
            is_own = self._is_own(uri)
            was = self._times(uri, "OLD.", before) if before else "0"
            is_new = f"{is_own} AND ({was}) = 0"
            entry = f"SELECT 1 FROM {self._entries} WHERE uri = {uri}"
            lines.append(
                "SELECT RAISE(ABORT, 'aioblobcol: the object is being deleted') "
                f"WHERE {is_new} AND EXISTS ({entry} AND state = 'deleting')"
            )
            if self._strict:
                named = self._times(uri, "", journaled.columns)
                lines.append(
                    f"SELECT CASE WHEN EXISTS ({entry}) THEN NULL "
                    f"WHEN (SELECT count(*) FROM {table} WHERE ({named}) > 0) > 1 THEN "
                    "RAISE(ABORT, 'aioblobcol: the object is live in another row') "
                    f"ELSE RAISE(ABORT, {literal(ABSENT)}) END WHERE {is_new}"
                )
            is_owed = f"(claim IS {literal(LET_GO)} AND since = {NOW})"
            lines.append(
                f"DELETE FROM {self._entries} WHERE uri = {uri} AND state <> 'deleting' "
                f"AND NOT {is_owed} AND ({was}) = 0"
            )
            lines.append(
                f"UPDATE {self._entries} SET claim = NULL WHERE uri = {uri} AND {is_owed} "
                f"AND ({was}) = 0"
            )
            if before:  # one object in two cells of the row that it was in already
                times = self._times(uri, "NEW.", journaled.columns)
                lines.append(
                    "SELECT RAISE(ABORT, 'aioblobcol: the object would be in several cells') "
                    f"WHERE {is_own} AND ({was}) > 0 AND ({times}) > ({was})"
                )
        return lines

    def _retire(self, journaled: JournaledTable, *, after: Sequence[UriColumn]) -> list[str]:
        """Write entries; one that is there is of a row whose own trigger has not run yet."""
        table = literal(self._place.plain_name_of(journaled.table))
        key = ", ".join(
            f"CAST(OLD.{self._place.quoted(name)} AS TEXT)" for name in journaled.key_names
        )
        lines = []
        for column in journaled.columns:
            uri = f"({self._uri('OLD.', column)})"
            is_gone = f"({self._times(uri, 'NEW.', after) if after else '0'}) = 0"
            owner = (
                f"json_object('table', {table}, 'column', {literal(column.name)}, "
                f"'key', json_array({key}))"
            )
            lines.append(
                f"UPDATE {self._entries} SET state = 'retired', since = {NOW}, "
                f"not_before = {self._due}, owner = {owner}, claim = {literal(LET_GO)} "
                f"WHERE uri = {uri} AND state <> 'deleting' AND {is_gone}"
            )
            lines.append(
                f"INSERT INTO {self._entries} (uri, state, since, not_before, owner) "
                f"SELECT {uri}, 'retired', {NOW}, {self._due}, {owner} "
                f"WHERE {self._is_own(uri)} AND {is_gone} "
                f"AND NOT EXISTS (SELECT 1 FROM {self._entries} WHERE uri = {uri})"
            )
        return lines
