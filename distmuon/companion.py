"""Any elementwise optimizer class as the update rule of the parameters that Muon does not take.

A group names it in its `algorithm`: "torch.optim.SGD(momentum=0.9)", a class by its module and the
options that are not the group's own. The rule is applied to runs of a flat buffer, so it must treat
every element alike, wherever a tensor starts and ends. That is not taken on trust: a class is tried
on a small tensor, whole and element by element, before it is used.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distmuon.errors import see

# Sizes that clipping by a norm, or a ratio of norms, would treat unlike.
_VALUES = (0.5, -2.0, 3.0, 0.01, -0.7, 8.0)
_GRADS = (0.3, -5.0, 0.02, 1.0, -0.4, 40.0)
_STEPS = 3


@dataclass(frozen=True, slots=True)
class Companion:
    """A class that has been tried.

    Attributes:
        algorithm: What a group calls it.
        cls: The class.
        options: What it is told beside learning rate and weight decay.
        state: Names of its state tensors, each of the parameter's shape.
        counter: Where it counts its steps: in the parameter's state, as a tensor or a number; in
            its group; or not at all.
    """

    algorithm: str
    cls: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any]
    state: tuple[str, ...]
    counter: Literal["tensor", "number", "group", "none"]

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
        """One step on any run of a flat buffer.

        Args:
            param: [n]; updated in place.
            grad: [n], same dtype.
            state: [n] each, by name; updated in place.
            step: Number of this step, from 1.
            lr: Learning rate.
            weight_decay: As the class takes it: decoupled, or added to the gradient.
        """
        parameter = nn.Parameter(param)
        parameter.grad = grad
        optimizer = self.cls([parameter], lr=lr, weight_decay=weight_decay, **self.options)
        (group,) = optimizer.param_groups
        if step > 1:  # at the first one the class fills in what it starts from
            optimizer.state[parameter].update(state)
            count = step - 1
            if self.counter == "group":
                group["step"] = count
            elif self.counter != "none":
                tensor = self.counter == "tensor"
                optimizer.state[parameter]["step"] = torch.tensor(float(count)) if tensor else count
        optimizer.step()
        for name, target in state.items():
            made = optimizer.state[parameter].get(name)
            if made is not None and made is not target:
                target.copy_(made)


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
        whole, optimizer = _try(cls, options, [nn.Parameter(torch.tensor(_VALUES).view(2, 3))])
        single = [nn.Parameter(torch.tensor([value])) for value in _VALUES]
        apart, _ = _try(cls, options, single)
    except Exception as error:
        raise ValueError(
            f"Invalid algorithm={algorithm!r}. It failed on a small tensor: "
            f"{type(error).__name__}: {error}." + see("bad-group")
        ) from error
    if not torch.allclose(whole, apart, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"Invalid algorithm={algorithm!r}. {name} looks at whole tensors: its step on a tensor "
            "is not its step on the elements, and a sharded tensor is cut anywhere. Take an "
            "elementwise class, or give these parameters to an optimizer of their own."
            + see("bad-group")
        )
    return Companion(algorithm, cls, options, *_read_state(algorithm, optimizer))


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


def _try(
    cls: Callable[..., torch.optim.Optimizer],
    options: Mapping[str, Any],
    parameters: list[nn.Parameter],
) -> tuple[Tensor, torch.optim.Optimizer]:
    """Values after a few steps, in one row, and the optimizer."""
    optimizer = cls(parameters, lr=0.1, weight_decay=0.01, **options)
    for step in range(_STEPS):
        grads = torch.tensor(_GRADS).roll(step)
        for parameter, grad in zip(
            parameters, torch.split(grads, parameters[0].numel()), strict=True
        ):
            parameter.grad = grad.view(parameter.shape).clone()
        with torch.no_grad():
            optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in parameters]), optimizer


def _read_state(
    algorithm: str, optimizer: torch.optim.Optimizer
) -> tuple[tuple[str, ...], Literal["tensor", "number", "group", "none"]]:
    (parameter,) = optimizer.param_groups[0]["params"]
    names: list[str] = []
    counter: Literal["tensor", "number", "group", "none"] = "none"
    if "step" in optimizer.param_groups[0]:
        counter = "group"
    for name, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            names.append(name)
        elif name == "step" and value == _STEPS:
            counter = "tensor" if isinstance(value, Tensor) else "number"
        elif value is not None:
            raise ValueError(
                f"Invalid {algorithm=}. It keeps {name!r} for each tensor, which a piece of a "
                "tensor cannot have. Take another class." + see("bad-group")
            )
    return tuple(names), counter
