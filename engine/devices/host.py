"""Compute on the CPU: device memory is host memory, so nothing is ever copied."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from engine.memory.aligned import aligned_empty
from engine.memory.device import Pieces
from engine.memory.lane import Event, LaneName, Reached


class HostDevice:
    """Implements ``engine.memory.device.Device`` on the CPU; the calling thread is the compute lane."""

    name = "cpu"
    capability: tuple[int, int] | None = None
    shares_host_memory = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def limit_memory(self, num_bytes: int) -> None:
        """The system's memory has no such limit."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Page-aligned, so that disk reads can land in it."""
        return aligned_empty(num_bytes)

    def allocate_host(self, num_bytes: int) -> Tensor:
        """The same memory under its other name."""
        return aligned_empty(num_bytes)

    def copy(self, lane: LaneName, pieces: Pieces, after: Event) -> Event:
        """Only ever between two tensors that are distinct for a reason, so at once."""
        after.wait()
        for destination, source in pieces:
            destination.copy_(source)
        return Reached()

    def compute_after(self, event: Event) -> None:
        """Block: compute is this thread."""
        event.wait()

    def compute_mark(self) -> Event:
        """Compute is done when it returns."""
        return Reached()

    def computing(self) -> AbstractContextManager[None]:
        """Nothing to set."""
        return nullcontext()

    def upload(self, values: Tensor) -> Tensor:
        """Nothing to do."""
        return values

    def download(self, values: Tensor) -> Tensor:
        """Nothing to do."""
        return values

    def synchronize(self) -> None:
        """Everything was done when it was asked for."""

    def close(self) -> None:
        """Nothing to end."""
