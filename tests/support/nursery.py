"""A warm process that forks a child for each order on stdin: one program, killed with SIGKILL.

Run as a script, with no thread of its own, so that forking is safe. An order and everything that
is told on stdout, by the nursery and by its children, is one line of JSON. A child kills itself at
the n-th step of the database driver's dialect or of the store (before or after it), or the nursery
does after so many seconds.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiobotocore.session import get_session

from aioblobcol._store import _s3
from aioblobcol.testing import S3Server
from support.killed_programs import PREFIX, PROGRAMS, Place, Told, open_engine

DIALECT_STEPS = (
    "do_begin",
    "do_execute",
    "do_execute_no_params",
    "do_executemany",
    "do_commit",
    "do_rollback",
)
STORE_STEPS = ("put", "copy", "delete_many")


def tell(what: Mapping[str, Any]) -> None:
    """Say one thing; whole, though this process is killed right after it."""
    os.write(1, json.dumps(what).encode() + b"\n")


class Steps:
    """Counts moments, and kills this process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.passed = 0
        self.is_counting = False
        self._kill_at = kill_at

    def pass_one(self, name: str) -> None:
        self.passed += self.is_counting
        if self.is_counting and self.passed == self._kill_at:
            tell({"killed": name})
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, place: Place) -> None:
        """Make steps of what a place's connections and store do."""
        dialect: Any = place.engine.sync_engine.dialect
        for name in DIALECT_STEPS:
            setattr(dialect, name, self._watched(getattr(dialect, name)))
        for name in STORE_STEPS:
            setattr(place.store, name, self._awaited(getattr(place.store, name)))
        list_all = place.store.iter_uris

        async def iter_uris() -> AsyncIterator[str]:
            self.pass_one("before iter_uris")
            async for uri in list_all():
                yield uri
            self.pass_one("after iter_uris")

        place.store.iter_uris = iter_uris

    def _watched(self, function: Any) -> Any:
        @functools.wraps(function)
        def watched(*arguments: Any, **named: Any) -> Any:
            statement = arguments[1] if "execute" in function.__name__ else ""
            name = " ".join(f"{function.__name__} {statement}".split())[:100]
            self.pass_one(f"before {name}")
            result = function(*arguments, **named)
            self.pass_one(f"after {name}")
            return result

        return watched

    def _awaited(self, function: Any) -> Any:
        @functools.wraps(function)
        async def awaited(*arguments: Any) -> Any:
            self.pass_one(f"before {function.__name__}")
            result = await function(*arguments)
            self.pass_one(f"after {function.__name__}")
            return result

        return awaited


async def run(order: Mapping[str, Any], begun: int) -> None:
    """Run a program in this child."""
    steps = Steps(order.get("kill_at"))

    def send(what: Mapping[str, Any]) -> None:
        tell(what)
        if "begun" in what:
            steps.is_counting = True
            os.write(begun, b"!")

    engine = open_engine(order["url"])
    async with S3Server(order["endpoint_url"]).open_store(
        bucket=order["bucket"], prefix=PREFIX
    ) as store:
        place = Place(engine, store)
        steps.watch(place)
        told = Told(send)
        writer = place.journal.writer(engine.sync_engine)
        stage_inside = writer.stage_inside

        def staged_inside(session: Any, uris: Any) -> None:
            tell({"inside": list(uris)})  # durable with the session's transaction only
            stage_inside(session, uris)

        writer.stage_inside = staged_inside  # type: ignore[method-assign]
        await PROGRAMS[order["program"]](place, told)
        steps.is_counting = False
    await engine.dispose()
    tell({"steps": steps.passed})


def be_child(order: Mapping[str, Any], begun: int) -> None:
    """Run a program, and leave without the nursery's clean-up."""
    try:
        tell({"pid": os.getpid()})
        asyncio.run(run(order, begun))
    except BaseException:
        tell({"error": traceback.format_exc()[-3000:]})
        os._exit(1)
    os._exit(0)


def obey(order: Mapping[str, Any]) -> None:
    """Fork a child, and tell how it ended."""
    hears, begun = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(hears)
        be_child(order, begun)
    os.close(begun)
    if "kill_after" in order and os.read(hears, 1):
        readable, _, _ = select.select([hears], [], [], order["kill_after"])
        if not readable:  # or it has ended before
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(hears)
    tell({"ended": os.waitstatus_to_exitcode(status)})


async def warm_up() -> None:
    """Load now what a child would have to load."""
    session = get_session()
    _s3.get_session = lambda: session  # type: ignore[attr-defined]
    async with S3Server("http://127.0.0.1:1").open_store(bucket="none") as store:
        Place(open_engine("postgresql+asyncpg://nobody@127.0.0.1:1/none"), store)
    engine = open_engine("sqlite+aiosqlite:///:memory:")
    async with engine.connect():
        pass
    await engine.dispose()


def main() -> None:
    asyncio.run(warm_up())
    gc.freeze()
    for line in sys.stdin:
        obey(json.loads(line))


if __name__ == "__main__":
    main()
