# SPDX-License-Identifier: AGPL-3.0-or-later
"""`prune.png`: the channels that a run removed from each layer, and the fitness over the run, in 1600 x 900 pixels.

The picture has its own Figure, because Ultralytics uses the figures of pyplot. The settings of matplotlib are replaced
while the picture is drawn, and restored after that.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_prune.env.files import write_bytes
from yolo_prune.report.data import LayerRow, Report
from yolo_prune.report.history import History
from yolo_prune.report.history_chart import draw_history, name_cuts
from yolo_prune.report.svg import default_style, plain_axes
from yolo_prune.report.table import MISSING, difference, fitness, number, percent

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 16.0, 9.0, 100  # inches, inches, pixels per inch
LEFT, RIGHT = 0.055, 0.945  # edges of both panels, as fractions of the width of the figure

# Blue and vermilion (after Okabe & Ito, 2008) look different with every common colour blindness. The rest is grey.
DENSE, PRUNED, PROTECTED = "#bcd4e6", "#0a5c94", "#8c8c8c"
INK, QUIET, FAINT, BAND = "#222222", "#666666", "#d9d9d9", "#f5f5f5"
COLOURS = {"ink": INK, "quiet": QUIET, "faint": FAINT, "sheet": "#ffffff", "dense": DENSE, "pruned": PRUNED}
COLOURS |= {"cost": "#d55e00", "cost-soft": "#d55e0018", "back": "#a33b00", "back-soft": "#d55e0017"}

GAP = 1.2  # between the convolutions of two modules, in widths of a bar
DIGIT = 0.64  # width of a digit in DejaVu Sans, as a fraction of the font size


def draw(report: Report, path: str | Path) -> Path:
    """Draw `report` into the PNG file `path`, which is never incomplete. None values leave gaps."""
    buffer = io.BytesIO()
    with default_style():
        compose(report).savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return write_bytes(path, buffer.getvalue())


def compose(report: Report) -> Figure:
    """The picture of `report` as a Figure, not yet rendered."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    _header(figure, report)
    _layers(figure.add_axes((LEFT, 0.525, RIGHT - LEFT, 0.275)), report.layers)
    _history(figure, report)
    return figure


# ---- header ------------------------------------------------------------------------------------------------


def _header(figure: Figure, report: Report) -> None:
    heading = title(report)
    size = min(21.0, 0.44 * WIDTH * 72 / (len(heading) * 0.68))
    figure.text(LEFT, 0.936, heading, fontsize=size, weight="bold", color=INK, va="center")
    figure.text(LEFT, 0.889, _subtitle(report), fontsize=12, color=QUIET, va="center")
    dense, pruned = report.dense, report.pruned
    change = difference(pruned.fitness, dense.fitness).replace("-", "\N{MINUS SIGN}")
    tiles = [
        _tile("GFLOPs", dense.flops, pruned.flops, 1e9),
        _tile("M parameters", dense.params, pruned.params, 1e6),
        _tile("MB on disk", dense.size_mb, pruned.size_mb, 1.0),
        ("fitness", fitness(dense.fitness), fitness(pruned.fitness), change),
    ]
    for (label, before, after, note), x in zip(tiles, (0.53, 0.635, 0.74, 0.845), strict=True):
        both = before if after == MISSING else f"{before} → {after}"
        figure.text(x, 0.963, label, fontsize=11, color=QUIET, va="center")
        figure.text(x, 0.927, both, fontsize=14, color=INK, va="center", weight="bold")
        if MISSING not in (before, after):
            figure.text(x, 0.889, note, fontsize=11, color=QUIET, va="center")


def _tile(label: str, before: float | None, after: float | None, scale: float) -> tuple[str, str, str, str]:
    return label, number(before, scale), number(after, scale), f"{percent(after, before)} kept"


