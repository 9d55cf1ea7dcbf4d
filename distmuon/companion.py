"""Any optimizer class as the update rule of the parameters that Muon does not take.

A group names it in its `algorithm`: "torch.optim.SGD(momentum=0.9)", a class by its module and the
options that are not the group's own. Most treat every element alike; they are applied to runs of a
flat buffer, wherever a tensor starts and ends. Others look at whole tensors: norms, factored second
moments, preconditioners. Their parameters lie whole at one rank each. Which kind a class is, is not
taken on trust: it is tried on small tensors, in the way that it would be used.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distmuon.errors import see

Counter = Literal["tensor", "number", "group", "none"]
Reach = Literal["element", "tensor"]
Shape = tuple[int, ...]

# What is tried. The last is past 4096 elements, from where on some keep their state in blocks.
_SHAPES: tuple[Shape, ...] = ((2, 3), (5,), (1,), (3, 2, 4), (64, 65))
_STEPS = 3


@dataclass(frozen=True, slots=True)
class Companion:
    """A class that has been tried.

    Attributes:
        algorithm: What a group calls it.
        cls: The class.
        options: What it is told beside learning rate and weight decay.
        reach: What it looks at: single elements, or whole tensors.
        counter: Where it counts its steps: in the parameter's state, as a tensor or a number; in
            its group; or not at all.
        elementwise: Names of the state that has the parameter's shape; all there is for "element".
    """

    algorithm: str
    cls: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any]
    reach: Reach
    counter: Counter
    elementwise: tuple[str, ...]

    @property
    def decays(self) -> bool:
        """Whether it takes a weight decay."""
        return _takes_decay(self.cls)

    def update_(
        self,
        param: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        *,
        step: int,
        lr: float,
        weight_decay: float,
    ) -> None:
        """One step on any run of a flat buffer, or on a whole tensor.

        Args:
            param: [n] of any tensors, or one tensor in its shape; updated in place.
            grad: Same shape and dtype.
            state: As `state_shapes` says, by name; updated in place.
            step: Number of this step, from 1.
            lr: Learning rate.
            weight_decay: As the class takes it, if it does: decoupled, or added to the gradient.

        Raises:
            ValueError: if it keeps other state than when it was tried.
        """
        parameter = nn.Parameter(param)
        parameter.grad = grad
        optimizer = _make(self.cls, self.options, [parameter], lr, weight_decay)
        if step > 1:  # at the first one the class fills in what it starts from
            kept, count = optimizer.state[parameter], step - 1
            kept.update(state)
            if self.counter == "group":
                optimizer.param_groups[0]["step"] = count
            elif self.counter != "none":
                kept["step"] = self._counted(count, param) if self.counter == "tensor" else count
        optimizer.step()
        found = _tensors(optimizer, parameter)
        known = {name: each.shape for name, each in state.items()}
        if any(known.get(name) != each.shape for name, each in found.items()):
            raise ValueError(
                f"{self.algorithm} keeps {_say(found)} for a tensor of shape {list(param.shape)}, "
                f"where {_say(state)} was foreseen. Take another class." + see("bad-group")
            )
        for name, each in found.items():
            if each is not state[name]:
                state[name].copy_(each)

    def _counted(self, count: int, param: Tensor) -> Tensor:
        # torch's fused kernels read the count on the parameter's device, by its address; the others
        # on the host. Filled in, because a copy to a GPU would wait for it.
        device = param.device if self.options.get("fused") else torch.device("cpu")
        return torch.full((), float(count), device=device)


@cache
def find_companion(algorithm: str) -> Companion:
    """Find and try the class that a group names.

    Args:
        algorithm: A class by its module, with or without options: "torch.optim.RMSprop",
            "torch.optim.SGD(momentum=0.9)". Options are numbers, booleans, strings, None, or tuples
            of them; `lr` and `weight_decay` are the group's.

    Returns:
        The class, ready to be used.

    Raises:
        ValueError: if there is no such class, it does not take the options, or it cannot be
            sharded, saying why.
    """
    path, options = _parse(algorithm)
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Invalid algorithm={algorithm!r}. There is no {name} in {module}: {error}."
            + see("bad-group")
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(
            f"Invalid algorithm={algorithm!r}. Must be a torch.optim.Optimizer." + see("bad-group")
        )
    taken = {"lr", "weight_decay"} & options.keys()
    if taken:
        raise ValueError(
            f"Invalid algorithm={algorithm!r}. Set {sorted(taken)} in the group." + see("bad-group")
        )
    try:
        wanted, optimizer = _together(cls, options)
    except Exception as error:
        raise ValueError(
            f"Invalid algorithm={algorithm!r}. It failed on a small tensor: "
            f"{type(error).__name__}: {error}." + see("bad-group")
        ) from error
    together = _kept_together(cls, options, optimizer)
    if together:
        raise ValueError(
            f"Invalid algorithm={algorithm!r}. {name} keeps {together} for all tensors together, "
            "which a rank with some of them cannot know. Give these parameters to an optimizer "
            "of their own." + see("bad-group")
        )
    counter, elementwise = _counter(optimizer), _elementwise(optimizer)
    for reach in ("element", "tensor"):
        companion = Companion(algorithm, cls, options, reach, counter, elementwise)
        if _agrees(companion, wanted):
            return companion
    raise ValueError(
        f"Invalid algorithm={algorithm!r}. {name} cannot be sharded: its step on one tensor, with "
        "nothing but the tensors of its state, is not the step that it makes beside others. It "
        "looks at all of them together, or keeps more than tensors. Give these parameters to an "
        "optimizer of their own." + see("bad-group")
    )


@cache
def state_shapes(algorithm: str, shape: Shape) -> Mapping[str, Shape]:
    """What a class keeps for one parameter; nothing is computed or allocated.

    Args:
        algorithm: What a group calls it.
        shape: The parameter's.

    Returns:
        The shape of each state tensor, by name.

    Raises:
        ValueError: as `find_companion`.
    """
    return _foresee(find_companion(algorithm), shape)


def _foresee(companion: Companion, shape: Shape) -> Mapping[str, Shape]:
    if companion.reach == "element":
        return dict.fromkeys(companion.elementwise, shape)
    parameter = nn.Parameter(torch.empty(shape, device="meta"))
    parameter.grad = torch.empty(shape, device="meta")
    optimizer = _make(companion.cls, companion.options, [parameter])
    # State is made first; then the arithmetic may ask for values, of which there are none.
    with suppress(Exception), torch.no_grad():
        optimizer.step()
    return {name: tuple(each.shape) for name, each in _tensors(optimizer, parameter).items()}


def _make(
    cls: Callable[..., torch.optim.Optimizer],
    options: Mapping[str, Any],
    parameters: Sequence[nn.Parameter],
    lr: float = 0.1,
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    decay = {"weight_decay": weight_decay} if _takes_decay(cls) else {}
    return cls(parameters, lr=lr, **decay, **options)


@cache
def _takes_decay(cls: Callable[..., torch.optim.Optimizer]) -> bool:
    parameters = signature(cls).parameters
    return "weight_decay" in parameters or any(
        each.kind is each.VAR_KEYWORD for each in parameters.values()
    )


def _parse(algorithm: str) -> tuple[str, dict[str, Any]]:
    wrong = ValueError(
        f"Invalid {algorithm=}. Must be a class with its module, and its options as keywords: "
        '"torch.optim.SGD(momentum=0.9)".' + see("bad-group")
    )
    try:
        tree = ast.parse(algorithm, mode="eval").body
    except (SyntaxError, ValueError):
        raise wrong from None
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    if call.args or not isinstance(call.func, ast.Attribute):
        raise wrong
    try:
        options = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    except ValueError:
        raise wrong from None
    if None in options:
        raise wrong
    return ast.unparse(call.func), {str(key): value for key, value in options.items()}


def _values(seed: int) -> list[Tensor]:
    """One tensor of each shape, with sizes that a norm, or a ratio of norms, would treat unlike."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)
        for shape in _SHAPES
    ]


