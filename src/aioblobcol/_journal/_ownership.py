"""Which database may delete under a store's prefix: one, and no copy of it.

The prefix holds a marker, an object with an identity. The database holds the same identity in a
row, with what tells this database from its copies (the fingerprint), and with what the
configuration calls itself (``Journal(owner=...)``). Whoever deletes asks first whether all agree.

Invariants: on doubt nothing is deleted; a prefix with somebody else's marker is never claimed
without being told to, and then under a new identity. Two databases that claim a free prefix in
the same moment may both believe to own it, until they look again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import hashlib
import json
import logging
import time
import uuid
import weakref
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, DateTime, MetaData, Table, Text, delete, func, select, text, update
from sqlalchemy.engine import Engine

from .._sources import Payload
from .._store._base import PutRequest, Store, put_seconds
from .._uri import marker_uri, root_uri
from ..errors import BlobNotFoundError, OwnershipError, StoreError
from ._entries import insert_new

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from ._table import Journal

logger = logging.getLogger("aioblobcol.journal")

REMEMBERED_SECONDS = 60
ASKED_AGAIN_SECONDS = 5
"""After how long a store is looked at again that did not agree; a claim may be under way."""
NO_IDENTITY = "unreadable"


class OwnershipState(enum.Enum):
    """Whether this database may delete under a prefix; only `AGREED` says that it may."""

    AGREED = "agreed"
    UNCLAIMED = "unclaimed"
    UNMARKED = "unmarked"
    TAKEN = "taken"
    COPIED = "copied"
    MISCONFIGURED = "misconfigured"
    DISOWNED = "disowned"
    UNKNOWN = "unknown"

    @property
    def meaning(self) -> str:
        """One sentence for people, whose subject is the prefix, and what to do about it."""
        return _MEANING[self]


_MINE = "If its objects are this database's alone, run `aioblobcol claim --take-over`"
_MEANING = {
    OwnershipState.AGREED: "is owned by this database.",
    OwnershipState.UNCLAIMED: (
        "is owned by nobody yet: the first `aioblobcol worker`, or `aioblobcol claim`, claims it."
    ),
    OwnershipState.UNMARKED: (
        "has lost its marker: the next `aioblobcol worker`, or `aioblobcol claim`, writes it anew."
    ),
    OwnershipState.TAKEN: (
        f"has the marker of another database. {_MINE}, otherwise give the store a prefix of its "
        "own."
    ),
    OwnershipState.COPIED: (
        "was claimed by a database of which this one is a copy, or which was moved. "
        f"{_MINE}; if it is a copy, run `aioblobcol disown`, or give the store a prefix of its own."
    ),
    OwnershipState.MISCONFIGURED: (
        "was claimed under another Journal(owner=...) than this configuration's. "
        f"{_MINE}, otherwise correct the configuration."
    ),
    OwnershipState.DISOWNED: (
        f"was given up by `aioblobcol disown`: this database deletes nothing. {_MINE}."
    ),
    OwnershipState.UNKNOWN: (
        "does not tell whose it is: its marker cannot be read (that takes s3:GetObject and "
        "s3:ListBucket)."
    ),
}


_FREE = frozenset({OwnershipState.UNCLAIMED, OwnershipState.UNMARKED})


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    identity: str | None
    fingerprint: str | None
    owner: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Sight:
    """What was found about one store."""

    store: Store
    row: _Row | None
    marker: str | StoreError | TimeoutError | None
    state: OwnershipState

    @property
    def root(self) -> str:
        return root_uri(self.store.bucket, self.store.prefix)


@dataclasses.dataclass(slots=True)
class _Memory:
    """What was found lately, and what of it is in the log."""

    states: Mapping[str, OwnershipState] | None = None
    until: float = 0
    logged: dict[str, OwnershipState] = dataclasses.field(default_factory=dict)


_memories: weakref.WeakKeyDictionary[Journal, weakref.WeakKeyDictionary[Engine, _Memory]] = (
    weakref.WeakKeyDictionary()
)


def owners_table(metadata: MetaData, journal: Table) -> Table:
    """Add the table beside the journal: a row for each prefix that was claimed or given up."""
    return Table(
        f"{journal.name}_owner",
        metadata,
        Column("root", Text, primary_key=True),
        Column("identity", Text),  # NULL: given up
        Column("fingerprint", Text),
        Column("owner", Text),
        Column("claimed_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
        schema=journal.schema,
    )


async def check_ownership(
    journal: Journal,
    engine: AsyncEngine,
    *,
    claims: bool = False,
    for_seconds: float = REMEMBERED_SECONDS,
) -> Mapping[str, OwnershipState]:
    """Return of each store, by name, whether this database may delete in it.

    What is wrong is logged when it is seen first.

    Args:
        journal: its stores are open.
        engine: of the database with the journal.
        claims: claim the prefixes that nobody has claimed, and write lost markers anew.
        for_seconds: how long it is remembered that all agree; otherwise each store gets one GET.

    Raises:
        SQLAlchemyError, OSError: the database could not be asked.
    """
    memories = _memories.setdefault(journal, weakref.WeakKeyDictionary())
    memory = memories.setdefault(engine.sync_engine, _Memory())
    now = time.monotonic()
    may_claim = claims and not _FREE.isdisjoint((memory.states or {}).values())
    if memory.states is not None and not may_claim and now < memory.until:
        return memory.states
    memory.states = None  # what is not known to be so any more allows nothing
    states = {
        name: await _claim_if_free(journal, engine, sight) if claims else sight.state
        for name, sight in (await _look(journal, engine)).items()
    }
    is_good = set(states.values()) == {OwnershipState.AGREED}
    seconds = for_seconds if is_good else min(for_seconds, ASKED_AGAIN_SECONDS)
    memory.states, memory.until = states, time.monotonic() + seconds
    _log(journal, memory)
    return states


async def claim(
    journal: Journal, engine: AsyncEngine, *, take_over: bool = False
) -> Mapping[str, OwnershipState]:
    """Make this database the one that deletes in the journal's stores.

    Args:
        journal: its stores are open.
        engine: of the database with the journal.
        take_over: also where another database owns the prefix, or may own it. That one deletes
            nothing from then on (within a minute, if its worker runs).

    Raises:
        OwnershipError: a prefix has a marker, and not this database's; nothing was changed.
        StoreError: a marker could not be read or written; to repeat it is safe.
        SQLAlchemyError: the database could not be asked.
    """
    sights = await _look(journal, engine)
    for sight in sights.values():
        if isinstance(sight.marker, Exception):
            raise sight.marker
        is_given_up = sight.state is OwnershipState.DISOWNED and sight.marker is None
        is_free = is_given_up or sight.state in {*_FREE, OwnershipState.AGREED}
        if not (is_free or take_over):
            raise OwnershipError(sight.root, sight.state.meaning)
    states = {}
    for name, sight in sights.items():
        states[name] = sight.state
        if sight.state is not OwnershipState.AGREED:
            states[name] = await _claim(journal, engine, sight.store, anew=True)
    _memories.pop(journal, None)
    return states


async def disown(journal: Journal, engine: AsyncEngine) -> None:
    """Make this database one that deletes nothing: for a copy of another one. Asks no store.

    Raises:
        SQLAlchemyError: the database could not be asked.
    """
    async with engine.begin() as connection:
        for store in journal.stores.values():
            root = root_uri(store.bucket, store.prefix)
            await connection.execute(
                insert_new(journal.owners, connection.dialect.name), {"root": root}
            )
            await connection.execute(
                update(journal.owners)
                .where(journal.owners.c.root == root)
                .values(identity=None, fingerprint=None, owner=None)
            )
    _memories.pop(journal, None)


# --- looking


async def _look(journal: Journal, engine: AsyncEngine) -> dict[str, _Sight]:
    table = journal.owners
    # before the rows: a first claim that is under way writes its row before the marker
    markers = await asyncio.gather(*(_marker(store) for store in journal.stores.values()))
    async with engine.connect() as connection:
        found = await connection.execute(
            select(table.c.root, table.c.identity, table.c.fingerprint, table.c.owner)
        )
        rows = {root: _Row(*rest) for root, *rest in found}
        fingerprint = await _fingerprint(connection, table.schema)
    sights = {}
    for (name, store), marker in zip(journal.stores.items(), markers, strict=True):
        row = rows.get(root_uri(store.bucket, store.prefix))
        state = _judge(row, marker, fingerprint=fingerprint, owner=journal.owner)
        sights[name] = _Sight(store, row, marker, state)
    return sights


def _judge(
    row: _Row | None, marker: str | Exception | None, *, fingerprint: str, owner: str | None
) -> OwnershipState:
    if row is not None and row.identity is None:
        return OwnershipState.DISOWNED
    if isinstance(marker, Exception):
        return OwnershipState.UNKNOWN
    if row is None:
        return OwnershipState.UNCLAIMED if marker is None else OwnershipState.TAKEN
    doubts = {
        OwnershipState.TAKEN: marker is not None and marker != row.identity,
        OwnershipState.COPIED: row.fingerprint != fingerprint,
        OwnershipState.MISCONFIGURED: row.owner != owner,
        OwnershipState.UNMARKED: marker is None,
    }
    return next((state for state, is_so in doubts.items() if is_so), OwnershipState.AGREED)


async def _marker(store: Store) -> str | StoreError | TimeoutError | None:
    """Return the identity in the marker, None if there is no marker, or why it is not known."""
    try:
        async with asyncio.timeout(store.request_seconds):
            body = await store.get(marker_uri(store.bucket, store.prefix))
    except BlobNotFoundError as exc:
        return exc if "NoSuchBucket" in exc.code else None
    except (StoreError, TimeoutError) as exc:
        return exc
    try:
        return str(json.loads(body)["identity"])
    except (ValueError, KeyError, TypeError):
        return NO_IDENTITY


async def _fingerprint(connection: AsyncConnection, schema: str | None) -> str:
    """Return what tells this database from a copy of it that was restored elsewhere.

    On PostgreSQL the cluster and the database's number in it; a promoted physical replica has the
    same ones, and a role that may not ask for the cluster sees the number only. On SQLite the
    file's path. ``Journal(owner=...)`` is for what they cannot tell apart.
    """
    if connection.dialect.name == "sqlite":
        databases = (await connection.execute(text("PRAGMA database_list"))).all()
        paths = {name: path for _, name, path in databases}
        path = paths.get(schema or "main") or ""
        return f"sqlite:{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    number = await connection.scalar(
        text("SELECT oid::bigint FROM pg_database WHERE datname = current_database()")
    )
    cluster = "?"
    may_ask = text("SELECT has_function_privilege('pg_control_system()', 'execute')")
    if await connection.scalar(may_ask):
        cluster = await connection.scalar(text("SELECT system_identifier FROM pg_control_system()"))
    return f"postgresql:{cluster}:{number}"


def _log(journal: Journal, memory: _Memory) -> None:
    for name, state in (memory.states or {}).items():
        if state is OwnershipState.AGREED:
            memory.logged.pop(name, None)
        elif memory.logged.get(name) is not state:
            memory.logged[name] = state
            store = journal.stores[name]
            root = root_uri(store.bucket, store.prefix)
            logger.error("nothing is deleted in the store %r: %s %s", name, root, state.meaning)


# --- writing


async def _claim_if_free(journal: Journal, engine: AsyncEngine, sight: _Sight) -> OwnershipState:
    if sight.state not in _FREE:
        return sight.state
    try:
        state = await _claim(journal, engine, sight.store, anew=False)
    except (StoreError, TimeoutError) as exc:
        logger.warning("%s was not claimed: %s", sight.root, exc)
        return OwnershipState.UNKNOWN
    logger.info("%s is owned by this database from now on", sight.root)
    return state


async def _claim(
    journal: Journal, engine: AsyncEngine, store: Store, *, anew: bool
) -> OwnershipState:
    """Write the identity down here, then into the marker, and read that back.

    A first claim of several workers at once ends with the same identity in all of them. Killed in
    between, the marker is missing, and the next one writes it.
    """
    table = journal.owners
    values: dict[str, Any] = {
        "root": root_uri(store.bucket, store.prefix),
        "identity": uuid.uuid4().hex,
        "owner": journal.owner,
    }
    async with engine.begin() as connection:
        values["fingerprint"] = await _fingerprint(connection, table.schema)
        is_this = table.c.root == values["root"]
        if anew:
            await connection.execute(delete(table).where(is_this))
        await connection.execute(insert_new(table, connection.dialect.name), values)
        identity = await connection.scalar(select(table.c.identity).where(is_this))
    if identity is None:  # given up meanwhile
        return OwnershipState.DISOWNED
    await _put_marker(store, identity)
    is_there = await _marker(store) == identity
    return OwnershipState.AGREED if is_there else OwnershipState.TAKEN


async def _put_marker(store: Store, identity: str) -> None:
    about = "whose objects these are; see `aioblobcol claim --help`"
    body = json.dumps({"identity": identity, "about": about}).encode()
    payload = Payload(
        body, md5=None, sha256=hashlib.sha256(body).hexdigest(), crc32=zlib.crc32(body)
    )
    uri = marker_uri(store.bucket, store.prefix)
    async with asyncio.timeout(put_seconds(store, len(body))):
        await store.put(PutRequest("owner", uri, payload, {}))


__all__ = [
    "OwnershipState",
    "check_ownership",
    "claim",
    "disown",
    "owners_table",
]
