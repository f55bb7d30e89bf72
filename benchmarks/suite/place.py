"""What a contender is given, and what it gives back: a place to work in, and an act to time.

Nothing but the standard library is imported here: contenders run in environments of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final

BUCKET: Final = "benchmark"
REGION: Final = "us-east-1"
KEY_ID: Final = "benchmark"
SECRET: Final = "benchmark"  # noqa: S105 - the stub does not look
PART_BYTES: Final = 8 * 2**20
PARTS_IN_FLIGHT: Final = 4
CHUNK_BYTES: Final = 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a contender works.

    Attributes:
        endpoint_url: of the stub.
        ca_file: what to trust, over https.
        directory: an empty one, for its database and files.
        columns: of a row.
        blob_bytes: of a small column.
        stream_bytes: of a large object.
        rows: of a bulk insert.
        batch_rows: rows of a transaction of it.
        uri: of an object of ``stream_bytes`` that is there.
    """

    endpoint_url: str
    ca_file: Path | None
    directory: Path
    columns: int = 1
    blob_bytes: int = 16 * 1024
    stream_bytes: int = 0
    rows: int = 0
    batch_rows: int = 1
    uri: str | None = None

    def to_values(self) -> dict[str, Any]:
        """Return it as what JSON knows, for a child."""
        values = dataclasses.asdict(self)
        ca_file = str(self.ca_file) if self.ca_file is not None else None
        return {**values, "ca_file": ca_file, "directory": str(self.directory)}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Place:
        """Read what `to_values` made."""
        ca_file = Path(values["ca_file"]) if values["ca_file"] is not None else None
        return cls(**{**values, "ca_file": ca_file, "directory": Path(values["directory"])})

    @property
    def client_arguments(self) -> dict[str, Any]:
        """What botocore's and aiobotocore's ``create_client`` take."""
        return {
            "endpoint_url": self.endpoint_url,
            "region_name": REGION,
            "aws_access_key_id": KEY_ID,
            "aws_secret_access_key": SECRET,
            **({"verify": str(self.ca_file)} if self.ca_file is not None else {}),
        }

    @property
    def obstore_config(self) -> dict[str, Any]:
        """The same for obstore."""
        return {
            "endpoint": self.endpoint_url,
            "region": REGION,
            "access_key_id": KEY_ID,
            "secret_access_key": SECRET,
        }

    @property
    def obstore_client_options(self) -> Any:
        """Obstore takes no certificate of one's own; encryption costs the same."""
        return {"allow_http": True, "allow_invalid_certificates": True}

    def bodies(self) -> list[bytes]:
        """Return the bytes of the small columns, which differ."""
        return [os.urandom(self.blob_bytes) for _ in range(self.columns)]

    def new_key(self) -> str:
        """Return a key that was never used."""
        return f"rows/{uuid.uuid4().hex}"


async def _nothing(_subject: Any = None) -> Any:
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Act:
    """What is timed, and what belongs to it without being timed as a part of it.

    Attributes:
        run: the act; given what ``before`` returned.
        before: makes what the act needs, not timed.
        after: waits for what the act left to the background, timed apart.
    """

    run: Callable[[Any], Awaitable[Any]]
    before: Callable[[], Awaitable[Any]] = _nothing
    after: Callable[[], Awaitable[Any]] = _nothing


OpenAct = Callable[[Place], AbstractAsyncContextManager[Act]]


@contextlib.asynccontextmanager
async def idle(_place: Place) -> AsyncIterator[Act]:
    """Do nothing for a while: what the machine adds to a loop's stalls by itself."""

    async def run(_subject: Any) -> None:
        await asyncio.sleep(0.1)

    yield Act(run)
