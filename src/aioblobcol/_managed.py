"""Sessions that upload: ``blob_sessionmaker``, ``track_blobs``, ``upload_blobs``, ``enlist``.

`_keeper` listens to the plain `Session`; here is what only the `AsyncSession` around it can do.
Invariants (the two rules of cancellation, second half): COMMIT, once sent, is run to its end,
and so are ROLLBACK and close; a transaction whose COMMIT failed is ended and settled before the
error goes on, so that the error can tell the outcome.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

from sqlalchemy import event
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    AsyncSessionTransaction,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, sessionmaker

from ._bulk import on_orm_execute
from ._column import DEFAULT_STORE
from ._connection import use_explicit_begin
from ._journal import Journal
from ._keeper import Keeper, keeper_of, listen
from ._store._base import DeleteReport, Store
from ._tasks import run_to_end
from .errors import (
    BlobNotWrittenError,
    BlobSharedError,
    CommitOutcomeUnknown,
    InvalidInputError,
    TransactionAbortedError,
    UnsafeTransactionError,
)

if TYPE_CHECKING:
    from types import TracebackType

    from .aws_s3 import DeleteS3Result, PutS3Result

S = TypeVar("S", bound=AsyncSession)
T = TypeVar("T")

_UNTRACKED = (
    "this session does not upload: make it with blob_sessionmaker(engine, store), or equip its "
    "class or factory with track_blobs(..., store)"
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Settings:
    stores: Mapping[str, Store]
    journal: Journal | None
    background: bool
    commit_seconds: float


@overload
def blob_sessionmaker(
    bind: AsyncEngine | AsyncConnection | None = ...,
    store: Store | None = ...,
    *,
    class_: type[S],
    stores: Mapping[str, Store] | None = ...,
    journal: Journal | None = ...,
    background: bool = ...,
    commit_seconds: float = ...,
    **session_arguments: Any,
) -> async_sessionmaker[S]: ...


@overload
def blob_sessionmaker(
    bind: AsyncEngine | AsyncConnection | None = ...,
    store: Store | None = ...,
    *,
    stores: Mapping[str, Store] | None = ...,
    journal: Journal | None = ...,
    background: bool = ...,
    commit_seconds: float = ...,
    **session_arguments: Any,
) -> async_sessionmaker[AsyncSession]: ...


def blob_sessionmaker(
    bind: AsyncEngine | AsyncConnection | None = None,
    store: Store | None = None,
    *,
    class_: type[Any] = AsyncSession,
    stores: Mapping[str, Store] | None = None,
    journal: Journal | None = None,
    background: bool = False,
    commit_seconds: float = 60,
    **session_arguments: Any,
) -> async_sessionmaker[Any]:
    """Return a factory of sessions that keep the objects of `Blob` attributes with their rows.

    ::

        Session = blob_sessionmaker(engine, store)
        async with Session.begin() as session:
            session.add(Task(url=url, html=Blob(page)))

    A flush uploads every pending blob at once, before its first statement. When the transaction
    is committed, the objects that its rows have let go are deleted; when it is rolled back, or
    the session closed without a commit, those that it has made. Neither ever raises; what could
    not be deleted is logged, and in `blob_report`. On SQLite engines the recipe of
    `use_explicit_begin` is installed.

    Args:
        bind: the engine. Without one, give ``binds=`` or bind each session.
        store: for columns that name none; not opened here.
        class_: a subclass of `AsyncSession`, such as SQLModel's.
        stores: more stores, by the names that columns say; in place of ``store``, with
            ``default`` among them, or beside it.
        journal: every object is staged there before it can exist, and what rows let go is
            deleted by its worker. Its stores are used if none are given.
        background: let the stores delete superseded objects after the commit has returned.
            They finish when they close.
        commit_seconds: how long COMMIT, and separately ROLLBACK, may take.
        session_arguments: of `AsyncSession`. ``expire_on_commit`` is False by default.

    Raises:
        InvalidInputError: no store at all, or something that is none.
    """
    settings = _settings(
        store, stores, journal, background=background, commit_seconds=commit_seconds
    )
    engines = [bind, *dict(session_arguments.get("binds") or {}).values()]
    for engine in engines:
        if isinstance(engine, AsyncEngine):
            use_explicit_begin(engine)
    arguments = {"expire_on_commit": False, **session_arguments}
    if "sync_session_class" in arguments:
        arguments["sync_session_class"] = _listening(arguments["sync_session_class"])
    return async_sessionmaker(bind, class_=_equipped(class_, settings), **arguments)


@overload
def track_blobs(
    target: type[S],
    store: Store | None = ...,
    *,
    stores: Mapping[str, Store] | None = ...,
    journal: Journal | None = ...,
    background: bool = ...,
    commit_seconds: float = ...,
) -> type[S]: ...


@overload
def track_blobs(
    target: async_sessionmaker[S],
    store: Store | None = ...,
    *,
    stores: Mapping[str, Store] | None = ...,
    journal: Journal | None = ...,
    background: bool = ...,
    commit_seconds: float = ...,
) -> async_sessionmaker[S]: ...


@overload
def track_blobs(
    target: async_scoped_session[S],
    store: Store | None = ...,
    *,
    stores: Mapping[str, Store] | None = ...,
    journal: Journal | None = ...,
    background: bool = ...,
    commit_seconds: float = ...,
) -> async_scoped_session[S]: ...


def track_blobs(
    target: Any,
    store: Store | None = None,
    *,
    stores: Mapping[str, Store] | None = None,
    journal: Journal | None = None,
    background: bool = False,
    commit_seconds: float = 60,
) -> Any:
    """Equip a session class or a factory that you have already; see `blob_sessionmaker`.

    A factory (`async_sessionmaker`, `async_scoped_session`) is changed in place, and returned:
    the sessions that it makes from now on upload. Of a class a subclass is returned. SQLite
    engines need `use_explicit_begin` as well if savepoints are used.

    Raises:
        InvalidInputError: neither a class nor a factory of `AsyncSession`; or the stores.
    """
    settings = _settings(
        store, stores, journal, background=background, commit_seconds=commit_seconds
    )
    if isinstance(target, async_scoped_session):
        _equip_factory(target.session_factory, settings)
        return target
    if isinstance(target, async_sessionmaker):
        _equip_factory(target, settings)
        return target
    if isinstance(target, type) and issubclass(target, AsyncSession):
        return _equipped(target, settings)
    raise InvalidInputError(
        f"track_blobs() equips a class or a factory of AsyncSession, not {target!r}"
    )


async def upload_blobs(
    session: AsyncSession | async_scoped_session[AsyncSession], *instances: object
) -> None:
    """Upload the pending blobs of mapped objects now, ahead of the flush that writes them.

    For a session that is not in a transaction yet: no connection is held meanwhile. The
    transaction that comes owns the objects as if its flush had uploaded them; if it ends
    without writing them, they are deleted and the blobs are pending again. Objects need not be
    added to the session yet.

    Raises:
        UnsafeTransactionError: the session does not upload, or its transaction cannot be judged.
        InvalidInputError, StoreClosedError, BlobUploadError: as the flush would; nothing is kept.
    """
    keeper = _keeper(_plain(session))
    await _plain(session).run_sync(keeper.upload_ahead, instances)


async def enlist(
    session: AsyncSession | async_scoped_session[AsyncSession],
    *results: PutS3Result | DeleteS3Result,
    allow_unwritten: bool = False,
) -> None:
    """Hand results of ``put_s3`` and ``delete_s3`` to whoever commits the session.

    From here on the transaction under way, or the next one, settles them as a
    `blob_transaction` does; COMMIT is refused if its statements did not do what they say.

    Args:
        session: any `AsyncSession`.
        results: not settled and not enlisted elsewhere.
        allow_unwritten: see `blob_transaction`.

    Raises:
        ResultSpentError: a result is settled, or somebody else's.
        UnsafeTransactionError: the transaction could not be judged afterwards.
    """
    plain = _plain(session)
    await plain.run_sync(_enlist, results, allow_unwritten)


def blob_report(session: AsyncSession | async_scoped_session[AsyncSession]) -> DeleteReport:
    """Return what the clean-up of the session's last transaction did; in background, so far."""
    keeper = keeper_of(_plain(session).sync_session)
    unit = keeper.last if keeper is not None else None
    return unit.report if unit is not None else DeleteReport()


