"""Four bits a value: how far it may be off, what is exact, and the very bits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import engine.formats.int4 as int4_module
import engine.formats.int4_sizes as sizes_module
from engine.dtypes import DType
from engine.formats.int4 import pack, unpack
from engine.formats.int4_sizes import GROUPS, Int4
from engine.memory.tensors import torch_dtype
from tests.engine.int4_reference import packed, unpacked
from tests.engine.test_llama_sizes import peak_of

WIDTHS = (1, 2, 31, 32, 64, 65, 96, 129, 500, 576)
"""Odd ones, and axes of real models that are no multiple of a group."""
_LEAST = 2.0**-25
"""Half of float16's smallest number: what rounding to it may cost where numbers are tiny."""


def bytes_of(stored: Int4, values_RI: Tensor) -> Tensor:
    """What an import writes."""
    return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in pack(stored, values_RI)])


def values_of(stored: Int4, raw: Tensor, shape: tuple[int, int], dtype: DType = DType.FLOAT32) -> Tensor:
    """What products take, without the padding."""
    out = torch.full(stored.unpacked_shape(shape), float("nan"), dtype=torch_dtype(dtype))
    unpack(stored, raw, out)
    assert out.isfinite().all()
    return out[:, : shape[1]]


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Int4, Tensor]:
    """Rows of any width, of groups of very different sizes, some of them constant or nothing but zeros."""
    stored = Int4(draw(st.sampled_from(GROUPS)))
    rows, width = draw(st.integers(1, 5)), draw(st.sampled_from(WIDTHS) | st.integers(1, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(rows, width, generator=generator) * 10.0 ** draw(st.integers(-8, 3))
    values += draw(st.sampled_from((0.0, 1.0, -300.0)))
    if draw(st.booleans()):
        values[:, : stored.group] = draw(st.sampled_from((0.0, 0.1, -7.0)))
    if draw(st.booleans()):
        values = values.bfloat16().float()
    return stored, values


@given(matrices())
def test_the_bits_are_those_of_the_description(case: tuple[Int4, Tensor]) -> None:
    stored, values = case
    raw = bytes_of(stored, values)
    assert raw.numel() == stored.num_bytes(tuple(values.shape))
    assert bytes(raw.numpy()) == packed(values.numpy(), stored.group)
    rows, width = values.shape
    for dtype in DType:
        expected = unpacked(bytes(raw.numpy()), (rows, width), stored.group, dtype)[:, :width]
        assert np.array_equal(values_of(stored, raw, (rows, width), dtype).float().numpy(), expected)


@given(matrices())
def test_a_value_is_off_by_half_a_step_and_what_rounding_costs(case: tuple[Int4, Tensor]) -> None:
    stored, values = case
    rows, width = values.shape
    raw = bytes_of(stored, values)
    off = (values_of(stored, raw, (rows, width)) - values).abs()
    _, scale, minimum = pack(stored, values)
    most = 0.5 * scale.float() + (2**-11 * minimum.float().abs()).clamp_min(_LEAST)
    most += (15 * 2**-11 * scale.float()).clamp_min(15 * _LEAST)
    most = most.repeat_interleave(stored.group, 1)[:, :width]
    # Computing it in float32 rounds, too.
    assert (off <= most * (1 + 1e-5) + values.abs() * 1e-6).all()


@given(
    st.sampled_from(GROUPS),
    st.lists(st.integers(0, 15), min_size=1, max_size=200),
    st.integers(-20, 4),
    st.integers(-64, 64),
)
def test_multiples_of_a_number_that_float16_has_are_exact(
    group: int, codes: list[int], exponent: int, begin: int
) -> None:
    step = 2.0**exponent
    codes[0] = 0
    values = torch.tensor([codes], dtype=torch.float32) * step + begin * step
    for first in range(0, len(codes), group):
        some = values[:, first : first + group]
        # The whole range is used, so that the stored step is the step.
        some[0, 0] = begin * step
        some[0, -1] = (begin + 15) * step if some.shape[1] > 1 else begin * step
    found = values_of(Int4(group), bytes_of(Int4(group), values), (1, len(codes)))
    assert torch.equal(found, values)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -65504.0, 2.0**-24])
