"""One extent of KV cache: in memory that compute can address, in host memory across a link, or in a spill file."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.memory.arena import Piece
from engine.memory.lane import Event
from engine.memory.spill import Extent


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtentLayout:
    """Which tokens an extent holds, and how large one layer's are."""

    start: int
    """Position of its first token."""
    capacity: int
    """Tokens it holds."""
    num_layers: int
    num_heads: int
    head_size: int
    item_bytes: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.num_heads * self.head_size * self.item_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer."""
        return self.capacity * self.token_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return self.num_layers * self.layer_bytes


class MemoryExtent:
    """An extent that attention reads as it lies, ``[layer][k|v][head][token][dim]``: a head's keys are contiguous."""

    def __init__(self, layout: ExtentLayout, piece: Piece, dtype: torch.dtype) -> None:
        self.layout = layout
        self._piece = piece
        shape = (layout.num_layers, 2, layout.num_heads, layout.capacity, layout.head_size)
        self._layers = piece.data[: layout.num_bytes].view(dtype).view(shape).unbind()

    def layer(self, layer: int) -> Tensor:
        """One layer as ``[k|v, head, token, dim]``."""
        return self._layers[layer]

    def release(self) -> None:
        """Free the memory."""
        self._piece.release()


@dataclass(slots=True, eq=False)
class HostExtent:
    """An extent in host memory that the device cannot address, ``[layer][token][k|v][head][dim]``.

    Tokens are contiguous, so that what comes is as long as what is there, and what is added is one piece.
    """

    layout: ExtentLayout
    _piece: Piece
    stored: dict[int, Event] = field(default_factory=dict)
    """When the tokens that were added last to each layer are there."""

    def tokens(self, layer: int, first: int, count: int) -> Tensor:
        """The bytes of some tokens in one layer."""
        begin = layer * self.layout.layer_bytes + first * self.layout.token_bytes
        return self._piece.data[begin : begin + count * self.layout.token_bytes]

    def release(self) -> None:
        """Free the memory."""
        self._piece.release()


@dataclass(slots=True, eq=False)
class DiskExtent:
    """An extent in a spill file, laid out as ``HostExtent`` is."""

    layout: ExtentLayout
    _extent: Extent
    stored: dict[int, Event] = field(default_factory=dict)

    def read(self, layer: int, into: Tensor) -> None:
        """Fill host bytes with a layer's first tokens."""
        self._extent.read(layer * self.layout.layer_bytes, into)

    def write(self, layer: int, first: int, data: Tensor) -> None:
        """Write contiguous host bytes of tokens ``first ..``."""
        self._extent.write(layer * self.layout.layer_bytes + first * self.layout.token_bytes, data)

    def release(self) -> None:
        """Free the room."""
        self._extent.release()
