"""The triggers on PostgreSQL: at statement level, on the difference between before and after.

One function per table; it looks at all columns with URIs of all rows that a statement has changed,
so that swaps, moves between partitions, upserts, MERGE, cascades and COPY come out right. The same
triggers stand on each partition and on each table that inherits, for a statement on one of those
fires no others.

Invariants: a URI that rows name afterwards and not before is *adopted*: its entry is there, is not
``deleting``, and is removed. One that rows named before and not afterwards is *retired*. The row
lock of the entry makes adoption and condemnation exclude each other. Foreign URIs are left alone.
Installing is one statement: writers are locked out, what they wrote is looked at, the triggers
stand.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING

from ._columns import LET_GO, JournaledTable, Place, UriColumn, literal, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from sqlalchemy.engine import Connection

NO_SEGMENT = r"/\.{0,2}/"
HINT = (
    "stage an object before a row names it (sessions of the journal and put_s3(journal=) do, other "
    "programs call {stage}(uri)); at REPEATABLE READ, before the transaction begins"
)
NESTED_HINT = (
    "a trigger that moves an object to another row runs for each statement, and its name comes "
    "after aioblobcol_journal in the alphabet"
)
EVENTS = {
    "insert": ("AFTER INSERT", "REFERENCING NEW TABLE AS after_rows"),
    "update": ("AFTER UPDATE", "REFERENCING OLD TABLE AS before_rows NEW TABLE AS after_rows"),
    "delete": ("AFTER DELETE", "REFERENCING OLD TABLE AS before_rows"),
    "truncate": ("BEFORE TRUNCATE", ""),
}
"""Moment and transition tables of each trigger; on partitioned tables the last one only looks."""


class PostgresqlTriggers:
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
        self._retention = f"interval '{retention.total_seconds():f} seconds'"
        self._strict = strict
        self._entries = place.name_of(place.journal)
        default = place.journal.name == "aioblobcol_journal"
        stage = "aioblobcol_stage" if default else shortened(f"{place.journal.name}_stage")
        self._stage = place.quoted(stage, place.journal)

    def create_functions(self) -> list[str]:
        """Return the statement that installs ``aioblobcol_stage(uri)``, for other programs."""
        body = f"""
BEGIN
    IF given IS NULL OR NOT ({self._is_own("given")}) THEN
        RAISE EXCEPTION 'aioblobcol: % is not an object of this journal', coalesce(given, 'NULL')
            USING HINT = 'its key is under the store''s prefix and ends in /id=<32 hex digits>';
    END IF;
    {DURABLE}
    INSERT INTO {self._entries} (uri, state) VALUES (given, 'staged');
    RETURN given;
END"""
        create = f"CREATE OR REPLACE FUNCTION {self._stage}(given text) RETURNS text {_as(body)}"
        return [
            _block(f"""
DECLARE
    path text := {PATH};
    path_before text := current_setting('search_path');
BEGIN
    {self._begin()}
    {_run(create, f"{self._stage}(text)")}
    PERFORM set_config('search_path', path_before, true);
END""")
        ]

    def drop_functions(self) -> list[str]:
        """Return the statement that takes it away."""
        return [f"DROP FUNCTION IF EXISTS {self._stage}(text)"]

    def create(self, tables: Sequence[JournaledTable], only: Sequence[JournaledTable]) -> list[str]:
        """Return the one statement that installs the triggers of the tables in *only*.

        Those that are not in the database, and views, are passed over.
        """
        if not only:
            return []
        given = ",\n            ".join(self._given(each, is_chosen=each in only) for each in tables)
        functions = "\n    ".join(
            f"IF to_regclass({self._table_literal(each)}) = ANY (chosen) THEN\n        "
            f"{_run(self._create_function(each), f'{self._function_name(each)}()')}\n    END IF;"
            for each in only
        )
        return [_block(self._install(given, functions))]

    def drop(self, journaled: JournaledTable) -> list[str]:
        """Return the statements that take the triggers away, on all partitions."""
        return [f"DROP FUNCTION IF EXISTS {self._function_name(journaled)}() CASCADE"]

    def missing(self, connection: Connection, tables: Sequence[JournaledTable]) -> list[str]:
        """Return the tables, with their partitions, on which a trigger is not as it should be."""
        given = ", ".join(self._given(each, is_chosen=True) for each in tables)
        stamps = ", ".join(
            f"({self._table_literal(each)}, {literal(self._stamp(each))})" for each in tables
        )
        names = ", ".join(literal(f"aioblobcol_journal_{event}") for event in EVENTS)
        found = connection.exec_driver_sql(
            f"""
