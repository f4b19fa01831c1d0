"""The command line: `fomoe fit` and `fomoe validate` with settings from YAML files, and the other commands by name."""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from jsonargparse import Namespace
from lightning import __version__ as lightning_version
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fomoe_pl import __version__, completion, console, new, sweep
from fomoe_pl.adjust import KEY, changed_callbacks, changes_in_steps, in_steps, merged_changes, steps_for
from fomoe_pl.callbacks.curves import CurvesOnFullDisk, ResumedRows
from fomoe_pl.callbacks.report import RunReport
from fomoe_pl.checkpoint.resuming import check_weights, resolve, tokens_in
from fomoe_pl.console import Talk
from fomoe_pl.data import command as prepare_command
from fomoe_pl.data.module import FoMoEData
from fomoe_pl.errors import (
    KEY_PATHS,
    ConfigError,
    MeetingError,
    OneMessage,
    SiteLostError,
    check_seed,
    config_error_in,
    config_message,
    fail,
    speaks,
)
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.files import ForgivingStream, check_local
from fomoe_pl.folders import RunFolders, check_fixed, clear
from fomoe_pl.lightning_internals import PlainCLI, given_version
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.module import FoMoEModule
from fomoe_pl.planner import command as plan_command
from fomoe_pl.shipped import NamedConfig, config_names
from fomoe_pl.strategies import REGISTERED, FederatedStrategy, SiteStrategy
from fomoe_pl.strategies.checks import check_precision
from fomoe_pl.training.elastic import Pace, nodes_left

EXIT_LOST = 1
KEY_PATHS |= dict.fromkeys(
    {*signature(FederationConfig).parameters, *signature(FederatedStrategy).parameters}, "trainer.strategy.init_args."
) | dict.fromkeys(signature(ModelConfig).parameters, "model.architecture.")
HUB_COMMANDS = ("export", "import", "generate", "evaluate")
OTHERS = ("new", "prepare", "plan", "sweep", "compare", "completion")
COMMANDS = {
    "new": "a commented file for a run of your own; --list: which configurations there are",
    "prepare": "make a corpus from text",
    "plan": "which settings a federation can run, and what they cost",
    "fit": "train",
    "validate": "the global model of a checkpoint on the corpus' validation text",
    "sweep": "a grid of runs, one after the other; goes on where it stopped",
    "compare": "runs side by side, in the terminal and on a page",
    "export": "a checkpoint as a Hugging Face folder",
    "import": "a Hugging Face folder as a checkpoint to train on",
    "generate": "text from a checkpoint or an export",
    "evaluate": "scores of tasks, by lm-evaluation-harness",
    "completion": "what bash or zsh need to complete commands, options and names",
}
ELSEWHERE = {"train": "fit", "pretrain": "fit", "run": "fit", "test": "validate", "eval": "evaluate", "data": "prepare"}
"""What commands of other programs are called here."""
SERVERS = ("url", "uri", "host", "endpoint", "address", "init_method", "artifact_location")
"""Ends of the settings that may be URLs."""
URLS = ("data.root", "trainer.strategy.init_args.checkpoint_root", "ckpt_path")
"""Beginnings of others; `ckpt_path` where checkpoints are behind URLs."""


class Parser(OneMessage, LightningArgumentParser):
    """A parser that reports one short error and suggests the nearest option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and end."""
        unknown = re.match(r"[Uu]nrecognized arguments: --([\w.]+)", message)
        if unknown is not None:
            near = get_close_matches(unknown[1], [option[2:] for option in self.options()], 1)
            message += f". Did you mean --{near[0]}?" if near else ""
        unknown = re.match(r"(?:Key )?Option '([\w.]+)' is not accepted", message)
        if unknown is not None:  # of a class, whose settings are no options
            known = {*signature(FederationConfig).parameters, *(o.rpartition(".")[2] for o in self.options())}
            near = get_close_matches(unknown[1].rpartition(".")[2], known, 1)
            message += f". Did you mean {near[0]}?" if near else ""
        if "following arguments are required" in message:
            message += ". Give a configuration, such as -c quickstart; fomoe new --list names them all"
        super().error(message, ex)


