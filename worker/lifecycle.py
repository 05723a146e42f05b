"""Starting and stopping in order: the drain's thread, its place among Celery's bootsteps, and the signals."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from celery import bootsteps
from celery.worker import state as celery_state

from worker.bell import Bell

_FAILED = 1


class DrainThread(threading.Thread):
    """Runs the drain; whatever ends it also ends Celery's loop."""

    def __init__(self, drain: Callable[[], None]) -> None:
        super().__init__(name="drain")
        self._drain = drain
        self.error: BaseException | None = None
        """What ended the drain, if it was not asked to end."""
        self.on_end: Callable[[], None] = lambda: None

    def run(self) -> None:
        """The thread's body."""
        try:
            self._drain()
        except BaseException as error:  # noqa: BLE001 (kept for the main thread, which reports it)
            self.error = error
        finally:
            self.on_end()


class DrainStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Ties the drain thread to Celery's start and stop."""

    requires = ("celery.worker.components:Pool",)

    def __init__(
        self, parent: Any, drain_thread: DrainThread | None = None, on_signal: "Stop | None" = None, **kwargs: Any
    ) -> None:
        super().__init__(parent, **kwargs)
        assert drain_thread is not None
        assert on_signal is not None
        self._thread = drain_thread
        self._on_signal = on_signal

    def start(self, parent: Any) -> None:
        """Start draining; from now on signals are ours."""

        def end_celery() -> None:
            celery_state.should_stop = _FAILED if self._thread.error is not None else os.EX_OK
            if parent.hub is not None:
                parent.hub.call_soon(lambda: None)  # wakes the loop, so that it sees the flag

        self._thread.on_end = end_celery
        self._on_signal.install()
        self._thread.start()

    def stop(self, parent: Any) -> None:
        """Wait for the drain's last commit."""
        self._on_signal.bell.stop()
        self._thread.join()

    terminate = stop


class Stop:
    """The signal handlers: the first signal sets flags, the second ends the process."""

    def __init__(self, bell: Bell) -> None:
        self.bell = bell
        self.signal: int | None = None
        """The first signal that came."""
        # Asked before Celery installs its own handlers: under nohup, a closed terminal is no reason to stop.
        self._heeds_hangup = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN

    def install(self) -> None:
        """Replace Celery's handlers, which would stop the consumer and leave the drain alone."""
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(name, self._handle)
        signal.signal(signal.SIGHUP, self._handle if self._heeds_hangup else signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        # Celery's loop ends when the drain does: until then the bell's thread pool and remote control stay alive.
        self.bell.stop()
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the terminal may be what has gone
            os.write(sys.stderr.fileno(), b"stopping after this pass; once more to stop at once\n")
