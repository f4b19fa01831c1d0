"""The contract between module, data, callbacks and strategy: what those three may ask of the sites they run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from fomoe_pl.checkpoint.content import Content, Counts, MidRound
from fomoe_pl.federation.exchange import gather_texts
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.movement import Movement
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.federation.placement import Placement
from fomoe_pl.federation.settings import WireDtype
from fomoe_pl.federation.topology import Topology
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency
from fomoe_pl.training.elastic import Pace


@runtime_checkable
class DomainData(Protocol):
    """What validation asks of a datamodule; its batches have `inputs`, `targets`, `domain` and `bytes`.

    Attributes:
        domains: Names of the domains; a batch's `domain` (B,) indexes into them.
    """

    domains: Sequence[str]


@runtime_checkable
class ProbedData(Protocol):
    """What `RoutingStability` asks of a datamodule."""

    def probe(self, n_sequences: int, n_tokens: int) -> dict[str, Tensor]:
        """One batch of held-out text, the same on every site."""


@runtime_checkable
class IdentifiedData(Protocol):
    """What `RunReport` asks of a datamodule."""

    def identity(self) -> dict[str, Any]:
        """Corpus, tokenizer and validation set: runs are comparable if these are equal."""


class RoundModule(MidRound, Protocol):
    """What rounds ask of a LightningModule.

    Attributes:
        max_skipped_steps: Optimizer steps that all sites together may skip.
    """

    max_skipped_steps: int

    def count_skipped(self) -> tuple[int, int]:
        """Optimizer steps that this site skipped since the last call, and all of them."""

    def pop_round_losses(self) -> tuple[float, float]:
        """Sum of the finite training losses since the last call, and their number."""

    def pop_loads(self) -> Tensor:
        """Return `loads` and reset them."""


class SiteContext(Counts, Protocol):
    """What strategies of this project implement, and `Alone` for Lightning's own.

    Attributes:
        pace: Of a run that may have fewer sites than planned; None without.
        round_stats: Means over all sites of the last round; empty before the first.
        watch_seconds: Seconds spent on observing and drawing so far, not part of `sync_seconds`.
        wire_dtype: dtype of averaged values on the wire.
    """

    pace: Pace | None
    round_stats: dict[str, float]
    watch_seconds: float
    wire_dtype: WireDtype

    @property
    def content(self) -> Content | None:
        """What checkpoints hold; None where they are Lightning's own."""

    @property
    def save_seconds(self) -> float:
        """Seconds for which training stood still for saving so far."""

    @property
    def has_rounds(self) -> bool:
        """Whether sites agree in rounds; synchronous training has none."""

    @property
    def sees_loads(self) -> bool:
        """Whether the placement depends on how often experts were picked."""

    @property
    def moves_experts(self) -> bool:
        """Whether the placement changes while a run trains."""

    @property
    def measures_sync(self) -> bool:
        """Whether the time of synchronisation is known: data parallelism hides it in the backward pass."""

    @property
    def placement(self) -> Placement | None:
        """The placement; None if every rank holds all experts."""

    def residency(self, config: ModelConfig) -> Residency:
        """The experts that this site holds."""

    def tokens_of_all(self, tokens: int) -> int:
        """Tokens that all sites take while this one takes so many."""

    def texts_of_sites(self, text: str) -> list[str]:
        """All-gather of a value, in the order of sites; a collective call, after the rendezvous."""

    def sum_in_site(self, values: Tensor) -> Tensor:
        """Sum a small tensor over the ranks of this site; all of them call it together."""

    def average_gradients(self, optimizer: Optimizer) -> None:
        """Average gradients over the ranks of this site, before they are used."""

    @property
    def total_of_slices(self) -> Callable[[Tensor], Tensor] | None:
        """Adds a number over the ranks of this site, if they have slices of its model; else None."""

    def reduce_loads(self, loads_LE: Tensor) -> Tensor:
        """Expert loads (L, E) that the balance bias is updated from."""

    def all_experts_of(self, layer: int) -> AbstractContextManager[None]:
        """Make all E experts of one layer live on this site inside the context; a collective call."""

    def stop_if_asked(self) -> None:
        """Stop the run here if asked to and possible; called after each micro-batch."""

    def hold_stop(self) -> None:
        """Let `trainer.should_stop` be true only where the run may end."""

    def watch_movement(self) -> Movement | None:
        """Have every round fill a `Movement`; None where there are no rounds."""

    def copy_errors(self) -> Tensor | None:
        """Squares of the errors of copies of experts, and of the experts, float64 (L,2), of those that this site owns.

        To be added over the sites. None without copies.
        """

    def copy_age(self) -> int | None:
        """Rounds for which copies had been in use when the round began that has ended last; None without copies."""

    def agreed_bytes(self) -> int:
        """Bytes of anchors and outer momentum on this rank's device."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The method's settings by name, plain values."""

    def describe(self) -> str:
        """One line that names the method."""


