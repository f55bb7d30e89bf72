"""Objects for people, one at a time: put, get, ls, rm, url.

What rows name is the application's: it is read here like any other object, and neither written
nor deleted. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from .._store._base import ObjectInfo
from .._tasks import run_to_end
from ..errors import BlobNotFoundError, StoreAccessError
from ._bars import shown, transfer_bar
from ._guarding import Candidate, Removal, check_may_put
from ._listing import emit, flush, list_objects
from ._moving import (
    STANDARD,
    ReaderGoneError,
    Source,
    content_type_of,
    copy_out,
    descriptor_of,
    download,
    open_source,
    upload,
)
from ._options import AsJson, Bucket, CompatOption, EndpointUrl, MaybeAppName, Quiet, Region
from ._places import PlaceOptions, Places
from ._running import run_in_loop
from ._servers import CannotRunError, UsageError
from ._trouble import explaining, print_anything

READER_GONE: Final = 141
"""Source: POSIX shells, 128 plus the number of SIGPIPE."""
DELETED_AT_ONCE: Final = 500

EXAMPLES: Final = {
    "put": (
        "Examples: `aioblobcol put report.pdf s3://bucket/reports/`; "
        "`pg_dump shop | aioblobcol put - s3://bucket/dumps/shop.sql`; "
        "`aioblobcol put photo.jpg --bucket bucket --endpoint-url http://127.0.0.1:9000`."
    ),
    "get": (
        "Examples: `aioblobcol get s3://bucket/reports/report.pdf`; "
        "`aioblobcol get --app myapp.models:blobs s3://bucket/app/.../id=0197... page.html`; "
        "`aioblobcol get s3://bucket/dumps/shop.sql - | psql shop`."
    ),
    "ls": (
        "Examples: `aioblobcol ls s3://bucket/reports/2026-`; `aioblobcol ls --app "
        "myapp.models:blobs | sort -n | tail` for the largest; `aioblobcol ls --json s3://bucket | "
        "jq -r .uri`."
    ),
    "rm": (
        "Examples: `aioblobcol rm s3://bucket/reports/old.pdf` shows what would go; with "
        "`--delete` it goes. Orphans of an application: `aioblobcol check --delete`."
    ),
    "url": (
        "Example: `aioblobcol url s3://bucket/reports/1.pdf --expires-minutes 1440 --download-as "
        "'Report May.pdf'`."
    ),
}

commands = typer.Typer()

Uri = Annotated[str, typer.Argument(metavar="URI", help="s3://bucket/key.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]


@commands.command(epilog=EXAMPLES["put"])
def put(
    *,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="What to upload; - is standard input.")
    ],
    uri: Annotated[
        str | None,
        typer.Argument(
            metavar="URI",
            help="s3://bucket/key; after a / the file's name is added.",
            show_default="the file's name, in --bucket",
        ),
    ] = None,
    content_type: Annotated[
        str | None, typer.Option(help="Such as image/png.", show_default="by the name")
    ] = None,
    overwrite: Overwrite = False,
    app_name: MaybeAppName = None,
    bucket: Bucket = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    compat: CompatOption = None,
    quiet: Quiet = False,
) -> None:
    """Upload a file, and print its URI.

    Large files go up in parts, several at a time. An object is there as a whole or not at all:
    Ctrl-C leaves none, nor parts of one.

    Refused under the prefix of an application's store: an object there that no row names is an
    orphan, which check and worker delete. Let a row have it, in Python.
    """
    place = _place(app_name, bucket, endpoint_url, region, compat)
    with _telling("put"):
        places = Places(place)
        target = _target_uri(place, file, uri)
        with _opening(file) as source:
            found = content_type or content_type_of(source.name, target)
            if found is not None and not (found.isascii() and found.isprintable()):
                raise UsageError("--content-type", "is of plain characters, such as image/png")
            arguments = {} if found is None else {"ContentType": found}
            work = _put(places, target, source, arguments, overwrite=overwrite, quiet=quiet)
            size = run_in_loop(work)
        emit(target)
    _tell(f"{size:,} bytes, {found or 'of no content type'}", quiet=quiet)


@commands.command(epilog=EXAMPLES["get"])
def get(
    *,
    uri: Uri,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="Where to; a directory, or - for standard output.",
            show_default="the key's last part, here",
        ),
    ] = None,
    overwrite: Overwrite = False,
    app_name: MaybeAppName = None,
    bucket: Bucket = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    compat: CompatOption = None,
    quiet: Quiet = False,
) -> None:
    """Download an object into a file.

    Large objects come in several parts at a time, and a connection that breaks off is taken up
    where it was. The file is there when it is whole; until then what was there before stays.
    Ctrl-C leaves no part of it.
    """
    place = _place(app_name, bucket, endpoint_url, region, compat)
    with _telling("get"):
        places = Places(place)
        found = place.uri(uri, "URI")
        target = _target(found, file, overwrite=overwrite)
        with _opening_special(target) as descriptor:
            size = run_in_loop(_get(places, found, target, descriptor, quiet=quiet))
    where = "standard output" if file == STANDARD else shown(str(target))
    _tell(f"{size:,} bytes to {where}", quiet=quiet)


@commands.command(name="ls", epilog=EXAMPLES["ls"])
def list_prefix(
    *,
    prefix: Annotated[
        str | None,
        typer.Argument(
            metavar="PREFIX",
            help="What the URIs begin with: s3://bucket, s3://bucket/some/fold.",
            show_default="all of --app's stores, or of --bucket",
        ),
    ] = None,
    as_json: AsJson = False,
    app_name: MaybeAppName = None,
    bucket: Bucket = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    compat: CompatOption = None,
    quiet: Quiet = False,
) -> None:
    """List objects: size in bytes, when they were stored (UTC), URI.

    In the order of the keys' bytes, whatever there is: thousands per second, in constant memory.
    Counts go to stderr at the end.
    """
    place = _place(app_name, bucket, endpoint_url, region, compat)
    with _telling("ls"):
        count, total = run_in_loop(_list(Places(place), prefix, as_json=as_json))
    _tell(f"{count:,} objects, {total:,} bytes", quiet=quiet)


@commands.command(name="rm", epilog=EXAMPLES["rm"])
def remove(
    *,
    uris: Annotated[list[str], typer.Argument(metavar="URI...", help="s3://bucket/key.")],
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete them; otherwise only say what would go.")
    ] = False,
    min_age_hours: Annotated[
        float,
        typer.Option(
            min=0,
            max=1_000_000,
            help="With an application: younger objects are kept, for their transactions may be "
            "under way. Trusts this machine's clock.",
        ),
    ] = 24,
    app_name: MaybeAppName = None,
    bucket: Bucket = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    compat: CompatOption = None,
) -> None:
    """Delete objects that belong to nobody.

    Refused is what a row or the journal names, what a transaction may still take into use, and,
    without --app, whatever is called as the objects of rows are. If one is refused none is
    deleted.

    Exit code 0: all are deleted, or would be. 1: something was refused, is not there, or could
    not be deleted.
    """
    place = _place(app_name, bucket, endpoint_url, region, compat)
    with _telling("rm"):
        found = list(dict.fromkeys(place.uri(each, "URI") for each in uris))
        work = _remove(Places(place), found, really=delete, min_age=timedelta(hours=min_age_hours))
        is_well = run_in_loop(work)
    if not is_well:
        raise typer.Exit(1)


@commands.command(epilog=EXAMPLES["url"])
def url(
    *,
    uri: Uri,
    expires_minutes: Annotated[
        float, typer.Option(min=1 / 60, max=7 * 24 * 60, help="At most 10080, which is 7 days.")
    ] = 60,
    download_as: Annotated[
        str | None,
        typer.Option(help="A browser saves it under this name.", show_default="it shows it"),
    ] = None,
    app_name: MaybeAppName = None,
    bucket: Bucket = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    compat: CompatOption = None,
    quiet: Quiet = False,
) -> None:
    """Print a URL with which anybody can download an object until it expires: a secret.

    Signed with temporary credentials it expires with them, if that is earlier.
    """
    place = _place(app_name, bucket, endpoint_url, region, compat)
    with _telling("url"):
        expires_in = timedelta(minutes=expires_minutes)
        work = _presign(Places(place), place.uri(uri, "URI"), expires_in, download_as)
        emit(run_in_loop(work))
    until = datetime.now(timezone.utc) + expires_in
    _tell(f"whoever has it can read the object until {until:%Y-%m-%d %H:%M} UTC", quiet=quiet)


# --- what they do, in the event loop


async def _put(
    places: Places,
    uri: str,
    source: Source,
    arguments: dict[str, Any],
    *,
    overwrite: bool,
    quiet: bool,
) -> int:
    with _ending_in_order():
        async with places:
            return await _put_to(places, uri, source, arguments, overwrite=overwrite, quiet=quiet)


async def _put_to(
    places: Places,
    uri: str,
    source: Source,
    arguments: dict[str, Any],
    *,
    overwrite: bool,
    quiet: bool,
) -> int:
    store = await places.store_of(uri)
    await check_may_put(places, store, uri)
    if not overwrite:
        try:
            await store.head(uri)
        except BlobNotFoundError:
            pass
        except StoreAccessError as exc:
            raise CannotRunError(
                f"it cannot be told whether {uri} is there already: {exc.code}. --overwrite "
                "does not ask"
            ) from exc
        else:
            raise UsageError("URI", f"{uri} is there already; --overwrite replaces it")
    with transfer_bar(source.name, is_quiet=quiet) as move:
        return await upload(store, uri, source, arguments=arguments, on_progress=move)


async def _get(
    places: Places, uri: str, target: Path, descriptor: int | None, *, quiet: bool
) -> int:
    with _ending_in_order():
        async with places:
            store = await places.store_of(uri)
            hides = descriptor is not None and os.isatty(
                descriptor
            )  # they would share the terminal
            with transfer_bar(uri.rpartition("/")[2], is_quiet=quiet or hides) as move:
                if descriptor is not None:
                    return await copy_out(store, uri, descriptor, on_progress=move)
                return await download(store, uri, target, on_progress=move)


async def _list(places: Places, prefix: str | None, *, as_json: bool) -> tuple[int, int]:
    async with places:
        return await list_objects(places, prefix, as_json=as_json)


async def _remove(places: Places, uris: list[str], *, really: bool, min_age: timedelta) -> bool:
    async with places:
        removal = Removal(places, min_age=min_age)
        candidates = await removal.judge(uris)
        refused = [each for each in candidates if each.refusal is not None]
        for each in refused:
            _complain(each.uri, each.refusal)
        if really and refused:
            typer.echo("Nothing was deleted.", err=True)
            return False
        allowed = [each for each in candidates if each.refusal is None]
        if not really:
            for each in allowed:
                emit(f"would delete  {_described(each)}")
            typer.echo("Nothing was deleted; --delete does it.", err=True)
            return not refused
        are_gone = True
        for start in range(0, len(allowed), DELETED_AT_ONCE):
            some = allowed[start : start + DELETED_AT_ONCE]
            are_gone &= await _delete(places, removal, some)
        return are_gone


async def _delete(places: Places, removal: Removal, candidates: list[Candidate]) -> bool:
    """Delete what nobody has taken into use meanwhile; tell whether all of it is gone."""
    named = await removal.namers([each.uri for each in candidates])
    is_well = True
    by_store: dict[int, tuple[Any, list[Candidate]]] = {}
    for each in candidates:
        if each.uri in named:
            _complain(each.uri, named[each.uri].refusal)
            is_well = False
            continue
        store = await places.store_of(each.uri)
        by_store.setdefault(id(store), (store, []))[1].append(each)
    for store, some in by_store.values():
        work = store.delete_many([each.uri for each in some])
        report = await run_to_end(work, seconds=2 * store.request_seconds)
        for each in some:
            if each.uri in report.failed:
                _complain(each.uri, report.failed[each.uri])
                is_well = False
            else:
                emit(f"deleted  {_described(each)}")
    return is_well


async def _presign(places: Places, uri: str, expires_in: timedelta, download_as: str | None) -> str:
    async with places:
        store = await places.store_of(uri)
        await store.head(uri)  # a URL that leads nowhere helps nobody
        return await store.presign(uri, expires_in=expires_in, download_as=download_as)


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Have SIGTERM end the transfer as Ctrl-C does, or parts of an upload would be left.

    Raises:
        CannotRunError: it came.
    """
    loop, task, was_told = asyncio.get_running_loop(), asyncio.current_task(), False
    assert task is not None

    def end() -> None:
        nonlocal was_told
        was_told = True
        task.cancel()

    with contextlib.suppress(NotImplementedError, RuntimeError):  # Windows; another thread
        loop.add_signal_handler(signal.SIGTERM, end)
    try:
        yield
    except asyncio.CancelledError as exc:
        if not was_told:
            raise
        raise CannotRunError("ended by SIGTERM") from exc
    finally:
        with contextlib.suppress(NotImplementedError):
            loop.remove_signal_handler(signal.SIGTERM)


