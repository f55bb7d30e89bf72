"""The errors of aioblobcol, one tree, and the three outcomes of a transaction.

AioBlobColError
├── InvalidInputError (ValueError)     refused before the first byte was sent
│   ├── InvalidS3UriError              not an s3://bucket/key
│   ├── ForeignUriError                not under this store's bucket and prefix
│   ├── InvalidBucketError, InvalidPrefixError, InvalidPrimaryKeyError, InvalidColumnError
│   ├── InvalidSourceError (TypeError) not something that can be uploaded
│   │   ├── BlobTooLargeError          more bytes than the column takes
│   │   └── SizeMismatchError          another number of bytes than was declared
│   ├── ContentTypeRefusedError        a content type that the column does not accept
│   ├── NaiveDatetimeError             a datetime without a time zone
│   └── InvalidPutArgumentsError       what put_object does not take, or what the library owns
├── StoreError                         S3 refused or failed one request
│   ├── BlobNotFoundError
│   ├── BlobChangedError               the object is not the version that was asked for
│   ├── BlobCorruptedError             the bytes that came are not those that were stored
│   ├── StoreAccessError
│   └── StoreUnavailableError          no definite answer: it may have taken effect
├── StoreClosedError (RuntimeError)
├── BlobNotUploadedError (RuntimeError) a pending blob where a stored one is needed
├── BlobUnboundError (RuntimeError)    a stored blob that does not know its store
├── BlobUploadError                    one of several uploads failed, all were undone
├── CleanUpError                       from ``raise_for_failures()`` only
├── OwnershipError                     a prefix that another database owns, or may own
├── ResultSpentError (RuntimeError)    a result was used after it was settled
├── JournalError (RuntimeError)        the journal could not be written; nothing was uploaded
└── TransactionError
    ├── UnsafeTransactionError         refused: the library could not judge how it ends
    ├── TransactionAbortedError        the database had already given the transaction up
    ├── BlobNotWrittenError            refused to commit: an upload went into no row
    ├── BlobSharedError                refused to commit: one upload went into several rows
    └── CommitOutcomeUnknown           COMMIT was sent, no answer came; nothing was deleted
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class Outcome(enum.Enum):
    """What is certain about a transaction that ended."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    UNKNOWN = "unknown"


class AioBlobColError(Exception):
    """Base of every error that the library raises on purpose."""


# --- Bad input: nothing was sent, nothing has to be undone -------------------------------


class InvalidInputError(AioBlobColError, ValueError):
    """An argument was refused before the first byte was sent."""


class InvalidS3UriError(InvalidInputError):
    """Not of the form ``s3://bucket/key``."""


class ForeignUriError(InvalidInputError):
    """A URI that does not lie under this store's own bucket and prefix."""


class InvalidBucketError(InvalidInputError):
    """Not a usable bucket name."""


class InvalidPrefixError(InvalidInputError):
    """Not a usable key prefix."""


class InvalidPrimaryKeyError(InvalidInputError):
    """A primary key that cannot be written into an object's key."""


class InvalidColumnError(InvalidInputError):
    """A column name that is unusable, unknown or given twice."""


class InvalidSourceError(InvalidInputError, TypeError):
    """Not something whose bytes can be uploaded."""


class BlobTooLargeError(InvalidSourceError):
    """More bytes than the column's ``max_bytes``; nothing was kept.

    Raised before anything is sent, if the size is known by then. Of an upload that has to be
    read to know it, it is the ``__cause__`` of a `BlobUploadError`.
    """


class SizeMismatchError(InvalidSourceError):
    """The source has another number of bytes than it was declared to have; nothing was kept."""


class ContentTypeRefusedError(InvalidInputError):
    """A content type that the column's ``accept`` does not name; nothing was kept."""


class NaiveDatetimeError(InvalidInputError):
    """A datetime without a time zone where an aware one is needed."""


class InvalidPutArgumentsError(InvalidInputError):
    """An extra argument that ``put_object`` does not take, or that the library owns."""


# --- The object store --------------------------------------------------------------------


