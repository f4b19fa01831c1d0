"""docs/extending.md and docs/tutorials/your-strategy.md as a user would try them: their files and commands."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fomoe_pl.costs.activations import Types, expert_activation_bytes
from fomoe_pl.costs.bytes import predict_bytes
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.placement import Random
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.hub.source import site_view
from fomoe_pl.model.config import ModelConfig
from tests.golden import tensors_of
from tests.test_cli import environment
from tests.training import ARCHITECTURE, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PAGES = [ROOT / "docs/extending.md", ROOT / "docs/tutorials/your-strategy.md"]
BLOCKS = [block for page in PAGES for block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), flags=re.DOTALL)]
SITES = 2
SAVED, STEPS = 3, 6  # in the middle of a round and of an interval between two draws; rounds have two steps
SMALL: dict[str, Any] = {
    "trainer": {
        "devices": SITES, "max_steps": STEPS, "limit_val_batches": 0, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "strategy": {
            "class_path": "fomoe_pl.strategies.FederatedStrategy", "init_args": {"overlap": 1, "local_steps": 2},
        },
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"filename": "{step}", "every_n_train_steps": SAVED, "save_top_k": -1},
            },
            {"class_path": "fomoe_pl.callbacks.CommunicationMonitor"},
            {"class_path": "fomoe_pl.callbacks.RunReport"},
        ],
    },
    "model": {
        "architecture": {
            "d_model": 16, "n_layers": 2, "n_heads": 2, "n_experts": 4, "top_k": 2, "d_expert": 8, "base_width": 16,
        },
        "optimizer": {"cooldown_steps": 0},
    },
    "data": {"sequence_length": 16, "batch_size": 2, "val_batch_size": 4, "val_sequences": 12},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pages' files, and the shipped settings."""
    found = tmp_path_factory.mktemp("user")
    (found / "configs").symlink_to(ROOT / "configs")
    (found / "small.yaml").write_text(yaml.safe_dump(SMALL))
    for _, text in BLOCKS:
        if name := re.match(r"# (\w+\.(?:py|yaml))\n", text):
            (found / name[1]).write_text(text)
    return found


def command_of(settings: str) -> list[str]:
    """The command of a page that trains with these settings."""
    (found,) = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()
                if settings in line and " sweep " not in line]  # fmt: skip
    return shlex.split(found)


def fit(folder: Path, root: str, settings: str, *more: str, name: str = "") -> Path:
    """Type the command of SETTINGS.yaml, on a small scale; returns the run's folder."""
    program, *words = command_of(f"{settings}.yaml")
    run = name or settings
    words[3:3] = ["-c", "small.yaml"]  # behind the quickstart
    words += ["--data.root", root, "--trainer.logger.init_args.name", run, *more]
    start = str(Path(sys.executable).with_name(program))  # the console command, which knows no current folder
    done = subprocess.run([start, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / run


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step={step}.ckpt"


def manifest(run: Path, step: int = STEPS) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint(run, step) / "manifest.json").read_text())
    return found


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def site_state(run: Path, site: int, step: int = STEPS) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(checkpoint(run, step) / f"site-{site:05d}.pt", weights_only=False)
    return found


def resumes_bit_for_bit(folder: Path, root: str, name: str, whole: Path) -> None:
    """Whether a run that goes on from the middle comes to the same checkpoint."""
    resumed = fit(folder, root, name, "--ckpt_path", str(checkpoint(whole, SAVED)), name=f"{name}-resumed")
    expected = tensors_of(checkpoint(whole, STEPS))
    assert expected
    assert tensors_of(checkpoint(resumed, STEPS)) == expected
    for site in range(SITES):
        one, other = (site_state(run, site) for run in (whole, resumed))
        torch.testing.assert_close(one["optimizer_states"], other["optimizer_states"], rtol=0, atol=0)
        assert one["residents"] == other["residents"]


@pytest.fixture(scope="module")
def fedadam(folder: Path, root: str) -> Path:
    return fit(folder, root, "fedadam")


@pytest.fixture(scope="module")
def by_load(folder: Path, root: str) -> Path:
    return fit(folder, root, "by_load")


def test_all_files_of_the_pages_are_named_and_all_commands_are_run_here() -> None:
    for kind, text in BLOCKS:
        assert kind == "bash" or re.match(r"# \w+\.(py|yaml)\n", text), text
    source = Path(__file__).read_text()
    for name in re.findall(r"-c (\w+)\.yaml", "".join(text for kind, text in BLOCKS if kind == "bash")):
        assert f'fit(folder, root, "{name}"' in source, name


def test_an_outer_rule_keeps_its_slots_moves_them_and_resumes(folder: Path, root: str, fedadam: Path) -> None:
    assert manifest(fedadam)["redraws"] == 1
    assert manifest(fedadam)["identity"]["outer.rule"] == "fedadam"
    v = [name for name in tensors_of(checkpoint(fedadam, STEPS)) if name.startswith("v-experts")]
    assert len(v) == 2 * 2 * 4  # both matrices of each expert of each layer, once
    migrated = Ledger()
    migrated.load_state_dict(site_state(fedadam, 0)["strategy"]["ledger"])
    expert = 2 * 16 * 8
    assert migrated.payload("migration")
    assert migrated.payload("migration") % (3 * 4 * expert) == 0  # anchor and both slots, float32
    resumes_bit_for_bit(folder, root, "fedadam", fedadam)


