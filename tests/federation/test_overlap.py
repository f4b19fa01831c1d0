"""Fragments' turns, averages applied later and routers' own period equal a simulation of all sites in one process."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_pl.codec import Codec, Groups, Root, TopK
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.inner import RowAdamW, moments
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.left_out import LeftOut
from fomoe_pl.federation.outer import Average, Nesterov
from fomoe_pl.federation.placement import all_holder_sets
from fomoe_pl.federation.schedule import RoundSchedule
from fomoe_pl.federation.settings import InnerMoments
from fomoe_pl.federation.state import RESIDUAL
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport
from tests.distributed import run_distributed
from tests.federation.simulation import BETAS, EPS, EXPERTS, LAYERS, LR, SITES, Case, draw
from tests.federation.toy import local_step, toy_layout

BUCKET = 6  # numbers: an expert's matrix, or two rows of the embedding, which so are coded by themselves


@dataclass(frozen=True)
class Overlap:
    """One setting of the turns, on four sites each of whose experts is on two."""

    fragments: int = 1
    delay: int = 0
    alpha: float = 0.0
    codec: Codec | None = None
    feedback: bool = False
    moments_codec: Codec | None = None
    inner_moments: InnerMoments = "average"
    periods: tuple[int, int] = (1, 1)
    nesterov: bool = False
    local_steps: int = 4
    router_every: int | None = None
    out: tuple[tuple[int, int], ...] = ()  # steps with whose turn a site has nothing to give

    @property
    def steps(self) -> int:  # the last round is a short one, and begins with an average on its way
        return 2 * self.local_steps + self.local_steps // self.fragments + min(self.delay, 1)

    @property
    def schedule(self) -> RoundSchedule:
        return RoundSchedule.parse(self.local_steps, self.fragments, self.delay, self.router_every)

    def due(self, rounds: int) -> tuple[bool, bool]:
        return rounds % self.periods[0] == 0, rounds % self.periods[1] == 0


LEAN = Overlap(codec=Groups(4), feedback=True, moments_codec=Groups(8))
TURNS = [(1, 0), (1, 1), (1, 3), (2, 0), (2, 1)]
CASES = [
    *(replace(of, fragments=n, delay=d, alpha=0.5 * ((n + d + i) % 2))
      for i, of in enumerate((Overlap(), LEAN, Overlap(codec=Groups(8)))) for n, d in TURNS),
    *(replace(of, fragments=3, delay=d, local_steps=6) for of in (Overlap(nesterov=True), LEAN) for d in (0, 1)),
    replace(LEAN, fragments=2, delay=1, periods=(1, 2)),
    replace(LEAN, fragments=2, delay=1, codec=TopK(4)),
    Overlap(fragments=2, delay=1, inner_moments="reset", codec=Groups(8)),
    Overlap(delay=2, inner_moments="keep", codec=Groups(8), feedback=True, out=((4, 1), (8, 3))),
    replace(LEAN, delay=2, out=((4, 1), (8, 0))),
    Overlap(delay=2, out=((4, 2),)),
    Overlap(fragments=2, inner_moments="keep", nesterov=True, out=((4, 1), (4, 2), (6, 3))),
    Overlap(router_every=2, nesterov=True, out=((2, 3), (6, 0))),
    replace(LEAN, fragments=2, delay=1, router_every=1, alpha=0.5),
    replace(LEAN, delay=3, router_every=2, out=((2, 1), (4, 2))),
]  # fmt: skip
CASE = Case(overlap=2)


def layout_of(site: int) -> ParameterLayout:
    """The toy's tensors, and two of a layer that are no expert's."""
    layout = toy_layout(CASE.place(0), site)
    more = {"layers.1.scale": draw("scale", shape=(3,)), "layers.1.router.weight": draw("router", shape=(4, 2))}
    tensors = {**layout.tensors, **{name: tensor.requires_grad_() for name, tensor in more.items()}}
    return ParameterLayout(tensors, layout.expert_layer, layout.trained | more.keys())


def adamw(layout: ParameterLayout) -> RowAdamW:
    trained = [layout.tensors[name] for name in sorted(layout.trained)]
    return RowAdamW(trained, row_warmup_steps=0, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)


def state_of(site: Any) -> dict[str, Tensor]:
    """Everything at a site: local values, anchors, momenta, residuals, moments."""
    found = {f"local {name}": t for name, t in site.layout.tensors.items()}
    for slot, values in {**site.slots, **site.own}.items():
        found |= {f"{slot} {name}": value for name, value in values.items()}
    for name in sorted(site.layout.trained):
        found |= {f"{m} {name}": v for m, v in moments(site.optimizer, site.layout.tensors[name]).items()}
    return {key: value.detach().clone() for key, value in found.items()}


# -- the real thing ---------------------------------------------------------------------------------------------------


def _run(rank: int) -> list[list[dict[str, Tensor]]]:
    return [run_on(rank, of) for of in CASES]


def run_on(rank: int, of: Overlap) -> list[dict[str, Tensor]]:
    arcs = all_holder_sets(EXPERTS, LAYERS, SITES, CASE.overlap)
    wire = Transport(Topology(SITES, 1, rank), arcs, Ledger(), device=torch.device("cpu"), bucket_bytes=4 * BUCKET,
                     overlapped=of.delay > 0)  # fmt: skip
    layout = layout_of(rank)
    federation = Federation(
        layout, CASE.place(0), wire, outer=Nesterov(0.7, 0.9) if of.nesterov else Average(),
        inner_moments=of.inner_moments, codec=of.codec, moments_codec=of.moments_codec, error_feedback=of.feedback,
    )  # fmt: skip
    optimizer, history, rounds, begun = adamw(layout), [], 0, 0
    flight: Any = None
    told: Any = None
    for step in range(1, of.steps + 1):
        local_step(CASE, federation, optimizer, step)
        turn = of.schedule.turn(step, of.steps)
        if of.schedule.routers_due(step, of.steps):
            flags = torch.zeros(SITES)
            flags[rank] = (step, rank) in of.out
            known = LeftOut(frozenset({rank} if flags[rank] else ()), (sums := wire.start_sum("control", flags))[0])
            names = layout.routers - (layout.fragment(turn.fragment, of.fragments) if turn else frozenset())
            federation.average_routers(
                names, known, lambda wait=sums[1]: frozenset(wait().nonzero().flatten().tolist())
            )
        if flight is not None and step in (begun + of.delay, of.steps):
            out = frozenset(told()[1].nonzero().flatten().tolist())
            federation.finish(flight, out, alpha=of.alpha)
            flight = None
        if turn is not None:
            closes = step == of.steps
            out = frozenset(site for at, site in of.out if at == step)
            names = None if closes else layout.fragment(turn.fragment, of.fragments)
            if of.delay == 0 or closes:
                left_out = LeftOut(out)
            else:
                message = torch.zeros(2, SITES)
                message[1, rank] = rank in out
                there, told = wire.start_sum("control", message)
                left_out = LeftOut(frozenset(out & {rank}), lambda there=there: there()[1])
            due = of.due(rounds + 1)
            flight = federation.begin(optimizer, left_out, ahead=None if of.delay else 1, due=due, names=names)
            begun, rounds = step, rounds + turn.ends_round
            if of.delay == 0 or closes:
                federation.finish(flight, alpha=0.0 if closes else of.alpha)
                flight = None
            elif step % 2:
                flight.land()  # as before a checkpoint
        site = SimpleNamespace(layout=layout, slots=federation.state.slots, own=federation.state.own,
                               optimizer=optimizer)  # fmt: skip
        history.append(state_of(site))
    federation.check_agreement()
    wire.close()
    return history


# -- the simulation ---------------------------------------------------------------------------------------------------


class Simulated:
    """One site of the simulation: trains like the real one, and knows nothing of federations."""

    def __init__(self, site: int, of: Overlap) -> None:
        self.site, self.placement, self.layout = site, CASE.place(0), layout_of(site)
        self.optimizer = adamw(self.layout)
        named = {name: t.detach() for name, t in self.layout.tensors.items()}
        self.slots = {"anchor": {name: t.clone() for name, t in named.items()}}
        if of.nesterov:
            self.slots["momentum"] = {name: torch.zeros_like(named[name]) for name in self.layout.trained}
        coded = [name for name in named if name.rpartition(".")[2] in ("embedding", "w_in", "w_out")]
        self.own = {RESIDUAL: {name: torch.zeros_like(named[name]) for name in coded}} if of.feedback else {}

    def parts(self, names: frozenset[str]) -> list[tuple[str, int | None, slice]]:
        """(name, expert or None, rows) of what is averaged by itself."""
        found: list[tuple[str, int | None, slice]] = []
        for name in sorted(names):
            if name in self.layout.expert_layer:
                experts = self.placement.residents(self.site)[self.layout.expert_layer[name]]
                found += [(name, expert, slice(row, row + 1)) for row, expert in enumerate(experts)]
            elif name == "embedding":
                found += [(name, None, slice(row, row + 2)) for row in (0, 2, 4)]
            else:
                found.append((name, None, slice(None)))
        return found


def averaged(values: dict[int, Tensor], codec: Codec | None, sites: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The mean that all sites get of what some of them give, and what coding has lost of each one's."""
    lost = {site: torch.zeros_like(value) for site, value in values.items()}
    if codec is None or len(sites) == 1:
        return sum(values[site] for site in sorted(values)) / len(values), lost

    def coded(x: Tensor) -> Tensor:
        return codec.decode(codec.encode(x.reshape(1, -1)), x.numel()).view_as(x)

    decoded = {site: coded(value) for site, value in values.items()}
    mean = torch.zeros_like(next(iter(values.values())))
    for site in sorted(values):
        mean += decoded[site]
    mean /= torch.tensor(float(len(values)))
    lost = {site: values[site] - decoded[site] for site in values}
    if len(sites) == 2 or isinstance(codec, TopK):
        return mean, lost
    twice = coded(mean)
    if sites[0] in values:  # it has the only slice that is not empty
        lost[sites[0]] += (mean - twice) * float(len(values))
    return twice, lost


