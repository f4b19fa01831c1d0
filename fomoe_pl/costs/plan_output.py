"""What the planner says: a table, JSON, and a YAML file that `fomoe fit` accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fomoe_pl.costs.memory import GIB, MIB
from fomoe_pl.costs.pareto import pareto_front
from fomoe_pl.costs.plan import Plan, Refusal
from fomoe_pl.costs.quality import Measurement
from fomoe_pl.costs.request import LAYOUTS, PlanRequest
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.sizes import parameter_counts


def quality_text(plan: Plan) -> str:
    """The penalty and the model that it was measured on, `reference` for full replicas, or that nobody measured it."""
    found = plan.quality
    if found is None:
        return "not measured"
    if isinstance(found, Measurement):
        return f"{found.penalty:+.1%} {found.metric} of {found.model}"
    return "reference"


def quality_sources(plans: Sequence[Plan]) -> list[str]:
    """Where the penalties of these plans are from."""
    found = {(p.quality.model, p.quality.source) for p in plans if isinstance(p.quality, Measurement)}
    return [f"quality of {model}: {source}" for model, source in sorted(found)]


def pareto(plans: Sequence[Plan]) -> list[Plan]:
    """Plans than which none is both faster and smaller: hours against the largest device's bytes; fastest first."""
    return [plans[i] for i in pareto_front([(plan.hours, max(plan.held_bytes)) for plan in plans])]


def one_of_each(plans: Sequence[Plan]) -> list[Plan]:
    """The fastest plan of each model, layout, overlap and method."""
    seen: dict[tuple[Any, ...], Plan] = {}
    for plan in plans:
        c = plan.choice
        seen.setdefault((c.model, c.layout, c.overlap, c.method), plan)
    return list(seen.values())


def setting_text(plan: Plan) -> str:
    """A plan's choice in words."""
    c = plan.choice
    checkpointed = ", checkpointed" if plan.checkpointing else ""
    return (
        f"{c.sites} sites ({c.layout}), overlap {c.overlap}, {c.method}, K {c.local_steps}, {c.routing}, "
        f"{c.wire_dtype}, batch {plan.batch_size}×{plan.accumulate} of {plan.global_batch}{checkpointed}"
    )


