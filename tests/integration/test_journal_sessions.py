"""Sessions with a journal: staged before an upload, adopted by the row, settled at the end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from support.databases import Database, terminate_backends
from support.journaled import World, open_world

from aioblobcol import (
    Blob,
    BlobNotWrittenError,
    BlobUploadError,
    InvalidColumnError,
    InvalidInputError,
    Journal,
    JournalError,
    PutS3ApiCall,
    UnsafeTransactionError,
    Worker,
    blob_report,
    blob_sessionmaker,
    blob_transaction,
    enlist,
    put_s3,
    track_blobs,
    upload_blobs,
)
from aioblobcol.testing import MemoryStore, Step, StoredObject


@pytest_asyncio.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database) as opened:
        yield opened


@pytest_asyncio.fixture
async def postgres_world(postgres: Database) -> AsyncIterator[World]:
    async with open_world(postgres) as opened:
        yield opened


class OopsError(Exception):
    pass


class TestManaged:
    async def test_an_object_is_staged_before_it_exists(self, world: World) -> None:
        """When the PUT arrives at the store, the entry is committed."""
        seen: list[dict[str, str]] = []

        async def look(step: Step) -> None:
            if (step.operation, step.stage) == ("put", "before"):
                seen.append({step.uri: (await world.states())[step.uri]})

        world.store.hooks.append(look)
        async with world.sessions.begin() as session:
            session.add(world.Doc(key="a", body=Blob(b"1"), cover=Blob(b"2")))

        assert [list(each.values()) for each in seen] == [["staged"], ["staged"]]
        assert len(await world.check()) == 2

    async def test_a_committed_row_is_not_in_the_journal(self, world: World) -> None:
        """Adopted by the row's own statement."""
        async with world.sessions.begin() as session:
            session.add(world.Doc(key="a", body=Blob(b"1")))

        assert await world.states() == {}
        assert list((await world.check()).values()) == [b"1"]

    async def test_what_a_row_lets_go_is_the_workers(self, database: Database) -> None:
        """It is retired by the trigger, stays for the retention, and is reported as kept."""
        async with open_world(database, retention=timedelta(minutes=10)) as world:
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="a", body=Blob(b"1")))
            async with world.sessions.begin() as session:
                doc = await session.get_one(world.Doc, "a")
                assert doc.body is not None
                old, doc.body = doc.body.uri, Blob(b"2")
            report = blob_report(session)

            assert await world.states() == {old: "retired"}
            assert old in report.kept
            assert old in world.store.objects

    async def test_a_failed_create_leaves_nothing(self, world: World) -> None:
        """Its objects are condemned and deleted, and their entries go at once."""
        with pytest.raises(OopsError):
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="a", body=Blob(b"1"), cover=Blob(b"2")))
                await session.flush()
                raise OopsError

        assert world.store.objects == {}
        assert await world.states() == {}

    async def test_a_savepoint_takes_its_objects_along(self, world: World) -> None:
        """What was staged for it is settled at the end of the root."""
        async with world.sessions.begin() as session:
            session.add(world.Doc(key="a", body=Blob(b"1")))
            with pytest.raises(OopsError):
                async with session.begin_nested():
                    session.add(world.Doc(key="b", body=Blob(b"2")))
                    await session.flush()
                    raise OopsError

        assert list((await world.check()).values()) == [b"1"]

    async def test_a_failed_upload_leaves_nothing(self, world: World) -> None:
        """Whatever was staged with it is condemned when the transaction ends."""

        def refuse(step: Step) -> None:
            if step.operation == "put" and "col=cover" in step.uri:
                raise OopsError

        world.store.hooks.append(refuse)
        with pytest.raises(BlobUploadError):
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="a", body=Blob(b"1"), cover=Blob(b"2")))

        assert "staged" not in (await world.states()).values()
        assert await world.check() == {}

    async def test_uploaded_ahead_and_never_written(self, world: World) -> None:
        """The transaction that comes owns the objects, and they go with it."""
        async with world.sessions() as session:
            await upload_blobs(session, world.Doc(key="a", body=Blob(b"1")))
            assert list((await world.states()).values()) == ["staged"]
            await session.rollback()

        assert await world.check() == {}

    async def test_bulk_statements(self, world: World) -> None:
        """An INSERT of many rows, an UPDATE and a DELETE without the unit of work."""
        async with world.sessions.begin() as session:
            rows = [{"key": str(n), "body": Blob(b"%d" % n)} for n in range(5)]
            await session.execute(sa.insert(world.Doc), rows)
        async with world.sessions.begin() as session:
            await session.execute(
                sa.update(world.Doc).where(world.Doc.key == "1").values(body=Blob(b"new"))
            )
            await session.execute(sa.delete(world.Doc).where(world.Doc.key == "2"))

        assert sorted((await world.check()).values()) == [b"0", b"3", b"4", b"new"]

    async def test_writes_past_the_session_are_seen(self, world: World) -> None:
        """Raw SQL and cascades retire what they let go."""
        async with world.sessions.begin() as session:
            session.add_all([world.Doc(key=key, body=Blob(key.encode())) for key in "abc"])
        async with world.engine.begin() as connection:
            await connection.execute(sa.text("DELETE FROM world_docs WHERE key = 'a'"))
            await connection.execute(sa.text("UPDATE world_docs SET body = NULL WHERE key = 'b'"))

        assert list((await world.check()).values()) == [b"c"]

    async def test_a_table_of_another_metadata_is_refused(self, world: World) -> None:
        """No trigger would adopt its objects; nothing is sent."""
        other = World.__new__(World)
        store = MemoryStore(bucket="other", prefix="app")
        World.__init__(other, world.database, store)
        factory = blob_sessionmaker(world.engine, world.store, journal=world.journal)
        with pytest.raises(InvalidInputError, match="none of the journal's tables"):
            async with factory.begin() as session:
                session.add(other.Doc(key="a", body=Blob(b"1")))

        assert await world.check() == {}

    async def test_a_store_that_the_journal_does_not_know_is_refused(self, world: World) -> None:
        """Its URIs would be foreign; nothing is sent."""
        async with MemoryStore(bucket="elsewhere", prefix="app") as store:
            factory = blob_sessionmaker(world.engine, store, journal=world.journal)
            with pytest.raises(InvalidInputError, match="none of the journal's stores"):
                async with factory.begin() as session:
                    session.add(world.Doc(key="a", body=Blob(b"1")))

            assert store.objects == {}
        assert await world.check() == {}

    async def test_factories_that_are_there_already(self, world: World) -> None:
        """``track_blobs`` takes a journal, too, and its stores with it."""
        factory = track_blobs(world.database.session, journal=world.journal)
        async with factory() as session:
            await upload_blobs(session, world.Doc(key="a", body=Blob(b"1")))

            assert list((await world.states()).values()) == ["staged"]
        assert await world.check() == {}

    @pytest.mark.parametrize("wrong", ["journal", 1])
    def test_no_journal(self, wrong: object) -> None:
        with pytest.raises(InvalidInputError, match="journal is a Journal"):
            blob_sessionmaker(None, MemoryStore(), journal=wrong)  # type: ignore[call-overload]


