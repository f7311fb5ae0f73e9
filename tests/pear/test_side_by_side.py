"""Jobs in processes of their own give what they give here, and their errors arrive."""

import pytest
import torch

from pear.io import DataError
from pear.side_by_side import Job, Team


def draw(tick, seed):
    tick(1, 2)
    assert torch.get_num_threads() == 1
    torch.manual_seed(seed)
    return (torch.randn(300, 300) @ torch.randn(300, 300)).sum().item()


def fail(tick):
    raise DataError("no such thing")


def test_workers_change_no_result_and_hide_no_error():
    jobs = {str(seed): Job(draw, dict(seed=seed)) for seed in range(3)}
    results = []
    for workers in (1, 2):
        with Team(workers) as team:
            results.append(team.run(jobs))
            with pytest.raises(DataError, match="no such thing"):
                team.run({"fails": Job(fail, {})})
            assert team.run(jobs) == results[-1]  # an error of one call is not the next call's
    assert results[0] == results[1]
    assert list(results[0]) == ["0", "1", "2"] and len(set(results[0].values())) == 3


def test_threads_are_put_back():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with Team(1) as team, pytest.raises(DataError):
            team.run({"fails": Job(fail, {})})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_positive(workers):
    with pytest.raises(ValueError, match=f"workers must be at least 1, got {workers}"):
        Team(workers)
