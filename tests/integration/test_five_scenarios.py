"""The five scenarios of sqlalchemy_mate's pattern, on a real client, S3 server and database."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from aiobotocore.session import get_session
from support.databases import Database
from support.models import Task, contents, load

from aioblobcol import PutS3ApiCall, S3Store, blob_transaction
from aioblobcol.aws_s3 import (
    clean_up_created_s3_object_when_create_or_update_row_failed,
    clean_up_old_s3_object_when_update_row_succeeded,
    delete_s3,
    drain,
    put_s3,
    put_s3backed_column,
)
from aioblobcol.testing import S3Server

HTML = b"<html>this is html 1</html>"
IMAGE = b"\x89PNG this is image 1"
NOW = datetime(2026, 11, 23, 12, tzinfo=timezone.utc)


class UserError(Exception):
    pass


def calls(old: Task | None = None, *, number: int = 1) -> list[PutS3ApiCall]:
    return [
        PutS3ApiCall(
            "html", HTML + b"%d" % number, old.html if old else None, {"ContentType": "text/html"}
        ),
        PutS3ApiCall(
            "image",
            IMAGE + b"%d" % number,
            old.image if old else None,
            {"ContentType": "image/png"},
        ),
    ]


class TestBlobTransaction:
    async def test_create_fails(self, database: Database, s3_store: S3Store) -> None:
        """A failing create leaves neither a row nor an object, and the error arrives."""
        async with database.session() as session:
            with pytest.raises(UserError):
                async with blob_transaction(session, store=s3_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls())
                    session.add(Task(url="u", **put.to_values()))
                    raise UserError

        assert await contents(s3_store, database.engine) is None

    async def test_create_update_delete(self, database: Database, s3_store: S3Store) -> None:
        """Create, failing update, update, delete: the row and the objects agree after each."""
        async with database.session() as session:
            async with blob_transaction(session, store=s3_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls())
                session.add(Task(url="u", **put.to_values()))
            assert await contents(s3_store, database.engine) == (HTML + b"1", IMAGE + b"1")

            task = await load(session)
            with pytest.raises(UserError):
                async with blob_transaction(session, store=s3_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(task, number=2))
                    await session.execute(
                        sa.update(Task).where(put.guard(Task)).values(**put.to_values())
                    )
                    raise UserError
            assert await contents(s3_store, database.engine) == (HTML + b"1", IMAGE + b"1")

            task = await load(session)
            async with blob_transaction(session, store=s3_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(task, number=2))
                await session.execute(
                    sa.update(Task).where(put.guard(Task)).values(**put.to_values())
                )
            assert await contents(s3_store, database.engine) == (HTML + b"2", IMAGE + b"2")

            task = await load(session)
            async with blob_transaction(session, store=s3_store) as tx:
                tx.delete_s3([task.html, task.image])
                await session.delete(task)
        assert await contents(s3_store, database.engine) is None


class TestHandWritten:
    """The seed's form, awaited: any aiobotocore client, and the clean-ups called by hand."""

    async def test_all_five(self, database: Database, s3: S3Server, s3_store: S3Store) -> None:
        """With a borrowed client all five scenarios work as the seed's users write them."""
        where: dict[str, Any] = {
            "bucket": s3_store.bucket,
            "prefix": f"/{s3_store.prefix}/",
            "update_at": NOW,
        }
        async with (
            get_session().create_client("s3", **s3.client_arguments) as s3_client,
            database.session() as session,
        ):
            put = await put_s3(calls(), s3_client, "u", **where)
            try:
                async with session.begin():
                    session.add(Task(url="u", **put.to_values()))
                    raise UserError
            except UserError:
                report = await put.clean_up_created_s3_object_when_create_or_update_row_failed()
            report.raise_for_failures()
            assert len(report.deleted) == 2
            assert await contents(s3_store, database.engine) is None

            put = await put_s3(calls(), s3_client, "u", **where)
            async with session.begin():
                session.add(Task(url="u", **put.to_values()))
            assert await contents(s3_store, database.engine) == (HTML + b"1", IMAGE + b"1")

            task = await load(session)
            put = await put_s3(calls(task, number=2), s3_client, "u", **where)
            try:
                async with session.begin():
                    await session.execute(
                        sa.update(Task).where(put.guard(Task)).values(**put.to_values())
                    )
                    raise UserError
            except UserError:
                await put.clean_up_created_s3_object_when_create_or_update_row_failed()
            assert await contents(s3_store, database.engine) == (HTML + b"1", IMAGE + b"1")

            task = await load(session)
            put = await put_s3(calls(task, number=2), s3_client, "u", **where)
            async with session.begin():
                await session.execute(
                    sa.update(Task).where(put.guard(Task)).values(**put.to_values())
                )
            await put.clean_up_old_s3_object_when_update_row_succeeded()
            assert await contents(s3_store, database.engine) == (HTML + b"2", IMAGE + b"2")

            task = await load(session)
            gone = delete_s3([task.html, task.image], s3_client, s3_store.bucket, s3_store.prefix)
            async with session.begin():
                await session.delete(task)
            await gone.clean_up_s3_objects_when_delete_row_succeeded()
            await drain(s3_client)
        assert await contents(s3_store, database.engine) is None

    async def test_one_column(self, database: Database, s3: S3Server, s3_store: S3Store) -> None:
        """put_s3backed_column and the two module-level clean-ups settle one column."""
        async with get_session().create_client("s3", **s3.client_arguments) as s3_client:
            arguments: dict[str, Any] = {
                "s3_client": s3_client,
                "pk": ("a", 1),
                "bucket": s3_store.bucket,
                "prefix": s3_store.prefix,
                "update_at": NOW,
            }
            first = await put_s3backed_column("html", b"1", None, **arguments)
            second = await put_s3backed_column("html", b"2", first.new_s3_uri, **arguments)
            await clean_up_old_s3_object_when_update_row_succeeded(
                s3_client, second.old_s3_uri, second.executed
            )
            left = [uri async for uri in s3_store.iter_uris()]
            await clean_up_created_s3_object_when_create_or_update_row_failed(
                s3_client, second.new_s3_uri, second.executed
            )
            await clean_up_old_s3_object_when_update_row_succeeded(s3_client, None)

            assert left == [second.new_s3_uri]
            assert [uri async for uri in s3_store.iter_uris()] == []


