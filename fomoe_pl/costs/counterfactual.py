"""Bytes that one site would send with the methods that keep whole replicas, for the same model and steps."""

from __future__ import annotations

from fomoe_pl.costs.bytes import predict_bytes
from fomoe_pl.costs.rounds import ITEMSIZE, ddp_collectives
from fomoe_pl.federation.ledger import ring_all_reduce_bytes
from fomoe_pl.federation.settings import FederationConfig, WireDtype
from fomoe_pl.model.config import ModelConfig


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
        architecture, FederationConfig(local_steps=1, wire_dtype=wire_dtype), n_sites=n_sites, site=0, steps=1
    )
    return ledger.total_wire
