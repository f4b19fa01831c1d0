"""Parameter counts and FLOPs from the configuration alone: pure functions, no torch, nothing is built."""

from dataclasses import dataclass, fields

from fomoe_pl.model.config import Checkpointing, ModelConfig
from fomoe_pl.model.residency import Routing


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model by what they are.

    Attributes:
        embeddings: Input embedding, and the output matrix if it is not tied.
        attention: Query, key, value and output projections, all layers.
        norms: All norms.
        router: Router rows, all layers.
        shared: Shared experts, all layers.
        experts: Routed experts, all layers.
    """

    embeddings: int
    attention: int
    norms: int
    router: int
    shared: int
    experts: int

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return sum(getattr(self, field.name) for field in fields(self))


def expert_parameters(config: ModelConfig) -> int:
    """Return the parameters of one routed expert of one layer, without its router row."""
    return config.d_model * (config.expert_in_width + config.d_expert)


def attention_parameters(config: ModelConfig) -> int:
    """Return the parameters of one layer's four projections."""
    return 2 * config.d_model * config.head_size * (config.n_heads + config.kv_heads)


def norm_parameters(config: ModelConfig) -> int:
    """Return the parameters of all norms."""
    per_layer = config.d_model * (4 if config.norm_placement == "peri" else 2)
    if config.qk_norm == "full":
        per_layer += config.head_size * (config.n_heads + config.kv_heads)
    elif config.qk_norm == "head":
        per_layer += 2 * config.head_size
    return config.n_layers * per_layer + config.d_model * (2 if config.embedding_norm else 1)


def scored_experts(config: ModelConfig, n_resident: int, routing: Routing) -> int:
    """Return how many experts of a layer the router scores: the residents in partitioned mode, else all."""
    return n_resident if routing == "partitioned" else config.n_experts


def resident_counts(config: ModelConfig, n_resident: int, routing: Routing) -> ParameterCounts:
    """Return what a site holds that has `n_resident` experts of every layer.

    Args:
        config: The architecture.
        n_resident: Resident experts R of each layer.
        routing: In partitioned mode the router has R rows, otherwise it is whole.
    """
    rows = scored_experts(config, n_resident, routing)
    return ParameterCounts(
        embeddings=config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2),
        attention=config.n_layers * attention_parameters(config),
        norms=norm_parameters(config),
        router=config.n_layers * rows * config.d_model,
        shared=config.n_layers * config.n_shared_experts * expert_parameters(config),
        experts=config.n_layers * n_resident * expert_parameters(config),
    )


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Return the counts of the whole model."""
    return resident_counts(config, config.n_experts, "ghost")


def sparse_parameters(config: ModelConfig, routing: Routing) -> int:
    """Return the parameters that only an expert's holders have: experts, and in partitioned mode router rows."""
    counts = parameter_counts(config)
    return counts.experts + (counts.router if routing == "partitioned" else 0)


def dense_parameters(config: ModelConfig, routing: Routing) -> int:
    """Return the parameters that every site has."""
    return parameter_counts(config).total - sparse_parameters(config, routing)


def active_parameters(config: ModelConfig) -> int:
    """Return the parameters that one token meets in the whole model: everything but the experts not chosen."""
    return resident_counts(config, config.top_k, "ghost").total


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token's forward pass, 2 for each multiply-add; the backward pass is twice as much, less `spared`.

    Attributes:
        projections: Query, key, value and output of all layers.
        scores: Products of queries with keys and of weights with values, over the whole square of positions.
        router: Scoring of experts.
        experts: Routed and shared experts.
        output: The output matrix.
        spared: Of the backward pass: gradients that frozen copies do not have.
    """

    projections: float
    scores: float
    router: float
    experts: float
    output: float
    spared: float = 0.0

    @property
    def forward(self) -> float:
        """Sum of the forward pass's parts."""
        return self.projections + self.scores + self.router + self.experts + self.output

    @property
    def training(self) -> float:
        """Forward and backward pass, without recomputation."""
        return 3 * self.forward - self.spared

    def training_executed(self, *, checkpointing: Checkpointing) -> float:
        """Forward and backward pass, with the second forward pass of what is checkpointed.

        Of experts our kernels leave out that pass's second product; it is counted here.
        """
        again = {"none": 0.0, "experts": self.experts, "blocks": self.forward - self.output}
        return self.training + again[checkpointing]


def flops_by_part(
    config: ModelConfig,
    sequence_length: int,
    *,
    executed_picks: float | None = None,
    n_scored: int | None = None,
    copied_picks: float = 0.0,
    input_gradient: bool = True,
) -> TokenFlops:
    """Return the FLOPs of one token's forward pass: 2 for each multiply-add of every matrix product.

    Attention counts the whole square of positions, as PaLM does (arXiv 2204.02311, appendix B), although half of it is
    masked. Norms, activations, softmax and rotations are left out; the output matrix counts, the embedding lookup does
    not.

    Args:
        config: The architecture.
        sequence_length: Positions S of a sequence.
        executed_picks: Mean number of routed experts that run for a token and layer; None is top_k (nominal). With
            ghosts it is FoMoE's sigma_st · top_k (§3.3).
        n_scored: Experts that the router scores; None is all.
        copied_picks: How many of the executed picks frozen copies compute, whose weights get no gradients.
        input_gradient: Whether tokens get gradients through copies.
    """
    spared = expert_parameters(config) + (0 if input_gradient else config.d_model * config.expert_in_width)
    picks = config.top_k if executed_picks is None else executed_picks
    scored = config.n_experts if n_scored is None else n_scored
    layers = config.n_layers
    return TokenFlops(
        projections=2 * layers * attention_parameters(config),
        scores=2 * layers * 2 * sequence_length * config.n_heads * config.head_size,
        router=2 * layers * scored * config.d_model,
        experts=2 * layers * (config.n_shared_experts + picks) * expert_parameters(config),
        output=2 * config.vocab_size * config.d_model,
        spared=2 * layers * copied_picks * spared,
    )
