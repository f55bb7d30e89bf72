"""What a journal adds to the creation and the update of a row: latency, CPU, requests at once.

The same rows with and without a journal, by `blob_sessionmaker`, on PostgreSQL and on a SQLite
file; both take turns within each round, and the ratio is taken of the medians. One request at a
time shows what staging adds to its latency; many at once show what group commit saves.
The object store is another process with a latency of its own, as in `create_row`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from create_row import latency_server, print_machine
from own_postgresql import own_postgresql
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aioblobcol import Blob, BlobType, Journal, S3Store, blob_sessionmaker, open_store

COLUMNS: Final = ("blob_1", "blob_2", "blob_3", "blob_4")
BUCKET: Final = "benchmark"
PER_ROUND: Final = 10


def make_model() -> Any:
    """Return a mapped class with a `MetaData` of its own."""

    class Base(DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = f"rows_{uuid.uuid4().hex[:8]}"

        id: Mapped[str] = mapped_column(primary_key=True)
        blob_1: Mapped[Blob | None] = mapped_column(BlobType())
        blob_2: Mapped[Blob | None] = mapped_column(BlobType())
        blob_3: Mapped[Blob | None] = mapped_column(BlobType())
        blob_4: Mapped[Blob | None] = mapped_column(BlobType())

    return Row


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """Rows with or without a journal."""

    model: Any
    sessions: async_sessionmaker[AsyncSession]
    bodies: list[bytes]

    def _blobs(self) -> dict[str, Blob]:
        return {name: Blob(body) for name, body in zip(COLUMNS, self.bodies, strict=True)}

    async def create(self) -> None:
        """One row after the other."""
        for _ in range(PER_ROUND):
            async with self.sessions.begin() as session:
                session.add(self.model(id=uuid.uuid4().hex, **self._blobs()))

    async def update(self) -> None:
        """Read a row, replace all its blobs; one after the other."""
        key = uuid.uuid4().hex
        async with self.sessions.begin() as session:
            session.add(self.model(id=key, **self._blobs()))
        for _ in range(PER_ROUND):
            async with self.sessions.begin() as session:
                row = await session.get_one(self.model, key)
                for name, blob in self._blobs().items():
                    setattr(row, name, blob)

    async def create_at_once(self) -> None:
        """As many rows by as many requests at once."""

        async def request() -> None:
            async with self.sessions.begin() as session:
                session.add(self.model(id=uuid.uuid4().hex, **self._blobs()))

        await asyncio.gather(*(request() for _ in range(PER_ROUND)))


@contextlib.asynccontextmanager
async def open_sides(
    url: str | URL, store: S3Store, *, blob_bytes: int
) -> AsyncIterator[dict[str, Side]]:
    """Make the tables of both sides, each with an engine of its own."""
    bodies = [os.urandom(blob_bytes) for _ in COLUMNS]
    async with contextlib.AsyncExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in ("without", "with"):
            model = make_model()
            journal = Journal(model.metadata, store) if name == "with" else None
            engine = create_async_engine(url)
            stack.push_async_callback(engine.dispose)
            if engine.dialect.name == "sqlite":
                event.listen(engine.sync_engine, "connect", _use_wal)
            sessions = blob_sessionmaker(engine, store, journal=journal)
            async with engine.begin() as connection:
                await connection.run_sync(model.metadata.create_all)
            sides[name] = Side(model, sessions, bodies)
        yield sides


def _use_wal(dbapi_connection: Any, _record: object) -> None:
    dbapi_connection.execute("PRAGMA journal_mode=WAL").close()


async def compare(what: str, sides: dict[str, Side], *, rounds: int) -> None:
    """Measure one act on both sides, and print a line for each figure."""
    acts: dict[str, Callable[[Side], Awaitable[None]]] = {
        "create": Side.create,
        "update": Side.update,
        f"{PER_ROUND} creates at once": Side.create_at_once,
    }
    for name, act in acts.items():
        wall: dict[str, list[float]] = {side: [] for side in sides}
        cpu: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(-2, rounds):
            for side in list(sides) if number % 2 else list(reversed(sides)):
                gc.collect()
                started, started_cpu = time.perf_counter(), time.process_time()
                await act(sides[side])
                if number >= 0:
                    wall[side].append((time.perf_counter() - started) / PER_ROUND)
                    cpu[side].append((time.process_time() - started_cpu) / PER_ROUND)
        for figure, measured in (("wall", wall), ("CPU", cpu)):
            medians = {side: statistics.median(measured[side]) for side in sides}
            print(
                f"{what:<12}{name:<22}{figure:<6}"
                f"{1000 * medians['without']:>9.2f} ms{1000 * medians['with']:>9.2f} ms"
                f"{medians['with'] / medians['without']:>9.3f}"
            )


async def run(*, rounds: int, latency_seconds: float, blob_bytes: int) -> None:
    """Measure and print."""
    print_machine()
    print(
        f"{len(COLUMNS)} columns of {blob_bytes} bytes, {1000 * latency_seconds:g} ms latency of "
        f"the object store, {rounds} interleaved rounds of {PER_ROUND}; times for each row\n"
    )
    print(f"{'':<40}{'without':>12}{'with':>12}{'ratio':>9}")
    with (
        latency_server(latency_seconds=latency_seconds) as server,
        tempfile.TemporaryDirectory() as directory,
        own_postgresql() as postgres_url,
    ):
        store = open_store(
            bucket=BUCKET,
            prefix="rows",
            endpoint_url=f"http://127.0.0.1:{server.port}",
            region_name="us-east-1",
            aws_access_key_id="benchmark",
            aws_secret_access_key="benchmark",  # noqa: S106 - the server does not look
        )
        async with store:
            urls: dict[str, str | URL] = {
                "PostgreSQL": postgres_url,
                "SQLite": f"sqlite+aiosqlite:///{Path(directory) / 'rows.db'}",
            }
            for what, url in urls.items():
                async with open_sides(url, store, blob_bytes=blob_bytes) as sides:
                    await compare(what, sides, rounds=rounds)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--latency-seconds", type=float, default=0.005)
    parser.add_argument("--blob-bytes", type=int, default=16 * 1024)
    arguments = parser.parse_args()
    asyncio.run(
        run(
            rounds=arguments.rounds,
            latency_seconds=arguments.latency_seconds,
            blob_bytes=arguments.blob_bytes,
        )
    )


if __name__ == "__main__":
    main()