def simulate(of: Overlap) -> list[list[dict[str, Tensor]]]:
    sites = [Simulated(site, of) for site in range(SITES)]
    history: list[list[dict[str, Tensor]]] = [[] for _ in sites]
    rounds, on_its_way = 0, None
    for step in range(1, of.steps + 1):
        for s in sites:
            local_step(CASE, s, s.optimizer, step)
        closes = step == of.steps
        if of.schedule.routers_due(step, of.steps):
            turn = of.schedule.turn(step, of.steps)
            names = sites[0].layout.fragment(turn.fragment, of.fragments) if turn else frozenset()
            average_routers(sites, {"layers.1.router.weight", "router.dense_bias"} - names,
                            {site for at, site in of.out if at == step})  # fmt: skip
        if on_its_way and (closes or step == on_its_way[0] + of.delay):
            apply(sites, of, *on_its_way[1:], alpha=of.alpha)
            on_its_way = None
        if (turn := of.schedule.turn(step, of.steps)) is not None:
            layout, out = sites[0].layout, {site for at, site in of.out if at == step}
            names = frozenset(layout.tensors) if closes else layout.fragment(turn.fragment, of.fragments)
            told = of.delay == 0 or closes
            on_its_way = (step, *begin(sites, of, names, rounds + 1, out, all_due=told and bool(out)))
            rounds += turn.ends_round
            if of.delay == 0 or closes:
                apply(sites, of, *on_its_way[1:], alpha=0.0 if closes else of.alpha)
                on_its_way = None
        for s, own in zip(sites, history, strict=True):
            own.append(state_of(s))
    return history


