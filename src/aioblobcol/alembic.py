"""Migrations that do not import this library: ``render_item`` for Alembic's ``env.py``.

::

    from aioblobcol.alembic import render_item

    context.configure(..., render_item=render_item)

Autogenerate then writes what the database has (``sa.Text()``; of ``format="json"``, JSON, and
JSONB on PostgreSQL) in place of `BlobType`, so that old migrations run without aioblobcol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ._column import BlobType

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

__all__ = ["render_item"]


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
