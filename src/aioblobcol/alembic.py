"""Migrations that do not import this library: ``render_item`` for Alembic's ``env.py``.

::

    from aioblobcol.alembic import render_item

    context.configure(..., render_item=render_item)

Autogenerate then writes what the database has (``sa.Text()``; of ``format="json"``, JSON, and
JSONB on PostgreSQL) in place of `BlobType`, so that old migrations run without aioblobcol.

Triggers are no part of what Alembic compares. A migration that adds, drops or renames columns with
URIs, or partitions, or that changes a table with them in batch mode on SQLite (which makes the
table anew, without its triggers), ends with `create_journal_triggers`::

    def upgrade() -> None:
        drop_journal_triggers(op, journal)  # SQLite refuses to drop a column that they name
        with op.batch_alter_table("docs") as batch:
            batch.add_column(sa.Column("thumb", sa.Text()))
        create_journal_triggers(op, journal)

Both of them run in the migration's transaction, so that no row is written in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement

from ._column import BlobType
from ._journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from alembic.autogenerate.api import AutogenContext

__all__ = ["create_journal_triggers", "drop_journal_triggers", "render_item"]


class Operations(Protocol):
    """What is needed of ``alembic.op``."""

    def get_context(self) -> Any:
        """Return what the migration runs in."""

    def execute(self, sqltext: Any) -> Any:
        """Run a statement, or print it."""


def create_journal_triggers(op: Operations, journal: Journal) -> None:
    """Install, or renew, the triggers of all tables that are there, in a migration.

    With ``--sql`` the statements are printed, as if the database had all that the models have.

    Args:
        op: ``from alembic import op``, as in every migration.
        journal: its table is created by an earlier operation.

    Raises:
        DBAPIError: as `Journal.create_triggers`.
    """
    context = op.get_context()
    if context.as_sql:
        _print(op, journal.ddl(context.dialect, with_table=False))
    else:
        journal.create_triggers(context.connection)


def drop_journal_triggers(op: Operations, journal: Journal) -> None:
    """Take the triggers away, in a migration: for the downgrade, or while columns change."""
    context = op.get_context()
    if context.as_sql:
        _print(op, journal.drop_ddl(context.dialect))
    else:
        journal.drop_triggers(context.connection)


class _Verbatim(ExecutableDDLElement):
    """A statement in which colons and percent signs mean nothing."""

    inherit_cache = False

    def __init__(self, text: str) -> None:
        self.text = text


@compiles(_Verbatim)
def _write(element: _Verbatim, _compiler: Any, **_: Any) -> str:
    return element.text


def _print(op: Operations, statements: Iterable[str]) -> None:
    for statement in statements:
        op.execute(_Verbatim(statement))


def render_item(type_: str, obj: Any, autogen_context: AutogenContext) -> str | Literal[False]:
    """Render a `BlobType` as the plain type under it; leave everything else to Alembic.

    Call it from a ``render_item`` of your own if you have one, and go on if it returns False.
    """
    if type_ != "type" or not isinstance(obj, BlobType):
        return False
    sa = autogen_context.opts["sqlalchemy_module_prefix"] or ""
    if obj.format == "uri":
        return f"{sa}Text()"
    autogen_context.imports.add("from sqlalchemy.dialects import postgresql")
    return (
        f"{sa}JSON(none_as_null=True)"
        ".with_variant(postgresql.JSONB(none_as_null=True), 'postgresql')"
    )
