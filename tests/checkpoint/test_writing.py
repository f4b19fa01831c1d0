"""A checkpoint that is written while training goes on: what is copied, and when it is complete."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fomoe_pl.checkpoint import format as checkpoint
from fomoe_pl.checkpoint.writing import HostCopies, Writing
from fomoe_pl.errors import ConfigError

N_SITES = 2


def test_copies_are_of_their_own_memory_and_take_the_last_ones_buffers() -> None:
    tensor, mutable = torch.arange(6.0).view(2, 3), {"a": [1]}
    content = {"rows": [tensor[0], tensor[1].clone()], "other": (tensor, mutable, "text", 3)}
    copies = HostCopies()
    first = copies.copy(content)
    tensor += 1
    mutable["a"].append(2)
    assert torch.equal(first["rows"][0], torch.arange(3.0))
    assert torch.equal(first["other"][0], torch.arange(6.0).view(2, 3))
    assert first["other"][1:] == ({"a": [1]}, "text", 3)
    memory = {t.data_ptr() for t in (*first["rows"], first["other"][0])}
    second = copies.copy(content)
    assert {t.data_ptr() for t in (*second["rows"], second["other"][0])} == memory
    assert torch.equal(second["other"][0], tensor)


def test_buffers_of_a_validation_serve_training_too() -> None:
    copies = HostCopies()
    with torch.inference_mode():
        copies.copy([torch.zeros(3)])
    [copied] = copies.copy([torch.ones(3)])
    assert torch.equal(copied, torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_the_device_does_next_is_not_in_the_copy() -> None:
    tensor = torch.zeros(64, 2**20, device="cuda")
    busy = torch.rand(4096, 4096, device="cuda")
    copies = HostCopies()
    for value in range(1, 4):
        for _ in range(20):
            busy = busy @ busy / busy.norm()  # the copy stands behind it
        tensor.fill_(value)
        [copied] = copies.copy([tensor])
        tensor.fill_(-1)
        assert copied.is_pinned()
        assert bool((copied == value).all())


def writing(folder: Path, site: int, steps: int = 7) -> Writing:
    manifest = {"optimizer_steps": steps} if site == 0 else None
    return Writing(folder, steps, site, manifest, N_SITES)


def contents(site: int) -> dict[str, Any]:
    return {checkpoint.experts_name(site): {f"x#{site}": torch.tensor(float(site))}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.begin(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_it_is_complete_when_all_sites_have_written(folder: Path) -> None:
    first, second = writing(folder, 0), writing(folder, 1)
    removed: list[str] = []
    first.start(contents(0), HostCopies())
    first.after(lambda: removed.append("before"))
    first.wait_written()
    assert not first.wait_alone(0.2)
    assert (removed, first.complete, folder.exists()) == ([], False, False)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        checkpoint.read_manifest(checkpoint.partial(folder))
    second.start(contents(1), HostCopies())
    second.wait_complete()
    first.wait_complete()
    assert first.complete
    assert removed == ["before"]
    first.after(lambda: removed.append("at once"))
    assert removed == ["before", "at once"]
    assert all(site.wait_alone(0) for site in (first, second))
    assert {*checkpoint.read_manifest(folder)["files"]} == {checkpoint.experts_name(site) for site in range(N_SITES)}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_older_checkpoint_of_the_same_name_is_not_taken_for_it(folder: Path) -> None:
    for site in reversed(range(N_SITES)):  # without threads site 0 must come last
        older = writing(folder, site, steps=6)
        older.write(contents(site))
        older.wait_complete()
    assert checkpoint.is_complete(folder, 6)
    checkpoint.begin(folder)
    newer = writing(folder, 0)
    newer.start(contents(0), HostCopies())
    assert not newer.wait_alone(0.2)
    newer.give_up()
    assert checkpoint.is_complete(folder, 6)


def test_what_cannot_be_written_ends_quietly_and_nothing_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "write", raising(OSError(28, "No space left on device")))
    other, zero, removed = writing(folder, 1), writing(folder, 0), []
    other.start(contents(1), HostCopies())
    other.wait_written()
    monkeypatch.undo()
    zero.start(contents(0), HostCopies())
    zero.after(lambda: removed.append("old"))
    assert other.failed
    assert "site 1 cannot write" in capsys.readouterr().err
    zero.give_up()
    assert not zero.complete
    assert removed == []
    assert not list(folder.parent.iterdir())
    other.raise_unexpected()  # nothing: the disk is to blame


def test_sites_without_a_common_file_system_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fomoe_pl.checkpoint.writing._VISIBLE_SECONDS", 0.1)
    zero = writing(folder, 0)
    zero.start(contents(0), HostCopies())
    zero.wait_written()
    zero.wait_complete()  # site 1 says that it has written, elsewhere
    assert zero.failed
    assert not zero.complete
    assert "the files of 1 of 2 sites" in capsys.readouterr().err


def test_what_is_no_fault_of_the_disk_is_raised_where_training_looks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "write", raising(ZeroDivisionError("a mistake")))
    site = writing(folder, 0)
    site.start(contents(0), HostCopies())
    site.wait_complete()
    assert site.failed
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        site.raise_unexpected()


def raising(error: BaseException) -> Callable[..., None]:
    def write(*_: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        raise error

    return write
