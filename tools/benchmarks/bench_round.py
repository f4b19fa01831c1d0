"""A round on real devices against what it cannot be faster than: its averages alone, and its copies over the bus alone.

    torchrun --standalone --nproc-per-node 2 tools/benchmarks/bench_round.py --model olmoe-1.3b \
      --output runs/bench_round

Each process is a site, with a GPU of its own as long as there are enough. For each wire (NCCL between GPUs, gloo
through page-locked memory of the host) and each place of the outer state (`outer_state` of the strategy) rounds of a
real `Federation`, the same averages with nothing around them, and copies of as many bytes as the round carries between
host and device, both ways at once, take turns. `bench_round.json` and `bench_round.md` are rewritten after each row.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
import torch.distributed as dist
from harness import Report, architecture, drawn_on_device, in_turns, markdown, middle, now
from torch import Tensor

from fomoe_pl.costs.memory import MIB
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Kind, Ledger
from fomoe_pl.federation.outer import Average, Nesterov
from fomoe_pl.federation.placement import all_holder_sets, place
from fomoe_pl.federation.settings import OuterPlace
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.optimizer import OptimizerConfig, inner_optimizer

COLUMNS = ("wire", "outer state", "overlap", "outer rule", "parameters", "round (s)", "averages alone (s)",
           "bus alone (s)", "up, down (MiB)", "round / longest")  # fmt: skip


class NotedTransport(Transport):
    """Notes what a round averages, and does it again with nothing around it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.noted: list[tuple[Kind, int, tuple[int, ...]]] = []

    def _start_all_reduce(
        self, kind: Kind, buffer: Tensor, sites: tuple[int, ...], *, between: bool = False
    ) -> Callable[[], None]:
        self.noted.append((kind, buffer.numel(), sites))
        return super()._start_all_reduce(kind, buffer, sites, between=between)

    def alone(self) -> float:
        """Seconds of the noted averages, two of them on their way at a time, as in a round."""
        largest = max((n for _, n, _ in self.noted), default=0)
        buffers = [torch.zeros(largest, dtype=self.dtype, device=self.device, pin_memory=self.pinned) for _ in range(2)]
        start = started()
        last: Callable[[], None] | None = None
        for i, (kind, numel, sites) in enumerate(self.noted):
            wait = super()._start_all_reduce(kind, buffers[i % 2][:numel], sites)
            if last is not None:
                last()
            last = wait
        if last is not None:
            last()
        return finished(start)


@dataclass(frozen=True)
class Row:
    """Seconds of a case, of each repetition."""

    wire: str
    outer_state: str
    overlap: int
    rule: str
    parameters: int
    round_seconds: list[float]
    averages_seconds: list[float]
    bus_seconds: list[float]
    bus_bytes: tuple[int, int]

    @property
    def ratio(self) -> float:
        """Medians: the round over the longer of the two."""
        return median(self.round_seconds) / max(median(self.averages_seconds), median(self.bus_seconds))

    def cells(self) -> list[str]:
        """Of the table."""
        seconds = map(middle, (self.round_seconds, self.averages_seconds, self.bus_seconds))
        up, down = (f"{n / MIB:,.0f}" for n in self.bus_bytes)
        return [self.wire, self.outer_state, str(self.overlap), self.rule, f"{self.parameters / 1e6:,.0f}M", *seconds,
                f"{up}, {down}", f"{self.ratio:.2f}"]  # fmt: skip


def started() -> float:
    """Now that all sites are here and their devices idle."""
    now()
    dist.barrier()
    return now()


