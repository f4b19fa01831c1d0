"""What TensorBoard shows besides the curves: charts that group them, and the run in words."""

import re
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from fomoe_pl.callbacks.communication import training_bytes, wire_bytes
from fomoe_pl.callbacks.observed import observed_module, observed_strategy
from fomoe_pl.callbacks.stability import RoundView, stability_of
from fomoe_pl.costs.memory import MIB
from fomoe_pl.model.sizes import active_parameters, parameter_counts

# Group -> chart -> tag. One tag a chart: each of several runs is one line in its colour.
CHARTS: dict[str, dict[str, str]] = {
    "1 Quality": {
        "bits per byte": "val/bits_per_byte",
        "validation loss (nats a token)": "val/loss",
        "training loss, mean of the sites (nats a token)": "round/train_loss",
        "what routing is worth (nats a token)": "val/routing_necessity_nats",
        "what a site's own view lacks (nats a token)": "val/own_view_gap_nats",
    },
    "2 Are experts alive?": {
        "load entropy (1 = even)": "routing/load_entropy/mean",
        "load entropy in validation (1 = even)": "val/load_entropy",
        "MaxVio (0 = even)": "routing/max_violation/mean",
        "starved experts of a layer": "routing/starved_experts/mean",
        "load entropy of live experts (1 = even)": "routing/live_load_entropy/mean",
        "starved live experts of a layer": "routing/live_starved_experts/mean",
        "ghost fraction": "routing/ghost_fraction/mean",
        "ghost fraction beyond even routing": "routing/ghost_excess/mean",
        "picks that copies served (share)": "routing/copy_fraction/mean",
        "picks that copies served beyond even routing": "routing/copy_excess/mean",
    },
    "3 Is the router settled?": {
        "churn: picks changed since the last look (share)": "routing/churn/mean",
        "picks that an average changes (share)": "routing/sync_jump/mean",
        "saturation (share of the last picks)": "routing/saturation/mean",
        "median gate of the picks": "routing/gate_q50/mean",
        "gate entropy (1 = undecided)": "routing/gate_entropy/mean",
        "similarity of router rows (cosine)": "routing/row_similarity/mean",
        "domain information of a pick (bits)": "val/domain_information_bits",
    },
    "4 Do sites stay together?": {
        "agreement of routers before averaging": "routing/site_agreement/mean",
        "drift of holders (relative)": "routing/drift/mean",
        "drift of dense parameters (relative)": "pseudo_gradient/dense_drift",
        "cosine of experts' pseudo-gradients": "routing/drift_cosine/mean",
        "cosine of dense pseudo-gradients": "pseudo_gradient/dense_cosine",
        "norm of the averaged dense pseudo-gradient": "pseudo_gradient/dense_norm",
        "probe loss before averaging (nats)": "routing/probe_loss_local_nats",
        "probe loss after averaging (nats)": "routing/probe_loss_nats",
        "error of copies (relative)": "routing/copy_error/mean",
        "age of copies (rounds)": "routing/copy_age_rounds",
    },
    "5 Communication": {
        "sent for training by site 0 (MiB)": "comm/training_wire_MiB",
        "sent, over full replicas": "comm/of_replica",
        "sent, over DDP": "comm/of_ddp",
        "share of time in synchronisation": "comm/sync_share",
    },
    "6 Speed and memory": {
        "tokens a second of a site": "throughput/with_sync_tokens_per_s",
        "tokens a second without synchronisation": "throughput/local_tokens_per_s",
        "TFLOP/s, skipped picks counted": "throughput/nominal_TFLOP_per_s",
        "peak memory (MiB)": "memory/peak_MiB",
    },
}


def layout(trainer: Trainer, pl_module: LightningModule) -> dict[str, dict[str, list[Any]]]:
    """The charts as `SummaryWriter.add_custom_scalars` takes them, without those that this run leaves empty.

    TensorBoard shows charts of several runs as one only if they are the same. Domains have a chart each; single layers
    are in the tab "Scalars" and in the pictures.
    """
    absent = absent_tags(trainer, pl_module)
    found: dict[str, dict[str, list[Any]]] = {}
    for group, charts in CHARTS.items():
        for chart, tag in charts.items():
            if not tag.startswith(absent):
                found.setdefault(group, {})[chart] = ["Multiline", [_pattern(tag)]]
    for domain in getattr(getattr(trainer, "datamodule", None), "domains", ()):
        tag = f"val/bits_per_byte/{domain}"
        found["1 Quality"][f"bits per byte of {domain}"] = ["Multiline", [_pattern(tag)]]
    stability = stability_of(trainer)
    for own in stability.own_statistics if stability else ():
        tags = [_pattern(f"statistic/{own.name}/mean")]
        found.setdefault("7 Your own", {})[f"{own.name} ({own.unit})"] = ["Multiline", tags]
    return found


