"""A FastAPI application with managed columns: forms and uploads in, descriptions out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI, File, Form, HTTPException, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aioblobcol import (
    Blob,
    BlobTooLargeError,
    BlobType,
    ContentTypeRefusedError,
    blob_sessionmaker,
)
from aioblobcol.testing import MemoryStore

CAT = b"\x89PNG\r\n\x1a\n"
PNG = ("cät.png", CAT, "image/png")


class Base(DeclarativeBase):
    pass


class Doc(Base):
    __tablename__ = "docs"
    name: Mapped[str] = mapped_column(primary_key=True)
    scan: Mapped[Blob | None] = mapped_column(
        BlobType(format="json", max_bytes=10, accept=("image/*",))
    )


class DocForm(BaseModel):
    name: str
    scan: Blob | None = None


class DocOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    name: str
    scan: Blob | None


def application(session: Any) -> FastAPI:  # noqa: C901 - one line for each route
    app = FastAPI()

    @app.post("/form", response_model=DocOut)
    async def form(given: Annotated[DocForm, Form(media_type="multipart/form-data")]) -> Doc:
        return await save(Doc(**given.model_dump()))

    @app.post("/upload/{name}", response_model=DocOut)
    async def upload(name: str, scan: UploadFile) -> Doc:
        return await save(Doc(name=name, scan=Blob(scan)))

    @app.post("/file/{name}", response_model=DocOut)
    async def file(name: str, scan: Annotated[Blob, File()]) -> Doc:
        return await save(Doc(name=name, scan=scan))

    @app.post("/json", response_model=DocOut)
    async def body(given: DocForm) -> Doc:
        return await save(Doc(**given.model_dump()))

    @app.get("/docs/{name}", response_model=DocOut)
    async def get(name: str) -> Doc:
        async with session() as reading:
            doc: Doc = await reading.get_one(Doc, name)
        return doc

    @app.get("/docs/{name}/scan")
    async def download(name: str) -> StreamingResponse:
        async with session() as reading:
            scan = (await reading.get_one(Doc, name)).scan

        async def chunks() -> AsyncIterator[bytes]:
            async with scan.open() as body:
                async for chunk in body:
                    yield chunk

        return StreamingResponse(chunks(), media_type=scan.content_type)

    async def save(doc: Doc) -> Doc:
        try:
            async with session.begin() as writing:
                writing.add(doc)
        except BlobTooLargeError as exc:
            raise HTTPException(413, str(exc)) from exc
        except ContentTypeRefusedError as exc:
            raise HTTPException(415, str(exc)) from exc
        return doc

    return app


@pytest_asyncio.fixture
async def client(tmp_path: Path, memory_store: MemoryStore) -> AsyncIterator[httpx.AsyncClient]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    transport = httpx.ASGITransport(app=application(blob_sessionmaker(engine, memory_store)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened
    await engine.dispose()


class TestUploads:
    @pytest.mark.parametrize(
        ("url", "fields"), [("/form", {"name": "d"}), ("/upload/d", {}), ("/file/d", {})]
    )
    async def test_are_stored_with_their_row(
        self,
        client: httpx.AsyncClient,
        memory_store: MemoryStore,
        url: str,
        fields: dict[str, str],
    ) -> None:
        """A field of a form model, an `UploadFile` and a `Blob` parameter end in a row."""
        answer = await client.post(url, data=fields, files={"scan": PNG})

        scan = {"size": len(CAT), "content_type": "image/png", "filename": "cät.png"}
        assert (answer.status_code, answer.json()) == (200, {"name": "d", "scan": scan})
        assert [each.body for each in memory_store.objects.values()] == [CAT]
        assert (await client.get("/docs/d")).json() == answer.json()
        download = await client.get("/docs/d/scan")
        assert (download.content, download.headers["content-type"]) == (CAT, "image/png")

    async def test_may_be_left_out(
        self, client: httpx.AsyncClient, memory_store: MemoryStore
    ) -> None:
        """A form without the file makes a row without a blob."""
        answer = await client.post("/form", data={"name": "d"}, files={"other": PNG})

        assert answer.json() == {"name": "d", "scan": None}
        assert memory_store.calls == []

    @pytest.mark.parametrize(
        ("scan", "status"),
        [
            (("x.png", b"12345678901", "image/png"), 413),
            (("x.txt", b"text", "text/plain"), 415),
            (("x.png", b"cat", "png"), 422),
        ],
        ids=["too large", "another type", "no type"],
    )
    async def test_that_are_refused(
        self,
        client: httpx.AsyncClient,
        memory_store: MemoryStore,
        scan: tuple[str, bytes, str],
        status: int,
    ) -> None:
        """What the column refuses is refused before anything is sent, as an error of its own."""
        answer = await client.post("/form", data={"name": "d"}, files={"scan": scan})

        assert answer.status_code == status
        assert memory_store.calls == []


class TestUris:
    @pytest.mark.parametrize("given", ["s3://bucket/prefix/k", {"uri": "s3://bucket/prefix/k"}, 5])
    async def test_are_refused_in_json(
        self, client: httpx.AsyncClient, memory_store: MemoryStore, given: object
    ) -> None:
        """A client cannot choose an object in a JSON body."""
        answer = await client.post("/json", json={"name": "d", "scan": given})

        assert answer.status_code == 422
        assert "a URI or other text is never taken" in answer.text
        assert memory_store.calls == []

    @pytest.mark.parametrize("url", ["/form", "/upload/d", "/file/d"])
    async def test_are_refused_in_forms(
        self, client: httpx.AsyncClient, memory_store: MemoryStore, url: str
    ) -> None:
        """Nor in a field of a form."""
        fields = {"name": "d", "scan": "s3://bucket/prefix/k"}
        answer = await client.post(url, data=fields, files={"other": PNG})

        assert answer.status_code == 422
        assert memory_store.calls == []

    async def test_json_without_a_blob(self, client: httpx.AsyncClient) -> None:
        """A JSON body may leave the blob out."""
        answer = await client.post("/json", json={"name": "d", "scan": None})

        assert answer.json() == {"name": "d", "scan": None}


class TestOpenApi:
    async def test_the_document(self, client: httpx.AsyncClient) -> None:
        """Files come in, and descriptions go out."""
        schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
        incoming = schemas["DocForm"]["properties"]["scan"]["anyOf"][0]
        outgoing = schemas["DocOut"]["properties"]["scan"]["anyOf"][0]

        assert incoming == {"type": "string", "format": "binary"}
        assert outgoing["required"] == ["size", "content_type", "filename"]