class SaveTrainingConfig(SaveConfigCallback):
    """Saves the settings of a training run in its folder; a later validation leaves them alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save when fitting."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class FoMoECLI(PlainCLI):
    """LightningCLI that checks the whole configuration before any process starts."""

    def __init__(self, args: Any = None, quiet: bool = False) -> None:
        self._quiet = quiet
        self._replaced: list[Path] = []
        super().__init__(
            FoMoEModule,
            FoMoEData,
            seed_everything_default=42,
            save_config_callback=SaveTrainingConfig,
            save_config_kwargs={"overwrite": True},
            args=args,
            auto_configure_optimizers=False,  # the module has its own, under `model.optimizer`
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with short errors."""
        kwargs.setdefault("dump_header", ["fomoe-pl"])
        parser = Parser(**kwargs)
        what = "A YAML file, or the name of one that is installed (`fomoe new --list`); may be given several times."
        parser.add_argument("-c", "--config", action=NamedConfig, help=what)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings of this command line alone."""
        what = "Replace the run that the folder holds; else a numbered folder is taken."
        parser.add_argument("--overwrite", action="store_true", help=what)
        what = "Tokens of all sites after which the run ends, instead of trainer.max_steps."
        parser.add_argument("--max_tokens", type=float | None, default=None, help=what)
        what = (
            "Changes to callbacks, by class: --callbacks.ModelCheckpoint.every_n_train_steps '20 rounds'; null: none."
        )
        parser.add_argument(f"--{KEY}", type=dict[str, dict[str, Any] | None], default={}, help=what)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Train, and validate a checkpoint: a corpus has two splits, so there is nothing to test or predict on."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check settings that are used before classes are instantiated."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        _write_out(config)
        if not isinstance(config.seed_everything, bool):
            check_seed("seed_everything", config.seed_everything)
        _check_paths("", config)

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
        check_precision(config.trainer.precision)
        accelerator = config.trainer.accelerator
        if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ConfigError("trainer.accelerator", accelerator, f"torch {torch.__version__} finds no CUDA device",
                              "use cpu, or install a CUDA build of torch where there is a GPU")  # fmt: skip
        if self._quiet:
            config.trainer.enable_progress_bar = config.trainer.enable_model_summary = False
        _drop_disabled(config.trainer)
        if self.subcommand == "fit":
            self._choose_folder(config)
        self._planned_nodes = config.trainer.num_nodes
        if isinstance(config.trainer.strategy, str):
            config.trainer.strategy = self._own_strategy(config.trainer)
        elif (least := config.trainer.strategy.get("init_args", {}).get("min_sites")) is not None:
            ranks = config.trainer.strategy.init_args.get("ranks_per_site", 1)
            ranks = ranks if isinstance(ranks, int) else 1  # ranks of each site are refused with it
            nodes = nodes_left(os.environ, config.trainer.devices, config.trainer.num_nodes, least, ranks)
            config.trainer.num_nodes = nodes

    def _choose_folder(self, config: Any) -> None:
        """Leave a run alone that lies where this one would be written.

        Only the first process has to choose: all others ask it where checkpoints go, and nothing else of theirs lies in
        a run's folder. Those that go on from a checkpoint all look where it is.
        """
        folders, path, overwrite = RunFolders(config.trainer.logger), config.ckpt_path, config.overwrite
        config.overwrite = False  # the settings are saved: who trains with them again has not asked for it
        if path == "auto":
            if overwrite:
                raise ConfigError("overwrite", True, "ckpt_path auto goes on with the run that would be replaced",
                                  "leave out one of them")  # fmt: skip
            folders.choose_newest()
            return
        if path is not None and folders.choose_that_of(Path(path)):
            if overwrite:
                raise ConfigError("overwrite", True, f"the checkpoint to go on from lies in {folders.paths[0]}",
                                  "leave it out: a resumed run goes on in its folder")  # fmt: skip
            return
        if not speaks():
            return
        if overwrite:
            self._replaced = folders.paths
        elif folders.choose_free():
            print(f"A run lies in the folder of that name already: this one is written to {folders.paths[0]} "
                  "(--overwrite replaces the old one)", flush=True)  # fmt: skip
        if not overwrite:
            check_fixed(_fixed_folders(config.trainer))

    @staticmethod
    def _own_strategy(trainer: Any) -> str:
        name: str = trainer.strategy
        if name == "auto":
            return "single_site" if str(trainer.devices) == "1" and trainer.num_nodes == 1 else "ddp_counted"
        # Lightning's own strategy of this short name does not count bytes.
        name = "ddp_counted" if name == "ddp" else name
        if name not in REGISTERED:
            raise _unknown_strategy(trainer.strategy)
        return name

    def before_fit(self) -> None:
        """Check the configuration."""
        self._check()
        for folder in self._replaced:  # nothing is removed before all settings are found to work
            clear(folder)
        cast(Any, self.trainer).callbacks[:0] = [CurvesOnFullDisk(), ResumedRows(self.trainer.loggers)]

    def after_fit(self) -> None:
        """Say what the run has ended with, and what can be done with it."""
        if self.trainer.is_global_zero and not cast(Any, self.trainer).fast_dev_run:
            print(_ending(self.trainer), flush=True)

    def before_validate(self) -> None:
        """Check the configuration."""
        self._check()

    def _check(self) -> None:
        trainer, module, data = self.trainer, cast(FoMoEModule, self.model), cast(FoMoEData, self.datamodule)
        strategy = trainer.strategy
        if not isinstance(strategy, SiteStrategy):
            raise _unknown_strategy(f"{type(strategy).__module__}.{type(strategy).__qualname__}")
        if self.subcommand == "fit":
            self._plan_tokens(strategy, data)
        path = self.config[self.subcommand].ckpt_path
        own_disks = isinstance(strategy, FederatedStrategy) and strategy.checkpoint_root is not None
        if path is not None and not own_disks:
            check_local("ckpt_path", path)
        if path is not None and self.subcommand == "fit" and not own_disks:
            path = _newest(trainer) if path == "auto" else path
            self.config[self.subcommand].ckpt_path = self.config_init[self.subcommand].ckpt_path = path
        if isinstance(strategy, FederatedStrategy) and strategy.settings.min_sites is not None:
            self._keep_pace(strategy, strategy.settings.n_sites_of(trainer.num_nodes * trainer.num_devices), path)
        data.goes_on = path is not None
        strategy.check_run(trainer, module, data, fitting=self.subcommand == "fit")
        if path is not None and not own_disks:  # which of them a site lacks shows when all have met
            check_weights(path, module.config)

    def _plan_tokens(self, strategy: SiteStrategy, data: FoMoEData) -> None:
        """Set the number of steps that the tokens take which were given instead."""
        trainer, tokens = self.trainer, self.config[self.subcommand].max_tokens
        if trainer.max_epochs not in (None, -1) and not isinstance(trainer.limit_train_batches, int):
            whole = sum(domain.train.tokens for domain in data.manifest.domains) * (trainer.max_epochs or 1)
            rule = "the data is an endless stream, and an epoch would end the run in the middle of a round"
            raise ConfigError("trainer.max_epochs", trainer.max_epochs, rule,
                              f"leave it -1 and give the tokens of all sites, --max_tokens {whole}")  # fmt: skip
        if tokens is None:
            return
        settings = strategy.settings if isinstance(strategy, FederatedStrategy) else None
        processes = trainer.num_devices * self._planned_nodes
        sizes = data.batch_sizes(processes if settings is None else settings.n_sites_of(processes))
        step_tokens = trainer.accumulate_grad_batches * sum(sizes) * data.sequence_length
        steps = steps_for(tokens, step_tokens, None if settings is None else settings.local_steps)
        cast(Any, trainer).fit_loop.epoch_loop.max_steps = steps
        rank_zero_info(f"max_tokens = {tokens:g}: {steps} steps of {step_tokens} tokens")

    def _keep_pace(self, strategy: FederatedStrategy, n_sites: int, path: str | None) -> None:
        """Set the number of steps that the planned tokens take with the sites that are present."""
        trainer, data = self.trainer, cast(FoMoEData, self.datamodule)
        if not isinstance(data.batch_size, int):
            rule = "with a batch size of each site the number of sites cannot change by itself"
            raise ConfigError("min_sites", strategy.settings.min_sites, rule, "leave it out, or type one batch size")
        strategy.pace = Pace(
            planned=trainer.max_steps, start=0, tokens=0, sites=n_sites,
            site_tokens=trainer.accumulate_grad_batches * data.batch_size * data.sequence_length,
            planned_sites=strategy.settings.n_sites_of(trainer.num_devices * self._planned_nodes),
        )  # fmt: skip
        if strategy.checkpoint_root is None or path is None:  # else it goes on when all have met
            strategy.pace.go_on(*((0, 0) if path is None else tokens_in(Path(path))), trainer)


def _local_steps(strategy: Any) -> Any:
    """K as it was given, for a strategy by name or by class; None where there are no rounds."""
    if isinstance(strategy, str):
        return REGISTERED[strategy][2].get("local_steps") if strategy in REGISTERED else None
    return vars(strategy.get("init_args", Namespace())).get("local_steps")


def _write_out(config: Any) -> None:
    """Replace what only this command line knows by what the Trainer takes: intervals in rounds, changed callbacks."""
    trainer, k = config.trainer, _local_steps(config.trainer.strategy)
    micro = trainer.accumulate_grad_batches
    in_batches = k * micro if isinstance(k, int) and isinstance(micro, int) else k
    trainer.val_check_interval = in_steps("trainer.val_check_interval", trainer.val_check_interval, in_batches)
    if config[KEY]:
        given = trainer.callbacks
        listed = given if isinstance(given, list) else [] if given is None else [given]
        trainer.callbacks = changed_callbacks(listed, changes_in_steps(config[KEY], k))
        config[KEY] = {}  # they are in the list now


def _fixed_folders(trainer: Any) -> list[tuple[str, Path]]:
    """Folders of a run's report that no logger names, with the settings that do."""
    reports = [c for c in trainer.callbacks or () if pkgutil.resolve_name(c.class_path) is RunReport]
    given = [c.init_args.get("folder") for c in reports]
    if trainer.logger is False:
        given = [folder or trainer.default_root_dir or "." for folder in given]
    return [("trainer.callbacks.RunReport.folder", Path(folder)) for folder in given if folder is not None]


