"""Attention where the device has memory of its own: a pool a layer, and one call for all sequences of a kind.

Shapes: T tokens of a micro-batch, t of one segment, S tokens of a pool or buffer, N query heads, K key/value heads, H
head size.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
from torch import Tensor

from engine.attention.elsewhere import Elsewhere
from engine.attention.groups import Group
from engine.attention.host_attention import Attended, HostAttention
from engine.attention.kernels import merge
from engine.attention.packed import (
    Folding,
    Places,
    Ragged,
    attend_packed,
    attend_part,
    folding_of,
    ragged_numbers,
    ragged_of,
    ragged_size,
)
from engine.attention.pools import KVPools
from engine.attention.table import Kernel
from engine.kvcache.cache import Move
from engine.kvcache.segments import Kind, MicroBatch, Segment
from engine.memory.closing import run_all
from engine.memory.device import Device
from engine.shape import ModelShape
from engine.tiers import TierName
from engine.units import MIB

_MOVED_BYTES = 16 * MIB
"""How much of the keys and values is moved within a layer's pool at once, through the workspace."""


@dataclass(frozen=True, slots=True)
class _Call:
    """Some rows of a micro-batch that are attended to at once."""

    rows: slice
    places: Places
    folding: Folding


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What a micro-batch needs on the device, in whole numbers."""

    slots: list[int]
    """Where the keys and values of its first rows go in the pool."""
    here: list[_Call]
    """Over the pool, where it is attended to as it lies."""
    gathered: list[tuple[list[int], list[_Call]]]
    """Else: tokens of it that are unpacked together, and the calls over these."""
    own: list[_Call]
    groups: list[tuple[Group, list[_Call], list[int]]]
    """With the calls over a group's buffer, and where in it the keys and values of its rows go. Of a part: the call
    over its keys, and with the last, one over the segment's own."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """The same on the device: in every layer alike."""

    slots: Tensor
    here: list[tuple[slice, Ragged]]
    gathered: list[tuple[Tensor, list[tuple[slice, Ragged]]]]
    own: list[tuple[slice, Ragged]]
    groups: list[tuple[Group, list[tuple[slice, Ragged]], Tensor]]


