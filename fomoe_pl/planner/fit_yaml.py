"""A plan as a file that `fomoe fit` runs."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import yaml

from fomoe_pl.costs.memory import GIB, MIB
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.sizes import parameter_counts
from fomoe_pl.planner.choices import Plan
from fomoe_pl.planner.output import quality_text
from fomoe_pl.planner.plan import INSIDE
from fomoe_pl.planner.request import PlanRequest

_NESTEROV = {"class_path": "fomoe_pl.federation.outer.Nesterov", "init_args": {"lr": 0.7, "momentum": 0.9}}
OBSERVERS = ("CommunicationMonitor", "ThroughputMonitor", "FoMoEProgressBar", "RunReport")


def processes(plan: Plan, request: PlanRequest) -> tuple[int, int]:
    """Devices of a node and number of nodes; the greatest common divisor of the sites', so that all nodes are alike."""
    if plan.choice.layout == "one":
        return (1, len(request.sites)) if request.accelerator == "gpu" else (len(request.sites), 1)
    # Written out, the divisor of 8, 8 and 4 is 4: the larger sites start two nodes.
    devices = min(site.devices for site in request.sites)
    while any(site.devices % devices for site in request.sites):
        devices -= 1
    total = sum(site.devices for site in request.sites)
    return (devices, total // devices) if request.accelerator == "gpu" else (total, 1)


def fit_settings(plan: Plan, request: PlanRequest, model: dict[str, Any]) -> dict[str, Any]:
    """Settings of `fomoe fit` for a plan that it can run.

    Args:
        plan: What is written.
        request: The request.
        model: The `model` section of the model's file; settings that are not planned are kept.
    """
    c, batches = plan.choice, plan.site_batches
    inside = INSIDE.get(c.layout)
    ranks: int | list[int] = plan.ranks[0] if len(set(plan.ranks)) == 1 else list(plan.ranks)
    several = {"ranks_per_site": ranks, "inside": inside} if max(plan.ranks) > 1 else {}
    alike = len(set(batches)) == 1
    devices, nodes = processes(plan, request)
    strategy: Any = "ddp_counted" if c.sites > 1 else "single_site"
    if c.method != "ddp":
        nesterov = c.method == "diloco"
        copies = {"shadow_bits": request.shadow_bits, "shadow_refresh": request.shadow_refresh}
        codes = {"wire_codec": c.wire_codec, "error_feedback": True}
        moments = {"moments_codec": c.moments_codec, "moments_every": c.moments_every}
        strategy = {
            "class_path": "fomoe_pl.strategies.FederatedStrategy",
            "init_args": {
                **several,
                "overlap": c.overlap,
                **({"capacities": list(c.capacities)} if c.capacities else {}),
                "routing": c.routing,
                **(copies if c.routing == "shadow" else {}),
                "placement": "fixed",
                **({} if alike else {"weighting": "tokens"}),
                "local_steps": c.local_steps,
                **({"fragments": c.fragments, "delay": c.delay} if c.fragments > 1 or c.delay else {}),
                **({"router_every": c.router_every} if c.router_every else {}),
                "outer": _NESTEROV if nesterov else None,
                "inner_moments": "average" if c.averages_moments else "keep",
                **(moments if c.averages_moments else {}),
                "wire_dtype": c.cast_dtype,
                **(codes if c.wire_codec else {}),
                "bucket_mib": request.bucket_mib,
                "outer_state": plan.saving.outer_state,
            },
        }
    name = f"plan_{c.model}_{c.layout}_overlap{c.overlap}_{c.method}"
    name = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
    architecture = asdict(ModelConfig(**model["architecture"])) | {
        "activation_checkpointing": plan.saving.checkpointing
    }
    defaults = {f.name: f.default for f in fields(ModelConfig)}
    return {
        "seed_everything": 42,
        "trainer": {
            "accelerator": request.accelerator,
            "devices": devices,
            "num_nodes": nodes,
            "precision": request.precision,
            "max_steps": plan.length.steps,
            "max_epochs": -1,
            "accumulate_grad_batches": plan.accumulate,
            "val_check_interval": plan.length.every * plan.accumulate,
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
                        "every_n_train_steps": plan.length.every,
                        "enable_version_counter": False,
                    },
                },
                *({"class_path": f"fomoe_pl.callbacks.{observer}"} for observer in OBSERVERS),
            ],
        },
        "model": {
            **({"compile_blocks": True} if request.accelerator == "gpu" and c.method != "ddp" else {}),
            **model,
            "architecture": {name: value for name, value in architecture.items() if value != defaults[name]},
            "evaluation_window": request.evaluation_window,
        },
        "data": {
            "root": request.data_root,
            "sequence_length": request.sequence_length,
            "batch_size": batches[0] if alike else list(batches),
            "val_batch_size": plan.val_batch,
            "val_sequences": request.val_sequences,
        },
    }


def fit_yaml(plan: Plan, request: PlanRequest, model: dict[str, Any]) -> str:
    """A file for `fomoe fit -c`, with the plan's figures and the start command in comments."""
    devices, nodes = processes(plan, request)
    start = "fomoe fit -c THIS_FILE"
    if nodes > 1:
        start = (f"torchrun --nnodes {nodes} --nproc_per_node {devices} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
                 "-m fomoe_pl fit -c THIS_FILE")  # fmt: skip
    total = parameter_counts(ModelConfig(**model["architecture"])).total
    on_host = f" and {plan.on_host / GIB:.1f} GiB of its host's memory" if plan.on_host else ""
    lines = [
        f"Planned: {total / 1e6:,.0f} million parameters, {plan.length.steps:,} steps of {plan.global_batch:,} "
        f"sequences, {plan.tokens:,} tokens, {plan.hours:,.1f} hours with {plan.length.validations} validations, "
        f"{max(plan.held_bytes) / GIB:.1f} GiB a device{on_host}, {plan.sent_per_round / MIB:,.0f} MiB from a site "
        f"{'a step' if plan.choice.method == 'ddp' else 'a round'}; quality: {quality_text(plan)}.",
        f"Start it, on each node: {start}",
    ]
    per_place = [site.devices // devices for site in request.sites]
    if plan.choice.layout != "one" and max(per_place) > 1 and nodes > 1:
        nodes_of = ", ".join(f"{site.name} {n}" for site, n in zip(request.sites, per_place, strict=True))
        lines.append(f"All nodes have {devices} devices: nodes to start at each site: {nodes_of}, with other "
                     "devices in CUDA_VISIBLE_DEVICES.")  # fmt: skip
    if nodes > 1 and (plan.choice.capacities or len(set(plan.ranks)) > 1 or len(set(plan.site_batches)) > 1):
        lines.append("Settings are of each site: number the nodes in their order, with --node_rank and --master_addr "
                     "in place of --rdzv-backend and --rdzv-endpoint.")  # fmt: skip
    lines.append("The corpus in data.root must have the model's vocabulary.")
    body = yaml.safe_dump(fit_settings(plan, request, model), sort_keys=False)
    return "".join(f"# {line}\n" for line in lines) + body