class StoreError(AioBlobColError):
    """S3 refused or failed a request about one object.

    Attributes:
        operation: what was asked for, such as ``put``.
        uri: the object.
        code: S3's own error code, or the name of the client's error.
        may_have_taken_effect: True when the server may still carry the request out.
    """

    advice = "The code names the cause."
    may_have_taken_effect = False

    def __init__(self, operation: str, uri: str, code: str) -> None:
        super().__init__(operation, uri, code)  # whole args, so that the error pickles
        self.operation, self.uri, self.code = operation, uri, code

    def __str__(self) -> str:
        return f"cannot {self.operation} {self.uri}: {self.code}. {self.advice}"


class BlobNotFoundError(StoreError):
    """The object, or its bucket, is not there."""

    advice = "Read the row again, it may have been replaced; check that the bucket exists."


class BlobChangedError(StoreError):
    """The object is not the version that was asked for: somebody has overwritten it."""

    advice = "Keys of this library are never written twice: who else writes under this prefix?"


class BlobCorruptedError(StoreError):
    """The bytes that came are not those that were stored; what was read is not to be used."""

    advice = "Read it again. If it stays so the object is damaged: restore it from a backup."


class StoreAccessError(StoreError):
    """The credentials do not permit this request."""

    advice = "The credentials need s3:PutObject, s3:GetObject and s3:DeleteObject under the prefix."


class StoreUnavailableError(StoreError):
    """No definite answer: the request may or may not have taken effect."""

    advice = "The server did not give a definite answer; the request may be repeated."
    may_have_taken_effect = True


class StoreClosedError(AioBlobColError, RuntimeError):
    """The store, or the client behind it, is not open."""


class BlobNotUploadedError(AioBlobColError, RuntimeError):
    """A `Blob` without an object, where one is needed; nothing was sent to the database."""


class BlobUnboundError(AioBlobColError, RuntimeError):
    """A stored `Blob` that does not know its store; nothing was sent."""


