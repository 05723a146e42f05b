"""Starting and stopping in order: the drain's thread, and the signals."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from worker.bell import Bell


class DrainThread(threading.Thread):
    """Runs the drain, and keeps what ended it."""

    def __init__(self, drain: Callable[[], None]) -> None:
        super().__init__(name="drain")
        self._drain = drain
        self.error: BaseException | None = None
        """What ended the drain, if it was not asked to end."""

    def run(self) -> None:
        """The thread's body."""
        try:
            self._drain()
        except BaseException as error:  # noqa: BLE001 (kept for the main thread, which reports it)
            self.error = error

    def wait(self) -> None:
        """Return when the drain has ended; signals are handled meanwhile."""
        while self.is_alive():
            self.join(timeout=0.5)


class Stop:
    """The signal handlers: the first signal sets flags, the second ends the process."""

    def __init__(self, bell: Bell) -> None:
        self.bell = bell
        self.signal: int | None = None
        """The first signal that came."""
        # Under nohup, a closed terminal is no reason to stop.
        self._heeds_hangup = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN

    def install(self) -> None:
        """From now on signals are ours. Call it on the main thread."""
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(name, self._handle)
        signal.signal(signal.SIGHUP, self._handle if self._heeds_hangup else signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        self.bell.stop()
        with contextlib.suppress(Exception):
            self.bell.on_stop()
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the terminal may be what has gone
            os.write(sys.stderr.fileno(), b"stopping after this pass; once more to stop at once\n")
