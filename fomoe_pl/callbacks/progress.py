"""What a run tells of itself while it trains: a bar on a terminal, elsewhere plain lines."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from fomoe_pl.callbacks.observed import observed_module, observed_strategy, peak_memory
from fomoe_pl.callbacks.throughput import Interval, ThroughputMonitor, TimedCallback
from fomoe_pl.errors import check_range


def human_bytes(n: int) -> str:
    """Write a number of bytes in the largest binary unit that leaves at least 1: `1.5 MiB`."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


class FoMoEProgressBar(TQDMProgressBar):
    """Shows the training loss, the last global bits per byte, the round, and what this site has sent.

    Where standard output is no terminal there is no bar, but a line at each logging interval of the Trainer
    (`log_every_n_steps`): date, step, round, loss, bits per byte, learning rate, norm of the gradient, this site's
    tokens a second, MFU where `ThroughputMonitor` knows it, peak memory, seconds that the site has waited for others
    since the last line, bytes that it has sent, and the time that is left.

    Args:
        refresh_rate: Batches between two updates of the bar; each reads the loss, and so waits for the GPU. 0 shows
            neither bar nor lines.
    """

    STEPS_FORMAT = "{n_fmt}/{total_fmt} {bar} {desc} [{remaining} left]"  # within 80 columns

    def __init__(self, refresh_rate: int = 10) -> None:
        check_range("trainer.callbacks.FoMoEProgressBar.refresh_rate", refresh_rate, "0 shows no bar", least=0)
        super().__init__(refresh_rate=refresh_rate)
        self._clock = TimedCallback()
        self._before, self._told, self._first = Interval(), 0, 0

    @property
    def is_enabled(self) -> bool:
        """Whether there are bars."""
        return super().is_enabled and _on_terminal()

    @property
    def sanity_check_description(self) -> str:
        """What the validation before training is called."""
        return "Before training"

    # -- what is shown --------------------------------------------------------------------------------------------

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the quality before training."""
        super().on_sanity_check_end(trainer, pl_module)
        bits_per_byte = observed_module(pl_module).validation_before_training.get("val/bits_per_byte")
        if bits_per_byte is not None and trainer.is_global_zero:
            print(f"Before training the global model has {bits_per_byte:.3f} bits per byte.", flush=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict]:
        """Return the numbers next to the bar."""
        strategy, metrics = observed_strategy(trainer), trainer.callback_metrics
        shown = {"loss": "train/loss", "bpb": "val/bits_per_byte"}
        items: dict[str, int | str | float | dict] = {
            name: f"{float(metrics[key]):.3f}" for name, key in shown.items() if key in metrics
        }
        return {**items, "round": strategy.rounds_done, "sent": human_bytes(strategy.counted.total_wire)}

    def line(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return the numbers of the steps since the last line."""
        strategy, metrics = observed_strategy(trainer), trainer.callback_metrics
        window, step = self._clock.trained - self._before, trainer.global_step
        last = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        parts = [f"{datetime.now():%Y-%m-%d %H:%M:%S}", f"step {step}{last}", f"round {strategy.rounds_done}"]
        formats = {"train/loss": "loss {:.3f}", "val/bits_per_byte": "bits/byte {:.3f}",
                   "train/learning_rate": "lr {:.3g}", "train/grad_norm": "grad {:.3g}"}  # fmt: skip
        parts += [form.format(float(metrics[key])) for key, form in formats.items() if key in metrics]
        parts.append(f"{window.rate:,.0f} tokens/s")
        monitors = [c for c in cast(Any, trainer).callbacks if isinstance(c, ThroughputMonitor)]
        if monitors and "throughput/mfu_executed" in monitors[0].latest:
            parts.append(f"MFU {monitors[0].latest['throughput/mfu_executed']:.1%}")
        parts += [f"memory {peak_memory(pl_module.device):,.0f} MiB", f"waited {window.sync_seconds:.1f} s",
                  f"sent {human_bytes(strategy.counted.total_wire)}"]  # fmt: skip
        if last:
            seconds = self._clock.trained.seconds / (step - self._first) * (trainer.max_steps - step)
            parts.append(f"left {timedelta(seconds=round(seconds))}")
        return "  ".join(parts)

    # -- when -----------------------------------------------------------------------------------------------------

    def init_train_tqdm(self) -> Tqdm:
        """A bar of the run's optimizer steps, which goes on where a resumed run does."""
        if self.trainer.max_steps < 1:
            return super().init_train_tqdm()
        return Tqdm(
            total=self.trainer.max_steps, initial=self.trainer.global_step, disable=self.is_disabled, leave=True,
            dynamic_ncols=True, file=sys.stdout, smoothing=0, bar_format=self.STEPS_FORMAT,
        )  # fmt: skip

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start bar and clock."""
        super().on_train_start(trainer, pl_module)
        self._clock.on_train_start(trainer, pl_module)
        self._before = self._clock.trained
        self._told = self._first = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, *rest: Any) -> None:
        """Epochs are sections of the run."""
        if trainer.max_steps < 1:
            super().on_train_epoch_start(trainer, *rest)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Let the clock run."""
        super().on_train_batch_start(trainer, pl_module, *rest)
        self._clock.on_train_batch_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Update the bar, or print a line."""
        self._clock.on_train_batch_end(trainer, pl_module)
        step, last = trainer.global_step, trainer.max_steps
        if step == self._told:
            if last < 1:
                super().on_train_batch_end(trainer, pl_module, *rest)
            return
        if self.is_enabled:
            if last < 1:
                super().on_train_batch_end(trainer, pl_module, *rest)
            elif step % self.refresh_rate == 0 or step == last:
                self._told = step
                self._show(trainer, pl_module)
        elif super().is_enabled and (step % cast(Any, trainer).log_every_n_steps == 0 or step == last):
            print(self.line(trainer, pl_module), flush=True)
            self._told, self._before = step, self._clock.trained

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what the last validation gave."""
        if trainer.max_steps < 1:
            super().on_train_epoch_end(trainer, pl_module)
        elif self.is_enabled:
            self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        items = {**self.get_metrics(trainer, pl_module)}
        sent = items.pop("sent")
        self.train_progress_bar.set_description_str(
            ", ".join([*(f"{name} {value}" for name, value in items.items()), f"{sent} sent"]), refresh=False
        )
        self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.refresh()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        super().on_validation_start(trainer, pl_module)
        if not trainer.sanity_checking and trainer.training:
            self._clock.on_validation_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the clock."""
        self._clock.on_save_checkpoint(trainer, pl_module, checkpoint)


def _on_terminal() -> bool:
    """Whether there is somebody to see a bar: on a terminal or in a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules
