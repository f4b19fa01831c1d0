"""Compiled blocks: one compilation serves all layers, placements and ghosts.

Each layer is one graph, of torch.compile's, around our kernels (`backends/kernels.py`), which it takes as they are.
Layers have equal shapes, so the first one's code serves the others; which experts are resident is in tensors, whose
values may change. What is compiled anew: training against validation, and another number of resident experts. A second
batch size makes code for all batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def compiled(run: Callable[..., Result]) -> Callable[..., Result]:
    """Return a compiled form of a function of tensors, made when it is first called."""
    result: Any = torch.compile(run)
    return result
