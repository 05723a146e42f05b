"""Keys and values that compute cannot address: fetched in groups ahead of it, and stored behind it.

Shapes: T tokens of a micro-batch, S tokens of a buffer, K key/value heads, H head size.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from engine.attention.groups import Group, Kept, groups_of, kept_of, unwritten
from engine.attention.int4_sizes import packed_windows
from engine.attention.int4_window_pages import WindowPages, WindowWork
from engine.attention.int4_window_rows import WindowRows
from engine.attention.pools import KV, KVPools
from engine.attention.sizes import STORE_BUFFERS, kv_layer_bytes
from engine.formats.sizes import TensorFormat
from engine.kvcache.cache import SequenceRoom
from engine.kvcache.segments import MicroBatch
from engine.memory.closing import run_all, settle
from engine.memory.lane import REACHED, Event, LaneName, ThreadLane
from engine.memory.memory import Memory
from engine.memory.ring import Item, Place, Ring
from engine.memory.tier import Block
from engine.shape import ModelShape
from engine.tiers import TierName


@dataclass(slots=True)
class _Buffer:
    """Host memory for a micro-batch's new keys and values in one layer."""

    block: Block
    left: Event = REACHED
    """They are in their pages."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What a micro-batch needs, the same in every layer."""

    groups: list[Group]
    kept: Kept
    slots: Tensor
    """Where the kept rows go in the host's pool, int64; those that go to the disk go nowhere there."""
    on_host: Tensor
    """The kept rows that go there, int64."""
    unwritten: Tensor
    """Where the host's pool must hold some number all the same, int64: attention there reads whole pages, and what it
    does not attend to counts for nothing only if it is a number."""
    by_windows: WindowWork | None = None
    """Where the rows go instead, if keys are packed by windows: ``slots`` and ``on_host`` have none then."""


