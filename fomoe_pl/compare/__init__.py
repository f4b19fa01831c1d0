"""Runs side by side: tables, plots, CSV, and one page that opens without a network."""

from fomoe_pl.compare.command import main

__all__ = ["main"]
