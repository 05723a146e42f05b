"""Weights over the tiers: resident where the plan says so, else staged through device buffers ahead of compute.

The ring runs on across the end of a pass: while the last layers are computed, the first of the next pass are read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from engine.dtypes import DType
from engine.errors import EngineError
from engine.memory.closing import run_all, settle
from engine.memory.device import Device
from engine.memory.lane import Event, LaneEvent, LaneName, Reached, ThreadLane
from engine.memory.tensors import torch_dtype
from engine.memory.tier import Block, MemoryTier
from engine.memory.traffic import Traffic
from engine.model.family import EMBED, HEAD, NamedWeights, layer_name
from engine.tiers import TierName
from engine.weights.files import WeightFiles
from engine.weights.stored import unpacked_bytes

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
        self._dtype = dtype
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
            yield self._operands(name, self._host[name].data)
            return
        if self._streamed[self._entered % len(self._streamed)] != name:
            raise EngineError(f"{name} is entered out of turn")
        slot = self._slots[self._entered % len(self._slots)]
        if slot.filled is None:
            raise EngineError(f"{name} was never begun")
        with self._traffic.waiting(then=name):
            slot.filled.wait()
            self._device.compute_after(slot.copied)
        yield self._operands(name, slot.device.data)
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
        self._unpacked: Block | None = None
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
        to_unpack = [self._unpacked_bytes(name) for name in away if not self._is_ready(name)]
        if to_unpack:
            self._unpacked = self._allocate(TierName.DEVICE, max(to_unpack))
        if self._streamed:
            size = max(self._files.num_bytes(name) for name in self._streamed)
            bounce = not self._device.shares_host_memory and TierName.DISK in layer_tiers
            for _ in range(num_slots):
                host = self._allocate(TierName.HOST, size) if bounce else None
                self._slots.append(_Slot(self._allocate(TierName.DEVICE, size), host))
            for _ in self._slots:
                self._begin_next()

    def _is_ready(self, name: str) -> bool:
        """Whether all tensors of a unit are computed with as they are stored."""
        return all(entry.format.is_ready(self._dtype) for entry in self._files.entries(name).values())

    def _unpacked_bytes(self, name: str) -> int:
        entries = self._files.entries(name).values()
        return sum(unpacked_bytes(prod(entry.shape), self._dtype) for entry in entries)

    def _allocate(self, tier: TierName, num_bytes: int) -> Block:
        block = self._tiers[tier].allocate(num_bytes, "weights")
        self._blocks.append(block)
        return block

    def _load(self, name: str) -> NamedWeights:
        """A unit that stays on the device: read once, unpacked once."""
        if self._is_ready(name):
            block = self._allocate(TierName.DEVICE, self._files.num_bytes(name))
            if self._device.shares_host_memory:
                self._read(name, block.data)
            else:
                raw = self._device.allocate_host(self._files.num_bytes(name))
                self._read(name, raw)
                self._copy_in(name, block.data, raw).wait()
            return self._files.tensors(name, block.data)
        # Unpacked on the host: the device budget has no room for a second copy of the largest unit.
        block = self._allocate(TierName.DEVICE, self._unpacked_bytes(name))
        raw = self._device.allocate_host(self._files.num_bytes(name))
        self._read(name, raw)
        if self._device.shares_host_memory:
            return self._unpack(name, raw, block.data)
        places = self._places(name, block.data)
        for tensor_name, place in places.items():
            unpacked = torch.empty_like(place, device="cpu")
            self._files.unpack(name, raw, {tensor_name: unpacked})
            self._copy_in(name, place, unpacked).wait()
        return places

    def _places(self, name: str, data: Tensor) -> dict[str, Tensor]:
        """Where a unit's tensors lie in ``data`` once they are unpacked: one behind the other."""
        places, begin = {}, 0
        for tensor_name, entry in self._files.entries(name).items():
            num_values = prod(entry.shape)
            end = begin + num_values * self._dtype.num_bytes
            places[tensor_name] = data[begin:end].view(torch_dtype(self._dtype)).view(entry.shape)
            begin += unpacked_bytes(num_values, self._dtype)
        return places

    def _unpack(self, name: str, raw: Tensor, into: Tensor) -> NamedWeights:
        places = self._places(name, into)
        self._files.unpack(name, raw, places)
        return places

    def _operands(self, name: str, raw: Tensor) -> NamedWeights:
        """What a layer that does not stay is computed with: its bytes as they lie, or the buffer for unpacked ones."""
        if self._unpacked is None or self._is_ready(name):
            return self._files.tensors(name, raw)
        return self._unpack(name, raw, self._unpacked.data)

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
