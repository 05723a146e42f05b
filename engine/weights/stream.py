"""Weights over the tiers: resident where the plan says so, else staged through device buffers ahead of compute.

The ring runs on across the end of a pass: while the last layers are computed, the first of the next pass are read.
"""

from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
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
from engine.memory.ring import HostPlace, Item, Place, Ring
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
        num_unpacked: int = 1,
        stay_packed: bool = False,
    ) -> None:
        """Read everything that stays in memory, and begin to stream the rest.

        Args:
            files: the units' own; stay the caller's to close, after the stream.
            memory: what pays for it.
            units: where each unit's weights live, layers in order of depth; embedding and head on the device.
            dtype: what they are computed in.
            num_slots: staging buffers that streamed layers pass through.
            num_unpacked: buffers for layers that are unpacked in each pass: how many may be entered at a time.
            stay_packed: layers on the device lie there as they are stored, and are unpacked in each pass.

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
        self._stored: dict[str, Tensor] = {}
        """The bytes of layers that compute can address, but that must be unpacked, or lie in host memory."""
        self._streamed: dict[str, Item] = {}
        self._ring: Ring | None = None
        self._ready: dict[str, bool] = {}
        """Whether each unit is computed with as it is stored."""
        self._buffers: list[Tensor] = []
        """For layers that are unpacked in each pass, in turn."""
        self._next_buffer = cycle(self._buffers)
        try:
            self._place(units, num_slots, num_unpacked, stay_packed=stay_packed)
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
        """Whether a layer may be entered before the one in front of it is left: each unpacked one needs a buffer."""
        return len(self._buffers) != 1

    @contextmanager
    def layer(self, index: int) -> Iterator[NamedWeights]:
        """One layer's tensors on the device, in the compute dtype, for as long as the context lasts."""
        name = layer_name(index)
        if name in self._resident:
            self._traffic.computes(name)
            yield self._resident[name]
            return
        if name in self._stored:
            self._traffic.computes(self._first(name))
            yield self._tensors(name, self._stored[name])
            return
        if self._ring is None:
            raise EngineError(f"{name} is entered, and this model has no such layer")
        with self._ring.enter(self._streamed[name].place, then=self._first(name)) as (_, raw):
            tensors = self._tensors(name, raw)
            if self._ready[name]:
                yield tensors
                return
        # Nobody needs what was fetched any more: the next layer may come into its place while this one is computed.
        yield tensors

    def close(self) -> None:
        """Stop reading and free every byte."""
        blocks, self._blocks = self._blocks, []
        run_all(
            [
                *([self._ring.close] if self._ring is not None else []),
                self._resident.clear,
                self._stored.clear,
                self._streamed.clear,
                self._buffers.clear,
                *(block.release for block in blocks),
            ]
        )

    def _place(self, units: Mapping[str, TierName], num_slots: int, num_unpacked: int, *, stay_packed: bool) -> None:
        self._ready = {name: self._is_ready(name) for name in units}
        on_device = [name for name, tier in units.items() if tier is TierName.DEVICE]
        packed = [name for name in on_device if stay_packed and name not in (EMBED, HEAD) and not self._ready[name]]
        self._load(on_device, frozenset(packed))
        for name, tier in units.items():
            place: Place = _UnitFile(self._files, name)
            if tier is TierName.HOST:
                block = self._allocate(TierName.HOST, self._files.num_bytes(name))
                self._read(name, block.data)
                if self._device.shares_host_memory:
                    self._stored[name] = block.data
                    continue
                place = HostPlace(block.data)
            if tier is not TierName.DEVICE:
                self._streamed[name] = Item(name, place, self._files.num_bytes(name), is_weights=True)
        in_each_pass = [*self._stored, *self._streamed]
        to_unpack = [self._unpacked_bytes(name) for name in in_each_pass if not self._ready[name]]
        if to_unpack:
            self._buffers = [self._allocate(TierName.DEVICE, max(to_unpack)).data for _ in range(num_unpacked)]
        self._next_buffer = cycle(self._buffers)
        if self._streamed:
            self._ring = Ring(
                self._memory,
                what=WEIGHTS,
                slot_bytes=max(item.fetched for item in self._streamed.values()),
                num_slots=num_slots,
                from_files=TierName.DISK in units.values(),
            )
            self._ring.begin(cycle(self._streamed.values()))

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

    def _load(self, names: Sequence[str], packed: Container[str]) -> None:
        """Units that stay on the device: each is read once, and unpacked once, or for now not at all if it is among
        ``packed``.

        Where they are copied there, through two buffers: one is read into while the other is copied from. They are no
        tier's, and gone before anything else is allocated on the host.
        """
        shares = self._device.shares_host_memory
        read: deque[tuple[Tensor, Event]] = deque()
        unpacked: tuple[Tensor, Event] | None = None
        for name in names:
            num_bytes, as_stored = self._files.num_bytes(name), name in packed or self._ready[name]
            block = self._allocate(TierName.DEVICE, num_bytes if as_stored else self._unpacked_bytes(name))
            if name in packed:
                self._stored[name] = block.data
            elif as_stored:
                self._resident[name] = self._files.tensors(name, block.data)
            if shares and as_stored:
                self._read(name, block.data)
                continue
            if len(read) < (1 if shares else _LOADING_BUFFERS):
                read.append((self._device.allocate_host(max(map(self._files.num_bytes, names))), REACHED))
            buffer, left = read.popleft()
            left.wait()
            raw = buffer[:num_bytes]
            self._read(name, raw)
            if as_stored:
                left = self._copy_in(name, block.data, raw)
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

    def _first(self, name: str) -> str:
        """What compute is at first in a layer that is not resident."""
        return name if self._ready[name] else f"unpack {name}"

    def _tensors(self, name: str, raw: Tensor) -> NamedWeights:
        """What a layer is computed with: its bytes as they lie, or what is unpacked from them, now."""
        if self._ready[name]:
            return self._files.tensors(name, raw)
        tensors = self._unpack(name, raw, next(self._next_buffer))
        self._traffic.computes(name)
        return tensors

    def _read(self, name: str, out: Tensor) -> None:
        with self._traffic.moving(LaneName.DISK_READ, self._files.num_bytes(name), name, weights=True):
            self._files.read_unit(name, out)

    def _copy_in(self, name: str, destination: Tensor, source: Tensor) -> Event:
        copied = self._device.copy(LaneName.HOST_TO_DEVICE, [(destination, source)], self._device.compute_mark())
        num_bytes = source.numel() * source.element_size()
        self._traffic.follow(LaneName.HOST_TO_DEVICE, copied, num_bytes, name, weights=True)
        return copied
