"""Where keys and values lie: one block of each tier, in which every extent of the cache has its place.

Shapes: K key/value heads, t tokens of a segment, s key tokens, c tokens of an extent, H head size.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from engine.attention.sizes import kv_bytes_per_token, kv_layer_bytes
from engine.formats.sizes import Plain
from engine.kvcache.cache import Extent, Holding
from engine.memory.closing import run_all
from engine.memory.memory import Memory
from engine.memory.ring import HostPlace, Place
from engine.memory.spill import SpillRange
from engine.memory.tensors import torch_dtype
from engine.memory.tier import Block
from engine.shape import ModelShape
from engine.tiers import TierName

KV = "KV cache"


class MemoryKV:
    """One sequence's keys and values where compute can address them, ``[k|v, K, c, H]`` a layer of an extent.

    A head's keys are contiguous.
    """

    def __init__(self, extents: tuple[Extent, ...], layers: list[tuple[Tensor, ...]]) -> None:
        self._extents = extents
        self._layers = layers

    def only_extent(self, position: int) -> tuple[Tensor, ...] | None:
        """The layers of the first extent, if the tokens up to ``position`` all lie in it."""
        return self._layers[0] if position < self._extents[0].capacity else None

    def read(self, layer: int, num_tokens: int, heads: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of the first ``num_tokens``, ``[K, s, H]`` each, one pair an extent."""
        for extent, layers in zip(self._extents, self._layers, strict=True):
            count = min(num_tokens - extent.start, extent.capacity)
            if count <= 0:
                break
            yield layers[layer][0, heads, :count], layers[layer][1, heads, :count]

    def append(self, layer: int, start: int, heads: slice, k_KtH: Tensor, v_KtH: Tensor) -> None:
        """Store some heads of the tokens from position ``start`` on."""
        end = start + k_KtH.shape[1]
        for extent, layers in zip(self._extents, self._layers, strict=True):
            first, last = max(start, extent.start), min(end, extent.start + extent.capacity)
            if first < last:
                here, there = slice(first - start, last - start), slice(first - extent.start, last - extent.start)
                layers[layer][0, heads, there] = k_KtH[:, here]
                layers[layer][1, heads, there] = v_KtH[:, here]


class FetchedKV:
    """One sequence's keys and values elsewhere, ``[token][k|v][head][dim]`` in each layer of an extent.

    Tokens are contiguous, so that what is fetched is as long as what is there, and what is added is one piece.
    """

    def __init__(self, extents: tuple[Extent, ...], places: list[list[Place]]) -> None:
        self.extents = extents
        self.places = places
        """For each extent, one place a layer."""


class KVPools:
    """Owns the memory of all keys and values; closes it."""

    def __init__(self, shape: ModelShape, stored: Plain, tokens: Mapping[TierName, int], memory: Memory) -> None:
        """Take room for as many ``tokens`` of each tier; that on disk is claimed from the file system by ``claim``.

        Raises:
            TierFull: a budget would be exceeded.
        """
        self._shape = shape
        self._stored = stored
        self._token_bytes = kv_bytes_per_token(shape, stored)
        self._memory = memory
        self._blocks: dict[TierName, Block] = {}
        sizes = {tier: count * self._token_bytes for tier, count in tokens.items() if count}
        self._spilled: SpillRange | None = None
        try:
            if TierName.DISK in sizes:
                self._spilled = memory.disk.reserve(sizes.pop(TierName.DISK), KV)
            for tier, size in sizes.items():
                self._blocks[tier] = memory.allocate(tier, size, KV)
        except BaseException:
            self.close()
            raise

    def claim(self, tier: TierName, end: int) -> None:
        """Make sure that the first ``end`` tokens of a tier can be stored.

        Raises:
            DiskFull: the file system has no room.
        """
        if tier is TierName.DISK and self._spilled is not None:
            self._spilled.claim(end * self._token_bytes)

    def of(self, holding: Holding) -> MemoryKV | FetchedKV:
        """The keys and values of one sequence, uninitialised at first."""
        if self._memory.is_addressable(holding.tier):
            return MemoryKV(holding.extents, [self._layers(holding.tier, extent) for extent in holding.extents])
        return FetchedKV(holding.extents, [self._places(holding.tier, extent) for extent in holding.extents])

    def close(self) -> None:
        """Give the memory back."""
        spilled = [self._spilled.release] if self._spilled is not None else []
        run_all([*(block.release for block in self._blocks.values()), *spilled])

    def _layers(self, tier: TierName, extent: Extent) -> tuple[Tensor, ...]:
        shape = self._shape
        begin = extent.offset * self._token_bytes
        raw = self._blocks[tier].data[begin : begin + extent.capacity * self._token_bytes]
        sizes = (shape.num_layers, 2, shape.num_kv_heads, extent.capacity, shape.head_size)
        return raw.view(torch_dtype(self._stored.dtype)).view(sizes).unbind()

    def _places(self, tier: TierName, extent: Extent) -> list[Place]:
        size = kv_layer_bytes(self._shape, self._stored, extent.capacity)
        first = extent.offset * self._token_bytes
        begins = [first + layer * size for layer in range(self._shape.num_layers)]
        if self._spilled is not None and tier is TierName.DISK:
            return [self._spilled.place(begin) for begin in begins]
        return [HostPlace(self._blocks[tier].data[begin : begin + size]) for begin in begins]
