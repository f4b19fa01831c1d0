"""The model of a run for lm-evaluation-harness, while each site holds some of the experts only.

Shapes: B sequences of a batch, S positions, D model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from fomoe_pl.hub.harness import HarnessLM, Score, Scored, batches_by_length, padded, scores
from fomoe_pl.hub.tokenizer import corpus_tokenizer
from fomoe_pl.training.context import context


class TrainingLM(HarnessLM):
    """Scores of the agreed model; all sites ask it for the same, at the same time.

    Args:
        trainer: Of the run, at a round's end.
        pl_module: What it trains.
        batch_size: Sequences that are scored together.
        window: Batches of a site that go through each layer together: a layer's experts are gathered once a window.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, batch_size: int, window: int) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer = corpus_tokenizer(data.manifest)
        library = tokenizer.library()
        super().__init__(
            lambda text: list(library.encode(text, add_special_tokens=False).ids),
            tokenizer.eod_id,
            data.sequence_length,
        )
        self._module: Any = pl_module
        self._site = context(trainer)
        self.batch_size, self.window = batch_size, window

    def score(self, sequences: Sequence[Scored]) -> list[Score]:
        """Score all sequences: each site its share, summed over sites in one message."""
        topology = self._site.topology
        batches = batches_by_length(sequences, self.batch_size)
        own = batches[topology.site :: topology.n_sites]
        n_windows = math.ceil(math.ceil(len(batches) / topology.n_sites) / self.window)
        found_N2 = torch.zeros(len(sequences), 2, dtype=torch.float64)
        self._module.make_room()
        for start in range(0, n_windows * self.window, self.window):
            self._window([(i, [sequences[j] for j in i]) for i in own[start : start + self.window]], found_N2)
        total = self._site.sum_over_sites(found_N2.flatten().to(self._module.device), "evaluation")
        return [Score(nats, greedy > 0) for nats, greedy in total.cpu().view(-1, 2).tolist()]

    def _window(self, batches: list[tuple[list[int], list[Scored]]], found_N2: torch.Tensor) -> None:
        """Every site goes through all layers, also one that has nothing to score: it gives its experts to others."""
        model, device = self._module.transformer, self._module.device
        streams = [model.embed(padded(chosen, device)) for _, chosen in batches]
        for layer, block in enumerate(model.layers):
            with self._site.all_experts_of(layer):
                for i, x_BSD in enumerate(streams):
                    streams[i] = block(x_BSD)[0]
        for (places, chosen), x_BSD in zip(batches, streams, strict=True):
            found = list(scores(chosen, model.finish(x_BSD), model.logits))
            found_N2[places] = torch.tensor([(s.nats, float(s.greedy)) for s in found], dtype=torch.float64)
