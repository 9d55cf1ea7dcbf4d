"""Ranks that succeed or fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch.distributed as dist
from torch import nn

from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.sharded import Sharded
from distmuon.collectives import Communicator
from distmuon.errors import see

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")


def find_communicator(
    optimizer: Sharded | None, process_group: ProcessGroup | None, model: nn.Module | None
) -> Communicator:
    """The ranks that save or load together.

    Args:
        optimizer: Whose ranks they are, if there is one.
        process_group: Otherwise they are this group's; None for the default group, if there is one.
        model: Tells this rank's device where there is no optimizer.

    Raises:
        TypeError: for another optimizer, which has no parts to save.
        ValueError: if the optimizer is sharded over other ranks than the group's.
    """
    _check_optimizer(optimizer)
    if optimizer is None:
        # As everywhere in torch; and ranks that each saved alone would replace each other's.
        default = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        alone = Communicator(process_group or default)
        alone.locate(parameter.device for parameter in (model.parameters() if model else ()))
        return alone
    communicator = optimizer.communicator
    if process_group is not None and not communicator.same_ranks(process_group):
        raise ValueError(
            "process_group has other ranks than the optimizer is sharded over. Leave it out: the "
            "optimizer's own group is used." + see("bad-option")
        )
    communicator.locate(parameter.device for parameter in optimizer.parameter_names)
    return communicator


def _check_optimizer(optimizer: object) -> None:
    if optimizer is not None and not isinstance(optimizer, Sharded):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}. Must be a distmuon.Muon, in no wrapper; "
            "a module goes into model=, the state of another optimizer into tensors=."
            + see("bad-option")
        )


def all_ranks(communicator: Communicator, action: Callable[[], Result]) -> list[Result]:
    """Do something on every rank and share the results. A collective.

    Args:
        communicator: The ranks.
        action: Sends no messages; what it raises is raised on every rank.

    Returns:
        Every rank's result, in rank order; small and picklable.

    Raises:
        CheckpointError: on every rank, if it failed on any: names each that did and why.
    """
    result: Result | None = None
    problem: Exception | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is: the others would wait for this rank's answer
        problem = error
    message = None if problem is None else f"{type(problem).__name__}: {problem}"
    if isinstance(problem, CheckpointError):
        message = str(problem)
    answers = _collect(communicator, (result, message))
    messages = [answer[1] for answer in answers]
    if any(messages):
        _raise(messages, problem)
    return [answer[0] for answer in answers]  # type: ignore[misc]  # no message: a result


def _collect(
    communicator: Communicator, value: tuple[Result | None, str | None]
) -> list[tuple[Result | None, str | None]]:
    try:
        return communicator.collect(value)
    except RuntimeError as error:
        why = f" This rank's own problem: {value[1]}" if value[1] else ""
        raise CheckpointError(
            f"Rank {communicator.rank} lost the other ranks; one of them has died.{why} ({error})",
            entry="rank-lost",
        ) from error


def _raise(messages: list[str | None], own: Exception | None) -> NoReturn:
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(messages) if text is not None]
    same = {text for text in messages if text is not None}
    if len(failed) == len(messages) and len(same) == 1:
        failed = [f"every rank: {same.pop()}"] if len(messages) > 1 else [same.pop()]
    raise CheckpointError("\n".join(failed)) from own
