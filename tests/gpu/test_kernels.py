"""Attention kernels on a GPU against the definition: lengths on both sides of blocks, heads as models have them."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention.kernels import merge
from engine.attention.packed import (
    Folding,
    Places,
    Ragged,
    attend_packed,
    attend_part,
    foldings_of,
    ragged_numbers,
    ragged_of,
)
from engine.attention.self_test import check_attention
from engine.devices.cuda import CudaDevice
from engine.dtypes import DType
from engine.loading import load_engine
from engine.memory.device import Device
from engine.model.registry import reference_config, sizes_for
from engine.shape import ModelShape
from tests.engine.plain_attention import attend_plainly
from tests.gpu.on_gpu import EDGES, ON_A_GPU, Arithmetic, opt_model, options

pytestmark = ON_A_GPU

TOLERANCE = {DType.FLOAT32: 1e-4, DType.FLOAT16: 5e-3, DType.BFLOAT16: 4e-2}
"""How far an output may be off: rounding, of values that are about 1."""
HEADS = [(4, 4), (8, 2), (8, 1)]
"""Query heads and key/value heads."""
GAP = 3
"""Tokens of the pool between two sequences, which are no numbers: whoever reads them computes none."""


def placed(lengths: list[int], pasts: list[int]) -> Places:
    """Sequences one behind the other, with gaps."""
    starts, end = [], 0
    for length, past in zip(lengths, pasts, strict=True):
        starts.append(end + GAP)
        end = starts[-1] + past + length
    return Places(lengths, starts, [past + length for length, past in zip(lengths, pasts, strict=True)])


CALLS = {
    "whole prompts": placed(list(EDGES), [0] * len(EDGES)),
    "decode tokens": placed([1] * len(EDGES), [length - 1 for length in EDGES]),
    "chunks of prompts": placed([40] * len(EDGES), list(EDGES)),
    "decode tokens beside prompts": placed([1, 1, 257, 64], [1024, 255, 0, 1000]),
}


def pool_for(places: Places, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> Tensor:
    """``[S, k|v, K, H]``: no numbers where no sequence lies."""
    generator = torch.Generator().manual_seed(1)
    pool_S2KH = torch.full((places.starts[-1] + places.used[-1] + GAP, 2, num_kv_heads, head_size), float("nan"))
    for start, used in zip(places.starts, places.used, strict=True):
        pool_S2KH[start : start + used] = torch.randn(used, 2, num_kv_heads, head_size, generator=generator)
    return pool_S2KH.to(dtype)


def queries_for(places: Places, num_heads: int, head_size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(sum(places.lengths), num_heads, head_size, generator=generator).to(dtype)


def defined(places: Places, q_TNH: Tensor, pool_S2KH: Tensor) -> Tensor:
    """Attention as it is defined, in float32 on the CPU: ``[T, N, H]``."""
    found, row = [], 0
    group = q_TNH.shape[1] // pool_S2KH.shape[2]
    for length, start, used in zip(places.lengths, places.starts, places.used, strict=True):
        keys, values = (
            pool_S2KH[start : start + used, which].float().transpose(0, 1).repeat_interleave(group, 0)
            for which in (0, 1)
        )
        q_NtH = q_TNH[row : row + length].float().transpose(0, 1)
        found.append(attend_plainly(q_NtH, keys, values, causal=True)[0].transpose(0, 1))
        row += length
    return torch.cat(found)


def ragged_on(device: CudaDevice, places: Places, folding: Folding) -> Ragged:
    numbers = torch.tensor(ragged_numbers(places, folding, is_part=True), dtype=torch.int32)
    return ragged_of(places, device.upload(numbers), folding)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("call", CALLS)
def test_each_sequence_attends_to_its_own_keys(
    call: str, head_size: int, heads: tuple[int, int], kind: Arithmetic
) -> None:
    places = CALLS[call]
    pool = pool_for(places, heads[1], head_size, kind.torch_dtype)
    queries = queries_for(places, heads[0], head_size, kind.torch_dtype)
    places.check(len(pool))
    assert kind.kernel is not None
    folding = foldings_of(kind.kernel, *heads).of(places.lengths)
    with closing(kind.device()) as device, torch.inference_mode(), device.computing():
        q_TNH = device.upload(queries)
        out_TNH = torch.empty_like(q_TNH)
        attend_packed(kind.kernel, q_TNH, device.upload(pool), ragged_on(device, places, folding), out_TNH)
        found = device.download(out_TNH)
    expected = defined(places, queries, pool)
    torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[kind.dtype], rtol=TOLERANCE[kind.dtype])


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize(
    ("lengths", "pasts"),
    [([1], [1024]), ([1], [257]), ([70], [255]), ([257], [1023]), ([64, 1, 33, 7], [64, 1023, 128, 257])],
)
def test_sequences_that_come_in_parts_are_merged(
    lengths: list[int], pasts: list[int], head_size: int, heads: tuple[int, int], kind: Arithmetic
) -> None:
    """As where one is longer than a buffer: two parts of what lies before, and its own tokens; or many windows."""
    whole = placed(lengths, pasts)
    pool = pool_for(whole, heads[1], head_size, kind.torch_dtype)
    queries = queries_for(whole, heads[0], head_size, kind.torch_dtype)
    halves, first = [past // 2 for past in pasts], whole.starts
    rest = [past - half for past, half in zip(pasts, halves, strict=True)]
    second, own = ([start + count for start, count in zip(first, counts, strict=True)] for counts in (halves, pasts))
    parts = [
        (Places(lengths, first, halves), False), (Places(lengths, second, rest), False),
        (Places(lengths, own, lengths), True),
    ]  # fmt: skip
    assert kind.kernel is not None
    folding = foldings_of(kind.kernel, *heads).of_prompts
    with closing(kind.device()) as device, torch.inference_mode(), device.computing():
        q_TNH, pool_S2KH = device.upload(queries), device.upload(pool)
        found = [
            attend_part(kind.kernel, q_TNH, pool_S2KH, ragged_on(device, places, folding), causal=causal)
            for places, causal in parts
        ]
        out_TNH = device.download(merge(found)[0].transpose(0, 1).contiguous())
    expected = defined(whole, queries, pool)
    torch.testing.assert_close(out_TNH.float(), expected, atol=TOLERANCE[kind.dtype], rtol=TOLERANCE[kind.dtype])


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_no_kernel_of_this_card_fails_its_own_test(head_size: int, heads: tuple[int, int], kind: Arithmetic) -> None:
    shape = sizes_for(reference_config(heads[0] * head_size, head_size=head_size, num_layers=2, vocab_size=512)).shape
    with closing(kind.device()) as device:
        check_attention(device, kind.dtype, replace(shape, num_kv_heads=heads[1]))


def test_kernels_are_tested_when_a_model_is_loaded(
    kind: Arithmetic, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[DType] = []

    def noted(device: Device, dtype: DType, shape: ModelShape) -> None:
        asked.append(dtype)
        check_attention(device, dtype, shape)

    monkeypatch.setattr("engine.engine.check_attention", noted)
    made = opt_model(tmp_path, kind.torch_dtype, num_hidden_layers=2)
    load_engine(made.folder, options("all-device", tmp_path), device=kind.device()).close()
    assert asked == [kind.dtype]