class TestWhatIsStored:
    async def test_metadata_and_arguments(self, s3_store: S3Store) -> None:
        """Extra arguments arrive, the caller's are not changed, and metadata come back decoded."""
        extra: dict[str, Any] = {
            "ContentType": "text/html",
            "CacheControl": "no-cache",
            "Metadata": {"title": "Grüße \N{SNOWMAN}", "plain": "text"},
        }
        before = {**extra, "Metadata": dict(extra["Metadata"])}
        put = await put_s3(
            store=s3_store,
            pk="u",
            update_at=NOW,
            api_calls=[
                PutS3ApiCall("html", HTML, None, extra),
                PutS3ApiCall("image", IMAGE, None, extra),
            ],
        )
        put.to_values()
        for result in put.put_s3backed_column_results:
            info = await s3_store.head(result.new_s3_uri)
            key = result.new_s3_uri.removeprefix(f"s3://{s3_store.bucket}/")
            raw = await s3_store.client.head_object(Bucket=s3_store.bucket, Key=key)

            assert info.metadata["title"] == "Grüße \N{SNOWMAN}"
            assert info.metadata["plain"] == "text"
            assert info.metadata["update_at"] == NOW.isoformat()
            assert len(info.metadata["sha256"]) == 64
            assert (raw["ContentType"], raw["CacheControl"]) == ("text/html", "no-cache")
        assert extra == before
