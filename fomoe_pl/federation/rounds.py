"""Rounds: what sites agree on, and how they come to agree (FoMoE, arXiv 2606.19025, synchronisation).

A `Federation` owns this site's anchors and outer state. It never sees a model class: it gets a `ParameterLayout`.
The order of collectives follows from the placement and the round index alone, so that no site waits for a collective
that another does not issue.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby, product
from operator import itemgetter
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fomoe_pl.federation.agreement import disagreements
from fomoe_pl.federation.inner import RowAdamW, moments
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Kind
from fomoe_pl.federation.movement import AGREED, MEAN, OWN, Movement
from fomoe_pl.federation.outer import OuterRule, outer_steps_
from fomoe_pl.federation.outer_state import OuterState, Piece, cut, joined
from fomoe_pl.federation.placement import Placement, Transfer, gather_layer, migration
from fomoe_pl.federation.wire import Wire

InnerMoments = Literal["keep", "reset", "average"]


class Federation:
    """One site's side of the rounds.

    Args:
        layout: this site's tensors.
        placement: who holds what.
        wire: counted collectives.
        outer: outer rule.
        inner_moments: what a round does to the inner optimizer's moments.
        state_on_host: anchors and outer momentum live in memory of the host, page-locked where there is a GPU, and come
            to the device piece by piece.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        placement: Placement,
        wire: Wire,
        *,
        outer: OuterRule,
        inner_moments: InnerMoments = "keep",
        state_on_host: bool = False,
    ) -> None:
        self.layout = layout
        self.placement = placement
        self.wire = wire
        self.outer = outer
        self.inner_moments = inner_moments
        self.site = wire.topology.site
        self._state = OuterState(layout, has_momentum=outer.has_momentum, on_host=state_on_host)
        self.anchors, self.momenta = self._state.anchors, self._state.momenta
        self._stash: dict[str, Tensor] | None = None
        self.movement: Movement | None = None  # filled by each round, if somebody wants to know

    # -- what is averaged with whom -------------------------------------------------------------------------------

    def _groups(self) -> list[tuple[Kind, tuple[int, ...], list[Piece]]]:
        """(kind, sites, pieces) of every average that this site takes part in, in the global order."""
        tensors, numel = self.layout.tensors, self.wire.bucket_numel
        dense = [piece for name in self.layout.dense for piece in cut(name, tensors[name], numel)]
        groups: list[tuple[Kind, tuple[int, ...], list[Piece]]] = [("dense", self.wire.everyone, dense)]
        residents = self.placement.residents(self.site)
        rows = [{expert: row for row, expert in enumerate(layer)} for layer in residents]
        for sites in self.placement.holder_sets():
            if self.site in sites:
                # Tensor by tensor, so that experts that follow each other are one piece of a bucket.
                pieces = [
                    Piece(name, (rows[layer][expert], rows[layer][expert] + 1))
                    for layer, experts in groupby(self.placement.experts_of(sites), key=itemgetter(0))
                    for name, (_, expert) in product(self.layout.sparse(layer), experts)
                ]
                groups.append(("expert", sites, pieces))
        return groups

    # -- the round ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def synchronize(self, optimizer: torch.optim.Optimizer, left_out: frozenset[int] = frozenset()) -> None:
        """End a round: average, outer step, new anchors, new local values.

        Args:
            optimizer: the inner optimizer, whose moments are kept, reset or averaged.
            left_out: sites that have nothing to give, the same on all sites. They take the agreed values; their
                moments are the others' average, or start fresh. What all holders lack stays as it was.
        """
        self._state.begin()
        measured = self.movement is not None and self.movement.active
        if measured:
            with cast(Movement, self.movement).watched():
                self._note_movement()
        for kind, sites, pieces in self._groups():
            numels = [piece.of(self.anchors[piece.name]).numel() for piece in pieces]
            read, write = partial(self._pseudo_gradients, pieces), partial(self._outer_steps, kind, pieces, measured)
            self.wire.average(kind, sites, numels, read, write, left_out)
            if left_out.issuperset(sites):
                for piece in joined(pieces):
                    piece.of(self.layout.tensors[piece.name]).copy_(piece.of(self.anchors[piece.name]))
        if self.inner_moments == "average":
            self._average_moments(optimizer, left_out)
        elif self.inner_moments == "reset" or self.site in left_out:
            optimizer.state.clear()
        self._state.settle()

    def _pseudo_gradients(self, pieces: Sequence[Piece], bucket: Sequence[int]) -> list[Tensor]:
        taken = joined(pieces[i] for i in bucket)
        return _changes(self._locals(taken), self._state.fetch(taken).anchors)

    def _locals(self, pieces: Sequence[Piece]) -> list[Tensor]:
        return [piece.of(self.layout.tensors[piece.name]) for piece in pieces]

    def _outer_steps(
        self, kind: Kind, pieces: Sequence[Piece], measured: bool, bucket: Sequence[int], mean: Tensor
    ) -> None:
        taken = joined(pieces[i] for i in bucket)
        anchors, momenta = self._state.fetch(taken)
        parts = mean.split([anchor.numel() for anchor in anchors])
        deltas = [part.view_as(anchor) for part, anchor in zip(parts, anchors, strict=True)]
        trained = [i for i, piece in enumerate(taken) if piece.name in self.layout.trained]
        if measured:
            movement = cast(Movement, self.movement)
            with movement.watched(wait=False):  # there is next to nothing to wait for
                for i in trained:
                    layer, experts = self._experts_of(taken[i].name)
                    movement.add(MEAN, layer, experts[slice(*taken[i].rows or (0, 0))], deltas[i])
        if trained:
            moved, by = [anchors[i] for i in trained], [deltas[i] for i in trained]
            outer_steps_(self.outer, moved, by, momenta or None, freeze_if_zero=kind == "expert")
        for i in range(len(taken)):
            if taken[i].name not in self.layout.trained:
                anchors[i].sub_(deltas[i])
        torch._foreach_copy_(self._locals(taken), anchors)
        self._state.store(taken)

    def _note_movement(self) -> None:
        """This site's changes and what they started from: whole tensors, not expert by expert."""
        movement = cast(Movement, self.movement)
        movement.start()
        for name in sorted(self.layout.trained):
            layer, experts = self._experts_of(name)
            local = self.layout.tensors[name]
            anchor = self.anchors[name].to(local.device, non_blocking=True)
            movement.add(OWN, layer, experts, _changes([local], [anchor])[0])
            movement.add(AGREED, layer, experts, anchor)
        movement.settle()  # before the anchors change

    def _experts_of(self, name: str) -> tuple[int | None, Sequence[int]]:
        """Layer and experts of a tensor's rows; None for a dense one."""
        layer = self.layout.expert_layer.get(name)
        return layer, () if layer is None else self.placement.residents_in(layer, self.site)

    def _average_moments(self, optimizer: torch.optim.Optimizer, left_out: frozenset[int]) -> None:
        if left_out and isinstance(optimizer, RowAdamW):
            for name in sorted(self.layout.trained):
                optimizer.start_state(self.layout.tensors[name])  # a site that took no step yet has no moments
        for _, sites, pieces in self._groups():
            views = [
                piece.of(moment)
                for piece in pieces
                if piece.name in self.layout.trained
                for moment in moments(optimizer, self.layout.tensors[piece.name])
            ]
            if left_out.issuperset(sites):
                for view in views:
                    view.zero_()
            self._average_in_place(sites, views, left_out)

    def _average_in_place(self, sites: tuple[int, ...], views: Sequence[Tensor], left_out: frozenset[int]) -> None:
        def read(bucket: Sequence[int]) -> list[Tensor]:
            return [views[i].float() for i in bucket]

        def write(bucket: Sequence[int], mean: Tensor) -> None:
            for i, part in zip(bucket, mean.split([views[i].numel() for i in bucket]), strict=True):
                views[i].copy_(part.view_as(views[i]))

        self.wire.average("moments", sites, [v.numel() for v in views], read, write, left_out)

    def is_finite(self) -> bool:
        """Whether all local values of this site are finite; waits for the device."""
        # Of each the largest magnitude: isfinite would make a copy of the largest tensor, and more.
        largest = torch._foreach_norm([t.detach() for t in self.layout.tensors.values() if t.numel()], torch.inf)
        return bool(torch.stack([norm.float() for norm in largest]).isfinite().all())

    # -- moving experts -------------------------------------------------------------------------------------------

    def _exchange(
        self, kind: Kind, transfers: Sequence[Transfer], layer: int, sources: Sequence[dict[str, Tensor]],
        dtype: torch.dtype | None,
    ) -> dict[int, dict[tuple[int, str], Tensor]]:  # fmt: skip
        """Carry one layer's experts; returns expert -> {(index of source, name): its row}."""
        names = self.layout.sparse(layer)
        keys = [(i, name) for i, source in enumerate(sources) for name in names if name in source]
        row = {expert: r for r, expert in enumerate(self.placement.residents(self.site)[layer])}
        shapes = {key: sources[key[0]][key[1]].shape[1:] for key in keys}
        per_expert = sum(shape.numel() for shape in shapes.values())
        outgoing = [
            (t.receiver, sources[i][name][row[t.expert]]) for t in transfers if t.giver == self.site for i, name in keys
        ]
        mine = [t for t in transfers if t.receiver == self.site]
        incoming: dict[int, int] = {}
        for t in mine:
            incoming[t.giver] = incoming.get(t.giver, 0) + per_expert
        flat = self.wire.exchange(kind, outgoing, incoming, dtype or torch.float32)
        cursors = {giver: iter(part.split([shapes[k].numel() for _ in range(part.numel() // per_expert) for k in keys]))
                   for giver, part in flat.items()}  # fmt: skip
        return {t.expert: {key: next(cursors[t.giver]).view(shapes[key]) for key in keys} for t in mine}

    @torch.no_grad()
    def migrate(self, new: Placement, optimizer: torch.optim.Optimizer) -> int:
        """Move to another placement at a round boundary; experts travel with anchors and outer momentum.

        Received experts start with fresh inner state; kept ones keep theirs.

        Args:
            new: the next placement, equal on all sites.
            optimizer: the inner optimizer.

        Returns:
            Number of experts that this site received, over all layers.
        """
        transfers = migration(self.placement, new)
        before, after = self.placement.residents(self.site), new.residents(self.site)
        received = 0
        for layer in range(len(new.holders)):
            moving = [t for t in transfers if t.layer == layer]
            if not moving:
                continue
            sources = [self.anchors, self.momenta]
            arrived = self._exchange("migration", moving, layer, sources, torch.float32)
            received += len(arrived)
            old_row = {expert: r for r, expert in enumerate(before[layer])}
            plan = [old_row.get(expert) for expert in after[layer]]
            for name in self.layout.sparse(layer):
                for i, source in enumerate(sources):
                    if name in source:
                        old = source[name].clone()
                        for r, expert in enumerate(after[layer]):
                            kept = plan[r]
                            source[name][r].copy_(old[kept] if kept is not None else arrived[expert][i, name])
                self.layout.tensors[name].copy_(self.anchors[name])
                if name in self.layout.trained and isinstance(optimizer, RowAdamW):
                    optimizer.replace_rows(self.layout.tensors[name], plan)
        self.placement = new
        return received

    @torch.no_grad()
    def gather(self, layer: int) -> dict[str, Tensor]:
        """All E experts of one layer, stacked, from their holders (every site must call it).

        Returns:
            Name -> (E, ...) in the training dtype, on the tensor's device; the site's own rows are copied too.
        """
        residents = self.placement.residents(self.site)[layer]
        names = self.layout.sparse(layer)
        local = {name: self.layout.tensors[name] for name in names}
        transfers = gather_layer(self.placement, layer)
        # Tensors of one layer may differ in dtype (a float32 bias beside bf16 weights): one exchange for each dtype.
        gathered: dict[str, Tensor] = {}
        n_experts = len(self.placement.holders[layer])
        for dtype in sorted({t.dtype for t in local.values()}, key=str):
            source = {name: t for name, t in local.items() if t.dtype == dtype}
            arrived = self._exchange("evaluation", transfers, layer, [source], dtype) if transfers else {}
            for name, tensor in source.items():
                full = tensor.new_empty((n_experts, *tensor.shape[1:]))
                full[list(residents)] = tensor.detach()
                for expert, rows in arrived.items():
                    full[expert].copy_(rows[0, name])
                gathered[name] = full
        return gathered

    # -- the global model in mid-round ----------------------------------------------------------------------------

    @torch.no_grad()
    def enter_global(self) -> None:
        """Put the agreed values into the model; local ones are kept aside until `leave_global`."""
        # On the host: the device has room for one copy of the model.
        self._stash = {name: t.detach().to("cpu", copy=True) for name, t in self.layout.tensors.items()}
        self.layout.fill(self.anchors)

    @torch.no_grad()
    def leave_global(self) -> None:
        """Undo `enter_global`."""
        if self._stash is not None:
            self.layout.fill(self._stash)
            self._stash = None

    # -- agreement and state --------------------------------------------------------------------------------------

    def check_agreement(self) -> None:
        """Compare anchors and outer momentum of all sites: dense tensors of all, each expert's of its holders.

        Raises:
            RuntimeError: if any site differs, naming tensors and sites.
        """
        for what, values in (("", self.anchors), ("outer momentum of ", self.momenta)):
            found = disagreements(self.wire, self.layout, self.placement, values) if values else []
            if found:
                more = f" and {len(found) - 5} more" if len(found) > 5 else ""
                named = "; ".join(what + item for item in found[:5])
                raise RuntimeError(f"sites differ after a round in {named}{more}; resume from a checkpoint")

    def state_dict(self) -> dict[str, Any]:
        """What this site needs, beside the global model, to go on from here."""
        # A checkpoint may be written while a mid-round validation has the agreed values in the model.
        source = self.layout.tensors if self._stash is None else self._stash
        return {"local": {name: tensor.detach() for name, tensor in source.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; anchors must have been set by `load_global` before."""
        self.layout.fill(state["local"])

    @torch.no_grad()
    def load_global(self, weights: dict[str, Tensor]) -> None:
        """Set anchors and local values from the global model (this site's rows)."""
        for name, anchor in self.anchors.items():
            anchor.copy_(weights[name])
        self.layout.fill(self.anchors)


def _changes(local: list[Tensor], anchors: list[Tensor]) -> list[Tensor]:
    """Anchor less local value of each, float32."""
    if all(t.dtype == torch.float32 for t in local):
        return list(torch._foreach_sub(anchors, local))
    # A site started from the anchor in the training dtype. What that rounded off is no change, and stays in the anchor:
    # else an outer step would feed it back round after round.
    return [anchor.to(t.dtype).float() - t.float() for t, anchor in zip(local, anchors, strict=True)]
