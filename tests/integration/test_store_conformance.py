"""Every store that the library has, under the conformance suite that users have."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.obstores import open_in

from aioblobcol import S3Store, Store
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


@pytest.mark.slow
class TestObstoreOnS3(StoreConformance):
    @pytest_asyncio.fixture
    async def store(self, tmp_path: Path, s3: S3Server) -> AsyncIterator[Store]:
        async with open_in("s3", tmp_path, s3) as store:
            yield store


class TestObstoreOnFiles(StoreConformance):
    @pytest_asyncio.fixture
    async def store(self, tmp_path: Path, s3: S3Server) -> AsyncIterator[Store]:
        async with open_in("files", tmp_path, s3) as store:
            yield store


class TestObstoreInMemory(StoreConformance):
    @pytest_asyncio.fixture
    async def store(self, tmp_path: Path, s3: S3Server) -> AsyncIterator[Store]:
        async with open_in("memory", tmp_path, s3) as store:
            yield store
