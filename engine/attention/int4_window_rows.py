"""Rows of keys that are packed by windows, and of values, in a pool. Implements ``engine.attention.stored.StoredRows``.

A row is as long as one of ``int4_rows``, and holds the same of a value. Of a key it holds the codes; the scales and
minima of a window's channels are dealt out over the rows of its tokens. A window that is not full yet lies plain in
rows of its own, ``SequenceRoom.beside`` of them, its keys one after the other.

Shapes: S rows or tokens, B bytes of a row, n windows, w tokens of one, K key/value heads, H head size, G groups of a
head, C = H / 2 bytes of its codes.
"""

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.attention.int4_rows import PackedRows
from engine.attention.int4_sizes import WINDOW
from engine.formats.int4 import Parts, quantised_columns, unpack_columns, unpack_parts
from engine.formats.int4_sizes import Int4


class WindowRows(PackedRows):
    """Rows ``uint8 [B]``. New keys and values travel as a plain key and a packed value: ``leaving``."""

    def __init__(self, num_kv_heads: int, head_size: int, stored: Int4, dtype: torch.dtype) -> None:
        """``dtype``: what is computed with."""
        super().__init__(num_kv_heads, head_size, stored)
        self._values = PackedRows(num_kv_heads, head_size, stored, sides=1)
        self._key = num_kv_heads, head_size
        self._dtype = dtype
        key_bytes = num_kv_heads * head_size * dtype.itemsize
        # Plain keys are no whole number of rows: they are written in pieces, of which both are.
        unit_bytes = gcd(self._bytes, key_bytes)
        self._unit = unit_bytes // dtype.itemsize
        self.units_of_row, self.units_of_key = self._bytes // unit_bytes, key_bytes // unit_bytes
        self.leaving_bytes = key_bytes + self._values.leaving_bytes

    def rounded(self, kv_S2KH: Tensor) -> Tensor:
        """Rows of values alone, ``uint8``; keys stay as they are."""
        return self._values.rounded(kv_S2KH[:, 1:])

    def new_parts(self, rows: Tensor) -> Parts:
        """Codes ``uint8 [S, 1, K, C]``, scales and minima ``float16 [S, 1, K, G]`` in rows that ``rounded`` gave."""
        return self._values.parts(rows)

    def leaving(self, rows: Tensor, kv_S2KH: Tensor) -> Tensor:
        """Plain keys, and rows of values behind them, ``uint8``."""
        return torch.cat((kv_S2KH[:, 0].flatten(1).view(torch.uint8), rows), 1)

    def arrived(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """The two of ``leaving``: keys ``[S, K, H]``, rows of values."""
        end = left.shape[1] - self._values.leaving_bytes
        return left[:, :end].reshape(-1).view(self._dtype).view(-1, *self._key), left[:, end:]

    def unpack(self, rows_SB: Tensor, out_S2KH: Tensor) -> None:
        """Whole windows, all of them full."""
        codes, scale, minimum = self.parts(rows_SB)
        unpack_parts((codes[:, 1], scale[:, 1], minimum[:, 1]), out_S2KH[:, 1])
        by_window = windows_of(codes).transpose(1, 2)
        parts = by_window, self._of_channels(scale[:, 0]), self._of_channels(minimum[:, 0])
        unpack_columns(parts, windows_of(out_S2KH).transpose(1, 2))

    def round_windows(self, k_nwKH: Tensor) -> None:
        """Full windows of plain keys, in place, to what they will be read as."""
        by_head = k_nwKH.transpose(1, 2)
        unpack_columns(quantised_columns(by_head), by_head)

    def put_values(self, pool_SB: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Packed values into the rows of their tokens."""
        for place, part in zip(self.parts(pool_SB), self._values.parts(rows), strict=True):
            place[:, 1].index_copy_(0, slots, part[:, 0])

    def put_windows(self, pool_SB: Tensor, slots: Tensor, parts: Parts) -> None:
        """Packed keys ``[n, K, w, ...]`` into the rows of their windows, of which ``slots`` has every one."""
        codes_nKwC, scale_nKH, minimum_nKH = parts
        places = [place[:, 0] for place in self.parts(pool_SB)]
        places[0].index_copy_(0, slots, codes_nKwC.transpose(1, 2).flatten(0, 1))
        for place_SKG, each in zip(places[1:], (scale_nKH, minimum_nKH), strict=True):
            place_SKG.index_copy_(0, slots, self._of_tokens(each, place_SKG.shape[2]))

    def opened(self, pool_SB: Tensor, rows: Tensor) -> Tensor:
        """Windows of plain keys, ``[n, w, K, H]``: ``rows`` has those of each, int64 ``[n, beside]``."""
        raw = pool_SB.index_select(0, rows.flatten()).view(len(rows), -1)
        size = WINDOW * self._key[0] * self._key[1] * self._dtype.itemsize
        return raw[:, :size].reshape(-1).view(self._dtype).view(-1, WINDOW, *self._key)

    def opened_in(self, rows_SB: Tensor) -> Tensor:
        """The plain keys of one window, ``[w, K, H]``, from its rows and any behind them."""
        size = WINDOW * self._key[0] * self._key[1] * self._dtype.itemsize
        return rows_SB.flatten()[:size].view(self._dtype).view(WINDOW, *self._key)

    def put_open(self, pool_SB: Tensor, units: Tensor, k_SKH: Tensor) -> None:
        """Plain keys to where they lie, ``units_of_key`` numbers each."""
        self.units(pool_SB).index_copy_(0, units, k_SKH.reshape(-1, self._unit))

    def units(self, pool_SB: Tensor) -> Tensor:
        """A pool in the pieces that plain keys are written in."""
        return pool_SB.view(-1).view(self._dtype).view(-1, self._unit)

    def _of_channels(self, numbers_SKG: Tensor) -> Tensor:
        """A window's numbers, from the rows of its tokens: ``[n, K, H]``."""
        num_kv_heads, head_size = self._key
        by_window = numbers_SKG.reshape(-1, WINDOW, *numbers_SKG.shape[1:]).transpose(1, 2)
        return by_window.reshape(len(by_window), num_kv_heads, -1)[..., :head_size]

    def _of_tokens(self, numbers_nKH: Tensor, groups: int) -> Tensor:
        """The other way, ``[n w, K, G]``; what is left over in the rows is zero."""
        number, num_kv_heads, head_size = numbers_nKH.shape
        whole = pad(numbers_nKH, (0, WINDOW * groups - head_size))
        return whole.view(number, num_kv_heads, WINDOW, groups).transpose(1, 2).flatten(0, 1)


def windows_of(kv_S2KH: Tensor) -> Tensor:
    """The keys of a buffer, or their codes, by windows, ``[n, w, K, H]``; a view."""
    keys_SKH = kv_S2KH[:, 0]
    return keys_SKH.view(-1, WINDOW, *keys_SKH.shape[1:])
