"""The heartbeat: a thread that keeps the worker's lease, and stops the drain when it cannot."""

import threading
from collections.abc import Callable

from storage.claims import heartbeat
from storage.database import Database
from storage.errors import ClaimLost, DatabaseUnreachable
from worker.logs import get_logger


class Lease:
    """Beats every fifth of the lease, on its own thread. ``on_lost`` is called, once, when the lease is gone."""

    def __init__(
        self,
        *,
        database: Database,
        worker_id: int,
        lease_s: float,
        clock: Callable[[], float],
        on_lost: Callable[[], None],
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._clock = clock
        self._on_lost = on_lost
        self._until = clock() + lease_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._log = get_logger({"worker": worker_id})
        self.is_lost = False
        """Whether another process may have taken the claims."""

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Beat no more; returns when the thread has ended."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, *, model: str | None = None, state: str | None = None) -> None:
        """Renew the lease now; also says what this worker is doing.

        Raises:
            ClaimLost: it was taken for dead.
            DatabaseUnreachable: it could not be renewed.
        """
        now = self._clock()
        heartbeat(self._database, self._worker_id, now=now, lease_s=self._lease_s, model=model, state=state)
        self._until = now + self._lease_s

    def _run(self) -> None:
        while not self._ended.wait(self._lease_s / 5):
            try:
                self.beat()
            except DatabaseUnreachable as error:
                # A busy or full database may recover; the drain will say so if it does not.
                self._log.warning("heartbeat failed: %s", error, extra={"action": "heartbeat"})
                if self._clock() < self._until:
                    continue
                self._lose()
                return
            except ClaimLost as error:
                self._log.warning("%s", error, extra={"action": "lost"})
                self._lose()
                return

    def _lose(self) -> None:
        self.is_lost = True
        self._on_lost()
