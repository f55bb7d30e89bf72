"""What the command line works on: the user's engine, stores and tables, in one object."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine

from ._journal import Journal, column_of
from ._store._base import Store, named_stores
from .errors import InvalidInputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlobApp:
    """An application, as operators see it; stands at module level, does no I/O.

    ::

        blobs = BlobApp(engine=engine, stores=store, metadata=Base.metadata)

        $ aioblobcol check --app myapp.models:blobs

    Attributes:
        engine: of the database.
        stores: one, or several by name; not open.
        metadata: of the mapped classes, all of which are imported with this object's module.
        journal: of the metadata, if there is one.
        uri_columns: columns of strings with URIs, of the explicit strength; the journal's are
            known.
    """

    engine: AsyncEngine
    stores: Store | Mapping[str, Store]
    metadata: MetaData
    journal: Journal | None = None
    uri_columns: Sequence[Any] = ()

    def __post_init__(self) -> None:
        """Refuse what no command could work with.

        Raises:
            InvalidInputError: no engine, no store, no metadata, not its journal, or a column that
                is none.
        """
        if not isinstance(self.engine, AsyncEngine):
            raise InvalidInputError(f"engine is an AsyncEngine, not {self.engine!r}")
        if not isinstance(self.metadata, MetaData):
            raise InvalidInputError(f"metadata is Base.metadata, not {self.metadata!r}")
        named_stores(self.stores)
        if self.journal is not Journal.of(self.metadata):
            raise InvalidInputError(
                "journal is the Journal of this metadata: without it the commands would take its "
                "objects for orphans"
                if self.journal is None
                else f"journal is the Journal of this metadata, not {self.journal!r}"
            )
        for column in self.uri_columns:
            column_of(column)

    @property
    def stores_by_name(self) -> Mapping[str, Store]:
        """The stores; one without a name is ``default``."""
        return named_stores(self.stores)

    @property
    def all_uri_columns(self) -> Sequence[Any]:
        """``uri_columns``, and the journal's."""
        return (*self.uri_columns, *(self.journal.uri_columns if self.journal else ()))
