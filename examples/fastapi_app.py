"""Pages with their HTML and their picture in S3: a FastAPI application.

    S3_BUCKET=pages uvicorn fastapi_app:app

The environment says where: DATABASE_URL, S3_BUCKET, S3_ENDPOINT_URL (for a server that is not
AWS), and what the AWS SDKs read (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal

from fastapi import FastAPI, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aioblobcol import (
    BlobNotFoundError,
    BlobNotWrittenError,
    BlobUploadError,
    CommitOutcomeUnknown,
    PutS3ApiCall,
    blob_transaction,
    guard,
    open_store,
)

endpoint_url = os.environ.get("S3_ENDPOINT_URL")
store = open_store(
    bucket=os.environ.get("S3_BUCKET", "pages"),
    prefix="pages",
    endpoint_url=endpoint_url,
    compat="generic" if endpoint_url else "aws",
)
engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///pages.db"))
Session = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    """The metadata of this application."""


class Page(Base):
    """A page: the row holds the URIs, S3 holds the bytes."""

    __tablename__ = "pages"

    name: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str]
    html: Mapped[str | None]
    image: Mapped[str | None]


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Open the store once for all requests; leaving it finishes its background work."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with store:
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.post("/pages", status_code=201)
async def create_page(
    name: Annotated[str, Form()], title: Annotated[str, Form()], html: UploadFile, image: UploadFile
) -> dict[str, str]:
    """Create a page. The row is committed before the answer is sent."""
    async with Session() as session, blob_transaction(session, store=store) as tx:
        put = await tx.put_s3(
            pk=name,
            api_calls=[
                PutS3ApiCall("html", await html.read(), None, {"ContentType": "text/html"}),
                PutS3ApiCall("image", await image.read(), None, {"ContentType": "image/png"}),
            ],
        )
        session.add(Page(name=name, title=title, **put.to_values()))
    return {"name": name, "title": title}


@app.put("/pages/{name}")
async def update_page(
    name: str, title: Annotated[str, Form()], html: UploadFile, image: UploadFile
) -> dict[str, str]:
    """Replace both columns, unless somebody else does so at the same time."""
    old = await read_page(name)
    # The session takes its connection for the UPDATE, after the bytes have travelled.
    async with Session() as session, blob_transaction(session, store=store, background=True) as tx:
        put = await tx.put_s3(
            pk=name,
            api_calls=[
                PutS3ApiCall("html", await html.read(), old.html, {"ContentType": "text/html"}),
                PutS3ApiCall("image", await image.read(), old.image, {"ContentType": "image/png"}),
            ],
        )
        row = update(Page).where(Page.name == name, put.guard(Page))
        await session.execute(row.values(title=title, **put.to_values()))
    return {"name": name, "title": title}


@app.delete("/pages/{name}", status_code=204)
async def delete_page(name: str) -> None:
    """Delete the row, and after the commit its objects."""
    old = await read_page(name)
    async with Session() as session, blob_transaction(session, store=store) as tx:
        tx.delete_s3([old.html, old.image])
        unchanged = guard(Page, html=old.html, image=old.image)
        await session.execute(delete(Page).where(Page.name == name, unchanged))


@app.get("/pages/{name}")
async def show_page(name: str) -> dict[str, str | None]:
    """Return the row."""
    page = await read_page(name)
    return {"name": page.name, "title": page.title, "html": page.html, "image": page.image}


@app.get("/pages/{name}/{column}")
async def show_column(name: str, column: Literal["html", "image"]) -> Response:
    """Return the bytes of a column."""
    page = await read_page(name)
    uri = page.html if column == "html" else page.image
    if uri is None:
        raise HTTPException(404)
    media_type = "text/html" if column == "html" else "image/png"
    return Response(await store.get(uri), media_type=media_type)


async def read_page(name: str) -> Page:
    """Read a row and give the connection back, so that none is held while bytes travel."""
    async with Session() as session:
        page = await session.get(Page, name)
    if page is None:
        raise HTTPException(404)
    return page


# In all of these, what was uploaded in vain is deleted already, or must not be deleted.
ANSWERS: dict[type[Exception], tuple[int, str]] = {
    # the database refused the row: the name is taken
    IntegrityError: (409, "there is such a page already"),
    # the guard matched nothing: another request replaced or deleted the row meanwhile
    BlobNotWrittenError: (409, "the page was changed meanwhile, read it again"),
    # S3 did not take an object, so the row was never written
    BlobUploadError: (502, "the storage did not take the upload, nothing was changed"),
    # the answer to COMMIT was lost: only reading the row again tells what became of it
    CommitOutcomeUnknown: (503, "nobody knows whether it was saved, read the page again"),
    # the object was replaced after its row was read: the next attempt finds the new one
    BlobNotFoundError: (503, "the page was changed meanwhile, try again"),
}


async def answer(_request: Request, error: Exception) -> Response:
    """Tell the client what it can do; the URIs are nobody else's business."""
    status, detail = ANSWERS[type(error)]
    return JSONResponse({"detail": detail}, status_code=status)


for expected in ANSWERS:
    app.add_exception_handler(expected, answer)
