"""The decoder-only mixture-of-experts transformer of one device.

Shapes: B batch, S sequence, D model, V vocabulary, E experts of a layer, R resident experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fomoe_pl.model import losses
from fomoe_pl.model.attention import Attention
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.init import initialize
from fomoe_pl.model.moe import MoELayer
from fomoe_pl.model.parametrization import branch_multiplier, logits_multiplier
from fomoe_pl.model.parts import Linear, Norm
from fomoe_pl.model.residency import Residency, Routing, Shadow
from fomoe_pl.model.router import RoutingStats


class Block(nn.Module):
    """Attention and mixture of experts, each x + m·norm(F(norm(x))) (`peri`) or x + m·F(norm(x)) (`pre`).

    The multiplier m is CompleteP's for depth, or 1.

    Args:
        config: The architecture.
        routing: How picks of absent experts are treated.
        resident: Sorted ids of this layer's resident experts.
        shadow: How copies are kept; used with `shadow` routing.
        device: Where the weights live; None is torch's default.
        dtype: Type of the weights; None is torch's default.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: Routing,
        resident: tuple[int, ...],
        shadow: Shadow,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.multiplier = branch_multiplier(config)
        self.checkpointing = config.activation_checkpointing == "blocks"
        self.compiled: Callable[..., tuple[Tensor, RoutingStats]] | None = None
        self.attention_norm = Norm(config.d_model, config, device=device, dtype=dtype)
        self.attention = Attention(config, device=device, dtype=dtype)
        self.moe_norm = Norm(config.d_model, config, device=device, dtype=dtype)
        self.moe = MoELayer(config, routing, resident, shadow, device=device, dtype=dtype)
        peri = config.norm_placement == "peri"
        self.attention_out_norm = Norm(config.d_model, config, device=device, dtype=dtype) if peri else nn.Identity()
        self.moe_out_norm = Norm(config.d_model, config, device=device, dtype=dtype) if peri else nn.Identity()

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RoutingStats]:
        """Return the residual stream (B,S,D) after this block, and what its router did."""
        tables = self.attention.rotary(x_BSD.shape[1], x_BSD.device)
        # Routing at random draws from a generator, which compiled code cannot.
        run = self.plain if self.compiled is None or self.moe.router.is_random else self.compiled
        if self.checkpointing and torch.is_grad_enabled():
            # Nothing that is done again draws random numbers.
            return checkpoint(run, x_BSD, *tables, use_reentrant=False, preserve_rng_state=False)
        return run(x_BSD, *tables)

    def plain(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> tuple[Tensor, RoutingStats]:
        """What `forward` does, of tensors alone: this is what is compiled."""
        attended_BSD = self.attention_out_norm(self.attention(self.attention_norm(x_BSD), cos_SC, sin_SC))
        x_BSD = x_BSD + self.multiplier * attended_BSD
        y_BSD, stats = self.moe(self.moe_norm(x_BSD))
        return x_BSD + self.multiplier * self.moe_out_norm(y_BSD), stats


class Transformer(nn.Module):
    """FoMoE's architecture (arXiv 2606.19025, §3), and by its options OLMoE's and Qwen3-MoE's.

    Args:
        config: The architecture.
        residency: Which experts are here; None is all of them.
        seed: Seed of the initial values; see `model/init.py`. On the meta device nothing is drawn.
        device: Where the model lives; None is torch's default.
        dtype: Type of the weights; None is torch's default.
    """

    def __init__(
        self,
        config: ModelConfig,
        residency: Residency | None = None,
        *,
        seed: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.residency = Residency.full(config) if residency is None else residency
        self.embedding = Linear(config.d_model, config.vocab_size, device=device, dtype=dtype)
        self.embedding_norm = (
            Norm(config.d_model, config, device=device, dtype=dtype) if config.embedding_norm else nn.Identity()
        )
        # Typed by what it holds: a ModuleList does not tell.
        self.layers: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(config, self.residency.routing, resident, self.residency.shadow, device=device, dtype=dtype)
            for resident in self.residency.experts
        )
        self.final_norm = Norm(config.d_model, config, device=device, dtype=dtype)
        if not config.tie_embeddings:
            self.output = Linear(config.d_model, config.vocab_size, device=device, dtype=dtype)
        if not self.embedding.weight.is_meta:
            initialize(self, seed)

    @property
    def output_weight(self) -> nn.Parameter:
        """The output matrix (V,D): the embedding if tied."""
        return self.embedding.weight if self.config.tie_embeddings else self.output.weight

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Turn token ids, int64 (B,S), into the residual stream (B,S,D) before the first block."""
        return self.embedding_norm(F.embedding(tokens_BS, self.embedding.weight))

    def finish(self, x_BSD: Tensor) -> Tensor:
        """Normalise the residual stream (B,S,D) after the last block, and multiply by the factor on the logits."""
        return self.final_norm(x_BSD) * logits_multiplier(self.config)

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, list[RoutingStats]]:
        """Run all blocks.

        Args:
            tokens_BS: Token ids, int64 (B,S).

        Returns:
            The hidden states (B,S,D) whose products with `output_weight` are the logits, and each layer's statistics.
        """
        x_BSD = self.embed(tokens_BS)
        stats = []
        for block in self.layers:
            x_BSD, layer_stats = block(x_BSD)
            stats.append(layer_stats)
        return self.finish(x_BSD), stats

    def logits(self, hidden: Tensor) -> Tensor:
        """Return all logits, (...,D) to (...,V); for small inputs, the losses below do without them."""
        return F.linear(hidden, self.output_weight)

    def loss(self, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Return the mean cross entropy in nats over targets that are not -100; differentiable, in chunks.

        Args:
            hidden_BSD: From `forward`.
            targets_BS: Next tokens, int64 (B,S).
        """
        return losses.linear_cross_entropy(
            hidden_BSD.flatten(0, 1), self.output_weight, targets_BS.flatten(), self.config.loss_chunk_bytes
        )

    def token_losses(self, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Return each token's cross entropy in nats, float32 (B,S), 0 where the target is -100; no gradient.

        Args:
            hidden_BSD: From `forward`.
            targets_BS: Next tokens, int64 (B,S).
        """
        return losses.token_losses(
            hidden_BSD.flatten(0, 1), self.output_weight, targets_BS.flatten(), self.config.loss_chunk_bytes
        ).view(targets_BS.shape)

    def compile_blocks(self) -> None:
        """Run the blocks as compiled code from now on.

        Each layer is one graph of torch.compile's around our kernels (`backends/kernels.py`). Layers have equal shapes,
        so the first one's code serves the others, whichever experts are resident: residency is in tensors. Validation
        and another number of resident experts compile again; a second batch size compiles for all batch sizes.
        """
        for block in self.layers:
            block.compiled = torch.compile(block.plain)

    def expert_tensors(self) -> dict[str, int]:
        """Return the layer of every tensor whose row r (axis 0) belongs to expert `residency.experts[layer][r]`.

        Names are those of `named_parameters()` and `named_buffers()`. In partitioned mode the router's tensors are
        among them; otherwise they are dense.
        """
        parts = ["experts.w_in", "experts.w_out"]
        if self.residency.routing == "partitioned":
            parts.append("router.weight")
            if self.config.balance == "bias":
                parts.append("router.balance_bias")
        return {f"layers.{layer}.moe.{part}": layer for layer in range(self.config.n_layers) for part in parts}

    def shadow_tensors(self) -> dict[str, int]:
        """Return the layer of every tensor of copies; row a (axis 0) belongs to `residency.absent(layer, config)[a]`.

        Names are those of `named_buffers()`: `layers.0.moe.shadow.w_in`. A row is what `residency.shadow.codec`
        makes of the expert's row of `layers.0.moe.experts.w_in`, flattened. There are none where all are resident.
        """
        return {
            f"layers.{layer}.moe.shadow.{name}": layer
            for layer, block in enumerate(self.layers)
            if block.moe.shadow is not None
            for name in ("w_in", "w_out")
        }

    @contextmanager
    def refreshing(self) -> Iterator[dict[str, Tensor]]:
        """Let new copies be written, and take them when the block ends without an exception: all of them or none.

        Yields:
            By the names of `shadow_tensors` the copies as they are, on their device, to be written over in part or as a
            whole. This is memory of its own, as much as all copies take, and free again afterwards.
        """
        buffers = dict(self.named_buffers())
        staged = {name: buffers[name].clone() for name in self.shadow_tensors()}
        yield staged
        for name, tensor in staged.items():
            buffers[name].copy_(tensor)  # in place: recorded passes read these addresses

    def set_residency(self, residency: Residency) -> None:
        """Change which experts the rows stand for. The caller moves the rows; their numbers must not change.

        Copies of experts that stay absent are kept; those of experts that were resident have to be written
        (`refreshing`), until which they decode to NaN.

        Args:
            residency: Of the same routing mode, with as many residents in each layer as before.
        """
        for block, resident in zip(self.layers, residency.experts, strict=True):
            block.moe.set_resident(resident)
        self.residency = residency

    def update_balance_bias(self, loads: list[Tensor]) -> None:
        """Move the balance biases by one step; once an optimizer step, with `balance: bias` alone.

        Args:
            loads: Picks (E,) of each layer since the last update.
        """
        for block, load_E in zip(self.layers, loads, strict=True):
            block.moe.router.update_balance_bias(load_E, self.config.bias_update_rate)
