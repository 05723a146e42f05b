"""Processes that take turns on the machine, a slice of time each.

Neighbours on a shared machine take half of a core's speed away for seconds or for minutes. Runs one after another then
measure the neighbours; runs in slices all have the same to bear. A process that is stopped does not know it: what its
own clock says is told here in seconds in which it ran.
"""

import contextlib
import os
import signal
import subprocess
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

SLICE_S = 1.0
"""Long beside what it costs to fill the caches again, short beside what neighbours do."""


@dataclass(frozen=True, slots=True)
class Slices:
    """When one process ran, by ``perf_counter``, which on Linux is one clock for all processes."""

    spans: list[tuple[float, float]] = field(default_factory=list)

    def seconds(self, begin: float, end: float) -> float:
        """For how long of the time between it ran."""
        return sum(max(0.0, min(end, stop) - max(begin, start)) for start, stop in self.spans)

    def hold(self, begin: float, end: float) -> bool:
        """Whether it ran without a stop from one to the other."""
        return any(start <= begin and end <= stop for start, stop in self.spans)


def take_turns(
    processes: "Sequence[subprocess.Popen[bytes]]", *, timeout_s: float, slice_s: float = SLICE_S
) -> Iterator[tuple[int, Slices]]:
    """Let each run for a slice, then the next, until all have ended: the number of each that ends, and when it ran.

    Each must lead a session of its own, so that all of it stops. What still runs after ``timeout_s`` is killed; so is
    everything if the iteration is given up.
    """
    ends = perf_counter() + timeout_s
    slices = [Slices() for _ in processes]
    try:
        for process in processes:
            _send(process, signal.SIGSTOP)
        turns = deque(range(len(processes)))
        while turns:
            number = turns.popleft()
            process = processes[number]
            start = perf_counter()
            _send(process, signal.SIGCONT if start < ends else signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(slice_s)
            if process.returncode is None:
                _send(process, signal.SIGSTOP)
                turns.append(number)
            slices[number].spans.append((start, perf_counter()))
            if process.returncode is not None:
                yield number, slices[number]
    finally:
        for process in processes:
            if process.returncode is None:
                _send(process, signal.SIGKILL)
                process.wait()


def _send(process: "subprocess.Popen[bytes]", what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, what)
