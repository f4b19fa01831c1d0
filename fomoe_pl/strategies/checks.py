"""Settings and checkpoints that cannot work, told before any process starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from fomoe_pl.callbacks.supported import check_callbacks
from fomoe_pl.errors import ConfigError, check_choice, check_range, check_seed
from fomoe_pl.federation.checkpoint import check_architecture, read_manifest
from fomoe_pl.federation.outer_state import OuterPlace
from fomoe_pl.federation.placement import PlacementKind
from fomoe_pl.federation.rounds import InnerMoments
from fomoe_pl.federation.wire import WireDtype
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing

KEY = "trainer.strategy.init_args"

StopAt = Literal["round", "step"]

# Settings that may differ between a checkpoint and the model that reads it: they leave the weights alone.
IRRELEVANT_TO_WEIGHTS = frozenset(
    {"expert_backend", "activation_checkpointing", "loss_chunk_bytes", "balance", "aux_loss_weight", "z_loss_weight",
     "bias_update_rate"}
)  # fmt: skip


def irrelevant_to_weights(saved: Mapping[str, Any], config: ModelConfig) -> frozenset[str]:
    """Settings that may differ; a balance bias chooses experts, so whether there is one may not."""
    same_bias = (saved.get("balance") == "bias") == (config.balance == "bias")
    return IRRELEVANT_TO_WEIGHTS if same_bias else IRRELEVANT_TO_WEIGHTS - {"balance"}


def check_settings(
    *,
    sites: int | None,
    ranks_per_site: int,
    reshuffle_rounds: int,
    bucket_mib: int,
    share_device: bool,
    wire_dtype: str,
    inner_moments: str,
    outer_state: str,
    routing: str,
    placement: str,
    stop_at: str,
    timeout_seconds: float,
    overlap: int | None,
    min_sites: int | None,
    placement_seed: int,
) -> None:
    """Check what can be checked without a model or a trainer.

    Raises:
        ConfigError: naming the setting, the rule and what would be valid.
    """
    for setting, chosen, choices in (
        ("wire_dtype", wire_dtype, WireDtype),
        ("inner_moments", inner_moments, InnerMoments),
        ("outer_state", outer_state, OuterPlace),
        ("routing", routing, Routing),
        ("placement", placement, PlacementKind),
        ("stop_at", stop_at, StopAt),
    ):
        check_choice(f"{KEY}.{setting}", chosen, choices)
    if ranks_per_site != 1:
        rule = "several ranks in a site are not supported yet"
        raise ConfigError(f"{KEY}.ranks_per_site", ranks_per_site, rule, "set it to 1 and let every rank be a site")
    # 20 days: in milliseconds a timeout has to fit 32 bits.
    check_range(f"{KEY}.timeout_seconds", timeout_seconds, "1800 is the default", above=0, most=20 * 24 * 3600)
    for name, value in (("sites", sites), ("overlap", overlap), ("min_sites", min_sites),
                        ("reshuffle_rounds", reshuffle_rounds), ("bucket_mib", bucket_mib)):  # fmt: skip
        check_range(f"{KEY}.{name}", value, "type 1 or more", least=1)
    check_seed(f"{KEY}.placement_seed", placement_seed)
    if wire_dtype == "float16" and inner_moments == "average":
        rule = "AdamW's second moments are mostly below float16's smallest number, and without them steps explode"
        raise ConfigError(f"{KEY}.wire_dtype", wire_dtype, rule, "type bfloat16 or float32, or inner_moments keep")
    if share_device and sites is None:
        raise ConfigError(f"{KEY}.sites", sites, "must be given when sites share a device", "for example 4")


def check_processes(sites: int | None, n_processes: int, num_nodes: int, *, share_device: bool) -> int:
    """Number of sites, if it fits the number of processes on all machines.

    Raises:
        ConfigError: if it does not.
    """
    if share_device and num_nodes > 1:
        rule = "sites can share a GPU of one machine only"
        raise ConfigError("trainer.num_nodes", num_nodes, rule, "set it to 1, or share_device to false")
    if sites is None or sites == n_processes:
        return n_processes
    rule = f"must equal the number of processes ({n_processes} = trainer.devices x num_nodes)"
    raise ConfigError(f"{KEY}.sites", sites, rule, f"set trainer.devices to {sites}, or sites to {n_processes}")


def check_launched(devices: int, num_nodes: int, world_size: int) -> None:
    """Refuse a launcher (torchrun, SLURM) that has started another number of processes than the Trainer expects.

    Raises:
        ConfigError: if the numbers differ.
    """
    if devices * num_nodes != world_size:
        rule = f"times trainer.num_nodes ({num_nodes}) must be the {world_size} processes that were launched"
        hint = "with torchrun, --nproc_per_node is trainer.devices and --nnodes trainer.num_nodes"
        raise ConfigError("trainer.devices", devices, rule, hint)


def check_training(trainer: Trainer, *, federated: bool) -> None:
    """Check the Trainer's own settings, which Lightning finds out about only once it trains.

    Args:
        trainer: the Trainer, before it runs.
        federated: whether training has rounds, whose last one ends with the run's last step.

    Raises:
        ConfigError: naming the setting and the rule.
    """
    check_callbacks(trainer)
    if trainer.accumulate_grad_batches < 1:
        rule = "must be at least 1 micro-batch"
        raise ConfigError("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, rule, "1 is the default")
    by_time = getattr(trainer, "_val_check_time_interval", None)
    if by_time is None and not (trainer.val_check_interval or 0) > 0:
        rule = "must be a positive number of micro-batches"
        raise ConfigError("trainer.val_check_interval", trainer.val_check_interval, rule, "give a multiple of K")
    if by_time is not None and trainer.num_devices * trainer.num_nodes > 1:
        rule = "is a time, and the clocks of several processes would have them validate after different steps"
        raise ConfigError("trainer.val_check_interval", f"{by_time:g} s", rule, "give micro-batches: a multiple of K")
    check_range("trainer.gradient_clip_val", trainer.gradient_clip_val, "1.0 is common, null is off", least=0)
    if not federated:
        return
    if trainer.fast_dev_run:
        rule = "ends the run within a round, without checkpoints or curves"
        raise ConfigError("trainer.fast_dev_run", trainer.fast_dev_run, rule, "set trainer.max_steps to one round, K")
    if trainer.max_steps < 1:
        rule = "the run's local steps must be known: its last round ends with the last of them"
        raise ConfigError("trainer.max_steps", trainer.max_steps, rule, "type a number, such as 480")
    if trainer.max_epochs not in (None, -1):
        rule = "would end the run in the middle of a round; the data has no end"
        raise ConfigError("trainer.max_epochs", trainer.max_epochs, rule, "set it to -1 and give trainer.max_steps")
    if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        rule = "would ask all sites after every step, and end the run in the middle of a round"
        raise ConfigError("trainer.max_time", "given", rule, "give trainer.max_steps alone")


def check_weights(path: str | Path, config: ModelConfig) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        ConfigError: listing every setting that differs.
    """
    saved = read_manifest(Path(path))["architecture"]
    check_architecture(Path(path), saved, asdict(config), irrelevant_to_weights(saved, config))


def check_skipped(of_sites: list[int], limit: int) -> None:
    """Stop a run that skips too many steps.

    Args:
        of_sites: steps that each site has skipped since this process started.
        limit: most of them together.

    Raises:
        RuntimeError: naming the sites.
    """
    if sum(of_sites) > limit:
        named = ", ".join(f"site {site}: {n}" for site, n in enumerate(of_sites) if n)
        raise RuntimeError(f"{sum(of_sites)} optimizer steps had gradients that are not finite ({named}), more than "
                           f"model.max_skipped_steps = {limit}")  # fmt: skip
