"""What sites compare at their meeting: all that must be equal, and nothing that each chooses for itself."""

from typing import Any

import lightning.pytorch as L
import pytest

from fomoe_pl.callbacks import RoutingStability
from fomoe_pl.codec import Groups
from fomoe_pl.data import FoMoEData
from fomoe_pl.errors import MeetingError
from fomoe_pl.federation.outer import Average, Nesterov
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.module import FoMoEModule
from fomoe_pl.optimizer import OptimizerConfig
from fomoe_pl.strategies.presence import Plain, check_equal, differences, digest, shared_settings

SIZES = {"vocab_size": 257, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_experts": 4, "top_k": 2, "d_expert": 8}


class MyCodec:
    def __init__(self, bits: int) -> None:
        self.bits = bits


def settings(root: str, /, where: str = "", **change: Any) -> dict[str, Plain]:
    """Of a site whose settings are these, but for one in one place."""
    changed: dict[str, dict[str, Any]] = {where: change}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=8, logger=False, enable_checkpointing=False,
        callbacks=[RoutingStability(**changed.get("watch", {}))] * changed.get("callbacks", {}).get("n", 1),
        **changed.get("trainer", {}),
    )  # fmt: skip
    module = FoMoEModule(
        ModelConfig(**SIZES | changed.get("architecture", {})),
        OptimizerConfig(**changed.get("optimizer", {})), **changed.get("module", {}),
    )  # fmt: skip
    data = FoMoEData(**{"root": root, "sequence_length": 16, "batch_size": 2} | changed.get("data", {}))
    federation = FederationConfig(**changed.get("federation", {}))
    return shared_settings(trainer, module, data, federation, strategy=changed.get("", {}).get("name", "Federated"))


@pytest.mark.parametrize(
    ("where", "change", "names"),
    [
        ("architecture", {"vocab_size": 300}, ["model.architecture.vocab_size"]),
        ("architecture", {"gate": "softmax"}, ["model.architecture.gate"]),
        ("optimizer", {"lr": 0.5}, ["model.optimizer.lr"]),
        ("module", {"seed": 5}, ["model.seed"]),
        ("module", {"evaluation_window": 3}, ["model.evaluation_window"]),
        ("federation", {"local_steps": 8}, ["trainer.strategy.init_args.local_steps"]),
        ("federation", {"outer": Nesterov(momentum=0.8)}, ["trainer.strategy.init_args.outer"]),
        ("federation", {"wire_codec": Groups(4)}, ["trainer.strategy.init_args.wire_codec"]),
        ("federation", {"wire_codec": MyCodec(4)}, ["trainer.strategy.init_args.wire_codec"]),
        ("federation", {"check_agreement": True}, ["trainer.strategy.init_args.check_agreement"]),
        ("trainer", {"precision": "bf16-mixed"}, ["trainer.precision"]),
        ("trainer", {"limit_val_batches": 3}, ["trainer.limit_val_batches"]),
        ("trainer", {"gradient_clip_val": 0.5}, ["trainer.gradient_clip_val"]),
        ("data", {"sequence_length": 8}, ["data.sequence_length"]),
        ("data", {"split": "domain"}, ["data.split"]),
        ("watch", {"probe_sequences": 0}, ["trainer.callbacks.0.probe_sequences"]),
        ("callbacks", {"n": 0}, ["trainer.callbacks."]),
        ("", {"name": "CountedDDP"}, ["trainer.strategy"]),
        # Each site's own.
        ("architecture", {"expert_backend": "loop"}, []),
        ("federation", {"outer_state": "host"}, []),
        ("federation", {"outer": Average()}, []),  # what None is
        ("federation", {"local_steps": {4: 2, 0: 1}}, ["trainer.strategy.init_args.local_steps"]),
        ("data", {"root": "elsewhere", "max_bad_shards": 2}, []),
        ("data", {"num_workers": 2}, ["data.num_workers"]),
        ("module", {"compile_blocks": True, "cuda_graphs": False}, []),
        ("trainer", {"default_root_dir": "elsewhere", "enable_progress_bar": False, "enable_model_summary": False}, []),
    ],
)
def test_what_must_be_equal_is_compared_and_what_is_a_sites_own_is_not(
    root: str, where: str, change: dict[str, Any], names: list[str]
) -> None:
    base, other = settings(root), settings(root, where, **change)
    found = differences([base, other])
    assert [any(text.startswith(name) for text in found) for name in names] == [True] * len(names)
    assert bool(found) == bool(names), found
    assert (digest(base) == digest(other)) == (not names)


def test_an_object_without_a_text_of_its_own_is_told_by_its_arguments(root: str) -> None:
    one, same, other = (settings(root, "federation", wire_codec=MyCodec(bits)) for bits in (4, 4, 8))
    assert one == same
    assert differences([one, other]) == [
        "trainer.strategy.init_args.wire_codec is 'MyCodec(bits=4)' on site 0, 'MyCodec(bits=8)' on site 1"
    ]


def test_the_order_of_keys_is_no_difference(root: str) -> None:
    one, other = (settings(root, "federation", local_steps=steps) for steps in ({0: 1, 4: 2}, {4: 2, 0: 1}))
    assert differences([one, other]) == []


def test_all_values_are_named_with_their_sites() -> None:
    with pytest.raises(MeetingError) as error:
        check_equal([{"a": 1, "b": "x"}, {"a": 2, "b": "x"}, {"a": 1}])
    assert str(error.value) == (
        "configuration: differs between sites: a is 1 on sites 0, 2, 2 on site 1; b is 'x' on sites 0, 1, not there on "
        "site 2. Give every site the same values"
    )
    many = [{f"s{i:02d}": site for i in range(12)} for site in range(2)]
    with pytest.raises(MeetingError, match="s07 is 0 on site 0, 1 on site 1; and 4 more"):
        check_equal(many)
