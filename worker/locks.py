"""One worker a GPU: a lock file that the kernel releases when its holder ends, however it ends."""

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
        is_ours = _try_lock(descriptor)
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


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # not a POSIX system: nobody checks
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
