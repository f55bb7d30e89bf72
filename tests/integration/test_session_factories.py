"""Sessions of other makers, and what a column asks of an upload: with real databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from advanced_alchemy.base import BasicAttributes
from advanced_alchemy.config import SQLAlchemyAsyncConfig
from advanced_alchemy.exceptions import RepositoryError
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlmodel import Field, SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession as ModelSession
from support.databases import Database
from support.uploads import Upload

from aioblobcol import (
    Blob,
    BlobTooLargeError,
    BlobType,
    BlobUploadError,
    ContentTypeRefusedError,
    InvalidInputError,
    InvalidPrefixError,
    InvalidPutArgumentsError,
    blob_sessionmaker,
    track_blobs,
    upload_blobs,
)
from aioblobcol.testing import MemoryStore

PNG = b"\x89PNG\r\n\x1a\n"


class Base(DeclarativeBase):
    pass


class Doc(BasicAttributes, Base):
    __tablename__ = "factory_docs"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str | None]
    scan: Mapped[Blob | None] = mapped_column(BlobType())
    image: Mapped[Blob | None] = mapped_column(
        BlobType(content_type="image/png", max_bytes=10, accept=("image/*",))
    )
    archived: Mapped[Blob | None] = mapped_column(BlobType(format="json", store="archive"))
    private: Mapped[Blob | None] = mapped_column(
        BlobType(
            prefix=lambda doc: f"tenants/{doc.tenant}",
            put_arguments={"StorageClass": "STANDARD_IA"},
        )
    )


class Page(SQLModel, table=True):
    __tablename__ = "factory_pages"
    id: int | None = Field(default=None, primary_key=True)
    html: Blob | None = Field(default=None, sa_type=BlobType)


PNG = b"\x89PNG\r\n\x1a\n"
COLUMNS: list[Any] = [Doc.scan, Doc.image, Doc.archived, Doc.private, Page.html]
TABLES = [Doc.__table__, SQLModel.metadata.tables["factory_pages"]]


@pytest_asyncio.fixture
async def tables(database: Database) -> AsyncIterator[Database]:
    """Give a database with the tables of this module, empty."""
    async with database.engine.begin() as connection:
        for table in TABLES:
            await connection.run_sync(table.drop, checkfirst=True)  # type: ignore[attr-defined]
            await connection.run_sync(table.create)  # type: ignore[attr-defined]
    yield database


@pytest_asyncio.fixture
async def archive() -> AsyncIterator[MemoryStore]:
    async with MemoryStore(bucket="archive", prefix="old") as store:
        yield store


@pytest.fixture
def session(
    tables: Database, memory_store: MemoryStore, archive: MemoryStore
) -> async_sessionmaker[AsyncSession]:
    return blob_sessionmaker(tables.engine, stores={"default": memory_store, "archive": archive})


async def both_agree(store: MemoryStore, database: Database) -> list[bytes]:
    """Return the bodies that the rows name, after asking that the store has these and no other."""
    async with database.engine.connect() as connection:
        found = [
            blob.uri
            for column in COLUMNS
            for blob in (await connection.scalars(sa.select(column))).all()
            if blob is not None and blob.uri.startswith(f"s3://{store.bucket}/")
        ]
    assert sorted(found) == sorted(store.objects)
    return sorted(store.objects[uri].body for uri in found)


class Life:
    """What every session must do, whoever made it."""

    def __init__(self, database: Database, store: MemoryStore) -> None:
        self.database, self.store = database, store

    async def __call__(self, open_session: Any, make: Any, key: str) -> None:
        """Create, read, replace, roll back, close without a commit, and delete."""
        async with open_session() as session:
            session.add(make(id=1, **{key: Blob(b"one")}))
            await session.commit()
        await self.check(b"one")

        async with open_session() as session:
            loaded = await session.get(make, 1)
            assert await getattr(loaded, key).read() == b"one"
            setattr(loaded, key, Blob(b"two"))
            await session.commit()
        await self.check(b"two")

        async with open_session() as session:
            loaded = await session.get(make, 1)
            setattr(loaded, key, Blob(b"three"))
            session.add(make(id=2, **{key: Blob(b"four")}))
            await session.flush()
            await session.rollback()
            await self.check(b"two")
            session.add(make(id=2, **{key: Blob(b"five")}))
            await session.flush()
        await self.check(b"two")

        async with open_session() as session:
            await session.delete(await session.get(make, 1))
            await session.commit()
        await self.check()

    async def check(self, *bodies: bytes) -> None:
        assert await both_agree(self.store, self.database) == sorted(bodies)


@pytest.fixture
def life(tables: Database, memory_store: MemoryStore) -> Life:
    return Life(tables, memory_store)


class Docs(SQLAlchemyAsyncRepository[Doc]):
    model_type = Doc


class TestAdvancedAlchemy:
    def config(self, database: Database, **arguments: Any) -> SQLAlchemyAsyncConfig:
        return SQLAlchemyAsyncConfig(engine_instance=database.engine, **arguments)

    async def test_its_session_maker(
        self, tables: Database, memory_store: MemoryStore, life: Life
    ) -> None:
        """The session maker of a config is equipped in place."""
        maker = self.config(tables).create_session_maker()
        assert track_blobs(maker, memory_store) is maker  # type: ignore[call-overload]

        await life(maker, Doc, "scan")

    async def test_its_config(
        self, tables: Database, memory_store: MemoryStore, life: Life
    ) -> None:
        """A config takes the factory of `blob_sessionmaker`, and opens sessions that upload."""
        factory = blob_sessionmaker(tables.engine, memory_store)
        config = self.config(tables, session_maker=factory)

        await life(config.get_session, Doc, "scan")

    async def test_a_repository(
        self, tables: Database, memory_store: MemoryStore, life: Life
    ) -> None:
        """Every verb of a repository keeps both stores alike."""
        factory = blob_sessionmaker(tables.engine, memory_store)
        async with factory() as session:
            docs = Docs(session=session)
            await docs.add(Doc(id=1, scan=Blob(b"one")))
            await docs.add_many([Doc(id=i, scan=Blob(b"many")) for i in (2, 3)])
            await session.commit()
        await life.check(b"one", b"many", b"many")

        async with factory() as session:
            docs = Docs(session=session, auto_commit=True)
            await docs.update(Doc(id=1, scan=Blob(b"updated")))
            await life.check(b"updated", b"many", b"many")
            await docs.upsert(Doc(id=2, scan=Blob(b"upserted")))
            await docs.upsert(Doc(id=4, scan=Blob(b"inserted")))
            await life.check(b"updated", b"upserted", b"inserted", b"many")
            await docs.update_many([Doc(id=3, scan=Blob(b"updated too"))])
            await life.check(b"updated", b"upserted", b"inserted", b"updated too")
            await docs.delete(1)
            await docs.delete_many([2, 3])
            await life.check(b"inserted")
            await docs.delete_where(id=4)
            await life.check()

    async def test_a_repository_that_fails(
        self, tables: Database, memory_store: MemoryStore, life: Life
    ) -> None:
        """A key that is taken leaves nothing behind."""
        factory = blob_sessionmaker(tables.engine, memory_store)
        async with factory() as session:
            await Docs(session=session, auto_commit=True).add(Doc(id=1, scan=Blob(b"one")))
        async with factory() as session:
            with pytest.raises(RepositoryError):
                await Docs(session=session, auto_commit=True).add(Doc(id=1, scan=Blob(b"two")))

        await life.check(b"one")


class TestSqlModel:
    @pytest.fixture(params=["class_", "track_blobs"])
    def models(
        self, request: pytest.FixtureRequest, tables: Database, memory_store: MemoryStore
    ) -> async_sessionmaker[ModelSession]:
        if request.param == "class_":
            return blob_sessionmaker(tables.engine, memory_store, class_=ModelSession)
        tracked = track_blobs(ModelSession, memory_store)
        return async_sessionmaker(tables.engine, class_=tracked, expire_on_commit=False)

    async def test_its_session(self, models: async_sessionmaker[ModelSession], life: Life) -> None:
        """SQLModel's session uploads, for its own models and for others."""
        async with models() as session:
            assert isinstance(session, ModelSession)
        await life(models, Page, "html")
        await life(models, Doc, "scan")

    async def test_exec(
        self, models: async_sessionmaker[ModelSession], life: Life, memory_store: MemoryStore
    ) -> None:
        """`session.exec` reads bound blobs."""
        async with models.begin() as session:
            session.add(Page(id=1, html=Blob(b"one")))
        async with models() as session:
            (page,) = (await session.exec(select(Page))).all()
        assert page.html is not None
        assert await page.html.read() == b"one"

    async def test_the_class_itself_is_left_alone(
        self, models: async_sessionmaker[ModelSession], tables: Database
    ) -> None:
        """Sessions of the class that was given do not upload."""
        async with ModelSession(tables.engine) as session:
            session.add(Page(id=1, html=Blob(b"one")))
            with pytest.raises(sa.exc.StatementError, match="before it was uploaded"):
                await session.flush()


