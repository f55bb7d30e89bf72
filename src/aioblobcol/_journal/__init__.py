"""The journal's room: its table, the triggers that write it (by dialect), and its entries."""

from ._columns import JournaledTable, column_of, tables_with_uris
from ._due import database_time, is_condemnable, is_unadopted, is_under, lag_of
from ._entries import PARKED, Condemned, Entries, back_off, named_by_rows
from ._indexes import proposed_indexes
from ._own_engines import begin_read_committed
from ._ownership import OwnershipState, check_ownership, claim, disown
from ._staging import Staging, undo
from ._table import Journal
from ._writer import (
    LEFT_TO_WORKER,
    SETTLE_SECONDS,
    JournalWriter,
    warn_of_missing_triggers,
)

__all__ = [
    "LEFT_TO_WORKER",
    "PARKED",
    "SETTLE_SECONDS",
    "Condemned",
    "Entries",
    "Journal",
    "JournalWriter",
    "JournaledTable",
    "OwnershipState",
    "Staging",
    "back_off",
    "begin_read_committed",
    "check_ownership",
    "claim",
    "column_of",
    "database_time",
    "disown",
    "is_condemnable",
    "is_unadopted",
    "is_under",
    "lag_of",
    "named_by_rows",
    "proposed_indexes",
    "tables_with_uris",
    "undo",
    "warn_of_missing_triggers",
]
