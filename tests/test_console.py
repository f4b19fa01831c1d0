"""How much a command says."""

import logging
import warnings
from typing import Any

import pytest

from fomoe_pl import cli
from fomoe_pl.console import Talk, heard, split
from fomoe_pl.errors import ConfigError


def test_flags_may_stand_anywhere() -> None:
    assert split(["-q", "fit", "-c", "x"]) == (Talk(quiet=True), ["fit", "-c", "x"])
    assert split(["fit", "--verbose", "-c", "x"]) == (Talk(verbose=True), ["fit", "-c", "x"])
    assert split(["fit"]) == (Talk(), ["fit"])


@pytest.mark.parametrize(
    ("talk", "told"),
    [
        (Talk(), ["GPU available: True", "ours", "careful"]),
        (Talk(quiet=True), ["careful"]),
        (Talk(verbose=True), ["Seed set to 42", "GPU available: True", "ours", "careful"]),
    ],
)
def test_noise_is_kept_out_and_warnings_are_not(talk: Talk, told: list[str], caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.propagate, before = True, logger.propagate
    logger.addHandler(caplog.handler)
    with heard(talk), warnings.catch_warnings(record=True) as caught:
        logger.info("Seed set to 42")
        logger.info("GPU available: True")
        logger.info("ours")
        logger.warning("careful")
        warnings.warn("the dataloader does not have many workers", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    logger.removeHandler(caplog.handler)
    logger.propagate = before
    assert list(dict.fromkeys(record.message for record in caplog.records)) == told
    shown = [str(w.message) for w in caught]
    assert ("the dataloader does not have many workers" in shown) == talk.verbose
    assert "something else" in shown


@pytest.mark.parametrize("verbose", [True, False])
def test_where_an_error_comes_from_is_told_if_asked(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "-c", "nothing", *(["-v"] if verbose else [])])
    told = capsys.readouterr().err
    assert "fomoe: config = 'nothing'" in told
    assert ("Traceback" in told) == verbose
    assert ConfigError.__name__ in told or not verbose