class TestScopedSessions:
    @pytest.mark.parametrize("way", ["of the factory", "of the scoped session"])
    async def test_both_ways(
        self, tables: Database, memory_store: MemoryStore, life: Life, way: str
    ) -> None:
        """A scoped session uploads, if its factory does or if it is equipped itself."""
        if way == "of the factory":
            factory = blob_sessionmaker(tables.engine, memory_store)
            scoped = async_scoped_session(factory, scopefunc=asyncio.current_task)
        else:
            factory = async_sessionmaker(tables.engine, expire_on_commit=False)
            scoped = async_scoped_session(factory, scopefunc=asyncio.current_task)
            assert track_blobs(scoped, memory_store) is scoped
        await life(scoped, Doc, "scan")
        await scoped.remove()

        scoped.add(doc := Doc(id=1, scan=Blob(b"one")))
        await scoped.commit()
        await life.check(b"one")
        doc.scan = Blob(b"two")
        await upload_blobs(scoped, doc)
        assert doc.scan.is_stored
        await scoped.rollback()
        await life.check(b"one")
        await scoped.remove()


class TestTrackBlobs:
    async def test_a_factory(self, tables: Database, memory_store: MemoryStore, life: Life) -> None:
        """A factory is equipped in place, and keeps its arguments."""
        factory = async_sessionmaker(tables.engine, expire_on_commit=False, info={"a": 1})
        assert track_blobs(factory, memory_store) is factory

        async with factory() as session:
            assert session.info["a"] == 1
            assert session.sync_session.expire_on_commit is False
        await life(factory, Doc, "scan")
        async with factory.begin() as session:
            session.add(Doc(id=1, scan=Blob(b"one")))
        await life.check(b"one")

    async def test_a_class_with_its_own_commit(
        self, tables: Database, memory_store: MemoryStore, life: Life
    ) -> None:
        """A subclass keeps what it does itself, and calls ours with `super()`."""
        commits: list[AsyncSession] = []

        class Counting(AsyncSession):
            async def commit(self) -> None:
                commits.append(self)
                await super().commit()

        tracked = track_blobs(Counting, memory_store)
        assert issubclass(tracked, Counting)
        assert tracked.__name__ == "Counting"
        factory = async_sessionmaker(tables.engine, class_=tracked, expire_on_commit=False)
        await life(factory, Doc, "scan")

        assert len(commits) == 3

    async def test_twice(self, tables: Database, memory_store: MemoryStore, life: Life) -> None:
        """What is equipped already gets other stores."""
        factory = blob_sessionmaker(tables.engine, MemoryStore(bucket="closed"))
        await life(track_blobs(factory, memory_store), Doc, "scan")

    @pytest.mark.parametrize("target", [Session, object(), None, "AsyncSession"])
    def test_something_else(self, target: Any) -> None:
        """What is no class or factory of `AsyncSession` is refused."""
        with pytest.raises(InvalidInputError, match="AsyncSession"):
            track_blobs(target, MemoryStore())

    @pytest.mark.parametrize(
        ("arguments", "advice"),
        [
            ({}, "which store"),
            ({"store": "bucket"}, "not a store"),
            ({"stores": {"a": None}}, "not a store"),
            ({"store": MemoryStore(), "stores": {"default": MemoryStore()}}, "once"),
            ({"store": MemoryStore(), "commit_seconds": 0}, "positive"),
        ],
    )
    def test_unusable_arguments(self, arguments: dict[str, Any], advice: str) -> None:
        """Stores and times are checked where the factory is made."""
        with pytest.raises(InvalidInputError, match=advice):
            blob_sessionmaker(None, **arguments)
        with pytest.raises(InvalidInputError, match=advice):
            track_blobs(async_sessionmaker(), **arguments)


