"""What a row costs above the floor: create and update of 8 columns, 20 ms from the server.

The floor is one PUT of one column with the same tuned client, then the commit of the same row
with a plain `AsyncSession`: nothing that stores bytes before it commits can be faster. The acts
take turns within each round, so that what else the machine does meets all of them; the ratio is
taken of the medians. ``by hand`` (all PUTs in one ``asyncio.gather`` with the same client, no
clean-up, no guarantee) tells the client's share of the distance from the library's.

Exit code 1 if an act makes other requests than it should; a missed goal is printed only, since
a busy machine is no defect.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import functools
import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlalchemy import event, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aioblobcol import PutS3ApiCall, S3Store, blob_transaction, open_store, use_explicit_begin

GOAL = 1.20
COLUMNS = tuple(f"blob_{number}" for number in range(1, 9))
BUCKET = "benchmark"


class Base(DeclarativeBase):
    """The benchmark's tables."""


class Row(Base):
    """One row with eight columns in S3."""

    __tablename__ = "rows"

    id: Mapped[str] = mapped_column(primary_key=True)
    blob_1: Mapped[str | None]
    blob_2: Mapped[str | None]
    blob_3: Mapped[str | None]
    blob_4: Mapped[str | None]
    blob_5: Mapped[str | None]
    blob_6: Mapped[str | None]
    blob_7: Mapped[str | None]
    blob_8: Mapped[str | None]


