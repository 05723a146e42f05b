"""Attention of many sequences in one call: the definition's results, and no call that a kernel would refuse.

The kernels themselves are a GPU's; what is computed here goes through the same arguments into a reference.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.packed import (
    NO_FOLDING,
    Folding,
    Places,
    Ragged,
    attend_packed,
    check_arguments,
    fold,
    foldings_of,
    ragged_numbers,
    ragged_of,
    unfold,
)
from engine.attention.table import Kernel, kernel_for, takes_heads
from engine.dtypes import DType
from engine.errors import EngineError
from tests.engine.plain_attention import attend_plainly

HEAD = 8


def ragged(places: Places, folding: Folding = NO_FOLDING) -> Ragged:
    return ragged_of(places, torch.tensor(ragged_numbers(places, folding, is_part=True), dtype=torch.int32), folding)


@st.composite
def places(draw: st.DrawFn) -> tuple[Places, int]:
    """Sequences with gaps between them, in any order; and the tokens of the pool that they lie in."""
    most = draw(st.sampled_from([1, 9]))
    one = st.tuples(st.integers(1, most), st.integers(0, 70), st.integers(0, 5))
    sizes = draw(st.lists(one, min_size=1, max_size=6))
    lengths, starts, used, end = [], [], [], 0
    for length, past, gap in sizes:
        starts.append(end + gap)
        lengths.append(length)
        used.append(past + length)
        end = starts[-1] + used[-1]
    order = draw(st.permutations(range(len(sizes))))
    shuffled = Places(*([values[index] for index in order] for values in (lengths, starts, used)))
    return shuffled, end + draw(st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(places(), st.integers(1, 4))
def test_log_sum_exps_are_read_where_the_memory_efficient_kernel_leaves_them(
    drawn: tuple[Places, int], sequences: int
) -> None:
    """It has a row for each sequence, which ends at a multiple of 32."""
    some, folding = drawn[0], Folding(sequences=sequences)
    rows = torch.full((len(some.lengths) * sequences, (max(some.lengths) + 31) // 32 * 32), -1)
    total = sum(some.lengths) * sequences
    for row, its in zip(rows, torch.arange(total).split(list(some.lengths) * sequences), strict=True):
        row[: len(its)] = its
    found = rows.flatten().index_select(0, ragged(some, folding).lse_at)
    assert found.tolist() == list(range(total))
    assert not len(ragged_of(some, torch.tensor(ragged_numbers(some, folding)), folding).lse_at)


@settings(max_examples=60, deadline=None)
@given(places(), st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.sampled_from(list(Kernel)), st.integers(0, 1 << 30))
def test_each_sequence_attends_to_its_own_keys(
    drawn: tuple[Places, int], heads: tuple[int, int], kernel: Kernel, seed: int
) -> None:
    where, num_keys = drawn
    where.check(num_keys)
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float16 if kernel is Kernel.FLASH else torch.float32
    num_rows = sum(where.lengths)
    q, kv, out = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((num_rows, heads[0], HEAD), (num_keys, 2, heads[1], HEAD), (num_rows, heads[0], HEAD))
    )
    attend_packed(kernel, q, kv, ragged(where, foldings_of(kernel, *heads).of(where.lengths)), out)
    begin = 0
    for length, start, used in zip(where.lengths, where.starts, where.used, strict=True):
        keys, values = (
            kv[start : start + used, which].transpose(0, 1).repeat_interleave(heads[0] // heads[1], 0)
            for which in (0, 1)
        )
        expected, _ = attend_plainly(q[begin : begin + length].transpose(0, 1), keys, values, causal=True)
        tolerance = 2e-3 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(
            out[begin : begin + length].transpose(0, 1), expected, atol=tolerance, rtol=tolerance
        )
        begin += length


@pytest.mark.parametrize(
    "folding", [NO_FOLDING, *(Folding(times, 1) for times in (2, 4)), Folding(1, 2), Folding(1, 4)]
)
def test_folding_is_undone(folding: Folding) -> None:
    q = torch.randn(5, 4, HEAD)
    folded = fold(q, folding)
    assert folded.shape == (5 * folding.times, 4 // folding.times, HEAD)
    out = torch.empty_like(q)
    unfold(folded, folding, out)
    assert torch.equal(out, q)


@pytest.mark.parametrize(
    "wrong", [Places([2], [0], [1]), Places([0], [0], [1]), Places([1], [-1], [1]), Places([1, 1], [0, 8], [3, 3])]
)
def test_places_beside_the_pool_are_refused(wrong: Places) -> None:
    with pytest.raises(EngineError, match="do not fit into a pool of 10"):
        wrong.check(10)


def rows(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


GOOD: dict[str, object] = {
    "kernel": Kernel.FLASH,
    "q": rows(3, 4, HEAD),
    "k": rows(9, 2, HEAD),
    "v": rows(9, 2, HEAD),
    "ragged": ragged(Places([1, 2], [0, 4], [3, 5])),
    "out": rows(3, 4, HEAD),
}


def changed(**fields: object) -> Callable[[dict[str, object]], dict[str, object]]:
    def change(good: dict[str, object]) -> dict[str, object]:
        given = good["ragged"]
        assert isinstance(given, Ragged)
        return {**good, "ragged": replace(given, **fields)}  # type: ignore[arg-type]

    return change


BROKEN: dict[str, tuple[Callable[[dict[str, object]], dict[str, object]], str]] = {
    "float32 for flash": (
        lambda good: {**good, **{name: rows(*good[name].shape, dtype=torch.float32) for name in "qkv"}, "out": None},  # type: ignore[attr-defined]
        "flash has no torch.float32",
    ),
    "float64": (
        lambda good: {**good, "kernel": Kernel.EFFICIENT, "q": rows(3, 4, HEAD, dtype=torch.float64)},
        "efficient has no torch.float64",
    ),
    "keys of another type": (lambda good: {**good, "k": rows(9, 2, HEAD, dtype=torch.bfloat16)}, "one number type"),
    "an output of another type": (lambda good: {**good, "out": rows(3, 4, HEAD, dtype=torch.bfloat16)}, "one number"),
    "keys elsewhere": (lambda good: {**good, "k": rows(9, 2, HEAD).to("meta")}, "on one device"),
    "starts elsewhere": (changed(starts=torch.zeros(3, dtype=torch.int32, device="meta")), "on one device"),
    "values apart": (lambda good: {**good, "q": rows(3, HEAD, 4).transpose(1, 2)}, "are neighbours"),
    "heads out of step": (lambda good: {**good, "k": rows(9, 2, HEAD + 1)[..., :HEAD]}, "begin at 16 bytes"),
    "a head size": (
        lambda good: {**good, **{name: rows(3, 2, 24)[..., :20] for name in "qkv"}, "out": rows(3, 2, 20)},
        "not 20",
    ),
    "a large head": (
        lambda good: {**good, **{name: rows(3, 2, 264) for name in "qkv"}, "out": rows(3, 2, 264)}, "not 264"
    ),
    "unlike keys and values": (lambda good: {**good, "v": rows(8, 2, HEAD)}, "keys and values are of one shape"),
    "smaller keys": (lambda good: {**good, "k": rows(9, 2, 16), "v": rows(9, 2, 16)}, "of one shape"),
    "heads that do not divide": (lambda good: {**good, "k": rows(9, 3, HEAD), "v": rows(9, 3, HEAD)}, "as many query"),
    "groups for the efficient kernel": (lambda good: {**good, "kernel": Kernel.EFFICIENT}, "knows no groups"),
    "a short output": (lambda good: {**good, "out": rows(2, 4, HEAD)}, "an output for each query"),
    "no sequence": (changed(used=torch.zeros(0, dtype=torch.int32)), "there are sequences"),
    "a start too few": (changed(starts=torch.zeros(2, dtype=torch.int32)), "and one more"),
    "long starts": (changed(starts=torch.zeros(3, dtype=torch.int64)), "int32, in one piece"),
    "long lengths": (changed(used=torch.zeros(2, dtype=torch.int64)), "int32, in one piece"),
    "lengths apart": (changed(used=torch.zeros(4, dtype=torch.int32)[::2]), "int32, in one piece"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_a_kernel_would_refuse_is_refused(what: str) -> None:
    check_arguments(**GOOD)  # type: ignore[arg-type]
    change, says = BROKEN[what]
    with pytest.raises(EngineError, match=says):
        check_arguments(**change(GOOD))  # type: ignore[arg-type]


CARDS = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]


@pytest.mark.parametrize("capability", CARDS)
def test_the_table_names_kernels_that_this_pytorch_was_built_with(capability: tuple[int, int]) -> None:
    """The list that its efficient kernel is dispatched by comes with it; flash needs Ampere."""
    source = Path(torch.__file__).parent / "include/ATen/native/transformers/cuda/mem_eff_attention/kernels/cutlassF.h"
    types = {"cutlass::bfloat16_t": DType.BFLOAT16, "cutlass::half_t": DType.FLOAT16, "float": DType.FLOAT32}
    entries = re.findall(r"is_same_v<DT, ([\w:]+)> && (\d+) <= cc && cc <= (\d+)", source.read_text())
    assert len(entries) >= 9
    number = 10 * capability[0] + capability[1]
    built = {types[name] for name, first, last in entries if int(first) <= number <= int(last)}
    for dtype in DType:
        kernel = kernel_for(dtype, capability)
        assert (kernel is not None) == (dtype in built)
        assert (kernel is Kernel.FLASH) == (dtype is not DType.FLOAT32 and capability >= (8, 0))
    assert kernel_for(DType.BFLOAT16, None) is Kernel.FLASH


def test_heads_are_taken_in_steps_of_eight() -> None:
    assert [size for size in range(1, 300) if takes_heads(size)] == list(range(8, 257, 8))