def _together(
    cls: Callable[..., torch.optim.Optimizer], options: Mapping[str, Any]
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Values after a few steps as the class is meant to be used, and the optimizer."""
    parameters = [nn.Parameter(value) for value in _values(0)]
    optimizer = _make(cls, options, parameters)
    for step in range(1, _STEPS + 1):
        for parameter, grad in zip(parameters, _values(step), strict=True):
            parameter.grad = grad
        with torch.no_grad():
            optimizer.step()
    return [parameter.detach() for parameter in parameters], optimizer


def _kept_together(
    cls: Callable[..., torch.optim.Optimizer],
    options: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
) -> list[str]:
    """What steps have changed in the group, the count of them aside."""
    fresh = _make(cls, options, [nn.Parameter(torch.zeros(1))])
    (before,), (after,) = fresh.param_groups, optimizer.param_groups
    return sorted(
        key for key in after.keys() - {"params", "step"} if str(after[key]) != str(before.get(key))
    )


def _agrees(companion: Companion, wanted: Sequence[Tensor]) -> bool:
    """Whether the same steps, made in pieces or tensor by tensor, end at the same values."""
    for index, expected in enumerate(wanted):
        rows = [_values(step)[index] for step in range(_STEPS + 1)]
        if companion.reach == "element":  # the elements of small ones, the large one in runs
            numel = expected.numel()
            sizes = [1] * numel if numel < 10 else [7, numel // 2, numel - numel // 2 - 7]
            rows = [row.reshape(-1) for row in rows]
            pieces = list(zip(*(torch.split(row, sizes) for row in rows), strict=True))
        else:
            pieces = [tuple(rows)]
        try:
            found = torch.cat([_alone(companion, *piece).reshape(-1) for piece in pieces])
        except Exception:
            return False
        if not torch.allclose(found, expected.reshape(-1), rtol=1e-4, atol=1e-6):
            return False
    return True


@torch.no_grad()
def _alone(companion: Companion, param: Tensor, *grads: Tensor) -> Tensor:
    state = {name: torch.zeros(shape) for name, shape in _foresee(companion, param.shape).items()}
    for step, grad in enumerate(grads, 1):
        companion.update_(param, grad, state, step=step, lr=0.1, weight_decay=0.01)
    return param


def _counter(optimizer: torch.optim.Optimizer) -> Counter:
    (group,) = optimizer.param_groups
    count = optimizer.state[group["params"][0]].get("step")
    if count is not None and count == _STEPS:
        return "tensor" if isinstance(count, Tensor) else "number"
    return "group" if "step" in group else "none"


def _elementwise(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    first = optimizer.param_groups[0]["params"][0]
    tensors = _tensors(optimizer, first)
    return tuple(name for name, each in tensors.items() if each.shape == first.shape)


def _tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and k != "step"}


def _say(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(each.shape)}" for name, each in state.items()) or "nothing"
