"""Where obstore finds the bytes: a URL and options become what makes its clients.

Pure text and dictionaries; a client is made when its store is entered.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib.metadata import version
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit
from urllib.request import url2pathname

from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

from .._sources import PART_BYTES
from ..errors import InvalidInputError
from ._base import SLOWEST_BYTES_PER_SECOND

ATTEMPTS: Final = 3
ANSWER_SECONDS: Final = 30

_REMOTE: Final[Mapping[str, Any]] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
_ENDPOINT_OPTIONS: Final = frozenset(
    {"aws_endpoint", "aws_endpoint_url", "aws_endpoint_url_s3", "endpoint", "endpoint_url"}
)
_ENDPOINT_VARIABLES: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """What differs between the places where the bytes lie.

    Attributes:
        name: as in the URL.
        make: makes the client; given how often it repeats a request. Blocks for milliseconds.
        is_remote: requests go over a network, and may be repeated.
        keeps_metadata: content type and metadata are stored with the object.
        signs: it can sign URLs.
        deletes_in_bulk: one request deletes many objects, and missing ones are no error.
        is_sorted: its listings are in the order of the keys' bytes.
    """

    name: str
    make: Callable[[int], Any]
    is_remote: bool = True
    keeps_metadata: bool = True
    signs: bool = True
    deletes_in_bulk: bool = False
    is_sorted: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class HttpOptions:
    """obstore's options of what sends requests; see `open_obstore`."""

    client_options: Mapping[str, Any] | None
    retry_config: Mapping[str, Any] | None
    credential_provider: Any

    @property
    def given(self) -> list[str]:
        """The names of those that were given."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]


def split_url(url: str) -> SplitResult:
    """Take a store's URL apart.

    Raises:
        InvalidInputError: it is none, or holds options or credentials.
    """
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in {"s3", "gs", "az", "file", "memory"}:
        raise InvalidInputError(
            f"not a store's URL: {url!r}. These are: s3://bucket/prefix, gs://bucket/prefix, "
            "az://container/prefix, file:///directory, memory://"
        )
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise InvalidInputError("options and credentials go into config=, not into a store's URL")
    return parts


def memory(parts: SplitResult, config: Mapping[str, Any]) -> Backend:
    """Keep everything in memory, for as long as the store object lives."""
    if config or parts.path.strip("/"):
        raise InvalidInputError("memory:// takes no config and no path; prefix= is for the latter")
    held = MemoryStore()  # one for good, or closing would lose what it holds
    return Backend("memory", lambda _: held, is_remote=False, signs=False)


def files(parts: SplitResult, config: Mapping[str, Any]) -> Backend:
    """Keep every object in a file of its own."""
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise InvalidInputError(
            f"file:// takes an absolute path, with three slashes: {parts.geturl()!r}"
        )
    directory = url2pathname(parts.path)
    return Backend(
        "file",
        lambda _: LocalStore(directory, mkdir=True, **config),
        is_remote=False,
        keeps_metadata=False,
        signs=False,
        is_sorted=False,
    )


def remote(
    parts: SplitResult,
    config: Mapping[str, Any],
    http: HttpOptions,
    *,
    request_seconds: float,
) -> Backend:
    """Send requests to S3 (or a compatible server), Google Cloud Storage or Azure."""
    options = dict(config)
    client_options = _client_options() | dict(http.client_options or {})
    if parts.scheme == "s3":
        endpoint = _endpoint(config)
        if endpoint.startswith("http:"):
            client_options.setdefault("allow_http", True)
        elif not {"unsigned_payload", "aws_unsigned_payload"} & {name.lower() for name in config}:
            options["unsigned_payload"] = True  # https protects the body, and hashing it is slow
    provider = http.credential_provider
    retries = _retry_config(request_seconds) | dict(http.retry_config or {})

    # The client that repeats nothing also deletes one by one, for servers without DeleteObjects.
    once = {"disable_bulk_delete": True, **options} if parts.scheme == "s3" else options

    def make(max_retries: int) -> Any:
        return _REMOTE[parts.scheme](
            parts.netloc,
            config=options if max_retries else once,
            client_options=client_options,
            retry_config=retries if max_retries else {**retries, "max_retries": 0},
            **({} if provider is None else {"credential_provider": provider}),
        )

    return Backend(parts.scheme, make, deletes_in_bulk=parts.scheme == "s3")


def _endpoint(config: Mapping[str, Any]) -> str:
    """Return where requests go, as far as it is said; ``""`` is AWS, over https."""
    for name, value in config.items():
        if name.lower() in _ENDPOINT_OPTIONS:
            return str(value)
    return next((os.environ[name] for name in _ENDPOINT_VARIABLES if os.environ.get(name)), "")


def _client_options() -> dict[str, Any]:
    part = ANSWER_SECONDS + PART_BYTES / SLOWEST_BYTES_PER_SECOND
    return {
        "connect_timeout": timedelta(seconds=5),
        # Of a whole request with its body, which may be read as slowly as a handler's client does;
        # whoever waits for a request here has a time limit.
        "timeout": timedelta(days=1),
        "read_timeout": timedelta(seconds=part),  # it runs while a part's body is sent
        "user_agent": f"aioblobcol/{version('aioblobcol')}",
    }


def _retry_config(request_seconds: float) -> dict[str, Any]:
    return {"max_retries": ATTEMPTS - 1, "retry_timeout": timedelta(seconds=request_seconds)}