def call(data: bytes = b"html", old: str | None = None) -> list[PutS3ApiCall]:
    return [PutS3ApiCall("html", data, old)]


class TestExplicit:
    async def test_create_update_and_delete(self, world: World) -> None:
        """A block with a journal leaves what rows let go to the worker."""
        async with AsyncSession(world.engine, expire_on_commit=False) as session:
            async with blob_transaction(session, store=world.store, journal=world.journal) as tx:
                put = await tx.put_s3(pk="u", api_calls=call())
                task = world.Task(url="u", **put.to_values())
                session.add(task)
            async with blob_transaction(session, store=world.store, journal=world.journal) as tx:
                put = await tx.put_s3(pk="u", api_calls=call(b"new", task.html))
                old, task.html = task.html, put.to_values()["html"]
            assert await world.states() == {old: "retired"}
            assert tx.report.kept.keys() == {old}
            async with blob_transaction(session, store=world.store, journal=world.journal) as tx:
                tx.delete_s3([task.html])
                await session.delete(task)

        assert await world.check() == {}

    async def test_a_block_that_fails(self, world: World) -> None:
        """Its uploads are condemned and deleted."""
        async with AsyncSession(world.engine) as session:
            with pytest.raises(OopsError):
                async with blob_transaction(
                    session, store=world.store, journal=world.journal
                ) as tx:
                    put = await tx.put_s3(pk="u", api_calls=call())
                    session.add(world.Task(url="u", **put.to_values()))
                    await session.flush()
                    raise OopsError

        assert world.store.objects == {}
        assert await world.states() == {}

    async def test_by_hand_and_committed(self, world: World) -> None:
        """``put_s3(journal=)`` stages on the journal's own connection."""
        put = await put_s3(call(), pk="u", store=world.store, journal=world.journal)
        assert list((await world.states()).values()) == ["staged"]
        async with AsyncSession(world.engine) as session:
            session.add(world.Task(url="u", **put.to_values()))
            await session.commit()
        report = await put.clean_up_old_s3_object_when_update_row_succeeded()

        assert report.deleted == ()
        assert list((await world.check()).values()) == [b"html"]

    async def test_by_hand_and_failed(self, world: World) -> None:
        put = await put_s3(call(), pk="u", store=world.store, journal=world.journal)
        report = await put.clean_up_created_s3_object_when_create_or_update_row_failed()

        assert len(report.deleted) == 1
        assert world.store.objects == {}
        assert await world.states() == {}

    async def test_by_hand_and_forgotten(self, world: World) -> None:
        """The worker removes it when its lease is over, without a warning of the library."""
        await put_s3(call(), pk="u", store=world.store, journal=world.journal)
        await world.expire_leases()

        assert await world.check() == {}

    async def test_an_upload_by_hand_that_fails(self, world: World) -> None:
        def refuse(step: Step) -> None:
            if step.operation == "put":
                raise OopsError

        world.store.hooks.append(refuse)
        with pytest.raises(BlobUploadError):
            await put_s3(call(), pk="u", store=world.store, journal=world.journal)

        assert "staged" not in (await world.states()).values()
        assert await world.check() == {}

    async def test_results_by_enlist(self, world: World) -> None:
        """Whoever commits the session settles them through the results' journal."""
        put = await put_s3(call(), pk="u", store=world.store, journal=world.journal)
        async with AsyncSession(world.engine) as session:
            await enlist(session, put)
            await session.rollback()

        assert await world.check() == {}

    async def test_a_result_that_was_not_staged_is_refused(self, world: World) -> None:
        """No row could adopt its objects; it stays the caller's."""
        put = await put_s3(call(), pk="u", store=world.store)
        async with AsyncSession(world.engine) as session:
            with pytest.raises(InvalidInputError, match="without the journal"):
                async with blob_transaction(session, put, journal=world.journal):
                    pass
        await put.clean_up_created_s3_object_when_create_or_update_row_failed()

        assert await world.check() == {}

    async def test_the_row_of_an_unstaged_result_is_refused(self, world: World) -> None:
        """By the trigger, for a program that does not know the journal."""
        put = await put_s3(call(), pk="u", store=world.store)
        async with AsyncSession(world.engine) as session:
            session.add(world.Task(url="u", **put.to_values()))
            with pytest.raises(SQLAlchemyError, match="never staged"):
                await session.commit()
        await put.clean_up_created_s3_object_when_create_or_update_row_failed()

    async def test_a_column_that_the_journal_does_not_know(self, world: World) -> None:
        """Refused before the first byte, for no row would adopt its object."""
        unknown = [PutS3ApiCall("unknown", b"1", None)]
        with pytest.raises(InvalidColumnError, match="uri_columns"):
            await put_s3(unknown, pk="u", store=world.store, journal=world.journal)

        assert world.store.objects == {}

    async def test_a_row_that_no_trigger_has_seen_is_not_committed(self, world: World) -> None:
        """The worker would delete its object when the lease is over."""
        async with world.engine.begin() as connection:
            await connection.run_sync(world.journal.drop_triggers)
        async with AsyncSession(world.engine) as session:
            with pytest.raises(BlobNotWrittenError, match="no trigger of the journal"):
                async with blob_transaction(
                    session, store=world.store, journal=world.journal
                ) as tx:
                    put = await tx.put_s3(pk="u", api_calls=call())
                    session.add(world.Task(url="u", **put.to_values()))

        assert await world.check() == {}

    async def test_a_block_that_joins(self, world: World) -> None:
        """It takes a journal, too; whoever has begun the transaction settles."""
        async with AsyncSession(world.engine) as session:
            async with session.begin():
                async with blob_transaction(
                    session, store=world.store, journal=world.journal
                ) as tx:
                    put = await tx.put_s3(pk="u", api_calls=call())
                    session.add(world.Task(url="u", **put.to_values()))

        assert list((await world.check()).values()) == [b"html"]

    async def test_by_hand_in_the_middle_of_the_transaction(self, world: World) -> None:
        """The clean-up waits for nobody: the row may be committed still."""
        put = await put_s3(call(), pk="u", store=world.store, journal=world.journal)
        async with AsyncSession(world.engine) as session:
            session.add(world.Task(url="u", **put.to_values()))
            if not world.database.is_sqlite:
                await session.flush()
            report = await put.clean_up_created_s3_object_when_create_or_update_row_failed()
            await session.rollback()

        assert len(report.kept) == (not world.database.is_sqlite)
        assert await world.check() == {}

    async def test_by_hand_and_not_committed_after_all(self, world: World) -> None:
        """The clean-up tells that no row has adopted the object."""
        put = await put_s3(call(), pk="u", store=world.store, journal=world.journal)
        report = await put.clean_up_old_s3_object_when_update_row_succeeded()

        assert "no committed row has adopted it" in next(iter(report.failed.values()))
        assert await world.check() == {}

    async def test_a_key_of_sqlalchemy_mate(self, world: World) -> None:
        """Foreign to the triggers, and superseded by its own primary key and column: deleted."""
        old = f"s3://{world.store.bucket}/{world.store.prefix}/dQ==/col=html/md5={'0' * 32}"
        world.store.objects[old] = StoredObject(b"old", {}, {})
        async with AsyncSession(world.engine) as session:
            session.add(world.Task(url="u", html=old))
            await session.commit()
            async with blob_transaction(session, store=world.store, journal=world.journal) as tx:
                task = await session.get_one(world.Task, "u")
                put = await tx.put_s3(pk="u", api_calls=call(b"new", old))
                task.html = put.to_values()["html"]

        assert tx.report.deleted == (old,)
        assert list((await world.check()).values()) == [b"new"]

    async def test_put_s3_needs_to_know_the_database(self, world: World) -> None:
        """A journal without an engine cannot stage outside of a session."""
        journal = Journal(sa.MetaData(), world.store)
        with pytest.raises(InvalidInputError, match="which database"):
            await put_s3(call(), pk="u", store=world.store, journal=journal)


