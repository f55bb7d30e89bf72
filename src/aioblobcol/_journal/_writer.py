"""What sessions do with the journal: stage before an upload, settle after a transaction.

Both run on connections of the journal's own. On SQLite, whose one write lock the session's
transaction may hold or want, staging goes through the session's connection as soon as it is in a
transaction, and is not durable before that one's COMMIT.

Invariants: an object is staged before it can exist; once its act of uploading has succeeded, it
is deleted only after its entry is ``deleting``, and that only if the entry was there, or no row
names the object. (An act that fails undoes its uploads itself, before anybody has their URIs.)
What cannot be asked or deleted is left to the worker; but on SQLite, where an entry may have gone
with its transaction, an object of a certain rollback is deleted although nobody can be asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, Text, bindparam, text
from sqlalchemy.engine import Engine

from .._connection import held_connections
from .._store._base import DeleteReport, is_owned
from .._transfer import delete_everywhere
from .._uri import is_one_attempt
from ..errors import InvalidInputError, JournalError, Outcome, UnsafeTransactionError
from ._entries import Condemned, Entries, Unneeded
from ._own_engines import OwnEngines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from sqlalchemy import Table, TextClause
    from sqlalchemy.engine import Connection, Dialect
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.orm import Session

    from .._store._base import Store
    from ._table import Journal

logger = logging.getLogger("aioblobcol.journal")

SETTLE_SECONDS = 60
CLAIMED_FOR = timedelta(minutes=15)
QUARANTINE = timedelta(hours=1)
"""How long a request may live: then the object of an unanswered upload is deleted once more."""
RENEWALS_PER_LEASE = 3

NOT_CONDEMNED = "the journal does not list it as free: a row has it, or its transaction goes on"
LEFT_TO_WORKER = "its row let it go; the journal's worker deletes it after the retention"
SNAPSHOT_REFUSED = (
    "this transaction is {level}: it sees the database as of its first statement, and no object "
    "that is staged from now on, so that no row could adopt it. Call "
    "`await upload_blobs(session, ...)` before it begins, or use READ COMMITTED"
)
SNAPSHOT_LEVELS = frozenset({"REPEATABLE READ", "SERIALIZABLE"})

STAGE = """
INSERT INTO {entries} (uri, state) SELECT given, 'staged' FROM unnest(:uris) AS given
WHERE set_config('synchronous_commit', CASE current_setting('synchronous_commit')
    WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, true) IS NOT NULL
ON CONFLICT DO NOTHING"""
"""A transaction of its own, in one round trip; durable although the server's default is not."""
STILL_STAGED = {
    "postgresql": "SELECT uri FROM {entries} WHERE uri = ANY(:uris) AND state = 'staged'",
    "sqlite": (
        "SELECT uri FROM {entries} "
        "WHERE uri IN (SELECT value FROM json_each(:uris)) AND state = 'staged'"
    ),
}
"""With one parameter, whatever their number; no list has to be written anew each time."""