def test_the_rule_of_the_tutorial_keeps_its_slot(folder: Path, root: str) -> None:
    run = fit(folder, root, "sign_momentum", "--trainer.strategy.init_args.local_steps", "2")
    assert manifest(run)["identity"]["outer.rule"] == "signmomentum"
    assert [name for name in tensors_of(checkpoint(run, STEPS)) if name.startswith("m-experts")]


def test_a_policy_sees_all_sites_loads_and_resumes(folder: Path, root: str, fedadam: Path, by_load: Path) -> None:
    loads_LE = manifest(by_load)["loads_at_draw"]
    picks = SITES * 4 * 2 * 16 * 2  # of the steps before the draw: sequences, tokens of each, picks of each
    assert [sum(loads_E) for loads_E in loads_LE] == [picks, picks]
    residents = [site_state(by_load, site)["residents"] for site in range(SITES)]
    for layer, loads_E in enumerate(loads_LE):
        first, second, *_ = sorted(range(4), key=lambda e: -loads_E[e])
        assert sum(first in of[layer] for of in residents) == sum(second in of[layer] for of in residents) == 1
        assert not any({first, second} <= set(of[layer]) for of in residents)
    about = manifest(by_load)
    views = [site_view(ModelConfig(**about["architecture"]), about, site).experts for site in range(SITES)]
    assert views == residents, "fomoe generate --site"
    saved = site_state(by_load, 0, SAVED)["strategy"]["loads"]
    assert saved.sum(dim=1).tolist() == [SAVED * 2 * 16 * 2] * 2  # this site's, in the middle of an interval
    calls = [site_state(run, 0)["strategy"]["ledger"]["calls"]["control"] for run in (fedadam, by_load)]
    assert calls[1] == calls[0] + 1 - 2 * 2  # the loads, once; and no slots to compare when saving
    resumes_bit_for_bit(folder, root, "by_load", by_load)


def test_an_expert_backend_gives_what_the_reference_gives(folder: Path, root: str) -> None:
    run = fit(folder, root, "dense_experts")
    expected = fit(folder, root, "dense_experts", "--model.architecture.expert_backend", "loop", name="reference")
    assert manifest(run)["architecture"]["expert_backend"] == "dense_experts.Dense"
    one, other = (load_weights(checkpoint(of, STEPS)) for of in (run, expected))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_statistic_is_summed_over_the_sites_logged_and_drawn(folder: Path, root: str) -> None:
    events = EventAccumulator(str(fit(folder, root, "lost_tokens"))).Reload()
    points = {tag: events.Scalars(f"statistic/lost_tokens/{tag}") for tag in ("mean", "layer_00", "layer_01")}
    assert all(0 < point.value < 1 for of in points.values() for point in of)
    mean, *layers = (of[0].value for of in points.values())
    assert mean == pytest.approx(sum(layers) / 2)
    chart = events.Tensors("custom_scalars__config__")[0]
    assert b"lost_tokens (share of tokens)" in chart.tensor_proto.string_val[0]


def test_a_wire_codec_sends_what_it_says(folder: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit(folder, root, "signs")  # which compares the sites whenever it saves
    monkeypatch.syspath_prepend(folder)
    codec = importlib.import_module("signs").Signs()
    federation = FederationConfig(overlap=1, local_steps=2, wire_codec=codec, inner_moments="average")
    config = ModelConfig(**manifest(run)["architecture"])
    for site in range(SITES):
        counted = Ledger()
        counted.load_state_dict(site_state(run, site)["strategy"]["ledger"])
        expected = predict_bytes(config, federation, n_sites=SITES, site=site, steps=STEPS)
        for kind in ("dense", "expert", "moments"):
            assert counted.payload(kind) == expected.payload(kind)
        assert 0 < counted.sent["dense"] < 3 * 2 * 7000 // 8


def test_the_planner_asks_an_expert_backend_what_it_keeps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    sizes = {**ARCHITECTURE, "d_model": 96, "expert_backend": "dense_experts.Dense"}
    types = Types.of("bf16-mixed")
    assert expert_activation_bytes(ModelConfig(**sizes), types, 4) == 2 * 4 * (2 * 8 + 8)
    (folder / "silent.py").write_text(
        "import dense_experts\nfrom fomoe_pl.model.backends import Backend\n\n\n"
        "class Silent(dense_experts.Dense):\n    kept_bytes = Backend.kept_bytes\n"
    )
    with pytest.raises(ConfigError, match=r"expert_backend = 'silent.Silent': does not declare .*kept_bytes"):
        expert_activation_bytes(ModelConfig(**{**sizes, "expert_backend": "silent.Silent"}), types, 4)


def test_what_only_a_run_knows_is_not_predicted() -> None:
    class ByLoad(Random):
        sees_loads = True

    config = ModelConfig(**ARCHITECTURE)
    with pytest.raises(ConfigError, match=r"placement = 'byload': .* only a run knows"):
        predict_bytes(config, FederationConfig(placement=ByLoad()), n_sites=2, site=0, steps=4)
