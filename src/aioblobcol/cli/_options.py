"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

AppName = Annotated[
    str,
    typer.Option(
        "--app",
        envvar="AIOBLOBCOL_APP",
        help="Where the BlobApp stands, such as myapp.models:blobs.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object per line, for programs.")]
