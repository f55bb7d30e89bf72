"""Programs that a hostile review found: each of them once lost or left an object."""

from __future__ import annotations

import asyncio
import gc
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import StaticPool
from support.awaits import CountedTask
from support.databases import Database, open_sqlite
from support.models import TASKS, Base, Task, contents, load

from aioblobcol import (
    BlobNotWrittenError,
    CommitOutcomeUnknown,
    Outcome,
    PutS3ApiCall,
    PutS3Result,
    UnsafeTransactionError,
    _session,
    blob_transaction,
    put_s3,
    use_explicit_begin,
)
from aioblobcol.testing import MemoryStore


def calls(html: bytes, old: str | None = None) -> list[PutS3ApiCall]:
    return [PutS3ApiCall("html", html, old)]


def guarded(put: PutS3Result) -> sa.Update:
    return sa.update(TASKS).where(TASKS.c.url == "u", put.guard(TASKS)).values(**put.to_values())


async def seed(database: Database, store: MemoryStore, url: str = "u") -> str:
    """Put a row there; return its URI."""
    async with database.session() as session, blob_transaction(session, store=store) as tx:
        put = await tx.put_s3(pk=url, api_calls=calls(b"old"))
        session.add(Task(url=url, **put.to_values()))
    return put.put_s3backed_column_results[0].new_s3_uri


class TestSomebodyElsesTransaction:
    @pytest.mark.parametrize("binds", [False, True])
    @pytest.mark.parametrize("has_read", [False, True])
    async def test_a_session_that_joined(
        self, database: Database, memory_store: MemoryStore, binds: bool, has_read: bool
    ) -> None:
        """A session on a connection in a transaction is refused, whatever it did before."""
        old = await seed(database, memory_store)
        async with database.engine.connect() as connection:
            outer = await connection.begin()
            session = AsyncSession(binds={Base: connection}) if binds else AsyncSession(connection)
            async with session:
                if has_read:
                    await session.execute(sa.select(Task))
                with pytest.raises(UnsafeTransactionError, match="bound to a connection"):
                    async with blob_transaction(session, store=memory_store) as tx:
                        put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                        await session.execute(
                            sa.update(Task).where(put.guard(Task)).values(**put.to_values())
                        )
            with suppress(InvalidRequestError):
                await outer.commit()
        gc.collect()

        orphans = tuple(uri for uri in memory_store.objects if uri != old)
        found = await contents(memory_store, database.engine, orphans=orphans)
        assert found == (b"old", None)

    async def test_several_binds(self, database: Database, memory_store: MemoryStore) -> None:
        """A session with binds that has read already is followed on the connection it holds."""
        old = await seed(database, memory_store)
        async with AsyncSession(binds={Base: database.engine}) as session:
            await session.get(Task, "u")
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                await session.execute(
                    sa.update(Task).where(put.guard(Task)).values(**put.to_values())
                )
                await session.commit()

        assert tx.outcome is Outcome.COMMITTED
        assert await contents(memory_store, database.engine) == (b"new", None)

    async def test_the_connections_own_rollback_and_commit(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Ending the transaction on the connection makes the outcome unknown."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            with pytest.raises(CommitOutcomeUnknown):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                    await session.execute(guarded(put))
                    connection = await session.connection()
                    await connection.rollback()
                    await connection.execute(sa.update(TASKS).values(title="x"))
                    await connection.commit()

        new = put.put_s3backed_column_results[0].new_s3_uri
        assert await contents(memory_store, database.engine, orphans=(new,)) == (b"old", None)

    async def test_two_sessions_on_one_connection(self, memory_store: MemoryStore) -> None:
        """Another session's commit on the same connection makes a rollback worthless."""
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
        use_explicit_begin(engine)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as one, AsyncSession(engine) as two:
            with pytest.raises(CommitOutcomeUnknown):
                async with blob_transaction(one, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"new"))
                    one.add(Task(url="u", **put.to_values()))
                    await one.flush()
                    await two.execute(sa.select(Task))
                    await two.commit()
                    raise RuntimeError("handler")

        assert await contents(memory_store, engine) == (b"new", None)
        await engine.dispose()


