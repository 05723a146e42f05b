"""Whose fault was it? A failure is classified once, where it is caught; what follows is `worker.fault_policy`'s."""

from enum import StrEnum

from engine.errors import CheckpointError, DeviceFailed, DeviceUnavailable, EngineError, TierFull
from worker.errors import ModelNotFound


class Blame(StrEnum):
    """Who has to bear a failure."""

    JOB = "job"
    """Its model is damaged: it would fail everywhere."""
    MACHINE = "machine"
    """No room, no such model here, a disk that fails: others may do better, and this machine, later."""
    DEVICE = "device"
    """The device is lost: this process can do nothing more."""
    UNKNOWN = "unknown"
    """A fault of ours, or a row that nobody foresaw."""


def blame_in_pass(error: Exception) -> Blame:
    """Who has to bear ``error``, which ended a pass.

    A plan promises that there is room for each pass: where there was none, nobody foresaw a row of it.
    """
    return Blame.UNKNOWN if isinstance(error, TierFull) else blame(error)


def blame(error: Exception) -> Blame:
    """Who has to bear ``error``."""
    if isinstance(error, DeviceFailed | DeviceUnavailable):
        return Blame.DEVICE
    if isinstance(error, CheckpointError):
        return Blame.JOB
    if isinstance(error, EngineError | ModelNotFound | OSError | MemoryError):
        return Blame.MACHINE
    return Blame.UNKNOWN
