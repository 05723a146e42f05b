"""Tensors of the engine's number types."""

import torch

from engine.dtypes import DType

_TORCH: dict[DType, torch.dtype] = {
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
    DType.FLOAT32: torch.float32,
}


def torch_dtype(dtype: DType) -> torch.dtype:
    """PyTorch's type of the same name."""
    return _TORCH[dtype]
