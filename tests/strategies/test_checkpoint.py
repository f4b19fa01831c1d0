"""Memory of a site, and checkpoints of a real run: what is written, what comes back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from safetensors import safe_open

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.outer import Nesterov
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.sizes import expert_parameters
from tests.distributed import run_distributed
from tests.federation.toy import digest
from tests.strategies.observers import Largest, sizes, snapshot, watched
from tests.training import Run, launched_as, make_trainer, validate

SITES = 4
EXPERTS = 8  # a number that no other first dimension of three has: heads, sequences and batches are fewer or more
NESTEROV = Nesterov(lr=0.7)
SETTINGS: dict[str, dict[str, Any]] = {
    "fixed": {"overlap": 1, "inner_moments": "average"},
    "random": {"overlap": 2, "placement": "random", "reshuffle_rounds": 1, "outer": NESTEROV},
    "partitioned": {"overlap": 2, "routing": "partitioned", "placement": "random", "inner_moments": "average"},
    "full": {"overlap": SITES, "outer_state": "host"},
}
# Where the outer state lives is of the run, not of the checkpoint.
GOES_ON_WITH = {"random": {"outer_state": "host"}, "full": {"outer_state": "device"}}
SAVED_AT = {"round": 4, "middle": 5, "end": 6}  # experts are not dealt anew at the end, which is a round's end too


class Saving(L.Callback):
    """Saves after some steps and remembers what there was."""

    def __init__(self, folder: str, name: str) -> None:
        self.path = f"{folder}/{name}"
        self.saved: dict[str, dict[str, Any]] = {}
        self.sizes: dict[str, list[int]] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        if trainer.strategy.optimizer_steps == 1:
            self.sizes = sizes(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for when, step in SAVED_AT.items():
            if trainer.global_step == step:
                self.saved[when] = snapshot(trainer)
                trainer.save_checkpoint(f"{self.path}-{when}.ckpt")


class Loaded(L.Callback):
    """Remembers what there is when training goes on."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.snapshot = snapshot(trainer)


def make_run(name: str, root: str, folder: str) -> Run:
    return Run(root=root, folder=folder, settings={"local_steps": 2, **SETTINGS[name]},
               architecture={"n_experts": EXPERTS}, trainer={"max_steps": 6})  # fmt: skip


def _save_and_load(rank: int, root: str, folder: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with launched_as(rank, SITES, folder):
        for name in SETTINGS:
            run, saving = make_run(name, root, folder), Saving(folder, name)
            starting, writing = Largest(EXPERTS), Largest(EXPERTS)
            trainer, module = make_trainer(run, rank, SITES, [saving]), run.module()
            with watched(module, "configure_model", starting), watched(trainer.strategy, "save_checkpoint", writing):
                trainer.fit(module, run.datamodule())
            loaded = {}
            for when in SAVED_AT:
                settings = run.settings | GOES_ON_WITH.get(name, {})
                again, callback = replace(run, settings=settings, trainer={"max_steps": 8}), Loaded()
                trainer = make_trainer(again, rank, SITES, [callback])
                path = f"{saving.path}-{when}.ckpt"
                trainer.fit(again.module(), again.datamodule(), ckpt_path=path, weights_only=False)
                loaded[when] = callback.snapshot, trainer.global_step, digest(trainer.strategy.federation)
            found[name] = {
                "saved": saving.saved,
                "loaded": loaded,
                "sizes": saving.sizes,
                "starting": (starting.operations, starting.found),
                "writing": (writing.operations, writing.found),
            }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def found(root: str, folder: Path) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(_save_and_load, SITES, root, str(folder))


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where two nested snapshots differ, bit for bit."""
    if type(ours) is type(theirs) in (list, tuple):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return [f"{path}: {sorted(map(str, ours.keys() ^ theirs.keys()))}"]
        return [d for key in ours for d in differences(ours[key], theirs[key], f"{path}/{key}")]
    same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    return [] if same else [path]


@pytest.mark.parametrize("when", SAVED_AT)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_site_finds_what_it_had(found: list[Any], name: str, when: str) -> None:
    for site in range(SITES):
        saved, (loaded, steps, _) = found[site][name]["saved"][when], found[site][name]["loaded"][when]
        assert differences(saved, loaded) == []
        assert saved["counters"] == (SAVED_AT[when] // 2, SAVED_AT[when], SAVED_AT[when])
        assert steps == 8
    assert len({found[site][name]["loaded"][when][2] for site in range(SITES)}) == 1


def test_a_snapshot_shows_a_difference(found: list[Any]) -> None:
    saved = found[0]["random"]["saved"]
    assert "/counters/1" in differences(saved["round"], saved["middle"])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_site_holds_its_share_only(found: list[Any], root: str, folder: Path, name: str) -> None:
    config: ModelConfig = make_run(name, root, str(folder)).config
    rows = config.d_model if name == "partitioned" else 0  # of the router
    full = config.n_layers * EXPERTS * (expert_parameters(config) + rows)
    for site in range(SITES):
        share = full * SETTINGS[name]["overlap"] // SITES
        assert {kind: sum(numels) for kind, numels in found[site][name]["sizes"].items()} == {
            "parameters": share, "gradients": share, "moments": 2 * share, "anchors": share,
        }  # fmt: skip
        for phase in ("starting", "writing"):
            operations, whole = found[site][name][phase]
            assert operations
            # On a full replica there are such tensors, or the watch would see nothing.
            assert bool(whole) == (name == "full"), f"{phase}: a tensor of all experts of a layer: {whole[:3]}"


def test_each_expert_is_written_once_by_a_holder(found: list[Any], folder: Path) -> None:
    keys: list[str] = []
    for site in range(SITES):
        with safe_open(folder / "fixed-round.ckpt" / f"experts-{site:05d}.safetensors", framework="pt") as file:
            own = list(file.keys())
        assert len(own) == 2 * 2 * EXPERTS // SITES  # layers x matrices x experts of a site
        keys += own
    assert len(keys) == len(set(keys))
    with safe_open(folder / "fixed-round.ckpt" / "dense.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if "experts" in key]  # noqa: SIM118  no mapping


def test_another_architecture_is_refused_with_the_keys_that_differ(found: list[Any], root: str, folder: Path) -> None:
    other = replace(
        make_run("fixed", root, str(folder)), architecture={"n_experts": EXPERTS, "d_expert": 4, "top_k": 1}
    )
    with pytest.raises(ConfigError, match="d_expert: checkpoint 8, configured 4") as error:
        validate(other, str(folder / "fixed-round.ckpt"))
    assert "top_k: checkpoint 2, configured 1" in str(error.value)
    assert "d_model" not in str(error.value)


def test_an_incomplete_folder_is_refused(found: list[Any], root: str, folder: Path, tmp_path: Path) -> None:
    run = make_run("fixed", root, str(folder))
    copy = tmp_path / "copy.ckpt"
    shutil.copytree(folder / "fixed-round.ckpt", copy)
    assert json.loads((copy / "manifest.json").read_text())["n_sites"] == SITES
    assert validate_loss(run, copy) == validate_loss(run, folder / "fixed-round.ckpt")
    (copy / "experts-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match="experts-00002"):
        validate(run, str(copy))
    (copy / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        validate(run, str(copy))


def validate_loss(run: Run, path: Path) -> float:
    return validate(run, str(path))["val/loss"]
