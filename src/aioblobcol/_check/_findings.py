"""What may be wrong with an object, in the words that people and programs are told."""

from __future__ import annotations

import dataclasses
import enum
from datetime import datetime


class FindingKind(enum.Enum):
    """What may be wrong with an object; the worst first."""

    DANGLING = "dangling"
    SIZE_MISMATCH = "size_mismatch"
    DOOMED = "doomed"
    SHARED = "shared"
    STUCK = "stuck"
    ORPHAN = "orphan"
    INCOMPLETE_UPLOAD = "incomplete_upload"

    @property
    def meaning(self) -> str:
        """What it is, and what to do, in one line for people."""
        return _MEANING[self]


_MEANING = {
    FindingKind.DANGLING: "a row names an object that is not there; restore the object or the row",
    FindingKind.SIZE_MISMATCH: "the object has another size than its row says; it is not what was "
    "uploaded",
    FindingKind.DOOMED: "a row names an object that the journal has listed for deletion: stop the "
    "worker, and copy the object to a new key",
    FindingKind.SHARED: "several cells name one object; the first that lets go of it deletes it "
    "for all",
    FindingKind.STUCK: "the journal's worker should have dealt with it long ago; is one running, "
    "and may it delete?",
    FindingKind.ORPHAN: "an object that no row names; --delete removes it",
    FindingKind.INCOMPLETE_UPLOAD: "parts of an object that was neither completed nor given up, "
    "which cost storage; --delete removes them",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Something that was looked at twice and is wrong.

    Attributes:
        kind: what.
        uri: of the object.
        size: in bytes, of an orphan and of an object of another size than its row says.
        modified_at: of an orphan; of an incomplete upload, when it was started.
        is_condemned: it is deleted, or the journal's worker will.
        reason: what else is known: the size in the row; the journal's state, and its last error.
    """

    kind: FindingKind
    uri: str
    size: int | None = None
    modified_at: datetime | None = None
    is_condemned: bool = False
    reason: str | None = None