WITH RECURSIVE given (name, is_chosen, function, head, tail) AS (VALUES {given}), {TREE}
SELECT tree.id::regclass::text FROM tree
JOIN (VALUES {stamps}) AS stamps (name, stamp) ON to_regclass(stamps.name) = tree.root
WHERE (
    SELECT count(*) FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
    WHERE tgrelid = tree.id AND tgname IN ({names}) AND tgenabled IN ('O', 'A')
    AND strpos(prosrc, stamp) > 0
) < {len(EVENTS)}
ORDER BY 1""",
            execution_options={"no_parameters": True},
        )
        return list(found.scalars())

    def _function_name(self, journaled: JournaledTable) -> str:
        return self._place.quoted(journaled.identifier("journal"), journaled.table)

    def _table_literal(self, journaled: JournaledTable) -> str:
        return literal(self._place.name_of(journaled.table))

    # --- which objects rows name

    def _is_own(self, uri: str) -> str:
        """Write what `is_owned` and `is_one_attempt` say."""
        under = " OR ".join(
            f"starts_with({uri}, {literal(root)}) "
            f"AND substr({uri}, {len(root)}) !~ {literal(NO_SEGMENT)}"
            for root in self._roots
        )
        return (
            f"({under}) AND left(right({uri}, 36), 4) = '/id=' "  # a third of a pattern's time
            f"AND translate(right({uri}, 32), '0123456789abcdef', '') = ''"
        )

    def _cells(self, journaled: JournaledTable, source: str, *, with_owner: bool = False) -> str:
        """Select the own URIs of the rows of *source*, one for each cell, with its owner."""
        values = ", ".join(
            f"({literal(column.name)}, {self._uri(column)})" for column in journaled.columns
        )
        owner = f", {self._owner(journaled)} AS owner" if with_owner else ""
        return (
            f"SELECT cell.uri{owner} FROM {source} AS r, LATERAL (VALUES {values}) "
            f"AS cell (name, uri) WHERE {self._is_own('cell.uri')}"
        )

    def _owner(self, journaled: JournaledTable) -> str:
        table = literal(self._place.plain_name_of(journaled.table))
        key = ", ".join(f"r.{self._place.quoted(name)}::text" for name in journaled.key_names)
        return (
            f"json_build_object('table', {table}, 'column', cell.name, "
            f"'key', json_build_array({key}))::text COLLATE \"C\""
        )

    def _uri(self, column: UriColumn) -> str:
        name = f"r.{self._place.quoted(column.name)}"
        uri = column.json_member(name, self._place.dialect) if column.is_json else f"{name}::text"
        return f'{uri} COLLATE "C"'

    # --- the function of one table

    def _create_function(self, journaled: JournaledTable) -> str:
        body = f"\n-- {self._stamp(journaled)}{self._body(journaled)}"
        return (
            f"CREATE OR REPLACE FUNCTION {self._function_name(journaled)}() RETURNS trigger "
            f"{SETTINGS} {_as(body)}"
        )

    def _stamp(self, journaled: JournaledTable) -> str:
        """Return what tells whether a function is up to date."""
        text = SETTINGS + self._body(journaled)
        return f"aioblobcol {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def _body(self, journaled: JournaledTable) -> str:
        before = self._cells(journaled, "before_rows", with_owner=True)
        after = self._cells(journaled, "after_rows")
        nothing = "SELECT NULL::text AS uri, NULL::text AS owner WHERE false"
        truncated = self._retire(self._cells(journaled, "\0", with_owner=True))
        head, tail = truncated.split("\0")
        return f"""
DECLARE
    refused text[];
    single text[];
    doomed text[];
