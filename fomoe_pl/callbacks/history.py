"""History of a whole run in bounded memory: the longer the run, the coarser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COLUMNS = 256
"""Most columns of a `LoadHistory`; an even number."""
LOOKS = 128
"""Most snapshots in a `PickHistory`; one of 512 tokens, 16 layers and 8 picks takes 128 KiB in checkpoints."""


def relative_load(load_LE: Tensor, scored_LE: Tensor) -> Tensor:
    """Return loads over their mean (L,E), 1 is even; NaN for experts that could not be picked.

    Args:
        load_LE: Picks of each expert.
        scored_LE: Bool, experts that could be picked: in partitioned routing of one site alone, its residents.
    """
    mean_L1 = load_LE.sum(dim=1, keepdim=True) / scored_LE.sum(dim=1, keepdim=True)
    return torch.where(scored_LE, load_LE / mean_L1, torch.nan)


class LoadHistory:
    """Loads of every round since the start, in at most `COLUMNS` columns.

    Where there would be more, two neighbours become one: the columns then are means of 2, 4, ... rounds. None is left
    out.

    Attributes:
        rounds_each: Rounds of a column; the last one may have fewer.
    """

    def __init__(self, start: int = 0) -> None:
        self.rounds_each = 1
        self._in_last = 0
        self._edges = [start]
        self._loads: list[tuple[Tensor, Tensor]] = []

    def add(self, step: int, load_LE: Tensor, scored_LE: Tensor) -> None:
        """Add a round.

        Args:
            step: Optimizer steps taken at its end.
            load_LE: Picks of each expert.
            scored_LE: Bool, experts that could be picked.
        """
        added = load_LE.float(), scored_LE
        if self._loads and self._in_last < self.rounds_each:
            self._loads[-1], self._edges[-1] = _joined(self._loads[-1], added), step
            self._in_last += 1
            return
        self._loads.append(added)
        self._edges.append(step)
        self._in_last = 1
        if len(self._loads) > COLUMNS:
            full, new = self._loads[:-1], self._loads[-1]
            self._loads = [*(_joined(*pair) for pair in zip(full[::2], full[1::2], strict=True)), new]
            self._edges = [*self._edges[:-1:2], self._edges[-1]]
            self.rounds_each *= 2

    def columns(self) -> tuple[Tensor, list[int]]:
        """Return relative loads (R,L,E), and the R + 1 steps between which they were taken."""
        return torch.stack([relative_load(*loads) for loads in self._loads]), list(self._edges)

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "rounds_each": self.rounds_each, "in_last": self._in_last, "edges": self._edges[:],
            "loads": self._loads[:],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.rounds_each, self._in_last = state["rounds_each"], state["in_last"]
        self._edges, self._loads = list(state["edges"]), list(state["loads"])


def _joined(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return one[0] + other[0], one[1] | other[1]


class PickHistory:
    """Picks on the probe at earlier rounds; of a long run every second, fourth, ... of them, and the last."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Tensor]] = []
        self._last: list[tuple[int, Tensor]] = []  # one, or none
        self._stride, self._looks = 1, 0

    def looks(self) -> list[tuple[int, Tensor]]:
        """Optimizer steps, and picks (L,T,K) as int16."""
        return self._kept + [last for last in self._last if not self._kept or last[0] != self._kept[-1][0]]

    def add(self, step: int, picks_LTK: Tensor) -> None:
        """Add the picks of a round.

        Args:
            step: Optimizer steps taken.
            picks_LTK: Expert ids.
        """
        self._last = [(step, picks_LTK.to(torch.int16))]
        if self._looks % self._stride == 0:
            self._kept += self._last
        self._looks += 1
        if len(self._kept) > LOOKS:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"kept": self._kept[:], "last": self._last, "stride": self._stride, "looks": self._looks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._kept, self._last = list(state["kept"]), state["last"]
        self._stride, self._looks = state["stride"], state["looks"]
