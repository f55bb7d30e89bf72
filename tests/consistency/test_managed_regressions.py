"""What hostile reviews lost or leaked with managed sessions, one test for each cause."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, StatementError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    make_transient,
    mapped_column,
    relationship,
    with_loader_criteria,
)
from sqlalchemy.pool import StaticPool
from support.databases import Database
from support.library import Album, Doc, Item, Library, Page, Photo, Song, Video, open_library

from aioblobcol import (
    Blob,
    BlobSharedError,
    BlobType,
    BlobUploadError,
    CommitOutcomeUnknown,
    PutS3ApiCall,
    TransactionAbortedError,
    UnsafeTransactionError,
    blob_report,
    blob_sessionmaker,
    blob_transaction,
    enlist,
    put_s3,
    track_blobs,
)
from aioblobcol._frames import Frames
from aioblobcol.errors import Outcome
from aioblobcol.testing import MemoryStore, StoredObject, assert_consistent

SHARES = sa.update(Doc).values(scan=Doc.body).execution_options(synchronize_session=False)


def raise_after_commit(database: Database) -> None:
    """Have the next COMMIT take effect, and raise what no driver does."""
    dialect: Any = database.engine.sync_engine.dialect
    do_commit = dialect.do_commit

    def lose(connection: object) -> None:
        dialect.do_commit = do_commit
        do_commit(connection)
        raise RuntimeError("lost")

    dialect.do_commit = lose


@pytest_asyncio.fixture
async def library(database: Database, memory_store: MemoryStore) -> AsyncIterator[Library]:
    """Give empty tables, on both databases, and sessions that upload."""
    async with open_library(database, memory_store) as opened:
        yield opened


class TestInheritance:
    async def test_a_bulk_delete_of_half_a_row(self, library: Library) -> None:
        """DELETE of a joined subclass leaves the other half, and its object."""
        await library.add(Video(id=1, preview=Blob(b"p"), film=Blob(b"f")))
        async with library.session.begin() as session:
            await session.execute(sa.delete(Video).where(Video.id == 1))

        assert await library.check() == [b"p"]

    async def test_a_bulk_delete_by_the_base(self, library: Library) -> None:
        """The rows of subclasses in the same table lose their objects, too."""
        await library.add(Song(id=1, preview=Blob(b"p"), sheet=Blob(b"s")))
        async with library.session.begin() as session:
            await session.execute(sa.delete(Item))

        assert await library.check() == []


class TestOneObjectInTwoCells:
    async def test_a_subquery_of_the_same_transaction(self, library: Library) -> None:
        """A bulk UPDATE may not take what this transaction has given to another row."""
        await library.add(Doc(name="a"), Doc(name="b"))
        async with library.session() as session:
            (await session.get_one(Doc, "a")).body = Blob(b"1")
            await session.flush()
            other = aliased(Doc)
            taken = sa.select(other.body).where(other.name == "a").scalar_subquery()
            statement = sa.update(Doc).where(Doc.name == "b").values(body=taken)
            with pytest.raises(BlobSharedError):
                await session.execute(statement.execution_options(synchronize_session=False))

        assert await library.check() == []

    async def test_one_blob_twice_in_a_statement(self, library: Library) -> None:
        """It is refused."""
        blob = Blob(b"1")
        several = [{"name": "a", "body": blob}, {"name": "b", "body": blob}]
        for values in (several, {"name": "a", "body": blob, "scan": blob}):
            async with library.session() as session:
                with pytest.raises(StatementError) as caught:
                    await session.execute(sa.insert(Doc).values(values))
            assert isinstance(caught.value.orig, BlobSharedError)

        assert await library.check() == []

    async def test_an_event_that_copies(self, library: Library) -> None:
        """A mapper's event that assigns an uploaded blob once more is refused."""

        def copy(_mapper: object, _connection: object, target: Doc) -> None:
            target.scan = target.body

        sa.event.listen(Doc, "before_insert", copy)
        try:
            with pytest.raises(StatementError) as caught:
                await library.add(Doc(name="d", body=Blob(b"1")))
        finally:
            sa.event.remove(Doc, "before_insert", copy)

        assert isinstance(caught.value.orig, BlobSharedError)
        assert await library.check() == []

    async def test_an_object_made_new_again(self, library: Library) -> None:
        """What was flushed for one row is copied for the next."""
        async with library.session.begin() as session:
            session.add(doc := Doc(name="a", body=Blob(b"1")))
            await session.flush()
            session.expunge(doc)
            make_transient(doc)
            doc.name = "b"
            session.add(doc)

        assert await library.check() == [b"1", b"1"]

    async def test_a_refusal_in_a_released_savepoint(self, library: Library) -> None:
        """It forbids COMMIT although another savepoint is rolled back later."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        async with library.session() as session:
            async with session.begin_nested():
                with pytest.raises(BlobSharedError):
                    await session.execute(SHARES)
            await (await session.begin_nested()).rollback()
            with pytest.raises(BlobSharedError):
                await session.commit()

        assert await library.check() == [b"1"]

    async def test_a_refusal_in_a_joined_session(self, library: Library) -> None:
        """It forbids the owner of the connection to commit."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        async with library.engine.connect() as connection:
            await connection.begin()
            async with library.session(bind=connection) as session:
                with pytest.raises(BlobSharedError):
                    await session.execute(SHARES)
            with pytest.raises(BlobSharedError):
                await connection.commit()
            await connection.rollback()

        assert await library.check() == [b"1"]


