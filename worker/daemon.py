"""One process, one device: a Celery worker for the doorbell, one drain thread for the work.

The order of stopping, and why: a signal only sets flags; the drain finishes its pass, records it and gives back what
it holds while Celery still answers; then Celery's loop ends, the drain thread is joined, and the database is closed
last. A second signal ends the process at once: the lease, or the next worker on this host, returns the claims.
"""

import importlib
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.exceptions import SecurityWarning

from engine.errors import DeviceUnavailable
from engine.openmp import limit_spinning
from engine.planner.decide import Outlook
from engine.planner.hardware import Hardware
from engine.planner.plan import PlanOptions
from engine.trace import TraceFile
from storage.database import Database
from worker.app import make_app
from worker.bell import Bell
from worker.doorbell import ping
from worker.errors import SettingsError, TraceNotWritten
from worker.lifecycle import DrainStep, DrainThread, Stop
from worker.locks import device_lock
from worker.logs import configure, get_logger
from worker.models import resolve_model
from worker.residency import Engine, Residency, Sample
from worker.session import serve
from worker.settings import Settings

_FAILED = 1
_PATIENCE_S = 60.0
"""How long a worker waits for a locked database: a nightly backup should not end a night's work."""
_KNOWN_ROOMS = ("engine.errors", "storage.errors", "worker.errors")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What a person asked of one worker."""

    queue: str | None = None
    """Default: the settings' queue."""
    model: str | None = None
    """Loaded before any job asks for it."""
    placement: PlanOptions = field(default_factory=PlanOptions)
    trace: Path | None = None
    """Where to write what lanes and passes did."""


def run_worker(settings: Settings, options: WorkerOptions) -> int:
    """Work until told to stop; returns the exit code: 0, or 130 after Ctrl-C, or 1 after a fault of ours.

    Call it on the main thread: it takes over the signals.

    Raises:
        RedisUnreachable, DatabaseUnreachable, ModelNotFound, DeviceUnavailable, SettingsError, TraceNotWritten: before
            anything starts.
        EngineError, DatabaseUnreachable: the drain ended on its own; nothing is lost.
    """
    configure(settings.log_level)
    limit_spinning()
    os.umask(0o077)
    if options.queue is not None:
        settings = replace(settings, queue=options.queue)
    ping(settings.redis_url)
    if options.model is not None:
        resolve_model(options.model, settings)
    with Database.open(settings.database_url, busy_timeout_s=_PATIENCE_S) as database:
        device = _open_device_name(options.placement)
        _make_spill_dir(_disk_dir(settings, options.placement))
        with device_lock(settings.home, device) as is_alone:
            if not is_alone:
                get_logger().warning("another worker uses %s too: both will be slower", device)
            with _trace(options.trace) as recorder:
                return _work(database, settings, options, device, recorder)


@contextmanager
def _trace(path: Path | None) -> Iterator[TraceFile | None]:
    if path is None:
        yield None
        return

    def broken(error: OSError) -> None:
        get_logger().warning("the trace ends early: %s: %s", path, error.strerror or error)

    try:
        trace = TraceFile(path, broken)
    except OSError as error:
        raise TraceNotWritten(f"the trace {path} cannot be written: {error.strerror or error}") from error
    try:
        yield trace
    finally:
        trace.close()


def _work(
    database: Database, settings: Settings, options: WorkerOptions, device: str, recorder: TraceFile | None
) -> int:
    bell = Bell()
    residency = Residency(_loader(settings, options.placement, device, recorder, bell), time.time)

    def drain() -> None:
        importlib.import_module("engine.engine")  # torch takes seconds: now, not when the first job waits for it
        try:
            serve(
                database=database,
                settings=settings,
                device=device,
                residency=residency,
                bell=bell,
                clock=time.time,
                preload=options.model,
            )
        finally:
            residency.unload()

    thread = DrainThread(drain)
    stopped_by = Stop(bell)
    app = make_app(settings, on_ring=lambda _: bell.ring())
    app.steps["worker"].add(DrainStep)
    signals.setup_logging.connect(_leave_logging_alone)
    with warnings.catch_warnings():
        # Celery warns root because of pickle, which this worker does not accept.
        warnings.simplefilter("ignore", SecurityWarning)
        worker = _celery_worker(app, thread, stopped_by)
    worker.start()
    # Celery may have ended without stopping its steps (it never came up): the drain must not outlive it.
    bell.stop()
    if thread.ident is not None:
        thread.join()
    return exit_code(thread.error, worker.exitcode, stopped_by.signal)


