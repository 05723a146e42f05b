"""Keys and values in four bits, a token a row. Implements ``engine.attention.stored.StoredRows``.

Shapes: S tokens, K key/value heads, H head size, G groups of a head, C = H / 2 bytes of its codes, B bytes of a row.
"""

import torch
from torch import Tensor

from engine.attention.int4_sizes import packed_tokens
from engine.formats.int4 import Parts, quantised, unpack_parts
from engine.formats.int4_sizes import Int4

_FLOAT16 = torch.float16.itemsize


class PackedRows:
    """Rows ``uint8 [B]``: all scales, all minima, all codes of a token, so that each begins where it may."""

    is_packed = True

    def __init__(self, num_kv_heads: int, head_size: int, stored: Int4, *, sides: int = 2) -> None:
        """``sides``: keys and values, or one of them."""
        self._group, self._heads = stored.group, (sides, num_kv_heads)
        numbers = sides * num_kv_heads * (head_size // stored.group) * _FLOAT16
        self._ends = numbers, 2 * numbers
        self._bytes = 2 * numbers + sides * num_kv_heads * head_size // 2
        self.row_bytes = self.leaving_bytes = self._bytes
        self._together = {on_cpu: packed_tokens(num_kv_heads, head_size, on_cpu=on_cpu) for on_cpu in (True, False)}

    def view(self, raw: Tensor) -> Tensor:
        """``uint8 [S, B]``."""
        return raw.view(-1, self._bytes)

    def pack(self, kv_S2KH: Tensor) -> Tensor:
        """``uint8 [S, B]``, some tokens at a time."""
        rows_SB = torch.empty(len(kv_S2KH), self._bytes, dtype=torch.uint8, device=kv_S2KH.device)
        together = self._together[kv_S2KH.device.type == "cpu"]
        for first in range(0, len(kv_S2KH), together):
            some = slice(first, first + together)
            parts = quantised(kv_S2KH[some], self._group)
            for place, part in zip(self.parts(rows_SB[some]), parts, strict=True):
                place.copy_(part)
        return rows_SB

    def parts(self, rows_SB: Tensor) -> Parts:
        """Codes ``uint8 [S, k|v, K, C]``, scales and minima ``float16 [S, k|v, K, G]`` in the bytes of rows."""
        first, second = self._ends
        codes, scale, minimum = rows_SB[:, second:], rows_SB[:, :first], rows_SB[:, first:second]
        by_head = len(rows_SB), *self._heads, -1
        return codes.view(by_head), scale.view(torch.float16).view(by_head), minimum.view(torch.float16).view(by_head)

    def new_parts(self, rows: Tensor) -> Parts:
        """Codes, scales and minima in rows that ``rounded`` gave."""
        return self.parts(rows)

    def leaving(self, rows: Tensor, kv_S2KH: Tensor) -> Tensor:
        """The rows."""
        del kv_S2KH
        return rows

    def rounded(self, kv_S2KH: Tensor) -> Tensor:
        """``uint8 [S, B]``."""
        rows_SB = self.pack(kv_S2KH)
        self.unpack(rows_SB, kv_S2KH)
        return rows_SB

    def unpack(self, rows: Tensor, out_S2KH: Tensor) -> None:
        """Into ``out``, which may have gaps between its tokens."""
        unpack_parts(self.parts(rows), out_S2KH)
