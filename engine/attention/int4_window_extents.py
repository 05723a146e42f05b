"""One sequence's keys, packed by windows, and its values, where compute is the CPU: see ``int4_windows``.

They lie as ``int4_extents`` says; only that a window's rows hold the scales and minima of its channels, not of its
tokens. The last extent has no tokens: there is the room for the keys of the window that is not full yet.

Shapes: K key/value heads, t query tokens, s key tokens, c tokens of an extent, w tokens of a window, n windows, H head
size, G groups of a head, C = H / 2 bytes of its codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.extents import NewKV, pieces_from, pieces_of, up_to
from engine.attention.int4_extents import PackedPiece, packed_layers
from engine.attention.int4_sizes import WINDOW
from engine.formats.int4 import Parts, quantised_columns, unpack_columns, unpack_parts
from engine.formats.int4_sizes import Int4
from engine.kvcache.cache import Extent
from engine.shape import ModelShape


@dataclass(frozen=True, slots=True)
class WindowedPiece:
    """One layer of an extent, and the keys of the window that is not full yet."""

    packed: PackedPiece
    """Its scales and minima of keys mean nothing by themselves: ``scales`` has them in order."""
    open_KwH: Tensor

    @property
    def num_windows(self) -> int:
        """That it has room for."""
        return self.packed.codes_2KcC.shape[2] // WINDOW

    @property
    def codes_KnwC(self) -> Tensor:
        """Those of keys."""
        codes_KcC = self.packed.codes_2KcC[0]
        return codes_KcC.view(len(codes_KcC), -1, WINDOW, codes_KcC.shape[2])

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Scales and minima of channels, ``[K, n, H]``."""
        head_size = self.open_KwH.shape[2]
        scale_KnH, minimum_KnH = (
            each[0].view(len(self.open_KwH), self.num_windows, -1)[..., :head_size]
            for each in (self.packed.scale_2KcG, self.packed.minimum_2KcG)
        )
        return scale_KnH, minimum_KnH

    def add(self, place: int, k_KH: Tensor, values: Sequence[Tensor]) -> None:
        """A token's key, and its packed value."""
        self.open_KwH[:, place % WINDOW] = k_KH
        for lies, part in zip(self.packed.parts, values, strict=True):
            lies[1, :, place] = part

    def pack(self, window: int, heads: slice, parts: Parts) -> None:
        """Some heads' keys of a window."""
        codes, scale, minimum = parts
        self.codes_KnwC[heads, window] = codes
        scale_KnH, minimum_KnH = self.scales
        scale_KnH[heads, window] = scale
        minimum_KnH[heads, window] = minimum

    def close(self, place: int) -> None:
        """Pack the open window, if the token at ``place`` was its last."""
        window, last = divmod(place, WINDOW)
        if last == WINDOW - 1:
            self.pack(window, slice(None), quantised_columns(self.open_KwH))


class WindowedKV:
    """All extents of a sequence."""

    def __init__(
        self, extents: tuple[Extent, ...], raw: Sequence[Tensor], shape: ModelShape, stored: Int4, dtype: torch.dtype
    ) -> None:
        """``raw``: the bytes of each extent; ``dtype``: what keys and values are computed as."""
        self._extents = extents[:-1]
        assert all(extent.capacity % WINDOW == 0 for extent in self._extents)
        size = WINDOW * shape.num_kv_heads * shape.head_size * dtype.itemsize
        by_layer = raw[-1].view(shape.num_layers, -1)[:, :size]
        self._open = [each.view(dtype).view(shape.num_kv_heads, WINDOW, -1) for each in by_layer.unbind()]
        layers = [packed_layers(each.view(shape.num_layers, -1), shape, stored) for each in raw[:-1]]
        self._layers = [
            tuple(WindowedPiece(piece, opened) for piece, opened in zip(of_extent, self._open, strict=True))
            for of_extent in layers
        ]

    def open(self, layer: int) -> Tensor:
        """The plain keys of the window that is not full yet, ``[K, w, H]``."""
        return self._open[layer]

    def up_to(self, layer: int, position: int) -> tuple[list[WindowedPiece], int]:
        """The extents up to that of a position, and where it is in that."""
        return up_to(self._extents, self._layers, layer, position)

    def read(self, layer: int, num_tokens: int, heads: slice, k_KtH: Tensor, v_KtH: Tensor) -> tuple[Tensor, Tensor]:
        """Some heads of the first ``num_tokens`` and of those behind them, ``[K, s, H]``: windows that are full as they
        are unpacked, and the last one plain."""
        found = [each.new_empty(len(each), num_tokens + each.shape[1], each.shape[2]) for each in (k_KtH, v_KtH)]
        k_KsH, v_KsH = found
        first, opened = 0, num_tokens % WINDOW
        for piece, count in pieces_of(self._extents, self._layers, layer, num_tokens):
            codes, scale, minimum = (each[1, heads, :count] for each in piece.packed.parts)
            unpack_parts((codes, scale, minimum), v_KsH[:, first : first + count])
            if windows := count // WINDOW:
                keys_KsH = k_KsH[:, first : first + windows * WINDOW]
                scale_KnH, minimum_KnH = (each[heads, :windows] for each in piece.scales)
                parts = piece.codes_KnwC[heads, :windows], scale_KnH, minimum_KnH
                unpack_columns(parts, keys_KsH.view(len(keys_KsH), windows, WINDOW, -1))
            first += count
        k_KsH[:, num_tokens - opened : num_tokens] = self._open[layer][heads, :opened]
        k_KsH[:, num_tokens:], v_KsH[:, num_tokens:] = k_KtH, v_KtH
        return k_KsH, v_KsH

    def append(self, layer: int, start: int, heads: slice, rows: slice, new: NewKV) -> None:
        """The packed values."""
        assert new.packed is not None
        for layers, here, there in pieces_from(self._extents, self._layers, start, rows.stop - rows.start):
            for place, part in zip(layers[layer].packed.parts, new.packed, strict=True):
                place[1, heads, there] = part[rows][here, 0, heads].transpose(0, 1)

    def pack(self, layer: int, heads: slice, start: int, parts: Parts) -> None:
        """Some heads' keys of the window that begins at position ``start``."""
        pieces, place = self.up_to(layer, start)
        pieces[-1].pack(place // WINDOW, heads, parts)
