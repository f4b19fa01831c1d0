"""Training speed and memory of site 0."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer

from fomoe_pl.callbacks.observed import (
    check_interval,
    log,
    measures_sync,
    observe_rounds,
    observed_module,
    observed_strategy,
    peak_memory,
)
from fomoe_pl.costs.memory import MIB
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.model.sizes import flops_by_part


@dataclass(frozen=True)
class Interval:
    """Time and tokens of some training steps of one site.

    Attributes:
        seconds: Wall-clock time, waiting for data included.
        sync_seconds: The part of it spent in synchronisation.
        watch_seconds: The part of it spent on observing and drawing.
        tokens: Tokens trained on.
    """

    seconds: float = 0.0
    sync_seconds: float = 0.0
    watch_seconds: float = 0.0
    tokens: int = 0

    def __add__(self, other: Interval) -> Interval:
        return Interval(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Interval) -> Interval:
        return Interval(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def local_seconds(self) -> float:
        """Seconds of the local steps alone."""
        return self.seconds - self.sync_seconds - self.watch_seconds

    @property
    def local_rate(self) -> float:
        """Tokens a second of the local steps alone."""
        return self.tokens / self.local_seconds

    @property
    def rate(self) -> float:
        """Tokens a second with synchronisation and watching."""
        return self.tokens / self.seconds


class TimedCallback(Callback):
    """Measures training time: from batch end to batch end, but without validation and checkpoints.

    It does not wait for the GPU: work still queued at the end of a window counts in the next.
    """

    def __init__(self) -> None:
        self.trained = Interval()
        self._reading = Interval()
        self._interrupted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at zero."""
        self.trained, self._interrupted = Interval(), False
        self._reading = self._read(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._interrupt(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the clock."""
        self._interrupt(trainer, pl_module)

    def _interrupt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._interrupted:  # later callbacks may have measured and drawn since the batch ended
            self._add(trainer, pl_module)
            self._interrupted = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Restart the clock after an interruption."""
        if self._interrupted:
            self._reading, self._interrupted = self._read(trainer, pl_module), False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Add this batch, unless an earlier callback has saved: then it was added there."""
        if self._interrupted:
            self._reading, self._interrupted = self._read(trainer, pl_module), False
        else:
            self._add(trainer, pl_module)

    def _add(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reading = self._read(trainer, pl_module)
        self.trained += reading - self._reading
        self._reading = reading

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> Interval:
        """All four clocks; only differences have a meaning."""
        strategy = observed_strategy(trainer)
        tokens = observed_module(pl_module).tokens_seen
        return Interval(time.perf_counter(), strategy.sync_seconds, strategy.watch_seconds, tokens)


def held_bytes(trainer: Trainer, pl_module: LightningModule) -> dict[str, int]:
    """Bytes of what this rank keeps on its device.

    Parameters, gradients, moments, anchors with outer momentum, and packed copies of absent experts where there are.
    """
    parameters = list(pl_module.parameters())
    layers = [block.moe for block in observed_module(pl_module).transformer.layers]
    experts = [layer.experts for layer in layers]
    copies = [(copy, e.copies.has_values) for e in experts if e.copies for copy in (e.copies.w_in, e.copies.w_out)]
    # Of gradients: experts' are of the copies' type, in the place of float32.
    saved = sum(copy.numel() * (4 - copy.itemsize) for copy, _ in copies)
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    packed = sum(layer.shadow.w_in.nbytes + layer.shadow.w_out.nbytes for layer in layers if layer.shadow is not None)
    return {
        "parameters": sum(p.nbytes for p in parameters) + sum(copy.nbytes for copy, lasts in copies if lasts),
        "gradients": sum(p.nbytes for p in parameters if p.requires_grad) - saved,  # there in the backward pass
        "moments": sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor)),
        "anchors": observed_strategy(trainer).agreed_bytes(),
        **({"copies": packed} if packed else {}),
    }


class ThroughputMonitor(TimedCallback, RoundObserver):
    """Logs site 0's speed over the last window, and its memory.

    - `throughput/local_tokens_per_s`: one site's local steps, synchronisation and watching excluded; missing with data
      parallelism, which hides its synchronisation in them;
    - `throughput/with_sync_tokens_per_s`: one site, everything between two steps included;
    - `throughput/with_sync_global_tokens_per_s`: the same of all sites, which all wait for each other;
    - `throughput/nominal_TFLOP_per_s`: speed of the local steps times the FLOPs of a token with top-k experts, forward
      and backward; `throughput/executed_TFLOP_per_s`: times those of the picks that residents executed, and without
      weights' gradients those that copies did, measured over the last round, and so missing before the first one ends;
    - `throughput/mfu_nominal`, `throughput/mfu_executed`: the same over the device's peak, where Lightning knows that;
    - `time/train_s`, `time/watch_s`: since this process started to train, validation and checkpoints excluded;
    - `time/save_stall_s`: for which training stood still for a save, once after each;
    - `memory/peak_MiB`: tensors on a GPU, or the process's resident set on a CPU;
    - `memory/<part>_MiB`: parameters (with experts' copies), gradients, moments, anchors (with outer momentum, unless
      they are on the host), packed copies of absent experts where there are, and on a GPU `activations_and_rest`, what
      the peak has beyond them.

    Args:
        every_n_steps: Length of a window in optimizer steps.

    Attributes:
        latest: The values of the last window by tag, on rank zero.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        super().__init__()
        self.every_n_steps = check_interval(self, every_n_steps)
        self.latest: dict[str, float] = {}
        self._step = 0
        self._before = Interval()
        self._picks: float | None = None
        self._counted, self._resets = (0.0, 0.0), 0
        self._save_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the first window."""
        super().on_train_start(trainer, pl_module)
        self._step, self._before = trainer.global_step, self.trained
        self._save_seconds = observed_strategy(trainer).save_seconds
        self._module = observed_module(pl_module)
        config, residency = self._module.config, self._module.transformer.residency
        # Picks of ghosts are skipped, copies' weights get no gradients.
        skips = residency.routing != "partitioned" and not residency.is_full(config)
        self._counted, self._resets = (0.0, 0.0), self._module.routing_health.resets
        self._picks = None if skips else float(min(config.top_k, residency.n_scored(0, config)))
        if skips:
            self._module.watch_routing()
            observe_rounds(trainer, self)
        bf16 = str(trainer.precision).startswith("bf16")
        self._peak_flops = None
        if pl_module.device.type == "cuda":
            dtype = torch.bfloat16 if bf16 else torch.float32
            n_ranks = observed_strategy(trainer).topology.n_ranks
            self._peak_flops = n_ranks * (get_available_flops(pl_module.device, dtype) or 0)

    def after_synchronization(self) -> None:
        """Record the share of picks that residents executed in the round, before the counts are reset."""
        health = self._module.routing_health
        live, picks = health.executed()
        # They are reset only if another callback reads them.
        live_before, picks_before = self._counted if health.resets == self._resets else (0.0, 0.0)
        if picks > picks_before:
            share = (live - live_before) / (picks - picks_before) / self._module.config.n_layers
            self._picks = share * self._module.config.top_k
        self._counted, self._resets = (live, picks), health.resets

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Log at the end of a window."""
        super().on_train_batch_end(trainer, pl_module)
        if trainer.global_step - self._step < self.every_n_steps:
            return
        window = self.trained - self._before
        self._step, self._before = trainer.global_step, self.trained
        if not trainer.is_global_zero:
            return
        _, batch, _ = rest
        strategy = observed_strategy(trainer)
        values = {"throughput/local_tokens_per_s": window.local_rate} if measures_sync(strategy) else {}
        values |= {
            "throughput/with_sync_tokens_per_s": window.rate,
            "throughput/with_sync_global_tokens_per_s": window.rate * strategy.tokens_of_all(10**6) / 10**6,
            "time/train_s": self.trained.seconds,
            "time/watch_s": self.trained.watch_seconds,
        }
        values |= self._stall(trainer)
        values |= self._flops(window, batch["inputs"].shape[1])
        peak, held = peak_memory(pl_module.device), held_bytes(trainer, pl_module)
        values["memory/peak_MiB"] = peak
        values |= {f"memory/{part}_MiB": n / MIB for part, n in held.items()}
        if pl_module.device.type == "cuda":
            values["memory/activations_and_rest_MiB"] = peak - sum(held.values()) / MIB
        self.latest = values
        log(trainer, values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A save after the last window."""
        values = self._stall(trainer)
        if values and trainer.is_global_zero:
            log(trainer, values)

    def _stall(self, trainer: Trainer) -> dict[str, float]:
        before, self._save_seconds = self._save_seconds, observed_strategy(trainer).save_seconds
        return {"time/save_stall_s": self._save_seconds - before} if self._save_seconds > before else {}

    def _flops(self, window: Interval, sequence_length: int) -> dict[str, float]:
        config = self._module.config
        residency = self._module.transformer.residency
        scored = residency.n_scored(0, config)
        values = {}
        for name, picks in (("nominal", float(config.top_k)), ("executed", self._picks)):
            if picks is None:
                continue
            # Nominal: no ghosts, and a whole router.
            n_scored = config.n_experts if name == "nominal" else scored
            copied = 0.0
            if name == "executed" and residency.routing == "shadow":
                picks, copied = float(config.top_k), config.top_k - picks
            flops = flops_by_part(
                config, sequence_length, executed_picks=picks, n_scored=n_scored, copied_picks=copied,
                input_gradient=residency.shadow.input_gradient,
            ).training  # fmt: skip
            values[f"throughput/{name}_TFLOP_per_s"] = flops * window.local_rate / 1e12
            if self._peak_flops:
                values[f"throughput/mfu_{name}"] = flops * window.local_rate / self._peak_flops
        return values
