"""One process, the whole model: `fomoe validate` and single-site training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.topology import Topology
from fomoe_pl.lightning_internals import replace_signal_handling, requested_devices, set_device
from fomoe_pl.strategies.base import SiteStrategy


class SingleSiteStrategy(SiteStrategy, SingleDeviceStrategy):
    """The plain full model on one device; reads every checkpoint of this project.

    Args:
        device: torch device; None is the first one of the Trainer's accelerator.
        async_save: Write checkpoints while training goes on, from a copy in host memory.
        **kwargs: As for Lightning's `SingleDeviceStrategy`.
    """

    def __init__(self, device: str | None = None, async_save: bool = True, **kwargs: Any) -> None:
        super().__init__(device=torch.device(device or "cpu"), **kwargs)
        self._device_is_given = device is not None
        self.init_site(async_save)

    def setup_environment(self) -> None:
        """Take the accelerator's device, which Lightning's connector chooses for its own strategies only."""
        assert self.accelerator is not None
        if not self._device_is_given:
            devices: list[torch.device] = self.accelerator.get_parallel_devices(self.accelerator.parse_devices(1))
            set_device(self, devices[0])
        super().setup_environment()

    def check_run(self, trainer: Any, module: Any, data: Any, *, fitting: bool) -> None:
        """As for all strategies; of several devices all but the first would do nothing."""
        requested = requested_devices(trainer)  # of GPUs a list of their numbers
        if str(requested) not in ("1", "auto") and not (isinstance(requested, list) and len(requested) == 1):
            raise ConfigError("trainer.devices", requested, "`single_site` is one process",
                              "set it to 1, or choose a strategy of several sites")  # fmt: skip
        if isinstance(requested, list) and requested != [0] and not self._device_is_given:
            raise ConfigError("trainer.devices", requested, "`single_site` takes the first GPU",
                              f"give the strategy device: cuda:{requested[0]}")  # fmt: skip
        super().check_run(trainer, module, data, fitting=fitting)

    def setup(self, trainer: Any) -> None:
        """As Lightning's; a signal ends training after the step."""
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            replace_signal_handling(trainer, self.stops.note)

    @property
    def topology(self) -> Topology:
        """One site."""
        return Topology(1, 1, 0)

    def sum_over_sites(self, values: Tensor, kind: str = "evaluation") -> Tensor:
        """The values themselves."""
        return values
