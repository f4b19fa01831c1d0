"""Figures of docs/system-model.md. They need matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import paper
from scale import Row

from fomoe_pl.costs.memory import GIB
from fomoe_pl.costs.network import Links
from fomoe_pl.costs.sites import Site
from fomoe_pl.model.sizes import parameter_counts
from fomoe_pl.planner.plot import axes_of, save


def figure_2(path: str | Path) -> None:
    """Shares of dense and expert parameters of Table 1."""
    figure, axes = axes_of("Parameters by kind (paper: Fig. 2)", "", "share of the parameters")
    names = list(paper.PAPER_SIZES)
    bottom = [0.0] * len(names)
    for kind in ("embeddings", "attention", "experts"):
        counts = [parameter_counts(paper.table_1(name)) for name in names]
        shares = [getattr(c, kind) / c.total for c in counts]
        axes.bar(names, shares, bottom=bottom, label=kind)
        bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
    axes.legend(loc="lower right")
    save(figure, path)


def figure_8(path: str | Path) -> None:
    """Share of experts in a site's FLOPs over the overlap."""
    figure, axes = axes_of(
        "Experts' share of a site's FLOPs (paper: Fig. 8)", "overlap", "share, without output matrix"
    )
    for d, layers, sites in ((512, 16, 16), (8192, 512, 32)):
        config = paper.paper_model(d, layers)
        overlaps = [o for o in (1, 2, 4, 8, 16, 32) if o <= sites]
        shares = [paper.ffn_share(config, 2048, n_sites=sites, overlap=o) for o in overlaps]
        axes.plot(overlaps, shares, "o-", label=f"D = {d}, {layers} layers, {sites} sites")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend()
    save(figure, path)


def figure_9(path: str | Path) -> None:
    """Bytes of a site and step, D = 8192, 512 layers, 32 sites, K = 32."""
    config, sites, k = paper.paper_model(8192, 512), 32, 32
    figure, axes = axes_of("GiB of a site and step, K = 32, D = 8192 (paper: Fig. 9)", "", "GiB a step")
    names = ["DDP", *(f"overlap {o}" for o in (32, 16, 8, 4))]
    values = [paper.ddp_bytes_per_step(config, sites)]
    values += [paper.bytes_per_round(config, n_sites=sites, overlap=o) / k for o in (32, 16, 8, 4)]
    axes.bar(names, [v / GIB for v in values])
    axes.set_yscale("log")
    save(figure, path)


def figure_10(path: str | Path) -> None:
    """Hours over the bandwidth, with the paper's formula and with latency."""
    config, sites = paper.paper_model(2048, 64), 32
    figure, axes = axes_of("Hours of 60e9 tokens, D = 2048, 32 sites, LocalAdamW (paper: Fig. 10)",
                         "Mbit/s", "hours")  # fmt: skip
    rates = [100, 200, 500, 1000, 2000, 5000, 10_000]
    waiting = Links.between([Site(accelerator="h100", latency_ms=50)] * sites)
    for overlap in (4, 8, 16, 32):
        hours = [sum(paper.run_hours(config, paper.Budget(60e9), n_sites=sites, overlap=overlap, bandwidth_mbit=rate,
                                     links=links)) for links in (None, waiting) for rate in rates]  # fmt: skip
        line = axes.plot(rates, hours[: len(rates)], "o-", label=f"overlap {overlap}")[0]
        axes.plot(rates, hours[len(rates) :], ":", color=line.get_color())
    axes.set(xscale="log", yscale="log")
    axes.legend(title="dotted: with 50 ms of latency")
    save(figure, path)


def plot_scale(rows: Sequence[Row], model: str, sites: int, path: str | Path) -> None:
    """Hours over the bandwidth of each method; what a site cannot hold is dotted."""
    figure, axes = axes_of(f"{model}, {sites} sites", "Mbit/s", "hours")
    methods = sorted({(r.method, r.overlap) for r in rows if r.model == model and r.sites == sites})
    for method, overlap in methods:
        chosen = [r for r in rows if (r.model, r.sites, r.method, r.overlap) == (model, sites, method, overlap)]
        label = f"{method}, overlap {overlap}" if method == "fomoe" else method
        style = "o-" if chosen[0].fits else "x:"
        axes.plot([r.bandwidth_mbit for r in chosen], [r.hours for r in chosen], style, label=label)
    axes.set(xscale="log", yscale="log")
    axes.legend(title="dotted: does not fit")
    save(figure, path)
