"""What is read of a run: its report, and curves and pictures from its event files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from fomoe_pl.callbacks.communication import NOT_TRAINING
from fomoe_pl.callbacks.report import REPORT_NAME
from fomoe_pl.compare.events import EVENTS, Curve, Floats, read_events
from fomoe_pl.errors import ConfigError

QUALITY = "val/bits_per_byte"
NEEDED: dict[str, Any] = {
    "sites": int, "steps": int, "resident_parameters": int, "peak_memory_mib": (int, float), "validation": dict,
    "tokens_per_second.local": (int, float, type(None)), "tokens_per_second.with_sync": (int, float),
    **{f"bytes.wire.{kind}": int for kind in ("total", *NOT_TRAINING)},
}  # fmt: skip
"""Keys that every report must have, and their types."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: End of the path of the folder that was given, long enough to tell runs apart.
        report: What `report.json` says.
        curves: Tag -> curve; empty for a run without TensorBoard.
        pictures: Tag -> the last picture, PNG.
    """

    name: str
    report: dict[str, Any]
    curves: dict[str, Curve] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def quality(self) -> Curve:
        """Bits per byte of the global model over the run; one point, or none, where there are no curves."""
        if QUALITY in self.curves:
            curve = self.curves[QUALITY]
            before = bool(self.report.get("validation_before_training")) and curve.steps[0] <= 1
            # Lightning has no step 0 of its own: what is validated before training is logged at the first.
            return Curve(np.concatenate([[0.0], curve.steps[1:]]) if before else curve.steps, curve.values)
        value = self.report["validation"].get(QUALITY)
        points = [] if value is None else [(self.report["steps"], value)]
        array = np.array(points, dtype=float).reshape(-1, 2)
        return Curve(array[:, 0], array[:, 1])

    def at(self, tag: str, steps: Floats) -> Floats | None:
        """A curve that grows from 0, interpolated linearly; None if the run has none."""
        if tag not in self.curves:
            return None
        curve = self.curves[tag]
        return np.interp(steps, np.concatenate([[0.0], curve.steps]), np.concatenate([[0.0], curve.values]))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read each run; names are the ends of the folders' paths, as short as tells them apart."""
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    paths = [folder.resolve() for folder in folders]
    names = []
    for i, path in enumerate(paths):
        others = [other for j, other in enumerate(paths) if j != i]
        n = 1
        while n < len(path.parts) and any(other.parts[-n:] == path.parts[-n:] for other in others):
            n += 1
        names.append(str(Path(*path.parts[-n:])))
    return names


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read the newest report in a run's folder or below it, and the event files next to it.

    Raises:
        ConfigError: If there is none.
    """
    reports = sorted(folder.rglob(REPORT_NAME), key=lambda path: path.stat().st_mtime)
    if not reports:
        raise ConfigError("compare", str(folder), f"has no {REPORT_NAME}, here or below",
                          "RunReport writes it when training ends")  # fmt: skip
    report = read_report(reports[-1])
    _tell_of_newer(folder, reports[-1])
    curves, pictures = read_events(reports[-1].parent, report)
    return Run(name or folder.resolve().name, report, curves, pictures)


def read_report(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        ConfigError: Naming the file and what is wrong in it.
    """
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError("compare", str(path), f"is no JSON ({error})", "train the run again") from None
    for key, kind in NEEDED.items():
        value = report
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise ConfigError("compare", str(path), f"has no {key}: it is damaged, or of an older version",
                              "train the run again with this version")  # fmt: skip
    return cast(dict[str, Any], report)


def _tell_of_newer(folder: Path, report: Path) -> None:
    written = report.stat().st_mtime
    for events in folder.rglob(EVENTS):
        if not (events.parent / REPORT_NAME).exists() and events.stat().st_mtime > written:
            print(f"fomoe: {events.parent} has a newer run that has not ended; {report.parent} is shown instead",
                  file=sys.stderr)  # fmt: skip
            return


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse runs whose qualities are not measured on the same text in the same tokens.

    Raises:
        ConfigError: Naming the runs and what differs.
    """
    hint = "Compare runs of one corpus, or say --any_data"
    for run in runs[1:]:
        ours, theirs = runs[0].report.get("data"), run.report.get("data")
        names = f"{runs[0].name}, {run.name}"
        if ours is None or theirs is None:
            unknown = runs[0].name if ours is None else run.name
            raise ConfigError("compare", names, f"the report of {unknown} does not say which data it is of", hint)
        differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if differing:
            found = "; ".join(f"{key} is {_short(ours.get(key))} and {_short(theirs.get(key))}" for key in differing)
            raise ConfigError("compare", names, f"are not of the same data: {found}", hint)


def _short(value: object) -> str:
    return str(value)[:12]
