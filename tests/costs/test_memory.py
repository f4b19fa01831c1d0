"""Memory by part: against what a model built here holds and keeps, and against the round's own buffers."""

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fomoe_pl.codec import Root
from fomoe_pl.costs.activations import Types, activation_bytes, chunk_bytes, loss_bytes
from fomoe_pl.costs.memory import Load, rank_memory
from fomoe_pl.costs.rounds import checkpoint_bytes
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.flight import Bucket, Flight
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.left_out import LeftOut
from fomoe_pl.federation.settings import FORMATS
from fomoe_pl.federation.state import State
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport
from fomoe_pl.model.attention import rotary_tables
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.losses import auxiliary_loss, token_losses
from fomoe_pl.model.residency import Residency, Shadow
from fomoe_pl.model.sizes import parameter_counts, resident_counts
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.optimizer import OptimizerConfig, inner_optimizer

B, S = 2, 80
SMALL = ModelConfig(
    vocab_size=1024, d_model=96, n_layers=3, n_heads=4, n_experts=8, top_k=2, d_expert=32, expert_backend="grouped"
)
VARIANTS = {
    "paper": SMALL,
    "swiglu": replace(SMALL, expert="swiglu", norm_placement="pre", gate="softmax", normalize_gates=True),
    "shared": replace(SMALL, n_shared_experts=2, n_kv_heads=2),
    "checkpointed": replace(SMALL, activation_checkpointing="blocks"),
}


def kept_bytes(config: ModelConfig, precision: str) -> int:
    """Bytes of the distinct storages that the forward pass keeps for the backward pass, parameters left out."""
    model = Transformer(config)
    if precision == "bf16-true":
        model.to(torch.bfloat16)
    tokens = torch.randint(config.vocab_size, (B, S + 1))
    tables = rotary_tables(S, config.head_size, config.rope_theta, torch.device("cpu"))
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *tables]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor  # held, so that no other storage takes its place
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        hidden, stats = model(tokens[:, :-1])
        loss = model.loss(hidden, tokens[:, 1:]) + auxiliary_loss(stats, config, model.residency).total
    assert loss.isfinite()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("variant", ["paper", "swiglu", "shared"])
