"""The triggers on PostgreSQL: at statement level, on the difference between before and after.

One function per table; it looks at all columns with URIs of all rows that a statement has changed,
so that swaps, moves between partitions, upserts, MERGE, cascades and COPY come out right. The same
triggers stand on each leaf of a partitioned table, for a statement on a leaf fires no others.

Invariants: a URI that rows name afterwards and not before is *adopted*: its entry is there, is not
``deleting``, and is removed. One that rows named before and not afterwards is *retired*. The row
lock of the entry makes adoption and condemnation exclude each other. Foreign URIs are left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._columns import JournaledTable, UriColumn, literal, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from sqlalchemy import Table

OWN_ID = "/id=[0-9a-f]{32}$"
HINT = (
    "stage an object before a row names it (sessions of the journal and put_s3(journal=) do, other "
    "programs call aioblobcol_stage(uri)); at REPEATABLE READ, before the transaction begins"
)


class PostgresqlTriggers:
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
        self._journal = journal
        self._roots = sorted(set(roots))
        self._retention = f"interval '{retention.total_seconds():f} seconds'"
        self._strict = strict
        self._dialect = dialect
        self._entries = quoted(dialect, journal.name, journal.schema)

    def create_functions(self) -> list[str]:
        """Return the statement that installs ``aioblobcol_stage(uri)``, for other programs."""
        name = quoted(self._dialect, "aioblobcol_stage", self._journal.schema)
        return [
            _function(
                f"{name}(given text) RETURNS text",
                f"""
BEGIN
    IF given IS NULL OR NOT ({self._is_own("given")}) THEN
        RAISE EXCEPTION 'aioblobcol: % is not an object of this journal', coalesce(given, 'NULL')
            USING HINT = 'its key is under the store''s prefix and ends in /id=<32 hex digits>';
    END IF;
    INSERT INTO {self._entries} (uri, state) VALUES (given, 'staged');
    RETURN given;
END""",
            )
        ]

    def drop_functions(self) -> list[str]:
        """Return the statement that takes it away."""
        name = quoted(self._dialect, "aioblobcol_stage", self._journal.schema)
        return [f"DROP FUNCTION IF EXISTS {name}(text)"]

    def create(self, journaled: JournaledTable) -> list[str]:
        """Return the statements that install the triggers of one table."""
        name = self._function_name(journaled)
        return [
            self._refuse_shared(journaled),
            _function(f"{name}() RETURNS trigger", self._body(journaled)),
            _block(self._create_on_every_leaf(journaled, name)),
        ]

    def drop(self, journaled: JournaledTable) -> list[str]:
        """Return the statements that take the triggers away, on all partitions."""
        return [f"DROP FUNCTION IF EXISTS {self._function_name(journaled)}() CASCADE"]

    def _function_name(self, journaled: JournaledTable) -> str:
        return quoted(self._dialect, journaled.identifier("journal"), journaled.table.schema)

    def _table_name(self, journaled: JournaledTable) -> str:
        return quoted(self._dialect, journaled.table.name, journaled.table.schema)

    # --- which objects rows name

    def _is_own(self, uri: str) -> str:
        under = " OR ".join(f"starts_with({uri}, {literal(root)})" for root in self._roots)
        return f"({under}) AND {uri} ~ {literal(OWN_ID)}"

    def _cells(self, journaled: JournaledTable, source: str) -> str:
        """Select the own URIs of the rows of *source*, one for each cell, with its owner."""
        values = ", ".join(
            f"({literal(column.name)}, {self._uri(column)})" for column in journaled.columns
        )
        names = (journaled.table.schema, journaled.table.name)
        table = ".".join(name for name in names if name)
        key = ", ".join(f"r.{quoted(self._dialect, name)}::text" for name in journaled.key_names)
        return (
            f"SELECT cell.uri, json_build_object('table', {literal(table)}, 'column', cell.name, "
            f"'key', json_build_array({key}))::text AS owner "
            f"FROM {source} AS r, LATERAL (VALUES {values}) AS cell (name, uri) "
            f"WHERE cell.uri IS NOT NULL AND {self._is_own('cell.uri')}"
        )

    def _uri(self, column: UriColumn) -> str:
        name = f"r.{quoted(self._dialect, column.name)}"
        return f"{name} ->> 'uri'" if column.is_json else f'{name}::text COLLATE "C"'

    # --- the function of one table

    def _refuse_shared(self, journaled: JournaledTable) -> str:
        cells = self._cells(journaled, self._table_name(journaled))
        return _block(f"""
DECLARE
    shared text;
BEGIN
    SELECT string_agg(uri, ', ') INTO shared FROM (
        SELECT uri FROM ({cells}) AS cells
        GROUP BY uri HAVING count(*) > 1 ORDER BY uri LIMIT 10
    ) AS twice;
    IF shared IS NOT NULL THEN
        RAISE EXCEPTION 'aioblobcol: several cells name one object: %', shared
            USING HINT = 'give each cell an object of its own, then install the triggers';
    END IF;
END""")

    def _body(self, journaled: JournaledTable) -> str:
        before, after = self._cells(journaled, "before_rows"), self._cells(journaled, "after_rows")
        nothing = "SELECT NULL::text AS uri, NULL::text AS owner WHERE false"
        truncated = self._retire(self._cells(journaled, "aioblobcol_truncated"))
        return f"""
