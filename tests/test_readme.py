"""What the documents print: every command parses, every setting has its table, every strategy file is listed."""

import argparse
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml

from fomoe_pl import sweep
from fomoe_pl.callbacks import (
    CommunicationMonitor,
    FoMoEProgressBar,
    GlobalEMA,
    RoutingStability,
    RunPictures,
    RunReport,
    ThroughputMonitor,
)
from fomoe_pl.cli import HUB_COMMANDS, FoMoECLI, main
from fomoe_pl.console import split
from fomoe_pl.costs.sites import Site
from fomoe_pl.data import command as prepare_command
from fomoe_pl.data.module import FoMoEData
from fomoe_pl.data.prepare import collect_statistics, prepare
from fomoe_pl.federation.outer import Average, Nesterov
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.hub.callback import TaskEvaluation
from fomoe_pl.hub.evaluate import evaluate
from fomoe_pl.hub.export import export
from fomoe_pl.hub.generate import generate
from fomoe_pl.hub.importing import import_model
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.module import FoMoEModule
from fomoe_pl.optimizer import OptimizerConfig
from fomoe_pl.planner import command as plan_command
from fomoe_pl.planner.request import PlanRequest
from fomoe_pl.strategies import REGISTERED, FederatedStrategy
from tests.tools import load

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/tutorials").glob("*.md")),
]  # fmt: skip
LAUNCHER = re.compile(r"^(srun |torchrun .*-m )(?=fomoe)")


