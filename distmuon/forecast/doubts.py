"""Where the routing had to guess: parameters of which another look at the model might think else.

The rules of `param_groups` always decide. These are the cases in which a person should confirm: by
an override, which is never doubted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

_MATRIX_MODULES = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_MATRIX_CLASS = re.compile(r"\w*(Linear|Conv1D|Dense|Router|Gate|Expert)\w*")


def find_tables(model: nn.Module) -> dict[tuple[int, ...], str]:
    """Name of an embedding by its shape.

    Args:
        model: The model that was routed.
    """
    return {
        tuple(module.weight.shape): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }


def find_owners(model: nn.Module) -> dict[nn.Parameter, nn.Module]:
    """The module that each parameter belongs to; the last one of several.

    Args:
        model: The model that was routed.
    """
    found: dict[nn.Parameter, nn.Module] = {}
    left = [model]
    while left:
        module = left.pop()
        found.update((parameter, module) for parameter in module.parameters(recurse=False))
        left.extend(module.children())
    return found


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
        tables: From `find_tables`.

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
    in_layer = any(part.isdecimal() for part in name.split("."))
    if not in_layer and (table := tables.get(shape)):
        return f"as large as {table}: an output head or a second embedding?"
    named = any(_MATRIX_CLASS.fullmatch(base.__name__) for base in type(owner).__mro__)
    if named or isinstance(owner, _MATRIX_MODULES) or "expert" in name:
        return ""
    if len(shape) == 3:
        return f"first dimension, {shape[0]}, taken for the number of matrices"
    return f"a bare parameter of {type(owner).__name__}: a matrix, or a table of rows?"