def _check_paths(key: str, value: Any) -> None:
    """Refuse URLs among all settings, but for those that are addresses of servers."""
    if isinstance(value, (Namespace, Mapping)):
        items: Iterable[tuple[str, Any]] = vars(value).items() if isinstance(value, Namespace) else value.items()
        for name, inner in items:
            _check_paths(f"{key}.{name}" if key else str(name), inner)
    elif isinstance(value, list):
        for inner in value:
            _check_paths(key, inner)
    elif not key.endswith(SERVERS) and not key.startswith(URLS):
        check_local(key, os.fspath(value) if isinstance(value, os.PathLike) else value)


def _drop_disabled(trainer: Any) -> None:
    """Leave out the callbacks of what is switched off: Lightning refuses them, and files list them."""
    debugs = bool(trainer.fast_dev_run)
    off: dict[type[Callback], bool] = {
        ProgressBar: trainer.enable_progress_bar is False,
        ModelSummary: trainer.enable_model_summary is False,
        Checkpoint: trainer.enable_checkpointing is False and not debugs,
    }
    dropped = tuple(kind for kind, is_off in off.items() if is_off)
    if dropped and isinstance(trainer.callbacks, list):
        trainer.callbacks = [
            c for c in trainer.callbacks if not issubclass(pkgutil.resolve_name(c.class_path), dropped)
        ]


