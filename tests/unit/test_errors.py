"""The tree of errors: what a caller may catch, read and send to another process."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest

from aioblobcol import errors
from aioblobcol.errors import (
    AioBlobColError,
    BlobChangedError,
    BlobCorruptedError,
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
    SizeMismatchError,
    StoreAccessError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
    TransactionAbortedError,
    TransactionError,
    UnsafeTransactionError,
)

NEW, OLD = "s3://bucket/new", "s3://bucket/old"

EXAMPLES: list[AioBlobColError] = [
    AioBlobColError("something"),
    *(
        each("what was wrong")
        for each in (
            InvalidInputError,
            InvalidS3UriError,
            ForeignUriError,
            InvalidBucketError,
            InvalidPrefixError,
            InvalidPrimaryKeyError,
            InvalidColumnError,
            InvalidSourceError,
            NaiveDatetimeError,
            InvalidPutArgumentsError,
            BlobTooLargeError,
            SizeMismatchError,
            ContentTypeRefusedError,
            StoreClosedError,
            BlobNotUploadedError,
            BlobUnboundError,
            ResultSpentError,
            TransactionError,
            UnsafeTransactionError,
            TransactionAbortedError,
        )
    ),
    StoreError("put", NEW, "InvalidRequest"),
    BlobNotFoundError("get", NEW, "NoSuchKey"),
    BlobChangedError("get", NEW, "PreconditionFailed"),
    BlobCorruptedError("get", NEW, "its SHA-256 is another one"),
    StoreAccessError("put", NEW, "AccessDenied"),
    StoreUnavailableError("put", NEW, "SlowDown"),
    BlobUploadError("html", NEW, "SlowDown."),
    BlobUploadError("html", NEW, "SlowDown.", {NEW: "AccessDenied"}),
    CleanUpError({OLD: "AccessDenied"}),
    OwnershipError("s3://bucket/app/", "has the marker of another database."),
    JournalError("OperationalError: no such table: aioblobcol_journal"),
    BlobNotWrittenError([NEW], "It went into no row."),
    BlobSharedError([NEW]),
    CommitOutcomeUnknown([NEW], [OLD]),
    CommitOutcomeUnknown([NEW], []),
    CommitOutcomeUnknown([NEW], [OLD], Outcome.COMMITTED),
    CommitOutcomeUnknown([NEW], [OLD], Outcome.ROLLED_BACK),
]


def all_errors() -> set[type[Exception]]:
    return {
        each
        for _, each in inspect.getmembers(errors, inspect.isclass)
        if issubclass(each, Exception)
    }


ALL_ERRORS = sorted(all_errors(), key=lambda each: each.__name__)


class TestTree:
    def test_every_error_has_an_example_here(self) -> None:
        """No error escapes these tests, and every one is under AioBlobColError."""
        assert {type(each) for each in EXAMPLES} == all_errors()
        assert all(issubclass(each, AioBlobColError) for each in all_errors())

    def test_the_drawing_shows_every_error(self) -> None:
        """The header of the module draws the whole tree."""
        header = errors.__doc__ or ""

        assert [each.__name__ for each in all_errors() if each.__name__ not in header] == []

    @pytest.mark.parametrize("error", ALL_ERRORS)
    def test_every_error_says_what_it_is(self, error: type[Exception]) -> None:
        """Every error has a docstring of its own."""
        assert error.__dict__.get("__doc__")

    @pytest.mark.parametrize(
        ("error", "base"),
        [
            (InvalidInputError, ValueError),
            (InvalidS3UriError, InvalidInputError),
            (ForeignUriError, InvalidInputError),
            (InvalidBucketError, InvalidInputError),
            (InvalidPrefixError, InvalidInputError),
            (InvalidPrimaryKeyError, InvalidInputError),
            (InvalidColumnError, InvalidInputError),
            (InvalidSourceError, InvalidInputError),
            (InvalidSourceError, TypeError),
            (NaiveDatetimeError, InvalidInputError),
            (InvalidPutArgumentsError, InvalidInputError),
            (BlobNotFoundError, StoreError),
            (StoreAccessError, StoreError),
            (StoreUnavailableError, StoreError),
            (StoreClosedError, RuntimeError),
            (ResultSpentError, RuntimeError),
            (UnsafeTransactionError, TransactionError),
            (TransactionAbortedError, TransactionError),
            (BlobNotWrittenError, TransactionError),
            (CommitOutcomeUnknown, TransactionError),
        ],
    )
    def test_it_can_be_caught_by_its_kind(
        self, error: type[Exception], base: type[Exception]
    ) -> None:
        """Bad input is a ValueError, use at the wrong time a RuntimeError."""
        assert issubclass(error, base)


class TestCopies:
    @pytest.mark.parametrize(
        "copied",
        [
            pytest.param(copy.copy, id="copy"),
            pytest.param(copy.deepcopy, id="deepcopy"),
            pytest.param(lambda error: pickle.loads(pickle.dumps(error)), id="pickle"),  # noqa: S301 - ours
        ],
    )
    @pytest.mark.parametrize("error", EXAMPLES, ids=[type(each).__name__ for each in EXAMPLES])
    def test_they_keep_everything(
        self, error: AioBlobColError, copied: Callable[[AioBlobColError], AioBlobColError]
    ) -> None:
        """An error that went to another process has its type, message and attributes."""
        error.add_note("seen in a worker")
        other = copied(error)

        assert type(other) is type(error)
        assert str(other) == str(error)
        assert vars(other) == vars(error)
        assert other.args == error.args

    def test_what_was_found_out_later_is_kept(self) -> None:
        """A refusal after a retry keeps its doubt when it is pickled."""
        error = StoreError("put", NEW, "InvalidRequest")
        error.may_have_taken_effect = True

        assert pickle.loads(pickle.dumps(error)).may_have_taken_effect is True  # noqa: S301 - ours


class TestMessages:
    @pytest.mark.parametrize(
        ("error", "parts"),
        [
            (StoreError("put", NEW, "InvalidRequest"), ["put", NEW, "InvalidRequest", "cause"]),
            (BlobNotFoundError("get", NEW, "NoSuchKey"), [NEW, "Read the row again"]),
            (StoreAccessError("put", NEW, "AccessDenied"), [NEW, "s3:DeleteObject"]),
            (StoreUnavailableError("put", NEW, "SlowDown"), [NEW, "may be repeated"]),
            (BlobUploadError("html", NEW, "Why."), ["'html'", NEW, "Why.", "deleted again"]),
            (
                BlobUploadError("html", NEW, "Why.", {OLD: "AccessDenied"}),
                [NEW, OLD, "could not be deleted", "orphans"],
            ),
            (CleanUpError({OLD: "AccessDenied"}), [OLD, "AccessDenied", "call the clean-up again"]),
            (BlobNotWrittenError([NEW], "Forgotten."), [NEW, "Forgotten.", "rolled back"]),
            (CommitOutcomeUnknown([NEW], [OLD]), [NEW, OLD, "Read the row again"]),
            (CommitOutcomeUnknown([NEW], []), [NEW, "none"]),
        ],
    )
    def test_they_tell_what_happened_and_what_to_do(
        self, error: AioBlobColError, parts: list[str]
    ) -> None:
        """A message names the object, what happened to it, and the next step."""
        assert [part for part in parts if part not in str(error)] == []


class TestAttributes:
    def test_of_a_refused_request(self) -> None:
        """Operation, URI and code, and whether the request may have taken effect."""
        error = StoreUnavailableError("put", NEW, "SlowDown")

        assert (error.operation, error.uri, error.code) == ("put", NEW, "SlowDown")
        assert error.may_have_taken_effect is True
        assert StoreError("put", NEW, "x").may_have_taken_effect is False

    def test_of_an_unknown_outcome(self) -> None:
        """Both sets of objects, all of them together, and that nobody knows."""
        error = CommitOutcomeUnknown([NEW], [OLD])

        assert (error.created, error.superseded, error.uris) == ((NEW,), (OLD,), (NEW, OLD))
        assert error.outcome is Outcome.UNKNOWN

    def test_the_callers_dict_is_copied(self) -> None:
        """What the caller does to its dict afterwards changes no error."""
        failed = {OLD: "AccessDenied"}
        clean_up, upload = CleanUpError(failed), BlobUploadError("html", NEW, "Why.", failed)
        failed.clear()

        assert clean_up.failed == upload.not_deleted == {OLD: "AccessDenied"}
