"""aioboto3, which runs in an environment of its own: it pins an older botocore."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aioboto3

from ..place import BUCKET, Act, Place


@contextlib.asynccontextmanager
async def put(place: Place) -> AsyncIterator[Act]:
    """Put one small object."""
    (body,) = place.bodies()
    async with aioboto3.Session().client("s3", **place.client_arguments) as client:
        yield Act(lambda _: client.put_object(Bucket=BUCKET, Key=place.new_key(), Body=body))


@contextlib.asynccontextmanager
async def get(place: Place) -> AsyncIterator[Act]:
    """Get one small object."""
    (body,) = place.bodies()
    key = place.new_key()
    async with aioboto3.Session().client("s3", **place.client_arguments) as client:
        await client.put_object(Bucket=BUCKET, Key=key, Body=body)

        async def run(_subject: Any) -> None:
            answer = await client.get_object(Bucket=BUCKET, Key=key)
            assert await answer["Body"].read() == body

        yield Act(run)
