"""Who averages the gradients over the ranks, and where the average of this rank's range is.

Three sources with one face, for P parameters: DistributedDataParallel averages `p.grad` on every
rank (2P elements sent per rank, and P more to publish the parameters); or a DDP communication hook
sends each rank its own range only (P and P); or there is no DDP and hooks on the parameters do the
same, freeing each gradient as it is sent.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from distmuon.buckets import Bucket
from distmuon.collectives import Communicator
from distmuon.errors import see
from distmuon.options import Reduce
from distmuon.reducer import Reducer

BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel's bucket_cap_mb


class GradientSource:
    """`reduce="ddp"`, and what the other modes share: `p.grad` is the average on every rank."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        """Read from the parameters of these buckets."""
        self._buckets = buckets
        self._frozen: list[tuple[str, Tensor]] = []

    def attach(self, model: nn.Module) -> None:
        """Register with a model: here only note what is frozen.

        Raises:
            ValueError: if model and optimizer do not train the same parameters.
        """
        _require_same_parameters(model, self._buckets)
        self._frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which gradients accumulate and are not sent.

        Raises:
            RuntimeError: if DistributedDataParallel sends them, which has its own.
        """
        raise RuntimeError(
            'The optimizer\'s no_sync() is for reduce="owned". Use the no_sync() of '
            "DistributedDataParallel." + see("attach")
        )

    def present(self) -> list[list[bool]]:
        """Whether this rank has a gradient, for each parameter of each bucket."""
        return [[p.grad is not None for p in bucket.spec.parameters] for bucket in self._buckets]

    def read(self) -> list[Tensor]:
        """The averaged gradients of this rank's range, [shard_numel] for each bucket.

        Raises:
            RuntimeError: if a parameter of the attached model is trainable only now.
        """
        self._refuse_unfrozen()
        return [bucket.shard.read_grad() for bucket in self._buckets]

    def _refuse_unfrozen(self) -> None:
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise RuntimeError(
                    f"{name} was frozen at attach() and is trainable now, but nobody averages its "
                    "gradient or updates it. Freeze it, or call add_param_group(), refresh() and "
                    "attach() on every rank." + see("attach")
                )

    def scale_(self, factor: float) -> None:
        """Multiply the averaged gradients by a factor before they are read."""
        for bucket in self._buckets:
            for parameter in bucket.spec.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def clear(self) -> None:
        """Forget what was received for this step; `p.grad` belongs to the user."""


def make_source(
    reduce: Reduce, buckets: Sequence[Bucket], communicator: Communicator
) -> GradientSource:
    """The source for a mode; one process has nothing to reduce, whatever the mode.

    Args:
        reduce: The mode.
        buckets: What the gradients belong to.
        communicator: The group.

    Returns:
        The source.
    """
    if reduce == "ddp" or communicator.world_size == 1:
        return GradientSource(buckets)
    if reduce == "hook":
        return HookGradients(buckets, communicator)
    return OwnedGradients(buckets, communicator)


class _ReducedGradients(GradientSource):
    """The averages arrive from a reducer."""

    def __init__(self, buckets: Sequence[Bucket], communicator: Communicator) -> None:
        """Prepare for `attach`."""
        super().__init__(buckets)
        self._communicator = communicator
        self._reducer = Reducer(buckets, communicator)

    @override
    def read(self) -> list[Tensor]:
        """The received averages of this rank's range.

        Raises:
            RuntimeError: if a parameter of the attached model is trainable only now.
        """
        self._refuse_unfrozen()
        return self._reducer.finish()

    @override
    def scale_(self, factor: float) -> None:
        """Multiply the received averages by a factor."""
        for grad in self._reducer.finish():
            grad.mul_(factor)

    @override
    def clear(self) -> None:
        """Drop the received averages."""
        self._reducer.drop()


