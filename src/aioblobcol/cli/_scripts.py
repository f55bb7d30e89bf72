"""``aioblobcol ddl``: the journal's statements as a script for psql or sqlite3.

Pure: asks no database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.schema import DropTable

from .._journal import proposed_indexes
from ._servers import UsageError

if TYPE_CHECKING:
    from .._journal import Journal

# as drivers whose statements do not write "%" twice
DIALECTS: dict[str, Any] = {"postgresql": PGDialect_asyncpg, "sqlite": sqlite_dialect}
HOW = {
    "postgresql": "psql -v ON_ERROR_STOP=1 -f journal.sql",
    "sqlite": "sqlite3 -bail app.db < journal.sql",
}


def script(journal: Journal, name: str, *, with_table: bool, with_indexes: bool) -> str:
    """Return what installs the journal, in one transaction.

    Raises:
        UsageError: there is no journal on this kind of database.
    """
    dialect = _dialect(name)
    once = "Once" if with_table else "As often as you like"
    lines = [
        f"-- The journal of aioblobcol. {once}, and after the tables with URIs: {HOW[name]}",
        "BEGIN;",
        *(_ended(each) for each in journal.ddl(dialect, with_table=with_table)),
        "COMMIT;",
    ]
    indexes = [_ended(each) for each in proposed_indexes(journal, dialect)]
    if with_indexes:
        lines += indexes
    elif indexes:
        lines.append("-- For large tables; the worker asks whether a row names an object:")
        lines += [f"-- {each}" for each in indexes]
    return "\n\n".join(lines)


def drop_script(journal: Journal, name: str) -> str:
    """Return what takes the triggers away, in one transaction; the rest stands in comments.

    Raises:
        UsageError: there is no journal on this kind of database.
    """
    dialect = _dialect(name)
    tables = [
        str(DropTable(each).compile(dialect=dialect)) for each in (journal.owners, journal.table)
    ]
    rest = [*journal.triggers(dialect).drop_functions(), *tables]
    lines = [
        f"-- Takes the journal of aioblobcol away. As often as you like: {HOW[name]}",
        "BEGIN;",
        *(_ended(each) for each in journal.drop_ddl(dialect)),
        "COMMIT;",
        "-- The tables say what is still to be deleted. Once `aioblobcol status` shows nothing:",
        *(f"-- {_ended(each)}" for each in rest),
    ]
    return "\n\n".join(lines)


def _dialect(name: str) -> Any:
    if name not in DIALECTS:
        raise UsageError("--dialect", f"is one of {', '.join(DIALECTS)}, not {name!r}")
    return DIALECTS[name]()


def _ended(statement: str) -> str:
    return statement.strip().removesuffix(";") + ";"
