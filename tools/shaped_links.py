"""Rounds over real shaped links: the system model's bytes and seconds against interface counters and a clock.

`sudo python tools/shaped_links.py --rates 50 200 1000 --output runs/shaped_links.json`

Needs root, `ip` and `tc`. Every site is a process in a network namespace of its own, joined by a virtual Ethernet pair
to a bridge in one more namespace; `tc tbf` limits both directions of every link. Nothing of the machine's own network
is touched, and the namespaces are removed at the end, also after a failure. In them runs what `fomoe fit` runs between
local steps: a `Federation` on gloo. Rounds start together; each site reads its interface's counters around them.
A run without limit comes first: it gives the seconds a byte that are not the link's, with which the others are
predicted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fomoe_pl.costs.network import Links, framed
from fomoe_pl.costs.rounds import Collective, count, round_collectives
from fomoe_pl.costs.sites import Site
from fomoe_pl.federation.inner import RowAdamW
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.outer import OuterRule
from fomoe_pl.federation.placement import all_arcs, place
from fomoe_pl.federation.rounds import Federation
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.wire import Wire
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer

PREFIX = f"fomoe{os.getpid()}-"  # of the tool's process, so that two of them do not meet
HUB, INTERFACE, PORT = f"{PREFIX}hub", "eth0", 29577
NO_LIMIT = 1e9  # Mbit/s, where a number is needed
ARCHITECTURE = ModelConfig(
    vocab_size=2048, d_model=256, n_layers=4, n_heads=4, n_experts=8, top_k=2, d_expert=128, base_width=256
)


def namespace(site: int) -> str:
    """Name of a site's namespace."""
    return f"{PREFIX}{site}"


def call(*words: str) -> str:
    """Run a command; its errors end the tool."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def build_commands(n_sites: int, mtu: int) -> list[list[str]]:
    """Commands that make the namespaces, the bridge and the links."""
    bridge = f"ip -n {HUB} link"
    lines = [f"ip netns add {HUB}", f"{bridge} add br0 type bridge", f"{bridge} set br0 up"]
    for site in range(n_sites):
        ns = namespace(site)
        lines += [
            f"ip netns add {ns}",
            f"ip -n {ns} link set lo up",
            f"ip -n {ns} link add {INTERFACE} type veth peer name port{site} netns {HUB}",
            # Frames as a real network has them: else counters and limits would see 64 KiB at once with one header.
            f"ip -n {ns} link set {INTERFACE} gso_max_segs 1 mtu {mtu}",
            f"ip -n {ns} addr add 10.77.0.{site + 1}/24 dev {INTERFACE}",
            f"ip -n {ns} link set {INTERFACE} up",
            f"{bridge} set port{site} mtu {mtu} master br0",
            f"{bridge} set port{site} up",
        ]
    return [line.split() for line in lines]


def limit_commands(n_sites: int, rate_mbit: float) -> list[list[str]]:
    """Commands that limit every link in both directions; a rate of 0 takes the limits away."""
    lines = []
    for site in range(n_sites):
        for ns, device in ((namespace(site), INTERFACE), (HUB, f"port{site}")):
            if rate_mbit:
                # A bucket of 2 ms at the rate, and no less than two jumbo frames; a queue of 50 ms.
                burst = max(int(rate_mbit * 1e6 / 8 * 0.002), 20_000)
                lines.append(f"tc -n {ns} qdisc replace dev {device} root tbf rate {rate_mbit}mbit burst {burst} "
                             "latency 50ms")  # fmt: skip
            else:
                lines.append(f"tc -n {ns} qdisc replace dev {device} root pfifo limit 1000")
    return [line.split() for line in lines]


@contextmanager
def network(n_sites: int, mtu: int) -> Iterator[None]:
    """Namespaces for as long as the context lasts."""
    remove()
    try:
        for command in build_commands(n_sites, mtu):
            call(*command)
        yield
    finally:
        remove()


def remove() -> None:
    """Remove what this process has made, and what one that was killed has left."""
    for line in call("ip", "netns", "list").splitlines():
        name = line.split()[0]
        made = re.fullmatch(r"fomoe(\d+)-(hub|\d+)", name)
        if made and (name.startswith(PREFIX) or not Path("/proc", made[1]).exists()):
            call("ip", "netns", "del", name)


def counters() -> dict[str, int]:
    """Bytes and packets that this namespace's interface has sent and received."""
    folder = Path("/sys/class/net") / INTERFACE / "statistics"
    names = ("tx_bytes", "rx_bytes", "tx_packets", "rx_packets")
    return {name: int((folder / name).read_text()) for name in names}


