"""The store on obstore, in each of the places that a test can have."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal, get_args

from aioblobcol.obstore import ObstoreStore, open_obstore
from aioblobcol.testing import S3Server

Place = Literal["files", "memory", "s3"]
PLACES: tuple[Place, ...] = get_args(Place)


def open_on(s3: S3Server, bucket: str, *, prefix: str = "prefix", **arguments: Any) -> ObstoreStore:
    """Return a store on an S3 server of this machine; the bucket must exist."""
    given = s3.client_arguments
    config = {
        "endpoint": given["endpoint_url"],
        "region": given["region_name"],
        "access_key_id": given["aws_access_key_id"],
        "secret_access_key": given["aws_secret_access_key"],
    }
    return open_obstore(f"s3://{bucket}/{prefix}", config=config, **arguments)


@contextlib.asynccontextmanager
async def open_in(place: Place, directory: Path, s3: S3Server) -> AsyncIterator[ObstoreStore]:
    """Give an open and empty store; its bucket on a server is a fresh one."""
    if place == "s3":
        bucket = f"test-{uuid.uuid4().hex}"
        await s3.create_bucket(bucket)
        store = open_on(s3, bucket)
    elif place == "files":
        store = open_obstore((directory / "blobs").as_uri(), prefix="prefix")
    else:
        store = open_obstore("memory://", prefix="prefix")
    async with store:
        yield store
