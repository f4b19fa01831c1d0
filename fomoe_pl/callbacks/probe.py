"""A fixed held-out text on which every site's own model is measured."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fomoe_pl.callbacks.observed import observed_module
from fomoe_pl.errors import ConfigError
from fomoe_pl.metrics.probe import row_similarity
from fomoe_pl.model.parallel import reshard
from fomoe_pl.slices import whole
from fomoe_pl.training.context import ProbedData


class Look(NamedTuple):
    """Measurements of a site's own model on the probe, on the CPU.

    Attributes:
        picks_LTK: Expert ids that each layer's router picks for each token, int64.
        gates_LTK: Gates of these picks, float32.
        similarity_L: Mean cosine between two rows of the layer's router, float64.
        loss: Cross entropy, nats a token, float64 ().
    """

    picks_LTK: Tensor
    gates_LTK: Tensor
    similarity_L: Tensor
    loss: Tensor


class Probe:
    """Held-out text, the same on all sites.

    Args:
        trainer: Its datamodule gives the text.
        pl_module: Whose model will read it.
        n_sequences: sequences.
        n_tokens: Tokens of each.

    Raises:
        ConfigError: If the datamodule has no `probe`.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, n_sequences: int, n_tokens: int) -> None:
        data = cast(Any, trainer).datamodule
        if not isinstance(data, ProbedData):
            raise ConfigError("trainer.callbacks.RoutingStability.probe_sequences", n_sequences,
                              f"needs data with a method `probe`, which {type(data).__name__} does not have",
                              "use fomoe_pl.data.FoMoEData, or set it to 0")  # fmt: skip
        self._batch = {k: t.to(pl_module.device) for k, t in data.probe(n_sequences, n_tokens).items()}

    def text(self) -> list[list[int]]:
        """Its tokens."""
        tokens: list[list[int]] = self._batch["inputs"].tolist()
        return tokens

    @torch.no_grad()
    def look(self, trainer: Trainer, pl_module: LightningModule) -> Look:
        """Run this site's current model on the text. On a GPU this waits for the device, once."""
        model = observed_module(pl_module).transformer
        with trainer.precision_plugin.forward_context():
            hidden_BSD, stats = model(self._batch["inputs"])
            losses_BS = model.token_losses(hidden_BSD, self._batch["targets"])
        reshard(model)  # the averages that follow change what was gathered
        routers = [block.moe.router for block in model.layers]
        picks_LTK = torch.stack([r.expert_ids(s.picks_TK) for r, s in zip(routers, stats, strict=True)])
        gates_LTK = torch.stack([s.gates_TK for s in stats])
        similarity_L = row_similarity(torch.stack([whole(r.weight) for r in routers]))
        loss = losses_BS.double().sum() / (self._batch["targets"] >= 0).sum()
        parts = [picks_LTK, gates_LTK, similarity_L, loss]
        # One transfer; float64 represents all of them exactly.
        flat = torch.cat([part.double().flatten() for part in parts]).cpu()
        picks, gates, similarity_L, loss = flat.split([part.numel() for part in parts])
        return Look(picks.long().view(picks_LTK.shape), gates.float().view(gates_LTK.shape), similarity_L, loss[0])