# --- what they have in common


def _place(
    app_name: str | None,
    bucket: str | None,
    endpoint_url: str | None,
    region: str | None,
    compat: str | None,
) -> PlaceOptions:
    return PlaceOptions(
        app_name=app_name,
        bucket=bucket,
        endpoint_url=endpoint_url,
        region=region,
        compat=compat,
    )


@contextlib.contextmanager
def _telling(command: str) -> Iterator[None]:
    """Turn trouble into a line and an exit code; end quietly when nobody reads any more."""
    print_anything()
    with explaining(command):
        try:
            yield
            flush()
        except BlobNotFoundError as exc:  # its advice is for programs
            raise CannotRunError(f"cannot {exc.operation} {exc.uri}: {exc.code}") from exc
        except ReaderGoneError as exc:
            _forget_stdout()
            raise typer.Exit(READER_GONE) from exc


def _forget_stdout() -> None:
    """Have Python, which writes what is left of its buffers at its end, write it nowhere."""
    if sys.stdout is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _opening(file: str) -> Iterator[Source]:
    """Open what is uploaded.

    Raises:
        UsageError: it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(open_source(file))
        except OSError as exc:
            raise UsageError("FILE", f"{shown(file)} cannot be read: {exc.strerror}") from exc
        yield source


def _target_uri(place: PlaceOptions, file: str, uri: str | None) -> str:
    name = "" if file == STANDARD else Path(file).name
    text = "" if uri is None else uri
    if not text or text.endswith("/"):
        if not name:
            raise UsageError("URI", "standard input has no name: s3://bucket/key is needed")
        text += name
    return place.uri(text, "URI")


def _target(uri: str, file: str | None, *, overwrite: bool) -> Path:
    """Return the file that is written; ``-`` is standard output."""
    path = Path("." if file is None else file)
    if file == STANDARD:
        return path
    if path.is_dir():
        name = uri.rpartition("/")[2]
        if not name or Path(name).name != name or name == "..":
            raise UsageError("FILE", f"{name!r} is no name for a file: say which")
        path /= name
    path = path.resolve()  # what a link leads to is replaced, and not the link
    if path.is_dir():
        raise UsageError("FILE", f"{shown(str(path))} is a directory")
    if not path.parent.is_dir():
        raise UsageError("FILE", f"there is no directory {shown(str(path.parent))}")
    if path.is_file() and not overwrite:
        raise UsageError("FILE", f"{shown(str(path))} is there already; --overwrite replaces it")
    return path


@contextlib.contextmanager
def _opening_special(target: Path) -> Iterator[int | None]:
    """Open standard output, or a device or a pipe, which is no file that could be replaced.

    Outside of the event loop: to open a pipe waits for its reader.
    """
    if str(target) == STANDARD:
        yield descriptor_of(sys.stdout)
    elif target.exists() and not target.is_file():
        with target.open("wb", buffering=0) as file:
            yield file.fileno()
    else:
        yield None


def _described(each: Candidate) -> str:
    info = each.info
    assert isinstance(info, ObjectInfo)
    at = info.modified_at
    when = "" if at is None else f"{at:%Y-%m-%d %H:%M:%S}  "
    return f"{info.size:,} bytes  {when}{shown(each.uri)}"


def _complain(uri: str, reason: str | None) -> None:
    typer.echo(f"aioblobcol rm: {shown(uri)} is not deleted: {reason}", err=True)


def _tell(text: str, *, quiet: bool) -> None:
    if not quiet:
        typer.echo(text, err=True)
