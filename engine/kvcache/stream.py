"""Keys and values that lie where compute cannot address them, on their way through a ring of device buffers.

Attention visits one layer of one extent after another, in an order that the pass decides. While it is at one, the next
are brought, and what it added to those before is taken back: three lanes, and compute, at once.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from torch import Tensor

from engine.errors import EngineError
from engine.kvcache.extents import DiskExtent, HostExtent
from engine.memory.closing import run_all
from engine.memory.device import Device
from engine.memory.lane import Event, LaneEvent, LaneName, Reached, ThreadLane
from engine.memory.tensors import torch_dtype
from engine.memory.tier import Block, MemoryTier
from engine.memory.traffic import Traffic
from engine.planner.plan import Plan
from engine.tiers import TierName

KV = "KV cache"
_REACHED = Reached()


@dataclass(frozen=True, slots=True)
class Visit:
    """One layer of one extent: what is there, and how many tokens attention will add to it."""

    layer: int
    extent: HostExtent | DiskExtent
    past: int
    added: int
    at_once: bool
    """Whether what is there was there when the pass began. Else an earlier visit of the pass adds it."""


@dataclass(slots=True)
class _Slot:
    """One buffer on the device and, between the disk and a device with its own memory, one on the host."""

    device: Block
    host: Block | None
    filled: LaneEvent | None = None
    ready: Event = _REACHED
    """The device's buffer holds what was brought; known once ``filled`` was waited for."""
    left: Event = _REACHED
    """Nobody needs the last visit's contents any more."""


