"""The promise of docs/checkpoints.md: releases that differ in their third number alone read each other's checkpoints.

`stored/format-<n>` is a checkpoint that two sites wrote when format n was new (its settings: `RUN`). A change of the
layout must change FORMAT, and then it needs a new one.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fomoe_pl import __version__
from fomoe_pl.checkpoint.format import FORMAT, read_manifest
from fomoe_pl.checkpoint.loading import load_global_model
from tests.test_cli import environment

FORMATS = {"0.1": 4}  # by the first two numbers of the version
STORED = Path(__file__).parent / "stored"
RUN: dict[str, Any] = {
    "seed_everything": 1,
    "trainer": {
        "accelerator": "cpu", "devices": 2, "max_steps": 4, "max_epochs": -1, "limit_val_batches": 0,
        "num_sanity_val_steps": 0, "enable_progress_bar": False, "logger": False, "enable_checkpointing": True,
        "strategy": {
            "class_path": "fomoe_pl.strategies.FederatedStrategy",
            "init_args": {"overlap": 1, "local_steps": 2, "inner_moments": "average",
                          "outer": {"class_path": "fomoe_pl.federation.outer.Nesterov"}},
        },
        "callbacks": [{
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": "saved", "filename": "{step}", "every_n_train_steps": 4,
                          "enable_version_counter": False},
        }],
    },
    "model": {
        "architecture": {"vocab_size": 257, "d_model": 8, "n_layers": 1, "n_heads": 2, "n_experts": 2, "top_k": 1,
                         "d_expert": 4, "base_width": 8, "base_depth": 1, "expert_backend": "loop"},
        "optimizer": {"warmup_steps": 1},
    },
    "data": {"sequence_length": 16, "batch_size": 2},
}  # fmt: skip


def fit(folder: Path, root: str, *more: str) -> str:
    """Train RUN on a corpus in a folder of its own; what it printed."""
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    command = [sys.executable, "-m", "fomoe_pl", "fit", "-c", "run.yaml", "--data.root", root, *more]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_release_with_another_third_number_has_the_same_format() -> None:
    assert FORMATS[__version__.rpartition(".")[0]] == FORMAT
    assert [path.name for path in STORED.iterdir()] == [f"format-{FORMAT}"]


def test_a_stored_checkpoint_is_the_model_that_it_was() -> None:
    folder = STORED / f"format-{FORMAT}"
    manifest = read_manifest(folder)
    assert (manifest["optimizer_steps"], manifest["rounds"], manifest["n_sites"]) == (4, 2, 2)
    model = load_global_model(folder)
    hidden, _ = model(torch.tensor([list(b"My fellow citizens")]))
    probabilities = model.logits(hidden)[0, -1].detach().softmax(dim=-1)
    assert int(probabilities.argmax()) == 69
    assert float(probabilities.max()) == pytest.approx(0.00564365, rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_from_a_stored_checkpoint(root: str, tmp_path: Path) -> None:
    shutil.copytree(STORED / f"format-{FORMAT}", tmp_path / "stored.ckpt")
    fit(tmp_path, root, "--ckpt_path", "stored.ckpt", "--trainer.max_steps", "8")
    assert read_manifest(tmp_path / "saved/step=8.ckpt")["rounds"] == 4
