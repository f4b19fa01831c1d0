"""FLOPs of a token by part, executed and nominal (arXiv 2606.19025, §3.4)."""

from __future__ import annotations

from fomoe_pl.errors import ConfigError
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing, Shadow
from fomoe_pl.model.sizes import TokenFlops, flops_by_part, scored_experts


def executed_picks(
    config: ModelConfig, n_resident: int, routing: Routing, ghost_fraction: float | None = None
) -> float:
    """Mean number of routed experts that run for a token of one layer.

    Args:
        config: The architecture.
        n_resident: Resident experts R of a layer.
        routing: `ghost` skips picks that are not resident; `partitioned` takes the top min(k, R) residents;
            `shadow` computes all.
        ghost_fraction: Measured share of the picks that are not of residents, `routing/ghost_fraction/mean` or
            `routing/copy_fraction/mean`; None is balanced routing's 1 - R/E, the paper's sigma_st.

    Raises:
        ConfigError: For a fraction outside 0..1 or a number of residents that cannot be.
    """
    if not 1 <= n_resident <= config.n_experts:
        raise ConfigError("n_resident", n_resident, "must be a number of experts of a layer",
                          f"give 1 to {config.n_experts}")  # fmt: skip
    if ghost_fraction is not None and not 0 <= ghost_fraction <= 1:
        raise ConfigError("ghost_fraction", ghost_fraction, "must be in 0..1", "give the measured share")
    if routing == "partitioned":
        return min(config.top_k, n_resident)
    if routing == "shadow":
        return config.top_k
    live = n_resident / config.n_experts if ghost_fraction is None else 1 - ghost_fraction
    return config.top_k * live


def token_flops(
    config: ModelConfig,
    sequence_length: int,
    *,
    n_resident: int | None = None,
    routing: Routing = "ghost",
    ghost_fraction: float | None = None,
    shadow: Shadow = Shadow(),  # noqa: B008  frozen
) -> TokenFlops:
    """FLOPs that a site executes for a token; with `n_resident` None the nominal ones of the whole model.

    Args:
        config: The architecture.
        sequence_length: Tokens of a sequence S.
        n_resident: Resident experts R of each layer.
        routing: The routing mode.
        ghost_fraction: As for `executed_picks`.
        shadow: How copies are used, with `shadow` routing: forward and input gradients are of all picks, gradients of
            weights of residents' picks alone.

    Raises:
        ConfigError: As for `executed_picks`.
    """
    resident = config.n_experts if n_resident is None else n_resident
    picks = executed_picks(config, resident, routing, ghost_fraction)
    learning = executed_picks(config, resident, "ghost", ghost_fraction) if routing == "shadow" else picks
    return flops_by_part(
        config, sequence_length, executed_picks=picks, n_scored=scored_experts(config, resident, routing),
        copied_picks=picks - learning, input_gradient=shadow.input_gradient,
    )  # fmt: skip
