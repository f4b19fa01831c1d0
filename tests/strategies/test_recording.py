"""Which runs replay their steps as a CUDA graph, and that these train what others train."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from fomoe_pl.callbacks import RoutingStability
from fomoe_pl.model.recorded import WARM_UP, RecordedPass
from fomoe_pl.module import FoMoEModule
from fomoe_pl.strategies import SingleSiteStrategy
from fomoe_pl.strategies.recording import recorded_pass
from tests.distributed import run_distributed
from tests.training import Run, fit, launched_as, parameters

GROUPED = {"expert_backend": "grouped"}


def ask(trainer: dict[str, Any], architecture: dict[str, Any] = GROUPED) -> RecordedPass | None:
    module = Run(root="", folder="", architecture=architecture).module()
    made = L.Trainer(accelerator="cpu", strategy=SingleSiteStrategy(), logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False, **trainer)  # fmt: skip
    made.strategy.connect(module)
    module.trainer = made
    module.configure_model()
    return recorded_pass(made, module, module.transformer)


def test_a_plain_run_is_recorded() -> None:
    assert isinstance(ask({}), RecordedPass)
    assert isinstance(ask({"precision": "bf16-mixed", "gradient_clip_val": 1.0}), RecordedPass)


@pytest.mark.parametrize(
    ("trainer", "architecture", "reason"),
    [
        ({"accumulate_grad_batches": 2}, GROUPED, "several micro-batches"),
        ({"callbacks": [GradientAccumulationScheduler({1: 2})]}, GROUPED, "several micro-batches"),
        ({"plugins": [MixedPrecision("16-mixed", "cpu")]}, GROUPED, "scales the loss"),
        ({}, {"expert_backend": "loop"}, "loop waits"),
    ],
)
def test_what_prevents_it_is_told(
    trainer: dict[str, Any], architecture: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert ask(trainer, architecture) is None
    assert reason in caplog.text
    assert "model.cuda_graphs" in caplog.text


def test_what_it_took_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = ask({})
    assert recorded is not None

    def record(self: RecordedPass, inputs_BS: Tensor, targets_BS: Tensor) -> None:
        self.recordings += 1

    monkeypatch.setattr(RecordedPass, "_record", record)
    with caplog.at_level("INFO"):
        for _ in range(2):  # a validation lies between them
            recorded._record(torch.zeros(1), torch.zeros(1))
    assert caplog.text.count("from here on steps are replayed") == 1


class Count(L.Callback):
    """How often a run's passes are recorded."""

    recordings = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        assert isinstance(pl_module, FoMoEModule)
        if pl_module._recorded is not None:
            self.recordings = pl_module._recorded.recordings


def _fit(rank: int, run: Run) -> tuple[dict[str, Tensor], float, int]:
    count = Count()
    with launched_as(rank, 1, run.folder):
        trainer = fit(run, rank, 1, [RoutingStability(), count])
        loss = float(trainer.callback_metrics["val/loss"])
        return {name: tensor.cpu() for name, tensor in parameters(trainer).items()}, loss, count.recordings


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_a_run_of_recorded_steps_is_the_same_run(root: str, tmp_path: Path, backend: str) -> None:
    """With rounds, a validation between them, a watcher, and the balance bias's own steps."""
    found = []
    for cuda_graphs in (True, False):
        folder = tmp_path / str(cuda_graphs)
        folder.mkdir()
        run = Run(
            root=root, folder=str(folder), settings={"local_steps": 3}, cuda_graphs=cuda_graphs,
            architecture={"expert_backend": backend, "balance": "bias"},
            trainer={"max_steps": WARM_UP + 7, "accelerator": "gpu", "precision": "bf16-mixed",
                     "gradient_clip_val": 0.5, "val_check_interval": WARM_UP + 3, "limit_val_batches": None},
        )  # fmt: skip
        found.append(run_distributed(_fit, 1, run)[0])
    (ours, our_loss, recordings), (theirs, their_loss, none) = found
    assert (recordings, none) == (2, 0)  # the validation in the middle takes the memory of the first
    assert our_loss == their_loss
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
