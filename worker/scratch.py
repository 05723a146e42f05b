"""Temporary folders: what a killed process leaves is removed by the next one.

In each lies a file that its owner keeps locked, and the kernel releases the lock however the owner ends. Only folders
of this user with such a file are ever touched.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "overnight-"
MARKER = ".overnight-owner"


class ScratchFolder:
    """A new folder (0700) with a locked file in it, until `remove`."""

    def __init__(self, kind: str = "", parent: Path | None = None) -> None:
        """``kind`` is for people who look into the folder above; ``parent``: default the system's for such things."""
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}", dir=parent))
        # Under its name only once it is locked: whoever sees it and can lock it knows that its owner is gone.
        unborn = self.path / f"{MARKER}.new"
        self._descriptor = os.open(unborn, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        _lock(self._descriptor)
        unborn.rename(self.path / MARKER)

    def remove(self) -> None:
        """The folder with all that is in it; what cannot be removed is left."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


@contextmanager
def scratch_folder(kind: str = "") -> Iterator[Path]:
    """A `ScratchFolder` for the time of a block."""
    folder = ScratchFolder(kind)
    try:
        yield folder.path
    finally:
        folder.remove()


def sweep(parents: Iterable[Path] | None = None) -> int:
    """Remove the folders in ``parents`` (default: where they are made) whose owners are gone; returns how many."""
    swept = 0
    for parent in parents or {Path(tempfile.gettempdir()), Path("/tmp")}:
        for folder in parent.glob(f"{PREFIX}*"):
            swept += _sweep_one(folder)
    return swept


def _sweep_one(folder: Path) -> bool:
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        descriptor = os.open(folder / MARKER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if os.fstat(descriptor).st_uid != os.geteuid() or not _lock(descriptor):
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock; False: somebody else holds it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: nothing is ever swept
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
