"""Where a pass's hidden states wait between layers: device, host or disk memory, one place for all micro-batches."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.memory.device import Device
from engine.memory.lane import LaneName
from engine.memory.spill import DiskTier, Extent
from engine.memory.tensors import torch_dtype
from engine.memory.tier import Block, MemoryTier
from engine.memory.traffic import Traffic
from engine.planner.plan import Plan
from engine.tiers import TierName

ACTIVATIONS = "activations"


class Activations:
    """Room for one pass's hidden states ``[tokens, D]``; ``load`` and ``store`` by micro-batch."""

    def __init__(
        self,
        plan: Plan,
        hidden_size: int,
        device: Device,
        tiers: Mapping[TierName, MemoryTier],
        disk: DiskTier,
        traffic: Traffic,
    ) -> None:
        self._device = device
        self._traffic = traffic
        self._hidden_size = hidden_size
        self._dtype = torch_dtype(plan.dtype)
        self._batch_bytes = plan.micro_batch * hidden_size * self._dtype.itemsize
        self._addressable = plan.activations is TierName.DEVICE or (
            plan.activations is TierName.HOST and device.shares_host_memory
        )
        self._memory: Block | None = None
        self._extent: Extent | None = None
        self._bounce: Block | None = None
        num_bytes = self._batch_bytes * plan.micro_batches
        if plan.activations is TierName.DISK:
            self._extent = disk.allocate(num_bytes, ACTIVATIONS)
            if not device.shares_host_memory:
                self._bounce = tiers[TierName.HOST].allocate(self._batch_bytes, ACTIVATIONS)
        else:
            self._memory = tiers[plan.activations].allocate(num_bytes, ACTIVATIONS)

    def load(self, index: int, num_tokens: int) -> Tensor:
        """The hidden states of micro-batch ``index`` on the device, ``[num_tokens, D]``; compute may overwrite them."""
        size = num_tokens * self._hidden_size * self._dtype.itemsize
        if self._memory is not None and self._addressable:
            return self._shaped(self._place(self._memory, index, size))
        on_device = self._device.allocate(size)
        if self._extent is not None:
            host = on_device if self._bounce is None else self._bounce.data[:size]
            with self._traffic.waiting(), self._traffic.moving(LaneName.DISK_READ, size, ACTIVATIONS):
                self._extent.read(index * self._batch_bytes, host)
        else:
            assert self._memory is not None
            host = self._place(self._memory, index, size)
        if host is not on_device:
            with self._traffic.waiting():
                copied = self._device.copy(LaneName.HOST_TO_DEVICE, on_device, host, self._device.compute_mark())
                self._device.compute_after(copied)
            self._traffic.follow(LaneName.HOST_TO_DEVICE, copied, size, ACTIVATIONS)
        return self._shaped(on_device)

    def store(self, index: int, hidden_TD: Tensor) -> None:
        """Keep the hidden states of micro-batch ``index`` until they are loaded again."""
        data = hidden_TD.contiguous().view(-1).view(torch.uint8)
        size = data.numel()
        if self._memory is not None and self._addressable:
            place = self._place(self._memory, index, size)
            if place.data_ptr() != data.data_ptr():
                place.copy_(data)
            return
        if not self._device.shares_host_memory:
            block = self._memory or self._bounce
            assert block is not None
            host = self._place(block, index, size) if block is self._memory else block.data[:size]
            with self._traffic.waiting():
                copied = self._device.copy(LaneName.DEVICE_TO_HOST, host, data, self._device.compute_mark())
                copied.wait()
            self._traffic.follow(LaneName.DEVICE_TO_HOST, copied, size, ACTIVATIONS)
            data = host
        if self._extent is not None:
            with self._traffic.waiting(), self._traffic.moving(LaneName.DISK_WRITE, size, ACTIVATIONS):
                self._extent.write(index * self._batch_bytes, data)

    def close(self) -> None:
        """Free the room."""
        for owned in (self._memory, self._extent, self._bounce):
            if owned is not None:
                owned.release()

    def _place(self, block: Block, index: int, size: int) -> Tensor:
        begin = index * self._batch_bytes
        return block.data[begin : begin + size]

    def _shaped(self, data: Tensor) -> Tensor:
        return data.view(self._dtype).view(-1, self._hidden_size)