class TestASyncSessionClass:
    @pytest.mark.parametrize("way", ["blob_sessionmaker", "track_blobs", "per session"])
    async def test_keeps_its_listeners(
        self, tables: Database, memory_store: MemoryStore, life: Life, way: str
    ) -> None:
        """A plain session class of the user's is used, with the listeners that it has."""

        class Own(Session):
            pass

        flushed: list[Session] = []
        sa.event.listen(Own, "before_flush", lambda session, *_: flushed.append(session))
        arguments: dict[str, Any] = {"sync_session_class": Own}
        if way == "blob_sessionmaker":
            factory = blob_sessionmaker(tables.engine, memory_store, **arguments)
        elif way == "track_blobs":
            factory = async_sessionmaker(tables.engine, expire_on_commit=False, **arguments)
            track_blobs(factory, memory_store)
        else:
            plain = blob_sessionmaker(tables.engine, memory_store)

            def factory() -> AsyncSession:  # type: ignore[misc]
                return plain(**arguments)

        async with factory() as session:
            assert isinstance(session.sync_session, Own)
        await life(factory, Doc, "scan")
        assert flushed

        before = len(flushed)
        sa.event.listen(Own, "after_flush", lambda session, *_: flushed.append(session))
        async with factory() as session:
            session.add(Doc(id=1))
            await session.commit()
        assert len(flushed) > before + 1

    async def test_other_sessions_of_the_class_have_no_part_in_it(
        self, tables: Database, memory_store: MemoryStore
    ) -> None:
        """A plain session on a mapped class with pending blobs fails, and drops no bytes."""
        blob_sessionmaker(tables.engine, memory_store, sync_session_class=Session)
        async with AsyncSession(tables.engine) as session:
            session.add(doc := Doc(id=1, scan=Blob(b"one")))
            with pytest.raises(sa.exc.StatementError, match="blob_sessionmaker"):
                await session.commit()
        assert repr(doc.scan) == "<Blob pending, 3 bytes>"


