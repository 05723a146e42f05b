"""Host memory that a GPU copies from and to by itself: pages that are there, near it, and stay where they are.

Pages are private and huge where the system has such, since one thread that touches four kilobytes after the other takes
a third of a second and more for each GiB; here several threads ask for whole ranges. Each thread runs on the cores of
the GPU's NUMA node, where the system then puts the pages.
"""

import ctypes
import logging
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import DeviceFailed
from engine.units import MIB, format_bytes

log = logging.getLogger(__name__)

_RANGE = 64 * MIB
"""Bytes that a thread asks for at once."""
_MOST_THREADS = 8
_POPULATE_WRITE = 23
"""``MADV_POPULATE_WRITE``, of Linux 5.14 and later: the pages are there when the call returns."""
_REFUSED = {2, 304, 801}
"""CUDA's errors for pinning that are no fault of the device: no memory left to pin, the system says no, not supported
(``cudaErrorMemoryAllocation``, ``cudaErrorOperatingSystem``, ``cudaErrorNotSupported``)."""

Register = Callable[[int, int], int]
"""Pins an address and a number of bytes; 0 or CUDA's error."""
Unregister = Callable[[int], object]


class _Pages(mmap.mmap):
    """Pages that are unpinned when their last view is gone."""

    unpin: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.unpin is not None:
            with suppress(Exception):  # the interpreter may be ending
                self.unpin()


def pinned_empty(
    num_bytes: int, name: str, cpus: set[int] | None, register: Register, unregister: Unregister
) -> Tensor:
    """Bytes, ``uint8 [num_bytes]``, that begin on a page of 4096.

    Where the system refuses to pin them, they are ordinary memory: copies are slower then, and right.

    Args:
        num_bytes: at least as many are mapped.
        name: the GPU's, for messages.
        cpus: of the GPU's NUMA node; ``None``: nobody knows.
        register: see ``Register``.
        unregister: the other way.

    Raises:
        DeviceFailed: the GPU is lost.
        OSError: the system has no memory.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = _Pages(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a child's first write would move the parent's pages
        with suppress(OSError, AttributeError):
            pages.madvise(getattr(mmap, advice))
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    address = memory.data_ptr()
    populate(address, num_bytes, cpus)
    error = register(address, len(pages))
    if error in _REFUSED:
        log.warning(
            "%s: %s of host memory cannot be pinned (CUDA error %d): copies will be slower; raise the limit of locked "
            "memory, or lower --host-memory",
            name,
            format_bytes(num_bytes),
            error,
        )
    elif error:
        raise DeviceFailed(f"{name}: pinning host memory failed (CUDA error {error}); look at nvidia-smi and at dmesg")
    else:
        pages.unpin = lambda: unregister(address)
    return memory


def populate(address: int, num_bytes: int, cpus: set[int] | None) -> None:
    """Have the system make all pages now, by several threads; what cannot be had so comes when it is touched."""
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def near() -> None:
        if cpus:
            with suppress(OSError):
                os.sched_setaffinity(0, cpus)  # of this thread alone

    def ask(first: int) -> None:
        madvise(address + first, min(_RANGE, num_bytes - first), _POPULATE_WRITE)

    threads = min(_MOST_THREADS, len(cpus or ()) or os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="overnight-pages", initializer=near) as pool:
        list(pool.map(ask, range(0, num_bytes, _RANGE)))


def cpus_near(pci_address: str, root: Path = Path("/sys")) -> set[int] | None:
    """The processors of a PCI device's NUMA node; ``None``: there is one node, or nobody knows."""
    with suppress(OSError, ValueError):
        node = int((root / "bus/pci/devices" / pci_address.lower() / "numa_node").read_text())
        if node >= 0:
            listed = (root / f"devices/system/node/node{node}/cpulist").read_text()
            found = {cpu for part in listed.strip().split(",") for cpu in _range(part)}
            return found & os.sched_getaffinity(0) or None
    return None


def _range(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)