BEGIN
    {DURABLE}
    IF TG_OP = 'INSERT' THEN
        {self._settle(nothing, after)};
    ELSIF TG_OP = 'UPDATE' THEN
        IF EXISTS ({self._changes(journaled)}) THEN
            {self._settle(before, after)};
        END IF;
    ELSIF TG_OP = 'DELETE' THEN
        {self._retire(before)};
    ELSIF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'aioblobcol: TRUNCATE of % needs READ COMMITTED', TG_RELID::regclass
            USING HINT = 'rows that are not in this snapshot would leave their objects behind';
    ELSIF EXISTS ({UNEQUIPPED}) THEN
        RAISE EXCEPTION 'aioblobcol: a partition of % has no triggers', TG_RELID::regclass
            USING HINT = 'its objects would stay for ever: install the triggers, then try again';
    ELSE
        EXECUTE {literal(head + "ONLY ")}
            || quote_ident(TG_TABLE_SCHEMA) || '.' || quote_ident(TG_TABLE_NAME)
            || {literal(tail)};
    END IF;
    IF refused IS NOT NULL THEN
        SELECT array_agg(uri ORDER BY uri) INTO doomed
            FROM {self._entries} WHERE uri = ANY (refused) AND state = 'deleting';
        WITH owed AS (
            UPDATE {self._entries} AS entry SET claim = NULL
            WHERE uri = ANY (single) AND {IS_OWED} RETURNING uri
        )
        SELECT array_agg(uri ORDER BY uri) INTO refused FROM (
            SELECT unnest(refused) AS uri EXCEPT SELECT uri FROM owed ORDER BY 1 LIMIT 10
        ) AS rest;
    END IF;
    IF refused IS NOT NULL THEN
        PERFORM set_config('row_security', 'on', true);
        {self._refuse(journaled)}
    END IF;
    RETURN NULL;
END"""

    def _refuse(self, journaled: JournaledTable) -> str:
        """Raise; or warn, where the journal is not strict and nothing is being deleted."""
        told = f"""'aioblobcol: %', (
            {self._reasons(journaled)}
        ) USING HINT = CASE WHEN pg_trigger_depth() > 1
            THEN {literal(NESTED_HINT)} ELSE {literal(HINT.format(stage=self._stage))} END"""
        if self._strict:
            return f"RAISE EXCEPTION {told};"
        return f"""IF doomed IS NULL THEN
            RAISE WARNING {told};
        ELSE
            refused := doomed[:10];
            RAISE EXCEPTION {told};
        END IF;"""

    def _changes(self, journaled: JournaledTable) -> str:
        """Select what tells whether an UPDATE was about URIs at all; most are not."""
        names = ", ".join(f"c{number}" for number, _ in enumerate(journaled.columns))
        values = ", ".join(
            f'r.{self._place.quoted(column.name)}::text COLLATE "C" AS c{number}'
            for number, column in enumerate(journaled.columns)
        )
        return (
            f"SELECT 1 FROM (SELECT {values}, 1 AS n FROM after_rows AS r UNION ALL "
            f"SELECT {values}, -1 FROM before_rows AS r) AS cells "
            f"GROUP BY {names} HAVING sum(n) <> 0"
        )

    def _settle(self, before: str, after: str) -> str:
        """Adopt and retire; the entries are asked for by an array, which no plan can make a join.

        A plan that was made while the journal was small would read all of it for each object.
        """
        # an object for several cells that is let pass must not be condemned meanwhile
        taken = "was = 0 AND now = 1" if self._strict else "now > was"
        return f"""WITH moved AS (
            SELECT uri, max(owner) AS owner, sum(was) AS was, sum(now) AS now FROM (
                SELECT uri, owner, 1 AS was, 0 AS now FROM ({before}) AS b
                UNION ALL SELECT uri, NULL, 0, 1 FROM ({after}) AS a
            ) AS cells GROUP BY uri HAVING sum(was) <> sum(now)
        ), taken AS (
            DELETE FROM {self._entries} AS entry
            WHERE entry.uri = ANY (ARRAY(SELECT uri FROM moved WHERE {taken}))
            AND entry.state <> 'deleting'
            AND NOT ({IS_OWED}) RETURNING entry.uri
        ), gone AS (
            {self._retire("SELECT uri, owner FROM moved WHERE now = 0")}
        )
        SELECT array_agg(uri), array_agg(uri) FILTER (WHERE is_single) INTO refused, single FROM (
            SELECT uri, was = 0 AND now = 1 AS is_single FROM moved WHERE now > was
            EXCEPT SELECT uri, true FROM taken
        ) AS rest"""

    def _retire(self, cells: str) -> str:
        """Write entries; one that is there is of a row whose own trigger has not run yet."""
        return (
            f"INSERT INTO {self._entries} AS entry (uri, state, since, not_before, owner) "
            "SELECT DISTINCT ON (uri) uri, 'retired', statement_timestamp(), "
            f"statement_timestamp() + {self._retention}, owner FROM ({cells}) AS let_go "
            "ON CONFLICT (uri) DO UPDATE SET state = excluded.state, since = excluded.since, "
            "not_before = excluded.not_before, owner = excluded.owner, "
            f"claim = {literal(LET_GO)} WHERE entry.state <> 'deleting'"
        )

    def _reasons(self, journaled: JournaledTable) -> str:
        """Tell of each URI that was not adopted why not."""
        cells = self._cells(journaled, self._place.name_of(journaled.table))
        return f"""
            SELECT string_agg(each.uri || CASE
                WHEN entry.state = 'deleting' THEN ' is being deleted'
                WHEN (SELECT count(*) FROM ({cells}) AS c WHERE c.uri = each.uri) > 1
                    THEN ' is live in another cell'
                WHEN current_setting('transaction_isolation') <> 'read committed'
                    THEN ' was never staged, as far as this snapshot shows'
                WHEN pg_trigger_depth() > 1 THEN ' was never staged, or is let go by the statement '
                    'whose trigger names it, which counts when that statement is done'
                ELSE ' was never staged, or is live in another table'
            END, '; ' ORDER BY each.uri)
            FROM unnest(refused) AS each (uri)
            LEFT JOIN {self._entries} AS entry ON entry.uri = each.uri"""

    # --- installing

    def _given(self, journaled: JournaledTable, *, is_chosen: bool) -> str:
        """Write what the installation knows of a table, as a row of VALUES."""
        head, tail = self._cells(journaled, "\0").split("\0")
        function = literal(f"{self._function_name(journaled)}()")
        return (
            f"({self._table_literal(journaled)}, {str(is_chosen).lower()}, {function}, "
            f"{literal(head)}, {literal(tail)})"
        )

    def _begin(self) -> str:
        """Fix what names mean, and have only one install at a time; writers do not wait yet."""
        return f"""PERFORM set_config('search_path', path, true);
    IF to_regclass({literal(self._entries)}) IS NULL THEN
        RAISE EXCEPTION 'aioblobcol: there is no table %', {literal(self._entries)}
            USING HINT = 'create the journal''s table first, or together with the others';
    END IF;
    LOCK TABLE {self._entries} IN SHARE UPDATE EXCLUSIVE MODE;"""

    def _install(self, given: str, functions: str) -> str:
        tree = f"WITH RECURSIVE given (name, is_chosen, function, head, tail) AS (VALUES\n{given}\n"
        tree += f"        ), {TREE}"
        return f"""
