"""sqlalchemy_mate's five scenarios in its hand-written form, awaited.

    S3_BUCKET=tasks python hand_written.py

`aioblobcol.blob_transaction` does all of this in one block. By hand, take care that

- new objects are deleted only for an error before COMMIT is sent: an error of COMMIT itself may
  hide that it succeeded, so nothing is deleted for that one;
- old objects are deleted after COMMIT has succeeded, outside of the ``try`` whose ``except``
  deletes the new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from aiobotocore.session import get_session
from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aioblobcol.aws_s3 import PutS3ApiCall, PutS3Result, delete_s3, drain, guard, put_s3

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///tasks.db")
BUCKET = os.environ.get("S3_BUCKET", "tasks")
PREFIX = "tasks"
PAGE = "https://www.example.com"


class Base(DeclarativeBase):
    """The metadata of this example."""


class Task(Base):
    """The row holds the URIs, S3 holds the bytes."""

    __tablename__ = "tasks"

    url: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str]
    html: Mapped[str | None]
    image: Mapped[str | None]


async def create_fails(engine: AsyncEngine, s3_client: Any) -> None:
    """INSERT is refused (there is no title): the new objects are deleted."""
    put = await upload(s3_client, html=b"<p>1</p>", image=b"image 1", old=None)
    async with AsyncSession(engine) as session:
        try:
            session.add(Task(url=PAGE, **put.to_values()))
            await session.flush()
        except BaseException:  # a cancellation, too
            await put.clean_up_created_s3_object_when_create_or_update_row_failed()
            raise
        await session.commit()


async def create_succeeds(engine: AsyncEngine, s3_client: Any) -> None:
    """The row names the new objects."""
    put = await upload(s3_client, html=b"<p>1</p>", image=b"image 1", old=None)
    async with AsyncSession(engine) as session:
        try:
            session.add(Task(url=PAGE, title="one", **put.to_values()))
            await session.flush()
        except BaseException:
            await put.clean_up_created_s3_object_when_create_or_update_row_failed()
            raise
        await session.commit()


async def update_fails(engine: AsyncEngine, s3_client: Any) -> None:
    """UPDATE is refused (the title is gone): the new objects are deleted, the old ones stay."""
    old = await read(engine)
    put = await upload(s3_client, html=b"<p>2</p>", image=b"image 2", old=old)
    async with AsyncSession(engine) as session:
        try:
            row = update(Task).where(Task.url == PAGE, put.guard(Task)).returning(Task.url)
            changed = await session.execute(row.values(title=None, **put.to_values()))
            changed.scalar_one()  # raises if another transaction replaced or deleted the row
        except BaseException:
            await put.clean_up_created_s3_object_when_create_or_update_row_failed()
            raise
        await session.commit()
    await put.clean_up_old_s3_object_when_update_row_succeeded()


async def update_succeeds(engine: AsyncEngine, s3_client: Any) -> None:
    """The row names the new objects, and after the commit the old ones are deleted."""
    old = await read(engine)
    put = await upload(s3_client, html=b"<p>2</p>", image=b"image 2", old=old)
    async with AsyncSession(engine) as session:
        try:
            row = update(Task).where(Task.url == PAGE, put.guard(Task)).returning(Task.url)
            changed = await session.execute(row.values(title="two", **put.to_values()))
            changed.scalar_one()
        except BaseException:
            await put.clean_up_created_s3_object_when_create_or_update_row_failed()
            raise
        await session.commit()
    await put.clean_up_old_s3_object_when_update_row_succeeded()


async def delete_succeeds(engine: AsyncEngine, s3_client: Any) -> None:
    """The row goes first, its objects after the commit."""
    old = await read(engine)
    gone = delete_s3([old.html, old.image], s3_client=s3_client, bucket=BUCKET, prefix=PREFIX)
    async with AsyncSession(engine) as session:
        unchanged = guard(Task, html=old.html, image=old.image)
        row = delete(Task).where(Task.url == PAGE, unchanged).returning(Task.url)
        (await session.execute(row)).scalar_one()
        await session.commit()
    await gone.clean_up_s3_objects_when_delete_row_succeeded()


async def upload(s3_client: Any, *, html: bytes, image: bytes, old: Task | None) -> PutS3Result:
    """Upload both columns at once; if one fails, or we are cancelled, nothing is kept."""
    return await put_s3(
        api_calls=[
            PutS3ApiCall(
                column="html",
                binary=html,
                old_s3_uri=old.html if old else None,
                extra_put_object_kwargs={"ContentType": "text/html"},
            ),
            PutS3ApiCall(
                column="image",
                binary=image,
                old_s3_uri=old.image if old else None,
                extra_put_object_kwargs={"ContentType": "image/png"},
            ),
        ],
        s3_client=s3_client,
        pk=PAGE,
        bucket=BUCKET,
        prefix=PREFIX,
    )


async def read(engine: AsyncEngine) -> Task:
    """Read the row and give the connection back before bytes travel."""
    async with AsyncSession(engine) as session:
        return await session.get_one(Task, PAGE)


async def main() -> None:
    """Run the five scenarios where the environment says."""
    engine = create_async_engine(DATABASE_URL)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    endpoint_url = os.environ.get("S3_ENDPOINT_URL")
    async with get_session().create_client("s3", endpoint_url=endpoint_url) as s3_client:
        with contextlib.suppress(IntegrityError):
            await create_fails(engine, s3_client)
        await create_succeeds(engine, s3_client)
        with contextlib.suppress(IntegrityError):
            await update_fails(engine, s3_client)
        await update_succeeds(engine, s3_client)
        await delete_succeeds(engine, s3_client)
        await drain(s3_client)  # a client of your own has no `open_store` that does this
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
