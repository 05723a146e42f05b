"""One sequence's keys and values where compute is the CPU: in extents, a head's keys one after another in each.

Shapes: K key/value heads, T tokens of a micro-batch, t of a segment, s key tokens, c tokens of an extent, H head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.formats.int4 import Parts
from engine.kvcache.cache import Extent
from engine.shape import ModelShape


@dataclass(frozen=True, slots=True)
class NewKV:
    """What a micro-batch adds: as it is computed with, and as it is stored, if that is something else."""

    k_TKH: Tensor
    v_TKH: Tensor
    packed: Parts | None = None
    """Codes, scales and minima of keys and values, ``[T, k|v, K, ...]``."""


class SequenceKV(Protocol):
    """One way in which they lie."""

    def up_to(self, layer: int, position: int) -> tuple[list[Any], int]:
        """The pieces up to the one that ``position`` is in, in one layer, and where it is in that."""

    def read(self, layer: int, num_tokens: int, heads: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Some heads of the first ``num_tokens``, ``[K, s, H]`` each, one pair an extent."""

    def append(self, layer: int, start: int, heads: slice, rows: slice, new: NewKV) -> None:
        """Store some heads of a segment, whose rows these are, from position ``start`` on."""


class PlainKV:
    """``[k|v, K, c, H]`` a layer of an extent."""

    def __init__(
        self, extents: tuple[Extent, ...], raw: Sequence[Tensor], shape: ModelShape, dtype: torch.dtype
    ) -> None:
        """``raw``: the bytes of each extent."""
        sizes = (shape.num_layers, 2, shape.num_kv_heads, -1, shape.head_size)
        self._extents = extents
        self._layers = [each.view(dtype).view(sizes).unbind() for each in raw]

    def up_to(self, layer: int, position: int) -> tuple[list[Tensor], int]:
        """The extents up to that of a position."""
        return up_to(self._extents, self._layers, layer, position)

    def read(self, layer: int, num_tokens: int, heads: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Where they lie."""
        for kv_2KcH, count in pieces_of(self._extents, self._layers, layer, num_tokens):
            yield kv_2KcH[0, heads, :count], kv_2KcH[1, heads, :count]

    def append(self, layer: int, start: int, heads: slice, rows: slice, new: NewKV) -> None:
        """A copy."""
        k_tKH, v_tKH = new.k_TKH[rows], new.v_TKH[rows]
        for layers, here, there in pieces_from(self._extents, self._layers, start, len(k_tKH)):
            layers[layer][0, heads, there] = k_tKH[here, heads].transpose(0, 1)
            layers[layer][1, heads, there] = v_tKH[here, heads].transpose(0, 1)


def up_to(
    extents: Sequence[Extent], layers: Sequence[tuple[Any, ...]], layer: int, position: int
) -> tuple[list[Any], int]:
    """One layer of the extents up to that of a position, and where it is in that; ``layers``: those of each extent."""
    found: list[Any] = []
    for extent, of_extent in zip(extents, layers, strict=True):
        found.append(of_extent[layer])
        if position < extent.start + extent.capacity:
            break
    return found, position - extent.start


def pieces_of(
    extents: Sequence[Extent], layers: Sequence[tuple[Any, ...]], layer: int, num_tokens: int
) -> Iterator[tuple[Any, int]]:
    """One layer of the extents that the first ``num_tokens`` lie in, and how many of them are in each."""
    for extent, of_extent in zip(extents, layers, strict=True):
        count = min(num_tokens - extent.start, extent.capacity)
        if count <= 0:
            break
        yield of_extent[layer], count


def pieces_from(
    extents: Sequence[Extent], layers: Sequence[tuple[Any, ...]], start: int, count: int
) -> Iterator[tuple[tuple[Any, ...], slice, slice]]:
    """Where ``count`` tokens from position ``start`` on lie: each extent, which of the tokens, and where in it."""
    end = start + count
    for extent, of_extent in zip(extents, layers, strict=True):
        first, last = max(start, extent.start), min(end, extent.start + extent.capacity)
        if first < last:
            yield of_extent, slice(first - start, last - start), slice(first - extent.start, last - extent.start)
