"""One rank's range of a flat parameter buffer, with the optimizer state that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from typing_extensions import override

from distmuon.collectives import Communicator, Pending
from distmuon.errors import see
from distmuon.failure import Topic
from distmuon.kernels import elementwise
from distmuon.kernels.device import on_device_of
from distmuon.layout import Layout
from distmuon.parameters import canonical_name
from distmuon.rounding import Piece, make_key, round_


class Run(NamedTuple):
    """Neighbouring pieces of a shard that are updated alike.

    Attributes:
        group: Index of their parameter group.
        step: Number of their update, from 1.
        start: First element in the shard.
        stop: One past the last.
    """

    group: int
    step: int
    start: int
    stop: int


class Range:
    """One rank's range of a flat buffer: values in fp32 or wider, and the state beside them.

    The update rules need no more.

    Attributes:
        layout: Where the parameters lie.
        segments: The pieces in this range, in order.
        master: [layout.shard_numel], fp32 or wider; this rank's range of the parameters.
        rank: Whose range it is.
        state: Named state in the dtype of `master`: each [layout.shard_numel], or as long as the
            rank's values per row.
        steps: How often each parameter has been updated.
    """

    def __init__(
        self, layout: Layout, rank: int, master: Tensor, state: Mapping[str, Tensor]
    ) -> None:
        """Hold on to a range and its state.

        Args:
            layout: Where each parameter lies.
            rank: Whose range of the buffer this is.
            master: [layout.shard_numel], the values; updated in place.
            state: What belongs to them; updated in place.
        """
        self.layout = layout
        self.rank = rank
        self.segments = layout.segments(rank)
        self.steps = [0] * len(layout.specs)
        self.master = master
        self.state = dict(state)

    def first_nonfinite(self, grad: Tensor) -> str | None:
        """Name of the first parameter with a NaN or an infinity in this rank's range.

        Args:
            grad: [layout.shard_numel], from `read_grad`.

        Returns:
            Its FQN, or None if all is finite.
        """
        # One pass without temporaries: 2 ms for 10.6 M elements, isfinite().all() took 56.
        # A NaN is both the least and the most.
        least, most = torch.aminmax(grad)
        if bool(torch.isfinite(least) & torch.isfinite(most)):
            return None
        for segment in self.segments:
            piece = grad[segment.shard_start :][: segment.numel]
            if not bool(torch.isfinite(piece).all()):
                return self.layout.specs[segment.tensor].name
        raise AssertionError("alignment gaps hold zeros")

    def begin_step(self, present: Sequence[bool], groups: Sequence[int]) -> list[Run]:
        """Count one more update of the present parameters and say where they lie.

        Args:
            present: For each parameter whether it is updated.
            groups: Index of each parameter's group.

        Returns:
            Runs in shard order. Alignment gaps inside a run are covered: they hold zeros.
        """
        self.steps[:] = [step + has for step, has in zip(self.steps, present, strict=True)]
        merged: list[Run] = []
        follows = False  # whether the piece before this one belongs to the last run
        for segment in self.segments:
            tensor, stop = segment.tensor, segment.shard_start + segment.numel
            run = Run(groups[tensor], self.steps[tensor], segment.shard_start, stop)
            if not present[tensor]:
                follows = False
            elif follows and merged[-1][:2] == run[:2]:
                merged[-1] = merged[-1]._replace(stop=stop)
            else:
                merged.append(run)
                follows = True
        return merged


class FlatRange(Range):
    """A range of a buffer that parameters are views of: of our own, or of a framework's.

    master copy for narrower ones. With a seed for stochastic rounding that copy is there only from
    `begin_step` to `finish_step`.

    Attributes:
        parameters: The parameters, in flat order.
        flat: [layout.numel], the parameters' dtype; every parameter is a view of it.
        mine: [layout.shard_numel], this rank's range of `flat`; perhaps the memory of `master`.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        parameters: Sequence[Tensor],
        flat: Tensor,
        master: Tensor,
        state: Mapping[str, Tensor],
    ) -> None:
        """Hold on to a range and the buffer that it belongs to.

        Args:
            layout: Where each parameter lies.
            rank: Whose range of the buffer this is.
            parameters: One per `layout.specs` entry, views of `flat`.
            flat: [layout.numel], the buffer.
            master: [layout.shard_numel], the values; updated in place.
            state: What belongs to them; updated in place.
        """
        super().__init__(layout, rank, master, state)
        self.parameters = tuple(parameters)
        self.flat = flat
        self.mine = flat.view(layout.world_size, -1)[rank]

    @torch.no_grad()
    def adopt(self) -> None:
        """Take in what was written into the parameters from outside since the last step.

        It replaces the master where that is a copy, or weights loaded into a bf16 model would be
        overwritten by it.
        """
        if self.master.data_ptr() == self.mine.data_ptr():
            return
        if self.mine.dtype == torch.bfloat16 and elementwise.takes(self.master):
            elementwise.adopt_(self.master, self.mine)
            return
        written = self.mine != self.master.to(self.flat.dtype)
        self.master.copy_(torch.where(written, self.mine.to(self.master.dtype), self.master))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All state by name, with the fp32 "master" of narrow parameters."""
        masters = {"master": self.master} if self._keeps_master else {}
        return {**self.state, **masters}

    @property
    def _keeps_master(self) -> bool:
        return self.master.dtype != self.flat.dtype


class Shard(FlatRange):
    """The flat buffer of same-dtype parameters and this rank's 1/N of their state.

    The parameters become views of the buffer, so that one in-place all-gather publishes them. The
    rank's own range is updated in at least fp32: it is the buffer itself for fp32 parameters and a
    master copy for narrower ones.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        parameters: Sequence[Tensor],
        state_numels: Mapping[str, int],
        *,
        seed: int | None = None,
    ) -> None:
        """Copy the parameters into one buffer and make them views of it.

        Args:
            layout: Where each parameter lies.
            rank: Whose range of the buffer this is.
            parameters: One per `layout.specs` entry, same dtype and device.
            state_numels: Names and lengths of the state tensors to allocate, zeros at first.
            seed: Of stochastic rounding, for bfloat16 parameters; None to keep a master copy.
        """
        first = parameters[0]
        self.parameters = tuple(parameters)
        self.flat = torch.zeros(layout.numel, dtype=first.dtype, device=first.device)
        # DLPack gives each view a storage object of its own over the buffer's memory. Whoever takes
        # parameters of one storage for tied would otherwise save the first and drop the others
        # (Accelerate's save_state), and torch.save would write the whole buffer for any one.
        with on_device_of(self.flat):  # torch exports from the current device only
            self._views = tuple(
                from_dlpack(self.flat[offset : offset + spec.numel]).view(spec.shape)
                for spec, offset in zip(layout.specs, layout.offsets, strict=True)
            )
        self._topic = Topic("publish", None, tuple(spec.name for spec in layout.specs))
        self.layout = layout
        self._adopt_storage()
        self._seed = seed
        wide = torch.promote_types(first.dtype, torch.float32)
        mine = self.flat.view(layout.world_size, -1)[rank]
        # What stands for the copy between steps: one zero, to the eye as long as it.
        self._no_master = mine.new_zeros(1, dtype=wide).expand(mine.shape)
        # Shares storage when the dtype is already wide enough.
        master = mine.to(wide) if seed is None else self._no_master
        state = {name: master.new_zeros(numel) for name, numel in state_numels.items()}
        super().__init__(layout, rank, self.parameters, self.flat, master, state)

    @override
    def adopt(self) -> None:
        """Take in what was done to the parameters from outside since the last step.

        New storage under a Parameter (`model.to()`, `parameter.data = ...`) becomes a view of the
        buffer again. Values written into a narrow parameter replace their fp32 master.

        Raises:
            RuntimeError: if a parameter now has another shape, dtype or device.
        """
        self._adopt_storage()
        if self._seed is None:
            super().adopt()

    @override
    def begin_step(self, present: Sequence[bool], groups: Sequence[int]) -> list[Run]:
        if self._seed is not None:
            self.master = self.mine.to(self.master.dtype)
        return super().begin_step(present, groups)

    def finish_step(self) -> None:
        """Let go of what is not kept between steps, once everything has been sent."""
        if self._seed is not None:
            self.master = self._no_master

    @property
    @override
    def _keeps_master(self) -> bool:
        return self._seed is None and super()._keeps_master

    def _adopt_storage(self) -> None:
        rows = zip(self.layout.specs, self.parameters, self._views, strict=True)
        for spec, parameter, view in rows:
            if (parameter.shape, parameter.dtype, parameter.device) != (
                view.shape,
                view.dtype,
                view.device,
            ):
                raise RuntimeError(
                    f"{spec.name} became {parameter.dtype} {list(parameter.shape)} on "
                    f"{parameter.device} after the first step; its optimizer state is for "
                    f"{view.dtype} {list(view.shape)} on {view.device}. Change the model before "
                    "the first step, or build a new optimizer." + see("changed-parameters")
                )
            if (parameter.data_ptr(), parameter.stride()) != (view.data_ptr(), view.stride()):
                view.copy_(
                    parameter.data.clone()
                )  # it may be a transposed view of this very memory
                parameter.data = view

    def read_grad(self) -> Tensor:
        """This rank's range of the averaged gradients.

        Returns:
            [layout.shard_numel] in the dtype of `master`; zero where a parameter has no gradient.

        Raises:
            TypeError: for a sparse gradient, naming the parameter.
        """
        grad = torch.empty_like(self.master)
        filled = 0
        for segment in self.segments:
            source = self.parameters[segment.tensor].grad
            if source is None:
                continue
            if source.layout != torch.strided:
                name = self.layout.specs[segment.tensor].name
                raise TypeError(
                    f"{name} has a {source.layout} gradient. Must be dense: build its layer with "
                    "sparse=False." + see("bad-tensor")
                )
            piece = source.reshape(-1)[segment.tensor_start :][: segment.numel]
            grad[filled : segment.shard_start].zero_()
            filled = segment.shard_start + segment.numel
            grad[segment.shard_start : filled].copy_(piece)
        grad[filled:].zero_()
        return grad

    def publish(
        self, communicator: Communicator, start: int = 0, stop: int | None = None
    ) -> Pending:
        """Start to give every rank the updated parameters.

        Args:
            communicator: The group over which the buffer is sharded.
            start: First element of each shard that is sent.
            stop: One past the last; None for the end.

        Returns:
            The message in flight; the parameters are complete once it has been waited for.
        """
        if self._keeps_master:
            self.mine[start:stop].copy_(self.master[start:stop])
        elif self._seed is not None:
            end = self.layout.shard_numel if stop is None else stop
            pieces = self._pieces(self._seed, start, end)
            round_(self.mine[start:end], self.master[start:end], pieces)
        if (start, stop) == (0, None):
            return communicator.publish(self.flat, topic=self._topic)
        shards = self.flat.view(communicator.world_size, -1)[:, start:stop]
        return communicator.publish_part(shards, topic=self._topic)

    def _pieces(self, seed: int, start: int, stop: int) -> list[Piece]:
        """What lies from `start` to `stop`, for rounding."""
        pieces = []
        for segment in self.segments:
            first = max(start, segment.shard_start)
            end = min(stop, segment.shard_start + segment.numel)
            if first < end:
                name = canonical_name(self.layout.specs[segment.tensor].name)
                key = make_key(seed, name, self.steps[segment.tensor])
                place = segment.tensor_start + first - segment.shard_start
                pieces.append(Piece(first - start, end - start, place, key))
        return pieces

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank, the fp32 master of narrow parameters included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def take_state(self, steps: list[int], tensors: Mapping[str, Tensor]) -> None:
        """Go on with state that was loaded before there was a shard.

        Args:
            steps: How often each parameter has been updated; kept, not copied.
            tensors: Named state, as long as here, and perhaps "master"; those of the right dtype
                and device are kept, not copied.
        """
        self.steps = steps
        for name, tensor in tensors.items():
            here = self.master if name == "master" else self.state[name]
            there = tensor.to(here)
            if name != "master":
                self.state[name] = there
            elif self._keeps_master:
                self.master = there
