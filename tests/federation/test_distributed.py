import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from tests.distributed import run_distributed


def _sum(rank: int, offset: int) -> int:
    value = torch.tensor(rank + offset)
    dist.all_reduce(value)
    return int(value) * 10 + rank


def _fail(rank: int) -> None:
    if rank == 1:
        raise KeyError("planted")


def test_every_ranks_result_comes_back_in_order():
    assert run_distributed(_sum, 3, 5) == [180, 181, 182]


def test_an_error_of_one_rank_is_raised():
    with pytest.raises(ProcessRaisedException, match="planted"):
        run_distributed(_fail, 2)