class KVStream:
    """Owns the ring and its lanes. Visits are entered in the order in which ``begin`` was told of them."""

    def __init__(
        self,
        plan: Plan,
        slot_bytes: int,
        device: Device,
        tiers: Mapping[TierName, MemoryTier],
        traffic: Traffic,
    ) -> None:
        self._device = device
        self._traffic = traffic
        self._dtype = torch_dtype(plan.dtype)
        from_disk = plan.kv_bytes[TierName.DISK] > 0
        bounces = from_disk and not device.shares_host_memory
        self._slots: list[_Slot] = []
        self._bringing = ThreadLane(LaneName.DISK_READ if from_disk else LaneName.HOST_TO_DEVICE)
        self._writing = ThreadLane(LaneName.DISK_WRITE)
        self._order: Iterator[Visit] = iter(())
        self._next: Visit | None = None
        self._begun: deque[tuple[Visit, _Slot]] = deque()
        try:
            for _ in range(plan.kv_slots):
                on_device = tiers[TierName.DEVICE].allocate(slot_bytes, KV)
                self._slots.append(_Slot(on_device, None))
                if bounces:
                    self._slots[-1].host = tiers[TierName.HOST].allocate(slot_bytes, KV)
        except BaseException:
            self.close()
            raise
        self._free = deque(self._slots)

    def begin(self, visits: Iterable[Visit]) -> None:
        """A pass begins: these will be entered, in this order."""
        if self._begun or self._next is not None:
            raise EngineError("the last pass left keys and values that it never looked at")
        self._order = iter(visits)
        self._next = next(self._order, None)
        self._run_ahead()

    @contextmanager
    def enter(self, layer: int, extent: HostExtent | DiskExtent) -> Iterator[tuple[Visit, Tensor]]:
        """The next visit, which must be of this, and its keys and values on the device: ``[token, k|v, head, dim]``.

        Tokens from ``past`` on are for the caller to fill in; they are kept when the context ends.
        """
        if not self._begun:
            self._bring()
        visit, slot = self._begun.popleft()
        if visit.layer != layer or visit.extent is not extent:
            raise EngineError(f"keys and values of layer {layer} are entered out of turn")
        assert slot.filled is not None
        with self._traffic.waiting():
            slot.filled.wait()
            self._device.compute_after(slot.ready)
        layout = extent.layout
        tokens = visit.past + visit.added
        data = slot.device.data[: tokens * layout.token_bytes]
        yield visit, data.view(self._dtype).view(tokens, 2, layout.num_heads, layout.head_size)
        self._leave(visit, slot)
        self._free.append(slot)
        self._run_ahead()

    def settle(self) -> None:
        """Wait for what is taken back; each buffer knows of the last of its own.

        What fails is told to whoever needs it: the outputs of the pass are right without it.
        """
        for slot in self._slots:
            with suppress(EngineError, CancelledError):
                slot.left.wait()

    def close(self) -> None:
        """Stop the lanes, and free the ring when nothing is under way any more. What is not kept yet is lost."""
        blocks = [block for slot in self._slots for block in (slot.device, slot.host) if block is not None]
        run_all(
            [
                self._bringing.close,
                self._writing.close,
                self.settle,
                self._slots.clear,
                *(block.release for block in blocks),
            ]
        )

    def _run_ahead(self) -> None:
        while self._free and self._next is not None and self._next.at_once:
            self._bring()

    def _bring(self) -> None:
        visit = self._next
        if visit is None:
            raise EngineError("keys and values are entered that the pass did not speak of")
        self._next = next(self._order, None)
        slot = self._free.popleft()
        stored = visit.extent.stored.get(visit.layer, _REACHED)
        slot.filled = self._bringing.submit(lambda: self._fill(visit, slot, stored))
        self._begun.append((visit, slot))

    def _fill(self, visit: Visit, slot: _Slot, stored: Event) -> None:
        """On the lane: bring what is there into the slot."""
        extent, size = visit.extent, visit.past * visit.extent.layout.token_bytes
        if not size:
            slot.ready = slot.left
            return
        stored.wait()
        if isinstance(extent, HostExtent):
            slot.ready = self._copy_in(slot, extent.tokens(visit.layer, 0, visit.past), slot.left)
            return
        slot.left.wait()
        buffer = (slot.host or slot.device).data[:size]
        with self._traffic.moving(LaneName.DISK_READ, size, KV):
            extent.read(visit.layer, buffer)
        slot.ready = _REACHED if slot.host is None else self._copy_in(slot, buffer, _REACHED)

    def _copy_in(self, slot: _Slot, source: Tensor, after: Event) -> Event:
        copied = self._device.copy(LaneName.HOST_TO_DEVICE, slot.device.data[: source.numel()], source, after)
        self._traffic.follow(LaneName.HOST_TO_DEVICE, copied, source.numel(), KV)
        return copied

    def _leave(self, visit: Visit, slot: _Slot) -> None:
        """Take back what attention added; the slot is free for another visit when that is done."""
        slot.left = self._device.compute_mark()
        if not visit.added:
            return
        extent = visit.extent
        begin = visit.past * extent.layout.token_bytes
        place = slice(begin, begin + visit.added * extent.layout.token_bytes)
        data = slot.device.data[place]
        if isinstance(extent, HostExtent):
            slot.left = self._copy_out(extent.tokens(visit.layer, visit.past, visit.added), data, slot.left)
        else:
            if slot.host is not None:
                on_host = slot.host.data[place]
                slot.left, data = self._copy_out(on_host, data, slot.left), on_host
            slot.left = self._write(extent, visit, data, slot.left)
        extent.stored[visit.layer] = slot.left

    def _copy_out(self, destination: Tensor, source: Tensor, after: Event) -> Event:
        copied = self._device.copy(LaneName.DEVICE_TO_HOST, destination, source, after)
        self._traffic.follow(LaneName.DEVICE_TO_HOST, copied, source.numel(), KV)
        return copied

    def _write(self, extent: DiskExtent, visit: Visit, data: Tensor, after: Event) -> Event:
        def work() -> None:
            after.wait()
            with self._traffic.moving(LaneName.DISK_WRITE, data.numel(), KV):
                extent.write(visit.layer, visit.past, data)

        return self._writing.submit(work)
