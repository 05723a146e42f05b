"""Where keys and values lie: one block of each tier, in which every extent of the cache has its place."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.extents import PlainKV, SequenceKV
from engine.attention.groups import Group, Run
from engine.attention.int4_extents import PackedKV
from engine.attention.int4_sizes import has_windows
from engine.attention.int4_window_extents import WindowedKV
from engine.attention.sizes import kv_bytes_per_token, kv_layer_bytes
from engine.attention.stored import rows_of
from engine.errors import EngineError
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import TensorFormat
from engine.kvcache.cache import Extent, Holding, Move
from engine.memory.closing import run_all
from engine.memory.lane import REACHED, Event
from engine.memory.memory import Memory
from engine.memory.ring import Place, Scattered
from engine.memory.spill import SpillRange
from engine.memory.tier import Block
from engine.shape import ModelShape
from engine.tiers import TierName
from engine.units import MIB

KV = "KV cache"
_MOVED_BYTES = 16 * MIB
"""How much of the keys and values is moved within a layer's pool at once, through the workspace."""


@dataclass(slots=True, eq=False)
class _OnDisk:
    """A group's keys and values of one layer in the spill file, for a ``Ring``: read into the buffer, never written."""

    pools: "KVPools"
    layer: int
    runs: tuple[Run, ...]
    stored: Event = REACHED

    def read(self, into: Tensor) -> int:
        """Fill the buffer, but for the room of tokens that the pass adds."""
        return self.pools.read(self.layer, self.runs, into)

    def write(self, offset: int, data: Tensor) -> None:
        """Never."""
        raise EngineError("what a pass adds is stored by itself")


class KVPools:
    """Owns the memory of all keys and values; closes it.

    In memory where compute is the CPU, each extent is by itself, a head's keys one after another. Else a tier's room is
    one pool a layer, of a row for each token. In the spill file a page has all its layers, one after another, so that
    the file grows with the pages that are used.
    """

    def __init__(
        self,
        shape: ModelShape,
        stored: TensorFormat,
        dtype: torch.dtype,
        tokens: Mapping[TierName, int],
        page_tokens: int,
        memory: Memory,
    ) -> None:
        """Take room for as many ``tokens`` of each tier; that on disk is claimed from the file system by ``claim``.

        ``stored``: the format of a head's vector; ``dtype``: what is computed with.

        Raises:
            TierFull: a budget would be exceeded.
        """
        self._shape, self._stored, self._dtype = shape, stored, dtype
        self.rows = rows_of(shape, stored, dtype)
        self.page_tokens = page_tokens
        self._layer_bytes = kv_layer_bytes(shape, stored)
        self._token_bytes = kv_bytes_per_token(shape, stored)
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

    def has(self, tier: TierName) -> bool:
        """Whether there is any room in a tier."""
        return tier in self._blocks or (tier is TierName.DISK and self._spilled is not None)

    def claim(self, tier: TierName, end: int) -> None:
        """Make sure that the first ``end`` tokens of a tier can be stored.

        Raises:
            DiskFull: the file system has no room.
        """
        if tier is TierName.DISK and self._spilled is not None:
            self._spilled.claim(end * self._token_bytes)

    def by_heads(self, holding: Holding) -> SequenceKV | WindowedKV:
        """The keys and values of one sequence where compute is the CPU, uninitialised at first."""
        raw = [self._extent(holding.tier, extent) for extent in holding.extents]
        if isinstance(self._stored, Int4) and has_windows(self._shape, self._stored):
            return WindowedKV(holding.extents, raw, self._shape, self._stored, self._dtype)
        if isinstance(self._stored, Int4):
            return PackedKV(holding.extents, raw, self._shape, self._stored, self._dtype)
        return PlainKV(holding.extents, raw, self._shape, self._dtype)

    def layers(self, tier: TierName) -> tuple[Tensor, ...]:
        """A tier's pools, layer by layer; nothing where it has no room."""
        if tier not in self._blocks:
            return ()
        return tuple(map(self.rows.view, self._blocks[tier].data.view(self._shape.num_layers, -1).unbind()))

    def move(self, move: Move) -> None:
        """Towards the beginning of the device's pools, piece by piece, since both places may overlap."""
        for pool in self.layers(TierName.DEVICE):
            step = max(1, _MOVED_BYTES // pool[0].nbytes)
            for first in range(0, move.num_tokens, step):
                count = min(step, move.num_tokens - first)
                piece = pool[move.source + first : move.source + first + count].clone()
                pool[move.destination + first : move.destination + first + count] = piece

    def scattered(self, group: Group, layer: int) -> tuple[Place, int]:
        """A group's keys and values of one layer, for an item of a ``Ring``, and how many bytes these are."""
        runs = tuple(run for share in group.shares for run in share.runs)
        size = self._layer_bytes
        if group.tier is TierName.DISK:
            return _OnDisk(self, layer, runs), max(run.at + run.num_tokens for run in runs) * size
        pool = self._blocks[group.tier].data.view(self._shape.num_layers, -1)[layer]
        pieces = [(run.at * size, pool[run.offset * size : (run.offset + run.num_tokens) * size]) for run in runs]
        return Scattered(pieces), sum(piece.numel() for _, piece in pieces)

    def read(self, layer: int, runs: Iterable[Run], into: Tensor) -> int:
        """From the spill file into a buffer; how many bytes."""
        count = 0
        for begin, rows in self._on_disk(layer, runs):
            self._disk.read(begin, into[rows])
            count += rows.stop - rows.start
        return count

    def write(self, layer: int, runs: Iterable[Run], rows: Tensor) -> None:
        """Into the spill file; ``rows``: contiguous."""
        raw = rows.view(torch.uint8).view(-1)
        for begin, its in self._on_disk(layer, runs):
            self._disk.write(begin, raw[its])

    def close(self) -> None:
        """Give the memory back."""
        spilled = [self._spilled.release] if self._spilled is not None else []
        run_all([*(block.release for block in self._blocks.values()), *spilled])

    def _on_disk(self, layer: int, runs: Iterable[Run]) -> Iterator[tuple[int, slice]]:
        """Where in the spill range each piece of a page is, and which bytes of a buffer it is."""
        for run in runs:
            offset, at, left = run.offset, run.at, run.num_tokens
            while left:
                page, within = divmod(offset, self.page_tokens)
                count = min(left, self.page_tokens - within)
                begin = page * self.page_tokens * self._token_bytes
                begin += (layer * self.page_tokens + within) * self._layer_bytes
                yield begin, slice(at * self._layer_bytes, (at + count) * self._layer_bytes)
                offset, at, left = offset + count, at + count, left - count

    @property
    def _disk(self) -> SpillRange:
        assert self._spilled is not None
        return self._spilled

    def _extent(self, tier: TierName, extent: Extent) -> Tensor:
        begin = extent.offset * self._token_bytes
        return self._blocks[tier].data[begin : begin + extent.capacity * self._token_bytes]
