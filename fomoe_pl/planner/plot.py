"""Drawings of the planner and of the system model's pages. They need matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fomoe_pl.costs.memory import GIB
from fomoe_pl.errors import ConfigError
from fomoe_pl.planner.choices import Plan

TEXT: dict[str, Any] = {"svg.hashsalt": "fomoe", "svg.fonttype": "none", "figure.dpi": 100, "font.size": 9}


def axes_of(title: str, x: str, y: str, size: tuple[float, float] = (6.4, 3.6)) -> tuple[Any, Any]:
    """An empty figure and its axes.

    Raises:
        ConfigError: Without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "plot", "matplotlib", "is not installed", 'install the extra `plots`: .venv/bin/pip install -e ".[plots]"'
        ) from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update(TEXT)  # type: ignore[arg-type]
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def save(figure: Any, path: str | Path) -> None:
    """Write a figure; the same numbers give the same bytes."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def plot_front(plans: Sequence[Plan], front_of: Callable[[Sequence[Plan]], list[Plan]], path: str | Path) -> None:
    """Hours against the largest device's memory of each model's plans, and the front that none beats in both."""
    figure, axes = axes_of("Plans", "GiB on the fullest device", "hours")
    for model in dict.fromkeys(plan.choice.model for plan in plans):
        own = [plan for plan in plans if plan.choice.model == model]
        front = front_of(own)
        line = axes.plot([max(p.held_bytes) / GIB for p in front], [p.hours for p in front], "o-", label=model)[0]
        axes.scatter([max(p.held_bytes) / GIB for p in own], [p.hours for p in own], s=6, alpha=0.3,
                     color=line.get_color())  # fmt: skip
    axes.set_yscale("log")
    axes.legend()
    save(figure, path)