def test_activations_are_those_that_autograd_keeps(variant: str, precision: Any) -> None:
    config, types = VARIANTS[variant], Types.of(precision, kernels=False)
    # The loss keeps both of its gradients; they are the loss's part.
    of_loss = 4 * config.vocab_size * config.d_model + B * S * config.d_model * types.stream
    predicted = activation_bytes(config, types, B * S, 8, 8) + of_loss
    assert predicted == pytest.approx(kept_bytes(config, precision), rel=0.007)


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all storages that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, torch.Tensor) and (key := leaf.untyped_storage()._cdata) not in self._known:
                self._known.add(key)
                self.live += leaf.untyped_storage().nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(leaf.untyped_storage(), self._died, key, leaf.untyped_storage().nbytes())
        return out

    def _died(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def step_peaks(
    config: ModelConfig, precision: str, batch: int, length: int, residency: Residency | None = None
) -> tuple[int, int]:
    """Most live bytes up to the end of the forward pass, and of the backward pass, in a third training step."""
    forward = backward = 0
    with LiveBytes() as bytes_:
        model = Transformer(config, residency)
        for name, packed in model.named_buffers():
            if name in model.shadow_tensors():
                packed.zero_()
        optimizer = inner_optimizer(model, OptimizerConfig())
        for _ in range(3):
            tokens = torch.randint(config.vocab_size, (batch, length + 1))
            bytes_.peak = bytes_.live
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
                hidden, stats = model(tokens[:, :-1])
                loss = model.loss(hidden, tokens[:, 1:]) + auxiliary_loss(stats, config, model.residency).total
            forward, bytes_.peak = bytes_.peak, 0
            loss.backward()
            backward = bytes_.peak
            del hidden, stats, loss
            optimizer.step()
            optimizer.zero_grad()  # as strategies do
    return forward, backward


def test_a_validation_has_one_chunk_of_logits_at_a_time() -> None:
    vocab, width, rows = 4096, 8, 128
    weight = torch.randn(vocab, width)

    def peak(chunks: int) -> int:
        hidden, targets = torch.randn(chunks * rows, width), torch.randint(vocab, (chunks * rows,))
        with LiveBytes() as bytes_:
            token_losses(hidden, weight, targets, 4 * vocab * rows)
        return bytes_.peak

    assert peak(1) > 2 * 4 * vocab * rows  # logits and their logarithms
    assert peak(4) < peak(1) * 1.1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("changes", "batch"),
    [
        ({"vocab_size": 5003}, 4),  # the loss makes the peak
        ({"vocab_size": 5003, "activation_checkpointing": "blocks"}, 4),
        # The backward pass, in float32.
        ({"vocab_size": 5003, "activation_checkpointing": "blocks", "n_layers": 12}, 16),
        ({"vocab_size": 256, "n_layers": 8}, 8),  # activations
        ({"vocab_size": 256, "n_layers": 8, "activation_checkpointing": "experts"}, 8),
    ],
)
def test_the_peak_of_a_step_is_what_lives_in_it(changes: dict[str, Any], batch: int, precision: Any) -> None:
    sizes = {"d_model": 64, "n_layers": 3, "n_heads": 2, "n_experts": 4, "d_expert": 32} | changes
    width = -(-sizes["vocab_size"] // 8) * 8
    config = replace(SMALL, loss_chunk_bytes=4 * width * 64, **sizes)
    load = Load(precision=precision, batch_size=batch, sequence_length=128, method="single", kernels=False)
    memory = rank_memory(config, load, n_resident=4)
    measured = max(step_peaks(config, precision, batch, 128))
    assert memory.peak - memory.library == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("resident", "shadow"), [(2, Shadow(4)), (4, Shadow(2)), (4, Shadow(8, input_gradient=False)), (8, Shadow(4))]
)
def test_the_peak_of_a_step_with_copies_is_what_lives_in_it(resident: int, shadow: Shadow, precision: Any) -> None:
    """Experts are most of this model, so that copies and the layer that is unpacked count."""
    config = replace(SMALL, vocab_size=256, d_model=64, n_layers=4, n_heads=2, d_expert=512)
    residency = Residency("shadow", (tuple(range(resident)),) * config.n_layers, shadow)
    load = Load(precision=precision, batch_size=4, sequence_length=128, method="single", kernels=False)
    memory = rank_memory(config, load, n_resident=resident, routing="shadow", shadow=shadow)
    measured = max(step_peaks(config, precision, 4, 128, residency))
    assert memory.peak - memory.library == pytest.approx(measured, rel=0.05)
    model = Transformer(config, residency)
    assert memory.copies == sum(t.nbytes for name, t in model.named_buffers() if name in model.shadow_tensors())
    if resident == config.n_experts:
        assert memory == rank_memory(config, load, n_resident=resident)


