"""The check: the bucket's listing and what the database knows, side by side, in both directions.

Two sorted streams are merged, neither of which is kept. They are never of one moment, so that each
finding is looked at again (HEAD, journal, row) before it is reported. Read-only unless told
otherwise; what is told to be deleted is deleted by nobody else than the journal's worker, or,
without a journal, here. Only what is old enough is reported: that trusts clocks, and says so.

Invariants: an orphan is condemned only after the rows were asked again, and with a journal only
once nobody can adopt it any more; outside of the store's bucket and prefix nothing is reported;
a range of keys counts as looked at only when all that was found in it has been taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from .._journal import (
    Entries,
    Journal,
    JournaledTable,
    OwnershipState,
    check_ownership,
    column_of,
    named_by_rows,
    tables_with_uris,
)
from .._store._base import IncompleteUpload, ListedObject, ObjectInfo, Store, is_owned
from .._tasks import run_to_end
from .._uri import is_one_attempt, marker_uri, root_uri
from ..errors import (
    BlobNotFoundError,
    InvalidInputError,
    OwnershipError,
    StoreAccessError,
    StoreError,
)
from ._findings import Finding, FindingKind
from ._known import Knowledge, Known
from ._ranges import KeyRange, share_out, share_within

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Callable,
        Collection,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from sqlalchemy import MetaData
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

logger = logging.getLogger("aioblobcol.check")

CONNECT_SECONDS = 60
VERIFIED_AT_ONCE = 100
PROGRESS_EVERY = 1000
"""URIs between two calls of `Check.on_progress`."""
SAMPLED = 1000
WAITING_AT_MOST = 100
"""Findings that nobody has taken yet."""

LAST = "\U0010ffff"  # comes after every URI
ASKED_OF_STORE = frozenset({FindingKind.ORPHAN, FindingKind.DANGLING, FindingKind.SIZE_MISMATCH})


def _age(moment: datetime) -> timedelta:
    return datetime.now(timezone.utc) - moment


@dataclasses.dataclass(frozen=True, slots=True)
class _Batch:
    """What seems wrong with the objects up to a URI; None: up to the range's end."""

    suspects: Sequence[Finding]
    up_to: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Reached:
    """Everything up to a URI of a range is dealt with; None: the whole range is."""

    up_to: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Facts:
    """What the journal and the rows said on the second look, by URI."""

    listed: set[str]
    cells: Mapping[str, Sequence[frozenset[int]]]
    doomed: Mapping[str, str]
    stuck: Mapping[str, str]


