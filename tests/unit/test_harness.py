"""The harness itself: failures of a rank must reach the test, in time and by name."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness import RankFailure, distributed, run_ranks


def _sum_over_ranks(offset: int) -> torch.Tensor:
    value = torch.full((2, 3), float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return value


def _describe() -> tuple[int, int, int, str | None]:
    return dist.get_rank(), dist.get_world_size(), torch.get_num_threads(), os.environ.get("MARK")


def _raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("layers.3.mlp.weight")
    dist.barrier()


def _hang_on(rank: int) -> str:
    while dist.get_rank() == rank:
        time.sleep(0.01)
    return "done"


def _wait_for_a_missing_rank() -> None:
    if dist.get_rank() != 1:
        dist.all_reduce(torch.ones(1))


def _die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def _return_a_generator() -> object:
    return (i for i in range(3))


def _skip_everywhere() -> None:
    pytest.skip("no such backend")


def _threads_of_the_server() -> int:
    return len(os.listdir(f"/proc/{os.getppid()}/task"))


def _step_an_optimizer() -> torch.Tensor:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    torch.optim.SGD([weight], lr=0.5).step()
    (weight @ weight).sum().backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    return weight.grad


def test_three_ranks_reduce_and_tensors_come_back() -> None:
    results = run_ranks(3, _sum_over_ranks, 1)
    assert len(results) == 3
    for result in results:
        torch.testing.assert_close(result, torch.full((2, 3), 6.0), rtol=0, atol=0)


def test_results_stand_in_rank_order_and_the_environment_reaches_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MARK", "set after the server started")
    expected = [(rank, 4, 1, "set after the server started") for rank in range(4)]
    assert run_ranks(4, _describe) == expected


def test_one_rank_is_a_group_too() -> None:
    assert [rank for rank, *_ in run_ranks(1, _describe)] == [0]


def test_a_raising_rank_shows_its_traceback() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(3, _raise_on, 2)
    text = str(failure.value)
    assert text.startswith("rank 2 of 3 raised:\nTraceback")
    assert 'raise KeyError("layers.3.mlp.weight")' in text


def test_a_hanging_rank_is_killed_in_time_and_named() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure) as failure:
        run_ranks(3, _hang_on, 1, timeout=6)
    assert time.monotonic() - start < 12
    text = str(failure.value)
    assert "ranks [1] of 3 were still running after 6 s" in text
    assert "finished: [0, 2]" in text
    assert "in _hang_on" in text, "the failure must show where the rank stood"


def test_ranks_in_a_collective_that_one_rank_left_out_do_not_hang() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure):
        run_ranks(3, _wait_for_a_missing_rank, timeout=20)
    assert time.monotonic() - start < 26


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2 died with exit code -9"):
        run_ranks(2, _die_on, 1)


def test_a_result_that_cannot_be_pickled_is_a_failure() -> None:
    with pytest.raises(RankFailure, match="cannot be pickled"):
        run_ranks(1, _return_a_generator)


def test_a_local_function_is_refused_before_anything_starts() -> None:
    with pytest.raises(TypeError, match="top level of a module"):
        run_ranks(2, lambda: None)


def test_no_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size=0"):
        run_ranks(0, _describe)


def test_the_server_that_ranks_fork_from_has_one_thread() -> None:
    # A second thread could hold a lock (OpenMP, malloc, import) at the moment of the fork.
    assert run_ranks(2, _threads_of_the_server) == [1, 1]


def test_autograd_and_an_optimizer_work_in_a_rank() -> None:
    first, second = run_ranks(2, _step_an_optimizer)
    torch.testing.assert_close(first, torch.full((64, 64), 256.0))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_skip_on_the_ranks_is_a_skip_of_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="no such backend"):
        run_ranks(2, _skip_everywhere)


@distributed(world_size=3)
def test_body(tmp_path: Path) -> None:
    (tmp_path / f"rank-{dist.get_rank()}").touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("value", [1.0, 2.5])
@distributed(world_size=2)
def test_parameters_reach_the_body(value: float) -> None:
    total = torch.tensor(value)
    dist.all_reduce(total)
    assert total.item() == 2 * value


@distributed(world_size=2)
def _fails_on_rank_one() -> None:
    assert dist.get_rank() == 0


def test_a_failing_body_fails_the_test() -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2 raised"):
        _fails_on_rank_one()
