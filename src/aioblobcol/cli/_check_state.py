"""Where a check is: a small file that says which keys are left, so that it can be interrupted.

Written as a whole or not at all; removed when all is done. A check that was killed goes on after
the last position that was written; what it had found after that is found again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._check import KeyRange
from ._servers import UsageError

STATE_OPTION = "--state"
VERSION = 1
SECONDS_BETWEEN_WRITES = 1.0


@dataclasses.dataclass(slots=True)
class CheckState:
    """What is left to be looked at, and how much was wrong so far, by the root of each store.

    Attributes:
        path: of the file; None keeps nothing.
        options: that would make what is left another check, among them whose check it is.
    """

    path: Path | None
    options: Mapping[str, Any]
    _left: dict[str, list[KeyRange]] = dataclasses.field(default_factory=dict)
    _wrong: dict[str, int] = dataclasses.field(default_factory=dict)
    _written: float = -math.inf

    @classmethod
    def load(cls, path: Path | None, options: Mapping[str, Any]) -> CheckState:
        """Read what an earlier check has left, if it has left something.

        Raises:
            UsageError: the file cannot be used, or is of a check with other options, or of
                another application or database.
        """
        state = cls(path, options)
        if path is None:
            return state
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            state.write()  # what cannot be written is told before hours of work
            return state
        except (OSError, ValueError) as exc:
            raise UsageError(STATE_OPTION, f"cannot read {path}: {exc}") from exc
        try:
            state._take(kept)
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise UsageError(
                STATE_OPTION, f"{path} is not the state of a check; delete it to begin anew"
            ) from exc
        if kept["options"] != options:
            raise UsageError(
                STATE_OPTION,
                f"{path} is of a check with other options, or of another application or database "
                f"({json.dumps(kept['options'])}): repeat them, or delete it to begin anew",
            )
        return state

    @property
    def wrong_before(self) -> int:
        """How much an earlier check has found."""
        return sum(self._wrong.values())

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier check has left something."""
        return bool(self._left)

    def left(self, root: str) -> Sequence[KeyRange]:
        """Return what is left of a store."""
        return self._left.get(root, [KeyRange()])

    def wrong(self, root: str) -> int:
        """Return how much was wrong with a store in what is not left."""
        return self._wrong.get(root, 0)

    def note(self, root: str, left: Sequence[KeyRange], wrong: int) -> None:
        """Keep what is left of a store, and how much is wrong so far; written once a second.

        Raises:
            UsageError: the file cannot be written.
        """
        self._left[root], self._wrong[root] = list(left), wrong
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write what was noted.

        Raises:
            UsageError: the file cannot be written.
        """
        if self.path is None:
            return
        self._written = time.monotonic()
        stores = {
            root: {
                "left": [(each.after, each.up_to) for each in left],
                "wrong": self._wrong[root],
            }
            for root, left in self._left.items()
        }
        kept = {"version": VERSION, "options": self.options, "stores": stores}
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("w", encoding="utf-8") as file:
                json.dump(kept, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise UsageError(STATE_OPTION, f"cannot write {self.path}: {exc}") from exc

    def remove(self) -> None:
        """Forget it: all is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _take(self, kept: Any) -> None:
        if kept["version"] != VERSION:
            raise ValueError("another version")
        for root, store in kept["stores"].items():
            self._left[root] = [KeyRange(after, up_to) for after, up_to in store["left"]]
            self._wrong[root] = int(store["wrong"])
