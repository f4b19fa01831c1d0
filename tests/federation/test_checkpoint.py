"""Names of the checkpoint folder: at each moment one of them is a complete checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation import checkpoint


def write(folder: Path, value: float) -> None:
    checkpoint.begin(folder)
    checkpoint.write_dense(folder, {"x": torch.tensor(value)})
    checkpoint.finish(folder, {"value": value})


def value(folder: Path) -> float:
    found: float = checkpoint.read_manifest(folder)["value"]
    return found


def test_a_new_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "last.ckpt"
    for number in (1.0, 2.0):
        write(folder, number)
        assert value(folder) == number
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_writer_that_stops_before_the_manifest_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "last.ckpt"
    write(folder, 1.0)
    checkpoint.begin(folder)
    checkpoint.write_dense(folder, {"x": torch.tensor(2.0)})
    assert value(folder) == 1
    write(folder, 3.0)
    assert value(folder) == 3


@pytest.mark.parametrize("name", ["last.ckpt.partial", "last.ckpt.old"])
def test_a_writer_that_stops_between_two_names_loses_nothing(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "last.ckpt"
    write(folder, 1.0)
    folder.rename(tmp_path / name)
    with pytest.raises(ConfigError, match=f"Saving was interrupted; .*{name} is complete"):
        checkpoint.read_manifest(folder)
    checkpoint.begin(folder)
    assert value(folder) == 1


def test_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", 1.0)
    manifest = tmp_path / "a.ckpt" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(ConfigError, match="has format 99"):
        checkpoint.read_manifest(tmp_path / "a.ckpt")
