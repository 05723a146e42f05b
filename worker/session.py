"""One registration of this process as a worker: its row, its lease, its drain."""

import os
from collections.abc import Callable
from pathlib import Path

from storage.claims import Worker, expire, register_worker, stop_worker
from storage.database import Database
from storage.errors import ClaimLost, DatabaseUnreachable
from storage.jobs import sweep_invisible
from worker.bell import Bell
from worker.drain import Drain
from worker.lease import Lease
from worker.locks import import_lock
from worker.logs import get_logger
from worker.models import ModelRef
from worker.presence import host_name, is_dead
from worker.residency import Residency
from worker.settings import Settings

_DEAD_ENQUEUE_S = 3600.0
"""An enqueue that has added nothing for so long was killed; what it left is swept when a worker starts."""


def serve(
    *,
    database: Database,
    settings: Settings,
    device: str,
    residency: Residency,
    bell: Bell,
    clock: Callable[[], float],
    preload: str | None = None,
) -> None:
    """Register, drain until the bell says stop, and sign off; registers anew when taken for dead.

    A machine that slept for longer than its lease loses its claims to others, nothing else: what it computed meanwhile
    is refused, and it begins again under a new number, its model still loaded.

    Raises:
        ModelNotFound, EngineError: ``preload`` cannot be loaded, or the device failed.
        DatabaseUnreachable: nothing can be read or recorded.
    """
    while True:
        try:
            _serve_once(database, settings, device, residency, bell, clock, preload)
            return
        except ClaimLost as error:
            get_logger().warning("%s", error, extra={"action": "lost"})


def _serve_once(
    database: Database,
    settings: Settings,
    device: str,
    residency: Residency,
    bell: Bell,
    clock: Callable[[], float],
    preload: str | None,
) -> None:
    worker_id = register_worker(
        database,
        hostname=host_name(),
        pid=os.getpid(),
        queue=settings.queue,
        device=device,
        now=clock(),
        lease_s=settings.lease_s,
    )
    lease = Lease(
        database=database,
        worker_id=worker_id,
        lease_s=settings.lease_s,
        clock=clock,
        on_lost=bell.ring,
    )

    def reap() -> None:
        # First our own lease: after a night of sleep it may be over, and we are not dead.
        lease.beat()
        if returned := expire(database, now=clock(), is_dead=_is_gone):
            get_logger({"worker": worker_id}).info(
                "took back %d rows of workers that are gone", returned, extra={"action": "expire"}
            )

    drain = Drain(
        database=database,
        settings=settings,
        worker_id=worker_id,
        residency=residency,
        prepare=prepare_model,
        reap=reap,
        describe=lambda model, state: lease.beat(model=model, state=state),
        is_lost=lambda: lease.is_lost,
        bell=bell,
        clock=clock,
    )
    sweep_invisible(database, now=clock(), older_than_s=_DEAD_ENQUEUE_S)
    lease.start()
    try:
        if preload is not None:
            drain.preload(preload)
        drain.run()
    finally:
        lease.stop()
        try:
            stop_worker(database, worker_id, now=clock())
        except DatabaseUnreachable as error:
            get_logger({"worker": worker_id}).warning("cannot sign off: %s", error, extra={"action": "stop"})


def prepare_model(ref: ModelRef, model_dir: Path) -> None:
    """Import a Hugging Face folder on its first use.

    Raises:
        CheckpointError, DiskFull: it cannot be imported.
    """
    if ref.is_imported or model_dir.exists():
        return
    from engine.weights.importers.huggingface import import_checkpoint

    model_dir.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with import_lock(model_dir.parent):
        if not model_dir.exists():  # else another worker was faster
            get_logger().info("importing %s", ref.path, extra={"action": "import", "model": model_dir})
            import_checkpoint(ref.path, model_dir)


def _is_gone(worker: Worker) -> bool:
    return is_dead(worker.hostname, worker.pid, worker.started_at)
