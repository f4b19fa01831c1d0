"""What `bench_model.py` times: our model in several builds and Hugging Face's OLMoE, each with its training step.

A step is the whole of it: two copies to the device, forward pass, cross entropy and the router's loss, backward pass,
clipping of the gradient's norm, fused AdamW, dropping gradients. On a GPU matrix products are in bfloat16
by autocast and parameters, gradients and moments in float32, for all but `hf_bf16_*`. On a CPU all is in float32, as in
the quickstart.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
from harness import CLIP_NORM, drawn_on_device
from torch import Tensor, nn

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.inner import RowAdamW
from fomoe_pl.federation.placement import place
from fomoe_pl.model.config import Checkpointing, ModelConfig
from fomoe_pl.model.copies import ExpertCopies
from fomoe_pl.model.passes import TrainingPass, training_pass
from fomoe_pl.model.recorded import RecordedPass
from fomoe_pl.model.residency import Residency, Shadow, ShadowBits
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.optimizer import OptimizerConfig, clip_next_step, inner_optimizer, norm_or_skip

LEARNING_RATE = 1e-6
"""So small that routers stay as they were drawn: steps are timed at one ghost fraction."""
Batch = tuple[Tensor, Tensor]
"""Inputs and targets, int64 (B,S), on the host."""
Run = Callable[[Tensor, Tensor], TrainingPass]


@dataclass(frozen=True)
class Ours:
    """A build of our model.

    Attributes:
        backend: Its `expert_backend`.
        compiled: Whether its blocks are compiled.
        recorded: Whether its forward and backward pass is replayed as a CUDA graph, where there is a GPU.
        bf16_gradients: Whether its experts have bfloat16 gradients, where products are in bfloat16.
        checkpointing: Its `activation_checkpointing`.
        shadow_bits: Of copies that compute the picks of absent experts; None skips these.
    """

    backend: str
    compiled: bool
    recorded: bool = False
    bf16_gradients: bool = False
    checkpointing: Checkpointing = "none"
    shadow_bits: ShadowBits | None = None


@dataclass(frozen=True)
class HuggingFace:
    """A build of Hugging Face's OLMoE.

    Attributes:
        experts: Its `experts_implementation`.
        compiled: `model` compiles it as one, `layers` each layer, None nothing. As one, transformers hands attention
            a mask instead of the word "causal" (before torch 2.14), which shuts out the fastest kernel.
        pure: Parameters, gradients and moments are bfloat16, without autocast.
    """

    experts: str = "grouped_mm"
    compiled: str | None = None
    pure: bool = False


VARIANTS: dict[str, Ours | HuggingFace] = {
    "ours": Ours("triton", compiled=True, recorded=True, bf16_gradients=True),
    "ours_shadow": Ours("triton", compiled=True, recorded=True, bf16_gradients=True, shadow_bits=4),
    "ours_shadow_2": Ours("triton", compiled=True, recorded=True, bf16_gradients=True, shadow_bits=2),
    "ours_float32": Ours("triton", compiled=True, recorded=True),
    "ours_saving": Ours("triton", compiled=True, recorded=True, bf16_gradients=True, checkpointing="experts"),
    "ours_least": Ours("triton", compiled=True, recorded=True, bf16_gradients=True, checkpointing="blocks"),
    "ours_compiled": Ours("triton", compiled=True, bf16_gradients=True),
    "ours_eager": Ours("auto", compiled=False),
    "grouped_recorded": Ours("grouped", compiled=True, recorded=True),
    "grouped_compiled": Ours("grouped", compiled=True),
    "grouped": Ours("grouped", compiled=False),
    "hf_compiled": HuggingFace(compiled="model"),
    "hf_layers_compiled": HuggingFace(compiled="layers"),
    "hf_bf16_compiled": HuggingFace(compiled="layers", pure=True),
    "hf_eager": HuggingFace(),
    "hf_loop": HuggingFace(experts="eager"),
}


class Contestant:
    """A model with its optimizer.

    Args:
        model: On its device.
        optimizer: Of all its parameters.
        run: The forward pass, of inputs and targets (B,S).
        device: Where it trains.
        autocast: Whether matrix products are in bfloat16.
        resident: Experts of each layer that are here.
        recorded: Whether forward and backward pass are replayed as a CUDA graph; of our models on a GPU.
        copies: Of our experts' weights, which get the gradients.
        copying: Whether copies of absent experts compute their picks.
        note: What a reader of its row must know.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, run: Run, device: torch.device, *,
        autocast: bool, resident: int, recorded: bool = False, copies: ExpertCopies | None = None,
        copying: bool = False, note: str = "",
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.device = model, optimizer, device
        self.recorded = RecordedPass(run, model) if recorded and isinstance(model, Transformer) else None
        self.run = self.recorded or run
        self.autocast, self.resident, self.note, self.copies = autocast, resident, note, copies
        self.copying = copying
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.last: TrainingPass | None = None
        # Of all steps: batches differ, by 0.03 where an eighth of the experts is here.
        self._live, self._picks = torch.zeros((), dtype=torch.int64, device=device), 0

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        inputs_BS, targets_BS = (tokens.to(self.device, non_blocking=True) for tokens in batch)
        if self.copies is not None:
            self.copies.refresh()
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext():
            done = self.run(inputs_BS, targets_BS)
        if self.recorded is None or not self.recorded.backward():
            done.total.backward()
        if isinstance(self.model, Transformer):
            clip_next_step(self.optimizer, norm_or_skip(self.optimizer), CLIP_NORM)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last = done._replace(total=done.total.detach())  # what is kept counts as memory of the step
        if len(done.live_L):
            self._live = self._live + done.live_L.sum()
            self._picks += len(done.live_L) * done.picks

    def loss(self) -> float:
        """What the last step minimised, nats a token with the router's losses; waits for the device."""
        assert self.last is not None, "no step has been taken"
        return float(self.last.total)

    def ghost_fraction(self) -> float | None:
        """Share of all steps' picks that were of absent experts, copied or not; None without experts; waits."""
        return 1 - int(self._live) / self._picks if self._picks else None


