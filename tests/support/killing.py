"""Kill tests: a nursery whose children die, and a ward where both stores are compared afterwards.

The comparison trusts nobody: what must be committed was told by the child before it died, what an
object must hold stands in its row, and what is there is listed. Nothing is compared before all
that the dead child has sent took effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from aioblobcol._check import FindingKind
from aioblobcol._uri import marker_uri, split_s3_uri
from aioblobcol.testing import MemoryStore, S3Server

from .killed_programs import ALIVE, PREFIX, Contents, Place, bytes_of, open_engine
from .s3_proxy import Forward, Request, S3Proxy, s3_proxy

Hear = Callable[[Mapping[str, Any]], None]


class Nursery:
    """The warm process; see `support.nursery`."""

    def __init__(self) -> None:
        here = Path(__file__).parents[1]
        paths = [str(here), *(path for path in sys.path if path)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.nursery"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    async def obey(self, order: Mapping[str, Any], hear: Hear) -> int:
        """Have a child run, and return how it ended; *hear* what it tells."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        while line := await asyncio.to_thread(self._process.stdout.readline):
            told = json.loads(line)
            if "ended" in told:
                return int(told["ended"])
            hear(told)
        raise AssertionError("the nursery has ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def open_nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    try:
        yield nursery
    finally:
        nursery.close()


@dataclasses.dataclass
class LastWords:
    """What programs have told.

    Attributes:
        committed: of each, the contents of its rows as the last COMMIT that was answered left them.
        possible: and as the COMMIT would that was under way.
        planted: objects that were made past the journal.
        inside: those that were staged in the session's own transaction (SQLite).
        killed_at: the step.
        steps: how many there are, of a program that was not killed.
    """

    committed: dict[str, Contents] = dataclasses.field(default_factory=dict)
    possible: dict[str, Contents] = dataclasses.field(default_factory=dict)
    planted: set[str] = dataclasses.field(default_factory=set)
    inside: set[str] = dataclasses.field(default_factory=set)
    pid: int | None = None
    has_begun: bool = False
    killed_at: str = ""
    steps: int = 0
    error: str = ""
    ended: int = 0
    requests: int = 0

    def hear(self, told: Mapping[str, Any]) -> None:
        if "maybe" in told:
            self.possible[told["who"]] = told["maybe"]
        elif "committed" in told:
            self.committed[told["who"]] = told["committed"]
        self.planted.update(told.get("planted", ()))
        self.inside.update(told.get("inside", ()))
        self.pid = told.get("pid", self.pid)
        self.has_begun = told.get("begun", self.has_begun)
        self.killed_at = told.get("killed", self.killed_at)
        self.steps = told.get("steps", self.steps)
        self.error = told.get("error", self.error)

    @property
    def was_killed(self) -> bool:
        return self.ended == -signal.SIGKILL

    @property
    def permitted(self) -> set[str]:
        """What may be left though no journal lists it: only if the session had no time to end."""
        return self.inside if self.was_killed else set()

    def contradictions(self, says: Contents) -> list[str]:
        """Return how the rows of programs differ from all that they may be."""
        found = []
        for who in self.possible or [""]:
            own = {cell: text for cell, text in says.items() if cell.startswith(who)}
            committed = self.committed.get(who, {})
            if own not in (committed, self.possible.get(who, committed)):
                found.append(f"ROWS of {who!r} are {own}, committed was {committed}")
        return found


@dataclasses.dataclass
class Figures:
    """What a series of kills came to.

    Attributes:
        runs: programs, killed or not.
        kills: of them, with SIGKILL.
        left_uploads: kills after which an upload was left that only the check finds.
        left_unlisted: kills after which an object was left that no journal lists: where
            invariant 2 permits it.
        failures: what must not be.
    """

    runs: int = 0
    kills: int = 0
    left_unlisted: int = 0
    left_uploads: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.runs} runs, {self.kills} kills, {self.left_unlisted} left an orphan that only "
            f"`check` finds, {self.left_uploads} such an upload, {len(self.failures)} failures"
        )


