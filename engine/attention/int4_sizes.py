"""Which heads can be stored in four bits, and what packing them takes. No torch."""

from engine.attention.sizes import kv_layer_bytes
from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain, TensorFormat
from engine.kvcache.cache import ROOM_OF_TOKENS, SequenceRoom
from engine.shape import ModelShape
from engine.units import div_ceil

WINDOW = 64
"""Tokens of a sequence whose keys are packed together, where positions turn them: see ``int4_windows``."""
_GROUP = 64
_PACKED_VALUES, _PACKED_VALUES_ON_CPU = 1 << 24, 1 << 20
"""How many values are packed at once: on the CPU as many as caches hold, on a GPU so many that a few launches pack a
micro-batch."""
_PACKED_IN_WINDOWS = 1 << 22
"""The same of windows on a GPU: as a rule few tokens of a micro-batch are the last of one, but each may be."""
_PACKING_BYTES = 12
"""What each of these takes meanwhile, beside its row: a copy in float32, its step in float32, its code."""
_MERGED_QUERIES = 1 + 1 + 1 + 1 + 2 + 1 + 1
"""What a query takes whose window attends to itself and to what lies before, in queries: its copy; what came of an
earlier part, of its window, and of what lies before that; the sum, which is float32, and what that is rounded to; and
one for the log-sum-exps of all."""


def kv_format(name: str, dtype: DType, shape: ModelShape) -> TensorFormat:
    """How one head's vector is stored."""
    return Int4(head_group(shape.head_size, turned=shape.turns_keys)) if name == Int4.name else Plain(dtype)


def has_windows(shape: ModelShape, stored: TensorFormat) -> bool:
    """Whether keys are packed by windows: those that positions turn lose too much token by token."""
    return shape.turns_keys and isinstance(stored, Int4)


def can_pack(head_size: int, *, turned: bool = False) -> bool:
    """Whether heads of this size can be stored in four bits: two codes are a byte, and no group lies across the halves
    of a head (see ``int4_products``), unless it is the whole head."""
    group = head_group(head_size, turned=turned)
    step = 4 if turned else 2  # plain keys of float32 lie beside packed ones
    return head_size % step == 0 and (group == head_size or (head_size % group == 0 and head_size // 2 % group == 0))


def head_group(head_size: int, *, turned: bool = False) -> int:
    """How many of a head's values share a scale and a minimum: 64, or all where these do not divide it.

    ``turned``: 64 or somewhat fewer; then as many scales as a head has values find room in the rows of a window.
    """
    if turned:
        return head_size // div_ceil(head_size, _GROUP)
    return _GROUP if head_size % _GROUP == 0 else head_size


def kv_room(shape: ModelShape, stored: TensorFormat, dtype: DType) -> SequenceRoom:
    """What a sequence takes: where keys are packed by windows, whole ones, and room for the plain keys of one."""
    if not has_windows(shape, stored):
        return ROOM_OF_TOKENS
    plain = WINDOW * shape.num_kv_heads * shape.head_size * dtype.num_bytes
    return SequenceRoom(WINDOW, div_ceil(plain, kv_layer_bytes(shape, stored)))


def leaving_bytes(shape: ModelShape, stored: TensorFormat, dtype: DType, num_tokens: int) -> int:
    """Bytes of a layer's new tokens on their way to where they are kept: of windows, keys are plain."""
    rows = kv_layer_bytes(shape, stored, num_tokens)
    return rows // 2 + kv_layer_bytes(shape, Plain(dtype), num_tokens) // 2 if has_windows(shape, stored) else rows


def reading_bytes(shape: ModelShape, stored: TensorFormat, dtype: DType, pool_tokens: int) -> int:
    """Bytes that a prompt takes on the CPU which attends to earlier parts of itself: these are unpacked, and its heads
    are dealt out, so that no two are at the same time."""
    return kv_layer_bytes(shape, Plain(dtype), min(shape.max_positions, pool_tokens)) if isinstance(stored, Int4) else 0


def packed_tokens(num_kv_heads: int, head_size: int, *, on_cpu: bool) -> int:
    """Tokens whose keys and values are packed at once."""
    values = _PACKED_VALUES_ON_CPU if on_cpu else _PACKED_VALUES
    return max(1, values // (2 * num_kv_heads * head_size))


def packed_windows(shape: ModelShape, *, on_cpu: bool) -> int:
    """Windows whose keys are packed at once."""
    values = _PACKED_VALUES_ON_CPU if on_cpu else _PACKED_IN_WINDOWS
    return max(1, values // (WINDOW * shape.num_kv_heads * shape.head_size))


def packing_bytes(shape: ModelShape, stored: TensorFormat, dtype: DType, num_tokens: int, *, on_cpu: bool) -> int:
    """Bytes that packing a micro-batch's keys and values takes, their rows included; or, if that is more, attention of
    its windows to what lies before them."""
    if not isinstance(stored, Int4):
        return 0
    together = min(num_tokens, packed_tokens(shape.num_kv_heads, shape.head_size, on_cpu=on_cpu))
    values = 2 * shape.num_kv_heads * shape.head_size * together
    taken = _PACKING_BYTES * values
    if has_windows(shape, stored):  # each token may be the last of its window, and all of that is packed
        windows = min(num_tokens, packed_windows(shape, on_cpu=on_cpu))
        taken = max(taken, _PACKING_BYTES * WINDOW * shape.num_kv_heads * shape.head_size * windows)
        if not on_cpu:
            taken = max(taken, _MERGED_QUERIES * shape.num_heads * shape.head_size * dtype.num_bytes * num_tokens)
    return kv_layer_bytes(shape, stored, num_tokens) + taken
