"""The command line: `fomoe fit`, `fomoe validate` and `fomoe test`, with settings from YAML files."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, NoReturn, cast

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

from fomoe_pl.data.module import FoMoEData
from fomoe_pl.errors import ConfigError
from fomoe_pl.module import FoMoEModule
from fomoe_pl.strategies import FederatedStrategy, SingleSiteStrategy

EXIT_CONFIG = 2

QUIET = (
    ".*recommended to use `self.log.*sync_dist=True.*",  # validation sums are reduced by the strategy, counted
    ".*does not have many workers.*",  # reading is far from being the bottleneck at the shipped sizes
    ".*exists and is not empty.*",  # a run folder holds curves and checkpoints side by side
    ".*isinstance.treespec, LeafSpec.*",  # Lightning's own affair with torch
)


class Parser(LightningArgumentParser):
    """A parser whose errors are one message, without a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and end."""
        cause = ex
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        fail(str(cause) if cause is not None else message)


def fail(message: str) -> NoReturn:
    """End with one message; under a launcher only the first rank speaks."""
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        print(f"fomoe: {message}", file=sys.stderr)
    raise SystemExit(EXIT_CONFIG)


class FoMoECLI(LightningCLI):
    """LightningCLI that checks the whole configuration before any process starts."""

    def __init__(self, args: Any = None) -> None:
        super().__init__(
            FoMoEModule,
            FoMoEData,
            seed_everything_default=42,
            save_config_kwargs={"overwrite": True},
            args=args,
            parser_kwargs={"description": "Federated mixture-of-experts pre-training."},
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with short errors."""
        kwargs.setdefault("dump_header", ["fomoe-pl"])
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="Path to a YAML file; may be given several times.")
        return parser

    def before_instantiate_classes(self) -> None:
        """Validation is of the whole model on one device; strategy names must exist."""
        config = self.config[self.subcommand]
        if self.subcommand in ("validate", "test"):
            if not config.ckpt_path:
                raise ConfigError("ckpt_path", config.ckpt_path, f"`fomoe {self.subcommand}` needs a checkpoint",
                                  "add --ckpt_path runs/quickstart/checkpoints/last.ckpt")  # fmt: skip
            config.trainer.strategy = "single_site"
            config.trainer.devices = 1
            config.trainer.num_nodes = 1
        name = config.trainer.strategy
        if isinstance(name, str) and name != "auto" and name not in StrategyRegistry:
            names = ", ".join(sorted(StrategyRegistry.available_strategies()))
            raise ConfigError("trainer.strategy", name, "is no strategy",
                              f"choose one of {names}")  # fmt: skip

    def before_fit(self) -> None:
        """Check everything that can be seen from here."""
        self._check()

    def before_validate(self) -> None:
        """Check everything that can be seen from here."""
        self._check()

    def before_test(self) -> None:
        """Check everything that can be seen from here."""
        self._check()

    def _check(self) -> None:
        trainer, module, data = self.trainer, cast(FoMoEModule, self.model), cast(FoMoEData, self.datamodule)
        n_processes = trainer.num_nodes * trainer.num_devices
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if environment is not None and environment.creates_processes_externally:
            n_processes = environment.world_size()
        if isinstance(trainer.strategy, FederatedStrategy):
            trainer.strategy.check(module.config, n_processes)
        elif isinstance(trainer.strategy, SingleSiteStrategy):
            n_processes = 1
        data.check(n_processes)
        if data.vocab_size != module.config.vocab_size:
            raise ConfigError("model.architecture.vocab_size", module.config.vocab_size,
                              f"must equal the vocabulary of the data in {data.root} ({data.vocab_size})",
                              f"set it to {data.vocab_size}, or prepare the data with another tokenizer")  # fmt: skip


def main(args: list[str] | None = None) -> None:
    """Entry point of the console command."""
    if len(args if args is not None else sys.argv[1:]) == 0:
        args = ["--help"]
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    try:
        FoMoECLI(args=args)
    except ConfigError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
