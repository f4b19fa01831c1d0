"""Does a model train on one device as one of several sites, which a full replica of it cannot?

The site has its share of the experts, and besides parameters, gradients and moments what FederatedStrategy keeps for
DiLoCo's outer step: anchors and outer momentum, float32, on the device. Its peers are not there: a sum over the sites
is this site's own values times their number. All else of a round is what a run does.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from harness import now
from model_contestants import Batch, Ours, build_ours
from model_rows import SiteRow
from torch import Tensor

from fomoe_pl.costs.memory import GIB, Load, rank_memory
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Kind, Ledger
from fomoe_pl.federation.outer import Nesterov
from fomoe_pl.federation.placement import place
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Shadow, ShadowBits
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.strategies.federated import copies_of

SITES, LOCAL_STEPS, ROUNDS = 4, 4, 3
CARD_BYTES = 80 * GIB
OUTER = Nesterov(lr=0.7, momentum=0.9)


class MirrorTransport(Transport):
    """A wire whose far ends answer with this site's own values, and with zeros for what only they have."""

    def _new_group(self, sites: tuple[int, ...], slices: bool, timeout: timedelta | None) -> None:
        """There is nobody to meet."""

    def _start_all_reduce(
        self, kind: Kind, buffer: Tensor, sites: tuple[int, ...], *, between: bool = False
    ) -> Callable[[], Any]:
        self.ledger.all_reduce(kind, buffer.nbytes, len(sites))
        return partial(buffer.mul_, len(sites))

    def start_exchange(
        self, kind: Kind, outgoing: Sequence[tuple[int, Tensor]], incoming: dict[int, int], dtype: torch.dtype
    ) -> Callable[[], dict[int, Tensor]]:
        """As of `Transport`."""
        self.ledger.send(kind, sum(tensor.nbytes for _, tensor in outgoing))
        arrived = {site: torch.zeros(numel, dtype=dtype, device=self.device) for site, numel in incoming.items()}
        return lambda: arrived


@dataclass(frozen=True)
class Rank:
    """What one device holds.

    Attributes:
        what: In words, for the table.
        overlap: Sites that hold each expert; `SITES` for a full replica.
        rounds: Whether there are outer steps, and so anchors and momentum.
        shadow_bits: Of copies that compute the picks of absent experts; None skips these.
    """

    what: str
    overlap: int
    rounds: bool
    shadow_bits: ShadowBits | None = None


RANKS = (
    Rank(f"site 0 of {SITES}, overlap 1, anchors and outer momentum", 1, rounds=True),
    Rank("the same, the other experts as copies of 4 bits", 1, rounds=True, shadow_bits=4),
    Rank("full replica, anchors and outer momentum", SITES, rounds=True),
    Rank("full replica, no outer step", SITES, rounds=False),
)


def measure(config: ModelConfig, device: torch.device, build: Ours, rank: Rank, batches: list[Batch]) -> SiteRow:
    """Train for a few rounds; running out of memory is a result.

    Args:
        config: The architecture.
        device: Where to train. More than 80 GiB of a GPU are not used.
        build: Backend, and whether blocks are compiled.
        rank: What it holds.
        batches: On the host, all of one shape.
    """
    batch_size, length = batches[0][0].shape
    n_resident = config.n_experts * rank.overlap // SITES
    load = Load(
        precision="bf16-mixed" if device.type == "cuda" else "32-true", batch_size=batch_size, sequence_length=length,
        method="rounds" if rank.rounds else "single", outer_momentum=rank.rounds,
        bf16_gradients=build.bf16_gradients,
    )  # fmt: skip
    copied: dict[str, Any] = {}
    if rank.shadow_bits is not None:
        copied = {"routing": "shadow", "shadow": Shadow(rank.shadow_bits)}
    row = SiteRow(what=rank.what, predicted_bytes=rank_memory(config, load, n_resident=n_resident, **copied).peak)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_BYTES / total), device)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _train(config, device, build, rank, batches, row)
    except Exception as error:  # the other rows still come, and this one says why it has no figures
        row.tokens_per_second = row.round_seconds = None
        row.out_of_memory = isinstance(error, torch.OutOfMemoryError)
        row.note = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}".replace("|", "/")
    if device.type == "cuda":
        row.peak_bytes = torch.cuda.max_memory_allocated(device)
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    gc.collect()
    return row


def _train(
    config: ModelConfig, device: torch.device, build: Ours, rank: Rank, batches: list[Batch], row: SiteRow
) -> None:
    fraction = Fraction(rank.overlap, SITES)
    build = replace(build, shadow_bits=rank.shadow_bits)
    contestant = build_ours(config, device, build, fraction, autocast=device.type == "cuda")
    federation = _federation(contestant.model, config, device, rank.overlap) if rank.rounds else None
    tokens = batches[0][0].numel()
    speeds, rounds, losses = [], [], []
    for _ in range(ROUNDS):
        start = now()
        for step in range(LOCAL_STEPS):
            contestant.step(batches[step % len(batches)])
        speeds.append(LOCAL_STEPS * tokens / (now() - start))
        losses.append(contestant.loss())
        if federation is not None:
            start = now()
            federation.synchronize(contestant.optimizer)
            federation.refresh_copies()
            rounds.append(now() - start)
    row.tokens_per_second = statistics.median(speeds[1:])  # the first block compiles
    row.round_seconds = statistics.median(rounds) if rounds else None
    row.losses = [losses[0], losses[-1]]
    row.note = f"batch {batches[0][0].shape[0]} x {batches[0][0].shape[1]}, {ROUNDS} rounds of {LOCAL_STEPS} steps"
    if rank.rounds:
        row.note += "; the peers' sums are its own"


def _federation(model: torch.nn.Module, config: ModelConfig, device: torch.device, overlap: int) -> Federation:
    assert isinstance(model, Transformer)
    placement = place("fixed", n_layers=config.n_layers, n_experts=config.n_experts, n_sites=SITES, overlap=overlap)
    wire = MirrorTransport(Topology(SITES, 1, 0), placement.holder_sets(), Ledger(), device=device)
    layout = ParameterLayout.of(model, model.expert_tensors())
    return Federation(layout, placement, wire, outer=OUTER, copies=copies_of(model))


def site_target(rows: list[SiteRow]) -> str:
    """What the rows say of the target."""
    n_sites = sum(rank.overlap < SITES for rank in RANKS)
    sites, replicas = rows[:n_sites], rows[n_sites:]
    if any(site.tokens_per_second is None for site in sites):
        return "MISSED: a site does not train"
    if not all(replica.out_of_memory for replica in replicas):
        return "MISSED: a full replica did not run out of memory"
    need = min(replica.predicted_bytes for replica in replicas) / GIB
    return f"met: the sites train, a full replica would need {need:.0f} GiB or more and runs out of memory"