class TestConnections:
    async def test_staging_never_waits_for_the_applications_pool(self, postgres: Database) -> None:
        """50 requests hold all 5 connections and stage; each of them commits."""
        engine = create_async_engine(postgres.url, pool_size=5, max_overflow=0, pool_timeout=60)
        async with open_world(postgres) as world:
            factory = blob_sessionmaker(engine, journal=world.journal)

            async def request(number: int) -> None:
                async with factory.begin() as session:
                    await session.execute(sa.select(world.Doc.key))  # holds a connection
                    session.add(world.Doc(key=str(number), body=Blob(b"%d" % number)))

            await asyncio.gather(*map(request, range(50)))
            await engine.dispose()

            assert len(await world.check()) == 50

    async def test_stagings_share_a_statement(self, world: World) -> None:
        """While one is written the next ones gather."""
        writer = world.journal.writer(world.engine.sync_engine)
        written: list[int] = []
        write = writer._write

        async def counted(uris: list[str]) -> None:
            written.append(len(uris))
            await write(uris)

        writer._side.group._write = counted  # type: ignore[assignment]
        uris = [new_uri(world) for _ in range(20)]
        await asyncio.gather(*(writer.stage([uri]) for uri in uris))

        assert written in ([1, 19], [20])
        assert set(await world.states()) == set(uris)

    async def test_one_bad_request_does_not_fail_its_batch(self, world: World) -> None:
        """What the database refuses is told to whoever wanted it."""
        writer = world.journal.writer(world.engine.sync_engine)
        good, bad = [new_uri(world) for _ in range(5)], None
        results = await asyncio.gather(
            *(writer.stage([uri]) for uri in good[:3]),
            writer.stage([bad]),  # type: ignore[list-item]
            *(writer.stage([uri]) for uri in good[3:]),
            return_exceptions=True,
        )

        assert [isinstance(each, Exception) for each in results] == [False] * 3 + [True] + [
            False
        ] * 2
        assert set(await world.states()) == set(good)

    async def test_one_cancelled_request_does_not_fail_its_batch(self, world: World) -> None:
        writer = world.journal.writer(world.engine.sync_engine)
        uris = [new_uri(world) for _ in range(5)]
        tasks = [asyncio.create_task(writer.stage([uri])) for uri in uris]
        await asyncio.sleep(0)
        tasks[2].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)

        assert [result is None for result in results] == [True, True, False, True, True]
        assert set(uris) - {uris[2]} <= set(await world.states())

    async def test_a_connection_that_was_cut_is_no_failure(self, postgres_world: World) -> None:
        """A batch in doubt is sent again."""
        world = postgres_world
        writer = world.journal.writer(world.engine.sync_engine)
        await writer.stage([new_uri(world)])
        await terminate_backends(world.engine)
        await writer.stage([new_uri(world)])

        assert len(await world.states()) == 2


