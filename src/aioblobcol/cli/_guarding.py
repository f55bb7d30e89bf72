"""What people may not write or delete by hand: where objects belong to rows.

Invariants: on doubt the answer is no; what a row or the journal names is never deleted here, nor
anything that somebody may still take into use: of those the journal's worker and `aioblobcol
check --delete` dispose, who exclude the ones that write rows. Under a prefix with the marker of a
database nothing is put, for nothing there is kept that no row names.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Text, bindparam, cast, literal, null, select, text, union_all

from .._app import BlobApp
from .._journal import (
    JournaledTable,
    OwnershipState,
    check_ownership,
    column_of,
    tables_with_uris,
)
from .._store._base import ObjectInfo, is_owned
from .._tasks import run_to_end
from .._uri import MARKER_NAME, is_one_attempt, marker_uri, root_uri, split_s3_uri
from ..errors import BlobNotFoundError, StoreError
from ._checking import APP_OPTION
from ._places import WITHOUT_APP, Places
from ._servers import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from .._store._base import Store

CONNECT_SECONDS: Final = 60
URIS_PER_QUESTION: Final = 500
PARAMETERS: Final = 32_000
"""Source: PostgreSQL's protocol and SQLite's SQLITE_MAX_VARIABLE_NUMBER; see `_journal`."""
ROWS_KEY: Final = "such keys (/id=... or /col=.../md5=...) are those of the objects of rows"

_SEEDS_KEY = re.compile(r"/col=[^/]+/md5=[0-9a-f]{32}\Z")


@dataclasses.dataclass(slots=True)
class Namers:
    """Who names one object: columns of tables, and the journal by the state of its entry."""

    columns: set[str] = dataclasses.field(default_factory=set)
    state: str | None = None

    @property
    def refusal(self) -> str | None:
        """Say why the object is not deleted by hand; None if nobody names it."""
        if self.columns:
            verb = "names" if len(self.columns) == 1 else "name"
            names = " and ".join(sorted(self.columns))
            return f"{names} {verb} it; change or delete the row instead"
        if self.state == "staged":
            return "the journal lists it as staged: its transaction may be under way"
        if self.state is not None:
            return f"the journal lists it as {self.state}: its worker deletes it"
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """An object that is to be deleted.

    Attributes:
        uri: the object.
        info: what the store says of it; None if it is not there, or was not asked.
        refusal: why it is not deleted; None if it may be.
    """

    uri: str
    info: ObjectInfo | None = None
    refusal: str | None = None


async def check_may_put(places: Places, store: Store, uri: str) -> None:
    """Refuse to write where only rows' objects are.

    Raises:
        UsageError: with the way out.
    """
    owner = places.owner_of(uri)
    if owner is not None:
        root = root_uri(owner.bucket, owner.prefix)
        raise UsageError(
            "URI",
            f"{root} holds the objects of the application's rows: one that no row names is an "
            "orphan, which check and worker delete. Let a row have it, in Python "
            "(row.column = Blob(Path(...))), or put it outside of that prefix",
        )
    if uri.endswith(f"/{MARKER_NAME}"):
        raise UsageError("URI", f"a {MARKER_NAME} is written by `aioblobcol claim` only")
    if _is_of_row(uri):
        raise UsageError("URI", f"{ROWS_KEY}; give it another name")
    markers = _markers_above(uri)
    found = await asyncio.gather(*(_head(store, marker) for marker in markers))
    for marker, info in zip(markers, found, strict=True):
        if isinstance(info, ObjectInfo):  # who may only put cannot tell
            root = marker.removesuffix(MARKER_NAME)
            raise UsageError(
                "URI",
                f"{root} belongs to the database of an application, whose check deletes what no "
                "row names. Put it outside of that prefix",
            )


class Removal:
    """Decides about the objects that one command is to delete."""

    def __init__(self, places: Places, *, min_age: timedelta) -> None:
        """Take what is known of the application; send nothing.

        Args:
            places: open.
            min_age: younger objects of an application are kept, unless they were put beside it.
        """
        self._places = places
        self._min_age = min_age
        self._markers: dict[str, ObjectInfo | StoreError | None] = {}
        app = places.app
        self._tables: Sequence[JournaledTable] = (
            []
            if app is None
            else tables_with_uris(app.metadata, [column_of(each) for each in app.all_uri_columns])
        )
        if app is not None and not self._tables:
            raise UsageError(APP_OPTION, "no table of this application has a column with URIs")

    async def judge(self, uris: Sequence[str]) -> list[Candidate]:
        """Say of each whether it may be deleted, without deleting any.

        Raises:
            UsageError: one is in none of the application's stores.
            StoreError: a store could not be opened.
            SQLAlchemyError: the database could not be asked.
        """
        stores = {}
        for uri in uris:
            self._check_is_ours(uri)
            stores[uri] = await self._places.store_of(uri)
        owners = await self._ownership()
        above = {marker: stores[uri] for uri in uris for marker in _markers_above(uri)}
        found = await asyncio.gather(*(_head(store, marker) for marker, store in above.items()))
        self._markers.update(zip(above, found, strict=True))
        infos = await asyncio.gather(*(_head(stores[uri], uri) for uri in uris))
        named = await self.namers(uris)  # the store was asked before
        candidates = []
        for uri, info in zip(uris, infos, strict=True):
            refusal = (named[uri].refusal if uri in named else None) or self._refusal(
                stores[uri], uri, owners
            )
            candidates.append(self._candidate(uri, info, refusal))
        return candidates

    async def namers(self, uris: Sequence[str]) -> Mapping[str, Namers]:
        """Return who names which of *uris*; nothing without an application.

        One statement reads all, for an object goes from the journal to its row in one transaction.

        Raises:
            SQLAlchemyError: not all of it could be read.
        """
        app = self._places.app
        if app is None:
            return {}
        parts = self._questions(app)
        statement = union_all(*parts)
        size = max(1, min(URIS_PER_QUESTION, PARAMETERS // len(parts) - 1))
        found: dict[str, Namers] = {}
        async with _connect(app) as connection:
            for start in range(0, len(uris), size):
                some = list(uris[start : start + size])
                for uri, name, state in await connection.execute(statement, {"uris": some}):
                    namers = found.setdefault(uri, Namers())
                    if name is not None:
                        namers.columns.add(name)
                    namers.state = namers.state or state
        return found

    def _questions(self, app: BlobApp) -> list[Any]:
        wanted: Any = bindparam("uris", expanding=True)
        nothing = cast(null(), Text)
        parts: list[Any] = [
            select(
                each.uri.label("uri"),
                cast(literal(f"{of.table.fullname}.{each.name}"), Text).label("name"),
                nothing.label("state"),
            )
            .where(each.uri.in_(wanted))
            .distinct()
            for of in self._tables
            for each in of.columns
        ]
        if app.journal is not None:
            table = app.journal.table
            parts.append(select(table.c.uri, nothing, table.c.state).where(table.c.uri.in_(wanted)))
        return parts

    async def _ownership(self) -> Mapping[str, OwnershipState]:
        """Return whether this database may delete, by what the URIs of a store begin with."""
        app = self._places.app
        if app is None or app.journal is None:
            return {}
        stores = app.journal.stores
        for store in stores.values():
            await self._places.opened(store)
        states = await check_ownership(app.journal, app.engine, for_seconds=0)
        return {
            root_uri(store.bucket, store.prefix): states[name] for name, store in stores.items()
        }

    def _check_is_ours(self, uri: str) -> None:
        if self._places.app is None:
            return
        owner = self._places.owner_of(uri)
        if owner is None or not is_owned(owner, uri):
            roots = ", ".join(self._places.stores)
            raise UsageError(
                "URI", f"{uri} is under none of this application's stores ({roots}); {WITHOUT_APP}"
            )

    def _refusal(self, store: Store, uri: str, owners: Mapping[str, OwnershipState]) -> str | None:
        """Say why an object that nobody names is not deleted by hand; None if it may be."""
        if uri.endswith(f"/{MARKER_NAME}"):
            return "it says whose the prefix is; see `aioblobcol claim` and `disown`"
        root = root_uri(store.bucket, store.prefix)
        state = owners.get(root)
        if state not in {None, OwnershipState.AGREED}:
            return f"{root} {state.meaning}"
        is_journaled = state is not None
        others = self._others(
            uri, own=marker_uri(store.bucket, store.prefix), is_journaled=is_journaled
        )
        if others is not None or not _is_of_row(uri):
            return others
        if self._places.app is None:
            return f"{ROWS_KEY}, and only with {APP_OPTION} it can be told whether one names it"
        if is_journaled and is_one_attempt(uri):
            return "no row names it: `aioblobcol check --delete` sees to it that none will"
        return None

    def _others(self, uri: str, *, own: str, is_journaled: bool) -> str | None:
        """Say that an object is under a prefix that another database owns, or may own."""
        for marker in _markers_above(uri):
            found = self._markers[marker]
            if is_journaled and marker == own:
                continue  # `check_ownership` has judged it
            if isinstance(found, StoreError):
                return f"it cannot be told whether a database owns the prefix: {found.code}"
            if found is not None:
                root = marker.removesuffix(MARKER_NAME)
                return f"{root} belongs to a database: only its application knows ({APP_OPTION})"
        return None

    def _candidate(
        self, uri: str, info: ObjectInfo | StoreError | None, refusal: str | None
    ) -> Candidate:
        if refusal is not None:
            return Candidate(uri, refusal=refusal)
        if isinstance(info, StoreError):
            return Candidate(uri, refusal=f"the store does not answer for it: {info.code}")
        if info is None:
            return Candidate(uri, refusal="it is not there")
        return Candidate(uri, info, self._young(info))

    def _young(self, info: ObjectInfo) -> str | None:
        if self._places.app is None:
            return None
        now = datetime.now(timezone.utc)
        if info.modified_at is not None and now - info.modified_at >= self._min_age:
            return None
        hours = self._min_age / timedelta(hours=1)
        return (
            f"no row names it, but it is younger than {hours:g} hours: its transaction may be "
            "under way (--min-age-hours)"
        )


def _is_of_row(uri: str) -> bool:
    """Tell whether this library, or sqlalchemy_mate, makes such keys for the blobs of rows."""
    return is_one_attempt(uri) or _SEEDS_KEY.search(uri) is not None


def _markers_above(uri: str) -> list[str]:
    """Return the markers of the prefixes that *uri* may be under, the shortest first."""
    bucket, key = split_s3_uri(uri)
    folders = key.split("/")[:-1]
    markers = [marker_uri(bucket, "")]
    for depth, folder in enumerate(folders, start=1):
        if folder in {"", ".", ".."}:
            break  # no prefix of a store has such a component
        markers.append(marker_uri(bucket, "/".join(folders[:depth])))
    return markers


async def _head(store: Store, uri: str) -> ObjectInfo | StoreError | None:
    """Return what is there, None if nothing is, or what keeps the store from telling."""
    try:
        async with store.runtime.slots, asyncio.timeout(store.request_seconds):
            return await store.head(uri)
    except BlobNotFoundError:
        return None
    except StoreError as exc:
        return exc
    except TimeoutError:
        return StoreError("head", uri, "no answer in time")


@contextlib.asynccontextmanager
async def _connect(app: BlobApp) -> AsyncIterator[AsyncConnection]:
    """Give a connection that sees all rows as they are committed by now, or fails."""
    connection = app.engine.connect()
    try:
        # to its end: a connection that is cancelled while it is made is closed by nobody
        await run_to_end(connection.start(), seconds=CONNECT_SECONDS)
        if app.engine.dialect.name == "postgresql":
            await connection.execution_options(isolation_level="READ COMMITTED")
            # a hidden row would be taken for none
            await connection.execute(text("SET LOCAL row_security = off"))
        yield connection
    finally:
        if connection.sync_connection is not None:
            await connection.close()
