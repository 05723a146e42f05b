"""Finds races without being late: who touched which bytes, and what made that happen before what.

The device here computes and copies at once, in the calling thread, and writes down what a GPU would do at its leisure:
compute is one agent, each stream of a lane is one, each host thread is one. An agent's operations follow each other;
between agents only what was waited for counts. Two agents that touch the same byte, one of them to write, with nothing
waited for in between, are a race, however lucky the run was (Lamport 1978; Mattern 1989; vector clocks as in FastTrack,
Flanagan and Freund 2009).

A run is written down once and judged as often as one likes, also as if one of its waits had not been there.
"""

import sys
import threading
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

from engine.attention import elsewhere, host_attention
from engine.attention.int4_window_pages import WindowPages, WindowWork
from engine.attention.pages import PageTable, attend_pages
from engine.attention.stored import StoredRows
from engine.attention.table import Capability
from engine.devices.simulated import SimulatedDevice
from engine.memory import closing
from engine.memory.device import Pieces
from engine.memory.lane import Event, LaneEvent, LaneName, Reached, ThreadLane
from engine.memory.spill import DiskTier
from engine.memory.tier import Block
from engine.tiers import TierName
from engine.weights.files import WeightFiles
from tests.engine.late import tensors_in

COMPUTE = "compute"
FILE = 1 << 62
"""Bytes of a spill file have addresses from here on."""

Position = tuple[str, int, int]
"""The file of a call, and the line and column where it ends."""
Clock = dict[str, int]


def caller() -> Position:
    """The engine's call that led here; of ``settle``, whose it is."""
    frame = sys._getframe(2)
    if frame.f_code.co_filename == closing.__file__ and frame.f_back is not None:
        frame = frame.f_back
    _, line, _, column = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    return frame.f_code.co_filename, line or 0, column or 0


def host() -> str:
    """The calling thread."""
    return f"thread {threading.get_ident()}"


@dataclass(frozen=True, slots=True)
class _Fork:
    agent: str
    point: int


@dataclass(frozen=True, slots=True)
class _Join:
    """``agent`` goes on after ``point``, because of the call at ``position``; ``None``: of the way devices work."""

    agent: str
    point: int
    position: Position | None


@dataclass(frozen=True, slots=True)
class _Use:
    """A thread names an event; ``known``: where whoever made the event was then."""

    agent: str
    known: int


@dataclass(frozen=True, slots=True)
class _Issue:
    """A copy ends at ``point``; ``known``: where whoever issued it was then."""

    agent: str
    point: int
    known: int


@dataclass(frozen=True, slots=True)
class _Synchronize:
    """A thread waits for all that was issued, as far as it can tell: others may issue more at any time."""

    agent: str


@dataclass(frozen=True, slots=True)
class _Access:
    agent: str
    begin: int
    end: int
    writes: bool
    what: str
    fresh: bool = False
    """Nobody has heard of this memory before."""


_Record = _Fork | _Join | _Use | _Issue | _Synchronize | _Access


@dataclass(frozen=True, slots=True)
class Race:
    """Two that touch the same bytes, and nothing says who is first."""

    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.first}, and {self.second}"


class Trace:
    """What happened, in an order that was possible."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[_Record] = []
        self.points = 0

    def point(self, agent: str) -> int:
        """All that an agent did so far."""
        with self._lock:
            self.points += 1
            self._records.append(_Fork(agent, self.points))
            return self.points

    def join(self, agent: str, point: int, position: Position | None = None) -> None:
        """From here on, an agent comes after a point."""
        self.add(_Join(agent, point, position))

    def follow(self, agent: str, other: str) -> None:
        """From here on, an agent comes after what another did so far, as devices work."""
        self.join(agent, self.point(other))

    def access(self, agent: str, memory: Tensor, what: str, *, writes: bool, fresh: bool = False) -> None:
        """An agent touches a tensor's bytes, and whatever lies between them."""
        if memory.numel():
            begin = memory.data_ptr()
            reach = sum((size - 1) * stride for size, stride in zip(memory.shape, memory.stride(), strict=True))
            self.touch(agent, begin, begin + (reach + 1) * memory.element_size(), what, writes=writes, fresh=fresh)

    def touch(self, agent: str, begin: int, end: int, what: str, *, writes: bool, fresh: bool = False) -> None:
        """An agent touches bytes."""
        self.add(_Access(agent, begin, end, writes, what, fresh))

    def add(self, record: _Record) -> None:
        """It happens now."""
        with self._lock:
            self._records.append(record)

    def races(self, without: Position | None = None, most: int = 1) -> list[Race]:
        """The first ``most`` races; ``without``: as if nothing had been waited for there."""
        clocks: dict[str, Clock] = {}
        points: dict[int, Clock] = {}
        makers: dict[int, tuple[str, int]] = {}
        issued: list[_Issue] = []
        history = _History()
        found: list[Race] = []
        for record in self._records:
            clock = clocks.setdefault(record.agent, {record.agent: 1})
            if isinstance(record, _Fork):
                points[record.point] = dict(clock)
                makers[record.point] = record.agent, clock[record.agent]
                clock[record.agent] += 1
            elif isinstance(record, _Join):
                if without is None or record.position != without:
                    _join(clock, points[record.point])
            elif isinstance(record, _Issue):
                issued.append(record)
            elif isinstance(record, _Synchronize):
                for each in issued:
                    maker, time = makers[each.known]
                    if clock.get(maker, 0) >= time:
                        _join(clock, points[each.point])
            elif isinstance(record, _Use):
                maker, time = makers[record.known]
                if clock.get(maker, 0) < time:
                    found.append(Race(f"{maker}: makes an event", f"{record.agent}: waits for it, or for one before"))
            else:
                found += history.touch(record, clock)
            if len(found) >= most:
                break
        return found[:most]

    def positions(self) -> set[Position]:
        """The calls that waited."""
        return {each.position for each in self._records if isinstance(each, _Join) and each.position is not None}


