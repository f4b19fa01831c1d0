"""What a checkpoint holds of a strategy: the agreed model, and each site's own state; and how both are taken back."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from fomoe_pl.checkpoint import format as files
from fomoe_pl.checkpoint.carryover import carry_over, differences
from fomoe_pl.checkpoint.disks import Disk
from fomoe_pl.checkpoint.resuming import check_weights
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.inner import ROW_COUNTERS
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.federation.placement import Placement
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.federation.shadow import Copies
from fomoe_pl.federation.topology import Topology
from fomoe_pl.lightning_internals import random_states, set_random_states
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.remote import AnyPath
from fomoe_pl.slices import Slices


class MidRound(Protocol):
    """The part of a LightningModule that sites count with in a round, and that a resumed round goes on with."""

    def round_losses(self) -> tuple[float, float]:
        """Sum and number of the finite losses of the round so far."""

    def set_round_losses(self, losses: tuple[float, float]) -> None:
        """Restore `round_losses`."""

    def round_steps(self) -> tuple[int, int]:
        """Steps of the round that were skipped, and all of them."""

    def set_round_steps(self, steps: tuple[int, int]) -> None:
        """Restore `round_steps`."""

    def loads(self) -> Tensor:
        """Picks of each expert since experts were last placed, float32 (L, E)."""

    def set_loads(self, loads_LE: Tensor) -> None:
        """Restore `loads`."""


class Counts(Protocol):
    """What checkpoints and whoever watches both ask of a strategy.

    Attributes:
        ledger: Bytes that this rank sent so far; see `ledger_of_site`.
        observers: Who looks at the ends of rounds.
        rounds_done: Rounds that have ended; stays 0 in synchronous training.
        sync_seconds: Seconds spent in synchronisation so far.
    """

    ledger: Ledger
    observers: list[RoundObserver]
    rounds_done: int
    sync_seconds: float

    @property
    def topology(self) -> Topology:
        """This rank's place among the sites; of data-parallel strategies every rank counts as one."""

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that the run has taken; within a round's end with the step that ends it."""

    @property
    def counted(self) -> Ledger:
        """What `ledger_of_site` gave last, of which no other rank is asked."""

    def ledger_of_site(self) -> Ledger:
        """Bytes that this site sent so far, on its first rank; all of its ranks call it together."""

    def sum_over_sites(self, values: Tensor, kind: str = "evaluation") -> Tensor:
        """Sum a small tensor over all ranks of all sites, counted; all call it together."""


class Site(Counts, Protocol):
    """What is asked of the strategy whose checkpoints these are.

    Attributes:
        redraws: How often experts have been placed again.
        loads_at_draw: Of each layer and expert, what a policy that sees loads saw last.
        slices: Of a site's tensors which part this rank has; None is the whole.
    """

    redraws: int
    loads_at_draw: list[list[float]] | None
    slices: Slices | None

    def joined(self, name: str, values: Tensor) -> Tensor:
        """A whole tensor, of which this rank may have a slice; all ranks of the site call it together."""

    @property
    def placement(self) -> Placement | None:
        """Who holds what; None where every rank holds all."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""

    @property
    def trainer(self) -> Any:
        """The Trainer that runs."""

    @property
    def transformer(self) -> Transformer:
        """The model."""

    @property
    def mid_round(self) -> MidRound:
        """What the module counts in a round."""

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The inner optimizer, if it trains."""

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What removes folders."""

    @property
    def in_step(self) -> bool:
        """Whether there are gradients of micro-batches that no optimizer step has used yet."""

    @property
    def alone(self) -> bool:
        """Whether this rank has failed while the others go on: nothing may be sent to them."""

    def sum_in_site(self, values: Tensor) -> Tensor:
        """Sum a small tensor over the ranks of this site; all of them call it together."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """An object from one rank to all."""

    def texts_of_sites(self, text: str) -> list[str]:
        """What each site tells the others, in the order of sites; all call it together."""


class FederatedSite(Site, Protocol):
    """What is asked of a strategy with rounds beside."""

    federation: Federation | None
    settings: FederationConfig

    def land(self) -> dict[str, Any]:
        """Wait for averages that are on their way, and apply none of them; what a resumed run goes on with."""

    def go_on_with(self, landed: dict[str, Any]) -> None:
        """Take up what `land` gave."""

    def gathered_in_site(self, values: Tensor) -> list[Tensor]:
        """Flat tensors of the site's ranks, which may be of different lengths, on the CPU; a collective call."""

    def placed(self, config: ModelConfig) -> Placement:
        """Where experts are after the last time that they were placed."""


