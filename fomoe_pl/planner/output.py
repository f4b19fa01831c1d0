"""The planner's output: tables, notes, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fomoe_pl.costs.memory import GIB, MIB
from fomoe_pl.costs.sites import Site
from fomoe_pl.planner.choices import Plan, Refusal
from fomoe_pl.planner.request import LAYOUTS, PlanRequest

OF_OTHER_SHAPE = ("choice", "saving", "length", "memory", "quality")


def quality_text(plan: Plan) -> str:
    """The penalty and the model that it was measured on, or "reference", or "not measured"."""
    found = plan.quality
    if found is None:
        return "not measured"
    if found.overlap == found.sites:
        return f"reference, {found.value:g} {found.metric} of {found.model}"
    return f"{found.penalty:+.1%} {found.metric} of {found.model}"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto front of pairs, smaller being better, ordered by the first number."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    front: list[int] = []
    for i in order:
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def pareto(plans: Sequence[Plan]) -> list[Plan]:
    """The Pareto front of hours and the largest device's bytes, fastest first."""
    return [plans[i] for i in pareto_front([(plan.hours, max(plan.held_bytes)) for plan in plans])]


def one_of_each(plans: Sequence[Plan]) -> list[Plan]:
    """The fastest plan of each model, layout, overlap, method and kind of routing, and the fastest that was measured.

    Shadow routing is listed apart: sites without copies are always faster, and worse. So are unlike capacities.
    """
    seen: dict[tuple[Any, ...], Plan] = {}
    for plan in plans:
        c = plan.choice
        kind = c.routing == "shadow", c.capacities is None, plan.quality is None
        seen.setdefault((c.model, c.layout, c.overlap, c.method, *kind), plan)
    return list(seen.values())


def each_or_all(numbers: Sequence[int]) -> str:
    """One number of all places, or one for each place."""
    return str(numbers[0]) if len(set(numbers)) == 1 else "/".join(map(str, numbers))


