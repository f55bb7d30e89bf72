"""The answer to COMMIT is lost: the journal's entry tells what became of the transaction."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Literal

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from support.databases import Database
from support.journaled import World, open_world
from support.postgres_proxy import PostgresProxy, postgres_proxy

from aioblobcol import (
    Blob,
    CommitOutcomeUnknown,
    Outcome,
    PutS3ApiCall,
    blob_report,
    blob_sessionmaker,
    blob_transaction,
)

Strength = Literal["managed", "explicit"]
both = pytest.mark.parametrize("strength", ["managed", "explicit"])

SLOW_COMMIT = """
CREATE FUNCTION world_slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER world_slow AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION world_slow()"""


@dataclasses.dataclass
class Wire:
    """Sessions whose COMMIT goes over a wire that can be cut."""

    world: World
    proxy: PostgresProxy
    direct: Database

    async def create(self, strength: Strength, key: str, mode: str) -> CommitOutcomeUnknown:
        """Create a row, lose the answer to its COMMIT, and return what is told."""
        world = self.world
        with pytest.raises(CommitOutcomeUnknown) as caught:
            if strength == "managed":
                async with world.sessions.begin() as session:
                    session.add(world.Doc(key=key, body=Blob(b"1"), cover=Blob(b"2")))
                    await session.flush()
                    self.proxy.mode = mode  # type: ignore[assignment]
            else:
                async with AsyncSession(world.engine) as session:
                    async with blob_transaction(
                        session, store=world.store, journal=world.journal
                    ) as tx:
                        put = await tx.put_s3(pk=key, api_calls=[PutS3ApiCall("html", b"1", None)])
                        session.add(world.Task(url=key, **put.to_values()))
                        await session.flush()
                        self.proxy.mode = mode  # type: ignore[assignment]
        assert self.proxy.mode == "pass"
        return caught.value


@pytest_asyncio.fixture
async def wire(postgres: Database) -> AsyncIterator[Wire]:
    async with postgres_proxy(postgres.url) as proxy:
        proxy.is_once = True
        engine = create_async_engine(proxy.url, connect_args={"ssl": False})
        database = dataclasses.replace(postgres, url=proxy.url, engine=engine)
        async with open_world(database) as world:
            yield Wire(world, proxy, postgres)
        await engine.dispose()


@both
async def test_it_was_never_carried_out(wire: Wire, strength: Strength) -> None:
    """The entries are staged still: rolled back, and the objects are deleted."""
    unknown = await wire.create(strength, "a", "before_server")

    assert unknown.outcome is Outcome.ROLLED_BACK
    assert "rolled back" in str(unknown)
    assert wire.world.store.objects == {}
    assert await wire.world.check() == {}


@both
async def test_it_was_carried_out(wire: Wire, strength: Strength) -> None:
    """The entries are gone, and the rows name the objects: committed."""
    unknown = await wire.create(strength, "a", "after_server")

    assert unknown.outcome is Outcome.COMMITTED
    assert "was committed" in str(unknown)
    assert set(await wire.world.check()) == set(unknown.created) != set()


@both
async def test_it_is_still_being_carried_out(wire: Wire, strength: Strength) -> None:
    """A plain read would say "rolled back"; the entry's lock is waited for."""
    table = "world_docs" if strength == "managed" else "world_tasks"
    async with wire.direct.engine.begin() as connection:
        for statement in SLOW_COMMIT.format(table=table).split(";\nCREATE CONSTRAINT"):
            text = statement if "FUNCTION world_slow() R" in statement else None
            await connection.exec_driver_sql(text or f"CREATE CONSTRAINT{statement}")
    try:
        async with wire.direct.engine.connect() as holder:
            await holder.exec_driver_sql("SELECT pg_advisory_lock(4711)")
            creating = asyncio.create_task(wire.create(strength, "a", "in_server"))
            await wire.proxy.commit_arrived.wait()
            await _until_two_wait(holder)
            assert not creating.done()
            await holder.exec_driver_sql("SELECT pg_advisory_unlock(4711)")
            unknown = await creating

        assert unknown.outcome is Outcome.COMMITTED
        assert set(await wire.world.check()) == set(unknown.created) != set()
    finally:
        wire.proxy.release.set()
        async with wire.direct.engine.begin() as connection:
            await connection.exec_driver_sql("DROP FUNCTION world_slow() CASCADE")


async def test_committed_and_replaced_by_another_one(wire: Wire) -> None:
    """The entry is retired by then: it was committed, and the new object is nobody's to delete."""
    world = wire.world
    factory = blob_sessionmaker(wire.direct.engine, journal=world.journal)
    writer = world.journal.writer(world.engine.sync_engine)
    resolve = writer.resolve

    async def replaced_first(created: object, **more: object) -> object:
        async with factory.begin() as session:
            doc = await session.get_one(world.Doc, "a")
            doc.body = Blob(b"another one's")
        return await resolve(created, **more)  # type: ignore[arg-type]

    writer.resolve = replaced_first  # type: ignore[assignment,method-assign]
    unknown = await wire.create("managed", "a", "after_server")

    assert unknown.outcome is Outcome.COMMITTED
    assert sorted((await world.check()).values()) == [b"2", b"another one's"]


