"""The disk tier: one spill file, unlinked at open, so that nothing is left behind however the process ends."""

import errno
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.errors import DiskFull, LaneFailed, TierFull
from engine.memory.lane import REACHED, Event
from engine.memory.ranges import FreeRanges
from engine.memory.tier import Tier
from engine.tiers import TierName
from engine.units import align_up, format_bytes

PAGE = 4096


class DiskTier(Tier):
    """Parts of a spill file. Room is claimed from the file system before it is promised, not when the data comes."""

    def __init__(self, budget: int, directory: Path) -> None:
        super().__init__(TierName.DISK, budget)
        self._directory = directory
        self._fd: int | None = None
        self._ranges = FreeRanges(budget)
        self._claimed = 0

    def allocate(self, num_bytes: int, what: str) -> "SpillRange":
        """At least ``num_bytes``, in the lowest place free, claimed from the file system.

        Raises:
            TierFull: the budget would be exceeded.
            DiskFull: the file system has no room.
        """
        room = self.reserve(align_up(num_bytes, PAGE), what)
        try:
            room.claim(room.size)
        except BaseException:
            room.release()
            raise
        return room

    def reserve(self, num_bytes: int, what: str) -> "SpillRange":
        """Room of the budget, in the lowest place free; it is held as far as its owner claims it.

        Raises:
            TierFull: the budget would be exceeded.
        """
        offset = self._ranges.allocate(num_bytes)
        if offset is None:
            raise TierFull(
                f"disk memory is full: {what} needs {format_bytes(num_bytes)} in one piece, "
                f"{format_bytes(self._ranges.free)} of {format_bytes(self.budget)} are left"
            )
        return SpillRange(self, offset, num_bytes, what)

    def close(self) -> None:
        """Give the file's room back to the file system."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def claim(self, end: int) -> None:
        """Make the file system promise every byte below ``end``.

        Raises:
            DiskFull: it has no room.
        """
        if end > self._claimed:
            try:
                os.posix_fallocate(self._file(), self._claimed, end - self._claimed)
            except OSError as error:
                with suppress(OSError):  # what was claimed before the room was used up is nobody's
                    os.ftruncate(self._file(), self._claimed)
                raise self._failed(error) from error
            self._claimed = end

    def _file(self) -> int:
        if self._fd is None:
            try:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._fd, path = tempfile.mkstemp(prefix="overnight-", suffix=".spill", dir=self._directory)
                Path(path).unlink()
            except OSError as error:
                raise self._failed(error) from error
        return self._fd

    def _failed(self, error: OSError) -> DiskFull | LaneFailed:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(
                f"no space left for spill files in {self._directory}, which hold {format_bytes(self._claimed)}; "
                "free some, name another directory with --disk-dir, or lower --disk-space"
            )
        return LaneFailed(f"spill file in {self._directory}: {error.strerror or error}")

    def write(self, offset: int, data: Tensor) -> None:
        """Write a contiguous ``uint8`` CPU tensor."""
        view = data.numpy().data
        try:
            while view:
                written = os.pwrite(self._file(), view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._failed(error) from error

    def read(self, offset: int, into: Tensor) -> None:
        """Fill a contiguous ``uint8`` CPU tensor."""
        view = into.numpy().data
        try:
            while view:
                count = os.preadv(self._file(), [view], offset)
                if count == 0:
                    raise LaneFailed(f"spill file in {self._directory}: it ends before offset {offset}")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise self._failed(error) from error

    def recycle(self, offset: int, size: int) -> None:
        """Called by ``SpillRange.release``."""
        self._ranges.release(offset, size)


class SpillRange:
    """Part of a spill file, owned by whoever asked; ``release`` once."""

    def __init__(self, tier: DiskTier, offset: int, size: int, what: str) -> None:
        self._tier = tier
        self.offset = offset
        self.size = size
        self._what = what
        self._claimed = 0
        self._released = False

    def claim(self, end: int) -> None:
        """Make the file system promise the first ``end`` bytes, and whatever lies before them in the file.

        Raises:
            DiskFull: it has no room.
        """
        if end > self._claimed:
            self._tier.claim(self.offset + end)
            self._tier.take(end - self._claimed, self._what)
            self._claimed = end

    def read(self, begin: int, into: Tensor) -> None:
        """Fill a contiguous ``uint8`` CPU tensor from ``begin`` on."""
        self._tier.read(self.offset + begin, into)

    def write(self, begin: int, data: Tensor) -> None:
        """Write a contiguous ``uint8`` CPU tensor from ``begin`` on."""
        self._tier.write(self.offset + begin, data)

    def place(self, begin: int) -> "SpilledPlace":
        """The bytes from ``begin`` on, for a ``Ring``."""
        return SpilledPlace(self._tier, self.offset + begin)

    def release(self) -> None:
        """Give the room back; a second call does nothing."""
        if not self._released:
            self._released = True
            self._tier.give(self._claimed, self._what)
            self._tier.recycle(self.offset, self.size)


@dataclass(slots=True, eq=False)
class SpilledPlace:
    """A piece of a spill file, as a place of a ``Ring``'s."""

    tier: DiskTier
    offset: int
    stored: Event = REACHED

    def read(self, into: Tensor) -> int:
        """Fill host bytes from its beginning."""
        self.tier.read(self.offset, into)
        return into.numel()

    def write(self, offset: int, data: Tensor) -> None:
        """Write contiguous host bytes from ``offset`` on."""
        self.tier.write(self.offset + offset, data)
