"""The simulated device, as late as a GPU: operations are only issued when they are called, and run afterwards.

Compute has a thread of its own. An operation on device memory returns at once with a result that holds NaN until it
has run, in order after all that was issued before it, so a wait that is missing on either side of compute shows: a
buffer that is given away too early is overwritten before it is read. Host memory is worked on at once, as ever.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from engine.devices.simulated import SimulatedDevice
from engine.memory.lane import Event, LaneName, ThreadLane


def tensors_in(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class LateDevice(SimulatedDevice):
    """``compute_delay_s`` passes before compute goes on after each wait for a lane."""

    def __init__(self, *, delay_s: float = 0.0, compute_delay_s: float = 0.0) -> None:
        super().__init__(delay_s=delay_s)
        self._compute = ThreadLane(LaneName.DEVICE_COMPUTE)
        self._compute_delay_s = compute_delay_s
        self._host_memory: set[int] = set()
        self._failure: BaseException | None = None

    def allocate(self, num_bytes: int) -> Tensor:
        """While computing, poisoned in compute's order: the memory may have been compute's a moment ago."""
        memory = super().allocate(num_bytes)
        self._host_memory.discard(memory.data_ptr())
        return memory

    def allocate_host(self, num_bytes: int) -> Tensor:
        with _disable_current_modes():
            memory = super().allocate_host(num_bytes)
        self._host_memory.add(memory.data_ptr())
        return memory

    def compute_after(self, event: Event) -> None:
        def wait() -> None:
            time.sleep(self._compute_delay_s)
            event.wait()

        self.issue(wait)

    def compute_mark(self) -> Event:
        return self._compute.submit(lambda: None)

    @contextmanager
    def computing(self) -> Iterator[None]:
        with _Issue(self):
            yield

    def download(self, values: Tensor) -> Tensor:
        self.compute_mark().wait()
        if self._failure is not None:
            raise self._failure
        with _disable_current_modes():
            return values.clone()

    def synchronize(self) -> None:
        self.compute_mark().wait()
        super().synchronize()

    def close(self) -> None:
        self._compute.close()
        super().close()

    def issue(self, work: Callable[[], object]) -> None:
        """Run ``work`` when all that was issued before has run."""

        def run() -> None:
            if self._failure is None:
                try:
                    with torch.inference_mode():
                        work()
                except Exception as error:  # noqa: BLE001  whatever it was, the host hears of it when it asks
                    self._failure = error

        self._compute.submit(run)

    def is_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._host_memory


class _Issue(TorchDispatchMode):
    def __init__(self, device: LateDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        given = tensors_in((args, kwargs))
        on_host = [self._device.is_host(tensor) for tensor in given]
        assert all(on_host) or not any(on_host), f"{func} mixes host and device memory"
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for one value of the device"
        is_view = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        if is_view or all(on_host):  # also where nothing is given: memory is only made
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._device.issue(lambda: func(*args, **kwargs))
            return kwargs.get("out", args[0]) if func._schema.returns else None
        # Run for the shape alone: what it is given may not be there yet.
        result = func(*args, **kwargs)
        made = tensors_in(result)
        for tensor in made:
            tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.zero_()

        def work() -> None:
            for tensor, value in zip(made, tensors_in(func(*args, **kwargs)), strict=True):
                tensor.copy_(value)

        self._device.issue(work)
        return result
