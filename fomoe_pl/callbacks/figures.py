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
MOST_TICKS = 16
EVEN = "load / mean load (1 = even)"
MOST_EVEN = 4.0
"""Upper end of the reds (more than even): otherwise one early outlier would leave everything else pale."""
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
    figure, [axes] = _panels(1, width=max(3.4, 0.3 * experts), height=max(1.6, 0.26 * layers), top=0.35)
    image = _image(axes, values_LE, even=even, most=most)
    axes.set_title(title, y=1)
    axes.set(xlabel="expert", ylabel="layer")
    _whole_ticks(axes, experts, layers)
    _colour_bar(figure, image, unit, values_LE)
    return figure


def timeline(load_RLE: Tensor, edges: Sequence[int], rounds_each: int = 1) -> Figure:
    """Each layer's loads over the run: steps by expert, a panel for each layer (at most 12 of them).

    Args:
        load_RLE: Loads over their mean, a column of the picture each.
        edges: Optimizer steps between which they were taken, one more than columns.
        rounds_each: Rounds of which a column is the mean.
    """
    shown = shown_layers(load_RLE.shape[1])
    figure, panels = _panels(len(shown), width=3.1, height=1.9)
    experts = load_RLE.shape[2]
    most = _even_limit(load_RLE)
    rows = [expert - 0.5 for expert in range(experts + 1)]
    for axes, layer in zip(panels, shown, strict=True):
        values, look = _shown(load_RLE[:, layer].T, even=True, most=most)
        image = axes.pcolormesh(list(edges), rows, values, **look)
        axes.set_title(f"layer {layer}", fontsize=9, y=1)
        axes.tick_params(labelsize=8)
    panels[0].set(yticks=_ticks(experts, MOST_TICKS // 2), ylim=(rows[-1], rows[0]))
    column = "round" if rounds_each == 1 else f"mean of {rounds_each} rounds"
    figure.supxlabel(f"optimizer steps of a site (a column is a {column}, as wide as its steps)", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    figure.suptitle("Load of each expert over the run", fontsize=11)
    _colour_bar(figure, image, EVEN, load_RLE)
    return figure


def domain_maps(load_LNE: Tensor, domains: Sequence[str]) -> Figure:
    """Which experts each domain's text goes to in the global model, a panel for each layer (at most 12 of them)."""
    share_LNE = load_LNE / load_LNE.sum(dim=2, keepdim=True) * load_LNE.shape[2]
    shown = shown_layers(len(load_LNE))
    left = 0.4 + 0.07 * max(len(domain) for domain in domains)
    figure, panels = _panels(len(shown), width=3.1, height=0.5 + 0.2 * len(domains), left=left)
    most = _even_limit(share_LNE)
    for axes, layer in zip(panels, shown, strict=True):
        image = _image(axes, share_LNE[layer], even=True, most=most)
        axes.set_title(f"layer {layer}", fontsize=9, y=1)
        axes.tick_params(labelsize=8)
    panels[0].set_xticks(_ticks(share_LNE.shape[2], MOST_TICKS // 2))
    panels[0].set_yticks(range(len(domains)), domains)
    for leftmost in panels[::4]:
        leftmost.tick_params(axis="y", labelsize=7)
    figure.supxlabel("expert", fontsize=9)
    figure.suptitle("Picks of each domain's text, global model", fontsize=11)
    _colour_bar(figure, image, "picks / even share (1 = even)", share_LNE)
    return figure


def placement_map(placement: Placement) -> Figure:
    """Which site holds which expert, a panel for each layer (at most 12 of them)."""
    import matplotlib as mpl

    holders = placement.holders
    shown = shown_layers(len(holders))
    figure, panels = _panels(len(shown), width=3.1, height=0.5 + 0.2 * placement.n_sites, right=0.25)
    colours = mpl.colormaps["tab10"]
    for axes, layer in zip(panels, shown, strict=True):
        grid = torch.ones(placement.n_sites, len(holders[layer]), 3)
        for expert, sites in enumerate(holders[layer]):
            for site in sites:
                grid[site, expert] = torch.tensor(colours(site % 10)[:3])
        axes.imshow(grid.numpy(), aspect="auto", interpolation="nearest")
        axes.set_title(f"layer {layer}", fontsize=9, y=1)
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


def _panels(
    n: int, *, width: float, height: float, left: float = 0.7, right: float = 1.35, top: float = 0.65
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, at most four in a row, in rows of nearly equal length.

    Args:
        n: Panels.
        width: Of a panel, inches.
        height: Of a panel, inches.
        left: Room for the labels of the rows, inches.
        right: Room at the right, which holds a colour bar, inches.
        top: Room for titles, inches.
    """
    from matplotlib.figure import Figure

    rows = math.ceil(n / 4)
    columns = math.ceil(n / rows)
    between, bottom = (0.25, 0.5), 0.6
    whole = (
        left + columns * width + (columns - 1) * between[0] + right,
        bottom + rows * height + (rows - 1) * between[1] + top,
    )
    # Not matplotlib's own layouts: they measure every text, which takes longer than everything else. That is why
    # titles get an explicit y.
    figure = Figure(figsize=whole, dpi=110)
    figure.subplots_adjust(
        left=left / whole[0], right=1 - right / whole[0], bottom=bottom / whole[1], top=1 - top / whole[1],
        wspace=between[0] / width, hspace=between[1] / height,
    )  # fmt: skip
    # Shared axes, so that only the outer panels need labels: text is most of the cost of a drawing.
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for unused in panels[n:]:
        unused.remove()
    for lowest in panels[max(n - columns, 0) : n]:
        lowest.tick_params(labelbottom=True)
    return figure, panels[:n]


def _image(axes: Axes, values: Tensor, *, even: bool, most: float | None = None) -> Any:
    shown, look = _shown(values, even=even, most=most)
    return axes.imshow(shown, aspect="auto", interpolation="nearest", **look)


def _shown(values: Tensor, *, even: bool, most: float | None) -> tuple[Any, dict[str, Any]]:
    """Values as matplotlib takes them, and the colours for them."""
    import matplotlib as mpl
    from matplotlib.colors import TwoSlopeNorm

    look: dict[str, Any] = {"cmap": mpl.colormaps["RdBu_r" if even else "viridis"].with_extremes(bad=MISSING)}
    finite = values[values.isfinite()].double()
    if even:
        look["norm"] = TwoSlopeNorm(1.0, 0.0, most or _even_limit(values))
    else:
        top = most if most is not None else float(finite.max()) if len(finite) else 1.0
        look |= {"vmin": 0.0, "vmax": top or 1.0}
    return torch.where(values.isfinite(), values.double(), torch.nan).numpy(), look


def _even_limit(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return min(max(2.0, float(finite.max())), MOST_EVEN) if len(finite) else 2.0


def _colour_bar(figure: Figure, image: Any, label: str, values: Tensor) -> None:
    """Of all panels; with an arrow where some of the values are beyond it."""
    room, (width, height) = figure.subplotpars, figure.get_size_inches()
    beyond = bool((values[values.isfinite()] > image.norm.vmax).any())
    axes = figure.add_axes(
        (room.right + 0.2 / width, room.bottom, 0.15 / width, min(room.top - room.bottom, 5 / height))
    )
    figure.colorbar(image, cax=axes, label=label, extend="max" if beyond else "neither")


def _ticks(n: int, most: int = MOST_TICKS) -> list[int]:
    # Panels share their ticks, so they are set once; and few: a tick in each panel takes longer than its image.
    return list(range(0, n, max(1, math.ceil(n / most))))


def _whole_ticks(axes: Axes, n_x: int, n_y: int) -> None:
    axes.set_xticks(_ticks(n_x))
    axes.set_yticks(_ticks(n_y))
    axes.tick_params(labelsize=8)
