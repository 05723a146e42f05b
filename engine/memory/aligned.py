"""Host memory straight from the operating system."""

import mmap

import torch
from torch import Tensor


def aligned_empty(num_bytes: int) -> Tensor:
    """Zeroed bytes, ``uint8 [num_bytes]``, that begin on a page of 4096.

    They are an anonymous mapping of their own: untouched pages cost nothing, direct reads may land in them, and the
    memory returns to the operating system when the last view of the tensor is gone, whatever the allocator thinks.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
