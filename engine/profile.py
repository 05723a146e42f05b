"""The stored profile of the machine at hand: kept, checked, and measured where there is none."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import HardwareError
from engine.planner.hardware import Hardware
from engine.planner.profiles import PROFILE_NAME, load_hardware, profile_json

Measure = Callable[[], Hardware]


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """What lies in the folder of all state."""

    path: Path
    hardware: Hardware
    measured_at: float
    """Unix seconds."""

    def is_of(self, identity: dict[str, str]) -> bool:
        """Whether this is the machine that was measured."""
        return dict(self.hardware.identity) == identity


def stored_profile(home: Path) -> StoredProfile | None:
    """The profile in ``home``; ``None``: nobody has measured yet.

    Raises:
        HardwareError: it is damaged or of another version.
    """
    path = home / PROFILE_NAME
    if not path.exists():
        return None
    return StoredProfile(path, load_hardware(path), path.stat().st_mtime)


def store_profile(home: Path, hardware: Hardware) -> Path:
    """Replace the profile, whole.

    Raises:
        OSError: the folder cannot be written to.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = home / PROFILE_NAME
    handle, partial = tempfile.mkstemp(prefix=f".{PROFILE_NAME}.", dir=home)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(profile_json(hardware), file, indent=1)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def profile_for(home: Path, identity: dict[str, str], measure: Measure, warn: Callable[[str], None]) -> Hardware:
    """The stored profile if it is of this machine, else a new one, stored for the next time if that can be done.

    Raises:
        EngineError, OSError: measuring failed.
    """
    try:
        stored = stored_profile(home)
    except HardwareError as error:
        warn(f"{error}; measuring anew")
        stored = None
    if stored is not None and stored.is_of(identity):
        return stored.hardware
    hardware = measure()
    try:
        store_profile(home, hardware)
    except OSError as error:
        warn(f"the profile of this machine cannot be kept in {home}: {error.strerror or error}")
    return hardware


def age_days(stored: StoredProfile) -> float:
    """Since it was measured."""
    return (time.time() - stored.measured_at) / 86400
