"""Validation of the global model, while each site holds some of the experts only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.strategies.base import SiteStrategy


class GlobalValidation(SiteStrategy):
    """The part of the federated strategy that makes the agreed model whole for a while."""

    federation: Federation | None
    settings: FederationConfig

    @property
    def last_step(self) -> int | None:
        """The step that ends the run, and with it its last round; None if that is not known."""
        steps: int = self.trainer.max_steps
        return steps if steps > 0 else None

    def on_validation_start(self) -> None:
        """In mid-round the agreed values stand in for the local ones."""
        if self.federation is not None and not self._at_round_end():
            self.federation.enter_global()

    def on_validation_end(self) -> None:
        """Back to the local values."""
        if self.federation is not None:
            self.federation.leave_global()

    def _at_round_end(self) -> bool:
        return self.optimizer_steps == 0 or self.settings.schedule.is_round_end(self.optimizer_steps, self.last_step)

    @contextmanager
    def all_experts_of(self, layer: int) -> Iterator[None]:
        """Make all E experts of one layer live on this site while the context lasts; all sites enter it together."""
        assert self.federation is not None
        if self.transformer.residency.is_full(self.transformer.config):  # type: ignore[union-attr,operator]
            yield
            return
        prefix = f"layers.{layer}.moe."
        tensors = {name.removeprefix(prefix): t for name, t in self.federation.gather(layer).items()}
        with self.transformer.layers[layer].moe.with_all_experts(tensors):  # type: ignore[index,union-attr]
            yield
