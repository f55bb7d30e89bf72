"""The picture of a run: what a put costs, how long a row takes, how fast and large a stream is."""

from __future__ import annotations

import importlib
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .driver import Result, Results
from .plan import MIB

OWN_COLOUR: Final = "#1f6f8b"
PEER_COLOUR: Final = "#c3ccd1"
FONT_SIZE: Final = 8

PANELS: Final[Sequence[tuple[str, str, Callable[[Result], float], str]]] = (
    ("put", "CPU of one 16 KiB put, microseconds", lambda r: 1e6 * statistics.median(r.cpu), ".0f"),
    (
        "create-8",
        "A row with 8 x 16 KiB, 20 ms from S3, milliseconds",
        lambda r: 1e3 * statistics.median(r.wall),
        ".0f",
    ),
    ("upload", "1 GiB up, MiB/s", lambda r: 1024 / statistics.median(r.wall), ".0f"),
    (
        "upload",
        "1 GiB up, growth of memory in MiB",
        lambda r: max(r.growth, default=0) / MIB,
        ".0f",
    ),
)
LEFT_OUT: Final = ("aioblobcol, a quarter of the size",)


def draw(results: Results, path: Path, *, machine: str) -> None:
    """Write the picture as PNG; nothing if none of its groups ran.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    panels = [panel for panel in PANELS if panel[0] in results]
    if not panels:
        return
    figure, axes = pyplot.subplots(
        (len(panels) + 1) // 2, 2, figsize=(11, 3.3 * ((len(panels) + 1) // 2)), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (group, title, value, form) in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, title, _values(results[group], value), form)
    about = textwrap.fill(machine, 190)
    figure.text(0.01, 0.005, about, fontsize=FONT_SIZE - 2, color="#555555")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _values(contenders: Mapping[str, Result], value: Callable[[Result], float]) -> dict[str, float]:
    return {
        name: value(result)
        for name, result in contenders.items()
        if result.wall and name not in LEFT_OUT
    }


def _draw_panel(axis: Any, title: str, values: Mapping[str, float], form: str) -> None:
    is_more_better = title.endswith("MiB/s")
    names = sorted(values, key=lambda name: values[name], reverse=not is_more_better)  # best on top
    colours = [OWN_COLOUR if name.startswith("aioblobcol") else PEER_COLOUR for name in names]
    bars = axis.barh(names, [values[name] for name in names], color=colours)
    axis.bar_label(bars, fmt=f"%{form}", padding=3, fontsize=FONT_SIZE)
    axis.set_title(title, fontsize=FONT_SIZE + 2, loc="left")
    axis.tick_params(labelsize=FONT_SIZE, left=False, labelbottom=False, bottom=False)
    axis.margins(x=0.12)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
