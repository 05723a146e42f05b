"""One process, one device: a Celery worker for the doorbell, one drain thread for the work.

The order of stopping, and why: a signal only sets flags; the drain finishes its pass, records it and gives back what
it holds while Celery still answers; then Celery's loop ends, and the database is closed last. A second signal ends the
process at once: the lease, or the next worker on this host, returns the claims.
"""

import importlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from celery import Celery, signals
from celery.exceptions import SecurityWarning

from engine.errors import DeviceUnavailable
from engine.planner.plan import PlanOptions
from engine.process import tune
from engine.trace import TraceFile
from storage.database import Database
from worker.app import make_app
from worker.bell import Bell
from worker.doorbell import ping
from worker.errors import RedisRefused, RedisUnreachable, TraceNotWritten
from worker.exactness import why_not_exact
from worker.lifecycle import DrainThread, Stop
from worker.locks import device_lock
from worker.logs import configure, get_logger
from worker.models import resolve_model
from worker.patience import Patience
from worker.residency import Loaded, Residency, Sample, Tell
from worker.ringing import Ringing
from worker.session import serve
from worker.settings import Settings
from worker.spill import make_spill_folder, spill_folder
from worker.strangers import Strays

if TYPE_CHECKING:
    from engine.memory.device import Device
    from engine.planner.hardware import Hardware

_FAILED = 1
_BUSY_S = 10.0
"""How long one statement waits for another process's lock; what lasts longer is a matter of ``worker.patience``."""
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
    is_alone: bool = False
    """No other worker will ever serve the queue: what cannot be done here fails the job instead of waiting."""


def run_worker(settings: Settings, options: WorkerOptions) -> int:
    """Work until told to stop; returns the exit code: 0, or 130 after Ctrl-C, or 1 after a fault of ours.

    Call it on the main thread: it takes over the signals.

    Raises:
        RedisRefused, DatabaseUnreachable, ModelNotFound, DeviceUnavailable, SettingsError, TraceNotWritten: before
            anything starts. Redis or a database that may come back is waited for.
        EngineError, DatabaseUnreachable: the drain ended on its own; nothing is lost.
    """
    configure(settings.log_level)
    tune()
    os.umask(0o077)
    if options.queue is not None:
        settings = replace(settings, queue=options.queue)
    try:
        ping(settings.redis_url)
    except RedisRefused:
        raise
    except RedisUnreachable as error:
        get_logger().warning("%s; until then this worker looks for jobs by itself", error, extra={"action": "bell"})
    if options.model is not None:
        resolve_model(options.model, settings)
    patience = Patience(settings.patience_s)
    with patience(lambda: Database.open(settings.database_url, busy_timeout_s=_BUSY_S)) as database:
        device = _open_device_name(options.placement)
        make_spill_folder(spill_folder(settings, options.placement))
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
    residency = Residency(
        _loader(settings, options.placement, device, recorder, bell),
        time.time,
        cache(lambda model_dir: why_not_exact(model_dir, options.placement)),
    )

    def drain() -> None:
        importlib.import_module("engine.engine")  # torch takes seconds: now, not when the first job waits for it
        try:
            serve(
                database=database,
                settings=settings,
                device=device,
                residency=residency,
                bell=bell,
                preload=options.model,
                is_alone=options.is_alone,
            )
        finally:
            residency.unload()

    strays = Strays(lambda text: get_logger().warning("%s", text, extra={"action": "stray"}), time.monotonic)

    def app() -> Celery:
        return make_app(settings, on_ring=lambda _: bell.ring(), on_stray=strays)

    stop = Stop(bell)
    stop.install()
    signals.setup_logging.connect(_leave_logging_alone)
    # Celery warns root because of pickle, which this worker does not accept.
    warnings.simplefilter("ignore", SecurityWarning)
    ringing = Ringing(app, settings, bell)
    thread = DrainThread(drain)
    thread.start()
    ringing.start()
    thread.wait()
    ringing.close()
    return exit_code(thread.error, stop.signal)


def exit_code(error: BaseException | None, stopped_by: int | None) -> int:
    """What the process ends with: after the drain's error, and the first signal. 0 is an orderly stop and nothing else.

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
    return 0 if stopped_by is not None else _FAILED


def _loader(
    settings: Settings, placement: PlanOptions, device_name: str, recorder: TraceFile | None, bell: Bell
) -> Callable[[Path, Sample, Tell], Loaded]:
    warn = cache(get_logger().warning)  # a profile that is damaged is said so once

    def load(model_dir: Path, sample: Sample, tell: Tell) -> Loaded:
        from engine.devices.open import open_device
        from engine.engine import Engine
        from engine.loading import plan_input
        from engine.planner.decide import decide
        from engine.planner.replan import Replanning

        disk_dir = spill_folder(settings, placement)
        make_spill_folder(disk_dir)
        workload = sample()
        options = replace(placement, device=device_name, disk_dir=disk_dir)
        device = open_device(device_name)
        try:
            given = plan_input(model_dir, options, device, workload)
            known = _known_hardware(settings.home, device, disk_dir, warn)
            decision = decide(given, known, lambda: _measured(settings.home, options, disk_dir, bell, tell))
        except BaseException:
            device.close()
            raise
        engine = Engine.load(model_dir, decision.plan, device=device, recorder=recorder, expects=decision.expects)
        hardware = decision.hardware or known
        return Loaded(engine, Replanning(given, decision.plan, hardware).seconds_saved if hardware else None)

    return load


def _known_hardware(home: Path, device: "Device", disk_dir: Path, warn: Callable[[str], None]) -> "Hardware | None":
    """What this machine can do, if somebody has measured it."""
    from engine.measure.identity import identity_of
    from engine.profile import known_profile

    return known_profile(home, identity_of(device, disk_dir), warn)


def _measured(home: Path, options: PlanOptions, disk_dir: Path, bell: Bell, tell: Tell) -> "Hardware":
    """What this machine can do, measured now within the budgets of ``options``, and kept.

    Raises:
        Interrupted: the worker was told to stop while it measured.
        Unmeasurable: the budgets are too small to measure with.
    """
    from engine.devices.open import open_device
    from engine.measure import measure
    from engine.profile import keep_profile

    log = get_logger()
    tell("measuring")
    log.info("measuring this machine, once: it takes a minute or two", extra={"action": "measure"})
    device = open_device(options.device)  # one of its own: closing it gives back what PyTorch keeps for it
    try:
        hardware = measure(
            device,
            disk_dir,
            options=options,
            stop=lambda: bell.is_stopping,
            say=lambda what: log.debug("measuring %s", what),
        )
    finally:
        device.close()
    keep_profile(home, hardware, log.warning)
    return hardware


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


def _leave_logging_alone(**_: object) -> None:
    """Connected to Celery's ``setup_logging``, whose mere receiver keeps it from configuring anything."""
