"""Which calls a micro-batch takes on a device with memory of its own, over keys that are packed by windows.

Some sequences at a time, their keys and values are unpacked into a buffer, each sequence from the beginning of a window
on. There the keys of a query's own window must be plain, and those of windows before it rounded. Where new tokens are
in one window, that is one call. Where they are in several, two: each window by itself, as if it were a sequence; then
what became full is rounded, and each attends to what lies before it; and both are merged. A sequence that is longer
than the buffer comes in parts, and its new tokens with the last of them.

Shapes: n windows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from engine.attention.groups import Group, open_from
from engine.attention.int4_sizes import WINDOW
from engine.attention.int4_window_rows import WindowRows
from engine.attention.int4_window_store import Added, Stores, places_of
from engine.attention.packed import Foldings, Places, Ragged
from engine.attention.upload import Upload
from engine.kvcache.cache import SequenceRoom
from engine.kvcache.segments import Kind, MicroBatch, Segment
from engine.units import align_up


class Before(NamedTuple):
    """The keys before each window, and the queries that attend to them."""

    rows: Tensor
    """Where these queries are among those of the call, int64."""
    ragged: Ragged
    full: Tensor
    """New windows of the buffer that are full, and rounded first: int64."""


class Call(NamedTuple):
    """Some rows of a micro-batch that are attended to at once."""

    rows: slice
    own: Ragged
    """Of queries whose new tokens are in one window: all keys up to their own. Else each window's own. Of a part: all
    that is in the buffer, which lies before the queries."""
    before: Before | None = None
    """Where new tokens are in several windows."""


@dataclass(frozen=True, slots=True)
class Chunk:
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
    calls: list[Call]
    is_part: bool
    """It has keys of one segment that lie before its new tokens' windows, and others come after it."""
    follows_parts: bool
    """It is the last of these."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a micro-batch needs, in every layer alike."""

    stores: list[Stores]
    """Where its first rows are kept in the pool."""
    chunks: list[Chunk]


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


class WindowCalls:
    """Knows where sequences lie in a pool, in a group and in the buffer."""

    def __init__(
        self, foldings: Foldings, rows: WindowRows, room: SequenceRoom, *, buffer_tokens: int, most_windows: int
    ) -> None:
        """``room``: what a sequence takes; ``most_windows``: how many are packed at once."""
        self._foldings, self._rows, self._room = foldings, rows, room
        self._buffer_tokens, self._most_windows = buffer_tokens, most_windows

    def of(self, batch: MicroBatch, groups: Sequence[Group], upload: Upload) -> Callable[[], Work]:
        """Those of a micro-batch, once the upload is sent; ``groups``: what it fetches."""
        added: list[Added] = []
        chunks: list[Callable[[], Chunk]] = []
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
        return lambda: Work([each() for each in to], [each() for each in chunks])

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

    def _chunks(self, segments: Sequence[Segment], row: int, upload: Upload) -> Iterator[Callable[[], Chunk]]:
        """As many sequences together as find room in the buffer; longer ones in parts."""
        most = self._buffer_tokens
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

    def _chunk_of(self, group: Group, upload: Upload) -> Callable[[], Chunk]:
        if group.is_part:
            return self._part_of(group.rows, group.num_tokens, (), upload, group)
        lies = []
        for share in group.shares:
            opened = () if share.open_at is None else range(share.open_at, share.open_at + self._room.beside)
            lies.append(_Lies(share.row, share.first + share.past, share.length, share.first, share.at, opened))
        return self._chunk(lies, (), upload, group)

    def _part_of(
        self, rows: slice, num_tokens: int, tokens: Sequence[int], upload: Upload, group: Group | None = None
    ) -> Callable[[], Chunk]:
        """Some of what lies before a segment, by itself."""
        ragged = self._part(Places([rows.stop - rows.start], [0], [num_tokens]), upload)
        from_pool = upload.indices(tokens) if group is None else None
        nothing = upload.indices(())
        return lambda: Chunk(
            num_tokens,
            None if from_pool is None else from_pool(),
            group,
            opened=nothing(),
            opened_at=nothing(),
            rows=rows,
            at=nothing(),
            calls=[Call(rows, ragged())],
            is_part=True,
            follows_parts=False,
        )

    def _chunk(
        self, lies: Sequence[_Lies], tokens: Sequence[int], upload: Upload, group: Group | None = None
    ) -> Callable[[], Chunk]:
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
        return lambda: Chunk(
            num_tokens,
            None if from_pool is None else from_pool(),
            group,
            opened=opened(),
            opened_at=opened_at(),
            rows=_rows_of(lies),
            at=at(),
            calls=[each() for each in calls],
            is_part=False,
            follows_parts=lies[0].first > 0,
        )

    def _call_of(self, lies: Sequence[_Lies], num_tokens: int, upload: Upload) -> Callable[[], Call]:
        windows = [(each, window) for each in lies for window in each.windows]
        rows, in_one = _rows_of(lies), len(windows) == len(lies)
        # In one call for all keys these begin with the sequence's; in a call for each window, with the window's.
        begins = [each.at if in_one else _first_of(window) for each, window in windows]
        own = Places(
            [len(window) for _, window in windows],
            begins,
            [window.stop - begin for (_, window), begin in zip(windows, begins, strict=True)],
        )
        own.check(num_tokens)
        if in_one and not lies[0].first:
            at_once = upload.ragged(own, self._foldings.of(own.lengths))
            return lambda: Call(rows, at_once())
        by_itself = self._part(own, upload)
        if in_one:
            return lambda: Call(rows, by_itself())
        behind = [(each, window) for each, window in windows if _first_of(window) > each.at]
        before = Places(
            [len(window) for _, window in behind],
            [each.at for each, _ in behind],
            [_first_of(window) - each.at for each, window in behind],
        )
        before.check(num_tokens)
        ragged = self._part(before, upload)
        its = upload.indices([
            each.row - rows.start + place - each.begin for each, window in behind for place in window
        ])  # fmt: skip
        full = upload.indices([window.start // WINDOW for each in lies for window in each.windows[:-1]])
        return lambda: Call(rows, by_itself(), Before(its(), ragged(), full()))

    def _part(self, places: Places, upload: Upload) -> Callable[[], Ragged]:
        """What is merged with others."""
        return upload.ragged(places, self._foldings.of_prompts, is_part=True)


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
