import math

import pytest
import torch
from torch import Tensor, nn

from fomoe_pl.metrics import LanguageModelMetric

# Of the targets below: 0 ends a document; a token's bytes are those of the text, so not the same everywhere.
BYTES_BS = torch.tensor([[1, 2, 0], [4, 0, 0], [3, 5, 0]])


def batch() -> tuple[Tensor, Tensor, Tensor]:
    losses_BS = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, 0.0], [4.0, 1.0, 0.0]])
    targets_BS = torch.tensor([[1, 2, 0], [3, -100, -100], [3, 3, -100]])
    return losses_BS, targets_BS, torch.tensor([0, 1, 0])


def test_values_by_hand() -> None:
    metric = LanguageModelMetric(["prose", "code"])
    metric.update(*batch(), BYTES_BS)
    values = metric.compute()
    # prose: nats 1+2+3+4+1 = 11, 5 tokens, bytes 1+2+0+3+5 = 11; code: 0.5 nats, 1 token, 4 bytes
    expected = {
        "loss": 11.5 / 6,
        "perplexity": math.exp(11.5 / 6),
        "bits_per_byte": 11.5 / 15 / math.log(2),
        "loss/prose": 11 / 5,
        "bits_per_byte/prose": 1 / math.log(2),
        "loss/code": 0.5,
        "bits_per_byte/code": 0.125 / math.log(2),
    }
    assert {key: value.item() for key, value in values.items()} == pytest.approx(expected)


def test_uniform_bytes_are_eight_bits() -> None:
    metric = LanguageModelMetric(["all"])
    metric.update(
        torch.full((2, 5), math.log(256)),
        torch.arange(10).view(2, 5),
        torch.zeros(2, dtype=torch.int64),
        torch.ones(2, 5),
    )
    assert metric.compute()["bits_per_byte"].item() == pytest.approx(8)
    assert metric.compute()["perplexity"].item() == pytest.approx(256)


def test_sum_of_two_ranks_equals_one_rank_with_both_batches() -> None:
    losses_BS, targets_BS, domain_B = batch()
    whole = LanguageModelMetric(["prose", "code"])
    ranks = [LanguageModelMetric(["prose", "code"]) for _ in range(2)]
    for rank, rows in enumerate((slice(0, 1), slice(1, 3))):
        part = losses_BS[rows], targets_BS[rows], domain_B[rows], BYTES_BS[rows]
        ranks[rank].update(*part)
        whole.update(*part)
    local = ranks[0].compute()
    ranks[0].load_states(ranks[0].states() + ranks[1].states())
    reduced = ranks[0].compute()
    assert reduced == whole.compute()
    assert reduced["loss"] != local["loss"]  # no value of before the reduction is kept
    assert ranks[0].states().dtype == torch.float64
    assert ranks[0].states().shape == (3 * 2,)


def test_states_is_a_copy() -> None:
    metric = LanguageModelMetric(["prose", "code"])
    metric.update(*batch(), BYTES_BS)
    metric.states().zero_()
    assert metric.compute()["loss"].item() == pytest.approx(11.5 / 6)


def test_domain_without_tokens_is_nan_and_leaves_the_total_alone() -> None:
    metric = LanguageModelMetric(["prose", "code", "poems"])
    metric.update(*batch(), BYTES_BS)
    values = metric.compute()
    assert math.isnan(values["loss/poems"])
    assert math.isnan(values["bits_per_byte/poems"])
    assert values["loss"].item() == pytest.approx(11.5 / 6)


def test_reset_starts_again() -> None:
    metric = LanguageModelMetric(["prose", "code"])
    metric.update(*batch(), BYTES_BS)
    metric.reset()
    assert metric.states().count_nonzero() == 0


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, lambda module: module.to(torch.bfloat16)])
def test_sums_stay_exact_when_the_module_around_is_cast(cast) -> None:
    parent = nn.Module()
    parent.metric = LanguageModelMetric(["all"])
    parent.metric.load_states(torch.full((3,), 2.0**24 + 1, dtype=torch.float64))
    cast(parent)
    assert parent.metric.states().tolist() == [2**24 + 1] * 3
    parent.metric.reset()
    assert parent.metric.states().dtype == torch.float64
    assert parent.state_dict() == {}


def test_moves_with_the_module_around() -> None:
    parent = nn.Module()
    parent.metric = LanguageModelMetric(["all"])
    parent.to("meta")
    assert parent.metric.states().device.type == "meta"


def test_counts_beyond_the_reach_of_float32() -> None:
    metric = LanguageModelMetric(["all"])
    metric.load_states(torch.tensor([0.0, 2.0**24, 0.0], dtype=torch.float64))
    metric.update(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int64), torch.tensor([0]), torch.ones(1, 1))
    assert metric.tokens.item() == 2**24 + 1


def test_lives_through_inference_mode() -> None:
    metric = LanguageModelMetric(["prose", "code"])
    with torch.inference_mode():
        metric.reset()
        metric.update(*batch(), BYTES_BS)
    metric.update(*batch(), BYTES_BS)
    assert metric.compute()["loss"].item() == pytest.approx(11.5 / 6)
