"""Running groups: contenders take turns in rounds, the order rotates, each in its own process.

Whatever a child leaves (files, a database) is in a directory that goes with it; what it stored in
the stub is dropped after its turn or its group. A contender that fails is out of its group and
reported, and the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .place import Place
from .plan import PREPARE, Contender, Group, Scheme
from .servers import (
    AbsentError,
    Child,
    ChildError,
    Stub,
    make_certificate,
    running_child,
    running_stub,
)


@dataclasses.dataclass(slots=True)
class Result:
    """What a contender did in a group; one entry a round.

    Attributes:
        wall: seconds of an act, the median of the turn.
        cpu: seconds of an act.
        settle: seconds of the background work after an act.
        growth: bytes.
        stall: seconds.
        server_share: how much of the time the stub was busy; near 1 it is what is measured.
        requests: of one act, by kind.
        absent: why it did not run.
        error: how it failed.
    """

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    settle: list[float] = dataclasses.field(default_factory=list)
    growth: list[int] = dataclasses.field(default_factory=list)
    stall: list[float] = dataclasses.field(default_factory=list)
    server_share: list[float] = dataclasses.field(default_factory=list)
    requests: dict[str, int] | None = None
    absent: str | None = None
    error: str | None = None

    @property
    def is_running(self) -> bool:
        """Whether it takes part."""
        return self.absent is None and self.error is None

    def add(self, sample: Mapping[str, Any]) -> None:
        """Take the sample of one turn."""
        self.wall.append(statistics.median(sample["seconds"]))
        self.cpu.append(sample["cpu_seconds"])
        self.settle.append(statistics.median(sample["settle_seconds"]))
        if sample["growth_bytes"] is not None:
            self.growth.append(sample["growth_bytes"])
        if sample["stall_seconds"] is not None:
            self.stall.append(sample["stall_seconds"])


Results = dict[str, dict[str, Result]]


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """Where everything runs: the stubs, the interpreters, the cores.

    Attributes:
        shared: children for all contenders of a module, where nothing is measured.
    """

    stubs: Mapping[Scheme, Stub]
    environments: Mapping[str, str]
    client_cpu: int | None
    stack: contextlib.ExitStack
    shared: dict[str, Child] | None

    @contextlib.contextmanager
    def child(self, contender: Contender, place: Place) -> Iterator[Child]:
        """Open a contender in a child, of its own or shared.

        Raises:
            AbsentError: it cannot run here.
            ChildError: it failed.
        """
        with contextlib.ExitStack() as stack:
            if self.shared is None:
                child = self._start(contender, place.directory, stack)
            else:
                module = contender.function.partition(":")[0]
                child = self._shared(module, contender, self.shared)
            with child.opened(contender.function, place):
                yield child
        if child.process.returncode:  # its figures stand, but nobody should have to find out
            print(f"{contender.name}: ended with {child.process.returncode}", file=sys.stderr)

    def _shared(self, module: str, contender: Contender, shared: dict[str, Child]) -> Child:
        if module not in shared or shared[module].has_ended:
            directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
            shared[module] = self._start(contender, directory, self.stack)
        return shared[module]

    def _start(self, contender: Contender, directory: Path, stack: contextlib.ExitStack) -> Child:
        python = sys.executable
        if contender.environment is not None:
            python = self.environments.get(contender.environment, "")
            if not Path(python).is_file():
                raise AbsentError("not installed")
        return stack.enter_context(running_child(directory, python=python, cpu=self.client_cpu))


@contextlib.contextmanager
def machine(
    *, schemes: Sequence[Scheme], environments: Mapping[str, str], pins: bool, is_smoke: bool
) -> Iterator[Machine]:
    """Start the stubs; the first core is theirs, the second one the children's."""
    server_cpu, client_cpu = (0, 1) if pins else (None, None)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stubs: dict[Scheme, Stub] = {}
        for scheme in schemes:
            certificate = ca_file = None
            if scheme == "https":
                certificate, ca_file = make_certificate(directory)
            stub = running_stub(
                certificate=certificate, ca_file=ca_file, verify=is_smoke, cpu=server_cpu
            )
            stubs[scheme] = stack.enter_context(stub)
        yield Machine(stubs, environments, client_cpu, stack, {} if is_smoke else None)


