"""Weights over the tiers: resident where the plan says so, else staged through device buffers ahead of compute.

The ring runs on across the end of a pass: while the last layers are computed, the first of the next pass are read.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from math import prod

import torch
from torch import Tensor

from engine.dtypes import DType
from engine.errors import EngineError
from engine.memory.closing import run_all
from engine.memory.lane import REACHED, Event, LaneName
from engine.memory.memory import Memory
from engine.memory.ring import HostPlace, Item, Ring
from engine.memory.tensors import torch_dtype
from engine.memory.tier import Block
from engine.model.family import EMBED, HEAD, NamedWeights, layer_name
from engine.tiers import TierName
from engine.weights.files import WeightFiles
from engine.weights.stored import unpacked_bytes

WEIGHTS = "weights"
_LOADING_BUFFERS = 2


@dataclass(slots=True, eq=False)
class _UnitFile:
    """A unit's file, as a place of the ring's; nobody ever changes it."""

    files: WeightFiles
    name: str
    stored: Event = REACHED

    def read(self, into: Tensor) -> int:
        """The whole file."""
        self.files.read_unit(self.name, into)
        return into.numel()

    def write(self, offset: int, data: Tensor) -> None:
        """Never."""
        raise EngineError(f"{self.name} is written back, and weights never change")


class WeightStream:
    """Owns every weight byte in memory. ``layer`` must be entered in order of depth, pass after pass."""

    def __init__(
        self,
        files: WeightFiles,
        memory: Memory,
        *,
        units: Mapping[str, TierName],
        dtype: DType,
        num_slots: int,
    ) -> None:
        """Read everything that stays in memory, and begin to stream the rest.

        Args:
            files: the units' own; stay the caller's to close, after the stream.
            memory: what pays for it.
            units: where each unit's weights live, layers in order of depth; embedding and head on the device.
            dtype: what they are computed in.
            num_slots: staging buffers that streamed layers pass through.

        Raises:
            TierFull: a budget would be exceeded.
            CheckpointError: a file is damaged.
        """
        self._files = files
        self._memory = memory
        self._device = memory.device
        self._traffic = memory.traffic
        self._dtype = dtype
        self._blocks: list[Block] = []
        self._resident: dict[str, NamedWeights] = {}
        self._host: dict[str, Block] = {}
        self._streamed: dict[str, Item] = {}
        self._ring: Ring | None = None
        self._unpacked: Block | None = None
        try:
            self._place(units, num_slots)
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

    @property
    def opens_two(self) -> bool:
        """Whether a layer may be entered before the one in front of it is left: unpacked ones share a buffer."""
        return self._unpacked is None

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
        if self._ring is None:
            raise EngineError(f"{name} is entered, and this model has no such layer")
        with self._ring.enter(self._streamed[name].place, then=name) as (_, raw):
            yield self._operands(name, raw)

    def close(self) -> None:
        """Stop reading and free every byte."""
        blocks, self._blocks = self._blocks, []
        run_all(
            [
                *([self._ring.close] if self._ring is not None else []),
                self._resident.clear,
                self._host.clear,
                self._streamed.clear,
                *(block.release for block in blocks),
            ]
        )

    def _place(self, units: Mapping[str, TierName], num_slots: int) -> None:
        self._load([name for name, tier in units.items() if tier is TierName.DEVICE])
        for name, tier in units.items():
            if tier is TierName.DEVICE:
                continue
            if tier is TierName.HOST:
                block = self._allocate(TierName.HOST, self._files.num_bytes(name))
                self._read(name, block.data)
                self._host[name] = block
            if tier is TierName.DISK or not self._device.shares_host_memory:
                place = HostPlace(self._host[name].data) if tier is TierName.HOST else _UnitFile(self._files, name)
                self._streamed[name] = Item(name, place, self._files.num_bytes(name), is_weights=True)
        to_unpack = [self._unpacked_bytes(name) for name in units if not self._stays(name)]
        if to_unpack:
            self._unpacked = self._allocate(TierName.DEVICE, max(to_unpack))
        if self._streamed:
            self._ring = Ring(
                self._memory,
                what=WEIGHTS,
                slot_bytes=max(item.fetched for item in self._streamed.values()),
                num_slots=num_slots,
                from_files=TierName.DISK in units.values(),
            )
            self._ring.begin(cycle(self._streamed.values()))

    def _stays(self, name: str) -> bool:
        """Whether a layer is on the device, or wherever it is, as it is computed with."""
        return name in self._resident or self._is_ready(name)

    def _is_ready(self, name: str) -> bool:
        """Whether all tensors of a unit are computed with as they are stored."""
        return all(entry.format.is_ready(self._dtype) for entry in self._files.entries(name).values())

    def _unpacked_bytes(self, name: str) -> int:
        entries = self._files.entries(name).values()
        return sum(unpacked_bytes(entry.format, entry.shape, self._dtype) for entry in entries)

    def _allocate(self, tier: TierName, num_bytes: int) -> Block:
        block = self._memory.allocate(tier, num_bytes, WEIGHTS)
        self._blocks.append(block)
        return block

    def _load(self, names: Sequence[str]) -> None:
        """Units that stay on the device: each is read once, and unpacked once.

        Where they are copied there, through two buffers: one is read into while the other is copied from. They are no
        tier's, and gone before anything else is allocated on the host.
        """
        shares = self._device.shares_host_memory
        read: deque[tuple[Tensor, Event]] = deque()
        unpacked: tuple[Tensor, Event] | None = None
        for name in names:
            num_bytes, is_ready = self._files.num_bytes(name), self._is_ready(name)
            block = self._allocate(TierName.DEVICE, num_bytes if is_ready else self._unpacked_bytes(name))
            if shares and is_ready:
                self._read(name, block.data)
                self._resident[name] = self._files.tensors(name, block.data)
                continue
            if len(read) < (1 if shares else _LOADING_BUFFERS):
                read.append((self._device.allocate_host(max(map(self._files.num_bytes, names))), REACHED))
            buffer, left = read.popleft()
            left.wait()
            raw = buffer[:num_bytes]
            self._read(name, raw)
            if is_ready:
                left = self._copy_in(name, block.data, raw)
                self._resident[name] = self._files.tensors(name, block.data)
            elif shares:
                self._resident[name] = self._unpack(name, raw, block.data)
            else:
                unpacked = self._copy_unpacked(
                    name, raw, block.data, unpacked or (self._largest_tensor(names), REACHED)
                )
            read.append((buffer, left))
        for _, left in [*read, *([unpacked] if unpacked is not None else [])]:
            left.wait()

    def _largest_tensor(self, names: Sequence[str]) -> Tensor:
        """Room on the host for any tensor of some units in the compute dtype."""
        entries = (entry for name in names for entry in self._files.entries(name).values())
        most = max(prod(entry.format.unpacked_shape(entry.shape)) for entry in entries)
        return torch.empty(most, dtype=torch_dtype(self._dtype))

    def _copy_unpacked(
        self, name: str, raw: Tensor, into: Tensor, buffer: tuple[Tensor, Event]
    ) -> tuple[Tensor, Event]:
        """Unpacked on the host, tensor by tensor: the device budget has no room for a second copy of a large unit.

        Through a buffer, and after what was copied from it last; both are given back.
        """
        room, left = buffer
        self._resident[name] = places = self._places(name, into)
        for tensor_name, place in places.items():
            left.wait()
            values = room[: place.numel()].view(place.shape)
            self._files.unpack(name, raw, {tensor_name: values})
            left = self._copy_in(name, place, values)
        return room, left

    def _places(self, name: str, data: Tensor) -> dict[str, Tensor]:
        """Where a unit's tensors lie in ``data`` once they are unpacked: one behind the other."""
        places, begin = {}, 0
        for tensor_name, entry in self._files.entries(name).items():
            shape = entry.format.unpacked_shape(entry.shape)
            end = begin + prod(shape) * self._dtype.num_bytes
            places[tensor_name] = data[begin:end].view(torch_dtype(self._dtype)).view(shape)
            begin += unpacked_bytes(entry.format, entry.shape, self._dtype)
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

    def _read(self, name: str, out: Tensor) -> None:
        with self._traffic.moving(LaneName.DISK_READ, self._files.num_bytes(name), name, weights=True):
            self._files.read_unit(name, out)

    def _copy_in(self, name: str, destination: Tensor, source: Tensor) -> Event:
        copied = self._device.copy(LaneName.HOST_TO_DEVICE, [(destination, source)], self._device.compute_mark())
        num_bytes = source.numel() * source.element_size()
        self._traffic.follow(LaneName.HOST_TO_DEVICE, copied, num_bytes, name, weights=True)
        return copied
