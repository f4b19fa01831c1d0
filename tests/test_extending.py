"""docs/extending.md as a user would try it: its files, in a folder of their own, and its commands."""

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

from fomoe_pl.federation.ledger import Ledger
from tests.golden import tensors_of
from tests.test_cli import environment
from tests.training import ROOT

pytestmark = pytest.mark.timeout(300)
PAGE = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
SAVED, STEPS = 3, 6  # in the middle of a round and of an interval between two draws; rounds have two steps
SMALL: dict[str, Any] = {
    "trainer": {
        "devices": 2, "max_steps": STEPS, "limit_val_batches": 0, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
        "enable_progress_bar": False,
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
    """A folder with the page's files, and the shipped settings."""
    found = tmp_path_factory.mktemp("user")
    (found / "configs").symlink_to(ROOT / "configs")
    (found / "small.yaml").write_text(yaml.safe_dump(SMALL))
    for _, text in BLOCKS:
        if name := re.match(r"# (\w+\.(?:py|yaml))\n", text):
            (found / name[1]).write_text(text)
    return found


def command_of(settings: str) -> list[str]:
    """The page's command with these settings."""
    (found,) = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if settings in line]
    return shlex.split(found)


def fit(folder: Path, root: str, name: str, *more: str) -> Path:
    """Type the command of NAME.yaml, on a small scale; returns the run's folder, named like its last argument."""
    program, *words = command_of(f"{name}.yaml")
    run = f"{name}-resumed" if "--ckpt_path" in more else name
    words += ["-c", "small.yaml", "--data.root", root, "--trainer.logger.init_args.name", run, *more]
    start = str(Path(sys.executable).with_name(program))  # the console command, which knows no current folder
    done = subprocess.run(
        [start, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / run


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step={step}.ckpt"


def manifest(run: Path, step: int = STEPS) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint(run, step) / "manifest.json").read_text())
    return found


def resumes_bit_for_bit(folder: Path, root: str, name: str, whole: Path) -> None:
    """Whether a run that goes on from the middle comes to the same checkpoint."""
    resumed = fit(folder, root, name, "--ckpt_path", str(checkpoint(whole, SAVED)))
    expected = tensors_of(checkpoint(whole, STEPS))
    assert expected and tensors_of(checkpoint(resumed, STEPS)) == expected


@pytest.fixture(scope="module")
def fedadam(folder: Path, root: str) -> Path:
    return fit(folder, root, "fedadam")


@pytest.fixture(scope="module")
def by_load(folder: Path, root: str) -> Path:
    return fit(folder, root, "by_load")


def test_all_files_of_the_page_are_named_and_all_commands_are_run_here() -> None:
    for kind, text in BLOCKS:
        assert kind == "bash" or re.match(r"# \w+\.(py|yaml)\n", text), text
    names = re.findall(r"-c (\w+)\.yaml", "".join(text for kind, text in BLOCKS if kind == "bash"))
    assert set(names) <= set(globals()), names


def test_an_outer_rule_keeps_its_slots_and_resumes(folder: Path, root: str, fedadam: Path) -> None:
    saved = tensors_of(checkpoint(fedadam, STEPS))
    assert manifest(fedadam)["redraws"] == 1
    slots = {name.split("-")[1] if name.startswith("momentum-") else name.split("-")[0] for name in saved}
    assert slots, saved
    resumes_bit_for_bit(folder, root, "fedadam", fedadam)


def test_a_policy_sees_the_same_loads_on_all_sites(folder: Path, root: str, by_load: Path) -> None:
    found = manifest(by_load)
    assert found["redraws"] == 1
    print(found)
    resumes_bit_for_bit(folder, root, "by_load", by_load)
