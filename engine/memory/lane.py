"""A lane: a FIFO of asynchronous work on one resource, whose failure reaches whoever waits."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from engine.errors import EngineError, LaneFailed


class LaneName(StrEnum):
    """The resources that work at the same time."""

    DISK_READ = "disk_read"
    DISK_WRITE = "disk_write"
    HOST_TO_DEVICE = "host_to_device"
    DEVICE_TO_HOST = "device_to_host"
    DEVICE_COMPUTE = "device_compute"
    HOST_COMPUTE = "host_compute"


@dataclass(slots=True)
class Traffic:
    """Bytes moved and seconds busy, by lane, since the last ``take``; safe to add to from any lane."""

    num_bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    weight_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, lane: LaneName, num_bytes: int, seconds: float, *, weights: bool = False) -> None:
        """Count one transfer."""
        with self._lock:
            self.num_bytes[lane] = self.num_bytes.get(lane, 0) + num_bytes
            self.seconds[lane] = self.seconds.get(lane, 0.0) + seconds
            if weights:
                self.weight_bytes += num_bytes

    def take(self) -> "Traffic":
        """What was counted so far; counting starts anew."""
        with self._lock:
            taken = Traffic(self.num_bytes, self.seconds, self.weight_bytes)
            self.num_bytes, self.seconds, self.weight_bytes = {}, {}, 0
        return taken


class Event(Protocol):
    """A point in a lane's work."""

    def wait(self) -> None:
        """Block the calling thread until the point is reached; raise what the work raised."""


class Reached:
    """An event that has happened."""

    def wait(self) -> None:
        """Return at once."""


class LaneEvent:
    """The end of one piece of work on a ``ThreadLane``."""

    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def wait(self) -> None:
        """Block until done.

        Raises:
            LaneFailed: the work failed; an ``EngineError`` of the work itself is raised as it is.
        """
        try:
            self._future.result()
        except EngineError:
            raise
        except Exception as error:
            raise LaneFailed(f"{type(error).__name__}: {error}") from error


class ThreadLane:
    """A lane run by one thread of its own."""

    def __init__(self, name: LaneName) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"overnight-{name}")

    def submit(self, work: Callable[[], None]) -> LaneEvent:
        """Queue ``work``; it starts when all that was queued before has ended."""
        return LaneEvent(self._executor.submit(work))

    def close(self) -> None:
        """Drop what has not started and wait for what has."""
        self._executor.shutdown(wait=True, cancel_futures=True)
