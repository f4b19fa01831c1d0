"""What a checkpoint holds of the federated strategy: the agreed model, and each site's own state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from fomoe_pl.federation.checkpoint import read_manifest
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.outer import OuterRule
from fomoe_pl.federation.placement import Placement, PlacementKind
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency, Routing
from fomoe_pl.strategies.base import SiteStrategy


class GlobalState(SiteStrategy):
    """The part of the federated strategy that saves and resumes."""

    every_site_writes = True
    outer: OuterRule
    routing: Routing
    placement_kind: PlacementKind
    placement_seed: int
    reshuffle_rounds: int

    def overlap(self, n_sites: int) -> int:
        """Sites that hold each expert."""
        raise NotImplementedError

    def placed(self, config: ModelConfig, redraws: int) -> Placement:
        """The placement after it was redrawn `redraws` times."""
        raise NotImplementedError

    def global_tensors(self) -> Mapping[str, Tensor]:
        """The anchors: agreed values, float32, also in mid-round."""
        assert self.federation is not None
        return self.federation.anchors

    def outer_slots(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The outer rule's state, float32."""
        assert self.federation is not None
        return self.federation.state.of_rule

    def owned_experts(self) -> list[tuple[int, int, int]]:
        """The experts of which this site is the owner."""
        site = self.topology.site
        placement = cast(Federation, self.federation).placement
        return [(i, e, r) for i, e, r in super().owned_experts() if placement.owner(i, e) == site]

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Anchors must exist before they can be restored."""
        return True

    def check_before_saving(self) -> None:
        """Compare what all sites must have alike."""
        cast(Federation, self.federation).check_agreement()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read Lightning's state and take the placement of the checkpoint's round."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self.redraws = read_manifest(Path(checkpoint_path))["redraws"]
        config: ModelConfig = self.transformer.config  # type: ignore[assignment]
        placement = self.placed(config, self.redraws)
        cast(Federation, self.federation).placement = placement
        self.transformer.set_residency(  # type: ignore[operator]
            Residency(self.routing, placement.residents(self.topology.site))
        )
        return checkpoint

    def identity(self, n_sites: int) -> dict[str, Any]:
        """Who holds what, and the outer rule, whose state has its names."""
        drawn = {"placement_seed": self.placement_seed, "reshuffle_rounds": self.reshuffle_rounds}
        return {
            **super().identity(n_sites), "overlap": self.overlap(n_sites), "routing": self.routing,
            "placement": self.placement_kind, "outer.rule": str(self.outer).split()[0],
            **(drawn if self.placement_kind == "random" else {}),
        }  # fmt: skip

    def site_state(self) -> dict[str, Any]:
        """Local values, which differ from the anchors in mid-round, and the ledger."""
        return {**super().site_state(), "federation": cast(Federation, self.federation).state_dict()}

    def load_site_state(self, state: dict[str, Any]) -> None:
        """Restore `site_state`."""
        super().load_site_state(state)
        cast(Federation, self.federation).load_state_dict(state["federation"])

    def set_global(self, weights: dict[str, Tensor]) -> None:
        """Anchors and local values."""
        cast(Federation, self.federation).load_global(weights)
