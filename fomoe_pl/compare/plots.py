"""Plots of several runs, as matplotlib figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fomoe_pl.callbacks.communication import training_bytes
from fomoe_pl.compare.events import Floats
from fomoe_pl.compare.groups import Group, grouped
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
    """Bits per byte against tokens, bytes and time; None without curves.

    Runs that differ in seeds alone are one line, their mean, and a band of one standard deviation.
    """
    tags = [tag for tag in AGAINST if any(tag in run.curves for run in runs)]
    if not tags or not any(len(run.quality().steps) for run in runs):
        return None
    figure = _figure(4.6 * len(tags), 3.6)
    panels = figure.subplots(1, len(tags), squeeze=False)[0]
    for axes, tag in zip(panels, tags, strict=True):
        label, unit = _axis(tag, runs)
        for i, group in enumerate(grouped(runs)):
            for x, mean, std in _lines(group, tag):
                axes.plot(x * unit, mean, marker="o", markersize=3, label=_label(group.name), color=f"C{i}")
                if std is not None:
                    axes.fill_between(x * unit, mean - std, mean + std, color=f"C{i}", alpha=0.2, linewidth=0)
        axes.set(xlabel=label, ylabel=BITS)
        axes.locator_params(axis="x", nbins=6)  # long numbers would run into each other
        axes.grid(alpha=0.3)
    _legend(figure, panels[: len(tags)])
    return figure


def _axis(tag: str, runs: Sequence[Run]) -> tuple[str, float]:
    """What an axis is called, and by how much its values are multiplied."""
    most = max((float(run.curves[tag].values[-1]) for run in runs if tag in run.curves), default=0.0)
    if tag == "time/train_s" and most > 7200:
        return "training time (h)", 1 / 3600
    return AGAINST[tag]


def _lines(group: Group, tag: str) -> list[tuple[Floats, Floats, Floats | None]]:
    """Abscissae, means and standard deviations; a line for each run where they were not validated at the same steps."""
    found = [(curve := run.quality(), run.at(tag, curve.steps)) for run in group.runs]
    drawn = [(curve, x) for curve, x in found if x is not None and len(x)]
    if len(drawn) > 1 and all(np.array_equal(curve.steps, drawn[0][0].steps) for curve, _ in drawn):
        values = np.stack([curve.values for curve, _ in drawn])
        return [(np.mean([x for _, x in drawn], axis=0), values.mean(axis=0), values.std(axis=0, ddof=1))]
    return [(x, curve.values, None) for curve, x in drawn]


def pareto(runs: Sequence[Run]) -> Figure | None:
    """Final bits per byte against bytes sent, with the runs that no other beats in both; None without either.

    Runs that differ in seeds alone are one point, their mean, with a bar of one standard deviation.
    """
    points, shown = [], []
    for i, group in enumerate(grouped(runs)):
        curves = [run.quality() for run in group.runs]
        ends = np.array([c.values[-1] for c in curves if len(c.values) and math.isfinite(c.values[-1])])
        if len(ends):
            sent = np.mean([training_bytes(run.report["bytes"]["wire"]) / MIB for run in group.runs])
            points.append((float(sent), float(ends.mean())))
            shown.append((i, group.name, float(ends.std(ddof=1)) if len(ends) > 1 else None))
    if not points:
        return None
    figure = _figure(6.4, 4.0)
    axes = figure.subplots()
    front = [points[i] for i in pareto_front(points)]
    axes.plot(*zip(*front, strict=True), color="0.6", linestyle="--", zorder=1, label="not beaten in both")
    for (i, name, std), (x, y) in zip(shown, points, strict=True):
        axes.scatter(x, y, color=f"C{i}", zorder=2, label=_label(name))
        if std is not None:
            axes.errorbar(x, y, yerr=std, color=f"C{i}", capsize=3, zorder=2)
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
                axes.plot(curve.steps, curve.values, color=f"C{i}", label=_label(run.name), marker=marker, markersize=3)
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


def _label(name: str) -> str:
    """A name as matplotlib shows it unchanged: `$` is no formula, and `_` in front does not hide it."""
    name = name.replace("$", r"\$")
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
