"""The store on obstore as a type checker sees it; see api.py."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import assert_type

from aioblobcol import Capabilities, Store
from aioblobcol.obstore import ObstoreStore, open_obstore


async def opening() -> None:
    async with open_obstore("file:///tmp/x", bucket="b", prefix="p") as store:
        assert_type(store, ObstoreStore)
        assert_type(store.capabilities, Capabilities)
        as_any_other: Store = store
        assert_type(await as_any_other.get("s3://b/p/k"), bytes)

    open_obstore("s3://b", config={"region": "us-east-1"}, max_bytes_in_flight=2**24)
    open_obstore("s3://b", "p")  # type: ignore[call-arg]
    open_obstore(url=1)  # type: ignore[arg-type]