class TestKeys:
    async def test_written_otherwise(self, sqlite: Database, memory_store: MemoryStore) -> None:
        """The database may write a key otherwise than it was asked for."""
        key: Any = "1"
        async with open_library(sqlite, memory_store) as library:
            await library.add(Item(id=1, preview=Blob(b"1")))
            async with library.session.begin() as session:
                await session.execute(sa.update(Item), [{"id": key, "preview": Blob(b"2")}])
            assert await library.check() == [b"2"]
            async with library.session() as session:
                session.add(item := Item(id="2", preview=Blob(b"3")))
                await session.commit()
                await session.delete(item)
                await session.commit()

            assert await library.check() == [b"2"]

    async def test_changed_in_bulk(self, library: Library) -> None:
        """A bulk UPDATE of keys and blobs at once is refused."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        async with library.session() as session:
            with pytest.raises(UnsafeTransactionError, match="primary keys"):
                await session.execute(sa.update(Doc).values(name="b", body=Blob(b"2")))

        assert await library.check() == [b"1"]

    async def test_twice_in_a_list(self, library: Library) -> None:
        """The last one stays."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        rows = [{"name": "a", "body": Blob(body)} for body in (b"2", b"3")]
        async with library.session.begin() as session:
            await session.execute(sa.update(Doc), rows)

        assert await library.check() == [b"3"]


