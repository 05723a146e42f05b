"""What a micro-batch adds to pages of host memory and of the spill file, where keys are packed by windows.

A lane does it, with the plain keys that come from the device: a pass is done with them once they have left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.groups import Run, open_from, runs_of
from engine.attention.int4_sizes import WINDOW
from engine.attention.int4_window_rows import WindowRows
from engine.attention.int4_window_store import Added, Stores, places_of, store, stores
from engine.attention.pools import KVPools
from engine.kvcache.cache import Extent, SequenceRoom
from engine.kvcache.segments import MicroBatch, Segment
from engine.tiers import TierName
from engine.units import align_up, div_ceil


@dataclass(frozen=True, slots=True)
class _OnDisk:
    """One segment: its rows are read, changed and written again."""

    num_rows: int
    read: tuple[Run, ...]
    to: tuple[Stores, ...]
    write: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class WindowWork:
    """What a micro-batch adds, the same in every layer."""

    on_host: tuple[Stores, ...]
    blank: Tensor
    """Rows of host memory for plain keys that nobody has written yet, int64: attention there reads all of a window, and
    what it does not attend to counts for nothing only if it is a number."""
    on_disk: tuple[_OnDisk, ...]

    @property
    def disk_tokens(self) -> int:
        """Rows that are written there."""
        return sum(run.num_tokens for each in self.on_disk for run in each.write)


class WindowPages:
    """Knows where in the pages new keys and values go."""

    def __init__(self, pools: KVPools, rows: WindowRows, room: SequenceRoom, most_windows: int) -> None:
        """``most_windows``: how many are packed at once."""
        self._pools, self._rows, self._room, self._most_windows = pools, rows, room, most_windows

    def work_of(self, batch: MicroBatch) -> WindowWork:
        """That of a micro-batch: ``Kept`` has the same rows."""
        on_host: list[Added] = []
        blank: list[int] = []
        on_disk: list[_OnDisk] = []
        row, first = 0, None
        for segment in batch.segments:
            holding = segment.holding
            if holding is not None and not holding.is_addressable:
                first = row if first is None else first
                if holding.tier is TierName.HOST:
                    on_host.append(self._on_host(segment, holding.extents, row - first))
                    blank += () if segment.start else on_host[-1].opened
                else:
                    on_disk.append(self._on_disk(segment, holding.extents, row - first))
            row += segment.length
        blocks = places_of(on_host, self._rows, self._most_windows)
        return WindowWork(tuple(stores(each, _int64) for each in blocks), _int64(blank), tuple(on_disk))

    def put(self, layer: int, work: WindowWork, left: Tensor) -> None:
        """Into host memory; ``left``: see ``WindowRows.leaving``."""
        if work.on_host:
            pool = self._pools.layers(TierName.HOST)[layer]
            if len(work.blank):
                pool.index_fill_(0, work.blank, 0)
            keys, values = self._rows.arrived(left)
            for each in work.on_host:
                store(self._rows, pool, each, keys, values)

    def write(self, layer: int, work: WindowWork, left: Tensor) -> None:
        """Into the spill file."""
        keys, values = self._rows.arrived(left)
        for each in work.on_disk:
            raw = torch.zeros(each.num_rows * self._rows.row_bytes, dtype=torch.uint8)
            self._pools.read(layer, each.read, raw)
            for to in each.to:
                store(self._rows, self._rows.view(raw), to, keys, values)
            self._pools.write(layer, each.write, raw)

    def _on_host(self, segment: Segment, extents: Sequence[Extent], row: int) -> Added:
        base, end = _windows(segment)
        slots = list(_slots(extents, base, end - base))
        opened = list(_slots(extents, open_from(segment, self._room), self._room.beside))
        return Added(row, segment.start, segment.length, slots, opened)

    def _on_disk(self, segment: Segment, extents: Sequence[Extent], row: int) -> _OnDisk:
        """Its windows' rows come first, those of plain keys behind them."""
        base, padded = _windows(segment)
        start, end, opened = segment.start, segment.start + segment.length, padded - base
        num_rows = opened + self._room.beside
        added = Added(row, start, segment.length, range(opened), range(opened, num_rows))
        numbers = tuple(places_of([added], self._rows, self._most_windows))
        open_begin = open_from(segment, self._room)
        # Of plain keys, the rows that new ones are in; the first of them may hold an older one, too.
        places = max(start, end - end % WINDOW) % WINDOW, end % WINDOW
        first = places[0] * self._rows.units_of_key // self._rows.units_of_row
        touched = div_ceil(places[1] * self._rows.units_of_key, self._rows.units_of_row) - first if end % WINDOW else 0
        changed = tuple(runs_of(extents, open_begin + first, touched, opened + first))
        if start % WINDOW and any(each.full_slots for each in numbers):  # all of that window is packed
            before = (
                *runs_of(extents, base, start - base, 0),
                *runs_of(extents, open_begin, self._room.beside, opened),
            )
            new = runs_of(extents, base, end - base, 0)
        else:
            before, new = changed, runs_of(extents, start, segment.length, start - base)
        return _OnDisk(num_rows, before, tuple(stores(each, _int64) for each in numbers), (*new, *changed))


def _windows(segment: Segment) -> tuple[int, int]:
    """Where the windows of a segment begin and end, in tokens of the sequence."""
    return segment.start - segment.start % WINDOW, align_up(segment.start + segment.length, WINDOW)


def _slots(extents: Sequence[Extent], first: int, count: int) -> Iterator[int]:
    for run in runs_of(extents, first, count, 0):
        yield from range(run.offset, run.offset + run.num_tokens)


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
