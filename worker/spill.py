"""The folder in which a worker's spill files lie."""

from pathlib import Path

from engine.planner.plan import PlanOptions
from worker.errors import SettingsError
from worker.settings import Settings


def spill_folder(settings: Settings, placement: PlanOptions) -> Path:
    """As asked for, else that of the settings."""
    return placement.disk_dir or settings.spill_dir


def make_spill_folder(path: Path) -> None:
    """Raise ``SettingsError`` where it cannot be made."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"the folder for spill files {path} cannot be made: {error.strerror or error}; name another with "
            "--disk-dir or OVERNIGHT_SPILL"
        ) from error
