"""Whether a process that once registered here is still alive, so that a kill -9 need not be waited out."""

import os
import socket
import sys
from pathlib import Path

_FIRST_PID_NAMESPACE = 0xEFFFFFFC


def host_name() -> str:
    """A name for "the same process ids mean the same processes": the host's, and in a container also its namespace."""
    name = socket.gethostname()
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return name
    return name if namespace == _FIRST_PID_NAMESPACE else f"{name}#{namespace}"


def process_of(pid: int) -> str | None:
    """What tells a process from all others that ever have its number: the boot, and the moment of its start.

    None where the system does not say. Neither changes when somebody sets the clock.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{_stat(pid)[19]}"
    except (OSError, IndexError):
        return None


def is_dead(hostname: str, pid: int, process: str | None) -> bool:
    """Proof that a process is gone. ``process``: as ``process_of`` said of it when it lived.

    False means "cannot tell" as well as "alive": a process of another host, or of another boot of a host of that name,
    is left to its lease.
    """
    if hostname != host_name():
        return False
    here = process_of(os.getpid())
    if process is not None and here is not None and process.partition("/")[0] != here.partition("/")[0]:
        return False
    try:
        os.kill(pid, 0)
        if _stat(pid)[0] in "ZX":  # a zombie has only its exit status left
            return True
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return process is not None and process_of(pid) not in (None, process)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before them may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
