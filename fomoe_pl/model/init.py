"""Initial values that depend on (seed, layer, expert id) or (seed, tensor name) alone.

So every site that holds an expert draws the same bits for it, whatever the number of sites and the placement. No site
draws an expert that it does not hold, unless it keeps a copy: then it packs what it drew, so all copies are the same
bits, too.
"""

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fomoe_pl.model.parametrization import Rule, rule_of

if TYPE_CHECKING:
    from fomoe_pl.model.transformer import Transformer

_EXPERTS_PER_LAYER = 2**16


def _digest(text: str) -> int:
    # torch's CPU generator keeps 32 bits of its seed.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def expert_generator(seed: int, layer: int, expert: int) -> torch.Generator:
    """Return the generator of one expert.

    Counted on from one hash, not hashed one by one: among the 65,536 experts of the largest preset a collision of
    32-bit hashes would be likely.

    Args:
        seed: Seed of the run.
        layer: Index of the layer.
        expert: Id of the expert in its layer, below 65,536.
    """
    number = (_digest(f"{seed}/experts") + layer * _EXPERTS_PER_LAYER + expert) % 2**32
    return torch.Generator(device="cpu").manual_seed(number)


def dense_generator(seed: int, name: str) -> torch.Generator:
    """Return the generator of one dense tensor.

    Args:
        seed: Seed of the run.
        name: Name of the tensor, as in `named_parameters()`.
    """
    return torch.Generator(device="cpu").manual_seed(_digest(f"{seed}/{name}"))


def _draw(target: Tensor, rule: Rule, generator: torch.Generator) -> None:
    # On the CPU in float32 whatever the target is: the same bits everywhere. The device is explicit because
    # Lightning builds models inside a default-device context.
    values = torch.empty(target.shape, dtype=torch.float32, device="cpu")
    target.copy_(values.normal_(rule.init_mean, rule.init_std, generator=generator))


@torch.no_grad()
def initialize(model: "Transformer", seed: int) -> None:
    """Give parameters and copies of absent experts their initial values, biases zero, and lookups the residency.

    Args:
        model: The transformer, on a real device.
        seed: Seed of the run.
    """
    for name, parameter in model.named_parameters():
        if ".moe.experts." not in name and ".moe.router." not in name:
            _draw(parameter, rule_of(name, model.config), dense_generator(seed, name))
    for layer, block in enumerate(model.layers):
        # Memory that came from the meta device holds no lookups yet.
        block.moe.set_resident(model.residency.experts[layer])
        _initialize_routed(model, layer, seed)
        if block.moe.router.balance_bias is not None:
            block.moe.router.balance_bias.zero_()


def _initialize_routed(model: "Transformer", layer: int, seed: int) -> None:
    moe = model.layers[layer].moe
    router, experts, shadow = moe.router, moe.experts, moe.shadow
    router_rule, in_rule, out_rule = (
        rule_of(f"layers.{layer}.moe.{part}", model.config)
        for part in ("router.weight", "experts.w_in", "experts.w_out")
    )
    rows = {expert: row for row, expert in enumerate(model.residency.experts[layer])}
    absent = {} if shadow is None else {expert: row for row, expert in enumerate(shadow.absent)}
    whole = model.residency.routing != "partitioned"
    for expert in range(model.config.n_experts) if whole else rows:
        generator = expert_generator(seed, layer, expert)
        # The router's row comes first, so that a whole router never has to draw a ghost's matrices.
        _draw(router.weight[expert if whole else rows[expert]], router_rule, generator)
        if expert in rows:
            _draw(experts.w_in[rows[expert]], in_rule, generator)
            _draw(experts.w_out[rows[expert]], out_rule, generator)
        elif shadow is not None:
            for weight, packed, rule in (
                (experts.w_in, shadow.w_in, in_rule),
                (experts.w_out, shadow.w_out, out_rule),
            ):
                values = torch.empty(weight.shape[1:], dtype=torch.float32, device=packed.device)
                _draw(values, rule, generator)
                packed[absent[expert]].copy_(model.residency.shadow.codec.encode(values.flatten()))
