"""Statements: what a text of SQL does, what its row count proves, which URIs it names."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioblobcol._statements import (
    Evidence,
    Kind,
    Statement,
    copied_columns,
    count_sets,
    empties_a_column,
    evidence_of,
    named_uris,
    placements,
    read_statement,
    sets_on_conflict,
)

URI, OTHER_URI = "s3://bucket/prefix/a/id=1", "s3://bucket/prefix/b/id=2"
WATCHED = frozenset({URI, OTHER_URI})


def read(text: str, dialect: str = "postgresql") -> Statement:
    return read_statement(text, dialect=dialect)


class TestKind:
    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("INSERT INTO t VALUES (1)", Kind.INSERT),
            ("  insert\ninto t values (1)", Kind.INSERT),
            ("-- COMMIT\nINSERT INTO t VALUES (1)", Kind.INSERT),
            ("/* COMMIT; */ /* and */ UPDATE t SET a = 1", Kind.UPDATE),
            ("/* outer /* inner */ COMMIT */ UPDATE t SET a = 1", Kind.UPDATE),
            ("UPDATE t SET a = 1;", Kind.UPDATE),
            ("UPDATE t SET a = 1 ; -- done", Kind.UPDATE),
            ("DELETE FROM t", Kind.DELETE),
            ("MERGE INTO t USING s ON true", Kind.UPDATE),
            ("REPLACE INTO t VALUES (1)", Kind.UPDATE),
            ("SELECT 1", Kind.OTHER),
            ("(SELECT 1) UNION (SELECT 2)", Kind.OTHER),
            ("SELECT * FROM t FOR UPDATE", Kind.OTHER),
            ("SELECT 'DELETE FROM t'", Kind.OTHER),
            ("EXPLAIN ANALYZE UPDATE t SET a = 1", Kind.OTHER),
            ("TRUNCATE t", Kind.OTHER),
            ("CREATE TABLE t (a int)", Kind.OTHER),
            ("COMMITTED", Kind.OTHER),
            ("-- nothing but a comment", Kind.OTHER),
            (" ; ", Kind.OTHER),
            ("", Kind.OTHER),
        ],
    )
    def test_the_first_word_decides(self, text: str, kind: Kind) -> None:
        """A statement is what its first word says, comments and parentheses apart."""
        assert read(text).kind is kind

    @pytest.mark.parametrize(
        "text",
        [
            "COMMIT",
            "commit;",
            "COMMIT AND CHAIN",
            "COMMIT PREPARED 'x'",
            "END",
            "ABORT",
            "ROLLBACK",
            "ROLLBACK WORK",
            "ROLLBACK AND CHAIN",
            "ROLLBACK PREPARED 'x'",
            "PREPARE TRANSACTION 'x'",
            "/* a */ COMMIT",
            "/* a /* nested */ b */ COMMIT",
            "-- a\nCOMMIT",
            "--\nCOMMIT",
            ";COMMIT",
        ],
    )
    def test_what_ends_a_transaction_is_seen(self, text: str) -> None:
        """A plain statement that ends the transaction is recognised in every spelling."""
        assert read(text).kind is Kind.CONTROL

    @pytest.mark.parametrize(
        "text",
        [
            "ALTER TABLE t ADD a int",
            "create table t (a int)",
            "DROP TABLE t",
            "TRUNCATE t",
            "RENAME TABLE a TO b",
            "LOCK TABLES t WRITE",
            "START TRANSACTION",
            "BEGIN",
            "GRANT ALL ON t TO u",
            "SET autocommit = 1",
            "SET @@SESSION.autocommit = 1",
            "XA END 'x'",
            "# a comment\nCOMMIT",
            "/*!40000 COMMIT */",
        ],
    )
    @pytest.mark.parametrize("dialect", ["mysql", "mariadb"])
    def test_implicit_commits_of_mysql(self, text: str, dialect: str) -> None:
        """What commits implicitly on MySQL and MariaDB ends the transaction there."""
        assert read(text, dialect).kind is Kind.CONTROL

    @pytest.mark.parametrize("dialect", ["postgresql", "sqlite"])
    @pytest.mark.parametrize("text", ["CREATE TABLE t (a int)", "DROP TABLE t", "BEGIN"])
    def test_ddl_is_transactional_elsewhere(self, text: str, dialect: str) -> None:
        """DDL on PostgreSQL and SQLite belongs to the transaction."""
        assert read(text, dialect).kind is Kind.OTHER


class TestSeveralStatements:
    @pytest.mark.parametrize(
        "text",
        [
            "UPDATE t SET a = 1; COMMIT",
            "UPDATE t SET a = 1;COMMIT;",
            "SELECT 1; /* x */ COMMIT",
            "SELECT 1; -- x\nROLLBACK",
            "SELECT ';'; END; SELECT 2",
            "SELECT 1; ROLLBACK TO a",
            "SELECT 1; SAVEPOINT a",
            "SAVEPOINT a; UPDATE t SET a = 1",
            "RELEASE a; SAVEPOINT a",
            "CREATE FUNCTION f() RETURNS int AS $$ BEGIN; END $$ LANGUAGE plpgsql; COMMIT",
            "SELECT 'a\\'; COMMIT; --'",  # a backslash is no escape in standard SQL
            "SELECT 'unterminated; COMMIT",
        ],
    )
    def test_control_among_them_cannot_be_followed(self, text: str) -> None:
        """A text that also ends a transaction or moves savepoints is taken for a control."""
        assert read(text).kind is Kind.CONTROL

    @pytest.mark.parametrize(
        ("text", "dialect"),
        [
            ("SELECT '; COMMIT'", "postgresql"),
            ("SELECT '; it''s; COMMIT'", "postgresql"),
            ("SELECT E'it\\'s; COMMIT'", "postgresql"),
            ("SELECT 'it\\'s; COMMIT'", "mysql"),
            ('SELECT "; COMMIT"', "mysql"),
            ("SELECT `; COMMIT`", "mysql"),
            ('SELECT 1 AS "; COMMIT"', "postgresql"),
            ("SELECT [; COMMIT]", "sqlite"),
            ("SELECT 1 /* ; COMMIT */", "sqlite"),
            ("SELECT 1 -- ; COMMIT", "sqlite"),
            ("DO $$ BEGIN UPDATE t SET a = 1; END $$", "postgresql"),
            ("DO $do$ BEGIN PERFORM '$$'; END; $do$;", "postgresql"),
            ("CREATE TRIGGER x AFTER INSERT ON t BEGIN DELETE FROM u; END", "sqlite"),
            ("CREATE TEMP TRIGGER x DELETE ON t BEGIN SELECT 1; SELECT 2; END;", "sqlite"),
        ],
    )
    def test_words_in_literals_and_bodies_are_no_control(self, text: str, dialect: str) -> None:
        """What stands in a literal, a comment, a quoted name or a body does not count."""
        assert read(text, dialect).kind is Kind.OTHER

    def test_one_with_a_semicolon_is_one(self) -> None:
        """A semicolon at the end, or in a literal, makes no second statement."""
        assert read("INSERT INTO t VALUES (';');  ") == Statement(Kind.INSERT)

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("INSERT INTO t VALUES (1); UPDATE u SET a = 1", Kind.UPDATE),
            ("SELECT 1; UPDATE u SET a = 1", Kind.UPDATE),
            ("DELETE FROM t; DELETE FROM u", Kind.DELETE),
        ],
    )
    def test_nobody_knows_whose_rows_were_counted(self, text: str, kind: Kind) -> None:
        """Several statements in one text prove nothing by their one row count."""
        statement = read(text)

        assert statement.kind is kind
        assert evidence_of(statement, rows=1, sets=1) is Evidence.UNCLEAR


class TestSavepoints:
    @pytest.mark.parametrize(
        ("text", "kind", "name"),
        [
            ("SAVEPOINT sa_savepoint_1", Kind.SAVEPOINT, "sa_savepoint_1"),
            ("savepoint A;", Kind.SAVEPOINT, "a"),
            ("SAVEPOINT/**/a", Kind.SAVEPOINT, "a"),
            ('SAVEPOINT "with space"', Kind.SAVEPOINT, "with space"),
            ('SAVEPOINT "say ""hi"""', Kind.SAVEPOINT, 'say "hi"'),
            ("RELEASE a", Kind.RELEASE, "a"),
            ("RELEASE SAVEPOINT a", Kind.RELEASE, "a"),
            ("ROLLBACK TO a", Kind.ROLLBACK_TO, "a"),
            ("ROLLBACK TO SAVEPOINT a", Kind.ROLLBACK_TO, "a"),
            ("ROLLBACK WORK TO SAVEPOINT a", Kind.ROLLBACK_TO, "a"),
            ("ROLLBACK TRANSACTION TO a", Kind.ROLLBACK_TO, "a"),
            ("ROLLBACK -- all of it\n TO SAVEPOINT a", Kind.ROLLBACK_TO, "a"),
            (";SAVEPOINT a", Kind.SAVEPOINT, "a"),
        ],
    )
    def test_they_are_read_with_their_name(self, text: str, kind: Kind, name: str) -> None:
        """Setting, releasing and rolling back to a savepoint is read, quoted or not."""
        assert read(text) == Statement(kind, name=name)

    @pytest.mark.parametrize(
        ("dialect", "quoted", "same"),
        [
            ("postgresql", '"Point"', False),
            ("postgresql", '"point"', True),
            ("sqlite", '"Point"', True),
            ("sqlite", "[Point]", True),
            ("mysql", "`Point`", True),
        ],
    )
    def test_only_postgresql_tells_them_apart_by_case(
        self, dialect: str, quoted: str, same: bool
    ) -> None:
        """A quoted name keeps its case on PostgreSQL; elsewhere case does not matter."""
        is_same = read(f"SAVEPOINT {quoted}", dialect).name == read("SAVEPOINT Point", dialect).name

        assert is_same is same


