"""The stored profiles of the machine at hand, one for each device that was measured: kept, and known again."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import HardwareError
from engine.planner.hardware import Hardware
from engine.planner.profiles import load_hardware, profile_json

Warn = Callable[[str], None]
"""Told, in a sentence for people, what went wrong and does no harm."""


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """What lies in the folder of all state."""

    path: Path
    hardware: Hardware
    measured_at: float
    """Unix seconds."""

    def is_of(self, identity: Mapping[str, str]) -> bool:
        """Whether this is the machine that was measured."""
        return dict(self.hardware.identity) == dict(identity)


def profile_path(home: Path, device: str) -> Path:
    """Where the profile of this machine with a device lies: ``cuda:0`` has another than ``cpu``."""
    return home / f"profile-{device.replace(':', '-')}.json"


def profile_paths(home: Path) -> list[Path]:
    """The profiles of all devices that were measured, the newest first."""
    return sorted(home.glob("profile-*.json"), key=lambda path: -path.stat().st_mtime)


def stored_profile(path: Path) -> StoredProfile | None:
    """The profile in a file; ``None``: nobody has measured yet.

    Raises:
        HardwareError: it is damaged or of another version.
    """
    if not path.exists():
        return None
    return StoredProfile(path, load_hardware(path), path.stat().st_mtime)


def store_profile(home: Path, hardware: Hardware) -> Path:
    """Replace the profile of its device, whole.

    Raises:
        OSError: the folder cannot be written to.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = profile_path(home, hardware.identity.get("device", hardware.device))
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=home)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(profile_json(hardware), file, indent=1)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def known_profile(home: Path, identity: Mapping[str, str], warn: Warn) -> Hardware | None:
    """The stored profile if it is of the machine with this identity, which names the device; ``None``: that was not
    measured."""
    try:
        stored = stored_profile(profile_path(home, identity["device"]))
    except HardwareError as error:
        warn(f"{error}; measure this machine anew: overnight doctor --measure")
        return None
    return stored.hardware if stored is not None and stored.is_of(identity) else None


def keep_profile(home: Path, hardware: Hardware, warn: Warn) -> None:
    """Store a profile for the next time, if that can be done."""
    try:
        store_profile(home, hardware)
    except OSError as error:
        warn(f"the profile of this machine cannot be kept in {home}: {error.strerror or error}")


def age_days(stored: StoredProfile) -> float:
    """Since it was measured."""
    return (time.time() - stored.measured_at) / 86400