class TestWhichDatabase:
    async def test_sessions_with_several_binds(self, world: World) -> None:
        """The journal's own engine tells where it is, if the session cannot."""
        factory = blob_sessionmaker(journal=world.journal, binds={world.Base: world.engine})
        async with factory.begin() as session:
            session.add(world.Doc(key="a", body=Blob(b"1")))

        assert list((await world.check()).values()) == [b"1"]

    async def test_sessions_that_read_from_a_replica(self, postgres_world: World) -> None:
        """Staging and its checks go where the session writes."""
        world = postgres_world
        follower = world.database.engine_with(
            connect_args={"server_settings": {"default_transaction_read_only": "on"}}
        )

        class Routing(Session):
            def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> Any:
                writes = self._flushing or isinstance(clause, (sa.Update, sa.Delete))
                return (world.engine if writes else follower).sync_engine

        factory = blob_sessionmaker(journal=world.journal, sync_session_class=Routing)
        async with factory() as session:
            await upload_blobs(session, doc := world.Doc(key="a", body=Blob(b"1")))
            session.add(doc)
            await session.commit()
        await follower.dispose()

        assert list((await world.check()).values()) == [b"1"]

    async def test_another_database_in_the_transaction(
        self, postgres_world: World, sqlite: Database
    ) -> None:
        """Its isolation level is of no concern."""
        world = postgres_world
        log = sa.Table("log", sa.MetaData(), sa.Column("text", sa.Text, primary_key=True))
        async with sqlite.engine.begin() as connection:
            await connection.run_sync(log.metadata.create_all)
        factory = blob_sessionmaker(world.engine, journal=world.journal, binds={log: sqlite.engine})
        async with factory.begin() as session:
            await session.execute(sa.insert(log).values(text="x"))
            session.add(world.Doc(key="a", body=Blob(b"1")))

        assert list((await world.check()).values()) == [b"1"]

    async def test_results_by_another_engine(self, world: World) -> None:
        """Two engines on one database share its journal."""
        other = world.database.engine_with()
        put = await put_s3(call(), pk="u", store=world.store, journal=world.journal)
        async with blob_sessionmaker(other, journal=world.journal).begin() as session:
            await enlist(session, put)
            session.add(world.Task(url="u", **put.to_values()))
        await other.dispose()

        assert list((await world.check()).values()) == [b"html"]

    async def test_results_of_two_journals_are_refused(self, world: World) -> None:
        async with open_world(world.database, name="other") as other:
            puts = [
                await put_s3(call(), pk="u", store=each.store, journal=each.journal)
                for each in (world, other)
            ]
            async with world.sessions() as session:
                with pytest.raises(InvalidInputError, match="two journals"):
                    await enlist(session, *puts)
            for put in puts:
                await put.clean_up_created_s3_object_when_create_or_update_row_failed()

    async def test_a_translated_schema_is_refused(self, world: World) -> None:
        """Rows would be written elsewhere than where the journal is; nothing is sent."""
        engine = world.engine.execution_options(schema_translate_map={None: "elsewhere"})
        with pytest.raises(InvalidInputError, match="schema_translate_map"):
            async with blob_sessionmaker(engine, journal=world.journal).begin() as session:
                session.add(world.Doc(key="a", body=Blob(b"1")))

        assert world.store.objects == {}

    async def test_no_table_of_the_journal(self, world: World) -> None:
        """The error tells what is missing and what to do; nothing is sent."""
        async with world.engine.begin() as connection:
            await connection.run_sync(world.journal.drop_triggers)
            await connection.run_sync(world.journal.table.drop)
        with pytest.raises(JournalError, match="aioblobcol ddl"):
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="a", body=Blob(b"1")))
        if world.database.is_sqlite:
            with pytest.raises(JournalError, match="no such table"):
                async with world.sessions.begin() as session:
                    await session.execute(sa.select(world.Doc.key))
                    session.add(world.Doc(key="a", body=Blob(b"1")))

        assert not any(verb == "put" for verb, _ in world.store.calls)

    async def test_no_triggers(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        """The first upload of a process warns, and no row is committed that nobody has seen."""
        async with world.engine.begin() as connection:
            await connection.run_sync(world.journal.drop_triggers)
        with pytest.raises(BlobNotWrittenError, match="no trigger of the journal"):
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="a", body=Blob(b"1")))

        assert "world_docs" in caplog.text
        assert await world.check() == {}


