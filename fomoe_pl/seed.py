"""The seed of what is given none of its own."""

import os


def seed_or_default(seed: int | None) -> int:
    """A given seed, or that of Lightning's `seed_everything` if it was called in this process or its parent, or 0.

    Args:
        seed: As given; None is not given.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
