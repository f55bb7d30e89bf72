"""What the journal's commands work on: the application's journal, and its stores while open."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from .._app import BlobApp
from .._journal import Journal
from ._checking import APP_OPTION
from ._servers import UsageError


def journal_of(app: BlobApp) -> Journal:
    """Return the application's journal.

    Raises:
        UsageError: it has none; says how to make one.
    """
    if app.journal is None:
        raise UsageError(
            APP_OPTION,
            "this application has no journal. Make one beside its models, "
            "`journal = Journal(Base.metadata, store)`, hand it to BlobApp(..., journal=journal), "
            "and install it with `aioblobcol ddl` or create_all",
        )
    return app.journal


@contextlib.asynccontextmanager
async def opened(app: BlobApp) -> AsyncIterator[Journal]:
    """Open the journal's stores; close them and the engine on every way out.

    Raises:
        UsageError: as `journal_of`.
    """
    journal = journal_of(app)
    try:
        async with contextlib.AsyncExitStack() as stack:
            distinct: dict[int, Any] = {id(store): store for store in journal.stores.values()}
            for store in distinct.values():
                await stack.enter_async_context(store)
            yield journal
    finally:
        await app.engine.dispose()
