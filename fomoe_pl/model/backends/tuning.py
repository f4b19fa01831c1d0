"""Tiles of the kernels' products: found by sweeps on an H100, cut to the rows, channels and shared memory there are."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

DESCRIPTORS_FROM = (9, 0)
"""Compute capability from which on a copy engine fetches whole tiles, and products read them where they arrive."""


class Tiles(NamedTuple):
    """Tile of a product: rows, columns, summands a step, and how many warps and pipeline stages make it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None  # the most of a thread, so that another program fits next to it


class Tuning(NamedTuple):
    """Tiles of the five products. For swiglu `up` has two accumulators of rows × columns."""

    up: Tiles
    down: Tiles
    down_backward: Tiles
    up_backward: Tiles
    weights: Tiles


TUNED = {
    2: Tuning(
        up=Tiles(128, 128, 32, 8, 5),
        down=Tiles(128, 256, 64, 8, 4),
        down_backward=Tiles(64, 128, 64, 8, 3, registers=128),
        up_backward=Tiles(128, 256, 64, 8, 4),
        weights=Tiles(128, 256, 64, 8, 5),
    ),
    4: Tuning(*[Tiles(64, 64, 32, 4, 3)] * 5),
}
"""By the bytes of a number. Found by sweeps on an H100 (docs/benchmarks), with swiglu.

Of two bytes: a tile of 128 × 256 float32 accumulators fills the registers of 8 warps, and its program has a
multiprocessor for itself; that is fastest where a product is all there is (`down`, `up_backward`, `weights`). So it is
for `up`, whose two accumulators of 128 × 128 are as many; short steps there leave room for five stages of gathered
rows. `down_backward` reads and writes five numbers beside each sum: a quarter of the tile with half the registers lets
a second program compute while one waits for memory. Of four bytes: for tests and small models, not swept.
"""


def up_to_power(n: int, least: int = 1) -> int:
    """The smallest power of two that is not below n and least."""
    return max(least, 1 << (n - 1).bit_length())


@lru_cache(maxsize=64)
def tuned(
    itemsize: int, d_model: int, d_expert: int, rows_per_expert: int, *, shared_bytes: int, capability: tuple[int, int]
) -> Tuning:
    """Tiles for these sizes: no larger than what there is, and as many stages, then columns, as fit.

    Rows stay: a tile of fewer would read its expert's weights more often. That the result fits is checked by compiling
    for each generation (tests).

    Args:
        itemsize: Bytes of a number.
        d_model: D.
        d_expert: F.
        rows_per_expert: Picks of an expert, ghosts' picks included: how many are live is known on the device alone.
        shared_bytes: Shared memory that a program may have.
        capability: Compute capability of the GPU.
    """
    descriptors = capability >= DESCRIPTORS_FROM
    # Before, a step's blocks are in registers while they are multiplied, and one stage less is in shared memory.
    at_work = 0 if descriptors else 1

    def fit(tiles: Tiles, rows: int, columns: int, depth: int, accumulators: int = 1, of_numbers: int = 0) -> Tiles:
        # The first `of_numbers` stages hold no blocks, but the tokens' numbers by which their rows are fetched.
        most = [up_to_power(n, 16) for n in (rows, columns, depth)]
        tiles = tiles._replace(
            rows=min(tiles.rows, most[0]), columns=min(tiles.columns, most[1]), depth=min(tiles.depth, most[2])
        )
        while True:
            block = (tiles.rows + accumulators * tiles.columns) * tiles.depth * itemsize
            # A descriptor's kernel writes a tile, half of it at a time, while it fetches the blocks of the next.
            written = tiles.rows * tiles.columns * itemsize // 2 if descriptors and not of_numbers else 0
            # 16 columns are the least of a product: what does not fit then is for the compiler to say.
            if (tiles.stages - at_work - of_numbers) * block + written <= shared_bytes or tiles.columns <= 16:
                return tiles
            if tiles.stages > 2 + of_numbers:
                tiles = tiles._replace(stages=tiles.stages - 1)
            else:
                tiles = tiles._replace(columns=tiles.columns // 2)

    tuning = TUNED[itemsize]
    return Tuning(
        up=fit(tuning.up, rows_per_expert, d_expert, d_model, accumulators=2),
        down=fit(tuning.down, rows_per_expert, d_model, d_expert),
        down_backward=fit(tuning.down_backward, rows_per_expert, d_expert, d_model),
        up_backward=fit(tuning.up_backward, rows_per_expert, d_model, d_expert),
        weights=fit(tuning.weights, min(d_model, d_expert), d_model, rows_per_expert, of_numbers=2),
    )