class PackedRunner:
    """Implements ``engine.attention.attention.Runner``."""

    def __init__(
        self,
        shape: ModelShape,
        kernel: Kernel,
        device: Device,
        pools: KVPools,
        elsewhere: Elsewhere,
        on_host: HostAttention | None = None,
        *,
        unpacked_tokens: int = 0,
    ) -> None:
        """``pools``, ``elsewhere`` and ``on_host`` are the runner's to close; the rest as in ``Attention``."""
        self._rows, self._unpacked_tokens = pools.rows, unpacked_tokens
        self._num_heads = shape.num_heads
        self._kernel = kernel
        heads = (shape.num_heads, shape.num_kv_heads)
        self._folding, self._decode_folding = (folding_of(kernel, *heads, decodes=decodes) for decodes in (False, True))
        # Decode tokens have a call of their own where they are folded in another way.
        self._splits = self._folding != self._decode_folding
        self._device = device
        self._pools = pools
        self._layers = pools.layers(TierName.DEVICE)
        self._elsewhere = elsewhere
        self._on_host = on_host
        self._batches: list[_Batch] = []
        self._attended: list[Attended | None] = []
        """What of each micro-batch the host attends to."""
        self._started: deque[tuple[Tensor, bool]] = deque()
        """Outputs, and whether the host has a part in them."""

    def begin(self, batches: Sequence[MicroBatch], moves: Sequence[Move]) -> None:
        """All numbers of a pass go to the device in two copies."""
        for move in moves:
            self._move(move)
        self._elsewhere.begin(batches)
        self._started.clear()
        on_host = self._on_host
        self._attended = [on_host.attended(batch) if on_host is not None else None for batch in batches]
        upload = _Upload()
        numbers = [self._numbers(batch, self._elsewhere.groups(index)) for index, batch in enumerate(batches)]
        for each in numbers:
            upload.add(each)
        upload.send(self._device)
        self._batches = [upload.taken(each) for each in numbers]

    def start(self, layer: int, index: int, qkv: Tensor) -> None:
        """Store a micro-batch's keys and values, and attend, but for what the host is left to do."""
        batch = self._batches[index]
        q_TNH, kv_T2KH = qkv[:, : self._num_heads], qkv[:, self._num_heads :].view(len(qkv), 2, -1, qkv.shape[2])
        stored = self._rows.rounded(kv_T2KH)
        self._elsewhere.store(layer, index, stored)
        # Rows of padding stay as they are: no other row ever depends on them.
        out_TNH = torch.empty(q_TNH.shape, dtype=qkv.dtype, device=qkv.device)
        attended = self._attended[index]
        if self._on_host is not None and attended is not None:
            rows = attended.rows
            self._on_host.start(layer, attended, q_TNH[rows], out_TNH[rows], self._elsewhere.stored(layer))
        if batch.here or batch.gathered:
            pool = self._layers[layer]
            pool.index_copy_(0, batch.slots, stored[: len(batch.slots)])
            for rows, ragged in batch.here:
                attend_packed(self._kernel, q_TNH[rows], pool, ragged, out_TNH[rows])
            for tokens, calls in batch.gathered:
                kv_S2KH = self._elsewhere.unpacked(pool.index_select(0, tokens))
                for rows, ragged in calls:
                    attend_packed(self._kernel, q_TNH[rows], kv_S2KH, ragged, out_TNH[rows])
        for rows, ragged in batch.own:
            attend_packed(self._kernel, q_TNH[rows], kv_T2KH[rows], ragged, out_TNH[rows])
        parts: list[tuple[Tensor, Tensor]] = []
        for group, calls, slots in batch.groups:
            with self._elsewhere.fetched(group) as buffer_S2KH:
                if group.is_part:
                    self._attend_part(group, calls, q_TNH, kv_T2KH, buffer_S2KH, parts, out_TNH)
                else:
                    buffer_S2KH.index_copy_(0, slots, kv_T2KH[group.rows])
                    for rows, ragged in calls:
                        attend_packed(self._kernel, q_TNH[rows], buffer_S2KH, ragged, out_TNH[rows])
        self._started.append((out_TNH, attended is not None))

    def finish(self) -> Tensor:
        """What came of what was started first, the host's part included."""
        out_TNH, waits = self._started.popleft()
        if waits:
            assert self._on_host is not None
            self._on_host.finish()
        return out_TNH

    def settle(self) -> None:
        """Wait for what is stored elsewhere."""
        self._elsewhere.settle()

    def close(self) -> None:
        """Free everything."""
        on_host = [self._on_host.close] if self._on_host is not None else []
        run_all([*on_host, self._elsewhere.close, self._batches.clear, self._started.clear, self._pools.close])

    def _attend_part(
        self,
        group: Group,
        calls: list[tuple[slice, Ragged]],
        q_TNH: Tensor,
        kv_T2KH: Tensor,
        buffer_S2KH: Tensor,
        parts: list[tuple[Tensor, Tensor]],
        out_TNH: Tensor,
    ) -> None:
        """Some keys of one segment; with the last of them, its own, and all are merged."""
        rows, ragged = calls[0]
        parts[:] = [merge([*parts, attend_part(self._kernel, q_TNH[rows], buffer_S2KH, ragged, causal=False)])]
        if group.is_last:
            rows, ragged = calls[1]
            own = attend_part(self._kernel, q_TNH[rows], kv_T2KH[rows], ragged, causal=True)
            out_TNH[rows] = merge([*parts, own])[0].transpose(0, 1)
            parts.clear()

    def _move(self, move: Move) -> None:
        """Towards the pool's beginning, piece by piece, since both places may overlap."""
        for pool_S2KH in self._layers:
            step = max(1, _MOVED_BYTES // (pool_S2KH[0].numel() * pool_S2KH.element_size()))
            for first in range(0, move.num_tokens, step):
                count = min(step, move.num_tokens - first)
                piece = pool_S2KH[move.source + first : move.source + first + count].clone()
                pool_S2KH[move.destination + first : move.destination + first + count] = piece

    def _numbers(self, batch: MicroBatch, groups: Sequence[Group]) -> _Numbers:
        slots: list[int] = []
        calls: dict[Kind, list[_Call]] = {Kind.HERE: [], Kind.OWN: [], Kind.ELSEWHERE: []}
        gathered: list[tuple[list[int], list[_Call]]] = []
        begin = 0
        for (kind, _), group in groupby(batch.segments, key=lambda each: (each.kind, self._splits and each.length > 1)):
            segments = list(group)
            lengths = [segment.length for segment in segments]
            rows = slice(begin, begin + sum(lengths))
            if kind is Kind.HERE:
                starts = [_first(segment) for segment in segments]
                used = [segment.start + segment.length for segment in segments]
                places = Places(lengths, starts, used)
                places.check(len(self._layers[0]))
                if self._rows.is_packed:
                    gathered += self._gathered(places, begin)
                else:
                    calls[kind].append(_Call(rows, places, self._folding_of(lengths)))
                for segment, first in zip(segments, starts, strict=True):
                    slots += range(first + segment.start, first + segment.start + segment.length)
            elif kind is Kind.OWN:
                calls[kind].append(_Call(rows, _own(lengths), self._folding_of(lengths)))
            begin = rows.stop
        of_groups = [self._of_group(group) for group in groups]
        return _Numbers(slots, calls[Kind.HERE], gathered, calls[Kind.OWN], of_groups)

    def _gathered(self, places: Places, row: int) -> Iterator[tuple[list[int], list[_Call]]]:
        """The pool's tokens of some sequences, as many together as are unpacked at a time, and calls over these.

        ``row``: the first of the sequences'.
        """
        tokens, lengths, starts, used = list[int](), list[int](), list[int](), list[int]()
        for length, start, count in zip(places.lengths, places.starts, places.used, strict=True):
            if tokens and len(tokens) + count > self._unpacked_tokens:
                yield tokens, [self._call(row, lengths, starts, used)]
                row += sum(lengths)
                tokens, lengths, starts, used = [], [], [], []
            lengths.append(length)
            starts.append(len(tokens))
            used.append(count)
            tokens += range(start, start + count)
        yield tokens, [self._call(row, lengths, starts, used)]

    def _call(self, row: int, lengths: Sequence[int], starts: Sequence[int], used: Sequence[int]) -> _Call:
        places = Places(lengths, starts, used)
        places.check(self._unpacked_tokens)
        return _Call(slice(row, row + sum(lengths)), places, self._folding_of(lengths))

    def _folding_of(self, lengths: Sequence[int]) -> Folding:
        return self._decode_folding if max(lengths) == 1 else self._folding

    def _of_group(self, group: Group) -> tuple[Group, list[_Call], list[int]]:
        if group.is_part:
            (share,) = group.shares
            calls = [_Call(group.rows, Places([share.length], [0], [share.past]), self._folding)]
            if group.is_last:
                calls.append(_Call(group.rows, _own([share.length]), self._folding))
            return group, calls, []
        calls, slots = [], list[int]()
        for _, some in groupby(group.shares, key=lambda share: self._splits and share.length > 1):
            shares = list(some)
            lengths = [share.length for share in shares]
            used = [share.past + share.length for share in shares]
            rows = slice(shares[0].row, shares[-1].row + shares[-1].length)
            places = Places(lengths, [share.at for share in shares], used)
            places.check(group.num_tokens)
            calls.append(_Call(rows, places, self._folding_of(lengths)))
            for share in shares:
                slots += range(share.at + share.past, share.at + share.past + share.length)
        return group, calls, slots


@dataclass(slots=True)
class _Upload:
    """All whole numbers of a pass, sent together and given out again in the same order."""

    ragged: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    sent: list[Tensor] = field(default_factory=list)
    """What is left of both on the device."""

    def add(self, numbers: _Numbers) -> None:
        """Those of one micro-batch."""
        self.slots += numbers.slots
        for call in _calls(numbers):
            self.ragged += ragged_numbers(call.places, call.folding)
        for tokens, _ in numbers.gathered:
            self.slots += tokens
        for _, _, slots in numbers.groups:
            self.slots += slots

    def send(self, device: Device) -> None:
        """To the device."""
        self.sent = [
            device.upload(torch.tensor(self.ragged, dtype=torch.int32)),
            device.upload(torch.tensor(self.slots, dtype=torch.int64)),
        ]

    def taken(self, numbers: _Numbers) -> _Batch:
        """Those of one micro-batch, on the device; asked for in the order in which they were added."""
        slots = self._take(1, len(numbers.slots))
        here = self._calls(numbers.here)
        gathered = [(self._take(1, len(tokens)), self._calls(calls)) for tokens, calls in numbers.gathered]
        own = self._calls(numbers.own)
        groups = [(group, self._calls(calls)) for group, calls, _ in numbers.groups]
        to_slots = [self._take(1, len(its)) for _, _, its in numbers.groups]
        return _Batch(slots, here, gathered, own, [(*each, its) for each, its in zip(groups, to_slots, strict=True)])

    def _calls(self, calls: Iterable[_Call]) -> list[tuple[slice, Ragged]]:
        found = []
        for call in calls:
            count = ragged_size(call.places, call.folding)
            found.append((call.rows, ragged_of(call.places, self._take(0, count), call.folding)))
        return found

    def _take(self, which: int, count: int) -> Tensor:
        values = self.sent[which]
        self.sent[which] = values[count:]
        return values[:count]


def _calls(numbers: _Numbers) -> list[_Call]:
    of_gathered = (call for _, calls in numbers.gathered for call in calls)
    return [*numbers.here, *of_gathered, *numbers.own, *(call for _, calls, _ in numbers.groups for call in calls)]


def _own(lengths: Sequence[int]) -> Places:
    """Segments that attend to themselves, one behind the other."""
    return Places(lengths, [0, *accumulate(lengths)][:-1], lengths)


def _first(segment: Segment) -> int:
    """Where a sequence's one range of the pool begins."""
    assert segment.holding is not None
    (extent,) = segment.holding.extents
    return extent.offset