class TimedWire(Wire):
    """Adds up the seconds in collectives."""

    seconds = 0.0

    def _all_reduce(self, *arguments: Any) -> None:
        start = time.perf_counter()
        super()._all_reduce(*arguments)
        self.seconds += time.perf_counter() - start


def work(settings: dict[str, Any]) -> None:
    """A site: for each line that comes in so many rounds of a real Federation, and a line of readings out."""
    rank, n_sites, overlap = settings["rank"], settings["n_sites"], settings["overlap"]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://10.77.0.1:{PORT}", rank=rank, world_size=n_sites)
    placement = place("fixed", n_layers=ARCHITECTURE.n_layers, n_experts=ARCHITECTURE.n_experts, n_sites=n_sites,
                      overlap=overlap)  # fmt: skip
    model = Transformer(ARCHITECTURE, Residency("ghost", placement.residents(rank)))
    layout = ParameterLayout.of(model, model.expert_tensors())
    arcs = all_arcs(ARCHITECTURE.n_experts, ARCHITECTURE.n_layers, n_sites, overlap)
    wire = TimedWire(Topology(n_sites, 1, rank), arcs, Ledger(), device=torch.device("cpu"))
    federation = Federation(layout, placement, wire, outer=OuterRule(), inner_moments=settings["moments"])
    optimizer = RowAdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    federation.synchronize(optimizer)  # opens connections
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps([one_round(federation, wire, optimizer) for _ in range(int(line))]), flush=True)
    wire.close()
    dist.destroy_process_group()


def one_round(federation: Federation, wire: TimedWire, optimizer: RowAdamW) -> dict[str, float]:
    """Readings of a round that all sites start together."""
    optimizer.step()
    dist.barrier()
    before, sent, start, inside = counters(), wire.ledger.total_wire, time.perf_counter(), wire.seconds
    federation.synchronize(optimizer)
    own = time.perf_counter() - start - (wire.seconds - inside)
    dist.barrier()
    seconds = time.perf_counter() - start
    read = {name: value - before[name] for name, value in counters().items()}
    return {"seconds": seconds, "outside_collectives": own, "ledger": wire.ledger.total_wire - sent, **read}