def setting_text(plan: Plan) -> str:
    """A plan's choice in words."""
    c = plan.choice
    wire = c.wire_dtype if c.moments_every == 1 else f"{c.wire_dtype}, moments every {c.moments_every} rounds"
    turns = f", {c.fragments} fragments" if c.fragments > 1 else ""
    turns += f", delay {c.delay}" if c.delay else ""
    saved = "" if plan.saving.checkpointing == "none" else f", {plan.saving.checkpointing} checkpointed"
    if plan.saving.outer_state == "host":
        saved += f", outer state on the host ({plan.on_host / GIB:.1f} GiB a device)"
    ranks = "" if max(plan.ranks) == 1 else f" of {each_or_all(plan.ranks)}"
    held = f", experts {each_or_all(plan.held_experts)}" if c.capacities else ""
    return (
        f"{c.sites} sites{ranks} ({c.layout}), overlap {c.overlap}{held}, {c.method}, K {c.local_steps}{turns}, "
        f"{c.routing}, {wire}, batch {each_or_all(plan.batches)}×{plan.accumulate} of {plan.global_batch}{saved}"
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
    cost = ["cost"] if priced else []
    for name in ("GiB a\ndevice", "MiB a\nround", "GiB a\nsave", "GiB in\nall", "step\n(s)", "round\n(s)", "hours",
                 *cost):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("quality", min_width=8, max_width=16)
    table.add_column("fit\ntoday", no_wrap=True)
    for i, plan in enumerate(plans, 1):
        cost = ["-" if plan.price is None else f"{plan.price:,.0f}"] if priced else []
        table.add_row(
            str(i), plan.choice.model, setting_text(plan), f"{max(plan.held_bytes) / GIB:.1f}",
            f"{plan.sent_per_round / MIB:,.0f}", f"{plan.checkpoint['total'] / GIB:,.1f}",
            f"{plan.sent_in_all / GIB:,.1f}", f"{plan.step_seconds:.2f}", f"{plan.round_seconds:,.1f}",
            f"{plan.hours:,.1f}", *cost, quality_text(plan),
            "no" if plan.why_not_today else "yes",
        )  # fmt: skip
    return table


def speed_text(site: Site) -> str:
    """How a site's step time is estimated."""
    by = f"{site.mfu:.0%} of the peak" if site.step_factor is None else f"measured factor {site.step_factor:g}"
    return f"{site.name} {by}"


def saves_text(request: PlanRequest) -> str:
    """What of a save crosses links."""
    if request.checkpoint_copies is not None:
        return "on disks of the sites' own, of which copies beyond the holders' cross links"
    if request.checkpoint_over_link:
        return "what each site writes crosses its link, in hours and GiB in all"
    return "in a folder that all sites reach without their links"


def notes(plans: Sequence[Plan], request: PlanRequest) -> list[str]:
    """Notes below the table."""
    layouts = "; ".join(f"{name}, {text}" for name, text in LAYOUTS.items() if name in request.layouts)
    lines = [
        f"hours: steps at {', '.join(speed_text(site) for site in request.sites)}. A share of the peak (mfu) is "
        "an assumption until a step is measured: `tools/benchmarks/check_costs.py step` prints the `step_factor`.",
        "hours and GiB in all: with "
        f"{' or '.join(str(n) for n in sorted({plan.length.validations for plan in plans}))} validations of "
        f"{request.val_sequences} sequences. MiB a round: what leaves the busiest site every K steps; ddp, whose K is "
        "1: every step.",
        "batch: micro-batch of a device (of each place, where they differ) × accumulation, of all sites' sequences in "
        f"a step; checkpointed: activations are recomputed. sites: {layouts}.",
        f"GiB a save: on disk; {saves_text(request)}.",
    ]
    if any(max(plan.ranks) > 1 for plan in plans):
        lines.append("step: with what devices of a site send each other, at half of inside_gbps, nothing of it hidden; "
                     "that steps of several ranks are not recorded as CUDA graphs is not counted.")  # fmt: skip
    if any(plan.choice.capacities for plan in plans):
        lines.append("experts: of a layer at each place, by the room of its devices.")
    if any(plan.saving.outer_state == "host" for plan in plans):
        lines.append("outer state on the host: anchors, outer momentum and what coding has lost, page-locked, for "
                     "which torch may take up to twice as much; a save takes a snapshot of all that it writes there "
                     "(`async_save: false`: none). Whether the host has that much is not checked.")  # fmt: skip
    if any(plan.choice.routing == "shadow" for plan in plans):
        often = "every round" if request.shadow_refresh == 1 else f"every {request.shadow_refresh} rounds"
        lines.append(f"shadow: picks of absent experts are computed with copies of {request.shadow_bits} bits, "
                     f"refreshed {often}; ghost: they are skipped.")  # fmt: skip
    if any(plan.choice.wire_codec for plan in plans):
        lines.append("int8, int4, topk: changes in that code with error feedback, averaged moments in int8; norms, "
                     "routers and biases in float32.")  # fmt: skip
    for layout, why in sorted({(p.choice.layout, p.why_not_today) for p in plans if p.why_not_today}):
        lines.append(f"fit today: {layout} {why}.")
    measured = {(p.quality.model, p.quality.source) for p in plans if p.quality is not None}
    lines += [f"quality of {model}: {source}" for model, source in sorted(measured)]
    if any(plan.quality is None for plan in plans):
        lines.append("quality: not measured with the same method, routing, sites, overlap and K, a float32 wire and "
                     "moments averaged every round.")  # fmt: skip
    return lines


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers with ranges: `1-4, 6`."""
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
    for name, width in (("model", 12), ("devices", 9), ("method", 13), ("overlap", 11), ("why", None)):
        table.add_column(name, max_width=width)
    for models, layouts, refusal in merged(refusals):
        table.add_row(
            ", ".join(models), ", ".join(layouts), ", ".join(refusal.methods), spans(refusal.overlaps), refusal.reason
        )
    return table


def merged(refusals: Sequence[Refusal]) -> list[tuple[list[str], list[str], Refusal]]:
    """Group refusals that differ only in layout, then only in model: (models, layouts, one of them)."""
    layouts: dict[Refusal, list[str]] = {}
    for refusal in refusals:
        layouts.setdefault(replace(refusal, layout="one"), []).append(refusal.layout)
    models: dict[tuple[Refusal, tuple[str, ...]], list[str]] = {}
    for refusal, found in layouts.items():
        models.setdefault((replace(refusal, model=""), tuple(found)), []).append(refusal.model)
    return [(names, list(found), refusal) for (refusal, found), names in models.items()]


def answers(models: Sequence[str], rows: Sequence[Plan]) -> list[str]:
    """One line for each model: whether it can be trained.

    Args:
        models: Names of all that were asked for.
        rows: Of the table.
    """
    lines = []
    for model in models:
        own = [(i, plan) for i, plan in enumerate(rows, 1) if plan.choice.model == model]
        today = [(i, plan) for i, plan in own if plan.why_not_today is None]
        if today:
            row, plan = today[0]
            lines.append(f"{model}: yes, in {plan.hours:,.1f} hours (row {row})")
        elif own:
            row, plan = own[0]
            lines.append(f"{model}: not with `fomoe fit` today; it would take {plan.hours:,.1f} hours (row {row}), but "
                         f"{plan.choice.layout} {plan.why_not_today}")  # fmt: skip
        else:
            lines.append(f"{model}: no, see what does not fit")
    return lines


def as_json(plans: Sequence[Plan], refusals: Sequence[Refusal]) -> dict[str, Any]:
    """Everything, in bytes, seconds and hours."""
    return {
        "layouts": LAYOUTS,
        "plans": [
            asdict(plan.choice)
            | plan.saving._asdict()
            | {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in OF_OTHER_SHAPE}
            | {
                "steps": plan.length.steps,
                "validations": plan.length.validations,
                "held_bytes": plan.held_bytes,
                "memory": [asdict(memory) | {"peak": memory.peak} for memory in plan.memory],
                "quality": quality_text(plan),
                "quality_source": None if plan.quality is None else plan.quality.source,
                "why_not_today": plan.why_not_today,
            }
            for plan in plans
        ],
        "refused": [asdict(refusal) for refusal in refusals],
    }
