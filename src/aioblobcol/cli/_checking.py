"""``aioblobcol check``: find the application, compare both stores, print what is wrong.

People read a line for each finding and a summary, programs read JSON lines with ``--json``.
Findings go to stdout, progress and trouble to stderr.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from .._app import BlobApp
from .._check import Check, Finding, FindingKind
from .._uri import root_uri
from ._servers import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .._store._base import Store

APP_OPTION = "--app"


def load_app(name: str) -> BlobApp:
    """Import ``module:attribute``, with the current directory on the path.

    Raises:
        UsageError: there is no such thing, or it is not a `BlobApp`.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(
            APP_OPTION, f"{name!r} is not module:attribute, such as myapp.models:blobs"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not module_name.startswith(exc.name):
            raise  # it is there, and lacks something itself
        raise UsageError(APP_OPTION, f"there is no module {exc.name!r}") from exc
    app = getattr(module, attribute, None)
    if not isinstance(app, BlobApp):
        raise UsageError(APP_OPTION, f"{name} is not a BlobApp, but {type(app).__name__}")
    return app


async def run_check(
    app: BlobApp, *, delete: bool, min_age: timedelta, as_json: bool, console: Console
) -> int:
    """Check every store of *app* and print what is found; return how much is wrong or unknown.

    Raises:
        StoreError, SQLAlchemyError, RuntimeError: as `Check.findings`.
    """
    report: Callable[[Mapping[str, Any], str], None] = _print_json if as_json else _print_line
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that knows no "ü" shows it escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    wrong = 0
    try:
        for name, store in _distinct(app).items():
            wrong += await _check_store(
                app, name, store, delete=delete, min_age=min_age, report=report, console=console
            )
    finally:
        await app.engine.dispose()
    return wrong


async def _check_store(
    app: BlobApp,
    name: str,
    store: Store,
    *,
    delete: bool,
    min_age: timedelta,
    report: Callable[[Mapping[str, Any], str], None],
    console: Console,
) -> int:
    check = Check(
        app.engine,
        store,
        app.metadata,
        uri_columns=app.all_uri_columns,
        journal=app.journal,
        delete=delete,
        min_age=min_age,
    )
    counts: Counter[FindingKind] = Counter()
    deleted = 0
    entered: Any = store  # every store is an async context manager
    async with entered:
        with console.status("comparing") as status:
            check.on_progress = lambda: status.update(
                f"{check.objects:,} objects, {check.cells:,} cells"
            )
            async for finding in check.findings():
                counts[finding.kind] += 1
                deleted += finding.is_condemned
                report(*_described(finding))
    for uri in check.undecided:
        report({"undecided": uri}, f"undecided  {uri}  the store does not answer for it")
    root = root_uri(store.bucket, store.prefix)
    summary: dict[str, Any] = {
        "store": name,
        "root": root,
        "objects": check.objects,
        "cells": check.cells,
        "foreign": check.foreign,
        **{kind.value: counts[kind] for kind in FindingKind},
        "deleted": deleted,
        "undecided": len(check.undecided),
    }
    found = ", ".join(f"{counts[kind]:,} {kind.value}" for kind in FindingKind)
    more = f", {deleted:,} deleted" if delete else ""
    more += f", {check.foreign:,} foreign" if check.foreign else ""
    unclear = f", {len(check.undecided):,} undecided" if check.undecided else ""
    report(
        {"summary": summary},
        f"{root}: {check.objects:,} objects, {check.cells:,} cells: {found}{more}{unclear}",
    )
    return counts.total() - deleted + len(check.undecided)


def _distinct(app: BlobApp) -> dict[str, Store]:
    """Return the stores, once for each bucket and prefix."""
    found: dict[str, tuple[str, Store]] = {}
    for name, store in app.stores_by_name.items():
        found.setdefault(root_uri(store.bucket, store.prefix), (name, store))
    return dict(found.values())


def _described(finding: Finding) -> tuple[Mapping[str, Any], str]:
    when = finding.modified_at
    fields = {
        "kind": finding.kind.value,
        "uri": finding.uri,
        "size": finding.size,
        "modified_at": None if when is None else when.isoformat(),
        "deleted": finding.is_condemned,
    }
    more = [] if finding.size is None else [f"{finding.size:,} bytes"]
    if when is not None:
        more.append(f"{when:%Y-%m-%d %H:%M}")
    if finding.is_condemned:
        more.append("deleted")
    return fields, "  ".join((f"{finding.kind.value:<9}", finding.uri, *more))


def _print_json(fields: Mapping[str, Any], _line: str) -> None:
    print(json.dumps(fields), flush=True)  # noqa: T201 - this is what it is for


def _print_line(_fields: Mapping[str, Any], line: str) -> None:
    Console(highlight=False, soft_wrap=True).print(escape(line))
