"""What the managed strength costs: the CPU of a create, the memory and load of a large flush.

Create: one row with four columns, by `blob_sessionmaker` and by hand, that is, the same four
``put_object`` calls (with the same checksums) of the same tuned client at once and then the commit
of the same row with a plain `AsyncSession`. Both take turns within each round; what is compared is
the CPU time of this process, all threads. The server is another process, so that its work does not
count.

Flush: many rows with two blobs each. Its memory is what Python has allocated at most, above
what there was before the objects were added; the bytes of the sources are not part of it. The
server counts how many PUTs are under way at one time.

Exit code 1 if more PUTs are under way than the store's ``max_concurrency``, or if files take
more memory than that many of them; a missed goal for CPU is printed only, since a busy machine is
no defect.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import gc
import hashlib
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from create_row import LatencyServer, latency_server, print_machine
from sqlalchemy import event
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aioblobcol import Blob, BlobType, S3Store, blob_sessionmaker, open_store, use_explicit_begin

GOAL: Final = 1.10
COLUMNS: Final = ("blob_1", "blob_2", "blob_3", "blob_4")
BUCKET: Final = "benchmark"
MIB: Final = 2**20
CREATES_PER_ROUND: Final = 10


class Base(DeclarativeBase):
    """The benchmark's tables."""


class Managed(Base):
    """A row whose session uploads."""

    __tablename__ = "managed"

    id: Mapped[str] = mapped_column(primary_key=True)
    blob_1: Mapped[Blob | None] = mapped_column(BlobType())
    blob_2: Mapped[Blob | None] = mapped_column(BlobType())
    blob_3: Mapped[Blob | None] = mapped_column(BlobType())
    blob_4: Mapped[Blob | None] = mapped_column(BlobType())


