"""Attention on a device with memory of its own, over keys that are packed by windows: see ``int4_windows``.

Some sequences at a time, their keys and values are unpacked into a buffer, each sequence from the beginning of a window
on. There the keys of a query's own window must be plain: so sequences are computed a window at a time, all of them
together, and what a step has made full is rounded in the buffer before the next.

Shapes: T tokens of a micro-batch, S tokens of a buffer or rows of a pool, n windows, w tokens of one, N query heads, K
key/value heads, H head size, B bytes of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from engine.attention.elsewhere import Elsewhere
from engine.attention.groups import Group, open_from
from engine.attention.host_attention import HostAttention
from engine.attention.int4_sizes import WINDOW, packed_windows
from engine.attention.int4_window_rows import WindowRows, windows_of
from engine.attention.int4_window_store import Added, Stores, places_of, store
from engine.attention.packed import Places, Ragged, attend_packed
from engine.attention.packed_runner import PackedRunner
from engine.attention.pools import KVPools
from engine.attention.table import Kernel
from engine.attention.upload import Upload
from engine.kvcache.cache import SequenceRoom
from engine.kvcache.segments import Kind, MicroBatch, Segment
from engine.memory.device import Device
from engine.shape import ModelShape
from engine.units import align_up


@dataclass(frozen=True, slots=True)
class _Lies:
    """A segment in a buffer."""

    row: int
    """Its first row in the micro-batch."""
    start: int
    length: int
    at: int
    """Where its sequence begins in the buffer."""
    opened: Sequence[int] = ()
    """Rows with the plain keys of its first window, if that has earlier tokens."""

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Positions of its first and behind its last token in each of its windows."""
        end = self.start + self.length
        firsts = range(self.start - self.start % WINDOW, end, WINDOW)
        return [(max(self.start, first), min(end, first + WINDOW)) for first in firsts]


@dataclass(frozen=True, slots=True)
class _Step:
    """A window of each sequence that has another."""

    rows: slice | Tensor
    """Their queries, in a row or by numbers, int64."""
    ragged: Ragged
    full: Tensor
    """Windows of the buffer that later steps see: int64."""


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
    """Where they go, int64."""
    steps: list[_Step]


@dataclass(frozen=True, slots=True)
class _Work:
    """What a micro-batch needs, in every layer alike."""

    stores: list[Stores]
    """Where its first rows are kept in the pool."""
    chunks: list[_Chunk]


