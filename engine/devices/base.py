"""What the engine asks of a device. Compute is ordered as it is issued; copies run on lanes beside it."""

from typing import Protocol

import torch
from torch import Tensor

from engine.memory.lane import Event, LaneName


class Device(Protocol):
    """One compute device and the links to it; ``close`` when done."""

    name: str
    torch_device: torch.device
    shares_host_memory: bool
    """Host memory is device memory: no copy is ever needed, and the bytes are charged to the tier that owns them."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Device memory, ``uint8 [num_bytes]``, uninitialised."""

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Host memory that copies to and from the device may use: page-aligned, pinned where that matters."""

    def copy(self, lane: LaneName, destination: Tensor, source: Tensor) -> Event:
        """Begin a copy between host and device on its lane, after all compute issued so far.

        Both stay untouched by the caller until the event has been waited for.
        """

    def compute_after(self, event: Event) -> None:
        """Compute issued from now on sees what ``event`` completed."""

    def compute_mark(self) -> Event:
        """The end of all compute issued so far."""

    def upload(self, values: Tensor) -> Tensor:
        """A small host tensor (ids, positions) for compute to use."""

    def download(self, values: Tensor) -> Tensor:
        """A small result on the host; blocks until it is computed."""

    def close(self) -> None:
        """End the lanes."""


__all__ = ["Device", "Event", "LaneName"]
