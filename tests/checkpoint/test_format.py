"""Names of the checkpoint folder: at each moment one of them is a complete checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fomoe_pl.checkpoint import format as checkpoint
from fomoe_pl.errors import ConfigError


def write(folder: Path, value: float) -> None:
    checkpoint.begin(folder)
    checkpoint.write(folder, checkpoint.dense_name(), {"x": torch.tensor(value)})
    checkpoint.seal(folder, 0, [checkpoint.dense_name()])
    checkpoint.finish(folder, {"value": value, "optimizer_steps": int(value)})


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
    checkpoint.write(folder, checkpoint.dense_name(), {"x": torch.tensor(2.0)})
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


def damage(folder: Path, how: str) -> None:
    weights, manifest = folder / "dense.safetensors", folder / "manifest.json"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "gone":
        weights.unlink()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "another manifest":
        manifest.write_text(manifest.read_text().replace('"optimizer_steps": 2', '"optimizer_steps": 3'))
    else:
        manifest.write_text(manifest.read_text()[:-20])


def flip(folder: Path) -> None:
    content = bytearray((folder / "dense.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "dense.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("how", "told"),
    [("cut", "dense.safetensors has 67 bytes, not 68"), ("gone", "dense.safetensors is missing"),
     ("no manifest", "has no manifest.json"), ("half a manifest", "is no manifest"),
     ("another manifest", "manifest.json does not have its own hash")],
)  # fmt: skip
def test_a_damaged_folder_is_named_and_the_one_before_is_found(tmp_path: Path, how: str, told: str) -> None:
    for number in (1.0, 2.0):
        write(tmp_path / f"{number}.ckpt", number)
    assert checkpoint.newest(tmp_path) == (tmp_path / "2.0.ckpt", [])
    damage(tmp_path / "2.0.ckpt", how)
    with pytest.raises(ConfigError, match=told):
        checkpoint.read_manifest(tmp_path / "2.0.ckpt")
    found, [message] = checkpoint.newest(tmp_path)
    assert found == tmp_path / "1.0.ckpt"
    assert "2.0.ckpt" in message
    assert told in message


def test_where_a_bit_has_flipped_the_one_before_is_found_if_hashes_are_compared(tmp_path: Path) -> None:
    for number in (1.0, 2.0):
        write(tmp_path / f"{number}.ckpt", number)
    assert checkpoint.newest(tmp_path, hashes=True) == (tmp_path / "2.0.ckpt", [])
    flip(tmp_path / "2.0.ckpt")
    assert checkpoint.newest(tmp_path) == (tmp_path / "2.0.ckpt", [])
    found, [message] = checkpoint.newest(tmp_path, hashes=True)
    assert found == tmp_path / "1.0.ckpt"
    assert "the hash of dense.safetensors differs" in message


def test_nothing_is_the_newest_of_nothing(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("name", ["last.ckpt.partial", "last.ckpt.old"])
def test_a_complete_folder_under_another_name_is_found(tmp_path: Path, name: str) -> None:
    write(tmp_path / "last.ckpt", 1.0)
    (tmp_path / "last.ckpt").rename(tmp_path / name)
    assert checkpoint.newest(tmp_path) == (tmp_path / name, [])


def test_a_flipped_bit_in_a_file_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "last.ckpt"
    write(folder, 1.0)
    wanted = {"names": ["x"], "expert_layer": {}, "residents": (), "n_experts": 0}
    assert checkpoint.read_weights(folder, **wanted) == {"x": torch.tensor(1.0)}
    flip(folder)
    with pytest.raises(ConfigError, match="the hash of dense"):
        checkpoint.read_weights(folder, **wanted)


def test_the_manifest_is_read_once_however_many_files_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names = tmp_path / "last.ckpt", [checkpoint.dense_name(), *map(checkpoint.experts_name, range(3))]
    checkpoint.begin(folder)
    for i, name in enumerate(names):
        checkpoint.write(folder, name, {f"x#{i - 1}" if i else "y": torch.tensor(float(i))})
    checkpoint.seal(folder, 0, names)
    checkpoint.finish(folder, {"optimizer_steps": 1})
    reads, read = [], checkpoint.read_manifest
    monkeypatch.setattr(checkpoint, "read_manifest", lambda path: reads.append(path) or read(path))
    weights = checkpoint.read_weights(folder, ["x", "y"], {"x": 0}, ((2, 0, 1),), n_experts=3)
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {"x": [3, 1, 2], "y": 0}
    assert reads == [folder]


@pytest.mark.parametrize("slot", ["momentum", "dense", "experts", "dense_v", "experts_m"])
def test_files_of_a_slot_are_not_taken_for_weights(slot: str) -> None:
    names = {
        prefix: [checkpoint.dense_name(prefix), checkpoint.experts_name(3, prefix)]
        for prefix in ("", checkpoint.of_slot(slot))
    }
    for prefix, of_prefix in names.items():
        assert all(checkpoint.has_tensors(name, prefix) for name in of_prefix)
        assert not any(
            checkpoint.has_tensors(name, prefix) for other in names if other != prefix for name in names[other]
        )


def resident_mib() -> float:
    """Pages of files that are in this process's memory."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells what is in memory")
