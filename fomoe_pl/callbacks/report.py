"""A run's results in one file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer

from fomoe_pl.callbacks.communication import payload_bytes, wire_bytes
from fomoe_pl.callbacks.observed import (
    EvaluatingCallback,
    measures_sync,
    observed_module,
    observed_strategy,
    peak_memory,
    run_folder,
)
from fomoe_pl.callbacks.stability import stability_of
from fomoe_pl.callbacks.throughput import TimedCallback
from fomoe_pl.files import write_whole
from fomoe_pl.training.context import IdentifiedData

REPORT_NAME = "report.json"


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _data_identity(trainer: Trainer) -> dict[str, Any] | None:
    """The datamodule's description; None if it has none."""
    data = cast(Any, trainer).datamodule
    return {**data.identity(), **_validated(trainer)} if isinstance(data, IdentifiedData) else None


def _validated(trainer: Trainer) -> dict[str, Any]:
    """Which part of the validation sequences a validation reads: all of them, or which batches of which site."""
    loader: Any = trainer.val_dataloaders
    given, whole = sum(trainer.num_val_batches), None if loader is None else len(loader)
    part = "all"
    if given != whole:
        sites = observed_strategy(trainer).topology.n_sites
        part = f"the first {given} batches of {getattr(loader, 'batch_size', '?')} on each of {sites} sites"
    overfit = {"overfit_batches": cast(Any, trainer).overfit_batches} if cast(Any, trainer).overfit_batches else {}
    return {"validated": part if given else "nothing", **overfit}


_OF_DATA = ("batch_size", "split", "dirichlet_alpha", "weights", "shuffle_sequences", "seed")
_OF_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "precision")


def run_settings(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What makes a run what it is, as plain values by dotted names: method, model, optimizer, data, seeds."""
    settings = observed_strategy(trainer).hyperparameters | flat(pl_module.hparams)
    data = cast(Any, trainer).datamodule
    settings |= {f"data.{name}": getattr(data, name) for name in _OF_DATA if hasattr(data, name)}
    return settings | {name: getattr(trainer, name) for name in _OF_TRAINER}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _routing(trainer: Trainer) -> dict[str, float | None]:
    """Means of the last round that measured them, by the tag's middle part; empty without `RoutingStability`."""
    stability = stability_of(trainer)
    values = {} if stability is None else stability.latest
    return {tag.split("/")[1]: finite_or_none(value) for tag, value in values.items() if tag.endswith("/mean")}


def _evaluations(trainer: Trainer) -> dict[str, Any]:
    """What the run's callbacks have evaluated."""
    callbacks = cast(Any, trainer).callbacks
    return next((c.evaluations for c in callbacks if isinstance(c, EvaluatingCallback) and c.evaluations), {})


class RunReport(TimedCallback):
    """Writes `report.json` when training ends, on rank zero.

    Keys: `strategy` (its class), `method` (in words), `data` (corpus, tokenizer, and which sequences are validated),
    `sites`, `steps`, `rounds`, `tokens` (`site`, `global`), `validation` (the last `val/...` values, of the global
    model, measured after `validation_step` steps), `settings` (of method, model, optimizer, data, and seeds),
    `validation_before_training` (the same of the initial model; empty unless `num_sanity_val_steps` reads all that a
    validation reads), `round` (the
    last round's means over all sites), `routing` (its means over the layers, of `RoutingStability`),
    `evaluations` (by view, of `TaskEvaluation` and later of `fomoe evaluate`),
    `looked_step` (steps at the round that measured churn, agreement and drift), `other_views_step` (steps at the
    validation that measured routing necessity and own views), and of site 0:
    `bytes` (`payload` and `wire` by kind and in total), `train_seconds` (without validation and checkpoints),
    `sync_seconds` and `watch_seconds` of this process, `tokens_per_second` (`local`, `with_sync`), `peak_memory_mib`,
    `resident_parameters`.
    Undefined numbers are null, and so is what data parallelism hides: its seconds of synchronisation, local speed.

    Args:
        folder: Where to write; None is the run's own folder, as its first logger names it, or without a logger
            the trainer's root folder.

    Attributes:
        path: The report, on rank zero, once it is written.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.path: Path | None = None
        self._validated_at: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the report of an earlier run, so that it is not mistaken for this run's."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            (self._folder_of(trainer) / REPORT_NAME).unlink(missing_ok=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the numbers are from."""
        if not trainer.sanity_checking:
            self._validated_at = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Where the last validation was: a resumed run may end before its next."""
        return {"validated_at": self._validated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._validated_at = state_dict.get("validated_at")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file; Lightning has torn the strategy down before `on_fit_end`."""
        if not trainer.is_global_zero or not self.trained.tokens:
            return
        folder = self._folder_of(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / REPORT_NAME
        write_whole(self.path, json.dumps(self.report(trainer, pl_module), indent=2) + "\n")

    def report(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the report of the run as it stands."""
        strategy, module = observed_strategy(trainer), observed_module(pl_module)
        stability = stability_of(trainer)
        tokens, measured = module.tokens_seen, measures_sync(strategy)
        validation = {k: finite_or_none(float(v)) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        local = self.trained.local_rate if measured else None
        before = {k: finite_or_none(v) for k, v in module.validation_before_training.items()}
        return {
            "strategy": type(trainer.strategy).__name__,
            "method": strategy.describe(),
            "settings": run_settings(trainer, pl_module),
            "data": _data_identity(trainer),
            "sites": strategy.topology.n_sites,
            "steps": trainer.global_step,
            "rounds": strategy.rounds_done,
            "tokens": {"site": tokens, "global": module.tokens_of_all_sites},
            "validation": validation,
            "validation_step": self._validated_at,
            "validation_before_training": before,
            "round": {name: finite_or_none(value) for name, value in strategy.round_stats.items()},
            "routing": _routing(trainer),
            "evaluations": _evaluations(trainer),
            "looked_step": None if stability is None else stability.looked_step,
            "other_views_step": None if stability is None else stability.other_views_step,
            "bytes": {"payload": payload_bytes(strategy.counted), "wire": wire_bytes(strategy.counted)},
            "train_seconds": self.trained.seconds,
            "sync_seconds": self.trained.sync_seconds if measured else None,
            "watch_seconds": self.trained.watch_seconds,
            "tokens_per_second": {"local": local, "with_sync": self.trained.rate},
            "peak_memory_mib": peak_memory(pl_module.device),
            "resident_parameters": sum(p.numel() for p in pl_module.parameters()),
        }

    def _folder_of(self, trainer: Trainer) -> Path:
        return run_folder(trainer) if self.folder is None else Path(self.folder)