class HookGradients(_ReducedGradients):
    """`reduce="hook"`: DDP calls us for each of its buckets instead of all-reducing it.

    `p.grad` keeps this rank's own, unaveraged gradient.
    """

    def __init__(self, buckets: Sequence[Bucket], communicator: Communicator) -> None:
        """Prepare for `attach`."""
        super().__init__(buckets, communicator)
        self._sent: set[Tensor] = set()
        self._unsent: set[Tensor] = set()  # accumulated since, or never sent

    @override
    def attach(self, model: nn.Module) -> None:
        """Register the hook.

        Raises:
            TypeError: if the model is not wrapped in DistributedDataParallel.
            ValueError: if model and optimizer do not train the same parameters.
        """
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(
                f'reduce="hook" is for DistributedDataParallel, not for {type(model).__name__}. '
                'Wrap the model first, or use reduce="owned" without DDP.' + see("attach")
            )
        if not self._communicator.same_ranks(model.process_group):
            raise ValueError(
                "DistributedDataParallel and the optimizer have different process groups, so their "
                "averages would differ. Give both the same process_group." + see("attach")
            )
        super().attach(model)
        method = weakref.WeakMethod(self._on_gradient)
        for parameter in (p for bucket in self._buckets for p in bucket.spec.parameters):
            parameter.register_post_accumulate_grad_hook(partial(_call, method))  # type: ignore[no-untyped-call]
        model.register_comm_hook(self, _ddp_hook)

    def _on_gradient(self, parameter: Tensor) -> None:
        self._unsent.add(parameter)

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Send one of DDP's buckets; DDP calls this after the gradients were accumulated.

        Args:
            pairs: Parameters and their gradients on this rank.
        """
        self._reducer.start(pairs)
        parameters = [parameter for parameter, _ in pairs]
        self._sent.update(parameters)
        self._unsent.difference_update(parameters)

    @override
    def read(self) -> list[Tensor]:
        """The received averages of this rank's range.

        Raises:
            RuntimeError: if a gradient was accumulated after, or without, being sent.
        """
        for bucket in self._buckets:
            for name, parameter in zip(bucket.spec.names, bucket.spec.parameters, strict=True):
                averaged = parameter in self._sent and parameter not in self._unsent
                if parameter.grad is not None and not averaged:
                    raise RuntimeError(
                        f"The gradient of {name} was not reduced over the ranks: the last backward "
                        "pass ran under no_sync(), went through the bare module instead of the one "
                        "given to attach(), or came before the last step."
                        + see("gradient-not-averaged")
                    )
        return super().read()

    @override
    def clear(self) -> None:
        """Drop the received averages."""
        self._sent.clear()
        self._unsent.clear()
        super().clear()


def _ddp_hook(source, bucket):  # type: ignore[no-untyped-def]  # DDP refuses string annotations
    source.send(list(zip(bucket.parameters(), bucket.gradients(), strict=True)))
    buffer = bucket.buffer()
    # Done as far as DDP is concerned: `start` has copied what it sends, and nobody reads the
    # unaveraged buffer.
    devices = [buffer.device] if buffer.device.type == "cuda" else None
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
    future.set_result(buffer)
    return future


class OwnedGradients(_ReducedGradients):
    """`reduce="owned"`: hooks on the parameters send each set of them as soon as it is complete.

    Sets leave in one fixed order on every rank, whatever order backward fills them in, and all of
    them before backward returns: a rank that did not use a parameter must not be a message behind
    the others when the user's own collectives follow.
    """

    def __init__(self, buckets: Sequence[Bucket], communicator: Communicator) -> None:
        """Prepare for `attach`."""
        super().__init__(buckets, communicator)
        self._sets: list[list[Tensor]] = []
        self._set_of: dict[Tensor, int] = {}
        self._waiting: list[set[Tensor]] = []
        self._sent = 0
        self._end: Literal["queued", "open"] = "open"
        self._has: set[Tensor] = set()
        self._mode: Literal["reduce", "accumulate"] = "reduce"

    @override
    def attach(self, model: nn.Module) -> None:
        """Give every rank rank 0's weights and buffers, and register the hooks.

        Raises:
            TypeError: if the model is wrapped in DistributedDataParallel, which would average too.
            ValueError: if model and optimizer do not train the same parameters.
        """
        if isinstance(model, DistributedDataParallel):
            raise TypeError(
                'reduce="owned" replaces DistributedDataParallel. Attach the bare module, or use '
                'reduce="hook".' + see("attach")
            )
        super().attach(model)
        for bucket in self._buckets:
            self._communicator.broadcast(bucket.shard.flat)
        for buffer in model.buffers():
            self._communicator.broadcast(buffer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sets = _by_size(trained)
        self._set_of = {p: index for index, members in enumerate(self._sets) for p in members}
        # The parameters outlive this optimizer and must not keep it at work.
        method = weakref.WeakMethod(self._on_gradient)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(partial(_call, method))  # type: ignore[no-untyped-call]
        self.clear()

    @override
    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate in `p.grad` for all micro-batches but the last."""
        before, self._mode = self._mode, "accumulate"
        try:
            yield
        finally:
            self._mode = before

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._mode == "accumulate":
            return
        index = self._set_of[parameter]
        if index < self._sent:
            raise RuntimeError(
                "A parameter got a second gradient after its first was sent. Run every backward "
                "pass of a step but the last under optimizer.no_sync(), and call zero_grad() "
                "when a step is left out." + see("gradient-not-averaged")
            )
        if self._end == "open":
            self._end = "queued"
            # As DDP does: runs when this backward pass ends.
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._send_rest)
        self._waiting[index].discard(parameter)
        while self._sent < len(self._sets) and not self._waiting[self._sent]:
            self._send()

    def _send_rest(self) -> None:
        self._end = "open"
        while self._sent < len(self._sets):
            self._send()

    def _send(self) -> None:
        members = self._sets[self._sent]
        self._has.update(p for p in members if p.grad is not None)
        self._reducer.start([(p, p.grad) for p in members])
        for parameter in members:
            parameter.grad = None
        self._sent += 1

    @override
    def present(self) -> list[list[bool]]:
        """Whether backward gave a gradient; takes part for a rank that had no backward pass."""
        self._send_rest()
        return [[p in self._has for p in bucket.spec.parameters] for bucket in self._buckets]

    @override
    def clear(self) -> None:
        """Drop the received averages and start a new round."""
        self._reducer.drop()
        self._waiting = [set(members) for members in self._sets]
        self._sent, self._end = 0, "open"
        self._has.clear()


