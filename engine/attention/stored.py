"""How the keys and values of a token lie in a pool, in a buffer or in a page: as one row, plain or packed.

Shapes: S tokens, K key/value heads, H head size, B bytes of a row.
"""

from typing import Protocol

import torch
from torch import Tensor

from engine.attention.int4_rows import PackedRows
from engine.attention.int4_sizes import has_windows
from engine.attention.int4_window_rows import WindowRows
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import TensorFormat
from engine.shape import ModelShape


class StoredRows(Protocol):
    """One way."""

    is_packed: bool
    """Whether rows must be unpacked before anybody attends to them."""

    leaving_bytes: int
    """What a token takes on its way to where it is kept."""

    def view(self, raw: Tensor) -> Tensor:
        """Rows in bytes of memory, ``uint8 [S * B]``: a view of ``S`` rows."""

    def rounded(self, kv_S2KH: Tensor) -> Tensor:
        """Rows of keys and values, which are rounded in place to what will be read from these rows: so it makes no
        difference who attends to them when. Keys that are packed by windows stay as they are, and are in no row yet."""

    def leaving(self, rows: Tensor, kv_S2KH: Tensor) -> Tensor:
        """What goes to where some tokens are kept: from their rows, and what ``rounded`` has left of them."""

    def unpack(self, rows: Tensor, out_S2KH: Tensor) -> None:
        """The keys and values of rows that are packed."""


class PlainRows:
    """Rows ``[k|v, K, H]``, of the type that is computed with."""

    is_packed = False

    def __init__(self, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
        self._dtype, self._row = dtype, (2, num_kv_heads, head_size)
        self.leaving_bytes = 2 * num_kv_heads * head_size * dtype.itemsize

    def view(self, raw: Tensor) -> Tensor:
        """``[S, k|v, K, H]``."""
        return raw.view(self._dtype).view(-1, *self._row)

    def rounded(self, kv_S2KH: Tensor) -> Tensor:
        """As they are."""
        return kv_S2KH

    def leaving(self, rows: Tensor, kv_S2KH: Tensor) -> Tensor:
        """The rows."""
        del kv_S2KH
        return rows

    def unpack(self, rows: Tensor, out_S2KH: Tensor) -> None:
        """As they are."""
        out_S2KH.copy_(rows)


def rows_of(shape: ModelShape, stored: TensorFormat, dtype: torch.dtype) -> StoredRows:
    """The rows of a format; ``dtype`` is computed with."""
    heads = shape.num_kv_heads, shape.head_size
    if not isinstance(stored, Int4):
        return PlainRows(*heads, dtype)
    return WindowRows(*heads, stored, dtype) if has_windows(shape, stored) else PackedRows(*heads, stored)
