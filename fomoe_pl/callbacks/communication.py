"""Logs what sites send, how long it takes, and what other methods would have sent."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fomoe_pl.callbacks.observed import (
    RoundCallback,
    log,
    measures_sync,
    observe_rounds,
    observed_module,
    observed_strategy,
)
from fomoe_pl.callbacks.throughput import TimedCallback
from fomoe_pl.costs.bytes import ITEMSIZE, ddp_step_bytes, replica_round_bytes
from fomoe_pl.costs.memory import MIB
from fomoe_pl.federation.ledger import KINDS, Ledger
from fomoe_pl.federation.observer import RoundObserver

NOT_TRAINING = ("evaluation",)
"""Kinds that depend on how often one validates, not on the method."""
LINKS = (0.1, 1.0, 10.0)
"""Link speeds for which time is modelled, 10^9 bits a second."""


def wire_bytes(ledger: Ledger) -> dict[str, int]:
    """Wire bytes so far by kind, and their `total`."""
    return {**{kind: ledger.wire(kind) for kind in KINDS}, "total": ledger.total_wire}


def payload_bytes(ledger: Ledger) -> dict[str, int]:
    """Payload bytes so far by kind, and their `total`."""
    return {**{kind: ledger.payload(kind) for kind in KINDS}, "total": ledger.total_payload}


def training_bytes(by_kind: dict[str, int]) -> int:
    """Total without what validations send."""
    return by_kind["total"] - sum(by_kind[kind] for kind in NOT_TRAINING)


class CommunicationMonitor(TimedCallback, RoundCallback, RoundObserver):
    """Logs bytes and synchronisation time; of site 0 where nothing else is said.

    - `comm/payload_MiB/<kind>` and `comm/wire_MiB/<kind>`: since the start of the run;
    - `comm/round_wire_MiB/<kind>`: since the last time, so a round and the evaluation before it;
    - `comm/training_wire_MiB`: since the start of the run, without evaluation;
    - `comm/site_wire_MiB/site_<ii>` and `comm/all_sites_wire_MiB`: all kinds since the start of the run, up to the
      round's control message, which carries them;
    - `comm/wire_per_token_B`: wire bytes of all kinds over this site's tokens, both since this process started to
      train (FoMoE, arXiv 2606.19025, cost model: bytes a site over the tokens of its local batches);
    - `comm/ddp_wire_MiB`, `comm/replica_wire_MiB`: what the same steps would have sent with data parallelism, and the
      same rounds with full-replica DiLoCo (`fomoe_pl.costs.bytes`), gradients in the parameters' dtype and
      replicas in the run's `wire_dtype`; `comm/of_ddp`, `comm/of_replica`: the training bytes over these;
    - `comm/sync_s`: since the start of the run; `comm/sync_share`: its part of the training time of this process;
    - `comm/bandwidth_MiB_per_s`: training bytes of the last round over its synchronisation time;
    - `comm/modelled_s/<link>`: local time plus this process's training bytes over links of 0.1, 1 and 10 Gbit/s,
      without latency;

    Data parallelism overlaps its synchronisation with the backward pass, and nobody measures it: there the three about
    its time are missing, and local time is all of the training time.

    `round/<name>` are the strategy's means over all sites, after a round. `<kind>` is each of the ledger's kinds and
    `total`.

    Args:
        every_n_steps: Interval in synchronous training, in optimizer steps.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        TimedCallback.__init__(self)
        RoundCallback.__init__(self, every_n_steps)
        self._wire: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting at what was already sent: at set-up, or before a resumption."""
        TimedCallback.on_train_start(self, trainer, pl_module)
        RoundCallback.on_train_start(self, trainer, pl_module)
        strategy, module = observed_strategy(trainer), observed_module(pl_module)
        observe_rounds(trainer, self)
        self._strategy = strategy
        self._wire = self._wire_at_start = wire_bytes(strategy.ledger_of_site())
        self._sync_seconds = strategy.sync_seconds
        self._tokens_at_start = module.tokens_seen
        self._site_wire: list[float] = []
        dtype = str(next(pl_module.parameters()).dtype).removeprefix("torch.")
        n = strategy.topology.n_sites
        self._ddp_step = ddp_step_bytes(module.config, n, dtype) if dtype in ITEMSIZE else 0  # type: ignore[arg-type]
        self._replica_round = replica_round_bytes(module.config, n, strategy.wire_dtype)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Time, then rounds."""
        TimedCallback.on_train_batch_end(self, trainer, pl_module)
        RoundCallback.on_train_batch_end(self, trainer, pl_module)

    def statistics(self) -> Tensor:
        """Bytes of this site in its own entry, zeros elsewhere."""
        topology, ledger = self._strategy.topology, self._strategy.ledger_of_site()
        own = torch.zeros(topology.n_sites, dtype=torch.float64)
        if topology.leads:
            own[topology.site] = ledger.total_wire
        return own

    def receive(self, total: Tensor) -> None:
        """What each site sent."""
        self._site_wire = total.tolist()

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log totals and differences to the last call."""
        strategy = observed_strategy(trainer)
        ledger = strategy.ledger_of_site()
        if not trainer.is_global_zero:
            return
        wire, payload = wire_bytes(ledger), payload_bytes(ledger)
        values = {f"comm/payload_MiB/{kind}": n / MIB for kind, n in payload.items()}
        values |= {f"comm/wire_MiB/{kind}": n / MIB for kind, n in wire.items()}
        values |= {f"comm/round_wire_MiB/{kind}": (n - self._wire[kind]) / MIB for kind, n in wire.items()}
        values["comm/training_wire_MiB"] = training_bytes(wire) / MIB
        values |= {f"comm/site_wire_MiB/site_{site:02d}": n / MIB for site, n in enumerate(self._site_wire)}
        if self._site_wire:
            values["comm/all_sites_wire_MiB"] = sum(self._site_wire) / MIB
        tokens = observed_module(pl_module).tokens_seen - self._tokens_at_start
        values["comm/wire_per_token_B"] = (wire["total"] - self._wire_at_start["total"]) / tokens
        values |= self._compared(training_bytes(wire), trainer.global_step, strategy.rounds_done)
        if measures_sync(strategy):
            values |= self._sync(wire, strategy.sync_seconds)
        sent = training_bytes(wire) - training_bytes(self._wire_at_start)
        for link in LINKS:
            values[f"comm/modelled_s/{link:g}Gbps"] = self.trained.local_seconds + 8 * sent / (link * 1e9)
        values |= {f"round/{name}": value for name, value in strategy.round_stats.items()}
        log(trainer, values)
        self._wire, self._sync_seconds = wire, strategy.sync_seconds

    def _compared(self, sent: int, steps: int, rounds: int) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, n in (("ddp", steps * self._ddp_step), ("replica", rounds * self._replica_round)):
            if n:  # one site sends nothing with any method, and without rounds there is no DiLoCo to compare with
                values |= {f"comm/{name}_wire_MiB": n / MIB, f"comm/of_{name}": sent / n}
        return values

    def _sync(self, wire: dict[str, int], sync_seconds: float) -> dict[str, float]:
        values = {"comm/sync_s": sync_seconds, "comm/sync_share": self.trained.sync_seconds / self.trained.seconds}
        if sync_seconds > self._sync_seconds:
            in_round = training_bytes(wire) - training_bytes(self._wire)
            values["comm/bandwidth_MiB_per_s"] = in_round / MIB / (sync_seconds - self._sync_seconds)
        return values
