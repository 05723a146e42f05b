"""A device of separate memory, for tests: it computes on the CPU, but sees only what was copied to it.

Copies run on lanes of their own, late and if asked throttled, and until one is done its destination holds NaN: whoever
forgets to copy, or to wait, gets a wrong result instead of a lucky one.
"""

import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from engine.memory.aligned import aligned_empty
from engine.memory.device import Pieces
from engine.memory.lane import Event, LaneName, Reached, ThreadLane

POISON = 0xFF
"""Every floating-point type reads all ones as NaN."""


def poison(memory: Tensor) -> None:
    """Make whoever reads it compute NaN."""
    memory.view(torch.uint8).fill_(POISON) if memory.is_contiguous() else memory.fill_(float("nan"))


def _poison_all(pieces: Pieces) -> None:
    for destination, _ in pieces:
        poison(destination)


class SimulatedDevice:
    """Implements ``engine.memory.device.Device``; links run at ``bytes_per_second``, each copy is ``delay_s`` late."""

    name = "simulated"
    capability: tuple[int, int] | None = None
    shares_host_memory = False

    def __init__(self, *, bytes_per_second: float = float("inf"), delay_s: float = 0.0) -> None:
        self.torch_device = torch.device("cpu")
        self._bytes_per_second = bytes_per_second
        self._delay_s = delay_s
        self._lanes = {name: ThreadLane(name) for name in (LaneName.HOST_TO_DEVICE, LaneName.DEVICE_TO_HOST)}

    def limit_memory(self, num_bytes: int) -> None:
        """The system's memory has no such limit."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Poisoned, as it is before anything was copied to it."""
        return aligned_empty(num_bytes).fill_(POISON)

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Poisoned too: what was never read from disk must not look like data."""
        return aligned_empty(num_bytes).fill_(POISON)

    def copy(self, lane: LaneName, pieces: Pieces, after: Event) -> Event:
        """Poison as soon as the destinations are free, copy later; in the calling thread's mode, as a GPU would."""
        inference = torch.is_inference_mode_enabled()
        num_bytes = sum(source.numel() * source.element_size() for _, source in pieces)
        seconds = self._delay_s + num_bytes / self._bytes_per_second
        if isinstance(after, Reached):
            _poison_all(pieces)

        def work() -> None:
            with torch.inference_mode(inference):
                if not isinstance(after, Reached):
                    after.wait()
                    _poison_all(pieces)
                if seconds:
                    time.sleep(seconds)
                for destination, source in pieces:
                    destination.copy_(source)

        return self._lanes[lane].submit(work)

    def compute_after(self, event: Event) -> None:
        """Block: compute is the calling thread."""
        event.wait()

    def compute_mark(self) -> Event:
        """Compute is done when it returns."""
        return Reached()

    def computing(self) -> AbstractContextManager[None]:
        """Nothing to set."""
        return nullcontext()

    def upload(self, values: Tensor) -> Tensor:
        """A copy, so that the host's can change."""
        return values.clone()

    def download(self, values: Tensor) -> Tensor:
        """A copy."""
        return values.clone()

    def synchronize(self) -> None:
        """Compute is done when it returns; the lanes take one piece of work after the other."""
        for lane in self._lanes.values():
            lane.submit(lambda: None).wait()

    def close(self) -> None:
        """End the lanes."""
        for lane in self._lanes.values():
            lane.close()
