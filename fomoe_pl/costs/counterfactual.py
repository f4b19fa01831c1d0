"""Bytes that one site would send with the methods that keep whole replicas, for the same model and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fomoe_pl.costs.bytes import predict_bytes
from fomoe_pl.costs.rounds import ITEMSIZE, ddp_collectives
from fomoe_pl.federation.ledger import ring_all_reduce_bytes
from fomoe_pl.federation.outer import Nesterov
from fomoe_pl.model.config import ModelConfig

if TYPE_CHECKING:
    from fomoe_pl.federation.transport import WireDtype


def ddp_step_bytes(architecture: ModelConfig, n_sites: int, param_dtype: WireDtype = "float32") -> int:
    """Wire bytes of an optimizer step of data parallelism: all gradients, and with `balance: bias` the loads.

    Args:
        architecture: The model.
        n_sites: Number of sites M.
        param_dtype: dtype of parameters and so of gradients.
    """
    payload = sum(call.payload for call in ddp_collectives(architecture, n_sites, ITEMSIZE[param_dtype]))
    if architecture.balance == "bias":
        payload += architecture.n_layers * architecture.n_experts * ITEMSIZE["float32"]
    return ring_all_reduce_bytes(payload, n_sites)


def replica_round_bytes(architecture: ModelConfig, n_sites: int, wire_dtype: WireDtype = "float32") -> int:
    """Wire bytes of a round of full-replica DiLoCo: all parameters, no moments.

    Args:
        architecture: The model.
        n_sites: Number of sites M.
        wire_dtype: dtype on the wire.
    """
    ledger = predict_bytes(
        architecture, n_sites=n_sites, overlap=n_sites, site=0, steps=1, local_steps=1,
        outer=Nesterov(0.7, 0.9), wire_dtype=wire_dtype,
    )  # fmt: skip
    return ledger.total_wire
