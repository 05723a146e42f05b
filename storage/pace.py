"""Long work on the database in short transactions, so that nobody waits for it: how much each takes, and the gaps."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TOO_LONG_S = 0.12
"""Seconds of a transaction after which the next one does half as much."""
SHORT_S = 0.05
"""After a shorter one the next does twice as much: a small one mostly waits for the disk to confirm it."""
WORK_S = 0.3
"""Seconds of transactions one after the other; then comes a gap."""
GAP_S = 0.2
"""Longer than the pause between two tries of a SQLite that waits for a lock (0.1 s at most): all get their turn."""


class Pace:
    """Grows and shrinks the size of a step (rows, pages) with the time that steps take, and rests in between."""

    def __init__(
        self,
        size: int,
        *,
        most: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.size = size  #: of the next step
        self._most = most
        self._clock, self._sleep = clock, sleep
        self._worked_s = 0.0

    @contextmanager
    def step(self) -> Iterator[int]:
        """One transaction: yields its size."""
        started = self._clock()
        yield self.size
        seconds = self._clock() - started
        if seconds > TOO_LONG_S:
            self.size = max(1, self.size // 2)
        elif seconds < SHORT_S:
            self.size = min(self._most, self.size * 2)
        self._worked_s += seconds
        if self._worked_s >= WORK_S:
            self._worked_s = 0.0
            self._sleep(GAP_S)