class TestCommonTableExpressions:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("WITH a AS (SELECT 1) SELECT * FROM a", Statement(Kind.OTHER)),
            ("WITH a AS (SELECT 'DELETE') SELECT * FROM a", Statement(Kind.OTHER)),
            ("WITH a AS (SELECT 1 FOR UPDATE) UPDATE t SET a = 1", Statement(Kind.UPDATE)),
            ("WITH a AS (SELECT 1 FOR UPDATE) DELETE FROM t", Statement(Kind.DELETE)),
            ("WITH delete AS (SELECT 1) SELECT * FROM delete", Statement(Kind.OTHER)),
            (
                "WITH a(x) AS (SELECT f(1)) INSERT INTO t SELECT x FROM a",
                Statement(Kind.INSERT, may_skip_rows=True),
            ),
        ],
    )
    def test_the_outer_statement_decides(self, text: str, expected: Statement) -> None:
        """A WITH that only reads is its outer statement."""
        assert read(text) == expected

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("WITH u AS (UPDATE t SET a = 1 RETURNING 1) SELECT count(*) FROM u", Kind.UPDATE),
            ("WITH d AS ( DELETE FROM t RETURNING *) SELECT count(*) FROM d", Kind.DELETE),
            ("WITH i AS (INSERT INTO t VALUES (1) RETURNING 1) SELECT 1", Kind.INSERT),
            ("WITH d AS (DELETE FROM t RETURNING *) INSERT INTO u SELECT * FROM d", Kind.UPDATE),
            ("WITH a AS (WITH b AS (DELETE FROM t) SELECT 1) SELECT 1", Kind.UPDATE),
        ],
    )
    def test_a_write_inside_proves_nothing(self, text: str, kind: Kind) -> None:
        """The row count of a WITH that writes is the outer statement's, and proves nothing."""
        statement = read(text)

        assert statement.kind is kind
        assert evidence_of(statement, rows=1, sets=1) is Evidence.UNCLEAR


