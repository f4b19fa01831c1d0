"""Health of the routing: how evenly experts are chosen, and how many choices are lost to ghosts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fomoe_pl.metrics.flat import FlatSumMetric

STARVED_BELOW = 0.1
"""An expert is starved when its load is below this part of the mean load."""


def load_entropy(load_LE: Tensor, scored_LE: Tensor) -> Tensor:
    """Entropy of the shares of the load, over log n: 1 = even, 0 = everything to one expert.

    The FoMoE paper (arXiv 2606.19025) reports entropy without a formula; this is the entropy of the aggregate load
    f, `-sum f_i log f_i / log n`, not the mean entropy of single tokens' gates.

    Args:
        load_LE: Picks of each expert; L layers, E experts. 0 where not scored.
        scored_LE: Bool, the n experts of a layer that could be picked.

    Returns:
        (L,). 1 where n is 1, NaN where nothing was picked.
    """
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True)
    entropy_L = -torch.special.xlogy(share_LE, share_LE).sum(dim=1)
    n_L = scored_LE.sum(dim=1)
    # A single expert is even, but 0/0 by the formula. Adding 0 times its entropy keeps NaNs.
    return torch.where(n_L > 1, entropy_L / torch.log(n_L.double().clamp(min=2)), 1 + 0 * entropy_L)


def load_cv(load_LE: Tensor, scored_LE: Tensor) -> Tensor:
    """Coefficient of variation of the load, standard deviation over mean: 0 = even, sqrt(n - 1) = all to one.

    After Shazeer et al. 2017 (arXiv 1701.06538), whose balance loss is its square; standard deviation of the
    population (divided by n).

    Args:
        load_LE: Picks of each expert; L layers, E experts. 0 where not scored.
        scored_LE: Bool, the n experts of a layer that could be picked.

    Returns:
        (L,). NaN where nothing was picked.
    """
    n_L = scored_LE.sum(dim=1)
    mean_L = load_LE.sum(dim=1) / n_L
    deviation_LE = (load_LE - mean_L[:, None]) * scored_LE
    return torch.sqrt(deviation_LE.square().sum(dim=1) / n_L) / mean_L


def max_violation(load_LE: Tensor, scored_LE: Tensor) -> Tensor:
    """MaxVio, `max(load) / mean(load) - 1`: 0 = even, n - 1 = everything to one expert.

    Wang et al. 2024 (arXiv 2408.15664, section 4.1).

    Args:
        load_LE: Picks of each expert; L layers, E experts. 0 where not scored.
        scored_LE: Bool, the n experts of a layer that could be picked.

    Returns:
        (L,). NaN where nothing was picked.
    """
    mean_L = load_LE.sum(dim=1) / scored_LE.sum(dim=1)
    return load_LE.amax(dim=1) / mean_L - 1


def starved_experts(load_LE: Tensor, scored_LE: Tensor) -> Tensor:
    """Number of scored experts with less than a tenth of the mean load (this project's threshold).

    Args:
        load_LE: Picks of each expert; L layers, E experts. 0 where not scored.
        scored_LE: Bool, the n experts of a layer that could be picked.

    Returns:
        (L,). NaN where nothing was picked.
    """
    mean_L1 = (load_LE.sum(dim=1) / scored_LE.sum(dim=1))[:, None]
    starved_LE = scored_LE & (load_LE < STARVED_BELOW * mean_L1)
    return torch.where(mean_L1[:, 0] > 0, starved_LE.sum(dim=1).double(), torch.nan)


def ghost_fraction(live_L: Tensor, picks: Tensor) -> Tensor:
    """Share of the picks that no resident expert executed: 1 - sigma_st of arXiv 2606.19025, section 4.1.

    Args:
        live_L: Executed picks of each layer.
        picks: All picks of one layer, 0-dim.

    Returns:
        (L,). NaN where nothing was picked.
    """
    return 1 - live_L / picks


class RoutingHealth(FlatSumMetric):
    """Evenness of the load, with and without ghosts, gate entropy and ghost fraction, by layer and averaged.

    Over the sum of all updates since the last reset, so over a batch, a round or a validation set, and after a
    reduction over the picks of all sites. Ghosts' picks belong to the load: it describes what the router chose.
    The statistics with `live_` are over the picks that were executed, by the experts that at least one update of one
    rank had.

    In partitioned routing a site's load of non-residents is zero because the router never sees them. The statistics
    are over the scored experts: those that at least one update (of one rank) could pick.

    Args:
        n_layers: Number of MoE layers L.
        n_experts: Number of routed experts E of a layer.
        names: Of the N custom statistics that are summed over tokens.

    Attributes:
        resets: How often the sums were reset.
    """

    load_LE: Tensor
    live_LE: Tensor
    scored_LE: Tensor
    resident_LE: Tensor
    gate_entropy_L: Tensor
    picks: Tensor

    sums_NL: Tensor
    tokens: Tensor

    def __init__(self, n_layers: int, n_experts: int, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = tuple(names)
        for name in ("load_LE", "live_LE", "scored_LE", "resident_LE"):
            self.add_sum(name, (n_layers, n_experts))
        self.add_sum("gate_entropy_L", (n_layers,))
        self.add_sum("picks", ())
        if names:
            self.add_sum("sums_NL", (len(names), n_layers))
            self.add_sum("tokens", ())
        self.resets = 0

    def reset(self) -> None:
        """Reset all sums."""
        super().reset()
        self.resets += 1

    def executed(self) -> tuple[float, float]:
        """Return the picks that were executed, summed over layers, and all picks of one layer; one wait for a GPU."""
        live, picks = torch.stack([self.live_LE.sum(), self.picks]).tolist()
        return live, picks

    def update(
        self,
        load_LE: Tensor,
        gate_entropy_L: Tensor,
        picks: int,
        scored_LE: Tensor | None = None,
        resident_LE: Tensor | None = None,
        sums_NL: Tensor | None = None,
        tokens: int = 0,
    ) -> None:
        """Add one forward pass. All layers at once: single layers would cost L times the kernel launches.

        Args:
            load_LE: Picks of each expert, those of ghosts included; of any number type.
            gate_entropy_L: Mean over tokens of the entropy of the normalised scores, over the log of their number.
            picks: All picks of one layer (tokens times choices), the same in each.
            scored_LE: Bool, the experts that the router could pick; None = all.
            resident_LE: Bool, the experts that execute their picks; None = all.
            sums_NL: Of each named statistic the sum over tokens; None where there are none.
            tokens: How many they are.
        """
        self.load_LE = self.load_LE + load_LE
        self.live_LE = self.live_LE + (load_LE if resident_LE is None else load_LE * resident_LE)
        self.scored_LE = self.scored_LE + (1 if scored_LE is None else scored_LE)
        self.resident_LE = self.resident_LE + (1 if resident_LE is None else resident_LE)
        self.gate_entropy_L = self.gate_entropy_L + gate_entropy_L * picks
        self.picks = self.picks + picks
        if sums_NL is not None:
            self.sums_NL = self.sums_NL + sums_NL
            self.tokens = self.tokens + tokens

    def ghost_share(self) -> Tensor:
        """Return the share of each expert's own picks that was skipped, (L,E) on the CPU; NaN where it has none."""
        load_LE = self.load_LE.cpu()
        return 1 - self.live_LE.cpu() / load_LE

    def named(self) -> dict[str, Tensor]:
        """Return the mean over tokens of each named statistic, float64 (L,) on the CPU; NaN without tokens."""
        if not self.names:
            return {}
        return dict(zip(self.names, self.sums_NL.cpu() / self.tokens.cpu(), strict=True))

    def by_layer(self) -> dict[str, Tensor]:
        """Return each statistic, float64 (L,) on the CPU.

        Statistics: `load_entropy`, `load_cv`, `max_violation`, `starved_experts` (a number of experts, of the
        mean layer), each also with `live_`; `gate_entropy`; `ghost_fraction` and `ghost_excess`, which is the
        fraction less 1 - residents / scored experts, what even routing would skip (1 - overlap / M with ghosts).
        All are NaN while nothing was picked.
        """
        # One copy to the CPU here instead of one for each of the many values when they are logged.
        load_LE, live_LE, picks = self.load_LE.cpu(), self.live_LE.cpu(), self.picks.cpu()
        scored_LE, resident_LE = self.scored_LE.cpu(), self.resident_LE.cpu()
        skipped_L = ghost_fraction(live_LE.sum(dim=1), picks)
        statistics = {
            "gate_entropy": self.gate_entropy_L.cpu() / picks,
            "ghost_fraction": skipped_L,
            "ghost_excess": skipped_L - (1 - resident_LE.sum(dim=1) / scored_LE.sum(dim=1)),
        }
        for prefix, counted_LE, could_LE in (("", load_LE, scored_LE > 0), ("live_", live_LE, resident_LE > 0)):
            for function in (load_entropy, load_cv, max_violation, starved_experts):
                statistics[prefix + function.__name__] = function(counted_LE, could_LE)
        return statistics

    def compute(self) -> dict[str, Tensor]:
        """Return `<statistic>` (mean of the layers) and `<statistic>/layer_<i>`, 0-dim float64 tensors on the CPU.

        Statistics as in `by_layer`.
        """
        statistics = self.by_layer()
        values = {name: value_L.mean() for name, value_L in statistics.items()}
        for name, value_L in statistics.items():
            values |= {f"{name}/layer_{layer}": value for layer, value in enumerate(value_L)}
        return values