def _checkpoint_folders(trainer: Trainer) -> tuple[list[Path], Path | None]:
    """Where the run's checkpoints are, which Lightning finds out only when it trains; and other runs of its name.

    Raises:
        ConfigError: Where every start has a folder of its own, in which a restarted run finds nothing.
    """
    given = [c.dirpath if isinstance(c, ModelCheckpoint) else None for c in trainer.checkpoint_callbacks]
    folders = [Path(path) for path in given if path is not None]
    if not given:  # only what is saved where a run ends
        folders.append(Path(trainer.default_root_dir, "checkpoints"))
    if len(folders) >= max(1, len(given)):
        return folders, None
    logger = trainer.logger
    if logger is None:
        return [*folders, Path(trainer.default_root_dir, "checkpoints")], None
    version = given_version(logger)
    if isinstance(logger, WandbLogger):
        version = logger.version  # the id, if it was given
    if version is None:
        raise ConfigError("ckpt_path", "auto",
                          f"{type(logger).__name__} gives every start a folder of its own: a restarted run would "
                          "find no checkpoints", "give ModelCheckpoint a dirpath, or the logger a version that stays: "
                          "trainer.logger.init_args.version (of W&B an id)")  # fmt: skip
    name = Path(logger.save_dir or trainer.default_root_dir, str(logger.name))
    version = version if isinstance(version, str) else f"version_{version}"
    return [*folders, name / version / "checkpoints"], name