class TestEvidence:
    @pytest.mark.parametrize(
        ("text", "rows", "sets", "expected"),
        [
            ("UPDATE t SET a = 1", 1, 1, Evidence.CHANGED),
            ("UPDATE t SET a = 1", 3, 1, Evidence.SEVERAL),
            ("UPDATE t SET a = 1", 0, 1, Evidence.NOTHING),
            ("UPDATE t SET a = 1", -1, 1, Evidence.UNCLEAR),
            ("UPDATE t SET a = 1", 2, 2, Evidence.CHANGED),
            ("UPDATE t SET a = 1", 1, 2, Evidence.UNCLEAR),
            ("UPDATE t SET a = 1", 3, 2, Evidence.UNCLEAR),
            ("DELETE FROM t", 1, 1, Evidence.CHANGED),
            ("DELETE FROM t", 0, 1, Evidence.NOTHING),
            ("DELETE FROM t", -1, 2, Evidence.UNCLEAR),
            ("INSERT INTO t VALUES (1)", 1, 1, Evidence.CHANGED),
            ("INSERT INTO t VALUES (1)", -1, 7, Evidence.CHANGED),
            ("INSERT INTO t VALUES (1), (2)", 2, 1, Evidence.CHANGED),
            ("INSERT INTO t VALUES (1)", 0, 1, Evidence.NOTHING),
            ("INSERT INTO t VALUES (1)", 1, 2, Evidence.UNCLEAR),
            ("INSERT INTO t VALUES (1) ON CONFLICT DO NOTHING", 1, 1, Evidence.CHANGED),
            ("INSERT INTO t VALUES (1) ON CONFLICT DO NOTHING", 0, 1, Evidence.NOTHING),
            ("INSERT INTO t VALUES (1) ON CONFLICT DO NOTHING", -1, 1, Evidence.UNCLEAR),
            ("INSERT INTO t VALUES (1) ON CONFLICT DO NOTHING", 2, 2, Evidence.CHANGED),
            ("INSERT INTO t VALUES (1) ON CONFLICT DO NOTHING", 1, 2, Evidence.UNCLEAR),
            ("INSERT INTO t VALUES (1), (2) ON CONFLICT DO NOTHING", 1, 1, Evidence.UNCLEAR),
            ("INSERT OR IGNORE INTO t VALUES (1)", -1, 1, Evidence.UNCLEAR),
            ("INSERT LOW_PRIORITY IGNORE INTO t VALUES (1)", -1, 1, Evidence.UNCLEAR),
            ("INSERT INTO t SELECT a FROM u", -1, 1, Evidence.UNCLEAR),
            ("INSERT INTO t SELECT a FROM u", 1, 1, Evidence.CHANGED),
            ("INSERT INTO t SELECT a FROM u", 5, 1, Evidence.UNCLEAR),
        ],
    )
    def test_the_row_count_proves(
        self, text: str, rows: int, sets: int, expected: Evidence
    ) -> None:
        """A write is proved by an exact count, an INSERT that skips nothing by its answer."""
        assert evidence_of(read(text), rows=rows, sets=sets) is expected


