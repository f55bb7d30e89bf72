"""The question after every test: do the rows and the objects agree?"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from .._blob import Blob
from .._uri import marker_uri
from ..errors import StoreError

if TYPE_CHECKING:
    from .._store._base import Store


async def assert_consistent(
    store: Store,
    engine: AsyncEngine,
    columns: Sequence[Any],
    *,
    orphans: Collection[str] = (),
) -> dict[str, bytes]:
    """Assert that every committed URI is readable and that nothing else is under the prefix.

    Call it when no transaction is under way.

    Args:
        store: open.
        engine: of the database.
        columns: every column that holds URIs, such as ``[Task.html, Task.image]``; of managed
            columns (`BlobType`) and of strings alike.
        orphans: URIs that are expected without a row: exactly these.

    Returns:
        URI to bytes, of what the rows name.

    Raises:
        AssertionError: a LOSS (a row names an object that is missing or holds other bytes than
            its SHA-256 says), an object that two cells name, an orphan too many or too few, or an
            upload that was neither completed nor aborted.
    """
    named: list[str] = []
    async with engine.connect() as connection:
        for column in columns:
            found = await connection.scalars(select(column).where(column.is_not(None)))
            named.extend(value.uri if isinstance(value, Blob) else value for value in found)
    twice = sorted({uri for uri in named if named.count(uri) > 1})
    _fail_if(twice, "named by two cells")
    contents: dict[str, bytes] = {}
    losses: dict[str, str] = {}
    for uri in named:
        try:
            info, body = await store.head(uri), await store.get(uri)
        except StoreError as exc:
            losses[uri] = str(exc)
            continue
        contents[uri] = body
        expected = info.metadata.get("sha256")
        if expected is not None and expected != hashlib.sha256(body).hexdigest():
            losses[uri] = "holds other bytes than its SHA-256 says"
    _fail_if(losses, "LOSS")
    present = {uri async for uri in store.iter_uris()}
    present.discard(marker_uri(store.bucket, store.prefix))
    found_orphans = present - set(named)
    unexpected = found_orphans - set(orphans)
    _fail_if(sorted(unexpected), "LEAK: no row names")
    missing = set(orphans) - found_orphans
    _fail_if(sorted(missing), "expected as orphans, but not there")
    incomplete = [upload.uri async for upload in store.iter_uploads()]
    _fail_if(incomplete, "LEAK: neither completed nor aborted")
    return contents


def _fail_if(found: Collection[str], what: str) -> None:
    if found:  # no assert statement: they are not there under `python -O`
        raise AssertionError(f"{what}: {found}")