class TestColumns:
    async def test_several_stores(
        self,
        session: async_sessionmaker[AsyncSession],
        tables: Database,
        memory_store: MemoryStore,
        archive: MemoryStore,
    ) -> None:
        """Each column has its store, in which its blobs are written, read and deleted."""
        async with session.begin() as writing:
            writing.add(Doc(id=1, scan=Blob(b"one"), archived=Blob(b"two")))
        async with session.begin() as reading:
            doc = await reading.get_one(Doc, 1)
            assert doc.scan is not None
            assert doc.archived is not None
            assert await doc.scan.read() == b"one"
            assert await doc.archived.read() == b"two"
            assert doc.archived.uri.startswith("s3://archive/old/")
            doc.scan, doc.archived = doc.archived, doc.scan  # copied from store to store

        (scan,), (archived,) = memory_store.objects.values(), archive.objects.values()
        assert (scan.body, archived.body) == (b"two", b"one")
        assert "copy" not in {call for call, _ in (*memory_store.calls, *archive.calls)}

    async def test_a_copy_from_store_to_store(
        self,
        session: async_sessionmaker[AsyncSession],
        memory_store: MemoryStore,
        archive: MemoryStore,
    ) -> None:
        """What describes an object goes with it to another store."""
        described = Blob(b"x", content_type="text/x", filename="ü", metadata={"a": "b"})
        async with session.begin() as writing:
            writing.add(doc := Doc(id=1, archived=described))
        async with session.begin() as writing:
            doc = await writing.get_one(Doc, 1)
            doc.scan = doc.archived
        assert doc.scan is not None

        assert (await doc.scan.stat()).metadata == (await described.stat()).metadata
        assert (await doc.scan.stat()).content_type == "text/x"

    async def test_a_store_that_the_session_does_not_have(
        self, tables: Database, memory_store: MemoryStore
    ) -> None:
        """A store that nobody gave is named, with what to write; nothing is sent."""
        factory = blob_sessionmaker(tables.engine, memory_store)
        async with factory() as writing:
            writing.add(Doc(id=1, scan=Blob(b"one"), archived=Blob(b"two")))
            with pytest.raises(InvalidInputError, match=r"stores=\{'archive'"):
                await writing.commit()
        assert memory_store.calls == []

    async def test_a_prefix(
        self, session: async_sessionmaker[AsyncSession], memory_store: MemoryStore
    ) -> None:
        """The prefix of the row stands after the store's, and put arguments are sent."""
        async with session.begin() as writing:
            writing.add(doc := Doc(id=1, tenant="42", private=Blob(b"one")))
        assert doc.private is not None

        assert doc.private.uri.startswith(
            "s3://bucket/prefix/tenants/42/factory_docs/col=private/id="
        )
        (stored,) = memory_store.objects.values()
        assert stored.arguments["StorageClass"] == "STANDARD_IA"

    @pytest.mark.parametrize("tenant", ["..", "a//b", "x" * 300])
    async def test_an_unusable_prefix(
        self,
        session: async_sessionmaker[AsyncSession],
        memory_store: MemoryStore,
        tables: Database,
        tenant: str,
    ) -> None:
        """A prefix that no key can have is refused, nothing is sent, the session goes on."""
        async with session() as writing:
            writing.add(doc := Doc(id=1, tenant=tenant, scan=Blob(b"s"), private=Blob(b"one")))
            with pytest.raises(InvalidPrefixError):
                await writing.commit()
            assert memory_store.calls == []
            doc.tenant = "42"
            await writing.commit()
        assert await both_agree(memory_store, tables) == [b"one", b"s"]

    @pytest.mark.parametrize("given", ["", "/", None, 5])
    async def test_a_prefix_that_is_none(
        self, tables: Database, memory_store: MemoryStore, given: Any
    ) -> None:
        """A callable that returns no prefix is refused, and the column is named."""

        class Local(DeclarativeBase):
            pass

        class Row(Local):
            __tablename__ = "factory_docs"
            id: Mapped[int] = mapped_column(primary_key=True)
            scan: Mapped[Blob | None] = mapped_column(BlobType(prefix=lambda _row: given))

        async with blob_sessionmaker(tables.engine, memory_store)() as writing:
            writing.add(Row(id=1, scan=Blob(b"one")))
            with pytest.raises(InvalidPrefixError, match=r"factory_docs\.scan"):
                await writing.commit()
        assert memory_store.calls == []

    async def test_put_arguments_that_the_store_refuses(
        self, tables: Database, s3_store: Any
    ) -> None:
        """An argument that `put_object` does not take is refused before anything is sent."""

        class Local(DeclarativeBase):
            pass

        class Row(Local):
            __tablename__ = "factory_docs"
            id: Mapped[int] = mapped_column(primary_key=True)
            scan: Mapped[Blob | None] = mapped_column(BlobType(put_arguments={"Colour": "red"}))

        async with blob_sessionmaker(tables.engine, s3_store)() as writing:
            writing.add(Row(id=1, scan=Blob(b"one")))
            with pytest.raises(InvalidPutArgumentsError, match="Colour"):
                await writing.commit()
        assert [uri async for uri in s3_store.iter_uris()] == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("blob", "error", "advice"),
        [
            (Blob(PNG + b"abc"), BlobTooLargeError, "factory_docs.image.*11 bytes.*10"),
            (Blob(Upload(PNG + b"abc")), BlobTooLargeError, "11 bytes.*10"),
            (Blob(b"x", content_type="text/x"), ContentTypeRefusedError, r"image/\*.*text/x"),
        ],
        ids=["bytes", "upload", "type"],
    )
    async def test_nothing_is_sent(
        self,
        session: async_sessionmaker[AsyncSession],
        memory_store: MemoryStore,
        tables: Database,
        blob: Blob,
        error: type[Exception],
        advice: str,
    ) -> None:
        """What the column refuses keeps everything unsent, and the session stays usable."""
        async with session() as writing:
            writing.add(doc := Doc(id=1, scan=Blob(b"one"), image=blob))
            with pytest.raises(error, match=advice):
                await writing.commit()
            assert memory_store.calls == []
            doc.image = Blob(PNG)
            await writing.commit()
        assert await both_agree(memory_store, tables) == [b"one", PNG]

    async def test_an_upload_that_turns_out_too_large(
        self,
        session: async_sessionmaker[AsyncSession],
        memory_store: MemoryStore,
        tables: Database,
    ) -> None:
        """What is too large only when it is read undoes the flush; the cause tells the size."""
        blob = Blob(Upload(PNG + b"abc", size=None))
        async with session() as writing:
            writing.add(doc := Doc(id=1, scan=Blob(b"one"), image=blob))
            with pytest.raises(BlobUploadError) as caught:
                await writing.commit()
            assert isinstance(caught.value.__cause__, BlobTooLargeError)
            assert memory_store.objects == {}
            with pytest.raises(BlobUploadError, match="at least in part"):
                await writing.commit()  # the rest of it does not pass for the whole
            doc.image = Blob(PNG)
            await writing.commit()
        assert await both_agree(memory_store, tables) == [b"one", PNG]

    @pytest.mark.parametrize("key", ["scan", "archived"])
    async def test_a_copy_is_checked_too(
        self,
        session: async_sessionmaker[AsyncSession],
        memory_store: MemoryStore,
        archive: MemoryStore,
        tables: Database,
        key: str,
    ) -> None:
        """A stored blob that is assigned to a column that refuses it is not copied."""
        async with session.begin() as writing:
            writing.add(
                Doc(id=1, scan=Blob(b"text"), archived=Blob(b"text", content_type="text/x"))
            )
        async with session() as writing:
            doc = await writing.get_one(Doc, 1)
            doc.image = getattr(doc, key)
            with pytest.raises(BlobUploadError) as caught:
                await writing.commit()
        assert isinstance(caught.value.__cause__, ContentTypeRefusedError)
        assert await both_agree(memory_store, tables) == [b"text"]

    async def test_a_string(
        self, session: async_sessionmaker[AsyncSession], memory_store: MemoryStore
    ) -> None:
        """A string is refused when it is flushed, and nothing is sent."""
        async with session() as writing:
            writing.add(Doc(id=1, scan="s3://bucket/prefix/k", image=Blob(b"cat")))
            with pytest.raises(InvalidInputError, match="a string is not written"):
                await writing.commit()
        assert memory_store.calls == []