class TestUnseenChanges:
    async def test_sql_that_copies_before_anything_is_at_stake(self, library: Library) -> None:
        """The transaction's earlier statements count, too."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        async with library.session.begin() as session:
            await session.execute(
                sa.text("INSERT INTO docs (name, body) SELECT 'b', body FROM docs")
            )
            (await session.get_one(Doc, "a")).body = Blob(b"2")

        assert await library.check() == [b"1", b"2"]

    @pytest.mark.parametrize(
        "copies",
        [
            """INSERT INTO docs (name, body) SELECT 'b', "body" FROM docs WHERE name = 'a'""",
            "INSERT INTO docs (name, body) SELECT 'b', BODY FROM docs WHERE name = 'a'",
            "UPDATE docs SET body = (SELECT d.body FROM docs d WHERE name = 'a') WHERE name = 'x'",
        ],
    )
    async def test_sql_that_copies(self, library: Library, copies: str) -> None:
        """Quoted, in capitals, or in a subquery: what it may have copied is kept."""
        await library.add(Doc(name="a", body=Blob(b"1")), Doc(name="x"))
        async with library.session.begin() as session:
            (await session.get_one(Doc, "x")).scan = Blob(b"3")
            await session.flush()
            await session.execute(sa.text(copies))
            (await session.get_one(Doc, "a")).body = Blob(b"2")

        assert await library.check() == [b"1", b"2", b"3"]

    @pytest.mark.parametrize("moment", ["before_update", "before_flush"])
    async def test_a_listener_that_empties_a_cell(self, library: Library, moment: str) -> None:
        """The old object goes, although the flush was about something else."""
        await library.add(Doc(name="a", body=Blob(b"1")))

        def empty(_mapper: object, _connection: object, target: Doc) -> None:
            target.body = None

        def empty_all(session: Session, _context: object, _instances: object) -> None:
            for doc in session.dirty:
                doc.body = None

        async with library.session() as session:
            target: Any = Doc if moment == "before_update" else session.sync_session
            listener = empty if moment == "before_update" else empty_all
            sa.event.listen(target, moment, listener)
            try:
                (await session.get_one(Doc, "a")).title = "t"
                await session.commit()
            finally:
                sa.event.remove(target, moment, listener)

        assert await library.check() == []

    @pytest.mark.parametrize("autoflush", [True, False])
    @pytest.mark.parametrize("moment", ["before_flush", "after_flush"])
    async def test_a_bulk_statement_in_a_flush(
        self, library: Library, moment: str, autoflush: bool
    ) -> None:
        """A listener may send one; the flush around it is not disturbed."""
        await library.add(Doc(name="a", body=Blob(b"1")), Doc(name="b", body=Blob(b"2")))

        def update(session: Session, *_: object) -> None:
            session.execute(sa.update(Doc).where(Doc.name == "b").values(body=Blob(b"4")))

        async with library.session(autoflush=autoflush) as session:
            sa.event.listen(session.sync_session, moment, update)
            (await session.get_one(Doc, "a")).body = Blob(b"3")
            await session.flush()
            sa.event.remove(session.sync_session, moment, update)
            await session.commit()

        assert await library.check() == [b"3", b"4"]


class TestStrings:
    """A row of the user's that names an object in a column of text, such as an audit's."""

    @pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
    @pytest.mark.parametrize("how", ["unit of work", "core", "text", "literal", "document"])
    async def test_an_old_object_is_named(self, library: Library, *, first: bool, how: str) -> None:
        """It is kept, in whatever order the two are written, and the report says so."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        assert doc.body is not None
        old = doc.body.uri
        async with library.session() as session:
            doc = await session.get_one(Doc, "d")
            if first:
                await self.name_it(session, old, how)
            doc.body = Blob(b"2")
            await session.flush()
            if not first:
                await self.name_it(session, old, how)
            await session.commit()

            assert set(blob_report(session).kept) == {old}
        assert await library.check(orphans=(old,)) == [b"2"]

    async def name_it(self, session: AsyncSession, uri: str, how: str) -> None:
        title = f'{{"was": "{uri}", "by": "\u00e9"}}' if how == "document" else uri
        if how in {"unit of work", "document"}:
            session.add(Doc(name="audit", title=title))
            await session.flush()
        elif how == "core":
            await session.execute(sa.insert(Doc.__table__).values(name="audit", title=title))  # type: ignore[arg-type]
        elif how == "text":
            insert = sa.text("INSERT INTO docs (name, title) VALUES ('audit', :title)")
            await session.execute(insert, {"title": title})
        else:
            quoted = title.replace(":", "\\:")
            insert = sa.text(f"INSERT INTO docs (name, title) VALUES ('audit', '{quoted}')")  # noqa: S608
            await session.execute(insert)

    async def test_one_with_a_key_of_other_programs(self, library: Library) -> None:
        """An object without an id of ours is told by the whole of its URI."""
        old = f"s3://{library.store.bucket}/{library.store.prefix}/by/hand"
        library.store.objects[old] = StoredObject(b"1", {}, {})
        async with library.engine.begin() as connection:
            await connection.execute(
                sa.text("INSERT INTO docs (name, body) VALUES ('d', :uri)"), {"uri": old}
            )
        async with library.session.begin() as session:
            session.add(Doc(name="audit", title=old))
            (await session.get_one(Doc, "d")).body = Blob(b"2")

        assert await library.check(orphans=(old,)) == [b"2"]

    async def test_in_a_condition(self, library: Library) -> None:
        """To look for it does not keep it."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        assert doc.body is not None
        by_uri = sa.text("UPDATE docs SET title = 'x' WHERE body = :uri")
        async with library.session.begin() as session:
            await session.execute(by_uri, {"uri": doc.body.uri})
            await session.execute(
                sa.update(Doc).where(Doc.body == doc.body.uri).values(body=Blob(b"2"))
            )

        assert await library.check() == [b"2"]

    async def test_undone_with_a_savepoint(self, library: Library) -> None:
        """What a savepoint has named and taken back is named by nobody."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        assert doc.body is not None
        async with library.session.begin() as session:
            loaded = await session.get_one(Doc, "d")
            loaded.body = Blob(b"2")
            await session.flush()
            async with session.begin_nested() as savepoint:
                session.add(Doc(name="audit", title=doc.body.uri))
                await session.flush()
                await savepoint.rollback()

        assert await library.check() == [b"2"]

    async def test_a_new_one_that_is_replaced_again(self, library: Library) -> None:
        """Its own statement does not name it, somebody else's does."""
        for is_named in (False, True):
            async with library.session.begin() as session:
                doc = await session.merge(Doc(name="d", body=Blob(b"1")))
                await session.flush()
                assert doc.body is not None
                first = doc.body.uri
                if is_named:
                    session.add(Doc(name="audit", title=first))
                    await session.flush()
                doc.body = Blob(b"2")

            assert await library.check(orphans=(first,) if is_named else ()) == [b"2"]

    async def test_beside_an_array(self, postgres: Database, memory_store: MemoryStore) -> None:
        """A list among the parameters is no list of parameters."""
        async with open_library(postgres, memory_store) as library:
            async with postgres.engine.begin() as connection:
                await connection.exec_driver_sql("DROP TABLE IF EXISTS tagged")
                await connection.exec_driver_sql("CREATE TABLE tagged (tags text[], note text)")
                await connection.exec_driver_sql("INSERT INTO tagged VALUES (NULL, NULL)")
            await library.add(doc := Doc(name="d", body=Blob(b"1")))
            assert doc.body is not None
            tagged = sa.table("tagged", sa.column("tags", sa.ARRAY(sa.Text)), sa.column("note"))
            async with library.session.begin() as session:
                values = {"tags": ["x"], "note": doc.body.uri}
                await session.execute(sa.update(tagged).where(sa.true()).values(values))
                (await session.get_one(Doc, "d")).body = Blob(b"2")

            assert await library.check(orphans=(doc.body.uri,)) == [b"2"]
            async with postgres.engine.begin() as connection:
                await connection.exec_driver_sql("DROP TABLE tagged")

    async def test_a_list_that_failed_half_way(
        self, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """SQLite keeps the rows before the one that failed."""
        for is_watched in (False, True):
            async with open_library(sqlite, memory_store) as library:
                memory_store.objects.clear()
                await library.add(doc := Doc(name="d", body=Blob(b"1")), Doc(name="x"))
                assert doc.body is not None
                old = doc.body.uri
                rows = [{"name": "audit", "title": old}, {"name": "x", "title": None}]
                async with library.session.begin() as session:
                    doc = await session.get_one(Doc, "d")
                    if is_watched:
                        doc.body = Blob(b"2")
                        await session.flush()
                    with pytest.raises(IntegrityError):
                        await session.execute(sa.insert(Doc.__table__), rows)  # type: ignore[arg-type]
                    doc.body = doc.body if is_watched else Blob(b"2")

                assert await library.check(orphans=(old,)) == [b"2"]

    @pytest.mark.parametrize("sessions", [1, 2])
    async def test_on_a_joined_connection(self, library: Library, sessions: int) -> None:
        """It does not matter which of the sessions on the connection has written it."""
        await library.add(doc := Doc(name="d", body=Blob(b"1")))
        assert doc.body is not None
        old = doc.body.uri
        async with library.engine.connect() as connection:
            outer = await connection.begin()
            factory = blob_sessionmaker(
                connection, library.store, join_transaction_mode="create_savepoint"
            )
            async with factory() as one, factory() as two:
                other = one if sessions == 1 else two
                found = await other.get_one(Doc, "d")
                one.add(Doc(name="audit", title=old))
                await one.commit()
                found.body = Blob(b"2")
                await other.commit()
                found.body = Blob(b"3")
                await other.commit()
            await outer.commit()
        await library.store.runtime.background.drain()

        assert await library.check(orphans=(old,)) == [b"3"]

    async def test_a_prefix_that_looks_like_an_id(self, sqlite: Database) -> None:
        """Objects are told by the last part of their keys."""
        prefix = f"id={32 * 'a'}"
        async with MemoryStore(bucket="bucket", prefix=prefix) as store:
            async with open_library(sqlite, store) as library:
                async with library.session.begin() as session:
                    session.add_all(Doc(name=n, body=Blob(b"1")) for n in "ab")
                    await session.flush()
                    (await session.get_one(Doc, "a")).body = Blob(b"2")

                assert await library.check() == [b"1", b"2"]

    async def test_the_explicit_strength_around_it(self, library: Library) -> None:
        """What `blob_transaction` made and a `Blob` replaces is deleted."""
        async with library.session() as session:
            async with blob_transaction(session, store=library.store) as tx:
                calls = [PutS3ApiCall("body", b"1", None)]
                put = await tx.put_s3(pk="d", api_calls=calls)
                session.add(doc := Doc(name="d", **put.to_values()))
                await session.flush()
                doc.body = Blob(b"2")

        assert await library.check() == [b"2"]

    async def test_many_of_them(self, library: Library) -> None:
        """New objects that are replaced in the same transaction, row by row, leave nothing."""
        async with library.session.begin() as session:
            docs = [Doc(name=str(n), body=Blob(b"1")) for n in range(40)]
            photos = Album(id=1, photos=[Photo(image=Blob(b"1")) for _ in range(40)])
            session.add_all([*docs, photos])
            await session.flush()
            for doc in docs:
                doc.body = Blob(b"2")
            for photo in photos.photos:
                photo.image = Blob(b"2")

        assert await library.check() == 80 * [b"2"]


class TestBulk:
    async def test_returning_of_nothing(self, library: Library) -> None:
        """An UPDATE with RETURNING that matches nothing leaves no object."""
        statement = sa.update(Doc).values(body=Blob(b"1")).returning(Doc.name)
        async with library.session.begin() as session:
            assert (await session.scalars(statement)).all() == []

        assert await library.check() == []

    async def test_from_statement(self, library: Library) -> None:
        """SELECT .. FROM an UPDATE with RETURNING is that UPDATE."""
        await library.add(*(Doc(name=n, body=Blob(n.encode())) for n in "ab"))
        update = sa.update(Doc).where(Doc.name == "a").values(body=Blob(b"c")).returning(Doc)
        async with library.session.begin() as session:
            doc = (await session.scalars(sa.select(Doc).from_statement(update))).one()
            assert doc.body is not None
            assert await doc.body.read() == b"c"

        assert await library.check() == [b"b", b"c"]

    async def test_criteria_of_selects_alone(self, library: Library) -> None:
        """A listener that hides rows from SELECTs hides none from a bulk DELETE."""
        await library.add(Doc(name="a", title="gone", body=Blob(b"1")))

        def hide(execute: Any) -> None:
            if execute.is_select:
                criteria = with_loader_criteria(Doc, Doc.title != "gone")
                execute.statement = execute.statement.options(criteria)

        async with library.session() as session:
            sa.event.listen(session.sync_session, "do_orm_execute", hide)
            await session.execute(sa.delete(Doc).where(Doc.title == "gone"))
            await session.commit()

        assert await library.check() == []

    async def test_a_row_that_is_added_meanwhile(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """A bulk UPDATE that hits more rows than were locked is refused, RETURNING or not."""
        async with open_library(postgres, memory_store) as library:
            waiting: list[Doc] = []

            def add(_c: object, _cursor: object, text: str, *_: object) -> None:
                if text.startswith("UPDATE") and waiting:
                    sa.util.await_only(library.add(waiting.pop()))

            sa.event.listen(postgres.engine.sync_engine, "before_cursor_execute", add)
            statement: Any = sa.update(Doc).where(sa.func.lower(Doc.title) == "t")
            statement = statement.values(body=Blob(b"2"), title=None)
            for each in (statement, statement.returning(Doc.name)):
                await library.add(Doc(name="a", title="t", body=Blob(b"1")))
                waiting.append(Doc(name="b", title="T"))
                async with library.session() as session:
                    with pytest.raises(UnsafeTransactionError, match="another transaction added"):
                        await session.execute(each)
                async with library.session.begin() as session:
                    await session.execute(sa.delete(Doc))
            sa.event.remove(postgres.engine.sync_engine, "before_cursor_execute", add)

            assert await library.check() == []

    async def test_a_condition_on_rows_that_change_meanwhile(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """A DELETE that hits other rows than were locked, for its subquery says so, is refused."""
        async with open_library(postgres, memory_store) as library:
            await library.add(
                Doc(name="a", body=Blob(b"a")),
                Doc(name="b", body=Blob(b"b")),
                Page(book="a", number=1),
            )

            def turn(_c: object, _cursor: object, text: str, *_: object) -> None:
                if text.startswith("DELETE FROM docs"):
                    sa.util.await_only(move())

            async def move() -> None:
                async with library.session.begin() as other:
                    await other.execute(sa.update(Page).values(book="b"))

            named = sa.select(Page.book).where(Page.book == Doc.name).exists()
            sa.event.listen(postgres.engine.sync_engine, "before_cursor_execute", turn)
            async with library.session() as session:
                with pytest.raises(UnsafeTransactionError, match="another transaction"):
                    await session.execute(sa.delete(Doc).where(named))
            sa.event.remove(postgres.engine.sync_engine, "before_cursor_execute", turn)

            assert await library.check() == [b"a", b"b"]

    async def test_a_condition_that_changes_rows(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """It would be asked twice, so it is refused before anything is sent."""
        async with open_library(postgres, memory_store) as library:
            await library.add(Doc(name="a", body=Blob(b"a")), Page(book="a", number=1))
            gone = sa.delete(Page).returning(Page.book).cte()
            statement = sa.delete(Doc).where(Doc.name.in_(sa.select(gone.c.book)))
            async with library.session() as session:
                with pytest.raises(UnsafeTransactionError, match="CTE"):
                    await session.execute(statement)
                assert not session.in_transaction()

            assert await library.check() == [b"a"]

    async def test_a_cte_beside_it(self, postgres: Database, memory_store: MemoryStore) -> None:
        """One that is no part of the condition is sent once, as ever."""
        async with open_library(postgres, memory_store) as library:
            await library.add(Doc(name="a", body=Blob(b"a")))
            audit = sa.insert(Page).values(book="a", number=1).cte("audit")
            async with library.session.begin() as session:
                await session.execute(sa.delete(Doc).add_cte(audit))
                assert await session.scalar(sa.select(Page.book)) == "a"

            assert await library.check() == []

    async def test_a_row_that_a_trigger_keeps(
        self, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """What a DELETE skipped keeps its object, also where its key is not found again."""

        class Base(DeclarativeBase):
            pass

        class Moment(Base):
            __tablename__ = "moments"
            name: Mapped[str] = mapped_column(primary_key=True)
            at: Mapped[datetime] = mapped_column(primary_key=True, server_default=sa.func.now())
            body: Mapped[Blob | None] = mapped_column(BlobType())

        async with sqlite.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.exec_driver_sql(
                "CREATE TRIGGER keep BEFORE DELETE ON moments WHEN OLD.name = 'kept' "
                "BEGIN SELECT RAISE(IGNORE); END"
            )
        factory = blob_sessionmaker(sqlite.engine, memory_store)
        async with factory.begin() as session:  # the database writes no microseconds
            session.add_all(Moment(name=name, body=Blob(name.encode())) for name in ("kept", "x"))
        async with factory.begin() as session:
            await session.execute(sa.delete(Moment))

        found = await assert_consistent(memory_store, sqlite.engine, [Moment.body])
        assert list(found.values()) == [b"kept"]

    async def test_without_autoflush(self, library: Library) -> None:
        """The option of one statement holds for it."""
        async with library.session.begin() as session:
            session.add(Doc(name="new", body=Blob(b"1")))
            await session.execute(sa.delete(Doc), execution_options={"autoflush": False})
            assert session.new

        assert await library.check() == [b"1"]

    async def test_bind_arguments(self, library: Library) -> None:
        """What routes the statement routes the reads of its rows as well."""
        asked: list[Any] = []

        class Routed(Session):
            def get_bind(self, mapper: Any = None, *, tenant: str = "", **arguments: Any) -> Any:
                asked.append(tenant)
                return super().get_bind(mapper, **arguments)

        await library.add(Doc(name="a", body=Blob(b"a")))
        factory = blob_sessionmaker(library.engine, library.store, sync_session_class=Routed)
        async with factory() as session:
            await session.execute(sa.delete(Doc), bind_arguments={"tenant": "x"})
            await session.commit()

        assert set(asked) == {"x"}
        assert await library.check() == []

    @pytest.mark.parametrize("in_values", [True, False])
    async def test_null_beside_values(self, library: Library, in_values: bool) -> None:
        """A column may be set by the parameters as well as by the statement."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        first, second = {"title": "x"}, {"body": None}
        one, other = (first, second) if in_values else (second, first)
        async with library.session.begin() as session:
            await session.execute(sa.update(Doc).where(Doc.name == "a").values(one), other)

        assert await library.check() == []

    async def test_null_after_a_blob_in_a_list(self, library: Library) -> None:
        """The row is empty, and the upload goes."""
        await library.add(Doc(name="a"))
        rows: list[dict[str, Any]] = [{"name": "a", "body": body} for body in (Blob(b"1"), None)]
        async with library.session.begin() as session:
            await session.execute(sa.update(Doc), rows)

        assert await library.check() == []

    async def test_an_insert_of_an_expression(self, library: Library) -> None:
        """It might be another row's object: refused."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        taken = sa.select(aliased(Doc).body).scalar_subquery()
        async with library.session() as session:
            for value in (taken, sa.text("(SELECT body FROM docs)")):
                with pytest.raises(UnsafeTransactionError, match="copy"):
                    await session.execute(sa.insert(Doc).values(name="b", body=value))
            await session.execute(sa.insert(Doc).values(name="c", body=sa.null()))
            await session.commit()

        assert await library.check() == [b"1"]

    async def test_insert_or_replace(self, sqlite: Database, memory_store: MemoryStore) -> None:
        """It is an upsert, and refused."""
        async with open_library(sqlite, memory_store) as library:
            await library.add(Doc(name="a", body=Blob(b"1")))
            statement = sa.insert(Doc).prefix_with("OR REPLACE").values(name="a", body=Blob(b"2"))
            async with library.session() as session:
                with pytest.raises(UnsafeTransactionError, match="upsert"):
                    await session.execute(statement)

            assert await library.check() == [b"1"]

    async def test_an_upsert_that_mentions_a_new_object(self, library: Library) -> None:
        """What an earlier statement wrote is not this one's: it is kept."""
        module = __import__(f"sqlalchemy.dialects.{library.engine.dialect.name}", fromlist="x")
        async with library.session() as session:
            session.add(doc := Doc(name="a", body=Blob(b"1")))
            await session.flush()
            assert doc.body is not None
            statement = module.insert(Doc).values(name="b", title=doc.body.uri)
            await session.execute(statement.on_conflict_do_nothing())
            await session.commit()

        assert await library.check() == [b"1"]

    async def test_rows_that_share_already(self, library: Library) -> None:
        """What others made rows share is not this statement's fault."""
        await library.add(Doc(name="a", body=Blob(b"1"), scan=Blob(b"2")))
        async with library.engine.begin() as connection:
            await connection.execute(
                sa.text("INSERT INTO docs (name, body) SELECT 'b', body FROM docs")
            )
        async with library.session.begin() as session:
            await session.execute(sa.update(Doc).values(scan=None))

        assert await library.read(Doc, "a") == b"1"

    async def test_a_row_that_is_gone(self, library: Library) -> None:
        """One of several rows was deleted meanwhile: StaleDataError with every driver."""
        await library.add(*(Doc(name=n, body=Blob(n.encode())) for n in "abc"))
        async with library.session() as session:
            docs = (await session.scalars(sa.select(Doc))).all()
            await session.commit()
            async with library.session.begin() as other:
                await other.execute(sa.delete(Doc).where(Doc.name == "b"))
            for doc in docs:
                doc.body = Blob(b"new")
            with pytest.raises(sa.orm.exc.StaleDataError):
                await session.commit()

        assert await library.check() == [b"a", b"c"]

    async def test_an_upsert_after_a_statement_that_was_not_sent(self, library: Library) -> None:
        """It is not blamed for what the other one would have carried."""
        module = __import__(f"sqlalchemy.dialects.{library.engine.dialect.name}", fromlist="x")
        rows: list[dict[str, Any]] = [
            {"name": "a", "body": Blob(b"1")},
            {"name": "b", "body": "a string"},
        ]
        async with library.session() as session:
            with pytest.raises(StatementError, match="a string"):
                await session.execute(sa.insert(Doc), rows)
            await session.execute(module.insert(Doc).values(name="c").on_conflict_do_nothing())
            await session.commit()

        assert await library.check() == []

    async def test_loaded_objects_are_told(self, library: Library) -> None:
        """An UPDATE with a blob reaches the objects that the session holds."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        async with library.session() as session:
            doc = await session.get_one(Doc, "a")
            await session.execute(sa.update(Doc).where(Doc.name == "a").values(body=Blob(b"2")))
            await session.commit()
            assert doc.body is not None
            assert await doc.body.read() == b"2"
            row = (await session.execute(sa.select(Doc.name, Doc.body))).one()
            assert row._mapping[Doc.body] == doc.body


class TestKeysOfOthers:
    @pytest.mark.parametrize("by", ["hand", "listener"])
    async def test_renamed_by_a_cascade_and_deleted(
        self, postgres: Database, memory_store: MemoryStore, by: str
    ) -> None:
        """A row that was renamed in the same flush is not deleted, and keeps its object."""

        class Base(DeclarativeBase):
            pass

        class Parent(Base):
            __tablename__ = "cascading_parents"
            key: Mapped[str] = mapped_column(primary_key=True)
            title: Mapped[str | None]
            kids: Mapped[list[Kid]] = relationship(cascade="all", passive_deletes=True)

        class Kid(Base):
            __tablename__ = "cascading_kids"
            parent: Mapped[str] = mapped_column(
                sa.ForeignKey("cascading_parents.key", onupdate="CASCADE"), primary_key=True
            )
            scan: Mapped[Blob | None] = mapped_column(BlobType())

        @sa.event.listens_for(Parent, "before_update")
        def rename(_mapper: object, _connection: object, target: Parent) -> None:
            if by == "listener":
                target.key = "q"

        async with postgres.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        factory = blob_sessionmaker(postgres.engine, memory_store)
        try:
            async with factory.begin() as session:
                session.add(Parent(key="p"))
                await session.flush()
                session.add(Kid(parent="p", scan=Blob(b"1")))
            with contextlib.suppress(sa.exc.SQLAlchemyError), warnings.catch_warnings():
                warnings.simplefilter("ignore", sa.exc.SAWarning)
                async with factory.begin() as session:
                    parent = await session.get_one(Parent, "p")
                    kid = await session.get_one(Kid, "p")
                    parent.title = "renamed"
                    if by == "hand":
                        parent.key = "q"
                    await session.delete(kid)
            await assert_consistent(memory_store, postgres.engine, [Kid.scan])
        finally:
            async with postgres.engine.begin() as connection:
                await connection.run_sync(Base.metadata.drop_all)


class TestInnocent:
    """What the checks above must not refuse."""

    async def test_changed_and_orphaned(self, library: Library) -> None:
        """A child may be given a blob and then be let go in one flush."""
        await library.add(Album(photos=[Photo(image=Blob(b"1")), Photo(image=Blob(b"2"))]))
        async with library.session.begin() as session:
            album = (await session.scalars(sa.select(Album))).one()
            album.photos[1].image = Blob(b"3")
            album.photos.pop()

        assert await library.check() == [b"1"]

    async def test_one_result_again_after_a_savepoint(self, library: Library) -> None:
        """A result whose row was undone with its savepoint may be written into another object."""
        put = await put_s3(
            pk="d", api_calls=[PutS3ApiCall("body", b"1", None)], store=library.store
        )
        async with library.session.begin() as session:
            await enlist(session, put)
            savepoint = await session.begin_nested()
            session.add(undone := Doc(name="d", **put.to_values()))
            await session.flush()
            await savepoint.rollback()
            session.add(Doc(name="d", **put.to_values()))

        assert undone not in session
        assert await library.check() == [b"1"]


class TestEnds:
    @pytest.mark.parametrize("commits", ["flush", "upload"])
    async def test_a_block_whose_flush_fails(self, library: Library, commits: str) -> None:
        """It rolls back as any block does, and the session goes on."""
        await library.add(Doc(name="a", body=Blob(b"1")))
        async with library.session() as session:
            if commits == "upload":
                library.store.fail("put", times=1)
            with pytest.raises((IntegrityError, BlobUploadError)):
                async with session.begin():
                    session.add(doc := Doc(name="a", body=Blob(b"2")))
            assert not session.in_transaction()
            session.expunge_all()
            doc.name = "b"
            async with session.begin():
                session.add(doc)

        assert await library.check() == [b"1", b"2"]

    async def test_a_session_that_enlisted_is_let_go(self, library: Library) -> None:
        """Nothing holds it once it is closed."""
        put = await put_s3(
            pk="d", api_calls=[PutS3ApiCall("body", b"2", None)], store=library.store
        )

        async def use() -> weakref.ref[Session]:
            async with library.session.begin() as session:
                await enlist(session, put)
                session.add(Doc(name="d", **put.to_values()))
                return weakref.ref(session.sync_session)

        left = await use()
        for _ in range(3):
            gc.collect()

        assert left() is None

    async def test_one_result_in_two_cells(self, library: Library) -> None:
        """A string of a result goes into one managed attribute."""
        put = await put_s3(
            pk="d", api_calls=[PutS3ApiCall("body", b"2", None)], store=library.store
        )
        async with library.session() as session:
            await enlist(session, put)
            session.add_all([Doc(name=name, **put.to_values()) for name in "ab"])
            with pytest.raises(BlobSharedError):
                await session.commit()

        assert await library.check() == []

    async def test_dropped_in_a_transaction(self, library: Library) -> None:
        """A session that is dropped is collected: its connection comes back, a warning is given."""

        async def drop() -> None:
            session = library.session()
            session.add(Doc(name="d", body=Blob(b"1")))
            await session.flush()

        with pytest.warns((ResourceWarning, sa.exc.SAWarning)) as warned:
            await drop()
            for _ in range(3):  # the session, then what its connection kept
                gc.collect()

        (left,) = library.store.objects
        assert any(left in str(each.message) for each in warned)
        assert library.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        await library.engine.dispose()
        assert await library.check(orphans=(left,)) == []

    async def test_an_odd_error_after_commit(
        self, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """COMMIT took effect and something else raised: unknown, and nothing is deleted."""
        async with open_library(sqlite, memory_store) as library:
            raise_after_commit(sqlite)
            with pytest.raises(CommitOutcomeUnknown):
                await library.add(Doc(name="d", body=Blob(b"1")))

            assert await library.check() == [b"1"]

    async def test_an_error_after_an_unknown_outcome(
        self, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """The next transaction's error is its own."""
        async with open_library(sqlite, memory_store) as library:

            def fail(_session: Session) -> None:
                raise ZeroDivisionError

            raise_after_commit(sqlite)
            async with library.session() as session:
                session.add(Doc(name="d", body=Blob(b"1")))
                with pytest.raises(CommitOutcomeUnknown):
                    await session.commit()
                with pytest.raises(ZeroDivisionError):
                    await session.run_sync(fail)


class TestOneConnectionForAll:
    """SQLite in memory with a `StaticPool`: whoever ends a transaction ends everybody's."""

    @pytest.mark.parametrize("is_explicit", [True, False], ids=["explicit", "legacy"])
    @pytest.mark.parametrize("is_managed", [True, False], ids=["managed", "plain"])
    @pytest.mark.parametrize(
        "ends",
        [
            ("mine rolls back", "other commits"),
            ("other commits", "mine rolls back"),
            ("other rolls back", "mine commits"),
            ("mine commits", "other rolls back"),
            ("mine commits", "other commits"),
            ("other commits", "mine commits"),
            ("other commits", "other begins", "mine rolls back"),
            ("other rolls back", "other begins", "mine commits"),
            ("other is given back", "other begins", "mine commits"),
            ("other is given back", "mine begins", "mine commits"),
            ("other is in autocommit", "other begins", "mine rolls back"),
        ],
        ids="-".join,
    )
    async def test_two_sessions_at_once(
        self,
        memory_store: MemoryStore,
        caplog: pytest.LogCaptureFixture,
        ends: tuple[str, ...],
        *,
        is_explicit: bool,
        is_managed: bool,
    ) -> None:
        """What another session may have committed is not deleted, and what is left is named."""
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
        class_ = track_blobs(AsyncSession, memory_store)
        managed = async_sessionmaker(engine, class_=class_, expire_on_commit=False)
        if is_explicit:
            managed = blob_sessionmaker(engine, memory_store)
        plain = async_sessionmaker(engine, class_=class_ if is_managed else AsyncSession)
        async with engine.begin() as connection:
            await connection.run_sync(Doc.metadata.create_all)
        async with managed.begin() as session:
            session.add(Doc(name="d", body=Blob(b"old")))
        async with managed() as mine, plain() as other:
            (await mine.get_one(Doc, "d")).body = Blob(b"new")
            await mine.flush()
            other.add(Doc(name="e", body=Blob(b"other") if is_managed else None))
            await other.flush()
            for end in ends:
                session = mine if end.startswith("mine") else other
                if end.endswith("begins"):
                    await session.execute(sa.text("UPDATE docs SET title = 't' WHERE name = 'e'"))
                elif end.endswith("commits"):
                    with contextlib.suppress(CommitOutcomeUnknown):
                        await session.commit()
                elif end.endswith("given back"):
                    await (await engine.connect()).close()
                elif end.endswith("autocommit"):
                    async with engine.connect() as connection:
                        await connection.execution_options(isolation_level="AUTOCOMMIT")
                else:
                    await session.rollback()
        async with engine.connect() as connection:
            bodies = await connection.scalars(sa.select(Doc.body).where(Doc.body.is_not(None)))
            named = {body.uri for body in bodies if body is not None}
        await engine.dispose()

        assert named <= memory_store.objects.keys()
        for orphan in memory_store.objects.keys() - named:
            assert orphan in caplog.text

    async def test_reading_beside_a_joined_session(
        self, memory_store: MemoryStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Whoever comes after the owner's COMMIT does not make it doubtful."""
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
        async with engine.begin() as connection:
            await connection.run_sync(Doc.metadata.create_all)
        async with engine.connect() as owner:
            await owner.begin()
            factory = blob_sessionmaker(owner, memory_store)
            async with factory() as session:
                session.add(Doc(name="d", body=Blob(b"1")))
                await session.commit()
            async with factory() as session:
                (await session.get_one(Doc, "d")).body = Blob(b"2")
                await session.commit()
            await owner.commit()
            async with engine.connect() as other:
                await other.execute(sa.select(Doc.name))
        await memory_store.runtime.background.drain()

        found = await assert_consistent(memory_store, engine, [Doc.body])
        await engine.dispose()
        assert list(found.values()) == [b"2"]
        assert "lost" not in caplog.text

    @pytest.mark.parametrize("is_explicit", [True, False], ids=["explicit", "legacy"])
    async def test_the_driver_is_told_to_commit(
        self,
        sqlite: Database,
        memory_store: MemoryStore,
        caplog: pytest.LogCaptureFixture,
        *,
        is_explicit: bool,
    ) -> None:
        """Behind SQLAlchemy's back, and then the session is rolled back: nothing is deleted."""
        engine = create_async_engine(sqlite.url)
        class_ = track_blobs(AsyncSession, memory_store)
        factory = async_sessionmaker(engine, class_=class_)
        if is_explicit:
            factory = blob_sessionmaker(engine, memory_store)
        async with open_library(sqlite, memory_store):
            async with factory() as session:
                session.add(doc := Doc(name="d", body=Blob(b"1")))
                await session.flush()
                assert doc.body is not None
                uri = doc.body.uri
                raw = await (await session.connection()).get_raw_connection()
                assert raw.driver_connection is not None
                await raw.driver_connection.commit()
                await session.rollback()

            found = await assert_consistent(memory_store, engine, [Doc.body])
        await engine.dispose()

        assert list(found) == [uri]
        assert uri in caplog.text


class TestFrames:
    """The books of a session with two connections."""

    def test_a_savepoint_on_both(self) -> None:
        """Rolling it back on both undoes what was done in it, and no more."""
        books = Frames()
        for uri in ("outer", "inner"):
            books.create(uri)
        books.write("outer")
        books.savepoint("1:a")
        books.savepoint("2:a")
        books.write("inner")

        assert books.roll_back_to("1:a") == ("inner",)
        assert books.roll_back_to("2:a") == ()
        assert books.written == {"outer"}
        assert books.settle(Outcome.COMMITTED).compensate == ("inner",)

    @pytest.mark.parametrize("order", [("1:a", "2:a"), ("2:a", "1:a")])
    def test_released_on_both(self, order: tuple[str, str]) -> None:
        """Releasing it on both keeps what was done in it, also what forbids COMMIT."""
        books, error = Frames(), TransactionAbortedError("failed")
        books.create("inner")
        books.savepoint("1:a")
        books.savepoint("2:a")
        books.write("inner")
        books.forbid_commit(error)
        for name in order:
            books.release(name)

        assert books.written == {"inner"}
        assert books.poison is error

    def test_one_that_was_set_before(self) -> None:
        """A savepoint that is older than the books undoes everything, what forbids COMMIT too."""
        books = Frames()
        books.create("new")
        books.write("new")
        books.supersede("old")
        books.forbid_commit(TransactionAbortedError("failed"))

        assert books.roll_back_to("1:older") == ("new",)
        assert books.superseded == frozenset()
        assert books.poison is None
