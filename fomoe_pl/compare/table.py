"""Tables of runs: for a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fomoe_pl.callbacks.communication import NOT_TRAINING, training_bytes
from fomoe_pl.compare.groups import differing, grouped, heading, setting
from fomoe_pl.compare.runs import QUALITY, Run
from fomoe_pl.costs.memory import MIB
from fomoe_pl.files import write_whole

Shown = tuple[list[str], list[list[str]]]
"""Headings, and rows."""


class Column(NamedTuple):
    """A number of a run.

    Attributes:
        heading: Short words: a terminal of 80 columns holds them broken between words, and no number is cut.
        value: Reads it from a report; None where the run has none.
        form: Format of the printed number.
        at: Steps at which it was measured, if that was not the end of the run.
    """

    heading: str
    value: Callable[[dict[str, Any]], float | None]
    form: str
    at: Callable[[dict[str, Any]], int | None] = lambda report: None


def _routing(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda report: report.get("routing", {}).get(name)


def _ghosts(report: dict[str, Any]) -> float | None:
    """The ghost excess; None for runs without ghosts."""
    routing = report.get("routing", {})
    return None if routing.get("ghost_fraction") == 0 else routing.get("ghost_excess")


def _validated(report: dict[str, Any]) -> int | None:
    """Steps of the last validation, if it was not at the end."""
    step: int | None = report.get("validation_step")
    return None if step == report["steps"] else step


def _perplexity(report: dict[str, Any]) -> float | None:
    """Of a token, so that it compares runs of one tokenizer only."""
    value: float | None = report["validation"].get("val/perplexity")
    return value


def _beside(report: dict[str, Any]) -> float:
    return sum(report["bytes"]["wire"][kind] for kind in NOT_TRAINING) / MIB


# Quality is that of the global model. Sent, speed and memory are site 0's: what left it (wire bytes) for training, and
# apart from it for evaluation; "local" speed excludes synchronisation, and is not known of DDP.
MAIN = (
    Column("sites", lambda r: r["sites"], ",d"),
    Column("steps", lambda r: r["steps"], ",d"),
    Column("bits / byte", lambda r: r["validation"].get(QUALITY), ".3f", _validated),
    Column("ppl", _perplexity, ",.2f", _validated),
    Column("MiB sent", lambda r: training_bytes(r["bytes"]["wire"]) / MIB, ",.1f"),
    Column("MiB sent for eval", _beside, ",.1f"),
    Column("tokens / s", lambda r: r["tokens_per_second"]["with_sync"], ",.0f"),
    Column("tokens / s local", lambda r: r["tokens_per_second"]["local"], ",.0f"),
    Column("resident params", lambda r: r["resident_parameters"], ",d"),
    Column("peak MiB", lambda r: r["peak_memory_mib"], ",.0f"),
)


def _earlier(report: dict[str, Any]) -> int | None:
    step: int | None = report.get("other_views_step")
    return None if step == report["steps"] else step


def _looked(report: dict[str, Any]) -> int | None:
    """Steps of the last round that looked at probe and drift, if it was not the last."""
    step: int | None = report.get("looked_step")
    return None if step == report["steps"] else step


# Of the last round, mean of the layers; necessity of the last validation that measured it: `@ 240` if at step 240.
ROUTING = (
    Column("load entropy", _routing("load_entropy"), ".3f"),
    Column("MaxVio", _routing("max_violation"), ".2f"),
    Column("starved experts", _routing("starved_experts"), ".2f"),
    Column("ghosts beyond even", _ghosts, "+.3f"),
    Column("churn", _routing("churn"), ".3f", _looked),
    Column("sites agree", _routing("site_agreement"), ".3f", _looked),
    Column("drift", _routing("drift"), ".4f", _looked),
    Column("necessity nats", lambda r: r["validation"].get("val/routing_necessity_nats"), ".3f", _earlier),
    Column("domain bits", lambda r: r["validation"].get("val/domain_information_bits"), ".3f"),
)


def _evaluation(view: str, limit: int | None, task: str, metric: str) -> Column:
    def found(report: dict[str, Any]) -> dict[str, Any]:
        known: dict[str, Any] = report.get("evaluations", {}).get(view, {})
        return known if metric in known.get("tasks", {}).get(task, {}) and known.get("limit") == limit else {}

    def at(report: dict[str, Any]) -> int | None:
        steps: int | None = found(report).get("steps")
        return None if steps == report["steps"] else steps

    heading = f"{task} {metric}" + ("" if view == "global" else f" {view}")
    heading += "" if limit is None else f" first {limit}"
    return Column(heading, lambda report: found(report).get("tasks", {}).get(task, {}).get(metric), ".4f", at)


def evaluation_columns(runs: Sequence[Run]) -> tuple[Column, ...]:
    """A column for each view, number of rows, task and metric that some run has; standard errors are left out."""
    keys = {
        (view, found.get("limit"), task, metric): None
        for run in runs
        for view, found in run.report.get("evaluations", {}).items()
        for task, metrics in found["tasks"].items()
        for metric in metrics
        if not metric.endswith("_stderr")
    }
    return tuple(_evaluation(*key) for key in keys)


def settings_table(runs: Sequence[Run]) -> list[Shown]:
    """The settings in which runs differ, a row for each; nothing where they do not, or are not known."""
    keys = differing(runs)
    if not keys:
        return []
    return [(["run", *map(heading, keys)], [[run.name, *(setting(run, key) for key in keys)] for run in runs])]


# What is told of several runs together, within 80 columns; unrounded, all numbers are in the CSV file.
OF_GROUPS = ("bits / byte", "ppl", "MiB sent", "tokens / s")


def groups_table(runs: Sequence[Run]) -> list[Shown]:
    """Mean and standard deviation of runs that differ in seeds alone; nothing where there are no such."""
    groups = grouped(runs)
    if len(groups) == len(runs):
        return []
    columns = [column for column in (*MAIN, *ROUTING) if column.heading in OF_GROUPS]
    spreads = [[group.spread(column.value) for column in columns] for group in groups]
    shown = [i for i in range(len(columns)) if any(row[i] is not None for row in spreads)]
    rows = [
        [group.name, str(len(group.runs)), *("-" if (s := row[i]) is None else s.text(columns[i].form) for i in shown)]
        for group, row in zip(groups, spreads, strict=True)
    ]
    return [(["runs", "n", *(columns[i].heading for i in shown)], rows)]


def row(run: Run, columns: Sequence[Column]) -> list[str]:
    """One run's cells, its name first; `-` for missing values."""
    return [run.name, *(_cell(column, run.report) for column in columns)]