def _newest(trainer: Trainer) -> str | None:
    """What `--ckpt_path auto` is for this run."""
    folders, others = _checkpoint_folders(trainer)
    return resolve(folders, "auto", others)


def _unknown_strategy(given: str) -> ConfigError:
    names = ", ".join(sorted({*REGISTERED, "ddp"}))
    return ConfigError("trainer.strategy", given, "is no strategy of fomoe-pl",
                       f"choose one of {names}; or give class_path and init_args, as the files in configs/strategy do"
                       )  # fmt: skip


def _ending(trainer: Trainer) -> str:
    """Result, checkpoint, report and next commands of a finished run."""
    strategy, metrics = cast(SiteStrategy, trainer.strategy), trainer.callback_metrics
    result = f"finished after {trainer.global_step} steps"
    if "val/bits_per_byte" in metrics:
        result += f": {float(metrics['val/bits_per_byte']):.3f} bits per byte of the global model"
    lines, saved = [result], strategy.checkpoints.last_saved
    report = next((c.path for c in cast(Any, trainer).callbacks if isinstance(c, RunReport) and c.path), None)
    if saved is not None:
        lines.append(f"checkpoint  {saved}")
    if report is not None:
        lines.append(f"report      {report}")
    if isinstance(saved, Path) and not strategy.content.own_disks:
        lines += [f"next        fomoe generate {saved} --prompt 'Once'",
                  f"            fomoe export {saved} {saved.parents[1] / 'model'}"]  # fmt: skip
    elif saved is not None:
        lines.append("next        fomoe export PART... OUTPUT, with the parts of all sites")
    if report is not None:
        lines.append(f"            fomoe compare {report.parent}")
    return "\n".join(lines)


def _way_on(checkpoint: str | None, args: list[str] | None) -> str:
    """How to resume: the typed command with the checkpoint."""
    if checkpoint is None:
        return "there is no checkpoint to resume from"
    if os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID"):
        return f"resume with the same command and --ckpt_path {checkpoint}"
    typed = list(sys.argv[1:] if args is None else args)
    while "--ckpt_path" in typed:
        at = typed.index("--ckpt_path")
        del typed[at : at + 2]
    typed = [word for word in typed if not word.startswith("--ckpt_path=")]
    return f"resume with\n  {shlex.join(['fomoe', *typed, '--ckpt_path', checkpoint])}"


@contextmanager
def _checkpoint_in_one(words: list[str]) -> Iterator[list[str] | None]:
    """For `validate`: the words with one folder in the place of a checkpoint's parts, or of its URL; None as typed."""
    at = words.index("--ckpt_path") + 1 if words[0] == "validate" and "--ckpt_path" in words else len(words)
    end = next((i for i in range(at, len(words)) if words[i].startswith("-")), len(words))
    if at == end:
        yield None
        return
    from fomoe_pl.hub.joined import joined  # not needed for training

    with joined(words[at:end]) as folder:
        same = [str(folder)] == words[at:end]
        yield None if same else [*words[:at], str(folder), *words[end:]]


