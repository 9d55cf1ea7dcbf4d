"""Other optimizers' state, taken in and given back by several ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.migrate import export_state_dict, import_state_dict
from tests.harness import run_ranks
from tests.unit.test_migrate import Model, ours, sum_and_adamw, sums, train

Weights = dict[str, Tensor]


def go_on(given: Any, weights: Weights, group: Any) -> tuple[Weights, Any]:
    model = Model()
    model.load_state_dict(weights)
    mine = ours(model, process_group=group)
    import_state_dict(mine, given, momentum_convention="sum")
    train(model, [mine], range(4, 6))
    exported = None
    mine.consolidate_state_dict(to=0)
    if group is None or dist.get_rank() == 0:
        targets = sum_and_adamw(model)
        exported = [export_state_dict(mine, each, momentum_convention="sum") for each in targets]
    return {name: value.clone() for name, value in model.state_dict().items()}, exported


def go_on_here(given: Any, weights: Weights) -> tuple[Weights, Any]:
    return go_on(given, weights, dist.group.WORLD)


def test_ranks_take_their_parts_and_give_back_the_whole_bitwise() -> None:
    model = Model()
    theirs = sums(model)
    train(model, theirs, range(4))
    given = theirs[0].state_dict()
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    expected, whole = go_on(given, weights, None)
    results = run_ranks(3, go_on_here, given, weights)
    for found, _ in results:
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for mine, theirs_ in zip(results[0][1], whole, strict=True):
        for number, entry in theirs_["state"].items():
            assert all(torch.equal(mine["state"][number][key], entry[key]) for key in entry)
