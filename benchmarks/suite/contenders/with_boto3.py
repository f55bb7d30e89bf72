"""boto3: in threads, and in the order in which sqlalchemy_mate uses it."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import asyncio
import contextlib
import io
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import boto3
import botocore.exceptions
from boto3.s3.transfer import TransferConfig

from ..pattern import BLOCK, BLOCK_BYTES
from ..place import BUCKET, CHUNK_BYTES, PART_BYTES, PARTS_IN_FLIGHT, Act, Place


@contextlib.contextmanager
def _client(place: Place) -> Iterator[Any]:
    client = boto3.client("s3", **place.client_arguments)
    try:
        yield client
    finally:
        client.close()


@contextlib.asynccontextmanager
async def put(place: Place) -> AsyncIterator[Act]:
    """Put one small object in a thread."""
    (body,) = place.bodies()
    with _client(place) as client:

        async def run(_subject: Any) -> None:
            key = place.new_key()
            await asyncio.to_thread(client.put_object, Bucket=BUCKET, Key=key, Body=body)

        yield Act(run)


@contextlib.asynccontextmanager
async def get(place: Place) -> AsyncIterator[Act]:
    """Get one small object in a thread."""
    (body,) = place.bodies()
    key = place.new_key()
    with _client(place) as client:
        client.put_object(Bucket=BUCKET, Key=key, Body=body)

        def get_now() -> None:
            assert client.get_object(Bucket=BUCKET, Key=key)["Body"].read() == body

        async def run(_subject: Any) -> None:
            await asyncio.to_thread(get_now)

        yield Act(run)


class PatternFile(io.RawIOBase):
    """A file of the pattern that is read once."""

    def __init__(self, size: int) -> None:
        self._left = size

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes."""
        wanted = self._left if size < 0 else min(size, self._left)
        self._left -= wanted
        whole, rest = divmod(wanted, BLOCK_BYTES)
        return BLOCK * whole + BLOCK[:rest] if rest else BLOCK * whole


@contextlib.asynccontextmanager
async def upload(place: Place) -> AsyncIterator[Act]:
    """Upload a large object from a file object, in threads."""
    config = TransferConfig(multipart_chunksize=PART_BYTES, max_concurrency=PARTS_IN_FLIGHT)
    with _client(place) as client:
        client.put_object(Bucket=BUCKET, Key=place.new_key(), Body=b"opens a connection")

        async def run(_subject: Any) -> None:
            source = PatternFile(place.stream_bytes)
            key = place.new_key()
            await asyncio.to_thread(client.upload_fileobj, source, BUCKET, key, Config=config)

        yield Act(run)


@contextlib.asynccontextmanager
async def download(place: Place) -> AsyncIterator[Act]:
    """Read a large object chunk by chunk in a thread."""
    assert place.uri is not None
    key = place.uri.removeprefix(f"s3://{BUCKET}/")
    with _client(place) as client:

        def read() -> int:
            body = client.get_object(Bucket=BUCKET, Key=key)["Body"]
            return sum(len(chunk) for chunk in body.iter_chunks(CHUNK_BYTES))

        async def run(_subject: Any) -> None:
            assert await asyncio.to_thread(read) == place.stream_bytes

        yield Act(run)


class Seed:
    """HEAD and PUT for each column, the row, then DELETE for each old object, one by one."""

    def __init__(self, client: Any, engine: Any, place: Place) -> None:
        self._client = client
        self._engine = engine
        self._bodies = place.bodies()
        self._place = place

    def create(self) -> Any:
        """Create a row."""
        from sqlalchemy.orm import Session  # noqa: PLC0415 - the others need none

        from ..tables import Row, values_of  # noqa: PLC0415

        uris = [self._put(body) for body in self._bodies]
        row = Row(id=uuid.uuid4().hex, **values_of(uris))
        with Session(self._engine, expire_on_commit=False) as session:
            session.add(row)
            session.commit()
        return row

    def update(self, row: Any) -> None:
        """Replace all columns."""
        from sqlalchemy.orm import Session  # noqa: PLC0415 - the others need none

        from ..tables import COLUMNS  # noqa: PLC0415

        columns = COLUMNS[: self._place.columns]
        old = [getattr(row, column) for column in columns]
        for column, body in zip(columns, self._bodies, strict=True):
            setattr(row, column, self._put(body))
        with Session(self._engine, expire_on_commit=False) as session:
            session.add(row)
            session.commit()
        for uri in old:
            key = uri.removeprefix(f"s3://{BUCKET}/")
            self._client.delete_object(Bucket=BUCKET, Key=key)

    def _put(self, body: bytes) -> str:
        key = self._place.new_key()
        with contextlib.suppress(botocore.exceptions.ClientError):  # not there
            self._client.head_object(Bucket=BUCKET, Key=key)
        self._client.put_object(Bucket=BUCKET, Key=key, Body=body)
        return f"s3://{BUCKET}/{key}"


@contextlib.contextmanager
def _seed(place: Place) -> Iterator[Seed]:
    from sqlalchemy import create_engine  # noqa: PLC0415 - the others need none

    from ..tables import Base, use_wal  # noqa: PLC0415

    engine = create_engine(f"sqlite:///{place.directory / 'seed'}.db")
    use_wal(engine)
    Base.metadata.create_all(engine)
    with _client(place) as client:
        yield Seed(client, engine, place)
    engine.dispose()


@contextlib.asynccontextmanager
async def seed_create(place: Place) -> AsyncIterator[Act]:
    """Create a row as sqlalchemy_mate does."""
    with _seed(place) as seed:
        yield Act(lambda _: asyncio.to_thread(seed.create))


@contextlib.asynccontextmanager
async def seed_update(place: Place) -> AsyncIterator[Act]:
    """Replace all columns of a row as sqlalchemy_mate does."""
    with _seed(place) as seed:
        yield Act(
            lambda row: asyncio.to_thread(seed.update, row),
            before=lambda: asyncio.to_thread(seed.create),
        )
