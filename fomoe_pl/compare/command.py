"""`fomoe compare RUN...`."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from fomoe_pl.compare.groups import grouped
from fomoe_pl.compare.page import write_page
from fomoe_pl.compare.runs import check_comparable, read_runs
from fomoe_pl.compare.table import failures, markdown, print_table, tables, write_csv, write_groups
from fomoe_pl.errors import ConfigError, OneMessage
from fomoe_pl.files import check_local, prepare
from fomoe_pl.shipped import how_to_install


class Parser(OneMessage, argparse.ArgumentParser):
    """A parser that reports one short error."""


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="fomoe compare",
        description="Runs side by side: quality, bytes, speed, memory, health of the routing, what they differ in; and "
        "means of those that differ in seeds alone.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs that have ended")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write all numbers, unrounded; means of runs that differ in seeds alone go beside it, into *.groups.csv",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with tables, plots and pictures")
    parser.add_argument("--any_data", action="store_true", help="compare runs of different corpora or tokenizers too")
    parser.add_argument("--max_bits_per_byte", type=float, metavar="X", help="exit with 1 if a run is not below X")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Read the command line; print tables, write what was asked for, check the limit."""
    options = make_parser().parse_args(arguments)
    if options.html is not None and find_spec("matplotlib") is None:
        raise ConfigError("html", str(options.html), "needs matplotlib", how_to_install("plots"))
    for key, path in (("csv", options.csv), ("html", options.html)):
        if path is not None:
            prepare(key, path)
    for folder in options.runs:
        check_local("compare", folder)
    runs = read_runs(options.runs)
    if not options.any_data:
        check_comparable(runs)
    for headings, rows in tables(runs):
        if options.markdown:
            print(markdown(headings, rows) + "\n")
        else:
            print_table(headings, rows)
    if options.csv is not None:
        write_csv(runs, options.csv)
        if len(grouped(runs)) < len(runs):
            write_groups(runs, options.csv.with_suffix(f".groups{options.csv.suffix}"))
    if options.html is not None:
        write_page(runs, options.html)
    if options.max_bits_per_byte is not None and (failed := failures(runs, options.max_bits_per_byte)):
        sys.exit("error: " + "\n".join(failed))