def title(report: Report) -> str:
    """A short title of a run: the model, and the share that was kept."""
    name = _shorten(model_name(report.model), 24)
    if report.status == "failed":
        return f"{name}: run failed"
    if report.status == "running":
        return f"{name}: run in progress"
    if report.timed and report.timed.ratio:
        return f"{name} pruned to {percent(report.timed.ratio, 1)} of its latency"
    kept = percent(report.pruned.flops, report.dense.flops)
    return f"{name} pruned" if kept == MISSING else f"{name} pruned to {kept} of its FLOPs"


def model_name(path: str) -> str:
    """`yolo11n` for yolo11n.pt, but `train3/best` for runs/train3/weights/best.pt."""
    parts = Path(path.replace("\\", "/"))
    run = f"{parts.parts[-3]}/" if parts.parent.name == "weights" and len(parts.parts) > 2 else ""
    return run + parts.stem or "model"


def _subtitle(report: Report) -> str:
    rounds = len(report.rounds)
    parts = [Path(report.data).name, "" if report.imgsz is None else f"imgsz {report.imgsz}"]
    parts += [f"{rounds} round{'s' if rounds != 1 else ''}"]
    parts += ["" if report.epochs is None else f"{report.epochs} epoch{'s' if report.epochs != 1 else ''}"]
    return _shorten(",  ".join(part for part in parts if part), 68)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# ---- upper panel: channels of every convolution ------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    """A top-level module: its label, the edges of its slot, and the centres of its bars, in widths of a bar."""

    label: str
    left: float
    right: float
    centres: tuple[float, ...]


