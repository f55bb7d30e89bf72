"""``aioblobcol check``: find the application, compare both stores, print what is wrong.

People read a line for each finding and a summary, programs read JSON lines with ``--json``.
Findings go to stdout, progress and trouble to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from .._app import BlobApp
from .._check import Check, Finding, FindingKind
from .._uri import root_uri
from ._check_state import CheckState
from ._servers import UsageError
from ._trouble import print_anything

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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


@dataclasses.dataclass(frozen=True, slots=True)
class CheckOptions:
    """What the command line asks for, beside the application; see its help."""

    app_name: str
    delete: bool
    min_age: timedelta
    jobs: int
    state_path: Path | None
    as_json: bool


async def run_check(app: BlobApp, options: CheckOptions, console: Console) -> int:
    """Check every store of *app* and print what is found; return how much is wrong or unknown.

    Raises:
        UsageError: the state file cannot be used.
        StoreError, SQLAlchemyError, RuntimeError: as `Check.findings`.
    """
    print_anything()
    state = CheckState.load(options.state_path, _kept(app, options))
    talk = _Talk(console, as_json=options.as_json)
    if state.is_resumed:
        talk.warn(
            f"going on with what {options.state_path} says is left; "
            f"{state.wrong_before:,} found before are not printed again"
        )
    wrong = 0
    try:
        await _warn_of_missing_triggers(app, talk)
        for name, store in _distinct(app).items():
            wrong += await _StoreCheck(app, name, store, options, state, talk).run()
    except BaseException:
        with contextlib.suppress(UsageError):  # what has stopped it comes first
            state.write()
        raise
    finally:
        await app.engine.dispose()
    state.remove()
    return wrong


def _kept(app: BlobApp, options: CheckOptions) -> Mapping[str, Any]:
    """Return what a check has to have in common with the one that it takes up; no secrets."""
    url = app.engine.url.difference_update_query(["password"])
    return {
        "app": options.app_name,
        "database": url.render_as_string(hide_password=True),
        "delete": options.delete,
        "min_age_hours": options.min_age / timedelta(hours=1),
    }


async def _warn_of_missing_triggers(app: BlobApp, talk: _Talk) -> None:
    """Say which tables write past the journal, as far as it can tell."""
    missing_triggers = getattr(app.journal, "missing_triggers", None)
    if missing_triggers is None:
        return
    async with app.engine.connect() as connection:
        missing = await connection.run_sync(missing_triggers)
    if missing:
        talk.warn(f"triggers of the journal are missing: {', '.join(missing)}; create them again")


class _Talk:
    """Prints results to stdout; everything else to stderr, where a bar shows how far it is."""

    def __init__(self, console: Console, *, as_json: bool) -> None:
        self._as_json = as_json
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=14),
            TaskProgressColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            redirect_stdout=False,  # it would go to stderr, and be folded
            redirect_stderr=False,
        )
        self._task: TaskID | None = None

    def report(self, fields: Mapping[str, Any], line: str) -> None:
        """Print one result, above the bar."""
        self._bar.stop()
        print(json.dumps(fields) if self._as_json else line, flush=True)  # noqa: T201 - data
        if self._task is not None:
            self._bar.start()

    def warn(self, text: str) -> None:
        """Say what is no finding."""
        if self._as_json:
            self.report({"warning": text}, "")
        self.explain(f"aioblobcol check: {text}")

    def explain(self, text: str) -> None:
        """Say something to people."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str) -> Iterator[None]:
        """Show a bar meanwhile, on a terminal."""
        self._task = self._bar.add_task(escape(what), total=None, told="")
        self._bar.start()
        try:
            yield
        finally:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None

    def show(self, fraction: float | None, told: str) -> None:
        """Move the bar."""
        assert self._task is not None
        total = None if fraction is None else 1
        self._bar.update(self._task, total=total, completed=fraction or 0, told=told)


class _StoreCheck:
    """The check of one store, as it is told."""

    def __init__(
        self,
        app: BlobApp,
        name: str,
        store: Store,
        options: CheckOptions,
        state: CheckState,
        talk: _Talk,
    ) -> None:
        self._name = name
        self._store = store
        self._root = root_uri(store.bucket, store.prefix)
        self._options = options
        self._state = state
        self._talk = talk
        self._check = Check(
            app.engine,
            store,
            app.metadata,
            uri_columns=app.all_uri_columns,
            journal=app.journal,
            delete=options.delete,
            min_age=options.min_age,
            jobs=options.jobs,
            ranges=state.left(self._root),
        )
        self._check.on_progress = self._note
        self._before = state.wrong(self._root)
        self._counts: Counter[FindingKind] = Counter()
        self._deleted = self._undecided = 0
        self._started = time.monotonic()

    @property
    def _wrong(self) -> int:
        found = self._counts.total() - self._deleted + len(self._check.undecided)
        return self._before + found

    async def run(self) -> int:
        """Print what is found; return how much is wrong."""
        entered: Any = self._store  # every store is an async context manager
        async with entered, contextlib.aclosing(self._check.findings()) as findings:
            with self._talk.bar(self._name):
                async for finding in findings:
                    self._counts[finding.kind] += 1
                    self._deleted += finding.is_condemned
                    self._talk.report(*_described(finding))
        self._sum_up()
        return self._wrong

    def _note(self) -> None:
        check = self._check
        for uri in check.undecided[self._undecided :]:
            line = f"undecided  {uri}  the store does not answer for it"
            self._talk.report({"undecided": uri}, line)
        self._undecided = len(check.undecided)
        self._state.note(self._root, check.left, self._wrong)
        rate = check.objects / max(time.monotonic() - self._started, 0.001)
        told = f"{check.objects:,} objects, {check.cells:,} cells, {rate:,.0f}/s"
        self._talk.show(check.fraction, told)

    def _sum_up(self) -> None:
        check = self._check
        summary: dict[str, Any] = {
            "store": self._name,
            "root": self._root,
            "objects": check.objects,
            "cells": check.cells,
            "foreign": check.foreign,
            **{kind.value: self._counts[kind] for kind in FindingKind},
            "deleted": self._deleted,
            "undecided": len(check.undecided),
            "found_before": self._before,
        }
        told = [f"{self._counts[kind]:,} {kind.value}" for kind in self._counts]
        told += [f"{self._deleted:,} deleted"] if self._options.delete else []
        told += [f"{check.foreign:,} foreign"] if check.foreign else []
        told += [f"{len(check.undecided):,} undecided"] if check.undecided else []
        told += [f"{self._before:,} found before"] if self._before else []
        if not self._options.as_json:
            for kind in FindingKind:
                if self._counts[kind]:
                    self._talk.explain(f"{kind.value}: {kind.meaning}")
        self._talk.report(
            {"summary": summary},
            f"{self._root}: {check.objects:,} objects, {check.cells:,} cells: "
            f"{', '.join(told) if told else 'nothing wrong'}",
        )


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
        "reason": finding.reason,
    }
    more = [] if finding.size is None else [f"{finding.size:,} bytes"]
    if when is not None:
        more.append(f"{when:%Y-%m-%d %H:%M}")
    if finding.is_condemned:
        more.append("deleted")
    if finding.reason is not None:
        more.append(finding.reason)
    return fields, "  ".join((f"{finding.kind.value:<9}", finding.uri, *more))
