"""The bell inside the process: what Celery's handler and the signals pull, and the drain hears."""

import threading
from collections.abc import Callable


class Bell:
    """Wakes the drain, and tells it to stop. Any thread, and a signal handler, may ring it."""

    def __init__(self) -> None:
        self._rung = threading.Event()
        self._stop = threading.Event()
        self.on_stop: Callable[[], None] = lambda: None
        """Called when a person asks for the end, from a signal handler: must be quick."""

    @property
    def is_stopping(self) -> bool:
        """Whether the drain was asked to stop."""
        return self._stop.is_set()

    def ring(self) -> None:
        """Something may have changed in the database."""
        self._rung.set()

    def stop(self) -> None:
        """Finish the current pass, commit, give back the rest."""
        self._stop.set()
        self._rung.set()

    def answer(self) -> None:
        """What rang until now is about to be looked at."""
        self._rung.clear()

    def pause(self, timeout_s: float) -> None:
        """Return after ``timeout_s`` seconds, or when it is time to stop."""
        self._stop.wait(timeout_s)

    def wait(self, timeout_s: float) -> None:
        """Return when it rings, at once if it has rung since ``answer``, or after ``timeout_s`` seconds."""
        if not self._stop.is_set():
            self._rung.wait(timeout_s)
