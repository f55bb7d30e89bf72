"""Large binary columns in S3, their URIs in the row, and both stores always agree.

`open_store` describes where the bytes live, `blob_transaction` owns uploads and their
transaction, `aioblobcol.aws_s3` has the calls of the explicit strength.
"""

from ._app import BlobApp
from ._blob import Blob, open_blob
from ._column import BlobType
from ._connection import use_explicit_begin
from ._journal import Journal, OwnershipState
from ._managed import blob_report, blob_sessionmaker, enlist, track_blobs, upload_blobs
from ._status import JournalStatus, ParkedObject, StateStatus, journal_status
from ._store._base import DeleteReport, ObjectInfo, Store
from ._store._s3 import S3Store, open_store
from ._unit_of_work import BlobTransaction, blob_transaction
from ._worker import Worker, WorkReport
from .aws_s3 import DeleteS3Result, PutS3ApiCall, PutS3Result, delete_s3, guard, put_s3
from .errors import (
    AioBlobColError,
    BlobNotFoundError,
    BlobNotUploadedError,
    BlobNotWrittenError,
    BlobSharedError,
    BlobTooLargeError,
    BlobUnboundError,
    BlobUploadError,
    CleanUpError,
    CommitOutcomeUnknown,
    ContentTypeRefusedError,
    ForeignUriError,
    InvalidBucketError,
    InvalidColumnError,
    InvalidInputError,
    InvalidPrefixError,
    InvalidPrimaryKeyError,
    InvalidPutArgumentsError,
    InvalidS3UriError,
    InvalidSourceError,
    JournalError,
    NaiveDatetimeError,
    Outcome,
    OwnershipError,
    ResultSpentError,
    StoreAccessError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
    TransactionAbortedError,
    TransactionError,
    UnsafeTransactionError,
)

__all__ = [
    "AioBlobColError",
    "Blob",
    "BlobApp",
    "BlobNotFoundError",
    "BlobNotUploadedError",
    "BlobNotWrittenError",
    "BlobSharedError",
    "BlobTooLargeError",
    "BlobTransaction",
    "BlobType",
    "BlobUnboundError",
    "BlobUploadError",
    "CleanUpError",
    "CommitOutcomeUnknown",
    "ContentTypeRefusedError",
    "DeleteReport",
    "DeleteS3Result",
    "ForeignUriError",
    "InvalidBucketError",
    "InvalidColumnError",
    "InvalidInputError",
    "InvalidPrefixError",
    "InvalidPrimaryKeyError",
    "InvalidPutArgumentsError",
    "InvalidS3UriError",
    "InvalidSourceError",
    "Journal",
    "JournalError",
    "JournalStatus",
    "NaiveDatetimeError",
    "ObjectInfo",
    "Outcome",
    "OwnershipError",
    "OwnershipState",
    "ParkedObject",
    "PutS3ApiCall",
    "PutS3Result",
    "ResultSpentError",
    "S3Store",
    "StateStatus",
    "Store",
    "StoreAccessError",
    "StoreClosedError",
    "StoreError",
    "StoreUnavailableError",
    "TransactionAbortedError",
    "TransactionError",
    "UnsafeTransactionError",
    "WorkReport",
    "Worker",
    "blob_report",
    "blob_sessionmaker",
    "blob_transaction",
    "delete_s3",
    "enlist",
    "guard",
    "journal_status",
    "open_blob",
    "open_store",
    "put_s3",
    "track_blobs",
    "upload_blobs",
    "use_explicit_begin",
]
