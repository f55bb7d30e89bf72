"""What is public, and what a user of sqlalchemy_mate finds again."""

from __future__ import annotations

import dataclasses
import inspect
from types import ModuleType

import pytest

import aioblobcol
import aioblobcol.testing
from aioblobcol import aws_s3

PUBLIC = [
    (module, name) for module in (aioblobcol, aws_s3, aioblobcol.testing) for name in module.__all__
]

# Source: sqlalchemy_mate, sqlalchemy_mate/patterns/large_binary_column/aws_s3.py and helpers.py
SEED_FUNCTIONS = {
    "put_s3": "api_calls s3_client pk bucket prefix update_at is_pk_url_safe",
    "put_s3backed_column": (
        "column binary old_s3_uri s3_client pk bucket prefix update_at is_pk_url_safe"
        " extra_put_object_kwargs"
    ),
    "clean_up_created_s3_object_when_create_or_update_row_failed": "s3_client new_s3_uri executed",
    "clean_up_old_s3_object_when_update_row_succeeded": "s3_client old_s3_uri executed",
    "split_s3_uri": "s3_uri",
    "join_s3_uri": "bucket key",
    "is_s3_object_exists": "s3_client bucket key",
    "batch_delete_s3_objects": "s3_client s3_uri_list",
    "normalize_s3_prefix": "prefix",
    "get_s3_key": "pk column binary prefix",
    "encode_pk": "pk is_pk_url_safe delimiter",
    "get_md5": "b",
    "get_sha256": "b",
    "b64encode_str": "s",
    "b64decode_str": "s",
}
SEED_CLASSES = {
    "PutS3ApiCall": "column binary old_s3_uri extra_put_object_kwargs",
    "PutS3BackedColumnResult": "column old_s3_uri new_s3_uri executed",
    "PutS3Result": "put_s3backed_column_results",
}
SEED_METHODS = [
    "to_values",
    "clean_up_created_s3_object_when_create_or_update_row_failed",
    "clean_up_old_s3_object_when_update_row_succeeded",
]
# of `blob_transaction`, which shares them; no user's
FAMILY = {"put_row", "why_kept", "OnAttempt"}


def defined_in(module: ModuleType) -> set[str]:
    """Return the names that do not start with an underscore and are no modules."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


class TestPublicNames:
    @pytest.mark.parametrize("module", [aioblobcol, aioblobcol.testing])
    def test_all_is_what_is_there(self, module: ModuleType) -> None:
        """A package's `__all__` holds every public name in it, and no other."""
        assert set(module.__all__) == defined_in(module)

    def test_aws_s3_lists_what_it_defines(self) -> None:
        """`aws_s3.__all__` holds every public name that is defined there."""
        own = {
            name
            for name in defined_in(aws_s3) - FAMILY
            if getattr(getattr(aws_s3, name), "__module__", None) == aws_s3.__name__
        }

        assert own - set(aws_s3.__all__) == set()
        assert set(aws_s3.__all__) - defined_in(aws_s3) == set()

    @pytest.mark.parametrize("module", [aioblobcol, aws_s3, aioblobcol.testing])
    def test_names_are_sorted_and_unique(self, module: ModuleType) -> None:
        """`__all__` is easy to read."""
        assert list(module.__all__) == sorted(set(module.__all__))

    @pytest.mark.parametrize(("module", "name"), PUBLIC, ids=str)
    def test_every_public_name_is_documented(self, module: ModuleType, name: str) -> None:
        """Every public name has a docstring of its own, and so has every public method."""
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            documented = inspect.getdoc(value) or ""
            assert documented
            assert not documented.startswith(f"{name}("), "a dataclass's made-up docstring"
        if inspect.isclass(value):
            undocumented = [
                method
                for method, function in vars(value).items()
                if not method.startswith("_")
                and (inspect.isfunction(function) or isinstance(function, property))
                and not inspect.getdoc(function)
            ]
            assert undocumented == []


class TestComingFromSqlalchemyMate:
    @pytest.mark.parametrize(("name", "parameters"), SEED_FUNCTIONS.items())
    def test_functions_take_the_same_arguments(self, name: str, parameters: str) -> None:
        """The seed's functions are there, with its parameters first and in its order."""
        expected = parameters.split()
        signature = inspect.signature(getattr(aws_s3, name)).parameters
        positional = [
            each.name for each in signature.values() if each.kind is each.POSITIONAL_OR_KEYWORD
        ]

        assert name in aws_s3.__all__
        assert positional == expected

    @pytest.mark.parametrize(("name", "fields"), SEED_CLASSES.items())
    def test_classes_have_the_same_fields(self, name: str, fields: str) -> None:
        """The seed's dataclasses are there, its fields in its order; others may be left out."""
        public = [
            field
            for field in dataclasses.fields(getattr(aws_s3, name))
            if not field.name.startswith("_")
        ]
        of_the_seed = fields.split()

        assert name in aws_s3.__all__
        assert [field.name for field in public[: len(of_the_seed)]] == of_the_seed
        assert all(field.default is not dataclasses.MISSING for field in public[len(of_the_seed) :])

    @pytest.mark.parametrize("name", SEED_METHODS)
    def test_results_have_the_same_methods(self, name: str) -> None:
        """The seed's methods of a result take no arguments here either."""
        assert list(inspect.signature(getattr(aws_s3.PutS3Result, name)).parameters) == ["self"]

    @pytest.mark.parametrize(
        "name",
        [
            "put_s3",
            "put_s3backed_column",
            "is_s3_object_exists",
            "batch_delete_s3_objects",
            "clean_up_created_s3_object_when_create_or_update_row_failed",
            "clean_up_old_s3_object_when_update_row_succeeded",
        ],
    )
    def test_what_does_io_is_awaited(self, name: str) -> None:
        """What asks S3 is a coroutine function, and the rest is not."""
        pure = {"encode_pk", "get_s3_key", "split_s3_uri", "join_s3_uri", "normalize_s3_prefix"}

        assert inspect.iscoroutinefunction(getattr(aws_s3, name))
        assert not any(inspect.iscoroutinefunction(getattr(aws_s3, each)) for each in pure)
