"""The command line: `fomoe fit` and `fomoe validate` with settings from YAML files, and the other commands by name."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fomoe_pl.callbacks.curves import CurvesOnFullDisk
from fomoe_pl.costs import plan_command
from fomoe_pl.data.module import FoMoEData
from fomoe_pl.errors import ConfigError, OneMessage, SiteLostError, config_message, fail, speaks
from fomoe_pl.files import ForgivingStream
from fomoe_pl.module import FoMoEModule
from fomoe_pl.strategies import REGISTERED, FederatedStrategy, SingleSiteStrategy, SiteStrategy
from fomoe_pl.strategies.checkpoints import resolve
from fomoe_pl.strategies.checks import check_launched, check_training, check_weights
from fomoe_pl.strategies.elastic import Pace, nodes_left, tokens_in

EXIT_LOST = 1
HUB_COMMANDS = ("export", "import", "generate", "evaluate")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")

QUIET = (
    ".*recommended to use `self.log.*sync_dist=True.*",  # validation sums are reduced by the strategy, counted
    ".*does not have many workers.*",  # reading is far from being the bottleneck at the shipped sizes
    ".*exists and is not empty.*",  # a run folder holds curves and checkpoints side by side
    ".*dirpath has changed from.*",  # validating reads a checkpoint wherever it lies
    ".*isinstance.treespec, LeafSpec.*",  # Lightning's own affair with torch
)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "💡" not in record.getMessage()


class Parser(OneMessage, LightningArgumentParser):
    """A parser whose errors are one message."""


class SaveTrainingConfig(SaveConfigCallback):
    """Saves the settings of a training run in its folder; a later validation leaves them alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save when fitting."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class FoMoECLI(LightningCLI):
    """LightningCLI that checks the whole configuration before any process starts."""

    def __init__(self, args: Any = None) -> None:
        super().__init__(
            FoMoEModule,
            FoMoEData,
            seed_everything_default=42,
            save_config_callback=SaveTrainingConfig,
            save_config_kwargs={"overwrite": True},
            args=args,
            auto_configure_optimizers=False,  # the module has its own, under `model.optimizer`
            parser_kwargs={
                "description": "Federated mixture-of-experts pre-training. `fomoe plan --help`: what it will cost; "
                "`fomoe compare --help`: runs side by side; `fomoe export`, `import`, `generate`, `evaluate` "
                "with --help: what a finished model is for."
            },
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with short errors."""
        kwargs.setdefault("dump_header", ["fomoe-pl"])
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="Path to a YAML file; may be given several times.")
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Train, and validate a checkpoint: a corpus has two splits, so there is nothing to test or predict on."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint is a folder, whose settings are compared with the configured ones, not taken over."""

    def before_instantiate_classes(self) -> None:
        """Validation is of the whole model on one device; a strategy's name is one of this project's."""
        config = self.config[self.subcommand]
        for part in (config.model, config.data):
            part.seed = int(config.seed_everything or 0) if part.seed is None else part.seed
        if self.subcommand == "validate":
            if not config.ckpt_path:
                raise ConfigError("ckpt_path", config.ckpt_path, "`fomoe validate` needs a checkpoint",
                                  "add --ckpt_path runs/quickstart/checkpoints/last.ckpt")  # fmt: skip
            config.trainer.strategy = "single_site"
            config.trainer.devices = 1
            config.trainer.num_nodes = 1
            config.trainer.logger = False  # else its numbers would go into the training run's curves, at step 0
        if config.trainer.precision is not None and str(config.trainer.precision) not in PRECISIONS:
            raise ConfigError("trainer.precision", config.trainer.precision, "is not supported",
                              f"choose one of {', '.join(PRECISIONS)}")  # fmt: skip
        accelerator = config.trainer.accelerator
        if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ConfigError("trainer.accelerator", accelerator, f"torch {torch.__version__} finds no CUDA device",
                              "use cpu, or install a CUDA build of torch where there is a GPU")  # fmt: skip
        self._planned_nodes = config.trainer.num_nodes
        if isinstance(config.trainer.strategy, str):
            config.trainer.strategy = self._own_strategy(config.trainer)
        elif (least := config.trainer.strategy.get("init_args", {}).get("min_sites")) is not None:
            nodes = nodes_left(os.environ, config.trainer.devices, config.trainer.num_nodes, least)
            config.trainer.num_nodes = nodes

    @staticmethod
    def _own_strategy(trainer: Any) -> str:
        name: str = trainer.strategy
        if name == "auto":
            return "single_site" if str(trainer.devices) == "1" and trainer.num_nodes == 1 else "ddp_counted"
        # Lightning has given the short name to its own, whose bytes nobody counts.
        name = "ddp_counted" if name == "ddp" else name
        if name not in REGISTERED:
            raise _unknown_strategy(trainer.strategy)
        return name

    def before_fit(self) -> None:
        """Check everything that can be seen from here."""
        self._check()
        cast(Any, self.trainer).callbacks.insert(0, CurvesOnFullDisk())

    def before_validate(self) -> None:
        """Check everything that can be seen from here."""
        self._check()

    def _check(self) -> None:
        trainer, module, data = self.trainer, cast(FoMoEModule, self.model), cast(FoMoEData, self.datamodule)
        strategy = trainer.strategy
        if not isinstance(strategy, SiteStrategy):
            raise _unknown_strategy(f"{type(strategy).__module__}.{type(strategy).__qualname__}")
        n_processes = trainer.num_nodes * trainer.num_devices
        environment = getattr(strategy, "cluster_environment", None)
        if environment is not None and environment.creates_processes_externally:
            check_launched(trainer.num_devices, trainer.num_nodes, environment.world_size())
        path = self.config[self.subcommand].ckpt_path
        if path is not None and self.subcommand == "fit":
            path = resolve(_checkpoint_folder(trainer), path)
            self.config[self.subcommand].ckpt_path = self.config_init[self.subcommand].ckpt_path = path
        if isinstance(strategy, FederatedStrategy):
            if strategy.min_sites is not None:
                self._keep_pace(strategy, n_processes, path)
            strategy.check(module.config, n_processes, trainer.num_nodes)
        elif isinstance(strategy, SingleSiteStrategy):
            requested = self.config[self.subcommand].trainer.devices
            if str(requested) not in ("1", "auto"):
                raise ConfigError("trainer.devices", requested, "`single_site` is one process",
                                  "set it to 1, or choose a strategy of several sites")  # fmt: skip
            n_processes = 1
        if self.subcommand == "fit":
            check_training(trainer, federated=isinstance(strategy, FederatedStrategy))
        data.goes_on = path is not None
        data.check(n_processes)
        if data.vocab_size != module.config.vocab_size:
            raise ConfigError("model.architecture.vocab_size", module.config.vocab_size,
                              f"must equal the vocabulary of the data in {data.root} ({data.vocab_size})",
                              f"set it to {data.vocab_size}, or prepare the data with another tokenizer")  # fmt: skip
        if path is not None:
            check_weights(path, module.config)

    def _keep_pace(self, strategy: FederatedStrategy, n_sites: int, path: str | None) -> None:
        """Let a run that may have fewer sites than planned take the steps that the planned tokens need."""
        trainer, data = self.trainer, cast(FoMoEData, self.datamodule)
        steps, tokens = (0, 0) if path is None else tokens_in(Path(path))
        strategy.pace = Pace(
            planned=trainer.max_steps, start=steps, tokens=tokens, sites=n_sites,
            site_tokens=trainer.accumulate_grad_batches * data.batch_size * data.sequence_length,
            planned_sites=trainer.num_devices * self._planned_nodes,
        )  # fmt: skip
        if trainer.max_steps > 0 and strategy.pace.last_step != trainer.max_steps:
            last, planned = strategy.pace.last_step, strategy.pace.planned_sites
            rank_zero_info(f"{n_sites} of {planned} sites: the planned tokens take until step {last}")
            trainer.fit_loop.epoch_loop.max_steps = last


def _checkpoint_folder(trainer: Trainer) -> Path:
    """Where the run's ModelCheckpoint writes, which Lightning finds out only when it trains."""
    given = getattr(trainer.checkpoint_callback, "dirpath", None)
    if given is not None:
        return Path(given)
    logger = trainer.logger
    if logger is None:
        return Path(trainer.default_root_dir, "checkpoints")
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version, "checkpoints")


