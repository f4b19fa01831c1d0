"""One of several sites whose model is cut among all GPUs of this host: what it trains, how fast, in how much memory.

    torchrun --standalone --nproc-per-node 2 tools/benchmarks/sharded_site.py -c configs/model/fomoe-13.3b.yaml \
      --sites 4 --overlap 1 --output runs/sharded_site

The site has its share of the experts, anchors, and AdamW's moments. Its peers are not there: a sum over the sites is
this site's own values times their number. All else of steps and rounds is what a run does.
"""

from __future__ import annotations

import os
import statistics
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from harness import CLIP_NORM, SITE_TIMEOUT, Report, drawn_on_device, markdown, now, random_tokens, read
from model_site import MirrorTransport
from torch.distributed.device_mesh import DeviceMesh

from fomoe_pl.costs.flops import token_flops
from fomoe_pl.costs.memory import GIB, Load, rank_memory
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.inside import Inside
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.outer import Average
from fomoe_pl.federation.placement import place
from fomoe_pl.federation.topology import Topology
from fomoe_pl.model.config import Checkpointing, ModelConfig
from fomoe_pl.model.parallel import shard
from fomoe_pl.model.passes import training_pass
from fomoe_pl.model.residency import Residency, Routing, Shadow, ShadowBits
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.optimizer import OptimizerConfig, clip_next_step, inner_optimizer, norm_or_skip
from fomoe_pl.slices import take_gradients
from fomoe_pl.strategies.federated import copies_of

H200_FLOPS = 989e12
"""Of bfloat16, dense: what MFU is a share of."""


def bench(
    architecture: ModelConfig,
    output: str,
    sites: int = 4,
    overlap: int = 1,
    shadow_bits: ShadowBits | None = None,
    activation_checkpointing: Checkpointing | None = None,
    batch_size: int = 4,
    sequence_length: int = 2048,
    local_steps: int = 4,
    rounds: int = 3,
    compile_blocks: bool = True,
    accelerator: Literal["gpu", "cpu"] = "gpu",
) -> dict[str, Any] | None:
    """Train for a few rounds; the first rank writes and prints what came of it.

    Args:
        architecture: The model.
        output: Folder for results.
        sites: M.
        overlap: Sites that hold each expert.
        shadow_bits: Of copies that compute picks of absent experts; null skips these.
        activation_checkpointing: What is recomputed; null is the model's.
        batch_size: Sequences of a rank and step.
        sequence_length: Tokens of a sequence S.
        local_steps: K.
        rounds: Rounds; the first one is warm-up.
        compile_blocks: As the model's setting.
        accelerator: Gpu over NCCL, or cpu over gloo to try it out.
    """
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = accelerator == "gpu"
    config = architecture
    if activation_checkpointing is not None:
        config = replace(config, activation_checkpointing=activation_checkpointing)
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=SITE_TIMEOUT)
    inside = Inside(Topology(1, n, rank), device, "nccl" if gpu else "gloo", SITE_TIMEOUT)
    assert inside.group is not None, "start it with two processes or more"
    placement = place("fixed", n_layers=config.n_layers, n_experts=config.n_experts, n_sites=sites, overlap=overlap)
    shadow = Shadow(shadow_bits or 4)
    routing: Routing = "ghost" if shadow_bits is None else "shadow"
    torch.manual_seed(0)
    with drawn_on_device():
        model = Transformer(config, Residency(routing, placement.residents(0), shadow), device=device)
    if compile_blocks:
        model.compile_blocks()
    mesh = DeviceMesh.from_group(inside.group, device.type)
    slices = shard(model, mesh, rank, torch.bfloat16 if gpu else None)
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimizer = inner_optimizer(model, OptimizerConfig(lr=1e-4, warmup_steps=0))
    wire = MirrorTransport(
        Topology(sites, n, rank), placement.holder_sets(), Ledger(), device=device, inside=inside, slices=True
    )
    layout = ParameterLayout.of(model, model.expert_tensors())
    federation = Federation(
        layout, placement, wire, outer=Average(), inner_moments="average", copies=copies_of(model),
        joined=lambda name, values: inside.joined(values, *slices.cut[name]),
    )  # fmt: skip
    inputs, targets = random_tokens(local_steps, config.vocab_size, batch_size, sequence_length)
    speeds, seconds, losses = [], [], []
    for _ in range(rounds):
        start = now()
        for step in range(local_steps):
            tokens = inputs[step].to(device), targets[step].to(device)
            with torch.autocast(device.type, torch.bfloat16) if gpu else nullcontext():
                done = training_pass(model, *tokens)
            done.total.backward()
            take_gradients(model)
            clip_next_step(optimizer, norm_or_skip(optimizer, inside.sum), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(done.total.detach())
            del done  # it would hold memory of this step in the next one
        end = now()
        speeds.append(n * local_steps * batch_size * sequence_length / (end - start))
        federation.synchronize(optimizer)
        federation.refresh_copies()
        seconds.append(now() - end)
        if rank == 0:
            print(f"{speeds[-1]:,.0f} tokens/s, a round in {seconds[-1]:.2f} s", flush=True)
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    load = Load(
        precision="bf16-mixed" if gpu else "32-true", batch_size=batch_size, sequence_length=sequence_length,
    )  # fmt: skip
    n_resident = len(placement.residents(0)[0])
    predicted = rank_memory(config, load, n_resident=n_resident, routing=routing, shards=n, shadow=shadow)
    flops = token_flops(config, sequence_length, n_resident=n_resident, routing=routing, shadow=shadow)
    speed = statistics.median(speeds[1:] or speeds)
    found: dict[str, Any] = {
        "tokens_per_second": speed, "mfu": speed * flops.training_executed(checkpointing="none") / (n * H200_FLOPS),
        "round_seconds": statistics.median(seconds[1:] or seconds), "peak_gib": peak / GIB,
        "predicted_gib": predicted.peak / GIB, "predicted_parts_gib": {
            name: bytes_ / GIB for name, bytes_ in predicted.at_peak()[1].items() if bytes_},
        "local_parameters": sum(t.numel() for t in layout.tensors.values()), "losses": [float(x) for x in losses],
    }  # fmt: skip
    if rank:
        return None
    settings = {"ranks": n, "sites": sites, "overlap": overlap, "shadow_bits": shadow_bits, "batch_size": batch_size,
                "sequence_length": sequence_length, "checkpointing": config.activation_checkpointing,
                "compile_blocks": compile_blocks}  # fmt: skip
    cells = [f"{speed:,.0f}", f"{found['mfu']:.3f}", f"{found['round_seconds']:.2f}", f"{found['peak_gib']:.1f}",
             f"{found['predicted_gib']:.1f}", f"{found['losses'][0]:.3f}", f"{found['losses'][-1]:.3f}"]  # fmt: skip
    columns = ("tokens/s of the site", "MFU", "round (s)", "peak a GPU (GiB)", "predicted (GiB)", "first loss", "last")
    print(Report(Path(output), "sharded_site", accelerator, settings).write(found, markdown(columns, [cells])))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    _, architecture, settings = read("One of several sites, cut among the GPUs of this host.", bench, arguments)
    bench(architecture, **settings)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
