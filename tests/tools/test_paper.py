"""The paper's numbers, from the settings that give them."""

import pytest

from fomoe_pl.errors import ConfigError
from fomoe_pl.model.sizes import parameter_counts
from tests.tools import load

paper = load("paper")


@pytest.mark.parametrize(
    ("name", "printed", "share"),
    [("54M", 54, 0.039), ("153M", 153, 0.219), ("1.8B", 1800, 0.591), ("13.3B", 13300, 0.646), ("104B", 104000, 0.661)],
)
def test_table_1_and_expert_shares_of_figure_2(name: str, printed: int, share: float) -> None:
    config = paper.table_1(name)
    digits = {54: 54, 153: 153, 1800: 1.8, 13300: 13.3, 104000: 104}
    total = parameter_counts(config).total / 1e6
    shown = total if printed < 1000 else total / 1000
    assert round(shown, 1 if printed in (1800, 13300) else 0) == digits[printed]
    dense, experts = paper.counted_parameters(config)
    assert experts / (dense + experts) == pytest.approx(share, abs=0.001)


def test_the_two_ratios_are_the_1_8b_models_at_half_replication() -> None:
    config = paper.table_1("1.8B")
    assert sum(paper.counted_parameters(config)) == 1_815_432_192
    assert round(paper.saving(config, 0.5), 4) == 1.4199
    assert round(paper.saving(config, 0.5, local_steps=32), 2) == 45.44
    # Equation 8 with O = 2, M = 4 and a reshuffle every round sends that share: 2 (O-1)/O + (1 - O/M) = 2 (M-1)/M.
    round_bytes = paper.bytes_per_round(config, n_sites=4, overlap=2, reshuffled=1.0)
    full = paper.bytes_per_round(config, n_sites=4, overlap=4)
    assert full / round_bytes == pytest.approx(1.4199, abs=0.003)  # the router's and the norms' 0.3%


@pytest.mark.parametrize(("name", "ceiling"), [("54M", 1.04), ("153M", 1.28), ("1.8B", 2.44), ("104B", 2.94)])
def test_no_overlap_saves_more_than_the_ceiling(name: str, ceiling: float) -> None:
    assert paper.saving(paper.table_1(name), 0.0) == pytest.approx(ceiling, abs=0.015)


def test_fixed_placement_saves_more_than_the_papers_ratio() -> None:
    """M = 8, O = 4, fixed: 1.51, 1.58 and 1.61 for the three largest models."""
    for name, ratio in (("1.8B", 1.51), ("13.3B", 1.58), ("104B", 1.61)):
        config = paper.table_1(name)
        full = paper.bytes_per_round(config, n_sites=8, overlap=8)
        assert full / paper.bytes_per_round(config, n_sites=8, overlap=4) == pytest.approx(ratio, abs=0.01)


def test_figure_8s_shares() -> None:
    small, large = paper.paper_model(512, 16), paper.paper_model(8192, 512)
    assert round(paper.ffn_share(small, 2048, n_sites=16, overlap=16), 2) == 0.14
    assert round(paper.ffn_share(large, 2048, n_sites=32, overlap=32), 2) == 0.31
    shares = [paper.ffn_share(large, 2048, n_sites=32, overlap=o) for o in (4, 8, 16, 32)]
    assert shares == sorted(shares)
    assert shares[0] < 0.5 * shares[-1]


def test_figure_9s_order_and_figure_10s_ratio() -> None:
    large = paper.paper_model(8192, 512)
    per_step = [paper.bytes_per_round(large, n_sites=32, overlap=o) / 32 for o in (4, 8, 16, 32)]
    assert per_step == sorted(per_step)
    assert paper.ddp_bytes_per_step(large, 32) == pytest.approx(32 * per_step[-1])
    config = paper.paper_model(2048, 64)
    hours = {
        o: paper.run_hours(config, paper.Budget(60e9), n_sites=32, overlap=o, bandwidth_mbit=1000)[1] for o in (4, 32)
    }
    assert hours[32] / hours[4] == pytest.approx(1.3e5 / 6e4, rel=0.02)  # read off the figure


def test_local_adamw_sends_three_times_as_much() -> None:
    config = paper.table_1("153M")
    plain = paper.bytes_per_round(config, n_sites=4, overlap=2)
    assert paper.bytes_per_round(config, n_sites=4, overlap=2, moments=True) == 3 * plain


@pytest.mark.parametrize(
    "call",
    [
        lambda c: paper.bytes_per_round(c, n_sites=4, overlap=5),
        lambda c: paper.bytes_per_round(c, n_sites=4, overlap=2, reshuffled=1.5),
        lambda c: paper.run_hours(c, paper.Budget(1e9), n_sites=4, overlap=2, bandwidth_mbit=0),
        lambda c: paper.ffn_share(c, 128, n_sites=3, overlap=4),
    ],
)
def test_nonsense_is_refused(call: object) -> None:
    with pytest.raises(ConfigError):
        call(paper.table_1("153M"))  # type: ignore[operator]
