"""What a checkpoint holds of the federated strategy: the agreed model, and each site's own state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from fomoe_pl.federation.checkpoint import read_manifest, read_weights
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.placement import Placement
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.strategies.base import SiteStrategy


class GlobalState(SiteStrategy):
    """The part of the federated strategy that saves and resumes."""

    every_site_writes = True
    settings: FederationConfig

    def placed(self, config: ModelConfig) -> Placement:
        """Where experts are after the last time that they were placed."""
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
        manifest = read_manifest(Path(checkpoint_path))
        self.redraws, self.loads_at_draw = manifest["redraws"], manifest.get("loads_at_draw")
        config: ModelConfig = self.transformer.config  # type: ignore[assignment]
        placement = self.placed(config)
        cast(Federation, self.federation).placement = placement
        self.transformer.set_residency(  # type: ignore[operator]
            self.settings.residency(placement.residents(self.topology.site))
        )
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read this site's weights, and pack those of the experts that it keeps copies of, a layer at a time."""
        super().load_model_state_dict(checkpoint, strict)
        federation, config = cast(Federation, self.federation), cast(ModelConfig, self.transformer.config)
        if federation.copies is None:
            return
        folder, layers = Path(checkpoint["folder"]), self.layout().expert_layer
        absent = federation.placement.complement().residents(self.topology.site)
        with federation.copies.refreshing() as fresh:
            for layer in range(config.n_layers):
                names = [name for name in fresh if layers[name] == layer]
                for name, values in read_weights(folder, names, layers, absent, config.n_experts).items():
                    fresh[name].copy_(federation.copies.encode(values))

    def identity(self, n_sites: int) -> dict[str, Any]:
        """Who holds what, and the outer rule, whose state has its names."""
        return {**super().identity(n_sites), **self.settings.identity(n_sites)}

    def site_state(self) -> dict[str, Any]:
        """Local values, which differ from the anchors in mid-round, and the ledger."""
        state = {**super().site_state(), "federation": cast(Federation, self.federation).state_dict()}
        copies = cast(Federation, self.federation).copies
        if copies is not None and self.settings.shadow_refresh > 1:  # else they are what the anchors are
            state["copies"] = dict(copies.tensors)
        if self.settings.policy.sees_loads:
            state["loads"] = cast(Any, self.lightning_module).loads()
        return state

    def load_site_state(self, state: dict[str, Any]) -> None:
        """Restore `site_state`."""
        super().load_site_state(state)
        cast(Federation, self.federation).load_state_dict(state["federation"])
        copies = cast(Federation, self.federation).copies
        if copies is not None and "copies" in state:
            for name, packed in copies.tensors.items():
                packed.copy_(state["copies"][name])
        if "loads" in state:
            cast(Any, self.lightning_module).set_loads(state["loads"])

    def set_global(self, weights: dict[str, Tensor]) -> None:
        """Anchors and local values."""
        cast(Federation, self.federation).load_global(weights)