class JournalWriter:
    """The journal of one database, as the sessions of one engine use it.

    Attributes:
        journal: whose entries it writes.
        is_volatile: the database is in memory and dies with the process, so that nothing needs
            to be remembered.
    """

    def __init__(self, journal: Journal, engine: Engine) -> None:
        self.journal = journal
        self.is_volatile = _is_in_memory(engine)
        self._dialect = engine.dialect
        self._is_sqlite = engine.dialect.name == "sqlite"
        self._entries = Entries(journal, engine.dialect.name)
        self._stage = _with_uris(STAGE, journal.table, engine.dialect)
        self._still_staged = _with_uris(
            STILL_STAGED[engine.dialect.name], journal.table, engine.dialect
        )
        self._own = OwnEngines(engine, self._write)

    # --- before

    def check_uris(self, uris: Collection[str]) -> None:
        """Refuse what the journal's triggers would take for foreign.

        Raises:
            InvalidInputError: nothing was written.
        """
        for uri in uris:
            if not self.looks_after(uri):
                raise InvalidInputError(
                    f"{uri} is in none of the journal's stores: give Journal(metadata, stores) all "
                    "stores of the sessions"
                )

    def check_snapshot(self, session: Session) -> None:
        """Refuse a transaction that could not see what is staged from now on.

        Raises:
            UnsafeTransactionError: nothing was sent but the question.
            InvalidInputError: its tables are others than the journal's.
        """
        for connection in self._held_here(session):
            check_schemas(connection)
        for connection in () if self._is_sqlite else self._held_here(session):
            level = str(connection.get_isolation_level())
            if level in SNAPSHOT_LEVELS:
                raise UnsafeTransactionError(SNAPSHOT_REFUSED.format(level=level))

    def stages_inside(self, session: Session) -> bool:
        """Tell whether staging has to go through the session's own connection."""
        return self._is_sqlite and (self.is_volatile or bool(self._held_here(session)))

    def stage_inside(self, session: Session, uris: Collection[str]) -> None:
        """Stage in the session's transaction, in a greenlet; gone if it, or a savepoint, is undone.

        Raises:
            JournalError: it could not be written.
        """
        connection = session.connection(bind_arguments={"clause": self.journal.table})
        entries = connection.dialect.identifier_preparer.format_table(self.journal.table)
        cursor = connection.connection.cursor()  # ours, so no listener needs to look at it
        try:
            cursor.executemany(
                f"INSERT OR IGNORE INTO {entries} (uri, state) VALUES (?, 'staged')",
                [(uri,) for uri in uris],
            )
        except Exception as exc:  # the driver's own
            raise JournalError(f"{type(exc).__name__}: {exc}") from exc
        finally:
            cursor.close()

    async def stage(self, uris: Collection[str]) -> None:
        """Stage durably, together with whoever else wants to.

        Raises:
            InvalidInputError: a database in memory, of which there is no second connection.
            JournalError: it could not be written; nothing may be uploaded.
        """
        if self.is_volatile:
            raise InvalidInputError(
                "the journal is in memory, where only the session's own connection finds it: "
                "upload inside of blob_transaction(session, journal=journal)"
            )
        try:
            await self._own.here.group.submit(tuple(uris))
        except Exception as exc:  # drivers raise what they like when they cannot connect
            reason = str(exc).partition("\n")[0] or "no answer in time"
            raise JournalError(f"{type(exc).__name__}: {reason}") from exc

    async def note_upload(self, uri: str, upload_id: str) -> None:
        """Write down the multipart upload of a staged object, before it has any part.

        Raises:
            JournalError: it could not be written, or the object was condemned meanwhile.
        """
        try:
            async with self._own.begin() as connection:
                is_noted = await self._entries.note_upload(connection, uri, upload_id)
        except Exception as exc:  # drivers raise what they like when they cannot connect
            raise JournalError(f"{type(exc).__name__}: {exc}") from exc
        if not is_noted:
            raise JournalError(f"{uri} was condemned before its upload had begun")

    @contextlib.asynccontextmanager
    async def renewing(self, uris: Collection[str]) -> AsyncIterator[None]:
        """Renew the lease of staged objects for as long as their uploads take."""
        loop, every = asyncio.get_running_loop(), self._lease_seconds / RENEWALS_PER_LEASE
        renewals: list[asyncio.Task[None]] = []
        first = loop.call_later(  # most uploads are over long before
            every, lambda: renewals.append(loop.create_task(self._renew(tuple(uris), every)))
        )
        try:
            yield
        finally:
            first.cancel()
            for renewal in renewals:
                renewal.cancel()
                await asyncio.wait({renewal})

    def still_staged(self, session: Session, uris: Sequence[str]) -> list[str]:
        """Return those that the session's transaction has not adopted, in a greenlet."""
        held = self._held_here(session) or held_connections(session.get_transaction())
        if not held:
            return []
        given = json.dumps(uris) if self._is_sqlite else list(uris)
        return sorted(held[0].execute(self._still_staged, {"uris": given}).scalars())

    def looks_after(self, uri: str) -> bool:
        """Tell whether the triggers retire an object that its row lets go."""
        return is_one_attempt(uri) and self._store_of(uri) is not None

    # --- afterwards

    async def unadopted(self, uris: Sequence[str]) -> list[str]:
        """Return those that no committed row has adopted; none if nobody can tell."""
        try:
            async with asyncio.timeout(SETTLE_SECONDS), self._own.begin() as connection:
                return await self._entries.staged(connection, uris)
        except Exception as exc:
            logger.warning("the journal could not be asked", exc_info=exc)
            return []

    async def settle(
        self, unneeded: Mapping[str, Store], *, unanswered: Collection[str] = ()
    ) -> DeleteReport:
        """Condemn and delete new objects that certainly no committed row names.

        Never raises: what fails is left to the worker, and reported.

        Args:
            unneeded: URI to store.
            unanswered: those whose upload may still take effect; deleted once more later.
        """
        report, _ = await self._settle(unneeded, unanswered, is_doubtful=False)
        return report

    async def resolve(
        self, created: Mapping[str, Store], *, staged_at: float | None
    ) -> tuple[DeleteReport, Outcome]:
        """Find out what became of a transaction whose COMMIT was not answered, and settle.

        A plain read would still show its objects as staged while the server commits: their
        entries are locked, for which the transaction's end is waited. Never raises.

        Args:
            created: the objects that it wrote into rows, with their stores.
            staged_at: when the first of them was, on the monotonic clock, if that is known.

        Returns:
            What was deleted, and the outcome: unknown if the database does not answer, or if its
            objects are neither listed nor in rows, and a worker may have removed them meanwhile.
        """
        report, found = await self._settle(created, tuple(created), is_doubtful=True)
        age = None if staged_at is None else time.monotonic() - staged_at
        is_recent = age is not None and age < self._lease_seconds / 2
        if found.were_adopted or (found.are_gone and is_recent):
            return report, Outcome.COMMITTED
        if found.were_staged and not found.are_gone:
            return report, Outcome.ROLLED_BACK
        return report, Outcome.UNKNOWN

    async def _settle(
        self, unneeded: Mapping[str, Store], unanswered: Collection[str], *, is_doubtful: bool
    ) -> tuple[DeleteReport, Unneeded]:
        claim = uuid.uuid4().hex
        found = Unneeded()
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                async with self._own.here.slots[is_doubtful]:  # those wait for others
                    found = await self._condemn(claim, unneeded, is_doubtful=is_doubtful)
                condemned = [Condemned(uri, 0, uri in unanswered) for uri in found.condemned]
                return await self._carry_out(claim, condemned, unneeded), found
        except Exception as exc:
            logger.warning("left to the journal's worker: %s", ", ".join(unneeded), exc_info=exc)
            if self._is_sqlite and not is_doubtful and not found.condemned:
                # the entries went with the transaction
                return await delete_everywhere(unneeded), found
            reason = f"left to the journal's worker: {type(exc).__name__}: {exc}"
            return DeleteReport(failed=dict.fromkeys(unneeded, reason)), found

    async def _condemn(
        self, claim: str, unneeded: Mapping[str, Store], *, is_doubtful: bool
    ) -> Unneeded:
        async with self._own.begin() as connection:
            return await self._entries.condemn_unneeded(
                connection,
                tuple(unneeded),
                claim=claim,
                claimed_for=CLAIMED_FOR,
                is_doubtful=is_doubtful,
            )

    async def _carry_out(
        self, claim: str, condemned: Sequence[Condemned], stores: Mapping[str, Store]
    ) -> DeleteReport:
        mine = {each.uri for each in condemned}
        kept = {uri: NOT_CONDEMNED for uri in stores if uri not in mine}
        if not condemned:
            return DeleteReport(kept=kept)
        report = await delete_everywhere({each.uri: stores[each.uri] for each in condemned})
        deleted = [each for each in condemned if each.uri not in report.failed]
        failed = {
            each.uri: (each, report.failed[each.uri])
            for each in condemned
            if each.uri in report.failed
        }
        async with self._own.begin() as connection:
            await self._entries.forget(connection, deleted, claim=claim, quarantine=QUARANTINE)
            await self._entries.postpone(connection, failed, claim=claim)
        return report.merged_with(DeleteReport(kept=kept))

    # --- statements

    async def _write(self, uris: Sequence[str]) -> None:
        side = self._own.here
        if not side.has_looked:
            side.has_looked = True
            async with self._own.begin() as connection:
                await warn_of_missing_triggers(self.journal, connection)
        if self._is_sqlite:
            async with side.staging.begin() as connection:
                await self._entries.stage(connection, uris)
            return
        async with side.autocommitting.connect() as connection:
            await connection.execute(self._stage, {"uris": list(uris)})

    async def _renew(self, uris: Collection[str], every: float) -> None:
        while True:
            try:
                async with self._own.begin() as connection:
                    left = await self._entries.renew(connection, uris)
                if left:
                    logger.warning("condemned in the middle of their upload: %s", ", ".join(left))
            except Exception as exc:  # there is another time before the lease is over
                logger.warning("the lease of an upload could not be renewed", exc_info=exc)
            await asyncio.sleep(every)

    @property
    def _lease_seconds(self) -> float:
        return self.journal.lease.total_seconds()

    def _held_here(self, session: Session) -> list[Connection]:
        """Return the connections to this database that the session's transaction uses."""
        held = held_connections(session.get_transaction()) or []
        return [each for each in held if each.dialect is self._dialect]

    def _store_of(self, uri: str) -> Store | None:
        stores = self.journal.stores.values()
        return next((store for store in stores if is_owned(store, uri)), None)


