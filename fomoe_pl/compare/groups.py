"""Runs that differ in seeds alone, as one: mean, standard deviation and number; and what the others differ in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from fomoe_pl.compare.runs import Run

HEADINGS = {
    "local_steps": "K", "optimizer.lr": "rate", "inner_moments": "moments", "wire_codec": "codec",
    "moments_codec": "moments codec", "wire_dtype": "wire", "data.batch_size": "batch", "data.split": "data",
    "data.seed": "data seed",
}  # fmt: skip
"""What a table calls a setting; all others by the last part of their names."""


@dataclass(frozen=True)
class Spread:
    """A number of several runs.

    Attributes:
        mean: Over the runs that have it.
        std: Standard deviation of a sample; None of one run.
        n: Runs that have it.
    """

    mean: float
    std: float | None
    n: int

    def text(self, form: str) -> str:
        """`2.346 ± 0.012`, or the number alone."""
        shown = format(self.mean, form)
        return shown if self.std is None else f"{shown} ± {format(self.std, form.replace('+', ''))}"


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for their seeds.

    Attributes:
        name: What their names have in common, else the settings by which they differ from the others.
        runs: One or more.
    """

    name: str
    runs: tuple[Run, ...]

    def spread(self, value: Callable[[dict[str, Any]], float | None]) -> Spread | None:
        """Mean and standard deviation of a number of the reports; None where no run has it."""
        found = [float(v) for run in self.runs if (v := value(run.report)) is not None and math.isfinite(v)]
        return Spread(mean(found), stdev(found) if len(found) > 1 else None, len(found)) if found else None


def is_seed(key: str) -> bool:
    """Whether a setting is a seed."""
    return key.rpartition(".")[2].endswith("seed")


def differing(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all runs that have them, seeds last."""
    keys = dict.fromkeys(key for run in runs for key in _settings(run))
    found = [key for key in keys if len({_plain(_settings(run)[key]) for run in runs if key in _settings(run)}) > 1]
    seeds = [key for key in found if is_seed(key)]
    # One seed for all is told once, not also as that of the data.
    known = [_settings(run) for run in runs]
    same = [key for key in seeds[1:] if all(s[key] == s.get(seeds[0]) for s in known if key in s)]
    return sorted((key for key in found if key not in same), key=is_seed)


def heading(key: str) -> str:
    """What a table calls a setting."""
    return HEADINGS.get(key, key.rpartition(".")[2].replace("_", " "))


def setting(run: Run, key: str) -> str:
    """A run's setting as a table shows it; `-` where its strategy has none such."""
    return _plain(_settings(run)[key]) if key in _settings(run) else "-"


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The groups, in the order of their first runs; a report without settings, of an older version, is one alone."""
    found: dict[Any, list[Run]] = {}
    for i, run in enumerate(runs):
        settings = _settings(run)
        kept = tuple(sorted((key, _plain(value)) for key, value in settings.items() if not is_seed(key)))
        found.setdefault((kept, run.report["steps"], run.report["sites"]) if settings else i, []).append(run)
    names = [_common(members) for members in found.values()]
    differ = [key for key in differing(runs) if not is_seed(key)]
    groups = []
    for name, members in zip(names, found.values(), strict=True):
        if not name or names.count(name) > 1:
            name = ", ".join(f"{heading(key)} {setting(members[0], key)}" for key in differ) or members[0].name
        groups.append(Group(name, tuple(members)))
    return groups


def _common(members: Sequence[Run]) -> str:
    """What the names of several runs begin with, without the beginning of a number or the word seed."""
    names = [run.name for run in members]
    if len(names) == 1:
        return names[0]
    start = _beginning(names).rstrip("0123456789").rstrip("-_/ .,=")
    for word in ("seed_everything", "seed", "s"):
        short = start.removesuffix(word)
        if short != start and (not short or short[-1] in "-_/ .,"):
            return short.rstrip("-_/ .,=")
    return start


def _beginning(names: Sequence[str]) -> str:
    """The characters that all begin with."""
    first, last = min(names), max(names)  # all others lie between them
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _settings(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = run.report.get("settings") or {}
    return found


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