class TestEngines:
    async def test_its_connections_end_with_the_engines(self, world: World) -> None:
        """Also if sessions use it with options of their own."""
        engine = world.database.engine_with()
        factory = blob_sessionmaker(
            engine.execution_options(isolation_level="SERIALIZABLE"), journal=world.journal
        )
        async with factory.begin() as session:
            session.add(world.Doc(key="a", body=Blob(b"1")))
        writer = world.journal.writer(engine.sync_engine)
        own: Any = writer._side.staging.sync_engine.pool
        assert own.checkedin() == 1
        await engine.dispose()

        assert not writer._sides
        assert own.checkedin() == 0

    def test_several_event_loops(self, tmp_path: Path) -> None:
        """A loop that is closed is forgotten."""
        url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
        engine = create_async_engine(url, poolclass=NullPool)
        metadata = sa.MetaData()
        journal = Journal(metadata, MemoryStore(bucket="b", prefix="p"), engine=engine)

        async def run() -> None:
            async with engine.begin() as connection:
                await connection.run_sync(metadata.create_all)
            await journal.writer().stage([f"s3://b/p/x/id={uuid.uuid4().hex}"])

        for _ in range(3):
            asyncio.run(run())

        assert len(journal.writer()._sides) <= 1

    async def test_a_small_pool_is_no_limit(self, world: World) -> None:
        """A settlement that waits keeps no upload out."""
        engine = world.database.engine_with(pool_size=1, max_overflow=0)
        writer = world.journal.writer(engine.sync_engine)
        async with writer._begin(), writer._begin():
            if not world.database.is_sqlite:  # whose one lock the first has
                await writer.stage([new_uri(world)])
        await engine.dispose()


