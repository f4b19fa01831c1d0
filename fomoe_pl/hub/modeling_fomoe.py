"""FoMoE's architecture for transformers: a self-contained file that `fomoe export` puts next to the weights.

It is loaded with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, needs transformers and torch
alone, and computes what `fomoe_pl.model.transformer.Transformer` does for every setting of its architecture (FoMoE,
arXiv 2606.19025, §3; by its options OLMoE's and Qwen3-MoE's).

Shapes: B batch, S sequence, T = B·S tokens, D model, C channels of one head, E experts, K experts of a token, F expert
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


class FomoeConfig(PreTrainedConfig):
    """The architecture. Sizes have transformers' names, switches those of fomoe-pl.

    Attributes:
        moe_intermediate_size: Width F of one expert.
        n_shared_experts: Experts of width F that see every token, side by side as one.
        gate: `sigmoid` or `softmax` over all experts.
        norm_topk_prob: Divide a token's gates by their sum.
        expert: `silu` is W_out·silu(W_in·x); `swiglu` is W_out·(silu(W_gate·x) * W_up·x).
        norm_placement: `peri` is x + norm(F(norm(x))); `pre` is x + F(norm(x)).
        norm: `layernorm` or `rmsnorm`, with a weight and no bias.
        embedding_norm: Normalise the embeddings before the first block.
        qk_norm: `none`, `full` (over all heads) or `head` (each head by itself).
        parametrization: `completep` multiplies branches by base_depth/depth and logits by base_width/width;
            `standard` multiplies nothing.
        balance: `bias` has a bias for each expert that takes part in choosing alone.
        router_aux_loss_coef: Weight of the balance loss, which is added with `output_router_logits=True`.
        max_position_embeddings: Tokens of a training sequence; nothing in the model depends on it.
        fomoe: What was trained: of the exporting program, read by no code here.
    """

    model_type = "fomoe"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012  transformers' convention
    attribute_map = {"num_local_experts": "num_experts", "intermediate_size": "moe_intermediate_size"}  # noqa: RUF012

    vocab_size: int = 257
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    n_shared_experts: int = 0
    gate: str = "sigmoid"
    norm_topk_prob: bool = False
    expert: str = "silu"
    norm_placement: str = "peri"
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    embedding_norm: bool = True
    qk_norm: str = "none"
    parametrization: str = "completep"
    base_width: int = 256
    base_depth: int = 4
    balance: str = "aux_loss"
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    fomoe: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        if self.rope_parameters.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type {self.rope_parameters['rope_type']!r}: FoMoE has the default one alone")

    @property
    def branch_multiplier(self) -> float:
        """Factor on each residual branch."""
        return self.base_depth / self.num_hidden_layers if self.parametrization == "completep" else 1.0

    @property
    def logits_multiplier(self) -> float:
        """Factor on the logits."""
        return self.base_width / self.hidden_size if self.parametrization == "completep" else 1.0


class FomoeNorm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, with a weight and no bias."""

    def __init__(self, size: int, config: FomoeConfig) -> None:
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; the shape stays."""
        x = x.to(self.weight.dtype)
        if self.kind == "layernorm":
            return F.layer_norm(x, self.weight.shape, self.weight, None, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(positions_BS: Tensor, channels: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, float32 (B,1,S,C); the sine of the first half of the channels has its sign turned."""
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=positions_BS.device) / channels
    angles = positions_BS[:, None, :, None].float() * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x_BHSC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels by its position's angle, in float32; same shape, same dtype."""
    x = x_BHSC.float()
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x_BHSC.dtype)


def eager_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention; the only implementation that returns its weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class FomoeAttention(nn.Module):
    """Causal self-attention with rotary positions, grouped-query heads and optional query/key norms."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = FomoeNorm(self.head_dim if per_head else q_size, config)
            self.k_norm = FomoeNorm(self.head_dim if per_head else kv_size, config)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; (B,S,D) to (B,S,D), and the weights where the implementation has them."""
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = position_embeddings
        query, key = rotate(query, cos, sin).to(v.dtype), rotate(key, cos, sin).to(v.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights


class FomoeRouter(nn.Module):
    """Scores experts and picks top-k, in float32 whatever the precision of the rest.

    A balance bias takes part in choosing alone; the gate stays the score (arXiv 2408.15664, §3).
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__()
        self.top_k, self.kind, self.normalize = config.num_experts_per_tok, config.gate, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.balance == "bias" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (T,E), gates (T,K), both float32, and ids of the experts (T,K)."""
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            scores_TE = logits_TE.sigmoid() if self.kind == "sigmoid" else logits_TE.softmax(dim=-1)
            choose_TE = scores_TE.detach()
            if self.e_score_correction_bias is not None:
                choose_TE = choose_TE + self.e_score_correction_bias
            ids_TK = choose_TE.topk(self.top_k, dim=-1).indices
            gates_TK = scores_TE.gather(1, ids_TK)
            if self.normalize:
                gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
        return logits_TE, gates_TK, ids_TK


def _one_by_one(experts: Any, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """Run one expert after the other: transformers' `eager`."""
    w_in = experts.gate_up_proj if experts.has_gate else experts.up_proj
    y_TD = torch.zeros_like(x_TD)
    for expert in ids_TK.unique().tolist():
        tokens, picks = (ids_TK == expert).nonzero(as_tuple=True)
        h = x_TD[tokens] @ w_in[expert]
        h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
        y = (h @ experts.down_proj[expert]) * gates_TK[tokens, picks, None]
        y_TD.index_add_(0, tokens, y.to(y_TD.dtype))
    return y_TD


@use_experts_implementation(is_transposed=True, has_gate=False)
class FomoeExperts(nn.Module):
    """Experts of two matrices: `up_proj` (E,D,F) and `down_proj` (E,F,D)."""

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__()
        self.num_experts, self.act_fn = config.num_experts, F.silu
        size, width = config.hidden_size, config.moe_intermediate_size
        self.up_proj = nn.Parameter(torch.empty(config.num_experts, size, width))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, width, size))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return Σ_k gate_k · expert_k(x), (T,D)."""
        return _one_by_one(self, hidden_states, top_k_index, top_k_weights)


@use_experts_implementation(is_transposed=True)
class FomoeGatedExperts(nn.Module):
    """Experts of three matrices: `gate_up_proj` (E,D,2F), gate before up, and `down_proj` (E,F,D)."""

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__()
        self.num_experts, self.act_fn = config.num_experts, F.silu
        size, width = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, size, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, width, size))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return Σ_k gate_k · expert_k(x), (T,D)."""
        return _one_by_one(self, hidden_states, top_k_index, top_k_weights)