@dataclasses.dataclass(frozen=True, slots=True)
class LatencyServer:
    """The server of `latency_server`, running."""

    port: int

    def take_counts(self) -> dict[str, int]:
        """Return the requests since the last call, by kind."""
        counts: dict[str, int] = self._get("/counts")
        return counts

    def take_peak(self) -> int:
        """Return the highest number of PUTs under way at one time since the last call."""
        peak: int = self._get("/peak")
        return peak

    def _get(self, target: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", target)
            return json.loads(connection.getresponse().read())


@contextlib.contextmanager
def latency_server(*, latency_seconds: float) -> Iterator[LatencyServer]:
    """Run the server in a process of its own."""
    script = Path(__file__).with_name("latency_server.py")
    command = [sys.executable, str(script), f"--latency-seconds={latency_seconds}"]
    with subprocess.Popen(  # noqa: S603 - our own script
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield LatencyServer(int(process.stdout.readline()))
        finally:
            process.stdin.close()  # the server ends with its input


@dataclasses.dataclass(frozen=True, slots=True)
class Acts:
    """What is timed. Each act has an engine of its own: the library listens to the one it uses."""

    store: S3Store
    engines: dict[str, AsyncEngine]
    blobs: list[bytes]

    async def floor(self) -> None:
        """One PUT, one commit."""
        row_id = uuid.uuid4().hex
        await self._put(row_id, 0)
        await self._commit("floor", row_id)

    async def by_hand(self) -> None:
        """All PUTs at once, one commit, no guarantee."""
        row_id = uuid.uuid4().hex
        await asyncio.gather(*(self._put(row_id, index) for index in range(len(self.blobs))))
        await self._commit("by hand", row_id)

    async def create(self) -> str:
        """The library's way to create a row; returns its primary key."""
        row_id = uuid.uuid4().hex
        async with (
            AsyncSession(self.engines["create"], expire_on_commit=False) as session,
            blob_transaction(session, store=self.store) as tx,
        ):
            put = await tx.put_s3(pk=row_id, api_calls=self._calls())
            session.add(Row(id=row_id, **put.to_values()))
        return row_id

    async def update(self, row: Row) -> None:
        """The library's way to replace all columns, the clean-up off the path."""
        old = {column: getattr(row, column) for column in COLUMNS}
        async with (
            AsyncSession(self.engines["create"], expire_on_commit=False) as session,
            blob_transaction(session, store=self.store, background=True) as tx,
        ):
            put = await tx.put_s3(pk=row.id, api_calls=self._calls(old))
            await session.execute(
                update(Row).where(Row.id == row.id, put.guard(Row)).values(**put.to_values())
            )

    async def new_row(self) -> Row:
        """Create a row for `update`, and return it."""
        row_id = await self.create()
        async with AsyncSession(self.engines["create"]) as session:
            return await session.get_one(Row, row_id)

    def _calls(self, old: dict[str, str] | None = None) -> list[PutS3ApiCall]:
        return [
            PutS3ApiCall(column, blob, (old or {}).get(column))
            for column, blob in zip(COLUMNS, self.blobs, strict=True)
        ]

    async def _put(self, row_id: str, index: int) -> None:
        body = self.blobs[index]
        await self.store.client.put_object(
            Bucket=BUCKET,
            Key=f"{self.store.prefix}/{row_id}/col={COLUMNS[index]}",
            Body=body,
            ChecksumCRC32=base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode("ascii"),
            Metadata={"update_at": "2026-01-01T00:00:00+00:00", "sha256": "0" * 64},
        )

    async def _commit(self, engine: str, row_id: str) -> None:
        uris = {c: f"s3://{BUCKET}/{self.store.prefix}/{row_id}/col={c}" for c in COLUMNS}
        async with AsyncSession(self.engines[engine], expire_on_commit=False) as session:
            session.add(Row(id=row_id, **uris))
            await session.commit()


@contextlib.asynccontextmanager
async def open_acts(server: LatencyServer, *, blob_bytes: int) -> AsyncIterator[Acts]:
    """Open the store and a SQLite file in WAL mode for each act."""
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
        engines = {}
        for name in ("floor", "by hand", "create"):
            engines[name] = engine = create_async_engine(
                f"sqlite+aiosqlite:///{directory / name}.db"
            )
            stack.push_async_callback(engine.dispose)
            use_explicit_begin(engine)
            event.listen(engine.sync_engine, "connect", _use_wal)
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
        yield Acts(store, engines, [os.urandom(blob_bytes) for _ in COLUMNS])


def _use_wal(dbapi_connection: Any, _record: object) -> None:
    dbapi_connection.execute("PRAGMA journal_mode=WAL").close()


async def measure(acts: Acts, *, rounds: int) -> dict[str, list[float]]:
    """Return the wall times of each act in seconds; the order rotates from round to round."""
    names = ["floor", "by hand", "create", "update"]
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-5, rounds):  # the first ones open connections and fill caches
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            act: Callable[[], Awaitable[object]]
            match name:
                case "floor":
                    act = acts.floor
                case "by hand":
                    act = acts.by_hand
                case "create":
                    act = acts.create
                case _:
                    act = functools.partial(acts.update, await acts.new_row())
            started = time.perf_counter()
            await act()
            seconds = time.perf_counter() - started
            if number >= 0:
                times[name].append(seconds)
            await acts.store.runtime.background.drain()
    return times


async def count_requests(acts: Acts, server: LatencyServer) -> dict[str, dict[str, int]]:
    """Return the requests of one create and of one update, the clean-up included."""
    row = await acts.new_row()
    server.take_counts()
    await acts.create()
    created = server.take_counts()
    await acts.update(row)
    await acts.store.runtime.background.drain()
    return {"create": created, "update": server.take_counts()}


def print_times(times: dict[str, list[float]]) -> None:
    """Print the table of wall times."""
    floor = statistics.median(times["floor"])
    print(f"{'act':<10}{'median':>10}{'p10':>10}{'p90':>10}{'ratio':>8}")
    for name, seconds in times.items():
        tenths = statistics.quantiles(seconds, n=10)
        figures = (statistics.median(seconds), tenths[0], tenths[-1])
        columns = "".join(f"{1000 * figure:>7.2f} ms" for figure in figures)
        print(f"{name:<10}{columns}{figures[0] / floor:>8.3f}")
    ratio = statistics.median(times["create"]) / floor
    print(
        f"\ncreate / floor: {ratio:.3f} (goal {GOAL:.2f}, {'met' if ratio <= GOAL else 'MISSED'})"
    )


def print_counts(counts: dict[str, dict[str, int]]) -> bool:
    """Print the requests of each act; tell whether they are what they should be."""
    expected = {
        "create": {"PUT": len(COLUMNS)},
        "update": {"PUT": len(COLUMNS), "DeleteObjects": 1},
    }
    for name, found in counts.items():
        kinds = {"PUT": 0, "HEAD": 0, "DELETE": 0, "DeleteObjects": 0, "Expect": 0, **found}
        verdict = "" if found == expected[name] else "   WRONG"
        print(f"{name}: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}{verdict}")
    return counts == expected


def print_machine() -> None:
    """Print what the figures depend on."""
    packages = ("aioblobcol", "aiobotocore", "botocore", "aiohttp", "SQLAlchemy", "aiosqlite")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"{python}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores\n")


async def run(*, rounds: int, latency_seconds: float, blob_bytes: int) -> bool:
    """Measure and print; tell whether the requests were right."""
    print_machine()
    print(
        f"{len(COLUMNS)} columns of {blob_bytes} bytes, {1000 * latency_seconds:g} ms latency, "
        f"SQLite (WAL), {rounds} interleaved rounds\n"
    )
    with latency_server(latency_seconds=latency_seconds) as server:
        async with open_acts(server, blob_bytes=blob_bytes) as acts:
            print_times(await measure(acts, rounds=rounds))
            return print_counts(await count_requests(acts, server))


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--latency-seconds", type=float, default=0.02)
    parser.add_argument("--blob-bytes", type=int, default=16 * 1024)
    arguments = parser.parse_args()
    were_right = asyncio.run(
        run(
            rounds=arguments.rounds,
            latency_seconds=arguments.latency_seconds,
            blob_bytes=arguments.blob_bytes,
        )
    )
    sys.exit(0 if were_right else 1)


if __name__ == "__main__":
    main()