class TestLongUploads:
    async def test_the_lease_is_renewed(self, database: Database) -> None:
        """For as long as the upload takes."""
        async with open_world(database, lease=timedelta(seconds=0.3)) as world:
            gate = world.store.hold("put", containing="col=body")
            creating = asyncio.create_task(self._create(world))
            await gate.reached.wait()
            first = await self._since(world)
            async with asyncio.timeout(20):
                while await self._since(world) == first:  # noqa: ASYNC110 - the database tells nobody
                    await asyncio.sleep(0.01)
            gate.open()
            await creating

            assert len(await world.check()) == 1

    async def test_a_lease_that_is_over(self, world: World) -> None:
        """The worker condemns the object in the middle of its upload: its row is refused."""
        gate = world.store.hold("put", containing="col=body")
        creating = asyncio.create_task(self._create(world))
        await gate.reached.wait()
        await world.expire_leases()
        await Worker(world.journal, world.engine).run_once()
        gate.open()
        with pytest.raises(SQLAlchemyError, match=r"being deleted|never staged"):
            await creating

        assert await world.check() == {}

    async def test_what_was_staged_inside_needs_no_renewal(self, sqlite: Database) -> None:
        """Nobody else sees it yet, and the session has the one lock for writing."""
        async with open_world(sqlite, lease=timedelta(milliseconds=1)) as world:
            writer = world.journal.writer(world.engine.sync_engine)
            renewed: list[object] = []
            writer.renewing = renewed.append  # type: ignore[method-assign,assignment]
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="a"))
                await session.flush()
                session.add(world.Doc(key="b", body=Blob(b"1")))

            assert renewed == []
            assert len(await world.check()) == 1

    @staticmethod
    async def _create(world: World) -> None:
        async with world.sessions.begin() as session:
            session.add(world.Doc(key="a", body=Blob(b"1")))

    @staticmethod
    async def _since(world: World) -> object:
        async with world.engine.connect() as connection:
            return await connection.scalar(sa.select(world.journal.table.c.since))


