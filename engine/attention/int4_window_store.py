"""Where what a micro-batch adds goes in a pool, where keys are packed by windows: see ``int4_window_rows``.

Shapes: S rows of a pool, T new tokens, n windows, w tokens of one, K key/value heads, H head size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from engine.attention.int4_sizes import WINDOW
from engine.attention.int4_window_rows import WindowRows
from engine.formats.int4 import quantised_columns


@dataclass(frozen=True, slots=True)
class Added:
    """Consecutive tokens of one sequence."""

    row: int
    """The first of them among those that are stored."""
    start: int
    """Its position in the sequence."""
    length: int
    slots: Sequence[int]
    """Rows of the pool from the beginning of the window that ``start`` is in, up to the end of the last one."""
    opened: Sequence[int]
    """Rows of the pool for plain keys."""


class Numbers(NamedTuple):
    """Whole numbers, as lists."""

    rows: list[int]
    """Which tokens."""
    slots: list[int]
    """The row of each."""
    full_slots: list[int]
    """The rows of all tokens of windows that become full."""
    old: list[int]
    """For plain keys: the rows of sequences of which such a window has earlier tokens."""
    old_at: list[int]
    """Which window that is."""
    full_rows: list[int]
    """New tokens that are in these windows."""
    full_at: list[int]
    """Where in them."""
    open_rows: list[int]
    """New tokens whose window is not full."""
    open_units: list[int]
    """Where their keys go: see ``WindowRows.put_open``."""


@dataclass(frozen=True, slots=True)
class Stores:
    """The same on a device."""

    rows: Tensor
    slots: Tensor
    full_slots: Tensor
    old: Tensor
    old_at: Tensor
    full_rows: Tensor
    full_at: Tensor
    open_rows: Tensor
    open_units: Tensor


def places_of(added: Iterable[Added], rows: WindowRows, most_windows: int) -> Iterator[Numbers]:
    """Where new tokens of some sequences go, in the order in which they are stored; a list ends when ``most_windows``
    windows have become full.

    Of the last window the plain keys are kept also if it becomes full: its own tokens see them.
    """
    found = _nothing()
    for each in added:
        end, base = each.start + each.length, each.start - each.start % WINDOW
        for first in range(base, end, WINDOW):
            begin, seen = max(each.start, first), min(end, first + WINDOW)
            new = range(each.row + begin - each.start, each.row + seen - each.start)
            found.rows.extend(new)
            found.slots.extend(each.slots[begin - base : seen - base])
            if seen == end:
                found.open_rows.extend(new)
                found.open_units.extend(_units(each.opened, begin - first, seen - first, rows))
            if seen < first + WINDOW:
                continue
            window = len(found.full_slots) // WINDOW
            if begin > first:
                found.old.extend(each.opened)
                found.old_at.append(window)
            found.full_slots.extend(each.slots[first - base : first - base + WINDOW])
            found.full_rows.extend(new)
            found.full_at.extend(range(window * WINDOW + begin - first, window * WINDOW + seen - first))
            if window + 1 == most_windows:
                yield found
                found = _nothing()
    if found.slots:
        yield found


def _nothing() -> Numbers:
    return Numbers([], [], [], [], [], [], [], [], [])


def stores(numbers: Numbers, made: Callable[[list[int]], Tensor]) -> Stores:
    """On a device, ``made`` by something that gives int64."""
    return Stores(*map(made, numbers))


def store(rows: WindowRows, pool_SB: Tensor, to: Stores, k_TKH: Tensor, values: Tensor) -> None:
    """New keys and rows of values into a pool."""
    rows.put_values(pool_SB, to.slots, values.index_select(0, to.rows))
    if len(to.full_slots):
        windows_nwKH = k_TKH.new_empty(len(to.full_slots) // WINDOW, WINDOW, *k_TKH.shape[1:])
        if len(to.old_at):
            windows_nwKH.index_copy_(0, to.old_at, rows.opened(pool_SB, to.old.view(len(to.old_at), -1)))
        windows_nwKH.flatten(0, 1).index_copy_(0, to.full_at, k_TKH.index_select(0, to.full_rows))
        rows.put_windows(pool_SB, to.full_slots, quantised_columns(windows_nwKH.transpose(1, 2)))
    if len(to.open_units):
        rows.put_open(pool_SB, to.open_units, k_TKH.index_select(0, to.open_rows))


def _units(opened: Sequence[int], first: int, end: int, rows: WindowRows) -> list[int]:
    """The pieces of keys that have these places in a window."""
    of_row, of_key = rows.units_of_row, rows.units_of_key
    return [opened[unit // of_row] * of_row + unit % of_row for unit in range(first * of_key, end * of_key)]
