"""sqlalchemy-file: `FileField` columns, a plain `Session`, libcloud's local storage.

It is a synchronous library, so it runs on a synchronous session and driver, behind coroutines
that never wait. The local driver keeps each object's metadata in a file beside it; these files
belong to their objects and are not counted.

Source: its documentation, "Quick Start" and "Session Awareness".
"""

# The project is checked without its peers installed, too; libcloud has untyped functions.
# mypy: disable-error-code="import-not-found, no-untyped-call"

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar
from unittest import mock

from bench import DocSession, Lab, Operation, awaited, use_explicit_begin
from libcloud.storage.drivers.local import LocalStorageDriver
from sqlalchemy import Engine, ForeignKey, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy_file import File, FileField
from sqlalchemy_file.storage import StorageManager

METADATA = ".metadata.json"


class Base(DeclarativeBase):
    """The metadata of this library's tables."""


class Doc(Base):
    """A row with two files."""

    __tablename__ = "docs"

    id: Mapped[int] = mapped_column(primary_key=True)
    says: Mapped[str]
    file: Mapped[Any | None] = mapped_column(FileField)
    thumb: Mapped[Any | None] = mapped_column(FileField)
    folder_id: Mapped[int | None] = mapped_column(ForeignKey("folders.id"))


class Folder(Base):
    """A row that owns others."""

    __tablename__ = "folders"

    id: Mapped[int] = mapped_column(primary_key=True)
    docs: Mapped[list[Doc]] = relationship(cascade="all, delete-orphan", lazy="selectin")


class PlainSession:
    """A `Session` behind the verbs of an `AsyncSession`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, instance: object) -> None:
        """Add a new row."""
        self._session.add(instance)

    def expire(self, instance: object) -> None:
        """Forget what was loaded of a row."""
        self._session.expire(instance)

    def begin(self) -> AbstractAsyncContextManager[Any]:
        """Open a block that commits, or rolls back when it raises."""
        return awaited(self._session.begin())

    def begin_nested(self) -> AbstractAsyncContextManager[Any]:
        """Open a savepoint."""
        return awaited(self._session.begin_nested())

    async def get_one(self, entity: Any, ident: Any) -> Any:
        """Load a row."""
        return self._session.get_one(entity, ident)

    async def delete(self, instance: object) -> None:
        """Delete a row."""
        self._session.delete(instance)

    async def execute(self, statement: Any) -> Any:
        """Send a statement."""
        return self._session.execute(statement)

    async def flush(self) -> None:
        """Send what changed."""
        self._session.flush()

    async def commit(self) -> None:
        """Commit."""
        self._session.commit()

    async def rollback(self) -> None:
        """Roll back."""
        self._session.rollback()


class SqlalchemyFileLab(Lab):
    """Keys are made by the library."""

    distribution = "sqlalchemy-file"
    cannot_play: ClassVar[dict[str, str]] = {
        "cancelled_upload": "its upload is synchronous, nothing can cancel it",
        "cancelled_commit": "its session is synchronous, nothing can cancel COMMIT",
    }
    Doc = Doc
    Folder = Folder

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Make an empty storage the default one, and make the tables."""
        self._files = self.directory / "storage" / "files"
        self._files.mkdir(parents=True)
        self._driver = LocalStorageDriver(str(self._files.parent))
        storage = uuid.uuid4().hex
        StorageManager.add_storage(storage, self._driver.get_container(self._files.name))
        StorageManager.set_default(storage)
        self._engine = create_engine(f"sqlite:///{self.database}")
        use_explicit_begin(self._engine)
        Base.metadata.create_all(self._engine)
        with (
            self._faulty("upload_object_via_stream", "put"),
            self._faulty("delete_object", "delete"),
        ):
            yield
            self._engine.dispose()

    def _faulty(self, method: str, operation: Operation) -> contextlib.AbstractContextManager[Any]:
        carry_out = getattr(self._driver, method)

        def meet(*args: Any, **kwargs: Any) -> Any:
            if not _is_metadata(*args, **kwargs):
                self.faults.meet_now(operation)
            return carry_out(*args, **kwargs)

        return mock.patch.object(self._driver, method, meet)

    @property
    def engine(self) -> Engine:
        """The synchronous engine."""
        return self._engine

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[DocSession]:
        """Open a plain session; importing the library has equipped them all."""
        with Session(self._engine, expire_on_commit=False) as session:
            yield PlainSession(session)

    def file(self, content: bytes, *, name: str | None = None) -> File:
        """Return a `File`; its name is metadata only."""
        return File(content=content, filename=name)

    def key(self, value: str) -> str:
        """Return the identifier that the library made."""
        return str(json.loads(value)["file_id"])

    def objects(self) -> dict[str, bytes]:
        """Return what the directory holds."""
        files = [each for each in self._files.iterdir() if not each.name.endswith(METADATA)]
        return {each.name: each.read_bytes() for each in files}


def _is_metadata(*args: Any, **kwargs: Any) -> bool:
    names = (kwargs.get("object_name", ""), *(getattr(each, "name", "") for each in args))
    return any(str(each).endswith(METADATA) for each in names)


LAB = SqlalchemyFileLab