class Plain(Base):
    """The same row, its URIs written by hand."""

    __tablename__ = "plain"

    id: Mapped[str] = mapped_column(primary_key=True)
    blob_1: Mapped[str | None]
    blob_2: Mapped[str | None]
    blob_3: Mapped[str | None]
    blob_4: Mapped[str | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where both kinds of rows go. Each has an engine of its own: the library listens to one."""

    store: S3Store
    directory: Path
    managed: async_sessionmaker[AsyncSession]
    plain: async_sessionmaker[AsyncSession]

    async def by_hand(self, bodies: list[bytes]) -> None:
        """All PUTs at once, then the row; no clean-up and no guarantee."""
        row_id = uuid.uuid4().hex
        uris = {c: f"{self.store.prefix}/plain/col={c}/id={uuid.uuid4().hex}" for c in COLUMNS}
        puts = (self._put(key, body) for key, body in zip(uris.values(), bodies, strict=True))
        await asyncio.gather(*puts)
        async with self.plain() as session:
            session.add(Plain(id=row_id, **{c: f"s3://{BUCKET}/{k}" for c, k in uris.items()}))
            await session.commit()

    async def create(self, bodies: list[bytes]) -> None:
        """The library's way."""
        blobs = {column: Blob(body) for column, body in zip(COLUMNS, bodies, strict=True)}
        async with self.managed.begin() as session:
            session.add(Managed(id=uuid.uuid4().hex, **blobs))

    async def _put(self, key: str, body: bytes) -> None:
        await self.store.client.put_object(
            Bucket=BUCKET,
            Key=key,
            Body=body,
            ChecksumCRC32=base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode("ascii"),
            ContentType="application/octet-stream",
            Metadata={"sha256": hashlib.sha256(body).hexdigest()},
        )


@contextlib.asynccontextmanager
async def open_place(server: LatencyServer) -> AsyncIterator[Place]:
    """Open the store, and a SQLite file in WAL mode for each kind of row."""
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = open_store(
            bucket=BUCKET,
            prefix="rows",
            endpoint_url=f"http://127.0.0.1:{server.port}",
            region_name="us-east-1",
            aws_access_key_id="benchmark",
            aws_secret_access_key="benchmark",  # noqa: S106 - the server does not look
        )
        await stack.enter_async_context(store)
        engines: dict[str, AsyncEngine] = {}
        for name in ("managed", "plain"):
            engines[name] = engine = create_async_engine(
                f"sqlite+aiosqlite:///{directory / name}.db"
            )
            stack.push_async_callback(engine.dispose)
            use_explicit_begin(engine)
            event.listen(engine.sync_engine, "connect", _use_wal)
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
        yield Place(
            store,
            directory,
            blob_sessionmaker(engines["managed"], store),
            async_sessionmaker(engines["plain"], expire_on_commit=False),
        )


def _use_wal(dbapi_connection: Any, _record: object) -> None:
    dbapi_connection.execute("PRAGMA journal_mode=WAL").close()


# --- the CPU of a create ---------------------------------------------------------------------


async def compare_creates(place: Place, *, rounds: int, blob_bytes: int) -> None:
    """Measure both ways to create a row, and print the table."""
    bodies = [os.urandom(blob_bytes) for _ in COLUMNS]
    acts: dict[str, Callable[[list[bytes]], Awaitable[None]]] = {
        "by hand": place.by_hand,
        "managed": place.create,
    }
    cpu: dict[str, list[float]] = {name: [] for name in acts}
    wall: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(-2, rounds):  # the first ones open connections and fill caches
        order = list(acts) if number % 2 else list(reversed(acts))
        for name in order:
            gc.collect()
            started, started_cpu = time.perf_counter(), time.process_time()
            for _ in range(CREATES_PER_ROUND):
                await acts[name](bodies)
            if number >= 0:
                cpu[name].append((time.process_time() - started_cpu) / CREATES_PER_ROUND)
                wall[name].append((time.perf_counter() - started) / CREATES_PER_ROUND)
    print(f"{'create':<10}{'CPU median':>12}{'min':>10}{'max':>10}{'wall median':>14}")
    for name in acts:
        figures = (min(cpu[name]), max(cpu[name]))
        print(
            f"{name:<10}{_ms(statistics.median(cpu[name])):>12}"
            f"{''.join(f'{_ms(figure):>10}' for figure in figures)}"
            f"{_ms(statistics.median(wall[name])):>14}"
        )
    ratio = statistics.median(cpu["managed"]) / statistics.median(cpu["by hand"])
    pairs = [ours / theirs for ours, theirs in zip(cpu["managed"], cpu["by hand"], strict=True)]
    print(
        f"\nCPU, managed / by hand: {ratio:.3f} (goal {GOAL:.2f}, "
        f"{'met' if ratio <= GOAL else 'MISSED'}); of single rounds: median "
        f"{statistics.median(pairs):.3f}, {min(pairs):.3f} to {max(pairs):.3f}\n"
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


# --- a large flush ---------------------------------------------------------------------------


async def flush_many(
    place: Place, server: LatencyServer, *, rows: int, source_bytes: int, slots: int
) -> bool:
    """Flush many rows from bytes and from files; print the figures, tell whether they are bounded.

    One object of bytes, or one file, is the source of all blobs: the flush reads a file anew for
    each of them, so that what it keeps of them shows.
    """
    body = os.urandom(source_bytes)
    path = place.directory / "source"
    path.write_bytes(body)
    print(
        f"flush of {rows} rows with 2 blobs of {source_bytes // 1024} KiB each, {slots} slots "
        f"({slots * source_bytes / MIB:.1f} MiB)"
    )
    print(f"{'source':<10}{'peak of memory':>16}{'PUTs at once':>14}{'wall':>10}")
    floor = await _growth(_add_uris(place, rows=rows))
    print(f"{'none':<10}{floor / MIB:>12.1f} MiB{0:>14}{'':>10}")
    are_bounded = True
    for name, source in (("bytes", body), ("files", path)):
        server.take_peak()
        started = time.perf_counter()
        growth = await _growth(_add_blobs(place, source, rows=rows))
        seconds = time.perf_counter() - started
        peak = server.take_peak()
        print(f"{name:<10}{growth / MIB:>12.1f} MiB{peak:>14}{seconds:>8.1f} s")
        are_bounded &= peak <= slots
        # a body is there twice while the connection sends it
        are_bounded &= growth <= 2 * slots * source_bytes + rows * 32 * 1024
    print("" if are_bounded else "\nNOT BOUNDED\n")
    return are_bounded


async def _growth(work: Awaitable[None]) -> int:
    """Return by how much Python's memory grew at most while *work* was done."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        await work
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


async def _add_uris(place: Place, *, rows: int) -> None:
    async with place.plain.begin() as session:
        session.add_all(
            Plain(id=uuid.uuid4().hex, blob_1=f"s3://{BUCKET}/{n}", blob_2=f"s3://{BUCKET}/{n}")
            for n in range(rows)
        )


async def _add_blobs(place: Place, source: bytes | Path, *, rows: int) -> None:
    async with place.managed.begin() as session:
        session.add_all(
            Managed(id=uuid.uuid4().hex, blob_1=Blob(source), blob_2=Blob(source))
            for _ in range(rows)
        )


async def run(
    *, rounds: int, latency_seconds: float, blob_bytes: int, rows: int, source_bytes: int
) -> bool:
    """Measure and print; tell whether the large flushes were bounded."""
    print_machine()
    print(
        f"{len(COLUMNS)} columns of {blob_bytes} bytes, {1000 * latency_seconds:g} ms latency, "
        f"SQLite (WAL), {rounds} interleaved rounds of {CREATES_PER_ROUND} creates\n"
    )
    with latency_server(latency_seconds=latency_seconds) as server:
        async with open_place(server) as place:
            await compare_creates(place, rounds=rounds, blob_bytes=blob_bytes)
            slots = place.store.runtime.slots._value  # noqa: SLF001 - all are free now
            return await flush_many(
                place, server, rows=rows, source_bytes=source_bytes, slots=slots
            )


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--latency-seconds", type=float, default=0.002)
    parser.add_argument("--blob-bytes", type=int, default=16 * 1024)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--source-bytes", type=int, default=256 * 1024)
    arguments = parser.parse_args()
    were_bounded = asyncio.run(
        run(
            rounds=arguments.rounds,
            latency_seconds=arguments.latency_seconds,
            blob_bytes=arguments.blob_bytes,
            rows=arguments.rows,
            source_bytes=arguments.source_bytes,
        )
    )
    sys.exit(0 if were_bounded else 1)


if __name__ == "__main__":
    main()
