"""The progress bar of rank zero."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from fomoe_pl.callbacks.observed import observed_module, observed_strategy
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

    Args:
        refresh_rate: Batches between two updates; each reads the loss, and so waits for the GPU.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        check_range("trainer.callbacks.FoMoEProgressBar.refresh_rate", refresh_rate, "0 shows no bar", least=0)
        super().__init__(refresh_rate=refresh_rate)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the quality before training."""
        super().on_sanity_check_end(trainer, pl_module)
        bits_per_byte = observed_module(pl_module).validation_before_training.get("val/bits_per_byte")
        if bits_per_byte is not None and trainer.is_global_zero:
            print(f"Before training the global model has {bits_per_byte:.3f} bits per byte.")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict]:
        """Return the numbers next to the bar."""
        strategy, metrics = observed_strategy(trainer), trainer.callback_metrics
        shown = {"loss": "train/loss", "val_bits_per_byte": "val/bits_per_byte"}
        items: dict[str, int | str | float | dict] = {
            name: f"{float(metrics[key]):.3f}" for name, key in shown.items() if key in metrics
        }
        return {**items, "round": strategy.rounds_done, "sent": human_bytes(strategy.counted.total_wire)}
