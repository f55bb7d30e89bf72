"""What is kept after a block: no bytes, no listeners that pile up, no entries for what is gone."""

from __future__ import annotations

import gc
from contextlib import suppress

from sqlalchemy.ext.asyncio import AsyncSession
from support.databases import Database
from support.models import Task

from aioblobcol import PutS3ApiCall, PutS3Result, _session, blob_transaction, put_s3
from aioblobcol._sources import Payload
from aioblobcol.testing import MemoryStore


async def upload(session: AsyncSession, store: MemoryStore, number: int) -> PutS3Result:
    async with blob_transaction(session, store=store) as tx:
        put = await tx.put_s3(pk=number, api_calls=[PutS3ApiCall("html", b"x", None)])
        session.add(Task(url=str(number), **put.to_values()))
    return put


class TestMemory:
    async def test_a_result_does_not_keep_the_bytes(self, memory_store: MemoryStore) -> None:
        """A result that is kept for long does not keep what was uploaded."""
        call = PutS3ApiCall("html", b"large", None)
        put = await put_s3(pk="u", api_calls=[call], store=memory_store)
        put.to_values()
        gc.collect()

        assert not [kept for kept in gc.get_objects() if isinstance(kept, Payload) and kept.size]

    async def test_nothing_piles_up(self, sqlite: Database, memory_store: MemoryStore) -> None:
        """Many sessions and blocks, one failing in two, leave no entry in our tables."""
        for number in range(30):
            async with sqlite.session() as session:
                await upload(session, memory_store, 2 * number)
                with suppress(ZeroDivisionError):
                    async with blob_transaction(session, store=memory_store) as tx:
                        await tx.put_s3(pk="u", api_calls=[PutS3ApiCall("html", b"x", None)])
                        raise ZeroDivisionError
        gc.collect()

        assert len(_session._by_session) == 0
        assert len(_session._by_connection) == 0

    async def test_listeners_are_installed_once(
        self, sqlite: Database, memory_store: MemoryStore
    ) -> None:
        """A session and an engine get our listeners once, however many blocks they see."""
        engine = sqlite.engine.sync_engine
        async with sqlite.session() as session:
            for number in range(5):
                await upload(session, memory_store, number)
            commits = list(session.sync_session.dispatch.after_commit)

        assert commits.count(_session._after_commit) == 1
        assert len(list(engine.dispatch.before_cursor_execute)) == 1
