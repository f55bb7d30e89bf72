"""sqlalchemy-file: `FileField` columns, a synchronous session in a thread, libcloud's S3 driver.

Source: its documentation, "Quick Start".
"""

# mypy: disable-error-code="import-not-found, no-untyped-call"

from __future__ import annotations

import asyncio
import contextlib
import urllib.parse
import uuid
from collections.abc import AsyncIterator
from typing import Any

import libcloud.security
from libcloud.storage.base import Container
from libcloud.storage.drivers.s3 import S3StorageDriver
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy_file import File, FileField
from sqlalchemy_file.storage import StorageManager

from ..place import BUCKET, KEY_ID, SECRET, Act, Place
from ..tables import COLUMNS, use_wal


class Base(DeclarativeBase):
    """The metadata of its rows."""


class FileRow(Base):
    """A row of files."""

    __tablename__ = "file_rows"

    id: Mapped[str] = mapped_column(primary_key=True)
    blob_1: Mapped[Any | None] = mapped_column(FileField)
    blob_2: Mapped[Any | None] = mapped_column(FileField)
    blob_3: Mapped[Any | None] = mapped_column(FileField)
    blob_4: Mapped[Any | None] = mapped_column(FileField)
    blob_5: Mapped[Any | None] = mapped_column(FileField)
    blob_6: Mapped[Any | None] = mapped_column(FileField)
    blob_7: Mapped[Any | None] = mapped_column(FileField)
    blob_8: Mapped[Any | None] = mapped_column(FileField)


@contextlib.asynccontextmanager
async def create(place: Place) -> AsyncIterator[Act]:
    """Create a row."""
    bodies = place.bodies()
    url = urllib.parse.urlsplit(place.endpoint_url)
    if place.ca_file is not None:
        libcloud.security.CA_CERTS_PATH = str(place.ca_file)
    driver = S3StorageDriver(
        KEY_ID, SECRET, secure=url.scheme == "https", host=url.hostname, port=url.port
    )
    StorageManager.add_storage("files", Container(BUCKET, {}, driver))
    engine = create_engine(f"sqlite:///{place.directory / 'files'}.db")
    use_wal(engine)
    Base.metadata.create_all(engine)

    def create_now() -> None:
        files = {c: File(content=body) for c, body in zip(COLUMNS, bodies, strict=False)}
        with Session(engine, expire_on_commit=False) as session:
            session.add(FileRow(id=uuid.uuid4().hex, **files))
            session.commit()

    try:
        yield Act(lambda _: asyncio.to_thread(create_now))
    finally:
        engine.dispose()
