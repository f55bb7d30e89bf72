"""Bad input is refused before the first byte is sent, each with an error of its own."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.databases import Database
from support.models import Task
from support.s3_proxy import s3_proxy

from aioblobcol import (
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
    PutS3ApiCall,
    ResultSpentError,
    S3Store,
    StoreClosedError,
    blob_transaction,
    delete_s3,
    guard,
    open_store,
    put_s3,
)
from aioblobcol.testing import MemoryStore, S3Server

GOOD: dict[str, Any] = {"pk": "u", "api_calls": [PutS3ApiCall("html", b"x", None)]}


def call(**changes: Any) -> list[PutS3ApiCall]:
    """Return one good call, changed, behind another good one."""
    good = PutS3ApiCall("image", b"i", None)
    return [good, dataclasses.replace(PutS3ApiCall("html", b"x", None), **changes)]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "old URI of another scheme": (
        {"api_calls": call(old_s3_uri="https://bucket/key")},
        InvalidS3UriError,
        "s3://bucket/key",
    ),
    "old URI without a key": (
        {"api_calls": call(old_s3_uri="s3://bucket/")},
        InvalidS3UriError,
        "s3://bucket/",
    ),
    "control characters in an old URI": (
        {"api_calls": call(old_s3_uri="s3://bucket/a\nb")},
        InvalidS3UriError,
        "control",
    ),
    "a column twice": ({"api_calls": call(column="image")}, InvalidColumnError, "twice"),
    "control characters in a column": (
        {"api_calls": call(column="a\x00b")},
        InvalidColumnError,
        "column",
    ),
    "text in place of bytes": (
        {"api_calls": call(binary="text")},
        InvalidSourceError,
        "encode",
    ),
    "nothing in place of bytes": ({"api_calls": call(binary=None)}, InvalidSourceError, "None"),
    "a file that is not there": (
        {"api_calls": call(binary=Path("not-there"))},
        InvalidSourceError,
        "not-there",
    ),
    "a directory": ({"api_calls": call(binary=Path())}, InvalidSourceError, "not a file"),
    "a naive datetime": (
        {"update_at": datetime(2026, 1, 1)},  # noqa: DTZ001 - that is the point
        NaiveDatetimeError,
        "timezone",
    ),
    "no primary key": ({"pk": None}, InvalidInputError, "pk"),
    "an empty primary key": ({"pk": ()}, InvalidPrimaryKeyError, "part"),
    "a float as primary key": ({"pk": 1.5}, InvalidPrimaryKeyError, "float"),
    "a primary key that is not URL-safe": (
        {"pk": "a/b", "is_pk_url_safe": True},
        InvalidPrimaryKeyError,
        "URL-safe",
    ),
    "a key that is too long": ({"pk": ("x" * 180,) * 5}, InvalidPrimaryKeyError, "1024"),
    "what the library owns": (
        {"api_calls": call(extra_put_object_kwargs={"Bucket": "other"})},
        InvalidPutArgumentsError,
        "Bucket",
    ),
    "metadata that are no strings": (
        {"api_calls": call(extra_put_object_kwargs={"Metadata": {"n": 1}})},
        InvalidPutArgumentsError,
        "int",
    ),
    "a metadata name that no header has": (
        {"api_calls": call(extra_put_object_kwargs={"Metadata": {"a b": "x"}})},
        InvalidPutArgumentsError,
        "a b",
    ),
    "metadata names that differ in case only": (
        {"api_calls": call(extra_put_object_kwargs={"Metadata": {"SHA256": "x"}})},
        InvalidPutArgumentsError,
        "SHA256",
    ),
    "too many metadata": (
        {"api_calls": call(extra_put_object_kwargs={"Metadata": {"n": "x" * 2000}})},
        InvalidPutArgumentsError,
        "2048",
    ),
}
ON_S3_ONLY: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an argument that put_object does not have": (
        {"api_calls": call(extra_put_object_kwargs={"ContentTyp": "text/html"})},
        InvalidPutArgumentsError,
        "ContentTyp",
    ),
    "an argument of the wrong type": (
        {"api_calls": call(extra_put_object_kwargs={"ContentType": 5})},
        InvalidPutArgumentsError,
        "ContentType",
    ),
}


@pytest.mark.parametrize(("changes", "error", "text"), BAD.values(), ids=BAD)
class TestPutS3:
    async def test_refused(
        self, memory_store: MemoryStore, changes: dict[str, Any], error: type[Exception], text: str
    ) -> None:
        """Each has its own error, and no request was made."""
        with pytest.raises(error, match=text):
            await put_s3(**{**GOOD, **changes}, store=memory_store)

        assert memory_store.calls == []

    async def test_refused_inside_of_a_block(
        self,
        sqlite: Database,
        memory_store: MemoryStore,
        changes: dict[str, Any],
        error: type[Exception],
        text: str,
    ) -> None:
        """Inside of a block too, and the block can go on."""
        async with sqlite.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                with pytest.raises(error, match=text):
                    await tx.put_s3(**{**GOOD, **changes})
                put = await tx.put_s3(**GOOD)
                session.add(Task(url="u", **put.to_values()))

        assert [operation for operation, _ in memory_store.calls] == ["put"]


class TestOnS3:
    @pytest.mark.parametrize(
        ("changes", "error", "text"), [*BAD.values(), *ON_S3_ONLY.values()], ids=[*BAD, *ON_S3_ONLY]
    )
    async def test_nothing_goes_over_the_wire(
        self, s3: S3Server, changes: dict[str, Any], error: type[Exception], text: str
    ) -> None:
        """The real client is not asked either."""
        async with s3_proxy(s3.endpoint_url) as proxy:
            behind = dataclasses.replace(s3, endpoint_url=proxy.endpoint_url)
            async with behind.open_store(bucket="bucket") as store:
                with pytest.raises(error, match=text):
                    await put_s3(**{**GOOD, **changes}, store=store)

            assert proxy.requests == []


class TestNames:
    @pytest.mark.parametrize("bucket", ["", "a/b", "a b", "s3://bucket", "büro", None])
    def test_buckets(self, bucket: Any) -> None:
        """A bucket's name is checked when the store is described."""
        with pytest.raises(InvalidBucketError):
            open_store(bucket=bucket)

    @pytest.mark.parametrize("prefix", ["a//b", "a/../b", "./a", "a\nb", "x" * 256, None])
    def test_prefixes(self, prefix: Any) -> None:
        """A prefix is checked when the store is described."""
        with pytest.raises(InvalidPrefixError):
            open_store(bucket="bucket", prefix=prefix)

    def test_compat(self) -> None:
        """An unknown preset names the known ones."""
        with pytest.raises(InvalidInputError, match="aws, generic, r2, b2"):
            open_store(bucket="bucket", compat="minio")  # type: ignore[arg-type]  # that is the point

    async def test_store_and_client(self, memory_store: MemoryStore) -> None:
        """Both a store and a client, or neither, is refused."""
        with pytest.raises(InvalidInputError, match="either"):
            await put_s3(**GOOD, store=memory_store, bucket="bucket")
        with pytest.raises(InvalidInputError, match="store"):
            await put_s3(**GOOD)

    def test_guard_of_an_unknown_column(self) -> None:
        """A guard on a column that the entity does not have is refused."""
        with pytest.raises(InvalidColumnError, match="htm"):
            guard(Task, htm=None)


