"""docs/stores.md: every block runs, and the table of capabilities is that of the code."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.pages import ROOT, Block, Page, Place, managed_in_memory

from aioblobcol import Capabilities, S3Store, blob_sessionmaker, open_store
from aioblobcol.obstore import ObstoreStore, open_obstore
from aioblobcol.testing import S3Server

pytestmark = pytest.mark.slow  # one Python is enough for the pages

STORES = Page(ROOT / "docs/stores.md")


@pytest_asyncio.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    monkeypatch.chdir(tmp_path)
    async with managed_in_memory() as opened:
        opened.names |= {"blob_sessionmaker": blob_sessionmaker, "open_obstore": open_obstore}
        yield opened


class TestPage:
    def test_every_block_has_a_runner(self) -> None:
        """No block goes untested, and no test runs a block that is not there."""
        assert sorted(STORES.runners) == sorted(block.name for block in STORES.blocks)

    def test_links_lead_somewhere(self) -> None:
        """Every link names a file of the project, and a heading where it says so."""
        STORES.check_links()

    def test_capabilities(self) -> None:
        """The table says what the stores say."""
        stores: list[Any] = [
            open_store(bucket="b"),
            open_obstore("s3://b"),
            open_obstore("file:///tmp/x"),
            open_obstore("memory://"),
            open_obstore("gs://b"),
        ]
        names = [each.name for each in dataclasses.fields(Capabilities) if each.type == "bool"]
        said = {name: cells for name, *cells in STORES.table("Capability")}

        assert sorted(said) == sorted(names)
        for name, cells in said.items():
            can = [getattr(store.capabilities, name) for store in stores]
            assert cells == ["yes" if each else "no" for each in can], name
        assert open_obstore("az://b").capabilities == open_obstore("gs://b").capabilities

    def test_versions(self) -> None:
        """The parts that the page speaks of are those of the code."""
        assert "parts of 8 MiB, four on the wire" in STORES.text
        assert open_obstore("memory://").capabilities.parts_held == 4


class TestBlocks:
    @STORES.runs("s3")
    async def test_s3(self, block: Block, place: Place, s3: S3Server) -> None:
        """The row is committed, and its object is in the bucket."""
        bucket = f"test-{uuid.uuid4().hex}"
        await s3.create_bucket(bucket)
        given = s3.client_arguments
        text = block.text.replace("http://127.0.0.1:9000", given["endpoint_url"])
        await place.run(dataclasses.replace(block, text=text.replace("my-bucket", bucket)))

        async with place.names["store"]:
            assert await place.contents() == {"u": (b"<p>", None)}

    @STORES.runs("credentials")
    async def test_credentials(
        self, block: Block, place: Place, s3: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The store asks boto3 for its credentials."""
        bucket = f"test-{uuid.uuid4().hex}"
        await s3.create_bucket(bucket)
        for name, value in {
            "AWS_ENDPOINT_URL": s3.endpoint_url,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
        }.items():
            monkeypatch.setenv(name, value)
        text = block.text.replace("my-bucket", bucket)
        await place.run(dataclasses.replace(block, text=text))

        async with place.names["store"] as store:
            assert [uri async for uri in store.iter_uris()] == []

    @STORES.runs("files")
    @pytest.mark.parametrize("on_files", [True, False])
    async def test_files(
        self,
        block: Block,
        place: Place,
        on_files: bool,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The same URIs, whether the bytes lie in a directory or in S3."""
        if on_files:
            monkeypatch.setenv("BLOB_DIRECTORY", str(tmp_path / "blobs"))
        await place.run(block)
        store = place.names["store"]

        assert isinstance(store, ObstoreStore if on_files else S3Store)
        assert (store.bucket, store.prefix) == ("my-bucket", "tasks")
        if on_files:
            place.use(place.names["engine"])
            async with store:
                await place.add_managed("u", html=b"1")
                assert await place.contents() == {"u": (b"1", None)}

    @STORES.runs("lifecycle")
    async def test_lifecycle(self, block: Block, s3_store: S3Store) -> None:
        """S3 takes the rule."""
        rules = json.loads(block.text)
        await s3_store.client.put_bucket_lifecycle_configuration(
            Bucket=s3_store.bucket, LifecycleConfiguration=rules
        )
        found = await s3_store.client.get_bucket_lifecycle_configuration(Bucket=s3_store.bucket)

        assert found["Rules"][0]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}

    @STORES.runs("conformance")
    def test_conformance(self, block: Block, tmp_path: Path) -> None:
        """The suite runs in a project that has nothing but the block."""
        (tmp_path / "test_store.py").write_text(block.text, encoding="utf-8")
        finished = subprocess.run(  # noqa: S603 - our own page
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if "PYTEST" not in name},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

        assert finished.returncode == 0, finished.stdout
        assert " passed" in finished.stdout
        assert "failed" not in finished.stdout


class TestWithoutObstore:
    def test_the_door_says_which_extra(self) -> None:
        """Without obstore the library works, and its door says what to install."""
        program = (
            "import sys; sys.modules['obstore'] = None\n"
            "import aioblobcol, aioblobcol.testing\n"
            "try:\n    import aioblobcol.obstore\n"
            "except ModuleNotFoundError as exc:\n    print(exc)"
        )
        finished = subprocess.run(  # noqa: S603
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
        )

        assert 'pip install "aioblobcol[obstore]"' in finished.stdout
