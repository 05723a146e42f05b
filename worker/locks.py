"""Lock files, which the kernel releases when their holder ends: one worker a GPU, one import at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.errors import DeviceBusy


@contextmanager
def device_lock(home: Path, device: str) -> Iterator[bool]:
    """Hold ``device`` (``cuda:0``, ``cpu``) of this machine; yields False where others use it and that is allowed.

    Workers may share the CPU, slowly; two models on one GPU would each believe that its memory is theirs.

    Raises:
        DeviceBusy: another worker holds the GPU.
    """
    folder = home / "locks"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{device.replace(':', '-')}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        is_ours = _lock(descriptor, wait=False)
        if is_ours:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        elif device.startswith("cuda"):
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise DeviceBusy(
                f"another worker (process {holder}) uses {device}; stop it, or give this one another --device"
            )
        yield is_ours
    finally:
        os.close(descriptor)


@contextmanager
def import_lock(models_dir: Path) -> Iterator[None]:
    """Wait for other imports into ``models_dir``, and keep them waiting: the same checkpoint is not imported twice."""
    descriptor = os.open(models_dir / ".import.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # not a POSIX system: nobody checks
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
