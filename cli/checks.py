"""What `overnight doctor` looks at. Each check returns what it found and never raises for what it looks at."""

import os
import platform
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli.context import App, sqlite_path

_LITTLE_DISK = 5 * 10**9
_LITTLE_MEMORY = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    """What was found, and where."""
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


def run_checks(app: App) -> list[Check]:
    """All checks, in the order in which things depend on each other.

    Raises:
        SettingsError: without settings there is nothing to look at.
    """
    return [
        check_python(),
        check_home(app.settings.home),
        check_sqlite(),
        check_database(app),
        check_redis(app.settings.redis_url),
        *check_device(),
        check_memory(),
        check_disk("disk", app.settings.home),
        *check_models(app.settings.models_dir),
        *check_profiles(app.settings.home, app.settings.spill_dir),
    ]


def check_python() -> Check:
    """The interpreter."""
    return Check("python", "ok", f"{platform.python_version()} in {sys.prefix}")


def check_home(home: Path) -> Check:
    """The folder that holds all state, and who may read it."""
    there = next(folder for folder in (home, *home.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        remedy = "choose another by OVERNIGHT_HOME; without it, only status, fetch and wait work"
        return Check("home", "fail", f"{there} cannot be written", remedy)
    if there != home:
        return Check("home", "ok", f"{home} will be made on first use")
    mode = home.stat().st_mode & 0o777
    if mode & 0o077:
        remedy = f"its files may hold private texts: chmod 700 {home}"
        return Check("home", "warn", f"{home} can be read by others (mode {mode:o})", remedy)
    return Check("home", "ok", str(home))


def check_sqlite() -> Check:
    """SQLite's version, and the journal mode that is safe with it."""
    from storage.sqlite import OLDEST_SQLITE, journal_mode_for

    version = sqlite3.sqlite_version_info
    found = f"{sqlite3.sqlite_version}, journal mode {journal_mode_for(version)}"
    if version < OLDEST_SQLITE:
        return Check("sqlite", "fail", found, "use a Python with SQLite 3.35 or newer")
    return Check("sqlite", "ok", found)


def check_database(app: App) -> Check:
    """That the database opens and can be written, if it is there."""
    from storage.errors import DatabaseUnreachable

    path = sqlite_path(app.settings.database_url)
    if path is not None and not path.exists():
        folder = _nearest_folder(path)
        if not os.access(folder, os.W_OK):
            remedy = "change its permissions, or set --database or OVERNIGHT_DATABASE"
            return Check("database", "fail", f"{path} cannot be made: {folder} is not writable", remedy)
        return Check("database", "ok", f"{path} will be made on first use")
    try:
        with app.open_database() as database:
            with database.write():
                pass
            found = f"{database.url}, schema {database.schema_version}"
    except DatabaseUnreachable as error:
        return Check("database", "fail", str(error), "see the sentence before, then run doctor again")
    return Check("database", "ok", found)


def check_redis(redis_url: str) -> Check:
    """Redis; only `enqueue` and `worker` need it, `run` and `demo` start their own."""
    from worker.doorbell import ping
    from worker.errors import RedisRefused, RedisUnavailable, RedisUnreachable
    from worker.private_redis import find_redis_server
    from worker.redis_hint import start_command
    from worker.settings import without_password

    shown = without_password(redis_url)
    try:
        server = f"; `run` and `demo` use {find_redis_server()}"
    except RedisUnavailable as error:
        server = ""
        missing = str(error)
    try:
        ping(redis_url)
    except RedisRefused as error:
        return Check("redis", "warn", str(error), "mend OVERNIGHT_REDIS; `enqueue` and `worker` need it")
    except RedisUnreachable:
        detail = f"nothing answers at {shown}; `enqueue` and `worker` need it{server}"
        command = start_command(redis_url)
        return Check("redis", "warn", detail, f"start one: {command}" if command else "start it there")
    if not server:
        return Check("redis", "warn", f"{shown} answers, but `run` and `demo` cannot start their own", missing)
    return Check("redis", "ok", f"{shown} answers{server}")


def check_device() -> Iterator[Check]:
    """Torch and the GPUs it sees."""
    try:
        import torch
    except ImportError as error:
        yield Check("device", "fail", f"torch cannot be imported: {error}", "install overnight again")
        return
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", and this torch is built without CUDA"
        detail = f"cpu with {torch.get_num_threads()} threads, torch {torch.__version__}; no GPU is visible{built}"
        yield Check("device", "warn", detail, "fine for small models; for a GPU, install its driver and a CUDA torch")
        return
    from engine.units import format_bytes

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Check("device", "ok", f"cuda:{index} {name}, {format_bytes(free)} of {format_bytes(total)} free")


def check_memory() -> Check:
    """How much memory the host tier could take."""
    from engine.devices.facts import free_host_memory
    from engine.units import format_bytes

    free = free_host_memory()
    if free < _LITTLE_MEMORY:
        return Check("memory", "warn", f"{format_bytes(free)} free", "end other programs; only small models will fit")
    return Check("memory", "ok", f"{format_bytes(free)} free")


def check_disk(name: str, folder: Path) -> Check:
    """Room for models, spill files and the database."""
    from engine.units import format_bytes

    place = _nearest_folder(folder)
    free = shutil.disk_usage(place).free
    if free < _LITTLE_DISK:
        remedy = "free some, or put OVERNIGHT_HOME on a larger disk"
        return Check(name, "warn", f"{format_bytes(free)} free for {folder}", remedy)
    return Check(name, "ok", f"{format_bytes(free)} free for {folder}")


def check_models(folder: Path) -> Iterator[Check]:
    """That what lies in the model folder is whole."""
    from cli.models import scan

    models, faults = scan(folder)
    for fault in faults:
        yield Check("models", "fail", fault, "do that, remove it, or import it again under another name")
    names = ", ".join(model["name"] for model in models)
    remedy = "" if models or faults else "begin with: overnight demo, or: overnight import FOLDER"
    yield Check("models", "ok", f"{names or 'none yet'} in {folder}", remedy)


def check_profiles(home: Path, spill_dir: Path) -> Iterator[Check]:
    """Whether the planner knows this machine, with each device that was measured."""
    from engine.profile import profile_paths

    paths = profile_paths(home)
    if not paths:
        detail = "not measured yet; a worker that must stream weights does it first"
        yield Check("profile", "ok", detail, "overnight doctor --measure")
    for path in paths:
        yield _check_profile(path, spill_dir)


def _check_profile(path: Path, spill_dir: Path) -> Check:
    from engine.errors import EngineError
    from engine.profile import age_days, stored_profile

    again = "overnight doctor --measure"
    try:
        stored = stored_profile(path)
        if stored is None:
            return Check("profile", "ok", "not measured yet", again)
        from engine.devices.open import open_device
        from engine.measure import identity_of

        device_name = stored.hardware.identity.get("device")
        again += f" --device {device_name}" if device_name else ""
        device = open_device(device_name)
        try:
            is_of_this = stored.is_of(identity_of(device, spill_dir))
        finally:
            device.close()
    except (EngineError, RuntimeError) as error:
        return Check("profile", "warn", str(error), again)
    found = f"{stored.hardware.description}, {age_days(stored):.0f} days ago"
    if not is_of_this:
        return Check("profile", "warn", f"{found}: of another machine, or this one has changed", again)
    return Check("profile", "ok", found)


def _nearest_folder(path: Path) -> Path:
    """The closest folder above that exists."""
    return next(parent for parent in (path, *path.parents) if parent.is_dir())
