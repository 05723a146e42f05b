"""A lane: a FIFO of asynchronous work on one resource, whose failure reaches whoever waits."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import StrEnum
from time import perf_counter
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


class Event(Protocol):
    """A point in a lane's work."""

    def wait(self) -> None:
        """Block the calling thread until the point is reached; raise what the work raised."""

    def span(self) -> tuple[float, float] | None:
        """When the work before the point began and ended, on ``perf_counter``'s clock; ``None`` until it has ended.

        Where the point ends no piece of work in particular, it begins there, too.
        """


class Reached:
    """An event that has happened: now."""

    def __init__(self) -> None:
        self._at = perf_counter()

    def wait(self) -> None:
        """Return at once."""

    def span(self) -> tuple[float, float] | None:
        """A point in time."""
        return self._at, self._at


REACHED = Reached()


class LaneEvent:
    """The end of one piece of work on a ``ThreadLane``."""

    def __init__(self, future: "Future[tuple[float, float]]") -> None:
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

    def span(self) -> tuple[float, float] | None:
        """When the lane was at it; ``None`` too for work that failed, which moved nothing that counts."""
        over = self._future.done() and not self._future.cancelled() and self._future.exception() is None
        return self._future.result() if over else None


class ThreadLane:
    """A lane run by one thread of its own."""

    def __init__(self, name: LaneName) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"overnight-{name}")

    def submit(self, work: Callable[[], None]) -> LaneEvent:
        """Queue ``work``; it starts when all that was queued before has ended."""
        return LaneEvent(self._executor.submit(_timed, work))

    def close(self) -> None:
        """Drop what has not started and wait for what has."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    start = perf_counter()
    work()
    return start, perf_counter()
