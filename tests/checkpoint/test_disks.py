"""A site's checkpoints behind a URL: at each moment one of them is whole, and nothing half-written is taken for one."""

import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from fomoe_pl.checkpoint import format as files
from fomoe_pl.checkpoint.disks import NEW, UrlDisk, check_roots, stored_name
from fomoe_pl.checkpoint.writing import Writing
from fomoe_pl.errors import ConfigError
from fomoe_pl.remote import RemotePath

NAME, SITES = "last.ckpt", 2


class Killed(BaseException):
    """Not an error that anything expects."""


@pytest.fixture
def disks(memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[UrlDisk]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return [UrlDisk(f"memory://bucket/{site}") for site in range(SITES)]


def save(disks: list[UrlDisk], steps: int) -> list[Writing]:
    """As the sites of a run do it together."""
    saving = []
    for site, disk in enumerate(disks):
        files.begin(disk.place(NAME))
        saving.append(Writing(disk.place(NAME), steps, site, {"optimizer_steps": steps, "copies": 1}, 0, disk))
    for site, writing in enumerate(saving):
        x = torch.tensor([float(steps)])
        writing.write({files.dense_name(): {"x": x}, files.experts_name(site): {"e": x + site}})
        writing.raise_unexpected()
    every: dict[str, Any] = {}
    for writing in saving:
        every |= writing.sealed
    for writing in saving:
        writing.write_manifest(every)
        writing.raise_unexpected()
    for writing in saving:
        writing.complete_now()
        writing.raise_unexpected()
    return saving


def whole(disks: list[UrlDisk]) -> list[int]:
    """Steps of the checkpoints of which some site knows and whose files are all there, the newest first."""
    found = {one.manifest["sha256"]: one for disk in disks for one in disk.found(None)[0]}
    usable = []
    for one in sorted(found.values(), key=lambda one: one.age, reverse=True):
        held = [disk.held(one.name, one.manifest) for disk in disks]
        if set().union(*(of.names for of in held)) == one.manifest["files"].keys():
            usable.append(one.manifest["optimizer_steps"])
    return usable


def restarted(disks: list[UrlDisk]) -> list[UrlDisk]:
    return [UrlDisk(str(disk.url)) for disk in disks]


def test_a_checkpoint_is_there_once_and_as_it_was_written(disks: list[UrlDisk], memory: Any) -> None:
    for steps in (1, 2):
        assert all(writing.complete and not writing.failed for writing in save(disks, steps))
    assert whole(restarted(disks)) == [2]
    names = sorted(Path(path).name for path in memory.find("/bucket/1"))
    [manifest] = [one.manifest for one in disks[1].found(NAME)[0]]
    own = [files.dense_name(), files.experts_name(1)]
    assert names == sorted([files.MANIFEST, *(stored_name(name, manifest["files"][name]) for name in own)])
    assert not any(disk.folder.exists() and any(disk.folder.iterdir()) for disk in disks)  # what lay here is gone
    held = disks[1].held(NAME, manifest)
    assert held.names == {*own}
    assert held.place is not None
    files.write_manifest(held.place, manifest)
    for name in own:
        files.verify(held.place, name)
    disks[1].clear()
    assert not held.place.exists()
    assert disks[1].folder != held.place.parent


def test_a_run_that_is_killed_at_any_moment_leaves_the_one_before_or_the_new_one(
    disks: list[UrlDisk], memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = [getattr(RemotePath, name) for name in ("write_bytes", "upload", "remove")]
    left = 10**6

    def counted(way: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return way(*arguments)

        return call

    for way in ways:
        monkeypatch.setattr(RemotePath, way.__name__, counted(way))
    outcomes = []
    for operations in range(100):
        memory.store.clear()
        save(disks, 1)
        now = restarted(disks)
        left = operations
        try:
            save(now, 2)
            break
        except Killed:
            left = 10**6
        finally:
            for disk in now:
                disk.clear()
        outcomes.append(whole(restarted(disks))[0])
        # Whatever was left behind is in nobody's way.
        assert all(writing.complete for writing in save(restarted(disks), 3))
        assert whole(restarted(disks)) == [3]
        assert not any(NEW in path for path in memory.find("/bucket"))
    assert outcomes == sorted(outcomes)  # from some moment on it is the new one
    assert {*outcomes} == {1, 2}
    assert len(outcomes) > 10


def test_what_cannot_be_completed_leaves_the_one_before(
    disks: list[UrlDisk], memory: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(disks, 1)
    before = sorted(memory.find("/bucket"))

    def full(*_: Any) -> None:
        raise OSError("quota")

    files.begin(disks[0].place(NAME))
    writing = Writing(disks[0].place(NAME), 2, 0, {"optimizer_steps": 2, "copies": 1}, 0, disks[0])
    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "upload", full)
        writing.write({files.dense_name(): {"x": torch.zeros(1)}})
    assert writing.failed
    assert "site 0 cannot write memory://bucket/0/last.ckpt: quota" in capsys.readouterr().err
    (disks[0].url / NAME / stored_name("x", {"sha256": "0" * 64})).write_bytes(b"half")
    writing.give_up()
    assert sorted(memory.find("/bucket")) == before


def test_a_complete_checkpoint_whose_manifest_could_not_be_put_in_place_stays(
    disks: list[UrlDisk], memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(disks, 1)
    write = RemotePath.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "write_bytes", lambda self, _: write(self, _) if self.name == NEW else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(disks, 2)
    disks[0].give_up(NAME)  # of a later save
    assert whole(restarted(disks))[0] == 2
    disks[0].upload(NAME, {})
    assert disks[0].found(NAME)[0][0].manifest["optimizer_steps"] == 2
    assert NEW in {path.name for path in (disks[0].url / NAME).iterdir()}


def test_a_file_that_was_changed_is_not_taken(disks: list[UrlDisk], memory: Any) -> None:
    save(disks, 1)
    [manifest] = [one.manifest for one in disks[0].found(NAME)[0]]
    damaged = disks[0].url / NAME / stored_name(files.dense_name(), manifest["files"][files.dense_name()])
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    held = disks[0].held(NAME, manifest)
    assert held.names == {files.experts_name(0)}
    # Another site sends it, and the run goes on from here.
    folder = disks[0].place(NAME)
    files.write_manifest(files.partial(folder), manifest)
    files.put_in_place(folder)
    (folder / files.dense_name()).write_bytes(content)
    disks[0].adopt(NAME, [files.dense_name()])
    assert damaged.read_bytes() == content
    (disks[0].url / NAME / files.MANIFEST).write_bytes(b"{")
    found, [told] = disks[0].found(None)
    assert found == []
    assert "no manifest" in told


def test_it_is_removed_whole(disks: list[UrlDisk], memory: Any) -> None:
    save(disks, 1)
    disks[0].remove(NAME)
    assert memory.find("/bucket/0") == []
    assert disks[1].found(NAME)[0]


def test_what_cannot_be_written_is_told_before_training(monkeypatch: pytest.MonkeyPatch, memory: Any) -> None:
    disk = UrlDisk("memory://bucket/0")
    assert disk.trouble() == ""
    assert memory.find("/bucket") == []

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(memory, "pipe_file", denied)
    assert disk.trouble() == "memory://bucket/0 cannot be written (Access Denied)"


@pytest.mark.parametrize(
    ("roots", "told"),
    [
        ("memory://bucket/run", "is one place for several sites. Put {site} into it: memory://bucket/run/{site}"),
        ({0: "memory://a", 1: "/disk/1", 2: "memory://a/"}, "is one place for several sites"),
        ("https://host/{site}", "HTTP only reads"),
        ("nowhere://a/{site}", "no URL that fsspec knows"),
    ],
)
def test_addresses_that_cannot_work_are_refused(roots: Any, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_roots(roots)
    assert "checkpoint_root = " in str(error.value)
    assert told in str(error.value)


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=r'Install s3fs to access S3\)\. Install it: pip install .*"s3fs'):
        check_roots("s3://bucket/{site}")
    check_roots({0: "/disk/0", 1: "relative"})