def _join(clock: Clock, other: Clock) -> None:
    for agent, time in other.items():
        if clock.get(agent, 0) < time:
            clock[agent] = time


@dataclass(slots=True)
class _Cell:
    """Bytes that were touched together."""

    end: int
    write: tuple[str, int, str] | None = None
    """Agent, its time, and what it did."""
    reads: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Since the write, by agent."""


class _History:
    """The last that was done to each byte."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._cells: list[_Cell] = []

    def touch(self, access: _Access, clock: Clock) -> Iterator[Race]:
        first, last = self._cut(access.begin, access.end)
        time = clock[access.agent]
        if access.fresh:
            self._begins[first:last], self._cells[first:last] = [access.begin], [_Cell(access.end)]
            last = first + 1
        for cell in self._cells[first:last]:
            before = [] if cell.write is None else [cell.write]
            if access.writes:
                before += [(agent, read, what) for agent, (read, what) in cell.reads.items()]
            for agent, then, what in before:
                if agent != access.agent and clock.get(agent, 0) < then:
                    yield Race(f"{agent}: {what}", f"{access.agent}: {access.what}")
            if access.writes:
                cell.write, cell.reads = (access.agent, time, access.what), {}
            else:
                cell.reads[access.agent] = time, access.what

    def _cut(self, begin: int, end: int) -> tuple[int, int]:
        """The cells that are exactly the bytes from ``begin`` to ``end``."""
        for border in (begin, end):
            index = bisect_right(self._begins, border) - 1
            if index >= 0 and self._begins[index] < border < self._cells[index].end:
                cell = self._cells[index]
                self._begins.insert(index + 1, border)
                self._cells.insert(index + 1, _Cell(cell.end, cell.write, dict(cell.reads)))
                cell.end = border
        first, last = bisect_left(self._begins, begin), bisect_left(self._begins, end)
        at, index = begin, first
        while at < end:
            until = self._begins[index] if index < last else end
            if at < until:
                self._begins.insert(index, at)
                self._cells.insert(index, _Cell(until))
                index, last = index + 1, last + 1
            if index < last:
                at = self._cells[index].end
                index += 1
            else:
                at = end
        return first, last


class _Point:
    """An event: in truth it has happened."""

    def __init__(self, trace: Trace, agent: str) -> None:
        self._trace = trace
        self.point = trace.point(agent)
        self.known = trace.point(host())
        self._reached = Reached()

    def wait(self) -> None:
        """The calling thread comes after it."""
        self.before(host(), caller())

    def before(self, agent: str, position: Position) -> None:
        """An agent comes after it, on the calling thread's word."""
        self._trace.add(_Use(host(), self.known))
        self._trace.join(agent, self.point, position)

    def span(self) -> tuple[float, float] | None:
        return self._reached.span()


class _LanePoint:
    """The end of a lane's work. No stream of a GPU can wait for it: the host does."""

    def __init__(self, trace: Trace, event: LaneEvent, known: int, points: list[int]) -> None:
        self._trace, self._event, self.known, self.points = trace, event, known, points

    def wait(self) -> None:
        self.before(host(), caller())

    def before(self, agent: str, position: Position) -> None:
        """The calling thread comes after it, and so does whatever it then gives to ``agent``."""
        self._event.wait()
        self._trace.add(_Use(host(), self.known))
        self._trace.join(host(), self.points[0], position)
        if agent != host():
            self._trace.follow(agent, host())

    def span(self) -> tuple[float, float] | None:
        return self._event.span()


