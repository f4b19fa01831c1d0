"""The moving average of the global model: what is validated, saved and resumed is what the rounds give."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from fomoe_pl.callbacks import GlobalEMA
from fomoe_pl.callbacks.supported import check_callbacks
from fomoe_pl.errors import ConfigError
from fomoe_pl.strategies import FederatedStrategy
from tests.distributed import run_distributed
from tests.training import Run, fit, launched_as, validate

DECAY, SITES = 0.6, 2
TRAINER: dict[str, Any] = {
    "max_steps": 8, "val_check_interval": 4, "limit_val_batches": None, "enable_checkpointing": True,
}  # fmt: skip


class Anchors(L.Callback):
    """The global values after each step, by global step."""

    def __init__(self) -> None:
        self.of: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_batch_end(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        tensors = trainer.strategy.content.tensors()
        self.of[trainer.global_step] = {k: t.detach().clone() for k, t in tensors.items()}


def saver(folder: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)


def averaged_and_resumed(rank: int, root: str, folder: str, strategy: str, settings: dict[str, Any]) -> Any:
    with launched_as(rank, SITES, folder):
        run = Run(root=root, folder=folder, strategy=strategy, settings=settings, trainer=TRAINER)
        anchors, ema = Anchors(), GlobalEMA(DECAY, every_n_steps=2)
        whole = fit(run, rank, SITES, [ema, anchors, saver(f"{folder}/whole")])
        trained = {k: t.detach().clone() for k, t in whole.strategy.content.layout().tensors.items()}
        again = GlobalEMA(DECAY, every_n_steps=2)
        resumed = fit(run, rank, SITES, [again, saver(f"{folder}/again")], ckpt_path=f"{folder}/whole/step=4.ckpt")
        metrics = {k: float(v) for k, v in whole.callback_metrics.items() if k.startswith("val/")}
        assert metrics == {k: float(v) for k, v in resumed.callback_metrics.items() if k.startswith("val/")}
        for name, value in whole.strategy.content.average.items():
            assert torch.equal(value, resumed.strategy.content.average[name]), name
            assert torch.equal(trained[name].float(), anchors.of[8][name].float()), f"{name}: training saw the average"
        return metrics, anchors.of, dict(whole.strategy.content.average)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("strategy", "settings"),
    [("federated", {"local_steps": 2, "overlap": 1}), ("federated", {"local_steps": 2, "outer_state": "host"}),
     ("ddp", {})],
    ids=["overlap_1", "replicas_on_host", "ddp"],
)  # fmt: skip
def test_the_average_is_validated_saved_and_resumed(
    root: str, tmp_path: Path, strategy: str, settings: dict[str, Any]
) -> None:
    folder = str(tmp_path)
    sites = run_distributed(averaged_and_resumed, SITES, root, folder, strategy, settings)
    metrics, anchors, average = sites[0]
    for name, value in average.items():
        expected = anchors[0][name].double()
        for step in (2, 4, 6, 8):
            expected = DECAY * expected + (1 - DECAY) * anchors[step][name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    run = Run(root=root, folder=folder, strategy=strategy, settings=settings, trainer=TRAINER)
    checkpoint = f"{folder}/whole/step=8.ckpt"
    raw, of_average = validate(run, checkpoint), validate(run, checkpoint, [GlobalEMA(DECAY)])
    assert metrics["val/loss"] == pytest.approx(of_average["val/loss"], rel=1e-5)
    assert abs(metrics["val/loss"] - raw["val/loss"]) > 1e-4, "the model itself is another one"
    dense = load_file(f"{checkpoint}/average-dense.safetensors")
    assert all(torch.equal(value, average[name]) for name, value in dense.items())


def alone(root: str, folder: Path, **settings: Any) -> Run:
    return Run(root=root, folder=str(folder), strategy="single", trainer=TRAINER, **settings)


def test_what_is_validated_does_not_depend_on_the_window(root: str, tmp_path: Path) -> None:
    losses = []
    for window in (1, 2, 64):
        run = alone(root, tmp_path, evaluation_window=window)
        trainer = fit(run, 0, 1, [GlobalEMA(DECAY, every_n_steps=2), saver(str(tmp_path / str(window)))])
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-6)


def test_a_checkpoint_without_an_average_is_not_validated_as_one(root: str, tmp_path: Path) -> None:
    run = alone(root, tmp_path)
    fit(run, 0, 1, [saver(str(tmp_path / "plain"))])
    with pytest.raises(ConfigError, match=r"ckpt_path = .*step=8.ckpt': has no average"):
        validate(run, str(tmp_path / "plain/step=8.ckpt"), [GlobalEMA()])


def test_an_average_is_refused_where_experts_move_and_where_checkpoints_are_lightnings(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)}
    moving = L.Trainer(strategy=FederatedStrategy(placement="random"), callbacks=[GlobalEMA()], **settings)
    with pytest.raises(ConfigError, match="random placement moves experts"):
        check_callbacks(moving)
    check_callbacks(L.Trainer(strategy=FederatedStrategy(), callbacks=[GlobalEMA()], **settings))
    with pytest.raises(ConfigError, match="needs a strategy of this project"):
        GlobalEMA().on_validation_epoch_start(L.Trainer(**settings), L.LightningModule())
