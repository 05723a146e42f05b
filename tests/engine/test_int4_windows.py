"""Keys that positions turn, in four bits: what attention with a mask over all keys, rounded and plain, gives."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.extents import NewKV
from engine.attention.int4_sizes import WINDOW, can_pack, has_windows, head_group, kv_room
from engine.attention.int4_window_extents import WindowedKV
from engine.attention.int4_window_rows import WindowRows
from engine.attention.int4_window_store import Added, places_of, store, stores
from engine.attention.int4_windows import attend_in_extents, window_decoder
from engine.attention.pages import attend_pages, page_table
from engine.attention.sizes import kv_layer_bytes
from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.kvcache.cache import Extent
from engine.memory.tensors import torch_dtype
from engine.model.registry import reference_config, sizes_for
from engine.shape import ModelShape
from tests.engine.int4_reference import packed, unpacked

HEADS = (20, 32, 64, 80, 96, 128, 256)
TOLERANCE = {DType.FLOAT32: 1e-5, DType.BFLOAT16: 2e-2, DType.FLOAT16: 3e-3}


def rounded_rows(values: Tensor, group: int, dtype: DType) -> Tensor:
    """Along the last axis."""
    rows = values.float().reshape(-1, values.shape[-1]).numpy()
    back = unpacked(packed(rows, group), rows.shape, group, dtype)[:, : rows.shape[1]]
    return torch.from_numpy(back.copy()).view(values.shape)


def rounded_keys(k_TKH: Tensor, dtype: DType) -> Tensor:
    """Full windows, channel by channel, over their tokens; the last tokens as they are."""
    full = len(k_TKH) // WINDOW * WINDOW
    if not full:
        return k_TKH.float()
    windows = k_TKH[:full].view(-1, WINDOW, *k_TKH.shape[1:]).permute(0, 2, 3, 1)
    back = rounded_rows(windows.contiguous(), WINDOW, dtype).permute(0, 3, 1, 2).reshape(full, *k_TKH.shape[1:])
    return torch.cat([back, k_TKH[full:].float()])


def expected(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: int, dtype: DType) -> Tensor:
    """In float32, with a mask over twice the keys: a query sees those of its window plain, and others rounded."""
    num_tokens, shared = len(q_TNH), q_TNH.shape[1] // k_TKH.shape[1]
    keys = torch.cat([rounded_keys(k_TKH, dtype), k_TKH.float()]).repeat_interleave(shared, 1)
    values = rounded_rows(v_TKH, group, dtype).repeat(2, 1, 1).repeat_interleave(shared, 1)
    scores = torch.einsum("tnh,snh->nts", q_TNH.float(), keys) * q_TNH.shape[2] ** -0.5
    position = torch.arange(num_tokens)
    window = position // WINDOW
    earlier = window[None] < window[:, None]
    own = (window[None] == window[:, None]) & (position[None] <= position[:, None])
    seen = torch.cat([earlier, own], 1)
    return torch.einsum("nts,snh->tnh", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)


def shape_of(num_heads: int, num_kv_heads: int, head_size: int) -> ModelShape:
    shape = sizes_for(reference_config(num_heads * head_size, head_size=head_size, num_layers=2, vocab_size=8)).shape
    return replace(shape, num_kv_heads=num_kv_heads, head_size=head_size, turns_keys=True)


def room_for(tokens: int, shape: ModelShape, dtype: DType, extent_tokens: int) -> WindowedKV:
    """The room of one sequence, of bytes that nobody wrote."""
    stored = Int4(head_group(shape.head_size, turned=True))
    room = kv_room(shape, stored, dtype)
    capacities = [min(extent_tokens, room.of(tokens) - room.beside - first)
                  for first in range(0, room.of(tokens) - room.beside, extent_tokens)]  # fmt: skip
    extents, raw, start = [], [], 0
    for capacity in [*capacities, room.beside]:
        extents.append(Extent(start, capacity, start))
        raw.append(torch.full((capacity * shape.num_layers * kv_layer_bytes(shape, stored),), 255, dtype=torch.uint8))
        start += capacity
    return WindowedKV(tuple(extents), raw, shape, stored, torch_dtype(dtype))


@given(
    st.sampled_from(HEADS), st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.lists(st.integers(1, 150), min_size=1, max_size=5),
    st.sampled_from([64, 128, 1024]), st.sampled_from(list(TOLERANCE)), st.integers(0, 1 << 30),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_sequence_sees_its_window_plain_and_what_lies_before_it_rounded(
    size: int, heads: tuple[int, int], chunks: list[int], extent_tokens: int, dtype: DType, seed: int
) -> None:
    num_heads, num_kv_heads = heads
    count = sum(chunks)
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(count, num_heads + 2 * num_kv_heads, size, generator=generator).to(torch_dtype(dtype))
    # Channels about means of their own, as positions make them.
    qkv[:, num_heads : num_heads + num_kv_heads] += 3 * torch.randn(num_kv_heads, size, generator=generator)
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], 1)
    stored = Int4(head_group(size, turned=True))
    want = expected(q, k, v, stored.group, dtype)
    shape = shape_of(num_heads, num_kv_heads, size)
    kv = room_for(count, shape, dtype, extent_tokens)
    rows = WindowRows(num_kv_heads, size, stored, torch_dtype(dtype))
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    start = 0
    for length in chunks:
        these = slice(start, start + length)
        new_kv = qkv[these, num_heads:].clone().view(length, 2, num_kv_heads, size)
        parts = rows.new_parts(rows.rounded(new_kv))
        new = NewKV(new_kv[:, 0], new_kv[:, 1], parts)
        if length == 1:
            decode = window_decoder(1, q[these], new, out[these])
            assert decode is not None
            decode(0, *kv.up_to(1, start))
        else:
            for some in (slice(0, 1), slice(1, num_kv_heads)):
                if some.start < some.stop:
                    kv.append(1, start, some, slice(0, length), new)
                    shared = num_heads // num_kv_heads
                    wide = slice(some.start * shared, some.stop * shared)
                    own = tuple(each.transpose(0, 1)[some] for each in (new.k_TKH, new.v_TKH))
                    attend_in_extents(
                        1, start, some, (q[these].transpose(0, 1)[wide], *own), kv, out[these].transpose(0, 1)[wide]
                    )
        start += length
    torch.testing.assert_close(out.float(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@given(
    st.sampled_from(HEADS), st.integers(1, 3), st.lists(st.integers(1, 150), min_size=1, max_size=5),
    st.sampled_from(list(TOLERANCE)), st.integers(0, 1 << 30),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_pool_gives_back_windows_rounded_and_what_is_open_plain(
    size: int, heads: int, chunks: list[int], dtype: DType, seed: int
) -> None:
    """However many tokens come at once."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(chunks)
    kv = torch.randn(count, 2, heads, size, generator=generator).to(torch_dtype(dtype))
    stored = Int4(head_group(size, turned=True))
    rows = WindowRows(heads, size, stored, torch_dtype(dtype))
    room = kv_room(shape_of(heads, heads, size), stored, dtype)
    total = room.of(count)
    order = torch.randperm(total, generator=generator).tolist()  # a pool need not have a sequence in one piece
    pool = torch.full((total, rows.row_bytes), 255, dtype=torch.uint8)
    opened = order[total - room.beside :]
    start = 0
    for length in chunks:
        new = kv[start : start + length].clone()
        base, end = start - start % WINDOW, -(-(start + length) // WINDOW) * WINDOW
        left = rows.leaving(rows.rounded(new), new)
        assert left.shape == (length, rows.leaving_bytes)
        for numbers in places_of([Added(0, start, length, order[base:end], opened)], rows, most_windows=2):
            store(rows, pool, stores(numbers, partial(torch.tensor, dtype=torch.int64)), *rows.arrived(left))
        start += length
    full = count // WINDOW * WINDOW
    if full:
        found = torch.full((full, *kv.shape[1:]), float("nan"), dtype=kv.dtype)
        rows.unpack(pool[order[:full]], found)
        assert torch.equal(found[:, 0].float(), rounded_keys(kv[:full, 0], dtype))
        assert torch.equal(found[:, 1].float(), rounded_rows(kv[:full, 1], stored.group, dtype))
    if count > full:
        (window,) = rows.opened(pool, torch.tensor([opened]))
        assert torch.equal(window[: count - full], kv[full:, 0])


@given(
    st.sampled_from(HEADS), st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.lists(st.sampled_from([1, 2, 40, 63, 64, 65, 128, 129]), min_size=1, max_size=4),
    st.integers(1, 5), st.sampled_from(list(TOLERANCE)), st.integers(0, 1 << 30),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_host_sees_the_window_of_a_token_plain_and_what_lies_before_it_rounded(
    size: int, heads: tuple[int, int], counts: list[int], most: int, dtype: DType, seed: int
) -> None:
    """Also if the token is the last of its window, which is packed before anybody attends."""
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    shape, stored = shape_of(num_heads, num_kv_heads, size), Int4(head_group(size, turned=True))
    rows, room = WindowRows(num_kv_heads, size, stored, torch_dtype(dtype)), kv_room(shape, stored, dtype)
    of_sequence = -(-room.of(max(counts)) // WINDOW)
    order = torch.randperm(of_sequence * len(counts), generator=generator).view(len(counts), -1).tolist()
    pool = torch.zeros(of_sequence * len(counts) * WINDOW, rows.row_bytes, dtype=torch.uint8)
    queries, wanted, opened = [], [], []
    for pages, count in zip(order, counts, strict=True):
        slots = [page * WINDOW + token for page in pages for token in range(WINDOW)]
        opened.append(slots[room.of(count) - room.beside : room.of(count)])
        qkv = torch.randn(count, num_heads + 2 * num_kv_heads, size, generator=generator).to(torch_dtype(dtype))
        q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], 1)
        queries.append(q[-1])
        wanted.append(expected(q, k, v, stored.group, dtype)[-1])
        for start, length in ((0, count - 1), (count - 1, 1)):
            if length:
                new = torch.stack((k, v), 1)[start : start + length].clone()
                left = rows.leaving(rows.rounded(new), new)
                base, end = start - start % WINDOW, -(-(start + length) // WINDOW) * WINDOW
                for numbers in places_of([Added(0, start, length, slots[base:end], opened[-1])], rows, most):
                    store(rows, pool, stores(numbers, partial(torch.tensor, dtype=torch.int64)), *rows.arrived(left))
    table = page_table(order, counts, WINDOW, most, opened)
    values = 2 * len(table.pages) * num_heads + (len(table.pages) + len(counts)) * num_heads * size
    work = torch.empty(values + most * num_kv_heads * WINDOW * size)
    staged = torch.empty(most * WINDOW * rows.row_bytes, dtype=torch.uint8)
    q_RNH = torch.stack(queries)
    out = torch.full_like(q_RNH, float("nan"))
    attend_pages(q_RNH, pool, rows, table, staged, work, out)
    torch.testing.assert_close(out.float(), torch.stack(wanted), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("size", HEADS)
def test_room(size: int) -> None:
    """At least 2.9 times the sequences of 576 tokens, in groups of 64 values."""
    shape, stored = shape_of(4, 2, size), Int4(head_group(size, turned=True))
    assert can_pack(size, turned=True)
    assert has_windows(shape, stored)
    room = kv_room(shape, stored, DType.BFLOAT16)
    packed_bytes = room.of(576) * kv_layer_bytes(shape, stored)
    plain_bytes = 576 * 2 * shape.num_kv_heads * size * 2
    assert plain_bytes / packed_bytes > (2.9 if size % 64 == 0 else 2.4)
