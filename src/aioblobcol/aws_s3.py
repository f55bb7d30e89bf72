"""The explicit strength: awaited counterparts of sqlalchemy_mate's ``aws_s3`` module.

``put_s3`` uploads the columns of a row at once and returns what to write into the row; the
result's clean-up coroutines delete in parallel what must go. `aioblobcol.blob_transaction`
does the commit and the clean-up together and is what you want in a handler. Names and
arguments are those of ``sqlalchemy_mate.patterns.large_binary_column.aws_s3``.

Invariants: every attempt makes a fresh key, so no clean-up can meet another request's object;
a result is settled once, in one direction; the caller's arguments are never changed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import re
import warnings
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, NoReturn

from sqlalchemy import ColumnElement, Table, and_, true

from ._journal import LEFT_TO_WORKER, Journal, JournalWriter, Staging, undo
from ._sources import (
    HASH_INLINE_BYTES,
    PART_BYTES,
    BlobSource,
    Buffer,
    OnProgress,
    Payload,
    check_source,
    read_payloads,
)
from ._store._base import (
    DeleteReport,
    ObjectInfo,
    PutRequest,
    Store,
    WriteRequest,
    owned_uris,
)
from ._store._metadata import encode_metadata
from ._store._s3 import S3Store, drain
from ._streams import Fingerprint, fingerprint, open_source
from ._transfer import Attempt, LargeRequest, Request, Upload, delete_all, head_all, in_memory
from ._uri import (
    PrimaryKey,
    UploadedUri,
    attempt_key,
    b64decode_str,
    b64encode_str,
    content_key,
    encode_column,
    encode_pk,
    get_md5,
    get_s3_key,
    get_sha256,
    is_one_attempt,
    join_s3_uri,
    normalize_s3_prefix,
    split_s3_uri,
)
from .errors import (
    BlobNotFoundError,
    InvalidColumnError,
    InvalidInputError,
    InvalidPutArgumentsError,
    InvalidSourceError,
    NaiveDatetimeError,
    ResultSpentError,
)

__all__ = [
    "DeleteReport",
    "DeleteS3Result",
    "PutS3ApiCall",
    "PutS3BackedColumnResult",
    "PutS3Result",
    "b64decode_str",
    "b64encode_str",
    "batch_delete_s3_objects",
    "clean_up_created_s3_object_when_create_or_update_row_failed",
    "clean_up_old_s3_object_when_update_row_succeeded",
    "delete_s3",
    "drain",
    "encode_pk",
    "get_md5",
    "get_s3_key",
    "get_sha256",
    "guard",
    "is_s3_object_exists",
    "join_s3_uri",
    "normalize_s3_prefix",
    "put_s3",
    "put_s3backed_column",
    "split_s3_uri",
]

logger = logging.getLogger("aioblobcol.journal")

NOT_ADOPTED = (
    "no committed row has adopted it: the worker deletes it when its lease is over. Was the "
    "transaction committed, and is the column named in Journal(..., uri_columns=[...])?"
)

OnAttempt = Callable[[Sequence["PutS3BackedColumnResult"]], None]


@dataclasses.dataclass(frozen=True, slots=True)
class PutS3ApiCall:
    """One column to be uploaded.

    Attributes:
        column: the column's name.
        binary: bytes, bytearray, memoryview, the `pathlib.Path` of a file, a file that is open in
            binary mode, an async iterator of bytes, an object with an async ``read``
            (``UploadFile``, aiohttp's streams), or a response of httpx or aiohttp. More than
            8 MiB are uploaded part by part. The key of a stream has no ``md5=`` segment.
        old_s3_uri: what the row holds now: None for a new row, and whatever the column held
            (also None) for an update. It is deleted after the commit.
        extra_put_object_kwargs: passed to ``put_object``, such as ``ContentType``; a
            ``Metadata`` among them is merged with the library's. Never changed.
        on_progress: told of what was sent.
    """

    column: str
    binary: BlobSource = dataclasses.field(repr=False)
    old_s3_uri: str | None
    extra_put_object_kwargs: Mapping[str, Any] | None = None
    on_progress: OnProgress | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class PutS3BackedColumnResult:
    """What became of one column.

    Attributes:
        column: the column's name.
        old_s3_uri: what the row held before the upload.
        new_s3_uri: what the row must hold now.
        executed: False if ``skip_unchanged`` found the same bytes in place; then
            ``new_s3_uri`` is ``old_s3_uri``.
    """

    column: str
    old_s3_uri: str | None
    new_s3_uri: str
    executed: bool


class _Life:
    """Whether a result may still be used; shared by the frozen result, mutable itself."""

    def __init__(self, uris: Sequence[str], *, must_be_settled: bool) -> None:
        self.uris = tuple(uris)
        self.must_be_settled = must_be_settled
        self.settled: str | None = None
        self.owner: object = None

    def check_open(self, what: str) -> None:
        if self.settled is not None:
            raise ResultSpentError(
                f"{what}: this result was settled already ({self.settled}) and cannot be used "
                "again; upload again, every attempt gets keys of its own"
            )

    def settle(self, direction: str) -> None:
        """Settle by hand in one *direction*; the same one again repeats the deletes."""
        if self.owner is not None:
            raise ResultSpentError("this result belongs to a blob_transaction(), which settles it")
        if self.settled != direction:
            self.check_open(direction)
        self.settled = direction

    def take(self, owner: object) -> None:
        """Let a `blob_transaction` settle it."""
        self.check_open("blob_transaction()")
        if self.owner is not None and self.owner is not owner:
            raise ResultSpentError("this result belongs to another blob_transaction() already")
        self.owner = owner

    def __del__(self) -> None:
        if self.settled is None and self.must_be_settled and self.uris:
            warnings.warn(
                "a put_s3() result was dropped unsettled; unless a committed row names them, "
                f"these are orphans: {', '.join(self.uris)}",
                ResourceWarning,
                stacklevel=2,
            )


@dataclasses.dataclass(frozen=True, slots=True)
class PutS3Result:
    """What ``put_s3`` uploaded: write ``to_values()`` into the row, then commit and clean up.

    Attributes:
        put_s3backed_column_results: one for each column, in the order of the calls.
    """

    put_s3backed_column_results: tuple[PutS3BackedColumnResult, ...]
    _store: Store = dataclasses.field(repr=False, compare=False)
    _attempts: tuple[Attempt, ...] = dataclasses.field(repr=False, compare=False)
    _life: _Life = dataclasses.field(repr=False, compare=False)
    _writer: JournalWriter | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def changed(self) -> bool:
        """Whether any column was uploaded."""
        return any(result.executed for result in self.put_s3backed_column_results)

    def to_values(self) -> dict[str, str]:
        """Return column name to new URI, for ``Model(**values)`` or ``update().values(**values)``.

        Unchanged columns are left out: writing an old URI back could name an object that
        another transaction has just replaced and deleted.

        Raises:
            ResultSpentError: its transaction ended.
        """
        self._life.check_open("to_values()")
        if not any(result.old_s3_uri for result in self._executed()):
            # a create that succeeds calls nothing more in the hand-written form
            self._life.must_be_settled = False
        check = functools.partial(self._life.check_open, "to_values()")
        return {result.column: UploadedUri(result.new_s3_uri, check) for result in self._executed()}

    def guard(self, entity: Any) -> ColumnElement[bool]:
        """Return the condition that the row still holds the old URIs, for UPDATE's WHERE.

        Args:
            entity: the mapped class or `Table`.
        """
        return guard(
            entity,
            **{result.column: result.old_s3_uri for result in self.put_s3backed_column_results},
        )

    async def clean_up_created_s3_object_when_create_or_update_row_failed(self) -> DeleteReport:
        """Delete the new objects, because the row was certainly not written.

        Safe to call again to repeat what failed. Never raises for storage trouble.

        Raises:
            ResultSpentError: the row was written, as the other clean-up was told.
            asyncio.CancelledError: after the deletes were carried out.
        """
        self._life.settle("the row was not written")
        return await undo(self._attempts, self._writer)

    async def clean_up_old_s3_object_when_update_row_succeeded(self) -> DeleteReport:
        """Delete the replaced objects, because the transaction was certainly committed.

        With a journal they are its worker's, after the retention. A new object that the journal
        lists still as staged stands in ``failed`` then: the row was not committed, or its column
        is none of the journal's, and the worker would delete it when its lease is over.

        Safe to call again to repeat what failed. Never raises for storage trouble, and never
        touches the new objects.

        Raises:
            ResultSpentError: the row was not written, as the other clean-up was told.
            asyncio.CancelledError: after the deletes were carried out.
        """
        self._life.settle("the row was written")
        kept: dict[str, str] = {}
        old: list[str] = []
        for result, attempt in zip(self._executed(), self._attempts, strict=True):
            if result.old_s3_uri is None:
                continue
            reason = why_kept(result.old_s3_uri, attempt.uri)
            if self._writer is not None and self._writer.looks_after(result.old_s3_uri):
                reason = LEFT_TO_WORKER
            if reason is None:
                old.append(result.old_s3_uri)
            else:
                kept[result.old_s3_uri] = reason
        report = await delete_all(self._store, old)
        failed = await self._unadopted()
        return report.merged_with(DeleteReport(kept=kept, failed=failed))

    async def _unadopted(self) -> dict[str, str]:
        """Return the new objects that the row should name by now, and has not adopted."""
        if self._writer is None or self._writer.is_volatile:
            return {}
        left = await self._writer.unadopted([attempt.uri for attempt in self._attempts])
        for uri in left:
            logger.error("%s: %s", uri, NOT_ADOPTED, extra={"uri": uri})
        return dict.fromkeys(left, NOT_ADOPTED)

    def _executed(self) -> list[PutS3BackedColumnResult]:
        return [result for result in self.put_s3backed_column_results if result.executed]


@dataclasses.dataclass(frozen=True, slots=True)
class DeleteS3Result:
    """Objects whose row is about to be deleted (or their column emptied), made by ``delete_s3``."""

    s3_uris: tuple[str, ...]
    _store: Store = dataclasses.field(repr=False, compare=False)
    _life: _Life = dataclasses.field(repr=False, compare=False)

    async def clean_up_s3_objects_when_delete_row_succeeded(self) -> DeleteReport:
        """Delete the objects, because the transaction was certainly committed.

        Safe to call again to repeat what failed. Never raises for storage trouble.

        Raises:
            ResultSpentError: its transaction ended without deleting the row.
            asyncio.CancelledError: after the deletes were carried out.
        """
        self._life.settle("the row was deleted")
        kept = {uri: why for uri in self.s3_uris if (why := why_kept(uri, None)) is not None}
        report = await delete_all(self._store, [uri for uri in self.s3_uris if uri not in kept])
        return report.merged_with(DeleteReport(kept=kept))

    def __await__(self) -> Generator[Any, None, NoReturn]:
        raise TypeError(
            "delete_s3() does no I/O and is not awaited: delete the row, commit, then "
            "`await result.clean_up_s3_objects_when_delete_row_succeeded()`, or hand the result "
            "to blob_transaction()"
        )
        yield  # makes this a generator function, as __await__ must be


async def put_s3(
    api_calls: Sequence[PutS3ApiCall],
    s3_client: Any = None,
    pk: PrimaryKey | None = None,
    bucket: str | None = None,
    prefix: str | None = None,
    update_at: datetime | None = None,
    is_pk_url_safe: bool = False,
    *,
    store: Store | None = None,
    skip_unchanged: bool = False,
    journal: Journal | None = None,
) -> PutS3Result:
    """Upload the binary columns of one row, all at once, one PUT each if they are not large.

    Nothing is written to the database here. If one upload fails, or the caller is cancelled,
    everything that was attempted is deleted again before the error arrives.

    Args:
        api_calls: the columns.
        s3_client: any aiobotocore S3 client; give ``bucket`` and ``prefix`` with it.
        pk: the row's primary key; several parts as a tuple.
        bucket: with ``s3_client``.
        prefix: with ``s3_client``; slashes at its ends are ignored.
        update_at: aware; goes into the objects' metadata. By default now, in UTC.
        is_pk_url_safe: take the key's parts as they are instead of base64.
        store: in place of client, bucket and prefix; see `aioblobcol.open_store`.
        skip_unchanged: compare length and SHA-256 with the old object's (one HEAD) and leave
            equal columns alone; streams are uploaded all the same. For updates guarded with
            ``WHERE column = old URI`` only.
        journal: stage the objects there before they can exist; it needs an ``engine`` of its own.
            The columns have to be among its ``uri_columns``. That the row has adopted them is
            checked before COMMIT if the result goes into `blob_transaction` or `enlist`.

    Returns:
        The result to write, commit and settle; or let `aioblobcol.blob_transaction` do it.

    Raises:
        InvalidInputError: refused before anything was sent; the subclass tells what.
        StoreClosedError: the store or the client is not open.
        BlobUploadError: with column, URI and cause; nothing was kept.
        JournalError: the journal could not be written; nothing was sent.
        asyncio.CancelledError: nothing was kept.
    """
    writer = None if journal is None else journal.writer()
    return await put_row(
        store=_chosen_store(store, s3_client, bucket, prefix),
        api_calls=api_calls,
        pk=pk,
        update_at=update_at,
        is_pk_url_safe=is_pk_url_safe,
        skip_unchanged=skip_unchanged,
        writer=writer,
        upload=functools.partial(_upload_alone, writer),
    )


async def _upload_alone(writer: JournalWriter | None, uploads: Sequence[Upload]) -> list[Attempt]:
    """Upload outside of any session; what was staged for nothing is condemned."""
    staging = Staging(writer)
    staging.begin(None, [upload.uri for upload in uploads])
    try:
        return await staging.upload(uploads)
    except BaseException:
        if writer is not None and staging.is_begun:
            attempts = [
                Attempt(each.store, each.column, each.uri, may_land_late=True) for each in uploads
            ]
            await undo(attempts, writer)
        raise


async def put_row(
    *,
    store: Store,
    api_calls: Sequence[PutS3ApiCall],
    pk: PrimaryKey | None,
    update_at: datetime | None,
    is_pk_url_safe: bool,
    skip_unchanged: bool,
    writer: JournalWriter | None,
    upload: Callable[[Sequence[Upload]], Awaitable[list[Attempt]]],
    on_attempt: OnAttempt | None = None,
) -> PutS3Result:
    """Do what `put_s3` does with *upload*; *on_attempt* hears of every URI before that."""
    if pk is None:
        raise InvalidInputError("put_s3() needs the row's primary key: pk=...")
    encoded_pk = encode_pk(pk, is_pk_url_safe)
    metadata = {"update_at": _aware(update_at).isoformat()}
    _check_calls(api_calls)
    if writer is not None:
        writer.journal.check_names(call.column for call in api_calls)
    store.runtime  # noqa: B018 - raises when closed, before files are read
    known = await _known_bytes(api_calls)
    planned = [
        _plan(store, call, each, encoded_pk, metadata)
        for call, each in zip(api_calls, known, strict=True)
    ]
    for each in planned:
        store.check_put(each.request)
    old = [call.old_s3_uri for call in api_calls if call.old_s3_uri] if skip_unchanged else []
    found = await head_all(store, old)
    results: list[PutS3BackedColumnResult] = []
    uploads: list[Upload] = []
    for call, plan in zip(api_calls, planned, strict=True):
        in_place = found.get(call.old_s3_uri or "")
        if in_place is not None and plan.is_same_as(in_place):
            uri, executed = in_place.uri, False
        else:
            uploads.append(plan.upload())
            uri, executed = plan.uri, True
        results.append(PutS3BackedColumnResult(call.column, call.old_s3_uri, uri, executed))
    if on_attempt is not None:
        on_attempt([result for result in results if result.executed])
    attempts = await upload(uploads)
    life = _Life(
        [each.uri for each in uploads], must_be_settled=writer is None
    )  # or the journal's worker removes what is left
    return PutS3Result(tuple(results), store, tuple(attempts), life, writer)


async def put_s3backed_column(
    column: str,
    binary: BlobSource,
    old_s3_uri: str | None,
    s3_client: Any = None,
    pk: PrimaryKey | None = None,
    bucket: str | None = None,
    prefix: str | None = None,
    update_at: datetime | None = None,
    is_pk_url_safe: bool = False,
    extra_put_object_kwargs: Mapping[str, Any] | None = None,
    *,
    store: Store | None = None,
) -> PutS3BackedColumnResult:
    """Upload one column; the arguments and errors are those of `put_s3` and `PutS3ApiCall`.

    The low-level form: the caller alone settles it, with the two module-level clean-ups.
    """
    result = await put_s3(
        [PutS3ApiCall(column, binary, old_s3_uri, extra_put_object_kwargs)],
        s3_client=s3_client,
        pk=pk,
        bucket=bucket,
        prefix=prefix,
        update_at=update_at,
        is_pk_url_safe=is_pk_url_safe,
        store=store,
    )
    result._life.must_be_settled = False  # the plain record is the caller's now
    return result.put_s3backed_column_results[0]


async def clean_up_created_s3_object_when_create_or_update_row_failed(
    s3_client: Any = None,
    new_s3_uri: str = "",
    executed: bool = True,
    *,
    store: Store | None = None,
) -> DeleteReport:
    """Delete one new object, because the row was certainly not written.

    Args:
        s3_client: any aiobotocore S3 client, or give ``store``.
        new_s3_uri: as in `PutS3BackedColumnResult`.
        executed: nothing is done if False.
        store: refuses a URI outside its prefix.
    """
    return await _delete_single(s3_client, new_s3_uri if executed else None, store)


async def clean_up_old_s3_object_when_update_row_succeeded(
    s3_client: Any = None,
    old_s3_uri: str | None = None,
    executed: bool = True,
    *,
    store: Store | None = None,
) -> DeleteReport:
    """Delete one replaced object, because the transaction was certainly committed.

    Args:
        s3_client: any aiobotocore S3 client, or give ``store``.
        old_s3_uri: as in `PutS3BackedColumnResult`; None does nothing.
        executed: nothing is done if False.
        store: refuses a URI outside its prefix.
    """
    return await _delete_single(s3_client, old_s3_uri if executed else None, store)


def delete_s3(
    s3_uris: Sequence[str | None],
    s3_client: Any = None,
    bucket: str | None = None,
    prefix: str | None = None,
    *,
    store: Store | None = None,
) -> DeleteS3Result:
    """Note the objects of a row that is about to be deleted. Does no I/O, is not awaited.

    Args:
        s3_uris: the row's URIs; None (an empty column) is skipped.
        s3_client: any aiobotocore S3 client; give ``bucket`` and ``prefix`` with it.
        bucket: with ``s3_client``.
        prefix: with ``s3_client``.
        store: in place of client, bucket and prefix.

    Raises:
        InvalidS3UriError: not an S3 URI.
        ForeignUriError: a URI lies outside of bucket and prefix.
    """
    chosen = _chosen_store(store, s3_client, bucket, prefix)
    if isinstance(s3_uris, str):
        raise InvalidInputError("s3_uris is a list of URIs, not one string")
    uris = [uri for uri in s3_uris if uri is not None]
    for uri in uris:
        split_s3_uri(uri)
    return DeleteS3Result(
        s3_uris=tuple(owned_uris(chosen, uris)),
        _store=chosen,
        _life=_Life(uris, must_be_settled=False),
    )


def guard(entity: Any, **old_s3_uris: str | None) -> ColumnElement[bool]:
    """Return the condition that a row still holds these URIs, for the WHERE of UPDATE and DELETE.

    With it a concurrent replace makes the statement match nothing, `blob_transaction` refuses
    to commit (`BlobNotWrittenError`), and no object is lost or orphaned.

    Args:
        entity: the mapped class or `Table`.
        old_s3_uris: column name to the URI that was read, or None.

    Raises:
        InvalidColumnError: the entity has no such column.
    """
    columns = entity.c if isinstance(entity, Table) else entity
    conditions: list[ColumnElement[bool]] = []
    for name, uri in old_s3_uris.items():
        column = columns.get(name) if isinstance(entity, Table) else getattr(columns, name, None)
        if column is None:
            raise InvalidColumnError(f"{entity!r} has no column {name!r}")
        conditions.append(column.is_not_distinct_from(uri))
    return and_(true(), *conditions)


async def is_s3_object_exists(s3_client: Any, bucket: str, key: str) -> bool:
    """Tell whether an object exists (one HEAD).

    Raises:
        StoreAccessError: without s3:ListBucket, AWS answers 403 for an object that is missing.
        StoreError: the server did not say.
    """
    store = S3Store.borrow(s3_client, bucket=bucket, prefix="")
    try:
        await store.head(join_s3_uri(bucket, key))
    except BlobNotFoundError:
        return False
    return True


async def batch_delete_s3_objects(s3_client: Any, s3_uri_list: Sequence[str]) -> DeleteReport:
    """Delete objects of any buckets, 1,000 per request, in parallel.

    Returns:
        What was deleted and what was not; never raises for storage trouble.

    Raises:
        InvalidS3UriError: before anything is sent.
    """
    buckets: dict[str, list[str]] = {}
    for uri in s3_uri_list:
        buckets.setdefault(split_s3_uri(uri)[0], []).append(uri)
    reports = await asyncio.gather(
        *(
            delete_all(S3Store.borrow(s3_client, bucket=bucket, prefix=""), uris)
            for bucket, uris in buckets.items()
        )
    )
    return functools.reduce(DeleteReport.merged_with, reports, DeleteReport())


def why_kept(old_s3_uri: str, new_s3_uri: str | None) -> str | None:
    """Say why an object that no row names any more is not deleted, or None if it is.

    A key without an id of its own is sqlalchemy_mate's: shared by nature, so it goes only when
    this very primary key and column supersedes it.
    """
    if is_one_attempt(old_s3_uri):
        return None
    content_of_new = (new_s3_uri or "").rsplit("/md5=", 1)[0]
    if new_s3_uri and re.fullmatch(rf"{re.escape(content_of_new)}/md5=[0-9a-f]{{32}}", old_s3_uri):
        return None
    return "not made for this primary key and column, so it may be shared"


def _chosen_store(
    store: Store | None, s3_client: Any, bucket: str | None, prefix: str | None
) -> Store:
    if store is not None:
        if s3_client is not None or bucket is not None or prefix is not None:
            raise InvalidInputError("give either store, or s3_client with bucket and prefix")
        return store
    if s3_client is None or bucket is None or prefix is None:
        raise InvalidInputError("give store, or s3_client with bucket and prefix")
    if not hasattr(getattr(s3_client, "meta", None), "events"):
        raise InvalidInputError(
            f"s3_client is an aiobotocore S3 client, not {type(s3_client).__name__}"
        )
    return S3Store.borrow(s3_client, bucket=bucket, prefix=prefix)


def _check_calls(api_calls: Sequence[PutS3ApiCall]) -> None:
    seen: set[str] = set()
    for call in api_calls:
        encode_column(call.column)
        if call.column in seen:
            raise InvalidColumnError(f"column {call.column!r} is given twice")
        seen.add(call.column)
        if call.old_s3_uri is not None:
            split_s3_uri(call.old_s3_uri)
        check_source(call.binary, column=call.column)
        extra = call.extra_put_object_kwargs
        if extra is not None and not isinstance(extra, Mapping):
            raise InvalidPutArgumentsError(f"column {call.column!r}: extra arguments are a dict")
        metadata = (extra or {}).get("Metadata")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise InvalidPutArgumentsError(f"column {call.column!r}: Metadata is a dict")


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """One column on its way: what is known of its bytes before they are sent."""

    store: Store
    call: PutS3ApiCall
    metadata: Mapping[str, str]
    known: Payload | Fingerprint | None
    request: PutRequest

    @property
    def uri(self) -> str:
        """The new object."""
        return self.request.uri

    def is_same_as(self, info: ObjectInfo) -> bool:
        """Tell whether an object has the same bytes."""
        known = self.known
        return (
            known is not None
            and info.size == known.size
            and info.metadata.get("sha256") == known.sha256
        )

    def upload(self) -> Upload:
        """Return the act."""
        size = None if self.known is None else self.known.size
        return Upload(
            self.store,
            self.call.column,
            self.uri,
            self._prepare,
            size=in_memory(self.store, size),
            waits=not isinstance(self.known, Payload),
            on_progress=self.call.on_progress,
        )

    async def _prepare(self) -> Request:
        request = self.request
        if isinstance(self.known, Payload):
            return request
        is_file = isinstance(self.call.binary, Path)  # which may be written to meanwhile
        opened = await open_source(self.call.column, self.call.binary, with_sha256=is_file)
        if isinstance(opened, Payload):
            self._check_unchanged(opened.sha256)
            metadata = encode_metadata({**self.metadata, "sha256": opened.sha256})
            return dataclasses.replace(request, payload=opened, metadata=metadata)
        opened.on_end = self._check_unchanged if is_file else None
        return LargeRequest(
            WriteRequest(
                request.column, request.uri, request.metadata, request.arguments, opened.promised
            ),
            opened,
        )

    def _check_unchanged(self, sha256: str | None) -> None:
        """Refuse a file that was written to since its key was made of it."""
        if self.known is not None and self.known.sha256 != sha256:
            raise InvalidSourceError(
                f"column {self.call.column!r}: {self.call.binary!r} was changed while it was sent"
            )


_NO_PAYLOAD: Final = Payload(body=b"", md5=None, sha256="", crc32=0)


def _plan(
    store: Store,
    call: PutS3ApiCall,
    known: Payload | Fingerprint | None,
    encoded_pk: str,
    metadata: Mapping[str, str],
) -> _Plan:
    content = content_key(
        prefix=store.prefix,
        encoded_pk=encoded_pk,
        column=call.column,
        md5=None if known is None else known.md5,
    )
    extra = dict(call.extra_put_object_kwargs or {})
    merged = {**metadata, **(extra.pop("Metadata", None) or {})}
    request = PutRequest(
        column=call.column,
        uri=join_s3_uri(store.bucket, attempt_key(content)),
        payload=known if isinstance(known, Payload) else _NO_PAYLOAD,
        metadata=encode_metadata(merged if known is None else {**merged, "sha256": known.sha256}),
        arguments=extra,
    )
    if isinstance(known, Payload) and known.size > PART_BYTES:
        call = dataclasses.replace(call, binary=known.body)  # a copy, of what is mutable
        known = Fingerprint(known.size, known.md5, known.sha256)
    return _Plan(store, call, merged, known, request)


async def _known_bytes(
    calls: Sequence[PutS3ApiCall],
) -> list[Payload | Fingerprint | None]:
    """Return what is small as bytes, hashes of large files, None of a stream."""
    known: dict[int, Payload | Fingerprint] = {}
    small: dict[int, tuple[str, Buffer | Path]] = {}
    for place, call in enumerate(calls):
        source = call.binary
        if isinstance(source, Path):
            size = check_source(source, column=call.column)
            if size is not None and size > HASH_INLINE_BYTES:
                known[place] = await fingerprint(call.column, source)
                continue
        if isinstance(source, (bytes, bytearray, memoryview, Path)):
            small[place] = (call.column, source)
    known.update(zip(small, await read_payloads(list(small.values())), strict=True))
    return [known.get(place) for place in range(len(calls))]


def _aware(update_at: datetime | None) -> datetime:
    if update_at is None:
        return datetime.now(timezone.utc)
    if not isinstance(update_at, datetime):
        raise NaiveDatetimeError(f"update_at is a datetime, not {type(update_at).__name__}")
    if update_at.tzinfo is None or update_at.utcoffset() is None:
        raise NaiveDatetimeError("update_at has no time zone: use datetime.now(timezone.utc)")
    return update_at


async def _delete_single(s3_client: Any, uri: str | None, store: Store | None) -> DeleteReport:
    if uri is None:
        return DeleteReport()
    bucket, _ = split_s3_uri(uri)
    if store is None:
        store = _chosen_store(None, s3_client, bucket, "")
    return await delete_all(store, owned_uris(store, [uri]))
