"""One registration of this process as a worker: its row, its lease, its drain."""

import os
from pathlib import Path

from storage.claims import Worker, expire, register_worker, stop_worker
from storage.clock import DatabaseClock
from storage.crashes import count_crash
from storage.database import Database
from storage.errors import ClaimLost, DatabaseUnreachable, JobNotFound
from storage.jobs import get_job, sweep_invisible
from worker.aside import DEATHS_SPARED, LOADING, RUNNING, Aside
from worker.bell import Bell
from worker.blackbox import BlackBox, Death, deaths
from worker.drain import Drain
from worker.lease import Lease
from worker.locks import import_lock
from worker.logs import BoundLogger, get_logger
from worker.models import ModelRef
from worker.patience import Patience
from worker.presence import host_name, is_dead, process_of
from worker.residency import Residency
from worker.settings import Settings

_DEAD_ENQUEUE_S = 3600.0
"""Seconds: an enqueue that has added nothing for longer was killed, and what it left is deleted."""
_SWEEP_S = 600.0
_BACKOFFS = (1, 5, 30)
"""Times ``Settings.backoff_s``: how long a model is left alone after the first, the second, and each further fault."""


def serve(
    *,
    database: Database,
    settings: Settings,
    device: str,
    residency: Residency,
    bell: Bell,
    preload: str | None = None,
    is_alone: bool = False,
) -> None:
    """Register, drain until the bell says stop, and sign off; registers anew when taken for dead.

    A machine that slept for longer than its lease loses its claims to others, nothing else: what it computed meanwhile
    is refused, and it begins again under a new number, its model still loaded.

    Raises:
        ModelNotFound, EngineError: ``preload`` cannot be loaded, or the device failed.
        DatabaseUnreachable: nothing can be read or recorded, for longer than patience lasts.
    """
    patience = Patience(settings.patience_s, bell.pause, is_over=lambda: bell.is_stopping)
    while True:
        try:
            _serve_once(database, settings, device, residency, bell, patience, preload, is_alone)
            return
        except ClaimLost as error:
            get_logger().warning("%s", error, extra={"action": "lost"})


def _serve_once(
    database: Database,
    settings: Settings,
    device: str,
    residency: Residency,
    bell: Bell,
    patience: Patience,
    preload: str | None,
    is_alone: bool,
) -> None:
    clock = patience(lambda: DatabaseClock(database))
    worker_id = patience(
        lambda: register_worker(
            database,
            hostname=host_name(),
            pid=os.getpid(),
            process=process_of(os.getpid()),
            queue=settings.queue,
            device=device,
            now=clock(),
            lease_s=settings.lease_s,
        )
    )
    lease = Lease(database=database, worker_id=worker_id, lease_s=settings.lease_s, clock=clock, on_lost=bell.ring)
    waits_s = [settings.backoff_s * times for times in _BACKOFFS]
    aside = Aside(database, host_name(), waits_s=waits_s, clock=clock, patience=patience, is_alone=is_alone)
    box = BlackBox(settings.home, settings.database_url, worker_id, is_alone=is_alone)
    bell.on_stop = box.forgive
    keeper = _Housekeeper(database, settings, clock, aside, bell, get_logger({"worker": worker_id}))

    def reap() -> None:
        # First our own lease: after a night of sleep it may be over, and we are not dead.
        patience(lease.beat)
        patience(keeper.look)

    drain = Drain(
        database=database,
        settings=settings,
        worker_id=worker_id,
        residency=residency,
        prepare=prepare_model,
        reap=reap,
        describe=lambda doing: patience(lambda: lease.beat(doing)),
        is_lost=lambda: lease.is_lost,
        bell=bell,
        clock=clock,
        patience=patience,
        aside=aside,
        box=box,
        is_alone=is_alone,
    )
    lease.start()
    try:
        reap()
        if preload is not None:
            drain.preload(preload)
        drain.run()
    finally:
        lease.stop()
        box.close()
        try:
            stop_worker(database, worker_id, now=clock())
        except DatabaseUnreachable as error:
            get_logger({"worker": worker_id}).warning("cannot sign off: %s", error, extra={"action": "stop"})


class _Housekeeper:
    """Looks after what others left: claims of the dead, the rows they died with, enqueues that were killed."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        clock: DatabaseClock,
        aside: Aside,
        bell: Bell,
        log: BoundLogger,
    ) -> None:
        self._database = database
        self._settings = settings
        self._clock = clock
        self._aside = aside
        self._bell = bell
        self._log = log
        self._sweep_at = 0.0

    def look(self) -> None:
        """Raises DatabaseUnreachable."""
        now = self._clock()
        # Before their claims come back: another worker would take these rows first, and together with others.
        loading: set[str] = set()
        running: set[str] = set()
        for death in deaths(self._settings.home, self._settings.database_url):
            self._learn(death)
            if death.is_alone:
                continue  # its budgets were its run's own
            running |= self._models({key.job_id for key in death.running})
            if death.loading is not None and not death.running:
                loading.add(death.loading)
        # Several deaths that are found at once are one fault: nobody has waited in between.
        for model in sorted(loading):
            self._aside.note_death(model, "the worker died while it loaded the model", LOADING)
        for model in sorted(running):
            message = "workers die while they compute with the model"
            self._aside.note_death(model, message, RUNNING, spared=DEATHS_SPARED)
        if returned := expire(self._database, now=now, is_dead=_is_gone):
            self._log.info("took back %d rows of workers that are gone", returned, extra={"action": "expire"})
        if now >= self._sweep_at:
            self._sweep_at = now + _SWEEP_S
            sweep_invisible(
                self._database, now=now, older_than_s=_DEAD_ENQUEUE_S, is_over=lambda: self._bell.is_stopping
            )

    def _learn(self, death: Death) -> None:
        if not death.running:
            return
        rows = [(key.job_id, key.index, key.attempt) for key in death.running]
        count_crash(self._database, death.worker_id, rows)
        self._log.warning(
            "worker %d died; rows that it had in hand, which will run apart from others: %d",
            death.worker_id,
            len(rows),
            extra={"action": "crash"},
        )

    def _models(self, job_ids: set[int]) -> set[str]:
        found = set()
        for job_id in job_ids:
            try:
                found.add(get_job(self._database, job_id).model)
            except JobNotFound:
                continue
        return found


def prepare_model(ref: ModelRef, model_dir: Path) -> None:
    """Import a Hugging Face folder on its first use.

    Raises:
        CheckpointError, DiskFull: it cannot be imported.
    """
    if ref.is_imported or model_dir.exists():
        return
    from engine.weights.importing import import_checkpoint

    model_dir.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with import_lock(model_dir.parent):
        if not model_dir.exists():  # else another worker was faster
            get_logger().info("importing %s", ref.path, extra={"action": "import", "model": model_dir})
            import_checkpoint(ref.path, model_dir)


def _is_gone(worker: Worker) -> bool:
    return is_dead(worker.hostname, worker.pid, worker.process)