def commands(document: str) -> list[list[str]]:
    """Words of each `fomoe` and `python tools/...` command in the code blocks; launchers in front are cut off."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", document, flags=re.DOTALL | re.MULTILINE)
    lines = [LAUNCHER.sub("", line) for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"fomoe(_pl)? |python tools/", line)]


# Their commands are run, beside the pages' own files, by tests/test_extending.py.
ELSEWHERE = [ROOT / "docs/extending.md", ROOT / "docs/tutorials/your-strategy.md"]
PRINTED = {
    shlex.join(words): words for path in DOCUMENTS if path not in ELSEWHERE for words in commands(path.read_text())
}


class Parsed(Exception):  # noqa: N818  not an error: the end of what is to be run
    """A script has read its command line."""


class ParsedOnly(FoMoECLI):
    """The command line up to the point where a trainer would be made."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Read a command line; of a script run no more than that."""
    patch.chdir(ROOT)
    patch.setattr("torch.cuda.is_available", lambda: True)  # some commands are for a machine that has one
    program, *rest = words
    own_parsers = {"plan": plan_command.make_parser, "prepare": prepare_command.make_parser}
    if program != "python" and rest[0] in own_parsers:
        own_parsers[rest[0]]().parse_args(rest[1:])
        return
    if program != "python" and rest[0] == "sweep":  # whose other words are those of its runs
        options, fit = sweep.make_parser().parse_known_args(rest[1:])
        first = next(iter(sweep.commands(options.name, options.grid, options.save_dir, fit).values()))
        parse(["fomoe", *first], patch)
        return
    patch.setattr(sys, "argv", rest if program == "python" else split(words)[1])
    if program != "python" and rest[0] not in ("compare", "new", *HUB_COMMANDS):
        ParsedOnly()
        return
    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):

        def stop(self: Any, *args: Any, original: Callable[..., Any] = parser.parse_args, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            raise Parsed

        patch.setattr(parser, "parse_args", stop)
    if program == "python":
        patch.syspath_prepend(str((ROOT / rest[0]).parent))  # as Python does for a script
    with pytest.raises(Parsed):
        main(rest) if program != "python" else runpy.run_path(rest[0], run_name="__main__")


@pytest.mark.parametrize("command", PRINTED)
def test_printed_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(PRINTED[command], monkeypatch)


def test_commands_are_found_behind_their_launchers() -> None:
    document = """
text `fomoe fit -c in_a_sentence.yaml`
```
make quickstart
fomoe fit -c 'a b.yaml'  # why
```
```bash
torchrun --nproc_per_node 4 -m fomoe_pl fit -c c.yaml
srun fomoe validate
python tools/study/quality.py table
python -m pytest
```
"""
    assert commands(document) == [
        ["fomoe", "fit", "-c", "a b.yaml"],
        ["fomoe_pl", "fit", "-c", "c.yaml"],
        ["fomoe", "validate"],
        ["python", "tools/study/quality.py", "table"],
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["fomoe", "fit", "-c", "configs/quickstart.yaml", "--trainer.strategy.init_args.overlapp", "2"],
        ["fomoe", "fit", "-c", "configs/quickstart.yaml", "--model.architecture.top_k", "two"],
        ["fomoe", "prepare", "--source", "a", "--outptu", "b"],
    ],
    ids=shlex.join,
)
def test_a_mistyped_command_is_refused(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        parse(words, monkeypatch)


tables = load("settings_tables")
SETTINGS = {
    "configuration": (
        FederationConfig, FederatedStrategy, Average, Nesterov, OptimizerConfig, FoMoEModule, ModelConfig, FoMoEData,
        RoutingStability, RunPictures, CommunicationMonitor, ThroughputMonitor, RunReport, FoMoEProgressBar, GlobalEMA,
    ),
    "after-training": (export, generate, evaluate, TaskEvaluation, import_model),
    "data": (prepare, collect_statistics),
    "system-model": (PlanRequest, Site),
}  # fmt: skip


@pytest.mark.parametrize("page", SETTINGS)
def test_every_setting_has_a_table(page: str) -> None:
    """The tables are made when the site is built, by `tools/docs/settings_tables.py`."""
    asked = re.findall(r"^```\{settings\} (\S+)$", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.MULTILINE)
    assert [tables.find(path) for path in asked] == list(SETTINGS[page])


@pytest.mark.parametrize("owner", [owner for owners in SETTINGS.values() for owner in owners])
def test_every_setting_is_explained(owner: Callable[..., Any]) -> None:
    rows = tables.rows(owner)
    assert rows.keys() >= {*inspect.signature(owner).parameters} - {"settings", "progress", "parallel_devices"}
    assert [key for key, (_, text) in rows.items() if not text or text.startswith("As for")] == [] or (
        owner is collect_statistics  # of which the page shows what is its own
    )


def test_a_table_has_defaults_as_a_file_would_have_them() -> None:
    table = tables.markdown(OptimizerConfig)
    assert "| `betas` | `[0.9, 0.95]` | Decay rates" in table
    assert "| `sites` | `null` | Number of sites M; `null` is the world size. |" in tables.markdown(FederationConfig)
    assert "| `architecture` | required | The model" in tables.markdown(FoMoEModule)
    assert tables.markdown(collect_statistics, ["min_count"]).count("\n") == 2


def strategy_of(path: Path) -> Any:
    return yaml.safe_load(path.read_text())["trainer"]["strategy"]


def test_every_strategy_file_and_name_is_listed() -> None:
    files = re.findall(r"^\| `(\w+\.yaml)` \|", (ROOT / "docs/strategies.md").read_text(), flags=re.MULTILINE)
    assert sorted(files) == sorted(path.name for path in (ROOT / "configs/strategy").glob("*.yaml"))
    names = (ROOT / "docs/configuration.md").read_text().split("### By name")[1].split("##")[0]
    assert [name for name in REGISTERED if name != "single_site" and f"`{name}`" not in names] == []


def test_a_strategy_file_means_the_same_after_the_quickstart() -> None:
    """A key that a file does not name keeps the quickstart's value: so each must name all that the quickstart names."""
    quickstart = strategy_of(ROOT / "configs/quickstart.yaml")
    missing = {
        path.name: sorted(quickstart["init_args"].keys() - strategy["init_args"].keys())
        for path in (ROOT / "configs/strategy").glob("*.yaml")
        if (strategy := strategy_of(path))["class_path"] == quickstart["class_path"]
    }
    assert {name: keys for name, keys in missing.items() if keys} == {}