class TestNamedUris:
    @pytest.mark.parametrize(
        ("parameters", "text", "expected"),
        [
            ({"html": URI}, "INSERT", {URI}),
            ((1, URI, None, b"x"), "INSERT", {URI}),
            ([{"html": URI}, {"html": OTHER_URI}], "INSERT", {URI, OTHER_URI}),
            ([(1, URI), (2, "s3://bucket/else")], "INSERT", {URI}),
            ({"files": [URI, OTHER_URI]}, "INSERT", {URI, OTHER_URI}),
            ({"doc": json.dumps({"a": [URI], "n": 1})}, "INSERT", {URI}),
            ({"doc": {"nested": {"deep": (URI,)}}}, "INSERT", {URI}),
            ({}, f"UPDATE t SET html = '{URI}'", {URI}),  # noqa: S608 - never sent
            (None, f"SELECT '{OTHER_URI}' AS one, '{URI}' AS other", {URI, OTHER_URI}),
            ({"html": "s3://bucket/else"}, "INSERT", set()),
            ({"html": 5, "b": b"s3://bucket/prefix/a/id=1"}, "INSERT", set()),
            (None, "SELECT 1", set()),
        ],
    )
    def test_they_are_found_wherever_they_stand(
        self, parameters: object, text: str, expected: set[str]
    ) -> None:
        """A watched URI is found in a parameter of any shape, in JSON, and in the text."""
        assert named_uris(parameters, text, WATCHED) == expected

    @pytest.mark.parametrize(
        ("parameters", "executemany", "expected"),
        [
            ([{"a": 1}, {"a": 2}], True, 2),
            ([(1,), (2,), (3,)], True, 3),
            (({"a": 1},), True, 1),
            ({"a": 1}, False, 1),
            ((1, "text", "text"), False, 1),
            ((1, "text", "text"), True, 1),  # one batch of insertmanyvalues
            (("text", "text"), True, 1),
            ((), True, 1),
            ([], True, 1),
            (None, False, 1),
        ],
    )
    def test_sets_of_parameters_are_counted(
        self, parameters: object, executemany: bool, expected: int
    ) -> None:
        """An executemany has as many sets as parameters, anything else has one."""
        assert count_sets(parameters, executemany=executemany) == expected

    def test_values_that_certainly_go_into_columns(self) -> None:
        """Parameters named after columns are values; those of the WHERE clause are not."""
        compiled = [{"html": URI, "html_m1": OTHER_URI, "html_1": "s3://b/guard", "id": 5}]
        columns = {"html": "html_uri", "id": "id"}

        assert placements(compiled, columns) == {
            URI: {"html", "html_uri"},
            OTHER_URI: {"html", "html_uri"},
        }

    def test_text_has_the_names_of_its_author(self) -> None:
        """The parameters of text are known by their names alone."""
        assert placements([{"html": URI, "n": 1, "title": "no URI"}], None) == {URI: {"html"}}

    @pytest.mark.parametrize(
        ("text", "sets"),
        [
            ("INSERT INTO t (html) VALUES (?) ON CONFLICT DO NOTHING", True),
            ("INSERT .. ON CONFLICT (id) DO UPDATE SET html = excluded.html", True),
            ('INSERT .. ON CONFLICT (id) DO UPDATE SET n = t.n + 1, "html" = ?', True),
            ("INSERT .. ON DUPLICATE KEY UPDATE `html` = VALUES(`html`)", True),
            ("INSERT .. ON CONFLICT (id) DO UPDATE SET n = t.n + 1", False),
            ("INSERT .. (html) .. ON CONFLICT (id) DO UPDATE SET n = excluded.n", False),
        ],
    )
    def test_an_upsert_may_leave_the_column_alone(self, text: str, sets: bool) -> None:
        """What an upsert sets in a row that is there already stands in its own clause."""
        assert sets_on_conflict(text, {"html", "html_uri"}) is sets

    @pytest.mark.parametrize(
        ("text", "copied"),
        [
            ("INSERT INTO h SELECT html FROM t", {"html"}),
            ("INSERT INTO h SELECT * FROM t", {"html", "image"}),
            ("INSERT INTO h (a) SELECT p0 FROM (VALUES ($1)) AS v(p0) RETURNING t.html", set()),
            ("INSERT INTO t (html) VALUES (?)", set()),
            ("UPDATE t SET image = t.html WHERE id = 1", {"html"}),
            ("UPDATE t SET html = ?, image = ? WHERE t.html = ?", set()),
            ("UPDATE t SET html = ? WHERE t.html = ? RETURNING html", set()),
            ("UPDATE t SET html = ? RETURNING image", set()),
            ('UPDATE t SET image = "html"', {"html"}),
            ('UPDATE t SET image = s."html" FROM s', {"html"}),
            ('UPDATE t SET "html" = ?', set()),
            ("UPDATE t SET image = HTML", {"html"}),
            ("UPDATE t SET image = (SELECT s.html FROM s WHERE s.id = 1)", {"html"}),
            ("UPDATE t SET (image, n) = (SELECT s.html, 1 FROM s)", {"html"}),
            ("INSERT INTO h TABLE t", {"html", "image"}),
            ('INSERT INTO h SELECT "html" FROM t', {"html"}),
            (
                "MERGE INTO h USING t ON h.id = t.id WHEN NOT MATCHED THEN INSERT VALUES (html)",
                {"html"},
            ),
            ("DELETE FROM t WHERE a = html", set()),
        ],
    )
    def test_sql_may_copy_a_column(self, text: str, copied: set[str]) -> None:
        """A column that SQL reads and writes elsewhere is found by its name."""
        assert copied_columns(read(text), ["html", "image"]) == copied

    @pytest.mark.parametrize(
        ("text", "parameters", "empties"),
        [
            ("UPDATE t SET html = NULL WHERE html = ?", [{}], True),
            ("UPDATE t SET html = ? WHERE html = ?", [{"html": None, "html_1": URI}], True),
            ("UPDATE t SET n = ? WHERE html = ?", [{"n": 1, "html_1": URI}], False),
        ],
    )
    def test_an_update_that_empties_a_column(
        self, text: str, parameters: list[dict[str, object]], empties: bool
    ) -> None:
        """An UPDATE with a condition on the old URI empties its column with NULL."""
        assert empties_a_column(text, parameters) is empties


class TestAnyText:
    @settings(max_examples=300, deadline=None)
    @given(
        text=st.text(alphabet="';\"`$/*-# \nE\\aCOMMIT()[]", max_size=60),
        dialect=st.sampled_from(["postgresql", "sqlite", "mysql"]),
    )
    def test_a_commit_is_never_hidden_by_what_precedes_it(self, text: str, dialect: str) -> None:
        """Whatever whole statements precede it, a COMMIT in the same text is seen."""
        literal = text.replace("\\", "").replace("'", "''")

        assert read(f"SELECT '{literal}'; COMMIT", dialect).kind is Kind.CONTROL

    @settings(max_examples=300, deadline=None)
    @given(
        text=st.text(alphabet="';\"`$/*-# \nE\\aCOMMIT()[]", max_size=60),
        dialect=st.sampled_from(["postgresql", "sqlite", "mysql", "oracle"]),
    )
    def test_no_text_is_too_strange(self, text: str, dialect: str) -> None:
        """Every text is classified, none raises."""
        assert isinstance(read(text, dialect).kind, Kind)
