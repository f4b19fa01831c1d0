"""The sites' own report: what is sent is what is priced, and what comes back is what was told."""

import pytest
import torch
from torch import Tensor

from fomoe_pl.costs.rounds import control_collectives
from fomoe_pl.federation.report import PER_SITE, SUMMED, SiteReport, share
from fomoe_pl.federation.topology import Topology

REPORT = SiteReport(3, True, 1.5, 2.0, stop=True, ends=False, save_failed=False, saved=True)


@pytest.mark.parametrize("n_sites", range(2, 7))
def test_the_message_has_the_bytes_that_are_priced(n_sites: int) -> None:
    sent: list[Tensor] = []

    def total(values: Tensor) -> Tensor:
        sent.append(values)
        return values

    share(REPORT, Topology(n_sites, 1, n_sites - 1), total)
    assert [values.nbytes for values in sent] == [control_collectives(n_sites)[0].payload]


def test_every_field_travels_and_arrives_in_its_place() -> None:
    assert sorted((*PER_SITE, *SUMMED, "ends")) == sorted(SiteReport._fields)  # it shares the number of `stop`
    shared = share(REPORT, Topology(3, 1, 1), lambda values: values)
    assert (shared.skipped, shared.left_out) == ([0, 3, 0], frozenset({1}))
    assert shared.train_loss == 0.75
    assert (shared.stop, shared.save_failed, shared.saved) == (True, False, True)


@pytest.mark.parametrize(("stop", "ends"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("n_alike", [1, 3])
def test_a_signal_is_told_from_a_wish_to_end(stop: bool, ends: bool, n_alike: int) -> None:
    report = REPORT._replace(stop=stop, ends=ends)
    shared = share(report, Topology(3, 1, 0), lambda values: torch.cat((values[:-3], n_alike * values[-3:])))
    assert (shared.stop, shared.ends) == (stop, stop or ends)