class Alone:
    """Answers for Lightning's own strategies, of which nothing is known but their ranks: each has the whole model."""

    has_rounds = measures_sync = sees_loads = moves_experts = False
    content = placement = None
    pace: Pace | None = None
    rounds_done = 0
    save_seconds = sync_seconds = watch_seconds = 0.0
    wire_dtype: WireDtype = "float32"

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.ledger = Ledger()
        self.observers: list[RoundObserver] = []
        self.round_stats: dict[str, float] = {}

    @property
    def topology(self) -> Topology:
        """Every rank is a site, as far as data is concerned."""
        return Topology(self._trainer.world_size, 1, self._trainer.global_rank)

    def tokens_of_all(self, tokens: int) -> int:
        """Every rank reads as many."""
        return tokens * int(self._trainer.world_size)

    @property
    def optimizer_steps(self) -> int:
        """Lightning's count."""
        return int(self._trainer.global_step)

    def residency(self, config: ModelConfig) -> Residency:
        """All experts."""
        return Residency.full(config)

    def sum_over_sites(self, values: Tensor, kind: str = "evaluation") -> Tensor:
        """The values themselves."""
        return values

    @property
    def counted(self) -> Ledger:
        """Nothing is counted."""
        return self.ledger

    def ledger_of_site(self) -> Ledger:
        """Nothing is counted."""
        return self.ledger

    def texts_of_sites(self, text: str) -> list[str]:
        """Each rank's."""
        device = self._trainer.strategy.root_device
        return gather_texts(text, device, self.ledger) if self._trainer.world_size > 1 else [text]

    def sum_in_site(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def average_gradients(self, optimizer: Optimizer) -> None:
        """Nothing: Lightning's strategies do it."""

    @property
    def total_of_slices(self) -> None:
        """None: of Lightning's strategies none cuts a model of this project."""

    def reduce_loads(self, loads_LE: Tensor) -> Tensor:
        """The loads themselves."""
        return loads_LE

    def all_experts_of(self, layer: int) -> AbstractContextManager[None]:
        """They are live."""
        return nullcontext()

    def stop_if_asked(self) -> None:
        """Nothing: Lightning ends its runs."""

    def hold_stop(self) -> None:
        """Nothing: Lightning ends its runs."""

    def watch_movement(self) -> None:
        """Nothing: there are no rounds."""

    def copy_errors(self) -> None:
        """Nothing: every rank has all experts."""

    def copy_age(self) -> None:
        """Nothing, likewise."""

    def agreed_bytes(self) -> int:
        """Nothing is kept twice."""
        return 0

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All that is known."""
        return {"strategy": type(self._trainer.strategy).__name__}

    def describe(self) -> str:
        """All that is known."""
        return "a strategy of Lightning's"


def context(trainer: Any) -> SiteContext:
    """What answers for the sites of a run.

    Args:
        trainer: The Trainer that runs.
    """
    own: SiteContext | None = getattr(trainer.strategy, "context", None)
    alone: SiteContext = Alone(trainer)
    return alone if own is None else own
