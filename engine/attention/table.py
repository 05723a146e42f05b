"""Which attention kernel of PyTorch a device has for a number type. No torch.

Read from PyTorch's own sources: flash asks for compute capability 8.0 and half precision
(``native/transformers/cuda/flash_attn/flash_api.cpp``, ``mha_varlen_fwd``), the memory-efficient kernel is compiled for
5.0 and later, for bfloat16 from 8.0 on (``mem_eff_attention/kernels/cutlassF.h``, ``dispatch_cutlassF``).
"""

from enum import StrEnum

from engine.dtypes import DType

Capability = tuple[int, int]
"""CUDA's compute capability: major and minor."""
_AMPERE = (8, 0)
_EFFICIENT_FROM = (5, 0)
HEAD_STEP, LARGEST_HEAD = 8, 256
"""Head sizes that both kernels take: multiples of the first, up to the second."""


class Kernel(StrEnum):
    """A kernel that attends for many sequences in one call."""

    FLASH = "flash"
    EFFICIENT = "efficient"
    """PyTorch's memory-efficient attention."""


def kernel_for(dtype: DType, capability: Capability | None) -> Kernel | None:
    """The fastest; ``None``: there is none. Without a capability, as on the newest device there is."""
    is_half = dtype is not DType.FLOAT32
    if capability is None or capability >= _AMPERE:
        return Kernel.FLASH if is_half else Kernel.EFFICIENT
    return Kernel.EFFICIENT if dtype is not DType.BFLOAT16 and capability >= _EFFICIENT_FROM else None


def takes_heads(head_size: int) -> bool:
    """Whether the kernels compute heads of this many values."""
    return head_size % HEAD_STEP == 0 and head_size <= LARGEST_HEAD