def _celery_worker(app: Celery, thread: DrainThread, on_signal: Stop) -> Any:
    return app.Worker(
        hostname=f"overnight-{os.getpid()}@{socket.gethostname()}",
        pool_cls="threads",
        concurrency=1,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        drain_thread=thread,
        on_signal=on_signal,
    )


def exit_code(error: BaseException | None, celery_code: int | None, stopped_by: int | None) -> int:
    """What the process ends with: after the drain's error, Celery's own code, and the first signal.

    Raises:
        Exception: ``error``, where it is one that a person can mend.
    """
    if error is not None:
        if type(error).__module__ in _KNOWN_ROOMS:
            raise error
        get_logger().error(
            "the worker stopped: %s: %s; what it held goes to the next worker (OVERNIGHT_LOG_LEVEL=debug shows where)",
            type(error).__name__,
            error,
            exc_info=error,
            extra={"action": "stop"},
        )
        return _FAILED
    if stopped_by == signal.SIGINT:
        return 128 + signal.SIGINT
    return celery_code or 0


def _loader(
    settings: Settings, placement: PlanOptions, device: str, recorder: TraceFile | None, bell: Bell
) -> Callable[[Path, Sample], Engine]:
    def load(model_dir: Path, sample: Sample) -> Engine:
        from engine.engine import Engine as RealEngine

        disk_dir = _disk_dir(settings, placement)
        _make_spill_dir(disk_dir)
        workload = sample()
        options = replace(placement, device=device, disk_dir=disk_dir)
        outlook = None if workload is None else Outlook(workload, lambda: _profile(settings, device, options, bell))
        return RealEngine.load(model_dir, options, recorder=recorder, outlook=outlook)

    return load


def _profile(settings: Settings, device_name: str, options: PlanOptions, bell: Bell) -> Hardware:
    """What this machine can do; measured where nobody has done so yet, within the budgets of ``options``.

    Raises:
        Interrupted: the worker was told to stop while it measured.
        Unmeasurable: the budgets are too small to measure with.
    """
    from engine.devices.open import open_device
    from engine.measure import identity_of, measure
    from engine.profile import profile_for

    log = get_logger()
    disk_dir = _disk_dir(settings, options)
    device = open_device(device_name)
    try:

        def measured() -> Hardware:
            log.info("measuring this machine, once: it takes up to a minute", extra={"action": "measure"})
            return measure(
                device,
                disk_dir,
                options=options,
                stop=lambda: bell.is_stopping,
                say=lambda what: log.debug("measuring %s", what),
            )

        return profile_for(settings.home, identity_of(device, disk_dir), measured, lambda text: log.warning("%s", text))
    finally:
        device.close()


def _open_device_name(placement: PlanOptions) -> str:
    """The device's full name. A GPU is opened once: one that is not there is said now, not by the first job."""
    if placement.device is not None and not placement.device.startswith("cuda"):
        return placement.device
    from engine.devices.open import open_device

    try:
        device = open_device(placement.device)
    except RuntimeError as error:
        raise DeviceUnavailable(
            f"{placement.device or 'the GPU'} cannot be opened: {str(error).splitlines()[0]}; look at nvidia-smi, or "
            "use --device cpu"
        ) from error
    try:
        return device.name
    finally:
        device.close()


def _disk_dir(settings: Settings, placement: PlanOptions) -> Path:
    return placement.disk_dir or settings.spill_dir


def _make_spill_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"the folder for spill files {path} cannot be made: {error.strerror or error}; name another with "
            "--disk-dir or OVERNIGHT_SPILL"
        ) from error


def _leave_logging_alone(**_: object) -> None:
    """Connected to Celery's ``setup_logging``, whose mere receiver keeps it from configuring anything."""
