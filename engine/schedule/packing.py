"""A pass's tokens cut into micro-batches."""

from collections.abc import Iterable
from dataclasses import replace

from engine.attention.balanced import balanced
from engine.kvcache.cache import Holding
from engine.kvcache.segments import Segment
from engine.sequence import Sequence
from engine.units import div_ceil


class Packer:
    """Fills micro-batches one after another."""

    def __init__(self, micro_batch: int, micro_batches: int) -> None:
        self._micro_batch = micro_batch
        self._left = micro_batch * micro_batches
        self._batches: list[list[Segment]] = []
        self._room = 0

    @property
    def left(self) -> int:
        """Tokens this pass still takes."""
        return self._left

    def add(self, sequence: Sequence, start: int, length: int, holding: Holding) -> None:
        """Pack ``length`` tokens, split at the borders of micro-batches."""
        while length:
            self._open_if_full()
            taken = min(length, self._room)
            self._append(Segment(sequence, start, taken, holding))
            start, length = start + taken, length - taken

    def add_whole(self, sequence: Sequence, length: int) -> bool:
        """Pack a whole sequence into one micro-batch, leaving the current one's rest empty if it must."""
        if length > self._room:
            if self._left - self._room < length:
                return False
            self._left -= self._room
            self._room = 0
        self._open_if_full()
        self._append(Segment(sequence, 0, length))
        return True

    def finish(self) -> list[list[Segment]]:
        """The micro-batches as packed."""
        return [batch for batch in self._batches if batch]

    def _open_if_full(self) -> None:
        if self._room == 0:
            self._batches.append([])
            self._room = min(self._micro_batch, self._left)

    def _append(self, segment: Segment) -> None:
        self._batches[-1].append(segment)
        self._room -= segment.length
        self._left -= segment.length


def dealt(batches: list[list[Segment]], most: int) -> list[list[Segment]]:
    """The same segments, so that the host has a part in each of two or more micro-batches of about one size.

    One's attention on the host goes on beside another's compute; if the first had all that the host does, half of that
    would find nothing to go on beside. Nothing changes where the host has nothing to do.

    Args:
        batches: as packed.
        most: tokens of a micro-batch.
    """
    on_host = [segment for batch in batches for segment in batch if segment.can_attend_on_host]
    rest = _joined(segment for batch in batches for segment in batch if not segment.can_attend_on_host)
    if len(on_host) < 2:
        return batches
    number = max(2, len(batches))
    groups = balanced([segment.start + 1 for segment in on_host], number)
    found = [[on_host[index] for index in group] for group in groups]
    found += [[] for _ in range(number - len(found))]
    sizes = [len(batch) for batch in found]
    tokens = sum(sizes) + sum(segment.length for segment in rest)
    each = div_ceil(tokens, number)
    filled = 0
    for segment in rest:
        left: Segment | None = segment
        while left is not None:
            while filled < number - 1 and sizes[filled] >= each:
                filled += 1
            room = (each if filled < number - 1 else most) - sizes[filled]
            is_whole = left.holding is None or left.length <= room
            if is_whole and sizes[filled] + left.length > most:
                return batches  # a sequence that must stay whole found no room
            first, left = (left, None) if is_whole else _cut(left, max(1, room))
            found[filled].append(first)
            sizes[filled] += first.length
    return found if max(sizes) <= most else batches


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """Parts of one sequence that were cut at the border of micro-batches as one again."""
    found: list[Segment] = []
    for segment in segments:
        before = found[-1] if found else None
        if before is not None and before.sequence is segment.sequence:
            found[-1] = replace(before, length=before.length + segment.length)
        else:
            found.append(segment)
    return found


def _cut(segment: Segment, length: int) -> tuple[Segment, Segment]:
    """A segment's first tokens, and the others."""
    rest = replace(segment, start=segment.start + length, length=segment.length - length)
    return replace(segment, length=length), rest
