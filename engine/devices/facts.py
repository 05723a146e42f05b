"""What memory a process may still take on this machine, container limits included."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from engine.units import KIB

_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Free bytes of each tier, and whether device and host are one memory."""

    device_free: int
    host_free: int
    shares_host_memory: bool
    attention_threads: int = 0
    """Threads that attend to segments side by side, each with keys of its own in float32; 0: none does."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability; ``None``: no GPU, or none that is known."""
    gpus: int = 1
    """GPUs that share the host's memory, each with a worker of its own."""


def free_host_memory() -> int:
    """Bytes of main memory this process could take: the least of what the machine and its cgroups leave."""
    free = _meminfo_available()
    for limit, usage in _cgroup_limits():
        free = min(free, max(0, limit - usage))
    return free


def free_disk_space(directory: Path) -> int:
    """Bytes free for this user on the file system of ``directory`` or its nearest existing parent."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    stats = os.statvfs(directory)
    return stats.f_bavail * stats.f_frsize


def _meminfo_available() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * KIB
    # Not Linux: what is installed, since what is free is not told portably.
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, use without reclaimable page cache) of every memory cgroup above this process, v1 and v2."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                root = Path("/sys/fs/cgroup/memory")
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            group = root / path.lstrip("/")
            while group.is_relative_to(root):
                with contextlib.suppress(OSError, ValueError):
                    limit = int((group / names[0]).read_text())
                    if limit < _UNLIMITED:
                        usage = int((group / names[1]).read_text()) - _memory_stat(group, names[2])
                        found.append((limit, usage))
                group = group.parent
    return found


def _memory_stat(group: Path, name: str) -> int:
    for line in (group / "memory.stat").read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
