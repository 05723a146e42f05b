"""How large keys and values are. No torch."""

from engine.dtypes import DType
from engine.shape import ModelShape


def kv_bytes_per_token(shape: ModelShape, dtype: DType) -> int:
    """Bytes of keys and values one token leaves behind, over all layers."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * dtype.num_bytes


def kv_slot_bytes(shape: ModelShape, dtype: DType, extent_tokens: int) -> int:
    """Bytes of one layer's keys and values of the longest extent: what a cache that lives elsewhere passes through."""
    return 2 * shape.num_kv_heads * extent_tokens * shape.head_size * dtype.num_bytes