def average_routers(sites: list[Simulated], names: set[str], out: set[int]) -> None:
    """All sites go on from the mean of those that are not left out; nothing else changes."""
    for name in names:
        mean = sum(s.layout.tensors[name].detach() for s in sites if s.site not in out) / (len(sites) - len(out))
        for s in sites:
            s.layout.tensors[name].detach().copy_(mean)


def begin(
    sites: list[Simulated], of: Overlap, names: frozenset[str], rounds: int, out: set[int], *, all_due: bool
) -> tuple[Any, ...]:
    """What each site gives of each part, as it is now."""
    due = of.due(rounds) if of.inner_moments == "average" else (False, False)
    due = (True, True) if all_due and of.inner_moments == "average" else due
    given: dict[tuple[str, Any, Any], dict[int, Tensor]] = {}
    for s in sites:
        for name, expert, rows in s.parts(names):
            key = (name, expert, (rows.start, rows.stop) if expert is None else None)
            change = s.slots["anchor"][name][rows] - s.layout.tensors[name].detach()[rows]
            if of.feedback and name in s.own[RESIDUAL]:
                change = change + s.own[RESIDUAL][name][rows]
            given.setdefault(("change", *key), {})[s.site] = change
            for moment, is_due in zip(("exp_avg", "exp_avg_sq"), due, strict=True):
                if is_due and name in s.layout.trained:
                    value = moments(s.optimizer, s.layout.tensors[name])[moment][rows].clone()
                    given.setdefault((moment, *key), {})[s.site] = value
    return names, given, out, all(due)


