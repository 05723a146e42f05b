"""Host memory straight from the operating system."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from engine.units import MIB

HUGE_FROM = 32 * MIB
"""Bytes from which huge pages are asked for."""


def aligned_empty(num_bytes: int) -> Tensor:
    """Zeroed bytes, ``uint8 [num_bytes]``, that begin on a page of 4096.

    They are an anonymous mapping of their own: untouched pages cost nothing, direct reads may land in them, and the
    memory returns to the operating system when the last view of the tensor is gone, whatever the allocator thinks.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
