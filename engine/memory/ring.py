"""The staging ring: what compute needs next is fetched ahead of it, and what it changed is written back behind it.

Whatever lies where compute cannot address it passes through a few device buffers, one *item* after the other, in an
order that is known ahead: a layer's weights, a layer's keys and values of one extent, a micro-batch's hidden states.
While compute is at one item, the next are fetched and those before are written back, on lanes of their own.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from torch import Tensor

from engine.errors import EngineError
from engine.memory.closing import run_all, settle
from engine.memory.lane import REACHED, Event, LaneEvent, LaneName, ThreadLane
from engine.memory.memory import Memory
from engine.memory.tier import Block
from engine.tiers import TierName
from engine.units import MIB

PACED_BYTES = 16 * MIB
"""Bytes of a copy, at most: a millisecond or so of a link."""
_GIVEN = 2
"""Copies of one buffer that are under way at once: one, and the next, so that the link never waits for the thread."""


@dataclass(slots=True, eq=False)
class HostPlace:
    """Bytes in host memory that the device cannot address: copied over the link."""

    data: Tensor
    """``uint8``, as long as whatever is fetched from it or written back to it."""
    stored: Event = REACHED
    """When all that was written back to it is there."""


class FilePlace(Protocol):
    """Bytes in a file: read into host memory, and copied over the link if the device has memory of its own."""

    stored: Event
    """When all that was written back to it is there."""

    def read(self, into: Tensor) -> int:
        """Fill host bytes from the place's beginning; how many were read, since some may be nobody's."""

    def write(self, offset: int, data: Tensor) -> None:
        """Write contiguous host bytes from ``offset`` on."""


@dataclass(frozen=True, slots=True, eq=False)
class Scattered:
    """Bytes here and there in host memory that the device cannot address; nobody changes them through a ring."""

    pieces: Sequence[tuple[int, Tensor]]
    """Where in the buffer each goes, and the bytes."""


Place = HostPlace | Scattered | FilePlace


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One visit of compute to one place."""

    what: str
    """For whoever watches the traffic."""
    place: Place
    fetched: int
    """Bytes from the place's beginning that compute needs."""
    changed: slice | None = None
    """Bytes that compute sets, to be written back."""
    is_weights: bool = False
    after: Callable[[], Event | None] | None = None
    """When all that is fetched is where it is fetched from, if somebody else than the ring writes there; ``None``:
    nobody knows yet, and it is not fetched ahead."""


@dataclass(slots=True)
class _Slot:
    """One buffer on the device and, between a file and a device with its own memory, one on the host."""

    device: Block
    host: Block | None = None
    item: Item | None = None
    """The last that it was begun for."""
    filled: LaneEvent | None = None
    ready: Event = REACHED
    """The device's buffer is free and holds what was fetched; known once ``filled`` was waited for."""
    left: Event = REACHED
    """Nobody needs the device's buffer for the last item any more."""
    file_left: Event = REACHED
    """Nor the one that files are read into and written from: the host's, or on a device without memory of its own the
    same."""


