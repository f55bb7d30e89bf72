"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from ._places import COMPAT_NAMES

AppName = Annotated[
    str,
    typer.Option(
        "--app",
        envvar="AIOBLOBCOL_APP",
        help="Where the BlobApp stands, such as myapp.models:blobs.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object per line, for programs.")]

_WITHOUT_APP: Final = "Without an application"

MaybeAppName = Annotated[
    str | None,
    typer.Option(
        "--app",
        envvar="AIOBLOBCOL_APP",
        help="Where the BlobApp stands, such as myapp.models:blobs: its stores know their servers "
        "and credentials.",
        show_default="none",
    ),
]
Bucket = Annotated[
    str | None,
    typer.Option(
        help="For keys that are given without s3://bucket/.", rich_help_panel=_WITHOUT_APP
    ),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option(
        help="URL of an S3-compatible server.",
        show_default="AWS, or AWS_ENDPOINT_URL",
        rich_help_panel=_WITHOUT_APP,
    ),
]
Region = Annotated[
    str | None,
    typer.Option(
        help="The bucket's region.",
        show_default="the environment's",
        rich_help_panel=_WITHOUT_APP,
    ),
]
CompatOption = Annotated[
    str | None,
    typer.Option(
        "--compat",
        help=f"What the server understands: {', '.join(COMPAT_NAMES)}.",
        show_default="aws, or generic with --endpoint-url",
        autocompletion=lambda: list(COMPAT_NAMES),
        rich_help_panel=_WITHOUT_APP,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no figures, only trouble.")
]
