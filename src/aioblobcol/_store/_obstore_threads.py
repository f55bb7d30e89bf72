"""What obstore's threads still hold of Python's objects.

A thread of obstore that hands over a result needs the interpreter once more, right after the
result has arrived here. A program that ends in that very moment is aborted ("Fatal Python error:
Aborted", measured: 1 of 60 programs on a busy machine); so does one that ends while a thread lets
go of the bytes that it was given. Therefore futures and buffers are watched, and a store that is
closed waits until the threads have let go of them: milliseconds, nearly always none.

Invariant: `Watch` keeps nothing alive.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from typing import TypeVar

logger = logging.getLogger("aioblobcol.store")

T = TypeVar("T")

SETTLE_SECONDS = 1  # a choice; it is waited in vain if somebody keeps an error with its frames
LOOK_AGAIN_SECONDS = 0.001


class Watch:
    """The futures and buffers of one store.

    Args:
        keeps_buffers: obstore's store in memory keeps what it is given, for good.
    """

    def __init__(self, *, keeps_buffers: bool) -> None:
        self._keeps_buffers = keeps_buffers
        # by the identity of the reference: the hash of a memoryview is that of all its bytes
        self._alive: dict[int, weakref.ref[object]] = {}

    def __len__(self) -> int:
        return sum(self._is_held(each) for each in tuple(self._alive.values()))

    def over(self, watched: T) -> T:
        """Watch what is handed to obstore, or comes from it, and return it."""
        reference: weakref.ref[object] = weakref.ref(watched, self._forget)
        self._alive[id(reference)] = reference
        return watched

    def view(self, piece: bytes | memoryview) -> bytes | memoryview:
        """Return what tells when obstore has let go of *piece*."""
        return piece if self._keeps_buffers else self.over(memoryview(piece))

    async def settled(self, client: object) -> None:
        """Wait until obstore's threads are done with all that has ended here.

        Args:
            client: any object of obstore. To compare it is to call obstore, which then lets go
                of what its threads could not without the interpreter.
        """
        give_up_at = time.monotonic() + SETTLE_SECONDS
        while client == client and len(self):  # noqa: PLR0124 - it is a call
            if time.monotonic() > give_up_at:
                logger.info("obstore's threads may hold %s objects at closing", len(self))
                return
            await asyncio.sleep(LOOK_AGAIN_SECONDS)  # nothing tells when a thread is done

    def _forget(self, reference: weakref.ref[object]) -> None:
        self._alive.pop(id(reference), None)

    @staticmethod
    def _is_held(reference: weakref.ref[object]) -> bool:
        watched = reference()
        if isinstance(watched, asyncio.Future):
            return watched.done()  # one that is not is its caller's to wait for
        return watched is not None
