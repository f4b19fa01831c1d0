"""The byte ledger: what each site sends, by kind, counted where collectives are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Kind = Literal["dense", "expert", "moments", "migration", "shadow", "evaluation", "checkpoint", "control"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def ring_all_reduce_bytes(payload: int, group_size: int) -> int:
    """Bytes that one rank of a ring all-reduce sends: 2 (g - 1) / g x payload, rounded down."""
    return 2 * (group_size - 1) * payload // group_size


@dataclass
class Ledger:
    """Bytes that this rank handed to collectives and sent.

    Totals are kept per kind and group size, so that the ring factor is applied once to the sum and the result does
    not depend on how the tensors were cut into buckets.

    Attributes:
        reduced: (kind, group size) -> payload bytes of all-reduces.
        sent: Kind -> payload bytes sent point to point.
        calls: Kind -> number of collectives.
    """

    reduced: Counter[tuple[Kind, int]] = field(default_factory=Counter)
    sent: Counter[Kind] = field(default_factory=Counter)
    calls: Counter[Kind] = field(default_factory=Counter)

    def all_reduce(self, kind: Kind, payload: int, group_size: int) -> None:
        """Count one all-reduce of `payload` bytes (numel x wire dtype) in a group of `group_size` ranks."""
        self.reduced[kind, group_size] += payload
        self.calls[kind] += 1

    def send(self, kind: Kind, payload: int) -> None:
        """Count one exchange in which this rank sends `payload` bytes point to point."""
        self.sent[kind] += payload
        self.calls[kind] += 1

    def add(self, other: Ledger) -> None:
        """Count what another ledger has counted."""
        self.reduced += other.reduced
        self.sent += other.sent
        self.calls += other.calls

    def summed(self, total: Callable[[Tensor], Tensor], n_ranks: int) -> Ledger:
        """Add up the ledgers of several ranks.

        Args:
            total: Sums a tensor over them; all call it together.
            n_ranks: Most ranks of a group.
        """
        table = torch.zeros(len(KINDS), n_ranks + 3, dtype=torch.int64)
        for row, kind in zip(table, KINDS, strict=True):
            row[0], row[1] = self.sent[kind], self.calls[kind]
            for size in range(n_ranks + 1):
                row[2 + size] = self.reduced[kind, size]
        found = Ledger()
        for kind, (sent, calls, *reduced) in zip(KINDS, total(table).tolist(), strict=True):
            found.sent += Counter({kind: sent})
            found.calls += Counter({kind: calls})
            found.reduced += Counter({(kind, size): n for size, n in enumerate(reduced)})
        return found

    def payload(self, kind: Kind) -> int:
        """Payload bytes of one kind."""
        return self.sent[kind] + sum(n for (k, _), n in self.reduced.items() if k == kind)

    def wire(self, kind: Kind) -> int:
        """Bytes that leave this rank for one kind: ring factor for all-reduces, the payload itself otherwise."""
        rings = sum(ring_all_reduce_bytes(n, g) for (k, g), n in self.reduced.items() if k == kind)
        return self.sent[kind] + rings

    @property
    def total_payload(self) -> int:
        """Payload bytes of all kinds."""
        return sum(self.payload(kind) for kind in KINDS)

    @property
    def total_wire(self) -> int:
        """Wire bytes of all kinds."""
        return sum(self.wire(kind) for kind in KINDS)

    def state_dict(self) -> dict[str, Any]:
        """Totals for a checkpoint (plain types only)."""
        reduced = [[kind, group, n] for (kind, group), n in self.reduced.items()]
        return {"reduced": reduced, "sent": dict(self.sent), "calls": dict(self.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's totals."""
        self.reduced = Counter({(kind, group): n for kind, group, n in state["reduced"]})
        self.sent = Counter(state["sent"])
        self.calls = Counter(state["calls"])
