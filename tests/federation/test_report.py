"""The sites' own report: what is sent is what is priced, and what comes back is what was told."""

import pytest
from torch import Tensor

from fomoe_pl.costs.rounds import control_collectives
from fomoe_pl.federation.report import PER_SITE, SUMMED, SiteReport, share

REPORT = SiteReport(3, True, 1.5, 2.0, stop=True, save_failed=False, saved=True)


@pytest.mark.parametrize("n_sites", range(2, 7))
def test_the_message_has_the_bytes_that_are_priced(n_sites: int) -> None:
    sent: list[Tensor] = []

    def total(values: Tensor) -> Tensor:
        sent.append(values)
        return values

    share(REPORT, n_sites - 1, n_sites, total)
    assert [values.nbytes for values in sent] == [control_collectives(n_sites)[0].payload]


def test_every_field_travels_and_arrives_in_its_place() -> None:
    assert sorted((*PER_SITE, *SUMMED)) == sorted(SiteReport._fields)
    shared = share(REPORT, 1, 3, lambda values: values)
    assert (shared.skipped, shared.left_out) == ([0, 3, 0], frozenset({1}))
    assert shared.train_loss == 0.75
    assert (shared.stop, shared.save_failed, shared.saved) == (True, False, True)