def test_a_refresh_has_new_copies_beside_the_old_ones() -> None:
    """Against the bytes that encoding a tensor of residents takes, and those of all copies."""
    shadow, resident = Shadow(4), 4
    memory = rank_memory(SMALL, Load(), n_resident=resident, routing="shadow", shadow=shadow)
    values = torch.randn(resident, SMALL.d_model * SMALL.expert_in_width)
    with LiveBytes() as bytes_:
        packed = shadow.codec.encode(values)
    layer = (memory.copies // SMALL.n_layers) * SMALL.n_experts // (SMALL.n_experts - resident)
    # The values are among what lives: to encode them is to read them.
    assert memory.refresh - memory.copies - layer == pytest.approx(bytes_.peak - packed.nbytes, rel=0.02)
    assert packed.nbytes * 2 == layer // 2
    assert memory.moments_of_peak["refresh of the copies"] == memory.lasting + memory.refresh
    ghost = rank_memory(SMALL, Load(), n_resident=resident)
    assert (ghost.copies, ghost.refresh) == (0, 0)
    assert memory.lasting - ghost.lasting == memory.copies


def test_in_our_kernels_one_matrix_of_each_copy_is_unpacked_at_a_time() -> None:
    config = replace(SMALL, expert_backend="triton", expert="swiglu")

    def backward(routing: Any, *, input_gradient: bool = True) -> int:
        shadow = Shadow(4, input_gradient)
        return rank_memory(config, Load(), n_resident=6, routing=routing, shadow=shadow).backward

    matrix = 2 * 2 * config.d_model * config.d_expert  # of two absent experts, bfloat16
    assert backward("shadow") - backward("ghost") == 2 * matrix  # gate and up
    assert backward("shadow", input_gradient=False) - backward("ghost") == matrix


def test_checkpointing_keeps_the_inputs_of_blocks_alone() -> None:
    kept = kept_bytes(VARIANTS["checkpointed"], "32-true")
    types = Types.of("32-true", kernels=False)
    of_loss = 4 * 1024 * 96 + B * S * 96 * 4
    predicted = activation_bytes(VARIANTS["checkpointed"], types, B * S, 8, 8) + of_loss
    assert predicted == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("routing", ["ghost", "partitioned"])
def test_lasting_parts_are_bytes_of_the_built_model(routing: Any) -> None:
    ids = (0, 3, 5)
    model = Transformer(SMALL, Residency(routing, (ids,) * SMALL.n_layers))
    parameters = sum(p.numel() for p in model.parameters())
    memory = rank_memory(SMALL, Load(outer_momentum=True), n_resident=len(ids), routing=routing)
    assert memory.weights == memory.gradients == memory.anchors == memory.outer_momentum == 4 * parameters
    assert memory.moments == 8 * parameters
    half = rank_memory(SMALL, Load(precision="bf16-true"), n_resident=len(ids), routing=routing)
    assert (half.weights, half.moments, half.anchors) == (2 * parameters, 4 * parameters, 4 * parameters)
    ddp = rank_memory(SMALL, Load(method="ddp"), n_resident=8)
    assert ddp.gradients == 3 * ddp.weights
    alone = rank_memory(SMALL, Load(method="single"), n_resident=len(ids), routing=routing)
    assert alone.anchors == alone.outer_momentum == alone.wire == 0


@pytest.mark.parametrize("checkpointing", ["none", "experts", "blocks"])
def test_bfloat16_gradients_of_experts_and_their_copies(checkpointing: Any) -> None:
    config = replace(SMALL, expert_backend="triton", activation_checkpointing=checkpointing)
    load = Load(batch_size=4, sequence_length=128)
    plain, small = (rank_memory(config, replace(load, bf16_gradients=on), n_resident=4) for on in (False, True))
    experts = resident_counts(config, 4, "ghost").experts
    copies = 2 * experts if checkpointing == "none" else 0
    assert small.weights == plain.weights + copies
    assert small.activations == plain.activations - copies  # else each pass casts the weights, and keeps that
    assert small.gradients == plain.gradients - 2 * experts
    assert small.backward + small.weights <= plain.backward + plain.weights
    for unlike in (replace(load, precision="32-true"), replace(load, kernels=False)):
        other = replace(unlike, bf16_gradients=True)
        assert rank_memory(config, other, n_resident=4) == rank_memory(config, unlike, n_resident=4)


@pytest.mark.parametrize("momentum", [False, True])
def test_outer_state_on_the_host_comes_bucket_by_bucket(momentum: bool) -> None:
    load = Load(outer_momentum=momentum, bucket_bytes=4 * 1000)
    device, host = (rank_memory(SMALL, replace(load, state_on_host=on), n_resident=4) for on in (False, True))
    assert device.anchors == 4 * resident_counts(SMALL, 4, "ghost").total
    assert host.anchors == host.outer_momentum == 0
    assert SMALL.d_model * SMALL.d_expert > 1000  # so an expert's weight is a bucket
    assert host.wire - device.wire == 4 * 3 * SMALL.d_model * SMALL.d_expert * (2 if momentum else 1)
    assert device.lasting - host.lasting == device.anchors + device.outer_momentum


@pytest.fixture(params=[2, 3])
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    """Of several sites in one process: nothing travels."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield Transport(Topology(request.param, 1, 0), [], Ledger(), device=torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("codec", "feedback"), [("int4", True), ("int4", False), ("int8", True), ("int8", False), ("moments", False)]
)
def test_what_averages_of_codes_hold_is_what_lives_in_them(transport: Transport, codec: str, feedback: bool) -> None:
    """Between a device that has no codes in flight, and one that has, with what collectives hold themselves."""
    numel, sites = 2 * SMALL.d_model * SMALL.expert_in_width, transport.everyone
    coding = Root(FORMATS["int8"]) if codec == "moments" else FORMATS[codec]
    with LiveBytes() as bytes_:
        values, kept, lost = (torch.ones(4, numel) for _ in range(3))

        def bucket(i: int) -> Bucket:
            def read() -> list[torch.Tensor]:
                return [values[i] if codec == "moments" else values[i] - kept[i]]

            def write(into: torch.Tensor, mean: torch.Tensor) -> None:
                into[i].copy_(mean)

            losing = partial(write, lost) if feedback else None
            return Bucket("dense", sites, numel, read, partial(write, kept), coding, losing)

        before = bytes_.peak = bytes_.live
        Flight([bucket(i) for i in range(4)], transport, LeftOut(), ahead=1).drain()
        measured = bytes_.peak - before
    formats: Any = {"moments_codec": "int8"} if codec == "moments" else {"wire_codec": codec}
    load = Load(bucket_bytes=4 * numel, error_feedback=feedback, holders=(len(sites),), **formats)
    host, device = (
        rank_memory(SMALL, replace(load, wire_on_device=on), n_resident=8).wire for on in (False, True)
    )  # fmt: skip
    assert host <= measured <= device < 1.2 * measured


@pytest.mark.parametrize("routing", ["ghost", "partitioned"])
def test_what_coding_has_lost_is_kept_for_each_trained_matrix(routing: Any) -> None:
    ids = (0, 3, 5, 6)
    model = Transformer(SMALL, Residency(routing, (ids,) * SMALL.n_layers))
    layout = ParameterLayout.of(model, model.expert_tensors())
    lost = sum(t.nbytes for t in State(layout, feedback=True).own["residual"].values())
    load = Load(wire_codec="int8", bucket_bytes=4)
    plain, kept = (rank_memory(SMALL, replace(load, error_feedback=on), n_resident=4, routing=routing)
                   for on in (False, True))  # fmt: skip
    assert kept.residual == kept.lasting - plain.lasting == lost
    assert plain.residual == 0
    host = rank_memory(SMALL, replace(load, error_feedback=True, state_on_host=True), n_resident=4, routing=routing)
    assert (host.residual, host.on_host) == (0, kept.anchors + lost)
    assert host.wire - kept.wire == 4 * 3 * SMALL.d_model * SMALL.d_expert * 2  # of a bucket, an expert's matrix
    files = [checkpoint_bytes(SMALL, n_sites=2, overlap=1, routing=routing, error_feedback=on)["site"]
             for on in (False, True)]  # fmt: skip
    assert files[1] - files[0] == lost
    assert rank_memory(SMALL, replace(load, error_feedback=True, method="ddp"), n_resident=8).residual == 0


def test_what_is_on_its_way_is_the_largest_fragment_with_its_moments() -> None:
    load = Load(averaged_moments=2, wire_codec="int4", error_feedback=True)
    assert rank_memory(SMALL, load, n_resident=4).flight == 0
    counts = resident_counts(SMALL, 4, "ghost")
    whole = rank_memory(SMALL, replace(load, delay=1), n_resident=4)
    coded = counts.total - counts.norms - counts.router
    assert whole.flight == 4 * (3 * counts.total + coded)
    assert whole.lasting - rank_memory(SMALL, load, n_resident=4).lasting == whole.flight
    parts = [rank_memory(SMALL, replace(load, delay=1, fragments=n), n_resident=4).flight for n in (1, 2, 3)]
    assert parts == sorted(parts, reverse=True)
    assert parts[2] >= 4 * 3 * counts.embeddings


def test_the_peak_grows_with_what_a_site_holds() -> None:
    load = Load(batch_size=4, sequence_length=128)
    peaks = [rank_memory(SMALL, load, n_resident=r).peak for r in range(1, 9)]
    assert peaks == sorted(set(peaks))
    full, half = rank_memory(SMALL, load, n_resident=8), rank_memory(SMALL, load, n_resident=4)
    held = resident_counts(SMALL, 8, "ghost").experts - resident_counts(SMALL, 4, "ghost").experts
    forward = [memory.moments_of_peak["end of the forward pass"] for memory in (full, half)]
    assert forward[0] - forward[1] == (4 + 8 + 4 + 2) * held  # weights, moments, anchors, casts
    forward = [
        rank_memory(SMALL, replace(load, accumulate=2), n_resident=r).moments_of_peak["end of the forward pass"]
        for r in (8, 4)
    ]
    assert forward[0] - forward[1] == (4 + 4 + 8 + 4 + 2) * held  # and gradients of the micro-batches before
    assert rank_memory(SMALL, replace(load, batch_size=8), n_resident=8).peak > full.peak
    wide = replace(load, val_batch_size=64)
    assert rank_memory(SMALL, wide, n_resident=4).validation > half.validation == 0


def test_what_a_recorded_step_needs_stays_reserved_while_sites_average() -> None:
    plain = rank_memory(SMALL, Load(batch_size=64), n_resident=8)
    replayed = rank_memory(SMALL, Load(batch_size=64, recorded=True), n_resident=8)
    assert plain.recorded == 0
    assert replayed.peak == plain.peak + plain.wire
    assert replayed.at_peak()[0] == "averaging"
    assert replayed.moments_of_peak["global validation"] == plain.moments_of_peak["global validation"]


def test_logits_do_not_grow_with_the_batch_once_there_are_two_chunks() -> None:
    config = replace(SMALL, vocab_size=200_019)
    types = Types.of("bf16-mixed")
    step = loss_bytes(config, types, 20_000) - loss_bytes(config, types, 10_000)
    assert step == 10_000 * 96 * (4 + 4 + 2)  # hidden states, their gradient, their cast
    assert loss_bytes(config, types, 20_000) < 10_000 * 200_019 * 4
    chunk = Types.of("32-true", kernels=False), Types.of("bf16-mixed")
    made = [chunk_bytes(config, types, 20_000)[1] for types in chunk]
    assert max(made) <= config.loss_chunk_bytes
    assert made == pytest.approx([config.loss_chunk_bytes] * 2, rel=0.2)  # whatever a logit's type


def test_the_largest_part_at_the_peak_is_named() -> None:
    moment, parts = rank_memory(replace(SMALL, loss_chunk_bytes=2**20), Load(batch_size=64), n_resident=8).at_peak()
    assert (moment, next(iter(parts))) == ("backward pass", "backward")
    wide = replace(SMALL, vocab_size=50_000, loss_chunk_bytes=256 * 2**20)
    moment, parts = rank_memory(wide, Load(batch_size=16, accumulate=2, kernels=False), n_resident=8).at_peak()
    assert (moment, next(iter(parts))) == ("end of the forward pass", "logits")
    assert parts["gradients"] == 4 * resident_counts(wide, 8, "ghost").total
    assert next(iter(rank_memory(SMALL, Load(batch_size=1, sequence_length=1), n_resident=8).at_peak()[1])) == "library"
    for load in (Load(batch_size=64), Load(batch_size=1, sequence_length=1, outer_momentum=True, val_batch_size=1)):
        memory = rank_memory(SMALL, load, n_resident=2)
        assert sum(memory.at_peak()[1].values()) == memory.peak


@pytest.mark.parametrize("batch", [1, 64])
def test_what_is_sharded_is_divided_at_every_moment(batch: int) -> None:
    """Against the difference that halving makes: the parts that last, and gradients, also in the backward pass."""
    config = replace(SMALL, vocab_size=256, n_layers=12, activation_checkpointing="blocks")
    load = Load(precision="32-true", batch_size=batch, sequence_length=128, outer_momentum=True)
    whole, half = (rank_memory(config, load, n_resident=8, shards=n) for n in (1, 2))
    parameters = resident_counts(config, 8, "ghost").total
    for name in ("weights", "gradients", "anchors", "outer_momentum"):
        assert getattr(half, name) == 4 * -(-parameters // 2)
    assert (half.activations, half.logits) == (whole.activations, whole.logits)
    saved = whole.lasting - half.lasting
    assert saved == whole.weights // 2 * 5
    backward = {n: m.moments_of_peak["backward pass"] - m.gathered for n, m in (("whole", whole), ("half", half))}
    assert backward["half"] + saved <= backward["whole"] <= backward["half"] + saved + whole.gradients // 2
    forward = whole.moments_of_peak["end of the forward pass"] - half.moments_of_peak["end of the forward pass"]
    assert forward == saved - half.gathered
    outside, layer = parameter_counts(config).embeddings, (parameters - parameter_counts(config).embeddings) // 12
    assert half.gathered == pytest.approx(4 * (outside + 2 * layer), rel=0.01)
    assert half.peak > half.lasting
    with pytest.raises(ConfigError):
        rank_memory(config, load, n_resident=8, shards=0)


@pytest.mark.parametrize("n_resident", [0, 9])
def test_residents_that_cannot_be_are_refused(n_resident: int) -> None:
    with pytest.raises(ConfigError):
        rank_memory(SMALL, Load(), n_resident=n_resident)


@pytest.mark.parametrize("field", ["batch_size", "sequence_length", "bucket_bytes", "evaluation_window"])
def test_empty_loads_are_refused(field: str) -> None:
    with pytest.raises(ConfigError):
        Load(**{field: 0})
