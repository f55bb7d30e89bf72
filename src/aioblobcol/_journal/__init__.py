"""The journal's room: its table, and the triggers that write it, by dialect."""

from ._table import Journal

__all__ = ["Journal"]
