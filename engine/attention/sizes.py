"""How large keys and values are, and what attending to them takes beside. No torch."""

from engine.dtypes import DType
from engine.formats.sizes import Plain, TensorFormat
from engine.shape import ModelShape


def kv_bytes_per_token(shape: ModelShape, stored: TensorFormat) -> int:
    """Bytes of keys and values one token leaves behind, over all layers; the format is that of one head's vector."""
    return shape.num_layers * kv_layer_bytes(shape, stored)


def kv_layer_bytes(shape: ModelShape, stored: TensorFormat, num_tokens: int = 1) -> int:
    """Bytes of some tokens' keys and values in one layer."""
    return 2 * shape.num_kv_heads * num_tokens * stored.num_bytes((shape.head_size,))


def decode_workspace_bytes(shape: ModelShape, extent_tokens: int, num_threads: int) -> int:
    """Bytes of the float32 copies of an extent's keys that decoding on the CPU makes, one a thread."""
    return num_threads * kv_layer_bytes(shape, Plain(DType.FLOAT32), extent_tokens) // 2
