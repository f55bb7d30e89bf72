"""How the demo looks: one panel of code, rows, objects and checks for each scenario.

Prints what it is given and judges nothing. Reads well in 80 columns, without colours too.
"""

from __future__ import annotations

import textwrap

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ._scenarios import RowState, Scene
from ._servers import Servers


def show_servers(console: Console, servers: Servers) -> None:
    """Say where the demo runs."""
    console.print(f"database: {escape(servers.database)}", highlight=False, soft_wrap=True)
    console.print(f"objects:  {escape(servers.objects)}", highlight=False, soft_wrap=True)


def show_scene(console: Console, scene: Scene, *, number: int, of: int) -> None:
    """Show one scenario: the code, what came of it in both stores, and the checks."""
    console.print()
    console.rule(f"[bold]{number} of {of}: {scene.title}", align="left")
    console.print(_code(console, scene.code))
    ending = f", {scene.error}" if scene.error else ""
    console.print(f"[bold]{scene.outcome}[/bold]{escape(ending)}", highlight=False)
    console.print(_rows(scene.rows))
    console.print(_objects(scene))
    for claim in scene.held:
        console.print(f"[green]ok[/green]  {escape(claim)}", highlight=False)
    for problem in scene.problems:
        console.print(f"[red]BAD[/red] {escape(problem)}", highlight=False, soft_wrap=True)


def show_end(console: Console, *, scenes: int) -> None:
    """Say that everything held."""
    console.print()
    console.print(
        f"[bold green]All {scenes} scenarios held:[/bold green] both stores agree, byte for byte.",
        highlight=False,
    )


def short(uri: str | None) -> str:
    """Return what tells one object from another at a glance: its column and its id's end."""
    if uri is None:
        return "none"
    column = uri.partition("/col=")[2].partition("/")[0]
    return f"{column} …{uri[-8:]}"


def _code(console: Console, code: str) -> Padding | Text:
    if not console.is_terminal:
        return Text(textwrap.indent(code, "  ") + "\n")
    syntax = Syntax(code, "python", theme="ansi_dark", background_color="default", word_wrap=True)
    return Padding(syntax, (0, 0, 1, 2))


def _rows(rows: tuple[RowState, ...]) -> Table:
    table = _table("rows", "url", "title", "html", "image")
    for row in rows:
        table.add_row(escape(row.url), escape(row.title), short(row.html), short(row.image))
    if not rows:
        table.add_row("(none)")
    return table


def _objects(scene: Scene) -> Table:
    table = _table("objects", "object", "bytes", "what happened", "named by")
    table.columns[1].justify = "right"
    for each in scene.objects:
        is_there = each.size is not None
        table.add_row(
            short(each.uri),
            f"{each.size:,}" if is_there else "gone",
            each.fate,
            f"row's {each.named_by}" if each.named_by else "NO ROW" if is_there else "",
            style=None if is_there else "dim",
        )
    if not scene.objects:
        table.add_row("(none)")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title, title_justify="left", title_style="", box=box.ROUNDED)
    for column in table.columns:
        column.overflow = "fold"
    return table