def absent_tags(trainer: Trainer, pl_module: LightningModule) -> tuple[str, ...]:
    """Beginnings of the tags that a run of this kind never writes."""
    strategy, module = observed_strategy(trainer), observed_module(pl_module)
    residency, placement = module.transformer.residency, strategy.placement
    stability = stability_of(trainer)
    absent: list[str] = []
    if stability is None:
        absent += ["routing/", "pseudo_gradient/"]
    elif not stability.probe_sequences:
        absent += [
            f"routing/{name}" for name in ("churn", "sync_jump", "saturation", "gate_q", "row_", "site_", "probe")
        ]
    if stability is None or not stability.other_views_every:
        absent += ["val/routing_necessity", "val/own_view_gap"]
    if not strategy.has_rounds:
        absent += [f"routing/{name}" for name in ("sync_jump", "site_agreement", "drift", "probe_loss_local")]
        absent += ["pseudo_gradient/", "round/", "comm/replica", "comm/of_replica", "comm/sync_share"]
    if not strategy.measures_sync:
        absent += ["throughput/local"]
    if residency.is_full(module.config):
        absent += ["val/own_view_gap"]
    full = residency.is_full(module.config)
    if full or residency.routing != "ghost":
        absent += ["routing/ghost_"]
    if full or residency.routing != "shadow":
        absent += ["routing/copy_"]
    if placement is not None and all(len(sites) == 1 for sites in placement.holder_sets()):
        absent += ["routing/drift"]
        absent += ["routing/site_agreement"] if residency.routing == "partitioned" else []
    if strategy.topology.n_sites == 1:
        absent += ["routing/site_agreement", "pseudo_gradient/dense_drift", "pseudo_gradient/dense_cosine"]
        absent += [f"comm/{name}" for name in ("ddp", "replica", "of_")]
    return tuple(absent)


def _pattern(tag: str) -> str:
    return f"^{re.escape(tag)}$"


def introduction(trainer: Trainer, pl_module: LightningModule, configuration: str | None) -> str:
    """Markdown: method, model, and the configuration as it was saved."""
    strategy, config = observed_strategy(trainer), observed_module(pl_module).config
    counts = parameter_counts(config)
    rows = {
        "method": strategy.describe(),
        "model": f"{config.n_layers} layers, width {config.d_model}, {config.n_experts} experts of which "
        f"{config.top_k} are picked, vocabulary {config.vocab_size:,}",
        "parameters": f"{counts.total:,} in all, {active_parameters(config):,} for a token, "
        f"{sum(p.numel() for p in pl_module.parameters()):,} on this site",
        "experts' share": f"{counts.experts / counts.total:.0%}",
    }
    text = _table(rows)
    return text if configuration is None else f"{text}\n\n```yaml\n{configuration}\n```"


def final_values(trainer: Trainer, view: RoundView | None) -> dict[str, float]:
    """Numbers of a run that has ended, by `final/<name>`."""
    strategy = observed_strategy(trainer)
    values = {"final/training_wire_MiB": training_bytes(wire_bytes(strategy.counted)) / MIB}
    for name in ("bits_per_byte", "loss"):
        if f"val/{name}" in trainer.callback_metrics:
            values[f"final/{name}"] = float(trainer.callback_metrics[f"val/{name}"])
    for name in ("load_entropy", "starved_experts", "ghost_excess", "copy_excess"):
        if view is not None and f"routing/{name}/mean" in view.values:
            values[f"final/{name}"] = view.values[f"routing/{name}/mean"]
    return values


def columns(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Settings as columns of the tab HParams, which shows the first five: those by which methods differ."""
    strategy, hparams = observed_strategy(trainer), dict(pl_module.hparams)
    settings = strategy.hyperparameters
    first = {
        "1 K": settings.get("local_steps"), "2 overlap": settings.get("overlap"), "3 routing": settings.get("routing"),
        "4 rate": hparams.get("optimizer", {}).get("lr"), "5 seed": hparams.get("seed"),
    }  # fmt: skip
    told = {name: value for name, value in first.items() if value is not None}
    return {**told, "method": strategy.describe(), **settings, **hparams}


def summary(trainer: Trainer, values: dict[str, float]) -> str:
    """Markdown: the results."""
    strategy = observed_strategy(trainer)
    rows = {"steps of a site": f"{trainer.global_step:,}", "rounds": f"{strategy.rounds_done:,}"}
    rows |= {name.removeprefix("final/"): f"{value:,.4g}" for name, value in values.items()}
    return _table(rows)


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