def without_statistics(loss: Tensor) -> TrainingPass:
    """A pass that has nothing to tell but what is minimised."""
    nothing, zero = loss.detach().new_empty(0), loss.detach().new_zeros(())
    return TrainingPass(loss, loss.detach(), zero, zero, nothing, nothing, None, 0)


class NoExperts(nn.Module):
    """In the place of a mixture of experts: adds nothing to the residual stream, and has no statistics."""

    class Router:
        """What a block asks of its router before it runs."""

        is_random = False

    router = Router()

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, None]:
        """Return zeros (B,S,D), without gradient."""
        return torch.zeros_like(x_BSD), None


def without_experts(model: Transformer) -> None:
    """Take router, experts and their norms out of every block, to see what of a step is theirs."""
    for block in model.layers:
        block.moe = cast(Any, NoExperts())
        block.moe_norm = block.moe_out_norm = cast(Any, nn.Identity())


def residency_of(config: ModelConfig, fraction: Fraction) -> Residency:
    """What site 0 of 1/fraction sites holds when every expert is on one of them.

    Raises:
        ConfigError: If experts cannot be dealt so.
    """
    sites = 1 / fraction
    if sites.denominator != 1 or config.n_experts % sites:
        hint = "give 1, 1/2, 1/4, ... or 0"
        rule = f"must be one over a divisor of the {config.n_experts} experts of a layer"
        raise ConfigError("fractions", str(fraction), rule, hint)
    placement = place("fixed", n_layers=config.n_layers, n_experts=config.n_experts, n_sites=int(sites), overlap=1)
    return Residency("ghost", placement.residents(0))


def build_ours(
    config: ModelConfig, device: torch.device, build: Ours, fraction: Fraction = Fraction(1), *, autocast: bool
) -> Contestant:
    """Our model with a part of its experts; with a fraction of 0 its blocks are attention alone.

    Args:
        config: The architecture.
        device: Where it trains.
        build: The backend, and whether blocks are compiled.
        fraction: Resident experts over all, 1/n or 0.
        autocast: Whether matrix products are in bfloat16.

    Raises:
        ConfigError: For a fraction that cannot be.
    """
    config = replace(config, expert_backend=build.backend, activation_checkpointing=build.checkpointing)
    residency = residency_of(config, fraction or Fraction(1, config.n_experts))
    if build.shadow_bits is not None:
        residency = replace(residency, routing="shadow", shadow=Shadow(build.shadow_bits))
    torch.manual_seed(0)
    with drawn_on_device():
        model = Transformer(config, residency, device=device)
    if not fraction:
        without_experts(model)
    if build.compiled:
        model.compile_blocks()
    optimizer = inner_optimizer(model, OptimizerConfig(lr=LEARNING_RATE, warmup_steps=0))
    copies = None
    if build.bf16_gradients and autocast and fraction:
        assert isinstance(optimizer, RowAdamW)
        copies = ExpertCopies(model, torch.bfloat16)
        optimizer.copies = copies.of

    def without_router(inputs_BS: Tensor, targets_BS: Tensor) -> TrainingPass:
        return without_statistics(model.loss(model(inputs_BS)[0], targets_BS))

    run = partial(training_pass, model) if fraction else without_router
    return Contestant(model, optimizer, run, device, autocast=autocast,
                      resident=len(residency.experts[0]) if fraction else 0,
                      recorded=build.recorded and device.type == "cuda", copies=copies,
                      copying=bool(fraction) and build.shadow_bits is not None)  # fmt: skip


