"""The KV cache: each sequence's keys and values as extents in one tier.

A sequence reserves its maximum at admission and frees it at its end. Where the extent is in memory that compute can
address, attention reads it as it lies; else it passes, one extent of one layer at a time, through a ``Ring``.

Shapes: T tokens of a micro-batch, t of one segment, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from engine.errors import DiskFull, EngineError, TierFull
from engine.kvcache.extents import ExtentLayout, MemoryExtent, SpilledExtent
from engine.kvcache.segments import MicroBatch, Segment
from engine.kvcache.sizes import kv_bytes_per_token, kv_slot_bytes
from engine.kvcache.workers import AttentionWorkers, one_core
from engine.memory.arena import Arena
from engine.memory.closing import run_all
from engine.memory.device import Device
from engine.memory.ring import Item, Ring
from engine.memory.spill import DiskTier
from engine.memory.tensors import torch_dtype
from engine.memory.tier import MemoryTier
from engine.memory.traffic import Traffic
from engine.model.attention import attend, attend_decode, attend_decode_by_flash, flash_decodes, merge
from engine.planner.plan import Plan
from engine.sequence import Sequence
from engine.shape import ModelShape
from engine.tiers import TierName

KV = "KV cache"


class SequenceKV:
    """One sequence's extents, in order of position: some in memory that compute can address, or some elsewhere."""

    def __init__(self, tier: TierName, num_bytes: int) -> None:
        self.tier = tier
        self.num_bytes = num_bytes
        self.extents: list[MemoryExtent] = []
        self.spilled: list[SpilledExtent] = []

    def release(self) -> None:
        """Free the extents."""
        for extent in self.extents:
            extent.release()
        for spilled in self.spilled:
            spilled.release()


@dataclass(frozen=True, slots=True)
class _Part:
    """What one core attends to at a time: a segment, or some of its heads."""

    begin: int
    """The segment's first row."""
    segment: Segment
    kv_heads: slice

    @property
    def cost(self) -> int:
        """In proportion to the time it takes: reading the keys costs as much as computing with a few dozen queries."""
        queries = self.segment.length + 32
        num_heads: int = self.kv_heads.stop - self.kv_heads.start
        return queries * (self.segment.start + self.segment.length) * num_heads


