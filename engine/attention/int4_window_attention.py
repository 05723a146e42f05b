"""Attention on a device with memory of its own, over keys that are packed by windows: see ``int4_windows``.

Some sequences at a time, their keys and values are unpacked into a buffer, each sequence from the beginning of a window
on. There the keys of a query's own window must be plain, and those of windows before it rounded. Where new tokens are
in one window, that is one call. Where they are in several, two: each window by itself, as if it were a sequence; then
what became full is rounded, and each attends to what lies before it; and both are merged.

Shapes: T tokens of a micro-batch, S tokens of a buffer or rows of a pool, n windows, w tokens of one, N query heads, K
key/value heads, H head size, B bytes of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from engine.attention.elsewhere import Elsewhere
from engine.attention.groups import Group, open_from
from engine.attention.int4_sizes import WINDOW, packed_windows
from engine.attention.int4_window_rows import WindowRows, windows_of
from engine.attention.int4_window_store import Added, Stores, places_of, store
from engine.attention.kernels import merge
from engine.attention.packed import Places, Ragged, attend_packed, attend_part, foldings_of
from engine.attention.pools import KVPools
from engine.attention.table import Kernel
from engine.attention.upload import Upload
from engine.kvcache.cache import SequenceRoom
from engine.kvcache.segments import Kind, MicroBatch, Segment
from engine.memory.device import Device
from engine.shape import ModelShape
from engine.tiers import TierName
from engine.units import align_up


@dataclass(frozen=True, slots=True)
class _Lies:
    """A segment in a buffer."""

    row: int
    """Its first row in the micro-batch."""
    start: int
    length: int
    first: int
    """The position that the buffer has its sequence from: where a window begins."""
    at: int
    """Where that is in the buffer."""
    opened: Sequence[int] = ()
    """Rows with the plain keys of its first window, if that has earlier tokens."""

    @property
    def begin(self) -> int:
        """Where its first new token goes."""
        return self.at + self.start - self.first

    @property
    def windows(self) -> list[range]:
        """Where its new tokens are in the buffer, window by window."""
        end = self.begin + self.length
        begins = range(self.begin - self.begin % WINDOW, end, WINDOW)
        return [range(max(self.begin, begin), min(end, begin + WINDOW)) for begin in begins]


class _Before(NamedTuple):
    """What some windows attend to before themselves."""

    rows: Tensor
    """Their queries among those of a call, int64."""
    ragged: Ragged
    full: Tensor
    """Windows of the buffer that are new, and full: int64."""


class _Call(NamedTuple):
    """Some rows of a micro-batch that are attended to at once."""

    rows: slice
    own: Ragged
    """Each window by itself; with all before it, if new tokens are in no other; or a part of what lies before."""
    before: _Before | None = None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What is in the buffer together."""

    num_tokens: int
    tokens: Tensor | None
    """The rows of the pool that are unpacked into it, int64; ``None``: none are, or a group's."""
    group: Group | None
    opened: Tensor
    """Rows of the pool, or of the group, with plain keys: int64 ``[n, beside]``."""
    opened_at: Tensor
    """Which windows of the buffer these are, int64."""
    rows: slice
    """Those of the micro-batch."""
    at: Tensor
    """Where they go, int64; nowhere, if the buffer has a part of what lies before them."""
    calls: list[_Call]
    is_part: bool
    follows_parts: bool


@dataclass(frozen=True, slots=True)
class _Work:
    """What a micro-batch needs, in every layer alike."""

    stores: list[Stores]
    """Where its first rows are kept in the pool."""
    chunks: list[_Chunk]


