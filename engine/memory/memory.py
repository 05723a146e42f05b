"""The memory that some layers live in: a device, a budget for each tier, and whoever watches what moves."""

from collections.abc import Mapping
from pathlib import Path

from engine.memory.closing import run_all
from engine.memory.device import Device
from engine.memory.spill import DiskTier
from engine.memory.tier import Block, MemoryTier, Tier
from engine.memory.traffic import LaneRecorder, Traffic
from engine.tiers import TierName


class Memory:
    """Owns the device and the spill file; closes both. Whatever is allocated is closed by its owner before."""

    def __init__(
        self, device: Device, budgets: Mapping[TierName, int], disk_dir: Path, recorder: LaneRecorder | None = None
    ) -> None:
        """Nothing is taken yet.

        Args:
            device: where compute is.
            budgets: bytes that each tier may hold.
            disk_dir: where the spill file is made, if there is to be one.
            recorder: is told of every single piece of work.
        """
        self.device = device
        self.traffic = Traffic(device.compute_mark, recorder)
        self.disk = DiskTier(budgets[TierName.DISK], disk_dir)
        self._blocks = {
            TierName.DEVICE: MemoryTier(TierName.DEVICE, budgets[TierName.DEVICE], device.allocate),
            TierName.HOST: MemoryTier(TierName.HOST, budgets[TierName.HOST], device.allocate_host),
        }
        self.tiers: dict[TierName, Tier] = {**self._blocks, TierName.DISK: self.disk}

    def allocate(self, tier: TierName, num_bytes: int, what: str) -> Block:
        """A block of device or host memory, uninitialised.

        Raises:
            TierFull: the budget would be exceeded, or the machine has less than the budget promises.
        """
        return self._blocks[tier].allocate(num_bytes, what)

    def is_addressable(self, tier: TierName) -> bool:
        """Whether compute reads and writes what lies there without a copy."""
        return tier is TierName.DEVICE or (tier is TierName.HOST and self.device.shares_host_memory)

    def check_integrity(self) -> None:
        """Raise ``EngineError`` if a tier's books do not add up."""
        for tier in self.tiers.values():
            tier.check_integrity()

    def close(self) -> None:
        """Give the spill file's room back and end the device's lanes."""
        run_all([self.disk.close, self.device.close])
