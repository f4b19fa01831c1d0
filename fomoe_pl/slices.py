"""Tensors that the ranks of a site share out among themselves: what one rank has of them, as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Slices:
    """Which part of each tensor of a site a rank has.

    Attributes:
        n_ranks: Of the site.
        place: Of this rank.
        cut: Name -> axis, and length of the whole tensor along it; a tensor that is not here is whole on every rank.
            Rows of stacked experts are on axis 0, which is not cut.
    """

    n_ranks: int
    place: int
    cut: Mapping[str, tuple[int, int]]

    def chunk(self, name: str) -> int:
        """Length of all slices of a tensor but the last ones, which may be shorter or empty."""
        return -(-self.cut[name][1] // self.n_ranks)

    def own(self, name: str, whole: Tensor) -> Tensor:
        """This rank's slice of a tensor, as a view; what is not cut, as it is."""
        if name not in self.cut:
            return whole
        axis, length = self.cut[name]
        start = min(self.place * self.chunk(name), length)
        return whole.narrow(axis, start, min(self.chunk(name), length - start))


def local_of(parameter: nn.Parameter) -> nn.Parameter:
    """What this rank has of a parameter, as a plain one with the same storage; a plain one is itself."""
    if not isinstance(parameter, DTensor):
        return parameter
    kept = vars(parameter)  # in the parameter itself: a weak table of them keeps modules from moving
    if "fomoe_local" not in kept:
        kept["fomoe_local"] = nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
    local: nn.Parameter = kept["fomoe_local"]
    return local


def take_gradients(model: nn.Module) -> None:
    """Give the gradients that FSDP has averaged to the plain parameters, which the optimizer steps."""
    for parameter in model.parameters():
        if isinstance(parameter.grad, DTensor):
            local_of(parameter).grad = parameter.grad.to_local()
            parameter.grad = None


def whole(tensor: Tensor) -> Tensor:
    """A tensor of a model, gathered if it is a sharded one; all ranks of the site call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
