"""Attention where the device has memory of its own: a pool a layer, and one call for all sequences of a kind.

Shapes: T tokens of a micro-batch, t of one segment, S tokens of a pool or buffer, N query heads, K key/value heads, H
head size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

from torch import Tensor

from engine.attention.elsewhere import Elsewhere
from engine.attention.groups import Group
from engine.attention.kernels import merge
from engine.attention.packed import Places, Ragged, attend_packed, attend_part, foldings_of
from engine.attention.pools import KVPools
from engine.attention.table import Kernel
from engine.attention.upload import Upload
from engine.kvcache.segments import Kind, MicroBatch, Segment
from engine.shape import ModelShape
from engine.tiers import TierName


class _Call(NamedTuple):
    """Some rows of a micro-batch that are attended to at once."""

    rows: slice
    ragged: Ragged


@dataclass(frozen=True, slots=True)
class _Batch:
    """What a micro-batch needs on the device, in every layer alike."""

    slots: Tensor
    """Where the keys and values of its first rows go in the pool, int64."""
    here: list[_Call]
    """Over the pool, where it is attended to as it lies."""
    gathered: list[tuple[Tensor, _Call]]
    """Else: tokens of it that are unpacked together, int64, and the call over these."""
    own: list[_Call]
    groups: list[tuple[Group, list[_Call], Tensor]]
    """With the calls over a group's buffer, and where in it the keys and values of its rows go, int64. Of a part: the
    call over its keys, and with the last, one over the segment's own."""