class CheckedDevice(SimulatedDevice):
    """Writes down what is done on it and beside it; see ``watch``.

    It has the kernels of a card, and orders copies as CUDA's device does: those of one lane and one thread follow each
    other, since they are given to one stream; those of two threads share a link and no stream, so that nothing says
    which of them is first.
    """

    def __init__(self, trace: Trace, capability: Capability | None = None) -> None:
        super().__init__()
        self.capability = capability
        self._trace = trace

    def allocate(self, num_bytes: int) -> Tensor:
        """Memory that compute had a moment ago, perhaps."""
        with _disable_current_modes():
            memory = super().allocate(num_bytes)
        self._trace.access(COMPUTE, memory, "what was here before", writes=True, fresh=True)
        return memory

    def allocate_host(self, num_bytes: int) -> Tensor:
        with _disable_current_modes():
            memory = super().allocate_host(num_bytes)
        self._trace.access(host(), memory, "allocated", writes=True, fresh=True)
        return memory

    def copy(self, lane: LaneName, pieces: Pieces, after: Event) -> Event:
        position = caller()
        stream = f"{lane} of {host()}"
        self._trace.follow(stream, host())
        if isinstance(after, _Point | _LanePoint):
            after.before(stream, position)
        for destination, source in pieces:
            self._trace.access(stream, source, "copies from here", writes=False)
            self._trace.access(stream, destination, "copies to here", writes=True)
            with _disable_current_modes():
                destination.copy_(source)
        copied = _Point(self._trace, stream)
        self._trace.add(_Issue(stream, copied.point, copied.known))
        return copied

    def compute_after(self, event: Event) -> None:
        if isinstance(event, _Point | _LanePoint):
            event.before(COMPUTE, caller())

    def compute_mark(self) -> Event:
        self._trace.follow(COMPUTE, host())
        return _Point(self._trace, COMPUTE)

    @contextmanager
    def computing(self) -> Iterator[None]:
        with _Watch(self._trace):
            yield

    def upload(self, values: Tensor) -> Tensor:
        with _disable_current_modes():
            uploaded = values.clone()
        self._trace.follow(COMPUTE, host())
        self._trace.access(COMPUTE, uploaded, "uploaded", writes=True, fresh=True)
        return uploaded

    def download(self, values: Tensor) -> Tensor:
        self._trace.access(COMPUTE, values, "downloaded", writes=False)
        self._trace.follow(host(), COMPUTE)
        with _disable_current_modes():
            return values.clone()

    def synchronize(self) -> None:
        self._trace.follow(host(), COMPUTE)
        self._trace.add(_Synchronize(host()))


