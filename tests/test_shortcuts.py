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
from fomoe_pl.model.backends import kernels
from fomoe_pl.model.copies import ExpertCopies
from fomoe_pl.model.recorded import WARM_UP, RecordedPass
from fomoe_pl.module import FoMoEModule
from fomoe_pl.strategies import SingleSiteStrategy
from fomoe_pl.training.shortcuts import expert_copies, recorded_pass
from tests.distributed import run_distributed
from tests.training import Run, fit, launched_as, make_trainer, parameters

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
        ({"plugins": [MixedPrecision("16-mixed", "cpu")]}, GROUPED, "changes the loss scale"),
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


needs_kernels = pytest.mark.skipif(not kernels.INTERPRETED, reason="runs on a CPU in Triton's interpreter")
TRITON = {"expert_backend": "triton"}
MIXED = {"precision": "bf16-mixed"}


def copies_of(
    trainer: dict[str, Any], architecture: dict[str, Any], optimizer: dict[str, Any] | None = None
) -> ExpertCopies | None:
    module = Run(root="", folder="", architecture=architecture, optimizer=optimizer or {}).module()
    made = L.Trainer(accelerator="cpu", strategy=SingleSiteStrategy(), logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False, **trainer)  # fmt: skip
    made.strategy.connect(module)
    module.trainer = made
    module.configure_model()
    made.strategy.optimizers = [module.configure_optimizers()["optimizer"]]
    found = expert_copies(made, module, module.transformer)
    if found is not None:
        assert made.optimizers[0].copies is found.of  # type: ignore[attr-defined]
    return found


@needs_kernels
@pytest.mark.parametrize(
    ("trainer", "architecture", "optimizer", "has_copies"),
    [
        (MIXED, TRITON, {}, True),
        (MIXED, TRITON | {"activation_checkpointing": "experts"}, {}, True),
        ({}, TRITON, {}, False),  # products are float32
        ({"precision": "bf16-true"}, TRITON, {}, False),  # weights are bfloat16
        (MIXED, GROUPED, {}, False),
        (MIXED, TRITON, {"kind": "sgd"}, False),
        (MIXED | {"accumulate_grad_batches": 2}, TRITON, {}, False),
    ],
)
def test_which_runs_have_copies(
    trainer: dict[str, Any], architecture: dict[str, Any], optimizer: dict[str, Any], has_copies: bool
) -> None:
    assert (copies_of(trainer, architecture, optimizer) is not None) == has_copies


class InStep(L.Callback):
    """Fails if a pass has other weights than the optimizer, which is fused as on a GPU; counts steps."""

    steps = 0

    def on_train_start(self, trainer: L.Trainer, *_: object) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["fused"] = True

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        assert isinstance(pl_module, FoMoEModule)
        for block in pl_module.transformer.layers:
            for weight in (block.moe.experts.w_in, block.moe.experts.w_out):
                assert weight.grad is not None
                assert weight.grad.dtype == torch.bfloat16
        self.steps += 1

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        assert isinstance(pl_module, FoMoEModule)
        assert pl_module._passes is not None
        copies = pl_module._passes.copies
        assert copies is not None
        assert len(copies.of) == 2 * pl_module.config.n_layers
        assert all(torch.equal(copy, weight.bfloat16()) for weight, copy in copies.of.items())


def _fit_with_copies(rank: int, run: Run, other: Run) -> tuple[int, int]:
    watch = [InStep(), InStep()]
    with launched_as(rank, 2, run.folder):
        trainer = fit(run, rank, 2, [watch[0]])
        path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    with launched_as(rank, 2, other.folder):
        trainer = fit(other, rank, 2, [watch[1]], ckpt_path=path)
        module = trainer.lightning_module
        assert isinstance(module, FoMoEModule)
        assert module._passes is None
        assert all(block.moe.experts.copies is None for block in module.transformer.layers)
    return watch[0].steps, watch[1].steps


@pytest.mark.slow
@needs_kernels
def test_copies_follow_rounds_rows_that_were_sent_validations_and_checkpoints(root: str, tmp_path: Path) -> None:
    runs = []
    for steps in (6, 9):
        folder = tmp_path / str(steps)
        folder.mkdir()
        runs.append(
            Run(
                root=root, folder=str(folder), architecture=TRITON,
                settings={"local_steps": 2, "overlap": 1, "placement": "random", "reshuffle_rounds": 1},
                trainer={"max_steps": steps, "precision": "bf16-mixed", "gradient_clip_val": 0.5,
                         "val_check_interval": 3, "limit_val_batches": None, "enable_checkpointing": True},
            )
        )  # fmt: skip
    assert run_distributed(_fit_with_copies, 2, *runs) == [(6, 3)] * 2


class Interrupt(L.Callback):
    def on_train_batch_end(self, *_: object) -> None:
        raise ArithmeticError


def _fit_interrupted_and_without_copies(rank: int, run: Run) -> tuple[bool, bool, torch.dtype | None]:
    with launched_as(rank, 1, run.folder):
        module = run.module()
        with pytest.raises(ArithmeticError):
            make_trainer(run, rank, 1, [Interrupt()]).fit(module, run.datamodule())
        experts = module.transformer.layers[0].moe.experts
        had = experts.copies is not None
        module.bf16_gradients, module.tokens_seen = False, 0  # else its second run would be refused
        make_trainer(run, rank, 1).fit(module, run.datamodule())
        return had, experts.copies is not None, experts.w_in.grad_dtype


@needs_kernels
def test_copies_of_an_interrupted_run_are_gone_in_the_next(root: str, tmp_path: Path) -> None:
    trainer = {"max_steps": 1, "precision": "bf16-mixed"}
    run = Run(root=root, folder=str(tmp_path), strategy="single", architecture=TRITON, trainer=trainer)
    assert run_distributed(_fit_interrupted_and_without_copies, 1, run) == [(True, False, torch.float32)]


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
        if pl_module._passes is not None and pl_module._passes.recorded is not None:
            self.recordings = pl_module._passes.recorded.recordings


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
