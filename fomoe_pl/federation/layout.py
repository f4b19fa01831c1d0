"""Which tensor is dense, and which rows of which tensor are which expert of which layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fomoe_pl.slices import local_of


def fragment_of(layer: int | None, fragments: int) -> int:
    """Index of the fragment of a layer, or of what is outside layers (None); see `ParameterLayout.fragment`."""
    return 0 if layer is None or fragments == 1 else 1 + layer % (fragments - 1)


@dataclass(frozen=True)
class ParameterLayout:
    """The tensors that sites agree on.

    Attributes:
        tensors: Name -> tensor of this site, or what this rank has of it. Stacked expert tensors have one row for each
            resident expert.
        expert_layer: Name -> layer, for the stacked expert tensors; row r is the layer's r-th resident expert.
        trained: Names that the inner optimizer moves; the others are buffers, which rounds average plainly.
    """

    tensors: Mapping[str, Tensor]
    expert_layer: Mapping[str, int]
    trained: frozenset[str]

    @classmethod
    def of(cls, module: torch.nn.Module, expert_layer: Mapping[str, int]) -> ParameterLayout:
        """Layout of a module: its parameters and persistent buffers, tied ones once."""
        tensors: dict[str, Tensor] = {name: local_of(p) for name, p in module.named_parameters()}
        trained = frozenset(name for name, p in tensors.items() if p.requires_grad)
        persistent = module.state_dict(keep_vars=True)
        tensors |= {name: buffer for name, buffer in module.named_buffers() if name in persistent}
        return cls(tensors, dict(expert_layer), trained)

    def may_be_coded(self, name: str) -> bool:
        """Whether a codec may round a tensor's values on the wire: trained matrices, the router's excepted.

        Norms, biases and routers are few numbers, of which each matters.
        """
        stacked = name in self.expert_layer
        return name in self.trained and self.tensors[name].dim() >= 2 + stacked and name not in self.routers

    @property
    def routers(self) -> frozenset[str]:
        """Names of the tensors of routers, balance biases among them."""
        return frozenset(name for name in self.tensors if "router" in name.split("."))

    def fragment(self, index: int, fragments: int) -> frozenset[str]:
        """Names of the tensors of a fragment: of several the first has what is outside layers, the others layers.

        Layers are dealt out to the others in turns, so that each has some from all depths.

        Args:
            index: 0..fragments-1.
            fragments: Number of them.
        """
        return frozenset(name for name in self.tensors if fragment_of(self.layer(name), fragments) == index)

    def layer(self, name: str) -> int | None:
        """The layer of a tensor, dense or not; None for what is outside layers."""
        if name in self.expert_layer:
            return self.expert_layer[name]
        first, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        return int(number) if first == "layers" and number.isdigit() else None

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Set every tensor to the value of its name, in the tensor's own dtype and on its own device."""
        for name, tensor in self.tensors.items():
            tensor.copy_(values[name])

    @property
    def dense(self) -> list[str]:
        """Names of the tensors that every site holds, in a fixed order."""
        return [name for name in self.tensors if name not in self.expert_layer]

    def sparse(self, layer: int) -> list[str]:
        """Names of one layer's stacked expert tensors, in a fixed order."""
        return [name for name in self.tensors if self.expert_layer.get(name) == layer]