class PoolAttention:
    """Implements ``engine.attention.device_runner.OnDevice``."""

    def __init__(
        self, shape: ModelShape, kernel: Kernel, pools: KVPools, elsewhere: Elsewhere, *, unpacked_tokens: int = 0
    ) -> None:
        """As in ``Attention``."""
        self._rows, self._unpacked_tokens = pools.rows, unpacked_tokens
        self._kernel, self._elsewhere = kernel, elsewhere
        self._foldings = foldings_of(kernel, shape.num_heads, shape.num_kv_heads)
        self._layers = pools.layers(TierName.DEVICE)

    def stores_first(self, groups: Sequence[Group]) -> bool:
        """Always."""
        del groups
        return True

    def attend(self, layer: int, work: _Batch, q_TNH: Tensor, kv_T2KH: Tensor, stored: Tensor, out_TNH: Tensor) -> None:
        """With one call for all sequences of a kind."""
        if work.here or work.gathered:
            pool = self._layers[layer]
            pool.index_copy_(0, work.slots, stored[: len(work.slots)])
            for rows, ragged in work.here:
                attend_packed(self._kernel, q_TNH[rows], pool, ragged, out_TNH[rows])
            for tokens, (rows, ragged) in work.gathered:
                kv_S2KH = self._elsewhere.unpacked(pool.index_select(0, tokens))
                attend_packed(self._kernel, q_TNH[rows], kv_S2KH, ragged, out_TNH[rows])
        for rows, ragged in work.own:
            attend_packed(self._kernel, q_TNH[rows], kv_T2KH[rows], ragged, out_TNH[rows])
        parts: list[tuple[Tensor, Tensor]] = []
        for group, calls, slots in work.groups:
            with self._elsewhere.fetched(group) as buffer_S2KH:
                if group.is_part:
                    self._attend_part(group, calls, q_TNH, kv_T2KH, buffer_S2KH, parts, out_TNH)
                else:
                    buffer_S2KH.index_copy_(0, slots, kv_T2KH[group.rows])
                    for rows, ragged in calls:
                        attend_packed(self._kernel, q_TNH[rows], buffer_S2KH, ragged, out_TNH[rows])

    def _attend_part(
        self,
        group: Group,
        calls: list[_Call],
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

    def work_of(self, batch: MicroBatch, groups: Sequence[Group], upload: Upload) -> Callable[[], _Batch]:
        """One call a kind; see ``OnDevice``."""
        slots: list[int] = []
        here, own = list[Callable[[], _Call]](), list[Callable[[], _Call]]()
        gathered: list[tuple[Callable[[], Tensor], Callable[[], _Call]]] = []
        row = 0
        for (kind, _), group in groupby(
            batch.segments, key=lambda each: (each.kind, self._foldings.differ and each.length > 1)
        ):
            segments = list(group)
            lengths = [segment.length for segment in segments]
            if kind is Kind.HERE:
                starts = [_first(segment) for segment in segments]
                used = [segment.start + segment.length for segment in segments]
                places = Places(lengths, starts, used)
                places.check(len(self._layers[0]))
                if self._rows.is_packed:
                    gathered += self._gathered(places, row, upload)
                else:
                    here.append(self._call(row, places, upload))
                for segment, first in zip(segments, starts, strict=True):
                    slots += range(first + segment.start, first + segment.start + segment.length)
            elif kind is Kind.OWN:
                own.append(self._call(row, _own(lengths), upload))
            row += sum(lengths)
        of_groups = [self._of_group(group, upload) for group in groups]
        to = upload.indices(slots)
        return lambda: _Batch(
            to(),
            [each() for each in here],
            [(tokens(), call()) for tokens, call in gathered],
            [each() for each in own],
            [each() for each in of_groups],
        )

    def _gathered(
        self, places: Places, row: int, upload: Upload
    ) -> Iterator[tuple[Callable[[], Tensor], Callable[[], _Call]]]:
        """The pool's tokens of some sequences, as many together as are unpacked at a time, and the call over these.

        ``row``: the first of the sequences'.
        """
        tokens, lengths, starts, used = list[int](), list[int](), list[int](), list[int]()
        for length, start, count in zip(places.lengths, places.starts, places.used, strict=True):
            if tokens and len(tokens) + count > self._unpacked_tokens:
                yield self._piece(row, tokens, Places(lengths, starts, used), upload)
                row += sum(lengths)
                tokens, lengths, starts, used = [], [], [], []
            lengths.append(length)
            starts.append(len(tokens))
            used.append(count)
            tokens += range(start, start + count)
        yield self._piece(row, tokens, Places(lengths, starts, used), upload)

    def _piece(
        self, row: int, tokens: Sequence[int], places: Places, upload: Upload
    ) -> tuple[Callable[[], Tensor], Callable[[], _Call]]:
        places.check(min(self._unpacked_tokens, len(tokens)))
        return upload.indices(tokens), self._call(row, places, upload)

    def _call(self, row: int, places: Places, upload: Upload) -> Callable[[], _Call]:
        rows = slice(row, row + sum(places.lengths))
        ragged = upload.ragged(places, self._foldings.of(places.lengths))
        return lambda: _Call(rows, ragged())

    def _of_group(self, group: Group, upload: Upload) -> Callable[[], tuple[Group, list[_Call], Tensor]]:
        if group.is_part:
            (share,) = group.shares
            places = [Places([share.length], [0], [share.past])]
            places += [_own([share.length])] if group.is_last else []
            parts = [upload.ragged(each, self._foldings.of_prompts, is_part=True) for each in places]
            nowhere = upload.indices([])
            return lambda: (group, [_Call(group.rows, ragged()) for ragged in parts], nowhere())
        calls, slots = list[Callable[[], _Call]](), list[int]()
        for _, some in groupby(group.shares, key=lambda share: self._foldings.differ and share.length > 1):
            shares = list(some)
            used = [share.past + share.length for share in shares]
            lies = Places([share.length for share in shares], [share.at for share in shares], used)
            lies.check(group.num_tokens)
            calls.append(self._call(shares[0].row, lies, upload))
            for share in shares:
                slots += range(share.at + share.past, share.at + share.past + share.length)
        to = upload.indices(slots)
        return lambda: (group, [each() for each in calls], to())


def _first(segment: Segment) -> int:
    """Where a sequence's one range of the pool begins."""
    assert segment.holding is not None
    (extent,) = segment.holding.extents
    return extent.offset


def _own(lengths: Sequence[int]) -> Places:
    """Segments that attend to themselves, one behind the other."""
    return Places(lengths, [0, *accumulate(lengths)][:-1], lengths)
