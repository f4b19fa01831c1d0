"""Pictures of a run, as matplotlib figures: tensors in, a figure out.

Shapes: L layers, E experts, N domains, M sites, R rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fomoe_pl.federation.placement import Placement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 12
EVEN = "load / mean load (1 = even)"
MISSING = "0.8"  # grey, for what is undefined


def heat_map(values_LE: Tensor, title: str, unit: str, *, even: bool = False, most: float | None = None) -> Figure:
    """Layer by expert.

    Args:
        values_LE: What is shown; NaN is grey.
        title: Of the figure.
        unit: Label of the colour bar.
        even: Whether 1 is the even value: colours then go away from it in both directions.
        most: Upper end of the colours; None is the largest value.
    """
    layers, experts = values_LE.shape
    figure = _figure(max(5.0, 1.8 + 0.3 * experts), max(2.6, 1.3 + 0.26 * layers))
    axes = figure.subplots()
    image = _image(axes, values_LE, even=even, most=most)
    axes.set(title=title, xlabel="expert", ylabel="layer")
    _whole_ticks(axes, experts, layers)
    figure.colorbar(image, ax=axes, label=unit)
    return figure


def timeline(load_RLE: Tensor, steps: Sequence[int]) -> Figure:
    """Each layer's loads over the run: steps by expert, a panel for each layer (at most 12 of them).

    Args:
        load_RLE: Loads over their mean.
        steps: Optimizer steps at which they were taken.
    """
    shown = shown_layers(load_RLE.shape[1])
    figure, panels = _panels(len(shown), width=3.4, height=2.3)
    most = _even_limit(load_RLE)
    for axes, layer in zip(panels, shown, strict=True):
        edges = (steps[0], steps[-1] + (steps[-1] == steps[0]), load_RLE.shape[2] - 0.5, -0.5)
        image = _image(axes, load_RLE[:, layer].T, even=True, most=most, extent=edges)
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set_yticks(_ticks(load_RLE.shape[2]))
    figure.supxlabel("optimizer step of a site", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    figure.suptitle("Load of each expert over the run", fontsize=11)
    figure.colorbar(image, ax=panels, label=EVEN)
    return figure


def domain_maps(load_LNE: Tensor, domains: Sequence[str]) -> Figure:
    """Which experts each domain's text goes to in the global model, a panel for each layer (at most 12 of them)."""
    share_LNE = load_LNE / load_LNE.sum(dim=2, keepdim=True) * load_LNE.shape[2]
    shown = shown_layers(len(load_LNE))
    figure, panels = _panels(len(shown), width=3.4, height=0.9 + 0.2 * len(domains))
    most = _even_limit(share_LNE)
    for axes, layer in zip(panels, shown, strict=True):
        image = _image(axes, share_LNE[layer], even=True, most=most)
        axes.set_title(f"layer {layer}", fontsize=9)
        _whole_ticks(axes, share_LNE.shape[2], len(domains))
        axes.set_yticks(range(len(domains)), domains, fontsize=7)
    figure.supxlabel("expert", fontsize=9)
    figure.suptitle("Picks of each domain's text, global model", fontsize=11)
    figure.colorbar(image, ax=panels, label="picks / even share (1 = even)")
    return figure


def placement_map(placement: Placement) -> Figure:
    """Which site holds which expert, a panel for each layer (at most 12 of them)."""
    import matplotlib as mpl

    holders = placement.holders
    shown = shown_layers(len(holders))
    figure, panels = _panels(len(shown), width=3.4, height=0.9 + 0.2 * placement.n_sites)
    colours = mpl.colormaps["tab10"]
    for axes, layer in zip(panels, shown, strict=True):
        grid = torch.ones(placement.n_sites, len(holders[layer]), 3)
        for expert, sites in enumerate(holders[layer]):
            for site in sites:
                grid[site, expert] = torch.tensor(colours(site % 10)[:3])
        axes.imshow(grid.numpy(), aspect="auto", interpolation="nearest")
        axes.set_title(f"layer {layer}", fontsize=9)
        _whole_ticks(axes, len(holders[layer]), placement.n_sites)
        axes.set_xticks([x - 0.5 for x in range(1, len(holders[layer]))], minor=True)
        axes.set_yticks([y - 0.5 for y in range(1, placement.n_sites)], minor=True)
        axes.grid(which="minor", color="0.85", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("site", fontsize=9)
    figure.suptitle("Placement: experts on a site are coloured", fontsize=11)
    return figure


def shown_layers(n_layers: int) -> list[int]:
    """All layers, or 12 evenly spaced ones."""
    if n_layers <= MOST_PANELS:
        return list(range(n_layers))
    return [round(i * (n_layers - 1) / (MOST_PANELS - 1)) for i in range(MOST_PANELS)]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _panels(n: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(n, 4)
    rows = math.ceil(n / columns)
    figure = _figure(width * columns + 1.2, height * rows + 0.8)
    grid = figure.subplots(rows, columns, squeeze=False)
    panels = list(grid.flat)
    for unused in panels[n:]:
        unused.remove()
    return figure, panels[:n]


def _image(axes: Axes, values: Tensor, *, even: bool, most: float | None = None, extent: Any = None) -> Any:
    import matplotlib as mpl
    from matplotlib.colors import TwoSlopeNorm

    colours = mpl.colormaps["RdBu_r" if even else "viridis"].with_extremes(bad=MISSING)
    shown = values.double()
    finite = shown[shown.isfinite()]
    top = most if most is not None else float(finite.max()) if len(finite) else 1.0
    scale: dict[str, Any] = {"vmin": 0.0, "vmax": top or 1.0}
    if even:
        scale = {"norm": TwoSlopeNorm(1.0, 0.0, most or _even_limit(values))}
    masked = torch.where(shown.isfinite(), shown, torch.nan).numpy()
    return axes.imshow(masked, aspect="auto", interpolation="nearest", cmap=colours, extent=extent, **scale)


def _even_limit(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return max(2.0, float(finite.max())) if len(finite) else 2.0


def _ticks(n: int) -> list[int]:
    return list(range(0, n, max(1, math.ceil(n / 16))))


def _whole_ticks(axes: Axes, n_x: int, n_y: int) -> None:
    axes.set_xticks(_ticks(n_x))
    axes.set_yticks(_ticks(n_y))
    axes.tick_params(labelsize=8)
