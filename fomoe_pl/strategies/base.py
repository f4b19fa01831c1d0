"""What all strategies share: a place in the federation, a ledger, and one checkpoint format."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from fomoe_pl.federation import checkpoint as files
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.movement import Movement
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.federation.placement import Placement
from fomoe_pl.federation.rounds import Federation
from fomoe_pl.federation.topology import Topology
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency
from fomoe_pl.strategies.checks import check_resumable, check_weights

T = TypeVar("T")


class SiteStrategy(Strategy):
    """Mixin of this project's strategies; put it before the Lightning strategy in the bases.

    Attributes:
        ledger: bytes that this rank sent.
        rounds_done: rounds that have ended.
        redraws: how often experts were dealt anew.
        optimizer_steps: local optimizer steps taken.
        sync_seconds: seconds spent between the end of the last local step and the next, over all rounds.
        round_stats: means over all sites of the last round (fixed keys; empty before the first round).
        has_rounds: whether sites agree in rounds, not in every step.
        observers: who looks at the ends of rounds; the same on all sites, in the same order.
        watch_seconds: seconds that observers and pictures took so far; no part of `sync_seconds`.
    """

    has_rounds = False
    federation: Federation | None = None

    def init_site(self) -> None:
        """Set the counters; called by the constructors."""
        self.ledger = Ledger()
        self.rounds_done = 0
        self.redraws = 0
        self.optimizer_steps = 0
        self.sync_seconds = 0.0
        self.round_stats: dict[str, float] = {}
        self.observers: list[RoundObserver] = []
        self.watch_seconds = 0.0

    @property
    def topology(self) -> Topology:
        """This rank's place; for data-parallel strategies every rank counts as a site."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line that says which method this is."""
        return f"{type(self).__name__}, {self.topology.n_sites} sites"

    def residency(self, config: ModelConfig) -> Residency:
        """Which experts the model on this rank holds."""
        return Residency.full(config)

    def sum_over_sites(self, values: Tensor, kind: str = "evaluation") -> Tensor:
        """Sum a small tensor over all sites, counted."""
        raise NotImplementedError

    def reduce_loads(self, loads_LE: Tensor) -> Tensor:
        """Expert loads (L, E) that the balance bias is updated from: this site's own unless gradients are shared."""
        return loads_LE

    # -- who watches ---------------------------------------------------------------------------------------------

    def ask_observers(self, look: Callable[[RoundObserver], T]) -> list[T]:
        """Call each observer, in their order, on their own time."""
        start = time.perf_counter()
        answers = [look(observer) for observer in self.observers]
        self.watch_seconds += time.perf_counter() - start
        return answers

    def sum_with_observers(self, own: Tensor) -> Tensor:
        """Add `own` and all that observers count over the sites, in one message."""
        watched = self.ask_observers(lambda observer: observer.statistics())
        total = self.sum_over_sites(torch.cat([own, *watched]), "control")
        own, *parts = total.split([len(own), *map(len, watched)])
        waiting = iter(parts)
        self.ask_observers(lambda observer: observer.receive(next(waiting)))
        return own

    def watch_movement(self) -> Movement | None:
        """Have rounds fill a `Movement`; None where there are no rounds."""
        if self.federation is None:
            return None
        config: ModelConfig = self.transformer.config  # type: ignore[assignment]
        self.federation.movement = Movement(config.n_layers, config.n_experts)
        return self.federation.movement

    @property
    def placement(self) -> Placement | None:
        """Who holds what; None where every rank holds all."""
        return None if self.federation is None else self.federation.placement

    def agreed_bytes(self) -> int:
        """Bytes of anchors and outer momentum on this rank."""
        kept = () if self.federation is None else (self.federation.anchors, self.federation.momenta)
        return sum(tensor.nbytes for tensors in kept for tensor in tensors.values())

    # -- Lightning's own traffic, counted ------------------------------------------------------------------------

    @property
    def _joined(self) -> bool:
        return dist.is_initialized() and dist.get_world_size() > 1

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """A barrier; a control call without payload."""
        if self._joined:
            self.ledger.send("control", 0)
            super().barrier(*args, **kwargs)  # type: ignore[safe-super]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """An object from one rank to all (file names of checkpoints)."""
        if self._joined:
            self.ledger.send("control", len(pickle.dumps(obj)) if dist.get_rank() == src else 0)
        return super().broadcast(obj, src)  # type: ignore[safe-super]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """A tensor over all ranks (decisions to stop or to save, metrics logged with `sync_dist`)."""
        if self._joined and isinstance(tensor, Tensor):
            self.ledger.send("control", 0)  # Lightning's barrier before it
            self.ledger.all_reduce("control", tensor.nbytes, dist.get_world_size())
        return super().reduce(tensor, group, reduce_op)  # type: ignore[safe-super]

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @property
    def transformer(self) -> torch.nn.Module:
        """The model inside the LightningModule."""
        model = self.lightning_module.model  # type: ignore[union-attr]
        assert isinstance(model, torch.nn.Module)
        return model

    def layout(self) -> ParameterLayout:
        """The tensors that make up the global model."""
        return ParameterLayout.of(self.transformer, self.transformer.expert_tensors())  # type: ignore[operator]

    def global_tensors(self) -> Mapping[str, Tensor]:
        """Agreed values by name, with this site's rows of expert tensors."""
        return self.layout().tensors

    def owned_experts(self) -> list[tuple[int, int, int]]:
        """(layer, expert, row) of each expert that this rank writes."""
        residency: Residency = self.transformer.residency  # type: ignore[assignment]
        return [(i, e, r) for i, layer in enumerate(residency.experts) for r, e in enumerate(layer)]

    def writes_checkpoint(self) -> bool:
        """Whether this rank writes experts and its own state."""
        return self.is_global_zero

    def identity(self, n_sites: int) -> dict[str, Any]:
        """What `site_state` depends on: a run that resumes must have the same."""
        return {"strategy": type(self).__name__}

    def site_state(self) -> dict[str, Any]:
        """What this rank needs beside the global model to resume."""
        return {"ledger": self.ledger.state_dict(), "sync_seconds": self.sync_seconds}

    def load_site_state(self, state: dict[str, Any]) -> None:
        """Restore `site_state`."""
        self.ledger.load_state_dict(state["ledger"])
        self.sync_seconds = state["sync_seconds"]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: weights go into the folder's own files, expert by expert."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the checkpoint folder; every rank must call it."""
        # A file name may have a metric in it, of which every site has its own.
        folder = Path(self.broadcast(str(filepath)))
        layout, tensors = self.layout(), self.global_tensors()
        if self.is_global_zero:
            files.begin(folder)
        self.barrier("checkpoint begin")
        state = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        if self.writes_checkpoint():
            site = self.topology.site
            names = {layer: layout.sparse(layer) for layer in set(layout.expert_layer.values())}
            rows = {(name, e): tensors[name][row] for layer, e, row in self.owned_experts() for name in names[layer]}
            files.write_experts(folder, site, rows)
            own = {
                "optimizer_states": checkpoint.get("optimizer_states", []),
                "strategy": self.site_state(),
                "residents": self.transformer.residency.experts,  # type: ignore[union-attr]
            }
            files.write_state(folder, f"site-{site:05d}", own)
        if self.is_global_zero:
            files.write_dense(folder, {name: tensors[name] for name in layout.dense})
            files.write_state(folder, "trainer", state)
        self.barrier("checkpoint written")
        if self.is_global_zero:
            config: ModelConfig = self.transformer.config  # type: ignore[assignment]
            manifest = {
                "architecture": asdict(config), "n_sites": self.topology.n_sites,
                "rounds": self.rounds_done, "redraws": self.redraws, "optimizer_steps": self.optimizer_steps,
                "identity": self.identity(self.topology.n_sites),
            }  # fmt: skip
            files.finish(folder, manifest)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read Lightning's state; weights are read by `load_model_state_dict`, only those of this site."""
        folder = Path(checkpoint_path)
        files.read_manifest(folder)
        # Our own file: Lightning's loop and callback states hold more than plain tensors.
        state: dict[str, Any] = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=False)
        return {**state, "state_dict": {}, "optimizer_states": [], "folder": str(folder)}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read this site's weights from the folder."""
        folder, layout = Path(checkpoint["folder"]), self.layout()
        config: ModelConfig = self.transformer.config  # type: ignore[assignment]
        residency: Residency = self.transformer.residency  # type: ignore[assignment]
        check_weights(folder, config)
        names = list(layout.tensors)
        self.set_global(files.read_weights(folder, names, layout.expert_layer, residency.experts, config.n_experts))

    def set_global(self, weights: dict[str, Tensor]) -> None:
        """Put the global model's values into this rank's tensors."""
        self.layout().fill(weights)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore inner optimizer, outer state and counters of this site."""
        folder = Path(checkpoint["folder"])
        check_resumable(folder, self.identity(self.topology.n_sites))
        manifest = files.read_manifest(folder)
        # Data-parallel ranks are all alike, and only the first has written.
        site = self.topology.site if self.writes_checkpoint() else 0
        path = folder / f"site-{site:05d}.pt"
        own = torch.load(path, map_location="cpu", weights_only=False)
        if own["residents"] != self.transformer.residency.experts:  # type: ignore[union-attr]
            raise RuntimeError(f"{path} is of other experts than this site holds: {own['residents']}")
        super().load_optimizer_state_dict({"optimizer_states": own["optimizer_states"]})
        self.load_site_state(own["strategy"])
        self.rounds_done = manifest["rounds"]
        self.optimizer_steps = manifest["optimizer_steps"]

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint folder."""
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)
