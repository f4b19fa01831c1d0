"""Comparison of runs: tables, plots, CSV, and one self-contained HTML page."""

from fomoe_pl.compare.command import main

__all__ = ["main"]
