"""Attention over packed keys and values, which are never unpacked: what attention over the unpacked ones gives."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.extents import NewKV
from engine.attention.int4_decode import packed_decoder
from engine.attention.int4_extents import PackedKV
from engine.attention.int4_rows import PackedRows
from engine.attention.int4_sizes import head_group, packing_bytes
from engine.attention.sizes import decode_workspace_bytes, kv_layer_bytes
from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.kvcache.cache import Extent
from engine.model.registry import reference_config, sizes_for
from engine.shape import ModelShape
from tests.engine.int4_reference import packed, unpacked
from tests.engine.plain_attention import attend_plainly
from tests.engine.test_llama_sizes import peak_of

HEADS = (20, 32, 64, 80, 96, 128, 256)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def shape_of(num_heads: int, head_size: int) -> ModelShape:
    """A model with one layer."""
    return sizes_for(reference_config(num_heads * head_size, head_size=head_size, num_layers=1, vocab_size=8)).shape


def rows_of_reference(kv_S2KH: Tensor, group: int) -> Tensor:
    """What a cache in four bits gives back of keys and values, in float32."""
    size = kv_S2KH.shape[-1]
    rows = kv_S2KH.float().reshape(-1, size).numpy()
    return torch.from_numpy(unpacked(packed(rows, group), rows.shape, group, DType.FLOAT32).copy()).view(kv_S2KH.shape)


@given(
    st.sampled_from(HEADS),
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from(list(TOLERANCE)),
    st.integers(0, 1 << 30),
)
@settings(max_examples=40, deadline=None)
def test_rows_are_those_of_the_description(size: int, heads: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    stored = PackedRows(heads, size, Int4(head_group(size)))
    kv = torch.randn(tokens, 2, heads, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    rows = stored.pack(kv)
    assert rows.shape == (tokens, 2 * heads * Int4(head_group(size)).num_bytes((size,)))
    assert torch.equal(stored.view(rows.view(-1)), rows)
    found = torch.full(kv.shape, float("nan"))
    stored.unpack(rows, found)
    assert torch.equal(found, rows_of_reference(kv, head_group(size)))
    # In place, with gaps between tokens, as in a micro-batch's queries, keys and values.
    wide = torch.full((tokens, 5 * heads, size), 7.0, dtype=dtype)
    stored.unpack(rows, wide[:, 3 * heads :].view(tokens, 2, heads, size))
    own = torch.empty_like(kv)
    stored.unpack(rows, own)
    assert torch.equal(wide[:, 3 * heads :].view(kv.shape), own)
    assert (wide[:, : 3 * heads] == 7).all()


@given(
    st.sampled_from(HEADS), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(1, 50), st.sampled_from([5, 16, 64]),
    st.sampled_from(list(TOLERANCE)), st.integers(0, 1 << 30),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_decode_token_attends_to_all_before_it(
    size: int, heads: tuple[int, int], count: int, extent_tokens: int, dtype: torch.dtype, seed: int
) -> None:
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    group = head_group(size)
    stored = PackedRows(num_kv_heads, size, Int4(group))
    qkv = torch.randn(count, num_heads + 2 * num_kv_heads, size, generator=generator).to(dtype)
    kv = qkv[:, num_heads:].view(count, 2, num_kv_heads, size)
    rows = stored.pack(kv)
    exact_kv = torch.empty(kv.shape)
    stored.unpack(rows, exact_kv)
    stored.unpack(rows, kv)
    shape = replace(shape_of(num_heads, size), num_kv_heads=num_kv_heads)
    extents, raw = [], []
    for start in range(0, count, extent_tokens):
        extents.append(Extent(start, extent_tokens, start))
        raw.append(torch.full((extent_tokens * rows.shape[1],), 255, dtype=torch.uint8))
    sequence = PackedKV(tuple(extents), raw, shape, Int4(group), dtype)
    new = NewKV(kv[:, 0], kv[:, 1], stored.parts(rows))
    if count > 1:
        for heads_of in (slice(0, 1), slice(1, num_kv_heads)):
            sequence.append(0, 0, heads_of, slice(0, count - 1), new)
    q = qkv[:, :num_heads]
    out = torch.full((1, num_heads, size), float("nan"), dtype=dtype)
    last = NewKV(kv[-1:, 0], kv[-1:, 1], tuple(part[-1:] for part in stored.parts(rows)))
    decode = packed_decoder(1, q[-1:], last, out)
    assert decode is not None
    decode(0, *sequence.up_to(0, count - 1))
    shared = num_heads // num_kv_heads
    keys, values = (exact_kv[:, which].transpose(0, 1).repeat_interleave(shared, 0) for which in (0, 1))
    expected = attend_plainly(q[-1].float()[:, None], keys, values, causal=False)[0][:, 0]
    torch.testing.assert_close(out[0].float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    # And the whole sequence can be read back.
    found = torch.cat([torch.stack((k, v)) for k, v in sequence.read(0, count, slice(0, num_kv_heads))], 2)
    assert torch.equal(found.permute(2, 0, 1, 3), kv)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [100, 3000])
def test_packing_takes_no_more_memory_than_is_counted(tokens: int, dtype: torch.dtype) -> None:
    """Not all of 3,000 tokens are packed at once."""
    shape = shape_of(4, 64)
    kv = torch.randn(tokens, 2, 4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    counted = packing_bytes(shape, Int4(), DType.FLOAT32, tokens, on_cpu=True)
    assert 0.4 * counted < peak_of(lambda: PackedRows(4, 64, Int4()).pack(kv)) <= counted


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_decode_token_takes_no_more_memory_than_is_counted(dtype: torch.dtype) -> None:
    """The codes of an extent as numbers, and as bytes; and the scores of all tokens."""
    shape, extent_tokens, count = shape_of(4, 64), 256, 700
    extents = tuple(Extent(start, extent_tokens, start) for start in range(0, count, extent_tokens))
    size = kv_layer_bytes(shape, Int4(), extent_tokens)
    sequence = PackedKV(extents, [torch.zeros(size, dtype=torch.uint8) for _ in extents], shape, Int4(), dtype)
    qkv = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    kv = qkv[:, 4:].view(1, 2, 4, 64)
    stored = PackedRows(4, 64, Int4())
    new = NewKV(kv[:, 0], kv[:, 1], stored.parts(stored.pack(kv)))
    decode = packed_decoder(1, qkv[:, :4], new, torch.empty(1, 4, 64, dtype=dtype))
    assert decode is not None
    counted = decode_workspace_bytes(shape, Int4(), extent_tokens, num_threads=1, pool_tokens=count)
    assert 0.6 * counted < peak_of(lambda: decode(0, *sequence.up_to(0, count - 1))) <= counted