class FomoeSharedExperts(nn.Module):
    """Experts that are always on, side by side as one dense expert, without gates."""

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__()
        width = config.n_shared_experts * config.moe_intermediate_size
        self.is_gated = config.expert == "swiglu"
        if self.is_gated:
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (...,D) to (...,D)."""
        up = self.up_proj(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * up if self.is_gated else F.silu(up))


class FomoeSparseMoeBlock(nn.Module):
    """Router, routed experts, shared experts."""

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__()
        self.gate = FomoeRouter(config)
        self.experts = (FomoeGatedExperts if config.expert == "swiglu" else FomoeExperts)(config)
        self.shared_experts = FomoeSharedExperts(config) if config.n_shared_experts else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B,S,D) to (B,S,D)."""
        x_TD = hidden_states.flatten(0, 1)
        _, gates_TK, ids_TK = self.gate(x_TD)
        y_TD = self.experts(x_TD, ids_TK, gates_TK)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view(hidden_states.shape)


class FomoeDecoderLayer(GradientCheckpointingLayer):
    """Attention and mixture of experts, each x + m·norm(F(norm(x))) (`peri`) or x + m·F(norm(x)) (`pre`)."""

    def __init__(self, config: FomoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.multiplier = config.branch_multiplier
        self.self_attn = FomoeAttention(config, layer_idx)
        self.mlp = FomoeSparseMoeBlock(config)
        self.input_layernorm = FomoeNorm(config.hidden_size, config)
        self.pre_feedforward_layernorm = FomoeNorm(config.hidden_size, config)
        peri = config.norm_placement == "peri"
        self.post_attention_layernorm = FomoeNorm(config.hidden_size, config) if peri else nn.Identity()
        self.post_feedforward_layernorm = FomoeNorm(config.hidden_size, config) if peri else nn.Identity()

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map (B,S,D) to (B,S,D); the rest is the attention's."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.multiplier * self.post_attention_layernorm(attended)
        routed = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return hidden_states + self.multiplier * self.post_feedforward_layernorm(routed)


class FomoePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of these models."""

    config: FomoeConfig
    config_class = FomoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FomoeDecoderLayer"]  # noqa: RUF012  transformers' convention
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(FomoeRouter, index=0),
        "hidden_states": FomoeDecoderLayer,
        "attentions": OutputRecorder(FomoeAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # A plain start for tests and toys; fomoe-pl draws its models itself.
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if getattr(tensor, "_is_hf_initialized", False):
                continue
            if isinstance(module, FomoeNorm):
                tensor.fill_(1.0)
            elif name == "e_score_correction_bias":
                tensor.zero_()
            else:
                tensor.normal_(0.0, self.config.initializer_range)


class FomoeModel(FomoePreTrainedModel):
    """The transformer without its output matrix."""

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = FomoeNorm(config.hidden_size, config) if config.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList([FomoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = FomoeNorm(config.hidden_size, config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run all blocks; hidden states (B,S,D) whose products with the output matrix are the logits."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None] + seen
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BSD,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        config: Any = self.config
        tables = rotary_tables(position_ids, config.head_dim, config.rope_parameters["rope_theta"])
        x_BSD = self.embedding_norm(x_BSD)
        for layer in self.layers:
            x_BSD = layer(x_BSD, position_embeddings=tables, attention_mask=mask, cache=cache, **kwargs)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x_BSD) * self.config.logits_multiplier, cache=cache)


def balance_loss(router_logits: tuple[Tensor, ...], config: FomoeConfig) -> Tensor:
    """Return the mean over layers of E·Σ f_i·P_i, 1 when routing is uniform (Switch, arXiv 2101.03961, eq. 4)."""
    losses = []
    for logits_TE in router_logits:
        scores_TE = logits_TE.sigmoid() if config.gate == "sigmoid" else logits_TE.softmax(dim=-1)
        picks = scores_TE.topk(config.num_experts_per_tok, dim=-1).indices
        load_E = torch.zeros_like(scores_TE).scatter_(1, picks, 1.0).sum(dim=0) / picks.numel()
        share_E = (scores_TE / scores_TE.sum(dim=-1, keepdim=True)).mean(dim=0)
        losses.append(config.num_experts * (load_E * share_E).sum())
    return torch.stack(losses).mean()


class FomoeForCausalLM(FomoePreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers' convention

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__(config)
        self.model = FomoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits (B,S,V), and with `labels` the mean cross entropy in nats."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs: Any = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = aux_loss = None
        if output_router_logits:
            aux_loss = balance_loss(outputs.router_logits, self.config)
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            if aux_loss is not None and self.config.balance == "aux_loss":
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


__all__ = ["FomoeConfig", "FomoeForCausalLM", "FomoeModel", "FomoePreTrainedModel"]