def _layers(axes: Axes, layers: Sequence[LayerRow]) -> None:
    _panel(axes, "Output channels of every convolution", pad=14)
    if not layers:
        axes.set_xticks([])
        axes.set_yticks([])
        _write_in_the_middle(axes, "no layers recorded")
        return
    modules = _arrange(layers)
    centres = [centre for module in modules for centre in module.centres]
    axes.set_xlim(modules[0].left, modules[-1].right)
    # A scale of square roots starts at zero, as bars should, and still shows 16 channels beside 1024.
    axes.set_yscale("function", functions=(_root, _square))
    top = max(2, *(max(row.dense, row.pruned or 0) for row in layers))
    axes.set_ylim(0, top * 1.06)
    apart = 0.045 * math.sqrt(top)  # closer ticks would overlap
    ticks = [tick for power in range(3, 24) if (tick := 2**power) <= top and math.sqrt(tick) * 0.29 > apart]
    ticks.insert(0, 0)
    axes.set_yticks(ticks, labels=[str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylabel("channels (square-root scale)", fontsize=11, color=QUIET)
    for module in modules[::2]:
        axes.axvspan(module.left, module.right, color=BAND, linewidth=0, zorder=0)
    _bars(axes, centres, layers)
    middles = [(module.left + module.right) / 2 for module in modules]
    axes.set_xticks(middles, labels=[module.label for module in modules])
    axes.tick_params(axis="x", labelsize=_label_size(modules), length=0, pad=3)
    axes.set_xlabel("module (model.N), its convolutions in model order", fontsize=11, color=QUIET)


def _root(values: Any) -> Any:
    return values.clip(min=0) ** 0.5


def _square(values: Any) -> Any:
    return values**2


def _bars(axes: Axes, centres: Sequence[float], layers: Sequence[LayerRow]) -> None:
    from matplotlib.patches import Patch

    def bars(rows: Iterable[tuple[float, int | None]], width: float, **style: Any) -> None:
        drawn = [(x, height) for x, height in rows if height is not None]
        axes.bar([x for x, _ in drawn], [height for _, height in drawn], width=width, **style)

    free = [(x, row) for x, row in zip(centres, layers, strict=True) if not row.protected]
    kept = [(x, row) for x, row in zip(centres, layers, strict=True) if row.protected]
    bars(((x, row.dense) for x, row in free), 0.86, color=DENSE, linewidth=0, zorder=2)
    bars(((x, row.pruned) for x, row in free), 0.86, color=PRUNED, linewidth=0, zorder=3)
    protected: dict[str, Any] = {"facecolor": "white", "edgecolor": PROTECTED, "hatch": "/////", "lw": 0.6}
    bars(((x, row.pruned or row.dense) for x, row in kept), 0.80, zorder=3, **protected)
    handles: list[Artist] = [Patch(facecolor=DENSE, label="dense"), Patch(facecolor=PRUNED, label="pruned")]
    if kept:
        handles.append(Patch(label="protected, unchanged", **protected))
    _legend(axes, handles, pad=8)


def _arrange(layers: Sequence[LayerRow]) -> list[_Module]:
    """Places for the bars. Consecutive layers of a module share a slot, which is wide enough for its label."""
    runs: list[tuple[str, int]] = []
    for row in layers:
        label = _module_label(row.name)
        if runs and runs[-1][0] == label:
            runs[-1] = (label, runs[-1][1] + 1)
        else:
            runs.append((label, 1))
    # A wider slot makes all bars narrower, so that labels need more widths of a bar. A few steps reach the fixed point.
    panel = (RIGHT - LEFT) * WIDTH * 72  # points
    total = sum(count + GAP for _, count in runs)
    for _ in range(20):
        character = DIGIT * 9 * total / panel
        needed = [max(count + GAP, (len(label) + 0.9) * character) for label, count in runs]
        total = sum(needed)
        if total > 6 * len(layers):  # a model with many long names: smaller labels instead
            break
    modules, left = [], 0.0
    for (label, count), width in zip(runs, needed, strict=True):
        first = left + (width - count) / 2 + 0.5
        modules.append(_Module(label, left, left + width, tuple(first + index for index in range(count))))
        left += width
    return modules


def _module_label(name: str) -> str:
    """`23` for `model.23.cv2.0.2`: the index of the module in an Ultralytics model, else its first name."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "model" and parts[1].isdigit() else parts[0]


def _label_size(modules: Sequence[_Module]) -> float:
    """The font size in points, at most 10, with which every label fits into its slot."""
    point = (RIGHT - LEFT) * WIDTH * 72 / modules[-1].right
    fits = ((module.right - module.left) / (len(module.label) + 0.5) for module in modules)
    return min(10.0, min(fits) * point / DIGIT)


# ---- lower panels: fitness and FLOPs over the epochs --------------------------------------------------------


def _history(figure: Figure, report: Report) -> None:
    history = History.of(report)
    two = history.measured and bool(history.kept)
    top = figure.add_axes((LEFT, 0.185, RIGHT - LEFT, 0.205) if two else (LEFT, 0.07, RIGHT - LEFT, 0.32))
    foot = figure.add_axes((LEFT, 0.07, RIGHT - LEFT, 0.085)) if two else top
    above, below = top if history.measured else None, foot if history.kept else None
    if above is None and below is None:
        _panel(top, "Fitness while training, and FLOPs kept")
        top.set(xticks=[], yticks=[])
        _write_in_the_middle(top, "nothing recorded")
        return
    handles = draw_history(above, below, history, COLOURS, 10)
    words = "Fitness while training, and FLOPs kept" if above else "FLOPs kept (fitness was not measured)"
    _headline(top, words, pad=30)
    _legend(top, handles, pad=24)
    name_cuts(top, history, COLOURS, 10)


# ---- shared ------------------------------------------------------------------------------------------------


def _panel(axes: Axes, title: str, pad: float = 0.0) -> None:
    plain_axes(axes, COLOURS, 10)
    _headline(axes, title, pad)


def _headline(axes: Axes, title: str, pad: float) -> None:
    axes.set_title(title, loc="left", fontsize=14, weight="bold", color=INK, pad=pad)


def _legend(axes: Axes, handles: Sequence[Artist], pad: float) -> None:
    """A legend in one line, `pad` points above the panel, so that it covers no data."""
    if handles:
        anchor = (1.0, 1.0 + pad / (72 * HEIGHT * axes.get_position().height))
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": anchor, "borderaxespad": 0.0}
        look: dict[str, Any] = {"ncol": len(handles), "frameon": False, "fontsize": 11, "labelcolor": INK}
        axes.legend(handles=list(handles), **place, **look)


def _write_in_the_middle(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=13, color=QUIET)
