"""Plain tensors: computed with as they lie, or cast to another number type first."""

from torch import Tensor

from engine.formats.sizes import Plain
from engine.memory.tensors import torch_dtype


def operand(stored: Plain, raw: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor in its bytes; nothing is copied."""
    return raw.view(torch_dtype(stored.dtype)).view(shape)


def unpack(stored: Plain, raw: Tensor, out: Tensor) -> None:
    """The values in the number type of ``out``."""
    out.copy_(operand(stored, raw, tuple(out.shape)))