class _Watch(TorchDispatchMode):
    """Whatever is computed while it lasts is compute's."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, name = tensors_in((args, kwargs)), str(func)
        schema = func._schema
        written = {
            id(tensor)
            for argument, value in [
                *zip(schema.arguments, args, strict=False),
                *((each, kwargs[each.name]) for each in schema.arguments if each.name in kwargs),
            ]
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors_in(value)
        }
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        made = [each for each in tensors_in(result) if each.untyped_storage().data_ptr() not in storages]
        if (not made and not written and tensors_in(result)) or torch.Tag.inplace_view in func.tags:
            # A view touches nothing, be it another tensor or the same. ``torch.tensor`` ends with the latter, in memory
            # of the host that nobody has heard of, where perhaps a tensor lay that a lane copied from.
            return result
        self._trace.follow(COMPUTE, host())
        for tensor in given:
            self._trace.access(COMPUTE, tensor, name, writes=id(tensor) in written)
        for tensor in made:
            self._trace.access(COMPUTE, tensor, name, writes=True, fresh=True)
        return result


def watch(trace: Trace, monkeypatch: pytest.MonkeyPatch, capability: Capability | None = None) -> CheckedDevice:
    """A device, with lanes, files and the release of memory written down, too."""
    submit, close, read_unit, put = ThreadLane.submit, ThreadLane.close, WeightFiles.read_unit, elsewhere.put
    put_windows, write_windows = WindowPages.put, WindowPages.write
    write, read, release, unpack = DiskTier.write, DiskTier.read, Block.release, WeightFiles.unpack
    work_of: defaultdict[ThreadLane, list[list[int]]] = defaultdict(list)

    def submit_watched(self: ThreadLane, work: Callable[[], None]) -> _LanePoint:
        begun = trace.point(host())
        ended: list[int] = []
        work_of[self].append(ended)

        def watched() -> None:
            trace.join(host(), begun)
            try:
                work()
            finally:
                ended.append(trace.point(host()))

        return _LanePoint(trace, submit(self, watched), begun, ended)

    def close_watched(self: ThreadLane) -> None:
        close(self)
        for point in chain.from_iterable(work_of.pop(self, [])):
            trace.join(host(), point)

    def read_unit_watched(self: WeightFiles, name: str, out: Tensor) -> int:
        count = read_unit(self, name, out)
        trace.access(host(), out[:count], f"reads {name}", writes=True)
        return count

    def unpack_watched(self: WeightFiles, name: str, raw: Tensor, out: Mapping[str, Tensor]) -> None:
        unpack(self, name, raw, out)
        if isinstance(_get_current_dispatch_mode(), _Watch):
            return  # compute's, and written down as that
        for tensor in out.values():
            trace.access(host(), tensor, f"unpacks {name}", writes=True)

    def write_watched(self: DiskTier, offset: int, data: Tensor) -> None:
        trace.access(host(), data, "writes to the spill file", writes=False)
        trace.touch(host(), FILE + offset, FILE + offset + data.numel(), "writes to the spill file", writes=True)
        write(self, offset, data)

    def read_watched(self: DiskTier, offset: int, into: Tensor) -> None:
        read(self, offset, into)
        trace.touch(host(), FILE + offset, FILE + offset + into.numel(), "reads the spill file", writes=False)
        trace.access(host(), into, "reads the spill file", writes=True)

    def put_watched(pool: Tensor, slots: Tensor, rows: Tensor, unwritten: Tensor) -> None:
        for index, slot in enumerate(slots.tolist()):
            trace.access(host(), rows[index], "what is kept", writes=False)
            trace.access(host(), pool[slot], "keeps", writes=True)
        for slot in unwritten.tolist():
            trace.access(host(), pool[slot], "clears", writes=True)
        put(pool, slots, rows, unwritten)

    def put_windows_watched(self: WindowPages, layer: int, work: WindowWork, left: Tensor) -> None:
        trace.access(host(), left, "what is kept", writes=False)
        pool = self._pools.layers(TierName.HOST)[layer] if work.on_host else left
        for to in work.on_host:
            for slot in (*to.slots.tolist(), *to.full_slots.tolist()):
                trace.access(host(), pool[slot], "keeps", writes=True)
            for row in to.old.tolist():
                trace.access(host(), pool[row], "packs", writes=False)
            units = self._rows.units(pool)
            for unit in to.open_units.tolist():
                trace.access(host(), units[unit], "keeps plain", writes=True)
        for row in work.blank.tolist():
            trace.access(host(), pool[row], "clears", writes=True)
        put_windows(self, layer, work, left)

    def write_windows_watched(self: WindowPages, layer: int, work: WindowWork, left: Tensor) -> None:
        trace.access(host(), left, "what is kept", writes=False)
        write_windows(self, layer, work, left)

    def attend_watched(
        q: Tensor, pool: Tensor, stored: StoredRows, table: PageTable, staged: Tensor, work: Tensor, out: Tensor
    ) -> None:
        trace.access(host(), q, "queries of the host", writes=False)
        page_tokens = table.hidden.shape[2]
        for page in table.pages.tolist():
            trace.access(host(), pool[page * page_tokens : (page + 1) * page_tokens], "attended to", writes=False)
        for block in table.blocks:
            for row in () if block.opened is None else block.opened[1].flatten().tolist():
                trace.access(host(), pool[row], "attended to plain", writes=False)
        for memory in (staged, work):
            trace.access(host(), memory, "work of the host", writes=True)
        attend_pages(q, pool, stored, table, staged, work, out)
        trace.access(host(), out, "results of the host", writes=True)

    def release_watched(self: Block) -> None:
        # The device's own allocator hands memory out again in the order of compute, and knows of copies.
        if self._data is not None and self._tier.name is TierName.HOST:
            trace.access(host(), self._data, "released", writes=True)
        release(self)

    monkeypatch.setattr(ThreadLane, "submit", submit_watched)
    monkeypatch.setattr(ThreadLane, "close", close_watched)
    monkeypatch.setattr(WeightFiles, "read_unit", read_unit_watched)
    monkeypatch.setattr(WeightFiles, "unpack", unpack_watched)
    monkeypatch.setattr(elsewhere, "put", put_watched)
    monkeypatch.setattr(WindowPages, "put", put_windows_watched)
    monkeypatch.setattr(WindowPages, "write", write_windows_watched)
    monkeypatch.setattr(host_attention, "attend_pages", attend_watched)
    monkeypatch.setattr(DiskTier, "write", write_watched)
    monkeypatch.setattr(DiskTier, "read", read_watched)
    monkeypatch.setattr(Block, "release", release_watched)
    return CheckedDevice(trace, capability)