DECLARE
    path text := {PATH};
    path_before text := current_setting('search_path');
    security_before text := current_setting('row_security');
    chosen regclass[];
    others regclass[];
    each regclass;
    cells text;
    shared text;
    has_rows boolean;
    leaf record;
BEGIN
    {self._begin()}
    PERFORM set_config('row_security', 'off', true);
    {tree}
    SELECT array_agg(root ORDER BY name) FILTER (WHERE is_chosen),
        array_agg(root ORDER BY name) FILTER (WHERE NOT is_chosen)
        INTO chosen, others FROM tree WHERE id = root;
    FOREACH each IN ARRAY coalesce(chosen, '{{}}') LOOP
        EXECUTE 'LOCK TABLE ' || each || ' IN SHARE ROW EXCLUSIVE MODE';
    END LOOP;
    {tree}
    SELECT bool_or(pg_relation_size(id) > 0) INTO has_rows FROM tree WHERE is_chosen;
    IF has_rows THEN
        IF current_setting('transaction_isolation') <> 'read committed' THEN
            RAISE EXCEPTION 'aioblobcol: to install triggers needs READ COMMITTED'
                USING HINT = 'rows that are not in this snapshot would be overlooked';
        END IF;
        FOREACH each IN ARRAY coalesce(others, '{{}}') LOOP
            EXECUTE 'LOCK TABLE ' || each || ' IN SHARE ROW EXCLUSIVE MODE';
        END LOOP;
        {tree}
        SELECT string_agg(head || 'ONLY ' || id || tail, ' UNION ALL ')
            INTO cells FROM tree WHERE kind <> 'p';
        EXECUTE 'SELECT string_agg(uri, '', '') FROM (SELECT uri FROM (' || cells || ') AS cells '
            'GROUP BY uri HAVING count(*) > 1 ORDER BY uri LIMIT 10) AS twice' INTO shared;
        IF shared IS NOT NULL THEN
            RAISE EXCEPTION 'aioblobcol: several cells name one object: %', shared
                USING HINT = 'give each cell an object of its own, then install the triggers';
        END IF;
    END IF;
    {functions}
    FOR leaf IN {tree}
        SELECT id, function FROM tree WHERE is_chosen
    LOOP
        {CREATE_TRIGGERS}
    END LOOP;
    PERFORM set_config('search_path', path_before, true);
    PERFORM set_config('row_security', security_before, true);