def paced(pieces: Iterable[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Pieces (where each goes, and its bytes) as copies of at most ``PACED_BYTES`` together."""
    together: list[tuple[int, Tensor]] = []
    left = PACED_BYTES
    for at, source in pieces:
        for first in range(0, source.numel(), PACED_BYTES):
            part = source[first : first + PACED_BYTES]
            if part.numel() > left:
                yield together
                together, left = [], PACED_BYTES
            together.append((at + first, part))
            left -= part.numel()
    if together:
        yield together


class Ring:
    """Owns the buffers and the lanes that fill and empty them. One thread computes, and enters item after item."""

    def __init__(
        self,
        memory: Memory,
        *,
        what: str,
        slot_bytes: int,
        num_slots: int,
        from_files: bool,
    ) -> None:
        """Take ``num_slots`` buffers of ``slot_bytes``.

        ``what``: whose bytes these are; ``from_files``: whether some places are files.

        Raises:
            TierFull: a budget would be exceeded.
        """
        self._device = device = memory.device
        self._traffic = memory.traffic
        # Threads of its own: a large item that waits for a buffer must not hold up a small one of another ring.
        # Two, so that what is read and what is copied go on at the same time, however many pieces a copy is made in.
        self._reading = ThreadLane(LaneName.DISK_READ)
        self._copying = ThreadLane(LaneName.HOST_TO_DEVICE)
        self._writing = ThreadLane(LaneName.DISK_WRITE)
        self._slots: list[_Slot] = []
        self._order: Iterator[Item] = iter(())
        self._next: Item | None = None
        self._begun: deque[tuple[Item, _Slot]] = deque()
        self._entered: list[Item] = []
        self._free: deque[_Slot] = deque()
        try:
            for _ in range(num_slots):
                self._slots += [_Slot(memory.allocate(TierName.DEVICE, slot_bytes, what), left=device.compute_mark())]
                if from_files and not device.shares_host_memory:
                    self._slots[-1].host = memory.allocate(TierName.HOST, slot_bytes, what)
        except BaseException:
            self.close()
            raise
        self._free.extend(self._slots)

    def begin(self, items: Iterable[Item]) -> None:
        """These will be entered next, in this order, which may be endless.

        Raises:
            EngineError: items of before were never entered.
        """
        if self._begun or self._next is not None:
            raise EngineError("something was fetched that compute never entered")
        self._order = iter(items)
        self._next = next(self._order, None)
        self._run_ahead()

    @contextmanager
    def enter(self, place: Place, then: str | None = None) -> Iterator[tuple[Item, Tensor]]:
        """The next item and its bytes on the device, ``uint8``: what was fetched, as long as the context lasts. Another
        may be entered meanwhile.

        Args:
            place: where the item must be from.
            then: what compute is at afterwards, for whoever watches; by default what it was at before.

        Raises:
            EngineError: the next item is of another place.
            LaneFailed: fetching it failed, or writing back what it consists of.
        """
        self._run_ahead()
        if not self._begun:
            raise EngineError("something is entered that nobody spoke of, or that is not there yet")
        item, slot = self._begun[0]
        if item.place is not place:
            raise EngineError(f"{item.what} is next, and something else is entered")
        assert slot.filled is not None
        with self._traffic.waiting(then):
            slot.filled.wait()
            self._device.compute_after(slot.ready)
        self._begun.popleft()
        self._entered.append(item)
        yield item, slot.device.data
        self._leave(item, slot)
        self._entered.remove(item)
        self._free.append(slot)
        self._run_ahead()

    def settle(self) -> None:
        """Wait for what is under way; each buffer knows the last of its own.

        What fails is told to whoever needs it: the outputs of a pass are right without it.
        """
        for slot in self._slots:
            for event in (slot.ready, slot.left, slot.file_left):
                settle(event)

    def close(self) -> None:
        """Stop the lanes, and free the buffers when nothing is under way any more. What is not kept yet is lost."""
        blocks = [block for slot in self._slots for block in (slot.device, slot.host) if block is not None]
        run_all(
            [
                self._reading.close,
                self._copying.close,
                self._writing.close,
                self.settle,
                self._forget,
                *(block.release for block in blocks),
            ]
        )

    def _forget(self) -> None:
        """Nothing refers to memory of places or buffers any more: whoever still has the ring does not keep it alive."""
        self._order, self._next = iter(()), None
        self._slots.clear()
        self._begun.clear()
        self._free.clear()

    def _run_ahead(self) -> None:
        while self._free and self._next is not None and (stored := self._stored(self._next)) is not None:
            self._begin_next(stored)

    def _stored(self, item: Item) -> Event | None:
        """When what an item consists of is where it is kept; ``None``: nobody knows yet."""
        if item.after is not None:
            return item.after()
        # An item that was begun and changes the place will be written back, nobody knows when.
        ahead = [*self._entered, *(other for other, _ in self._begun)]
        if any(other.place is item.place and other.changed is not None for other in ahead):
            return None
        return REACHED if isinstance(item.place, Scattered) else item.place.stored

    def _begin_next(self, stored: Event) -> None:
        item = self._next
        assert item is not None
        self._next = next(self._order, None)
        slot = self._free.popleft()
        self._begun.append((item, slot))
        if slot.item is item and item.changed is None:
            return  # nothing else was in the buffer since
        slot.item = item
        place = item.place
        if isinstance(place, Scattered | HostPlace):
            pieces = place.pieces if isinstance(place, Scattered) else [(0, place.data[: item.fetched])]
            slot.filled = self._copying.submit(lambda: self._copy(item, slot, pieces, stored))
            return
        slot.filled = read = self._reading.submit(lambda: self._read(item, slot, place, stored))
        if slot.host is not None:
            on_host = [(0, slot.host.data[: item.fetched])]
            slot.filled = self._copying.submit(lambda: self._copy(item, slot, on_host, read))

    def _read(self, item: Item, slot: _Slot, place: FilePlace, stored: Event) -> None:
        """On a lane: read an item into the host's buffer, which is the device's where there is no other."""
        slot.file_left.wait()
        if item.fetched:
            stored.wait()
            began = perf_counter()
            count = place.read((slot.host or slot.device).data[: item.fetched])
            span = began, perf_counter()
            self._traffic.add(LaneName.DISK_READ, count, span, item.what, weights=item.is_weights)
        slot.ready = slot.left

    def _copy(self, item: Item, slot: _Slot, pieces: Sequence[tuple[int, Tensor]], there: Event) -> None:
        """On a lane: copy an item into the device's buffer, from where it is ``there``."""
        there.wait()
        if not item.fetched:
            slot.ready = slot.left
            return
        slot.ready = self._copy_in(item, slot, pieces)
        if not isinstance(item.place, Scattered | HostPlace):
            # Else it came past the host's buffer, from which the item before may still be written.
            slot.file_left = slot.ready

    def _copy_in(self, item: Item, slot: _Slot, pieces: Iterable[tuple[int, Tensor]]) -> Event:
        """A copy engine takes one copy after the other, whosever they are. What compute needs next must not wait behind
        a whole layer, so no more than two pieces are ever given to it at once."""
        copied: Event = slot.left
        given: deque[Event] = deque()
        for some in paced(pieces):
            if len(given) == _GIVEN:
                given.popleft().wait()
            into = [(slot.device.data[at : at + source.numel()], source) for at, source in some]
            copied = self._device.copy(LaneName.HOST_TO_DEVICE, into, slot.left)
            given.append(copied)
            size = sum(source.numel() for _, source in some)
            self._traffic.follow(LaneName.HOST_TO_DEVICE, copied, size, item.what, weights=item.is_weights)
        return copied

    def _leave(self, item: Item, slot: _Slot) -> None:
        """Write back what compute changed; the buffer is free for another item when that is done."""
        slot.left = self._device.compute_mark()
        if item.changed is None:
            return
        place, data = item.place, slot.device.data[item.changed]
        assert not isinstance(place, Scattered)
        if isinstance(place, HostPlace):
            place.stored = slot.left = self._copy_out(item, place.data[item.changed], data, slot.left)
        elif slot.host is None:
            place.stored = slot.left = slot.file_left = self._write(item, place, data, slot.left)
        else:
            on_host = slot.host.data[item.changed]
            slot.left = self._copy_out(item, on_host, data, slot.left)
            place.stored = slot.file_left = self._write(item, place, on_host, slot.left)

    def _copy_out(self, item: Item, destination: Tensor, source: Tensor, after: Event) -> Event:
        copied = self._device.copy(LaneName.DEVICE_TO_HOST, [(destination, source)], after)
        self._traffic.follow(LaneName.DEVICE_TO_HOST, copied, source.numel(), item.what)
        return copied

    def _write(self, item: Item, place: FilePlace, data: Tensor, after: Event) -> Event:
        assert item.changed is not None
        offset = item.changed.start

        def work() -> None:
            after.wait()
            with self._traffic.moving(LaneName.DISK_WRITE, data.numel(), item.what):
                place.write(offset, data)

        return self._writing.submit(work)
