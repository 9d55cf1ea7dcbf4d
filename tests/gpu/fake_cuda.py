"""CUDA tensors without a GPU: shapes, dtypes and devices are real, values are not there.

torch's fake tensors on "cuda" compute nothing, and refuse what a GPU would: operands on two
devices. `fake_cuda` also counts where the host waits for the device, as
`torch.cuda.set_sync_debug_mode` would: at a number that is read, and at a copy between host and
device that is not `non_blocking`. What the host computes with tensors of its own is real. torch's
fused optimizers, which read tensors by address, are refused those of another device. A message of
CUDA tensors arrives at once, with nothing in it; only what was copied from the host is reduced for
real, by the group's backend for the CPU.

Stood in for is what a machine without a GPU lacks, and no more:

- the driver: its capability (9.0, an H100), the current device, that no graph is being captured,
  and events, between which no time passes;
- the guard that makes a device current, which builds of torch for CPUs have no entry for: the one
  of the meta device, which does nothing. torch itself puts one like it there in a build for CUDA
  that finds no GPU;
- memory: an address is equal for tensors of one storage and offset, and for no others; DLPack, by
  which a shard makes views, gives a view, from the current device only, as torch's does.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.dlpack import from_dlpack
from torch.utils.weak import WeakTensorKeyDictionary

# Positions of c10::DeviceType.
_CUDA, _META, _DEVICE_TYPES = 1, 14, 21


@dataclass
class Host:
    """What the host does.

    Attributes:
        waits: How often it waited for the device, by operation.
        current: Index of the current device.
        sent: Messages of CUDA tensors, by operation and device.
    """

    waits: Counter[str] = field(default_factory=Counter)
    current: int = 0
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)


@contextmanager
def fake_cuda() -> Iterator[Host]:
    """Inside, tensors on "cuda:0" and so on are fake.

    Yields:
        What the host does inside.
    """
    host, known = Host(), WeakTensorKeyDictionary()
    with pytest.MonkeyPatch.context() as patch, _device_guard():
        _replace_driver(patch, host)
        _replace_memory(patch, host, known)
        with _Cuda(host, known):
            yield host


@contextmanager
def _device_guard() -> Iterator[None]:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    before = table[_CUDA]
    table[_CUDA] = table[_META]
    try:
        yield
    finally:
        table[_CUDA] = before


_H100 = SimpleNamespace(multi_processor_count=132, major=9, minor=0)


class _Event:
    """A torch.cuda.Event without a device."""

    def __init__(self, *, enable_timing: bool = False) -> None:
        self.stream: Any = None

    def record(self, stream: Any = None) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 0.0


def _replace_driver(patch: pytest.MonkeyPatch, host: Host) -> None:
    def exchange(index: int) -> int:
        before = host.current
        host.current = index if index >= 0 else before
        return before

    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "is_initialized", lambda: True)
    patch.setattr(torch.cuda, "_exchange_device", exchange)
    patch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    patch.setattr(torch.cuda, "current_device", lambda: host.current)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(torch.cuda, "get_device_properties", lambda device=None: _H100)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: torch.device(device))
    patch.setattr(torch.cuda, "Event", _Event)
    patch.setattr(torch.version, "cuda", None)  # a build for CUDA would launch kernels


def _replace_memory(patch: pytest.MonkeyPatch, host: Host, known: WeakTensorKeyDictionary) -> None:
    def address(tensor: FakeTensor) -> int:
        # Far enough apart for any tensor.
        return (tensor.untyped_storage()._cdata << 32) + tensor.storage_offset() * tensor.itemsize

    def tolist(tensor: FakeTensor) -> Any:
        # As one copy: torch's own reads fake values one by one.
        host.waits["tolist"] += 1
        value = known.get(tensor)
        return (torch.ones(tensor.shape, dtype=tensor.dtype) if value is None else value).tolist()

    def view(tensor: Tensor) -> Tensor:
        if tensor.is_cuda and tensor.device.index != host.current:
            raise BufferError("Can't export tensors on a different CUDA device index.")
        return tensor.view(tensor.shape) if tensor.is_cuda else from_dlpack(tensor)

    patch.setattr(FakeTensor, "data_ptr", address)
    patch.setattr(FakeTensor, "tolist", tolist)
    patch.setattr("distmuon.shard.from_dlpack", view)


class _Cuda(TorchDispatchMode):
    """Gives what concerns CUDA to fake tensors, and notes what makes the host wait for it."""

    def __init__(self, host: Host, known: WeakTensorKeyDictionary) -> None:
        super().__init__()
        # Copies of the host's tensors, and their values.
        self._known = known
        self._fake = FakeTensorMode()
        self._host = host

    def __enter__(self) -> _Cuda:
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=) comes here
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._before)
        super().__exit__(*error)

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        wanted = torch.device(kwargs.get("device") or "cpu")
        if wanted.type == "cpu" and not any(isinstance(each, FakeTensor) for each in tensors):
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if function.namespace == "c10d":
            return self._send(function, name, args, kwargs)
        if name.startswith("_fused_") and len({each.device for each in tensors}) > 1:
            raise RuntimeError(f"{name} reads its tensors by address: they must be on one device")
        if name == "_local_scalar_dense":
            self._host.waits[name] += 1
            return torch.ones((), dtype=tensors[0].dtype).item()
        with self._fake:
            out = function(*tree_map(self._faked, args), **tree_map(self._faked, kwargs))
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        crosses = len({each.device.type for each in (*tensors, *made)}) > 1
        if (crosses and _is_blocking_copy(name, args, kwargs)) or name == "_linalg_check_errors":
            self._host.waits[name] += 1
        if name == "_to_copy" and out.is_cuda and not isinstance(args[0], FakeTensor):
            self._known[out] = args[0].to(out.dtype)
        return out

    def _send(
        self, function: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Note a message. Numbers of the host are reduced for real; all else arrives at once."""
        fakes = [each for each in tree_leaves((args, kwargs)) if isinstance(each, FakeTensor)]
        for device in {str(each.device) for each in fakes}:
            self._host.sent[name, device] += 1
        if name == "allreduce_":
            values = [self._known[each] for each in fakes]
            _, work = function(values, *args[1:], **kwargs)
            return fakes, work
        work = FakeWork().boxed()
        return work if name in ("alltoall_base_", "send", "recv_") else (args[0], work)

    def _faked(self, value: Any) -> Any:
        is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self._fake.from_tensor(value) if is_real else value


def _is_blocking_copy(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if name == "copy_":
        return not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    return name == "_to_copy" and not kwargs.get("non_blocking", False)
