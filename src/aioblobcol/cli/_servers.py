"""The two stores of the demo: embedded ones, or those that the options name.

Whatever is made here is removed here: the table, the objects under the demo's own prefix, the
temporary directory. Invariant: what keeps the demo from running is a `CannotRunError` that
names the server and tells what to do; passwords are in no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiobotocore.config import AioConfig
from botocore.exceptions import BotoCoreError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from .._store._s3 import S3Store, open_store
from .._uri import root_uri
from ..errors import CleanUpError, InvalidInputError, StoreError
from ..testing import s3_server
from ._scenarios import RUN, Base, Task, describe

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

logger = logging.getLogger("aioblobcol.demo")

PATIENCE_SECONDS: Final = 20
EMBEDDED_BUCKET: Final = "demo"
DATABASE_ADVICE: Final = "Check --database-url, and that its user may create tables"
S3_ADVICE: Final = (
    "Check --s3-endpoint, --bucket, --region and the credentials "
    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
)


class CannotRunError(Exception):
    """The demo cannot run to its end; the text is for the user."""


class BrokenInvariantError(CannotRunError):
    """A scenario left something that must not be."""


class UsageError(CannotRunError):
    """An option is unusable."""

    def __init__(self, option: str, text: str) -> None:
        super().__init__(text)
        self.option = option


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What the command line said; None means embedded, or what the environment says."""

    database_url: str | None = dataclasses.field(repr=False, default=None)
    s3_endpoint: str | None = None
    bucket: str | None = None
    region: str | None = None
    prefix: str = "aioblobcol-demo"


@dataclasses.dataclass(frozen=True, slots=True)
class Servers:
    """Two stores that answer, with an empty table and an empty prefix."""

    engine: AsyncEngine
    store: S3Store
    database: str
    objects: str


def check(options: Options) -> None:
    """Refuse what can be seen to be wrong before anything is opened.

    Raises:
        UsageError: with the option's name.
    """
    if options.database_url is not None:
        _check_database_url(options.database_url)
    endpoint = options.s3_endpoint
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise UsageError("--s3-endpoint", "is a URL such as http://127.0.0.1:9000")
    if endpoint is not None and options.bucket is None:
        raise UsageError("--bucket", "is needed with --s3-endpoint, and the bucket must exist")
    try:
        open_store(bucket=EMBEDDED_BUCKET if options.bucket is None else options.bucket)
    except InvalidInputError as exc:
        raise UsageError("--bucket", str(exc)) from exc
    try:
        open_store(bucket=EMBEDDED_BUCKET, prefix=_prefix(options))
    except InvalidInputError as exc:
        raise UsageError("--prefix", str(exc)) from exc


@contextlib.asynccontextmanager
async def open_servers(options: Options) -> AsyncIterator[Servers]:
    """Open both stores, and leave nothing behind.

    Raises:
        CannotRunError: one of them cannot be used, or could not be cleaned up.
    """
    async with _database(options) as (engine, database), _objects(options) as (store, objects):
        yield Servers(engine, store, database, objects)


@contextlib.asynccontextmanager
async def _database(options: Options) -> AsyncIterator[tuple[AsyncEngine, str]]:
    """Open the database and give the demo's table a short life in it."""
    with tempfile.TemporaryDirectory(prefix="aioblobcol-demo-") as directory:
        url = make_url(options.database_url or f"sqlite+aiosqlite:///{Path(directory, 'demo.db')}")
        shown = url.render_as_string(hide_password=True)
        with _explaining_missing_modules():
            engine = create_async_engine(url)

        async def change(step: Callable[[Connection], None], trouble: str) -> None:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS), engine.begin() as connection:
                    await connection.run_sync(step)
            except Exception as exc:  # drivers raise what they like when they cannot connect
                raise CannotRunError(f"{trouble}: {describe(exc)}. {DATABASE_ADVICE}") from exc

        try:
            await change(Base.metadata.create_all, f"cannot use the database {shown}")
            left = f"the table {Task.__tablename__} may be left in {shown}"
            async with _tidied_by(lambda: change(Base.metadata.drop_all, left)):
                yield engine, shown if options.database_url else "a SQLite file, temporary"
        finally:
            await engine.dispose()


@contextlib.asynccontextmanager
async def _objects(options: Options) -> AsyncIterator[tuple[S3Store, str]]:
    """Open the object store and empty the demo's own prefix in the end."""
    async with contextlib.AsyncExitStack() as stack:
        if options.bucket is None:
            with _explaining_missing_modules():
                server = stack.enter_context(s3_server())
            # the server is in this process: no proxy of the environment leads there
            config = AioConfig(proxies={})
            store = server.open_store(
                bucket=EMBEDDED_BUCKET, prefix=_prefix(options), config=config
            )
            shown, where = "moto's S3 server, in this process", server.endpoint_url
        else:
            store = open_store(
                bucket=options.bucket,
                prefix=_prefix(options),
                endpoint_url=options.s3_endpoint,
                region_name=options.region,
                compat="generic" if options.s3_endpoint else "aws",
            )
            where = options.s3_endpoint or "AWS (or where the environment points)"
            shown = f"{root_uri(store.bucket, store.prefix)} at {where}"
        try:
            await stack.enter_async_context(store)
            if options.bucket is None:
                await store.client.create_bucket(Bucket=EMBEDDED_BUCKET)
        except (BotoCoreError, ValueError) as exc:  # such as an unknown profile
            raise CannotRunError(f"cannot open an S3 client for {where}: {exc}") from exc
        await _empty(store, f"cannot use the bucket {store.bucket!r} at {where}")
        left = f"objects may be left under {root_uri(store.bucket, store.prefix)} at {where}"
        async with _tidied_by(lambda: _empty(store, left)):
            yield store, shown


@contextlib.asynccontextmanager
async def _tidied_by(tidy: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Call *tidy* at the end; its trouble is raised, unless that would hide an error."""
    try:
        yield
    except BaseException:
        try:
            await tidy()
        except CannotRunError as exc:
            logger.error("%s", exc)
        raise
    await tidy()


async def _empty(store: S3Store, trouble: str) -> None:
    """Delete what is under the demo's own prefix: nothing, unless a scenario went wrong."""
    try:
        report = await store.delete_many([uri async for uri in store.iter_uris()])
        report.raise_for_failures()
    except (StoreError, CleanUpError) as exc:
        reason = exc.code if isinstance(exc, StoreError) else str(exc)
        raise CannotRunError(f"{trouble}: {reason}. {S3_ADVICE}") from exc


@contextlib.contextmanager
def _explaining_missing_modules() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as exc:
        raise CannotRunError(
            f'the module {exc.name} is missing: pip install "aioblobcol[demo]", and the driver '
            "that --database-url names"
        ) from exc


def _check_database_url(text: str) -> None:
    example = "such as postgresql+asyncpg://user:password@host/database"
    try:
        dialect = make_url(text).get_dialect()
    except ArgumentError as exc:
        raise UsageError("--database-url", f"is an async SQLAlchemy URL, {example}") from exc
    if not dialect.is_async:
        raise UsageError("--database-url", f"needs an asynchronous driver, {example}")


def _prefix(options: Options) -> str:
    return f"{options.prefix}/{RUN}"
