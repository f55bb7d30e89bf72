"""Fixtures: ``pytest_plugins = ["aioblobcol.testing.fixtures"]``.

``memory_store`` is open and empty. ``s3`` is a server for the whole session: moto in process,
or the one that ``AIOBLOBCOL_TEST_S3_ENDPOINT`` names. ``s3_store`` is open, with a fresh bucket.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from .._store._s3 import S3Store
from ._memory import MemoryStore
from ._server import S3Server, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """Give an S3 server, the same one for all tests of this process."""
    endpoint = os.environ.get("AIOBLOBCOL_TEST_S3_ENDPOINT")
    if endpoint:
        yield S3Server(endpoint)
        return
    with s3_server() as server:
        yield server


@pytest_asyncio.fixture
async def s3_store(s3: S3Server) -> AsyncIterator[S3Store]:
    """Give an open store on a fresh bucket."""
    bucket = f"test-{uuid.uuid4().hex}"
    async with s3.open_store(bucket=bucket) as store:
        await store.client.create_bucket(Bucket=bucket)
        yield store


@pytest_asyncio.fixture
async def memory_store() -> AsyncIterator[MemoryStore]:
    """Give an open, empty store in memory."""
    async with MemoryStore() as store:
        yield store
