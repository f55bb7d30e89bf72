"""What "committed" and "rolled back" are worth: each line of the table, on real databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import StaticPool
from support.databases import Database, open_sqlite
from support.models import COLUMNS, TASKS, Base, Task, contents
from support.postgres_proxy import PostgresProxy, postgres_proxy

from aioblobcol import (
    BlobNotWrittenError,
    CommitOutcomeUnknown,
    Outcome,
    PutS3ApiCall,
    PutS3Result,
    ResultSpentError,
    TransactionAbortedError,
    UnsafeTransactionError,
    blob_transaction,
    put_s3,
    use_explicit_begin,
)
from aioblobcol.testing import MemoryStore, assert_consistent


async def seed(database: Database, store: MemoryStore, html: bytes = b"old") -> str:
    """Put a row there; return its URI."""
    async with database.session() as session, blob_transaction(session, store=store) as tx:
        put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", html, None)])
        session.add(Task(url="u", **put.to_values()))
    return put.put_s3backed_column_results[0].new_s3_uri


def replace(put: PutS3Result) -> sa.Update:
    return sa.update(Task).where(Task.url == "u", put.guard(Task)).values(**put.to_values())


class TestFailedState:
    """PostgreSQL answers COMMIT of a failed transaction without an error, and rolls back."""

    async def test_a_swallowed_error_before_commit_is_found(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """A handler swallowed a statement's error: refused, rolled back, undone."""
        old = await seed(postgres, memory_store)
        async with postgres.session() as session:
            with pytest.raises(TransactionAbortedError, match="swallowed"):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
                    with suppress(IntegrityError):
                        await session.execute(sa.insert(TASKS).values(url="u"))

        assert tx.outcome is Outcome.ROLLED_BACK
        assert await contents(memory_store, postgres.engine) == (b"old", None)

    async def test_an_error_inside_a_savepoint_is_no_obstacle(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """What failed inside of a savepoint was undone with it, and the rest is committed."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                await session.execute(replace(put))
                with suppress(IntegrityError):
                    async with session.begin_nested():
                        await session.execute(sa.insert(TASKS).values(url="u"))

        assert tx.outcome is Outcome.COMMITTED
        assert await contents(memory_store, database.engine) == (b"new", None)

    async def test_on_sqlite_a_swallowed_error_leaves_the_transaction_alive(
        self, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """SQLite undoes the failed statement only; the rest is committed."""
        old = await seed(sqlite, memory_store)
        async with sqlite.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                await session.execute(replace(put))
                with suppress(IntegrityError):
                    await session.execute(sa.insert(TASKS).values(url="u"))

        assert await contents(memory_store, sqlite.engine) == (b"new", None)

    async def test_sqlite_rolled_back_by_itself(
        self, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """A trigger that rolls the transaction back is found although its error was swallowed."""
        old = await seed(sqlite, memory_store)
        async with sqlite.engine.begin() as connection:
            await connection.exec_driver_sql(
                "CREATE TRIGGER stop BEFORE DELETE ON tasks "
                "BEGIN SELECT RAISE(ROLLBACK, 'not today'); END"
            )
        async with sqlite.session() as session:
            with pytest.raises(TransactionAbortedError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
                    with suppress(DBAPIError):
                        await session.execute(sa.delete(TASKS))

        assert await contents(memory_store, sqlite.engine) == (b"old", None)

    async def test_what_is_written_after_sqlite_rolled_back_is_in_doubt(
        self, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """A statement after that runs outside of any transaction: nothing is deleted."""
        old = await seed(sqlite, memory_store)
        async with sqlite.engine.begin() as connection:
            await connection.exec_driver_sql(
                "CREATE TRIGGER stop BEFORE DELETE ON tasks "
                "BEGIN SELECT RAISE(ROLLBACK, 'not today'); END"
            )
        async with sqlite.session() as session:
            with pytest.raises(CommitOutcomeUnknown):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    with suppress(DBAPIError):
                        await session.execute(sa.delete(TASKS))
                    await session.execute(replace(put))

        assert await contents(memory_store, sqlite.engine, orphans=(old,)) == (b"new", None)


class TestAutocommit:
    """Every statement is durable at once, so nothing could be undone."""

    @pytest.mark.parametrize("way", ["engine", "execution_options"])
    async def test_refused_before_the_first_byte(
        self, database: Database, memory_store: MemoryStore, way: str
    ) -> None:
        """An AUTOCOMMIT engine is refused before anything is uploaded."""
        if way == "engine":
            engine = database.engine_with(isolation_level="AUTOCOMMIT")
        else:
            engine = database.engine.execution_options(isolation_level="AUTOCOMMIT")
        async with AsyncSession(engine) as session:
            with pytest.raises(UnsafeTransactionError, match="AUTOCOMMIT"):
                async with blob_transaction(session, store=memory_store) as tx:
                    await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
        await engine.dispose()

        assert memory_store.calls == []

    async def test_the_sessions_own_connection(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A session that was switched to AUTOCOMMIT by itself is refused when it is handed over."""
        async with database.session() as session:
            await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            with pytest.raises(UnsafeTransactionError, match="AUTOCOMMIT"):
                async with blob_transaction(session, store=memory_store):
                    raise AssertionError("not reached")

        assert memory_store.calls == []

    async def test_switched_inside_of_the_block(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A session that is switched later is refused before its first statement, and undone."""
        async with database.session() as session:
            with pytest.raises(UnsafeTransactionError, match="AUTOCOMMIT"):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
                    await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
                    session.add(Task(url="u", **put.to_values()))

        assert tx.outcome is Outcome.ROLLED_BACK
        assert await contents(memory_store, database.engine) is None

    async def test_a_refusal_that_is_swallowed(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Who goes on after the refusal gets an unknown outcome, and nothing is deleted."""
        async with database.session() as session:
            with pytest.raises(CommitOutcomeUnknown):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
                    with suppress(UnsafeTransactionError):
                        await session.connection(
                            execution_options={"isolation_level": "AUTOCOMMIT"}
                        )
                    await session.execute(sa.insert(Task).values(url="u", **put.to_values()))
                    raise RuntimeError("handler")

        assert await contents(memory_store, database.engine) == (b"x", None)

    async def test_an_engine_is_asked_once(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """The engine is probed for the first block only, and gives the connection back."""
        checkouts = []
        sa.event.listen(database.engine.sync_engine, "checkout", lambda *_: checkouts.append(1))
        counts = []
        for number in range(3):
            checkouts.clear()
            async with database.session() as session:
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk=number, api_calls=[PutS3ApiCall("html", b"x", None)])
                    session.add(Task(url=str(number), **put.to_values()))
            counts.append(len(checkouts))

        assert counts == [2, 1, 1]

    async def test_no_connection_is_taken_while_bytes_travel(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Entering the block and uploading hold no connection of the pool."""
        await seed(database, memory_store)
        pool = database.engine.sync_engine.pool
        held: list[object] = []
        memory_store.hooks.append(lambda _step: held.append(pool.checkedout()))  # type: ignore[attr-defined]  # QueuePool
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="v", api_calls=[PutS3ApiCall("html", b"x", None)])
                session.add(Task(url="v", **put.to_values()))

        assert held == [0, 0]

    async def test_a_static_pool_is_not_probed(self, memory_store: MemoryStore) -> None:
        """An in-memory database has one connection for everybody, and works."""
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
        use_explicit_begin(engine)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
                session.add(Task(url="u", **put.to_values()))

        assert await contents(memory_store, engine) == (b"x", None)
        await engine.dispose()


class TestLegacySqlite:
    """The driver's own BEGIN comes with the first change, and not before SAVEPOINT."""

    @pytest_asyncio.fixture
    async def legacy(self, tmp_path: Path) -> AsyncIterator[Database]:
        async with open_sqlite(tmp_path / "legacy.db", explicit_begin=False) as database:
            yield database

    async def test_works_without_savepoints(
        self, legacy: Database, memory_store: MemoryStore
    ) -> None:
        """A plain engine commits and rolls back as it should."""
        old = await seed(legacy, memory_store)
        async with legacy.session() as session:
            with pytest.raises(RuntimeError, match="handler"):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
                    raise RuntimeError("handler")

        assert await contents(memory_store, legacy.engine) == (b"old", None)

    @pytest.mark.parametrize("wrote_before", [False, True])
    async def test_a_savepoint_is_refused_when_it_begins(
        self, legacy: Database, memory_store: MemoryStore, wrote_before: bool
    ) -> None:
        """A savepoint could become the transaction itself; the error tells the way out."""
        old = await seed(legacy, memory_store)
        async with legacy.session() as session:
            with pytest.raises(UnsafeTransactionError, match="use_explicit_begin"):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    if wrote_before:
                        await session.execute(replace(put))
                    async with session.begin_nested():
                        await session.execute(sa.select(1))

        assert await contents(memory_store, legacy.engine) == (b"old", None)

    async def test_use_explicit_begin_is_the_way_out(
        self, legacy: Database, memory_store: MemoryStore
    ) -> None:
        """After use_explicit_begin(), also called twice, savepoints hold."""
        engine = create_async_engine(legacy.url)
        use_explicit_begin(engine)
        use_explicit_begin(engine)
        async with AsyncSession(engine, expire_on_commit=False) as session:
            with pytest.raises(RuntimeError, match="handler"):
                async with blob_transaction(session, store=memory_store) as tx:
                    async with session.begin_nested():
                        put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
                        session.add(Task(url="u", **put.to_values()))
                    raise RuntimeError("handler")
        await engine.dispose()

        assert await contents(memory_store, legacy.engine) is None


class TestBehindTheBack:
    """COMMIT as a plain statement: nobody can judge what follows."""

    async def test_a_text_commit_makes_the_outcome_unknown(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """After COMMIT as text a rollback proves nothing, so nothing is deleted."""
        old = await seed(postgres, memory_store)
        async with postgres.session() as session:
            with pytest.raises(CommitOutcomeUnknown) as caught:
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
                    await session.execute(sa.text("COMMIT"))
                    raise RuntimeError("handler")

        assert caught.value.superseded == (old,)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert await contents(memory_store, postgres.engine, orphans=(old,)) == (b"new", None)


class TestOwnership:
    """The block commits by itself, or it joins whoever has begun the transaction."""

    async def test_inside_a_begin_block(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Inside of session.begin() the block joins: the owner's commit settles it."""
        old = await seed(database, memory_store)
        async with database.session() as session, session.begin():
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                await session.execute(replace(put))
            assert tx.outcome is None
            assert old in memory_store.objects

        assert tx.outcome is Outcome.COMMITTED
        assert await contents(memory_store, database.engine) == (b"new", None)

    async def test_a_joined_block_whose_owner_rolls_back(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """When the owner rolls back, what a joined block has uploaded goes."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            with pytest.raises(RuntimeError, match="owner"):
                async with session.begin():
                    async with blob_transaction(session, store=memory_store) as tx:
                        put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"n", old)])
                        await session.execute(replace(put))
                    raise RuntimeError("owner")

        assert tx.outcome is Outcome.ROLLED_BACK
        assert await contents(memory_store, database.engine) == (b"old", None)
        with pytest.raises(ResultSpentError):
            put.to_values()

    async def test_a_joined_block_that_wrote_nothing(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """The owner's COMMIT is refused if a joined block's upload went into no row."""
        async with database.session() as session:
            with pytest.raises(BlobNotWrittenError):
                async with session.begin():
                    async with blob_transaction(session, store=memory_store) as tx:
                        await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"n", None)])

        assert await contents(memory_store, database.engine) is None

    async def test_a_joined_block_that_fails(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """What a failed joined block has not written goes, and the owner may commit the rest."""
        async with database.session() as session, session.begin():
            session.add(Task(url="rest"))
            with pytest.raises(RuntimeError, match="handler"):
                async with blob_transaction(session, store=memory_store) as tx:
                    await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"n", None)])
                    raise RuntimeError("handler")

        assert await contents(memory_store, database.engine, "rest") == (None, None)

    async def test_inside_a_savepoint(self, database: Database, memory_store: MemoryStore) -> None:
        """Inside of a savepoint it joins, and goes with the savepoint when that is rolled back."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            with pytest.raises(RuntimeError, match="savepoint"):
                async with session.begin_nested():
                    async with blob_transaction(session, store=memory_store) as tx:
                        put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"n", old)])
                        await session.execute(replace(put))
                    raise RuntimeError("savepoint")
            await session.commit()

        assert await contents(memory_store, database.engine) == (b"old", None)

    async def test_bound_to_a_connection_in_a_transaction(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A session that would join the transaction of its connection is refused."""
        async with database.engine.connect() as connection:
            await connection.begin()
            async with AsyncSession(connection) as session:
                with pytest.raises(UnsafeTransactionError, match="bound"):
                    async with blob_transaction(session, store=memory_store):
                        raise AssertionError("not reached")

    async def test_bound_to_a_free_connection(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A session on a connection without a transaction owns the one that it begins."""
        async with database.engine.connect() as connection:
            async with AsyncSession(connection) as session:
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
                    session.add(Task(url="u", **put.to_values()))

        assert await contents(memory_store, database.engine) == (b"x", None)

    async def test_two_blocks_at_once(self, database: Database, memory_store: MemoryStore) -> None:
        """A block inside of a block on the same session is refused."""
        async with database.session() as session, blob_transaction(session, store=memory_store):
            with pytest.raises(UnsafeTransactionError, match="another blob_transaction"):
                async with blob_transaction(session, store=memory_store):
                    raise AssertionError("not reached")

    async def test_a_refused_block_leaves_the_result_to_its_owner(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A result that was handed to a refused block can be handed to another one."""
        put = await put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)], store=memory_store)
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store):
                with pytest.raises(UnsafeTransactionError):
                    async with blob_transaction(session, put):
                        raise AssertionError("not reached")
            async with blob_transaction(session, put):
                session.add(Task(url="u", **put.to_values()))

        assert await contents(memory_store, database.engine) == (b"x", None)


class TestTransactionsInsideTheBlock:
    """What the block's own body commits and rolls back is judged as well."""

    async def test_a_commit_in_the_middle(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """What was committed in the middle stays, although the block fails afterwards."""
        old = await seed(database, memory_store)
        async with database.session() as session:
            with pytest.raises(RuntimeError, match="handler"):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
                    await session.commit()
                    more = await tx.put_s3(pk="v", api_calls=[PutS3ApiCall("html", b"v", None)])
                    session.add(Task(url="v", **more.to_values()))
                    raise RuntimeError("handler")

        assert await contents(memory_store, database.engine) == (b"new", None)

    async def test_a_rollback_in_the_middle(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """What was rolled back in the middle was not written, and may be written again."""
        async with database.session() as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
                session.add(Task(url="u", **put.to_values()))
                await session.flush()
                await session.rollback()
                session.add(Task(url="u", **put.to_values()))

        assert await contents(memory_store, database.engine) == (b"x", None)

    async def test_a_rollback_and_nothing_more(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A block whose work was rolled back by hand does not commit an upload without a row."""
        async with database.session() as session:
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
                    session.add(Task(url="u", **put.to_values()))
                    await session.flush()
                    await session.rollback()

        assert await contents(memory_store, database.engine) is None

    async def test_the_session_closed_in_the_middle(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """Closing the session without a commit is a rollback, although no event says so."""
        async with database.session() as session:
            with pytest.raises(BlobNotWrittenError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
                    session.add(Task(url="u", **put.to_values()))
                    await session.flush()
                    await session.close()

        assert await contents(memory_store, database.engine) is None

    async def test_two_phase(self, memory_store: MemoryStore, sqlite: Database) -> None:
        """A driver without two-phase commit fails before anything is prepared: undone."""
        async with AsyncSession(sqlite.engine, twophase=True) as session:
            with pytest.raises(NotImplementedError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
                    session.add(Task(url="u", **put.to_values()))

        assert await contents(memory_store, sqlite.engine) is None


class TestTwoPhase:
    """After PREPARE only the acknowledgement of the second phase is certain."""

    async def test_acknowledged(self, postgres: Database, memory_store: MemoryStore) -> None:
        """A second phase that was answered is a commit: the old object goes."""
        old = await seed(postgres, memory_store)
        async with AsyncSession(postgres.engine, twophase=True) as session:
            async with blob_transaction(session, store=memory_store) as tx:
                put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                await session.execute(replace(put))

        assert tx.outcome is Outcome.COMMITTED
        assert await contents(memory_store, postgres.engine) == (b"new", None)

    async def test_rolled_back_before(self, postgres: Database, memory_store: MemoryStore) -> None:
        """A handler that fails before PREPARE is undone like anywhere else."""
        old = await seed(postgres, memory_store)
        async with AsyncSession(postgres.engine, twophase=True) as session:
            with pytest.raises(RuntimeError, match="handler"):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
                    raise RuntimeError("handler")

        assert tx.outcome is Outcome.ROLLED_BACK
        assert await contents(memory_store, postgres.engine) == (b"old", None)

    async def test_the_second_phase_fails(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """Prepared, and no answer to the second phase: unknown, nothing is deleted."""
        old = await seed(postgres, memory_store)

        def fail(_connection: sa.Connection, _xid: object, _is_prepared: bool) -> None:
            raise RuntimeError("wire cut")

        sa.event.listen(postgres.engine.sync_engine, "commit_twophase", fail)
        async with AsyncSession(postgres.engine, twophase=True) as session:
            with pytest.raises(CommitOutcomeUnknown) as caught:
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
        sa.event.remove(postgres.engine.sync_engine, "commit_twophase", fail)

        engine = postgres.engine.execution_options(isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            left = await connection.scalars(sa.text("SELECT gid FROM pg_prepared_xacts"))
            for gid in left.all():  # as an operator does, who looks after two-phase commits
                await connection.exec_driver_sql(f"ROLLBACK PREPARED '{gid}'")

        assert caught.value.superseded == (old,)
        found = await contents(memory_store, postgres.engine, orphans=caught.value.created)
        assert found == (b"old", None)


class TestRefusedCommit:
    """The server answers COMMIT with an error, on an intact connection: rolled back."""

    async def _defer(self, database: Database) -> None:
        async with database.engine.begin() as connection:
            await connection.exec_driver_sql(
                "CREATE TABLE labels (url VARCHAR PRIMARY KEY REFERENCES tasks (url) "
                "DEFERRABLE INITIALLY DEFERRED)"
            )

    async def _drop(self, database: Database) -> None:
        async with database.engine.begin() as connection:
            await connection.exec_driver_sql("DROP TABLE labels")

    async def test_a_deferred_constraint(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A deferred foreign key fails at COMMIT: certainly rolled back, and undone."""
        old = await seed(database, memory_store)
        await self._defer(database)
        async with database.session() as session:
            with pytest.raises(IntegrityError):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
                    await session.execute(sa.text("INSERT INTO labels VALUES ('nobody')"))

        assert tx.outcome is Outcome.ROLLED_BACK
        # a pooled connection with a transaction left open would commit it now
        async with database.engine.begin() as connection:
            await connection.execute(sa.select(1))
        assert await contents(memory_store, database.engine) == (b"old", None)
        await self._drop(database)

    async def test_serialization_failure_and_the_retry_loop(
        self, postgres: Database, memory_store: MemoryStore
    ) -> None:
        """A COMMIT refused with 40001 is undone, and the usual retry loop uploads anew."""
        await seed(postgres, memory_store)
        engine = postgres.engine_with(isolation_level="SERIALIZABLE")
        attempts, refusals = 0, []
        async with AsyncSession(engine, expire_on_commit=False) as session:
            while True:
                attempts += 1
                task = await session.get_one(Task, "u", populate_existing=True)
                try:
                    async with blob_transaction(session, store=memory_store) as tx:
                        put = await tx.put_s3(
                            pk="u", api_calls=[PutS3ApiCall("html", b"mine", task.html)]
                        )
                        if attempts == 1:
                            async with AsyncSession(engine) as other:
                                await other.execute(
                                    sa.update(Task).where(Task.url == "u").values(title="theirs")
                                )
                                await other.commit()
                        await session.execute(replace(put))
                except DBAPIError as exc:
                    refusals.append(getattr(exc.orig, "sqlstate", None))
                    continue
                break
        await engine.dispose()

        assert refusals == ["40001"]
        assert await contents(memory_store, postgres.engine) == (b"mine", None)


class TestLostReply:
    """The wire is cut around COMMIT: the client sees the same, whatever the server did."""

    @pytest_asyncio.fixture
    async def proxy(self, postgres: Database) -> AsyncIterator[PostgresProxy]:
        async with postgres_proxy(postgres.url) as proxy:
            yield proxy

    @pytest_asyncio.fixture
    async def engine(self, proxy: PostgresProxy) -> AsyncIterator[AsyncEngine]:
        engine = create_async_engine(proxy.url, connect_args={"ssl": False})
        yield engine
        await engine.dispose()

    async def _update(
        self, engine: AsyncEngine, proxy: PostgresProxy, store: MemoryStore, old: str, mode: str
    ) -> CommitOutcomeUnknown:
        async with AsyncSession(engine) as session:
            with pytest.raises(CommitOutcomeUnknown) as caught:
                async with blob_transaction(session, store=store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
                    proxy.mode = mode  # type: ignore[assignment]  # parametrised
        proxy.mode = "pass"
        assert tx.outcome is Outcome.UNKNOWN
        return caught.value

    async def test_before_the_server_committed(
        self,
        postgres: Database,
        memory_store: MemoryStore,
        engine: AsyncEngine,
        proxy: PostgresProxy,
    ) -> None:
        """COMMIT never arrived: unknown, and both objects are still there."""
        old = await seed(postgres, memory_store)
        unknown = await self._update(engine, proxy, memory_store, old, "before_server")

        assert unknown.superseded == (old,)
        found = await contents(memory_store, postgres.engine, orphans=unknown.created)
        assert found == (b"old", None)

    async def test_after_the_server_committed(
        self,
        postgres: Database,
        memory_store: MemoryStore,
        engine: AsyncEngine,
        proxy: PostgresProxy,
    ) -> None:
        """COMMIT was carried out, its answer lost: unknown, and both objects are still there."""
        old = await seed(postgres, memory_store)
        unknown = await self._update(engine, proxy, memory_store, old, "after_server")

        found = await contents(memory_store, postgres.engine, orphans=unknown.superseded)
        assert found == (b"new", None)

    async def test_the_new_row_of_a_create(
        self,
        postgres: Database,
        memory_store: MemoryStore,
        engine: AsyncEngine,
        proxy: PostgresProxy,
    ) -> None:
        """A create whose answer is lost keeps its object, and the error names it."""
        async with AsyncSession(engine) as session:
            with pytest.raises(CommitOutcomeUnknown) as caught:
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
                    session.add(Task(url="u", **put.to_values()))
                    await session.flush()
                    proxy.mode = "after_server"

        assert caught.value.uris == tuple(memory_store.objects)
        assert await contents(memory_store, postgres.engine) == (b"x", None)

    async def test_cancelled_while_the_answer_is_under_way(
        self,
        postgres: Database,
        memory_store: MemoryStore,
        engine: AsyncEngine,
        proxy: PostgresProxy,
    ) -> None:
        """Cancelled while COMMIT waits for its answer: the answer is waited for, then cancelled."""
        old = await seed(postgres, memory_store)

        async def update() -> None:
            async with AsyncSession(engine) as session:
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
                    proxy.mode = "hold_reply"

        task = asyncio.create_task(update())
        await proxy.commit_arrived.wait()
        task.cancel()
        await asyncio.sleep(0)
        proxy.release.set()
        await asyncio.wait({task})

        assert task.cancelled()
        assert await contents(memory_store, postgres.engine) == (b"new", None)

    async def test_cancelled_and_then_the_answer_is_lost(
        self,
        postgres: Database,
        memory_store: MemoryStore,
        engine: AsyncEngine,
        proxy: PostgresProxy,
    ) -> None:
        """CancelledError wins, with the unknown outcome as its cause; nothing is deleted."""
        old = await seed(postgres, memory_store)
        errors: list[BaseException] = []

        async def update() -> None:
            try:
                async with AsyncSession(engine) as session:
                    async with blob_transaction(session, store=memory_store) as tx:
                        put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                        await session.execute(replace(put))
                        proxy.mode = "hold_reply"
            except asyncio.CancelledError as exc:
                errors.append(exc)
                raise

        task = asyncio.create_task(update())
        await proxy.commit_arrived.wait()
        task.cancel()
        await asyncio.sleep(0)
        await proxy.stop()
        await asyncio.wait({task})

        assert task.cancelled()
        assert isinstance(errors[0].__cause__, CommitOutcomeUnknown)
        found = await assert_consistent(memory_store, postgres.engine, COLUMNS, orphans=(old,))
        assert list(found.values()) == [b"new"]

    async def test_commit_takes_too_long(
        self,
        postgres: Database,
        memory_store: MemoryStore,
        engine: AsyncEngine,
        proxy: PostgresProxy,
    ) -> None:
        """A COMMIT without an answer in time is given up: unknown."""
        old = await seed(postgres, memory_store)
        async with AsyncSession(engine) as session:
            with pytest.raises(CommitOutcomeUnknown):
                async with blob_transaction(session, store=memory_store, commit_seconds=0.3) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
                    proxy.mode = "hold_reply"

        found = await assert_consistent(memory_store, postgres.engine, COLUMNS, orphans=(old,))
        assert list(found.values()) == [b"new"]


class TestErrorsAfterCommit:
    """COMMIT was acknowledged, and then something of the user's raised."""

    async def test_a_listener_that_raises(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """An after_commit listener that raises does not undo a durable row."""
        old = await seed(database, memory_store)
        async with database.session() as session:

            @sa.event.listens_for(session.sync_session, "after_commit")
            def fail(_session: object) -> None:
                raise RuntimeError("listener")

            with pytest.raises(RuntimeError, match="listener"):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
            sa.event.remove(session.sync_session, "after_commit", fail)

        assert tx.outcome is Outcome.COMMITTED
        assert await contents(memory_store, database.engine) == (b"new", None)

    async def test_a_before_commit_listener_that_raises(
        self, database: Database, memory_store: MemoryStore
    ) -> None:
        """A before_commit listener that raises stops the commit: rolled back and undone."""
        old = await seed(database, memory_store)
        async with database.session() as session:

            @sa.event.listens_for(session.sync_session, "before_commit")
            def fail(_session: object) -> None:
                raise RuntimeError("listener")

            with pytest.raises(RuntimeError, match="listener"):
                async with blob_transaction(session, store=memory_store) as tx:
                    put = await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"new", old)])
                    await session.execute(replace(put))
            sa.event.remove(session.sync_session, "before_commit", fail)

        assert tx.outcome is Outcome.ROLLED_BACK
        assert await contents(memory_store, database.engine) == (b"old", None)
