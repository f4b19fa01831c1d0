"""What a site keeps between rounds: named slots of float32 values, on the device or on the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fomoe_pl.federation.layout import ParameterLayout

ANCHOR = "anchor"
"""The slot of agreed values; others are the outer rule's."""
RESIDUAL = "residual"
"""A slot of the site's own: what coding has lost of its changes, to be added to the next ones (error feedback)."""

Fetched = dict[str, list[Tensor]]
"""Slot -> the values of some pieces, on the device of the layout's tensors."""


class Piece(NamedTuple):
    """A tensor, or rows of it (its first dimension: of stacked tensors an expert each), first and last + 1."""

    name: str
    rows: tuple[int, int] | None

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor that has the layout's shape, as a view."""
        return tensor if self.rows is None else tensor[slice(*self.rows)]


def cut(name: str, tensor: Tensor, numel: int) -> list[Piece]:
    """A tensor in pieces of so many numbers, or of one row each if that is more."""
    n_rows = len(tensor) if tensor.dim() else 1
    step = max(1, numel * n_rows // max(1, tensor.numel()))
    if n_rows <= step:
        return [Piece(name, None)]
    return [Piece(name, (row, min(row + step, n_rows))) for row in range(0, n_rows, step)]


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same in fewer pieces: rows that lie one after the other are one."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last and last.rows and piece.rows and last.name == piece.name and last.rows[1] == piece.rows[0]:
            found[-1] = Piece(piece.name, (last.rows[0], piece.rows[1]))
        else:
            found.append(piece)
    return found


def buckets(numels: Sequence[int], limit: int) -> list[list[int]]:
    """Cut a list of pieces, in order, into buckets of at most `limit` elements (or one larger piece).

    Returns:
        Indices of the pieces of each bucket.
    """
    found: list[list[int]] = []
    filled = 0
    for i, numel in enumerate(numels):
        if not found or filled + numel > limit:
            found.append([])
            filled = 0
        found[-1].append(i)
        filled += numel
    return found


class State:
    """Slots of values by the layout's names, float32 in any training precision: bfloat16 would lose small updates.

    Args:
        layout: This site's tensors, whose values the anchors start with.
        slots: Further slots, of what is trained, which start at zero.
        feedback: Keep the slot `RESIDUAL`, of what may be coded.
        on_host: Keep everything in memory of the host, page-locked where the tensors are on a GPU.

    Attributes:
        slots: Slot -> name -> values of the tensor's shape; `ANCHOR` has all names, others those that are trained.
            Equal on all sites that hold them.
        own: The same of slots that are the site's own.
    """

    def __init__(
        self, layout: ParameterLayout, *, slots: Sequence[str] = (), feedback: bool = False, on_host: bool = False
    ) -> None:
        new = _on_host if on_host else partial(torch.empty_like, dtype=torch.float32)
        self.layout = layout
        self.slots: dict[str, dict[str, Tensor]] = {
            ANCHOR: {name: new(t.detach()).copy_(t.detach()) for name, t in layout.tensors.items()}
        }
        for slot in slots:
            self.slots[slot] = {
                name: new(t.detach()).zero_() for name, t in layout.tensors.items() if name in layout.trained
            }
        self.own: dict[str, dict[str, Tensor]] = {}
        if feedback:
            coded = (name for name in layout.tensors if layout.may_be_coded(name))
            self.own[RESIDUAL] = {name: new(layout.tensors[name].detach()).zero_() for name in coded}
        self._elsewhere = on_host
        self._on_their_way: dict[Piece, Fetched] = {}
        on_gpu = on_host and any(t.is_cuda for t in layout.tensors.values())
        self._there: torch.cuda.Stream | None = torch.cuda.Stream() if on_gpu else None
        self._back: torch.cuda.Stream | None = torch.cuda.Stream() if on_gpu else None
        self._storing: tuple[torch.cuda.Event, Fetched] | None = None

    @property
    def anchors(self) -> dict[str, Tensor]:
        """Agreed values by name."""
        return self.slots[ANCHOR]

    @property
    def of_rule(self) -> dict[str, dict[str, Tensor]]:
        """The outer rule's slots."""
        return {slot: values for slot, values in self.slots.items() if slot != ANCHOR}

    def begin(self) -> None:
        """Forget what a round that broke off has fetched."""
        self._on_their_way.clear()

    def forget(self) -> None:
        """Give back the memory of what was fetched and only read; it is fetched once more when it is written."""
        if self._there is not None:  # whoever gets that memory next writes after today's readers
            self._there.wait_stream(torch.cuda.current_stream())
        self._on_their_way.clear()

    def fetch(self, pieces: Sequence[Piece]) -> Fetched:
        """The state of pieces on the device of their values: itself, or a copy, which stays there until `store`.

        Returns:
            Slot -> values in the order of the pieces; a slot of what is trained leaves the other pieces out.
        """
        if not self._elsewhere:
            return self._of(pieces)
        if pieces[0] not in self._on_their_way:
            kept, device = self._of(pieces), self.layout.tensors[pieces[0].name].device
            # Beside the work on the bucket before. What was in that memory has ended: `store` waits for it.
            with torch.cuda.stream(self._there):
                there = {slot: [t.to(device, copy=True, non_blocking=True) for t in of] for slot, of in kept.items()}
            if self._there is not None:
                torch.cuda.current_stream().wait_stream(self._there)
            self._on_their_way[pieces[0]] = there
        return self._on_their_way[pieces[0]]

    def store(self, pieces: Sequence[Piece]) -> None:
        """Keep what was made of the state that `fetch` gave, and forget that."""
        if not self._elsewhere:
            return
        there, kept = self._on_their_way.pop(pieces[0]), self._of(pieces)
        if self._back is None:
            _copy(there, kept)
            return
        # One store at a time, beside the next fetch: the bus goes both ways at once. A host that runs ahead, with many
        # stores to come, would hold the memory of all of them.
        self.settle()
        self._back.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._back):
            _copy(there, kept)
            self._storing = self._back.record_event(), there

    def settle(self) -> None:
        """Wait until the host has everything."""
        if self._storing is not None:
            self._storing[0].synchronize()
            self._storing = None

    def _of(self, pieces: Sequence[Piece]) -> Fetched:
        return {
            slot: [piece.of(values[piece.name]) for piece in pieces if piece.name in values]
            for slot, values in (self.slots | self.own).items()
        }


def _on_host(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32, device="cpu", pin_memory=like.is_cuda)


def _copy(there: Mapping[str, Sequence[Tensor]], kept: Mapping[str, Sequence[Tensor]]) -> None:
    for slot, values in there.items():
        for source, target in zip(values, kept[slot], strict=True):
            target.copy_(source, non_blocking=True)
