"""One extent of KV cache: in memory that compute can address, in host memory across a link, or in a spill file."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.memory.arena import Piece
from engine.memory.ring import HostPlace, Place
from engine.memory.spill import Extent, SpilledPlace


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


class SpilledExtent:
    """An extent in host memory that compute cannot address, or in a spill file: ``[layer][token][k|v][head][dim]``.

    Tokens are contiguous, so that what is fetched is as long as what is there, and what is added is one piece.
    """

    def __init__(self, layout: ExtentLayout, room: Piece | Extent) -> None:
        self.layout = layout
        self._room = room
        size = layout.layer_bytes
        begins = range(0, layout.num_bytes, size)
        self._layers: list[Place] = (
            [HostPlace(room.data[begin : begin + size]) for begin in begins]
            if isinstance(room, Piece)
            else [SpilledPlace(room, begin) for begin in begins]
        )

    def layer(self, layer: int) -> Place:
        """Where one layer lies."""
        return self._layers[layer]

    def release(self) -> None:
        """Free the room."""
        self._room.release()
