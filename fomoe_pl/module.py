"""The LightningModule: loss and metrics of training and of validation. Of other sites it asks its `SiteContext`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fomoe_pl.checkpoint.loading import hyper_parameters, load_global_model
from fomoe_pl.errors import ConfigError, check_range, check_seed
from fomoe_pl.federation.report import check_skipped
from fomoe_pl.metrics import RoutingHealth, Statistic, ValidationMetrics
from fomoe_pl.metrics.validation import OWN_VIEW_GAP
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.losses import IGNORED
from fomoe_pl.model.passes import TrainingPass
from fomoe_pl.model.residency import resident_mask
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.optimizer import OptimizerConfig, clip_next_step, inner_optimizer, inner_schedule, norm_or_skip
from fomoe_pl.seed import seed_or_default
from fomoe_pl.training.context import SiteContext, context
from fomoe_pl.training.shortcuts import Passes

Batch = dict[str, Tensor]


class FoMoEModule(L.LightningModule):
    """A mixture-of-experts language model in training.

    Args:
        architecture: The model.
        optimizer: Inner optimizer and schedule.
        seed: Seed of the initial weights; with equal seeds all sites and all placements start from the same model.
            None: that of `seed_everything`, else 0.
        evaluation_window: Validation batches that go through each layer together. When experts are gathered from
            other sites, a layer is fetched once a window; larger means fewer bytes and more activations in memory: one
            window of hidden states, two where random routing is measured too.
        max_skipped_steps: Optimizer steps that all sites together may skip because gradients are not finite; one more
            stops the run.
        compile_blocks: Run the blocks as compiled code (torch.compile): faster on a GPU, after some ten seconds of
            compilation in the first step.
        cuda_graphs: Record a training step's forward and backward pass on a GPU and replay it from then on: the GPU
            does not wait for Python. What a step needs of memory stays reserved while sites average. Where that cannot
            be, a line at the start says why.
        bf16_gradients: With `precision: bf16-mixed`, give experts bfloat16 gradients, and bfloat16 copies of their
            weights that last, where our kernels run them and each step is one backward pass of the site's own. false:
            their gradients are float32, and copies are made in each step.
    """

    def __init__(
        self,
        architecture: ModelConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  frozen
        seed: int | None = None,
        evaluation_window: int = 64,
        max_skipped_steps: int = 100,
        compile_blocks: bool = False,
        cuda_graphs: bool = True,
        bf16_gradients: bool = True,
    ) -> None:
        super().__init__()
        check_range("model.max_skipped_steps", max_skipped_steps, "100 is the default", least=0)
        check_range("model.evaluation_window", evaluation_window, "64 batches are the default", least=1)
        check_seed("model.seed", seed)
        self.config = architecture
        self.optimizer_config = optimizer
        self.seed = seed_or_default(seed)
        self.compile_blocks, self.cuda_graphs, self.bf16_gradients = compile_blocks, cuda_graphs, bf16_gradients
        self.evaluation_window = evaluation_window
        self.save_hyperparameters(
            {"architecture": asdict(architecture), "optimizer": asdict(optimizer), "seed": self.seed}
        )
        self.model: Transformer | None = None
        self.routing_health = RoutingHealth(architecture.n_layers, architecture.n_experts)
        self.statistics: tuple[Statistic, ...] = ()  # that callbacks ask for
        self.watches_routing = False
        self.tokens_seen = 0
        self.tokens_of_all_sites = 0
        self.validation_before_training: dict[str, float] = {}  # with `num_sanity_val_steps`
        self._window: list[Batch] = []
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0  # of this site, up to the last time that they were counted
        self._loss_sum: Tensor | None = None
        self._loss_count: Tensor | None = None
        self._skipped: Tensor | None = None
        self._grad_norm: Tensor | None = None
        self._steps_counted = 0
        self._loads_LE: Tensor | None = None
        self._picks_LE: Tensor | None = None
        self._passes: Passes | None = None
        self._validation: ValidationMetrics | None = None
        self.measures_other_views = False
        self.domain_load_LNE: Tensor | None = None

    @property
    def site(self) -> SiteContext:
        """The `SiteContext` of the run."""
        return context(self.trainer)

    @property
    def transformer(self) -> Transformer:
        """The built model."""
        assert self.model is not None, "configure_model has not run"
        return self.model

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, map_location: Any = None, **settings: Any
    ) -> FoMoEModule:
        """A module with the whole global model of a checkpoint, to validate it or to use it.

        Args:
            checkpoint_path: Folder that a run has saved.
            map_location: Device of the model; None is the CPU.
            **settings: Of the module, in the place of those it was trained with.

        Raises:
            ConfigError: If it is no complete checkpoint.
        """
        saved = hyper_parameters(checkpoint_path)
        found = {
            "architecture": ModelConfig(**saved["architecture"]),
            "optimizer": OptimizerConfig(**saved["optimizer"]),
            "seed": saved["seed"],
        }
        module = cls(**{**found, **settings})
        module.model = load_global_model(checkpoint_path)
        return module if map_location is None else module.to(map_location)

    def configure_model(self) -> None:
        """Build the model with this site's residents only; Lightning calls it once the processes are joined.

        Raises:
            RuntimeError: If it is there already and holds other experts than this site.
        """
        residency = self.site.residency(self.config)
        if self.model is None:
            self.model = Transformer(self.config, residency, seed=self.seed)
            if self.compile_blocks:
                self.model.compile_blocks()
        elif self.model.residency != residency:
            raise RuntimeError("this FoMoEModule has a model with other experts than this site is to hold: it was run "
                               "by another strategy, or loaded whole. Make a new FoMoEModule, and give ckpt_path for "
                               "what was trained")  # fmt: skip

    def on_train_start(self) -> None:
        """Set up schedule, recorded passes and copies; a resumed run of another length has another schedule.

        Raises:
            RuntimeError: If the model was trained before, and no checkpoint says how it goes on.
        """
        if self.tokens_seen and not self.trainer.ckpt_path:
            raise RuntimeError("this FoMoEModule has been trained: another `fit` would begin with fresh moments, a new "
                               "schedule and the first documents. Give ckpt_path to go on, or make a new FoMoEModule"
                               )  # fmt: skip
        for block in self.transformer.layers:
            block.moe.router.measures_entropy = self.watches_routing
        if self._passes is not None:  # of a run that was interrupted
            self._passes.close()
        several = self.site.topology.n_ranks > 1
        self._passes = Passes(
            self.trainer, self, self.transformer, graphs=self.cuda_graphs, bf16_gradients=self.bf16_gradients,
            statistics=self.statistics,
            sum_loads=self.site.sum_in_site if self.config.balance == "aux_loss" and several else None,
        )  # fmt: skip
        for configured in self.trainer.lr_scheduler_configs:
            schedule = cast(LambdaLR, configured.scheduler)
            for group, base, factor in zip(
                schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(schedule.last_epoch)

    def on_train_end(self) -> None:
        """Free the memory of a recorded step, and of copies."""
        if self._passes is not None:
            self._passes.close()
            self._passes = None

    # -- training -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy plus the router's losses on one micro-batch."""
        inputs_BS, targets_BS = batch["inputs"], batch["targets"]
        assert self._passes is not None, "training has not started"
        done = self._passes(inputs_BS, targets_BS)
        self._observe(done, inputs_BS.numel())
        if self._logs_after(self.trainer.global_step + 1):
            # Not `prog_bar=True`: Lightning would read it, and so wait for the GPU, after every step; our bar reads it
            # when it is drawn.
            losses = self.site.sum_in_site(torch.stack([done.loss, done.balance, done.z])) / self.site.topology.n_ranks
            self.log("train/loss", losses[0])
            self.log("train/balance_loss", losses[1])
            if self.config.z_loss_weight:
                self.log("train/z_loss", losses[2])
        return done.total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward pass; a recorded pass has already computed the gradients."""
        if self._passes is None or not self._passes.backward():
            super().backward(loss, *args, **kwargs)

    def _logs_after(self, steps: int) -> bool:
        # Lightning writes at these steps alone, but in every step `log` copies tensors, and numbers to the device: for
        # each of them the host waits until the GPU has caught up.
        every: int = cast(Any, self.trainer).log_every_n_steps
        return every > 0 and steps % every == 0

    @torch.no_grad()
    def _observe(self, done: TrainingPass, tokens: int) -> None:
        finite = done.loss.isfinite()
        summand, one = torch.where(finite, done.loss, 0.0).double(), finite.double()
        self._loss_sum = summand if self._loss_sum is None else self._loss_sum + summand
        self._loss_count = one if self._loss_count is None else self._loss_count + one
        topology = self.site.topology
        of_site = tokens * topology.n_ranks
        self.tokens_seen += of_site
        self.tokens_of_all_sites += self.site.tokens_of_all(of_site)
        if self.watches_routing:
            assert done.gate_entropy_L is not None, "routers measure what is watched, from the start of training on"
            residency = self.transformer.residency
            resident_LE = resident_mask(residency, self.config.n_experts, done.load_LE.device)
            scored_LE = resident_LE if residency.routing == "partitioned" else None
            self.routing_health.update(
                done.load_LE, done.gate_entropy_L, done.picks, scored_LE, resident_LE, done.sums_NL, tokens
            )
        if self.config.balance == "bias":
            self._loads_LE = done.load_LE if self._loads_LE is None else self._loads_LE + done.load_LE
        if self.site.sees_loads:
            self._picks_LE = self.loads() + done.load_LE

    def watch_routing(self) -> None:
        """Sum training steps in `routing_health`; called when training starts."""
        self.watches_routing = True

    def measure_other_views(self) -> None:
        """Have the next validation measure random routing and own views too: two more passes over its text."""
        self.measures_other_views = True

    def watch_statistics(self, statistics: Sequence[Statistic]) -> None:
        """Have training passes sum these in `routing_health` too; called before training starts."""
        names = tuple(statistic.name for statistic in statistics)
        if names != self.routing_health.names:
            health = RoutingHealth(self.config.n_layers, self.config.n_experts, names)
            self.routing_health = health.to(self.routing_health.load_LE.device)
        self.statistics = tuple(statistics)

    def loads(self) -> Tensor:
        """Picks of each expert on this site since experts were last placed, float32 (L, E)."""
        if self._picks_LE is None:
            return torch.zeros(self.config.n_layers, self.config.n_experts, device=self.device)
        return self._picks_LE

    def set_loads(self, loads_LE: Tensor) -> None:
        """Restore `loads`."""
        self._picks_LE = loads_LE.to(self.device)

    def pop_loads(self) -> Tensor:
        """Return `loads` and reset them."""
        loads_LE, self._picks_LE = self.loads(), None
        return loads_LE

    def pop_round_losses(self) -> tuple[float, float]:
        """Sum of the finite training losses since the last call, and their number."""
        losses = self.round_losses()
        self._loss_sum = self._loss_count = None
        return losses

    def round_losses(self) -> tuple[float, float]:
        """What `pop_round_losses` would return, for a checkpoint in mid-round."""
        if self._loss_sum is None or self._loss_count is None:
            return 0.0, 0.0
        return float(self._loss_sum), float(self._loss_count)

    def set_round_losses(self, losses: tuple[float, float]) -> None:
        """Restore `round_losses`."""
        if losses[1]:
            self._loss_sum, self._loss_count = torch.tensor(losses, dtype=torch.float64, device=self.device)

    def round_steps(self) -> tuple[int, int]:
        """What `count_skipped` would return, for a checkpoint in mid-round."""
        return (0 if self._skipped is None else int(self._skipped)), self._steps_counted

    def set_round_steps(self, steps: tuple[int, int]) -> None:
        """Restore `round_steps`."""
        self._skipped, self._steps_counted = torch.tensor(steps[0], device=self.device), steps[1]

    def count_skipped(self) -> tuple[int, int]:
        """Optimizer steps that this site skipped since the last call, and all of them; waits for the device."""
        skipped, steps = self.round_steps()
        self._skipped, self._steps_counted = None, 0
        self.skipped_steps += skipped
        return skipped, steps

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average gradients inside the site; skip the step if they are not finite; log; update the balance bias."""
        self.site.average_gradients(optimizer)
        norm = self._grad_norm = norm_or_skip(optimizer, self.site.total_of_slices)
        bad = ~norm.isfinite()
        self._skipped = bad.long() if self._skipped is None else self._skipped + bad
        self._steps_counted += 1
        if self._logs_after(self.trainer.global_step + 1):
            self.log("train/grad_norm", norm)
            # The same factor in every group, whatever CompleteP's scale of it is.
            group = optimizer.param_groups[0]
            self.log("train/learning_rate", self.optimizer_config.lr * group["lr"] / group["initial_lr"])
        if self._loads_LE is not None:
            loads_LE = self.site.reduce_loads(self._loads_LE)
            self.transformer.update_balance_bias(list(loads_LE * ~bad))  # equal loads move nothing
            self._loads_LE = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that was already computed: computing it reads all gradients."""
        if gradient_clip_algorithm not in (None, "norm"):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_next_step(optimizer, cast(Tensor, self._grad_norm), gradient_clip_val)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log token counts; stop here if asked to."""
        if self._logs_after(self.trainer.global_step):
            self.log("tokens/site", float(self.tokens_seen))
            self.log("tokens/global", float(self.tokens_of_all_sites))
            # Where there are rounds, sites count their skipped steps with them.
            if not self.site.has_rounds and self.count_skipped()[0]:
                check_skipped([self.skipped_steps], self.max_skipped_steps)
        self.site.stop_if_asked()

    def on_train_epoch_end(self) -> None:
        """Stop here if a callback asked for it."""
        self.site.hold_stop()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the token counts."""
        checkpoint["tokens_seen"], checkpoint["tokens_of_all_sites"] = self.tokens_seen, self.tokens_of_all_sites

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the token counts."""
        self.tokens_seen, self.tokens_of_all_sites = checkpoint["tokens_seen"], checkpoint["tokens_of_all_sites"]

    def configure_optimizers(self) -> Any:
        """Inner optimizer and its schedule."""
        cfg = self.optimizer_config
        optimizer = inner_optimizer(self.transformer, cfg)
        last = self.trainer.max_steps if self.trainer.max_steps > 0 else None
        schedule = inner_schedule(optimizer, cfg, last, self.site.pace)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- validation of the global model ---------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Reset the sums; free a recorded step's memory for the validation."""
        self.make_room()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._validation = ValidationMetrics(data.domains, self.config.n_layers, self.config.n_experts, self.device)
        # Re-seeded, so that every validation draws the same.
        self._random = torch.Generator(self.device).manual_seed(self.seed)

    def make_room(self) -> None:
        """Free a recorded step's memory, for evaluations between two steps."""
        if self._passes is not None:
            self._passes.release()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect batches; a full window goes through the model layer by layer."""
        if missing := {"inputs", "targets", "domain", "bytes"} - batch.keys():
            hint = "give bytes (B, S) of the text behind each target and domain (B,), or set limit_val_batches to 0"
            raise ConfigError("val_dataloaders", sorted(batch), f"a batch has no {', '.join(sorted(missing))}", hint)
        self._window.append(batch)
        if len(self._window) == self.evaluation_window:
            self._evaluate_window()

    @torch.no_grad()
    def _evaluate_window(self) -> None:
        model, metric = self.transformer, self._validation
        assert metric is not None
        others = self.measures_other_views
        skips = others and not model.residency.is_full(self.config)
        with self.trainer.precision_plugin.val_step_context():
            streams = [model.embed(batch["inputs"]) for batch in self._window]
            # Before other experts arrive, and batch by batch: only the losses of a site's own view are kept.
            own: list[Tensor] = []
            for x_BSD, batch in zip(streams, self._window, strict=True) if skips else ():
                own.append(self._losses(self._own_view(x_BSD), batch))
            random = list(streams) if others else []
            for layer, block in enumerate(model.layers):
                with self.site.all_experts_of(layer):
                    for i in range(len(streams)):  # in place: of each view one window of hidden states, not two
                        streams[i], stats = block(streams[i])
                        counted_BS = self._window[i]["targets"] != IGNORED
                        domain_BS = torch.where(counted_BS, self._window[i]["domain"][:, None], -1)
                        metric.loads.update(layer, block.moe.router.expert_ids(stats.picks_TK), domain_BS.flatten())
                    with block.moe.router.at_random(self._random):
                        for i in range(len(random)):
                            random[i] = block(random[i])[0]
            for i, batch in enumerate(self._window):
                losses_BS = self._losses(streams[i], batch)
                metric.language.update(losses_BS, batch["targets"], batch["domain"], batch["bytes"])
                if others:
                    own_BS = own[i] if skips else losses_BS
                    metric.views.update(losses_BS, self._losses(random[i], batch), own_BS, batch["targets"])
        self._window.clear()

    def _own_view(self, x_BSD: Tensor) -> Tensor:
        for block in self.transformer.layers:
            x_BSD = block(x_BSD)[0]
        return x_BSD

    def _losses(self, x_BSD: Tensor, batch: Batch) -> Tensor:
        return self.transformer.token_losses(self.transformer.finish(x_BSD), batch["targets"])

    def on_validation_epoch_end(self) -> None:
        """Sum over sites in one message, then log the same values everywhere."""
        if self._window:
            self._evaluate_window()
        metric = self._validation
        assert metric is not None
        metric.load_states(self.site.sum_over_sites(metric.states(), "evaluation"))
        computed = metric.compute(with_views=self.measures_other_views)
        if self.transformer.residency.is_full(self.config):
            computed.pop(OWN_VIEW_GAP, None)  # a full replica's view is the global model
        values = {f"val/{name}": float(value) for name, value in computed.items()}
        self.domain_load_LNE = metric.loads.load_LNE.cpu()
        if self.trainer.sanity_checking:  # Lightning logs nothing then, but it is where the curve starts
            # On a part of the text it would not belong to that curve.
            if self.trainer.num_sanity_val_batches == self.trainer.num_val_batches:
                self.validation_before_training = values
                for logger in self.loggers:
                    logger.log_metrics(values, step=0)
        else:
            self.log_dict(values)
        self._validation, self.measures_other_views = None, False
