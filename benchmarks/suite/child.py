"""The child in which contenders run: one line of JSON asks, one line answers.

``{"open": function, "place": {...}}`` opens a contender, ``{"times": n}`` lets it take a turn,
``{"counts": true}`` counts the requests of one act, ``{"close": true}`` closes it. An answer has
``absent`` if the contender cannot run here and ``error`` if it failed; it is closed then. The
child ends when its standard input does.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import json
import os
import sys
import traceback
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, Final

from .measuring import measure
from .place import Act, OpenAct, Place

PEERS: Final = frozenset(
    {"advanced_alchemy", "aioboto3", "boto3", "libcloud", "obstore", "s3fs", "sqlalchemy_file"}
)


def say(answer: dict[str, Any]) -> None:
    """Answer the driver."""
    sys.__stdout__.write(json.dumps(answer) + "\n")  # type: ignore[union-attr] # there is one
    sys.__stdout__.flush()  # type: ignore[union-attr]


def find(name: str) -> OpenAct:
    """Return the function that a name such as ``suite.contenders.own:put`` stands for."""
    module, _, function = name.partition(":")
    found: OpenAct = getattr(importlib.import_module(module), function)
    return found


async def work() -> None:
    """Do what is asked for until nobody asks."""
    # nothing else of the loop has to go on between turns, so reading may block it
    lines = map(json.loads, iter(sys.stdin.readline, ""))
    for asked in lines:
        try:
            await work_on(asked["open"], Place.from_values(asked["place"]), lines)
        except Exception as exc:
            say(why_not(exc))
        else:
            say({})


async def work_on(name: str, place: Place, lines: Iterator[dict[str, Any]]) -> None:
    """Open one contender and give it its turns, until it is closed."""
    async with find(name)(place) as act:
        say({})
        for asked in lines:
            if asked.get("close"):
                return
            say(await take_turn(act, place, asked))


async def take_turn(act: Act, place: Place, asked: dict[str, Any]) -> dict[str, Any]:
    """Do what was asked for."""
    for _ in range(asked.get("warm_ups", 0)):
        await act.run(await act.before())
        await act.after()
    if asked.get("counts"):
        return {"requests": await count(act, place)}
    sample = await measure(act, times=asked["times"], watch_loop=asked.get("watch_loop", False))
    return dataclasses.asdict(sample)


async def count(act: Act, place: Place) -> dict[str, int]:
    """Return the requests of one act, by kind."""
    subject = await act.before()
    _stats(place)
    await act.run(subject)
    await act.after()
    requests: dict[str, int] = _stats(place)["requests"]
    return {kind: n for kind, n in requests.items() if kind != "connections"}


def _stats(place: Place) -> Any:
    import ssl  # noqa: PLC0415 - only where requests are counted

    context = None
    if place.ca_file is not None:
        context = ssl.create_default_context(cafile=str(place.ca_file))
    url = f"{place.endpoint_url}/__stats"
    with urllib.request.urlopen(url, context=context) as answer:  # noqa: S310 - the stub's
        return json.load(answer)


def why_not(exc: BaseException) -> dict[str, str]:
    """Tell a contender that cannot run here from one that failed."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    if isinstance(exc, ModuleNotFoundError) and (exc.name or "").partition(".")[0] in PEERS:
        return {"absent": "not installed"}
    return {"error": "".join(traceback.format_exception(exc))}


def main() -> None:
    """Read the arguments and work."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cpu", type=int, help="run on this one only")
    given = parser.parse_args()
    if given.cpu is not None:
        os.sched_setaffinity(0, {given.cpu})
    asyncio.run(work())


if __name__ == "__main__":
    main()