@contextmanager
def sites_at_work(n_sites: int, overlap: int, moments: str) -> Iterator[Callable[[int], list[list[dict[str, float]]]]]:
    """Start the sites in their namespaces; gives a function that runs so many rounds and returns readings by site."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    processes: list[subprocess.Popen[str]] = []
    for rank in range(n_sites):
        settings = {"rank": rank, "n_sites": n_sites, "overlap": overlap, "moments": moments}
        command = ["ip", "netns", "exec", namespace(rank), sys.executable, __file__, "--worker", json.dumps(settings)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True))

    def line_of(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a site failed; its message is above")
        return line

    def rounds(n: int) -> list[list[dict[str, float]]]:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{n}\n")
            process.stdin.flush()
        return [json.loads(line_of(process)) for process in processes]

    try:
        for process in processes:
            line_of(process)
        yield rounds
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def summarize(readings: list[list[dict[str, float]]], calls: list[Collective], links: Links) -> dict[str, float]:
    """Medians over rounds beside what the system model says; bytes are of all sites together."""
    rounds = range(len(readings[0]))
    seconds = [max(site[i]["seconds"] for site in readings) for i in rounds]

    def total(name: str) -> float:
        return statistics.median(sum(site[i][name] for site in readings) for i in rounds)

    ledgers = [Ledger() for _ in readings]
    for site, ledger in enumerate(ledgers):
        count(ledger, calls, site)
    wire = sum(ledger.total_wire for ledger in ledgers)
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "outside_collectives": statistics.median(
            max(site[i]["outside_collectives"] for site in readings) for i in rounds
        ),
        "predicted_seconds": links.round_seconds(calls),
        "ledger_bytes": total("ledger"),
        "predicted_bytes": wire,
        "sent_bytes": total("tx_bytes"),
        "sent_packets": total("tx_packets"),
        "framed_bytes": framed(wire, received=wire, mtu=links.mtu),
    }


def calibrated(measured: dict[str, float], calls: list[Collective], links: Links) -> Links:
    """Links whose constants explain a round without limit: both are the seconds of a byte on the longest way."""
    longest = replace(links, copy_seconds_per_byte=1.0, transport_seconds_per_byte=0.0).round_seconds(calls)
    outside = measured["outside_collectives"]
    return replace(
        links,
        copy_seconds_per_byte=outside / longest,
        transport_seconds_per_byte=max(0.0, measured["seconds"] - outside) / longest,
    )


def link_of(rate_mbit: float) -> Site:
    """A site of which nothing counts but its link."""
    return Site(tflops=1, memory_gib=1, memory_gbps=1, bandwidth_mbit=rate_mbit, latency_ms=0)


def measure(rates: list[float], n_sites: int, overlaps: list[int], moments: str, rounds: int, mtu: int) -> list[Any]:
    """All rates and overlaps, each overlap first without limit, which calibrates the rest."""
    results = []
    with network(n_sites, mtu):
        for overlap in overlaps:
            calls = round_collectives(ARCHITECTURE, n_sites=n_sites, overlap=overlap, inner_moments=moments)  # type: ignore[arg-type]
            with sites_at_work(n_sites, overlap, moments) as run:
                links = Links.between([link_of(NO_LIMIT)] * n_sites, mtu=mtu)
                for rate in [0.0, *rates]:
                    for command in limit_commands(n_sites, rate):
                        call(*command)
                    if rate:
                        links = replace(links, places=(link_of(rate),) * n_sites)
                    run(1)
                    readings = run(rounds)
                    result = summarize(readings, calls, links)
                    if not rate:
                        links = calibrated(result, calls, links)
                    results.append({
                        "rate_mbit": rate, "sites": n_sites, "overlap": overlap, "moments": moments, "mtu": mtu,
                        "copy_seconds_per_byte": links.copy_seconds_per_byte,
                        "transport_seconds_per_byte": links.transport_seconds_per_byte, **result, "readings": readings,
                    })  # fmt: skip
                    print(row(results[-1]), flush=True)
    return results


def row(r: dict[str, Any]) -> str:
    """A result in a line."""
    rate = f"{r['rate_mbit']:g} Mbit/s" if r["rate_mbit"] else "no limit (calibration)"
    return (
        f"{rate}, overlap {r['overlap']}: {r['seconds']:.3f} s ({r['fastest']:.3f}..{r['slowest']:.3f}), "
        f"predicted {r['predicted_seconds']:.3f} ({r['predicted_seconds'] / r['seconds']:.3f}); "
        f"ledger {r['ledger_bytes']:,.0f} B, predicted {r['predicted_bytes']:,.0f}; interface {r['sent_bytes']:,.0f}, "
        f"with frames {r['framed_bytes']:,.0f} ({r['framed_bytes'] / r['sent_bytes']:.4f})"
    )


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rates", type=float, nargs="+", default=[50, 200, 1000], help="limits, Mbit/s")
    parser.add_argument("--sites", type=int, default=4, help="number of sites")
    parser.add_argument("--overlap", type=int, nargs="+", default=[2, 4], help="sites that hold each expert")
    parser.add_argument("--moments", choices=["keep", "average"], default="average", help="what a round averages")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds of each")
    parser.add_argument("--mtu", type=int, default=9000, help="largest packet, bytes; 1500 costs six times the work")
    parser.add_argument("--output", type=Path, default=Path("runs/shaped_links.json"), help="where results go")
    parser.add_argument("--worker", help="what the tool calls itself with")
    options = parser.parse_args(arguments)
    if options.worker:
        work(json.loads(options.worker))
        return
    if any(not rate > 0 for rate in options.rates):
        parser.error("--rates: a limit is above 0 Mbit/s")
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        parser.error(f"needs root and ip and tc (package iproute2); missing: {', '.join(missing) or 'root'}")
    results = measure(options.rates, options.sites, options.overlap, options.moments, options.rounds, options.mtu)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
