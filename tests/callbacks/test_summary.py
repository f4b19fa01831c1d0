"""tools/summary.py on reports written by hand."""

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

SUMMARY = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "summary.py"))
MIB = 2**20


def write(folder: Path, bits_per_byte: float | None) -> Path:
    kinds = ("dense", "expert", "moments", "migration", "evaluation", "checkpoint", "control")
    wire = dict.fromkeys(kinds, 0) | {
        "dense": 3 * MIB,
        "evaluation": MIB,
        "checkpoint": MIB // 2,
        "total": 9 * MIB // 2,
    }
    report: dict[str, Any] = {
        "sites": 4,
        "steps": 240,
        "validation": {"val/bits_per_byte": bits_per_byte},
        "bytes": {"wire": wire},
        "tokens_per_second": {"local": 5000.4, "with_sync": 4000.0},
        "resident_parameters": 1234567,
        "peak_memory_mib": 512.2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / "fomoe", 2.3456), write(tmp_path / "ddp", None)]
    SUMMARY["main"]([*map(str, runs), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| run | sites | steps | bits / byte | MiB sent | MiB sent for eval |")
    assert lines[1] == "| --- |" + " ---: |" * 9
    assert lines[2] == "| fomoe | 4 | 240 | 2.346 | 3.0 | 1.5 | 4,000 | 5,000 | 1,234,567 | 512 |"
    assert lines[3].startswith("| ddp | 4 | 240 | - |")


def test_table_has_a_row_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    SUMMARY["main"]([str(write(tmp_path / "fomoe", 2.3456)), str(write(tmp_path / "ddp", 1.9))])
    out = capsys.readouterr().out
    assert "2.346" in out
    assert "1.900" in out
    assert "1,234,567" in out  # whole, in an ordinary terminal


def test_the_newest_report_of_a_run_counts(tmp_path: Path) -> None:
    old, new = write(tmp_path / "version_9", 1.0), write(tmp_path / "version_10", 2.0)
    os.utime(old / "report.json", (1, 1))
    assert SUMMARY["find_report"](tmp_path) == new / "report.json"


@pytest.mark.parametrize(("value", "passes"), [(2.99, True), (3.0, False), (8.0, False), (None, False)])
def test_limit(tmp_path: Path, value: float | None, passes: bool) -> None:
    arguments = [str(write(tmp_path / "good", 1.0)), str(write(tmp_path / "run", value)), "--max_bits_per_byte", "3.0"]
    if passes:
        SUMMARY["main"](arguments)
        return
    with pytest.raises(SystemExit, match=f"run: val/bits_per_byte is {value}, not below 3.0") as failure:
        SUMMARY["main"](arguments)
    assert "good" not in str(failure.value.code).replace(str(tmp_path), "")


def test_a_folder_without_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no report\.json here or below"):
        SUMMARY["main"]([str(tmp_path)])
