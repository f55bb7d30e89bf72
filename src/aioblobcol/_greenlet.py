"""The bridge between SQLAlchemy's events and asyncio: the one place that awaits inside an event.

Under an `AsyncSession` an event runs in a greenlet, from which the coroutine around it can wait
for something. SQLAlchemy's function for it has changed its name (`await_only`, `await_` from
2.1 on), and there is none for telling whether a greenlet is there.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sqlalchemy import util
from sqlalchemy.exc import MissingGreenlet

T = TypeVar("T")

_await: Callable[[Coroutine[Any, Any, Any]], Any] = (
    util.await_ if hasattr(util, "await_") else util.await_only
)


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Await *work* from inside of an event of an `AsyncSession`.

    Raises:
        MissingGreenlet: called outside of one; *work* was closed and not begun.
    """
    result: T = _await(work)
    return result


__all__ = ["MissingGreenlet", "wait_for"]