async def warn_of_missing_triggers(journal: Journal, connection: AsyncConnection) -> None:
    """Say so if rows of some table are written past the journal."""
    missing = await connection.run_sync(journal.missing_triggers)
    if missing:
        logger.warning(
            "the journal's triggers do not stand, are disabled or out of date on %s: install them "
            "with `aioblobcol ddl` or Journal.create_triggers",
            ", ".join(missing),
        )


def check_schemas(bind: Engine | Connection) -> None:
    """Refuse what would write rows elsewhere than where the journal is.

    Raises:
        InvalidInputError: a ``schema_translate_map``.
    """
    if bind.get_execution_options().get("schema_translate_map"):
        raise InvalidInputError(
            "a journal works on the tables of its own MetaData, and not with a "
            "schema_translate_map: make a MetaData with a Journal for each schema"
        )


def _with_uris(sql: str, table: Table, dialect: Dialect) -> TextClause:
    """Return a statement about entries with one parameter, an array or a text in JSON."""
    statement = text(sql.format(entries=dialect.identifier_preparer.format_table(table)))
    type_: Any = Text if dialect.name == "sqlite" else ARRAY(Text)
    return statement.bindparams(bindparam("uris", type_=type_))


def _is_in_memory(engine: Engine) -> bool:
    if engine.dialect.name != "sqlite":
        return False
    database = engine.url.database
    return not database or ":memory:" in database or "mode=memory" in str(engine.url)
