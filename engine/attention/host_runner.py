"""Attention where compute is the CPU: layouts and threads as measured for it (decision 0005).

Shapes: T tokens of a micro-batch, N query heads, K key/value heads, H head size.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from engine.attention.blocks import attend_whole
from engine.attention.elsewhere import Elsewhere
from engine.attention.extents import NewKV, SequenceKV
from engine.attention.groups import Group
from engine.attention.int4_decode import packed_decoder
from engine.attention.int4_rows import PackedRows
from engine.attention.int4_sizes import WINDOW
from engine.attention.int4_window_extents import WindowedKV
from engine.attention.int4_window_rows import WindowRows
from engine.attention.int4_windows import attend_window_by_window, window_decoder
from engine.attention.kernels import Decoder, attend, decoder, merge
from engine.attention.pools import KVPools
from engine.attention.rows import Part, Rows
from engine.attention.sharing import Shares, sharing
from engine.attention.workers import one_core
from engine.kvcache.cache import Holding, Move
from engine.kvcache.segments import Kind, MicroBatch
from engine.memory.closing import run_all


@dataclass(frozen=True, slots=True)
class _Work:
    """What a micro-batch attends to, the same in every layer."""

    num_tokens: int
    here: Shares
    """Sequences whose keys compute can read where they lie, and new ones that have no earlier keys."""
    decode_rows: int
    """Rows up to the last segment of one token among these: they come first."""
    single: slice
    """The rows of segments of one token whose keys are fetched."""


class HostRunner:
    """Implements ``engine.attention.attention.Runner``."""

    def __init__(self, num_kv_heads: int, pools: KVPools, elsewhere: Elsewhere) -> None:
        """Both are the runner's to close."""
        self._num_kv_heads = num_kv_heads
        self._rows = pools.rows
        self._views: WeakKeyDictionary[Holding, SequenceKV | WindowedKV] = WeakKeyDictionary()
        self._work: list[_Work] = []
        self._pools = pools
        self._elsewhere = elsewhere
        self._found: deque[Tensor] = deque()
        self._sharing = sharing()

    def begin(self, batches: Sequence[MicroBatch], moves: Sequence[Move]) -> None:
        """Who computes what, once a pass."""
        assert not moves, "a sequence lies in as many extents as it takes"
        self._work = [self._work_of(batch) for batch in batches]
        self._elsewhere.begin(batches)

    def start(self, layer: int, index: int, qkv: Tensor) -> None:
        """Store a micro-batch's keys and values, and attend: compute is done when it returns."""
        work, num_kv_heads = self._work[index], self._num_kv_heads
        num_heads = qkv.shape[1] - 2 * num_kv_heads
        kv_T2KH = qkv[:, num_heads:].view(len(qkv), 2, -1, qkv.shape[2])
        has_windows = isinstance(self._rows, WindowRows)
        stored = self._rows.rounded(kv_T2KH)
        left = self._elsewhere.leaving(index, stored, kv_T2KH)
        if not has_windows:
            self._elsewhere.store(layer, index, left)
        q_TNH, k_TKH, v_TKH = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        if work.num_tokens < out_TNH.shape[0]:
            out_TNH[work.num_tokens :] = 0
        packed = self._rows.new_parts(stored) if isinstance(self._rows, PackedRows) else None
        new = NewKV(k_TKH, v_TKH, packed)
        if packed is None:
            decode = decoder(work.decode_rows, q_TNH, k_TKH, v_TKH, out_TNH)
        else:
            decode = (window_decoder if has_windows else packed_decoder)(work.decode_rows, q_TNH, new, out_TNH)
        rows = Rows(layer, q_TNH, new, out_TNH, decode, has_windows)
        self._sharing.run(rows, work.here)
        if isinstance(self._rows, WindowRows):
            self._attend_windows(rows, self._elsewhere.groups(index), self._rows)
        elif self._elsewhere.groups(index):
            one = work.single
            decode = decoder(one.stop - one.start, q_TNH[one], k_TKH[one], v_TKH[one], out_TNH[one])
            self._attend_elsewhere(rows, self._elsewhere.groups(index), decode, one.start)
        if has_windows:  # a new window's plain keys go where those of the one before are read from
            self._elsewhere.store(layer, index, left)
        self._found.append(out_TNH)

    def finish(self) -> Tensor:
        """What came of it."""
        return self._found.popleft()

    def settle(self) -> None:
        """Wait for what is stored elsewhere."""
        self._elsewhere.settle()

    def close(self) -> None:
        """Free everything."""
        run_all(
            [
                self._elsewhere.close,
                self._sharing.close,
                self._work.clear,
                self._found.clear,
                self._views.clear,
                self._pools.close,
            ]
        )

    def _attend_elsewhere(self, rows: Rows, groups: Sequence[Group], decode: Decoder | None, first_row: int) -> None:
        """Group by group, as they come."""
        before: list[tuple[Tensor, Tensor]] = []
        """What came of a long sequence's parts so far, merged: of many, each would take as much."""
        for group in groups:
            with self._elsewhere.fetched(group) as kv_S2KH:
                for share in group.shares:
                    end = share.at + share.past + (0 if group.is_part else share.length)
                    kv_2KsH = kv_S2KH[share.at : end].permute(1, 2, 0, 3)
                    if decode is not None and share.length == 1 and not group.is_part:
                        with one_core():  # others read what comes next meanwhile
                            decode(share.row - first_row, (kv_2KsH,), share.past)
                        continue
                    q_NtH, k_KtH, v_KtH = rows.at(share.row, share.length)
                    out_NtH = rows.out(share.row, share.length)
                    if not group.is_part:
                        kv_2KsH[0, :, share.past :], kv_2KsH[1, :, share.past :] = k_KtH, v_KtH
                        attend_whole(q_NtH, kv_2KsH[0], kv_2KsH[1], out_NtH)
                        continue
                    before = [merge([*before, attend(q_NtH, kv_2KsH[0], kv_2KsH[1], causal=False)])]
                    if group.is_last:
                        out_NtH.copy_(merge([*before, attend(q_NtH, k_KtH, v_KtH, causal=True)])[0])
                        before = []

    def _attend_windows(self, rows: Rows, groups: Sequence[Group], stored: WindowRows) -> None:
        """The same where keys are packed by windows."""
        before: list[tuple[Tensor, Tensor]] = []
        for group in groups:
            with self._elsewhere.fetched_rows(group) as rows_SB:
                kv_S2KH = self._elsewhere.unpacked(rows_SB)
                for share in group.shares:
                    q_NtH, k_KtH, v_KtH = rows.at(share.row, share.length)
                    if group.is_part:
                        k_KsH, v_KsH = kv_S2KH.permute(1, 2, 0, 3)
                        before = [merge([*before, attend(q_NtH, k_KsH, v_KsH, causal=False)])]
                        continue
                    first, end = share.at + share.past, share.at + share.past + share.length
                    if share.open_at is not None:
                        opened = rows_SB[share.open_at : share.at + share.size]
                        kv_S2KH[first - share.past % WINDOW : first, 0] = stored.opened_in(opened)[
                            : share.past % WINDOW
                        ]
                    kv_S2KH[first:end, 0], kv_S2KH[first:end, 1] = k_KtH.transpose(0, 1), v_KtH.transpose(0, 1)
                    k_KsH, v_KsH = kv_S2KH[share.at : end].permute(1, 2, 0, 3)
                    attend_window_by_window(q_NtH, k_KsH, v_KsH, rows.out(share.row, share.length), before)
                    before = []

    def _work_of(self, batch: MicroBatch) -> _Work:
        here: list[Part] = []
        begin, decode_rows = 0, 0
        single = slice(0, 0)
        for segment in batch.segments:
            end = begin + segment.length
            if segment.kind is Kind.ELSEWHERE:
                if segment.length == 1:
                    single = slice(single.start if single.stop else begin, end)
            else:
                holding = segment.holding if segment.kind is Kind.HERE else None
                kv = None if holding is None else self._kv_of(holding)
                here.append(Part(begin, segment, kv, slice(0, self._num_kv_heads)))
                if segment.length == 1:
                    decode_rows = end
            begin = end
        return _Work(batch.num_tokens, self._sharing.share(here), decode_rows, single)

    def _kv_of(self, holding: Holding) -> SequenceKV | WindowedKV:
        kv = self._views.get(holding)
        if kv is None:
            kv = self._views[holding] = self._pools.by_heads(holding)
        return kv
