"""The three places memory comes from, and how something is shared out over them. No torch."""

from dataclasses import dataclass
from enum import StrEnum


class TierName(StrEnum):
    """The three places memory comes from."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Shares:
    """Percent of a tensor class that lives in each tier; they sum to 100."""

    device: int
    host: int
    disk: int

    def __post_init__(self) -> None:
        if min(self.device, self.host, self.disk) < 0 or self.device + self.host + self.disk != 100:
            raise ValueError(f"shares must be three percentages of 0 or more that sum to 100, not {self}")

    @classmethod
    def parse(cls, text: str) -> "Shares":
        """``20/80/0``: device, host, disk.

        Raises:
            ValueError: with a sentence for people.
        """
        parts = text.split("/")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"{text!r} is not three percentages; write device/host/disk, for example 20/80/0")
        return cls(*(int(part) for part in parts))

    def of(self, tier: TierName) -> int:
        """The percentage of one tier."""
        return {TierName.DEVICE: self.device, TierName.HOST: self.host, TierName.DISK: self.disk}[tier]

    def __str__(self) -> str:
        return f"{self.device}/{self.host}/{self.disk}"
