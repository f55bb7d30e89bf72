"""What unit tests share: a store in memory. Nothing here opens a socket."""

from __future__ import annotations

from aioblobcol.testing.fixtures import memory_store

__all__ = ["memory_store"]
