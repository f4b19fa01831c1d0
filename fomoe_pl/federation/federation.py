"""Rounds: what sites agree on, and how they come to agree (FoMoE, arXiv 2606.19025, synchronisation).

A `Federation` owns this site's state: anchors and the outer rule's slots. It never sees a model class: it gets a
`ParameterLayout`. The order of collectives follows from the view and the round alone, so that no site waits for a
collective that another does not issue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby, product
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fomoe_pl.codec import Codec, Root
from fomoe_pl.federation.agreement import disagreements
from fomoe_pl.federation.flight import Arrived, Bucket, Flight
from fomoe_pl.federation.inner import SECOND_MOMENT, RowAdamW, moments
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Kind
from fomoe_pl.federation.left_out import LeftOut
from fomoe_pl.federation.movement import AGREED, MEAN, OWN, Movement
from fomoe_pl.federation.outer import OuterRule
from fomoe_pl.federation.placement import Placement, Transfer, gather_layer, migration
from fomoe_pl.federation.settings import InnerMoments
from fomoe_pl.federation.shadow import Arriving, Copies, owned_rows, refresh_layer
from fomoe_pl.federation.state import ANCHOR, RESIDUAL, Piece, State, buckets, cut, joined
from fomoe_pl.federation.transport import Transport

Due = tuple[bool, bool]
"""Whether a round averages first moments, and second ones."""


Rows = dict[int, dict[tuple[int, str], Tensor]]
"""Expert -> {(index of source, name): its row}."""


class Group(NamedTuple):
    """What is averaged over the same sites in the same code.

    Attributes:
        kind: Ledger kind.
        sites: The holder set.
        pieces: In the order of averaging.
        codec: None for a cast.
    """

    kind: Kind
    sites: tuple[int, ...]
    pieces: list[Piece]
    codec: Codec | None


class Federation:
    """One site's side of the rounds.

    Args:
        layout: This site's tensors.
        placement: Who holds what.
        transport: Counted collectives.
        outer: Outer rule.
        inner_moments: What a round does to the inner optimizer's moments.
        codec: Of the changes that may be coded; None casts them.
        moments_codec: Of the moments of what may be coded; None casts them.
        error_feedback: What coding has lost of a change is added to the next one.
        feedback_decay: Which share of it.
        state_on_host: Anchors and the outer rule's state live in memory of the host, page-locked where there is a GPU,
            and come to the device piece by piece.
        copies: Of the experts that this site does not hold, if there are any.
        joined: Joins the slices that the site's ranks have of rows of a tensor, which is given by its name; None
            where they are whole.

    Attributes:
        state: Anchors, the outer rule's slots, and what coding has lost.
        movement: Filled by each round, if somebody wants to know.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        placement: Placement,
        transport: Transport,
        *,
        outer: OuterRule,
        inner_moments: InnerMoments = "keep",
        codec: Codec | None = None,
        moments_codec: Codec | None = None,
        error_feedback: bool = False,
        feedback_decay: float = 1.0,
        state_on_host: bool = False,
        copies: Copies | None = None,
        joined: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self.layout = layout
        self.placement = placement
        self.transport = transport
        self.outer = outer
        self.inner_moments, self.feedback_decay = inner_moments, feedback_decay
        self.codec, self.moments_codec = codec, moments_codec
        self.site = transport.topology.site
        self.state = State(layout, slots=outer.slots, feedback=error_feedback, on_host=state_on_host)
        self.copies, self._joined_rows = copies, joined
        self._stash: dict[str, Tensor] | None = None
        self._alpha = 0.0
        self.movement: Movement | None = None

    @property
    def anchors(self) -> dict[str, Tensor]:
        """Agreed values by name, float32."""
        return self.state.anchors

    # -- the round ------------------------------------------------------------------------------------------------

    def synchronize(
        self, optimizer: torch.optim.Optimizer, left_out: frozenset[int] = frozenset(), *, due: Due = (True, True)
    ) -> None:
        """A whole round at once: `begin` and `finish`."""
        self.finish(self.begin(optimizer, LeftOut(left_out), due=due))

    @torch.no_grad()
    def begin(
        self, optimizer: torch.optim.Optimizer, left_out: LeftOut = LeftOut(), *, ahead: int | None = 1,  # noqa: B008
        due: Due = (True, True), names: frozenset[str] | None = None, arrived: Sequence[Arrived] | None = None,
    ) -> Flight:  # fmt: skip
        """Start to average this site's changes, and its moments if they are averaged.

        Args:
            optimizer: The inner optimizer, whose moments are kept, reset or averaged.
            left_out: Sites that have nothing to give. They take the agreed values; their moments are the others'
                average, or start fresh. What all holders lack stays as it was.
            ahead: Buckets that travel while another is read or written; None starts all of them now, from today's
                values, each with a buffer of its own, to go on while the site computes.
            due: Which of the moments are averaged, if they are averaged. Where it is known that a site is left out,
                whose own may be no numbers, all are.
            names: Of a fragment's tensors; None is all.
            arrived: What a flight that was begun like this one gave when it landed: nothing is sent.

        Returns:
            What is on its way, for `finish`.
        """
        self.state.begin()
        measured = self.movement is not None and self.movement.active and arrived is None
        taken = frozenset(self.layout.tensors) if names is None else names
        if self.movement is not None and measured:
            with self.movement.watched():
                if names is None:
                    self.movement.start()
                self._note_movement(taken)
        told = left_out.is_told
        planned = self._changes(taken, left_out, measured)
        averages = self.inner_moments == "average" and (any(due) or (bool(left_out.known) and not told))
        if averages:
            due = (True, True) if left_out.known and not told else due
            planned += self._moments(optimizer, taken, left_out, due)
        forgets = self.inner_moments == "reset" or (not (averages and all(due)) and self.site in left_out.known)
        flight = Flight(planned, self.transport, left_out, ahead, taken, optimizer if forgets else None, arrived)
        if ahead is None:
            self.state.forget()
        return flight

    @torch.no_grad()
    def finish(self, flight: Flight, left_out: frozenset[int] | None = None, *, alpha: float = 0.0) -> None:
        """Wait for what `begin` has started: outer step, new anchors, new local values, new moments.

        Args:
            flight: What is on its way.
            left_out: Sites that had nothing to give, where that was not known when it began.
            alpha: Share of the site's own values in what it goes on from, beside the agreed ones.
        """
        self._alpha = alpha
        flight.drain(left_out)
        if flight.forgotten is not None:
            for name in flight.names & self.layout.trained:
                flight.forgotten.state.pop(self.layout.tensors[name], None)
        self.state.settle()

    @torch.no_grad()
    def average_routers(
        self, names: frozenset[str], left_out: LeftOut, told: Callable[[], frozenset[int]] | None = None
    ) -> None:
        """Average routers within a round: sites go on from the mean of their changes since the anchors.

        Anchors, the outer rule's state and moments stay: the round's pseudo-gradient is still the whole way from the
        anchors.

        Args:
            names: Of their tensors.
            left_out: Sites that have nothing to give. They take the others' mean.
            told: Waits for these sites, where they are not known now.
        """
        self.state.begin()
        planned = [
            Bucket(
                kind, sites, sum(map(self._numel, taken)), partial(self._pseudo_gradients, taken),
                partial(self._go_on_from, taken), between=True,
            )
            for kind, sites, pieces, _ in self._groups(None, names) if len(sites) > 1
            for indices in buckets([self._numel(piece) for piece in pieces], self.transport.bucket_numel)
            for taken in [joined(pieces[i] for i in indices)]
        ]  # fmt: skip
        Flight(planned, self.transport, left_out, 1).drain(None if told is None else told())
        self.state.forget()

    @torch.no_grad()
    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Go back to the agreed values with a fresh inner state: the site's own are no numbers."""
        self.layout.fill(self.anchors)
        for values in self.state.own.values():
            for value in values.values():
                value.zero_()
        optimizer.state.clear()

    # -- what is averaged with whom, and what becomes of it ---------------------------------------------------------

    def _groups(self, codec: Codec | None, names: frozenset[str]) -> list[Group]:
        """Every average that this site takes part in, in the global order."""
        return averaged(self.layout, self.placement, self.site, self.transport.bucket_numel, codec, names)

    def _changes(self, names: frozenset[str], left_out: LeftOut, measured: bool) -> list[Bucket]:
        """A bucket after another of pseudo-gradients; its mean takes the outer step."""
        planned = []
        for kind, sites, pieces, codec in self._groups(self.codec, names):
            for indices in buckets([self._numel(piece) for piece in pieces], self.transport.bucket_numel):
                taken = joined(pieces[i] for i in indices)
                feeds = codec is not None and RESIDUAL in self.state.own
                planned.append(Bucket(
                    kind, sites, sum(map(self._numel, taken)), partial(self._pseudo_gradients, taken),
                    partial(self._outer_step, kind, taken, measured), codec,
                    partial(self._note_lost, taken) if feeds else None, partial(self._restore, taken),
                ))  # fmt: skip
        return planned

    def _moments(
        self, optimizer: torch.optim.Optimizer, names: frozenset[str], left_out: LeftOut, due: Due
    ) -> list[Bucket]:
        """The same of the inner optimizer's moments, which are replaced by their mean."""
        if left_out.known and isinstance(optimizer, RowAdamW):
            for name in sorted(names & self.layout.trained):
                optimizer.start_state(self.layout.tensors[name])  # a site that took no step yet has no moments
        planned = []
        for _, sites, pieces, codec in self._groups(self.moments_codec, names):
            found = [
                (second, piece.of(moment))
                for piece in pieces
                if piece.name in self.layout.trained
                for name, moment in moments(optimizer, self.layout.tensors[piece.name]).items()
                if due[second := name == SECOND_MOMENT]
            ]
            for coding, views in coded_apart(found, codec):
                for indices in buckets([view.numel() for view in views], self.transport.bucket_numel):
                    taken = [views[i] for i in indices]
                    numel = sum(view.numel() for view in taken)
                    read, write = partial(_as_float32, taken), partial(_spread, taken)
                    planned.append(Bucket("moments", sites, numel, read, write, coding, instead=partial(_zero, taken)))
        return planned

    def _numel(self, piece: Piece) -> int:
        return piece.of(self.anchors[piece.name]).numel()

    def _locals(self, pieces: Sequence[Piece]) -> list[Tensor]:
        return [piece.of(self.layout.tensors[piece.name]) for piece in pieces]

    def _note_lost(self, pieces: Sequence[Piece], lost: Tensor) -> None:
        _spread(self.state.fetch(pieces)[RESIDUAL], lost)

    def _restore(self, pieces: Sequence[Piece]) -> None:
        """The round is without these: what they were, and nothing lost."""
        for values in self.state.own.values():
            for piece in pieces:
                if piece.name in values:
                    piece.of(values[piece.name]).zero_()
        for piece, local in zip(pieces, self._locals(pieces), strict=True):
            local.copy_(piece.of(self.anchors[piece.name]))

    def _pseudo_gradients(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Anchor less local value, and what coding has lost of those before."""
        state = self.state.fetch(pieces)
        changes = _changes(self._locals(pieces), state[ANCHOR])
        if residuals := state.get(RESIDUAL):
            torch._foreach_add_(changes, residuals, alpha=self.feedback_decay)
        return changes

    def _go_on_from(self, pieces: Sequence[Piece], mean: Tensor) -> None:
        """Local values are the anchors less the mean of the sites' changes."""
        locals_, anchors = self._locals(pieces), self.state.fetch(pieces)[ANCHOR]
        parts = mean.split([anchor.numel() for anchor in anchors])
        for local, anchor, part in zip(locals_, anchors, parts, strict=True):
            local.copy_(anchor.to(local.dtype).float() - part.view_as(anchor))

    def _outer_step(self, kind: Kind, pieces: Sequence[Piece], measured: bool, mean: Tensor) -> None:
        """Anchors move by the mean of the sites' changes, and the local values are the anchors again."""
        state = self.state.fetch(pieces)
        anchors = state[ANCHOR]
        parts = mean.split([anchor.numel() for anchor in anchors])
        changes = [part.view_as(anchor) for part, anchor in zip(parts, anchors, strict=True)]
        trained = [i for i, piece in enumerate(pieces) if piece.name in self.layout.trained]
        if measured:
            movement = cast(Movement, self.movement)
            with movement.watched(wait=False):  # there is next to nothing to wait for
                for i in trained:
                    layer, experts = self._experts_of(pieces[i].name)
                    movement.add(MEAN, layer, experts[slice(*pieces[i].rows or (0, 0))], changes[i])
        if trained:
            step_ = self.outer.step_rows_ if kind == "expert" else self.outer.step_
            slots = {slot: state[slot] for slot in self.outer.slots}
            step_([anchors[i] for i in trained], [changes[i] for i in trained], slots)
        for i in range(len(pieces)):
            if pieces[i].name not in self.layout.trained:
                anchors[i].sub_(changes[i])
        locals_ = self._locals(pieces)
        torch._foreach_copy_(locals_, mixed(locals_, anchors, self._alpha) if self._alpha else anchors)
        self.state.store(pieces)

    def _note_movement(self, names: frozenset[str]) -> None:
        """This site's changes and what they started from: whole tensors, not expert by expert."""
        movement = cast(Movement, self.movement)
        for name in sorted(names & self.layout.trained):
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

    def is_finite(self, names: frozenset[str] | None = None) -> bool:
        """Whether this site's local values of all tensors, or of some, are finite; waits for the device."""
        tensors = self.layout.tensors
        values = [tensors[name].detach() for name in (tensors if names is None else sorted(names))]
        # Of each the largest magnitude: isfinite would make a copy of the largest tensor, and more.
        largest = torch._foreach_norm([t for t in values if t.numel()], torch.inf)
        return bool(torch.stack([norm.float() for norm in largest]).isfinite().all())

    # -- moving experts -------------------------------------------------------------------------------------------

    def _exchange(
        self, kind: Kind, transfers: Sequence[Transfer], layer: int, sources: Sequence[dict[str, Tensor]],
        dtype: torch.dtype | None,
    ) -> Rows:  # fmt: skip
        """Carry one layer's experts."""
        return self._start_exchange(kind, transfers, layer, sources, dtype)()

    def _start_exchange(
        self, kind: Kind, transfers: Sequence[Transfer], layer: int, sources: Sequence[dict[str, Tensor]],
        dtype: torch.dtype | None,
    ) -> Callable[[], Rows]:  # fmt: skip
        """As `_exchange`, of which the site does not wait; returns what does."""
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
        wait = self.transport.start_exchange(kind, outgoing, incoming, dtype or torch.float32)

        def arrived() -> Rows:
            flat = wait()
            sizes = [shapes[key].numel() for key in keys]
            cursors = {giver: iter(part.split(sizes * (part.numel() // per_expert))) for giver, part in flat.items()}
            return {t.expert: {key: next(cursors[t.giver]).view(shapes[key]) for key in keys} for t in mine}

        return arrived

    @torch.no_grad()
    def adopt(self, new: Placement, optimizer: torch.optim.Optimizer) -> int:
        """Move to another placement at a round boundary; experts travel with anchors and the outer rule's state.

        Received experts start with fresh inner state; kept ones keep theirs.

        Args:
            new: The next placement, equal on all sites.
            optimizer: The inner optimizer.

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
            sources = list(self.state.slots.values())
            arrived = self._exchange("migration", moving, layer, sources, torch.float32)
            received += len(arrived)
            old_row = {expert: r for r, expert in enumerate(before[layer])}
            plan = [old_row.get(expert) for expert in after[layer]]
            for name in self.layout.sparse(layer):
                for i, source in enumerate(sources):
                    if name in source:
                        got = {expert: rows[i, name] for expert, rows in arrived.items()}
                        _rearrange(source[name], plan, [got.get(expert) for expert in after[layer]])
                for own in self.state.own.values():
                    if name in own:  # of what another site had lost this one has nothing to make up for
                        _rearrange(own[name], plan, [None] * len(plan))
                self.layout.tensors[name].copy_(self.anchors[name])
                if name in self.layout.trained and isinstance(optimizer, RowAdamW):
                    optimizer.replace_rows(self.layout.tensors[name], plan)
        self.placement = new
        return received

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Give every site the agreed values of the experts that it lacks, packed; every site must call it."""
        if self.copies is None:
            return
        with self.copies.refreshing() as fresh:
            for layer in range(len(self.placement.holders)):
                self._unpack(layer, self._start_refresh(layer)(), fresh)

    def start_refresh(self, names: frozenset[str]) -> Arriving | None:
        """As `refresh_copies`, of the layers of a fragment, for `finish_refresh`; None where no copies are kept."""
        if self.copies is None:
            return None
        layers = sorted({self.layout.expert_layer[name] for name in names & self.copies.tensors.keys()})
        return Arriving({layer: self._start_refresh(layer) for layer in layers})

    @torch.no_grad()
    def finish_refresh(self, arriving: Arriving) -> None:
        """Wait for what `start_refresh` has started, and put the copies in their place."""
        if self.copies is None:
            return
        arrived = arriving.land()
        with self.copies.refreshing() as fresh:
            for layer, found in arrived.items():
                self._unpack(layer, found, fresh)

    @torch.no_grad()
    def _start_refresh(self, layer: int) -> Callable[[], Rows]:
        return self._start_exchange(
            "shadow", refresh_layer(self.placement, layer), layer, [self._packed(layer)], torch.uint8
        )

    def _unpack(self, layer: int, arrived: Rows, fresh: Mapping[str, Tensor]) -> None:
        absent = self.placement.complement().residents_in(layer, self.site)
        for name in self._copied(layer) if absent else ():
            rows = [arrived[expert][0, name] for expert in absent]
            if self._joined_rows is None:
                for row, packed in enumerate(rows):
                    fresh[name][row].copy_(packed)
            else:
                n_bytes = fresh[name].shape[1]
                fresh[name].copy_(self.transport.inside.joined(torch.stack(rows).to(fresh[name].device), 1, n_bytes))

    def _copied(self, layer: int) -> list[str]:
        copies = cast(Copies, self.copies)
        return [name for name in copies.tensors if self.layout.expert_layer[name] == layer]

    def _packed(self, layer: int) -> dict[str, Tensor]:
        """The experts of a layer that this site owns, as copies; other rows are left as they happen to be.

        Where the site's ranks have slices, they join the experts, all pack them, and each gives its part of the bytes.
        """
        copies = cast(Copies, self.copies)
        n_residents = len(self.placement.residents_in(layer, self.site))
        owned = owned_rows(self.placement, layer, self.site)
        packed = {}
        for name in self._copied(layer):
            n_bytes = copies.tensors[name].shape[1]
            packed[name] = copies.tensors[name].new_empty(n_residents, n_bytes)
            packed[name][owned] = copies.encode(self.owned_values(name, owned))
            if self._joined_rows is not None:
                packed[name] = self.transport.topology.own_part(packed[name], 1)
        return packed

    def owned_values(self, name: str, rows: Sequence[int]) -> Tensor:
        """The agreed values of whole experts of a stacked tensor that copies are kept of, where those are.

        Args:
            name: Of the tensor.
            rows: Of experts that this site owns.
        """
        values = self.anchors[name][list(rows)].to(cast(Copies, self.copies).tensors[name].device)
        return values if self._joined_rows is None else self._joined_rows(name, values)

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
        """Compare all slots of all sites: dense tensors of all, each expert's of its holders.

        Raises:
            RuntimeError: If any site differs, naming tensors and sites.
        """
        for slot, values in self.state.slots.items():
            found = self.transport.anywhere(disagreements(self.transport, self.layout, self.placement, values))
            if found:
                more = f" and {len(found) - 5} more" if len(found) > 5 else ""
                named = "; ".join(("" if slot == ANCHOR else f"outer {slot} of ") + item for item in found[:5])
                raise RuntimeError(f"sites differ after a round in {named}{more}; resume from a checkpoint")
        if self.copies is not None and self.copies.tensors:
            layout = self.copies.layout(self.layout)
            found = self.transport.anywhere(
                disagreements(self.transport, layout, self.placement.complement(), self.copies.tensors)
            )
            if found:
                raise RuntimeError(f"sites differ in their copies of {'; '.join(found[:5])}; resume from a checkpoint")

    def state_dict(self) -> dict[str, Any]:
        """What this site needs, beside the global model, to go on from here."""
        # A checkpoint may be written while a mid-round validation has the agreed values in the model.
        source = self.layout.tensors if self._stash is None else self._stash
        return {"local": {name: tensor.detach() for name, tensor in source.items()}, **self.state.own}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; anchors must have been set by `load_global` before."""
        self.layout.fill(state["local"])
        for slot, values in self.state.own.items():
            for name, value in values.items():
                # Also of a run without error feedback: then nothing has been lost.
                value.copy_(state[slot][name]) if slot in state else value.zero_()

    @torch.no_grad()
    def load_global(self, weights: dict[str, Tensor]) -> None:
        """Set anchors and local values from the global model (this site's rows)."""
        for name, anchor in self.anchors.items():
            anchor.copy_(weights[name])
        self.layout.fill(self.anchors)


def coded_apart(found: Sequence[tuple[bool, Tensor]], codec: Codec | None) -> list[tuple[Codec | None, list[Tensor]]]:
    """Moments of a group by their codec: without one all together, else the second as their roots.

    Args:
        found: Whether it is a second moment, and its values.
        codec: Of the group.
    """
    if codec is None:
        return [(None, [values for _, values in found])]
    codecs = (codec, Root(codec))
    return [(codecs[order], [values for second, values in found if second == order]) for order in (False, True)]


def averaged(
    layout: ParameterLayout, placement: Placement, site: int, bucket_numel: int, codec: Codec | None = None,
    names: frozenset[str] | None = None,
) -> list[Group]:  # fmt: skip
    """Every average that a site takes part in, in the global order.

    Args:
        layout: The site's tensors.
        placement: Who holds what.
        site: 0..M-1.
        bucket_numel: Most elements of a bucket, into which large dense tensors are cut.
        codec: Of what may be coded, which then makes groups of its own; None casts everything.
        names: Of the tensors that are averaged; None is all.
    """
    taken = frozenset(layout.tensors) if names is None else names
    dense = [piece for name in layout.dense if name in taken for piece in cut(name, layout.tensors[name], bucket_numel)]
    groups = [Group("dense", tuple(range(placement.n_sites)), dense, None)]
    rows = [{expert: row for row, expert in enumerate(layer)} for layer in placement.residents(site)]
    for sites in placement.holder_sets():
        if site in sites:
            # Tensor by tensor, so that experts that follow each other are one piece of a bucket.
            pieces = [
                Piece(name, (rows[layer][expert], rows[layer][expert] + 1))
                for layer, experts in groupby(placement.experts_of(sites), key=itemgetter(0))
                for name, (_, expert) in product([name for name in layout.sparse(layer) if name in taken], experts)
            ]
            groups.append(Group("expert", sites, pieces, None))
    if codec is None:
        return groups
    parts = []
    for kind, sites, pieces, _ in groups:
        for coded in (False, True):
            some = [piece for piece in pieces if layout.may_be_coded(piece.name) == coded]
            parts.append(Group(kind, sites, some, codec if coded else None))
    return parts


def mixed(local: list[Tensor], agreed: list[Tensor], alpha: float) -> list[Tensor]:
    """What a site goes on from, alpha * local + (1 - alpha) * agreed of each, float32."""
    return list(torch._foreach_lerp(agreed, [t.float() for t in local], alpha))


def _changes(local: list[Tensor], anchors: list[Tensor]) -> list[Tensor]:
    """Anchor less local value of each, float32."""
    if all(t.dtype == torch.float32 for t in local):
        return list(torch._foreach_sub(anchors, local))
    # A site started from the anchor in the training dtype. What that rounded off is no change, and stays in the anchor:
    # else an outer step would feed it back round after round.
    return [anchor.to(t.dtype).float() - t.float() for t, anchor in zip(local, anchors, strict=True)]


def _rearrange(values: Tensor, sources: Sequence[int | None], received: Sequence[Tensor | None]) -> None:
    """Give each row the values of the old row that it goes on from, else what was received; zeros without either."""
    old = values.clone()
    for row, source, new in zip(values, sources, received, strict=True):
        if source is not None:
            row.copy_(old[source])
        elif new is not None:
            row.copy_(new)
        else:
            row.zero_()


def _as_float32(views: Sequence[Tensor]) -> list[Tensor]:
    return [view.float() for view in views]


def _zero(views: Sequence[Tensor]) -> None:
    for view in views:
        view.zero_()


def _spread(views: Sequence[Tensor], mean: Tensor) -> None:
    """Copy the parts of a flat tensor into views, one after the other."""
    for view, part in zip(views, mean.split([view.numel() for view in views]), strict=True):
        view.copy_(part.view_as(view))
