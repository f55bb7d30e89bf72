"""The frames: which objects a transaction of a managed session created and superseded.

Pure bookkeeping, one instance for each root transaction. A frame stands for a savepoint as the
database knows it: opened, released and rolled back when the database has answered SAVEPOINT,
RELEASE or ROLLBACK TO, whoever sent them. `_ledger` judges how the root ended and keeps the
books of the explicit strength, which has to find out from statements what is said here.

Invariants: a URI is recorded before its upload starts; a superseded URI is released only by the
root's certain commit; an unknown outcome releases nothing but what certainly no row names.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ._ledger import Settlement
from ._uri import object_marks
from .errors import Outcome

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from .errors import TransactionError


@dataclasses.dataclass(slots=True)
class _Frame:
    name: str
    written: dict[str, None] = dataclasses.field(default_factory=dict)
    superseded: dict[str, None] = dataclasses.field(default_factory=dict)
    noted: set[str] = dataclasses.field(default_factory=set)
    poison: TransactionError | None = None


class Frames:
    """The books of one root transaction.

    A savepoint's name is ``connection:name``. A session with several connections opens and ends
    its savepoints on all of them, one after the other: what ends the first one's ends them all.
    """

    def __init__(self) -> None:
        self._ended_with_another: set[str] = set()
        self._bound: set[str] = set()
        self._expected: set[str] = set()
        self._noted_before: set[str] = set()
        self._created: dict[str, None] = {}
        self._frames = [_Frame("")]
        self._kept: set[str] = set()

    @property
    def created(self) -> tuple[str, ...]:
        """Every object that was made, or attempted, in this transaction."""
        return tuple(self._created)

    @property
    def written(self) -> frozenset[str]:
        """Every new object that a statement has put into a row, or is about to."""
        return frozenset(uri for frame in self._frames for uri in frame.written)

    @property
    def superseded(self) -> frozenset[str]:
        """Every object that a row of this transaction has let go."""
        return frozenset(uri for frame in self._frames for uri in frame.superseded)

    @property
    def is_empty(self) -> bool:
        """Nothing is at stake."""
        return not self._created and not any(frame.superseded for frame in self._frames)

    @property
    def poison(self) -> TransactionError | None:
        """What forbids COMMIT."""
        return next((frame.poison for frame in self._frames if frame.poison is not None), None)

    # --- what happened

    def create(self, uri: str) -> None:
        """Record a new object, before its upload starts."""
        self._created[uri] = None

    def forget(self, uri: str) -> None:
        """The upload failed and was undone."""
        self._created.pop(uri, None)

    def write(self, uri: str) -> None:
        """A statement that puts a new object into a row is about to be sent."""
        self._frames[-1].written[uri] = None
        self._bound.add(uri)
        self._expected.update(object_marks(uri))

    def take_bound(self) -> set[str]:
        """Return what was written since the last call: by the statement that is sent now."""
        bound, self._bound = self._bound, set()
        return bound

    def withdraw(self, uris: Iterable[str]) -> None:
        """The statement that was to write these was not sent after all."""
        for uri in uris:
            self._frames[-1].written.pop(uri, None)
            self._bound.discard(uri)
            self._expected.difference_update(object_marks(uri))

    def strangers(self, marks: Iterable[str]) -> set[str]:
        """Return those of the `object_marks` in a statement that are not of its own blobs."""
        found: set[str] = set()
        for mark in marks:
            if mark in self._expected:
                self._expected.discard(mark)  # it stands there once
            else:
                found.add(mark)
        return found

    def note(self, marks: Iterable[str]) -> None:
        """A statement has put the objects of these marks into columns by their strings."""
        self._frames[-1].noted.update(marks)

    def note_before(self, marks: Iterable[str]) -> None:
        """A statement has done so before anything was at stake: no savepoint takes it back."""
        self._noted_before.update(marks)

    def supersede(self, uri: str) -> None:
        """A row has let an object go: it was read before and after the statement."""
        self._frames[-1].superseded[uri] = None

    def forbid_commit(self, error: TransactionError) -> None:
        """Have COMMIT refused, unless the savepoint that it happened in is rolled back."""
        self._frames[-1].poison = error

    def keep_noted(self, *, unless: Collection[str]) -> None:
        """Keep what a string names in a column that is not managed, such as an audit row's."""
        noted = self._noted_before.union(*(frame.noted for frame in self._frames))
        if noted:
            self.keep(
                uri
                for uri in self.superseded
                if uri not in unless and not noted.isdisjoint(object_marks(uri))
            )

    def keep(self, uris: Iterable[str]) -> None:
        """Another row may name these: they are not deleted as superseded, come what may."""
        self._kept.update(uris)

    # --- savepoints, by the names of the database

    def savepoint(self, name: str) -> None:
        """Open a savepoint."""
        self._ended_with_another.discard(name)
        self._frames.append(_Frame(name))

    def release(self, name: str) -> None:
        """Hand what a savepoint did to what is around it."""
        depth = self._depth(name)
        while depth is not None and len(self._frames) > depth:
            inner = self._frames.pop()
            self._frames[-1].written |= inner.written
            self._frames[-1].superseded |= inner.superseded
            self._frames[-1].noted |= inner.noted
            self._frames[-1].poison = self._frames[-1].poison or inner.poison
            self._note_end(inner, of=name)

    def roll_back_to(self, name: str) -> tuple[str, ...]:
        """Undo what a savepoint did, and return the new objects that no row names any more.

        It stays open, as in SQL. One that was set before these books were opened undoes all.
        """
        if name in self._ended_with_another:
            return ()
        depth = self._depth(name)
        undone = self._frames[depth or 0 :]
        for frame in undone:
            self._note_end(frame, of=name)
        self._frames = self._frames[: depth or 0]
        self._frames.append(_Frame(name if depth else ""))
        left = {uri for frame in self._frames for uri in frame.written}
        return tuple(uri for frame in undone for uri in frame.written if uri not in left)

    def _note_end(self, frame: _Frame, *, of: str) -> None:
        if frame.name and frame.name.partition(":")[0] != of.partition(":")[0]:
            self._ended_with_another.add(frame.name)

    def _depth(self, name: str) -> int | None:
        for depth in range(len(self._frames) - 1, 0, -1):
            if self._frames[depth].name == name:
                return depth
        return None

    # --- the verdict

    def settle(self, outcome: Outcome) -> Settlement:
        """Say what may be deleted now that the root transaction has ended."""
        written = {uri: None for frame in self._frames for uri in frame.written}
        superseded = {uri: None for frame in self._frames for uri in frame.superseded}
        if outcome is Outcome.ROLLED_BACK:
            return Settlement(tuple(self._created), (), (), ())
        unwritten = tuple(uri for uri in self._created if uri not in written)
        if outcome is Outcome.UNKNOWN:
            return Settlement(unwritten, (), tuple(written), tuple(superseded))
        return Settlement(
            compensate=unwritten,
            supersede=tuple(uri for uri in superseded if uri not in self._kept),
            undecided_created=(),
            undecided_superseded=(),
            kept=tuple(uri for uri in superseded if uri in self._kept),
        )