def overview() -> str:
    """The overview of commands."""
    lines = [f"  {name:12}{what}" for name, what in COMMANDS.items()]
    return "\n".join((
        "usage: fomoe COMMAND ...", "",
        "Federated mixture-of-experts pre-training: sites train one model, and none of them holds all experts.", "",
        *lines, "",
        "fomoe COMMAND --help lists a command's settings; fomoe --version.",
        "-v with any command: what libraries say, and where an error comes from; -q: warnings and results alone.", "",
        "First run:  fomoe prepare --source sample --output runs/data/sample && fomoe fit -c quickstart",
    ))  # fmt: skip


def unknown_command(word: str) -> str:
    """The message for an unknown command."""
    near = [ELSEWHERE[word]] if word in ELSEWHERE else get_close_matches(word, COMMANDS, 1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{word!r} is no command. {hint}There are {', '.join(COMMANDS)}"


def _run(words: list[str], talk: Talk) -> None:
    """Run a command; those that need a lot of libraries import them only now."""
    name, rest = words[0], words[1:]
    if name == "completion":
        print(completion.script(_shell(rest), _all_options(), config_names()), end="")
    elif name in HUB_COMMANDS:
        from fomoe_pl.hub import command

        command.main(name, rest)
    elif name == "compare":
        from fomoe_pl import compare  # TensorBoard's reader is slow to import

        compare.main(rest)
    elif name == "sweep":
        sweep.main(rest, talk.words)
    elif name in ("new", "plan", "prepare"):
        {"new": new, "plan": plan_command, "prepare": prepare_command}[name].main(rest)
    else:
        merged = merged_changes(words)
        with (
            redirect_stdout(ForgivingStream.of(sys.stdout)),
            redirect_stderr(ForgivingStream.of(sys.stderr)),
            _checkpoint_in_one(merged) as changed,
        ):
            FoMoECLI(args=merged if changed is None else changed, quiet=talk.quiet)


def _shell(words: list[str]) -> str:
    if len(words) != 1 or words[0] not in completion.SHELLS:
        fail(f"fomoe completion takes one of {', '.join(completion.SHELLS)}: "
             "fomoe completion bash > ~/.local/share/bash-completion/completions/fomoe")  # fmt: skip
    return words[0]


def _all_options() -> dict[str, set[str]]:
    """Options of each command, dashes included."""
    from fomoe_pl import compare
    from fomoe_pl.hub import command

    found: dict[str, set[str]] = {name: set() for name in COMMANDS}
    parsers: dict[str, Any] = {
        "new": new.make_parser(), "sweep": sweep.make_parser(), "plan": plan_command.make_parser(),
        "prepare": prepare_command.make_parser(),
        "compare": compare.make_parser(), **{name: command.make_parser(name) for name in HUB_COMMANDS},
        **dict.fromkeys(FoMoECLI.subcommands(), _fit_parser()),
    }  # fmt: skip
    found |= {name: parser.options() for name, parser in parsers.items()}
    for name in FoMoECLI.subcommands():  # a strategy has its options only once it is chosen
        found[name] |= {f"--{path}{key}" for key, path in KEY_PATHS.items() if path.startswith("trainer.strategy")}
    return found


class _ParserOnly(FoMoECLI):
    """The command line before it reads anything."""

    def __init__(self) -> None:
        with suppress(_Made):
            super().__init__()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """No more."""
        raise _Made


class _Made(Exception):  # noqa: N818  not an error
    """The parser is there."""


def _fit_parser() -> Parser:
    return cast(Parser, _ParserOnly().parser)


def main(args: list[str] | None = None) -> None:
    """Entry point of the console command."""
    talk, words = console.split(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if words[0] == "--version":
        print(f"fomoe-pl {__version__}, lightning {lightning_version}, torch {torch.__version__}")
        return
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        fail(unknown_command(words[0]))
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # for a user's own classes, as with `python -m`; every process begins here
    try:
        with console.heard(talk):
            _run(words, talk)
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
        problem = config_message(error)
        if problem is None and isinstance(error, (MisconfigurationException, ModuleNotFoundError)):
            problem = str(error)  # Lightning's message for a missing file
        if problem is None:
            raise  # not caused by a setting: keep the traceback
        if talk.verbose:
            traceback.print_exc()
        found = config_error_in(error)
        fail(problem, found.speaks if isinstance(found, MeetingError) else None)


if __name__ == "__main__":
    main()
