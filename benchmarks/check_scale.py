"""What `aioblobcol check` costs with very many objects: keys per second, and memory.

As many rows in a PostgreSQL of its own as there are objects in a bucket that `listing_server`
makes up, listed through the real store. A few objects that no row names and a few rows without
their object are planted, and exactly these have to be found. The time includes everything: the
sample of the rows, their sorting by the database, the second look.

Memory is the process's resident set (Linux tells it): the highest after the first tenth of the
objects, above what it was by then.

Exit code 1 if something else is found, or if memory grows by more than a few MiB; keys per second
are printed only, since a busy machine is no defect.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import os
import pstats
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from create_row import print_machine
from own_postgresql import own_postgresql
from sqlalchemy import Column, Integer, MetaData, Table, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from aioblobcol import BlobType, S3Store, open_store
from aioblobcol._check import Check

BUCKET: Final = "benchmark"
PREFIX: Final = "rows/col=html"
MIB: Final = 2**20
GROWTH_AT_MOST: Final = 8 * MIB

metadata = MetaData()
rows = Table("rows", metadata, Column("id", Integer, primary_key=True), Column("html", BlobType()))


@contextlib.contextmanager
def listing_server(count: int, missing: list[int], *, latency_seconds: float) -> Iterator[int]:
    """Run the server in a process of its own; give its port."""
    script = Path(__file__).with_name("listing_server.py")
    command = [sys.executable, str(script), f"--prefix={PREFIX}", f"--count={count}"]
    command += [f"--latency-seconds={latency_seconds}", "--missing", *map(str, missing)]
    with subprocess.Popen(  # noqa: S603 - our own script
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()  # the server ends with its input


async def insert_rows(engine: AsyncEngine, count: int, left_out: list[int]) -> None:
    """Insert a row for each object but some."""
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.execute(
            text(
                "INSERT INTO rows (id, html) "
                "SELECT n, CAST(:start AS text) || lpad(to_hex(n), 32, '0') "
                "FROM generate_series(0, :last) AS n WHERE NOT n = ANY (:left_out)"
            ),
            {"start": f"s3://{BUCKET}/{PREFIX}/id=", "last": count - 1, "left_out": left_out},
        )
        await connection.execute(text("ANALYZE rows"))


async def measure(engine: AsyncEngine, store: S3Store, *, jobs: int, count: int) -> set[str]:
    """Check once and print the figures; return what was found, with the memory if it grew."""
    check = Check(engine, store, metadata, jobs=jobs)
    before: list[int] = []
    after: list[int] = []

    def look() -> None:
        (before if check.objects < count // 10 else after).append(resident_bytes())

    check.on_progress = look
    started, started_cpu = time.perf_counter(), time.process_time()
    found = {f"{each.kind.value} {each.uri[-8:]}" async for each in check.findings()}
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    growth = max(after) - max(before)
    print(
        f"{jobs:>4}{seconds:>10.1f} s{cpu:>10.1f} s{check.objects / seconds:>14,.0f}/s"
        f"{max(after) / MIB:>12.1f} MiB{growth / MIB:>+10.1f} MiB",
        flush=True,
    )
    return found | ({"MEMORY"} if growth > GROWTH_AT_MOST else set())


def resident_bytes() -> int:
    """Return how much memory this process has now."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def run(*, count: int, jobs: list[int], latency_seconds: float, profile: bool) -> bool:
    """Measure and print; tell whether all was as planted."""
    print_machine()
    orphans = [count // 7, count // 3, count - 1]
    dangling = [0, count // 2, count // 2 + 1, count - 2]
    expected = {f"orphan {number:08x}" for number in orphans}
    expected |= {f"dangling {number:08x}" for number in dangling}
    is_right = True
    with (
        own_postgresql() as url,
        listing_server(count, dangling, latency_seconds=latency_seconds) as port,
    ):
        engine = create_async_engine(url, pool_size=max(jobs) + 1)
        await insert_rows(engine, count, orphans)
        store = open_store(
            bucket=BUCKET,
            prefix=PREFIX,
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            compat="generic",
            aws_access_key_id="benchmark",
            aws_secret_access_key="benchmark",  # noqa: S106 - the server does not look
        )
        print(f"{count:,} objects and rows, {1000 * latency_seconds:g} ms for each page\n")
        print(f"{'jobs':>4}{'wall':>12}{'CPU':>12}{'keys':>16}{'memory':>16}{'growth':>14}")
        async with store:
            for number in jobs:
                found = await measure(engine, store, jobs=number, count=count)
                if found != expected:
                    print(f"NOT AS PLANTED: {sorted(found ^ expected)}")
                    is_right = False
            if profile:
                await show_profile(engine, store)
        await engine.dispose()
    return is_right


async def show_profile(engine: AsyncEngine, store: S3Store) -> None:
    """Print where one more check spends its time."""
    profiler = cProfile.Profile()
    profiler.enable()
    assert [each async for each in Check(engine, store, metadata).findings()]
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--latency-seconds", type=float, default=0.05)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    is_right = asyncio.run(
        run(
            count=given.count,
            jobs=given.jobs,
            latency_seconds=given.latency_seconds,
            profile=given.profile,
        )
    )
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
