"""Rounds over real shaped links: the system model's bytes and seconds against interface counters and a clock.

`sudo python tools/network/shaped_links.py --rates 50 200 1000 --latencies 20 60 --output runs/shaped_links.json`

Needs root, `ip` and `tc`. Every site is a process in a network namespace of its own, joined by a virtual Ethernet pair
to a bridge in one more namespace; `tc tbf` limits both directions of every link. Nothing of the machine's own network
is touched, and the namespaces are removed at the end, also after a failure. In them runs what `fomoe fit` runs between
local steps: a `Federation` on gloo. Rounds start together; each site reads its interface's counters around them.
Rounds without limit take turns with limited ones: they give the seconds a byte that are not the link's, with which the
limited ones are predicted. With `--latencies` a program carries the frames, each some milliseconds later; a small
average then counts how many latencies follow each other. A result is printed and added to `--output` when it is there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
import torch.distributed as dist
from namespaces import INTERFACE, NO_LIMIT, call, finish_checksums, latency, limit_commands, namespace, network

from fomoe_pl.costs.network import Links, framed
from fomoe_pl.costs.rounds import Collective, count, refresh_bytes, round_collectives
from fomoe_pl.costs.sites import Site
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.flight import Flight
from fomoe_pl.federation.inner import RowAdamW
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.placement import all_holder_sets
from fomoe_pl.federation.schedule import RoundSchedule
from fomoe_pl.federation.settings import FederationConfig, InnerMoments
from fomoe_pl.federation.shadow import Arriving
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport
from fomoe_pl.files import write_whole
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.strategies.federated import copies_of

PORT = 29577
NOT_A_LIMIT = 1e9  # Mbit/s, where a number is needed
PROBE_BYTES, PROBES = 1024, 5
BLOCKS = 3
"""A limit and its calibration take turns, so that what else the machine does meets both."""
SERIAL_SHARE = 0.2
"""Of what the host's transport takes without a limit the part in which the link waits: adding what has come, and
handing on. At 1,000 Mbit/s it is what rounds take longer than the link or the host alone (docs/benchmarks)."""
ARCHITECTURE = ModelConfig(
    vocab_size=2048, d_model=256, n_layers=4, n_heads=4, n_experts=8, top_k=2, d_expert=128, base_width=256
)


def counters() -> dict[str, int]:
    """Bytes and packets that this namespace's interface has sent and received."""
    folder = Path("/sys/class/net") / INTERFACE / "statistics"
    names = ("tx_bytes", "rx_bytes", "tx_packets", "rx_packets")
    return {name: int((folder / name).read_text()) for name in names}


Readings = list[list[dict[str, float]]]
"""By site, and by round."""


class Work(Protocol):
    """Runs `n` rounds or probes on all sites."""

    def __call__(self, n: int, what: str = "round") -> Readings: ...  # noqa: D102


class TimedTransport(Transport):
    """Adds up the seconds of waiting for collectives."""

    seconds = 0.0

    def _start_all_reduce(self, *arguments: Any, **options: Any) -> Callable[[], None]:
        with self._timed():
            wait = super()._start_all_reduce(*arguments, **options)

        def timed() -> None:
            with self._timed():
                wait()

        return timed

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def work(settings: dict[str, Any]) -> None:
    """A site: runs the rounds of a real Federation that each input line asks for, and prints a line of readings."""
    rank, n_sites, overlap = settings["rank"], settings["n_sites"], settings["overlap"]
    torch.set_num_threads(1)
    with suppress(PermissionError):
        os.nice(-5)
    finish_checksums(INTERFACE)
    if not settings["slow_start"]:
        Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").write_text("0")  # of this namespace
    dist.init_process_group("gloo", init_method=f"tcp://10.77.0.1:{PORT}", rank=rank, world_size=n_sites)
    method = method_of(settings["routing"], settings["format"], settings["moments"], overlap)
    placement = method.place(ARCHITECTURE.n_layers, ARCHITECTURE.n_experts, n_sites)
    model = Transformer(ARCHITECTURE, method.residency(placement.residents(rank)))
    layout = ParameterLayout.of(model, model.expert_tensors())
    arcs = all_holder_sets(ARCHITECTURE.n_experts, ARCHITECTURE.n_layers, n_sites, overlap)
    wire = TimedTransport(Topology(n_sites, 1, rank), arcs, Ledger(), device=torch.device("cpu"),
                     bucket_bytes=settings["bucket_bytes"], overlapped=True)  # fmt: skip
    federation = Federation(
        layout, placement, wire, outer=method.rule, inner_moments=method.inner_moments, codec=method.codec,
        moments_codec=method.codec_of_moments, error_feedback=method.error_feedback, copies=copies_of(model),
    )  # fmt: skip
    optimizer = RowAdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    federation.synchronize(optimizer)  # opens connections
    federation.refresh_copies()
    print("ready", flush=True)
    for line in sys.stdin:
        what, n = line.split()
        if what.startswith("turns:"):
            readings = [turns(federation, optimizer, **json.loads(what.removeprefix("turns:")))]
        else:
            readings = [probe() if what == "probe" else one_round(federation, wire, optimizer) for _ in range(int(n))]
        print(json.dumps(readings), flush=True)
    wire.close()
    dist.destroy_process_group()


