"""Models that tools measure: shapes from configs/model, and initial values that are drawn where they live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from fomoe_pl.model import init
from fomoe_pl.model.config import ModelConfig

MODEL_FILES = Path(__file__).parents[2] / "configs" / "model"


def architecture(name: str, **changes: Any) -> ModelConfig:
    """A file of configs/model.

    Args:
        name: the file's, without `.yaml`.
        **changes: fields that are replaced.
    """
    found: dict[str, Any] = yaml.safe_load((MODEL_FILES / f"{name}.yaml").read_text())["model"]["architecture"]
    return ModelConfig(**found | changes)


@contextmanager
def drawn_on_device() -> Iterator[None]:
    """Draw initial values where they live: which they are does not matter when a model is timed, and it is faster."""
    kept = init._draw
    init._draw = _quick_draw
    try:
        yield
    finally:
        init._draw = kept


def _quick_draw(target: Tensor, rule: init.Rule, generator: object) -> None:
    target.normal_(rule.init_mean, rule.init_std)
