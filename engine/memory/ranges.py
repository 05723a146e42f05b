"""Free ranges of a linear space: first fit, neighbours joined on release."""

from bisect import bisect_left
from collections.abc import Iterable

from engine.errors import EngineError


class FreeRanges:
    """Hands out ``[offset, offset + size)`` ranges below ``limit``."""

    def __init__(self, limit: int) -> None:
        self._ranges: list[tuple[int, int]] = [(0, limit)] if limit else []

    @classmethod
    def around(cls, limit: int, taken: Iterable[tuple[int, int]]) -> "FreeRanges":
        """What is free beside these ``(offset, size)``."""
        found, end = cls(0), 0
        for offset, size in [*sorted(taken), (limit, 0)]:
            if offset > end:
                found._ranges.append((end, offset - end))
            end = offset + size
        return found

    def allocate(self, size: int) -> int | None:
        """The lowest offset where ``size`` fits, or ``None``."""
        for index, (offset, free) in enumerate(self._ranges):
            if free >= size:
                rest = [(offset + size, free - size)] if free > size else []
                self._ranges[index : index + 1] = rest
                return offset
        return None

    def release(self, offset: int, size: int) -> None:
        """Make a range free again.

        Raises:
            EngineError: part of it is free already.
        """
        index = bisect_left(self._ranges, (offset, 0))
        before = self._ranges[index - 1] if index else None
        after = self._ranges[index] if index < len(self._ranges) else None
        if (before and before[0] + before[1] > offset) or (after and offset + size > after[0]):
            raise EngineError(f"range {offset}+{size} is released twice")
        start, stop = index, index
        if before and before[0] + before[1] == offset:
            offset, size, start = before[0], before[1] + size, index - 1
        if after and offset + size == after[0]:
            size, stop = size + after[1], index + 1
        self._ranges[start:stop] = [(offset, size)]

    @property
    def first(self) -> int:
        """Bytes of the range with the lowest offset."""
        return self._ranges[0][1] if self._ranges else 0

    @property
    def longest(self) -> int:
        """Bytes of the longest range."""
        return max((size for _, size in self._ranges), default=0)

    @property
    def free(self) -> int:
        """Bytes free, in all ranges together."""
        return sum(size for _, size in self._ranges)