def probe() -> dict[str, float]:
    """Seconds of a small average over all sites."""
    values = torch.ones(PROBE_BYTES // 4)
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(values)
    return {"seconds": time.perf_counter() - start}


def turns(
    federation: Federation, optimizer: RowAdamW, *, step: float, local_steps: int, fragments: int, delay: int,
    rounds: int,
) -> dict[str, float]:  # fmt: skip
    """Seconds that a round takes longer than its steps, in which the host sleeps; see `overlap.py`."""
    schedule = RoundSchedule.parse(local_steps, fragments, delay)
    flight: Flight | None = None
    copies: Arriving | None = None
    begun, sent, start = 0, 0, 0.0
    dist.barrier()
    for number in range(1, (rounds + 1) * local_steps + 1):
        time.sleep(step)
        if copies is not None and number == sent + delay:
            federation.finish_refresh(copies)
            copies = None
        turn = schedule.turn(number)
        if turn is not None:
            names = federation.layout.fragment(turn.fragment, fragments)
            flight, begun = federation.begin(optimizer, ahead=None if delay else 1, names=names), number
        if flight is not None and number == begun + delay:
            federation.finish(flight)
            copies, sent = federation.start_refresh(flight.names), number
            flight = None
            if copies is not None and not delay:
                federation.finish_refresh(copies)
        if number == local_steps:
            start = time.perf_counter()
    seconds = (time.perf_counter() - start) / rounds
    if flight is not None:
        federation.finish(flight)
    if copies is not None and delay:
        federation.finish_refresh(copies)
    return {"seconds": seconds, "waited": seconds - local_steps * step}


def one_round(federation: Federation, wire: TimedTransport, optimizer: RowAdamW) -> dict[str, float]:
    """Readings of a round that all sites start together."""
    optimizer.step()
    dist.barrier()
    before, sent, start, inside = counters(), wire.ledger.total_wire, time.perf_counter(), wire.seconds
    federation.synchronize(optimizer)
    federation.refresh_copies()
    seconds = time.perf_counter() - start
    own = seconds - (wire.seconds - inside)
    dist.barrier()  # the slowest site's seconds count; counters are read when all are done
    read = {name: value - before[name] for name, value in counters().items()}
    return {"seconds": seconds, "outside_collectives": own, "ledger": wire.ledger.total_wire - sent, **read}


@contextmanager
def sites_at_work(options: Namespace, overlap: int) -> Iterator[Work]:
    """Start the sites in their namespaces; gives a function that runs rounds and returns readings by site."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    processes: list[subprocess.Popen[str]] = []
    for rank in range(options.sites):
        settings = {"rank": rank, "n_sites": options.sites, "overlap": overlap, "moments": options.moments,
                    "routing": options.routing, "format": options.format, "slow_start": options.slow_start,
                    "bucket_bytes": options.bucket_mib * 2**20}  # fmt: skip
        command = ["ip", "netns", "exec", namespace(rank), sys.executable, __file__, "--worker", json.dumps(settings)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True))

    def line_of(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a site failed; its message is above")
        return line

    def rounds(n: int, what: str = "round") -> Readings:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{what} {n}\n")
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


def method_of(routing: Routing, wire_format: str, moments: InnerMoments, overlap: int) -> FederationConfig:
    """What sites do in a round."""
    coded: dict[str, Any] = {}
    if wire_format != "float32":
        coded = {"wire_codec": wire_format, "error_feedback": True}
        coded |= {"moments_codec": "int8"} if moments == "average" else {}
    return FederationConfig(overlap=overlap, routing=routing, inner_moments=moments, **coded)


def seconds_of(links: Links, calls: list[Collective], refreshed: float) -> float:
    """Of a round's averages, and of the refresh of copies, an exchange for each layer.

    Args:
        links: Joins the sites.
        calls: The averages.
        refreshed: Bytes that a site sends of copies.
    """
    return links.round_seconds(calls) + links.exchange_seconds(refreshed, ARCHITECTURE.n_layers if refreshed else 0)


def summarize(
    readings: list[list[dict[str, float]]], calls: list[Collective], links: Links, refreshed: float
) -> dict[str, float]:
    """Medians over rounds, and the system model's predictions; bytes are of all sites together."""
    rounds = range(len(readings[0]))
    seconds = [max(site[i]["seconds"] for site in readings) for i in rounds]

    def total(name: str) -> float:
        return median(sum(site[i][name] for site in readings) for i in rounds)

    ledgers = [Ledger() for _ in readings]
    for site, ledger in enumerate(ledgers):
        count(ledger, calls, site)
    wire = sum(ledger.total_wire for ledger in ledgers) + len(readings) * refreshed
    return {
        "seconds": median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "outside_collectives": median(max(site[i]["outside_collectives"] for site in readings) for i in rounds),
        "predicted_seconds": seconds_of(links, calls, refreshed),
        "ledger_bytes": total("ledger"),
        "predicted_bytes": wire,
        "sent_bytes": total("tx_bytes"),
        "sent_packets": total("tx_packets"),
        "framed_bytes": framed(wire, received=wire, mtu=links.mtu),
    }


def calibrated(measured: dict[str, float], calls: list[Collective], links: Links, refreshed: float) -> Links:
    """Links whose constants explain a round without limit: both are the seconds of a byte on the longest way."""
    copied = replace(links, copy_seconds_per_byte=1.0, transport_seconds_per_byte=0.0)
    longest = seconds_of(copied, calls, refreshed)
    outside = measured["outside_collectives"]
    transport = max(0.0, measured["seconds"] - outside) / longest
    return replace(
        links,
        copy_seconds_per_byte=outside / longest,
        transport_seconds_per_byte=transport,
        host_seconds_per_byte=SERIAL_SHARE * transport,
    )


def link_of(rate_mbit: float, latency_ms: float = 0.0) -> Site:
    """A site of which nothing counts but its link."""
    return Site(tflops=1, memory_gib=1, memory_gbps=1, bandwidth_mbit=rate_mbit, latency_ms=latency_ms)


def in_turns(run: Work, rounds: int, set_limit: Callable[[bool], None]) -> tuple[Readings, Readings]:
    """Readings without the limit and with it, in blocks that take turns, a round before each left out."""
    both: tuple[Readings, Readings] = ([], [])
    for _ in range(BLOCKS):
        for limited, kept in enumerate(both):
            set_limit(bool(limited))
            run(1)
            found = run(-(-rounds // BLOCKS))
            kept[:] = [old + new for old, new in zip(kept, found, strict=True)] if kept else found
    return both


def measure(options: Namespace) -> Iterator[dict[str, Any]]:
    """All limits, then all latencies, of each overlap; each with the rounds without limit that calibrate it."""
    n_sites, mtu, moments = options.sites, options.mtu, options.moments
    of_links: dict[str, int] = {"mtu": mtu, "bucket_bytes": options.bucket_mib * 2**20}
    settings = [(rate, 0.0) for rate in options.rates] + [(options.latency_rate, ms) for ms in options.latencies]
    with network(n_sites, mtu):
        for overlap in options.overlap:
            method = method_of(options.routing, options.format, moments, overlap)
            calls = round_collectives(
                ARCHITECTURE, n_sites=n_sites, overlap=overlap, routing=options.routing, inner_moments=moments,
                codec=method.codec, moments_codec=method.codec_of_moments,
            )  # fmt: skip
            refreshed = 0.0
            if options.routing == "shadow":
                refreshed = refresh_bytes(ARCHITECTURE, method.shadow, n_sites=n_sites, overlap=overlap)
            with sites_at_work(options, overlap) as run:
                for rate, ms in settings:

                    def set_limit(limited: bool, rate: float = rate) -> None:
                        for command in limit_commands(n_sites, rate if limited else NO_LIMIT):
                            call(*command)

                    free = Links.between([link_of(NOT_A_LIMIT)] * n_sites, **of_links)
                    shaped = (link_of(rate, ms),) * n_sites
                    common = {"rate_mbit": rate, "latency_ms": ms, "sites": n_sites, "overlap": overlap,
                              "moments": moments, "routing": options.routing, "format": options.format, **of_links,
                              "slow_start": options.slow_start}  # fmt: skip
                    if ms:
                        # Frames go through the program without latency too: its own time is no link's.
                        set_limit(True)
                        with latency(n_sites, 0.0):
                            run(1)
                            before = run(-(-options.rounds // 2))
                        with latency(n_sites, ms):
                            run(1)
                            readings = run(options.rounds)
                            waited = median(max(site[i]["seconds"] for site in found) for found in
                                            [run(PROBES, "probe")] for i in range(PROBES))  # fmt: skip
                        common["latencies"] = waited / (ms / 1e3)
                        common["predicted_latencies"] = 4 * (n_sites - 1)
                    else:
                        before, readings = in_turns(run, options.rounds, set_limit)
                    calibration = summarize(before, calls, free, refreshed)
                    links = replace(calibrated(calibration, calls, free, refreshed), places=shaped)
                    yield {**common, "copy_seconds_per_byte": links.copy_seconds_per_byte,
                           "transport_seconds_per_byte": links.transport_seconds_per_byte, "free": calibration,
                           "link_seconds": seconds_of(Links.between(shaped, **of_links), calls, refreshed),
                           **summarize(readings, calls, links, refreshed), "readings": readings}  # fmt: skip


def row(r: dict[str, Any]) -> str:
    """A result in a line."""
    latency_ = f" and {r['latency_ms']:g} ms" if r["latency_ms"] else ""
    waited = (
        f"a small average takes {r['latencies']:.1f} latencies, predicted {r['predicted_latencies']}; "
        if latency_
        else ""
    )
    return (
        f"{r['rate_mbit']:g} Mbit/s{latency_}, overlap {r['overlap']}: {r['seconds']:.3f} s "
        f"({r['fastest']:.3f}..{r['slowest']:.3f}), {'without latency' if latency_ else 'without limit'} "
        f"{r['free']['seconds']:.3f}, predicted {r['predicted_seconds']:.3f} "
        f"({r['predicted_seconds'] / r['seconds']:.3f}), {r['seconds'] / r['link_seconds']:.3f} times the links' own; "
        f"{waited}"
        f"ledger {r['ledger_bytes']:,.0f} B, predicted {r['predicted_bytes']:,.0f}; interface {r['sent_bytes']:,.0f}, "
        f"with frames {r['framed_bytes']:,.0f} ({r['framed_bytes'] / r['sent_bytes']:.4f})"
    )


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rates", type=float, nargs="+", default=[50, 200, 1000], help="limits, Mbit/s")
    parser.add_argument("--latencies", type=float, nargs="*", default=[20, 60], help="one way, milliseconds")
    parser.add_argument("--latency_rate", type=float, default=200, help="limit that goes with them, Mbit/s")
    parser.add_argument("--slow_start", action="store_true",
                        help="connections begin slowly again after idle time, as is Linux's default")  # fmt: skip
    parser.add_argument("--sites", type=int, default=4, help="number of sites")
    parser.add_argument("--overlap", type=int, nargs="+", default=[2, 4], help="sites that hold each expert")
    parser.add_argument("--moments", choices=["keep", "average"], default="average", help="what a round averages")
    parser.add_argument("--routing", choices=["ghost", "shadow"], default="ghost", help="shadow refreshes copies too")
    parser.add_argument("--format", choices=["float32", "int8", "int4"], default="float32", help="of changes")
    parser.add_argument("--rounds", type=int, default=6, help="measured rounds of each")
    parser.add_argument("--bucket_mib", type=int, default=64, help="size of a buffer; one is copied while one travels")
    parser.add_argument("--mtu", type=int, default=9000, help="largest packet, bytes; 1500 costs six times the work")
    parser.add_argument("--output", type=Path, default=Path("runs/shaped_links.json"), help="where results go")
    parser.add_argument("--worker", help="what the tool calls itself with")
    options = parser.parse_args(arguments)
    if options.worker:
        work(json.loads(options.worker))
        return
    if any(not value > 0 for value in (*options.rates, *options.latencies, options.latency_rate)):
        parser.error("--rates, --latencies: a limit is above 0 Mbit/s, a latency above 0 ms")
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        parser.error(f"needs root and ip and tc (package iproute2); missing: {', '.join(missing) or 'root'}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for result in measure(options):
        results.append(result)
        write_whole(options.output, json.dumps(results, indent=1) + "\n")
        print(row(result), flush=True)


if __name__ == "__main__":
    main()
