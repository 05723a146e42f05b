"""Weights over the tiers: resident where the plan says so, else staged through device buffers ahead of compute.

The ring runs on across the end of a pass: while the last layers are computed, the first of the next pass are read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.closing import run_all, settle
from engine.devices.base import Device
from engine.dtypes import DType
from engine.errors import EngineError
from engine.memory.lane import Event, LaneEvent, LaneName, Reached, ThreadLane
from engine.memory.tensors import torch_dtype
from engine.memory.tier import Block, MemoryTier
from engine.memory.traffic import Traffic
from engine.model.family import EMBED, HEAD, NamedWeights, layer_name
from engine.tiers import TierName
from engine.weights.files import WeightFiles

_REACHED = Reached()


@dataclass(slots=True)
class _Slot:
    """One staging buffer on the device and, where the device has its own memory, the host buffer that feeds it."""

    device: Block
    host: Block | None
    holds: str | None = None
    freed: Event = _REACHED
    filled: LaneEvent | None = None
    copied: Event = _REACHED

    def settle(self) -> None:
        """Wait until nothing is copied into it any more."""
        settle(self.copied)


class WeightStream:
    """Owns every weight byte in memory. ``layer`` must be entered in order of depth, pass after pass."""

    def __init__(
        self,
        files: WeightFiles,
        device: Device,
        tiers: Mapping[TierName, MemoryTier],
        traffic: Traffic,
        *,
        layer_tiers: Sequence[TierName],
        dtype: DType,
        num_slots: int,
    ) -> None:
        """``layer_tiers``: where each layer's weights live, in order of depth; ``dtype``: what they are computed in;
        ``num_slots``: staging buffers that streamed layers pass through."""
        self._files = files
        self._device = device
        self._traffic = traffic
        self._dtype = torch_dtype(dtype)
        self._tiers = tiers
        self._blocks: list[Block] = []
        self._resident: dict[str, NamedWeights] = {}
        self._host: dict[str, Block] = {}
        self._slots: list[_Slot] = []
        self._lane = ThreadLane(LaneName.DISK_READ)
        self._begun = self._entered = 0
        try:
            self._place(layer_tiers, num_slots)
        except BaseException:
            self.close()
            raise

    def embedding(self) -> NamedWeights:
        """The embedding's tensors, always on the device."""
        self._traffic.computes(EMBED)
        return self._resident[EMBED]

    def head(self) -> NamedWeights:
        """The head's tensors, always on the device."""
        self._traffic.computes(HEAD)
        return self._resident[HEAD]

    @contextmanager
    def layer(self, index: int) -> Iterator[NamedWeights]:
        """One layer's tensors on the device, in the compute dtype, for as long as the context lasts."""
        name = layer_name(index)
        if name in self._resident:
            self._traffic.computes(name)
            yield self._resident[name]
            return
        if self._device.shares_host_memory and name in self._host:
            self._traffic.computes(name)
            yield self._cast(name, self._files.tensors(name, self._host[name].data))
            return
        if self._streamed[self._entered % len(self._streamed)] != name:
            raise EngineError(f"{name} is entered out of turn")
        slot = self._slots[self._entered % len(self._slots)]
        if slot.filled is None:
            raise EngineError(f"{name} was never begun")
        with self._traffic.waiting(then=name):
            slot.filled.wait()
            self._device.compute_after(slot.copied)
        weights = self._cast(name, self._files.tensors(name, slot.device.data))
        yield weights
        slot.freed = self._device.compute_mark()
        self._entered += 1
        self._begin_next()

    def close(self) -> None:
        """Stop reading and free every byte."""
        blocks, self._blocks = self._blocks, []
        slots, self._slots = self._slots, []
        run_all(
            [
                self._lane.close,
                self._resident.clear,
                self._host.clear,
                *(slot.settle for slot in slots),
                *(block.release for block in blocks),
                self._files.close,
            ]
        )

    def _place(self, layer_tiers: Sequence[TierName], num_slots: int) -> None:
        self._cast_block: Block | None = None
        self._streamed: list[str] = []
        tier_of = {layer_name(index): tier for index, tier in enumerate(layer_tiers)}
        for name in (EMBED, *tier_of, HEAD):
            tier = tier_of.get(name, TierName.DEVICE)
            if tier is TierName.DEVICE:
                self._resident[name] = self._load(name)
            elif tier is TierName.HOST:
                block = self._allocate(TierName.HOST, self._files.num_bytes(name))
                self._read(name, block.data)
                self._host[name] = block
            if tier is TierName.DISK or (tier is TierName.HOST and not self._device.shares_host_memory):
                self._streamed.append(name)
        away = [name for name, tier in tier_of.items() if tier is not TierName.DEVICE]
        if away and self._casts:
            self._cast_block = self._allocate(TierName.DEVICE, max(self._computed_bytes(name) for name in away))
        if self._streamed:
            size = max(self._files.num_bytes(name) for name in self._streamed)
            bounce = not self._device.shares_host_memory and TierName.DISK in layer_tiers
            for _ in range(num_slots):
                host = self._allocate(TierName.HOST, size) if bounce else None
                self._slots.append(_Slot(self._allocate(TierName.DEVICE, size), host))
            for _ in self._slots:
                self._begin_next()

    @property
    def _casts(self) -> bool:
        return self._dtype != self._files.dtype

    def _computed_bytes(self, name: str) -> int:
        return self._files.num_bytes(name) * self._dtype.itemsize // self._files.dtype.itemsize

    def _allocate(self, tier: TierName, num_bytes: int) -> Block:
        block = self._tiers[tier].allocate(num_bytes, "weights")
        self._blocks.append(block)
        return block

    def _load(self, name: str) -> NamedWeights:
        """A unit that stays on the device: read once, cast once."""
        block = self._allocate(TierName.DEVICE, self._computed_bytes(name))
        if not self._casts and self._device.shares_host_memory:
            self._read(name, block.data)
            return self._files.tensors(name, block.data)
        raw = self._device.allocate_host(self._files.num_bytes(name))
        self._read(name, raw)
        if not self._casts:
            self._copy_in(name, block.data, raw).wait()
            return self._files.tensors(name, block.data)
        # Cast on the host: the device budget has no room for a second copy of the largest unit.
        views = self._views(name, block.data)
        for tensor_name, stored in self._files.tensors(name, raw).items():
            if self._device.shares_host_memory:
                views[tensor_name].copy_(stored)
            else:
                self._copy_in(name, views[tensor_name], stored.to(self._dtype)).wait()
        return views

    def _views(self, name: str, data: Tensor) -> dict[str, Tensor]:
        """A unit's tensors in the compute dtype over ``data``: the stored layout, scaled."""
        stored, computed = self._files.dtype.itemsize, self._dtype.itemsize
        views = {}
        for tensor_name, entry in self._files.entries(name).items():
            offset = entry.offset * computed // stored
            shape = torch.Size(entry.shape)
            views[tensor_name] = data[offset : offset + shape.numel() * computed].view(self._dtype).view(shape)
        return views

    def _cast(self, name: str, stored: NamedWeights) -> NamedWeights:
        if self._cast_block is None:
            return stored
        views = self._views(name, self._cast_block.data)
        for tensor_name, tensor in stored.items():
            views[tensor_name].copy_(tensor)
        return views

    def _begin_next(self) -> None:
        """Queue the next streamed layer for the slot that was freed last."""
        name = self._streamed[self._begun % len(self._streamed)]
        slot = self._slots[self._begun % len(self._slots)]
        self._begun += 1
        if slot.holds == name:
            return
        slot.holds = name
        slot.filled = self._lane.submit(lambda: self._stage(name, slot))

    def _stage(self, name: str, slot: _Slot) -> None:
        """On the lane: bring one layer into its slot."""
        size = self._files.num_bytes(name)
        if name in self._host:
            slot.copied = self._copy_in(name, slot.device.data[:size], self._host[name].data, slot.freed)
        elif slot.host is None:
            self._read(name, slot.device.data)  # compute on host memory is over when the layer is left
        else:
            slot.copied.wait()  # the buffer's last contents have left it
            self._read(name, slot.host.data)
            slot.copied = self._copy_in(name, slot.device.data[:size], slot.host.data[:size], slot.freed)

    def _read(self, name: str, out: Tensor) -> None:
        with self._traffic.moving(LaneName.DISK_READ, self._files.num_bytes(name), name, weights=True):
            self._files.read_unit(name, out)

    def _copy_in(self, name: str, destination: Tensor, source: Tensor, after: Event = _REACHED) -> Event:
        copied = self._device.copy(LaneName.HOST_TO_DEVICE, destination, source, after)
        num_bytes = source.numel() * source.element_size()
        self._traffic.follow(LaneName.HOST_TO_DEVICE, copied, num_bytes, name, weights=True)
        return copied
