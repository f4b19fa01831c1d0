"""Norms that a round's movement takes many at once are those of single tensors."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fomoe_pl.federation import movement
from fomoe_pl.federation.movement import AGREED, MEAN, OWN, OWN_NORM, Movement

LAYERS, EXPERTS = 3, 4
RESIDENTS = ((0, 2), (1, 3), (2,))


class Operations(TorchDispatchMode):
    """Counts them."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.number += 1
        return function(*args, **(kwargs or {}))


def noted(copies: int) -> list[tuple[int, int | None, Sequence[int], Tensor]]:
    """Dense tensors and stacks of experts, and of the means each expert's row alone."""
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[int, int | None, Sequence[int], Tensor]] = []
    for _ in range(copies):
        for which in (OWN, AGREED, MEAN):
            found.append((which, None, (), torch.randn(5, 3, generator=generator)))
            for layer, experts in enumerate(RESIDENTS):
                stack = torch.randn(len(experts), 2, 3, generator=generator)
                rows = zip(experts, stack, strict=True)
                found += (
                    [(which, layer, [expert], row) for expert, row in rows]
                    if which == MEAN else [(which, layer, experts, stack)]
                )  # fmt: skip
    return found


@pytest.mark.parametrize("most_bytes", [0, 100, 2**20])
def test_sums_are_of_each_tensor_and_each_expert(monkeypatch: pytest.MonkeyPatch, most_bytes: int) -> None:
    monkeypatch.setattr(movement, "PENDING_BYTES", most_bytes)
    dense, expert_LE4 = torch.zeros(4, dtype=torch.float64), torch.zeros(LAYERS, EXPERTS, 4, dtype=torch.float64)
    of = Movement(LAYERS, EXPERTS)
    for _ in range(2):  # the second round forgets the first
        of.start()
        for which, layer, experts, values in noted(2):
            of.add(which, layer, experts, values)
    for which, layer, experts, values in noted(2):
        if layer is None:
            dense[which] += values.double().square().sum()
        for row, expert in enumerate(experts):
            values_of = values if len(experts) == 1 else values[row]
            expert_LE4[layer, expert, which] += values_of.double().square().sum()
    for sums in (dense, expert_LE4):
        sums[..., OWN_NORM] = sums[..., OWN].sqrt()
    for found, wanted in zip(of.sums(), (dense, expert_LE4), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert expert_LE4[2, 0].tolist() == [0] * 4  # is not here


def test_operations_hardly_grow_with_the_tensors() -> None:
    """One by one they took a third of a round's end: hundreds of tensors, several operations each."""
    counted = []
    for copies in (1, 50):
        of, stacks = Movement(LAYERS, EXPERTS), 2 * copies * len([ids for ids in RESIDENTS if len(ids) > 1])
        values = noted(copies)
        with Operations() as operations:
            of.start()
            for one in values:
                of.add(*one)
            of.sums()
        counted.append(operations.number - stacks)  # a stack is taken apart, which copies nothing
    assert counted[0] == counted[1] < 25
