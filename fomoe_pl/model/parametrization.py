"""How widths and depths change initial values, learning rates and multipliers: CompleteP or none.

CompleteP (Dey et al. 2025, arXiv 2505.01618, table 1) with alpha = 1, m_N = width/base width, m_L = depth/base depth:

==================  =======================  ==================  ===============  ==================
what                initial std              learning rate       weight decay     Adam's epsilon
==================  =======================  ==================  ===============  ==================
embedding, output   std                      1                   1                1 / m_N
hidden matrices     std / sqrt(m_fan)        1 / m_fan           m_fan            1 / (m_N·m_L)
norms of blocks     1                        1                   none             1 / (m_N·m_L)
other norms         1                        1                   none             1 / m_N
==================  =======================  ==================  ===============  ==================

Residual branches are multiplied by 1/m_L and logits by 1/m_N. Here m_fan = fan-in/base width, which is m_N for all
matrices that read the residual stream. FoMoE scales top-k instead of the expert width (table 1), so what an expert
output matrix sums over is top_k·d_expert channels, and that counts as its fan-in. The paper's attention scale 1/C
and this model's 1/sqrt(C) differ by a constant as long as the head size C stays.

`standard` is GPT-2's: one std for all matrices, everything else 1.
"""

import math
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from torch import nn

from fomoe_pl.model.config import ModelConfig

if TYPE_CHECKING:
    from fomoe_pl.model.transformer import Transformer


class Rule(NamedTuple):
    """How one tensor is drawn and trained.

    Attributes:
        init_mean: Mean of the initial values: 0, or 1 for norms.
        init_std: Standard deviation of the initial values, 0 for norms.
        lr_scale: Factor on the learning rate.
        eps_scale: Factor on Adam's epsilon.
        weight_decay_scale: Factor on the weight decay (of AdamW, which multiplies it by the learning rate).
        decay: Whether weight decay applies at all.
    """

    init_mean: float
    init_std: float
    lr_scale: float
    eps_scale: float
    weight_decay_scale: float
    decay: bool


class ParameterGroup(TypedDict):
    """Parameters that share a rule; `names` are those of `named_parameters()`, in the order of `params`."""

    params: list[nn.Parameter]
    names: list[str]
    lr_scale: float
    eps_scale: float
    weight_decay_scale: float
    decay: bool


def branch_multiplier(config: ModelConfig) -> float:
    """Return the factor on each residual branch: 1/m_L, or 1 in `standard`."""
    return config.base_depth / config.n_layers if config.parametrization == "completep" else 1.0


def logits_multiplier(config: ModelConfig) -> float:
    """Return the factor on the logits: 1/m_N, or 1 in `standard`."""
    return config.base_width / config.d_model if config.parametrization == "completep" else 1.0


def fan_in(name: str, config: ModelConfig) -> int:
    """Return over how many channels a hidden matrix sums to make one output.

    Args:
        name: Name of the tensor, as in `named_parameters()`.
        config: The architecture.
    """
    if name.endswith("attention.o.weight"):
        return config.n_heads * config.head_size
    if name.endswith("experts.w_out"):
        return config.top_k * config.d_expert
    if name.endswith("shared.w_out"):
        return config.n_shared_experts * config.d_expert
    return config.d_model


def rule_of(name: str, config: ModelConfig) -> Rule:
    """Return the rule of one tensor.

    Args:
        name: Name of the tensor, as in `named_parameters()`.
        config: The architecture.
    """
    is_norm = "norm" in name.split(".")[-2]
    mean, std = (1.0, 0.0) if is_norm else (0.0, config.init_std)
    if config.parametrization == "standard":
        return Rule(mean, std, 1.0, 1.0, 1.0, decay=not is_norm)
    width = config.d_model / config.base_width
    if not name.startswith("layers."):
        return Rule(mean, std, 1.0, 1 / width, 1.0, decay=not is_norm)
    eps_scale = 1 / (width * config.n_layers / config.base_depth)
    if is_norm:
        return Rule(mean, std, 1.0, eps_scale, 1.0, decay=False)
    fan = fan_in(name, config) / config.base_width
    return Rule(mean, std / math.sqrt(fan), 1 / fan, eps_scale, fan, decay=True)


def parameter_groups(model: "Transformer") -> list[ParameterGroup]:
    """Return the model's parameters grouped by rule, each exactly once, in a fixed order.

    Args:
        model: The transformer.
    """
    groups: dict[tuple[float, float, float, bool], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        _, _, lr_scale, eps_scale, weight_decay_scale, decay = rule_of(name, model.config)
        empty: ParameterGroup = {
            "params": [],
            "names": [],
            "lr_scale": lr_scale,
            "eps_scale": eps_scale,
            "weight_decay_scale": weight_decay_scale,
            "decay": decay,
        }
        group = groups.setdefault((lr_scale, eps_scale, weight_decay_scale, decay), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
