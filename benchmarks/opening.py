"""How long opening a store keeps the event loop from everything else.

Each figure is of a process of its own that has opened nothing before: a task asks every
millisecond what time it is, and the longest wait between two answers is the stall. ``default`` is
aiobotocore's own client, made as its documentation shows. The first request is a PUT on a port
where nobody listens: it makes the TLS context and the first connection, and resolves S3's rules.

Prints the table; a missed goal is printed only, since a busy machine is no defect.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from create_row import print_machine

from aioblobcol import open_store

GOAL_SECONDS: Final = 0.020
INTERVAL_SECONDS: Final = 0.001
ENDPOINTS: Final = ("http://127.0.0.1:9", "https://127.0.0.1:9")
CLIENTS: Final = ("default", "open_store")
ARGUMENTS: Final = {
    "region_name": "us-east-1",
    "aws_access_key_id": "benchmark",
    "aws_secret_access_key": "benchmark",
}
ONE_ATTEMPT: Final = AioConfig(retries={"total_max_attempts": 1}, proxies={})


class Ticker:
    """A task that wants to run every millisecond, and knows how long it had to wait."""

    def __init__(self) -> None:
        self._longest = 0.0
        self._task = asyncio.create_task(self._tick())

    def take(self) -> float:
        """Return the longest stall in seconds since the last call."""
        longest, self._longest = self._longest, 0.0
        return longest

    async def stop(self) -> None:
        """End it."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _tick(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            now = time.perf_counter()
            self._longest = max(self._longest, now - last - INTERVAL_SECONDS)
            last = now


def opened(client: str, endpoint_url: str) -> contextlib.AbstractAsyncContextManager[Any]:
    """Return what is entered; both kinds of client have a ``put_object``."""
    arguments = {"endpoint_url": endpoint_url, "config": ONE_ATTEMPT, **ARGUMENTS}
    if client == "default":
        context: contextlib.AbstractAsyncContextManager[Any] = get_session().create_client(
            "s3", **arguments
        )
        return context
    return open_store(bucket="benchmark", **arguments)


async def measure(client: str, endpoint_url: str) -> dict[str, float]:
    """Open once, send once; return seconds."""
    ticker = Ticker()
    await asyncio.sleep(0.05)
    ticker.take()
    started, started_cpu = time.perf_counter(), time.process_time()
    async with opened(client, endpoint_url) as entered:
        await asyncio.sleep(2 * INTERVAL_SECONDS)  # a stall ends when the ticker has run
        figures = {
            "wall": time.perf_counter() - started,
            "cpu": time.process_time() - started_cpu,
            "stall": ticker.take(),
        }
        s3_client = entered if client == "default" else entered.client
        with contextlib.suppress(Exception):
            await s3_client.put_object(Bucket="benchmark", Key="key", Body=b"")
        await asyncio.sleep(2 * INTERVAL_SECONDS)
        figures["first request"] = ticker.take()
    await ticker.stop()
    return figures


def measured(client: str, endpoint_url: str) -> dict[str, float]:
    """Do it in a new process."""
    command = [sys.executable, __file__, "--client", client, "--endpoint-url", endpoint_url]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    figures: dict[str, float] = json.loads(answer.stdout)
    return figures


def rows(*, rounds: int) -> Iterator[tuple[str, str, list[dict[str, float]]]]:
    """Measure everything, the clients in turn."""
    for endpoint_url in ENDPOINTS:
        found: dict[str, list[dict[str, float]]] = {client: [] for client in CLIENTS}
        for _ in range(rounds):
            for client in CLIENTS:
                found[client].append(measured(client, endpoint_url))
        for client in CLIENTS:
            yield endpoint_url.partition(":")[0], client, found[client]


def run(*, rounds: int) -> None:
    """Print the table."""
    print_machine()
    print(f"{rounds} processes each; stalls of the event loop, median and longest\n")
    print(f"{'':<18}{'wall':>9}{'CPU':>9}{'opening':>20}{'first request':>20}")
    for scheme, client, found in rows(rounds=rounds):
        wall, cpu, stalls, firsts = (
            [figures[name] for figures in found]
            for name in ("wall", "cpu", "stall", "first request")
        )
        print(
            f"{scheme:<6}{client:<12}{_ms(statistics.median(wall)):>9}"
            f"{_ms(statistics.median(cpu)):>9}{_median_and_longest(stalls):>20}"
            f"{_median_and_longest(firsts):>20}"
        )
        if client == "open_store" and statistics.median(stalls) > GOAL_SECONDS:
            print(f"MISSED: {_ms(GOAL_SECONDS)} at most")


def _median_and_longest(seconds: list[float]) -> str:
    return f"{_ms(statistics.median(seconds))}, {_ms(max(seconds))}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--client", choices=CLIENTS, help="measure one in this process, as JSON")
    parser.add_argument("--endpoint-url", default=ENDPOINTS[0])
    arguments = parser.parse_args()
    if arguments.client is None:
        run(rounds=arguments.rounds)
    else:
        figures = asyncio.run(measure(arguments.client, arguments.endpoint_url))
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