class KVStore:
    """Owns every sequence's keys and values; implements ``engine.schedule.scheduler.KVReservations``."""

    def __init__(
        self,
        plan: Plan,
        shape: ModelShape,
        device: Device,
        tiers: Mapping[TierName, MemoryTier],
        disk: DiskTier,
        traffic: Traffic,
    ) -> None:
        self._shape = shape
        self._device = device
        self._disk = disk
        self._traffic = traffic
        self._dtype = torch_dtype(plan.dtype)
        self._pools = plan.kv_bytes
        self._fills_together = plan.kv_fills_together
        self._arenas = {
            tier: Arena(tiers[tier], pool, KV) for tier, pool in self._pools.items() if pool and tier in tiers
        }
        self._used = dict.fromkeys(TierName, 0)
        self._extent_tokens = plan.extent_tokens
        self._token_bytes = kv_bytes_per_token(shape, plan.dtype)
        self._addressable = {TierName.DEVICE} | ({TierName.HOST} if device.shares_host_memory else set())
        self._sequences: dict[Sequence, SequenceKV] = {}
        self._workers: AttentionWorkers | None = None
        if device.shares_host_memory and torch.get_num_threads() > 1:
            self._workers = AttentionWorkers(torch.get_num_threads())
        self._ring: Ring | None = None
        if plan.kv_slots:
            self._ring = Ring(
                device,
                tiers,
                traffic,
                what=KV,
                slot_bytes=kv_slot_bytes(shape, plan.dtype, plan.extent_tokens),
                num_slots=plan.kv_slots,
                from_files=plan.kv_bytes[TierName.DISK] > 0,
            )

    @property
    def largest_sequence(self) -> int:
        """Tokens of the longest sequence that an empty cache can hold."""
        return max(self._pools.values()) // self._token_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that are reserved for sequences."""
        return sum(self._used.values())

    def check_integrity(self) -> None:
        """Raise ``EngineError`` unless what is reserved is what the sequences and the arenas hold."""
        for tier, used in self._used.items():
            of_sequences = sum(held.num_bytes for held in self._sequences.values() if held.tier is tier)
            of_arena = self._arenas[tier].held_bytes if tier in self._arenas else used
            if not used == of_sequences == of_arena:
                raise EngineError(f"{tier}: KV cache of {used} bytes, sequences {of_sequences}, arena {of_arena}")

    @property
    def free_tokens(self) -> int:
        """Tokens for which no room is reserved, in all tiers together."""
        return sum(self._pools.values()) // self._token_bytes - sum(self._used.values()) // self._token_bytes

    def admit(self, sequence: Sequence) -> bool:
        """Reserve room until the sequence's end, as near to compute as there is room.

        Where shares of the cache were asked for, in the tier that is furthest below its share.

        Raises:
            DiskFull: the spill file cannot grow although its budget would allow it, and no sequence holds any room.
        """
        num_bytes = sequence.num_kv_tokens * self._token_bytes
        pools = self._pools
        candidates = [tier for tier in TierName if pools[tier] and self._used[tier] + num_bytes <= pools[tier]]
        if self._fills_together:
            candidates.sort(key=lambda tier: self._used[tier] / self._pools[tier])
        for tier in candidates:
            held = SequenceKV(tier, num_bytes)
            self._sequences[sequence] = held
            self._used[tier] += num_bytes
            try:
                for layout in self._layouts(sequence.num_kv_tokens):
                    self._extend(held, layout)
            except TierFull:
                self.release(sequence)
            except DiskFull:
                self.release(sequence)
                if not self._sequences:  # else: when a running sequence ends, its part of the spill file is free
                    raise
            except BaseException:
                self.release(sequence)
                raise
            else:
                return True
        return False

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's extents, if it has any."""
        held = self._sequences.pop(sequence, None)
        if held is not None:
            self._used[held.tier] -= held.num_bytes
            held.release()

    def begin(self, batches: SequenceOf[MicroBatch]) -> None:
        """A pass over all layers begins, with these micro-batches in each: what lies elsewhere is brought ahead."""
        if self._ring is not None:
            spilled = [segment for batch in batches for segment in batch.segments if self._is_spilled(segment)]
            self._ring.begin(self._visits(spilled))

    def settle(self) -> None:
        """After a pass: wait until everything that it added is where it is kept."""
        if self._ring is not None:
            self._ring.settle()

    def attend(self, layer: int, batch: MicroBatch, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Store a micro-batch's keys and values and attend, segment by segment: ``[T, N, H]``.

        Rows after the last segment's are padding: zeros come out.
        """
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        out_TNH[batch.num_tokens :] = 0
        decode = self._decoder(batch, q_TNH, k_TKH, v_TKH, out_TNH)

        def attend_rows(part: _Part) -> None:
            begin, segment, kv_heads = part.begin, part.segment, part.kv_heads
            extent = self._only_extent(segment)
            if extent is not None and decode is not None:
                if isinstance(extent, MemoryExtent):
                    decode(begin, extent.layer(layer), segment.start)
                    return
                # Meanwhile other cores read what comes next.
                with one_core(), self._fetched(layer, extent) as (past, kv_c2KH):
                    decode(begin, kv_c2KH.permute(1, 2, 0, 3), past)
                return
            rows = slice(begin, begin + segment.length)
            group = q_TNH.shape[1] // k_TKH.shape[1]
            heads = slice(kv_heads.start * group, kv_heads.stop * group)
            q_NtH, k_KtH, v_KtH = (
                x[rows, some].transpose(0, 1) for x, some in ((q_TNH, heads), (k_TKH, kv_heads), (v_TKH, kv_heads))
            )
            out_TNH[rows, heads] = self._attend_segment(layer, segment, kv_heads, q_NtH, k_KtH, v_KtH).transpose(0, 1)

        for run in self._runs(batch.segments):
            if self._workers is None or self._is_spilled(run[0].segment):
                for part in run:
                    attend_rows(part)
            else:
                parts = [part for whole in run for part in self._split(whole)]
                self._workers.each(attend_rows, parts, [part.cost for part in parts])
        return out_TNH

    def _split(self, whole: "_Part") -> "list[_Part]":
        """A prompt's heads shared out over the cores: a pass has too few prompts to give each core as much to do."""
        if whole.segment.length == 1:
            return [whole]
        num_heads, cores = self._shape.num_kv_heads, torch.get_num_threads()
        borders = [num_heads * core // cores for core in range(cores + 1)]
        return [_Part(whole.begin, whole.segment, slice(first, end)) for first, end in pairwise(borders) if first < end]

    def _decoder(
        self, batch: MicroBatch, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TNH: Tensor
    ) -> Callable[[int, Tensor, int], None] | None:
        """On the CPU, what computes one token at a row, given its sequence's keys and values and its position.

        What can be done for all of them together is done here.
        """
        rows = self._decode_rows(batch)
        if not rows or q_TNH.device.type != "cpu" or q_TNH.shape != k_TKH.shape:
            return None
        if not flash_decodes():
            scaled_TNH = q_TNH[:rows].float() * q_TNH.shape[-1] ** -0.5
            return lambda row, kv_2NcH, position: attend_decode(
                scaled_TNH[row], k_TKH[row], v_TKH[row], kv_2NcH, position, out_TNH[row]
            )
        q_T1N1H, out_T1N1H = q_TNH[:, None, :, None], out_TNH[:, None, :, None]
        kv_T2NH = torch.stack((k_TKH[:rows], v_TKH[:rows]), 1)
        return lambda row, kv_2NcH, position: attend_decode_by_flash(
            q_T1N1H[row], kv_T2NH[row], kv_2NcH, position, out_T1N1H[row]
        )

    @staticmethod
    def _decode_rows(batch: MicroBatch) -> int:
        """Rows up to the last segment of one token: schedulers put these first."""
        rows = end = 0
        for segment in batch.segments:
            end += segment.length
            rows = end if segment.length == 1 else rows
        return rows

    def _only_extent(self, segment: Segment) -> MemoryExtent | SpilledExtent | None:
        """Where one token finds all its sequence's keys and values, if that is one extent."""
        if segment.length > 1 or not segment.keeps_kv:
            return None
        held = self._sequences[segment.sequence]
        extent = held.spilled[0] if held.spilled else held.extents[0]
        return extent if segment.start < extent.layout.capacity else None

    @contextmanager
    def _fetched(self, layer: int, extent: SpilledExtent) -> Iterator[tuple[int, Tensor]]:
        """How many tokens of an extent there are, and they and those that follow them: ``[token, k|v, head, dim]``.

        Those that follow are for the caller to fill in; they are kept when the context ends.
        """
        assert self._ring is not None
        layout = extent.layout
        with self._ring.enter(extent.layer(layer)) as (item, raw):
            end = item.fetched if item.changed is None else item.changed.stop
            shape = (end // layout.token_bytes, 2, layout.num_heads, layout.head_size)
            yield item.fetched // layout.token_bytes, raw[:end].view(self._dtype).view(shape)

    def _is_spilled(self, segment: Segment) -> bool:
        held = self._sequences.get(segment.sequence)
        return held is not None and held.tier not in self._addressable

    def _visits(self, spilled: SequenceOf[Segment]) -> Iterator[Item]:
        """What attention will enter in a pass, in its order."""
        for layer in range(self._shape.num_layers if spilled else 0):
            for segment in spilled:
                end = segment.start + segment.length
                for extent in self._sequences[segment.sequence].spilled:
                    layout = extent.layout
                    past, there = (
                        min(max(0, position - layout.start), layout.capacity) * layout.token_bytes
                        for position in (segment.start, end)
                    )
                    if there:
                        added = slice(past, there) if past < there else None
                        yield Item(KV, extent.layer(layer), past, added)

    def _runs(self, segments: Iterable[Segment]) -> "Iterator[list[_Part]]":
        """Segments, gathered as far as they may be computed side by side.

        Not: two of one sequence, since the second looks back at the first; nor those whose cache is brought, in the
        order in which it comes.
        """
        all_heads = slice(0, self._shape.num_kv_heads)
        run: list[_Part] = []
        sequences: set[Sequence] = set()
        begin = 0
        for segment in segments:
            alone = self._is_spilled(segment)
            if run and (alone or segment.sequence in sequences):
                yield run
                run, sequences = [], set()
            run.append(_Part(begin, segment, all_heads))
            sequences.add(segment.sequence)
            begin += segment.length
            if alone:
                yield run
                run, sequences = [], set()
        if run:
            yield run

    def close(self) -> None:
        """Free everything."""
        run_all(
            [
                *([self._ring.close] if self._ring is not None else []),
                *(partial(self.release, sequence) for sequence in list(self._sequences)),
                *(arena.close for arena in self._arenas.values()),
                *([self._workers.close] if self._workers is not None else []),
            ]
        )

    def _layouts(self, num_tokens: int) -> list[ExtentLayout]:
        shape = self._shape
        return [
            ExtentLayout(
                start=start,
                capacity=min(self._extent_tokens, num_tokens - start),
                num_layers=shape.num_layers,
                num_heads=shape.num_kv_heads,
                head_size=shape.head_size,
                item_bytes=self._dtype.itemsize,
            )
            for start in range(0, num_tokens, self._extent_tokens)
        ]

    def _extend(self, held: SequenceKV, layout: ExtentLayout) -> None:
        if held.tier is TierName.DISK:
            held.spilled.append(SpilledExtent(layout, self._disk.allocate(layout.num_bytes, KV)))
            return
        piece = self._arenas[held.tier].allocate(layout.num_bytes)
        if held.tier in self._addressable:
            held.extents.append(MemoryExtent(layout, piece, self._dtype))
        else:
            held.spilled.append(SpilledExtent(layout, piece))

    def _attend_segment(
        self, layer: int, segment: Segment, heads: slice, q_NtH: Tensor, k_KtH: Tensor, v_KtH: Tensor
    ) -> Tensor:
        """Some key/value heads of a segment, and the query heads that share them."""
        if not segment.keeps_kv:
            return attend(q_NtH, k_KtH, v_KtH, causal=True)[0]
        held = self._sequences[segment.sequence]
        if held.spilled:
            return self._attend_spilled(layer, held, segment, q_NtH, k_KtH, v_KtH)
        end = segment.start + segment.length
        if segment.length == 1 or end <= held.extents[0].layout.capacity:
            # Stored first, the segment's own keys are read with the rest: one piece less to merge.
            self._store(layer, held, segment.start, heads, k_KtH, v_KtH)
            past = self._past(layer, held, end, heads)
            return merge([attend(q_NtH, k_KsH, v_KsH, causal=True) for k_KsH, v_KsH in past])[0]
        past = self._past(layer, held, segment.start, heads)
        pieces = [attend(q_NtH, k_KsH, v_KsH, causal=False) for k_KsH, v_KsH in past]
        out_NtH, _ = merge([*pieces, attend(q_NtH, k_KtH, v_KtH, causal=True)])
        self._store(layer, held, segment.start, heads, k_KtH, v_KtH)
        return out_NtH

    def _attend_spilled(
        self, layer: int, held: SequenceKV, segment: Segment, q_NtH: Tensor, k_KtH: Tensor, v_KtH: Tensor
    ) -> Tensor:
        """All heads of a segment, extent by extent as they come."""
        end = segment.start + segment.length
        kv_t2KH = torch.stack((k_KtH.transpose(0, 1), v_KtH.transpose(0, 1)), dim=1)
        pieces = []
        done = 0
        for extent in held.spilled:
            if extent.layout.start >= end:
                break
            with self._fetched(layer, extent) as (past, kv_c2KH):
                added = kv_c2KH.shape[0] - past
                kv_c2KH[past:] = kv_t2KH[done : done + added]
                done += added
                # Its own tokens, if all are here, are read with the rest: one piece less to merge.
                whole = added == segment.length
                k_KsH, v_KsH = kv_c2KH[: None if whole else past].permute(1, 2, 0, 3)
                if k_KsH.shape[1]:
                    pieces.append(attend(q_NtH, k_KsH, v_KsH, causal=whole))
        if not whole:
            pieces.append(attend(q_NtH, k_KtH, v_KtH, causal=True))
        return merge(pieces)[0]

    def _past(self, layer: int, held: SequenceKV, num_tokens: int, heads: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of the sequence's first ``num_tokens``, ``[K, s, H]`` each, one pair an extent."""
        for extent in held.extents:
            count = min(num_tokens - extent.layout.start, extent.layout.capacity)
            if count <= 0:
                break
            kv_2KcH = extent.layer(layer)
            yield kv_2KcH[0, heads, :count], kv_2KcH[1, heads, :count]

    def _store(self, layer: int, held: SequenceKV, start: int, heads: slice, k_KtH: Tensor, v_KtH: Tensor) -> None:
        """Append a segment's keys and values, those of some heads."""
        end = start + k_KtH.shape[1]
        for extent in held.extents:
            first = max(start, extent.layout.start)
            last = min(end, extent.layout.start + extent.layout.capacity)
            if first >= last:
                continue
            piece = slice(first - start, last - start)
            place = slice(first - extent.layout.start, last - extent.layout.start)
            kv = extent.layer(layer)
            kv[0, heads, place] = k_KtH[:, piece]
            kv[1, heads, place] = v_KtH[:, piece]