class TestIsolation:
    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    async def test_a_snapshot_that_is_too_old_is_refused(
        self, postgres_world: World, level: str
    ) -> None:
        """Before the first byte, with the way out in the message."""
        world = postgres_world
        engine = world.database.engine_with(isolation_level=level)
        factory = blob_sessionmaker(engine, journal=world.journal)
        with pytest.raises(UnsafeTransactionError, match="upload_blobs"):
            async with factory.begin() as session:
                await session.execute(sa.select(world.Doc.key))
                session.add(world.Doc(key="a", body=Blob(b"1")))
        await engine.dispose()

        assert not any(verb == "put" for verb, _ in world.store.calls)
        assert await world.check() == {}

    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    async def test_uploads_ahead_of_the_transaction_are_the_way_out(
        self, postgres_world: World, level: str
    ) -> None:
        """Its snapshot is taken later, and shows what was staged."""
        world = postgres_world
        engine = world.database.engine_with(isolation_level=level)
        factory = blob_sessionmaker(engine, journal=world.journal)
        async with factory() as session:
            doc = world.Doc(key="a", body=Blob(b"1"))
            await upload_blobs(session, doc)
            await session.execute(sa.select(world.Doc.key))
            session.add(doc)
            await session.commit()
        async with factory.begin() as session:  # not begun in the database before its flush
            session.add(world.Doc(key="b", body=Blob(b"2")))
        await engine.dispose()

        assert sorted((await world.check()).values()) == [b"1", b"2"]

    async def test_the_explicit_strength_is_refused_too(self, postgres_world: World) -> None:
        world = postgres_world
        engine = world.database.engine_with(isolation_level="REPEATABLE READ")
        async with AsyncSession(engine) as session:
            with pytest.raises(UnsafeTransactionError, match="as of its first statement"):
                async with blob_transaction(
                    session, store=world.store, journal=world.journal
                ) as tx:
                    await session.execute(sa.select(world.Task.url))
                    await tx.put_s3(pk="u", api_calls=call())
        await engine.dispose()

        assert world.store.objects == {}
        assert await world.check() == {}


