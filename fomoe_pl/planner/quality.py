"""What partial replicas cost in quality: measurements with their sources. Anything else is unknown."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe_pl.model.residency import Routing


@dataclass(frozen=True)
class Measurement:
    """A run against one with full replicas, all else equal: copies refreshed and moments averaged every round.

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
        penalty: How much worse that is than full replicas', as a share of theirs: 0 for those, the reference.
        shadow_bits: Of a number in a copy, with shadow routing.
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
    penalty: float
    shadow_bits: int | None = None


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
STUDIES = "docs/quality.md"
# Its four sites with equal data (iid), K = 32: (study, routing, overlap, bits per byte, penalty over seeds, bits).
_STUDIES: list[tuple[str, Routing, int, float, float, int | None]] = [
    ("16m_long", "shadow", 2, 1.2122, 0.027, 4),
    ("16m_long", "shadow", 1, 1.2545, 0.063, 4),
    ("16m_long", "ghost", 2, 1.2521, 0.061, None),
    ("16m", "ghost", 1, 1.5152, 0.133, None),
    ("16m", "shadow", 2, 1.4000, 0.047, 2),
]

MEASUREMENTS: tuple[Measurement, ...] = (
    *(
        Measurement(PAPER, "54M", method, "partitioned", m, overlap, k, "perplexity", value, value / row[m] - 1)
        for method, table in (("local_adamw", _TABLE_6), ("diloco", _TABLE_6_DILOCO))
        for (k, m), row in table.items()
        for overlap, value in row.items()
    ),
    *(
        Measurement(OWN, "0.8M", method, routing, 4, overlap, 8, "bits per byte", value, value / full - 1)
        for method, routing, overlap, value, full in _OWN
    ),
    *(
        Measurement(STUDIES, study, "local_adamw", routing, 4, overlap, 32, "bits per byte", value, penalty, bits)
        for study, routing, overlap, value, penalty, bits in _STUDIES
    ),
)


def measured_quality(
    *, method: str, routing: Routing, sites: int, overlap: int, local_steps: int, wire_dtype: str = "float32",
    moments_every: int = 1, shadow_bits: int = 4, shadow_refresh: int = 1, turns: bool = False,
) -> Measurement | None:  # fmt: skip
    """The measurement for these settings; None if there is none.

    Args:
        method: `local_adamw`, `diloco`, `local_sgd` or `ddp`.
        routing: The routing mode.
        sites: Number of sites M.
        overlap: Sites that hold each expert.
        local_steps: K.
        wire_dtype: Format on the wire; all measurements are of float32.
        moments_every: Rounds between two averages of the moments; all measurements are of every round.
        shadow_bits: Bits of a number in a copy, with shadow routing.
        shadow_refresh: Rounds between two refreshes of the copies; all measurements are of every round.
        turns: Whether fragments take turns, or averages are applied later; no measurement is of such a run.
    """
    copied = routing == "shadow" and overlap < sites
    if wire_dtype != "float32" or moments_every != 1 or turns or (copied and shadow_refresh != 1):
        return None
    bits = shadow_bits if copied else None
    wanted = (method, sites, overlap, local_steps)
    for m in MEASUREMENTS:
        alike = (m.routing, m.shadow_bits) == (routing, bits) or overlap == sites
        if (m.method, m.sites, m.overlap, m.local_steps) == wanted and alike:
            return m
    return None