def managing_keeper(session: Session) -> Keeper:
    """Return the keeper of any session; one that does not upload gets one for claims alone."""
    keeper = keeper_of(session)
    if keeper is None:
        listen(session)
        keeper = Keeper(session, {}, background=False, commit_seconds=60)
    return keeper


def _enlist(
    session: Session, results: tuple[PutS3Result | DeleteS3Result, ...], allow_unwritten: bool
) -> None:
    unit = managing_keeper(session).open_unit(session)
    unit.claim(session, results, allow_unwritten=allow_unwritten)


class _Uploading(AsyncSession):
    """What an equipped session class does besides."""

    _blob_settings: _Settings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "sync_session_class" in kwargs:
            kwargs["sync_session_class"] = _listening(kwargs["sync_session_class"])
        super().__init__(*args, **kwargs)
        settings = self._blob_settings
        Keeper(
            self.sync_session,
            settings.stores,
            background=settings.background,
            commit_seconds=settings.commit_seconds,
            journal=settings.journal,
        )

    async def commit(self) -> None:
        """Flush and commit; see `blob_sessionmaker` for what happens to the objects.

        Raises:
            TransactionAbortedError: the database had given the transaction up; rolled back.
            CommitOutcomeUnknown: the answer to COMMIT was lost; nothing was deleted.
        """
        await _commit(self, super().commit)

    async def rollback(self) -> None:
        """Roll back, although the caller is cancelled meanwhile."""
        await _end(self, super().rollback())

    async def close(self) -> None:
        """Close, although the caller is cancelled meanwhile."""
        await _end(self, super().close())

    async def reset(self) -> None:
        """Close the transaction, although the caller is cancelled meanwhile."""
        await _end(self, super().reset())

    async def invalidate(self) -> None:
        """Give the connections up, although the caller is cancelled meanwhile."""
        await _end(self, super().invalidate())

    async def run_sync(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a function with the plain `Session`."""
        _keeper(self).unknown = None
        try:
            return await super().run_sync(fn, *args, **kwargs)
        except BaseException as exc:
            await _end_failed_commit(self, exc)
            raise

    def begin(self) -> AsyncSessionTransaction:
        """Return a block that commits."""
        return _Transaction(self)

    async def __aexit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _maker_context_manager(self) -> Any:  # SQLAlchemy's own goes on in a task nobody awaits
        return _MakerBlock(self)


class _Transaction(AsyncSessionTransaction):
    """The block of ``session.begin()``."""

    __slots__ = ()

    async def commit(self) -> None:
        await _commit(self.session, super().commit)

    async def rollback(self) -> None:
        await _end(self.session, super().rollback())

    async def __aexit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        leave = functools.partial(super().__aexit__, type_, value, traceback)
        if type_ is None and self.is_active:
            try:
                await _flush(self.session)
            except BaseException as exc:  # the block rolls back, as with any error in it
                undo = super().__aexit__(type(exc), exc, exc.__traceback__)
                await _end(self.session, undo)
                raise
            await _send_commit(self.session, leave)
        else:
            await _end(self.session, leave())


class _MakerBlock:
    """The block of ``Session.begin()``: a session, and a transaction that commits."""

    def __init__(self, session: _Uploading) -> None:
        self._session = session
        self._transaction = session.begin()

    async def __aenter__(self) -> AsyncSession:
        await self._transaction.__aenter__()
        return self._session

    async def __aexit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._transaction.__aexit__(type_, value, traceback)
        finally:
            await self._session.close()


async def _commit(session: AsyncSession, send: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Flush, which may be cancelled, and then commit, which may not."""
    await _flush(session)
    await _send_commit(session, send)


async def _flush(session: AsyncSession) -> None:
    _keeper(session).unknown = None  # the last transaction's is not this one's
    await session.flush()


async def _send_commit(
    session: AsyncSession, send: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    keeper = _keeper(session)
    try:
        seconds = keeper.commit_seconds + keeper.settle_seconds
        await run_to_end(send(), seconds=seconds)
    except BaseException as exc:
        await _end_failed_commit(session, exc)
        raise
    finally:
        await _settle_leftovers(session, keeper)


async def _end_failed_commit(session: AsyncSession, error: BaseException) -> None:
    """End a transaction whose COMMIT failed or was refused, and say what became of it."""
    keeper = _keeper(session)
    unit = keeper.unit
    was_sent = unit is not None and unit.watch.facts.commit_sent
    was_refused = isinstance(error, (BlobNotWrittenError, BlobSharedError, TransactionAbortedError))
    if was_sent or was_refused:
        try:
            await session.rollback()
        except Exception:  # the connection must not be used again
            await session.invalidate()
    unknown = keeper.unknown
    if unknown is None:
        return
    if isinstance(error, CommitOutcomeUnknown):
        error.outcome = unknown.outcome
        return
    if isinstance(error, asyncio.CancelledError):
        raise error from unknown
    raise unknown from error


async def _end(session: AsyncSession, work: Coroutine[Any, Any, None]) -> None:
    """Run the end of a transaction to its own end."""
    keeper = _keeper(session)
    if keeper.unit is None and not session.in_transaction():
        await work  # there is no connection that it could wait for
        return
    try:
        await run_to_end(work, seconds=keeper.commit_seconds + keeper.settle_seconds)
    finally:
        await _settle_leftovers(session, keeper)


async def _settle_leftovers(session: AsyncSession, keeper: Keeper) -> None:
    if keeper.unit is not None and not session.in_transaction():
        await run_to_end(keeper.settle_leftovers(), seconds=keeper.settle_seconds)


# --- equipping -------------------------------------------------------------------------------

_classes: weakref.WeakKeyDictionary[type[Session], type[Session]] = weakref.WeakKeyDictionary()


def _equipped(class_: type[Any], settings: _Settings) -> type[Any]:
    if not isinstance(class_, type) or not issubclass(class_, AsyncSession):
        raise InvalidInputError(f"class_ is a subclass of AsyncSession, not {class_!r}")
    bases = (class_,) if issubclass(class_, _Uploading) else (_Uploading, class_)
    namespace = {
        "__doc__": class_.__doc__,
        "__module__": class_.__module__,
        "_blob_settings": settings,
        "sync_session_class": _listening(class_.sync_session_class),
    }
    return type(class_.__name__, bases, namespace)


def _listening(class_: Any) -> Any:
    """Return a subclass with our listeners, so that other sessions of that class have none.

    Of a `sessionmaker`, which also makes a plain `Session`, a copy that makes such ones.
    """
    if isinstance(class_, sessionmaker):
        made = copy.copy(class_)
        made.class_ = _listening(class_.class_)
        return made
    if not isinstance(class_, type) or not issubclass(class_, Session):
        raise InvalidInputError(f"sync_session_class is a subclass of Session, not {class_!r}")
    if class_ in _classes.values():
        return class_
    if class_ not in _classes:
        subclass = type(class_.__name__, (class_,), {"__module__": class_.__module__})
        listen(subclass)
        event.listen(subclass, "do_orm_execute", on_orm_execute)
        _classes[class_] = subclass
    return _classes[class_]


def _equip_factory(factory: Any, settings: _Settings) -> None:
    if not isinstance(factory, async_sessionmaker):
        raise InvalidInputError(f"not an async_sessionmaker: {factory!r}")
    factory.class_ = _equipped(factory.class_, settings)
    if "sync_session_class" in factory.kw:
        factory.configure(sync_session_class=_listening(factory.kw["sync_session_class"]))


def _settings(
    store: Store | None,
    stores: Mapping[str, Store] | None,
    journal: Journal | None,
    *,
    background: bool,
    commit_seconds: float,
) -> _Settings:
    named = dict(stores or {})
    if journal is not None and not isinstance(journal, Journal):
        raise InvalidInputError(f"journal is a Journal, not {journal!r}")
    if journal is not None and store is None and not named:
        named = dict(journal.stores)
    if store is not None:
        if DEFAULT_STORE in named:
            raise InvalidInputError("give the default store once: store, or stores['default']")
        named[DEFAULT_STORE] = store
    if not named:
        raise InvalidInputError("which store? blob_sessionmaker(engine, store)")
    for name, each in named.items():
        if not hasattr(each, "delete_many"):
            raise InvalidInputError(f"store {name!r} is not a store: {each!r}")
    if commit_seconds <= 0:
        raise InvalidInputError("commit_seconds is positive")
    return _Settings(named, journal, background, commit_seconds)


def _plain(session: AsyncSession | async_scoped_session[AsyncSession]) -> AsyncSession:
    if isinstance(session, async_scoped_session):
        return session()
    if not isinstance(session, AsyncSession):
        raise InvalidInputError(f"an AsyncSession is needed, not {type(session).__name__}")
    return session


def _keeper(session: AsyncSession) -> Keeper:
    keeper = keeper_of(session.sync_session)
    if keeper is None:
        raise UnsafeTransactionError(_UNTRACKED)
    return keeper


__all__ = ["blob_report", "blob_sessionmaker", "enlist", "track_blobs", "upload_blobs"]
