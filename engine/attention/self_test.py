"""Does a device's attention kernel compute what it should? Asked before a model's keys and values are given to it.

A GPU, its driver and PyTorch come in more combinations than anybody tests, and a kernel that is wrong says nothing.

Shapes: T query tokens, S key tokens of a pool, N query heads, K key/value heads, H head size.
"""

import torch
from torch import Tensor

from engine.attention.kernels import attend, merge
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
from engine.attention.table import Kernel, kernel_for
from engine.dtypes import DType
from engine.errors import DeviceUnavailable
from engine.memory.device import Device
from engine.memory.tensors import torch_dtype
from engine.shape import ModelShape

_TOLERANCE = {DType.FLOAT32: 1e-3, DType.FLOAT16: 1e-2, DType.BFLOAT16: 6e-2}
"""How far a result may be off: rounding, of values that are about 1."""
_MOST_KV_HEADS = 2
_DECODES = Places([1, 1, 1], [0, 3, 140], [1, 130, 65])
"""Two of them one or two keys beyond the blocks of 64 and 128 in which kernels compute."""
_PROMPTS = Places([70, 33], [210, 300], [70, 123])
"""A whole prompt, and a part of one that has 90 tokens before it."""
_PARTS = Places([5, 33], [210, 300], [70, 123])
"""The same keys, all with some before the queries' own."""
_POOL_TOKENS = 448


def check_attention(device: Device, dtype: DType, shape: ModelShape) -> None:
    """Compare the kernel that a device has for a number type, if it is not the CPU, with attention in float32 on the
    CPU, for heads as a model has them.

    Raises:
        DeviceUnavailable: it computes something else; the sentence names kernel, device and PyTorch.
    """
    kernel = None if device.shares_host_memory else kernel_for(dtype, device.capability)
    if kernel is None:
        return
    with torch.inference_mode():
        worst = _Test(kernel, device, dtype, shape).worst()
    if not worst <= _TOLERANCE[dtype]:  # not a number is wrong, too
        raise DeviceUnavailable(
            f"the {kernel} attention of PyTorch {torch.__version__} on {_card(device)} is wrong in {dtype}: it is off "
            f"by {worst:.3g}, where rounding explains {_TOLERANCE[dtype]:g}; try another version of PyTorch or of the "
            "driver, --dtype float32, or --device cpu, and report this sentence"
        )


class _Test:
    """A pool with a few sequences in it, and attention over them in every way that the engine attends."""

    def __init__(self, kernel: Kernel, device: Device, dtype: DType, shape: ModelShape) -> None:
        self._kernel, self._device, self._dtype = kernel, device, torch_dtype(dtype)
        self._num_kv_heads = min(_MOST_KV_HEADS, shape.num_kv_heads)
        self._num_heads = self._num_kv_heads * (shape.num_heads // shape.num_kv_heads)
        self._head_size = shape.head_size
        self._foldings = foldings_of(kernel, self._num_heads, self._num_kv_heads)
        self._generator = torch.Generator().manual_seed(0)
        pool_S2KH = self._random(_POOL_TOKENS, 2, self._num_kv_heads)
        held = torch.zeros(_POOL_TOKENS, dtype=torch.bool)
        for places in (_DECODES, _PROMPTS):
            places.check(_POOL_TOKENS)
            for start, used in zip(places.starts, places.used, strict=True):
                held[start : start + used] = True
        # Whoever reads what belongs to no sequence computes no number.
        pool_S2KH[~held] = float("nan")
        self._pool_S2KH, self._on_device_S2KH = pool_S2KH, device.upload(pool_S2KH)

    def worst(self) -> float:
        """The largest difference of all that is computed, or no number."""
        decodes, prompts, parts = (self._queries(places) for places in (_DECODES, _PROMPTS, _PARTS))
        with self._device.computing():
            found = [
                self._at_once(_DECODES, decodes),
                self._at_once(_PROMPTS, prompts),
                self._in_parts(_PARTS, parts),
            ]
        expected = [
            self._expected(_DECODES, decodes),
            self._expected(_PROMPTS, prompts),
            self._expected(_PARTS, parts),
        ]
        return float((torch.cat(found).float() - torch.cat(expected)).abs().max())

    def _at_once(self, places: Places, q_TNH: Tensor) -> Tensor:
        folding = self._foldings.of(places.lengths)
        queries = self._device.upload(q_TNH)
        out_TNH = torch.empty_like(queries)
        attend_packed(self._kernel, queries, self._on_device_S2KH, self._ragged(places, folding), out_TNH)
        return self._device.download(out_TNH)

    def _in_parts(self, places: Places, q_TNH: Tensor) -> Tensor:
        """First what lies before the queries' own keys, then these, as where a sequence is longer than a buffer."""
        queries = self._device.upload(q_TNH)
        folding = self._foldings.of_prompts
        lengths = places.lengths
        past = [used - length for used, length in zip(places.used, lengths, strict=True)]
        own = Places(lengths, [start + count for start, count in zip(places.starts, past, strict=True)], lengths)
        parts = [
            attend_part(
                self._kernel, queries, self._on_device_S2KH, self._ragged(some, folding, is_part=True), causal=causal
            )
            for some, causal in ((Places(lengths, places.starts, past), False), (own, True))
        ]
        return self._device.download(merge(parts)[0].transpose(0, 1).contiguous())

    def _expected(self, places: Places, q_TNH: Tensor) -> Tensor:
        expected, row = [], 0
        for length, start, used in zip(places.lengths, places.starts, places.used, strict=True):
            q_NtH = q_TNH[row : row + length].float().transpose(0, 1)
            k_KsH, v_KsH = self._pool_S2KH[start : start + used].float().permute(1, 2, 0, 3)
            expected.append(attend(q_NtH, k_KsH, v_KsH, causal=True)[0].transpose(0, 1))
            row += length
        return torch.cat(expected)

    def _ragged(self, places: Places, folding: Folding, *, is_part: bool = False) -> Ragged:
        numbers = torch.tensor(ragged_numbers(places, folding, is_part=is_part), dtype=torch.int32)
        return ragged_of(places, self._device.upload(numbers), folding)

    def _queries(self, places: Places) -> Tensor:
        return self._random(sum(places.lengths), self._num_heads)

    def _random(self, *size: int) -> Tensor:
        return torch.randn(*size, self._head_size, generator=self._generator).to(self._dtype)


def _card(device: Device) -> str:
    if device.torch_device.type != "cuda":
        return device.name
    return f"{device.name} ({torch.cuda.get_device_name(device.torch_device)})"
