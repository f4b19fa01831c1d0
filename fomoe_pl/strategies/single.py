"""One process, the whole model: `fomoe validate` and single-site training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from fomoe_pl.federation.topology import Topology
from fomoe_pl.strategies.base import SiteStrategy


class SingleSiteStrategy(SiteStrategy, SingleDeviceStrategy):
    """The plain full model on one device; reads every checkpoint of this project.

    Args:
        device: torch device; None is the first GPU, or the CPU where there is none.
        **kwargs: as for Lightning's `SingleDeviceStrategy`.
    """

    def __init__(self, device: str | None = None, **kwargs: Any) -> None:
        chosen = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        super().__init__(device=torch.device(chosen), **kwargs)
        self.init_site()

    @property
    def topology(self) -> Topology:
        """One site."""
        return Topology(1, 1, 0)

    def sum_over_sites(self, values: Tensor, kind: str = "evaluation") -> Tensor:
        """The values themselves."""
        return values
