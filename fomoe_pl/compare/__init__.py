"""Comparison of runs: tables, plots, CSV, and one self-contained HTML page."""

from fomoe_pl.compare.command import main, make_parser

__all__ = ["main", "make_parser"]