class TestDeleteS3:
    async def test_foreign(self, memory_store: MemoryStore) -> None:
        """URIs outside of the prefix are refused; a URI may have come from a client's JSON."""
        inside = "s3://bucket/prefix/a"
        for outside in ("s3://bucket/prefixes/a", "s3://other/prefix/a", "s3://bucket/prefix/"):
            with pytest.raises(ForeignUriError, match=outside):
                delete_s3([inside, outside], store=memory_store)

    async def test_awaited_by_mistake(self, memory_store: MemoryStore) -> None:
        """Awaiting it says that it does no I/O, and what to do instead."""
        with pytest.raises(TypeError, match="clean_up_s3_objects_when_delete_row_succeeded"):
            await delete_s3(["s3://bucket/prefix/a"], store=memory_store)

    async def test_none_is_skipped(self, memory_store: MemoryStore) -> None:
        """Empty columns are skipped."""
        result = delete_s3([None, "s3://bucket/prefix/a", None], store=memory_store)

        assert result.s3_uris == ("s3://bucket/prefix/a",)

    async def test_one_string(self, memory_store: MemoryStore) -> None:
        """One string in place of a list is refused, not taken letter by letter."""
        with pytest.raises(InvalidInputError, match="list"):
            delete_s3("s3://bucket/prefix/a", store=memory_store)


