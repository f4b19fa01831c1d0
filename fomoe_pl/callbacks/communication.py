"""Logs what site 0 sends and how long it takes."""

from lightning.pytorch import LightningModule, Trainer

from fomoe_pl.callbacks.observed import MIB, RoundCallback, log, observed_module, observed_strategy
from fomoe_pl.federation.ledger import KINDS, Ledger


def wire_bytes(ledger: Ledger) -> dict[str, int]:
    """Wire bytes so far by kind, and their `total`."""
    return {**{kind: ledger.wire(kind) for kind in KINDS}, "total": ledger.total_wire}


def payload_bytes(ledger: Ledger) -> dict[str, int]:
    """Payload bytes so far by kind, and their `total`."""
    return {**{kind: ledger.payload(kind) for kind in KINDS}, "total": ledger.total_payload}


class CommunicationMonitor(RoundCallback):
    """Logs site 0's bytes and synchronisation time.

    - `comm/payload(MiB)/<kind>` and `comm/wire(MiB)/<kind>`: since the start of the run;
    - `comm/round_wire(MiB)/<kind>`: since the last time, so a round and the evaluation before it;
    - `comm/sync(s)`: since the start of the run;
    - `comm/wire_per_token(B)`: wire bytes of all kinds over this site's tokens, both since this process started to
      train (FoMoE, arXiv 2606.19025, cost model: bytes a site over the tokens of its local batches);
    - `round/<name>`: the strategy's means over all sites, after a round.

    `<kind>` is each of the ledger's kinds and `total`.

    Args:
        every_n_steps: Interval in optimizer steps where there are no rounds.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        super().__init__(every_n_steps)
        self._wire: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rounds are counted from what was sent before the first step (setting up, or before a resumption)."""
        super().on_train_start(trainer, pl_module)
        self._wire = self._wire_at_start = wire_bytes(observed_strategy(trainer).ledger)
        self._tokens_at_start = observed_module(pl_module).tokens_seen

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log totals and what was added to them."""
        if not trainer.is_global_zero:
            return
        strategy = observed_strategy(trainer)
        wire, payload = wire_bytes(strategy.ledger), payload_bytes(strategy.ledger)
        values = {f"comm/payload(MiB)/{kind}": n / MIB for kind, n in payload.items()}
        values |= {f"comm/wire(MiB)/{kind}": n / MIB for kind, n in wire.items()}
        values |= {f"comm/round_wire(MiB)/{kind}": (n - self._wire[kind]) / MIB for kind, n in wire.items()}
        values["comm/sync(s)"] = strategy.sync_seconds
        tokens = observed_module(pl_module).tokens_seen - self._tokens_at_start
        values["comm/wire_per_token(B)"] = (wire["total"] - self._wire_at_start["total"]) / tokens
        values |= {f"round/{name}": value for name, value in strategy.round_stats.items()}
        log(trainer, values)
        self._wire = wire
