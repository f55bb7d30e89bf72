"""Every store that the library has, under the conformance suite that users have."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from support.obstores import open_on

from aioblobcol import S3Store, Store
from aioblobcol.obstore import open_obstore
from aioblobcol.testing import MemoryStore, S3Server
from aioblobcol.testing.conformance import StoreConformance


class TestMemoryStore(StoreConformance):
    @pytest_asyncio.fixture
    async def store(self, memory_store: MemoryStore) -> MemoryStore:
        return memory_store


class TestS3Store(StoreConformance):
    @pytest_asyncio.fixture
    async def store(self, s3_store: S3Store) -> S3Store:
        return s3_store


class TestObstoreOnS3(StoreConformance):
    @pytest_asyncio.fixture
    async def store(self, s3: S3Server) -> AsyncIterator[Store]:
        bucket = f"test-{uuid.uuid4().hex}"
        await s3.create_bucket(bucket)
        async with open_on(s3, bucket) as store:
            yield store


class TestObstoreOnFiles(StoreConformance):
    @pytest_asyncio.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[Store]:
        async with open_obstore(tmp_path.as_uri(), prefix="prefix") as store:
            yield store


class TestObstoreInMemory(StoreConformance):
    @pytest_asyncio.fixture
    async def store(self) -> AsyncIterator[Store]:
        async with open_obstore("memory://", prefix="prefix") as store:
            yield store