def finished(start: float) -> float:
    """Seconds until the device of the slowest site was idle again."""
    seconds = torch.tensor(now() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # over gloo: it is on the host
    return float(seconds)


def bus_bytes(
    elements: int, sent: int, itemsize: int, *, momentum: bool, on_host: bool, by_host: bool
) -> tuple[int, int]:
    """Bytes to the device and from it in a round.

    Args:
        elements: Numbers that the site keeps.
        sent: Of these, that are averaged with other sites.
        itemsize: Bytes of a number on the wire.
        momentum: There is outer momentum.
        on_host: It and the anchors are on the host: they come to the device, and what is new goes back.
        by_host: The wire's buffers are on the host.
    """
    up = down = itemsize * sent if by_host else 0
    if on_host:
        up += (4 + 4 * momentum) * elements
        down += (4 + 4 * momentum) * elements
    return up, down


def bus_alone(up: int, down: int, device: torch.device, bucket_bytes: int) -> float:
    """Seconds of copying these bytes from and to page-locked memory, both at once."""
    if device.type != "cuda" or not up + down:
        finished(started())  # as the others do
        return 0.0
    host = [torch.zeros(bucket_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.zeros(bucket_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    start = started()
    for (to, of), left, stream in zip(((there[0], host[0]), (host[1], there[1])), (up, down), streams, strict=True):
        with torch.cuda.stream(stream):
            while left > 0:
                n = min(left, bucket_bytes)
                to[:n].copy_(of[:n], non_blocking=True)
                left -= n
    return finished(start)


def measure(
    config: ModelConfig, device: torch.device, wire_name: str, outer_state: OuterPlace, overlap: int,
    options: Any,
) -> Row:  # fmt: skip
    """A case; every process calls it."""
    n_sites, rank = dist.get_world_size(), dist.get_rank()
    placement = place("fixed", n_layers=config.n_layers, n_experts=config.n_experts, n_sites=n_sites, overlap=overlap)
    with drawn_on_device():
        model = Transformer(config, Residency("ghost", placement.residents(rank)), device=device)
    by_host = wire_name == "gloo"
    wire = NotedTransport(
        Topology(n_sites, 1, rank), all_holder_sets(config.n_experts, config.n_layers, n_sites, overlap), Ledger(),
        device=torch.device("cpu") if by_host else device, dtype=options.wire_dtype,
        bucket_bytes=options.bucket_mib * MIB, home=device,
    )  # fmt: skip
    outer = Nesterov(0.7) if options.rule == "nesterov" else Average()
    layout = ParameterLayout.of(model, model.expert_tensors())
    federation = Federation(layout, placement, wire, outer=outer, state_on_host=outer_state == "host")
    optimizer = inner_optimizer(model, OptimizerConfig())
    elements = sum(t.numel() for t in layout.tensors.values())
    federation.synchronize(optimizer)  # opens connections, reserves memory
    sent = sum(n for _, n, _ in wire.noted)
    carried = bus_bytes(elements, sent, wire.dtype.itemsize, momentum=bool(outer.slots),
                        on_host=outer_state == "host" and device.type == "cuda", by_host=wire.pinned)  # fmt: skip

    def one_round() -> float:
        wire.noted.clear()
        start = started()
        federation.synchronize(optimizer)
        return finished(start)

    alone: dict[str, Callable[[], float]] = {
        "averages": wire.alone,
        "bus": partial(bus_alone, *carried, device, options.bucket_mib * MIB),
    }
    seconds = in_turns({"round": one_round, **alone}, options.rounds)
    wire.close()
    return Row(wire_name, outer_state, overlap, str(outer), elements, seconds["round"], seconds["averages"],
               seconds["bus"], carried)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--model", default="fomoe-153m", help="a file of configs/model, without .yaml")
    parser.add_argument("--overlaps", type=int, nargs="+", help="sites that hold each expert; 1 and all")
    parser.add_argument("--wires", nargs="+", choices=["nccl", "gloo"], help="both, or without a GPU each gloo alone")
    parser.add_argument("--rule", choices=["average", "nesterov"], default="average", help="outer rule")
    parser.add_argument("--wire_dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--bucket_mib", type=int, default=64, help="size of a buffer")
    parser.add_argument("--rounds", type=int, default=5, help="of each case")
    options = parser.parse_args(arguments)
    config = architecture(options.model)
    n_sites, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    enough = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if "nccl" in (options.wires or ()) and not enough:
        parser.error(f"--wires nccl wants a GPU for each of {os.environ['LOCAL_WORLD_SIZE']} processes; take gloo")
    device = torch.device("cuda", local) if enough else torch.device("cpu")
    if enough:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if enough else "gloo")
    report = None
    if dist.get_rank() == 0:
        settings = {name: getattr(options, name) for name in ("model", "rounds", "wire_dtype", "bucket_mib")}
        settings |= {"sites": n_sites, "architecture": asdict(config)}
        report = Report(options.output, "bench_round", device, settings)
    rows = []
    for overlap in options.overlaps or sorted({1, n_sites}):
        for wire in options.wires or (("nccl", "gloo") if enough else ("gloo",)):
            for state in get_args(OuterPlace):
                row = measure(config, device, wire, state, overlap, options)
                rows.append(row)
                if report is not None:
                    print("| " + " | ".join(row.cells()) + " |", flush=True)
                    results = {"rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
                    report.write(results, markdown(COLUMNS, [row.cells() for row in rows]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