END"""


TREE = """roots AS (
            SELECT to_regclass(given.name) AS id, given.* FROM given
        ), tree (id, kind, root, name, is_chosen, function, head, tail) AS (
            SELECT pg_class.oid::regclass, relkind, roots.* FROM roots
            JOIN pg_class ON pg_class.oid = roots.id WHERE relkind IN ('r', 'p')
            UNION ALL SELECT child.oid::regclass, child.relkind, tree.root, tree.name,
            tree.is_chosen, tree.function, tree.head, tree.tail
            FROM tree JOIN pg_inherits ON inhparent = tree.id
            JOIN pg_class AS child ON child.oid = inhrelid
            WHERE inhrelid NOT IN (SELECT id FROM roots WHERE id IS NOT NULL)
        )"""
"""Each table with its partitions and what inherits from it, unless that is one of the tables."""

PATH = """(
        SELECT coalesce(string_agg(quote_ident(name), ', ' ORDER BY number) || ', ', '')
        FROM unnest(current_schemas(false)) WITH ORDINALITY AS there (name, number)
        WHERE name NOT LIKE 'pg\\_temp\\_%'
    ) || 'pg_temp'"""
"""The schemas of now, whoever comes; last the temporary tables, which are first by default."""

SETTINGS = (
    "SET row_security = off "  # rather an error than rows that are not seen
    "SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off"
)
"""One look-up per object: plans are kept, and the planner knows neither statements nor journal."""

IS_OWED = (
    f"coalesce(entry.claim = {literal(LET_GO)} AND entry.since = statement_timestamp(), false)"
)
"""A row let the object go in this very statement, before its own trigger could adopt it."""


UNEQUIPPED = """
            SELECT 1 FROM pg_partition_tree(TG_RELID) WHERE isleaf AND NOT EXISTS (
                SELECT 1 FROM pg_trigger WHERE tgrelid = relid
                AND tgname = 'aioblobcol_journal_truncate' AND tgenabled IN ('O', 'A')
            )"""
"""A partition that was made after the installation, which TRUNCATE empties with all others."""

DURABLE = """IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;"""
"""A crash of the server must not undo what somebody has begun to act upon."""


def _create_triggers() -> str:
    lines = []
    for event, (moment, tables) in EVENTS.items():
        name = f"aioblobcol_journal_{event}"
        lines += [
            f"EXECUTE 'DROP TRIGGER IF EXISTS {name} ON ' || leaf.id;",
            f"EXECUTE 'CREATE TRIGGER {name} {moment} ON ' || leaf.id",
            f"    || ' {tables} FOR EACH STATEMENT EXECUTE FUNCTION ' || leaf.function;",
        ]
    return "\n        ".join(lines)


CREATE_TRIGGERS = _create_triggers()


def _run(create: str, signature: str) -> str:
    """Write how a function is created with the search path of the block around it."""
    alter = f"ALTER FUNCTION {signature} SET search_path = "
    return f"EXECUTE {_in_dollars(create)};\n    EXECUTE {literal(alter)} || path;"


def _as(body: str) -> str:
    return f"LANGUAGE plpgsql AS {_in_dollars(body + chr(10))}"


def _block(body: str) -> str:
    return f"DO {_in_dollars(body + chr(10))}"


def _in_dollars(text: str) -> str:
    """Quote a text that may hold quoted ones."""
    tags = (f"$aioblobcol{number or ''}$" for number in itertools.count())
    tag = next(tag for tag in tags if tag not in text)
    return f"{tag}{text}{tag}"
