"""Alembic: migrations that hold plain types, run, and are not asked for twice."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata, render_python_code
from alembic.autogenerate.api import AutogenContext
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import ops
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from support.databases import Database

from aioblobcol import BlobType, Journal
from aioblobcol.alembic import render_item
from aioblobcol.testing import MemoryStore

OPTIONS = {"compare_type": True, "render_item": render_item}
ENV = """
from alembic import context

given = context.config.attributes
context.configure(
    connection=given["connection"], target_metadata=given["metadata"], **given["options"]
)
with context.begin_transaction():
    context.run_migrations()
"""
SCRIPT = """
from alembic import op
import sqlalchemy as sa
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
"""

MIGRATION = """
import sqlalchemy as sa
from alembic import context, op

from aioblobcol import Journal
from aioblobcol.alembic import create_journal_triggers, drop_journal_triggers

revision = {revision!r}
down_revision = {after!r}
journal = Journal.of(context.config.attributes["metadata"])


def upgrade() -> None:
    {upgrade}


def downgrade() -> None:
    {downgrade}
"""
FIRST = """
    op.create_table(
        "docs",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("html", sa.Text(), nullable=False),
        sa.Column("scan", sa.JSON().with_variant(sa.dialects.postgresql.JSONB(), "postgresql")),
    )
    op.create_table(journal.table.name, *(column._copy() for column in journal.table.columns))
    create_journal_triggers(op, journal)
"""
FIRST_BACK = """
    drop_journal_triggers(op, journal)
    op.drop_table("docs")
    op.drop_table(journal.table.name)
"""
SECOND = """
    drop_journal_triggers(op, journal)
    with op.batch_alter_table("docs", recreate=RECREATE) as batch:
        batch.add_column(sa.Column("thumb", sa.Text()))
    create_journal_triggers(op, journal)
"""
SECOND_BACK = """
    drop_journal_triggers(op, journal)
    with op.batch_alter_table("docs") as batch:
        batch.drop_column("thumb")
    create_journal_triggers(op, journal)
