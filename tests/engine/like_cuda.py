"""CUDA where there is none: a device that copies as CUDA does, and CUDA's own device on streams that are stubs."""

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.attention.table import Capability
from engine.devices import cuda
from engine.devices.cuda import CudaDevice
from engine.devices.simulated import SimulatedDevice, poison
from engine.dtypes import DType
from engine.memory.device import Pieces
from engine.memory.lane import Event, LaneName, Reached


class Card(NamedTuple):
    """A GPU's compute capability, which says what kernels it has, and a number type to compute in."""

    capability: Capability | None
    dtype: DType


CARDS = {
    "7.5 in float16": Card((7, 5), DType.FLOAT16),
    "8.0 in float16": Card((8, 0), DType.FLOAT16),
    "8.0 in bfloat16": Card((8, 0), DType.BFLOAT16),
}
"""A T4, whose attention is the memory-efficient kernel, and the first card that has flash attention; in all that they
have of half precision."""
ROUNDING = {DType.FLOAT32: 1e-4, DType.FLOAT16: 0.02, DType.BFLOAT16: 0.15}
"""How far sums of ten or so log-probabilities may be from each other: pieces of a sequence's keys that are merged, and
attention on the host, round otherwise."""


class LikeCuda(SimulatedDevice):
    """Issues copies as CUDA does, by the calling thread, and refuses what CUDA would refuse for that thread's mode.

    It has the kernels of a card: see ``engine.attention.table``.
    """

    def __init__(self, capability: Capability | None = None) -> None:
        super().__init__()
        self.capability = capability

    def copy(self, lane: LaneName, pieces: Pieces, after: Event) -> Event:
        after.wait()
        for destination, source in pieces:
            with torch.inference_mode(destination.is_inference()):  # poisoning is no part of what CUDA does
                poison(destination)
            destination.copy_(source, non_blocking=True)
        return Reached()


class Stream:
    """A stream of a GPU that is not there."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""


class Recorded:
    """An event of a GPU that is not there."""

    def synchronize(self) -> None:
        """It has happened."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


def stubbed_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), index: int = 0) -> CudaDevice:
    """CUDA's device, whose memory must be given to it: nothing is there to allocate any."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: object())
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: index + 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(cuda, "timed_event", lambda _: Recorded())
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    return CudaDevice(index)