def is_olmoe(config: ModelConfig) -> bool:
    """Whether Hugging Face's OLMoE has this shape."""
    kinds = (config.gate, config.expert, config.norm_placement, config.norm, config.qk_norm, config.balance)
    rest = (config.embedding_norm, config.n_shared_experts, config.head_size * config.n_heads, config.parametrization)
    olmoe = ("softmax", "swiglu", "pre", "rmsnorm", "full", "aux_loss")
    return kinds == olmoe and rest == (False, 0, config.d_model, "standard") and config.rope_theta == 10000.0


def build_huggingface(config: ModelConfig, device: torch.device, build: HuggingFace, *, autocast: bool) -> Contestant:
    """Hugging Face's OLMoE with our architecture's shape; its loss has the load-balance loss, and no z-loss.

    Args:
        config: The architecture; `is_olmoe`.
        device: Where it trains.
        build: Implementation of the experts, and what is compiled.
        autocast: Whether matrix products are in bfloat16.
    """
    transformers = import_module("transformers")
    theirs = transformers.OlmoeConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_expert,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.kv_heads,
        num_experts=config.n_experts, num_experts_per_tok=config.top_k, norm_topk_prob=config.normalize_gates,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings, pad_token_id=None, eos_token_id=None,
        router_aux_loss_coef=config.aux_loss_weight, output_router_logits=True, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    experts, note = _experts_implementation(build.experts, autocast=autocast and not build.pure)
    if experts is not None:
        theirs._experts_implementation = experts
    torch.manual_seed(0)
    with device:
        model = transformers.OlmoeForCausalLM(theirs).train()
    if build.pure:
        model.to(torch.bfloat16)
        note = "; ".join(filter(None, (note, "all in bfloat16, moments too")))
    run = torch.compile(model) if build.compiled == "model" else model
    if build.compiled == "layers":
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda" or None
    )

    def forward(inputs_BS: Tensor, targets_BS: Tensor) -> TrainingPass:
        # `shift_labels` are not shifted again. `labels` only says that there are any.
        return without_statistics(run(input_ids=inputs_BS, labels=targets_BS, shift_labels=targets_BS).loss)

    return Contestant(model, optimizer, forward, device, autocast=autocast and not build.pure,
                      resident=config.n_experts, note=note)  # fmt: skip


def _experts_implementation(name: str, *, autocast: bool) -> tuple[str | None, str]:
    """The name to give to transformers, and a note for the row.

    Autocast does not know `grouped_mm`: on float32 parameters it would run in float32, and compiled as a loop that
    waits for the device. Under the name returned here it gets its weights in bfloat16, as autocast would give them.
    """
    try:
        moe = import_module("transformers.integrations.moe")
        grouped, known = moe.grouped_mm_experts_forward, moe.ALL_EXPERTS_FUNCTIONS
    except (ImportError, AttributeError):
        return None, "this version of transformers has no choice of experts"
    if name != "grouped_mm" or not autocast:
        return name, f"experts {name}"

    def forward(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
        return grouped(_InBfloat16(self), hidden.to(torch.bfloat16), index, weights)

    known.register("grouped_mm_autocast", forward)
    return "grouped_mm_autocast", "experts grouped_mm with bfloat16 copies of the weights"


class _InBfloat16:
    """Hugging Face's experts with their weights in bfloat16; all else is theirs."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.gate_up_proj = experts.gate_up_proj.to(torch.bfloat16)
        self.down_proj = experts.down_proj.to(torch.bfloat16)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


def build(
    variant: str, config: ModelConfig, device: torch.device, fraction: Fraction = Fraction(1), *, autocast: bool
) -> Contestant:
    """A contestant by its name in `VARIANTS`; the other arguments as in `build_ours`."""
    found = VARIANTS[variant]
    if isinstance(found, HuggingFace):
        return build_huggingface(config, device, found, autocast=autocast)
    return build_ours(config, device, found, fraction, autocast=autocast)
