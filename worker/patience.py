"""Waiting out a database that is locked, full or away: a nightly backup should not end a night's work."""

import time
from collections.abc import Callable
from typing import TypeVar

from storage.errors import DatabaseUnreachable
from worker.logs import get_logger

Result = TypeVar("Result")

_FIRST_S, _LONGEST_S = 0.25, 15.0
_SAY_EVERY_S = 60.0


class Patience:
    """Calls that ask the database, repeated with growing pauses while it cannot answer."""

    def __init__(
        self,
        limit_s: float,
        pause: Callable[[float], None] = time.sleep,
        *,
        is_over: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """``limit_s``: how long one call may be repeated; ``is_over``: nobody waits any longer, as when stopping;
        ``say``: told once a minute what is waited for (default: the log)."""
        self._limit_s = limit_s
        self._pause = pause
        self._is_over = is_over
        self._clock = clock
        self._say = say or (lambda text: get_logger().warning("%s", text, extra={"action": "wait"}))

    def __call__(self, act: Callable[[], Result]) -> Result:
        """What ``act`` returns, once it can.

        Raises:
            DatabaseUnreachable: it lasted for longer than the limit, or waiting cannot help (no database, wrong URL).
        """
        began = said = None
        wait_s = _FIRST_S
        while True:
            try:
                return act()
            except DatabaseUnreachable as error:
                now = self._clock()
                began = now if began is None else began
                if not error.may_pass or now - began > self._limit_s or self._is_over():
                    raise
                if said is None or now - said >= _SAY_EVERY_S:
                    said = now
                    self._say(f"waiting for the database: {error}")
                self._pause(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_S)