class Comparison:
    """One database and one bucket: compared, and empty again afterwards."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.figures = Figures()

    async def compare(self, words: LastWords) -> list[str]:
        """Drain, return what is wrong, and leave both stores empty."""
        try:
            return await self._compare(words)
        finally:
            await self._wipe()

    async def _compare(self, words: LastWords) -> list[str]:
        place = self.place
        async with place.engine.connect() as connection:
            named, says = await place.cells(connection)
        listed = await place.listed()
        failures = words.contradictions(says)
        failures += [f"LIVE and listed: {uri}" for uri in named.values() if uri in listed]
        await self._drain()
        objects = await self._objects()
        failures += losses(named, says, objects)
        failures += [
            f"JOURNAL lists {uri}: {state}" for uri, state in (await place.listed()).items()
        ]
        orphans = set(objects) - set(named.values())
        failures += [f"LEAK of {uri}" for uri in orphans - words.planted - words.permitted]
        self.figures.left_unlisted += not orphans.isdisjoint(words.permitted)
        failures += await self._look_at_uploads(words)
        if orphans:
            found = [finding async for finding in place.check().findings()]
            if {each.uri for each in found if each.kind is FindingKind.ORPHAN} != orphans:
                failures.append(f"CHECK found {found}, not {orphans}")
            await self._drain()
            if set(await self._objects()) != set(named.values()):
                failures.append(f"CHECK left {await self._objects()}")
        return failures

    async def _look_at_uploads(self, words: LastWords) -> list[str]:
        """Return what is wrong with incomplete uploads; the check finds those without parts."""
        store, failures = self.place.store, []
        left = [upload async for upload in store.iter_uploads()]
        for upload in left:
            bucket, key = split_s3_uri(upload.uri)
            answer = await store.client.list_parts(
                Bucket=bucket, Key=key, UploadId=upload.upload_id
            )
            if answer.get("Parts") and upload.uri not in words.permitted:
                failures.append(f"LEAK of parts of {upload.uri}")
        if left:
            self.figures.left_uploads += 1
            found = [finding async for finding in self.place.check().findings()]
            kinds = {each.kind for each in found}
            if kinds != {FindingKind.INCOMPLETE_UPLOAD} or len(found) != len(left):
                failures.append(f"CHECK found {found}, not {left}")
            failures += [f"CHECK left {each}" async for each in store.iter_uploads()]
        return failures

    async def _drain(self) -> None:
        await self.place.let_days_pass()
        for report in await self.place.worker().drain():
            assert not report.failed

    async def _objects(self) -> dict[str, str]:
        """List the objects of rows, with the MD5 of what they hold."""
        store = self.place.store
        if isinstance(store, MemoryStore):
            found = {uri: md5(each.body) for uri, each in store.objects.items()}
        else:
            page = await store.client.list_objects_v2(Bucket=store.bucket)
            assert not page["IsTruncated"]
            found = {
                f"s3://{store.bucket}/{each['Key']}": each["ETag"].strip('"')
                for each in page.get("Contents", ())
            }
            for uri, etag in found.items():
                if "-" in etag:  # of an object that was uploaded in parts it is no MD5 of the whole
                    found[uri] = md5(await store.get(uri))
        found.pop(marker_uri(store.bucket, store.prefix), None)
        return found

    async def _wipe(self) -> None:
        place = self.place
        async with place.engine.begin() as connection:
            for table in (place.Task, place.Doc, place.journal.table):
                await connection.execute(sa.delete(table))
        if objects := await self._objects():
            await place.store.delete_many(list(objects))


class Ward(Comparison):
    """Where children of the nursery die."""

    def __init__(self, url: str, place: Place, proxy: S3Proxy, nursery: Nursery) -> None:
        super().__init__(place)
        self._url = url
        self._proxy = proxy
        self._nursery = nursery

    async def run(self, program: str, *, wire: int | None = None, **order: Any) -> LastWords:
        """Run a program, killed or not, and compare the stores.

        Args:
            program: its name.
            wire: kill it when so many requests have arrived; the last of them takes effect.
            order: when the nursery or the child itself kills; see `support.nursery`.
        """
        words = LastWords()
        self._proxy.rule = self._rule(words, wire)
        whole = {
            "program": program,
            "url": self._url,
            "endpoint_url": self._proxy.endpoint_url,
            "bucket": self.place.store.bucket,
            **order,
        }
        words.ended = await self._nursery.obey(whole, words.hear)
        await self._wait_for_the_dead()
        failures = await self.compare(words)
        if words.error or words.ended not in {0, -signal.SIGKILL}:
            failures.append(f"it ended with {words.ended}: {words.error}")
        when = {**order, **({} if wire is None else {"wire": wire})}
        place = f"{program} on {self.place.engine.dialect.name} {when} {words.killed_at}"
        self.figures.failures += [f"{place}: {failure}" for failure in failures]
        self.figures.runs += 1
        self.figures.kills += words.was_killed
        assert words.was_killed or not failures, failures
        return words

    def _rule(self, words: LastWords, wire: int | None) -> Any:
        async def rule(_request: Request, forward: Forward) -> bytes:
            words.requests += words.has_begun
            if words.requests == wire and words.pid is not None:
                os.kill(words.pid, signal.SIGKILL)  # it waits for our answer
                words.killed_at = f"{_request.method} on the wire"
            return await forward()

        return rule

    async def _wait_for_the_dead(self) -> None:
        await self._proxy.settled()
        if self.place.engine.dialect.name == "postgresql":
            async with (
                self.place.engine.begin() as connection
            ):  # each backend shares it till its end
                await connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({ALIVE})"))


def losses(named: Mapping[str, str], says: Contents, objects: Mapping[str, str]) -> list[str]:
    """Return the cells whose object is missing or holds something else, or is another's too."""
    found = [
        f"LOSS: {cell} says {says[cell]!r}, names nothing" for cell in says if cell not in named
    ]
    for cell, uri in named.items():
        if objects.get(uri) != md5(bytes_of(says.get(cell, ""))):
            found.append(f"LOSS: {cell} names {uri}: {objects.get(uri, 'missing')}")
    uris = list(named.values())
    return found + [f"SHARED: {uri}" for uri in {uri for uri in uris if uris.count(uri) > 1}]


def md5(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


@contextlib.asynccontextmanager
async def open_ward(url: str, s3: S3Server, nursery: Nursery) -> AsyncIterator[Ward]:
    """Give empty tables with their journal, and an empty bucket."""
    bucket = f"killed-{uuid.uuid4().hex}"
    engine = open_engine(url, is_waited_for=False)
    async with s3.open_store(bucket=bucket, prefix=PREFIX) as store:
        await store.client.create_bucket(Bucket=bucket)
        async with s3_proxy(s3.endpoint_url) as proxy, open_tables(engine, store) as place:
            yield Ward(url, place, proxy, nursery)
    await engine.dispose()


@contextlib.asynccontextmanager
async def open_tables(engine: Any, store: Any) -> AsyncIterator[Place]:
    """Give a place whose tables are new and empty."""
    place = Place(engine, store)
    async with engine.begin() as connection:
        await connection.run_sync(place.metadata.drop_all)
        await connection.run_sync(place.metadata.create_all)
    yield place
    async with engine.begin() as connection:
        await connection.run_sync(place.metadata.drop_all)
