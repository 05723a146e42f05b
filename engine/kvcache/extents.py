"""One extent of KV cache, in memory or in a spill file, laid out ``[layer][k|v][head][token][dim]``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.memory.arena import Piece
from engine.memory.spill import Extent


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtentLayout:
    """Which tokens an extent holds, and where one layer's lie."""

    start: int
    """Position of its first token."""
    capacity: int
    """Tokens it holds."""
    num_layers: int
    num_heads: int
    head_size: int
    item_bytes: int

    @property
    def layer_shape(self) -> tuple[int, int, int, int]:
        """``(k|v, head, token, dim)``."""
        return 2, self.num_heads, self.capacity, self.head_size

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer."""
        return 2 * self.num_heads * self.capacity * self.head_size * self.item_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return self.num_layers * self.layer_bytes


class MemoryExtent:
    """An extent in device or host memory."""

    def __init__(self, layout: ExtentLayout, piece: Piece, dtype: torch.dtype) -> None:
        self.layout = layout
        self._piece = piece
        self._bytes = piece.data[: layout.num_bytes].view(layout.num_layers, layout.layer_bytes)
        self._layers = self._bytes.view(dtype).view(layout.num_layers, *layout.layer_shape)

    def layer_bytes(self, layer: int) -> Tensor:
        """One layer's bytes, contiguous."""
        return self._bytes[layer]

    def layer(self, layer: int) -> Tensor:
        """One layer as ``[k|v, head, token, dim]``."""
        return self._layers[layer]

    def release(self) -> None:
        """Free the memory."""
        self._piece.release()


class DiskExtent:
    """An extent in a spill file."""

    def __init__(self, layout: ExtentLayout, extent: Extent) -> None:
        self.layout = layout
        self._extent = extent

    def read_layer(self, layer: int, into: Tensor) -> None:
        """Fill ``uint8 [layer_bytes]`` on the host with one layer."""
        self._extent.read(layer * self.layout.layer_bytes, into)

    def write_tokens(self, layer: int, first: int, kv_2KtH: Tensor) -> None:
        """Write contiguous host keys and values of tokens ``first ..``: one contiguous piece a head."""
        layout = self.layout
        token_bytes = layout.head_size * layout.item_bytes
        rows = kv_2KtH.contiguous().view(torch.uint8).view(2 * layout.num_heads, -1)
        for head, row in enumerate(rows):
            at = (head * layout.capacity + first) * token_bytes
            self._extent.write(layer * layout.layer_bytes + at, row)

    def release(self) -> None:
        """Free the room."""
        self._extent.release()
