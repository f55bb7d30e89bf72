"""``aioblobcol ls``: the objects under a prefix, in the order of their keys' bytes."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Final

from .._uri import root_uri
from ._bars import shown
from ._moving import ReaderGoneError
from ._places import SCHEME, WITHOUT_APP, PlaceOptions, Places
from ._servers import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from .._store._base import ListedObject, Store

LAST: Final = "\U0010ffff"


async def list_objects(places: Places, prefix: str | None, *, as_json: bool) -> tuple[int, int]:
    """Print a line for each object; return how many there are, and their bytes.

    Raises:
        UsageError: the prefix is in none of the application's stores, or there is none at all.
        ReaderGoneError: nobody reads standard output any more.
        StoreError: the listing could not be read to its end.
    """
    count = total = 0
    for store, under in await _chosen(places, prefix):
        async with contextlib.aclosing(objects_under(store, under)) as listed:
            async for each in listed:
                count, total = count + 1, total + each.size
                emit(_as_json(each) if as_json else _as_line(each))
    return count, total


async def objects_under(store: Store, under: str) -> AsyncGenerator[ListedObject, None]:
    """List the objects of *store* whose URIs begin with *under*."""
    root = root_uri(store.bucket, store.prefix)
    start = "" if under == root else _before(under)
    listed = store.iter_objects(start_after=start if start > root else "", with_times=True)
    async with contextlib.aclosing(listed):
        async for each in listed:
            if each.uri.startswith(under):
                yield each
            elif each.uri > under:
                return


def emit(line: str) -> None:
    """Print a line to standard output.

    Raises:
        ReaderGoneError: nobody reads it any more.
    """
    if sys.stdout is None:
        raise ReaderGoneError
    try:
        sys.stdout.write(f"{line}\n")
    except BrokenPipeError as exc:
        raise ReaderGoneError from exc


def flush() -> None:
    """Have everything printed.

    Raises:
        ReaderGoneError: nobody reads it any more.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError as exc:
        raise ReaderGoneError from exc


async def _chosen(places: Places, prefix: str | None) -> Sequence[tuple[Store, str]]:
    """Return the stores that are listed, and what the URIs in each begin with."""
    options = places.options
    if prefix is None and places.app is not None:
        found = [(await places.opened(store), root) for root, store in places.stores.items()]
        return sorted(found, key=lambda each: each[1].encode())
    under = _prefix(options, prefix)
    if places.app is None:
        return [(await places.store_of(under), under)]
    for root, store in places.stores.items():
        if under.startswith(root) or f"{under}/" == root:
            return [(await places.opened(store), max(under, root, key=len))]
    raise UsageError(
        "PREFIX",
        f"{under} is under none of the application's stores ({', '.join(places.stores)}); "
        f"{WITHOUT_APP}",
    )


def _prefix(options: PlaceOptions, prefix: str | None) -> str:
    """Return *prefix* with its bucket; a bucket alone ends in a slash."""
    if prefix is None and options.bucket is None:
        raise UsageError("PREFIX", "what is to be listed? s3://bucket/prefix, --bucket or --app")
    under = options.completed(prefix or "", "PREFIX")
    rest = under.removeprefix(SCHEME)
    return under if "/" in rest else f"{under}/"


def _before(prefix: str) -> str:
    """Return what comes after (almost) everything that comes before *prefix*."""
    code = max(ord(prefix[-1]) - 1, 0)
    if 0xD800 <= code <= 0xDFFF:  # noqa: PLR2004 - surrogates, which are no characters
        code = 0xD7FF
    return f"{prefix[:-1]}{chr(code)}{LAST}"


def _as_line(each: ListedObject) -> str:
    at = each.modified_at
    when = "" if at is None else f"{at:%Y-%m-%d %H:%M:%S}"
    return f"{each.size:>15,}  {when:<19}  {shown(each.uri)}"


def _as_json(each: ListedObject) -> str:
    at = None if each.modified_at is None else each.modified_at.isoformat()
    return json.dumps({"uri": each.uri, "size": each.size, "modified_at": at})
