import os
from collections.abc import Iterator

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


def test_heavy_items_are_at_the_processes_alone() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for weight in (1, 1, 9, 1, 1, 1):
            taken += 1
            yield weight

    results = Workers(lambda weight: weight, 2, lambda weight: weight, most=2).map(items())
    seen = [(next(results), taken) for _ in range(6)]
    # The heavy one waits until what is before it has come back, and what is behind it waits for it.
    assert seen == [(1, 3), (1, 3), (9, 4), (1, 6), (1, 6), (1, 6)]


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