def run_group(group: Group, on: Machine) -> dict[str, Result]:
    """Let the contenders of a group take their turns."""
    stub = on.stubs[group.scheme]
    results = {contender.name: Result() for contender in group.contenders}
    stub.configure(latency_ms=0, megabytes_per_second=0)
    try:
        uri = _upload(group, on) if group.needs_object else None
    except ChildError as exc:
        return {name: Result(error=f"nothing to read: {exc}") for name in results}
    stub.configure(latency_ms=group.latency_ms, megabytes_per_second=group.megabytes_per_second)
    runner = _run_fresh if group.is_fresh else _run_kept
    runner(group, on, uri, results)
    stub.forget()
    return results


def _upload(group: Group, on: Machine) -> str:
    """Upload what the contenders read, from a process that is none of theirs."""
    with _place(group, on, None) as place, on.child(PREPARE, place) as child:
        uri: str = child.ask(times=1)["result"]
    return uri


@contextlib.contextmanager
def _place(
    group: Group, on: Machine, uri: str | None, *, stream_bytes: int | None = None
) -> Iterator[Place]:
    stub = on.stubs[group.scheme]
    with tempfile.TemporaryDirectory() as directory:
        yield Place(
            endpoint_url=stub.url,
            ca_file=stub.ca_file,
            directory=Path(directory),
            columns=group.columns,
            blob_bytes=group.blob_bytes,
            stream_bytes=stream_bytes or group.stream_bytes,
            rows=group.rows,
            batch_rows=group.batch_rows,
            uri=uri,
        )


@contextlib.contextmanager
def _out_if_it_fails(result: Result) -> Iterator[None]:
    try:
        yield
    except AbsentError as exc:
        result.absent = str(exc)
    except ChildError as exc:
        result.error = str(exc)


def _turn(child: Child, contender: Contender, group: Group, result: Result) -> None:
    times = max(group.times // 4, 1) if contender.is_slow else group.times
    warm_ups = min(group.warm_ups, 1) if contender.is_slow else group.warm_ups
    result.add(child.ask(times=times, warm_ups=warm_ups, watch_loop=group.watches_loop))


def _rounds(group: Group) -> Iterator[Contender]:
    """Yield whose turn it is; the order rotates, and slow ones take every fourth turn."""
    for number in range(group.rounds):
        turn = number % len(group.contenders)
        for contender in (*group.contenders[turn:], *group.contenders[:turn]):
            if not contender.is_slow or number % 4 == 0:
                yield contender


def _run_fresh(group: Group, on: Machine, uri: str | None, results: dict[str, Result]) -> None:
    for contender in _rounds(group):
        result = results[contender.name]
        if not result.is_running:
            continue
        with (
            _out_if_it_fails(result),
            _place(group, on, uri, stream_bytes=contender.stream_bytes) as place,
            on.child(contender, place) as child,
        ):
            before = on.stubs[group.scheme].cpu_seconds()
            _turn(child, contender, group, result)
            used = on.stubs[group.scheme].cpu_seconds() - before
            result.server_share.append(used / (result.wall[-1] * group.times))
            if group.counts:
                result.requests = child.ask(counts=True)["requests"]
        if not group.needs_object:
            on.stubs[group.scheme].forget()


def _run_kept(group: Group, on: Machine, uri: str | None, results: dict[str, Result]) -> None:
    with contextlib.ExitStack() as stack:
        children: dict[str, Child] = {}
        for contender in group.contenders:
            with _out_if_it_fails(results[contender.name]), contextlib.ExitStack() as opening:
                place = opening.enter_context(_place(group, on, uri))
                children[contender.name] = opening.enter_context(on.child(contender, place))
                stack.push(opening.pop_all())
        for contender in _rounds(group):
            result = results[contender.name]
            if result.is_running:
                with _out_if_it_fails(result):
                    _turn(children[contender.name], contender, group, result)
        for name, result in results.items():
            if group.counts and result.is_running:
                with _out_if_it_fails(result):
                    result.requests = children[name].ask(counts=True)["requests"]