def apply(
    sites: list[Simulated], of: Overlap, names: frozenset[str], given: Any, out: set[int], all_due: bool, alpha: float
) -> None:
    means = {}
    for key, values in given.items():
        holders, giving = sorted(values), {site: v for site, v in values.items() if site not in out}
        may_be_coded = key[1].rpartition(".")[2] in ("embedding", "w_in", "w_out")
        codec = of.codec if key[0] == "change" else of.moments_codec
        codec = Root(codec) if codec is not None and key[0] == "exp_avg_sq" else codec
        means[key] = averaged(giving, codec if may_be_coded else None, holders) if giving else (None, {})
    for s in sites:
        for name, expert, rows in s.parts(names):
            key = (name, expert, (rows.start, rows.stop) if expert is None else None)
            local, anchor = s.layout.tensors[name].detach()[rows], s.slots["anchor"][name][rows]
            mean, lost = means["change", *key]
            if mean is None:
                local.copy_(anchor)
            else:
                if of.nesterov and name in s.layout.trained:
                    momentum = s.slots["momentum"][name][rows]
                    momentum.mul_(0.9).add_(mean)
                    mean = 0.7 * (mean + 0.9 * momentum)
                anchor -= mean
                local.copy_(alpha * local + (1 - alpha) * anchor)
            if of.feedback and name in s.own[RESIDUAL]:
                s.own[RESIDUAL][name][rows] = lost.get(s.site, torch.zeros_like(local))
            for moment in ("exp_avg", "exp_avg_sq"):
                if (moment, *key) in means:
                    mean = means[moment, *key][0]
                    moments(s.optimizer, s.layout.tensors[name])[moment][rows] = 0.0 if mean is None else mean
        if of.inner_moments == "reset" or (s.site in out and not all_due):
            for name in names & s.layout.trained:
                s.optimizer.state.pop(s.layout.tensors[name], None)


@pytest.fixture(scope="module")
def histories() -> list[list[list[dict[str, Tensor]]]]:
    """[rank][case][step]: one start of the processes for all cases."""
    return run_distributed(_run, SITES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[repr(case) for case in CASES])
def test_it_equals_the_simulation_after_every_step(histories: list[Any], index: int) -> None:
    for site, expected in enumerate(simulate(CASES[index])):
        for step, values in enumerate(expected, start=1):
            found = histories[site][index][step - 1]
            assert found.keys() == values.keys()
            for key, value in values.items():
                told = f"step {step}, site {site}, {key}"
                torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, t=told: f"{t}: {m}")


def test_the_cases_tell_settings_apart(histories: list[Any]) -> None:
    """A delay, a fragment, alpha and a format each give other values in the end."""
    ends = [found[-1]["anchor layer1.w_in"] for found in histories[0]]
    assert [(i, j) for i in range(15) for j in range(i) if torch.equal(ends[i], ends[j])] == []