def _unknown_strategy(given: str) -> ConfigError:
    names = ", ".join(sorted({*REGISTERED, "ddp"}))
    return ConfigError("trainer.strategy", given, "is no strategy of fomoe-pl",
                       f"choose one of {names}; or give class_path and init_args, as the files in configs/strategy do"
                       )  # fmt: skip


def _way_on(checkpoint: str | None, args: list[str] | None) -> str:
    """How to go on: the command that was typed, with the checkpoint."""
    if checkpoint is None:
        return "there is no checkpoint to go on from"
    if os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID"):
        return f"go on with the same command and --ckpt_path {checkpoint}"
    typed = list(sys.argv[1:] if args is None else args)
    while "--ckpt_path" in typed:
        at = typed.index("--ckpt_path")
        del typed[at : at + 2]
    typed = [word for word in typed if not word.startswith("--ckpt_path=")]
    return f"go on with\n  {shlex.join(['fomoe', *typed, '--ckpt_path', checkpoint])}"


def main(args: list[str] | None = None) -> None:
    """Entry point of the console command."""
    words = sys.argv[1:] if args is None else args
    if not words:
        args = ["--help"]
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    try:
        if words[:1] == ["plan"]:  # needs no trainer
            plan_command.main(words[1:])
            return
        if words[:1] == ["compare"]:
            from fomoe_pl import compare  # TensorBoard's reader takes its time, and training needs none

            compare.main(words[1:])
            return
        if words[:1] and words[0] in HUB_COMMANDS:
            from fomoe_pl.hub import command  # what a finished model is for; training needs none of it

            command.main(words[0], words[1:])
            return
        with redirect_stdout(ForgivingStream.of(sys.stdout)), redirect_stderr(ForgivingStream.of(sys.stderr)):
            FoMoECLI(args=args)
    except SIGTERMException as stopped:
        checkpoint, number = stopped.args or (None, signal.SIGTERM)
        if speaks():
            print(f"fomoe: stopped by a signal; {_way_on(checkpoint, args)}", file=sys.stderr)
        raise SystemExit(128 + number) from None
    except SiteLostError as lost:
        if lost.speaks:
            print(f"fomoe: {lost}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_LOST) from None
    except Exception as error:
        told = config_message(error)
        if told is None and isinstance(error, (MisconfigurationException, ModuleNotFoundError)):
            told = str(error)  # Lightning's words for what is not there
        if told is None:
            raise  # no setting's fault: it stays whole
        fail(told)


if __name__ == "__main__":
    main()
