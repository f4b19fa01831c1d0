"""What partial replicas cost in quality: measurements with their sources. Anything else is unknown."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe_pl.model.residency import Routing


@dataclass(frozen=True)
class Measurement:
    """A run against one with full replicas, all else equal; the latter is in the table too, as the reference.

    Attributes:
        source: Where the numbers are.
        model: Which was trained.
        method: `local_adamw`, `diloco` or `local_sgd`.
        routing: The routing mode.
        sites: Number of sites M.
        overlap: Sites that hold each expert; all of them for full replicas, for which the routing does not matter.
        local_steps: K.
        metric: `perplexity` or `bits per byte`, of the global model.
        value: Of this run.
        full: Of the full replicas.
    """

    source: str
    model: str
    method: str
    routing: Routing
    sites: int
    overlap: int
    local_steps: int
    metric: str
    value: float
    full: float

    @property
    def penalty(self) -> float:
        """How much worse the metric is, as a share of the full replicas'."""
        return self.value / self.full - 1


PAPER = "arXiv 2606.19025, table 6"
# LocalAdamW, fixed placement, partitioned routing, 54M: {(K, M): {overlap: perplexity}}.
_TABLE_6 = {
    (32, 2): {1: 111.45, 2: 105.03},
    (32, 4): {1: 121.42, 2: 112.00, 4: 103.91},
    (32, 8): {1: 135.74, 2: 122.49, 4: 114.69, 8: 106.91},
    (64, 2): {1: 112.38, 2: 104.70},
    (64, 4): {1: 130.79, 2: 119.53, 4: 104.47},
    (64, 8): {1: 141.48, 2: 132.39, 4: 121.36, 8: 112.99},
    (128, 4): {1: 143.72, 2: 123.50, 4: 111.89},
    (128, 8): {1: 181.07, 2: 156.84, 4: 138.88, 8: 159.71},
}
# DiLoCo's outer step, otherwise the same.
_TABLE_6_DILOCO = {
    (32, 4): {1: 142.94, 2: 130.58, 4: 137.27},
    (32, 8): {1: 168.39, 2: 149.95, 4: 145.17, 8: 145.64},
}
OWN = "docs/benchmarks/strategies_cpu_2026-11-24.md"
# The quickstart's model and data, M = 4, K = 8: (method, routing, overlap, bits per byte, of the full replicas).
_OWN: list[tuple[str, Routing, int, float, float]] = [
    ("local_adamw", "ghost", 4, 2.669, 2.669),
    ("diloco", "ghost", 4, 3.434, 3.434),
    ("local_adamw", "ghost", 2, 2.840, 2.669),
    ("local_adamw", "ghost", 1, 3.023, 2.669),
    ("local_adamw", "partitioned", 2, 2.823, 2.669),
    ("diloco", "ghost", 2, 3.615, 3.434),
]

MEASUREMENTS: tuple[Measurement, ...] = (
    *(
        Measurement(PAPER, "54M", method, "partitioned", m, overlap, k, "perplexity", value, row[m])
        for method, table in (("local_adamw", _TABLE_6), ("diloco", _TABLE_6_DILOCO))
        for (k, m), row in table.items()
        for overlap, value in row.items()
    ),
    *(
        Measurement(OWN, "0.8M", method, routing, 4, overlap, 8, "bits per byte", value, full)
        for method, routing, overlap, value, full in _OWN
    ),
)


def measured_quality(
    *, method: str, routing: Routing, sites: int, overlap: int, local_steps: int, wire_dtype: str = "float32"
) -> Measurement | None:
    """The measurement for these settings; None if there is none.

    Args:
        method: `local_adamw`, `diloco`, `local_sgd` or `ddp`.
        routing: The routing mode.
        sites: Number of sites M.
        overlap: Sites that hold each expert.
        local_steps: K.
        wire_dtype: dtype on the wire; all measurements are of float32.
    """
    if wire_dtype != "float32":
        return None
    wanted = (method, sites, overlap, local_steps)
    for m in MEASUREMENTS:
        if (m.method, m.sites, m.overlap, m.local_steps) == wanted and (m.routing == routing or overlap == sites):
            return m
    return None