def _call(method: weakref.WeakMethod[Any], parameter: Tensor) -> None:
    hook = method()
    if hook is not None:
        hook(parameter)


def _require_same_parameters(model: nn.Module, buckets: Sequence[Bucket]) -> None:
    known: dict[Tensor, str] = {}
    for bucket in buckets:
        known.update(zip(bucket.spec.parameters, bucket.spec.names, strict=True))
    trained: dict[Tensor, str] = {
        parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    for name in (name for parameter, name in trained.items() if parameter not in known):
        raise ValueError(
            f"{name} is trainable but not in the optimizer: its gradient would never be averaged. "
            "Freeze it or add it to a group." + see("attach")
        )
    for name in (name for parameter, name in known.items() if parameter not in trained):
        raise ValueError(
            f"{name} is in the optimizer but no trainable parameter of the attached model."
            + see("attach")
        )


def _by_size(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Sets of at most `BUCKET_BYTES`, of one dtype and device, last parameters first."""
    sets: list[list[Tensor]] = []
    size, kind = BUCKET_BYTES, None
    for parameter in reversed(parameters):
        nbytes = parameter.numel() * parameter.element_size()
        if size + nbytes > BUCKET_BYTES or (parameter.dtype, parameter.device) != kind:
            sets.append([])
            size, kind = 0, (parameter.dtype, parameter.device)
        sets[-1].append(parameter)
        size += nbytes
    return sets
