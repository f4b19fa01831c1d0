"""Write every table and figure of docs/system-model.md that comes from the system model alone.

`python tools/system_model/cost_report.py --output docs/system-model`

Tables go between the marks `<!-- table NAME -->` and `<!-- end -->` of the page `--page`, figures into the folder. The
same code gives the same bytes. Measured numbers on the page are not touched.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from pathlib import Path

import figures
import paper
from scale import Assumptions, Row, billions, scale_rows, shapes

from fomoe_pl.costs.sites import Site
from fomoe_pl.model.sizes import active_parameters, parameter_counts
from fomoe_pl.planner.command import plan_all
from fomoe_pl.planner.output import pareto
from fomoe_pl.planner.plot import plot_front
from fomoe_pl.planner.request import PlanRequest

ROOT = Path(__file__).parents[2]
RATES = (100.0, 1000.0, 10_000.0)
SITES = (2, 4, 8, 16, 32)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is text."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_1() -> str:
    """The paper's Table 1, counted, with Fig. 2's shares and the two ratios."""
    rows = []
    for name, (d, layers, *_rest) in paper.PAPER_SIZES.items():
        config = paper.table_1(name)
        counts = parameter_counts(config)
        rows.append([
            name, f"{d} × {layers}", f"{counts.total:,}", f"{active_parameters(config):,}",
            f"{counts.embeddings / counts.total:.1%}", f"{paper.expert_share(config):.1%}",
            f"{paper.saving(config, 0.5):.4f}", f"{paper.saving(config, 0.5, 32):.3f}",
            f"{paper.saving(config, 0):.3f}",
        ])  # fmt: skip
    return markdown(
        ["model", "width × layers", "parameters", "of them active", "embeddings", "experts",
         "full / half of the experts", "DDP / half, K = 32", "full / no expert sent"], rows,
    )  # fmt: skip


def all_rows() -> list[Row]:
    """Every row of the 100B-scale study."""
    return [
        row
        for name, config in shapes().items()
        for sites in SITES
        for rate in RATES
        for row in scale_rows(name, config, Assumptions(), sites, rate)
    ]


def scale_table(rows: list[Row], sites: int) -> str:
    """All methods of all shapes at one number of sites."""
    lines = []
    keys = dict.fromkeys((r.model, r.method, r.overlap) for r in rows if r.sites == sites)
    for model, method, overlap in keys:
        own = [r for r in rows if (r.sites, r.model, r.method, r.overlap) == (sites, model, method, overlap)]
        label = f"{method}, overlap {overlap}" if method == "fomoe" else method
        hours = [f"{r.hours:,.0f} ({r.waiting:.0%})" for r in own]
        lines.append([f"{model} {label}", f"{own[0].sent_gib:,.1f}", f"{own[0].states_gib:,.0f}",
                      "yes" if own[0].fits else "**no**", *hours])  # fmt: skip
    head = ["model, method", "GiB sent in 32 steps", "GiB of states", "fits"]
    return markdown(head + [f"hours at {rate / 1000:g} Gbit/s (waiting)" for rate in RATES], lines)


def smallest_federations(rows: list[Row]) -> str:
    """For each shape the number of sites from which on a site can hold its part, by method."""
    lines = []
    for name, config in shapes().items():
        own = [r for r in rows if r.model == name and r.bandwidth_mbit == RATES[0]]
        full = [r.sites for r in own if r.method == "diloco" and r.fits]
        part = {r.sites: r.overlap for r in sorted(own, key=lambda r: r.overlap) if r.method == "fomoe" and r.fits}
        partial = ", ".join(f"{sites} sites: overlap up to {part[sites]}" for sites in sorted(part))
        lines.append([name, f"{billions(config):,.1f}", "yes" if full else "no", partial or "none"])
    return markdown(["model", "10^9 parameters", "a full replica (DiLoCo) fits", "FoMoE fits"], lines)


def example() -> PlanRequest:
    """The request of configs/plan/three_sites.yaml."""
    import yaml

    settings = yaml.safe_load((ROOT / "configs/plan/three_sites.yaml").read_text())
    models = [str(ROOT / path) for path in settings["models"]]
    return PlanRequest(**settings | {"models": models, "sites": [Site(**site) for site in settings["sites"]]})


def insert(page: str, name: str, table: str) -> str:
    """The page with this table between its marks.

    Raises:
        ValueError: If the page has no such marks.
    """
    pattern = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"no marks for the table {name}")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", page)


def write(output: Path, page: Path) -> None:
    """All figures and tables."""
    rows = all_rows()
    figures.figure_2(output / "figure_2.svg")
    figures.figure_8(output / "figure_8.svg")
    figures.figure_9(output / "figure_9.svg")
    figures.figure_10(output / "figure_10.svg")
    figures.plot_scale(rows, "DeepSeek-V3-like", 8, output / "scale_deepseek.svg")
    plot_front(plan_all(example())[0], pareto, output / "three_sites.svg")
    text = page.read_text()
    text = insert(text, "table-1", table_1())
    text = insert(text, "fits", smallest_federations(rows))
    text = insert(text, "scale-8", scale_table(rows, 8))
    page.write_text(text)
    parts = [f"## {sites} sites\n{scale_table(rows, sites)}\n" for sites in SITES]
    head = (
        "# The system model at 2 to 32 sites\nWritten by `tools/system_model/cost_report.py`; assumptions and terms: "
        "[the page on the system model](../system-model.md#predictions-for-sizes-that-were-not-trained-here).\n\n"
    )
    (output / "scale.md").write_text(head + "\n".join(parts))


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/system-model", help="folder of the figures")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/system-model.md", help="page with the tables' marks")
    options = parser.parse_args(arguments)
    write(options.output, options.page)
    print(f"wrote {options.output} and the tables of {options.page}")


if __name__ == "__main__":
    main()
