"""`fomoe plan`: what a federation can train, before any hardware is rented."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from fomoe_pl.costs.sites import Site
from fomoe_pl.errors import ConfigError, OneMessage
from fomoe_pl.files import prepare, write_whole
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.planner.choices import Plan, Refusal
from fomoe_pl.planner.fit_yaml import fit_yaml
from fomoe_pl.planner.output import answers, as_json, notes, one_of_each, pareto, plan_table, refusal_table
from fomoe_pl.planner.plan import Planner
from fomoe_pl.planner.request import PlanRequest
from fomoe_pl.shipped import NamedConfig, config_path, how_to_install

PLOTS = (".svg", ".png", ".pdf")
WIDTH = 150


def read_settings(path: str) -> dict[str, Any]:
    """The `model` section of a file of configs/model, or of any file that `fomoe fit` reads.

    Raises:
        ConfigError: If it has none, or another optimizer than AdamW, whose state is counted.
    """
    hint = "name one as `-c` of fomoe fit takes it, such as model/fomoe-153m"
    try:
        settings: dict[str, Any] = yaml.safe_load(Path(config_path(path, "models")).read_text())["model"]
        ModelConfig(**settings["architecture"])
    except OSError as error:
        raise ConfigError("models", path, f"cannot be read: {error.strerror}", hint) from error
    except (KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("models", path, f"has no usable model.architecture ({error})", hint) from error
    kind = (settings.get("optimizer") or {}).get("kind", "adamw")
    if kind != "adamw":
        raise ConfigError("models", path, f"has model.optimizer.kind {kind!r}, but memory is counted for AdamW",
                          "plan with adamw")  # fmt: skip
    return settings


def names_of(paths: Sequence[str]) -> dict[str, str]:
    """Name -> path: a file's name without its ending where it is the only one of that name, else the path."""
    stems = [Path(path).stem for path in paths]
    return {stem if stems.count(stem) == 1 else path: path for stem, path in zip(stems, paths, strict=True)}


class Parser(OneMessage, ArgumentParser):
    """A parser that reports one short error."""


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="fomoe plan",
        description="What a federation can train: settings that fit, ranked by time, and why others do not.",
    )
    parser.add_argument("-c", "--config", action=NamedConfig, help="a YAML file; may be given several times")
    parser.add_class_arguments(PlanRequest)
    parser.add_argument("--rows", type=int, default=6, help="settings shown of each model")
    parser.add_argument(
        "--choose", type=int, default=None, help="number of the row to write; by default the first that fit can run"
    )
    parser.add_argument(
        "--write", type=str, default=None, help="where to write the chosen setting as a file for `fomoe fit`"
    )
    parser.add_argument("--json", type=str, default=None, help="where to write all settings as JSON; - for the console")
    parser.add_argument("--plot", type=str, default=None, help="where to draw hours against memory (needs matplotlib)")
    return parser


def plan_all(request: PlanRequest) -> tuple[list[Plan], list[Refusal]]:
    """All models' plans, in the order of the request."""
    plans: list[Plan] = []
    refusals: list[Refusal] = []
    for name, path in names_of(request.models).items():
        settings = read_settings(path)
        kept = {key: settings[key] for key in ("cuda_graphs", "bf16_gradients") if key in settings}
        found, refused = Planner(name, ModelConfig(**settings["architecture"]), request, **kept).results
        plans += found
        refusals += refused
    return plans, refusals


def shown(plans: list[Plan], rows: int) -> list[Plan]:
    """The rows of the table: of each model its fastest plans, see `one_of_each`."""
    first: list[Plan] = []
    for _, group in groupby(one_of_each(plans), key=lambda plan: plan.choice.model):
        first += list(group)[:rows]
    return first


def chosen(rows: list[Plan], number: int | None) -> Plan:
    """The plan to write.

    Raises:
        ConfigError: If there is no such row, or `fomoe fit` cannot run it yet.
    """
    able = [i for i, plan in enumerate(rows, 1) if plan.why_not_today is None]
    if number is None and not able:
        raise ConfigError("write", "", "no setting that was found can be run by `fomoe fit` today", "see the table")
    number = able[0] if number is None else number
    if not 1 <= number <= len(rows):
        raise ConfigError("choose", number, f"is no row of the table ({len(rows)} rows)", f"choose one of {able}")
    if (why := rows[number - 1].why_not_today) is not None:
        raise ConfigError("choose", number, why, f"choose one of {able}")
    return rows[number - 1]


def check_files(options: Namespace) -> None:
    """Refuse files that cannot be written, before any work is done.

    Raises:
        ConfigError: Naming the option.
    """
    for key in ("write", "json", "plot"):
        path = getattr(options, key)
        if path is not None and (key, path) != ("json", "-"):
            prepare(key, Path(path))
    if options.plot is not None:
        if Path(options.plot).suffix not in PLOTS:
            raise ConfigError("plot", options.plot, "has no ending of a picture", f"end it in {', '.join(PLOTS)}")
        if find_spec("matplotlib") is None:
            raise ConfigError("plot", options.plot, "needs matplotlib", how_to_install("plots"))


def run(options: Namespace) -> None:
    """Plan and print."""
    settings = options.as_dict()
    asked = {name: settings[name] for name in PlanRequest.__dataclass_fields__}
    request = PlanRequest(**asked | {"sites": [Site(**site) for site in asked["sites"]]})
    if options.rows < 1:
        raise ConfigError("rows", options.rows, "must be at least 1", "6 is the default")
    check_files(options)
    plans, refusals = plan_all(request)
    rows = shown(plans, options.rows)
    # Never narrower than its table, of which columns would be left out: a terminal wraps lines.
    columns = get_terminal_size().columns if sys.stdout.isatty() else 0
    console = Console(width=max(WIDTH, columns), stderr=settings["json"] == "-", highlight=False)
    for line in answers(list(names_of(request.models)), rows):
        console.print(line)
    if rows:
        console.print(plan_table(rows))
    if refusals:
        console.print(refusal_table(refusals))
    for line in notes(rows, request) if rows else ():
        console.print(line)
    if options.json is not None:
        text = json.dumps(as_json(plans, refusals), indent=1) + "\n"
        if options.json == "-":
            print(text, end="")
        else:
            write_whole(Path(options.json), text)
    if options.plot is not None:
        from fomoe_pl.planner.plot import plot_front

        plot_front(plans, pareto, options.plot)
    if options.write is not None:
        plan = chosen(rows, options.choose)
        model = read_settings(names_of(request.models)[plan.choice.model])
        write_whole(Path(options.write), fit_yaml(plan, request, model))
        console.print(f"wrote {options.write}: row {rows.index(plan) + 1}")


def main(arguments: list[str]) -> None:
    """Entry point: the words after `fomoe plan`."""
    run(make_parser().parse_args(arguments))