def test_a_group_of_equal_values_is_exact(value: float) -> None:
    values = torch.full((2, 70), value)
    assert torch.equal(values_of(Int4(), bytes_of(Int4(), values), (2, 70)), values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e6, -1e6, 3e38], ids=str)
@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_what_float16_cannot_hold_is_refused(bad: float, place: int) -> None:
    values = torch.ones(3, 100)
    values[1, place] = bad
    with pytest.raises(ValueError, match="float16 cannot hold"):
        pack(Int4(), values)


def test_a_group_whose_last_step_leads_beyond_float16_is_refused() -> None:
    """Scale and minimum are rounded: what comes of code 15 may be larger than the largest value was."""
    values = torch.full((1, 64), -65504.0)
    values[0, 1] = 65504.0
    with pytest.raises(ValueError, match="float16 cannot hold"):
        pack(Int4(), values)


@pytest.mark.parametrize("dtype", DType)
def test_a_range_beyond_float16_is_none_that_is_computed_with(dtype: DType) -> None:
    """Both ends are numbers of float16, though 15 steps are not: these are multiplied in float32."""
    values = torch.zeros(1, 64)
    values[0, 0], values[0, 1] = -60000.0, 60000.0
    found = values_of(Int4(), bytes_of(Int4(), values), (1, 64), dtype)
    assert torch.equal(found[0, :2], values[0, :2].to(found.dtype))


def test_rows_are_unpacked_alike_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(37, 130, generator=torch.Generator().manual_seed(0))
    raw = bytes_of(Int4(32), values)
    expected = values_of(Int4(32), raw, (37, 130), DType.BFLOAT16)
    for most in (1, 160, 161, 1000, 37 * 160):
        monkeypatch.setattr(int4_module, "BLOCK_VALUES", most)
        assert torch.equal(values_of(Int4(32), raw, (37, 130), DType.BFLOAT16), expected)


@given(matrices(), st.sampled_from(list(DType)))
def test_the_steps_of_a_gpu_give_the_same_bits(case: tuple[Int4, Tensor], dtype: DType) -> None:
    stored, values = case
    values = values.repeat(1, stored.group).to(torch_dtype(dtype))
    apart, fused = (int4_module._quantised(values, stored.group, fused=fused) for fused in (False, True))
    assert all(map(torch.equal, apart, fused))
    found, expected = (torch.full_like(values, float("nan")) for _ in range(2))
    int4_module.unpack_parts(apart, expected)
    codes, scale, minimum = apart
    grouped = found.view(*scale.shape, -1)
    int4_module._unpack_at_once(codes, scale.float()[..., None], minimum.float()[..., None], found, grouped)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
@pytest.mark.parametrize("shape", [(200, 700), (3, 5000)])
@pytest.mark.parametrize("most", [1 << 20, 1 << 12])
def test_unpacking_takes_the_memory_that_it_says(
    most: int, shape: tuple[int, int], dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside its result. Less in float16, in which scales and minima are stored."""
    for module in (int4_module, sizes_module):
        monkeypatch.setattr(module, "BLOCK_VALUES", most)
    raw = bytes_of(Int4(32), torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    out = torch.empty(Int4(32).unpacked_shape(shape), dtype=torch_dtype(dtype))
    says = Int4(32).scratch_bytes(shape, dtype)
    # PyTorch makes tensors of plain numbers, too.
    assert 0.8 * says < peak_of(lambda: unpack(Int4(32), raw, out)) < says + 100


def test_sizes() -> None:
    """4.5 bits a value in groups of 64, where they need no padding."""
    assert Int4().num_bytes((8192, 2048)) == 8192 * 2048 * 4.5 / 8
    assert Int4(32).num_bytes((10, 64)) == 10 * 64 * 5 / 8
    assert Int4(128).num_bytes((10, 128)) == 10 * 128 * 4.25 / 8
    assert Int4().num_bytes((3, 65)) == Int4().num_bytes((3, 128))
    assert Int4().unpacked_shape((3, 65)) == (3, 128)
