"""One block of a memory tier, handed out in pieces."""

from torch import Tensor

from engine.errors import EngineError, TierFull
from engine.memory.ranges import FreeRanges
from engine.memory.tier import MemoryTier
from engine.units import format_bytes


class Arena:
    """Pieces come lowest first, so that memory which was used before is used again.

    Fresh pages cost several times what it takes to fill them, and a virtual machine's host may want them back as soon
    as they are free; pinning them costs more still. So what comes and goes with every sequence never goes back.
    """

    def __init__(self, tier: MemoryTier, num_bytes: int, what: str) -> None:
        """Take ``num_bytes`` of the tier.

        Raises:
            TierFull: the budget would be exceeded.
        """
        self._block = tier.allocate(num_bytes, what)
        self._num_bytes = num_bytes
        self._ranges = FreeRanges(num_bytes)
        self._name = f"{tier.name} memory"
        self._what = what

    def allocate(self, num_bytes: int) -> "Piece":
        """A piece, uninitialised.

        Raises:
            TierFull: no free range is as large.
        """
        offset = self._ranges.allocate(num_bytes)
        if offset is None:
            raise TierFull(f"{self._name}: no contiguous {format_bytes(num_bytes)} are left for {self._what}")
        return Piece(self, offset, self._block.data[offset : offset + num_bytes])

    @property
    def held_bytes(self) -> int:
        """Bytes of all pieces."""
        return self._num_bytes - self._ranges.free

    def recycle(self, offset: int, num_bytes: int) -> None:
        """Called by ``Piece.release``."""
        self._ranges.release(offset, num_bytes)

    def close(self) -> None:
        """Give the block back; a second call does nothing."""
        self._block.release()


class Piece:
    """Bytes of an arena, owned by whoever asked; ``release`` once."""

    def __init__(self, arena: Arena, offset: int, data: Tensor) -> None:
        self._arena = arena
        self._offset = offset
        self._data: Tensor | None = data

    @property
    def data(self) -> Tensor:
        """The bytes, ``uint8 [num_bytes]``."""
        if self._data is None:
            raise EngineError("a piece of an arena is used after it was released")
        return self._data

    def release(self) -> None:
        """Give the bytes back; a second call does nothing."""
        if self._data is not None:
            self._arena.recycle(self._offset, self._data.numel())
            self._data = None
