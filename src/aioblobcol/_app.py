"""What the command line works on: the user's engine, stores and tables, in one object."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine

from ._journal import column_of
from ._store._base import Store
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
        uri_columns: columns of strings with URIs, of the explicit strength.
    """

    engine: AsyncEngine
    stores: Store | Mapping[str, Store]
    metadata: MetaData
    uri_columns: Sequence[Any] = ()

    def __post_init__(self) -> None:
        """Refuse what no command could work with.

        Raises:
            InvalidInputError: no engine, no store, no metadata, or a column that is none.
        """
        if not isinstance(self.engine, AsyncEngine):
            raise InvalidInputError(f"engine is an AsyncEngine, not {self.engine!r}")
        if not isinstance(self.metadata, MetaData):
            raise InvalidInputError(f"metadata is Base.metadata, not {self.metadata!r}")
        named = self.stores_by_name
        if not named or not all(hasattr(store, "delete_many") for store in named.values()):
            raise InvalidInputError("stores is a store, or a dict of stores")
        for column in self.uri_columns:
            column_of(column)

    @property
    def stores_by_name(self) -> Mapping[str, Store]:
        """The stores; one without a name is ``default``."""
        return self.stores if isinstance(self.stores, Mapping) else {"default": self.stores}
