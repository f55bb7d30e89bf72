"""The commands and their options.

Results go to stdout, trouble to stderr in one line. Exit code 0: all held; 1: something did
not, or a server could not be used; 2: an option is unusable; 130: interrupted.
"""

from __future__ import annotations

from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ._checking import CheckOptions, load_app, run_check
from ._journal_commands import commands as journal_commands
from ._object_commands import commands as object_commands
from ._options import AppName
from ._printing import show_end, show_scene, show_servers
from ._running import run_in_loop
from ._scenarios import SCENARIOS, play
from ._servers import BrokenInvariantError, Options, check, open_servers
from ._trouble import explaining

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Large binary columns in S3, their URIs in the row, and both stores always agree.",
)


def _show_version(*, is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"aioblobcol {version('aioblobcol')}")
        raise typer.Exit


@app.callback()
def _main(
    *,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=lambda value: _show_version(is_wanted=value),
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Say which options stand before a command."""


@app.command()
def demo(
    *,
    database_url: Annotated[
        str | None,
        typer.Option(
            help="Async SQLAlchemy URL, such as postgresql+asyncpg://user:password@host/database. "
            "A table of its own is created there and dropped again.",
            show_default="a SQLite file, temporary",
        ),
    ] = None,
    s3_endpoint: Annotated[
        str | None,
        typer.Option(help="URL of an S3-compatible server; needs --bucket.", show_default="AWS"),
    ] = None,
    bucket: Annotated[
        str | None,
        typer.Option(
            help="An existing bucket. Credentials come from the environment or a profile.",
            show_default="moto's S3 server, in process",
        ),
    ] = None,
    region: Annotated[
        str | None, typer.Option(help="The bucket's region.", show_default="the environment's")
    ] = None,
    prefix: Annotated[
        str, typer.Option(help="The demo's objects go under a new name below this prefix.")
    ] = "aioblobcol-demo",
) -> None:
    """Create, update and delete a row with two blobs, let some of it fail, and check both stores.

    Runs on nothing but this package by default; with options, on real servers.
    """
    options = Options(
        database_url=database_url,
        s3_endpoint=s3_endpoint,
        bucket=bucket,
        region=region,
        prefix=prefix,
    )
    with explaining("demo", interrupted="interrupted, and tidied up"):
        check(options)
        run_in_loop(run_demo(options, Console()))


@app.command(name="check")
def check_stores(
    *,
    app_name: AppName,
    delete: Annotated[
        bool,
        typer.Option(
            "--delete",
            help="Delete the orphans that are old enough: with a journal its worker does, so that "
            "nobody can take them into use meanwhile. Nothing else is ever deleted.",
        ),
    ] = False,
    min_age_hours: Annotated[
        float,
        typer.Option(
            min=0,
            help="Younger objects are no orphans: their transactions may be under way. "
            "Trusts this machine's clock. With a journal whose triggers are all there and strict, "
            "0 is safe.",
        ),
    ] = 24,
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            help="Look at so many ranges of keys at the same time. Each lists a part of the "
            "bucket and reads all tables, on a connection of its own; worth it where the bucket is "
            "far away.",
        ),
    ] = 1,
    state: Annotated[
        Path | None,
        typer.Option(
            help="A file that keeps how far it is: an interrupted check goes on there when it is "
            "run again with the same options. Removed when all is done.",
            show_default="none, it would begin anew",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print a JSON object per line, for programs: findings, then a summary for each "
            "store.",
        ),
    ] = False,
) -> None:
    """Compare the bucket with the rows, in both directions, and with the journal if there is one.

    Finds rows whose object is missing or has another size (dangling, size_mismatch), or is about
    to be deleted (doomed), objects that several cells name (shared), entries of the journal that
    nobody deals with (stuck), and objects that no row names (orphan). Every finding is looked at
    twice before it is printed.

    Reads only, unless told to delete. Run it without --delete first: if a model is not imported,
    all of its objects look like orphans.

    Exit code 0: all is well, or was deleted. 1: something is wrong, or could not be decided.
    2: an option is unusable. 130: interrupted.
    """
    options = CheckOptions(
        app_name=app_name,
        delete=delete,
        min_age=timedelta(hours=min_age_hours),
        jobs=jobs,
        state_path=state,
        as_json=as_json,
    )
    more = "" if state is None else f"; run it again to go on from what {state} says is left"
    with explaining("check", RuntimeError, interrupted=f"interrupted{more}"):
        wrong = run_in_loop(run_check(load_app(app_name), options, Console(stderr=True)))
    if wrong:
        raise typer.Exit(1)


app.add_typer(journal_commands)
app.add_typer(object_commands)


async def run_demo(options: Options, console: Console) -> None:
    """Play the scenarios in order, up to the first that goes wrong, and show each.

    Raises:
        BrokenInvariantError: a scenario left something that must not be.
        CannotRunError: a server cannot be used.
    """
    async with open_servers(options) as servers:
        show_servers(console, servers)
        for number, scenario in enumerate(SCENARIOS, start=1):
            scene = await play(scenario, engine=servers.engine, store=servers.store)
            show_scene(console, scene, number=number, of=len(SCENARIOS))
            if scene.problems:
                raise BrokenInvariantError(
                    f"an invariant does not hold in {scene.title!r}, see BAD"
                )
    show_end(console, scenes=len(SCENARIOS))
