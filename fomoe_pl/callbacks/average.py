"""A moving average of the global model, which is validated instead of the model."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from fomoe_pl.callbacks.observed import RoundCallback, observe_rounds, observed_strategy
from fomoe_pl.checkpoint.content import Content
from fomoe_pl.errors import ConfigError, check_range
from fomoe_pl.federation.observer import RoundObserver


class GlobalEMA(RoundCallback, RoundObserver):
    """Keeps an exponential moving average of the global model and validates that instead of the model.

    After each round `average = decay x average + (1 - decay) x agreed values`, buffers included. Each site keeps it of
    what it holds: dense values and its residents, in float32, 4 bytes a parameter where the anchors are. Nothing is
    sent for it: holders of an expert agree on its values, so on their average. Training never sees it.

    All `val/...` of a run with this callback are of the average. Checkpoints hold both, and a resumed run goes on with
    both; `fomoe validate` with this callback reads the average, without it the model. `fomoe export --average true`
    writes the average.

    Args:
        decay: Weight of what was before, in [0, 1); of a round, so 0.9 is a memory of about ten rounds.
        every_n_steps: Interval in synchronous training, which has no rounds, in optimizer steps.
    """

    def __init__(self, decay: float = 0.9, every_n_steps: int = 10) -> None:
        super().__init__(every_n_steps)
        check_range("trainer.callbacks.GlobalEMA.decay", decay, "0.9 is the default", least=0, below=1)
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._stash: dict[str, Tensor] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the global model, or from the checkpoint's average."""
        super().on_train_start(trainer, pl_module)
        self._content = _content(trainer)
        saved = self._content.saved_average(Path(trainer.ckpt_path)) if trainer.ckpt_path else None
        if trainer.ckpt_path and saved is None:
            rank_zero_info(f"{trainer.ckpt_path} has no average of the global model: it starts at the model")
        values = self._content.tensors()
        source = values if saved is None else saved
        self._average = {
            name: torch.empty_like(t, dtype=torch.float32, requires_grad=False).copy_(source[name].detach())
            for name, t in values.items()
        }
        self._content.average = self._average
        observe_rounds(trainer, self)

    def after_synchronization(self) -> None:
        """Add the values that a round has ended with."""
        self._update()

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the values of synchronous training; rounds add theirs in `on_round_end`."""
        if not observed_strategy(trainer).has_rounds:
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        for name, value in self._content.tensors().items():
            self._average[name].lerp_(value.float(), 1 - self.decay)

    # -- validation -----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the model; before the first step it is the model itself."""
        content, average = _content(trainer), self._average
        if trainer.state.fn == TrainerFn.VALIDATING:
            average = self._of_checkpoint(trainer, content)
        if average and not trainer.sanity_checking:
            layout = content.layout()
            # On the host: the device has room for one copy of the model.
            self._stash = {name: t.detach().to("cpu", copy=True) for name, t in layout.tensors.items()}
            layout.fill(average)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the model; not at the epoch's end, which comes before the last window is evaluated."""
        if self._stash is not None:
            _content(trainer).layout().fill(self._stash)
            self._stash = None

    def _of_checkpoint(self, trainer: Trainer, content: Content) -> dict[str, Tensor]:
        found = content.saved_average(Path(trainer.ckpt_path)) if trainer.ckpt_path else None
        if found is None:
            raise ConfigError("ckpt_path", trainer.ckpt_path and str(trainer.ckpt_path),
                              "has no average of the global model, which GlobalEMA validates",
                              "leave GlobalEMA out, or give a checkpoint of a run with it")  # fmt: skip
        return found


def _content(trainer: Trainer) -> Content:
    content = observed_strategy(trainer).content
    if content is None:
        raise ConfigError("trainer.callbacks", "GlobalEMA", "needs a strategy of this project",
                          "choose one of fomoe_pl.strategies")  # fmt: skip
    return content