def test_reading_tensor_by_tensor_takes_no_more_room_than_some_of_them(tmp_path: Path) -> None:
    n, mib = 16, 16
    offsets = [i * mib * 2**20 for i in range(n + 1)]
    header = json.dumps({
        str(i): {"dtype": "F32", "shape": [4, mib * 2**16], "data_offsets": offsets[i : i + 2]} for i in range(n)
    }).encode()  # fmt: skip
    with (tmp_path / "x.safetensors").open("wb") as file:  # with a hole for the values
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offsets[-1])
    files = checkpoint.TensorFiles()
    before, most = resident_mib(), 0.0
    for i in range(n):
        for row in (None, 0, 1, 2, 3):
            assert files.read(tmp_path / "x.safetensors", str(i), row).sum() == 0
            most = max(most, resident_mib() - before)
    assert most < n * mib / 2


class Planted:
    """What runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("what", ["planted", "no pickle", "cut", "empty"])
def test_a_planted_file_does_nothing_and_is_named(tmp_path: Path, what: str) -> None:
    folder, name, done = tmp_path / "a.ckpt", checkpoint.site_name(0), tmp_path / "done"
    checkpoint.begin(folder)
    path = checkpoint.partial(folder) / name
    torch.save({"rng": Planted(done)} if what == "planted" else {"rng": torch.rand(9)}, path)
    if what != "planted":
        data = path.read_bytes()
        path.write_bytes({"no pickle": b"not a pickle" * 99, "cut": data[: len(data) // 2], "empty": b""}[what])
    checkpoint.seal(folder, 0, [name])  # whoever plants a file can write hashes too
    checkpoint.finish(folder, {"optimizer_steps": 1})
    with pytest.raises(ConfigError, match=rf"{name} holds something else than plain values and tensors"):
        checkpoint.read_state(folder, name)
    assert not done.exists()


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    checkpoint.begin(tmp_path / "a.ckpt")
    plain = {"rng": np.random.get_state(), "n": [1, 2.0, None, "text", b"x", (True, torch.rand(2))], "s": {3}}
    checkpoint.write(tmp_path / "a.ckpt", "trainer.pt", plain)
    with pytest.raises(ConfigError, match=r"room for plain values and tensors, and trainer.pt would have .*PosixPath"):
        checkpoint.write(tmp_path / "a.ckpt", "trainer.pt", {"callbacks": {"Mine": tmp_path}})


def test_a_file_is_hashed_again_only_if_it_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    hashed = checkpoint.sha256_of
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: (read.append(path), hashed(path))[1])
    path, moved = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"1")
    assert checkpoint.hash_of(path) == checkpoint.hash_of(path)
    assert len(read) == 2  # it may change within the same tick
    os.utime(path, ns=(1, 1))
    before = checkpoint.hash_of(path)
    path.rename(moved)
    assert checkpoint.hash_of(moved) == before
    assert len(read) == 3
    moved.write_bytes(b"2")
    assert checkpoint.hash_of(moved) != before
    checkpoint.remember(moved, "told")
    assert checkpoint.hash_of(moved) == "told"
    os.utime(moved, ns=(2, 2))
    assert checkpoint.hash_of(moved) == hashed(moved)
    assert len(read) == 5
