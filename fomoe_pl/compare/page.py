"""One self-contained HTML page: tables, plots as inline SVG, the runs' own pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from fomoe_pl.compare import plots
from fomoe_pl.compare.runs import Run
from fomoe_pl.compare.table import settings_table, tables
from fomoe_pl.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1250px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; margin-bottom: 0; }
table { border-collapse: collapse; font-size: 0.9rem; margin-top: 1.2rem; }
th { border-bottom: 2px solid #444; vertical-align: bottom; }
th, td { padding: 0.25rem 0.7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
tr:nth-child(even) td { background: #f4f4f4; } img { max-width: 100%; height: auto; } .note { color: #555; }
.pictures { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: flex-start; }
.pictures img { max-width: 49%; } .pictures img.wide { max-width: 100%; }
"""
CAPTIONS = {
    "sites": "Quality is that of the global model. Sent, speed and memory are of site 0; sent is what left it in "
    "rings, for training, and apart from it for evaluation and checkpoints.",
    "n": "Mean and standard deviation of runs that differ in seeds alone, and their number.",
    "load entropy": "Means over the layers: loads, ghosts, churn, agreement and drift of the last round, all sites; "
    "necessity and domain bits of the last validation that measured them.",
}
"""By a table's first column; other tables are of evaluations."""
EVALUATED = "Tasks of lm-evaluation-harness: of the global model where no site is named."
PLOTS = (
    ("Quality against tokens, bytes and time", plots.quality),
    ("Quality and bytes", plots.pareto),
    ("Routing", plots.routing),
)
SHOWN = ("load", "ghost_share", "copy_share", "drift", "timeline", "domains", "placement")
WIDE = 1000
"""Pixels from which a picture, one of several panels, has a row of its own: its words are too small in half a row."""


def page(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    parts = [f"<h1>{len(runs)} runs side by side</h1>", _data(runs)]
    for headings, rows in tables(runs):
        parts += [_table(headings, rows), f'<p class="note">{_caption(runs, headings)}</p>']
    for title, plot in PLOTS:
        figure = plot(runs)
        if figure is not None:
            parts += [f"<h2>{title}</h2>", _svg(figure, title)]
    for run in runs:
        parts += _pictures(run)
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Runs side by side</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _caption(runs: Sequence[Run], headings: Sequence[str]) -> str:
    if [list(headings)] == [table[0] for table in settings_table(runs)]:
        return "Settings in which the runs differ."
    return CAPTIONS.get(headings[1], EVALUATED)


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Write the page."""
    write_whole(path, page(runs))


def _data(runs: Sequence[Run]) -> str:
    rows = [[run.name, run.report.get("method", ""), *_identity(run)] for run in runs]
    return _table(["run", "method", "corpus", "tokenizer", "sequence length"], rows, left=True)


def _identity(run: Run) -> list[str]:
    data = run.report.get("data") or {}
    return [str(data.get(key, "-"))[:12] for key in ("corpus", "tokenizer", "sequence_length")]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    style = ' style="text-align:left"' if left else ""
    lines = [f"<th{style}>{escape(heading)}</th>" for heading in headings]
    body = "\n".join("<tr>" + "".join(f"<td{style}>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows)
    return f"<table><thead><tr>{''.join(lines)}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return _image(buffer.getvalue().encode(), "svg+xml", title)


def _image(content: bytes, kind: str, title: str, more: str = "") -> str:
    return f'<img{more} alt="{escape(title)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _png(content: bytes, title: str) -> str:
    width = int.from_bytes(content[16:20], "big")  # where the PNG format has it
    return _image(content, "png", title, ' class="wide"' if width > WIDE else "")


def _pictures(run: Run) -> list[str]:
    shown = [name for name in SHOWN if f"pictures/{name}" in run.pictures]
    if not shown:
        return []
    images = "\n".join(_png(run.pictures[f"pictures/{name}"], f"{run.name}: {name}") for name in shown)
    return [f"<h2>Pictures of {escape(run.name)}</h2>", f'<div class="pictures">\n{images}\n</div>']
