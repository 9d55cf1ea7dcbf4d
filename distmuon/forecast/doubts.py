"""Where the routing had to guess: parameters of which another look at the model might think else.

The rules of `param_groups` always decide. These are the cases in which a person should confirm: by
an override, which is never doubted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from distmuon.parameters import own_parameters

_MATRIX_MODULES = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_MATRIX_CLASS = re.compile(r"\w*(Linear|Conv1D|Dense|Router|Gate|Expert)\w*")


@dataclass(frozen=True, slots=True)
class Survey:
    """What is where in a model.

    Attributes:
        names: Each parameter's first name, in the model's order.
        owners: The module that has it under this name.
        tables: Name of an embedding by its shape.
    """

    names: Mapping[nn.Parameter, str]
    owners: Mapping[nn.Parameter, nn.Module]
    tables: Mapping[tuple[int, ...], str]


def survey(model: nn.Module) -> Survey:
    """Look at all modules of a model, once.

    Args:
        model: The model that was routed.
    """
    names: dict[nn.Parameter, str] = {}
    owners: dict[nn.Parameter, nn.Module] = {}
    tables: dict[tuple[int, ...], str] = {}
    for path, module in model.named_modules():
        for leaf, parameter in own_parameters(module):
            if parameter not in names:
                names[parameter] = f"{path}.{leaf}" if path else leaf
                owners[parameter] = module
        if isinstance(module, nn.Embedding):
            tables[tuple(module.weight.shape)] = path
    return Survey(names, owners, tables)


def doubt_about(
    name: str,
    parameter: nn.Parameter,
    reason: str,
    *,
    owner: nn.Module,
    tables: Mapping[tuple[int, ...], str],
) -> str:
    """Say what is doubtful about a trained parameter's routing.

    Args:
        name: Its FQN.
        parameter: The parameter.
        reason: Why it was routed as it is.
        owner: The module that it belongs to.
        tables: Name of an embedding by its shape.

    Returns:
        Words; empty if nothing is.
    """
    if reason.startswith("override"):
        return ""
    if reason.startswith("output head: the last Linear"):
        return "taken for the output head by its shape alone"
    if not reason.startswith(("hidden matrix", "stack of")):
        return ""
    if "fused blocks" in reason and "as one" in reason:
        return "several matrices in one parameter are orthogonalized as one"
    shape = tuple(parameter.shape)
    # In numbered layers the same shape is a coincidence.
    if (table := tables.get(shape)) and not any(part.isdecimal() for part in name.split(".")):
        return f"as large as {table}: an output head or a second embedding?"
    cls: Any = type(owner)
    if _is_of_matrices(cls) or isinstance(owner, _MATRIX_MODULES) or "expert" in name:
        return ""
    if len(shape) == 3:
        return f"first dimension, {shape[0]}, taken for the number of matrices"
    return f"a bare parameter of {type(owner).__name__}: a matrix, or a table of rows?"


# Few classes, many parameters; a bound, for a notebook may define the same class many times.
@lru_cache(1024)
def _is_of_matrices(kind: type[Any]) -> bool:
    return any(_MATRIX_CLASS.fullmatch(base.__name__) for base in kind.__mro__)
