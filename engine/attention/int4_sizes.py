"""Which heads can be stored in four bits, and what packing them takes. No torch."""

from engine.attention.sizes import kv_layer_bytes
from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain, TensorFormat
from engine.shape import ModelShape

_GROUP = 64
_PACKED_VALUES, _PACKED_VALUES_ON_CPU = 1 << 24, 1 << 20
"""Keys and values that are packed at once: what caches hold; on a GPU, so many that few launches pack a micro-batch."""
_PACKING_BYTES = 12
"""Of each of these, beside its row: in float32, as steps, as codes."""


def kv_format(name: str, dtype: DType, head_size: int) -> TensorFormat:
    """How one head's vector is stored."""
    return Int4(head_group(head_size)) if name == Int4.name else Plain(dtype)


def can_pack(head_size: int) -> bool:
    """Whether heads of this size can be stored in four bits: two codes are a byte, and no group lies across the halves
    of a head (see ``int4_products``), unless it is the whole head."""
    group = head_group(head_size)
    return head_size % 2 == 0 and (group == head_size or head_size // 2 % group == 0)


def head_group(head_size: int) -> int:
    """How many of a head's values share a scale and a minimum: 64, or all where these do not divide it."""
    return _GROUP if head_size % _GROUP == 0 else head_size


def packed_tokens(num_kv_heads: int, head_size: int, *, on_cpu: bool) -> int:
    """Tokens whose keys and values are packed at once."""
    values = _PACKED_VALUES_ON_CPU if on_cpu else _PACKED_VALUES
    return max(1, values // (2 * num_kv_heads * head_size))


def packing_bytes(shape: ModelShape, stored: TensorFormat, num_tokens: int, *, on_cpu: bool) -> int:
    """Bytes that packing a micro-batch's keys and values takes, their rows included."""
    if not isinstance(stored, Int4):
        return 0
    together = min(num_tokens, packed_tokens(shape.num_kv_heads, shape.head_size, on_cpu=on_cpu))
    values = 2 * shape.num_kv_heads * shape.head_size * together
    return kv_layer_bytes(shape, stored, num_tokens) + _PACKING_BYTES * values
