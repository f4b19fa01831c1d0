"""What libraries say that is kept out of the console, unless `-v` asks for it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_WARNINGS = (
    ".*recommended to use `self.log.*sync_dist=True.*",  # validation sums are reduced by the strategy, counted
    ".*does not have many workers.*",  # reading is not the bottleneck at the shipped sizes
    ".*Checkpoint directory .* exists and is not empty.*",  # a run folder holds curves and checkpoints side by side
    ".*dirpath has changed from.*",  # validating reads a checkpoint wherever it lies
    ".*isinstance.treespec, LeafSpec.*",  # between Lightning and torch
    ".*not recommended to provide both args and command line arguments.*",  # options are rewritten before parsing
)
_TOLD = (
    "💡", "stopped: `max_steps=", "Seed set to", "GPU available: False", "TPU available",
)  # fmt: skip
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.fabric.utilities.seed",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)  # fmt: skip


@dataclass(frozen=True)
class Talk:
    """How much a command says.

    Attributes:
        verbose: Everything that libraries say, and where an error that is one message comes from.
        quiet: Warnings, errors and results alone.
    """

    verbose: bool = False
    quiet: bool = False

    @property
    def words(self) -> list[str]:
        """As they were typed."""
        return ["-v"] * self.verbose + ["-q"] * self.quiet


def split(words: Sequence[str]) -> tuple[Talk, list[str]]:
    """Take `-v` and `-q` out of a command line; the last one wins."""
    talk, kept = Talk(), []
    for word in words:
        if word in ("-v", "--verbose"):
            talk = Talk(verbose=True)
        elif word in ("-q", "--quiet"):
            talk = Talk(quiet=True)
        else:
            kept.append(word)
    return talk, kept


def _has_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    told = record.levelno < logging.WARNING and any(part in message for part in _TOLD)
    return not told and "weights_only" not in message  # checkpoints here hold nothing but plain values


@contextmanager
def heard(talk: Talk) -> Iterator[None]:
    """Let as much of libraries be heard as was asked for."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    above = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric", "fomoe_pl")]
    levels = [logger.level for logger in above]
    with warnings.catch_warnings():
        if not talk.verbose:
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            for logger in loggers:
                logger.addFilter(_has_news)
        for logger in above if talk.quiet else ():
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_has_news)
            for logger, level in zip(above, levels, strict=True):
                logger.setLevel(level)