class TestLegacySqlite:
    async def test_a_change_that_begins_with_with(
        self, tmp_path: Path, memory_store: MemoryStore
    ) -> None:
        """The driver sends no BEGIN before WITH .. UPDATE: refused before it is sent."""
        async with open_sqlite(tmp_path / "legacy.db", explicit_begin=False) as database:
            old = await seed(database, memory_store)
            cte = sa.select(sa.literal("u").label("k")).cte("keys")
            async with database.session() as session:
                with pytest.raises(UnsafeTransactionError, match="use_explicit_begin"):
                    async with blob_transaction(session, store=memory_store) as tx:
                        put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                        await session.execute(
                            sa.update(TASKS)
                            .where(TASKS.c.url.in_(sa.select(cte.c.k)))
                            .values(**put.to_values())
                        )

            assert await contents(memory_store, database.engine) == (b"old", None)

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3's autocommit attribute")
    async def test_pep_249_mode(self, tmp_path: Path, memory_store: MemoryStore) -> None:
        """In the driver's PEP 249 mode a failing block is undone like anywhere else."""
        async with open_sqlite(tmp_path / "plain.db") as database:
            old = await seed(database, memory_store)
            engine = create_async_engine(database.url, connect_args={"autocommit": False})
            async with AsyncSession(engine) as session:
                with pytest.raises(RuntimeError, match="handler"):
                    async with blob_transaction(session, store=memory_store) as tx:
                        put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                        await session.execute(guarded(put))
                        raise RuntimeError("handler")
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"newer", old))
                    await session.execute(guarded(put))
            await engine.dispose()

            assert await contents(memory_store, database.engine) == (b"newer", None)


class TestUnseenWrites:
    async def test_a_function_that_writes(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """What a stored function wrote and the body committed is not deleted."""
        async with postgres.engine.begin() as connection:
            await connection.exec_driver_sql(
                "CREATE OR REPLACE FUNCTION make(url text, html text) RETURNS text LANGUAGE sql AS "
                "$$ INSERT INTO tasks (url, html) VALUES (url, html) RETURNING html $$"
            )
        async with postgres.session() as session:
            with pytest.raises(RuntimeError, match="handler"):
                async with blob_transaction(
                    session, store=memory_store, allow_unwritten=True
                ) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"new"))
                    uri = put.to_values()["html"]
                    await session.execute(sa.select(sa.func.make("u", uri)))
                    await session.commit()
                    raise RuntimeError("handler")

        assert await contents(memory_store, postgres.engine) == (b"new", None)

    async def test_a_function_that_writes_what_a_savepoint_undid(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """An upload of a rolled-back savepoint that is used again is not deleted unseen."""
        async with postgres.engine.begin() as connection:
            await connection.exec_driver_sql(
                "CREATE OR REPLACE FUNCTION make(url text, html text) RETURNS text LANGUAGE sql AS "
                "$$ INSERT INTO tasks (url, html) VALUES (url, html) RETURNING html $$"
            )
        async with postgres.session() as session:
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    with suppress(KeyError):
                        async with session.begin_nested():
                            await session.execute(sa.select(1))
                            put = await tx.put_s3(pk="u", api_calls=calls(b"new"))
                            raise KeyError
                    uri = put.to_values()["html"]
                    await session.execute(sa.select(sa.func.make("u", uri)))

        assert await contents(memory_store, postgres.engine) is None

    async def test_a_view_that_writes(self, database: Database, memory_store: MemoryStore) -> None:
        """What an INSTEAD OF trigger wrote and the body committed is not deleted."""
        async with database.engine.begin() as connection:
            await connection.exec_driver_sql("DROP VIEW IF EXISTS pages")
            await connection.exec_driver_sql(
                "CREATE VIEW pages AS SELECT url, html AS h FROM tasks"
            )
            if database.is_sqlite:
                await connection.exec_driver_sql(
                    "CREATE TRIGGER write INSTEAD OF INSERT ON pages BEGIN "
                    "INSERT INTO tasks (url, html) VALUES (NEW.url, NEW.h); END"
                )
            else:
                await connection.exec_driver_sql(
                    "CREATE OR REPLACE FUNCTION write() RETURNS trigger LANGUAGE plpgsql AS "
                    "$$ BEGIN INSERT INTO tasks (url, html) VALUES (NEW.url, NEW.h); "
                    "RETURN NULL; END $$"
                )
                await connection.exec_driver_sql(
                    "CREATE TRIGGER write INSTEAD OF INSERT ON pages "
                    "FOR EACH ROW EXECUTE FUNCTION write()"
                )
        async with database.session() as session:
            with suppress(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"new"))
                    await session.execute(
                        sa.text("INSERT INTO pages (url, h) VALUES ('u', :html)"), put.to_values()
                    )
                    await session.commit()

        assert await contents(memory_store, database.engine) == (b"new", None)
        async with database.engine.begin() as connection:
            await connection.exec_driver_sql("DROP VIEW pages")


