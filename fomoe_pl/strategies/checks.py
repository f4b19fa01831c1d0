"""Settings and checkpoints that cannot work, told before any process starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from fomoe_pl.callbacks.supported import check_callbacks
from fomoe_pl.data.module import FoMoEData
from fomoe_pl.errors import ConfigError, check_range
from fomoe_pl.federation.topology import Topology
from fomoe_pl.lightning_internals import OwnClock, validation_seconds
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.training.context import DomainData

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")

# What Lightning's DDPStrategy takes and a strategy of this project does not heed.
OWN_HOOK: dict[str, str] = {
    **dict.fromkeys(("init_sync", "broadcast_buffers"), "all ranks begin and go on with the same values"),
    **dict.fromkeys(
        ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"),
        "gradients go through the hook that counts their bytes",
    ),
    "start_method": "the trained model would stay in processes that end",
}
DDP_ARGUMENTS: dict[str, str] = {
    **dict.fromkeys(signature(DistributedDataParallel.__init__).parameters, "the model is not wrapped in DDP"),
    **dict.fromkeys(OWN_HOOK, "the model is not wrapped in DDP"),
    "start_method": OWN_HOOK["start_method"],
    "timeout": "the same is said in seconds, by timeout_seconds",
}
_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for owner in (DistributedDataParallel, DDPStrategy)
    for name, parameter in signature(owner.__init__).parameters.items()
}


def check_arguments(given: Mapping[str, Any], refused: Mapping[str, str]) -> dict[str, Any]:
    """Refuse arguments that would have no effect.

    Args:
        given: Arguments by name.
        refused: Name -> why.

    Returns:
        Those that are not what Lightning's `DDPStrategy` or torch's DDP takes anyway: a command line gives all of them,
        and torch warns of some whatever their value.

    Raises:
        ConfigError: For the first that is refused.
    """
    changed = {name: value for name, value in given.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}
    for name, value in changed.items():
        if name in refused:
            raise ConfigError(name, value, f"has no effect here: {refused[name]}", "leave it out")
    return changed


def check_processes(
    sites: int | None, ranks: int | tuple[int, ...], n_processes: int, num_nodes: int, *, share_device: bool
) -> int:  # fmt: skip
    """Number of sites, if it fits the number of processes on all machines.

    Args:
        sites: As it was set; None is what the processes make.
        ranks: Ranks of a site, or of each site.
        n_processes: On all machines together.
        num_nodes: Number of machines.
        share_device: Whether sites share a GPU.

    Raises:
        ConfigError: If it does not.
    """
    if share_device and num_nodes > 1:
        rule = "sites can share a GPU of one machine only"
        raise ConfigError("trainer.num_nodes", num_nodes, rule, "set it to 1, or share_device to false")
    told = f"the number of processes ({n_processes} = trainer.devices x num_nodes)"
    if not isinstance(ranks, int):
        if sum(ranks) != n_processes:
            rule = f"must add up to {told}"
            raise ConfigError("ranks_per_site", list(ranks), rule, f"start {sum(ranks)} processes, as many on each "
                              "machine, or give other ranks")  # fmt: skip
        return len(ranks)
    if n_processes % ranks:
        valid = ", ".join(str(n) for n in range(1, n_processes + 1) if n_processes % n == 0)
        raise ConfigError("ranks_per_site", ranks, f"must divide {told}, for whole sites", f"type one of {valid}")
    if sites is None or sites * ranks == n_processes:
        return n_processes // ranks
    if ranks == 1:
        hint = f"set trainer.devices to {sites}, or sites to {n_processes}"
        raise ConfigError("sites", sites, f"must equal {told}", hint)
    hint = f"start {sites * ranks} processes, or set sites to {n_processes // ranks}"
    raise ConfigError("sites", sites, f"times ranks_per_site ({ranks}) must equal {told}", hint)


def ranks_on_hosts(topology: Topology, hosts: Sequence[str]) -> tuple[str, str]:
    """Tell which rank is of which site, and warn where a site's fast traffic would cross between sites' machines.

    Args:
        topology: Who is who.
        hosts: Name of each rank's machine.

    Returns:
        A line of all sites; a warning, empty if each site has machines of its own or all of its ranks on one.
    """
    of_sites = [list(dict.fromkeys(hosts[rank] for rank in ranks)) for ranks in topology.ranks]
    lines = [f"site {site}: ranks {ranks.start} to {ranks.stop - 1} on {', '.join(on)}" if len(ranks) > 1
             else f"site {site}: rank {ranks.start} on {on[0]}"
             for site, (ranks, on) in enumerate(zip(topology.ranks, of_sites, strict=True))]  # fmt: skip
    torn = [
        f"site {site} is on {' and '.join(on)}, where site {other} is too" for site, on in enumerate(of_sites)
        for other, others in enumerate(of_sites) if len(on) > 1 and other != site and set(on) & set(others)
    ]  # fmt: skip
    warning = ""
    if torn:
        warning = (f"{torn[0]}: gradients would be averaged between machines in every step. Ranks are numbered machine "
                   "by machine: start the machines of a site one after the other, with as many processes on each as "
                   "divide ranks_per_site or are a multiple of it")  # fmt: skip
    return "; ".join(lines), warning


def check_module(module: Any) -> None:
    """Refuse a LightningModule that does not say of which tensors its experts are: rounds average those apart.

    Raises:
        ConfigError: Naming its class.
    """
    if not isinstance(getattr(module, "config", None), ModelConfig):
        rule = "has no `config` of a mixture of experts and no `transformer`, whose experts rounds average apart"
        hint = "use FoMoEModule or a subclass of it, which may have a loss of its own; other modules train with " \
               "Lightning's own strategies"  # fmt: skip
        raise ConfigError("model", type(module).__name__, rule, hint)


def check_launched(devices: int, num_nodes: int, world_size: int) -> None:
    """Refuse a launcher (torchrun, SLURM) that has started another number of processes than the Trainer expects.

    Raises:
        ConfigError: If the numbers differ.
    """
    if devices * num_nodes != world_size:
        rule = f"times trainer.num_nodes ({num_nodes}) must be the {world_size} processes that were launched"
        hint = "with torchrun, --nproc_per_node is trainer.devices and --nnodes trainer.num_nodes"
        raise ConfigError("trainer.devices", devices, rule, hint)


def check_precision(precision: object) -> None:
    """Refuse what the model's kernels and checkpoints do not know.

    Raises:
        ConfigError: Naming the choices.
    """
    if precision is not None and str(precision) not in PRECISIONS:
        hint = f"choose one of {', '.join(PRECISIONS)}"
        raise ConfigError("trainer.precision", precision, "is not supported", hint)


def check_data(
    trainer: Any, data: Any, config: ModelConfig, n_sites: int, n_ranks: int | tuple[int, ...] = 1, *, fitting: bool
) -> None:  # fmt: skip
    """Check the data against the model and the Trainer.

    Args:
        trainer: The Trainer.
        data: Its datamodule, or None.
        config: The model's architecture.
        n_sites: Number of sites M.
        n_ranks: Ranks of a site, or of each site.
        fitting: Whether it trains; else it validates.

    Raises:
        ConfigError: Naming the setting and the rule.
    """
    if isinstance(data, FoMoEData):
        data.check(n_sites, n_ranks)
        data.check_vocabulary(config.vocab_size)
        if fitting:
            check_endless(trainer)
    elif not isinstance(data, DomainData) and (not fitting or trainer.enable_validation):
        rule = "validation needs a datamodule with `domains`, the names that its batches' `domain` indexes"
        hint = "give datamodule=FoMoEData(...) or one of your own that has them, or set limit_val_batches to 0"
        raise ConfigError("val_dataloaders", type(data).__name__, rule, hint)


def check_endless(trainer: Any) -> None:
    """Check what ends an epoch: the data does not, so that Lightning's epochs are mere sections of it.

    Raises:
        ConfigError: Naming the setting and the rule.
    """
    section, micro = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if trainer.overfit_batches:
        rule = "would read the same batches again and again, and the data is an endless stream"
        raise ConfigError("trainer.overfit_batches", trainer.overfit_batches, rule, "set it to 0; to overfit a model, "
                          "prepare a small corpus")  # fmt: skip
    limited = isinstance(section, int) and section > 0
    if limited and section % micro:
        rule = f"must be a multiple of trainer.accumulate_grad_batches ({micro}): the last step would be a short one"
        hint = f"type {section + -section % micro}, or 1.0 for one endless epoch"
        raise ConfigError("trainer.limit_train_batches", section, rule, hint)
    if trainer.max_epochs not in (None, -1) and not limited:
        rule = "the data has no end, so that no epoch ends"
        raise ConfigError("trainer.max_epochs", trainer.max_epochs, rule, "set it to -1 and give trainer.max_steps")
    if trainer.max_epochs is None and trainer.max_steps == -1:
        rule = "the data has no end, so that the run would have none"
        raise ConfigError("trainer.max_steps", -1, rule, "type a number, such as 480, or set trainer.max_epochs to -1")
    if trainer.check_val_every_n_epoch not in (None, 1):
        rule = "the data has no end, so that epochs do not count"
        raise ConfigError("trainer.check_val_every_n_epoch", trainer.check_val_every_n_epoch, rule,
                          "set it to null and give trainer.val_check_interval, in micro-batches")  # fmt: skip


def check_training(trainer: Trainer, *, federated: bool) -> None:
    """Check the Trainer's own settings, which Lightning finds out about only once it trains.

    Args:
        trainer: The Trainer, before it runs.
        federated: Whether training has rounds, whose last one ends with the run's last step.

    Raises:
        ConfigError: Naming the setting and the rule.
    """
    check_callbacks(trainer)
    if trainer.accumulate_grad_batches < 1:
        rule = "must be at least 1 micro-batch"
        raise ConfigError("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, rule, "1 is the default")
    by_time = validation_seconds(trainer)
    if by_time is None and not (trainer.val_check_interval or 0) > 0:
        rule = "must be a positive number of micro-batches"
        raise ConfigError("trainer.val_check_interval", trainer.val_check_interval, rule, "give a multiple of K")
    if by_time is not None and trainer.num_devices * trainer.num_nodes > 1:
        rule = "is a time, and the clocks of several processes would have them validate after different steps"
        raise ConfigError("trainer.val_check_interval", f"{by_time:g} s", rule, "give micro-batches: a multiple of K")
    check_range("trainer.gradient_clip_val", trainer.gradient_clip_val, "1.0 is common, null is off", least=0)
    if not federated:
        return
    fast_dev_run = cast(Any, trainer).fast_dev_run
    if fast_dev_run:
        rule = "ends the run within a round, without checkpoints or curves"
        raise ConfigError("trainer.fast_dev_run", fast_dev_run, rule, "set trainer.max_steps to one round, K")
    if trainer.max_steps < 1:
        rule = "the run's local steps must be known: its last round ends with the last of them"
        raise ConfigError("trainer.max_steps", trainer.max_steps, rule, "type a number, such as 480")
    if trainer.max_epochs not in (None, -1):
        rule = "would end the run in the middle of a round; the data has no end"
        raise ConfigError("trainer.max_epochs", trainer.max_epochs, rule, "set it to -1 and give trainer.max_steps")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    # Lightning's would ask all sites after every step, and end the run in the middle of a round.
    callbacks[:] = [OwnClock.of(callback) if type(callback) is Timer else callback for callback in callbacks]


def check_position(trainer: Any) -> None:
    """Refuse to go on from where no optimizer step begins, or an epoch is over already.

    Args:
        trainer: The Trainer, which has read its state from a checkpoint.

    Raises:
        ConfigError: Naming the setting and the rule.
    """
    taken, micro = trainer.fit_loop.epoch_loop.batch_progress.current.processed, trainer.accumulate_grad_batches
    if taken % micro:
        rule = f"does not divide the {taken} micro-batches after which the checkpoint was saved: a step would be short"
        raise ConfigError("trainer.accumulate_grad_batches", micro, rule, "use that of the run that was interrupted")
    section = trainer.limit_train_batches
    if isinstance(section, int) and taken > section:
        rule = f"the checkpoint was saved after {taken} micro-batches of its epoch"
        raise ConfigError("trainer.limit_train_batches", section, rule, f"type {taken} or more")
