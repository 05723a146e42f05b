"""One sequence's keys and values in four bits where compute is the CPU; implements ``extents.SequenceKV``.

Shapes: K key/value heads, s key tokens, c tokens of an extent, H head size, G groups of a head, C = H / 2 bytes of its
codes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.extents import NewKV, pieces_from, pieces_of, up_to
from engine.formats.int4 import Parts, unpack_parts
from engine.formats.int4_sizes import Int4
from engine.kvcache.cache import Extent
from engine.shape import ModelShape


@dataclass(frozen=True, slots=True)
class PackedPiece:
    """One layer of an extent."""

    codes_2KcC: Tensor
    scale_2KcG: Tensor
    minimum_2KcG: Tensor

    def up_to(self, count: int) -> "PackedPiece":
        """Its first tokens."""
        return PackedPiece(*(each[:, :, :count] for each in self.parts))

    @property
    def parts(self) -> Parts:
        """All three."""
        return self.codes_2KcC, self.scale_2KcG, self.minimum_2KcG


class PackedKV:
    """Scales, minima and codes, each ``[k|v, K, c, ...]``, a layer of an extent."""

    def __init__(
        self,
        extents: tuple[Extent, ...],
        raw: Sequence[Tensor],
        shape: ModelShape,
        stored: Int4,
        dtype: torch.dtype,
    ) -> None:
        """``raw``: the bytes of each extent; ``dtype``: what they are read as."""
        self._extents, self._dtype, self._head_size = extents, dtype, shape.head_size
        self._layers = [packed_layers(each.view(shape.num_layers, -1), shape, stored) for each in raw]

    def up_to(self, layer: int, position: int) -> tuple[list[PackedPiece], int]:
        """The extents up to that of a position."""
        return up_to(self._extents, self._layers, layer, position)

    def read(self, layer: int, num_tokens: int, heads: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Unpacked into memory of their own."""
        for piece, count in pieces_of(self._extents, self._layers, layer, num_tokens):
            codes_2KsC, scale_2KsG, minimum_2KsG = (each[:, heads, :count] for each in piece.parts)
            kv_2KsH = torch.empty(*codes_2KsC.shape[:3], self._head_size, dtype=self._dtype)
            unpack_parts((codes_2KsC, scale_2KsG, minimum_2KsG), kv_2KsH)
            yield kv_2KsH[0], kv_2KsH[1]

    def append(self, layer: int, start: int, heads: slice, rows: slice, new: NewKV) -> None:
        """The packed ones."""
        assert new.packed is not None
        for layers, here, there in pieces_from(self._extents, self._layers, start, rows.stop - rows.start):
            for place, part in zip(layers[layer].parts, new.packed, strict=True):
                place[:, heads, there] = part[rows][here, :, heads].permute(1, 2, 0, 3)


def packed_layers(raw: Tensor, shape: ModelShape, stored: Int4) -> tuple[PackedPiece, ...]:
    """Each layer's bytes, ``[L, bytes]``: scales, minima, codes."""
    heads, groups = (2, shape.num_kv_heads, -1), shape.head_size // stored.group
    # A token of one head takes four bytes for each group and half a byte for each value.
    numbers = raw.shape[1] * 2 * groups // (4 * groups + shape.head_size // 2)
    found = []
    for layer in raw.unbind():
        scale, minimum = (layer[first : first + numbers].view(torch.float16) for first in (0, numbers))
        scale_2KcG, minimum_2KcG = (each.view(*heads, groups) for each in (scale, minimum))
        found.append(PackedPiece(layer[2 * numbers :].view(*heads, shape.head_size // 2), scale_2KcG, minimum_2KcG))
    return tuple(found)