class WindowedRunner(PackedRunner):
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
        room: SequenceRoom,
        unpacked_tokens: int,
    ) -> None:
        """As ``PackedRunner``; ``room``: what a sequence takes."""
        super().__init__(shape, kernel, device, pools, elsewhere, on_host, unpacked_tokens=unpacked_tokens)
        assert isinstance(pools.rows, WindowRows)
        self._window_rows, self._room = pools.rows, room
        self._most_windows = packed_windows(shape)
        self._window_work: list[_Work] = []

    def close(self) -> None:
        """Free everything."""
        self._window_work.clear()
        super().close()

    def _stores_first(self, index: int) -> bool:
        """Not where keys are fetched: a new window's plain ones go where those of the one before are read from."""
        return not self._elsewhere.groups(index)

    def _prepare(self, batches: Sequence[MicroBatch]) -> None:
        upload = Upload()
        coming = [self._work_of(batch, self._elsewhere.groups(index), upload) for index, batch in enumerate(batches)]
        upload.send(self._device)
        self._window_work = [each() for each in coming]

    def _attend(self, layer: int, index: int, q_TNH: Tensor, kv_T2KH: Tensor, stored: Tensor, out_TNH: Tensor) -> None:
        work = self._window_work[index]
        for chunk in work.chunks:
            with self._filled(layer, chunk) as kv_S2KH:
                kv_S2KH.index_copy_(0, chunk.at, kv_T2KH[chunk.rows])
                for step in chunk.steps:
                    self._step(step, kv_S2KH, q_TNH, out_TNH)
        # Behind attention: windows that become full are read plain until then.
        for each in work.stores:
            store(self._window_rows, self._layers[layer], each, kv_T2KH[:, 0], stored)

    def _step(self, step: _Step, kv_S2KH: Tensor, q_TNH: Tensor, out_TNH: Tensor) -> None:
        if isinstance(step.rows, slice):
            attend_packed(self._kernel, q_TNH[step.rows], kv_S2KH, step.ragged, out_TNH[step.rows])
        else:
            found = out_TNH.new_empty(len(step.rows), *out_TNH.shape[1:])
            attend_packed(self._kernel, q_TNH.index_select(0, step.rows), kv_S2KH, step.ragged, found)
            out_TNH.index_copy_(0, step.rows, found)
        if len(step.full):
            windows_nwKH = windows_of(kv_S2KH).index_select(0, step.full)
            self._window_rows.round_windows(windows_nwKH)
            windows_of(kv_S2KH).index_copy_(0, step.full, windows_nwKH)

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
            windows = self._window_rows.opened(rows_SB, chunk.opened.view(len(chunk.opened_at), -1))
            windows_of(kv_S2KH).index_copy_(0, chunk.opened_at, windows)
        return kv_S2KH

    def _work_of(self, batch: MicroBatch, groups: Sequence[Group], upload: Upload) -> Callable[[], _Work]:
        added: list[Added] = []
        chunks: list[Callable[[], _Chunk]] = []
        row = 0
        for (kind, _), some in groupby(batch.segments, key=lambda each: (each.kind, self._splits and each.length > 1)):
            segments = list(some)
            if kind is Kind.HERE:
                added += self._added(segments, row)
            if kind is not Kind.ELSEWHERE:
                chunks += self._chunks(segments, row, upload)
            row += sum(segment.length for segment in segments)
        chunks += [self._chunk_of(group, upload) for group in groups]
        to = [stores_of(each, upload) for each in places_of(added, self._window_rows, self._most_windows)]
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
        """As many sequences together as find room in the buffer."""
        lies, tokens, at = list[_Lies](), list[int](), 0
        for segment in segments:
            size = align_up(segment.start + segment.length, WINDOW)
            if lies and at + size > self._unpacked_tokens:
                yield self._chunk(lies, tokens, at, None, upload)
                lies, tokens, at = [], [], 0
            is_here = segment.kind is Kind.HERE
            opened = self._opened(segment) if is_here and segment.start % WINDOW else ()
            lies.append(_Lies(row, segment.start, segment.length, at, opened))
            tokens += range(_begin(segment), _begin(segment) + size) if is_here else ()
            at, row = at + size, row + segment.length
        yield self._chunk(lies, tokens, at, None, upload)

    def _chunk_of(self, group: Group, upload: Upload) -> Callable[[], _Chunk]:
        lies = []
        for share in group.shares:
            opened = () if share.open_at is None else range(share.open_at, share.open_at + self._room.beside)
            lies.append(_Lies(share.row, share.past, share.length, share.at, opened))
        return self._chunk(lies, [], group.num_tokens, group, upload)

    def _chunk(
        self, lies: Sequence[_Lies], tokens: Sequence[int], num_tokens: int, group: Group | None, upload: Upload
    ) -> Callable[[], _Chunk]:
        old = [each for each in lies if each.opened]
        opened = upload.indices([row for each in old for row in each.opened])
        opened_at = upload.indices([(each.at + each.start) // WINDOW for each in old])
        begins = [each.at + each.start for each in lies]
        at = upload.indices([place for each, begin in zip(lies, begins, strict=True)
                             for place in range(begin, begin + each.length)])  # fmt: skip
        rows = slice(lies[0].row, lies[-1].row + lies[-1].length)
        most = max(len(each.windows) for each in lies)
        steps = [self._step_of(lies, which, most, num_tokens, rows, upload) for which in range(most)]
        from_pool = upload.indices(tokens) if tokens and any(each.start for each in lies) else None
        return lambda: _Chunk(
            num_tokens, from_pool and from_pool(), group, opened(), opened_at(), rows, at(), [each() for each in steps]
        )

    def _step_of(
        self, lies: Sequence[_Lies], which: int, most: int, num_tokens: int, rows: slice, upload: Upload
    ) -> Callable[[], _Step]:
        """Each one's window ``which``; ``rows``: all of them."""
        here = [(each, each.windows[which]) for each in lies if which < len(each.windows)]
        lengths = [seen - begin for _, (begin, seen) in here]
        places = Places(lengths, [each.at for each, _ in here], [seen for _, (_, seen) in here])
        places.check(num_tokens)
        folding = self._folding_of(lengths)
        ragged = upload.ragged(places, folding)
        full = upload.indices(
            [(each.at + seen) // WINDOW - 1 for each, (_, seen) in here if which + 1 < len(each.windows)]
        )
        if most == 1:
            return lambda: _Step(rows, ragged(), full())
        queries = upload.indices(
            [each.row + position - each.start for each, (begin, seen) in here for position in range(begin, seen)]
        )
        return lambda: _Step(queries(), ragged(), full())


def stores_of(numbers: Sequence[list[int]], upload: Upload) -> Callable[[], Stores]:
    """Where new tokens go, once the numbers are sent."""
    sent = [upload.indices(each) for each in numbers]
    return lambda: Stores(*(each() for each in sent))


def _begin(segment: Segment) -> int:
    """Where a sequence's one range of the pool begins."""
    assert segment.holding is not None
    (extent,) = segment.holding.extents
    return extent.offset
