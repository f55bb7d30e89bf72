"""The journal's room: its table, the triggers that write it (by dialect), and its entries."""

from ._columns import JournaledTable, column_of, tables_with_uris
from ._entries import Condemned, Entries, back_off, named_by_rows
from ._staging import Staging
from ._table import Journal
from ._writer import LEFT_TO_WORKER, JournalWriter

__all__ = [
    "LEFT_TO_WORKER",
    "Condemned",
    "Entries",
    "Journal",
    "JournalWriter",
    "JournaledTable",
    "Staging",
    "back_off",
    "column_of",
    "named_by_rows",
    "tables_with_uris",
]
