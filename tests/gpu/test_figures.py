"""Figures that decisions rest on and that only a card can tell: printed, and compared with nothing.

See "Not provable here" in ``docs/decisions/0009-on-a-gpu.md``; whether keys come within 5 ms is in ``test_links``.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from time import perf_counter

import pytest
import torch
from torch import Tensor

from engine.attention import packed
from engine.attention.packed import NO_FOLDING, Folding, Places, Ragged, attend_packed, foldings_of
from engine.attention.table import Kernel
from engine.devices.cuda import CudaDevice
from engine.dtypes import DType
from engine.measure.effort import QUICK
from engine.measure.timing import timed
from tests.gpu.on_gpu import ON_A_GPU, Arithmetic, tell
from tests.gpu.test_kernels import placed, ragged_on

pytestmark = ON_A_GPU

EFFORT = replace(QUICK, figure_s=0.2)
HALF = Arithmetic(DType.FLOAT16)
ISSUED = 300
"""Calls that are issued one after the other, without waiting for any."""


def on_card(device: CudaDevice, *size: int) -> Tensor:
    return torch.randn(*size, device=device.torch_device).half()


def pool_and_rows(
    device: CudaDevice, places: Places, heads: tuple[int, int], head_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, a pool of keys and values, and room for the outputs."""
    queries = on_card(device, sum(places.lengths), heads[0], head_size)
    pool = on_card(device, places.starts[-1] + places.used[-1], 2, heads[1], head_size)
    return queries, pool, torch.empty_like(queries)


def test_decode_tokens_and_a_long_prompt_in_one_call_or_two(capsys: pytest.CaptureFixture[str]) -> None:
    """In one call, the decode tokens have as many blocks of queries as the prompt, all but one of them empty."""
    number, kernel = 64, HALF.kernel
    assert kernel is not None
    together = placed([1] * number + [1024], [511] * number + [0])
    tokens, prompt = (
        Places(together.lengths[part], together.starts[part], together.used[part])
        for part in (slice(0, number), slice(number, None))
    )
    with closing(CudaDevice(0)) as device, torch.inference_mode(), device.computing():
        queries, pool, out = pool_and_rows(device, together, (16, 16), 64)
        at_once, first, second = (ragged_on(device, places, NO_FOLDING) for places in (together, tokens, prompt))

        def in_two() -> None:
            attend_packed(kernel, queries[:number], pool, first, out[:number])
            attend_packed(kernel, queries[number:], pool, second, out[number:])

        one = timed(device, lambda: attend_packed(kernel, queries, pool, at_once, out), EFFORT)
        two = timed(device, in_two, EFFORT)
    tell(
        capsys, f"{number} decode tokens and a prompt of 1,024: {1e6 * one:.0f} µs in one call, {1e6 * two:.0f} in two"
    )


def test_pythons_operator_beside_the_one_of_aten(capsys: pytest.CaptureFixture[str]) -> None:
    """What the calling thread takes for a call that gives the card next to nothing to do."""
    if HALF.kernel is not Kernel.FLASH:
        pytest.skip("this card has no flash attention")
    if packed._varlen() is None:
        pytest.skip("this PyTorch has no varlen_attn_out: the engine calls ATen's operator itself")
    places = placed([1] * 8, [15] * 8)
    with closing(CudaDevice(0)) as device, torch.inference_mode(), device.computing():
        queries, pool, out = pool_and_rows(device, places, (4, 4), 64)
        keys, values, ragged = pool[:, 0], pool[:, 1], ragged_on(device, places, NO_FOLDING)
        public = issuing(device, lambda: packed._flash(queries, keys, values, ragged, out))
        aten = issuing(device, lambda: packed._flash_part(queries, keys, values, ragged, causal=True))
    tell(capsys, f"issuing flash attention: {1e6 * public:.1f} µs by varlen_attn_out, {1e6 * aten:.1f} µs by ATen")


def issuing(device: CudaDevice, work: Callable[[], object]) -> float:
    """Seconds of the calling thread for one call."""
    for _ in range(ISSUED):
        work()
    device.compute_mark().wait()
    begin = perf_counter()
    for _ in range(ISSUED):
        work()
    seconds = (perf_counter() - begin) / ISSUED
    device.compute_mark().wait()
    return seconds


@pytest.mark.parametrize("kind", [HALF, Arithmetic(DType.FLOAT16, (7, 5))], ids=str)
def test_reads_of_grouped_decoding(kind: Arithmetic, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of keys and values a second, each counted once, as the engine folds a group and as the kernel itself does.

    A kernel that reads them once for each query of a group is a fourth as fast as the card's memory.
    """
    heads, head_size, number, length = (32, 8), 128, 32, 2048
    kernel = kind.kernel
    assert kernel is not None
    places = placed([1] * number, [length - 1] * number)
    num_bytes = number * length * 2 * heads[1] * head_size * 2
    foldings: dict[str, Folding] = {"folded": foldings_of(kernel, *heads).of_decodes}
    if kernel is Kernel.FLASH:
        foldings["by the kernel"] = NO_FOLDING
    with closing(CudaDevice(0)) as device, torch.inference_mode(), device.computing():
        queries, pool, out = pool_and_rows(device, places, heads, head_size)

        def attending(ragged: Ragged) -> Callable[[], None]:
            return lambda: attend_packed(kernel, queries, pool, ragged, out)

        rates = {
            name: num_bytes / timed(device, attending(ragged_on(device, places, folding)), EFFORT)
            for name, folding in foldings.items()
        }
        copy = torch.empty_like(pool)
        rates["a copy reads"] = num_bytes / timed(device, lambda: copy.copy_(pool), EFFORT)
    shown = ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in rates.items())
    tell(capsys, f"grouped decoding on {kernel}: {shown}")