"""


def metadata(*more: sa.Column[Any]) -> sa.MetaData:
    made = sa.MetaData()
    sa.Table(
        "docs",
        made,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("html", BlobType(content_type="text/html", max_bytes=5), nullable=False),
        sa.Column("scan", BlobType(format="json", accept=("image/*",), store="archive")),
        *more,
    )
    return made


def drop_all(connection: Connection) -> None:
    found = sa.MetaData()
    found.reflect(connection)
    found.drop_all(connection)


@pytest_asyncio.fixture
async def empty(database: Database) -> AsyncIterator[Database]:
    """Give a database without any table, and leave it so."""
    async with database.engine.begin() as connection:
        await connection.run_sync(drop_all)
    yield database
    async with database.engine.begin() as connection:
        await connection.run_sync(drop_all)


class Project:
    """An Alembic project in a directory, for one database."""

    def __init__(self, path: Path, database: Database) -> None:
        path.mkdir()
        (path / "versions").mkdir()
        (path / "env.py").write_text(ENV)
        (path / "script.py.mako").write_text(SCRIPT)
        self._versions = path / "versions"
        self._config = Config()
        self._config.set_main_option("script_location", str(path))
        self._database = database

    async def revision(self, target: sa.MetaData, **options: Any) -> str:
        """Autogenerate a migration, and return its text."""
        script = await self._run(
            target, options, lambda: command.revision(self._config, "change", autogenerate=True)
        )
        return Path(script.path).read_text()  # noqa: ASYNC240 - a small file

    async def upgrade(self, target: sa.MetaData, revision: str = "head") -> None:
        await self._run(target, {}, lambda: command.upgrade(self._config, revision))

    async def downgrade(self, target: sa.MetaData, revision: str = "base") -> None:
        await self._run(target, {}, lambda: command.downgrade(self._config, revision))

    def write(self, revision: str, after: str | None, upgrade: str, downgrade: str) -> None:
        """Write a migration as a user does."""
        self._versions.joinpath(f"{revision}.py").write_text(
            MIGRATION.format(
                revision=revision, after=after, upgrade=upgrade.strip(), downgrade=downgrade.strip()
            )
        )

    async def printed(self, target: sa.MetaData, revisions: str) -> str:
        """Return what `upgrade --sql` prints."""
        self._config.output_buffer = buffer = io.StringIO()
        await self._run(target, {}, lambda: command.upgrade(self._config, revisions, sql=True))
        return buffer.getvalue()

    async def _run(self, target: sa.MetaData, options: dict[str, Any], act: Any) -> Any:
        def run(connection: Connection) -> Any:
            self._config.attributes.update(
                connection=connection, metadata=target, options={**OPTIONS, **options}
            )
            return act()

        async with self._database.engine.begin() as connection:
            return await connection.run_sync(run)


@pytest.fixture
def project(tmp_path: Path, empty: Database) -> Project:
    return Project(tmp_path / "migrations", empty)


async def differences(database: Database, target: sa.MetaData) -> list[Any]:
    def compare(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={**OPTIONS})
        found = compare_metadata(context, target)
        return [each for each in found if "alembic_version" not in repr(each)]

    async with database.engine.connect() as connection:
        return await connection.run_sync(compare)


async def columns(database: Database) -> dict[str, tuple[type[Any], bool]]:
    def read(connection: Connection) -> dict[str, tuple[type[Any], bool]]:
        inspector = sa.inspect(connection)
        if not inspector.has_table("docs"):
            return {}
        return {
            each["name"]: (type(each["type"]), each["nullable"])
            for each in inspector.get_columns("docs")
        }

    async with database.engine.connect() as connection:
        return await connection.run_sync(read)


class TestAMigration:
    async def test_creates_plain_columns(self, project: Project, empty: Database) -> None:
        """A generated migration does not know the library, and makes text and JSON columns."""
        text = await project.revision(metadata())
        await project.upgrade(metadata())

        assert "aioblobcol" not in text
        assert "Blob" not in text
        found = await columns(empty)
        assert found["html"] == (sa.TEXT, False)
        assert found["scan"] == (sqlite.JSON if empty.is_sqlite else postgresql.JSONB, True)

    async def test_leaves_no_difference(self, project: Project, empty: Database) -> None:
        """After it has run, `compare_type=True` finds nothing to do."""
        await project.revision(metadata())
        await project.upgrade(metadata())

        assert await differences(empty, metadata()) == []

    async def test_goes_back(self, project: Project, empty: Database) -> None:
        """A downgrade takes the columns away again."""
        await project.revision(metadata())
        await project.upgrade(metadata())
        more = metadata(sa.Column("thumb", BlobType()), sa.Column("page", BlobType(format="json")))
        text = await project.revision(more)
        await project.upgrade(more)
        after = await columns(empty)
        await project.downgrade(more)

        assert "aioblobcol" not in text
        assert {"thumb", "page"} < after.keys()
        assert await columns(empty) == {}

    async def test_is_right_in_batch_mode(self, project: Project, empty: Database) -> None:
        """Batch mode, which SQLite needs, renders the same types."""
        await project.revision(metadata())
        await project.upgrade(metadata())
        more = metadata(sa.Column("page", BlobType(format="json")))
        text = await project.revision(more, render_as_batch=True)
        await project.upgrade(more)

        assert "batch_alter_table" in text
        assert await differences(empty, more) == []

    async def test_of_a_column_that_becomes_managed(self, empty: Database) -> None:
        """A text column that held URIs needs no migration to become managed."""
        plain = sa.MetaData()
        sa.Table(
            "docs",
            plain,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("html", sa.Text, nullable=False),
            sa.Column("scan", sa.JSON().with_variant(postgresql.JSONB(), "postgresql")),
        )
        async with empty.engine.begin() as connection:
            await connection.run_sync(plain.create_all)

        assert await differences(empty, metadata()) == []

    async def test_of_a_format_that_changes(self, empty: Database) -> None:
        """Another format is another type, and is found."""
        async with empty.engine.begin() as connection:
            await connection.run_sync(metadata().create_all)
        other = sa.MetaData()
        sa.Table(
            "docs",
            other,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("html", BlobType(format="json"), nullable=False),
            sa.Column("scan", BlobType(format="json")),
        )
        ((change,),) = await differences(empty, other)

        assert change[:4] == ("modify_type", None, "docs", "html")


PREFIX = "s3://bucket/at 100%:x/y's"


class TestTriggers:
    @pytest.fixture
    def target(self) -> sa.MetaData:
        """Models of the newest revision, with a journal."""
        target = metadata(sa.Column("thumb", BlobType()))
        Journal(target, MemoryStore(bucket="bucket", prefix=PREFIX.removeprefix("s3://bucket/")))
        return target

    @pytest.fixture
    def project(self, project: Project, empty: Database) -> Project:
        """Two migrations; the second one makes the table anew on SQLite."""
        recreate = "always" if empty.is_sqlite else "auto"
        project.write("one", None, FIRST, FIRST_BACK)
        second = SECOND.replace("RECREATE", repr(recreate))
        project.write("two", "one", second, SECOND_BACK)
        return project

    async def _missing(self, database: Database, target: sa.MetaData) -> list[str]:
        journal = Journal.of(target)
        assert journal is not None
        async with database.engine.connect() as connection:
            return await connection.run_sync(journal.missing_triggers)

    async def _write(self, database: Database, *statements: str) -> list[tuple[str, str]]:
        uris = {name: f"{PREFIX}/x/id={name * 32}".replace("'", "''") for name in "abc"}
        async with database.engine.begin() as connection:
            for statement in statements:
                filled = statement.format(**{name: f"'{uri}'" for name, uri in uris.items()})
                await connection.exec_driver_sql(filled)
            found = await connection.exec_driver_sql("SELECT uri, state FROM aioblobcol_journal")
            return sorted((row.uri[-1], row.state) for row in found)

    async def test_in_migrations(
        self, project: Project, empty: Database, target: sa.MetaData
    ) -> None:
        """They stand after each migration, for the columns of its time, and go with the last."""
        stage = "INSERT INTO aioblobcol_journal (uri, state) VALUES ({}, 'staged')"
        insert = "INSERT INTO docs (id, html) VALUES (1, {a})"
        await project.upgrade(target, "one")
        first = await self._write(empty, stage.replace("{}", "{a}"), insert)
        lost = [await self._missing(empty, target)]
        await project.upgrade(target)
        lost.append(await self._missing(empty, target))
        second = await self._write(
            empty,
            *(stage.replace("{}", each) for each in ("{b}", "{c}")),
            "UPDATE docs SET html = {b}, thumb = {c}",
        )
        await project.downgrade(target, "one")
        lost.append(await self._missing(empty, target))
        third = await self._write(empty, "DELETE FROM docs")
        await project.downgrade(target)

        assert first == []
        assert second == [("a", "retired")]
        assert third == [("a", "retired"), ("b", "retired")]
        assert lost == [[], [], []]
        assert await self._missing(empty, target) == []

    async def test_batch_mode(self, project: Project, empty: Database, target: sa.MetaData) -> None:
        """A table that was made anew without them is found."""
        project.write(
            "two", "one", SECOND.rpartition("create_")[0].replace("RECREATE", "'always'"), "pass"
        )
        await project.upgrade(target)

        assert await self._missing(empty, target) == ["docs"]

    async def test_printed(
        self, project: Project, empty: Database, target: sa.MetaData, tmp_path: Path
    ) -> None:
        """What `--sql` prints runs, whatever the prefix holds."""
        project.write(
            "two",
            "one",
            "op.add_column('docs', sa.Column('thumb', sa.Text()))\n"
            "    drop_journal_triggers(op, journal)\n"
            "    create_journal_triggers(op, journal)",
            "pass",
        )
        if empty.is_sqlite:  # cannot pass over columns that are not there yet
            project.write("one", None, FIRST.rpartition("create_")[0], "pass")
        script = await project.printed(target, "head")
        async with empty.engine.connect() as connection:
            raw = await connection.get_raw_connection()
            driver: Any = raw.driver_connection
            await (driver.executescript if empty.is_sqlite else driver.execute)(script)
        found = await self._write(
            empty,
            "INSERT INTO aioblobcol_journal (uri, state) VALUES ({a}, 'staged')",
            "INSERT INTO docs (id, html) VALUES (1, {a})",
            "DELETE FROM docs",
        )

        assert found == [("a", "retired")]
        assert await self._missing(empty, target) == []


def rendered(**options: Any) -> str:
    table = metadata().tables["docs"]
    create = ops.CreateTableOp.from_table(table)
    return render_python_code(ops.UpgradeOps([create]), **options)


class TestRendering:
    def test_plain_types(self) -> None:
        """URIs are text; JSON is JSONB on PostgreSQL."""
        text = rendered(render_item=render_item)

        assert "sa.Column('html', sa.Text(), nullable=False)" in text
        assert (
            "sa.Column('scan', sa.JSON(none_as_null=True).with_variant("
            "postgresql.JSONB(none_as_null=True), 'postgresql'), nullable=True)"
        ) in text

    def test_another_prefix(self) -> None:
        """The module's name is the project's choice."""
        text = rendered(render_item=render_item, sqlalchemy_module_prefix="sqlalchemy.")

        assert "sqlalchemy.Text()" in text
        assert "sqlalchemy.JSON(" in text

    @pytest.mark.parametrize(
        ("type_", "item"), [("type", sa.Text()), ("table", None), ("column", BlobType())]
    )
    def test_everything_else_is_alembics(self, type_: str, item: Any) -> None:
        """What is no `BlobType` is left to Alembic, or to a function of the user's own."""
        context = AutogenContext(MigrationContext.configure(dialect_name="sqlite"))

        assert render_item(type_, item, context) is False

    def test_without_it(self) -> None:
        """Without `render_item` the type is written as a call that makes an equal one."""
        text = rendered(user_module_prefix="aioblobcol.")

        for column in ("html", "scan"):
            given = metadata().tables["docs"].c[column].type
            assert f"sa.Column('{column}', aioblobcol.{given!r}, " in text