class BlobUploadError(AioBlobColError):
    """One of several uploads failed; those that may have been stored were deleted again.

    Attributes:
        column: the column whose upload failed.
        uri: the key that it was to get. No row names it.
        reason: what went wrong; the error itself is ``__cause__``.
        not_deleted: URIs that were uploaded and could not be deleted (orphans), with the reason.
    """

    def __init__(
        self, column: str, uri: str, reason: str, not_deleted: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(column, uri, reason, dict(not_deleted or {}))
        self.column, self.uri, self.reason = column, uri, reason
        self.not_deleted: dict[str, str] = dict(not_deleted or {})

    def __str__(self) -> str:
        left = (
            f"These could not be deleted and are orphans now: {_listed(self.not_deleted)}."
            if self.not_deleted
            else "Whatever had been uploaded with it was deleted again."
        )
        return f"column {self.column!r} was not uploaded to {self.uri}: {self.reason} {left}"


class CleanUpError(AioBlobColError):
    """Some objects could not be deleted; raised by ``DeleteReport.raise_for_failures()`` only.

    Attributes:
        failed: URI to reason. These objects are orphans until somebody deletes them.
    """

    def __init__(self, failed: Mapping[str, str]) -> None:
        super().__init__(dict(failed))
        self.failed: dict[str, str] = dict(failed)

    def __str__(self) -> str:
        reasons = "; ".join(f"{uri} ({reason})" for uri, reason in self.failed.items())
        return (
            f"{len(self.failed)} object(s) could not be deleted and are orphans now; call the "
            f"clean-up again, or delete them yourself: {reasons}"
        )


class OwnershipError(AioBlobColError):
    """A prefix was not claimed, for another database owns it, or may own it.

    Attributes:
        root: what every URI under the prefix starts with.
    """

    def __init__(self, root: str, explanation: str) -> None:
        super().__init__(root, explanation)
        self.root, self.explanation = root, explanation

    def __str__(self) -> str:
        return f"{self.root} {self.explanation}"


class ResultSpentError(AioBlobColError, RuntimeError):
    """A result was used again after its transaction ended. Upload again instead."""


class JournalError(AioBlobColError, RuntimeError):
    """The journal could not be written, so that nothing was uploaded; the cause is ``__cause__``.

    The session's transaction goes on as it was, unless the error is the database's own.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"nothing was uploaded, for the journal could not be written: {self.reason} "
            "(are its table and its triggers there? create_all, or `aioblobcol ddl`)"
        )


# --- Transactions ------------------------------------------------------------------------


class TransactionError(AioBlobColError):
    """Something about the transaction that owns the uploads."""


class UnsafeTransactionError(TransactionError):
    """Refused: in this kind of transaction nobody could tell afterwards what became of the row."""


class TransactionAbortedError(TransactionError):
    """The database had given the transaction up before COMMIT; it was rolled back."""


class BlobNotWrittenError(TransactionError):
    """Refused to commit, rolled back and undone: the statements did not do what the result says.

    Attributes:
        uris: the objects that no statement put into a row, or whose row was not changed.
    """

    def __init__(self, uris: Collection[str], explanation: str) -> None:
        super().__init__(tuple(uris), explanation)
        self.uris, self.explanation = tuple(uris), explanation

    def __str__(self) -> str:
        return f"{self.explanation} The transaction was rolled back: {_listed(self.uris)}"


class BlobSharedError(TransactionError):
    """Refused to commit, rolled back and undone: one object went into several cells.

    One object belongs to one cell: deleting it with one row would take it from the others.

    Attributes:
        uris: the objects.
    """

    def __init__(self, uris: Collection[str]) -> None:
        super().__init__(tuple(uris))
        self.uris = tuple(uris)

    def __str__(self) -> str:
        return (
            "one object would belong to several rows or columns: narrow the WHERE to one row, "
            "upload once for each cell, or assign blob.copy(). The transaction is rolled back: "
            f"{_listed(self.uris)}"
        )


class CommitOutcomeUnknown(TransactionError):  # noqa: N818 - the name is a fact about the commit, and public
    """COMMIT was sent and no usable answer came: the row may be committed or not.

    Unless a journal knew more, nothing was deleted. One of the two sets of objects is named by
    the row, the other one is an orphan: read the row again once the database answers.

    Attributes:
        created: the objects that the row names if the transaction was committed.
        superseded: the objects that it names if the transaction was rolled back.
    """

    def __init__(
        self,
        created: Collection[str],
        superseded: Collection[str],
        outcome: Outcome = Outcome.UNKNOWN,
    ) -> None:
        super().__init__(tuple(created), tuple(superseded), outcome)
        self.created, self.superseded = tuple(created), tuple(superseded)

    @property
    def outcome(self) -> Outcome:
        """`Outcome.UNKNOWN`, or what the journal could say afterwards."""
        outcome: Outcome = self.args[2]
        return outcome

    @outcome.setter
    def outcome(self, outcome: Outcome) -> None:
        self.args = (self.created, self.superseded, outcome)  # so that it pickles

    @property
    def uris(self) -> tuple[str, ...]:
        """Every object that was left alone on purpose."""
        return (*self.created, *self.superseded)

    def __str__(self) -> str:
        if self.outcome is Outcome.COMMITTED:
            return (
                "the answer to COMMIT was lost, but the journal shows that it was committed: the "
                f"row names {_listed(self.created) or 'none'}, and need not be written again"
            )
        if self.outcome is Outcome.ROLLED_BACK:
            return (
                "the answer to COMMIT was lost, and the journal shows that it was rolled back: "
                "nothing was written, and it may be tried again. The new objects were deleted: "
                f"{_listed(self.created) or 'none'}"
            )
        return (
            "the answer to COMMIT was lost, so nothing was deleted. Read the row again: if it was "
            f"committed it names {_listed(self.created) or 'none'} (new), "
            f"otherwise {_listed(self.superseded) or 'none'} (old); the other ones are orphans"
        )


def _listed(uris: Collection[str]) -> str:
    return ", ".join(uris)