class Content:
    """Of a strategy whose ranks hold the whole model each: rank 0 writes everything.

    Args:
        site: The strategy.

    Attributes:
        average: A moving average of the global model, this site's rows; empty without.
        every_site_writes: Whether every site writes a part, or rank 0 everything.
        own_disks: Whether each site has a folder of its own, in which it stores its part.
        restored_after_setup: Whether tensors are there only after the strategy's `setup`.
    """

    every_site_writes = False
    own_disks = False
    restored_after_setup = False

    def __init__(self, site: Site) -> None:
        self.site = site
        self.average: Mapping[str, Tensor] = {}
        self._random_states: dict[str, Any] | None = None

    # -- what there is --------------------------------------------------------------------------------------------

    def layout(self) -> ParameterLayout:
        """The tensors that make up the global model."""
        return ParameterLayout.of(self.site.transformer, self.site.transformer.expert_tensors())

    def tensors(self) -> Mapping[str, Tensor]:
        """Agreed values by name, with this site's rows of expert tensors."""
        return self.layout().tensors

    def set_tensors(self, values: dict[str, Tensor]) -> None:
        """Put the global model's values into this rank's tensors."""
        self.layout().fill(values)

    def slots(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The outer rule's state: slot -> values by name, as `tensors`; empty without."""
        return {}

    def owned(self) -> list[tuple[int, int, int]]:
        """(layer, expert, row) of each expert that this rank writes."""
        residency = self.site.transformer.residency
        return [(i, e, r) for i, layer in enumerate(residency.experts) for r, e in enumerate(layer)]

    def identity(self) -> dict[str, Any]:
        """What `state` depends on: a run that has the same goes on bit for bit."""
        return {"strategy": type(self.site).__name__, "sites": self.site.topology.n_sites}

    def state(self) -> dict[str, Any]:
        """What this site needs beside the global model to resume; all of its ranks call it together."""
        return {"ledger": self.site.ledger_of_site().state_dict(), "sync_seconds": self.site.sync_seconds}

    def load_ledger(self, state: dict[str, Any]) -> None:
        """Go on from the counts of a checkpoint, on the rank that counts for its site."""
        if self.site.topology.leads:
            self.site.ledger.load_state_dict(state)

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state`."""
        self.load_ledger(state["ledger"])
        self.site.sync_seconds = state["sync_seconds"]

    def check(self) -> None:
        """Raise where what would be saved is not what all sites have; every rank calls it."""

    # -- what is written ------------------------------------------------------------------------------------------

    def place(self, path: str | Path) -> Path:
        """Where this site writes the checkpoint that Lightning calls by this path."""
        return Path(path)

    @property
    def disk(self) -> Disk | None:
        """Where this site's own checkpoints are; None where all write into one folder."""
        return None

    def called(self, path: Path) -> AnyPath:
        """What the checkpoint at this place is called in messages."""
        return path

    def remove(self, path: str | Path) -> None:
        """Remove the checkpoint that Lightning calls by this path."""
        self.site.checkpoint_io.remove_checkpoint(str(path))

    def open(self) -> None:
        """Look whether checkpoints can be written, when the sites have met; all call it together."""

    def close(self) -> None:
        """Leave nothing behind but checkpoints."""

    def start_training(self, fresh: bool) -> None:
        """All that a run goes on from has been read; all sites call it together.

        Args:
            fresh: Whether it starts from scratch.
        """

    @property
    def n_writers(self) -> int:
        """Sites that write."""
        return self.site.topology.n_sites if self.every_site_writes else 1

    @property
    def writes(self) -> bool:
        """Whether this rank writes experts and its site's state."""
        return self.site.topology.leads if self.every_site_writes else self.site.is_global_zero

    @property
    def writes_common(self) -> bool:
        """Whether this rank writes dense tensors and Lightning's state."""
        return self.writes if self.own_disks else self.site.is_global_zero

    def expert_files(self, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """File name -> its tensors by `<name>#<expert>`, of the files of experts that this rank writes.

        Args:
            prefix: Of the names of the files.
            tensors: Values by name, this site's rows; not all names need be there.
        """
        return {files.experts_name(self.site.topology.site, prefix): self.rows(tensors, self.owned())}

    def rows(self, tensors: Mapping[str, Tensor], experts: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
        """Tensors by `<name>#<expert>`.

        Args:
            tensors: Values by name, this site's rows.
            experts: (layer, expert, row) of those that are wanted.
        """
        layout = self.layout()
        names = {layer: layout.sparse(layer) for layer in set(layout.expert_layer.values())}
        return {
            f"{name}#{e}": tensors[name][row] for layer, e, row in experts for name in names[layer] if name in tensors
        }

    def files(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """File name -> content, of all files that this rank writes.

        Args:
            checkpoint: Lightning's state.
        """
        layout, site, module = self.layout(), self.site.topology.site, self.site.mid_round
        optimizers = [self._whole_state(state, layout) for state in checkpoint.get("optimizer_states", [])]
        losses = self.site.sum_in_site(torch.tensor(module.round_losses(), dtype=torch.float64)).tolist()
        contents: dict[str, Any] = {}
        slots = {files.of_slot(slot): tensors for slot, tensors in self.slots().items()}
        for prefix, values in {"": self.tensors(), **slots, files.AVERAGE: self.average}.items():
            tensors = self.whole(values)
            if tensors and self.writes:
                contents |= self.expert_files(prefix, tensors)
            if tensors and self.writes_common:
                contents[files.dense_name(prefix)] = {n: tensors[n] for n in layout.dense if n in tensors}
        state = self.state()  # with the bytes that experts' files have cost
        if self.writes:
            contents[files.site_name(site)] = {
                "optimizer_states": optimizers,
                "optimizer_names": self._optimizer_names(layout),
                "strategy": state,
                "residents": self.site.transformer.residency.experts,
                "expert_layer": dict(layout.expert_layer),
                "rng": random_states(),
                "losses": tuple(losses),
                "steps": module.round_steps(),
            }
            # Lightning keeps rank zero's callbacks; those that look into rounds know things of their own site.
            watchers = {observer.state_key for observer in self.site.observers if isinstance(observer, Callback)}
            kept = {key: state for key, state in checkpoint.get("callbacks", {}).items() if key in watchers}
            if kept:
                contents[files.observers_name(site)] = kept
        if self.writes_common:
            skipped = ("state_dict", "optimizer_states")
            trainer = files.trainer_name(site if self.own_disks else 0)
            contents[trainer] = {key: value for key, value in checkpoint.items() if key not in skipped}
        return contents

    def manifest(self) -> dict[str, Any]:
        """What the manifest says beside the files."""
        site, placement = self.site, self.site.placement
        placed = {} if placement is None or placement.is_full else {"placement": placement.record()}
        return {
            "architecture": asdict(site.transformer.config), "n_sites": site.topology.n_sites,
            "rounds": site.rounds_done, "redraws": site.redraws, "optimizer_steps": site.optimizer_steps,
            **({} if site.loads_at_draw is None else {"loads_at_draw": site.loads_at_draw}),
            "identity": self.identity(),
            **placed,
        }  # fmt: skip

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Whole tensors by name, of which this rank may have slices, in memory of the rank that writes.

        All ranks of the site call it together. A tensor at a time is gathered on the devices.
        """
        if self.site.slices is None:
            return tensors
        found = {}
        for name, values in tensors.items():
            joined = self.site.joined(name, values.detach())
            if self.writes:
                found[name] = joined.cpu()
        return found

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank has of whole tensors, by name."""
        slices = self.site.slices
        return dict(tensors) if slices is None else {name: slices.own(name, t) for name, t in tensors.items()}

    def _whole_state(self, state: Mapping[str, Any], layout: ParameterLayout) -> dict[str, Any]:
        """An optimizer's state dict with whole moments."""
        if self.site.slices is None:
            return dict(state)
        return self._converted(state, self._optimizer_names(layout), self.whole)

    def _own_state(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """A site's file with what this rank has of its tensors."""
        if self.site.slices is None:
            return dict(own)
        states = [self._converted(state, own["optimizer_names"], self.own) for state in own["optimizer_states"]]
        strategy = dict(own["strategy"])
        if "federation" in strategy:
            strategy["federation"] = {slot: self.own(values) for slot, values in strategy["federation"].items()}
        return {**own, "optimizer_states": states, "strategy": strategy}

    @staticmethod
    def _converted(
        state: Mapping[str, Any], names: Sequence[str],
        convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    ) -> dict[str, Any]:  # fmt: skip
        ids = [i for group in state["param_groups"] for i in group["params"]]
        of = {i: dict(state["state"].get(i, {})) for i in ids}
        for name, i in zip(names, ids, strict=True):
            for key in [key for key in of[i] if key not in ROW_COUNTERS]:
                of[i][key] = convert({name: of[i][key]}).get(name, of[i][key])
        return {**state, "state": {i: found for i, found in of.items() if found}}

    def _optimizer_names(self, layout: ParameterLayout) -> list[str]:
        """Names of the inner optimizer's parameters, in the order of its state."""
        name_of = {id(tensor): name for name, tensor in layout.tensors.items()}
        return [
            name_of[id(p)] for optimizer in self.site.optimizers for g in optimizer.param_groups for p in g["params"]
        ]

    # -- what is taken back ---------------------------------------------------------------------------------------

    def trainer_file(self, folder: Path, manifest: Mapping[str, Any]) -> str:
        """The file of Lightning's state that this site goes on from; of a checkpoint in parts any that is there."""
        there = sorted(name for name in manifest["files"] if name.startswith("trainer") and (folder / name).is_file())
        return there[0] if files.is_part(manifest) and there else files.trainer_name()

    def own_state(self, folder: Path, manifest: Mapping[str, Any], site: int) -> dict[str, Any] | None:
        """What a site needs beside the global model; None where that is lost.

        Args:
            folder: The checkpoint.
            manifest: Its manifest.
            site: Whose state it is.
        """
        return files.read_state(folder, files.site_name(site), manifest)

    def origin(self, n_saved: int) -> int:
        """The site whose own state this one goes on from, of those that have saved one."""
        return self.site.topology.site % n_saved

    def load_trainer(self, folder: Path) -> dict[str, Any]:
        """Lightning's state, with what this site's own callbacks know."""
        manifest, observers = files.read_manifest(folder), files.observers_name(self.site.topology.site)
        state = files.read_state(folder, self.trainer_file(folder, manifest), manifest)
        if observers in manifest["files"] and (folder / observers).is_file():  # a disk of its own may be lost
            own = files.read_state(folder, observers, manifest)
            state["callbacks"] = {**state.get("callbacks", {}), **own}
        return {**state, "state_dict": {}, "optimizer_states": [], "folder": str(folder)}

    def load_weights(self, folder: Path) -> None:
        """This site's weights, and only those.

        Raises:
            ConfigError: If they are those of another model.
        """
        check_weights(folder, self.site.transformer.config)
        tensors = self.layout().tensors
        weights = self._read(folder, list(tensors))
        files.check_shapes(folder, weights, tensors)
        self.set_tensors(weights)

    def _read(self, folder: Path, names: list[str], prefix: str = "") -> dict[str, Tensor]:
        model = self.site.transformer
        return self.own(files.read_weights(
            folder, names, self.layout().expert_layer, model.residency.experts, model.config.n_experts, prefix
        ))  # fmt: skip

    def saved_average(self, folder: Path) -> dict[str, Tensor] | None:
        """The moving average of the global model in a checkpoint, this site's rows; None if it has none."""
        if files.dense_name(files.AVERAGE) not in files.read_manifest(folder)["files"]:
            return None
        return self._read(folder, list(self.layout().tensors), files.AVERAGE)

    @torch.no_grad()
    def load_site(self, folder: Path, load_optimizers: Callable[[Mapping[str, Any]], None]) -> int:
        """Restore inner optimizer, outer state and counters of this site, as far as they fit.

        Args:
            folder: The checkpoint.
            load_optimizers: Lightning's way to load `{"optimizer_states": ...}`.

        Returns:
            Optimizer steps in it.
        """
        manifest, site, model = files.read_manifest(folder), self.site, self.site.transformer
        steps: int = manifest["optimizer_steps"]
        site.rounds_done = manifest["rounds"]
        missing = []
        for slot, values in self.slots().items():
            if files.dense_name(files.of_slot(slot)) not in manifest["files"]:
                missing.append(slot)
                continue
            for name, value in self._read(folder, list(values), files.of_slot(slot)).items():
                values[name].copy_(value)
        # Of data-parallel ranks, which are all alike, only the first has written; a site without a file of its own
        # goes on from another's.
        own_files = [name for name in manifest["files"] if name.startswith("site-")]
        of = self.origin(len(own_files)) if self.every_site_writes else 0
        own = self.own_state(folder, manifest, of)
        if own is None:
            return steps
        own = self._own_state(own)
        changed = differences(manifest["identity"], self.identity())
        if not changed:
            if own["residents"] != model.residency.experts:
                raise RuntimeError(f"site {of} of {folder} holds other experts than this one: {own['residents']}")
            load_optimizers({"optimizer_states": own["optimizer_states"]})
            self.load_state(own["strategy"])
            self._random_states = own["rng"]
            if site.topology.leads:  # they are those of all of the site's ranks
                site.mid_round.set_round_losses(own["losses"])
            site.mid_round.set_round_steps(own.get("steps", (0, 0)))  # older ones have none
            return steps
        if of == site.topology.site:
            self.load_ledger(own["strategy"]["ledger"])
        layout = self.layout()
        [optimizer] = site.optimizers
        fresh = carry_over(
            own, optimizer, self._optimizer_names(layout), layout.expert_layer, model.residency.experts,
            model.config.n_experts,
        )  # fmt: skip
        told = f"resuming with other settings ({changed}); site 0 starts {fresh} with fresh inner moments"
        if missing:
            told += f", and outer {', '.join(missing)} at zero"
        rank_zero_info(told)
        return steps

    def go_on(self) -> None:
        """Before the first step of a resumed run: draw the random numbers that the interrupted one would have drawn."""
        if self._random_states is not None:
            set_random_states(self._random_states)
            self._random_states = None


class FederatedContent(Content):
    """Of a strategy with rounds: the agreed values are anchors, and every site writes the experts that it owns."""

    every_site_writes = True
    restored_after_setup = True  # anchors must exist before they can be restored
    site: FederatedSite

    @property
    def federation(self) -> Federation:
        """The strategy's, which `setup` makes."""
        assert self.site.federation is not None, "the strategy has not been set up"
        return self.site.federation

    def tensors(self) -> Mapping[str, Tensor]:
        """The anchors: agreed values, float32, also in mid-round."""
        return self.federation.anchors

    def set_tensors(self, values: dict[str, Tensor]) -> None:
        """Anchors and local values."""
        self.federation.load_global(values)

    def slots(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The outer rule's state, float32."""
        return self.federation.state.of_rule

    def owned(self) -> list[tuple[int, int, int]]:
        """The experts of which this site is the owner."""
        site, placement = self.site.topology.site, self.federation.placement
        return [(i, e, r) for i, e, r in super().owned() if placement.owner(i, e) == site]

    def identity(self) -> dict[str, Any]:
        """Who holds what, and the outer rule, whose state has its names."""
        return {**super().identity(), **self.site.settings.identity(self.site.topology.n_sites)}

    def check(self) -> None:
        """Compare what all sites must have alike."""
        self.federation.check_agreement()

    def state(self) -> dict[str, Any]:
        """Local values, which differ from the anchors in mid-round, and the ledger."""
        federation = {slot: dict(self.whole(values)) for slot, values in self.federation.state_dict().items()}
        state = {**super().state(), "federation": federation}
        copies, settings = self.federation.copies, self.site.settings
        if copies is not None and (settings.shadow_refresh > 1 or settings.delay):  # else they are what the anchors are
            state["copies"] = dict(copies.tensors)
        if landed := self.site.land():
            state["landed"] = landed if self.site.slices is None else {"ranks": self._of_ranks(landed)}
        if self.site.settings.policy.sees_loads:
            state["loads"] = self.site.sum_in_site(self.site.mid_round.loads())
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state`."""
        super().load_state(state)
        self.federation.load_state_dict(state["federation"])
        copies = self.federation.copies
        if copies is not None and "copies" in state:
            for name, packed in copies.tensors.items():
                packed.copy_(state["copies"][name])
        if "loads" in state and self.site.topology.leads:
            self.site.mid_round.set_loads(state["loads"])
        self.site.go_on_with(self._own_landed(state.get("landed", {})))

    def _of_ranks(self, landed: dict[str, Any]) -> list[Tensor]:
        """What has landed on each rank of the site, as bytes: buckets of slices are not those of whole tensors."""
        file = io.BytesIO()
        torch.save(landed, file)
        return self.site.gathered_in_site(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))

    def _own_landed(self, landed: dict[str, Any]) -> dict[str, Any]:
        slices, ranks = self.site.slices, landed.get("ranks")
        if not landed or (ranks is None and slices is None):
            return landed
        if ranks is None or slices is None or len(ranks) != slices.n_ranks:
            told = "whole" if ranks is None else f"in slices of {len(ranks)} ranks"
            hint = "inside: replicate" if ranks is None else f"ranks_per_site: {len(ranks)} and inside: shard"
            rule = f"cannot go on with averages that are on their way, which this checkpoint has {told}"
            raise ConfigError("ranks_per_site", self.site.topology.n_ranks, rule, f"resume with {hint}, or from a "
                              "checkpoint with none on its way, such as the run's last")  # fmt: skip
        file = io.BytesIO(ranks[slices.place].numpy().tobytes())
        own: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return own

    def load_trainer(self, folder: Path) -> dict[str, Any]:
        """Take the placement of the checkpoint's round with it: it says which weights are this site's."""
        state, manifest = super().load_trainer(folder), files.read_manifest(folder)
        self.site.redraws, self.site.loads_at_draw = manifest["redraws"], manifest.get("loads_at_draw")
        placement = self.site.placed(self.site.transformer.config)
        self.federation.placement = placement
        residents = placement.residents(self.site.topology.site)
        self.site.transformer.set_residency(self.site.settings.residency(residents))
        return state

    def load_weights(self, folder: Path) -> None:
        """This site's weights, and those of the experts that it keeps copies of, packed a layer at a time."""
        super().load_weights(folder)
        if self.federation.copies is not None:
            self.load_copies(folder, self.federation.copies)

    def load_copies(self, folder: Path, copies: Copies) -> None:
        """Pack what a checkpoint has of the experts that are not here."""
        config = self.site.transformer.config
        layers = self.layout().expert_layer
        absent = self.federation.placement.complement().residents(self.site.topology.site)
        with copies.refreshing() as fresh:
            for layer in range(config.n_layers):
                names = [name for name in fresh if layers[name] == layer]
                for name, values in files.read_weights(folder, names, layers, absent, config.n_experts).items():
                    fresh[name].copy_(copies.encode(values))