class TestSqlite:
    async def test_in_a_transaction_the_session_stages_by_itself(self, sqlite: Database) -> None:
        """Another connection could not write, or would break the transaction's snapshot."""
        async with open_world(sqlite) as world:
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="a", body=Blob(b"1")))
                await session.flush()  # holds the write lock from now on
                session.add(world.Doc(key="b", body=Blob(b"2")))
                await session.flush()

            assert sorted((await world.check()).values()) == [b"1", b"2"]

    async def test_what_it_staged_and_undid_is_settled(self, sqlite: Database) -> None:
        """The entry went with the transaction; the object is condemned anew, and deleted."""
        async with open_world(sqlite) as world:
            with pytest.raises(OopsError):
                async with world.sessions.begin() as session:
                    await session.execute(sa.select(world.Doc.key))
                    session.add(world.Doc(key="a", body=Blob(b"1")))
                    await session.flush()
                    raise OopsError

            assert world.store.objects == {}
            assert await world.states() == {}

    async def test_uploaded_ahead_in_a_savepoint_that_is_undone(self, sqlite: Database) -> None:
        """It is staged again before a row names it."""
        async with open_world(sqlite) as world:
            async with world.sessions.begin() as session:
                await session.execute(sa.select(world.Doc.key))
                doc = world.Doc(key="a", body=Blob(b"1"))
                with pytest.raises(OopsError):
                    async with session.begin_nested():
                        await session.execute(sa.select(world.Doc.key))
                        await upload_blobs(session, doc)
                        raise OopsError
                session.add(doc)

            assert list((await world.check()).values()) == [b"1"]

    async def test_a_database_in_memory(self) -> None:
        """The session's connection is the only one that there is."""
        engine = create_async_engine("sqlite+aiosqlite:///:memory:")
        database = Database("sqlite", "sqlite+aiosqlite:///:memory:", engine)
        async with open_world(database) as world:
            async with world.sessions.begin() as session:
                session.add(world.Doc(key="a", body=Blob(b"1")))
            async with world.sessions.begin() as session:
                doc = await session.get_one(world.Doc, "a")
                doc.body = Blob(b"2")
            with pytest.raises(OopsError):
                async with world.sessions.begin() as session:
                    session.add(world.Doc(key="b", body=Blob(b"3")))
                    await session.flush()
                    raise OopsError
            with pytest.raises(InvalidInputError, match="in memory"):
                await put_s3(call(), pk="u", store=world.store, journal=world.journal)

            assert list((await world.check()).values()) == [b"2"]
        await engine.dispose()


def new_uri(world: World) -> str:
    return f"s3://{world.store.bucket}/{world.store.prefix}/x/id={uuid.uuid4().hex}"
