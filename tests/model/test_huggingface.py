"""The options that make OLMoE and Qwen3-MoE give the logits and gradients of Hugging Face's implementations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
COMMON: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_experts": 6,
    "top_k": 3,
    "d_expert": 24,
    "gate": "softmax",
    "expert": "swiglu",
    "norm_placement": "pre",
    "norm": "rmsnorm",
    "embedding_norm": False,
    "tie_embeddings": False,
    "parametrization": "standard",
}


def olmoe() -> tuple[Any, ModelConfig]:
    theirs = transformers.OlmoeConfig(
        **SIZES, intermediate_size=24, num_key_value_heads=4, norm_topk_prob=False, rms_norm_eps=1e-5
    )
    return transformers.OlmoeForCausalLM(theirs), ModelConfig(**COMMON, qk_norm="full", norm_eps=1e-5)


def qwen3() -> tuple[Any, ModelConfig]:
    theirs = transformers.Qwen3MoeConfig(
        **SIZES,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_key_value_heads=2,
        head_dim=16,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
    )
    ours = ModelConfig(**COMMON, qk_norm="head", norm_eps=1e-6, normalize_gates=True, n_kv_heads=2, head_dim=16)
    return transformers.Qwen3MoeForCausalLM(theirs), ours


def to_ours(tensors: dict[str, Tensor], n_layers: int, n_experts: int) -> dict[str, Tensor]:
    """Rename and stack Hugging Face's tensors (weights or gradients); none may be left over."""
    theirs = dict(tensors)
    ours = {
        "embedding.weight": theirs.pop("model.embed_tokens.weight"),
        "final_norm.weight": theirs.pop("model.norm.weight"),
        "output.weight": theirs.pop("lm_head.weight"),
    }
    for layer in range(n_layers):
        source, target = f"model.layers.{layer}.", f"layers.{layer}."
        for name in ("q", "k", "v", "o"):
            ours[f"{target}attention.{name}.weight"] = theirs.pop(f"{source}self_attn.{name}_proj.weight")
        for name in ("q_norm", "k_norm"):
            ours[f"{target}attention.{name}.weight"] = theirs.pop(f"{source}self_attn.{name}.weight")
        ours[f"{target}attention_norm.weight"] = theirs.pop(f"{source}input_layernorm.weight")
        ours[f"{target}moe_norm.weight"] = theirs.pop(f"{source}post_attention_layernorm.weight")
        ours[f"{target}moe.router.weight"] = theirs.pop(f"{source}mlp.gate.weight")
        experts = f"{source}mlp.experts."
        if f"{experts}gate_up_proj" in theirs:  # transformers 5 stacks them
            gate_up, down = theirs.pop(f"{experts}gate_up_proj"), theirs.pop(f"{experts}down_proj")
        else:
            gate, up, down = (
                torch.stack([theirs.pop(f"{experts}{e}.{name}_proj.weight") for e in range(n_experts)])
                for name in ("gate", "up", "down")
            )
            gate_up = torch.cat((gate, up), dim=1)
        ours[f"{target}moe.experts.w_in"] = gate_up.transpose(1, 2)
        ours[f"{target}moe.experts.w_out"] = down.transpose(1, 2)
    assert theirs == {}
    return ours


@pytest.mark.parametrize("family", [olmoe, qwen3])
def test_logits_loss_and_gradients(family: Any) -> None:
    theirs, config = family()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    ours = Transformer(config)
    ours.load_state_dict(to_ours(theirs.state_dict(), 3, 6))
    tokens = torch.randint(0, 60, (2, 11))
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100

    hidden, _ = ours(tokens)
    expected = theirs(tokens, labels=tokens)
    assert expected.logits.std() > 0.5
    torch.testing.assert_close(ours.logits(hidden), expected.logits, rtol=1e-4, atol=1e-4)
    loss = ours.loss(hidden, targets)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    gradients = to_ours({name: parameter.grad for name, parameter in theirs.named_parameters()}, 3, 6)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)
