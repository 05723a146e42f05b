"""The staging ring: whatever the order of visits, compute sees what was written last, and all of it is kept."""

import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.devices.host import HostDevice
from engine.devices.simulated import SimulatedDevice
from engine.errors import EngineError, LaneFailed
from engine.memory.device import Device, Pieces
from engine.memory.lane import REACHED, Event, LaneName
from engine.memory.memory import Memory
from engine.memory.ring import FilePlace, HostPlace, Item, Ring
from engine.memory.traffic import Traffic
from engine.tiers import TierName

SIZE = 64
LATE_S = 0.0005


@dataclass(slots=True, eq=False)
class Bytes:
    """A file, for the ring; its writes are late, and may fail."""

    data: Tensor
    stored: Event = REACHED
    fails: bool = False

    def read(self, into: Tensor) -> int:
        into.copy_(self.data[: into.numel()])
        return into.numel()

    def write(self, offset: int, data: Tensor) -> None:
        if self.fails:
            raise LaneFailed("no space left")
        time.sleep(LATE_S)
        self.data[offset : offset + data.numel()] = data


@dataclass(frozen=True)
class Opened:
    ring: Ring
    memory: Memory

    @property
    def traffic(self) -> Traffic:
        return self.memory.traffic

    def close(self) -> None:
        self.ring.close()
        assert all(tier.used == 0 for tier in self.memory.tiers.values())


def open_ring(device: Device, num_slots: int, *, from_files: bool) -> Opened:
    budgets = {TierName.DEVICE: num_slots * SIZE, TierName.HOST: num_slots * SIZE, TierName.DISK: 0}
    memory = Memory(device, budgets, Path())
    ring = Ring(memory, what="test", slot_bytes=SIZE, num_slots=num_slots, from_files=from_files)
    return Opened(ring, memory)


def place_of(values: Tensor, *, is_file: bool) -> HostPlace | Bytes:
    return Bytes(values.clone()) if is_file else HostPlace(values.clone())


@st.composite
def visits(draw: st.DrawFn) -> tuple[int, int, tuple[int, int] | None]:
    """Place, bytes fetched, and which bytes change."""
    fetched = draw(st.just(0) | st.integers(0, SIZE))
    first = draw(st.integers(0, SIZE - 1))
    changed = draw(st.none() | st.integers(first + 1, SIZE).map(lambda end: (first, end)))
    return draw(st.integers(0, 3)), fetched, changed


@settings(max_examples=100)
@given(
    order=st.lists(visits(), max_size=14),
    num_slots=st.integers(1, 4),
    kind=st.sampled_from(["host", "device", "files", "mixed"]),
    seed=st.integers(0, 99),
)
def test_every_visit_sees_what_was_written_last(
    order: list[tuple[int, int, tuple[int, int] | None]], num_slots: int, kind: str, seed: int
) -> None:
    """`host`: files and a device that shares the host's memory; else one of its own, and places of either kind."""
    rng = random.Random(seed)
    device: Device = HostDevice() if kind == "host" else SimulatedDevice(delay_s=LATE_S)
    are_files = [kind in ("host", "files") or (kind == "mixed" and index % 2 == 0) for index in range(4)]
    known = [torch.randint(0, 256, (SIZE,), dtype=torch.uint8) for _ in are_files]
    places = [place_of(values, is_file=is_file) for values, is_file in zip(known, are_files, strict=True)]
    opened = open_ring(device, num_slots, from_files=any(are_files))
    items = [
        Item("test", places[index], fetched, None if changed is None else slice(*changed))
        for index, fetched, changed in order
    ]
    opened.ring.begin(iter(items))
    for item, (index, fetched, changed) in zip(items, order, strict=True):
        with opened.ring.enter(places[index]) as (entered, data):
            assert entered is item
            assert torch.equal(data[:fetched], known[index][:fetched])
            if changed is not None:
                data[slice(*changed)] = value = rng.randrange(256)
                known[index][slice(*changed)] = value
    opened.ring.settle()
    for place, values in zip(places, known, strict=True):
        assert torch.equal(place.data, values)
    moved = opened.traffic.take().num_bytes
    read = sum(fetched for index, fetched, _ in order if are_files[index])
    assert moved.get(LaneName.DISK_READ, 0) == read
    opened.close()
    device.close()


def test_an_item_that_is_still_there_is_not_fetched_again() -> None:
    device = SimulatedDevice()
    opened = open_ring(device, 2, from_files=True)
    places = [Bytes(torch.full((SIZE,), index, dtype=torch.uint8)) for index in range(2)]
    items = [Item("test", place, SIZE) for place in places]
    opened.ring.begin(items * 3)
    for _ in range(3):
        for place in places:
            with opened.ring.enter(place) as (_, data):
                assert torch.equal(data, place.data)
    assert opened.traffic.take().num_bytes[LaneName.DISK_READ] == 2 * SIZE
    opened.close()
    device.close()


