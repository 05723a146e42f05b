"""Values a second that are unpacked from four bits, as a layer is before its products, or packed, as new keys are."""

from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor

from engine.attention.int4_rows import PackedRows
from engine.attention.int4_sizes import head_group
from engine.dtypes import DType
from engine.formats.int4 import unpack
from engine.formats.int4_sizes import Int4
from engine.measure.effort import Effort
from engine.measure.timing import timed
from engine.memory.device import Device
from engine.memory.tensors import torch_dtype

_MATRICES = 4
"""In turn, so that their bytes come from memory, as those of a layer do that was just read."""


def unpacked_per_s(device: Device, dtype: DType, hidden_size: int, effort: Effort) -> float:
    """Weights unpacked a second, from the largest matrices of a layer of that width, to ``dtype``."""
    stored, shape = Int4(), matrix(hidden_size)
    packed: Iterator[Tensor] = cycle([device.upload(_random(stored, shape)) for _ in range(_MATRICES)])
    out = torch.empty(shape, dtype=torch_dtype(dtype), device=device.torch_device)
    seconds = timed(device, lambda: unpack(stored, next(packed), out), effort)
    return out.numel() / seconds


def packed_per_s(device: Device, dtype: DType, effort: Effort) -> float:
    """Values packed a second: of as many tokens as a cache is given at once, in the widest model."""
    heads, tokens = effort.widths[-1][0] // effort.head_size, max(effort.tokens)
    rows = PackedRows(heads, effort.head_size, Int4(head_group(effort.head_size)))
    size = tokens, 2, heads, effort.head_size
    kv_S2KH = torch.randn(size, dtype=torch_dtype(dtype), device=device.torch_device)
    return kv_S2KH.numel() / timed(device, lambda: rows.pack(kv_S2KH), effort)


def unpacking_bytes(hidden_size: int, dtype: DType) -> int:
    """Device bytes that this takes."""
    stored, shape = Int4(), matrix(hidden_size)
    taken = _MATRICES * stored.num_bytes(shape) + shape[0] * shape[1] * dtype.num_bytes
    return taken + stored.scratch_bytes(shape, dtype)


def matrix(hidden_size: int) -> tuple[int, int]:
    """The shape of what is unpacked."""
    return 4 * hidden_size, hidden_size


def _random(stored: Int4, shape: tuple[int, int]) -> Tensor:
    """Packed bytes. Were scales and minima random, too, many would be no numbers, which take longer than others."""
    raw = torch.randint(0, 256, (stored.num_bytes(shape),), dtype=torch.uint8)
    codes = stored.unpacked_shape(shape)[0] * stored.unpacked_shape(shape)[1] // 2
    raw[codes:].view(torch.float16).uniform_(0.001, 0.01)
    return raw
