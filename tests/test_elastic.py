"""Fewer sites than planned: the planned tokens, and learning rates that do not jump."""

from pathlib import Path

import pytest
import torch

from fomoe_pl.errors import ConfigError
from fomoe_pl.optimizer import OptimizerConfig, inner_schedule
from fomoe_pl.training.elastic import Pace, check_min_sites, nodes_left


def pace(sites: int, start: int, tokens: int, planned: int = 100) -> Pace:
    return Pace(planned=planned, start=start, tokens=tokens, site_tokens=10, planned_sites=4, sites=sites)


def test_all_sites_take_the_planned_steps() -> None:
    assert pace(4, 0, 0).last_step == pace(4, 40, 1600).last_step == 100
    assert [pace(4, 40, 1600).at(step) for step in (40, 41, 100)] == [40, 41, 100]


@pytest.mark.parametrize(("sites", "last"), [(2, 160), (1, 280), (3, 120)])
def test_fewer_sites_take_more_steps_to_the_same_tokens(sites: int, last: int) -> None:
    after_40 = pace(sites, 40, 1600)
    assert after_40.last_step == last
    assert 1600 + (last - 40) * sites * 10 == 4000
    assert (after_40.at(40), after_40.at(last)) == (40, 100)


def test_where_tokens_do_not_divide_there_is_less_than_one_step_more() -> None:
    last = pace(3, 41, 1640).last_step
    assert 4000 <= 1640 + (last - 41) * 30 < 4000 + 30


def test_sites_that_come_back_take_the_rest() -> None:
    alone = pace(2, 40, 1600)
    assert pace(4, 80, 1600 + 40 * 20).last_step == 80 + (100 - int(alone.at(80)))


def test_a_run_that_is_done_has_no_further_step() -> None:
    assert pace(2, 100, 4000).last_step == pace(2, 101, 4040).last_step - 1 == 100


def test_learning_rates_follow_the_planned_steps() -> None:
    def rates(run: Pace | None, steps: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        config = OptimizerConfig(warmup_steps=4, cooldown_steps=40)
        [factor] = inner_schedule(optimizer, config, 100, run).lr_lambdas
        return [factor(step) for step in range(steps)]

    planned, fewer = rates(None, 101), rates(pace(2, 80, 3200), 121)
    assert rates(pace(4, 80, 3200), 101) == planned
    assert fewer[80] == planned[80] == 0.5  # in the middle of the cooldown
    assert fewer[80:121:2] == planned[80:]
    assert fewer[120] == 0
    assert fewer[81] == pytest.approx((planned[80] + planned[81]) / 2)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def test_machines_that_are_left() -> None:
    assert nodes_left({}, 2, 3, 2) == 3, "only torchrun starts fewer"
    assert nodes_left(TORCHRUN, 2, 3, 2) == 2
    assert nodes_left(TORCHRUN, "2", 2, 2) == 2
    assert nodes_left(TORCHRUN, 1, 4, 2) == 4, "refused by the check of what was launched"
    with pytest.raises(ConfigError, match=r"min_sites = 5: only 4 of 6 sites are there"):
        nodes_left(TORCHRUN, 2, 3, 5)


def test_numbers_of_sites_that_cannot_be_are_refused_at_the_start() -> None:
    full = pace(4, 0, 0)
    check_min_sites(1, full, 4, 4, 12)  # on 1, 2, 3 and 4 sites
    check_min_sites(4, full, 4, 2, 6)  # 6 experts, each on 2 of 4
    check_min_sites(1, full, 4, 2, 8)  # 8 experts, each on 2 of 3: 6, 5 and 5
    with pytest.raises(ConfigError, match="without an expert"):
        check_min_sites(1, full, 4, 1, 2)
    with pytest.raises(ConfigError, match="several machines"):
        check_min_sites(1, full, 8, 2, 8)
    with pytest.raises(ConfigError, match=r"min_sites = 5: must be from 1 to the planned number of sites \(4"):
        check_min_sites(5, full, 4, 2, 8)
    with pytest.raises(ConfigError, match=r"overlap = 5"):
        check_min_sites(2, full, 2, 5, 8)


def test_tokens_of_a_checkpoint_that_is_none_are_not_read(tmp_path: Path) -> None:
    from fomoe_pl.checkpoint.resuming import tokens_in

    with pytest.raises(ConfigError, match="no complete checkpoint"):
        tokens_in(tmp_path)
