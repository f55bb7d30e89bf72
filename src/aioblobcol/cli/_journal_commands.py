"""What operators run for the journal: worker, status, ddl, retire-table, claim, disown."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Annotated, Final

import typer
from rich.console import Console

from .._app import BlobApp
from .._journal import claim as claim_stores
from .._journal import disown as disown_stores
from .._status import JournalStatus, journal_status
from .._uri import root_uri
from ._checking import load_app
from ._opening import journal_of, opened
from ._options import AppName, AsJson
from ._retiring import Retirement, find_table, retire
from ._running import run_in_loop
from ._scripts import drop_script, script
from ._servers import UsageError
from ._status_report import as_json as status_as_json
from ._status_report import show_status
from ._trouble import explaining, print_anything
from ._working import WorkerOptions, run_worker

EXAMPLES: Final = {
    "worker": (
        "Examples: `aioblobcol worker --app myapp.models:blobs` under systemd or Kubernetes; "
        "`aioblobcol worker --once` from cron, with AIOBLOBCOL_APP set."
    ),
    "status": (
        "Example of an alarm: `aioblobcol status --app myapp.models:blobs --max-lag-minutes 30 "
        "|| notify`."
    ),
    "ddl": (
        "Example: `aioblobcol ddl --app myapp.models:blobs --dialect postgresql | psql -v "
        "ON_ERROR_STOP=1 mydatabase`."
    ),
    "retire": (
        "Example: `aioblobcol retire-table invoices_2019 --partition-of invoices --yes`, and "
        "then ALTER TABLE ... DETACH PARTITION or DROP TABLE."
    ),
    "claim": (
        "Example: after a move to another server, `aioblobcol claim --take-over`, once the old "
        "database is out of use."
    ),
    "disown": (
        "Example: right after a copy of production was restored for staging, and before a worker "
        "or an application runs on it: `aioblobcol disown --app myapp.models:blobs`."
    ),
}

commands = typer.Typer()


@commands.command(epilog=EXAMPLES["worker"])
def worker(
    *,
    app_name: AppName,
    once: Annotated[bool, typer.Option("--once", help="Delete what is due now, and exit.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Entries per round.")] = 500,
    poll_seconds: Annotated[
        float, typer.Option(min=0.01, help="How long to wait when nothing is due.")
    ] = 5,
    quarantine_minutes: Annotated[
        float,
        typer.Option(
            min=0,
            help="How long a request may live. What was never in a row is deleted once more "
            "after it, for its upload may be late.",
        ),
    ] = 60,
    as_json: AsJson = False,
) -> None:
    """Delete the objects that no row wants any more, as the journal says.

    Run one or more, on any machines. What cannot be deleted or reached is tried again later.
    SIGTERM and Ctrl-C stop it after the round under way, with exit code 0. With --once, exit
    code 1: an object could not be deleted, or a store is not this database's (see claim).
    """
    options = WorkerOptions(
        once=once,
        batch_size=batch_size,
        poll_every=timedelta(seconds=poll_seconds),
        quarantine=timedelta(minutes=quarantine_minutes),
        as_json=as_json,
    )
    with explaining("worker"):
        is_well = run_in_loop(run_worker(load_app(app_name), options))
    if not is_well:
        raise typer.Exit(1)


@commands.command(epilog=EXAMPLES["status"])
def status(
    *,
    app_name: AppName,
    max_lag_minutes: Annotated[
        float | None,
        typer.Option(
            min=0, help="Exit code 1 if the worker is further behind.", show_default="no limit"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the journal: how many entries of each kind, how old, and how far the worker is behind.

    Asks the database only. Exit code 1, for an alarm: an object is parked (S3 refuses to delete
    it; somebody has to act), or the worker is further behind than --max-lag-minutes.
    """
    with explaining("status"):
        found = run_in_loop(_status(load_app(app_name)))
    print_anything()
    if as_json:
        typer.echo(status_as_json(found))
    else:
        show_status(found, Console())
    is_late = max_lag_minutes is not None and found.lag > timedelta(minutes=max_lag_minutes)
    if found.parked_count or is_late:
        raise typer.Exit(1)


