"""How large keys and values are, and what attending to them takes beside. No torch."""

from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain, TensorFormat
from engine.shape import ModelShape
from engine.units import MIB

STORE_BUFFERS = 2
"""For what a micro-batch adds elsewhere: one is filled while the other is emptied into the pages that it is for."""


def kv_bytes_per_token(shape: ModelShape, stored: TensorFormat) -> int:
    """Bytes of keys and values one token leaves behind, over all layers; the format is that of one head's vector."""
    return shape.num_layers * kv_layer_bytes(shape, stored)


def kv_layer_bytes(shape: ModelShape, stored: TensorFormat, num_tokens: int = 1) -> int:
    """Bytes of some tokens' keys and values in one layer."""
    return 2 * shape.num_kv_heads * num_tokens * stored.num_bytes((shape.head_size,))


def decode_workspace_bytes(
    shape: ModelShape, stored: TensorFormat, extent_tokens: int, num_threads: int, pool_tokens: int
) -> int:
    """Bytes that decoding on the CPU takes: a float32 copy of an extent's keys for each thread, and scores.

    Each thread has another sequence, and the scores of all its tokens in two copies: together no more than
    ``pool_tokens``, which is how many the cache may have room for.
    """
    keys = num_threads * kv_layer_bytes(shape, Plain(DType.FLOAT32), extent_tokens) // 2
    if isinstance(stored, Int4):  # codes, one a byte, and scales and minima in float32
        keys += num_threads * kv_layer_bytes(shape, stored, 2 * extent_tokens)
    attended = min(num_threads * (shape.max_positions + 1), pool_tokens)
    return keys + 2 * DType.FLOAT32.num_bytes * shape.num_heads * attended


HOST_SLOTS = 2
"""Micro-batches that are attended to on the host and not yet finished."""
BLOCK_BYTES = 4 * MIB
"""How many bytes of float32 keys the host multiplies together, at most: what caches hold, and enough for all cores."""


def host_block_pages(shape: ModelShape, pages: int, page_tokens: int) -> int:
    """How many pages the host multiplies together, at most all ``pages`` of the pool."""
    return max(1, min(pages, BLOCK_BYTES // (4 * shape.num_kv_heads * shape.head_size * page_tokens)))


def host_block_bytes(shape: ModelShape, stored: TensorFormat, pages: int, page_tokens: int) -> int:
    """Bytes of the keys and values of these pages."""
    return kv_layer_bytes(shape, stored, host_block_pages(shape, pages, page_tokens) * page_tokens)


def host_attention_bytes(
    shape: ModelShape, stored: TensorFormat, dtype: DType, most_rows: int, pages: int, page_tokens: int
) -> int:
    """Host bytes that attention on the host takes: queries and results of micro-batches of ``most_rows``, in ``dtype``;
    the pages of a block; in float32, its keys or values, what comes of each page of the pool, and of each row."""
    size = shape.num_heads * shape.head_size
    slots = HOST_SLOTS * 2 * most_rows * size * dtype.num_bytes
    block = host_block_bytes(shape, stored, pages, page_tokens)
    block += host_block_pages(shape, pages, page_tokens) * 4 * shape.num_kv_heads * shape.head_size * page_tokens
    return slots + block + 4 * pages * (size + 2 * shape.num_heads) + 4 * most_rows * size


def host_temporary_bytes(shape: ModelShape, stored: TensorFormat, pages: int, page_tokens: int) -> int:
    """Bytes that come and go beside these, where keys and values are packed: codes, one a byte, and scales and minima
    in float32; of the windows of the rows' own tokens, plain keys, and these in float32."""
    if not isinstance(stored, Int4):
        return 0
    codes = 2 * host_block_bytes(shape, stored, pages, page_tokens)
    tokens = host_block_pages(shape, pages, page_tokens) * page_tokens
    return codes + (kv_layer_bytes(shape, Plain(DType.FLOAT32), tokens) if shape.turns_keys else 0)
