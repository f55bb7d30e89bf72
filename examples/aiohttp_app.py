"""Pages with their HTML and their picture in S3: an aiohttp application.

    S3_BUCKET=pages python aiohttp_app.py

The environment says where: DATABASE_URL, S3_BUCKET, S3_ENDPOINT_URL (for a server that is not
AWS), and what the AWS SDKs read (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler
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
routes = web.RouteTableDef()


class Base(DeclarativeBase):
    """The metadata of this application."""


class Page(Base):
    """A page: the row holds the URIs, S3 holds the bytes."""

    __tablename__ = "pages"

    name: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str]
    html: Mapped[str | None]
    image: Mapped[str | None]


@routes.post("/pages")
async def create_page(request: web.Request) -> web.Response:
    """Create a page. The row is committed before the answer is sent."""
    name, title = await text(request, "name"), await text(request, "title")
    html, image = await file(request, "html"), await file(request, "image")
    async with Session() as session, blob_transaction(session, store=store) as tx:
        put = await tx.put_s3(
            pk=name,
            api_calls=[
                PutS3ApiCall("html", html, None, {"ContentType": "text/html"}),
                PutS3ApiCall("image", image, None, {"ContentType": "image/png"}),
            ],
        )
        session.add(Page(name=name, title=title, **put.to_values()))
    return web.json_response({"name": name, "title": title}, status=201)


@routes.put("/pages/{name}")
async def update_page(request: web.Request) -> web.Response:
    """Replace both columns, unless somebody else does so at the same time."""
    title = await text(request, "title")
    html, image = await file(request, "html"), await file(request, "image")
    old = await read_page(request)
    # The session takes its connection for the UPDATE, after the bytes have travelled.
    async with Session() as session, blob_transaction(session, store=store, background=True) as tx:
        put = await tx.put_s3(
            pk=old.name,
            api_calls=[
                PutS3ApiCall("html", html, old.html, {"ContentType": "text/html"}),
                PutS3ApiCall("image", image, old.image, {"ContentType": "image/png"}),
            ],
        )
        row = update(Page).where(Page.name == old.name, put.guard(Page))
        await session.execute(row.values(title=title, **put.to_values()))
    return web.json_response({"name": old.name, "title": title})


@routes.delete("/pages/{name}")
async def delete_page(request: web.Request) -> web.Response:
    """Delete the row, and after the commit its objects."""
    old = await read_page(request)
    async with Session() as session, blob_transaction(session, store=store) as tx:
        tx.delete_s3([old.html, old.image])
        unchanged = guard(Page, html=old.html, image=old.image)
        await session.execute(delete(Page).where(Page.name == old.name, unchanged))
    return web.Response(status=204)


@routes.get("/pages/{name}")
async def show_page(request: web.Request) -> web.Response:
    """Return the row."""
    page = await read_page(request)
    return web.json_response(
        {"name": page.name, "title": page.title, "html": page.html, "image": page.image}
    )


@routes.get("/pages/{name}/{column:html|image}")
async def show_column(request: web.Request) -> web.Response:
    """Return the bytes of a column."""
    page = await read_page(request)
    is_html = request.match_info["column"] == "html"
    uri = page.html if is_html else page.image
    if uri is None:
        raise web.HTTPNotFound
    content_type = "text/html" if is_html else "image/png"
    return web.Response(body=await store.get(uri), content_type=content_type)


async def read_page(request: web.Request) -> Page:
    """Read a row and give the connection back, so that none is held while bytes travel."""
    async with Session() as session:
        page = await session.get(Page, request.match_info["name"])
    if page is None:
        raise web.HTTPNotFound
    return page


async def text(request: web.Request, field: str) -> str:
    """Return a text field of the form."""
    value = (await request.post()).get(field)
    if not isinstance(value, str):
        raise web.HTTPUnprocessableEntity(text=f"{field} is a text field")
    return value


async def file(request: web.Request, field: str) -> bytes:
    """Return an uploaded file of the form."""
    value = (await request.post()).get(field)
    if not isinstance(value, web.FileField):
        raise web.HTTPUnprocessableEntity(text=f"{field} is a file")
    return await asyncio.to_thread(value.file.read)


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


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Tell the client what it can do; the URIs are nobody else's business."""
    try:
        return await handler(request)
    except tuple(ANSWERS) as error:
        status, detail = ANSWERS[type(error)]
        return web.json_response({"detail": detail}, status=status)


async def stores(_app: web.Application) -> AsyncIterator[None]:
    """Open the store once for all requests; leaving it finishes its background work."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with store:
        yield
    await engine.dispose()


def make_app() -> web.Application:
    """Return the application."""
    app = web.Application(middlewares=[answer_errors], client_max_size=64 * 1024**2)
    app.cleanup_ctx.append(stores)
    app.add_routes(routes)
    return app


if __name__ == "__main__":
    web.run_app(make_app())
