"""Compare runs: `python tools/summary.py runs/quickstart runs/ddp --markdown`.

Quality is that of the global model; everything else is site 0's. "Sent" is what left the site (wire bytes) for
training, and apart from it for evaluation and checkpoints; "local" speed excludes synchronisation.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fomoe_pl.callbacks.report import REPORT_NAME

MIB = 2**20
# Short words: a terminal of 80 columns holds them broken between words, and no number is cut.
COLUMNS = (
    "run",
    "sites",
    "steps",
    "bits / byte",
    "MiB sent",
    "MiB sent for eval",
    "tokens / s",
    "tokens / s local",
    "resident params",
    "peak MiB",
)
# What a run sends beside training: it depends on how often one validates and saves, not on the strategy alone.
NOT_TRAINING = ("evaluation", "checkpoint")


def find_report(run: Path) -> Path:
    """Return the newest report in a run's folder or below it.

    Raises:
        FileNotFoundError: if there is none.
    """
    reports = sorted(run.rglob(REPORT_NAME), key=lambda path: path.stat().st_mtime)
    if not reports:
        raise FileNotFoundError(f"{run}: no {REPORT_NAME} here or below; it is written when training ends")
    return reports[-1]


def bits_per_byte(report: dict[str, Any]) -> float | None:
    """Return the last global validation; None if there was none or it is undefined."""
    value: float | None = report["validation"].get("val/bits_per_byte")
    return value


def row(run: Path, report: dict[str, Any]) -> list[str]:
    """Return one run's cells in the order of COLUMNS. Bytes are those that site 0 sent (wire)."""
    quality, wire = bits_per_byte(report), report["bytes"]["wire"]
    beside = sum(wire[kind] for kind in NOT_TRAINING)
    speed = report["tokens_per_second"]
    return [
        run.resolve().name,
        str(report["sites"]),
        str(report["steps"]),
        "-" if quality is None else f"{quality:.3f}",
        f"{(wire['total'] - beside) / MIB:,.1f}",
        f"{beside / MIB:,.1f}",
        f"{speed['with_sync']:,.0f}",
        f"{speed['local']:,.0f}",
        f"{report['resident_parameters']:,}",
        f"{report['peak_memory_mib']:,.0f}",
    ]


def markdown(rows: list[list[str]]) -> str:
    """Return the rows under COLUMNS as a Markdown table, numbers to the right."""
    lines = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def failures(reports: dict[Path, dict[str, Any]], limit: float) -> list[str]:
    """Return a line for each run whose bits per byte are not below the limit."""
    values = {run: bits_per_byte(report) for run, report in reports.items()}
    return [
        f"{run}: val/bits_per_byte is {value}, not below {limit}"
        for run, value in values.items()
        if value is None or not value < limit
    ]


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, print the table, check the limit."""
    parser = argparse.ArgumentParser(description="One row a run: quality, bytes, speed, size, memory.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs that have ended")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--max_bits_per_byte", type=float, metavar="X", help="exit with 1 if a run is not below X")
    options = parser.parse_args(arguments)
    try:
        reports = {run: json.loads(find_report(run).read_text()) for run in options.runs}
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    rows = [row(run, report) for run, report in reports.items()]
    if options.markdown:
        print(markdown(rows))
    else:
        table = Table(box=box.SIMPLE, padding=0, pad_edge=False)
        for index, column in enumerate(COLUMNS):
            # A heading is broken between words in any case, so that the width is left to the numbers.
            heading = column.replace(" / ", "/").replace(" ", "\n")
            table.add_column(heading, justify="right" if index else "left", no_wrap=True)
        for cells in rows:
            table.add_row(*cells)
        Console().print(table)
    if options.max_bits_per_byte is not None and (failed := failures(reports, options.max_bits_per_byte)):
        sys.exit("error: " + "\n".join(failed))


if __name__ == "__main__":
    main()
