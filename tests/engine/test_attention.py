"""The attention primitive against its definition, and the merge over any split against the whole."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention import kernels
from engine.attention.blocks import BLOCK_QUERIES, attend_in_blocks
from engine.attention.extents import PlainKV
from engine.attention.kernels import attend, decoder, merge
from engine.kvcache.cache import Extent
from engine.model.registry import reference_config, sizes_for
from tests.engine.plain_attention import attend_plainly

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def made(seed: int, heads: int, kv_heads: int, queries: int, keys: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed as the model packs them, ``[token, head, dim]``, seen as ``[head, token, dim]``: not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (torch.randn(*shape, size, generator=generator).transpose(0, 1) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [
        *((1, 1, False), (1, 257, False), (5, 33, False), (1, 1, True), (2, 2, True), (130, 130, True)),
        # The last queries of more keys, in one block and in several, whole and not.
        *((1, 9, True), (5, 33, True), (256, 300, True), (300, 300, True), (513, 700, True), (2, 2049, True)),
    ],
)
@pytest.mark.parametrize("size", [8, 20, 64])
def test_the_kernel_computes_the_definition(
    dtype: torch.dtype, queries: int, keys: int, causal: bool, size: int
) -> None:
    q, k, v = (x.to(dtype) for x in made(0, 3, 3, queries, keys, size))
    out, lse = attend(q, k, v, causal=causal)
    plain_out, plain_lse = attend_plainly(q.float(), k.float(), v.float(), causal=causal)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.shape == (3, queries, size)
    assert lse.shape == (3, queries)
    torch.testing.assert_close(out.float(), plain_out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, plain_lse, atol=max(1e-5, TOLERANCE[dtype]), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, BLOCK_QUERIES - 1, BLOCK_QUERIES, 2 * BLOCK_QUERIES + 5])
@pytest.mark.parametrize("past", [0, 1, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)])
def test_blocks_compute_the_definition(
    dtype: torch.dtype, queries: int, past: int, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a head or two at a time, as where there are many of them, or keys."""
    q, k, v = (x.to(dtype) for x in made(7, heads, kv_heads, queries, past + queries, 16))
    times = heads // kv_heads
    plain = attend_plainly(q.float(), *(x.float().repeat_interleave(times, 0) for x in (k, v)), causal=True)[0]
    for num_bytes in (1, 2 * 4 * times * BLOCK_QUERIES * k.shape[1], 1 << 30):
        monkeypatch.setattr("engine.attention.blocks.BLOCK_BYTES", num_bytes)
        out = torch.full((queries, heads, 16), math.nan, dtype=dtype).transpose(0, 1)
        attend_in_blocks(q, k, v, out)
        torch.testing.assert_close(out.float(), plain, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_the_definition_is_pytorchs() -> None:
    q, k, v = made(1, 2, 2, 9, 9, 16)
    for causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0]
        torch.testing.assert_close(attend_plainly(q, k, v, causal=causal)[0], expected, atol=1e-6, rtol=1e-5)


def test_the_log_sum_exp_is_of_the_scaled_scores() -> None:
    """Equal keys: every score is q.k / sqrt(H), so the log-sum-exp is that plus the logarithm of their number."""
    q = torch.full((1, 1, 4), 0.5)
    k = torch.full((1, 7, 4), 3.0)
    _, lse = attend(q, k, torch.zeros(1, 7, 4), causal=False)
    assert lse.item() == pytest.approx(4 * 1.5 / 2 + math.log(7), abs=1e-6)


def test_causal_sees_itself_and_the_past_only() -> None:
    q, k, v = made(2, 2, 2, 6, 6, 8)
    out, lse = attend(q, k, v, causal=True)
    for last in range(6):
        alone, alone_lse = attend(q[:, last : last + 1], k[:, : last + 1], v[:, : last + 1], causal=False)
        torch.testing.assert_close(out[:, last : last + 1], alone, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(lse[:, last : last + 1], alone_lse, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (6, 3)])