def plan_table(plans: Sequence[Plan]) -> Table:
    """Numbered plans as a table; with a column for cost if there are prices."""
    table = Table(
        title="Settings that fit, fastest first for each model", title_justify="left", box=SIMPLE_HEAD,
        collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("model", no_wrap=True)
    table.add_column("setting", min_width=24)
    priced = any(plan.price is not None for plan in plans)
    for name in ("GiB a\ndevice", "MiB a\nround", "step\n(s)", "round\n(s)", "hours", *(["cost"] if priced else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("quality", min_width=8, max_width=16)
    table.add_column("fit\ntoday", no_wrap=True)
    for i, plan in enumerate(plans, 1):
        cost = ["-" if plan.price is None else f"{plan.price:,.0f}"] if priced else []
        table.add_row(
            str(i), plan.choice.model, setting_text(plan), f"{max(plan.held_bytes) / GIB:.1f}",
            f"{plan.sent_per_round / MIB:,.0f}", f"{plan.step_seconds:.2f}", f"{plan.round_seconds:,.1f}",
            f"{plan.hours:,.1f}", *cost, quality_text(plan), "no" if plan.why_not_today else "yes",
        )  # fmt: skip
    return table


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: `1-4, 6`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def refusal_table(refusals: Sequence[Refusal]) -> Table:
    """What does not fit, and why."""
    table = Table(title="What does not fit", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "devices", "overlap", "why"):
        table.add_column(name)
    for refusal in refusals:
        table.add_row(refusal.model, refusal.layout, spans(refusal.overlaps), refusal.reason)
    return table


def as_json(plans: Sequence[Plan], refusals: Sequence[Refusal]) -> dict[str, Any]:
    """Everything, in bytes, seconds and hours."""
    return {
        "layouts": LAYOUTS,
        "plans": [
            asdict(plan.choice)
            | {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in ("choice", "memory", "quality")}
            | {
                "memory": asdict(plan.memory) | {"peak": plan.memory.peak},
                "quality": quality_text(plan),
                "quality_source": plan.quality.source if isinstance(plan.quality, Measurement) else None,
                "why_not_today": plan.why_not_today,
            }
            for plan in plans
        ],
        "refused": [asdict(refusal) for refusal in refusals],
    }


def processes(plan: Plan, request: PlanRequest) -> tuple[int, int]:
    """Devices of a node and number of nodes: with `each` the greatest common divisor, so that all nodes are alike."""
    if plan.choice.layout == "one":
        return (1, len(request.sites)) if request.accelerator == "gpu" else (len(request.sites), 1)
    # Written out, the divisor of 8, 8 and 4 is 4: the larger sites start two nodes.
    devices = min(site.devices for site in request.sites)
    while any(site.devices % devices for site in request.sites):
        devices -= 1
    total = sum(site.devices for site in request.sites)
    return (devices, total // devices) if request.accelerator == "gpu" else (total, 1)


def fit_settings(plan: Plan, request: PlanRequest, config: ModelConfig) -> dict[str, Any]:
    """Settings of `fomoe fit` for a plan that it can run."""
    c = plan.choice
    devices, nodes = processes(plan, request)
    k = c.local_steps * plan.accumulate
    rounds = -(-plan.steps // c.local_steps)
    every = max(1, rounds // 10)  # ten validations and checkpoints, at the ends of rounds
    strategy: Any = "ddp_counted"
    if c.method != "ddp":
        nesterov = c.method == "diloco"
        strategy = {
            "class_path": "fomoe_pl.strategies.FederatedStrategy",
            "init_args": {
                "overlap": c.overlap,
                "routing": c.routing,
                "placement": "fixed",
                "local_steps": c.local_steps,
                "outer": {"rule": "nesterov", "lr": 0.7, "momentum": 0.9} if nesterov else {"rule": "average"},
                "inner_moments": "average" if c.method == "local_adamw" else "keep",
                "wire_dtype": c.wire_dtype,
            },
        }
    name = f"plan_{c.model}_{c.layout}_overlap{c.overlap}_{c.method}"
    observers = ("CommunicationMonitor", "ThroughputMonitor", "FoMoEProgressBar", "RunReport")
    architecture = asdict(config) | {"activation_checkpointing": plan.checkpointing}
    defaults = {f.name: f.default for f in fields(ModelConfig)}
    return {
        "seed_everything": 42,
        "trainer": {
            "accelerator": request.accelerator,
            "devices": devices,
            "num_nodes": nodes,
            "precision": request.precision,
            "max_steps": plan.steps,
            "max_epochs": -1,
            "accumulate_grad_batches": plan.accumulate,
            "val_check_interval": every * k,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "gradient_clip_val": 1.0,
            "strategy": strategy,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": "runs", "name": name, "version": ""},
            },
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "filename": "last",
                        "every_n_train_steps": every * c.local_steps,
                        "enable_version_counter": False,
                    },
                },
                *({"class_path": f"fomoe_pl.callbacks.{observer}"} for observer in observers),
            ],
        },
        "model": {
            "architecture": {name: value for name, value in architecture.items() if value != defaults[name]},
            "evaluation_window": request.evaluation_window,
        },
        "data": {
            "root": request.data_root,
            "sequence_length": request.sequence_length,
            "batch_size": plan.batch_size,
            "val_batch_size": plan.batch_size,
        },
    }


def fit_yaml(plan: Plan, request: PlanRequest, config: ModelConfig) -> str:
    """A file for `fomoe fit -c`, with what the plan says of it, and how it is started, in comments."""
    devices, nodes = processes(plan, request)
    start = "fomoe fit -c THIS_FILE"
    if nodes > 1:
        start = (f"torchrun --nnodes {nodes} --nproc_per_node {devices} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
                 "-m fomoe_pl fit -c THIS_FILE")  # fmt: skip
    lines = [
        f"Planned: {parameter_counts(config).total / 1e6:,.0f} million parameters, {plan.steps:,} steps of "
        f"{plan.global_batch:,} sequences, {plan.tokens:,} tokens, {plan.hours:,.1f} hours, "
        f"{max(plan.held_bytes) / GIB:.1f} GiB a device, {plan.sent_per_round / MIB:,.0f} MiB from a site a round; "
        f"quality against full replicas: {quality_text(plan)}.",
        f"Start it, on each node: {start}",
    ]
    per_site = [site.devices // devices for site in request.sites]
    if plan.choice.layout == "each" and max(per_site) > 1 and nodes > 1:
        nodes_of = ", ".join(f"{site.name} {n}" for site, n in zip(request.sites, per_site, strict=True))
        lines.append(f"All nodes have {devices} devices: sites start so many nodes each ({nodes_of}), with other "
                     "devices in CUDA_VISIBLE_DEVICES.")  # fmt: skip
    lines.append("The corpus in data.root must have the model's vocabulary.")
    body = yaml.safe_dump(fit_settings(plan, request, config), sort_keys=False)
    return "".join(f"# {line}\n" for line in lines) + body
