"""The journal's room: its table, the triggers that write it (by dialect), and its entries."""

from ._entries import Condemned, Entries, back_off
from ._table import Journal

__all__ = ["Condemned", "Entries", "Journal", "back_off"]
