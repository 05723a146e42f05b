"""Celery's thread: it hears the doorbell, and is set up anew whenever something ends it.

The drain never waits for it.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.worker import state as celery_state

from worker.bell import Bell
from worker.doorbell import empty
from worker.errors import RedisUnreachable
from worker.logs import get_logger
from worker.settings import Settings

_FIRST_S, _LONGEST_S = 0.5, 30.0
_LONG_ENOUGH_S = 60.0
"""Seconds: a Celery that lived for longer did not end because of what it found at its start."""


class Ringing(threading.Thread):
    """Runs Celery's worker until it is closed. A daemon thread: the process may end while Celery waits for Redis."""

    def __init__(self, make_app: Callable[[], Celery], settings: Settings, bell: Bell) -> None:
        super().__init__(name="celery", daemon=True)
        self._make_app = make_app
        self._settings = settings
        self._bell = bell
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._worker: Any = None

    def run(self) -> None:
        """The thread's body."""
        wait_s = _FIRST_S
        while not self._closed.is_set():
            began = time.monotonic()
            why = self._hear()
            if self._closed.is_set():
                return
            get_logger().warning(
                "the doorbell fell silent (%s); the worker goes on looking by itself, and sets the bell up again",
                why,
                extra={"action": "bell"},
            )
            # Whatever ended Celery may still lie there, and all that lies there are hints.
            try:
                empty(self._settings)
            except RedisUnreachable as error:
                get_logger().debug("%s", error)
            self._bell.ring()
            wait_s = _FIRST_S if time.monotonic() - began > _LONG_ENOUGH_S else wait_s
            self._closed.wait(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_S)

    def close(self) -> None:
        """End Celery, and wait a moment for it: it may be stuck in a connection, which is no reason to stay."""
        with self._lock:
            self._closed.set()
            celery_state.should_stop = os.EX_OK
            hub = getattr(self._worker, "hub", None)
        if hub is not None:
            hub.call_soon(lambda: None)  # wakes the loop, so that it sees the flag
        if self.is_alive():
            self.join(timeout=5.0)

    def _hear(self) -> str:
        """Celery's worker from its start to its end; returns why it ended."""
        with self._lock:
            if self._closed.is_set():
                return "closed"
            celery_state.should_stop = celery_state.should_terminate = None
        try:
            worker = self._make_app().Worker(
                hostname=f"overnight-{os.getpid()}@{socket.gethostname()}",
                pool_cls="threads",
                concurrency=1,
                quiet=True,
                without_gossip=True,
                without_mingle=True,
            )
            with self._lock:
                self._worker = worker
            worker.start()
        except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever it is, the drain goes on)
            return f"{type(error).__name__}: {error}"
        return f"Celery ended with code {worker.exitcode}"
