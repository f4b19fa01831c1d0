"""The architecture as one frozen dataclass. Everything else in `model/` and `costs/` is a function of it."""

from dataclasses import dataclass, fields
from typing import Literal, get_origin

from fomoe_pl.errors import ConfigError, check_choice, check_range
from fomoe_pl.model.backends import AUTO, backend_of

Gate = Literal["sigmoid", "softmax"]
ExpertKind = Literal["silu", "swiglu"]
NormPlacement = Literal["peri", "pre"]
NormKind = Literal["layernorm", "rmsnorm"]
QKNorm = Literal["none", "full", "head"]
Parametrization = Literal["completep", "standard"]
Balance = Literal["none", "aux_loss", "bias"]
Checkpointing = Literal["none", "experts", "blocks"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder-only mixture-of-experts transformer; the defaults are FoMoE's (arXiv 2606.19025, §3).

    Attributes:
        vocab_size: Number of tokens V. At least the vocabulary of the data; more is never used (a padded vocabulary).
        d_model: Width D of the residual stream.
        n_layers: Number of blocks, each of one attention and one mixture of experts.
        n_heads: Number of query heads.
        n_experts: Routed experts E of each layer.
        top_k: Experts K chosen for each token.
        d_expert: Width F of one expert.
        n_kv_heads: Key and value heads (grouped-query attention); None is `n_heads`.
        head_dim: Size of one head; None is `d_model // n_heads`.
        n_shared_experts: Experts of width `d_expert` that see every token and are never routed.
        gate: `sigmoid` gates are independent of each other (σ-MoE, FoMoE §3); `softmax` is over all scored experts.
        normalize_gates: Divide a token's gates by their sum over the chosen experts, ghosts included.
        expert: `silu` is W_out·silu(W_in·x) (FoMoE); `swiglu` is W_out·(silu(W_gate·x) * W_up·x).
        norm_placement: `peri` is x + norm(F(norm(x))) (FoMoE); `pre` is x + F(norm(x)).
        norm: Kind of every norm; with a weight and no bias.
        norm_eps: Added to the variance inside every norm.
        embedding_norm: Normalise the embeddings before the first block (FoMoE §3).
        qk_norm: `full` normalises all of q and of k before the head split (OLMoE), `head` each head (Qwen3).
        rope_theta: Base of the rotary position embedding.
        tie_embeddings: Use the input embedding as the output matrix.
        parametrization: `completep` transfers learning rates over width and depth (arXiv 2505.01618, alpha = 1).
        base_width: Width at which CompleteP's multipliers are 1.
        base_depth: Depth at which CompleteP's multipliers are 1.
        init_std: Standard deviation of the initial weights (hidden matrices: of those with fan-in `base_width`).
        balance: `aux_loss` adds a load-balance loss; `bias` moves a per-expert bias (arXiv 2408.15664).
        aux_loss_weight: Weight of the load-balance loss; used with `balance: aux_loss`.
        z_loss_weight: Weight of the router z-loss (ST-MoE, arXiv 2202.08906); 0 is off.
        bias_update_rate: Step of the balance bias per optimizer step; used with `balance: bias`.
        expert_backend: `triton` is our kernels, `grouped` torch's grouped GEMM, `loop` the reference; `auto` is
            the first of them that works; or the `class_path` of your own `fomoe_pl.model.backends.Backend`.
        activation_checkpointing: What is computed again in the backward pass instead of kept: `experts` is what the
            experts keep, a large part of all for about a tenth more time; `blocks` is all, for about a third more.
        loss_chunk_bytes: Upper bound, in bytes, of one chunk of logits in the loss; they are float32, and of the
            precision's type where our kernels run.

    Raises:
        ConfigError: If a number is out of its range, sizes do not fit each other, or a choice is none of a setting's.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_experts: int
    top_k: int
    d_expert: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    n_shared_experts: int = 0
    gate: Gate = "sigmoid"
    normalize_gates: bool = False
    expert: ExpertKind = "silu"
    norm_placement: NormPlacement = "peri"
    norm: NormKind = "layernorm"
    norm_eps: float = 1e-5
    embedding_norm: bool = True
    qk_norm: QKNorm = "none"
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    parametrization: Parametrization = "completep"
    base_width: int = 256
    base_depth: int = 4
    init_std: float = 0.02
    balance: Balance = "aux_loss"
    aux_loss_weight: float = 0.01
    z_loss_weight: float = 0.0
    bias_update_rate: float = 1e-3
    expert_backend: str = AUTO
    activation_checkpointing: Checkpointing = "none"
    loss_chunk_bytes: int = 512 * 2**20

    def __post_init__(self) -> None:
        for field in fields(self):
            if get_origin(field.type) is Literal:
                check_choice(field.name, getattr(self, field.name), field.type)
        if self.expert_backend != AUTO:
            backend_of(self.expert_backend)
        positive = """vocab_size d_model n_layers n_heads n_experts top_k d_expert n_kv_heads head_dim norm_eps
            rope_theta base_width base_depth init_std loss_chunk_bytes"""
        for name in positive.split():
            check_range(name, getattr(self, name), "Give a positive number", above=0)
        for name in ("n_shared_experts", "aux_loss_weight", "z_loss_weight", "bias_update_rate"):
            check_range(name, getattr(self, name), "Give 0 or more", least=0)
        if self.top_k > self.n_experts:
            rule = f"cannot choose more experts than n_experts ({self.n_experts})"
            raise ConfigError("top_k", self.top_k, rule, f"Use 1 to {self.n_experts}")
        if self.head_dim is None and self.d_model % self.n_heads:
            rule = f"must be divisible by n_heads ({self.n_heads}) when head_dim is not given"
            raise ConfigError("d_model", self.d_model, rule, "Change n_heads, or give head_dim")
        if self.n_heads % self.kv_heads:
            rule = f"must divide n_heads ({self.n_heads})"
            raise ConfigError("n_kv_heads", self.kv_heads, rule, f"Use a divisor of {self.n_heads}")
        if self.head_size % 2:
            rule = "must be even: the rotary embedding turns pairs of channels"
            raise ConfigError("head_dim", self.head_size, rule, "Change head_dim, or d_model and n_heads")

    @property
    def kv_heads(self) -> int:
        """Key and value heads, `n_heads` if not given."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        """Channels of one head, `d_model // n_heads` if not given."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def expert_in_width(self) -> int:
        """Columns of an expert's input matrix: F, or 2F where gate and up projection lie side by side."""
        return 2 * self.d_expert if self.expert == "swiglu" else self.d_expert
