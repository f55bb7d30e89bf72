"""Pages with their HTML and their picture in managed columns: a FastAPI application.

    S3_BUCKET=pages uvicorn managed_fastapi:app

The environment says where: DATABASE_URL, S3_BUCKET, S3_ENDPOINT_URL (for a server that is not
AWS), and what the AWS SDKs read (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.orm.exc import StaleDataError

from aioblobcol import (
    Blob,
    BlobNotFoundError,
    BlobTooLargeError,
    BlobType,
    BlobUploadError,
    CommitOutcomeUnknown,
    ContentTypeRefusedError,
    blob_sessionmaker,
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
Session = blob_sessionmaker(engine, store, background=True)


class Base(DeclarativeBase):
    """The metadata of this application."""


class Page(Base):
    """A page: S3 holds the bytes, the row holds what is needed to list them."""

    __tablename__ = "pages"

    name: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str]
    html: Mapped[Blob] = mapped_column(
        BlobType(format="json", content_type="text/html", accept=["text/html"])
    )
    image: Mapped[Blob | None] = mapped_column(
        BlobType(format="json", max_bytes=10 * 2**20, accept=["image/*"])
    )


class PageOut(BaseModel):
    """What clients see: of each blob its size, content type and file name, and no URI."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    title: str
    html: Blob
    image: Blob | None


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Open the store once for all requests; leaving it finishes its background work."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with store:
        yield
    await engine.dispose()


async def open_session() -> AsyncIterator[AsyncSession]:
    """Give a handler its session. The handlers commit by themselves; what they do not is undone."""
    async with Session() as session:
        yield session


# With this scope the session is closed before the response is sent, and not after it.
Database = Annotated[AsyncSession, Depends(open_session, scope="function")]

app = FastAPI(lifespan=lifespan)


@app.post("/pages", status_code=201, response_model=PageOut)
async def create_page(
    session: Database,
    name: Annotated[str, Form()],
    title: Annotated[str, Form()],
    html: UploadFile,
    image: UploadFile | None = None,
) -> Page:
    """Create a page. Its row is committed before the answer is sent."""
    page = Page(name=name, title=title, html=Blob(html), image=Blob(image) if image else None)
    session.add(page)
    await session.commit()  # uploads both at once, and then asks for a connection
    return page


@app.put("/pages/{name}", response_model=PageOut)
async def update_page(
    session: Database,
    name: str,
    title: Annotated[str, Form()],
    html: UploadFile,
    image: UploadFile | None = None,
) -> Page:
    """Replace both columns. Of two requests at the same time the later one wins."""
    page = await read_page(name)
    session.add(page)
    page.title = title
    page.html = Blob(html)
    page.image = Blob(image) if image else None
    await upload_blobs(session, page)  # no connection is held meanwhile
    await session.commit()
    return page


@app.delete("/pages/{name}", status_code=204)
async def delete_page(session: Database, name: str) -> None:
    """Delete the row, and after the commit its objects."""
    await session.delete(await read_page(name))
    await session.commit()


@app.get("/pages", response_model=list[PageOut])
async def list_pages(session: Database) -> list[Page]:
    """List all pages: one SELECT, and no request to S3."""
    return list(await session.scalars(select(Page).order_by(Page.name)))


@app.get("/pages/{name}", response_model=PageOut)
async def show_page(name: str) -> Page:
    """Describe a page."""
    return await read_page(name)


@app.get("/pages/{name}/{column}")
async def show_column(name: str, column: Literal["html", "image"]) -> Response:
    """Stream the bytes of a column, in chunks; the session is closed before."""
    page = await read_page(name)
    blob = page.html if column == "html" else page.image
    if blob is None:
        raise HTTPException(404)
    async with AsyncExitStack() as opened:
        body = await opened.enter_async_context(blob.open())  # an error here is still answered
        kept_open = opened.pop_all()

    async def chunks() -> AsyncIterator[bytes]:
        async with kept_open:
            async for chunk in body:
                yield chunk

    return StreamingResponse(
        chunks(), media_type=blob.content_type, headers={"Content-Length": str(blob.size)}
    )


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
    # another request deleted the row meanwhile
    StaleDataError: (409, "the page was deleted meanwhile"),
    # the column does not take it; nothing was sent
    BlobTooLargeError: (413, "this file is too large"),
    ContentTypeRefusedError: (415, "this kind of file is not taken"),
    # S3 did not take an object, so the row was never written
    BlobUploadError: (502, "the storage did not take the upload, nothing was changed"),
    # the answer to COMMIT was lost: only reading the row again tells what became of it
    CommitOutcomeUnknown: (503, "nobody knows whether it was saved, read the page again"),
    # the object was replaced after its row was read: the next attempt finds the new one
    BlobNotFoundError: (503, "the page was changed meanwhile, try again"),
}


async def answer(_request: Request, error: Exception) -> Response:
    """Tell the client what it can do; the URIs are nobody else's business."""
    cause = error.__cause__  # what shows only when the bytes are read is the cause
    refused = cause if isinstance(cause, (BlobTooLargeError, ContentTypeRefusedError)) else error
    status, detail = ANSWERS[type(refused)]
    return JSONResponse({"detail": detail}, status_code=status)


for expected in ANSWERS:
    app.add_exception_handler(expected, answer)
