"""moto's S3 server on a free port of this machine: real HTTP, no credentials that matter."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

from aiobotocore.config import AioConfig

from .._store._s3 import S3Store, open_store


@dataclasses.dataclass(frozen=True, slots=True)
class S3Server:
    """An S3 server for tests.

    Attributes:
        endpoint_url: such as ``http://127.0.0.1:41234``.
    """

    endpoint_url: str

    @property
    def client_arguments(self) -> dict[str, str]:
        """What aiobotocore's ``create_client`` needs."""
        return {
            "endpoint_url": self.endpoint_url,
            "region_name": "us-east-1",
            "aws_access_key_id": "testing",
            "aws_secret_access_key": "testing",
        }

    def open_store(self, *, bucket: str, prefix: str = "prefix", **arguments: object) -> S3Store:
        """Return `aioblobcol.open_store` for this server; the bucket must exist."""
        direct = AioConfig(proxies={})  # HTTP_PROXY is not meant for this machine
        return open_store(
            bucket=bucket,
            prefix=prefix,
            **{"config": direct, **self.client_arguments, **arguments},
        )

    async def create_bucket(self, bucket: str) -> None:
        """Create a bucket."""
        async with self.open_store(bucket=bucket) as store:
            await store.client.create_bucket(Bucket=bucket)


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start moto's server in a thread of this process; needs ``moto[server]``."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 - optional, and takes a second

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for each request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}")
    finally:
        server.stop()
