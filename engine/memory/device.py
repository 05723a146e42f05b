"""What the engine asks of a device. Compute is ordered as it is issued; copies run on lanes beside it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from engine.memory.lane import Event, LaneName

Pieces = Sequence[tuple[Tensor, Tensor]]
"""Where bytes go, and where they come from."""


class Device(Protocol):
    """One compute device and the links to it; ``close`` when done."""

    name: str
    torch_device: torch.device
    capability: tuple[int, int] | None
    """CUDA's compute capability; ``None``: no GPU, or one as new as any."""
    shares_host_memory: bool
    """Host memory is device memory: no copy is ever needed, and the bytes are charged to the tier that owns them.
    Its compute is the calling thread's: done when it returns."""

    def limit_memory(self, num_bytes: int) -> None:
        """Until the device is closed, all that is allocated on it, compute's temporaries too, fits ``num_bytes``."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Device memory, ``uint8 [num_bytes]``, uninitialised."""

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Host memory that copies to and from the device may use: page-aligned, pinned where that matters."""

    def copy(self, lane: LaneName, pieces: Pieces, after: Event) -> Event:
        """Begin copies between host and device on their lane, once ``after`` has happened; does not block.

        ``pieces``: destination and source of each. ``after`` covers whatever compute still does with either side.
        Memory that was allocated just now was perhaps compute's a moment ago, so it takes ``compute_mark()``, too. Both
        sides stay untouched by the caller until the event has been waited for.
        """

    def compute_after(self, event: Event) -> None:
        """Compute issued from now on sees what ``event`` completed."""

    def compute_mark(self) -> Event:
        """The end of all compute issued so far."""

    def computing(self) -> AbstractContextManager[None]:
        """While it lasts, the calling thread's operations are this device's compute, in order as they are issued.

        Raises:
            TierFull: the device ran out of memory.
            DeviceFailed: the device is lost.
        """

    def upload(self, values: Tensor) -> Tensor:
        """A small host tensor (ids, positions) for compute to use."""

    def download(self, values: Tensor) -> Tensor:
        """A small result on the host; blocks until it is computed."""

    def synchronize(self) -> None:
        """Block until all that compute and the lanes were given so far has ended.

        Raises:
            DeviceFailed: the device is lost.
        """

    def close(self) -> None:
        """End the lanes."""


__all__ = ["Device", "Event", "LaneName", "Pieces"]