class WindowAttention:
    """Implements ``engine.attention.device_runner.OnDevice``."""

    def __init__(
        self,
        shape: ModelShape,
        kernel: Kernel,
        device: Device,
        pools: KVPools,
        elsewhere: Elsewhere,
        *,
        room: SequenceRoom,
        unpacked_tokens: int,
    ) -> None:
        """As in ``Attention``."""
        assert isinstance(pools.rows, WindowRows)
        self._rows, self._room, self._unpacked_tokens = pools.rows, room, unpacked_tokens
        self._kernel, self._device, self._elsewhere = kernel, device, elsewhere
        self._foldings = foldings_of(kernel, shape.num_heads, shape.num_kv_heads)
        self._layers = pools.layers(TierName.DEVICE)
        self._most_windows = packed_windows(shape, on_cpu=False)
        self._work: list[_Work] = []

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """All numbers of a pass go to the device at once."""
        upload = Upload()
        coming = [self._work_of(batch, self._elsewhere.groups(index), upload) for index, batch in enumerate(batches)]
        upload.send(self._device)
        self._work = [each() for each in coming]

    def stores_first(self, index: int) -> bool:
        """Not where keys are fetched: a new window's plain ones go where those of the one before are read from."""
        return not self._elsewhere.groups(index)

    def close(self) -> None:
        """Nothing but numbers."""
        self._work.clear()

    def attend(self, layer: int, index: int, q_TNH: Tensor, kv_T2KH: Tensor, stored: Tensor, out_TNH: Tensor) -> None:
        """Some sequences at a time."""
        work = self._work[index]
        parts: list[tuple[Tensor, Tensor]] = []
        for chunk in work.chunks:
            with self._filled(layer, chunk) as kv_S2KH:
                if not chunk.is_part:
                    kv_S2KH.index_copy_(0, chunk.at, kv_T2KH[chunk.rows])
                for call in chunk.calls:
                    q, out = q_TNH[call.rows], out_TNH[call.rows]
                    if not (chunk.is_part or chunk.follows_parts or call.before):
                        attend_packed(self._kernel, q, kv_S2KH, call.own, out)
                        continue
                    parts[:] = [merge([*parts, self._part(call, q, kv_S2KH, causal=not chunk.is_part)])]
                    if not chunk.is_part:
                        out.copy_(parts.pop()[0].transpose(0, 1))
        # Behind attention: windows that become full are read plain until then.
        for each in work.stores:
            store(self._rows, self._layers[layer], each, kv_T2KH[:, 0], stored)

    def _part(self, call: _Call, q_TNH: Tensor, kv_S2KH: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        """What queries find in the buffer: ``out [N, T, H]``, ``lse [N, T]``."""
        out_NTH, lse_NT = attend_part(self._kernel, q_TNH, kv_S2KH, call.own, causal=causal)
        if call.before is not None:
            rows, ragged, full = call.before
            for some in torch.split(full, self._most_windows):
                windows_nwKH = windows_of(kv_S2KH).index_select(0, some)
                self._rows.round_windows(windows_nwKH)
                windows_of(kv_S2KH).index_copy_(0, some, windows_nwKH)
            before = attend_part(self._kernel, q_TNH.index_select(0, rows), kv_S2KH, ragged, causal=False)
            both = merge([(out_NTH.index_select(1, rows), lse_NT.index_select(1, rows)), before])
            for place, found in zip((out_NTH, lse_NT), both, strict=True):
                place.index_copy_(1, rows, found)
        return out_NTH, lse_NT

    @contextmanager
    def _filled(self, layer: int, chunk: _Chunk) -> Iterator[Tensor]:
        """A buffer with the keys and values of earlier tokens, ``[S, k|v, K, H]``."""
        if chunk.group is not None:
            with self._elsewhere.fetched_rows(chunk.group) as rows_SB:
                yield self._with_opened(self._elsewhere.unpacked(rows_SB), rows_SB, chunk)
        elif chunk.tokens is not None:
            pool_SB = self._layers[layer]
            buffer = self._elsewhere.unpacked(pool_SB.index_select(0, chunk.tokens))
            yield self._with_opened(buffer, pool_SB, chunk)
        else:
            yield self._elsewhere.buffer(chunk.num_tokens)

    def _with_opened(self, kv_S2KH: Tensor, rows_SB: Tensor, chunk: _Chunk) -> Tensor:
        if len(chunk.opened_at):
            windows = self._rows.opened(rows_SB, chunk.opened.view(len(chunk.opened_at), -1))
            windows_of(kv_S2KH).index_copy_(0, chunk.opened_at, windows)
        return kv_S2KH

    def _work_of(self, batch: MicroBatch, groups: Sequence[Group], upload: Upload) -> Callable[[], _Work]:
        added: list[Added] = []
        chunks: list[Callable[[], _Chunk]] = []
        row = 0
        for (kind, _), some in groupby(
            batch.segments, key=lambda each: (each.kind, self._foldings.differ and each.length > 1)
        ):
            segments = list(some)
            if kind is Kind.HERE:
                added += self._added(segments, row)
            if kind is not Kind.ELSEWHERE:
                chunks += self._chunks(segments, row, upload)
            row += sum(segment.length for segment in segments)
        chunks += [self._chunk_of(group, upload) for group in groups]
        to = [stores_of(each, upload) for each in places_of(added, self._rows, self._most_windows)]
        return lambda: _Work([each() for each in to], [each() for each in chunks])

    def _added(self, segments: Sequence[Segment], row: int) -> Iterator[Added]:
        """Where those that are kept in the pool go; ``row``: the first one's."""
        for segment in segments:
            base = segment.start - segment.start % WINDOW
            end = align_up(segment.start + segment.length, WINDOW)
            begin = _begin(segment)
            yield Added(row, segment.start, segment.length, range(begin + base, begin + end), self._opened(segment))
            row += segment.length

    def _opened(self, segment: Segment) -> range:
        """Rows of the pool for plain keys."""
        first = _begin(segment) + open_from(segment, self._room)
        return range(first, first + self._room.beside)

    def _chunks(self, segments: Sequence[Segment], row: int, upload: Upload) -> Iterator[Callable[[], _Chunk]]:
        """As many sequences together as find room in the buffer; longer ones in parts."""
        most = self._unpacked_tokens
        lies, tokens = list[_Lies](), list[int]()
        for segment in segments:
            end = align_up(segment.start + segment.length, WINDOW)
            cut = max(0, end - most)
            if lies and (cut or len(tokens) + end > most):
                yield self._chunk(lies, tokens, upload)
                lies, tokens = [], []
            is_here = segment.kind is Kind.HERE
            held = range(_begin(segment), _begin(segment) + end) if is_here else range(end)
            for first in range(0, cut, most):
                past = min(most, cut - first)
                rows = slice(row, row + segment.length)
                yield self._part_of(rows, past, held[first : first + past], upload)
            opened = self._opened(segment) if is_here and segment.start % WINDOW else ()
            lies.append(_Lies(row, segment.start, segment.length, cut, len(tokens), opened))
            tokens += held[cut:]
            row += segment.length
        yield self._chunk(lies, tokens, upload)

    def _chunk_of(self, group: Group, upload: Upload) -> Callable[[], _Chunk]:
        if group.is_part:
            return self._part_of(group.rows, group.num_tokens, (), upload, group)
        lies = []
        for share in group.shares:
            opened = () if share.open_at is None else range(share.open_at, share.open_at + self._room.beside)
            lies.append(_Lies(share.row, share.first + share.past, share.length, share.first, share.at, opened))
        return self._chunk(lies, (), upload, group)

    def _part_of(
        self, rows: slice, num_tokens: int, tokens: Sequence[int], upload: Upload, group: Group | None = None
    ) -> Callable[[], _Chunk]:
        """Some of what lies before a segment, by itself."""
        places = Places([rows.stop - rows.start], [0], [num_tokens])
        ragged = upload.ragged(places, self._foldings.of_prompts, is_part=True)
        from_pool = upload.indices(tokens) if group is None else None
        nothing = upload.indices(())
        return lambda: _Chunk(
            num_tokens,
            from_pool and from_pool(),
            group,
            opened=nothing(),
            opened_at=nothing(),
            rows=rows,
            at=nothing(),
            calls=[_Call(rows, ragged())],
            is_part=True,
            follows_parts=False,
        )

    def _chunk(
        self, lies: Sequence[_Lies], tokens: Sequence[int], upload: Upload, group: Group | None = None
    ) -> Callable[[], _Chunk]:
        num_tokens = len(tokens) if group is None else group.num_tokens
        from_pool = upload.indices(tokens) if tokens and any(each.start for each in lies) else None
        old = [each for each in lies if each.opened]
        opened = upload.indices([row for each in old for row in each.opened])
        opened_at = upload.indices([each.begin // WINDOW for each in old])
        at = upload.indices([place for each in lies for place in range(each.begin, each.begin + each.length)])
        calls = [
            self._call_of(list(some), num_tokens, upload)
            for _, some in groupby(lies, key=lambda each: self._foldings.differ and each.length > 1)
        ]
        return lambda: _Chunk(
            num_tokens,
            from_pool and from_pool(),
            group,
            opened=opened(),
            opened_at=opened_at(),
            rows=_rows_of(lies),
            at=at(),
            calls=[each() for each in calls],
            is_part=False,
            follows_parts=lies[0].first > 0,
        )

    def _call_of(self, lies: Sequence[_Lies], num_tokens: int, upload: Upload) -> Callable[[], _Call]:
        windows = [(each, window) for each in lies for window in each.windows]
        rows, in_one = _rows_of(lies), len(windows) == len(lies)
        # A window's own keys begin where it does; in the only one, what is before it is of the same call.
        begins = [each.at if in_one else _first_of(window) for each, window in windows]
        own = Places(
            [len(window) for _, window in windows],
            begins,
            [window.stop - begin for (_, window), begin in zip(windows, begins, strict=True)],
        )
        own.check(num_tokens)
        if in_one and not lies[0].first:
            at_once = upload.ragged(own, self._foldings.of(own.lengths))
            return lambda: _Call(rows, at_once())
        by_itself = upload.ragged(own, self._foldings.of_prompts, is_part=True)
        if in_one:
            return lambda: _Call(rows, by_itself())
        behind = [(each, window) for each, window in windows if _first_of(window) > each.at]
        before = Places(
            [len(window) for _, window in behind],
            [each.at for each, _ in behind],
            [_first_of(window) - each.at for each, window in behind],
        )
        before.check(num_tokens)
        ragged = upload.ragged(before, self._foldings.of_prompts, is_part=True)
        its = upload.indices([
            each.row - rows.start + place - each.begin for each, window in behind for place in window
        ])  # fmt: skip
        full = upload.indices([window.start // WINDOW for each in lies for window in each.windows[:-1]])
        return lambda: _Call(rows, by_itself(), _Before(its(), ragged(), full()))


def _rows_of(lies: Sequence[_Lies]) -> slice:
    """The rows of a micro-batch that some segments are."""
    return slice(lies[0].row, lies[-1].row + lies[-1].length)


def _first_of(window: range) -> int:
    """Where a window begins whose new tokens are these."""
    return window.start - window.start % WINDOW


def stores_of(numbers: Sequence[list[int]], upload: Upload) -> Callable[[], Stores]:
    """Where new tokens go, once the numbers are sent."""
    sent = [upload.indices(each) for each in numbers]
    return lambda: Stores(*(each() for each in sent))


def _begin(segment: Segment) -> int:
    """Where a sequence's one range of the pool begins."""
    assert segment.holding is not None
    (extent,) = segment.holding.extents
    return extent.offset
