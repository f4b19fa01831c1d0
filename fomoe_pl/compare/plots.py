"""Plots of several runs, as matplotlib figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fomoe_pl.callbacks.communication import training_bytes
from fomoe_pl.compare.runs import Run
from fomoe_pl.costs.memory import MIB
from fomoe_pl.planner.output import pareto_front

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BITS = "bits per byte, global model"
GHOSTS, GHOST_SHARE = "routing/ghost_excess/mean", "routing/ghost_fraction/mean"
AGAINST = {
    "tokens/global": ("tokens of all sites (millions)", 1e-6),
    "comm/training_wire_MiB": ("sent by site 0 for training (MiB)", 1.0),
    "time/train_s": ("training time (s)", 1.0),
}
ROUTING = {
    "routing/load_entropy/mean": "load entropy (1 = even)",
    "routing/starved_experts/mean": "starved experts of a layer",
    GHOSTS: "ghost fraction beyond even routing",
    "routing/churn/mean": "churn (share of picks changed)",
    "routing/saturation/mean": "saturation (share of the final picks)",
    "routing/site_agreement/mean": "agreement of sites before averaging",
    "routing/drift/mean": "relative drift of holders",
    "val/routing_necessity_nats": "routing necessity (nats a token)",
    "val/domain_information_bits": "domain information of a pick (bits)",
}


def quality(runs: Sequence[Run]) -> Figure | None:
    """Bits per byte against tokens, bytes and seconds; None without curves."""
    drawn = [run.quality() for run in runs]
    tags = [tag for tag in AGAINST if any(tag in run.curves for run in runs)]
    if not tags or not any(len(curve.steps) for curve in drawn):
        return None
    figure = _figure(4.6 * len(tags), 3.6)
    panels = figure.subplots(1, len(tags), squeeze=False)[0]
    for axes, tag in zip(panels, tags, strict=True):
        label, unit = AGAINST[tag]
        for i, (run, curve) in enumerate(zip(runs, drawn, strict=True)):
            x = run.at(tag, curve.steps)
            if x is not None and len(x):
                axes.plot(x * unit, curve.values, marker="o", markersize=3, label=_label(run), color=f"C{i}")
        axes.set(xlabel=label, ylabel=BITS)
        axes.locator_params(axis="x", nbins=6)  # long numbers would run into each other
        axes.grid(alpha=0.3)
    _legend(figure, panels[: len(tags)])
    return figure


def pareto(runs: Sequence[Run]) -> Figure | None:
    """Final bits per byte against bytes sent, with the runs that no other beats in both; None without either."""
    points, shown = [], []
    for i, run in enumerate(runs):
        curve = run.quality()
        if len(curve.values) and math.isfinite(curve.values[-1]):
            points.append((training_bytes(run.report["bytes"]["wire"]) / MIB, float(curve.values[-1])))
            shown.append(i)
    if not points:
        return None
    figure = _figure(6.4, 4.0)
    axes = figure.subplots()
    front = [points[i] for i in pareto_front(points)]
    axes.plot(*zip(*front, strict=True), color="0.6", linestyle="--", zorder=1, label="not beaten in both")
    for i, (x, y) in zip(shown, points, strict=True):
        axes.scatter(x, y, color=f"C{i}", zorder=2, label=_label(runs[i]))
    axes.set(xlabel=AGAINST["comm/training_wire_MiB"][0], ylabel=BITS)
    axes.grid(alpha=0.3)
    axes.margins(0.1)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def routing(runs: Sequence[Run]) -> Figure | None:
    """Health of the routing over the run; None if no run has watched it."""
    tags = [tag for tag in ROUTING if any(_says(run, tag) for run in runs)]
    if not tags:
        return None
    rows = -(-len(tags) // 3)
    figure = _figure(13.8, 2.9 * rows + 0.5)
    panels = list(figure.subplots(rows, 3, squeeze=False).flat)
    for unused in panels[len(tags) :]:
        unused.remove()
    for axes, tag in zip(panels, tags, strict=False):
        for i, run in enumerate(runs):
            if _says(run, tag):
                curve = run.curves[tag]
                marker: Any = "o" if len(curve.steps) < 30 else None
                axes.plot(curve.steps, curve.values, color=f"C{i}", label=_label(run), marker=marker, markersize=3)
        axes.set(xlabel="optimizer step of a site", ylabel=ROUTING[tag])
        axes.yaxis.label.set_size(8)
        axes.grid(alpha=0.3)
    _legend(figure, panels[: len(tags)])
    return figure


def _says(run: Run, tag: str) -> bool:
    """Whether the run has this curve; without ghosts the ghost excess is a constant 0 and is left out."""
    if tag == GHOSTS and GHOST_SHARE in run.curves and not run.curves[GHOST_SHARE].values.any():
        return False
    return tag in run.curves


def _label(run: Run) -> str:
    """A run's name as matplotlib shows it unchanged: `$` is no formula, and `_` in front does not hide it."""
    name = run.name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    found: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    handles, labels = list(found.values()), list(found)
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), fontsize=9)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
