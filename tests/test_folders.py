"""Where a run is written: what another has left there stays."""

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from fomoe_pl.errors import ConfigError
from fomoe_pl.folders import RunFolders, check_fixed, clear, is_taken


def logger(folder: Path, name: str = "run", version: str | int | None = "") -> Any:
    return Namespace(class_path="a.Logger", init_args=Namespace(save_dir=str(folder), name=name, version=version))


def run_in(folder: Path, *files: str) -> Path:
    for file in files or ("report.json",):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


@pytest.mark.parametrize("file", ["report.json", "metrics.csv", "events.out.tfevents.1", "checkpoints/last.ckpt/a"])
def test_what_a_run_has_written_takes_its_folder(tmp_path: Path, file: str) -> None:
    assert not is_taken(tmp_path / "run")
    run_in(tmp_path / "run", "notes.txt")
    assert not is_taken(tmp_path / "run")
    run_in(tmp_path / "run", file)
    assert is_taken(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "version", "taken", "chosen"),
    [
        ("run", "", [], "run"), ("run", "", ["run"], "run-2"), ("run", "", ["run", "run-2", "run-3"], "run-4"),
        ("run", "", ["run-2"], "run"), ("a/run", "", ["a/run"], "a/run-2"), ("run", "x", ["run/x"], "run/x-2"),
        ("run", 3, ["run/version_3"], "run/version_3-2"), ("run", None, ["run"], None),
    ],
)  # fmt: skip
def test_a_taken_folder_is_numbered(tmp_path: Path, name: str, version: Any, taken: list[str], chosen: Any) -> None:
    for folder in taken:
        run_in(tmp_path / folder)
    folders = RunFolders(logger(tmp_path, name, version))
    moved = folders.choose_free()
    assert folders.paths == ([] if chosen is None else [tmp_path / chosen])
    assert moved == (chosen is not None and chosen in [f"{t}-{n}" for t in taken for n in (2, 4)] and bool(taken))


def test_all_loggers_get_the_same_number(tmp_path: Path) -> None:
    run_in(tmp_path / "b", "metrics.csv")
    run_in(tmp_path / "a-2")
    folders = RunFolders([logger(tmp_path, "a"), logger(tmp_path, "b")])
    assert folders.choose_free()
    assert folders.paths == [tmp_path / "a-3", tmp_path / "b-3"]


def test_a_resumed_run_stays_where_its_checkpoint_is(tmp_path: Path) -> None:
    for name in ("run", "run-2", "run-7", "other"):
        run_in(tmp_path / name, "checkpoints/last.ckpt/manifest.json")
    for name, stays in (("run", True), ("run-2", True), ("run-7", True), ("other", False)):
        folders = RunFolders(logger(tmp_path))
        assert folders.choose_that_of(tmp_path / name / "checkpoints/last.ckpt") == stays
        assert folders.paths == [tmp_path / (name if stays else "run")]
    newest = RunFolders(logger(tmp_path))
    newest.choose_newest()
    assert newest.paths == [tmp_path / "run-2"], "up to the first number that is missing"


def test_a_replaced_run_is_gone_and_nothing_else(tmp_path: Path) -> None:
    run_in(tmp_path, "report.json", "metrics.csv", "events.out.tfevents.1.2", "config.yaml", "checkpoints/a/b", "mine")
    (tmp_path / "model").mkdir()
    clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


def test_a_folder_that_cannot_be_numbered_is_refused(tmp_path: Path) -> None:
    check_fixed([("key", tmp_path)])
    run_in(tmp_path)
    with pytest.raises(ConfigError, match=r"key = .*holds a run that has ended. Give another folder, or --overwrite"):
        check_fixed([("key", tmp_path)])