class Check:
    """One look at a store and the database that names its objects.

    Attributes:
        objects: how many were listed so far.
        cells: how many URIs of this store the rows had so far.
        foreign: how many of the objects are named by no row and have no id of their own in the
            key: this library has not made them, so they are neither reported nor deleted.
        undecided: URIs that could not be looked at again, for the store did not answer.
        on_progress: called now and then, when the counts or ``left`` have changed.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        store: Store,
        metadata: MetaData,
        *,
        uri_columns: Iterable[Any] = (),
        journal: Journal | None = None,
        delete: bool = False,
        min_age: timedelta = timedelta(hours=24),
        grace: timedelta = timedelta(hours=1),
        jobs: int = 1,
        ranges: Sequence[KeyRange] = (KeyRange(),),
    ) -> None:
        """Describe a check; nothing is sent yet.

        Args:
            engine: of the database; one connection of its pool more than there are jobs is used
                at a time.
            store: open while the check runs.
            metadata: its tables with managed columns are read. All of the store's objects have to
                be named by tables of it, or they are taken for orphans.
            uri_columns: more columns with URIs, as strings.
            journal: what it lists is no orphan; its entries are looked at, too.
            delete: condemn orphans: with a journal by entering them into it, for its worker;
                without one by deleting those that are old enough.
            min_age: younger objects are not reported as orphans, since their transactions may
                still be under way. It is compared with this machine's clock; with a journal whose
                triggers are strict, 0 is safe.
            grace: how long an entry of the journal may be overdue before it counts as stuck.
            jobs: how many ranges of keys are looked at at the same time. Each reads all tables.
            ranges: what to look at; by default everything, or what another check has ``left``.

        Raises:
            InvalidInputError: no column with URIs, a negative time, or no job.
        """
        columns = [column_of(column) for column in uri_columns]
        self._tables: Sequence[JournaledTable] = tables_with_uris(metadata, columns)
        if not self._tables:
            raise InvalidInputError(
                "no table has a column with URIs; have all models been imported?"
            )
        if min(min_age, grace) < timedelta(0):
            raise InvalidInputError("min_age and grace are not negative")
        if jobs < 1:
            raise InvalidInputError("jobs is 1 or more")
        self.objects = 0
        self.cells = 0
        self.foreign = 0
        self.undecided: list[str] = []
        self.on_progress: Callable[[], None] = lambda: None
        self._is_postgresql = engine.dialect.name == "postgresql"
        self._engine = engine
        self._store = store
        self._root = root_uri(store.bucket, store.prefix)
        self._delete = delete
        self._min_age = min_age
        self._jobs = jobs
        self._left = dict(enumerate(ranges))
        self._sample: Sequence[str] = ()
        self._journal = journal
        self._owned_folders: dict[str, bool] = {}
        self._entries = None if journal is None else Entries(journal, engine.dialect.name)
        self._known = Knowledge(engine.dialect.name, self._root, self._tables, journal, grace=grace)
        self._looking_again = asyncio.Lock()

    @property
    def left(self) -> list[KeyRange]:
        """The ranges that are not dealt with; another check can go on with them.

        What was found in them already may be found again.
        """
        return list(self._left.values())

    @property
    def fraction(self) -> float | None:
        """Which part of all rows is dealt with, estimated from a sample; None if there is none."""
        return 1 - share_within(self.left, self._sample) if self._sample else None

    async def findings(self) -> AsyncGenerator[Finding, None]:
        """Yield what is wrong, in the order of the URIs, or of those of each range.

        Raises:
            OwnershipError: to be deleted is what another database owns.
            StoreError: the bucket could not be listed to its end.
            RuntimeError: the bucket or the database does not sort by bytes; or SQLite would lock
                itself out.
            SQLAlchemyError: the rows could not be read.
        """
        if self._delete:
            await self._check_may_delete()
        async with self._connect() as connection:
            self._sample = await self._known.sample(connection, SAMPLED)
        self._left = dict(enumerate(share_out(self.left, self._sample, self._jobs)))
        steps: asyncio.Queue[tuple[int, Finding | _Reached] | Exception | None]
        steps = asyncio.Queue(WAITING_AT_MOST)
        ranges = iter(list(self._left.items()))
        jobs = [asyncio.create_task(self._work(ranges, steps)) for _ in range(self._jobs)]
        at_work = len(jobs)
        try:
            while at_work:
                step = await steps.get()
                if step is None:
                    at_work -= 1
                elif isinstance(step, Exception):
                    raise step
                elif isinstance(step[1], Finding):
                    yield step[1]
                else:
                    self._note(step[0], step[1].up_to)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
        async with contextlib.aclosing(self._uploads()) as uploads:
            async for finding in uploads:
                yield finding

    async def _uploads(self) -> AsyncGenerator[Finding, None]:
        """Give the uploads that nobody will complete any more.

        An upload is staged before it is created, and its entry renewed as long as it is under way:
        with a journal, one that is not listed is nobody's. One that was completed meanwhile cannot
        be aborted any more.
        """
        known: list[IncompleteUpload] = []
        try:
            async with contextlib.aclosing(self._store.iter_uploads()) as listed:
                known = [upload async for upload in listed if self._is_our_own(upload.uri)]
        except StoreError as exc:
            if not isinstance(exc, StoreAccessError) and "NotImplemented" not in exc.code:
                raise
            logger.warning("incomplete uploads were not looked for: %s", exc)
        uris = [upload.uri for upload in known]
        under_way: Collection[str] = ()
        if self._entries is not None and uris:
            async with self._connect() as connection:
                under_way = await self._entries.listed(connection, uris)
        for upload in known:
            started_at = upload.started_at
            is_young = started_at is not None and _age(started_at) < self._min_age
            if is_young or upload.uri in under_way:
                continue
            reason, is_gone = f"upload {upload.upload_id}", False
            if self._delete:
                try:
                    await self._store.abort_upload(upload)
                    is_gone = True
                except StoreError as exc:  # the others are to be found, too
                    logger.error("%s of %s was not aborted: %s", reason, upload.uri, exc)
                    reason += f", not aborted: {exc.code}"
            yield Finding(
                FindingKind.INCOMPLETE_UPLOAD,
                upload.uri,
                modified_at=started_at,
                is_condemned=is_gone,
                reason=reason,
            )

    def _is_our_own(self, uri: str) -> bool:
        return is_one_attempt(uri) and self._owns(uri)

    async def _check_may_delete(self) -> None:
        if self._journal is None:
            return  # nothing is written to the database, which may be anybody's copy
        states = await check_ownership(self._journal, self._engine, claims=True)
        for name, store in self._journal.stores.items():
            is_this = root_uri(store.bucket, store.prefix) == self._root
            if is_this and states[name] is not OwnershipState.AGREED:
                raise OwnershipError(self._root, states[name].meaning)
        if self._engine.dialect.name == "sqlite" and self._engine.url.database:
            async with self._connect() as connection:
                mode = await connection.scalar(text("PRAGMA journal_mode"))
            if mode not in {"wal", "memory"}:
                raise RuntimeError(
                    "to read and to condemn at one time SQLite needs PRAGMA journal_mode=WAL; "
                    f"this file is in {mode!r}"
                )

    def _note(self, number: int, up_to: str | None) -> None:
        if up_to is None:
            del self._left[number]
        else:
            self._left[number] = KeyRange(up_to, self._left[number].up_to)
        self.on_progress()

    async def _work(
        self, ranges: Iterator[tuple[int, KeyRange]], steps: asyncio.Queue[Any]
    ) -> None:
        """Take one range after the other, as the other jobs do."""
        try:
            for number, key_range in ranges:
                async with contextlib.aclosing(self._look_at(key_range)) as taken:
                    async for step in taken:
                        await steps.put((number, step))
        except Exception as exc:  # any: whoever asks for the findings is told
            await steps.put(exc)
        await steps.put(None)

    async def _look_at(self, key_range: KeyRange) -> AsyncGenerator[Finding | _Reached, None]:
        async with (
            self._connect() as connection,
            contextlib.aclosing(self._compare(connection, key_range)) as batches,
        ):
            async for batch in batches:
                async with contextlib.aclosing(self._verify(batch.suspects)) as verified:
                    async for finding in verified:
                        yield finding
                yield _Reached(batch.up_to)

    @contextlib.asynccontextmanager
    async def _connect(self) -> AsyncIterator[AsyncConnection]:
        """Give a connection that sees all rows, or fails."""
        connection = self._engine.connect()
        try:
            # to its end: a connection that is cancelled while it is made is closed by nobody
            await run_to_end(connection.start(), seconds=CONNECT_SECONDS)
            if self._is_postgresql:
                # each look is to see what is committed by then, whatever the engine's level is
                await connection.execution_options(isolation_level="READ COMMITTED")
                # hidden rows would make their objects orphans
                await connection.execute(text("SET LOCAL row_security = off"))
            yield connection
        finally:
            if connection.sync_connection is not None:
                await connection.close()

    @contextlib.asynccontextmanager
    async def _connect_again(self) -> AsyncIterator[AsyncConnection]:
        """Give one to a job that has one already: to one at a time, to go easy on the pool."""
        async with self._looking_again, self._connect() as connection:
            yield connection

    # --- both streams

    async def _compare(
        self, connection: AsyncConnection, key_range: KeyRange
    ) -> AsyncGenerator[_Batch, None]:
        suspects: list[Finding] = []
        seen = 0
        known = self._known.stream(connection, key_range, self._owns)
        listed = self._listed(key_range)
        async with contextlib.aclosing(known), contextlib.aclosing(listed):
            row, thing = await anext(known, None), await anext(listed, None)
            while row is not None or thing is not None:
                row_uri = LAST if row is None else row.uri
                thing_uri = LAST if thing is None else thing.uri
                uri = min(row_uri, thing_uri)
                is_known, is_there = row_uri == uri, thing_uri == uri
                kinds = self._judge(uri, row if is_known else None, thing if is_there else None)
                suspects += [Finding(kind, uri) for kind in kinds]
                if is_known:
                    row = await anext(known, None)
                if is_there:
                    thing = await anext(listed, None)
                seen += 1
                if len(suspects) >= VERIFIED_AT_ONCE or seen % PROGRESS_EVERY == 0:
                    yield _Batch(suspects, uri)
                    suspects = []
        yield _Batch(suspects, None)

    async def _listed(self, key_range: KeyRange) -> AsyncGenerator[ListedObject, None]:
        """Give the objects in a range, as long as they come in the order of their bytes."""
        last = ""
        up_to = LAST if key_range.up_to is None else key_range.up_to
        marker = marker_uri(self._store.bucket, self._store.prefix)
        listed = self._store.iter_objects(start_after=key_range.after or "")
        async with contextlib.aclosing(listed):
            async for each in listed:
                uri = each.uri
                if uri > up_to:
                    return
                if uri <= last:
                    raise RuntimeError(
                        f"the bucket's listing does not sort by bytes: {uri} came after {last}"
                    )
                last = uri
                if uri != marker:
                    yield each

    def _judge(
        self, uri: str, row: Known | None, thing: ListedObject | None
    ) -> Iterable[FindingKind]:
        """Give what seems to be wrong with one object."""
        if thing is not None:
            self.objects += 1
        if row is None:
            if is_one_attempt(uri) and self._owns(uri):
                yield FindingKind.ORPHAN
            else:
                self.foreign += 1
            return
        self.cells += row.cells
        if row.cells and thing is None:
            yield FindingKind.DANGLING
        if thing is not None and row.sizes - {thing.size}:
            yield FindingKind.SIZE_MISMATCH
        if row.cells > 1:
            yield FindingKind.SHARED
        if row.cells and row.state not in {None, "staged"}:
            yield FindingKind.DOOMED
        if row.is_stuck:
            yield FindingKind.STUCK

    def _owns(self, uri: str) -> bool:
        # nearly all are: without what makes `is_owned` look closer
        own = uri.startswith(self._root) and "//" not in uri[5:] and "/." not in uri
        return (own and not uri.endswith("/")) or is_owned(self._store, uri)

    # --- looking again

    async def _verify(self, suspects: Sequence[Finding]) -> AsyncGenerator[Finding, None]:
        """Yield what still holds, each as soon as it was dealt with.

        The store is asked first, then the journal, then the rows: an object that a row names
        later than that was staged before, and one that is missing was missing while its row was
        there.
        """
        if not suspects:
            return
        asked = {each.uri: None for each in suspects if each.kind in ASKED_OF_STORE}
        heads = dict(zip(asked, await asyncio.gather(*map(self._head, asked)), strict=True))
        uris = list(dict.fromkeys(each.uri for each in suspects))
        async with self._connect_again() as connection:
            facts = await self._facts(connection, uris)
        for suspect in suspects:
            if suspect.kind in ASKED_OF_STORE and heads[suspect.uri] is None:
                self.undecided.append(suspect.uri)
                continue
            finding = await self._confirm(suspect, heads.get(suspect.uri), facts)
            if finding is not None:
                yield finding

    async def _facts(self, connection: AsyncConnection, uris: Sequence[str]) -> _Facts:
        if self._entries is None:
            return _Facts(set(), await self._known.cells(connection, uris), {}, {})
        return _Facts(
            await self._entries.listed(connection, uris),
            await self._known.cells(connection, uris),
            await self._known.doomed(connection, uris),
            await self._known.stuck(connection, uris),
        )

    async def _confirm(
        self, suspect: Finding, head: ObjectInfo | BlobNotFoundError | None, facts: _Facts
    ) -> Finding | None:
        """Return what a second look says of a suspect."""
        uri, info = suspect.uri, head if isinstance(head, ObjectInfo) else None
        cells = facts.cells.get(uri, ())
        holds, reason = False, None
        match suspect.kind:
            case FindingKind.ORPHAN:
                is_free = info is not None and not cells and uri not in facts.listed
                return await self._orphan(info) if info is not None and is_free else None
            case FindingKind.SIZE_MISMATCH:
                return _mismatch(info, cells) if info is not None else None
            case FindingKind.DANGLING:
                holds = bool(cells) and info is None
            case FindingKind.SHARED:
                holds = len(cells) > 1
            case FindingKind.DOOMED:
                holds, reason = uri in facts.doomed, facts.doomed.get(uri)
            case FindingKind.STUCK:
                holds, reason = uri in facts.stuck, facts.stuck.get(uri)
        return dataclasses.replace(suspect, reason=reason) if holds else None

    async def _head(self, uri: str) -> ObjectInfo | BlobNotFoundError | None:
        """Return what is there, that nothing is, or None if the store does not tell."""
        try:
            async with self._store.runtime.slots, asyncio.timeout(self._store.request_seconds):
                return await self._store.head(uri)
        except BlobNotFoundError as exc:
            return exc
        except (StoreError, TimeoutError):
            return None

    async def _orphan(self, info: ObjectInfo) -> Finding | None:
        """Report an orphan, and condemn it if that was asked for."""
        if not self._is_old(info):
            return None
        if self._delete and await self._is_in_anothers_prefix(info.uri):
            self.foreign += 1
            return None
        is_condemned = self._delete and await self._condemn(info.uri)
        if self._delete and not is_condemned and self._entries is not None:
            return None  # a row has taken it meanwhile
        return Finding(FindingKind.ORPHAN, info.uri, info.size, info.modified_at, is_condemned)

    async def _is_in_anothers_prefix(self, uri: str) -> bool:
        """Tell whether a folder on the way to an object has an owner's marker of its own."""
        folders = uri.removeprefix(self._root).split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            prefix = "/".join(filter(None, (self._store.prefix, *folders[:depth])))
            if prefix not in self._owned_folders:
                head = await self._head(marker_uri(self._store.bucket, prefix))
                self._owned_folders[prefix] = not isinstance(head, BlobNotFoundError)
            if self._owned_folders[prefix]:
                return True
        return False

    def _is_old(self, info: ObjectInfo) -> bool:
        now = datetime.now(timezone.utc)
        return info.modified_at is not None and now - info.modified_at >= self._min_age

    async def _condemn(self, uri: str) -> bool:
        if self._entries is None:
            async with self._connect_again() as connection:
                if await named_by_rows(connection, self._tables, [uri]):
                    return False
            return not (await self._store.delete_many([uri])).failed
        async with self._connect_again() as connection:
            is_entered = await self._entries.enter_orphan(connection, uri)
            await (connection.commit() if is_entered else connection.rollback())
        return is_entered


def _mismatch(info: ObjectInfo, cells: Sequence[frozenset[int]]) -> Finding | None:
    wrong = sorted(frozenset().union(*cells) - {info.size})
    if not wrong:
        return None
    told = ", ".join(f"{size:,}" for size in wrong)
    return Finding(
        FindingKind.SIZE_MISMATCH, info.uri, info.size, reason=f"the row says {told} bytes"
    )
