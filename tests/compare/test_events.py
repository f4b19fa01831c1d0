"""Curves of runs that went on, started again, or ended between two points, from event files written by hand."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fomoe_pl.compare.events import read_events

MIB = 2**20
TIME, WIRE, CHURN = "time/train_s", "comm/training_wire_MiB", "routing/churn/mean"


def report(steps: int, seconds: float, mib: int) -> dict[str, Any]:
    wire = {"total": (mib + 3) * MIB, "evaluation": 3 * MIB}
    return {"steps": steps, "train_seconds": seconds, "bytes": {"wire": wire}}


def write(folder: Path, index: int, curves: dict[str, dict[int, float]]) -> None:
    """One process's events; values by optimizer steps taken."""
    with SummaryWriter(str(folder / "new")) as writer:
        for tag, points in curves.items():
            for steps, value in points.items():
                writer.add_scalar(tag, value, steps - 1)
    (written,) = (folder / "new").iterdir()
    written.rename(folder / f"events.out.tfevents.{1000 + index}.host.{9 - index}.0")


def points(folder: Path, tag: str, report: dict[str, Any]) -> dict[float, float]:
    curve = read_events(folder, report)[0][tag]
    assert sorted(set(curve.steps)) == curve.steps.tolist()
    return dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))


def test_a_curve_ends_with_the_run(tmp_path: Path) -> None:
    write(tmp_path, 0, {WIRE: {10: 20.0, 20: 40.0}, TIME: {10: 1.0, 20: 2.0}, CHURN: {20: 0.5}})
    ended = report(27, 2.5, 54)
    assert points(tmp_path, WIRE, ended) == {10: 20, 20: 40, 27: 54}
    assert points(tmp_path, TIME, ended) == {10: 1, 20: 2, 27: 2.5}
    assert points(tmp_path, CHURN, ended) == {20: 0.5}
    assert points(tmp_path, WIRE, report(20, 2.0, 99)) == {10: 20, 20: 40}


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    write(tmp_path, 0, {TIME: {10: 1.0, 20: 2.0, 30: 3.0}, WIRE: {10: 20.0, 20: 40.0, 30: 60.0}})
    # Cut at 30 and taken up again at the checkpoint of 20.
    write(tmp_path, 1, {TIME: {25: 0.5, 35: 1.5}, WIRE: {25: 50.0, 35: 70.0}})
    ended = report(38, 1.75, 76)
    assert points(tmp_path, TIME, ended) == {10: 1, 20: 2, 25: 2.5, 35: 3.5, 38: 3.75}
    assert points(tmp_path, WIRE, ended) == {10: 20, 20: 40, 25: 50, 35: 70, 38: 76}


def test_another_run_in_the_folder_replaces_the_first(tmp_path: Path) -> None:
    write(tmp_path, 0, {TIME: {10: 1.0, 20: 2.0, 30: 3.0}, CHURN: {10: 0.875, 15: 0.75}})
    write(tmp_path, 1, {TIME: {5: 7.0, 10: 14.0}, CHURN: {5: 0.25, 10: 0.5}})
    ended = report(10, 14.0, 0)
    assert points(tmp_path, TIME, ended) == {5: 7, 10: 14}
    assert points(tmp_path, CHURN, ended) == {5: 0.25, 10: 0.5}


def test_training_does_not_load_the_reader() -> None:
    code = "import sys, fomoe_pl.cli; sys.exit('tensorboard.backend.event_processing.event_accumulator' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