def _cell(column: Column, report: dict[str, Any]) -> str:
    value, at = column.value(report), column.at(report)
    if value is None:
        return "-"
    return format(value, column.form) + ("" if at is None else f" @ {at}")


def tables(runs: Sequence[Run]) -> list[Shown]:
    """Headings and rows of each table; the first is of all runs, the others are there if there is something to show."""
    watched = any(run.report.get("routing") for run in runs)
    evaluated = evaluation_columns(runs)
    of_runs = [
        (["run", *(column.heading for column in columns)], [row(run, columns) for run in runs])
        for columns in (MAIN, *((ROUTING,) if watched else ()), *((evaluated,) if evaluated else ()))
    ]
    return [*of_runs, *settings_table(runs), *groups_table(runs)]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table, numbers to the right."""
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in rows]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The rows in a terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for index, words in enumerate(headings):
        # A heading is broken between words in any case, so that the width is left to the numbers.
        broken = words.replace(" / ", "\n/").replace(" ", "\n")
        if index:
            table.add_column(broken, justify="right", no_wrap=True)
        else:  # a long name is folded before any number is cut
            table.add_column(broken, overflow="fold", min_width=min(8, max(len(cells[0]) for cells in rows)))
    for cells in rows:
        table.add_row(*map(Text, cells))  # a plain string's [brackets] would be markup
    Console().print("", table)


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """All numbers, unrounded; empty for missing values."""
    columns = (*MAIN, *ROUTING, *evaluation_columns(runs))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", "method", *(column.heading for column in columns)])
    for run in runs:
        values = [column.value(run.report) for column in columns]
        writer.writerow([run.name, run.report.get("method", ""), *("" if v is None else v for v in values)])
    write_whole(path, text.getvalue())


def write_groups(runs: Sequence[Run], path: Path) -> None:
    """Means and standard deviations of runs that differ in seeds alone, unrounded, a row for each group."""
    columns = (*MAIN, *ROUTING, *evaluation_columns(runs))
    text = io.StringIO()
    writer = csv.writer(text)
    parts = ("mean", "std", "n")
    writer.writerow(["runs", "n", "members", *(f"{column.heading} {part}" for column in columns for part in parts)])
    for group in grouped(runs):
        found = [group.spread(column.value) for column in columns]
        numbers = [value for s in found for value in (("", "", 0) if s is None else (s.mean, s.std, s.n))]
        members = " ".join(run.name for run in group.runs)
        writer.writerow([group.name, len(group.runs), members, *("" if v is None else v for v in numbers)])
    write_whole(path, text.getvalue())


def failures(runs: Sequence[Run], limit: float) -> list[str]:
    """A line for each run whose bits per byte are not below the limit."""
    values = [(run.name, run.report["validation"].get(QUALITY)) for run in runs]
    return [
        f"{name}: {QUALITY} is {value}, not below {limit}"
        for name, value in values
        if value is None or not value < limit
    ]