class TestDescriptions:
    @pytest.mark.parametrize(
        ("key", "source", "described", "expected"),
        [
            ("image", b"GIF89a", {"content_type": "image/gif", "filename": "x.jpg"}, "image/gif"),
            ("image", PNG, {"filename": "x.jpg"}, "image/png"),
            ("scan", b"x", {"filename": "x.jpg"}, "image/jpeg"),
            ("scan", Path(__file__), {}, "text/x-python"),
            ("scan", b"x", {}, "application/octet-stream"),
        ],
    )
    async def test_content_types(
        self,
        session: async_sessionmaker[AsyncSession],
        memory_store: MemoryStore,
        key: str,
        source: Any,
        described: dict[str, Any],
        expected: str,
    ) -> None:
        """The blob's own type goes first, then the column's, then that of the file name."""
        blob = Blob(source, **described)
        async with session.begin() as writing:
            writing.add(Doc(id=1, **{key: blob}))

        (stored,) = memory_store.objects.values()
        assert stored.arguments["ContentType"] == expected
        assert (await blob.stat()).content_type == expected

    async def test_of_an_upload(
        self, session: async_sessionmaker[AsyncSession], memory_store: MemoryStore
    ) -> None:
        """What an upload says of itself goes before what the column says."""
        upload = Upload(b"GIF89a", filename="x.jpg", content_type="image/gif")
        async with session.begin() as writing:
            writing.add(Doc(id=1, image=Blob(upload)))

        (stored,) = memory_store.objects.values()
        assert stored.arguments["ContentType"] == "image/gif"
        assert stored.metadata["filename"] == "x.jpg"

    async def test_file_names(
        self, session: async_sessionmaker[AsyncSession], s3_store: Any, tables: Database
    ) -> None:
        """A file name is in the object's metadata, not in its key, in any alphabet."""
        name = "Übung – 練習.html"  # noqa: RUF001
        async with blob_sessionmaker(tables.engine, s3_store).begin() as writing:
            writing.add(doc := Doc(id=1, scan=Blob(b"x", filename=name, metadata={"a": "ä"})))
        assert doc.scan is not None

        metadata = (await doc.scan.stat()).metadata
        assert metadata == {"a": "ä", "filename": name, "sha256": doc.scan.sha256}
        assert doc.scan.uri.isascii()
        assert "html" not in doc.scan.uri
