"""Sites without a common file system: each stores a part, and goes on from its own and others' disks."""

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from fomoe_pl.callbacks import RoutingStability
from fomoe_pl.checkpoint import format as files
from fomoe_pl.checkpoint import parts
from fomoe_pl.checkpoint.loading import hyper_parameters, load_global_model
from fomoe_pl.cli import _checkpoint_in_one, main
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.outer import Nesterov
from fomoe_pl.hub.loading import load
from fomoe_pl.model.sizes import expert_parameters
from fomoe_pl.strategies import FederatedStrategy
from fomoe_pl.training.elastic import Pace
from tests.distributed import run_distributed
from tests.federation.toy import digest
from tests.strategies.test_checkpoint import differences
from tests.strategies.test_resume import state
from tests.training import Run, fit, launched_as, make_trainer

pytestmark = pytest.mark.timeout(300)
SITES, STEPS = 2, 6
SAVED_AT = (4, 5)  # a round's end, and the middle of one
RULES: dict[str, Any] = {"outer": Nesterov(lr=0.7), "inner_moments": "average"}
SETTINGS: dict[str, dict[str, Any]] = {
    "one": {"overlap": 1},
    "shared": {"overlap": 2, **RULES},
    "alike": {"overlap": 1, "copies": 2, "min_sites": 1},
    "two": {"overlap": 1, "copies": 2, "placement": "random", "routing": "shadow", **RULES},
}


class Saving(L.Callback):
    """Saves after some steps; with disks of their own the path is no folder of any site, but for the name."""

    def __init__(self, folder: str, *steps: int) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(f"{self.folder}/step-{trainer.global_step}.ckpt")


def make_run(root: str, folder: str, name: str, **more: Any) -> Run:
    root_of_sites = f"{'file://' if name == 'shared' else ''}{folder}/{name}/{{site}}"
    settings = {"checkpoint_root": root_of_sites, **SETTINGS[name], "local_steps": 2, **more}
    return Run(root=root, folder=folder, settings=settings, architecture={"n_experts": 4},
               trainer={"max_steps": STEPS})  # fmt: skip


def _observers(run: Run) -> list[L.Callback]:
    """What has a file of its own in each site's part."""
    return [RoutingStability()] if run.settings["overlap"] == 1 and run.settings.get("copies") else []


def _end(run: Run, rank: int, path: str | None = None, *saved: int) -> tuple[dict[str, Any], int]:
    """All that there is at the end, and the bytes that were sent for checkpoints."""
    torch.manual_seed(5 if saved or path is None else 3)
    trainer = fit(run, rank, SITES, [Saving(f"{run.folder}/common", *saved), *_observers(run)], path)
    found = copy.deepcopy(state(trainer))
    for kinds in (found["sent"], found["reduced"]):
        for key in [key for key in kinds if "checkpoint" in (key, key[0])]:
            del kinds[key]
    return found, trainer.strategy.ledger.wire("checkpoint")  # type: ignore[attr-defined]


def _refused(run: Run, rank: int, path: str | None, *callbacks: L.Callback) -> str:
    with pytest.raises(ConfigError) as error:
        fit(run, rank, SITES, callbacks, path)
    return str(error.value)


def _fewer(run: Run, rank: int, n_sites: int, path: str | None, *saved: int) -> FederatedStrategy:
    """As torchrun does where machines may go; all name their folders alike."""
    run.settings["checkpoint_root"] = dict.fromkeys(range(SITES), f"{Path(run.folder).parent}/alike/{rank}")
    trainer = make_trainer(run, rank % n_sites, n_sites, [Saving(run.folder, *saved)])
    strategy = cast(FederatedStrategy, trainer.strategy)
    strategy.pace = Pace(planned=STEPS, start=0, tokens=0, site_tokens=3 * 16, planned_sites=SITES, sites=n_sites)
    trainer.fit(run.module(), run.datamodule(), ckpt_path=path, weights_only=False)
    return strategy


