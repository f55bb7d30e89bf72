"""The journal's protocol as a model that is explored exhaustively: every order, a crash anywhere.

Two writers put objects of their own into one row, a worker reclaims (without lease: at any moment),
a check condemns what it believes to be an orphan, and requests that were given up take effect late.
The steps have the names of the code. Leaving out one of the `RULES` is how a test shows that it is
needed.

What the model does not have: clocks (the quarantine is an oracle that knows whether a request is
still under way), isolation levels, swaps, TRUNCATE, failover.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

RULES = {
    "stage first": "the entry is committed before the object can exist",
    "adopt what is listed": "a row takes over only what the journal lists",
    "deleting refuses": "what is being deleted is not adopted",
    "rows are locked": "adoption and condemnation exclude each other",
    "the journal decides": "after a lost COMMIT only the journal says what may be deleted",
    "deleting is terminal": "a DELETE that timed out does not make its object adoptable again",
    "quarantine": "an object without a row is deleted again when no request can be under way",
    "check condemns": "check enters an orphan as deleting, so that it is never adopted",
    "check asks again": "check reads the rows again after it has entered an orphan",
    "worker asks rows": "rows are asked before a staged object is condemned, by whomever",
}

OLD, NEW = "old", ("new 1", "new 2")
State = Literal["staged", "retired", "deleting"]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What the journal lists. `was_staged`: it was never in a row, as far as is known."""

    state: State
    was_staged: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Transaction:
    """What somebody has done and not committed; it holds the locks of what it touches."""

    row: str | None = None
    adopted: str | None = None
    retired: str | None = None
    entered: str | None = None

    @property
    def touches(self) -> frozenset[str]:
        """The entries that are locked."""
        return frozenset(
            uri for uri in (self.adopted, self.retired, self.entered) if uri is not None
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Actor:
    """Where somebody is in his program, and what he remembers."""

    at: str
    transaction: Transaction | None = None
    memory: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """One moment."""

    row: str
    objects: frozenset[str]
    entries: frozenset[tuple[str, Entry]]
    late: frozenset[tuple[str, str]]  # requests that were given up: "put" or "delete", and the URI
    actors: tuple[tuple[str, Actor], ...]

    def entry(self, uri: str) -> Entry | None:
        """Return what is committed about an object."""
        return dict(self.entries).get(uri)

    def listing(self, uri: str, entry: Entry | None) -> frozenset[tuple[str, Entry]]:
        """Return the entries with another one, or none, for *uri*."""
        left = {(each, what) for each, what in self.entries if each != uri}
        return frozenset(left if entry is None else {*left, (uri, entry)})

    def actor(self, name: str) -> Actor:
        """Return somebody."""
        return dict(self.actors)[name]

    def with_actor(self, name: str, actor: Actor, **changes: Any) -> World:
        """Return the world after a step of somebody."""
        actors = tuple((each, actor if each == name else was) for each, was in self.actors)
        return dataclasses.replace(self, actors=actors, **changes)

    def is_locked(self, uri: str, *, by_others_than: str) -> bool:
        """Tell whether somebody else's open transaction touches an entry."""
        return any(
            actor.transaction is not None and uri in actor.transaction.touches
            for name, actor in self.actors
            if name != by_others_than
        )

    def row_is_locked(self, *, by_others_than: str) -> bool:
        """Tell whether somebody else's open transaction has changed the row."""
        return any(
            actor.transaction is not None and actor.transaction.row is not None
            for name, actor in self.actors
            if name != by_others_than
        )


Step = tuple[str, World]


class Model:
    """The protocol, with all rules or without some."""

    def __init__(
        self,
        *,
        without: Iterable[str] = (),
        writers: int = 2,
        has_check: bool = True,
        bypasses: bool = False,
        restores: bool = False,
    ) -> None:
        """Say who takes part.

        Args:
            without: rules that are left out.
            writers: how many.
            has_check: whether ``check --delete`` runs beside them.
            bypasses: the first writer's statement goes past the triggers.
            restores: the last writer brings the old object back in place of a new one.
        """
        unknown = set(without) - RULES.keys()
        assert not unknown, unknown
        self._rules = RULES.keys() - set(without)
        self._writers = [f"writer {n + 1}" for n in range(writers)]
        self._has_check = has_check
        self._bypasses = bypasses
        self._restores = restores

    def start(self) -> World:
        """Return the first moment: the row names the old object."""
        actors = [(name, Actor("stage")) for name in self._writers]
        if self._restores:
            actors[-1] = (self._writers[-1], Actor("adopt"))
        actors.append(("worker", Actor("idle")))
        if self._has_check:
            actors.append(("check", Actor("list")))
        return World(OLD, frozenset({OLD}), frozenset(), frozenset(), tuple(actors))

    def steps(self, world: World) -> Iterator[Step]:
        """Yield every step that may be next."""
        for number, name in enumerate(self._writers):
            uri = NEW[number]
            if self._restores and name == self._writers[-1]:
                uri = OLD
            yield from self._writer(world, name, uri, bypasses=self._bypasses and number == 0)
        yield from self._worker(world)
        if self._has_check:
            yield from self._check(world)
        for verb, uri in world.late:
            objects = world.objects | {uri} if verb == "put" else world.objects - {uri}
            yield (
                f"late {verb} of {uri}",
                dataclasses.replace(world, objects=objects, late=world.late - {(verb, uri)}),
            )

    # --- a writer: stage, put, adopt, retire, commit, settle

    def _writer(self, world: World, name: str, uri: str, *, bypasses: bool) -> Iterator[Step]:
        me = world.actor(name)
        if me.at == "done":
            return
        # killed: the database rolls back, nobody settles
        yield f"{name} is killed", world.with_actor(name, Actor("done"))
        stages_first = "stage first" in self._rules
        if me.at == "stage":
            if stages_first:
                yield self._stage(world, name, uri, then="put")
            else:
                yield from self._put(world, name, uri, then="stage late")
        elif me.at == "stage late":
            yield self._stage(world, name, uri, then="adopt")
        elif me.at == "put":
            yield from self._put(world, name, uri, then="adopt")
        elif me.at == "adopt":
            yield from self._adopt(world, name, uri, bypasses=bypasses)
        elif me.at == "commit":
            yield from self._commit(world, name, uri)
        elif me.at == "settle":
            yield from self._settle(world, name, uri)
        elif me.at == "delete":
            yield from self._delete(world, name, uri, then="done", is_sure=False)

    def _stage(self, world: World, name: str, uri: str, *, then: str) -> Step:
        entries = world.entries
        if world.entry(uri) is None:
            entries = world.listing(uri, Entry("staged", was_staged=True))
        return f"{name} stages", world.with_actor(name, Actor(then), entries=entries)

    def _put(self, world: World, name: str, uri: str, *, then: str) -> Iterator[Step]:
        yield (
            f"{name} puts",
            world.with_actor(name, Actor(then), objects=world.objects | {uri}),
        )
        yield (
            f"{name} puts, without an answer",
            world.with_actor(name, Actor("settle"), late=world.late | {("put", uri)}),
        )

    def _adopt(self, world: World, name: str, uri: str, *, bypasses: bool) -> Iterator[Step]:
        if world.row_is_locked(by_others_than=name):
            return  # waits
        locks = "rows are locked" in self._rules
        if bypasses:
            transaction = Transaction(row=uri)
            yield f"{name} writes past the triggers", self._open(world, name, transaction)
            return
        old = world.row
        if locks and any(world.is_locked(each, by_others_than=name) for each in (uri, old)):
            return  # waits
        entry = world.entry(uri)
        is_listed = entry is not None
        is_dying = entry is not None and entry.state == "deleting"
        is_refused = (not is_listed and "adopt what is listed" in self._rules) or (
            is_dying and "deleting refuses" in self._rules
        )
        if is_refused or old == uri:
            yield f"{name} is refused", world.with_actor(name, Actor("settle"))
            return
        transaction = Transaction(row=uri, adopted=uri, retired=old)
        yield f"{name} adopts and retires", self._open(world, name, transaction)

    @staticmethod
    def _open(world: World, name: str, transaction: Transaction) -> World:
        return world.with_actor(name, Actor("commit", transaction))

    def _commit(self, world: World, name: str, uri: str) -> Iterator[Step]:
        transaction = world.actor(name).transaction
        assert transaction is not None
        assert transaction.row is not None
        entries = world.entries
        if transaction.adopted is not None:
            entries = world.listing(transaction.adopted, None)
        if transaction.retired is not None and transaction.retired not in dict(entries):
            entries = entries | {(transaction.retired, Entry("retired"))}
        done = {"row": transaction.row, "entries": entries}
        yield f"{name} commits", world.with_actor(name, Actor("done"), **done)
        yield (
            f"{name} commits, without an answer",
            world.with_actor(name, Actor("settle", memory=("unknown",)), **done),
        )
        yield f"{name} rolls back", world.with_actor(name, Actor("settle"))

    def _settle(self, world: World, name: str, uri: str) -> Iterator[Step]:
        """Condemn what is still staged; without the journal's word, what is believed to be."""
        if "the journal decides" not in self._rules:
            yield f"{name} trusts its memory", world.with_actor(name, Actor("delete"))
            return
        entry = world.entry(uri)
        if world.is_locked(uri, by_others_than=name):
            yield f"{name} leaves it", world.with_actor(name, Actor("done"))
        elif entry is None or entry.state != "staged":
            yield f"{name} has nothing to settle", world.with_actor(name, Actor("done"))
        elif self._is_named(world, uri):
            entries = world.listing(uri, None)
            yield (
                f"{name} finds it in a row",
                world.with_actor(name, Actor("done"), entries=entries),
            )
        else:
            entries = world.listing(uri, Entry("deleting", was_staged=True))
            yield (
                f"{name} condemns",
                world.with_actor(name, Actor("done"), entries=entries),
            )

    # --- the worker: condemn, delete, forget

    def _worker(self, world: World) -> Iterator[Step]:
        me = world.actor("worker")
        if me.at == "idle":
            for uri, entry in world.entries:
                locks = "rows are locked" in self._rules
                if locks and world.is_locked(uri, by_others_than="worker"):
                    continue  # skips
                if entry.state == "staged" and self._is_in_bypass(world, uri):
                    continue  # the lease outlives whoever writes past the triggers
                if entry.state == "staged" and self._is_named(world, uri):
                    yield (
                        f"worker finds {uri} in a row",
                        dataclasses.replace(world, entries=world.listing(uri, None)),
                    )
                    continue
                condemned = Entry("deleting", entry.was_staged)
                yield (
                    f"worker condemns {uri}",
                    world.with_actor(
                        "worker",
                        Actor("delete", memory=(uri, entry.was_staged)),
                        entries=world.listing(uri, condemned),
                    ),
                )
            return
        uri, was_staged = me.memory
        yield "worker is killed, another one starts", world.with_actor("worker", Actor("idle"))
        if me.at == "delete":
            yield from self._delete(world, "worker", uri, then="forget", is_sure=was_staged)
        elif me.at == "forget":
            yield (
                f"worker forgets {uri}",
                world.with_actor("worker", Actor("idle"), entries=world.listing(uri, None)),
            )

    def _is_in_bypass(self, world: World, uri: str) -> bool:
        return self._bypasses and uri == NEW[0] and world.actor(self._writers[0]).at != "done"

    def _is_named(self, world: World, uri: str) -> bool:
        return "worker asks rows" in self._rules and world.row == uri

    def _delete(
        self, world: World, name: str, uri: str, *, then: str, is_sure: bool
    ) -> Iterator[Step]:
        me = world.actor(name)
        waits = is_sure and "quarantine" in self._rules and self._may_be_put(world, uri)
        after = Actor(then, memory=me.memory)
        if waits:  # the object is deleted now and once more when the request is over
            after = Actor("idle")
        yield (
            f"{name} deletes {uri}",
            world.with_actor(name, after, objects=world.objects - {uri}),
        )
        entries = world.entries
        entry = world.entry(uri)
        if "deleting is terminal" not in self._rules and entry is not None:
            entries = world.listing(uri, Entry("retired", entry.was_staged))
        yield (
            f"{name} deletes {uri}, without an answer",
            world.with_actor(
                name,
                Actor("idle" if name == "worker" else "done"),
                late=world.late | {("delete", uri)},
                entries=entries,
            ),
        )

    def _may_be_put(self, world: World, uri: str) -> bool:
        """Tell what the quarantine waits for: a request, or a writer that has not sent it yet."""
        is_under_way = ("put", uri) in world.late
        return is_under_way or any(
            world.actor(name).at == "put" and NEW[number] == uri
            for number, name in enumerate(self._writers)
        )

    # --- check --delete: list, read, enter, ask again, commit

    def _check(self, world: World) -> Iterator[Step]:
        me = world.actor("check")
        if me.at == "list":
            for uri in world.objects:
                yield (
                    f"check lists {uri}",
                    world.with_actor("check", Actor("read rows", memory=(uri,))),
                )
        elif me.at == "read rows":
            (uri,) = me.memory
            after = Actor("done") if world.row == uri else Actor("read journal", memory=(uri,))
            yield f"check finds {uri} in no row", world.with_actor("check", after)
        elif me.at == "read journal":
            (uri,) = me.memory
            is_listed = world.entry(uri) is not None
            after = Actor("done") if is_listed else Actor("enter", memory=(uri,))
            yield f"check looks {uri} up in the journal", world.with_actor("check", after)
        elif me.at == "enter":
            (uri,) = me.memory
            if world.is_locked(uri, by_others_than="check"):
                return  # waits for the index
            if world.entry(uri) is not None:
                yield f"check finds {uri} listed", world.with_actor("check", Actor("done"))
                return
            transaction = Transaction(entered=uri)
            yield (
                f"check enters {uri}",
                world.with_actor("check", Actor("ask", transaction, memory=(uri,))),
            )
        elif me.at == "ask":
            (uri,) = me.memory
            asks = "check asks again" in self._rules
            if asks and world.row == uri:
                yield f"check takes {uri} back", world.with_actor("check", Actor("done"))
                return
            state: State = "deleting" if "check condemns" in self._rules else "retired"
            yield (
                f"check condemns {uri}",
                world.with_actor(
                    "check",
                    Actor("done"),
                    entries=world.listing(uri, Entry(state, was_staged=True)),
                ),
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, and how it came to it."""

    what: str
    trace: tuple[str, ...]


def explore(
    model: Model, *, stops_at: Iterable[str] = ("neither",), limit: int = 2_000_000
) -> tuple[int, dict[str, Finding]]:
    """Visit every state; return how many there are, and the first LOSS and LEAK with its trace.

    Args:
        model: the protocol.
        stops_at: stop once all of these were found.
        limit: of states.
    """
    start = model.start()
    came_from: dict[World, tuple[World, str] | None] = {start: None}
    queue = deque([start])
    found: dict[str, Finding] = {}
    while queue and not found.keys() >= set(stops_at):
        world = queue.popleft()
        wrong = _judge(world, is_over=_is_over(world))
        if wrong is not None and wrong not in found:
            found[wrong] = Finding(wrong, _trace(came_from, world))
        for label, after in model.steps(world):
            if after not in came_from:
                came_from[after] = (world, label)
                queue.append(after)
        assert len(came_from) < limit, "the model has grown beyond what a test explores"
    return len(came_from), found


def _judge(world: World, *, is_over: bool) -> str | None:
    if world.row not in world.objects:
        return "LOSS"
    listed = {uri for uri, _ in world.entries}
    orphans = world.objects - listed - {world.row}
    return "LEAK" if is_over and orphans else None


def _is_over(world: World) -> bool:
    """Tell whether nothing but a check, which may not come, could find an orphan."""
    is_quiet = not world.entries and not world.late
    return is_quiet and all(
        actor.at in {"done", "idle"} for name, actor in world.actors if name != "check"
    )


def _trace(came_from: dict[World, tuple[World, str] | None], world: World) -> tuple[str, ...]:
    labels: list[str] = []
    before: Callable[[World], tuple[World, str] | None] = came_from.__getitem__
    step = before(world)
    while step is not None:
        world, label = step
        labels.append(label)
        step = before(world)
    return tuple(reversed(labels))
