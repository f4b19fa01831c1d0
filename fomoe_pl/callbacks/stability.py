"""Whether experts stay alive, routers settle and sites stay together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fomoe_pl.callbacks.history import PickHistory
from fomoe_pl.callbacks.observed import RoundCallback, log, observe_rounds, observed_module, observed_strategy
from fomoe_pl.callbacks.probe import Look, Probe
from fomoe_pl.callbacks.tags import by_layer, copy_errors, movement_values, routing_values
from fomoe_pl.errors import ConfigError, check_range
from fomoe_pl.federation.movement import Movement
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.federation.packing import pack_counts, unpack_counts
from fomoe_pl.metrics import RoutingHealth, Statistic
from fomoe_pl.metrics.probe import pick_overlap, picked_by, site_agreement

QUANTILES = (0.1, 0.5, 0.9)


@dataclass
class RoundView:
    """Routing in the last round, or in the last interval of synchronous training.

    Attributes:
        health: Picks of all sites in the round; of this rank in synchronous training.
        values: What was measured of it.
        drift_LE: Relative drift of each expert's holders when last measured; None without rounds.
        gates_LTK: Gates on the probe when last measured; None without a probe.
    """

    health: RoutingHealth
    values: dict[str, float]
    drift_LE: Tensor | None = None
    gates_LTK: Tensor | None = None


class RoutingStability(RoundCallback, RoundObserver):
    """Logs the health of the routing at the end of every round, over all sites.

    - Loads, entropies and ghosts of the round's training steps (`fomoe_pl.metrics.routing`);
    - on a fixed probe of held-out text, the same on all sites (`fomoe_pl.metrics.probe`): churn since the last round,
      agreement between the sites' routers before averaging, the jump that averaging causes, similarity of router rows,
      quantiles of the gates, loss before and after; when training ends, saturation against the last picks;
    - of copies of absent experts the share of picks that they served, their relative error and age;
    - drift of experts among their holders before averaging, norms of pseudo-gradients (`fomoe_pl.metrics.drift`);
    - in some validations of the global model: routing necessity and the gap of the sites' own views
      (`fomoe_pl.metrics.validation`).

    Loads are measured in every round. The first, every `every_n_rounds`-th and the last round are measured in full:
    probe, drift, and each layer by itself, which cost more.

    Its numbers travel in the round's one control message. In synchronous training there is none: every `every_n_steps`
    steps it logs what rank 0 sees.

    Args:
        every_n_rounds: Rounds from one look (probe, drift, layers one by one) to the next; the first and the last round
            are looked at too, loads are measured in all.
        every_n_steps: Interval in synchronous training, in optimizer steps.
        probe_sequences: Sequences of the probe; 0 for no probe.
        probe_tokens: Tokens of each of them.
        other_views_every: Interval, in validations, between those that read the text twice more, for routing necessity
            and own views; 0 for never. Unless it is 0, the last validation of a run with `max_steps` always does, and
            so does `fomoe validate`.
        statistics: Your own, objects of subclasses of `fomoe_pl.metrics.Statistic`: summed in every training step, and
            logged with the loads.

    Attributes:
        view: The last round; None before the first.
        latest: Newest value of each tag.
        own_statistics: What was given as `statistics`.
        looked_step: Optimizer steps at the end of the last round that looked at probe and drift; None before.
        other_views_step: Optimizer steps at the last validation that read the text twice more; None before.
    """

    def __init__(
        self,
        every_n_rounds: int = 16,
        every_n_steps: int = 10,
        probe_sequences: int = 8,
        probe_tokens: int = 64,
        other_views_every: int = 4,
        statistics: list[Statistic] | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        for name, value, least in (
            ("every_n_rounds", every_n_rounds, 1), ("probe_sequences", probe_sequences, 0),
            ("probe_tokens", probe_tokens, 1), ("other_views_every", other_views_every, 0),
        ):  # fmt: skip
            key = f"trainer.callbacks.RoutingStability.{name}"
            check_range(key, value, "see docs/configuration.md for the defaults", least=least)
        self.every_n_rounds = every_n_rounds
        self.probe_sequences, self.probe_tokens = probe_sequences, probe_tokens
        self.other_views_every = other_views_every
        self.own_statistics = statistics or []
        names = [getattr(statistic, "name", "") for statistic in self.own_statistics]
        if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
            raise ConfigError("trainer.callbacks.RoutingStability.statistics", names, "have no different names",
                              'give each class a name of its own, such as name = "lost_tokens"')  # fmt: skip
        self.view: RoundView | None = None
        self.latest: dict[str, float] = {}
        self._looking = True
        self.other_views_step: int | None = None
        self.looked_step: int | None = None
        self._validations = 0
        self._started = False
        self._resumed: dict[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        """Reset to the start of a run."""
        self._history = PickHistory()
        self._last_picks: Tensor | None = None
        self._drift_LE: Tensor | None = None
        self._gates_LTK: Tensor | None = None
        self.latest.clear()

    # -- training -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fetch the probe, and register as an observer of rounds."""
        super().on_train_start(trainer, pl_module)
        self._trainer, self._module, self._started = trainer, pl_module, True
        strategy = observed_strategy(trainer)
        observed_module(pl_module).watch_routing()
        if self.own_statistics:
            observed_module(pl_module).watch_statistics(self.own_statistics)
        observe_rounds(trainer, self)
        self._movement: Movement | None = strategy.watch_movement()
        self._probe = None
        if self.probe_sequences:
            self._probe = Probe(trainer, pl_module, self.probe_sequences, self.probe_tokens)
        self._before: Look | None = None
        self._after: Look | None = None
        self._forget()
        if self._resumed is not None and self._of() == self._resumed["of"]:
            self._go_on(self._resumed)
        self._resumed = None

    def before_synchronization(self) -> None:
        """Measure the site's own model before averaging, in rounds that are measured in full."""
        strategy = observed_strategy(self._trainer)
        last = self._steps_taken() == self._trainer.max_steps
        self._looking = last or strategy.rounds_done % self.every_n_rounds == 0
        if self._movement is not None:
            self._movement.active = self._looking
        self._before = self._look() if self._looking else None

    def after_synchronization(self) -> None:
        """Measure the averaged model."""
        self._after = self._look() if self._looking else None

    def statistics(self) -> Tensor:
        """The vector that is summed over the sites."""
        parts = self._parts()
        self._shapes = {name: part.shape for name, part in parts.items()}
        return torch.cat([part.flatten() for part in parts.values()])

    def _parts(self) -> dict[str, Tensor]:
        module, strategy = observed_module(self._module), observed_strategy(self._trainer)
        residency = module.transformer.residency
        experts = range(module.config.n_experts)
        held = [[expert in ids for expert in experts] for ids in map(set, residency.experts)]
        resident_LE = torch.tensor(held, dtype=torch.float64)
        parts = {
            "sites": torch.ones(1, dtype=torch.float64),
            "health": module.routing_health.states().cpu(),
            "holders_LE": resident_LE,
            "scorers_LE": resident_LE if residency.routing == "partitioned" else torch.ones_like(resident_LE),
        }
        if self._movement is not None and self._looking:
            parts["dense"], parts["expert_LE"] = self._movement.sums()
        if self._looking and (errors_L2 := strategy.copy_errors()) is not None:
            parts["copies_L2"] = errors_L2
        if self._before is not None and self._after is not None:
            before, after = self._before, self._after
            changed_L = torch.zeros_like(after.similarity_L)
            if self._last_picks is not None:
                changed_L = 1 - pick_overlap(self._last_picks, after.picks_LTK)
            picked_LTE = picked_by(before.picks_LTK, module.config.n_experts)
            parts |= {
                "jump_L": 1 - pick_overlap(before.picks_LTK, after.picks_LTK),
                "churn_L": changed_L,
                "similarity_L": after.similarity_L,
                "losses": torch.stack([before.loss, after.loss]),
                "picked": pack_counts(picked_LTE, strategy.topology.n_sites),
            }
        if not strategy.topology.leads:  # but for what their own tokens did, a site's ranks all see the same
            parts = {name: part if name == "health" else torch.zeros_like(part) for name, part in parts.items()}
        return parts

    def receive(self, total: Tensor) -> None:
        """Compute the round's statistics from the sums over the sites."""
        module, strategy = observed_module(self._module), observed_strategy(self._trainer)
        flat = total.cpu().split([math.prod(shape) for shape in self._shapes.values()])
        parts = {name: part.view(self._shapes[name]) for name, part in zip(self._shapes, flat, strict=True)}
        health = RoutingHealth(module.config.n_layers, module.config.n_experts, module.routing_health.names)
        health.load_states(parts["health"])
        module.routing_health.reset()
        routing = module.transformer.residency.routing
        view = self.view = RoundView(health, routing_values(health, routing), self._drift_LE, self._gates_LTK)
        if (age := strategy.copy_age()) is not None:
            view.values["routing/copy_age_rounds"] = float(age)
        sites, holders_LE = parts["sites"], parts["holders_LE"]
        if "expert_LE" in parts:
            self._drift_LE = view.drift_LE = movement_values(
                view.values, parts["dense"], parts["expert_LE"], sites, holders_LE
            )
        if "copies_L2" in parts:
            view.values |= copy_errors(parts["copies_L2"])
        if "picked" in parts and self._after is not None:
            picks_LTK = self._after.picks_LTK
            shape = (*picks_LTK.shape[:2], module.config.n_experts)
            sites_LTE = unpack_counts(parts["picked"], strategy.topology.n_sites, shape)
            agreement_L = site_agreement(sites_LTE, parts["scorers_LE"])
            view.values |= by_layer("routing/site_agreement", agreement_L)
            view.values |= by_layer("routing/sync_jump", parts["jump_L"] / sites)
            view.values["routing/probe_loss_local_nats"] = float(parts["losses"][0] / sites)
            churn_L, similarity_L = parts["churn_L"] / sites, parts["similarity_L"] / sites
            self._remember(self._after, churn_L, similarity_L, parts["losses"][1] / sites)

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round; without rounds, measure this rank."""
        if not observed_strategy(trainer).has_rounds:
            self._look_alone()
        assert self.view is not None
        self.latest |= self.view.values
        if self._looking:
            self.looked_step = trainer.global_step
        if trainer.is_global_zero:
            values = self.view.values
            log(trainer, values if self._looking else {k: v for k, v in values.items() if "/layer_" not in k})

    def _look_alone(self) -> None:
        config, health = observed_module(self._module).config, observed_module(self._module).routing_health
        kept = RoutingHealth(config.n_layers, config.n_experts, health.names)
        kept.load_states(health.states().cpu())
        health.reset()
        self.view = RoundView(kept, routing_values(kept))
        look = self._look()
        if look is not None:
            churn_L = torch.zeros_like(look.similarity_L)
            if self._last_picks is not None:
                churn_L = 1 - pick_overlap(self._last_picks, look.picks_LTK)
            self._remember(look, churn_L, look.similarity_L, look.loss)

    def _look(self) -> Look | None:
        return None if self._probe is None else self._probe.look(self._trainer, self._module)

    def _remember(self, look: Look, churn_L: Tensor, similarity_L: Tensor, loss: Tensor) -> None:
        assert self.view is not None
        values = self.view.values
        if self._last_picks is not None:
            values |= by_layer("routing/churn", churn_L)
        values |= by_layer("routing/row_similarity", similarity_L)
        values["routing/probe_loss_nats"] = float(loss)
        quantiles = torch.tensor(QUANTILES, dtype=look.gates_LTK.dtype)
        for q, value_L in zip(QUANTILES, look.gates_LTK.flatten(1).quantile(quantiles, dim=1), strict=True):
            values |= by_layer(f"routing/gate_q{q * 100:.0f}", value_L)
        self._gates_LTK = self.view.gates_LTK = look.gates_LTK
        self._last_picks = look.picks_LTK
        if self._trainer.is_global_zero:
            # Inside a round Lightning has not counted its last step yet.
            self._history.add(self._steps_taken(), look.picks_LTK)

    def _steps_taken(self) -> int:
        return observed_strategy(self._trainer).optimizer_steps

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log saturation: how many of the last picks each earlier measurement already had, at its own step."""
        if self._last_picks is not None:
            for step, picks_LTK in self._history.looks():
                log(trainer, by_layer("routing/saturation", pick_overlap(picks_LTK.long(), self._last_picks)), step)

    # -- validation -----------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Request random routing and own views when they are due."""
        if trainer.sanity_checking or not self.other_views_every:
            return
        self._validations += 1
        last = trainer.state.fn == TrainerFn.VALIDATING or _is_last_validation(trainer)
        if last or self._validations % self.other_views_every == 0:
            observed_module(pl_module).measure_other_views()
            self.other_views_step = trainer.global_step

    # -- resuming -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State of this site; picks differ between sites."""
        state: dict[str, Any] = {"validations": self._validations, "other_views_step": self.other_views_step,
                                 "looked_step": self.looked_step}  # fmt: skip
        if self._started:
            state |= {
                "of": self._of(), "health": observed_module(self._module).routing_health.states().cpu(),
                "history": self._history.state_dict(), "last_picks": self._last_picks, "drift_LE": self._drift_LE,
                "gates_LTK": self._gates_LTK, "latest": dict(self.latest),
            }  # fmt: skip
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`; most of it when training starts, if site and probe are still the same."""
        self._validations, self.other_views_step = state_dict["validations"], state_dict.get("other_views_step")
        self.looked_step = state_dict.get("looked_step")
        self._resumed = state_dict if "of" in state_dict else None

    def _of(self) -> tuple[Any, ...]:
        """What picks depend on besides the weights: sites, resident experts, the probe; and the statistics' names."""
        names = [statistic.name for statistic in self.own_statistics]
        residency = observed_module(self._module).transformer.residency
        n_sites = observed_strategy(self._trainer).topology.n_sites
        text = None if self._probe is None else self._probe.text()
        return n_sites, residency.routing, residency.experts, text, *names

    def _go_on(self, state: dict[str, Any]) -> None:
        health = observed_module(self._module).routing_health
        health.load_states(state["health"].to(health.load_LE.device))
        self._history.load_state_dict(state["history"])
        self._last_picks, self._drift_LE = state["last_picks"], state["drift_LE"]
        self._gates_LTK = state["gates_LTK"]
        self.latest |= state["latest"]


def stability_of(trainer: Trainer) -> RoutingStability | None:
    """The trainer's `RoutingStability`, if it has one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, RoutingStability)), None)


def _is_last_validation(trainer: Trainer) -> bool:
    """Whether training ends with this one: a run always validates at its end."""
    return bool(trainer.should_stop)