def test_query_heads_share_key_heads_in_groups(heads: int, kv_heads: int) -> None:
    q, k, v = made(3, heads, kv_heads, 5, 5, 16)
    out, lse = attend(q, k, v, causal=True)
    group = heads // kv_heads
    for head in range(heads):
        shared = head // group
        alone, alone_lse = attend_plainly(
            q[head : head + 1], k[shared : shared + 1], v[shared : shared + 1], causal=True
        )
        torch.testing.assert_close(out[head : head + 1], alone, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(lse[head : head + 1], alone_lse, atol=2e-6, rtol=1e-5)


@settings(max_examples=60)
@given(
    keys=st.integers(1, 60),
    queries=st.integers(1, 5),
    cuts=st.sets(st.integers(1, 59), max_size=8),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_pieces_merge_to_the_whole(keys: int, queries: int, cuts: set[int], spread: float, seed: int) -> None:
    """Exactly, whatever the split and however far apart the pieces' scores are."""
    q, k, v = made(seed, 2, 2, queries, keys, 8)
    q = q * spread
    whole, _ = attend_plainly(q, k, v, causal=False)
    borders = [0, *sorted(cut for cut in cuts if cut < keys), keys]
    pieces = [attend(q, k[:, begin:end], v[:, begin:end], causal=False) for begin, end in pairwise(borders)]
    merged, _ = merge(pieces)
    assert merged.dtype == q.dtype
    torch.testing.assert_close(merged, whole, atol=2e-5, rtol=2e-5)


@settings(max_examples=30)
@given(past=st.integers(1, 40), new=st.integers(1, 20), seed=st.integers(0, 1000))
def test_past_and_own_chunk_merge_to_causal_attention(past: int, new: int, seed: int) -> None:
    q, k, v = made(seed, 2, 2, past + new, past + new, 8)
    whole, whole_lse = attend(q, k, v, causal=True)
    chunk = q[:, past:]
    merged, merged_lse = merge(
        [attend(chunk, k[:, :past], v[:, :past], causal=False), attend(chunk, k[:, past:], v[:, past:], causal=True)]
    )
    torch.testing.assert_close(merged, whole[:, past:], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(merged_lse, whole_lse[:, past:], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(attend(chunk, k, v, causal=True)[0], whole[:, past:], atol=2e-5, rtol=2e-5)


def test_one_piece_is_passed_through() -> None:
    piece = attend(*made(0, 1, 1, 2, 3, 8), causal=False)
    assert merge([piece]) is piece


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_pieces_merge_in_float32(dtype: torch.dtype) -> None:
    """One key a piece, so that each piece is exact, and the merge of 200 of them is off by its last rounding alone."""
    q, k, v = (x.to(dtype) for x in made(5, 1, 1, 1, 200, 16))
    whole, _ = attend_plainly(q.float(), k.float(), v.float(), causal=False)
    merged, _ = merge([attend(q, k[:, i : i + 1], v[:, i : i + 1], causal=False) for i in range(200)])
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.float(), whole, atol=1e-5, rtol=1.01 * torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [0, 1, 30])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("flash", "products"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("extents", [(31,), (1, 30), (30, 1), (10, 10, 11)])
def test_a_decode_token_is_stored_and_sees_all_up_to_itself(
    dtype: torch.dtype,
    position: int,
    heads: int,
    kv_heads: int,
    flash: bool,
    products: bool,
    extents: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "flash_decodes", lambda: flash)
    monkeypatch.setattr(kernels, "has_products", lambda dtype: products or dtype == torch.float32)
    torch.manual_seed(position)
    q_TNH, (k_TKH, v_TKH) = torch.randn(3, heads, 16).to(dtype), torch.randn(2, 3, kv_heads, 16).to(dtype)
    kv_2KcH = torch.randn(2, kv_heads, 31, 16).to(dtype)
    expected_kv = kv_2KcH.clone()
    expected_kv[0, :, position], expected_kv[1, :, position] = k_TKH[1], v_TKH[1]
    past = expected_kv[:, :, : position + 1].repeat_interleave(heads // kv_heads, 1)
    expected, _ = attend_plainly(q_TNH[1, :, None], past[0], past[1], causal=False)
    out_TNH = torch.full((3, heads, 16), float("nan"), dtype=dtype)

    decode = decoder(2, q_TNH, k_TKH, v_TKH, out_TNH)
    assert decode is not None
    pieces = [each.contiguous() for each in kv_2KcH.split(extents, 2)]
    held = next(number for number in range(len(extents)) if position < sum(extents[: number + 1]))
    decode(1, pieces[: held + 1], position - sum(extents[:held]))

    assert torch.equal(torch.cat(pieces, 2), expected_kv)
    torch.testing.assert_close(out_TNH[1], expected[:, 0], atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
    assert out_TNH[0].isnan().all()
    assert out_TNH[2].isnan().all()


@pytest.mark.parametrize(
    ("position", "held", "place"), [(0, 1, 0), (3, 1, 3), (4, 2, 0), (6, 2, 2), (7, 3, 0), (8, 3, 1)]
)
def test_a_position_lies_in_the_last_of_the_extents_up_to_it(position: int, held: int, place: int) -> None:
    extents = (Extent(0, 4, 50), Extent(4, 3, 0), Extent(7, 2, 10))
    shape = sizes_for(reference_config(8, head_size=8, num_layers=2, vocab_size=8)).shape
    # Each layer of an extent holds the number of the extent, the second one's negative.
    raw = [
        torch.tensor([number, -number]).float().repeat_interleave(2 * extent.capacity * 8).view(torch.uint8)
        for number, extent in enumerate(extents, start=1)
    ]
    found, where = PlainKV(extents, raw, shape, torch.float32).up_to(1, position)
    assert [each.unique().tolist() for each in found] == [[-number] for number in range(1, held + 1)]
    assert [each.shape[2] for each in found] == [extent.capacity for extent in extents[:held]]
    assert where == place


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
def test_keys_before_the_mask_are_seen(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    """A block of queries sees more keys than the mask has columns."""
    q, k, v = (x.to(dtype) for x in made(7, heads, kv_heads, 600, 2 * kernels.MASK_KEYS + 100, 16))
    out, lse = attend(q, k, v, causal=True)
    k, v = (x.repeat_interleave(heads // kv_heads, 0).float() for x in (k, v))
    expected, expected_lse = attend_plainly(q.float(), k, v, causal=True)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, atol=max(1e-5, TOLERANCE[dtype]), rtol=0)
