"""Large binary columns in S3, their URIs in the row, and both stores always agree.

`open_store` describes where the bytes live, `blob_transaction` owns uploads and their
transaction, `aioblobcol.aws_s3` has the calls of the explicit strength.
"""

from ._connection import use_explicit_begin
from ._store._base import DeleteReport, ObjectInfo, Store
from ._store._s3 import S3Store, open_store
from ._unit_of_work import BlobTransaction, blob_transaction
from .aws_s3 import DeleteS3Result, PutS3ApiCall, PutS3Result, delete_s3, guard, put_s3
from .errors import (
    AioBlobColError,
    BlobNotFoundError,
    BlobNotWrittenError,
    BlobSharedError,
    BlobUploadError,
    CleanUpError,
    CommitOutcomeUnknown,
    ForeignUriError,
    InvalidBucketError,
    InvalidColumnError,
    InvalidInputError,
    InvalidPrefixError,
    InvalidPrimaryKeyError,
    InvalidPutArgumentsError,
    InvalidS3UriError,
    InvalidSourceError,
    NaiveDatetimeError,
    Outcome,
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
    "BlobNotFoundError",
    "BlobNotWrittenError",
    "BlobSharedError",
    "BlobTransaction",
    "BlobUploadError",
    "CleanUpError",
    "CommitOutcomeUnknown",
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
    "NaiveDatetimeError",
    "ObjectInfo",
    "Outcome",
    "PutS3ApiCall",
    "PutS3Result",
    "ResultSpentError",
    "S3Store",
    "Store",
    "StoreAccessError",
    "StoreClosedError",
    "StoreError",
    "StoreUnavailableError",
    "TransactionAbortedError",
    "TransactionError",
    "UnsafeTransactionError",
    "blob_transaction",
    "delete_s3",
    "guard",
    "open_store",
    "put_s3",
    "use_explicit_begin",
]
