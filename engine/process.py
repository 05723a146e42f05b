"""Settings of the whole process that make computing on the CPU faster. Imports no torch: it must run before it.

Libraries below PyTorch read these settings, each for the whole process, so that no device or engine may change them:
what computes is one program's part. The program's entry point calls ``tune`` once.
"""

import contextlib
import ctypes
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from engine.units import GIB, MIB

LARGEST_KEPT = 32 * MIB
"""Bytes of the largest allocation that the C library can keep; larger ones always get a mapping of their own."""
_MOST_KEPT = GIB
"""Bytes of freed memory that the C library keeps."""
_SPIN_COUNT = "10000"
"""Rounds that an idle thread waits actively, some tens of microseconds: enough to be there for the next product of a
layer, too little to take a core from the threads that attend to segments between the products."""
_ALLOCATOR_SETTINGS = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
_KERNELS_KEPT = "64"
"""Compiled kernels: those that a few passes need."""

# malloc.h of the GNU C library.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def tune(environ: MutableMapping[str, str] = os.environ, cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Change this process's settings, each only where the user has not chosen it; call it before torch is imported.

    - OpenMP (``GOMP_SPINCOUNT``, ``OMP_WAIT_POLICY``): GNU's idle threads spin for milliseconds by default and hold a
      core that others need. Decode passes of 16 sequences took 107 ms with that and 61 ms with less, on two cores. It
      is read when torch is imported; after that this part changes nothing.
    - oneDNN (``ONEDNN_PRIMITIVE_CACHE_CAPACITY``), where the processor has AMX: kernels for it take 0.7 MB each, and by
      default a thousand are kept. Other kernels take so little that keeping all is right. Read at the first product.
    - PyTorch's allocator on GPUs (``PYTORCH_CUDA_ALLOC_CONF``): blocks that grow, since each pass asks for other sizes,
      and blocks of fixed sizes would leave gaps until a budget is used up by them. Read at the first allocation.
    - The C library (``MALLOC_*``, ``GLIBC_TUNABLES``): freed memory is used again, up to 1 GiB, instead of going back
      to the system. By default a layer's tensors are fresh pages each time; getting 25 MB of them took 10 to 40 ms on a
      virtual machine, and the product that fills them 21 ms. On the CPU, a plan's workspace has room for what is kept.

    Without a call everything is computed just the same, only slower.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    if not any(name in environ for name in _ALLOCATOR_SETTINGS):
        environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    if _has_amx(cpuinfo):
        environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS_KEPT)
    _keep_freed_memory(environ)


def _keep_freed_memory(environ: Mapping[str, str]) -> None:
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environ):
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library, which has no such setting
        mallopt = ctypes.CDLL(None).mallopt
        mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)


def _has_amx(cpuinfo: Path) -> bool:
    """Whether Linux offers AMX's tiles to programs; elsewhere, and in doubt, it does not."""
    with contextlib.suppress(OSError), cpuinfo.open() as lines:
        for line in lines:
            if line.startswith("flags"):
                return "amx_tile" in line.split()
    return False
