"""The system model against a GPU: predicted and measured peak memory of each part of a run, and seconds of a step.

    check_costs.py memory --case '{"model": "fomoe-54m", "overlap": 1}' '{"model": "fomoe-153m", "sites": 1}'
    check_costs.py step --case '{"model": "fomoe-153m"}' '{"model": "fomoe-153m", "overlap": 1}'

`memory` trains each case with the Trainer and FederatedStrategy, a process for each site, for two rounds of two steps
and a validation of the global model, and reads `torch.cuda.max_memory_allocated` of the steps, of the rounds and of the
validation apart. It starts the processes itself, gives each case `--limit` seconds, and goes on with the next if one
fails. `step` times local steps of one site, in one process; a model's first case calibrates its others.
A case is JSON: `model` is a file of configs/model, `architecture` replaces fields of it; see `Case` for the rest.
A result is printed and added to the file `--output` as soon as it is there.
"""

from __future__ import annotations

import gc
import json
import statistics
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from harness import CLIP_NORM, drawn_on_device, now
from memory_sites import Case, RandomTokens, be_a_site, end_sites_with_this_process, measured

from fomoe_pl.costs.memory import GIB
from fomoe_pl.costs.sites import Site
from fomoe_pl.costs.time import calibration, step_seconds, step_work
from fomoe_pl.federation.placement import place
from fomoe_pl.files import write_whole
from fomoe_pl.model.passes import training_pass
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.optimizer import OptimizerConfig, inner_optimizer


def case_text(case: Case) -> str:
    """A case in words."""
    changed = "".join(f" {name} {value}" for name, value in case.architecture.items())
    where = (" on one GPU" if case.host_wire else "") + (
        ", outer state on the host" if case.outer_state == "host" else ""
    )
    if case.routing != "ghost":
        where += f", {case.routing}" + (f" ({case.shadow_bits} bits)" if case.routing == "shadow" else "")
    if case.ranks > 1:
        where += f", {case.ranks} ranks each, {case.inside}"
    return (f"{case.model}{changed}, overlap {case.overlap or case.sites} of {case.sites} sites{where}, "
            f"batch {case.batch_size}, {case.outer}")  # fmt: skip


def memory_rows(result: dict[str, Any]) -> Iterator[str]:
    """A line for each site of a case."""
    told = case_text(Case(**result["case"]))
    if "problem" in result:
        yield f"{told}: {result['problem']}"
    for site, r in enumerate(result.get("sites", ())):
        ratio = r["predicted_over_measured"]
        parts = ", ".join(
            f"{name} {r['predicted'][name] / GIB:.2f}/{r['peaks'][name] / GIB:.2f}" for name in r["peaks"]
        )
        yield f"{told}, site {site}: predicted/measured GiB: {parts}; peak {ratio and f'{ratio:.4f}'}"


def run_memory(cases: list[Case], output: Path, limit: float) -> None:
    """All cases, in processes that are started here."""
    end_sites_with_this_process()
    results = []
    for result in measured(cases, Path(__file__), limit):
        results.append(result)
        write_whole(output, json.dumps(results, indent=1) + "\n")
        for line in memory_rows(result):
            print(line, flush=True)


def time_steps(case: Case, device: torch.device, *, warmup: int = 3, blocks: int = 5, steps: int = 3) -> list[float]:
    """Seconds a step of the blocks of local steps of site 0, clipping and optimizer included."""
    config = case.config()
    placement = place("fixed", n_layers=config.n_layers, n_experts=config.n_experts, n_sites=case.sites,
                      overlap=case.overlap or case.sites)  # fmt: skip
    with drawn_on_device():
        model = Transformer(config, Residency("ghost", placement.residents(0)), device=device)
    optimizer = inner_optimizer(model, OptimizerConfig())
    batch = {name: t.to(device) for name, t in RandomTokens(config, case, 1)[0].items()}

    def run(n: int) -> float:
        start = now()
        for _ in range(n):
            with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16-mixed"):
                loss = training_pass(model, batch["inputs"], batch["targets"]).total
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
        return (now() - start) / n

    run(warmup)
    return [run(steps) for _ in range(blocks)]


def run_step(cases: list[Case], output: Path, accelerator: str) -> None:
    """Time every case; the first one of each model gives the factor of the model's others."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    site = Site(accelerator=accelerator)
    factors: dict[str, float] = {}
    results = []
    for case in cases:
        name = f"{case.model} {case.architecture}"
        work = step_work(case.config(), case.load(), n_resident=case.resident())
        seconds = time_steps(case, device)
        median = statistics.median(seconds)
        calibrates = name not in factors
        factor = factors.setdefault(name, calibration(work, site, median))
        predicted = step_seconds(work, replace(site, step_factor=factor))
        mfu = work.flops / median / site.peak_flops(case.precision)
        results.append({"case": asdict(case), "resident": case.resident(), "seconds": seconds, "median": median,
                        "calibrates": calibrates, "predicted": predicted, "factor": factor, "mfu": mfu,
                        "work": asdict(work)})  # fmt: skip
        write_whole(output, json.dumps(results, indent=1) + "\n")
        told = "calibrates" if calibrates else f"predicted {predicted * 1e3:.1f}, ratio {predicted / median:.3f}"
        print(f"{case_text(case)}: {median * 1e3:.1f} ms ({min(seconds) * 1e3:.1f}..{max(seconds) * 1e3:.1f}), {told}, "
              f"MFU {mfu:.3f}, factor {factor:.3f}", flush=True)  # fmt: skip
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["memory", "step", "site"],
                        help="peak memory, or seconds of a step; `site` is what `memory` starts")  # fmt: skip
    parser.add_argument("--case", nargs="+", required=True, help="cases in JSON")
    parser.add_argument("--output", type=Path, default=Path("runs/check_costs.json"), help="where results go")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a case of `memory` may take")
    parser.add_argument("--accelerator", default="h100", help="row of the table of data sheets (step)")
    options = parser.parse_args(arguments)
    cases = [Case(**json.loads(text)) for text in options.case]
    if options.what == "site":
        be_a_site(cases)
        return
    gpus = torch.cuda.device_count()
    most = max(1 if case.host_wire or options.what == "step" else case.processes for case in cases)
    if 0 < gpus < most:
        parser.error(f'{most} processes need as many GPUs, and there are {gpus}; with "host_wire": true they share one')
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.what == "memory":
        run_memory(cases, options.output, options.limit)
    else:
        run_step(cases, options.output, options.accelerator)


if __name__ == "__main__":
    main()
