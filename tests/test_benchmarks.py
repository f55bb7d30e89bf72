"""The benchmarks: every contender that needs no peer works, and the stub answers as S3 does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiobotocore.session import get_session
from botocore.exceptions import ClientError
from suite.driver import Result
from suite.goals import goals_of
from suite.pattern import BLOCK
from suite.plan import GROUPS
from suite.servers import running_stub

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MIB = 2**20
BUCKET = "bucket"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_contender_without_a_peer_takes_its_turn(tmp_path: Path) -> None:
    """The smoke test runs the library in every group, and writes the report."""
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--smoke", "--own", "--without-https"]
    done = subprocess.run(  # noqa: S603 - our own script
        [*command, f"--output={tmp_path}"], check=False, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    groups = json.loads((tmp_path / "results.json").read_text())["groups"]
    ran = [
        contender["wall"] for group in groups.values() for contender in group["contenders"].values()
    ]
    assert len(ran) > 30
    assert (
        "| 3 | requests of a create: aioblobcol, explicit" in (tmp_path / "RESULTS.md").read_text()
    )


class TestGoals:
    """How a run is judged."""

    def test_rounds_are_compared_with_themselves(self) -> None:
        """A round that was slow for everybody does not count against anybody."""
        ours = Result(wall=[1.1, 11.0, 1.1], cpu=[1, 1, 1], settle=[0, 0, 0])
        floor = Result(wall=[1.0, 10.0, 1.0], cpu=[1, 1, 1], settle=[0, 0, 0])

        goals = goals_of({"create-8": {"aioblobcol, explicit": ours, "one PUT + commit": floor}})
        found = [goal for goal in goals if goal.is_met is not None]
        assert [(goal.number, goal.measured, goal.verdict) for goal in found] == [
            ("1", "1.10x", "met")
        ]

    def test_what_failed_is_not_judged(self) -> None:
        """A contender that failed half way leaves its goals open."""
        ours = Result(wall=[1.0], cpu=[1], settle=[0], error="it fell over")
        floor = Result(wall=[1.0], cpu=[1], settle=[0])

        goals = goals_of({"create-8": {"aioblobcol, explicit": ours, "one PUT + commit": floor}})
        assert {goal.verdict for goal in goals} == {"-"}

    def test_another_request_misses_a_goal(self) -> None:
        """Goal 3 holds for exactly these requests: one HEAD too many misses it."""
        ours = Result(wall=[1.0], requests={"PUT": 8, "HEAD": 1})

        goals = goals_of({"create-8": {"aioblobcol, managed": ours}})
        assert [goal.verdict for goal in goals if goal.is_exact and goal.is_met is not None] == [
            "MISSED"
        ]

    def test_every_contender_of_a_goal_is_in_the_plan(self) -> None:
        """No goal stays open because of a name that nobody has."""
        sample = Result(
            wall=[1.0], cpu=[1.0], settle=[1.0], growth=[1], stall=[1.0], requests={"PUT": 1}
        )
        results = {group.name: {c.name: sample for c in group.contenders} for group in GROUPS}

        assert [goal.text for goal in goals_of(results) if goal.is_met is None] == []


class TestStub:
    """What the figures rest on: the server counts, keeps and checks what it says it does."""

    @pytest.fixture
    def url(self) -> Iterator[str]:
        with running_stub(certificate=None, ca_file=None, verify=True, cpu=None) as stub:
            yield stub.url

    @pytest_asyncio.fixture
    async def client(self, url: str) -> AsyncIterator[Any]:
        arguments = {
            "endpoint_url": url,
            "region_name": "us-east-1",
            "aws_access_key_id": "key",
            "aws_secret_access_key": "secret",
        }
        async with get_session().create_client("s3", **arguments) as client:
            yield client

    async def test_gives_back_a_small_object(self, client: Any) -> None:
        """A small object comes back whole, in part, and with its metadata."""
        await client.put_object(Bucket=BUCKET, Key="a=b/c d", Body=b"0123", Metadata={"x": "y"})

        whole = await client.get_object(Bucket=BUCKET, Key="a=b/c d")
        part = await client.get_object(Bucket=BUCKET, Key="a=b/c d", Range="bytes=1-2")
        assert await whole["Body"].read() == b"0123"
        assert await part["Body"].read() == b"12"
        assert whole["Metadata"] == {"x": "y"}
        head = await client.head_object(Bucket=BUCKET, Key="a=b/c d")
        assert (head["ContentLength"], head["ETag"]) == (4, whole["ETag"])

    async def test_gives_back_a_large_object(self, client: Any) -> None:
        """A multipart upload of the pattern comes back as the pattern."""
        sent = BLOCK * 5 + BLOCK[:100]
        named = {"Bucket": BUCKET, "Key": "large"}
        created = await client.create_multipart_upload(**named, ChecksumAlgorithm="CRC32")
        named_upload = {**named, "UploadId": created["UploadId"]}
        parts = []
        for number, body in enumerate((BLOCK * 5, BLOCK[:100]), start=1):
            answer = await client.upload_part(**named_upload, PartNumber=number, Body=body)
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        await client.complete_multipart_upload(**named_upload, MultipartUpload={"Parts": parts})

        whole = await client.get_object(**named)
        assert await whole["Body"].read() == sent
        part = await client.get_object(**named, Range=f"bytes={MIB - 3}-{2 * MIB + 3}")
        assert await part["Body"].read() == sent[MIB - 3 : 2 * MIB + 4]

    async def test_refuses_other_bytes(self, client: Any) -> None:
        """A large object that is not the pattern is refused: it could not be given back."""
        with pytest.raises(ClientError, match="BenchmarkNotThePattern"):
            await client.put_object(Bucket=BUCKET, Key="large", Body=bytes(2 * MIB))

    async def test_refuses_a_part_that_is_too_small(self, client: Any) -> None:
        """All parts but the last have 5 MiB or more."""
        named = {"Bucket": BUCKET, "Key": "large"}
        created = await client.create_multipart_upload(**named)
        named["UploadId"] = created["UploadId"]
        answers = [
            await client.upload_part(**named, PartNumber=number, Body=b"small") for number in (1, 2)
        ]
        parts = [{"PartNumber": n, "ETag": a["ETag"]} for n, a in enumerate(answers, start=1)]

        with pytest.raises(ClientError, match="EntityTooSmall"):
            await client.complete_multipart_upload(**named, MultipartUpload={"Parts": parts})

    async def test_deletes_copies_and_lists(self, client: Any) -> None:
        """Copies, bulk deletes and listings see the same objects."""
        for key in ("p/1&", "p/2"):
            await client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
        await client.copy_object(
            Bucket=BUCKET, Key="p/3", CopySource={"Bucket": BUCKET, "Key": "p/2"}
        )
        names = [{"Key": "p/1&"}, {"Key": "p/2"}]
        await client.delete_objects(Bucket=BUCKET, Delete={"Objects": names})

        listed = await client.list_objects_v2(Bucket=BUCKET, Prefix="p/")
        assert [each["Key"] for each in listed["Contents"]] == ["p/3"]
        with pytest.raises(ClientError, match="NoSuchKey"):
            await client.get_object(Bucket=BUCKET, Key="p/2")

    async def test_looks_at_conditions(self, client: Any) -> None:
        """If-None-Match refuses a second PUT, If-Match a changed object."""
        named = {"Bucket": BUCKET, "Key": "one"}
        await client.put_object(**named, Body=b"x", IfNoneMatch="*")

        with pytest.raises(ClientError, match="PreconditionFailed"):
            await client.put_object(**named, Body=b"y", IfNoneMatch="*")
        with pytest.raises(ClientError, match="PreconditionFailed"):
            await client.get_object(**named, IfMatch='"other"')
