"""Whether a process that once registered here is still alive, so that a kill -9 need not be waited out."""

import os
import socket
import sys
from pathlib import Path

_FIRST_PID_NAMESPACE = 0xEFFFFFFC
_SLACK_S = 5.0


def host_name() -> str:
    """A name for "the same process ids mean the same processes": the host's, and in a container also its namespace."""
    name = socket.gethostname()
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return name
    return name if namespace == _FIRST_PID_NAMESPACE else f"{name}#{namespace}"


def is_dead(hostname: str, pid: int, started_at: float) -> bool:
    """Proof that the process is gone. ``started_at``: when it registered, unix seconds.

    False means "cannot tell" as well as "alive": a process of another host is left to its lease.
    """
    if hostname != host_name():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    except OSError:
        return False
    born_at = _born_at(pid)
    # A younger process than the registration has inherited the number.
    return born_at is not None and born_at > started_at + _SLACK_S


def _born_at(pid: int) -> float | None:
    """When a process started, unix seconds; None where the system does not say. A zombie counts as gone."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    except (OSError, StopIteration):
        return None
    if fields[0] in "ZX":
        return float("inf")
    return float(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