@dataclass(slots=True, eq=False)
class Told(Bytes):
    """A file that tells when it is read."""

    is_read: threading.Event = field(default_factory=threading.Event)

    def read(self, into: Tensor) -> int:
        self.is_read.set()
        return Bytes.read(self, into)


class Held(SimulatedDevice):
    """Its copies come to no end before they may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_copy = threading.Event()

    def copy(self, lane: LaneName, pieces: Pieces, after: Event) -> Event:
        self._lanes[lane].submit(self._wait)
        return super().copy(lane, pieces, after)

    def _wait(self) -> None:
        self.may_copy.wait()


def test_the_next_is_read_while_a_copy_of_many_pieces_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of every large layer are: a disk and a link that wait for each other take twice as long."""
    monkeypatch.setattr("engine.memory.ring.PACED_BYTES", SIZE // 8)
    device = Held()
    opened = open_ring(device, 2, from_files=True)
    places = [Told(torch.full((SIZE,), index, dtype=torch.uint8)) for index in range(2)]
    opened.ring.begin([Item("test", place, SIZE) for place in places])
    assert places[1].is_read.wait(60)
    device.may_copy.set()
    for place in places:
        with opened.ring.enter(place) as (_, data):
            assert torch.equal(data, place.data)
    opened.close()
    device.close()


@dataclass(slots=True, eq=False)
class Slow(Bytes):
    """A file that writes nothing before it may."""

    may_write: threading.Event = field(default_factory=threading.Event)

    def write(self, offset: int, data: Tensor) -> None:
        self.may_write.wait()
        Bytes.write(self, offset, data)


@pytest.mark.parametrize("then_from_a_file", [False, True])
def test_what_comes_from_the_host_frees_no_buffer_that_a_file_is_written_from(*, then_from_a_file: bool) -> None:
    device = SimulatedDevice()
    opened = open_ring(device, 1, from_files=True)
    slow, on_host = Slow(torch.zeros(SIZE, dtype=torch.uint8)), HostPlace(torch.ones(SIZE, dtype=torch.uint8))
    other = Bytes(torch.full((SIZE,), 2, dtype=torch.uint8))
    items = [Item("test", slow, 0, slice(0, SIZE)), Item("test", on_host, SIZE)]
    opened.ring.begin([*items, Item("test", other, SIZE)] if then_from_a_file else items)
    with opened.ring.enter(slow) as (_, data):
        data.fill_(7)
    with opened.ring.enter(on_host):
        pass
    threading.Timer(0.2, slow.may_write.set).start()
    if then_from_a_file:
        with opened.ring.enter(other):
            pass
    opened.ring.settle()
    assert (slow.data == 7).all()
    opened.close()
    device.close()


def test_a_visit_is_fetched_ahead_unless_one_before_changes_its_place() -> None:
    opened = open_ring(HostDevice(), 3, from_files=True)
    first, second = Bytes(torch.zeros(SIZE, dtype=torch.uint8)), Bytes(torch.zeros(SIZE, dtype=torch.uint8))

    def reads() -> int:
        opened.ring._reading.submit(lambda: None).wait()
        return opened.traffic.take().num_bytes.get(LaneName.DISK_READ, 0) // SIZE

    opened.ring.begin([Item("a", first, SIZE), Item("b", first, SIZE, slice(0, 1)), Item("c", first, SIZE)])
    assert reads() == 2
    with opened.ring.enter(first):
        pass
    assert reads() == 0, "the third waits for what the second changes"
    with opened.ring.enter(first):
        pass
    assert reads() == 1
    with opened.ring.enter(first):
        pass
    opened.ring.begin([Item("a", first, SIZE, slice(0, 1)), Item("b", second, SIZE)])
    assert reads() == 2
    opened.close()


@pytest.mark.parametrize("device", [HostDevice, SimulatedDevice])
def test_what_could_not_be_written_back_fails_whoever_needs_it(device: type[Device]) -> None:
    used = device()
    opened = open_ring(used, 2, from_files=True)
    place: FilePlace = Bytes(torch.zeros(SIZE, dtype=torch.uint8), fails=True)
    opened.ring.begin([Item("a", place, 0, slice(0, SIZE)), Item("b", place, SIZE)])
    with opened.ring.enter(place):
        pass
    opened.ring.settle()
    with pytest.raises(LaneFailed, match="no space left"), opened.ring.enter(place):
        pass
    opened.close()
    used.close()


def test_visits_are_entered_in_the_order_that_was_told() -> None:
    opened = open_ring(HostDevice(), 2, from_files=True)
    places = [Bytes(torch.zeros(SIZE, dtype=torch.uint8)) for _ in range(2)]
    opened.ring.begin([Item("first", places[0], SIZE)])
    with pytest.raises(EngineError, match="first is next, and something else is entered"):
        opened.ring.enter(places[1]).__enter__()
    with pytest.raises(EngineError, match="never entered"):
        opened.ring.begin([])
    with opened.ring.enter(places[0]):
        pass
    with pytest.raises(EngineError, match="nobody spoke of"):
        opened.ring.enter(places[1]).__enter__()
    opened.close()