DECLARE
    refused text[];
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    IF TG_OP = 'INSERT' THEN
        {self._settle(nothing, after)};
    ELSIF TG_OP = 'UPDATE' THEN
        {self._settle(before, after)};
    ELSIF TG_OP = 'DELETE' THEN
        {self._retire(before)};
    ELSIF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'aioblobcol: TRUNCATE of % needs READ COMMITTED', TG_RELID::regclass
            USING HINT = 'rows that are not in this snapshot would leave their objects behind';
    ELSE
        EXECUTE replace(
            {literal(truncated)}, 'aioblobcol_truncated', TG_RELID::regclass::text
        );
    END IF;
    IF refused IS NOT NULL THEN
        RAISE {"EXCEPTION" if self._strict else "WARNING"} 'aioblobcol: %', (
            {self._reasons(journaled)}
        ) USING HINT = {literal(HINT)};
    END IF;
    RETURN NULL;
END"""

    def _settle(self, before: str, after: str) -> str:
        return f"""WITH moved AS (
            SELECT uri, max(owner) AS owner, sum(was) AS was, sum(now) AS now FROM (
                SELECT uri, owner, 1 AS was, 0 AS now FROM ({before}) AS b
                UNION ALL SELECT uri, NULL, 0, 1 FROM ({after}) AS a
            ) AS cells GROUP BY uri HAVING sum(was) <> sum(now)
        ), taken AS (
            DELETE FROM {self._entries} AS entry USING moved
            WHERE entry.uri = moved.uri AND was = 0 AND now = 1 AND entry.state <> 'deleting'
            RETURNING entry.uri
        ), gone AS (
            {self._retire("SELECT uri, owner FROM moved WHERE now = 0")}
        )
        SELECT (array_agg(uri ORDER BY uri))[1:10] INTO refused
            FROM moved LEFT JOIN taken USING (uri) WHERE now > was AND taken.uri IS NULL"""

    def _retire(self, cells: str) -> str:
        return (
            f"INSERT INTO {self._entries} (uri, state, since, not_before, owner) "
            "SELECT DISTINCT ON (uri) uri, 'retired', statement_timestamp(), "
            f"statement_timestamp() + {self._retention}, owner FROM ({cells}) AS let_go "
            "ON CONFLICT (uri) DO NOTHING"
        )

    def _reasons(self, journaled: JournaledTable) -> str:
        """Tell of each URI that was not adopted why not."""
        cells = self._cells(journaled, self._table_name(journaled))
        return f"""
            SELECT string_agg(each.uri || CASE
                WHEN entry.state = 'deleting' THEN ' is being deleted'
                WHEN (SELECT count(*) FROM ({cells}) AS c WHERE c.uri = each.uri) > 1
                    THEN ' is live in another cell'
                WHEN current_setting('transaction_isolation') = 'read committed'
                    THEN ' was never staged'
                ELSE ' was never staged, as far as this snapshot shows'
            END, '; ' ORDER BY each.uri)
            FROM unnest(refused) AS each (uri)
            LEFT JOIN {self._entries} AS entry ON entry.uri = each.uri"""

    def _create_on_every_leaf(self, journaled: JournaledTable, function: str) -> str:
        table = literal(self._table_name(journaled))
        before, after = "OLD TABLE AS before_rows", "NEW TABLE AS after_rows"
        when = {
            "insert": ("AFTER INSERT", f"REFERENCING {after}"),
            "update": ("AFTER UPDATE", f"REFERENCING {before} {after}"),
            "delete": ("AFTER DELETE", f"REFERENCING {before}"),
            "truncate": ("BEFORE TRUNCATE", ""),
        }
        lines = []
        for event, (moment, tables) in when.items():
            name = f"aioblobcol_journal_{event}"
            create = f"CREATE TRIGGER {name} {moment} ON "
            rest = f" {tables} FOR EACH STATEMENT EXECUTE FUNCTION {function}()"
            lines.append(
                f"EXECUTE 'DROP TRIGGER IF EXISTS {name} ON ' || each;\n"
                f"        EXECUTE '{create}' || each || {literal(rest)};"
            )
        *changes, truncate = lines
        newline = "\n        "
        return f"""
DECLARE
    each regclass;
    is_leaf boolean;
BEGIN
    FOR each, is_leaf IN
        SELECT {table}::regclass, relkind <> 'p' FROM pg_class WHERE oid = {table}::regclass
        UNION SELECT relid, isleaf FROM pg_partition_tree({table}::regclass)
    LOOP
        {newline.join(changes)}
        IF is_leaf THEN
        {truncate}
        END IF;
    END LOOP;
END"""


def _function(head: str, body: str) -> str:
    return (
        f"CREATE OR REPLACE FUNCTION {head} LANGUAGE plpgsql SET search_path FROM CURRENT "
        "SET enable_nestloop = off "  # the planner knows nothing of how many rows changed
        f"AS $aioblobcol${body}\n$aioblobcol$"
    )


def _block(body: str) -> str:
    return f"DO $aioblobcol${body}\n$aioblobcol$"