class TestBlock:
    async def test_without_a_store(self, sqlite: Database) -> None:
        """A block without a store asks for one when it is needed."""
        async with sqlite.session() as session, blob_transaction(session) as tx:
            with pytest.raises(InvalidInputError, match="store="):
                await tx.put_s3(**GOOD)

    async def test_outside_of_the_block(self, sqlite: Database, memory_store: MemoryStore) -> None:
        """A block is entered before it is used, used once, and over when it is left."""
        async with sqlite.session() as session:
            block = blob_transaction(session, store=memory_store)
            with pytest.raises(ResultSpentError, match="inside"):
                await block.put_s3(**GOOD)
            async with block:
                pass
            with pytest.raises(ResultSpentError, match="inside"):
                await block.put_s3(**GOOD)
            with pytest.raises(ResultSpentError, match="once"):
                async with block:
                    raise AssertionError("not reached")

        assert memory_store.calls == []

    async def test_a_closed_store(self, sqlite: Database) -> None:
        """A closed store is refused before files are read or connections taken."""
        async with sqlite.session() as session:
            with pytest.raises(StoreClosedError):
                async with blob_transaction(session, store=MemoryStore()) as tx:
                    await tx.put_s3(**GOOD)

    async def test_something_else_in_place_of_the_session(self, sqlite: Database) -> None:
        """An engine, or a plain session, is refused by name."""
        with pytest.raises(InvalidInputError, match="AsyncEngine"):
            blob_transaction(sqlite.engine)  # type: ignore[arg-type]  # that is the point


class TestForeignOldUri:
    async def test_is_left_alone(self, sqlite: Database, s3_store: S3Store) -> None:
        """An old URI outside of the prefix is replaced in the row, and never deleted."""
        foreign = f"s3://{s3_store.bucket}/elsewhere/object"
        await s3_store.client.put_object(
            Bucket=s3_store.bucket, Key="elsewhere/object", Body=b"theirs"
        )
        async with sqlite.session() as session:
            async with blob_transaction(session, store=s3_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"mine", foreign)])
                session.add(Task(url="u", **put.to_values()))

        assert list(tx.report.kept) == [foreign]
        assert await s3_store.get(foreign) == b"theirs"

    @pytest.mark.parametrize(("url", "is_deleted"), [("u", True), ("other", False)])
    async def test_the_seeds_keys(
        self, sqlite: Database, memory_store: MemoryStore, url: str, is_deleted: bool
    ) -> None:
        """A key of sqlalchemy_mate's goes only when this very row and column supersedes it."""
        first = await put_s3(**GOOD, store=memory_store)
        ours = first.put_s3backed_column_results[0].new_s3_uri
        seeds = ours.rsplit("/id=", 1)[0]
        memory_store.objects[seeds] = memory_store.objects.pop(ours)
        first.to_values()
        async with sqlite.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk=url, api_calls=[PutS3ApiCall("html", b"mine", seeds)])
                session.add(Task(url=url, **put.to_values()))

        assert (seeds not in memory_store.objects) is is_deleted
        assert (seeds in tx.report.kept) is not is_deleted