class Elsewhere:
    """Owns the buffers and the lanes that fill and empty them."""

    def __init__(
        self,
        shape: ModelShape,
        stored: TensorFormat,
        dtype: torch.dtype,
        memory: Memory,
        pools: KVPools,
        *,
        room: SequenceRoom,
        group_tokens: int,
        unpacked_tokens: int,
        num_slots: int,
        kept_rows: int,
        host_attends: bool,
    ) -> None:
        """Take the buffers.

        Args:
            shape: of the layers.
            stored: the format of keys and values.
            dtype: what is computed with.
            memory: where compute is, and the budgets.
            pools: where keys and values lie.
            room: what a sequence takes.
            group_tokens: of one buffer.
            unpacked_tokens: whose keys and values are unpacked at a time; 0: they are never packed.
            num_slots: how many buffers are filled ahead of compute; 0: nothing lies elsewhere.
            kept_rows: rows of a micro-batch, at most.
            host_attends: decode tokens are attended to where host memory has their keys.

        Raises:
            TierFull: a budget would be exceeded.
        """
        self._shape, self._rows, self._dtype = shape, pools.rows, dtype
        self._token_bytes = kv_layer_bytes(shape, stored)
        self._device, self._traffic, self._pools = memory.device, memory.traffic, pools
        self._group_tokens, self._host_attends, self._room = group_tokens, host_attends, room
        self._by_windows: WindowPages | None = None
        if isinstance(pools.rows, WindowRows):
            self._by_windows = WindowPages(pools, pools.rows, room, packed_windows(shape, on_cpu=True))
        self._work: list[_Work] = []
        self._coming: deque[tuple[Group, Place]] = deque()
        self._stored: list[Event] = [REACHED] * shape.num_layers
        """By layer: when all that was stored so far is in its pages."""
        self._stored_upto = [-1] * shape.num_layers
        """By layer: the last micro-batch of this pass that was stored."""
        self._lane = ThreadLane(LaneName.DISK_WRITE)
        self._buffers: list[_Buffer] = []
        self._unpacked: Block | None = None
        self._ring = Ring(
            memory,
            what=KV,
            slot_bytes=group_tokens * self._token_bytes,
            num_slots=num_slots,
            from_files=pools.has(TierName.DISK),
        )
        try:
            tier = TierName.DEVICE if memory.device.shares_host_memory else TierName.HOST
            for _ in range(STORE_BUFFERS if num_slots else 0):
                self._buffers.append(_Buffer(memory.allocate(tier, kept_rows * pools.rows.leaving_bytes, KV)))
            if unpacked_tokens:
                size = 2 * shape.num_kv_heads * shape.head_size * dtype.itemsize
                self._unpacked = memory.allocate(TierName.DEVICE, unpacked_tokens * size, KV)
        except BaseException:
            self.close()
            raise
        self._next_buffer = cycle(self._buffers)

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """A pass begins: what its micro-batches attend to is fetched from now on."""
        groups = groups_of(batches, self._group_tokens, self._room, host_attends=self._host_attends)
        # Only attention on the host reads whole pages; a page of one token has nothing that nobody wrote.
        page_tokens = self._pools.page_tokens if self._host_attends else 1
        by_windows = self._by_windows
        self._work = [
            _work_of(each, kept_of(batch), page_tokens, None if by_windows is None else by_windows.work_of(batch))
            for each, batch in zip(groups, batches, strict=True)
        ]
        self._stored_upto = [-1] * self._shape.num_layers
        self._ring.begin(self._items())

    def groups(self, index: int) -> Sequence[Group]:
        """What a micro-batch's segments attend to, in order."""
        return self._work[index].groups

    @contextmanager
    def fetched(self, group: Group) -> Iterator[Tensor]:
        """The next group's keys and values, ``[S, k|v, K, H]``, with room for what the pass adds, which is the caller's
        to fill.

        Groups are entered in order, layer by layer.
        """
        with self.fetched_rows(group) as rows:
            yield self.unpacked(rows) if self._rows.is_packed else rows

    @contextmanager
    def fetched_rows(self, group: Group) -> Iterator[Tensor]:
        """The same as it is stored."""
        expected, place = self._coming.popleft()
        assert expected is group
        with self._ring.enter(place) as (_, raw):
            yield self._rows.view(raw[: group.num_tokens * self._token_bytes])

    def unpacked(self, rows: Tensor) -> Tensor:
        """The keys and values of packed rows, ``[S, k|v, K, H]``, in memory that the next call writes to, too."""
        kv_S2KH = self.buffer(len(rows))
        self._rows.unpack(rows, kv_S2KH)
        return kv_S2KH

    def buffer(self, num_tokens: int) -> Tensor:
        """The same memory as it is."""
        assert self._unpacked is not None
        row = 2, self._shape.num_kv_heads, self._shape.head_size
        return self._unpacked.data.view(self._dtype).view(-1, *row)[:num_tokens]

    def leaving(self, index: int, rows: Tensor, kv_T2KH: Tensor) -> Tensor | None:
        """What of a micro-batch is kept elsewhere; ``rows``: see ``StoredRows.rounded``."""
        kept = self._work[index].kept
        some = slice(kept.first_row, kept.first_row + kept.num_rows)
        return self._rows.leaving(rows[some], kv_T2KH[some]) if kept.num_rows else None

    def store(self, layer: int, index: int, rows: Tensor | None) -> None:
        """Keep what a micro-batch adds: see ``leaving``.

        To be called for each micro-batch, in order.
        """
        work = self._work[index]
        kept = work.kept
        if rows is not None:
            buffer = next(self._next_buffer)
            buffer.left.wait()
            if not self._device.shares_host_memory:
                rows = rows.contiguous()  # by compute, in its own memory: a lane copies bytes as they lie
            raw = buffer.block.data[: kept.num_rows * self._rows.leaving_bytes]
            on_host = raw.view(rows.dtype).view(rows.shape)
            copied = self._device.copy(LaneName.DEVICE_TO_HOST, [(on_host, rows)], self._device.compute_mark())
            if not self._device.shares_host_memory:
                self._traffic.follow(LaneName.DEVICE_TO_HOST, copied, raw.numel(), KV)
            buffer.left = self._stored[layer] = self._lane.submit(partial(self._put, layer, work, on_host, copied))
        self._stored_upto[layer] = index

    def stored(self, layer: int) -> Event:
        """When all that was stored of a layer so far is in its pages."""
        return self._stored[layer]

    def settle(self) -> None:
        """Wait until all that was stored is where it is kept."""
        for event in self._stored:
            settle(event)
        self._ring.settle()

    def close(self) -> None:
        """Stop the lanes and free the buffers. What is not kept yet is lost."""
        run_all(
            [
                self._lane.close,
                self._ring.close,
                self._work.clear,
                self._coming.clear,
                *(buffer.block.release for buffer in self._buffers),
                *([self._unpacked.release] if self._unpacked is not None else []),
            ]
        )

    def _items(self) -> Iterator[Item]:
        self._coming.clear()
        for layer in range(self._shape.num_layers):
            for work in self._work:
                for group in work.groups:
                    place, num_bytes = self._pools.scattered(group, layer)
                    self._coming.append((group, place))
                    yield Item(KV, place, num_bytes, after=partial(self._stored_after, layer, group.follows))

    def _stored_after(self, layer: int, follows: int) -> Event | None:
        return self._stored[layer] if self._stored_upto[layer] >= follows else None

    def _put(self, layer: int, work: _Work, rows: Tensor, copied: Event) -> None:
        """On the lane: into the pages."""
        copied.wait()
        if work.by_windows is not None:
            assert self._by_windows is not None
            if len(work.unwritten):
                self._pools.layers(TierName.HOST)[layer].index_fill_(0, work.unwritten, 0)
            self._by_windows.put(layer, work.by_windows, rows)
            if work.by_windows.on_disk:
                with self._traffic.moving(LaneName.DISK_WRITE, work.by_windows.disk_tokens * self._token_bytes, KV):
                    self._by_windows.write(layer, work.by_windows, rows)
            return
        if len(work.slots):
            some = rows if len(work.slots) == len(rows) else rows[work.on_host]
            put(self._pools.layers(TierName.HOST)[layer], work.slots, some, work.unwritten)
        on_disk = [run for tier, run in work.kept.runs if tier is TierName.DISK]
        if on_disk:
            num_bytes = sum(run.num_tokens for run in on_disk) * self._token_bytes
            with self._traffic.moving(LaneName.DISK_WRITE, num_bytes, KV):
                self._pools.write(layer, on_disk, rows)


def put(pool: Tensor, slots: Tensor, rows: Tensor, unwritten: Tensor) -> None:
    """Rows into host memory, each to its slot; zeros to those that nobody writes yet."""
    pool.index_copy_(0, slots, rows)
    if len(unwritten):
        pool.index_fill_(0, unwritten, 0)


def _work_of(groups: list[Group], kept: Kept, page_tokens: int, by_windows: WindowWork | None) -> _Work:
    on_host = [run for tier, run in kept.runs if tier is TierName.HOST]
    by_rows = on_host if by_windows is None else []
    slots = [slot for run in by_rows for slot in range(run.offset, run.offset + run.num_tokens)]
    rows = [row for run in by_rows for row in range(run.at, run.at + run.num_tokens)]
    blank = list(unwritten(on_host, page_tokens))
    to, of, zeros = (torch.tensor(each, dtype=torch.int64) for each in (slots, rows, blank))
    return _Work(groups, kept, to, of, zeros, by_windows)