def _between_runs(rank: int, name: str, change: Callable[[], Any]) -> None:
    """Change the disks, in one process while no other does anything."""
    dist.init_process_group("gloo", init_method=f"file://{name}-store", rank=rank, world_size=SITES)
    if rank == 0:
        change()
    dist.barrier()
    dist.destroy_process_group()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _runs(rank: int, root: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with launched_as(rank, SITES, folder):
        found["common"] = _end(make_run(root, folder, "one", checkpoint_root=None), rank, None, 5)
        runs = {name: make_run(root, folder, name) for name in SETTINGS if name != "alike"}
        for name, run in runs.items():
            found[name] = _end(run, rank, "auto" if name == "one" else None, *SAVED_AT)
        for name, step in (("one", 5), ("shared", 5), ("two", 4), ("two", 5)):
            found[f"{name} from {step}"] = _end(runs[name], rank, f"step-{step}.ckpt")
        found["used"] = _refused(runs["one"], rank, None)
        found["unknown"] = _refused(runs["one"], rank, "step-3.ckpt")
        newest = Path(folder, "two", "1", "step-5.ckpt")

        def break_off() -> None:
            """Site 1 was killed before it wrote the manifest and gave its part its name, and a byte has changed."""
            (newest / files.MANIFEST).unlink()
            _flip(newest / files.dense_name())
            newest.rename(files.partial(newest))

        _between_runs(rank, f"{folder}/broken", break_off)
        found["broken off"] = _end(runs["two"], rank, "auto")
        _between_runs(rank, f"{folder}/lost", lambda: shutil.rmtree(Path(folder, "two", "1")))
        torch.manual_seed(3)
        trainer = fit(runs["two"], rank, SITES, _observers(runs["two"]), "step-4.ckpt")
        found["lost"] = trainer.strategy.optimizer_steps, digest(trainer.strategy.federation)  # type: ignore[attr-defined]
        _between_runs(rank, f"{folder}/gone", lambda: Path(folder, "one", "1").rename(Path(folder, "gone")))
        found["gone"] = _refused(runs["one"], rank, "auto")
        Path(folder, "fewer").mkdir(exist_ok=True)
        _fewer(make_run(root, f"{folder}/fewer", "alike"), rank, SITES, None, *SAVED_AT)
    with launched_as(rank, SITES, folder):
        os.environ |= {"LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        Path(folder, f"alone-{rank}").mkdir()
        alone = _fewer(make_run(root, f"{folder}/alone-{rank}", "alike"), rank, 1, "auto")
        found["fewer"] = alone.optimizer_steps, alone.content.origin(SITES), digest(alone.federation)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disks")


@pytest.fixture(scope="module")
def found(root: str, folder: Path) -> list[dict[str, Any]]:
    return run_distributed(_runs, SITES, root, str(folder))


@pytest.mark.parametrize("name", ["one from 5", "shared from 5", "two from 4", "two from 5"])
def test_interrupted_and_resumed_is_uninterrupted(found: list[Any], name: str) -> None:
    for site in found:
        whole, resumed = site[name.split()[0]], site[name]
        assert differences(whole[0], resumed[0]) == []


def test_training_is_the_same_wherever_checkpoints_are(found: list[Any]) -> None:
    for site in found:
        assert differences(site["common"][0], site["one"][0]) == []


def test_only_what_a_site_lacks_travels(found: list[Any]) -> None:
    for site in found:
        assert (
            site["one"][1] == site["one from 5"][1] == site["shared"][1] == 0
        )  # copies up to the overlap cost nothing
        assert site["shared from 5"][1] > 0  # what a site holds and another one stores
        packed = site["two from 5"][1] - site["two"][1]  # of experts that a site lacks
        assert 0 < packed < site["two"][1] / 4
    # Anchors and momentum of the experts of a site, twice: so often was saved.
    config = make_run("", "", "two").config
    numbers = config.n_layers * 2 * (expert_parameters(config))
    assert found[0]["two"][1] == len(SAVED_AT) * 2 * 4 * numbers


def test_the_newest_that_all_can_have_goes_on(found: list[Any]) -> None:
    for site in found:
        assert differences(site["two"][0], site["broken off"][0]) == []
    assert found[0]["broken off"][1] > found[0]["two from 5"][1]  # the file with the flipped byte came from site 0
    assert found[1]["broken off"][1] == found[1]["two from 5"][1]


def test_a_site_that_lost_its_disk_goes_on_with_what_others_have(found: list[Any], folder: Path) -> None:
    assert found[0]["lost"] == found[1]["lost"]
    assert found[0]["lost"][0] == STEPS
    fetched = Path(folder, "two", "1", "step-4.ckpt")
    manifest = files.read_manifest(fetched)
    there = {path.name for path in fetched.iterdir()} - {files.MANIFEST}
    assert not {files.site_name(1), files.observers_name(1)} & there
    assert files.observers_name(1) in manifest["files"]
    assert files.dense_name() in there
    for name in there:
        files.verify(fetched, name, manifest)


def test_what_is_lost_with_a_disk_is_named(found: list[Any]) -> None:
    for site in found:
        assert "experts 1, 3 of layer 0; experts 0, 2 of layer 1 (experts-00001-00001.safetensors" in site["gone"]
        assert "was on site 1" in site["gone"]
        assert "step 4 is not whole" in site["gone"]
        assert "step 5 is not whole" in site["gone"]
        assert "experts 0" not in site["gone"].split("layer 1")[-1]


def test_other_runs_checkpoints_stay_and_there_is_no_other_name(found: list[Any]) -> None:
    for site in found:
        assert "has checkpoints of another run" in site["used"]
        assert "no site has a checkpoint of this name" in site["unknown"]


def test_fewer_sites_go_on_to_the_planned_tokens_each_from_its_own_state(found: list[Any]) -> None:
    last = 5 + (STEPS - 5) * SITES  # of 6 planned steps 5 were of both sites
    assert [site["fewer"][:2] for site in found] == [(last, 0), (last, 1)]


def test_whose_own_state_a_site_goes_on_from() -> None:
    has = {files.site_name(site): [site - 1] for site in range(1, 4)} | {files.site_name(0): []}
    assert parts.origins({"n_sites": 4}, has, 3) == [1, 2, 3]  # the first machine is gone
    assert parts.origins({"n_sites": 4}, has, 4) == [0, 1, 2, 3]
    assert parts.origins({"n_sites": 4}, {}, 6) == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("callbacks", "told"),
    [
        ([{"save_last": "link"}], "save_last = 'link'"),
        ([{"dirpath": "a"}, {"dirpath": "b", "monitor": "x"}], "one dirpath"),
        ([{"filename": "a/{step}"}], "no / in a filename"),
    ],
)
def test_names_alone_tell_checkpoints_apart(root: str, tmp_path: Path, callbacks: list[Any], told: str) -> None:
    run = make_run(root, str(tmp_path), "one")
    strategy = FederatedStrategy(**run.settings)
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=SITES, logger=False, max_steps=2,
                        max_epochs=-1, callbacks=[ModelCheckpoint(**arguments) for arguments in callbacks],
                        val_check_interval=2, check_val_every_n_epoch=None)  # fmt: skip
    with pytest.raises(ConfigError) as error:
        strategy.check_run(trainer, run.module(), None, fitting=True)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"copies": 2}, "Give checkpoint_root too"),
        ({"copies": 0, "checkpoint_root": "a"}, "at least 1"),
        ({"checkpoint_root": "a/{site}", "min_sites": 1}, "Name the folder alike on all machines"),
    ],
)
def test_settings_of_disks_that_cannot_work_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        FederatedStrategy(**settings)
    assert told in str(error.value)


