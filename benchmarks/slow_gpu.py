"""A GPU that is as slow as one likes: memory of its own behind throttled links, and products that take their time.

The processor computes what the device should, which is fast where a model is small. Then the thread sleeps for the rest
of the time that a device of the given speed would take. The cores are free meanwhile, as they are beside a GPU, for
lanes that copy and for attention on the host.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from engine.devices.simulated import SimulatedDevice

_SHORTEST_S = 0.0005
"""What is slept at once, at least: the system cannot do less with any accuracy."""


class SlowGpu(SimulatedDevice):
    """Computes ``flops`` and reads ``memory_speed`` bytes a second; each link carries ``link_speed`` bytes a second."""

    def __init__(self, *, flops: float, memory_speed: float, link_speed: float) -> None:
        super().__init__(bytes_per_second=link_speed)
        self._slowly = _Slowly(flops, memory_speed)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Everything that the thread computes takes as long as it would there."""
        with self._slowly:
            yield


_UNPACKING = (torch.ops.aten.bitwise_right_shift, torch.ops.aten.bitwise_and)
"""What takes codes out of bytes, and nothing else does."""


class _Slowly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, flops: float, memory_speed: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flops, self._memory_speed = flops, memory_speed
        self._free_at = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute; when the device would be done is counted on, and waited for once it is worth it."""
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        begun = time.perf_counter()
        found = func(*args, **(kwargs or {}))
        ended = time.perf_counter()
        self._free_at = max(ended, max(begun, self._free_at) + self._seconds(func, args, kwargs or {}, found))
        if self._free_at - ended > _SHORTEST_S:
            time.sleep(self._free_at - ended)
        return found

    def _seconds(self, func: Any, args: Any, kwargs: Any, found: Any) -> float:
        """What the device takes over an operation, at least: only products, attention and unpacking are made slower."""
        if func is torch.ops.overnight.attend_packed.default:
            return self._attention_s(*args)
        if func is torch.ops.mkldnn._linear_pointwise.default:  # this engine's own; PyTorch's list has it not
            operations = 2 * args[0].shape[0] * args[1].numel()
        elif func.overloadpacket in _UNPACKING:
            operations = 0
        elif (count := flop_registry.get(func.overloadpacket)) is not None:
            operations = count(*args, **kwargs, out_val=found)
        else:
            return 0.0
        values = [each for each in (*args, *kwargs.values(), found) if isinstance(each, Tensor)]
        moved = sum(each.numel() * each.element_size() for each in values)
        return max(float(operations) / self._flops, moved / self._memory_speed)

    def _attention_s(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, starts: Tensor, used: Tensor, *_: Any
    ) -> float:
        queries = (cu_q[1:] - cu_q[:-1]).tolist()
        keys = used.tolist()
        pairs = sum(count * its for count, its in zip(queries, keys, strict=True))
        operations = 4.0 * pairs * q.shape[1] * q.shape[2]
        moved = 2 * sum(keys) * k.shape[1] * k.shape[2] * k.element_size()
        return float(max(operations / self._flops, moved / self._memory_speed))
