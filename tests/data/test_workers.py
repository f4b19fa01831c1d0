import os

import pytest

from fomoe_pl.data.workers import Workers
from fomoe_pl.errors import ConfigError


def test_results_come_in_order() -> None:
    large = b"x" * 300_000  # more than a pipe holds

    def work(number: int) -> tuple[int, bytes]:
        return number * number, large

    for n in (1, 3):
        assert list(Workers(work, n).map(range(20))) == [(i * i, large) for i in range(20)]
        assert list(Workers(work, n).map([])) == []


def test_an_error_comes_out_as_it_is() -> None:
    def work(number: int) -> int:
        if number == 5:
            raise ConfigError("tokenizer", number, "cannot encode", "Use another")
        return number

    with pytest.raises(ConfigError, match="tokenizer = 5"):
        list(Workers(work, 2).map(range(20)))


def test_a_process_that_ends_is_told() -> None:
    def work(number: int) -> int:
        if number == 5:
            os._exit(1)
        return number

    with pytest.raises(RuntimeError, match="has ended before its time"):
        list(Workers(work, 2).map(range(50)))