def _export(folders: Sequence[Path | str], output: Path) -> bytes:
    main(["export", *map(str, folders), str(output), "--format", "plain"])
    return (output / "model.safetensors").read_bytes()


def test_an_export_from_several_folders_is_that_from_a_common_one(
    found: list[Any], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [folder / "one" / "0" / "step-5.ckpt", folder / "gone" / "step-5.ckpt"]
    whole = _export([folder / "common" / "step-5.ckpt"], tmp_path / "whole")
    assert _export(own, tmp_path / "joined") == whole
    assert _export([f"file://{own[0]}", own[1]], tmp_path / "url") == whole
    stored = _export([f"file://{folder}/shared/{site}/step-5.ckpt" for site in range(SITES)], tmp_path / "stored")
    assert _export([folder / "shared" / "1" / "step-5.ckpt", folder / "shared" / "0" / "step-5.ckpt"],
                   tmp_path / "copied") == stored  # fmt: skip
    assert [path.name for path in tmp_path.glob("*.parts")] == []
    for folders, told in ((own[:1], "experts 1, 3 of layer 0"),
                          ([own[0], folder / "gone" / "step-4.ckpt"], "is another checkpoint"),
                          ([own[0], own[0]], "experts 1, 3 of layer 0")):  # fmt: skip
        with pytest.raises(SystemExit):
            _export(folders, tmp_path / "refused")
        assert told in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_other_commands_take_several_folders_too(found: list[Any], folder: Path, root: str) -> None:
    own = [str(folder / "one" / "0" / "step-5.ckpt"), f"file://{folder / 'gone' / 'step-5.ckpt'}"]
    whole, joined = load(str(folder / "common" / "step-5.ckpt"), data=root), load(own, data=root)
    assert joined.steps == whole.steps == 5
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in joined.model.state_dict().items())
    with _checkpoint_in_one(["validate", "--ckpt_path", *own, "--data.root", root]) as words:
        assert words is not None
        assert [words[:2], words[3:]] == [["validate", "--ckpt_path"], ["--data.root", root]]
        there = load_global_model(words[2])
        assert set(hyper_parameters(words[2]))
    assert not Path(words[2]).exists()
    common = load_global_model(folder / "common" / "step-5.ckpt").state_dict()
    assert all(torch.equal(value, common[name]) for name, value in there.state_dict().items())
    with _checkpoint_in_one(["validate", "--ckpt_path", str(folder), "--data.root", root]) as words:
        assert words is None
