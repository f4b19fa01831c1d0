"""`fomoe plan`: what a federation can train, before anything is rented."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from fomoe_pl.costs.plan import Plan, Planner, Refusal
from fomoe_pl.costs.plan_output import (
    as_json,
    fit_yaml,
    one_of_each,
    pareto,
    plan_table,
    quality_sources,
    refusal_table,
)
from fomoe_pl.costs.request import LAYOUTS, RUNS_TODAY, PlanRequest
from fomoe_pl.costs.sites import Site
from fomoe_pl.errors import ConfigError, config_error_in
from fomoe_pl.model.config import ModelConfig

WIDTH = 150


def read_model(path: str) -> ModelConfig:
    """The architecture of a file of configs/model, or of any file that `fomoe fit` reads.

    Raises:
        ConfigError: if there is none in it.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
        architecture: dict[str, Any] = settings["model"]["architecture"]
        return ModelConfig(**architecture)
    except FileNotFoundError as error:
        raise ConfigError("models", path, "is no file", "name files such as configs/model/fomoe-153m.yaml") from error
    except (KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError("models", path, f"has no usable model.architecture ({error})",
                          "name files such as configs/model/fomoe-153m.yaml") from error  # fmt: skip


class Parser(ArgumentParser):
    """A parser whose errors are one message, and the message of a ConfigError where there is one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and end."""
        found = config_error_in(ex)
        print(f"fomoe: {found or message}", file=sys.stderr)
        raise SystemExit(2)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="fomoe plan",
        description="What a federation can train: settings that fit, ranked by time, and why others do not.",
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file; may be given several times")
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


def plan_all(request: PlanRequest) -> tuple[dict[str, ModelConfig], list[Plan], list[Refusal]]:
    """All models' plans, in the order of the request."""
    configs = {Path(path).stem: read_model(path) for path in request.models}
    plans: list[Plan] = []
    refusals: list[Refusal] = []
    for name, config in configs.items():
        found, refused = Planner(name, config, request).results
        plans += found
        refusals += refused
    return configs, plans, refusals


def shown(plans: list[Plan], rows: int) -> list[Plan]:
    """The rows of the table: of each model its fastest plans, one of each layout, overlap and method."""
    first: list[Plan] = []
    for _, group in groupby(one_of_each(plans), key=lambda plan: plan.choice.model):
        first += list(group)[:rows]
    return first


def chosen(rows: list[Plan], number: int | None) -> Plan:
    """The plan to write.

    Raises:
        ConfigError: if there is no such row, or `fomoe fit` cannot run it yet.
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


def run(options: Namespace) -> None:
    """Plan and print."""
    settings = options.as_dict()
    asked = {name: settings[name] for name in PlanRequest.__dataclass_fields__}
    request = PlanRequest(**asked | {"sites": [Site(**site) for site in asked["sites"]]})
    if options.rows < 1:
        raise ConfigError("rows", options.rows, "must be at least 1", "6 is the default")
    configs, plans, refusals = plan_all(request)
    rows = shown(plans, options.rows)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, stderr=settings["json"] == "-")
    if rows:
        console.print(plan_table(rows))
        console.print(f"batch: micro-batch × accumulation of a site, of all sites' sequences in a step; "
                      "checkpointed: activations are recomputed. sites: "
                      f"{'; '.join(f'{name}, {text}' for name, text in LAYOUTS.items() if name in request.layouts)}. "
                      "Traffic inside a sharded site is not modelled.")  # fmt: skip
        for layout in sorted({p.choice.layout for p in rows if p.why_not_today}):
            console.print(f"fit today: {layout} {RUNS_TODAY[layout]}.")
        for line in quality_sources(rows):
            console.print(line)
    else:
        console.print("Nothing fits.")
    if refusals:
        console.print(refusal_table(refusals))
    if options.json is not None:
        text = json.dumps(as_json(plans, refusals), indent=1)
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text + "\n")
    if options.plot is not None:
        from fomoe_pl.costs.figures import plot_front

        plot_front(plans, pareto, options.plot)
    if options.write is not None:
        plan = chosen(rows, options.choose)
        path = Path(options.write)
        path.parent.mkdir(parents=True, exist_ok=True)
        config = replace(configs[plan.choice.model], activation_checkpointing=plan.checkpointing)
        path.write_text(fit_yaml(plan, request, config))
        console.print(f"wrote {path}: row {rows.index(plan) + 1}")


def main(arguments: list[str]) -> None:
    """Entry point: the words after `fomoe plan`."""
    run(make_parser().parse_args(arguments))