@commands.command(epilog=EXAMPLES["ddl"])
def ddl(
    *,
    app_name: AppName,
    dialect: Annotated[
        str | None,
        typer.Option(help="postgresql or sqlite.", show_default="the application's"),
    ] = None,
    table: Annotated[
        bool,
        typer.Option(
            "--table/--no-table",
            help="With the journal's own tables, or the triggers only, which may be run again.",
        ),
    ] = True,
    indexes: Annotated[
        bool, typer.Option("--indexes", help="Create the proposed indexes, too.")
    ] = False,
    drop: Annotated[
        bool,
        typer.Option("--drop", help="Take the triggers away; the tables stay for the worker."),
    ] = False,
) -> None:
    """Print the SQL that installs the journal and its triggers, or takes them away.

    Run it after the tables with URIs are there, and with --no-table again whenever such columns
    or partitions were added. Indexes on the columns with URIs are proposed in comments.
    """
    with explaining("ddl"):
        app = load_app(app_name)
        name = dialect or app.engine.dialect.name
        if drop and (indexes or not table):
            raise UsageError("--drop", "goes with neither --no-table nor --indexes")
        if drop:
            text = drop_script(journal_of(app), name)
        else:
            text = script(journal_of(app), name, with_table=table, with_indexes=indexes)
    print_anything(encoding="utf-8")  # escapes would change what it means
    typer.echo(text)


@commands.command(name="retire-table", epilog=EXAMPLES["retire"])
def retire_table(
    *,
    table: Annotated[str, typer.Argument(help="Its name, with its schema if it has one.")],
    app_name: AppName,
    partition_of: Annotated[
        str | None, typer.Option(help="The table is a partition of this one.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only say what.")] = False,
) -> None:
    """Let go of all objects that a table names, before it is dropped or detached.

    No trigger sees DROP and DETACH: the objects would stay for ever. This sets the columns with
    URIs to NULL, or deletes the rows where a column takes no NULL; the worker deletes the objects
    when their retention is over.
    """
    with explaining("retire-table"):
        found = run_in_loop(_retire(load_app(app_name), table, partition_of, really=yes))
    if found.deletes_rows:
        how = "all its rows are deleted" if yes else "all its rows would be deleted"
    else:
        names = ", ".join(found.columns)
        how = f"{names} {'are' if yes else 'would be'} NULL"
    done = "were retired" if yes else "would be retired"
    typer.echo(f"{found.table}: {found.objects:,} objects in {found.rows:,} rows {done}; {how}")
    if not yes:
        typer.echo("Nothing was changed; --yes does it.", err=True)


@commands.command(epilog=EXAMPLES["claim"])
def claim(
    *,
    app_name: AppName,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Also from another database, which deletes nothing there from then on.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make this database the one that deletes in the journal's stores.

    A store's prefix belongs to one database. The first worker claims it by itself; a copy of the
    database, or one that was moved to another server, deletes nothing until it is told whose the
    objects are. Without --take-over, what another database owns is refused with exit code 1.
    """
    with explaining("claim"):
        for fields in run_in_loop(_claim(load_app(app_name), take_over=take_over)):
            line = f"{fields['root']} {fields['meaning']}"
            typer.echo(json.dumps(fields) if as_json else line)


@commands.command(epilog=EXAMPLES["disown"])
def disown(*, app_name: AppName) -> None:
    """Make this database delete nothing: for a copy of another one. Asks the database only.

    The stores, and the database that owns them, stay as they are. `claim --take-over` takes it
    back.
    """
    with explaining("disown"):
        for root in run_in_loop(_disown(load_app(app_name))):
            typer.echo(f"{root} is not this database's any more: it deletes nothing there.")


async def _status(app: BlobApp) -> JournalStatus:
    try:
        return await journal_status(app.engine, journal_of(app))
    finally:
        await app.engine.dispose()


async def _retire(app: BlobApp, name: str, parent: str | None, *, really: bool) -> Retirement:
    journal = journal_of(app)
    try:
        journaled = find_table(journal, name, parent)
        return await retire(app.engine, journal, journaled, really=really)
    finally:
        await app.engine.dispose()


async def _claim(app: BlobApp, *, take_over: bool) -> list[dict[str, str]]:
    async with opened(app) as journal:
        states = await claim_stores(journal, app.engine, take_over=take_over)
    found = []
    for name, state in states.items():
        store = journal.stores[name]
        root = root_uri(store.bucket, store.prefix)
        found.append({"store": name, "root": root, "state": state.value, "meaning": state.meaning})
    return found


async def _disown(app: BlobApp) -> list[str]:
    journal = journal_of(app)
    try:
        await disown_stores(journal, app.engine)
    finally:
        await app.engine.dispose()
    return [root_uri(store.bucket, store.prefix) for store in journal.stores.values()]
