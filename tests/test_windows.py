"""Memory of a validation: how many hidden states are alive while a window goes through the layers."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from fomoe_pl.metrics import ValidationMetrics
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.module import FoMoEModule
from fomoe_pl.training.context import Alone

LAYERS, WINDOW = 4, 8
CONFIG = ModelConfig(vocab_size=16, d_model=8, n_layers=LAYERS, n_heads=1, n_experts=4, top_k=2, d_expert=4,
                     base_width=8, base_depth=LAYERS)  # fmt: skip


class Alive:
    """Outputs of blocks that something still holds, and the most of them at once."""

    def __init__(self, model: Transformer) -> None:
        self.most, self._made = 0, list[weakref.ref[Tensor]]()
        for block in model.layers:
            block.register_forward_hook(self._note)

    def _note(self, block: Any, args: Any, output: tuple[Tensor, Any]) -> None:
        self._made.append(weakref.ref(output[0]))
        self._made = [made for made in self._made if made() is not None]
        self.most = max(self.most, len(self._made))


def evaluate(resident: int, *, others: bool) -> tuple[int, dict[str, Tensor]]:
    """Most hidden states beside the embeddings, and the values, of a window on a site that lacks experts."""
    module = FoMoEModule(CONFIG)
    residents = tuple(range(resident))
    module.model = Transformer(CONFIG, Residency("ghost", (residents,) * LAYERS), seed=1).eval()
    # Held here: a module knows its trainer by a weak reference.
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    module.trainer = trainer
    module.measures_other_views = others
    module._validation = ValidationMetrics(["one"], LAYERS, 4, "cpu")
    module._random = torch.Generator().manual_seed(0)

    @contextmanager
    def all_experts_of(layer: int) -> Iterator[None]:
        full = Transformer(CONFIG, seed=1).layers[layer].moe.state_dict()
        wanted = {"experts.w_in", "experts.w_out"}
        with module.transformer.layers[layer].moe.with_all_experts({k: full[k] for k in wanted}):
            yield

    if resident < 4:
        site: Any = Alone(trainer)
        site.all_experts_of = all_experts_of
        trainer.strategy.context = site  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(2)
    for _ in range(WINDOW):
        tokens = torch.randint(16, (2, 5), generator=generator)
        domain = torch.zeros(2, dtype=torch.int64)
        module._window.append({"inputs": tokens, "targets": tokens, "bytes": tokens, "domain": domain})
    alive = Alive(module.transformer)
    module._evaluate_window()
    return alive.most, module._validation.compute(with_views=others)


@pytest.mark.parametrize(("resident", "others", "windows"), [(4, False, 1), (4, True, 2), (2, False, 1), (2, True, 2)])
def test_windows_of_hidden_states_are_bounded(resident: int, others: bool, windows: int) -> None:
    most, values = evaluate(resident, others=others)
    assert windows * WINDOW <= most <= windows * WINDOW + 1  # and the one that is being made
    if others:
        assert float(values["routing_necessity_nats"]) != 0
        assert (float(values["own_view_gap_nats"]) != 0) == (resident < 4)


def test_values_do_not_depend_on_what_a_site_holds() -> None:
    part, whole = (evaluate(resident, others=True)[1] for resident in (2, 4))
    for name in ("loss", "routing_necessity_nats"):
        assert float(part[name]) == pytest.approx(float(whole[name]), rel=1e-6)
