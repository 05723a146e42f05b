"""Attention on the host beside a device: decode tokens whose keys and values lie in host memory (FlexGen, section 4.1).

Queries come down, results go up, and keys stay where they are. One thread does it, with all cores, while the device
computes another micro-batch.

Shapes: R rows, N query heads, H head size.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.attention.groups import open_from, runs_of
from engine.attention.pages import PageTable, attend_pages, page_table
from engine.attention.pools import KV, KVPools
from engine.attention.sizes import (
    HOST_SLOTS,
    host_attention_bytes,
    host_block_bytes,
    host_block_pages,
    host_temporary_bytes,
)
from engine.dtypes import DType
from engine.formats.sizes import TensorFormat
from engine.kvcache.cache import SequenceRoom
from engine.kvcache.segments import MicroBatch
from engine.memory.closing import run_all
from engine.memory.lane import REACHED, Event, LaneEvent, LaneName, ThreadLane
from engine.memory.memory import Memory
from engine.memory.tensors import torch_dtype
from engine.shape import ModelShape
from engine.tiers import TierName


@dataclass(slots=True)
class _Slot:
    """Pinned memory for the queries of a micro-batch, and for its results."""

    queries: Tensor
    results: Tensor
    up: Event = REACHED
    """The results are on the device."""


@dataclass(frozen=True, slots=True)
class Attended:
    """Rows of a micro-batch that are attended to on the host, the same in every layer."""

    rows: slice
    table: PageTable


class HostAttention:
    """Owns the lane and its memory."""

    def __init__(
        self,
        shape: ModelShape,
        stored: TensorFormat,
        dtype: DType,
        memory: Memory,
        pools: KVPools,
        *,
        page_tokens: int,
        most_rows: int,
        room: SequenceRoom,
    ) -> None:
        """Take the memory.

        Args:
            shape: of the layers.
            stored: the format of keys and values.
            dtype: of queries and results.
            memory: where compute is, and the budgets.
            pools: where keys and values lie.
            page_tokens: of a page.
            most_rows: of a micro-batch, at most.
            room: what a sequence takes.

        Raises:
            TierFull: a budget would be exceeded.
        """
        self._device, self._traffic, self._pools = memory.device, memory.traffic, pools
        self._page_tokens, self._room = page_tokens, room
        self._under_way: deque[tuple[LaneEvent, _Slot]] = deque()
        self._lane = ThreadLane(LaneName.HOST_COMPUTE)
        pages = len(pools.layers(TierName.HOST)[0]) // page_tokens
        self._block_pages = host_block_pages(shape, pages, page_tokens)
        self._block = memory.allocate(
            TierName.HOST, host_attention_bytes(shape, stored, dtype, most_rows, pages, page_tokens), KV
        )
        temporary, host = host_temporary_bytes(shape, stored, pages, page_tokens), memory.tiers[TierName.HOST]
        try:
            host.take(temporary, KV)
        except BaseException:
            self._block.release()
            raise
        self._give = partial(host.give, temporary, KV)
        kind = torch_dtype(dtype)
        size = most_rows * shape.num_heads * shape.head_size
        raw = self._block.data
        end = HOST_SLOTS * 2 * size * dtype.num_bytes
        values = raw[:end].view(kind).view(HOST_SLOTS, 2, most_rows, shape.num_heads, shape.head_size)
        self._slots = [_Slot(queries, results) for queries, results in values]
        staged_end = end + host_block_bytes(shape, stored, pages, page_tokens)
        self._staged = raw[end:staged_end]
        self._work = raw[staged_end:].view(torch.float32)
        self._next = 0

    def attended(self, batch: MicroBatch) -> Attended | None:
        """What of a micro-batch is attended to on the host: decode tokens of sequences that lie there."""
        row, first, end = 0, 0, 0
        pages: list[list[int]] = []
        counts: list[int] = []
        opened: list[list[int]] = []
        for segment in batch.segments:
            if segment.can_attend_on_host:
                assert segment.holding is not None
                first, end = (row if not pages else first), row + segment.length
                pages.append(
                    [
                        page
                        for extent in segment.holding.extents
                        for page in range(
                            extent.offset // self._page_tokens, (extent.offset + extent.capacity) // self._page_tokens
                        )
                    ]
                )
                counts.append(segment.start + 1)
                if self._room.beside:
                    first_open = open_from(segment, self._room)
                    runs = runs_of(segment.holding.extents, first_open, self._room.beside, 0)
                    opened.append([row for run in runs for row in range(run.offset, run.offset + run.num_tokens)])
            row += segment.length
        if not pages:
            return None
        return Attended(slice(first, end), page_table(pages, counts, self._page_tokens, self._block_pages, opened))

    def start(self, layer: int, attended: Attended, q_RNH: Tensor, out_RNH: Tensor, stored: Event) -> None:
        """Begin with some rows; ``stored``: when the keys that the pass adds are in their pages.

        Each is finished before the next but one is started.
        """
        slot = self._slots[self._next % HOST_SLOTS]
        self._next += 1
        queries, results = slot.queries[: len(q_RNH)], slot.results[: len(q_RNH)]
        copied = self._device.copy(
            LaneName.DEVICE_TO_HOST, [(queries, q_RNH.contiguous())], self._device.compute_mark()
        )
        self._traffic.follow(LaneName.DEVICE_TO_HOST, copied, queries.numel() * queries.element_size(), KV)
        needed = copied, stored
        work = partial(self._attend, layer, attended.table, slot, queries, results, out_RNH, needed)
        self._under_way.append((self._lane.submit(work), slot))

    def finish(self) -> None:
        """Compute from here on sees the results of what was started first."""
        done, slot = self._under_way.popleft()
        with self._traffic.waiting():
            done.wait()
            self._device.compute_after(slot.up)

    def close(self) -> None:
        """End the lane."""
        run_all([self._lane.close, self._under_way.clear, self._give, self._block.release])

    def _attend(
        self,
        layer: int,
        table: PageTable,
        slot: _Slot,
        queries: Tensor,
        results: Tensor,
        out_RNH: Tensor,
        needed: Sequence[Event],
    ) -> None:
        """On the lane."""
        for event in (*needed, slot.up):
            event.wait()
        with torch.inference_mode():
            pool = self._pools.layers(TierName.HOST)[layer]
            with self._traffic.moving(LaneName.HOST_COMPUTE, 0, KV):
                attend_pages(queries, pool, self._pools.rows, table, self._staged, self._work, results)
            # The queries were computed after whatever else this memory was used for.
            slot.up = self._device.copy(LaneName.HOST_TO_DEVICE, [(out_RNH, results)], REACHED)
        self._traffic.follow(LaneName.HOST_TO_DEVICE, slot.up, results.numel() * results.element_size(), KV)
