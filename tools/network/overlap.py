"""How long sites wait for averages that travel while they compute, over real shaped links.

`sudo python tools/network/overlap.py --rate 200 --fragments 4 --delays 0 1 2 3 --output runs/overlap.json`

The sites, namespaces and links are those of `shaped_links.py`. A local step is a time in which the host does nothing,
as while a GPU computes: so long that a round of the whole model, waited for, takes `--share` of the time of its K
steps. Then fragments take turns with each delay; what a round takes longer than its steps is waiting: for averages and
copies, and for the host that packs and applies them. The first round is left out, and sites do not start together.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from namespaces import call, latency, limit_commands, network
from shaped_links import Work, sites_at_work

from fomoe_pl.federation.schedule import RoundSchedule
from fomoe_pl.files import write_whole


def waiting(run: Work, order: dict[str, Any]) -> float:
    """Share of a round's steps that the slowest site waits."""
    readings = run(1, "turns:" + json.dumps(order, separators=(",", ":")))
    return max(site[0]["waited"] for site in readings) / (order["local_steps"] * order["step"])


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=float, default=200, help="limit of every link, Mbit/s")
    parser.add_argument("--latency", type=float, default=0, help="one way, milliseconds")
    parser.add_argument("--share", type=float, default=0.3, help="a round's share of the time of K steps")
    parser.add_argument("--local_steps", type=int, default=16, help="K")
    parser.add_argument("--fragments", type=int, default=4, help="that take turns")
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 1, 2, 3], help="steps")
    parser.add_argument("--rounds", type=int, default=4, help="measured rounds of each")
    parser.add_argument("--sites", type=int, default=4, help="number of sites")
    parser.add_argument("--overlap", type=int, default=2, help="sites that hold each expert")
    parser.add_argument("--moments", choices=["keep", "average"], default="average", help="what a round averages")
    parser.add_argument("--routing", choices=["ghost", "shadow"], default="ghost", help="shadow refreshes copies too")
    parser.add_argument("--format", choices=["float32", "int8", "int4", "topk"], default="float32", help="of changes")
    parser.add_argument("--bucket_mib", type=int, default=64, help="size of a buffer")
    parser.add_argument("--mtu", type=int, default=9000, help="largest packet, bytes")
    parser.add_argument("--output", type=Path, default=Path("runs/overlap.json"), help="where results go")
    options = parser.parse_args(arguments)
    options.slow_start = False
    if os.geteuid() != 0:
        parser.error("needs root, and ip and tc (package iproute2)")
    for delay in options.delays:
        RoundSchedule.parse(options.local_steps, options.fragments, delay)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = []
    with network(options.sites, options.mtu):
        for command in limit_commands(options.sites, options.rate):
            call(*command)
        slow = latency(options.sites, options.latency) if options.latency else nullcontext()
        with slow, sites_at_work(options, options.overlap) as run:
            run(1)
            readings = run(3)
            alone = median(max(site[i]["seconds"] for site in readings) for i in range(3))
            step = alone / options.share / options.local_steps
            print(f"a round alone takes {alone:.3f} s, so a step {step:.3f} s", flush=True)
            for delay in options.delays:
                order = {"step": step, "local_steps": options.local_steps, "fragments": options.fragments,
                         "delay": delay, "rounds": options.rounds}  # fmt: skip
                results.append({**order, "alone": alone, "waiting": waiting(run, order)})
                write_whole(options.output, json.dumps(results, indent=1) + "\n")
                told = f"{options.fragments} fragments, delay {delay}: sites wait {results[-1]['waiting']:.1%}"
                print(told, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
