"""The heartbeat: a thread that keeps the worker's lease for as long as anybody can."""

import threading
from collections.abc import Callable

from storage.claims import Doing, heartbeat
from storage.clock import DatabaseClock
from storage.database import Database
from storage.errors import ClaimLost, DatabaseUnreachable
from worker.logs import get_logger


class Lease:
    """Beats every fifth of the lease, on its own thread. ``on_lost`` is called, once, when the lease is gone.

    It is gone when the database says so, and not before: while the database is locked or away nobody else can take it
    either. Whatever else goes wrong with a beat is told, and the next one tries again.
    """

    def __init__(
        self,
        *,
        database: Database,
        worker_id: int,
        lease_s: float,
        clock: DatabaseClock,
        on_lost: Callable[[], None],
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._clock = clock
        self._on_lost = on_lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._log = get_logger({"worker": worker_id})
        self.is_lost = False
        """Whether another process has taken the claims."""

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Beat no more; returns when the thread has ended."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, doing: Doing | None = None) -> None:
        """Renew the lease now; also says what this worker is doing.

        Raises:
            ClaimLost: it was taken for dead.
            DatabaseUnreachable: it could not be renewed.
        """
        self._clock.sync()
        heartbeat(self._database, self._worker_id, now=self._clock(), lease_s=self._lease_s, doing=doing)

    def _run(self) -> None:
        while not self._ended.wait(self._lease_s / 5):
            try:
                self.beat()
            except ClaimLost as error:
                self._log.warning("%s", error, extra={"action": "lost"})
                self.is_lost = True
                self._on_lost()
                return
            except DatabaseUnreachable as error:
                self._log.warning("heartbeat failed: %s", error, extra={"action": "heartbeat"})
            except Exception as error:  # noqa: BLE001 (a thread that ended unseen would cost the lease)
                self._log.error(
                    "heartbeat failed: %s: %s",
                    type(error).__name__,
                    error,
                    exc_info=error,
                    extra={"action": "heartbeat"},
                )
