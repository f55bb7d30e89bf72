"""Pages with a journal: nothing leaks, also when pages are deleted by SQL, or a process is killed.

    S3_BUCKET=pages uvicorn journaled_fastapi:app

A worker runs inside of the application; it could as well be a process of its own:

    aioblobcol worker --app journaled_fastapi:blobs

The environment says where: DATABASE_URL, S3_BUCKET, S3_ENDPOINT_URL (for a server that is not
AWS), RETENTION_SECONDS (of replaced objects), and what the AWS SDKs read.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated, Any

from fastapi import FastAPI, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.orm.exc import StaleDataError

from aioblobcol import (
    Blob,
    BlobApp,
    BlobType,
    CommitOutcomeUnknown,
    Journal,
    Outcome,
    Worker,
    blob_sessionmaker,
    journal_status,
    open_store,
    upload_blobs,
)

endpoint_url = os.environ.get("S3_ENDPOINT_URL")
store = open_store(
    bucket=os.environ.get("S3_BUCKET", "pages"),
    prefix="pages",
    endpoint_url=endpoint_url,
    compat="generic" if endpoint_url else "aws",
)
engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///pages.db"))


class Base(DeclarativeBase):
    """The metadata of this application."""


class Page(Base):
    """A page: S3 holds the bytes."""

    __tablename__ = "pages"

    name: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str]
    html: Mapped[Blob] = mapped_column(BlobType(content_type="text/html"))
    image: Mapped[Blob | None] = mapped_column(BlobType())


retention = timedelta(seconds=float(os.environ.get("RETENTION_SECONDS", "600")))
journal = Journal(Base.metadata, store, retention=retention)
Session = blob_sessionmaker(engine, journal=journal)
blobs = BlobApp(engine=engine, stores=store, metadata=Base.metadata, journal=journal)
worker = Worker(journal, engine)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Open the store, and let a worker run as long as the application does."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    stop = asyncio.Event()
    async with store, asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.run(stop))
        yield
        stop.set()
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.post("/pages", status_code=204)
async def create_page(
    name: Annotated[str, Form()],
    title: Annotated[str, Form()],
    html: UploadFile,
    image: UploadFile | None = None,
) -> None:
    """Create a page: staged, uploaded, and adopted by its row."""
    page = Page(name=name, title=title, html=Blob(html), image=Blob(image) if image else None)
    async with Session.begin() as session:
        session.add(page)


@app.put("/pages/{name}", status_code=204)
async def update_page(
    name: str,
    title: Annotated[str, Form()],
    html: UploadFile,
    image: UploadFile | None = None,
) -> None:
    """Replace a page. What it had before goes when its retention is over."""
    page = await read_page(name)
    async with Session() as session:
        session.add(page)
        page.title, page.html, page.image = title, Blob(html), Blob(image) if image else None
        await upload_blobs(session, page)  # no connection is held, and nothing was read yet
        await session.commit()


@app.get("/pages/{name}")
async def show_page(name: str) -> Response:
    """Send the page."""
    page = await read_page(name)
    return Response(await page.html.read(), media_type="text/html")


async def read_page(name: str) -> Page:
    """Read a row in a transaction of its own, over before any bytes travel."""
    async with Session() as session:
        page = await session.get(Page, name)
    if page is None:
        raise HTTPException(404)
    return page


@app.delete("/pages", status_code=204)
async def delete_pages(prefix: str) -> None:
    """Delete many rows by SQL, which knows nothing of objects; the triggers tell the journal."""
    async with engine.begin() as connection:
        condition = {"first": prefix, "length": len(prefix)}
        await connection.execute(
            text("DELETE FROM pages WHERE substr(name, 1, :length) = :first"), condition
        )


@app.get("/health")
async def health() -> dict[str, Any]:
    """Tell how far the worker is behind, and how many objects S3 refuses to delete."""
    status = await journal_status(engine, journal)
    return {"lag_seconds": status.lag.total_seconds(), "parked": status.parked_count}


@app.exception_handler(IntegrityError)
@app.exception_handler(StaleDataError)
async def conflict(_request: Request, _error: Exception) -> Response:
    """Another request was faster; what this one has uploaded is deleted already."""
    return JSONResponse({"detail": "created or deleted meanwhile"}, status_code=409)


@app.exception_handler(CommitOutcomeUnknown)
async def lost(_request: Request, error: CommitOutcomeUnknown) -> Response:
    """The answer to COMMIT was lost, but the journal mostly knows what became of it."""
    if error.outcome is Outcome.COMMITTED:
        return Response(status_code=204)
    return JSONResponse({"detail": f"it is {error.outcome.value}, try again"}, status_code=503)
