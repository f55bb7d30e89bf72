"""The store on obstore: S3 with less CPU, local files, memory, Google Cloud Storage, Azure.

::

    from aioblobcol.obstore import open_obstore

    store = open_obstore("file:///var/lib/app/blobs")

obstore is optional: ``pip install "aioblobcol[obstore]"``. docs/stores.md compares the stores.
"""

from __future__ import annotations

try:
    from ._store._obstore import ObstoreStore, open_obstore
except ModuleNotFoundError as exc:
    if (exc.name or "").partition(".")[0] != "obstore":
        raise
    raise ModuleNotFoundError(
        'this store needs one more package: pip install "aioblobcol[obstore]"', name=exc.name
    ) from exc

__all__ = ["ObstoreStore", "open_obstore"]
