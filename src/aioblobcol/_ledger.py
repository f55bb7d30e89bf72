"""The ledger: what each transaction of one session put into rows, and what that is worth.

Pure bookkeeping and judgement, no I/O: `_session` reports what happened, `_unit_of_work`
carries out the `Settlement`. Invariants: a URI is recorded before its upload starts; what was
written in a rolled-back savepoint was not written; a superseded object is released only by a
certain commit; an unknown outcome releases nothing, and what is once in doubt stays so.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

from ._statements import Evidence
from .errors import Outcome

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping


@dataclasses.dataclass(slots=True)
class Facts:
    """What was seen of one root transaction, the input of `judge`.

    Attributes:
        is_sqlite: SQLite can refuse COMMIT and keep the transaction open.
        autocommit: a connection was in AUTOCOMMIT: every statement is durable at once.
        foreign_control: COMMIT, ROLLBACK or DDL that commits was sent as a plain statement.
        prepared: PREPARE TRANSACTION was sent (two-phase).
        commit_sent: COMMIT is on its way, or was answered.
        commit_failed: COMMIT, or waiting for its answer, raised.
        acknowledged: COMMIT was answered without an error, on every connection.
        doubtful: a statement failed after which none succeeded, and no probe was sent.
        refused: the server answered COMMIT with an error that means "rolled back".
        answered: the server answered COMMIT with some error, on an intact connection.
        rollback_sent: ROLLBACK is on its way, or was answered.
        rollback_failed: ROLLBACK raised.
        still_open: SQLite's own word, read after ROLLBACK.
        connections: how many took part; two do not commit at one moment.
    """

    is_sqlite: bool = False
    autocommit: bool = False
    foreign_control: bool = False
    prepared: bool = False
    commit_sent: bool = False
    commit_failed: bool = False
    acknowledged: bool = False
    doubtful: bool = False
    refused: bool = False
    answered: bool = False
    rollback_sent: bool = False
    rollback_failed: bool = False
    still_open: bool | None = None
    connections: int = 0


def judge(facts: Facts) -> Outcome:  # noqa: PLR0911 - one line for each row of the table
    """Say what is certain about a root transaction; anything but certainty is UNKNOWN."""
    if facts.autocommit or facts.foreign_control:
        return Outcome.UNKNOWN
    if facts.acknowledged:
        # PostgreSQL answers COMMIT of a failed transaction without an error, and rolls back
        return Outcome.UNKNOWN if facts.doubtful else Outcome.COMMITTED
    if facts.prepared:
        return Outcome.UNKNOWN
    if not facts.commit_sent:
        in_doubt = facts.is_sqlite and (facts.rollback_failed or facts.still_open is True)
        return Outcome.UNKNOWN if in_doubt else Outcome.ROLLED_BACK
    if facts.connections > 1:
        return Outcome.UNKNOWN
    if facts.is_sqlite:
        # a refused COMMIT leaves the transaction open; only ROLLBACK and its own word end it
        is_over = facts.answered and not facts.rollback_failed and facts.still_open is False
        return Outcome.ROLLED_BACK if is_over else Outcome.UNKNOWN
    return Outcome.ROLLED_BACK if facts.refused else Outcome.UNKNOWN


def is_refusal(sqlstate: str | None) -> bool:
    """Tell whether this answer to COMMIT means that the transaction was certainly rolled back.

    Integrity constraint violations (23xxx) and transaction rollbacks (40xxx) do; 40003 is
    "statement completion unknown". Source: PostgreSQL documentation, appendix "Error Codes".
    """
    return sqlstate is not None and sqlstate != "40003" and sqlstate[:2] in {"23", "40"}


@dataclasses.dataclass(slots=True)
class _Frame:
    """A savepoint, or (without a name) the root transaction."""

    name: str | None
    written: dict[str, int] = dataclasses.field(default_factory=dict)
    unclear: dict[str, int] = dataclasses.field(default_factory=dict)
    unwritten: set[str] = dataclasses.field(default_factory=set)
    buried: set[str] = dataclasses.field(default_factory=set)  # were in a row that is gone
    released: dict[str, int] = dataclasses.field(default_factory=dict)
    likely: dict[str, int] = dataclasses.field(default_factory=dict)
    missed: set[str] = dataclasses.field(default_factory=set)  # a write of it found no row
    shared: set[str] = dataclasses.field(default_factory=set)
    mentioned: set[str] = dataclasses.field(default_factory=set)

    def absorb(self, inner: _Frame) -> None:
        for uri in inner.unwritten:
            self.written.pop(uri, None)
            self.unclear.pop(uri, None)
        self.unwritten |= inner.unwritten
        self.unwritten -= inner.written.keys()
        self.written.update(inner.written)
        self.unclear.update(inner.unclear)
        self.buried |= inner.buried
        self.released.update(inner.released)
        self.likely.update(inner.likely)
        self.missed = (self.missed | inner.missed) - inner.written.keys()
        self.shared |= inner.shared
        self.mentioned |= inner.mentioned


@dataclasses.dataclass(frozen=True, slots=True)
class Demand:
    """What speaks against a COMMIT: nothing, if both are empty."""

    unwritten: tuple[str, ...]
    unreleased: tuple[str, ...]
    shared: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Settlement:
    """What may be deleted now that the block is over.

    Attributes:
        compensate: new objects that certainly no row names.
        supersede: old objects that certainly no row names any more.
        undecided_created: new objects in doubt; left alone.
        undecided_superseded: old objects in doubt; left alone.
        kept: objects that a committed transaction leaves alone: not proved to be in a row, or
            to be gone from theirs.
    """

    compensate: tuple[str, ...]
    supersede: tuple[str, ...]
    undecided_created: tuple[str, ...]
    undecided_superseded: tuple[str, ...]
    kept: tuple[str, ...] = dataclasses.field(default=(), compare=False)


class Ledger:
    """The books of one `blob_transaction`."""

    def __init__(self, *, keeps_unwritten: bool = False) -> None:
        """Open the books.

        Args:
            keeps_unwritten: take the user's word that a new URI which went into no row that
                can be seen is in another one.
        """
        self._keeps_unwritten = keeps_unwritten
        self._replaces: dict[str, str | None] = {}  # every new URI, in order, and its old one
        self._deletes: dict[str, None] = {}
        self._columns: dict[str, str] = {}
        self._made_in: dict[str, Hashable] = {}  # the session's savepoint of each upload
        self._frames = [_Frame(None)]
        self._placed: Counter[str] = Counter()  # statements that may have put it into a row
        self._given_up: set[str] = set()
        self._doomed: set[str] = set()
        self._committed: dict[str, int] = {}
        self._committed_deletes: dict[str, int] = {}
        self._buried: set[str] = set()
        self._in_doubt: set[str] = set()
        self._kept: set[str] = set()
        self._rehomed: set[str] = set()
        self._clock = 0

    # --- what is to be done

    def create(
        self,
        uri: str,
        *,
        replaces: str | None,
        column: str = "",
        savepoint: Hashable = None,
    ) -> None:
        """Record a new object, before its upload starts.

        Args:
            uri: the object.
            column: the column that it is for.
            replaces: the old object of its cell.
            savepoint: the innermost savepoint of the session at this moment. It may not have
                been sent yet: SQLAlchemy sends SAVEPOINT with the first statement in it.
        """
        self._replaces[uri] = replaces
        self._columns[uri] = column
        self._made_in[uri] = savepoint

    def delete(self, uri: str) -> None:
        """Record an object whose row this transaction removes."""
        self._deletes[uri] = None

    def forget(self, uri: str) -> None:
        """The upload failed and was undone: there is nothing to be done about it."""
        del self._replaces[uri]
        del self._made_in[uri]

    def give_up(self, uri: str) -> None:
        """The upload failed: whatever is there is deleted in the end, whichever way it ends."""
        self._given_up.add(uri)

    def doom(self, uris: Collection[str]) -> None:
        """The block that made these failed: nothing demands them, what is unwritten goes."""
        self._doomed.update(self._replaces.keys() & uris)

    @property
    def watched(self) -> frozenset[str]:
        """The URIs whose statements matter."""
        if self.is_empty:
            return frozenset()
        old = {uri for uri in self._replaces.values() if uri is not None}
        return frozenset(self._replaces.keys() | old | self._deletes.keys())

    @property
    def is_empty(self) -> bool:
        """Nothing was ever recorded."""
        return not (self._replaces or self._deletes)

    # --- what happened

    def mentioned(self, named: Collection[str]) -> None:
        """A statement that names these is about to be sent, whatever it is."""
        self._frames[-1].mentioned.update(self._replaces.keys() & named)

    def wrote(
        self, named: Collection[str], evidence: Evidence, *, removes: bool, is_delete: bool = False
    ) -> None:
        """A statement that changes rows was answered.

        Args:
            named: the URIs that it named.
            evidence: what it proves about them.
            removes: afterwards the rows that it changed do not name their old URIs any more.
            is_delete: the rows are gone.
        """
        frame = self._frames[-1]
        self._clock += 1
        for uri in named:
            if uri in self._replaces:
                self._note_new(frame, uri, evidence, is_delete)
            # an UPDATE that names a new URI writes it, as far as we know
            is_removal = is_delete or (removes and uri not in self._replaces)
            if is_removal and uri in self._deletes and evidence is not Evidence.NOTHING:
                frame.released[uri] = self._clock

    def _note_new(self, frame: _Frame, uri: str, evidence: Evidence, is_delete: bool) -> None:
        if is_delete:
            if evidence is not Evidence.NOTHING:
                frame.written.pop(uri, None)
                frame.unclear.pop(uri, None)
                frame.unwritten.add(uri)
                if evidence is Evidence.CHANGED:
                    frame.buried.add(uri)
            return
        if evidence is Evidence.SEVERAL:
            frame.shared.add(uri)
        if evidence in {Evidence.CHANGED, Evidence.SEVERAL}:
            frame.unclear.pop(uri, None)
            frame.written[uri] = self._clock
            frame.unwritten.discard(uri)
            frame.missed.discard(uri)
        elif evidence is Evidence.NOTHING:
            frame.missed.add(uri)
        elif evidence is Evidence.LIKELY and self._replaces[uri] is None:
            frame.likely[uri] = self._clock  # nothing is deleted for it
        else:
            frame.unclear[uri] = self._clock

    def confirmed(self, uri: str) -> None:
        """A row was read that names *uri*, which an unclear statement had written."""
        for frame in self._frames:
            clock = frame.unclear.pop(uri, None)
            if clock is not None:
                frame.written[uri] = clock

    def confirmed_unwritten(self, uri: str) -> None:
        """The row that *uri* was written into was read, and names its old one."""
        for frame in self._frames:
            frame.written.pop(uri, None)
            frame.likely.pop(uri, None)
        self._frames[-1].unwritten.add(uri)

    def placed(self, uris: Iterable[str]) -> None:
        """A statement may have put these into some row, proved or not."""
        self._placed.update(self._replaces.keys() & set(uris))

    def confirmed_gone(self, uri: str) -> None:
        """The row that named *uri* was read, and does not name it any more.

        If more than one statement may have put it into a row, another one may have it still:
        then it only counts as not written.
        """
        if self._placed[uri] > 1:
            self.confirmed_unwritten(uri)
            return
        self.wrote([uri], Evidence.CHANGED, removes=True, is_delete=True)

    def rehomed(self, uris: Iterable[str]) -> None:
        """Strings were put into rows: an old URI among them is not deleted, come what may."""
        old = self.watched - self._replaces.keys()
        self._rehomed.update(old.intersection(uris))

    @property
    def deletes(self) -> frozenset[str]:
        """The objects whose rows are to be removed."""
        return frozenset(self._deletes)

    @property
    def columns(self) -> dict[str, set[str]]:
        """Columns that uploads are for, with their new and old objects."""
        columns: dict[str, set[str]] = {}
        for new, old in self._replaces.items():
            at_stake = columns.setdefault(self._columns[new], set())
            at_stake.update({new} if old is None else {new, old})
        return columns

    def database_gave_up(self) -> None:
        """The database rolled the transaction back by itself in the middle of it."""
        for frame in self._frames:
            self._forget_work(frame)

    # --- savepoints and ends

    def savepoint(self, name: str) -> None:
        """Open a savepoint."""
        self._frames.append(_Frame(name))

    def release(self, name: str) -> None:
        """Hand what a savepoint did to what is around it."""
        depth = self._depth(name)
        while depth is not None and len(self._frames) > depth:
            inner = self._frames.pop()
            self._frames[-1].absorb(inner)

    def rollback_to(self, name: str) -> None:
        """Undo what a savepoint did. It stays open, as in SQL."""
        depth = self._depth(name)
        if depth is None:  # a savepoint that was set before we looked: nothing is sure any more
            self.database_gave_up()
            return
        del self._frames[depth:]
        self._frames.append(_Frame(name))

    def savepoint_released(self, savepoint: Hashable, *, parent: Hashable) -> None:
        """The session released a savepoint: its uploads belong to what is around it."""
        for uri, made_in in self._made_in.items():
            if made_in == savepoint:
                self._made_in[uri] = parent

    def savepoint_rolled_back(self, savepoint: Hashable) -> None:
        """The session rolled a savepoint back: the uploads that were made in it go with it."""
        self._doomed |= {uri for uri, made in self._made_in.items() if made == savepoint}

    def end_root(self, outcome: Outcome, *, savepoints_held: bool = True) -> None:
        """A root transaction is over; the next statement begins another one.

        Args:
            outcome: what `judge` said.
            savepoints_held: False if it was no transaction at all, so that rolling back to a
                savepoint of it proves nothing.
        """
        root = self._frames[0]
        if self.is_empty:
            self._frames = [root]
            return
        for frame in self._frames[1:]:
            root.absorb(frame)
        self._frames = [root]
        if outcome is Outcome.COMMITTED:
            self._committed.update(self._written())
            self._buried |= root.buried
            self._committed_deletes.update(root.released)
            # what was sent, and is not proved to be in a row, may be in one that is not seen
            unproved = root.unclear.keys() | root.mentioned
            if self._keeps_unwritten:
                unproved |= self._replaces.keys() - self._lost()
            settled = self._committed.keys() | root.buried | root.released.keys()
            self._kept |= unproved - settled
        elif outcome is Outcome.UNKNOWN:
            if not savepoints_held:
                self._doomed.clear()
            self._in_doubt |= self._replaces.keys() - self._committed.keys() - self._lost()
            self._in_doubt |= self._deletes.keys() - self._committed_deletes.keys()
        self._forget_work(root)

    # --- verdicts

    def written(self) -> list[str]:
        """New URIs that certainly went into a row."""
        return sorted(self._written())

    def column_of(self, uri: str) -> str | None:
        """Return the column that a new URI was uploaded for."""
        return self._columns.get(uri)

    def replaced_by(self, uri: str) -> str | None:
        """Return the old URI of a new one."""
        return self._replaces.get(uri)

    @property
    def created(self) -> frozenset[str]:
        """The new URIs."""
        return frozenset(self._replaces)

    def unclear(self) -> list[str]:
        """New URIs that only statements without a row count have written."""
        written = self._written()
        unclear = {uri for frame in self._frames for uri in frame.unclear}
        return sorted(unclear - written.keys())

    def demand(self) -> Demand:
        """Say what the transaction has not done that its results say it does."""
        written = self._written()
        replaced_here = set(self._replaces.values()) | self._deletes.keys()
        root = self._together()
        settled = (
            self._committed.keys()
            | self._lost()
            | self._in_doubt
            | self._kept
            | replaced_here
            | root.buried
        )
        done = self._committed_deletes.keys() | self._in_doubt | root.released.keys()
        return Demand(
            unwritten=tuple(
                uri for uri in self._replaces if uri not in written and uri not in settled
            ),
            unreleased=tuple(uri for uri in self._deletes if uri not in done),
            shared=tuple(sorted(root.shared)),
        )

    def settle(self) -> Settlement:
        """Say what may be deleted, after the last root transaction ended."""
        doubt = self._in_doubt
        certain = {uri: at for uri, at in self._committed.items() if uri not in doubt}
        kept = self._rehomed | doubt | self._kept
        # a row that was written and then deleted named what it replaced for the last time, too
        final = [*certain, *(uri for uri in self._buried if uri not in certain and uri not in kept)]
        released = [old for new in final for old in self._replaced_by(new, certain, kept)]
        gone = self._committed_deletes
        released += [uri for uri in gone if certain.get(uri, 0) < gone[uri]]
        supersede = [uri for uri in dict.fromkeys(released) if uri not in kept]
        compensate = [
            uri
            for uri in self._replaces
            if uri not in kept and uri not in certain and uri not in supersede
        ]
        return Settlement(
            compensate=tuple(compensate),
            supersede=tuple(supersede),
            undecided_created=tuple(uri for uri in self._replaces if uri in doubt),
            undecided_superseded=tuple(
                dict.fromkeys(
                    [old for new, old in self._replaces.items() if old and new in doubt]
                    + [uri for uri in self._deletes if uri in doubt]
                )
            ),
            kept=tuple(sorted((kept | self._deletes.keys()) - doubt - set(supersede))),
        )

    def doubt(self) -> Settlement:
        """Say what would be left alone if the root transaction under way ended unknown."""
        created = tuple(u for u in self._replaces if u not in self._lost())
        old = [uri for uri in self._replaces.values() if uri is not None]
        return Settlement((), (), created, tuple(dict.fromkeys([*old, *self._deletes])))

    # --- helpers

    def _written(self) -> dict[str, int]:
        root = self._together()
        doubted = root.missed | root.unwritten
        likely = {uri: at for uri, at in root.likely.items() if uri not in doubted}
        return likely | root.written

    def _together(self) -> _Frame:
        """Return what the open savepoints and the root have done so far."""
        root = _Frame(None)
        for frame in self._frames:
            root.absorb(frame)
        return root

    def _replaced_by(
        self, new: str, certain: Mapping[str, int], kept: Collection[str]
    ) -> Iterator[str]:
        """Follow the chain of what a written URI replaces, over those that went into no row."""
        at, old = certain.get(new, self._clock), self._replaces[new]
        while old is not None and old not in kept and certain.get(old, 0) <= at:
            yield old
            old = None if old in certain else self._replaces.get(old)

    def _lost(self) -> set[str]:
        """Doomed, and not written, as far as is known, by what came afterwards."""
        named = {uri for frame in self._frames for uri in (*frame.unclear, *frame.mentioned)}
        doomed = self._doomed - self._written().keys() - named - self._committed.keys()
        return doomed | self._given_up

    def _depth(self, name: str) -> int | None:
        for depth in range(len(self._frames) - 1, 0, -1):
            if self._frames[depth].name == name:
                return depth
        return None

    @staticmethod
    def _forget_work(frame: _Frame) -> None:
        frame.written.clear()
        frame.unclear.clear()
        frame.unwritten.clear()
        frame.buried.clear()
        frame.released.clear()
        frame.likely.clear()
        frame.missed.clear()
        frame.shared.clear()
        frame.mentioned.clear()
