"""Where the commands for objects work: in the stores of an application, or in any bucket.

Invariants: with an application only its own buckets are touched, through its own stores; each
store is opened once, when it is needed, and closed on every way out, and so is the engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, Final, get_args

from .._app import BlobApp
from .._store._s3 import CompatName, open_store
from .._uri import root_uri, split_s3_uri
from ..errors import InvalidInputError
from ._checking import APP_OPTION, load_app
from ._servers import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from .._store._base import Store

SCHEME: Final = "s3://"
WITHOUT_APP: Final = f"leave {APP_OPTION} out ({APP_OPTION} '' if it is in the environment)"
COMPAT_NAMES: Final = get_args(CompatName)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlaceOptions:
    """What the command line said of where; None: nothing."""

    app_name: str | None = None
    bucket: str | None = None
    endpoint_url: str | None = None
    region: str | None = None
    compat: str | None = None

    def check(self) -> None:
        """Refuse what goes together with nothing.

        Raises:
            UsageError: with the option's name.
        """
        if self.app_name:
            for option, given in (
                ("--bucket", self.bucket),
                ("--endpoint-url", self.endpoint_url),
                ("--region", self.region),
                ("--compat", self.compat),
            ):
                if given is not None:
                    text = f"the application's stores say that already; or {WITHOUT_APP}"
                    raise UsageError(option, text)
        url = self.endpoint_url
        if url is not None and not url.startswith(("http://", "https://")):
            raise UsageError("--endpoint-url", "is a URL such as http://127.0.0.1:9000")
        if self.compat is not None and self.compat not in COMPAT_NAMES:
            raise UsageError("--compat", f"is one of {', '.join(COMPAT_NAMES)}")

    def uri(self, text: str, what: str) -> str:
        """Return what *text* names: a URI, or a key in ``--bucket``.

        Raises:
            UsageError: neither.
        """
        uri = self.completed(text, what)
        try:
            split_s3_uri(uri)
        except InvalidInputError as exc:
            raise UsageError(what, str(exc)) from exc
        return uri

    def completed(self, text: str, what: str) -> str:
        """Return *text* with its bucket.

        Raises:
            UsageError: it has none.
        """
        if text.startswith(SCHEME):
            return text
        if self.bucket is None:
            raise UsageError(what, f"{text!r} is not s3://bucket/key, and there is no --bucket")
        return f"{SCHEME}{self.bucket}/{text}"


class Places:
    """The stores, by URI, while the command runs; an async context manager."""

    def __init__(self, options: PlaceOptions) -> None:
        """Find the application; open nothing.

        Raises:
            UsageError: an option is unusable.
        """
        options.check()
        self.options = options
        self.app: BlobApp | None = load_app(options.app_name) if options.app_name else None
        self._stack = contextlib.AsyncExitStack()
        self._opened: dict[int, Store] = {}
        self._by_bucket: dict[str, Store] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._stack.aclose()
        finally:
            if self.app is not None:
                await self.app.engine.dispose()

    @property
    def stores(self) -> Mapping[str, Store]:
        """The application's stores by what every URI in them starts with."""
        if self.app is None:
            return {}
        named = self.app.stores_by_name.values()
        return {root_uri(store.bucket, store.prefix): store for store in named}

    def owner_of(self, uri: str) -> Store | None:
        """Return the application's store under whose prefix *uri* is."""
        return next((each for root, each in self.stores.items() if uri.startswith(root)), None)

    async def store_of(self, uri: str) -> Store:
        """Return an open store that reaches *uri*.

        Raises:
            UsageError: the application has none in that bucket.
            StoreError, InvalidInputError: it could not be opened.
        """
        store = self.owner_of(uri)
        bucket = uri.removeprefix(SCHEME).partition("/")[0]
        if store is None and self.app is not None:
            store = next((each for each in self.stores.values() if each.bucket == bucket), None)
            if store is None:
                text = f"has no store in the bucket {bucket!r}; {WITHOUT_APP}"
                raise UsageError(APP_OPTION, text)
        if store is None:
            store = self._by_bucket.get(bucket) or self._describe(bucket)
            self._by_bucket[bucket] = store
        return await self.opened(store)

    async def opened(self, store: Store) -> Store:
        """Open a store, unless it is open already."""
        if id(store) not in self._opened:
            entered: Any = store  # every store is an async context manager
            await self._stack.enter_async_context(entered)
            self._opened[id(store)] = store
        return store

    def _describe(self, bucket: str) -> Store:
        url, compat = self.options.endpoint_url, self.options.compat
        chosen: Any = compat or ("aws" if url is None else "generic")
        try:
            return open_store(
                bucket=bucket, endpoint_url=url, region_name=self.options.region, compat=chosen
            )
        except InvalidInputError as exc:
            raise UsageError("--bucket", str(exc)) from exc
