"""Ways to run the picked experts: `loop` is the reference, `grouped` and `triton` are fast, others are custom.

Those of this package have short names, others the dotted path of their class.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fomoe_pl.errors import ConfigError

if TYPE_CHECKING:  # the configuration names a backend, and a backend reads the configuration
    from fomoe_pl.model.backends.frozen import Frozen
    from fomoe_pl.model.config import ExpertKind, ModelConfig

KEY = "expert_backend"
AUTO = "auto"
SHIPPED = {
    "triton": "fomoe_pl.model.backends.kernels.Triton",
    "grouped": "fomoe_pl.model.backends.grouped.Grouped",
    "loop": "fomoe_pl.model.backends.loop.Loop",
}
"""In the order in which `auto` tries them."""


class Backend(ABC):
    """Runs experts on the tokens that picked them; a subclass takes no arguments, and keeps nothing between calls.

    Attributes:
        waits_for_device: Whether `dispatch` reads values of a GPU on the host: steps are not recorded then.
        compiles_on: Device types (`cuda`, `cpu`) on which compiled blocks take `dispatch` in; elsewhere they call it.
        computes_copies: Whether it computes picks of low-bit copies, as `shadow` routing needs.
        fused: Whether `dispatch` takes bfloat16 copies of the weights and checkpointing as two more arguments, and
            keeps what our kernels keep; for this package's own.
    """

    waits_for_device: ClassVar[bool] = True
    compiles_on: ClassVar[frozenset[str]] = frozenset()
    computes_copies: ClassVar[bool] = False
    fused: ClassVar[bool] = False

    def unsupported(self, device: torch.device, dtype: torch.dtype, d_model: int, d_expert: int) -> str | None:
        """Return why it does not work here, or None if it does.

        Args:
            device: Where the tokens are.
            dtype: In which type the products run.
            d_model: Width D.
            d_expert: Width F.
        """
        return None

    @abstractmethod
    def dispatch(
        self, x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, kind: ExpertKind,
        frozen: Frozen | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the sum over the picks of residents and copies of gate x expert(x); others add nothing.

        Args:
            x_TD: Tokens (T, D), in the type of the products.
            gates_TK: Gates, float32 (T, K).
            slots_TK: Row of each pick in the stacked weights, int64 (T, K). Slots from R on are rows of the copies;
                without these R is a ghost and adds nothing.
            w_in_RDI: Input matrices, in the type of the parameters.
            w_out_RFD: Output matrices.
            kind: The expert's activation, see `fomoe_pl.model.backends.activation.activate`.
            frozen: Copies of experts that are not resident; None unless `computes_copies`.

        Returns:
            (T, D), of the dtype of x, with gradients for x, gates and weights.
        """

    def kept_bytes(self, config: ModelConfig, itemsize: int, picks: int) -> int:
        """Bytes a token that the experts of a layer keep for the backward pass: what the planner counts.

        Args:
            config: The architecture.
            itemsize: Bytes of a number of the products.
            picks: Of a token, K.

        Raises:
            ConfigError: If a backend does not declare it.
        """
        rule = "does not declare what it keeps for the backward pass, so that memory cannot be predicted"
        raise ConfigError(KEY, config.expert_backend, rule, f"give {type(self).__name__} the method kept_bytes")


@lru_cache
def backend_of(name: str) -> Backend:
    """The backend of a name or a dotted path.

    Args:
        name: `loop`, `grouped`, `triton`, or `module.Class` of a subclass of `Backend`.

    Raises:
        ConfigError: If there is none.
    """
    if name not in SHIPPED and "." not in name:
        hint = f"use {', '.join((AUTO, *SHIPPED))}, or the class_path of a subclass of fomoe_pl.model.backends.Backend"
        raise ConfigError(KEY, name, "is not one of the choices", hint)
    try:
        found = pkgutil.resolve_name(SHIPPED.get(name, name))
    except (ImportError, AttributeError, ValueError) as error:
        hint = "type module.Class; fomoe finds modules of the current folder"
        raise ConfigError(KEY, name, f"cannot be imported: {error}", hint) from error
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise ConfigError(KEY, name, "is no subclass of fomoe_pl.model.backends.Backend", "derive the class from it")
    return found()
