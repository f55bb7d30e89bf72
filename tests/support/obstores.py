"""The store on obstore, on the server that the tests have."""

from __future__ import annotations

from typing import Any

from aioblobcol.obstore import ObstoreStore, open_obstore
from aioblobcol.testing import S3Server


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
