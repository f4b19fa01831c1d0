"""Every numeric setting has a range, also those that are added later: this test finds them by their types."""

import inspect
import math
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest

from fomoe_pl import callbacks
from fomoe_pl.cli import main
from fomoe_pl.costs.sites import Site
from fomoe_pl.errors import ConfigError, check_range
from fomoe_pl.federation.outer import Average, Nesterov
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.module import FoMoEModule
from fomoe_pl.optimizer import OptimizerConfig
from fomoe_pl.planner.request import PlanRequest
from fomoe_pl.strategies import FederatedStrategy

SIZES = {"vocab_size": 17, "d_model": 8, "n_layers": 1, "n_heads": 1, "n_experts": 2, "top_k": 1, "d_expert": 4}
SITE = {"tflops": 1.0, "memory_gib": 1.0, "memory_gbps": 1.0}
MADE: dict[Callable[..., Any], dict[str, Any]] = {
    ModelConfig: SIZES, OptimizerConfig: {}, Nesterov: {}, Average: {}, FederatedStrategy: {},
    FederationConfig: {}, Site: SITE,
    FoMoEModule: {"architecture": ModelConfig(**SIZES)},
    PlanRequest: {"models": ["a.yaml"], "sites": [Site(**SITE)], "tokens": 1e9},
    **{getattr(callbacks, name): {} for name in callbacks.__all__},
}  # fmt: skip


def numeric(made: Callable[..., Any]) -> list[tuple[str, bool]]:
    """Parameters that may be a number or a list of numbers: name, and whether a list."""
    hints = get_type_hints(made.__init__)
    found = []
    for name in inspect.signature(made).parameters:
        kinds = [hints[name], *get_args(hints[name])] if name in hints else []
        if int in kinds or float in kinds:
            found.append((name, hints[name] in (list[int], tuple[float, float])))
    return found


SETTINGS = [(made, name, several) for made in MADE for name, several in numeric(made)]


def test_settings_are_found() -> None:
    names = {name for _, name, _ in SETTINGS}
    assert {"eps", "weight_decay", "betas", "seed", "placement_seed", "mtu", "lr", "draw_every", "top_k"} <= names
    assert len(SETTINGS) > 60


@pytest.mark.parametrize("value", [-1, -7.5, math.nan, math.inf])
@pytest.mark.parametrize(("made", "name", "several"), SETTINGS, ids=[f"{m.__name__}-{n}" for m, n, _ in SETTINGS])
def test_no_number_that_cannot_work_is_taken(made: Callable[..., Any], name: str, several: bool, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name.removesuffix('s')}\w* = .*: .*\. \w"):
        made(**{**MADE[made], name: [value, value] if several else value})


@pytest.mark.parametrize(
    ("bounds", "refused", "rule"),
    [
        ({"least": 0}, [-1, -1e-9], "must be a finite number, at least 0"),
        ({"above": 0}, [0, -0.0], "must be a finite number, above 0"),
        ({"least": 0, "below": 1}, [1, 1.5, -0.1], "must be a finite number, at least 0 and below 1"),
        ({"least": 1, "most": 3}, [0, 4], "must be a finite number, at least 1 and at most 3"),
    ],
)
def test_the_range_is_stated(bounds: dict[str, float], refused: list[float], rule: str) -> None:
    check_range("key", None, "hint", **bounds)
    check_range("key", 0.5 if "most" not in bounds else 3, "hint", **bounds)
    for value in [*refused, math.nan, math.inf, -math.inf]:
        with pytest.raises(ConfigError, match=rf"^key = {value!r}: {rule}\. Hint$".replace("+", r"\+")):
            check_range("key", value, "hint", **bounds)


@pytest.mark.parametrize("seed", ["-1", "-42", str(2**32)])
def test_the_command_line_takes_no_seed_that_generators_refuse(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "-c", "configs/quickstart.yaml", "--seed_everything", seed])
    assert f"seed_everything = {seed}: must be a finite number, at least 0 and at most {2**32 - 1}" in (
        capsys.readouterr().err
    )