class TestOldUriKept:
    """An old URI that is put into a row again is not deleted, however it is written."""

    @pytest.mark.parametrize("way", ["text", "bindparam", "raw"])
    async def test_written_back(
        self, database: Database, memory_store: MemoryStore, way: str
    ) -> None:
        """Written back after the replace: the row names the old object again."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                await session.execute(guarded(put))
                if way == "text":
                    await session.execute(
                        sa.text("UPDATE tasks SET html = :h WHERE url = 'u'"), {"h": old}
                    )
                elif way == "bindparam":
                    await session.execute(
                        sa.update(TASKS)
                        .where(TASKS.c.url == "u")
                        .values(html=sa.bindparam("b_html")),
                        {"b_html": old},
                    )
                else:
                    mark = "?" if database.is_sqlite else "$1"
                    connection = await session.connection()
                    await connection.exec_driver_sql(
                        f"UPDATE tasks SET html = {mark} WHERE url = 'u'",  # noqa: S608 - a placeholder
                        (old,),
                    )

        new = put.put_s3backed_column_results[0].new_s3_uri
        assert list(tx.report.kept) == [old]
        assert await contents(memory_store, database.engine, orphans=(new,)) == (b"old", None)

    async def test_moved_into_a_history(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Put into a row of a history as text."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                await session.execute(guarded(put))
                await session.execute(
                    sa.text("INSERT INTO tasks (url, image) VALUES ('history', :h)"), {"h": old}
                )

        assert await contents(memory_store, database.engine) == (b"new", None)
        assert await contents(memory_store, database.engine, "history") == (None, b"old")

    async def test_moved_to_another_column_in_the_same_statement(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Moved to another column by the statement that replaces it."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                await session.execute(
                    sa.text("UPDATE tasks SET html = :html, image = :old WHERE url = 'u'"),
                    {**put.to_values(), "old": old},
                )

        assert await contents(memory_store, database.engine) == (b"new", b"old")

    @pytest.mark.parametrize(
        "copy",
        [
            "INSERT INTO tasks (url, image) SELECT 'copy', html FROM tasks WHERE url = 'u'",
            "INSERT INTO tasks (url, image) SELECT 'copy', t.html FROM tasks t WHERE url = 'u'",
            "UPDATE tasks SET image = html WHERE url = 'u'",
            "UPDATE tasks SET title = 'x', image = tasks.html WHERE url = 'u'",
        ],
    )
    @pytest.mark.parametrize("then", ["replace", "delete"])
    async def test_copied_by_sql(
        self, database: Database, memory_store: MemoryStore, copy: str, then: str
    ) -> None:
        """Copied to another cell by SQL that does not name it: the object is kept."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store) as tx:
                if then == "delete":
                    tx.delete_s3([old])
                    await session.execute(sa.text(copy))
                    task.html = None
                else:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                    await session.execute(sa.text(copy))
                    await session.execute(guarded(put))

        assert list(tx.report.kept) == [old]
        url = "copy" if copy.startswith("INSERT") else "u"
        found = await contents(memory_store, database.engine, url)
        assert found is not None
        assert found[1] == b"old"

    async def test_moved_by_an_expression(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Moved to another column by the very statement that replaces it."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                await session.execute(guarded(put).values(image=TASKS.c.html))

        assert await contents(memory_store, database.engine) == (b"new", b"old")

    async def test_a_shared_key_of_the_seeds(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """delete_s3() leaves a key of sqlalchemy_mate's alone: another row may name it."""
        ours = await seed(database, memory_store)
        shared = ours.rsplit("/id=", 1)[0]
        memory_store.objects[shared] = memory_store.objects.pop(ours)
        async with database.engine.begin() as connection:
            await connection.execute(sa.update(TASKS).values(html=shared))
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store) as tx:
                tx.delete_s3([task.html])
                await session.delete(task)

        assert list(tx.report.kept) == [shared]
        assert list(memory_store.objects) == [shared]


class TestOneBlock:
    async def test_replaced_and_deleted_by_the_orm(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A row that was replaced and then deleted in one block leaves no object."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                task.html = put.to_values()["html"]
                await session.flush()
                await session.delete(task)

        assert await contents(memory_store, database.engine) is None

    @pytest.mark.parametrize("then", ["None", "another"])
    async def test_overwritten_by_the_orm(
        self, database: Database, memory_store: MemoryStore, then: str
    ) -> None:
        """An upload that the ORM overwrites in the same block leaves no object."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                task.html = put.to_values()["html"]
                await session.flush()
                if then == "None":
                    task.html = None
                else:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"newer", old))
                    task.html = put.to_values()["html"]

        expected = None if then == "None" else b"newer"
        assert await contents(memory_store, database.engine) == (expected, None)

    async def test_a_changed_outbox_beside_a_plain_statement(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A loaded object that notes the URI in another column tells nothing about the row."""
        old = await seed(database, memory_store)
        async with database.engine.begin() as connection:
            await connection.execute(sa.insert(TASKS).values(url="event"))
        async with database.session() as session:
            event = await load(session, "event")
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                event.title = put.to_values()["html"]
                await session.execute(guarded(put))

        assert await contents(memory_store, database.engine) == (b"new", None)

    async def test_moved_to_another_row_by_a_plain_statement(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """An upload that two statements wrote is not deleted because one row lost it: refused."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                    task.html = put.to_values()["html"]
                    await session.flush()
                    await session.execute(sa.insert(TASKS).values(url="v", **put.to_values()))
                    task.html = None

        assert await contents(memory_store, database.engine) == (b"old", None)

    async def test_copied_and_then_overwritten(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Nor is one that SQL copied to another row before it was overwritten."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                    task.html = put.to_values()["html"]
                    await session.flush()
                    await session.execute(
                        sa.text("INSERT INTO tasks (url, image) SELECT 'copy', html FROM tasks")
                    )
                    task.html = None

        assert await contents(memory_store, database.engine) == (b"old", None)

    async def test_a_trigger_that_puts_the_old_one_back(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """An update of a loaded object that a trigger undoes is refused."""
        old = await seed(postgres, memory_store)
        async with postgres.engine.begin() as connection:
            await connection.exec_driver_sql(
                "CREATE OR REPLACE FUNCTION put_back() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN NEW.html := OLD.html; RETURN NEW; END $$"
            )
            await connection.exec_driver_sql(
                "CREATE TRIGGER put_back BEFORE UPDATE ON tasks "
                "FOR EACH ROW EXECUTE FUNCTION put_back()"
            )
        async with postgres.session() as session:
            task = await load(session)
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                    task.html = put.to_values()["html"]

        assert await contents(memory_store, postgres.engine) == (b"old", None)

    @pytest.mark.slow
    async def test_the_users_own_rollback_is_cancelled(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A rollback in the body that is cancelled at any await leaves nothing behind."""

        async def program(session: AsyncSession) -> None:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"new"))
                session.add(Task(url="u", **put.to_values()))
                await session.flush()
                await session.rollback()
                raise KeyError

        was_cancelled, moment = True, 0
        while was_cancelled:
            moment += 1
            gc.collect()
            async with database.session() as session:
                with suppress(KeyError):
                    was_cancelled = await CountedTask(program(session), cancel_at=moment).run()
                    continue
                was_cancelled = False
            assert await contents(memory_store, database.engine) is None

        assert moment > 5


class Base2(DeclarativeBase):
    pass


class Item(Base2):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    html: Mapped[str | None]


class TestManyRows:
    """Whatever SQLAlchemy makes of many rows, what was written is seen."""

    async def test_keys_made_by_the_server(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Several new rows with server-made keys in one flush."""
        async with database.engine.begin() as connection:
            await connection.run_sync(Base2.metadata.drop_all)
            await connection.run_sync(Base2.metadata.create_all)
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                for number in range(3):
                    put = await tx.put_s3(pk=number, api_calls=calls(b"%d" % number))
                    session.add(Item(**put.to_values()))
            found = await session.scalars(sa.select(Item.html))
            assert len(set(found)) == len(memory_store.objects) == 3

    async def test_updates_of_objects_that_nobody_holds(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Several changed objects in one flush, forgotten at once."""
        for url in "abc":
            await seed(database, memory_store, url)
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                for task in (await session.scalars(sa.select(Task))).all():
                    put = await tx.put_s3(pk=task.url, api_calls=calls(b"new", task.html))
                    task.html = put.to_values()["html"]
                del task
                await session.flush()
                gc.collect()

        for url in "abc":
            assert await contents(memory_store, database.engine, url) == (b"new", None)

    async def test_bulk_update_by_primary_key(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """ORM bulk UPDATE by primary key, without any object."""
        old = {url: await seed(database, memory_store, url) for url in "abc"}
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                rows = []
                for url, uri in old.items():
                    put = await tx.put_s3(pk=url, api_calls=calls(b"new", uri))
                    rows.append({"url": url, **put.to_values()})
                await session.execute(sa.update(Task), rows)

        for url in "abc":
            assert await contents(memory_store, database.engine, url) == (b"new", None)

    @pytest.mark.parametrize("update_too", [True, False])
    async def test_upsert_of_several_rows(
        self, database: Database, memory_store: MemoryStore, update_too: bool
    ) -> None:
        """One upsert of several rows: written where it updates, refused where it skips."""
        old = await seed(database, memory_store, "a")
        insert = sqlite_insert if database.is_sqlite else postgres_insert
        async with database.session() as session:
            one = await put_s3(pk="a", api_calls=calls(b"new", old), store=memory_store)
            two = await put_s3(pk="b", api_calls=calls(b"new"), store=memory_store)
            statement = insert(TASKS).values(
                [{"url": "a", **one.to_values()}, {"url": "b", **two.to_values()}]
            )
            upsert = (
                statement.on_conflict_do_update(
                    index_elements=["url"], set_={"html": statement.excluded.html}
                )
                if update_too
                else statement.on_conflict_do_nothing()
            )
            with suppress(BlobNotWrittenError):
                async with blob_transaction(session, one, two):
                    await session.execute(upsert)

        expected = b"new" if update_too else b"old"
        assert await contents(memory_store, database.engine, "a") == (expected, None)


class TestEngines:
    async def test_an_engine_for_each_request(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Engines made by execution_options() are probed once, and pile up no listeners."""
        checkouts: list[int] = []
        sa.event.listen(database.engine.sync_engine, "checkout", lambda *_: checkouts.append(1))
        for number in range(8):
            engine = database.engine.execution_options(schema_translate_map={"tenant": None})
            async with AsyncSession(engine) as session:
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk=number, api_calls=calls(b"x"))
                    session.add(Task(url=str(number), **put.to_values()))
        handlers = list(database.engine.sync_engine.dialect.dispatch.handle_error)

        assert len(checkouts) == 1 + 8
        assert handlers.count(_session._handle_error) == 1

    async def test_a_bound_connection_in_autocommit(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A connection in AUTOCOMMIT is refused before the first byte, too."""
        async with database.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            async with AsyncSession(connection) as session:
                with pytest.raises(UnsafeTransactionError, match="AUTOCOMMIT"):
                    async with blob_transaction(session, store=memory_store) as tx:
                        await tx.put_s3(pk="u", api_calls=calls(b"x"))

        assert memory_store.calls == []

    async def test_background_work_at_closing(self, database: Database) -> None:
        """Work that is handed to the store while it closes is finished before it is closed."""
        async with MemoryStore(drain_seconds=5) as store:
            old = await seed(database, store)
            store.runtime.delete_again("s3://bucket/prefix/late", after_seconds=3600)
            gate = store.hold("delete", containing="late")
            closing = asyncio.create_task(store.runtime.close(drain_seconds=0))
            await gate.reached.wait()
            async with database.session() as session:
                async with blob_transaction(session, store=store, background=True) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"new", old))
                    await session.execute(guarded(put))
            gate.open()
            await closing
            is_gone = old not in store.objects
            left = len(store.runtime.background)

        assert (is_gone, left) == (True, 0)
