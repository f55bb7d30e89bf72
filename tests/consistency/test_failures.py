"""The failures that break the seed and every peer: after each, both stores agree."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from support.databases import Database
from support.models import TASKS, Task, contents, load

from aioblobcol import (
    BlobNotWrittenError,
    BlobSharedError,
    BlobUploadError,
    DeleteReport,
    Outcome,
    PutS3ApiCall,
    PutS3Result,
    ResultSpentError,
    blob_transaction,
    delete_s3,
    guard,
    put_s3,
)
from aioblobcol.testing import MemoryStore, Step


def calls(
    html: bytes | None = None,
    image: bytes | None = None,
    *,
    old: Task | None = None,
) -> list[PutS3ApiCall]:
    given = [("html", html), ("image", image)]
    return [
        PutS3ApiCall(column, binary, getattr(old, column, None))
        for column, binary in given
        if binary is not None
    ]


def replace(put: PutS3Result, url: str = "u") -> sa.Update:
    return sa.update(Task).where(Task.url == url, put.guard(Task)).values(**put.to_values())


async def create(
    database: Database, store: MemoryStore, url: str = "u", html: bytes = b"1", image: bytes = b"i"
) -> None:
    async with database.session() as session, blob_transaction(session, store=store) as tx:
        put = await tx.put_s3(pk=url, api_calls=calls(html, image))
        session.add(Task(url=url, **put.to_values()))


async def update(
    database: Database,
    store: MemoryStore,
    html: bytes,
    *,
    after_read: asyncio.Barrier | None = None,
) -> None:
    async with database.session() as session:
        task = await load(session)
        if after_read is not None:
            await after_read.wait()
        async with blob_transaction(session, store=store) as tx:
            put = await tx.put_s3(pk="u", api_calls=calls(html, old=task))
            await session.execute(replace(put))


async def delete(
    database: Database, store: MemoryStore, *, after_read: asyncio.Barrier | None = None
) -> None:
    async with database.session() as session:
        task = await load(session)
        if after_read is not None:
            await after_read.wait()
        async with blob_transaction(session, store=store) as tx:
            tx.delete_s3([task.html, task.image])
            await session.execute(
                sa.delete(Task).where(
                    Task.url == "u", guard(Task, html=task.html, image=task.image)
                )
            )


def refused(results: Sequence[Any]) -> int:
    """Count who was told that the row had changed; anything else is a failure of the test."""
    for result in results:
        if isinstance(result, BaseException) and not isinstance(
            result, (BlobNotWrittenError, DBAPIError)
        ):
            raise result
    return sum(isinstance(result, BaseException) for result in results)


class TestTwoWriters:
    async def test_double_submit(self, database: Database, memory_store: MemoryStore) -> None:
        """The loser of the primary key does not hurt the winner, although the bytes are equal."""
        results = await asyncio.gather(
            *(create(database, memory_store) for _ in range(4)), return_exceptions=True
        )

        assert refused(results) == 3
        assert await contents(memory_store, database.engine) == (b"1", b"i")

    async def test_two_updates_of_one_row(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Both read the same old URI: one wins, the other is refused and undone."""
        await create(database, memory_store)
        barrier = asyncio.Barrier(2)
        results = await asyncio.gather(
            update(database, memory_store, b"a", after_read=barrier),
            update(database, memory_store, b"b", after_read=barrier),
            return_exceptions=True,
        )

        assert refused(results) == 1
        winner = b"a" if results[0] is None else b"b"
        assert await contents(memory_store, database.engine) == (winner, b"i")

    async def test_update_against_delete(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """One of them wins, and no object is lost or left over."""
        await create(database, memory_store)
        barrier = asyncio.Barrier(2)
        results = await asyncio.gather(
            update(database, memory_store, b"a", after_read=barrier),
            delete(database, memory_store, after_read=barrier),
            return_exceptions=True,
        )

        assert refused(results) == 1
        expected = (b"a", b"i") if results[0] is None else None
        assert await contents(memory_store, database.engine) == expected

    async def test_there_and_back(self, database: Database, memory_store: MemoryStore) -> None:
        """A to B to A: each attempt has a key of its own, so the late delete of A harms nobody."""
        await create(database, memory_store, html=b"A")
        gate = memory_store.hold("delete")
        to_b = asyncio.create_task(update(database, memory_store, b"B"))
        await gate.reached.wait()  # B is committed, the old A is about to be deleted
        back_to_a = asyncio.create_task(update(database, memory_store, b"A"))
        gate.open()
        await asyncio.gather(to_b, back_to_a)

        assert await contents(memory_store, database.engine) == (b"A", b"i")

    async def test_unguarded_updates_leave_the_documented_orphan(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Without the guard the first update's object stays behind; nothing is lost."""
        await create(database, memory_store)
        async with database.session() as one, database.session() as two:
            first, second = await load(one), await load(two)
            async with blob_transaction(one, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"a", old=first))
                await one.execute(sa.update(Task).values(**put.to_values()))
            async with blob_transaction(two, store=memory_store) as tx:
                again = await tx.put_s3(pk="u", api_calls=calls(b"b", old=second))
                await two.execute(sa.update(Task).values(**again.to_values()))

        orphan = put.put_s3backed_column_results[0].new_s3_uri
        found = await contents(memory_store, database.engine, orphans=(orphan,))
        assert found == (b"b", b"i")


class TestFailingStore:
    async def test_one_of_several_uploads_fails(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """The others are deleted again, and one error names the column, the URI and the cause."""
        memory_store.fail("put", containing="col=image")
        async with database.session() as session:
            with pytest.raises(BlobUploadError) as caught:
                async with blob_transaction(session, store=memory_store) as tx:
                    await tx.put_s3(pk="u", api_calls=calls(b"1", b"i"))

        assert caught.value.column == "image"
        assert "col=image" in caught.value.uri
        assert "InvalidRequest" in caught.value.reason
        assert caught.value.__cause__ is not None
        assert caught.value.not_deleted == {}
        assert await contents(memory_store, database.engine) is None

    async def test_uploads_that_have_not_begun_are_not_begun(self, database: Database) -> None:
        """When one fails, those that wait for their turn are never sent."""
        async with MemoryStore(max_concurrency=1) as store:
            store.fail("put", containing="col=html")
            with pytest.raises(BlobUploadError):
                await put_s3(pk="u", api_calls=calls(b"1", b"i"), store=store)

        assert [operation for operation, _ in store.calls] == ["put", "delete"]

    async def test_a_put_on_the_wire_is_run_to_its_end(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """When one fails, the other one is waited for, and only then deleted."""
        gate = memory_store.hold("put", containing="col=html")
        memory_store.fail("put", containing="col=image")
        task = asyncio.create_task(put_s3(pk="u", api_calls=calls(b"1", b"i"), store=memory_store))
        await gate.reached.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        before = [operation for operation, _ in memory_store.calls]
        gate.open()
        with pytest.raises(BlobUploadError):
            await task

        assert before == ["put", "put"]
        assert memory_store.objects == {}
        assert memory_store.land_late() == []

    async def test_an_answer_that_was_lost(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A PUT whose answer was lost may have stored its object: deleted, now and later."""
        memory_store.fail("put", stage="after", containing="col=image")
        with pytest.raises(BlobUploadError) as caught:
            await put_s3(pk="u", api_calls=calls(b"1", b"i"), store=memory_store)

        assert memory_store.objects == {}
        assert memory_store.runtime.second_deletes == (caught.value.uri,)

    async def test_a_put_that_lands_after_its_delete(self, database: Database) -> None:
        """A PUT that takes effect after it was given up is deleted a second time."""
        async with MemoryStore(request_seconds=0.05) as store:
            gate = store.hold("put")
            with pytest.raises(BlobUploadError, match="no answer in time"):
                await put_s3(pk="u", api_calls=calls(b"1"), store=store)
            gate.open()
            landed = store.land_late()
            present = list(store.objects)

        assert landed == present  # it is there although its delete was answered
        assert store.objects == {}  # and gone when the second delete was due, or the store closed

    async def test_the_delete_of_the_old_object_fails(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """The commit stands, the new object stays, the old one is reported and an orphan."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            old = task.html
            assert old is not None
            memory_store.refuses[old] = "AccessDenied"
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                await session.execute(replace(put))

        assert tx.outcome is Outcome.COMMITTED
        assert tx.report.failed == {old: "AccessDenied"}
        found = await contents(memory_store, database.engine, orphans=(old,))
        assert found == (b"2", b"i")

    async def test_every_delete_raises(self, database: Database, memory_store: MemoryStore) -> None:
        """Whatever the store raises while cleaning up does not reach the handler."""
        await create(database, memory_store)

        def explode(step: Step) -> None:
            if step.operation == "delete":
                raise RuntimeError("a bug in the store")

        memory_store.hooks.append(explode)
        async with database.session() as session:
            task = await load(session)
            old = task.html
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                await session.execute(replace(put))

        assert tx.outcome is Outcome.COMMITTED
        assert list(tx.report.failed) == [old]

    async def test_a_failing_clean_up_does_not_hide_the_handlers_error(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """The handler's exception arrives, the orphan is in the report."""
        async with database.session() as session:
            with pytest.raises(KeyError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"1"))
                    memory_store.fail("delete")
                    raise KeyError

        orphan = put.put_s3backed_column_results[0].new_s3_uri
        assert list(tx.report.failed) == [orphan]
        assert await contents(memory_store, database.engine, orphans=(orphan,)) is None

    async def test_an_upload_that_could_not_be_undone_is_tried_again(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """What a failed put_s3 could not delete goes when the block ends, also by a commit."""
        memory_store.fail("put", containing="col=image", times=1)
        memory_store.fail("delete", times=1)
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                with pytest.raises(BlobUploadError) as caught:
                    await tx.put_s3(pk="u", api_calls=calls(b"1", b"i"))
                put = await tx.put_s3(pk="u", api_calls=calls(b"1", b"i"))
                session.add(Task(url="u", **put.to_values()))

        assert len(caught.value.not_deleted) == 1
        assert await contents(memory_store, database.engine) == (b"1", b"i")


class TestNotWritten:
    """COMMIT is refused when the statements did not do what the results say."""

    async def test_a_forgotten_column(self, database: Database, memory_store: MemoryStore) -> None:
        """An uploaded column that no statement names: rolled back, undone, and named."""
        async with database.session() as session:
            with pytest.raises(BlobNotWrittenError) as caught:
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"1", b"i"))
                    session.add(Task(url="u", html=put.to_values()["html"]))

        assert caught.value.uris == (put.put_s3backed_column_results[1].new_s3_uri,)
        assert await contents(memory_store, database.engine) is None

    @pytest.mark.parametrize("returning", [False, True])
    async def test_an_update_that_matched_nothing(
        self, database: Database, memory_store: MemoryStore, returning: bool
    ) -> None:
        """UPDATE .. WHERE without a match: refused, and the old object is not deleted."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                    statement = replace(put, url="typo")
                    await session.execute(statement.returning(Task.url) if returning else statement)

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    @pytest.mark.parametrize("returning", [False, True])
    async def test_an_update_that_matched(
        self, database: Database, memory_store: MemoryStore, returning: bool
    ) -> None:
        """The number of changed rows is known with RETURNING, too."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                statement = replace(put)
                await session.execute(statement.returning(Task.url) if returning else statement)

        assert await contents(memory_store, database.engine) == (b"2", b"i")

    async def test_insert_that_did_nothing(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """INSERT .. ON CONFLICT DO NOTHING without effect: refused."""
        await create(database, memory_store)
        async with database.session() as session:
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"2"))
                    await session.execute(
                        sa.text(
                            "INSERT INTO tasks (url, html) VALUES ('u', :html) "
                            "ON CONFLICT (url) DO NOTHING"
                        ),
                        put.to_values(),
                    )

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    async def test_opted_out(self, database: Database, memory_store: MemoryStore) -> None:
        """allow_unwritten=True commits, and leaves both sides alone."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store, allow_unwritten=True) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))

        assert tx.outcome is Outcome.COMMITTED
        assert list(tx.report.kept) == [put.put_s3backed_column_results[0].new_s3_uri]
        orphan = put.put_s3backed_column_results[0].new_s3_uri
        found = await contents(memory_store, database.engine, orphans=(orphan,))
        assert found == (b"1", b"i")

    async def test_a_delete_that_matched_nothing(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """DELETE without a match: refused, and the objects stay."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            result = delete_s3([task.html, task.image], store=memory_store)
            with pytest.raises(BlobNotWrittenError, match="delete_s3"):
                async with blob_transaction(session, result):
                    await session.execute(sa.delete(Task).where(Task.url == "typo"))

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    async def test_a_delete_that_was_forgotten(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """delete_s3() without any statement: refused, and the objects stay."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    tx.delete_s3([task.html, task.image])

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    @pytest.mark.parametrize("way", ["orm", "core", "text", "column"])
    async def test_ways_to_delete(
        self, database: Database, memory_store: MemoryStore, way: str
    ) -> None:
        """ORM, Core, text, or a column that is emptied: the objects go with the commit."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store) as tx:
                tx.delete_s3([task.html, task.image])
                if way == "orm":
                    await session.delete(task)
                elif way == "core":
                    await session.execute(sa.delete(Task).where(Task.url == "u"))
                elif way == "text":
                    await session.execute(sa.text("DELETE FROM tasks WHERE url = 'u'"))
                else:
                    task.html = task.image = None

        expected = (None, None) if way == "column" else None
        assert await contents(memory_store, database.engine) == expected

    @pytest.mark.parametrize("way", ["orm", "core", "text", "upsert", "orm_bulk"])
    async def test_ways_to_write(
        self, database: Database, memory_store: MemoryStore, way: str
    ) -> None:
        """However the statement is written, a URI that went into a row is seen."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"2", b"j", old=task))
                values = put.to_values()
                if way == "orm":
                    for column, uri in values.items():
                        setattr(task, column, uri)
                elif way == "core":
                    await session.execute(sa.update(TASKS).values(**values))
                elif way == "text":
                    await session.execute(
                        sa.text("UPDATE tasks SET html = :html, image = :image"), values
                    )
                elif way == "upsert":
                    await session.execute(
                        sa.text(
                            "INSERT INTO tasks (url, html, image) VALUES ('u', :html, :image) "
                            "ON CONFLICT (url) DO UPDATE "
                            "SET html = excluded.html, image = excluded.image"
                        ),
                        values,
                    )
                else:
                    await session.execute(sa.update(Task), [{"url": "u", **values}])

        assert await contents(memory_store, database.engine) == (b"2", b"j")

    async def test_several_rows_in_one_flush(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Several updates in one executemany, whose row count asyncpg does not tell, are seen."""
        for url in "abc":
            await create(database, memory_store, url)
        async with database.session() as session:
            tasks = [await load(session, url) for url in "abc"]
            async with blob_transaction(session, store=memory_store) as tx:
                for task in tasks:
                    put = await tx.put_s3(pk=task.url, api_calls=calls(b"2", old=task))
                    task.html = put.to_values()["html"]

        for url in "abc":
            assert await contents(memory_store, database.engine, url) == (b"2", b"i")

    async def test_several_rows_of_which_one_is_gone(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """When one row of an executemany was deleted by somebody else, nothing is committed."""
        for url in "abc":
            await create(database, memory_store, url)
        async with database.session() as session:
            tasks = [await load(session, url) for url in "abc"]
            orphans = (tasks[1].html or "", tasks[1].image or "")
            async with database.engine.begin() as connection:
                await connection.execute(sa.delete(Task).where(Task.url == "b"))
            with pytest.raises((BlobNotWrittenError, sa.orm.exc.StaleDataError)):
                async with blob_transaction(session, store=memory_store) as tx:
                    for task in tasks:
                        put = await tx.put_s3(pk=task.url, api_calls=calls(b"2", old=task))
                        task.html = put.to_values()["html"]

        assert await contents(memory_store, database.engine, "a", orphans=orphans) == (b"1", b"i")


class TestSavepoints:
    async def test_written_in_a_savepoint_that_was_rolled_back(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A URI written in a rolled-back savepoint was not written: refused."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                    with suppress(KeyError):
                        async with session.begin_nested():
                            await session.execute(replace(put))
                            raise KeyError

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    async def test_written_again_after_the_savepoint(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Written in a rolled-back savepoint and then once more outside: committed."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                with suppress(KeyError):
                    async with session.begin_nested():
                        await session.execute(replace(put))
                        raise KeyError
                await session.execute(replace(put))

        assert await contents(memory_store, database.engine) == (b"2", b"i")

    async def test_an_import_that_skips_bad_rows(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """An upload made inside of a savepoint goes with it, and the others are committed."""
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                for url in ("a", "b", "a", "c"):
                    with suppress(IntegrityError):
                        async with session.begin_nested():
                            put = await tx.put_s3(pk=url, api_calls=calls(url.encode()))
                            await session.execute(
                                sa.insert(TASKS).values(url=url, **put.to_values())
                            )

        for url in "abc":
            found = await contents(memory_store, database.engine, url)
            assert found == (url.encode(), None)

    async def test_three_deep(self, database: Database, memory_store: MemoryStore) -> None:
        """Released inside of a rolled-back one, the innermost was undone as well."""
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                outer = await tx.put_s3(pk="a", api_calls=calls(b"a"))
                session.add(Task(url="a", **outer.to_values()))
                await session.flush()
                with suppress(KeyError):
                    async with session.begin_nested():
                        middle = await tx.put_s3(pk="b", api_calls=calls(b"b"))
                        session.add(Task(url="b", **middle.to_values()))
                        async with session.begin_nested():
                            inner = await tx.put_s3(pk="c", api_calls=calls(b"c"))
                            session.add(Task(url="c", **inner.to_values()))
                        raise KeyError

        assert await contents(memory_store, database.engine, "a") == (b"a", None)
        assert len(memory_store.objects) == 1

    async def test_replaced_in_a_rolled_back_savepoint(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """The old object survives a replace whose savepoint was rolled back."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store):
                with suppress(KeyError):
                    async with (
                        session.begin_nested(),
                    ):
                        put = await put_s3(
                            pk="u", api_calls=calls(b"2", old=task), store=memory_store
                        )
                        await session.execute(replace(put))
                        raise KeyError
            await put.clean_up_created_s3_object_when_create_or_update_row_failed()

        assert await contents(memory_store, database.engine) == (b"1", b"i")


class TestReplaceTwice:
    async def test_in_one_block(self, database: Database, memory_store: MemoryStore) -> None:
        """Replaced twice in one transaction: only the last object is left."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store) as tx:
                for number in (b"2", b"3", b"4"):
                    put = await tx.put_s3(pk="u", api_calls=calls(number, old=task))
                    await session.execute(replace(put))
                    await session.refresh(task)

        assert await contents(memory_store, database.engine) == (b"4", b"i")

    async def test_created_and_deleted_in_one_block(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A row that came and went in one transaction leaves no object."""
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"1"))
                task = Task(url="u", **put.to_values())
                session.add(task)
                await session.flush()
                tx.delete_s3([task.html])
                await session.delete(task)

        assert await contents(memory_store, database.engine) is None

    async def test_an_old_uri_that_moved_to_another_row(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """An old URI that the same transaction put into another row is not deleted."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await load(session)
            async with blob_transaction(session, store=memory_store) as tx:
                old = task.html  # the next statement changes the attribute as well
                put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                await session.execute(replace(put))
                await session.execute(sa.insert(Task).values(url="v", html=old))

        assert await contents(memory_store, database.engine, "u") == (b"2", b"i")
        assert await contents(memory_store, database.engine, "v") == (b"1", None)


class TestResults:
    async def test_several_results_at_once(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Results of put_s3 and delete_s3, made before, are settled by one block."""
        await create(database, memory_store, "gone")
        async with database.session() as session:
            gone = await load(session, "gone")
            one = await put_s3(pk="a", api_calls=calls(b"a"), store=memory_store)
            two = await put_s3(pk="b", api_calls=calls(b"b"), store=memory_store)
            three = delete_s3([gone.html, gone.image, None], store=memory_store)
            async with blob_transaction(session, one, two, three):
                session.add_all(
                    [Task(url="a", **one.to_values()), Task(url="b", **two.to_values())]
                )
                await session.delete(gone)

        assert await contents(memory_store, database.engine, "a") == (b"a", None)
        assert await contents(memory_store, database.engine, "b") == (b"b", None)

    async def test_spent_is_spent(self, database: Database, memory_store: MemoryStore) -> None:
        """After a rollback the retry loop cannot use the deleted objects again."""
        put = await put_s3(pk="u", api_calls=calls(b"1"), store=memory_store)
        async with database.session() as session:
            with pytest.raises(KeyError):
                async with blob_transaction(session, put):
                    session.add(Task(url="u", **put.to_values()))
                    raise KeyError
            with pytest.raises(ResultSpentError):
                async with blob_transaction(session, put):
                    raise AssertionError("not reached")

        with pytest.raises(ResultSpentError):
            put.to_values()
        assert await contents(memory_store, database.engine) is None

    async def test_a_block_settles_its_results_by_itself(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Cleaning up by hand inside of the block, or after it, is refused."""
        put = await put_s3(pk="u", api_calls=calls(b"1"), store=memory_store)
        async with database.session() as session:
            async with blob_transaction(session, put):
                session.add(Task(url="u", **put.to_values()))
                with pytest.raises(ResultSpentError, match="settles it"):
                    await put.clean_up_created_s3_object_when_create_or_update_row_failed()
        with pytest.raises(ResultSpentError):
            await put.clean_up_created_s3_object_when_create_or_update_row_failed()

        assert await contents(memory_store, database.engine) == (b"1", None)

    async def test_the_other_direction_is_refused(self, memory_store: MemoryStore) -> None:
        """A result that was settled one way cannot be settled the other way."""
        put = await put_s3(pk="u", api_calls=calls(b"1"), store=memory_store)
        await put.clean_up_old_s3_object_when_update_row_succeeded()
        await put.clean_up_old_s3_object_when_update_row_succeeded()
        with pytest.raises(ResultSpentError, match="written"):
            await put.clean_up_created_s3_object_when_create_or_update_row_failed()

        assert len(memory_store.objects) == 1

    async def test_two_blocks_cannot_own_one_result(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A result that a block owns is refused by another block."""
        put = await put_s3(pk="u", api_calls=calls(b"1"), store=memory_store)
        async with database.session() as one, database.session() as two:
            async with blob_transaction(one, put):
                with pytest.raises(ResultSpentError, match="another"):
                    async with blob_transaction(two, put):
                        raise AssertionError("not reached")
                one.add(Task(url="u", **put.to_values()))

        assert await contents(memory_store, database.engine) == (b"1", None)

    async def test_put_s3_that_outlives_its_block(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """An upload that nobody waited for is undone when its block was left before it."""
        gate = memory_store.hold("put")
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                task = asyncio.create_task(tx.put_s3(pk="u", api_calls=calls(b"1")))
                await gate.reached.wait()
                assert tx._claims is not None
                tx._claims.allow_unwritten = True
        gate.open()
        with pytest.raises(ResultSpentError, match="was left"):
            await task

        assert await contents(memory_store, database.engine) is None

    async def test_a_dropped_result_warns(self, memory_store: MemoryStore) -> None:
        """A result that is dropped unsettled names its URIs in a ResourceWarning."""
        put = await put_s3(pk="u", api_calls=calls(b"1"), store=memory_store)
        uri = put.put_s3backed_column_results[0].new_s3_uri
        with pytest.warns(ResourceWarning, match=uri):
            del put
            gc.collect()

    async def test_the_hand_written_create_is_silent(self, memory_store: MemoryStore) -> None:
        """A successful hand-written create calls nothing: reading the values is enough."""
        put = await put_s3(pk="u", api_calls=calls(b"1"), store=memory_store)
        put.to_values()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del put
            gc.collect()


class TestBackground:
    async def test_superseded_objects_go_after_the_block(self, database: Database) -> None:
        """background=True does not wait for the delete, and closing the store does."""
        async with MemoryStore() as store:
            await create(database, store)
            gate = store.hold("delete")
            async with database.session() as session:
                task = await load(session)
                old = task.html or ""
                async with blob_transaction(session, store=store, background=True) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                    await session.execute(replace(put))
                await gate.reached.wait()
                still_there = old in store.objects
                gate.open()

        assert still_there
        assert tx.report == DeleteReport(deleted=(old,))
        async with store:
            assert await contents(store, database.engine) == (b"2", b"i")

    async def test_new_objects_of_a_failed_block_are_not_left_to_the_background(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """What a failed block uploaded is gone before its exception arrives."""
        async with database.session() as session:
            with pytest.raises(KeyError):
                async with blob_transaction(session, store=memory_store, background=True) as tx:
                    await tx.put_s3(pk="u", api_calls=calls(b"1"))
                    raise KeyError

        assert memory_store.objects == {}


class TestSessions:
    async def test_a_scoped_session(self, database: Database, memory_store: MemoryStore) -> None:
        """async_scoped_session is taken for the session behind it."""
        scoped: async_scoped_session[AsyncSession] = async_scoped_session(
            database.session, scopefunc=asyncio.current_task
        )
        async with blob_transaction(scoped, store=memory_store) as tx:
            put = await tx.put_s3(pk="u", api_calls=calls(b"1"))
            scoped.add(Task(url="u", **put.to_values()))
        await scoped.remove()

        assert await contents(memory_store, database.engine) == (b"1", None)

    async def test_a_session_that_has_read_already(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A session in the middle of its own reading transaction is followed from there on."""
        await create(database, memory_store)
        async with database.session() as session:
            task = await session.get_one(Task, "u")
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                task.html = put.to_values()["html"]

        assert await contents(memory_store, database.engine) == (b"2", b"i")

    async def test_many_blocks_on_one_session(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A session can be used for one block after another, whatever became of the last."""
        async with database.session() as session:
            for number in range(6):
                with suppress(KeyError):
                    async with blob_transaction(session, store=memory_store) as tx:
                        put = await tx.put_s3(pk=number, api_calls=calls(b"%d" % number))
                        session.add(Task(url=str(number), **put.to_values()))
                        if number % 2:
                            raise KeyError

        assert len(memory_store.objects) == 3
        assert await contents(memory_store, database.engine, "4") == (b"4", None)


class TestFalseEvidence:
    """A statement that changed some row proves nothing about another one."""

    async def _task(self, session: AsyncSession, database: Database, store: MemoryStore) -> Task:
        await create(database, store)
        await create(database, store, "v")
        return await load(session)

    async def test_an_upsert_that_leaves_the_column_alone(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """ON CONFLICT DO UPDATE of another column did not write the URI: refused."""
        insert = sqlite_insert if database.is_sqlite else postgres_insert
        async with database.session() as session:
            task = await self._task(session, database, memory_store)
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                    await session.execute(
                        insert(Task)
                        .values(url="u", **put.to_values())
                        .on_conflict_do_update(index_elements=["url"], set_={"title": "x"})
                    )

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    async def test_an_upsert_that_sets_it(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """ON CONFLICT DO UPDATE of this column wrote it."""
        insert = sqlite_insert if database.is_sqlite else postgres_insert
        async with database.session() as session:
            task = await self._task(session, database, memory_store)
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                await session.execute(
                    insert(Task)
                    .values(url="u", **put.to_values())
                    .on_conflict_do_update(index_elements=["url"], set_=put.to_values())
                )

        assert await contents(memory_store, database.engine) == (b"2", b"i")

    @pytest.mark.parametrize("first", ["outbox", "update"])
    async def test_an_outbox_that_names_the_uri(
        self, database: Database, memory_store: MemoryStore, first: str
    ) -> None:
        """The URI in another column of another row is no proof that the row has it."""
        async with database.session() as session:
            task = await self._task(session, database, memory_store)
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                    note = f"replaced by {put.to_values()['html']}"
                    outbox = sa.insert(TASKS).values(url="event", title=note)
                    statements = [outbox, replace(put, url="typo")]
                    for statement in statements if first == "outbox" else reversed(statements):
                        await session.execute(statement)

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    async def test_an_outbox_of_a_create(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Nor is it for a column that was empty before."""
        async with database.engine.begin() as connection:
            await connection.execute(sa.insert(TASKS).values(url="u"))
        async with database.session() as session:
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"2"))
                    uri = put.to_values()["html"]
                    await session.execute(sa.insert(TASKS).values(url="event", title=uri))
                    await session.execute(replace(put, url="typo"))

        assert memory_store.objects == {}

    async def test_a_condition_that_mentions_the_uri(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A statement that only mentions the URI did not write it."""
        async with database.session() as session:
            task = await self._task(session, database, memory_store)
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                    await session.execute(
                        sa.text("UPDATE tasks SET title = 'x' WHERE url <> :x AND url = 'u'"),
                        {"x": put.to_values()["html"]},
                    )

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    @pytest.mark.parametrize("loaded", [True, False])
    async def test_a_delete_that_missed_beside_another_change(
        self, database: Database, memory_store: MemoryStore, loaded: bool
    ) -> None:
        """Changing another row does not make up for a DELETE that matched nothing."""
        async with database.session() as session:
            task = await self._task(session, database, memory_store)
            uris = [task.html, task.image]
            if not loaded:
                session.expunge_all()
            with pytest.raises(BlobNotWrittenError, match="guard"):
                async with blob_transaction(session, store=memory_store) as tx:
                    tx.delete_s3(uris)
                    await session.execute(sa.delete(TASKS).where(TASKS.c.title == "no such"))
                    await session.execute(
                        sa.update(TASKS).where(TASKS.c.url == "v").values(title="x")
                    )

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    async def test_a_commit_in_the_middle_does_not_spend_the_deletes(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """An unrelated change that was committed in the middle releases nothing."""
        async with database.session() as session:
            task = await self._task(session, database, memory_store)
            with pytest.raises(KeyError):
                async with blob_transaction(session, store=memory_store) as tx:
                    tx.delete_s3([task.html, task.image])
                    await session.execute(
                        sa.update(TASKS).where(TASKS.c.url == "v").values(title="x")
                    )
                    await session.commit()
                    await session.execute(sa.delete(TASKS).where(TASKS.c.url == "u"))
                    raise KeyError

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    async def test_one_upload_in_several_rows(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """An UPDATE without its WHERE would share one object between rows: refused."""
        async with database.session() as session:
            task = await self._task(session, database, memory_store)
            with pytest.raises(BlobSharedError, match="WHERE"):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                    await session.execute(sa.update(Task).values(**put.to_values()))

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    async def test_a_column_that_is_emptied_with_a_guard(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """UPDATE .. SET image = NULL, guarded with the old URI, releases its object."""
        async with database.session() as session:
            task = await self._task(session, database, memory_store)
            image = task.image
            session.expunge_all()
            async with blob_transaction(session, store=memory_store) as tx:
                tx.delete_s3([image])
                await session.execute(
                    sa.update(Task).where(guard(Task, image=image)).values(image=None)
                )

        assert await contents(memory_store, database.engine) == (b"1", None)

    async def test_a_guard_of_an_unrelated_update(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """An UPDATE that is guarded with the old URI, and leaves the column alone: refused."""
        async with database.session() as session:
            task = await self._task(session, database, memory_store)
            image = task.image
            session.expunge_all()
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    tx.delete_s3([image])
                    await session.execute(
                        sa.update(Task).where(guard(Task, image=image)).values(title="x")
                    )

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    async def test_a_savepoint_of_the_connection(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A savepoint that the session does not know of is followed as well."""
        async with database.session() as session:
            task = await self._task(session, database, memory_store)
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                    connection = await session.connection()
                    savepoint = await connection.begin_nested()
                    await session.execute(replace(put))
                    await savepoint.rollback()

        assert await contents(memory_store, database.engine) == (b"1", b"i")

    @pytest.mark.parametrize("how", ["ROLLBACK TO a", "ROLLBACK TO SAVEPOINT a"])
    async def test_a_savepoint_in_text(
        self, database: Database, memory_store: MemoryStore, how: str
    ) -> None:
        """A savepoint that was written as text is followed as well."""
        async with database.session() as session:
            task = await self._task(session, database, memory_store)
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=calls(b"2", old=task))
                    await session.execute(sa.text("SAVEPOINT a"))
                    await session.execute(replace(put))
                    await session.execute(sa.text(how))

        assert await contents(memory_store, database.engine) == (b"1", b"i")
