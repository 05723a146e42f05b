"""Bytes and operations of tensors, from their shapes. No torch."""

from collections.abc import Iterable
from math import prod

from engine.dtypes import DType


def num_bytes(shape: tuple[int, ...], dtype: DType) -> int:
    """Bytes of a tensor as it is stored, row-major and without gaps."""
    return prod(shape) * dtype.num_bytes


def token_flops(shapes: Iterable[tuple[int, ...]]) -> float:
    """Floating-point operations of one token in the products with these tensors: a multiplication and an addition for
    each value of a matrix, however it is stored. Vectors (biases, norms) count nothing."""
    return 2.0 * sum(prod(shape) for shape in shapes if len(shape) == 2)
