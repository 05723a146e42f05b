"""The C library's allocator, from which PyTorch takes the CPU's temporaries: what it keeps of freed memory."""

import ctypes
import os
from collections.abc import Mapping

from engine.units import GIB, MIB

# malloc.h of the GNU C library.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

LARGEST_KEPT = 32 * MIB
"""Bytes of the largest allocation that can be kept; the library gives larger ones a mapping of their own, always."""
_TRIM = GIB


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Make the whole process reuse freed memory instead of returning it, up to 1 GiB; whether that could be arranged.

    By default the tensors of a layer come as fresh pages and go back at once, layer after layer. Getting 25 MB of pages
    took 10 to 40 ms on a virtual machine, and the product that fills them 21 ms. A plan's workspace has room for all
    that is kept. Where the user has chosen (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES), or the
    library is another one, nothing changes.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM))
