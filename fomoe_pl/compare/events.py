"""Curves and pictures of a run, from TensorBoard's event files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

from fomoe_pl.callbacks.communication import training_bytes
from fomoe_pl.costs.memory import MIB

Floats = NDArray[np.float64]
EVENTS = "events.out.tfevents.*"
WANTED = ("routing/", "val/", "tokens/global", "comm/training_wire_MiB", "time/train_s", "round/")
RESTARTS = ("time/train_s",)
"""Curves that start from 0 with each process that trains."""


@dataclass(frozen=True)
class Curve:
    """One tag: optimizer steps taken, in order and each once, and values."""

    steps: Floats
    values: Floats


def read_events(folder: Path, report: dict[str, Any]) -> tuple[dict[str, Curve], dict[str, bytes]]:
    """Curves and last pictures of all event files in a folder, by tag; none without files.

    Every training process writes a file of its own. From its first step on it replaces what earlier
    ones wrote: a resumed run continues, another run in the same folder replaces the first.

    Args:
        folder: Of the run.
        report: Of the run; its totals end the curves whose last point is before the last step.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    pictures: dict[str, bytes] = {}
    before: dict[str, float] = {}
    for path in sorted(folder.glob(EVENTS)):  # their names begin with the time
        events = EventAccumulator(str(path), size_guidance={SCALARS: 0, IMAGES: 1}).Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith(WANTED):
                # Loggers count steps from 0.
                new = [(float(point.step + 1), float(point.value)) for point in events.Scalars(tag)]
                kept = [point for point in points.get(tag, []) if point[0] < min(step for step, _ in new)]
                before[tag] = kept[-1][1] if kept and tag in RESTARTS else 0.0
                last = {step: before[tag] + value for step, value in new}
                points[tag] = kept + sorted(last.items())
        pictures |= {tag: events.Images(tag)[-1].encoded_image_string for tag in events.Tags()["images"]}
    for tag, total in _totals(report).items():
        if tag in points and points[tag][-1][0] < report["steps"]:
            points[tag].append((float(report["steps"]), before[tag] + total))
    arrays = {tag: np.array(found, dtype=float) for tag, found in points.items()}
    return {tag: Curve(array[:, 0], array[:, 1]) for tag, array in arrays.items()}, pictures


def _totals(report: dict[str, Any]) -> dict[str, float]:
    totals = {"comm/training_wire_MiB": training_bytes(report["bytes"]["wire"]) / MIB}
    if "train_seconds" in report:
        totals["time/train_s"] = report["train_seconds"]
    if "tokens" in report:
        totals["tokens/global"] = report["tokens"]["global"]
    return totals