async def test_the_rows_are_asked_too(wire: Wire) -> None:
    """A row that was written past the triggers keeps its object, although its entry is there."""
    world = wire.world
    async with wire.direct.engine.begin() as connection:
        await connection.exec_driver_sql("ALTER TABLE world_docs DISABLE TRIGGER USER")
    writer = world.journal.writer(world.engine.sync_engine)
    writer.still_staged = lambda *_: []  # type: ignore[method-assign]  # it would notice
    unknown = await wire.create("managed", "a", "after_server")
    async with wire.direct.engine.begin() as connection:
        await connection.exec_driver_sql("ALTER TABLE world_docs ENABLE TRIGGER USER")

    assert unknown.outcome is Outcome.COMMITTED
    assert len(await world.check()) == 2


async def test_rows_that_the_journals_own_connection_does_not_see(wire: Wire) -> None:
    """Hidden by a policy, or in a schema of the session's own: adopted is adopted."""
    world = wire.world
    async with wire.direct.engine.begin() as connection:
        for statement in (
            "CREATE ROLE world_tenant LOGIN PASSWORD 'x'",
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO world_tenant",
            "ALTER TABLE world_docs ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY p ON world_docs USING (title = current_setting('app.tenant', true))",
        ):
            await connection.exec_driver_sql(statement)
    engine = create_async_engine(
        sa.make_url(wire.proxy.url).set(username="world_tenant", password="x"),
        connect_args={"ssl": False},
    )
    try:
        with pytest.raises(CommitOutcomeUnknown) as caught:
            async with blob_sessionmaker(engine, journal=world.journal).begin() as session:
                await session.execute(sa.text("SELECT set_config('app.tenant', 't', true)"))
                session.add(world.Doc(key="a", title="t", body=Blob(b"1")))
                await session.flush()
                wire.proxy.mode = "after_server"

        assert caught.value.outcome is Outcome.COMMITTED
        assert list((await world.check()).values()) == [b"1"]
    finally:
        await engine.dispose()
        async with wire.direct.engine.begin() as connection:
            await connection.exec_driver_sql("ALTER TABLE world_docs DISABLE ROW LEVEL SECURITY")
            await connection.exec_driver_sql("DROP OWNED BY world_tenant CASCADE")
            await connection.exec_driver_sql("DROP ROLE world_tenant")


async def test_an_upload_that_was_never_written_testifies_nothing(wire: Wire) -> None:
    """Its entry is staged, and yet the transaction was committed."""
    world = wire.world
    with pytest.raises(CommitOutcomeUnknown) as caught:
        async with AsyncSession(world.engine) as session:
            async with blob_transaction(
                session, store=world.store, journal=world.journal, allow_unwritten=True
            ) as tx:
                call = [PutS3ApiCall("html", b"1", None)]
                put = await tx.put_s3(pk="a", api_calls=call)
                await tx.put_s3(pk="b", api_calls=call)
                session.add(world.Task(url="a", **put.to_values()))
                await session.flush()
                wire.proxy.mode = "after_server"

    assert caught.value.outcome is Outcome.COMMITTED
    assert list((await world.check()).values()) == [b"1"]


async def test_an_update_whose_answer_is_lost(wire: Wire) -> None:
    """The old object is the trigger's affair: retired if, and only if, it was committed."""
    world = wire.world
    async with world.sessions.begin() as session:
        session.add_all([world.Doc(key=key, body=Blob(b"old")) for key in "ab"])
    for key, mode, outcome in (
        ("a", "after_server", Outcome.COMMITTED),
        ("b", "before_server", Outcome.ROLLED_BACK),
    ):
        with pytest.raises(CommitOutcomeUnknown) as caught:
            async with world.sessions.begin() as session:
                doc = await session.get_one(world.Doc, key)
                doc.body = Blob(b"new")
                await session.flush()
                wire.proxy.mode = mode  # type: ignore[assignment]
        assert caught.value.outcome is outcome
        assert len(blob_report(session).deleted) == (outcome is Outcome.ROLLED_BACK)

    assert sorted((await world.check()).values()) == [b"new", b"old"]


async def test_a_database_that_does_not_answer(wire: Wire) -> None:
    """The outcome stays unknown, nothing is deleted, and the worker finds out later."""
    world = wire.world
    writer = world.journal.writer(world.engine.sync_engine)
    writer._own.begin = _Refusing  # type: ignore[method-assign,assignment]
    unknown = await wire.create("managed", "a", "before_server")

    assert unknown.outcome is Outcome.UNKNOWN
    assert len(world.store.objects) == 2
    assert set((await world.states()).values()) == {"staged"}
    assert await world.check() == {}


class _Refusing:
    async def __aenter__(self) -> None:
        raise OSError("no route to host")

    async def __aexit__(self, *_: object) -> None: ...


async def _until_two_wait(connection: object) -> None:
    """Wait until a COMMIT waits for the advisory lock, and a settlement for the COMMIT."""
    waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    async with asyncio.timeout(20):
        # PostgreSQL tells nobody that somebody waits: it has to be asked
        while (await connection.execute(waiting)).scalar_one() < 2:  # type: ignore[attr-defined]  # noqa: ASYNC110
            await asyncio.sleep(0.01)
