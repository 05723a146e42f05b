"""Which keys and values come together from where compute cannot address them: groups that fill a buffer. No tensor.

A sequence's keys lie in a buffer as in a pool, one token after the other: first those that are fetched, then room for
those that the pass adds. A sequence that is longer than a buffer comes in parts, in several groups, and its own tokens
attend to themselves in none. Where keys are packed by windows, there is one group more: it has the end of what lies
before, and room for the new tokens, as if the sequence were shorter.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from engine.kvcache.cache import ROOM_OF_TOKENS, Extent, SequenceRoom
from engine.kvcache.segments import Kind, MicroBatch, Segment
from engine.sequence import Sequence as Tokens
from engine.tiers import TierName
from engine.units import align_up, div_ceil

LEAST_GROUPS = 2
"""Groups of a micro-batch, at least, if it has two sequences: what comes first in a pass is waited for, and should be
little. With four, a ring of three buffers would hold less than a layer, and each would wait behind a piece of the
weights."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of a tier, and where they go."""

    offset: int
    """In tokens of the tier."""
    num_tokens: int
    at: int
    """In tokens of the buffer."""


@dataclass(frozen=True, slots=True)
class Share:
    """One segment's part of a group."""

    row: int
    """The segment's first row in its micro-batch."""
    length: int
    """Its rows."""
    first: int
    """The position of the first token that is fetched."""
    at: int
    """Where its keys begin in the buffer."""
    past: int
    """How many are fetched."""
    size: int
    """Tokens of the buffer that are the segment's."""
    runs: tuple[Run, ...]
    open_at: int | None = None
    """Where the plain keys of its last window begin, if that is not full: see ``int4_windows``."""


@dataclass(frozen=True, slots=True)
class Group:
    """What is in a buffer at once."""

    tier: TierName
    shares: tuple[Share, ...]
    is_part: bool
    """Some keys of one segment, without its own."""
    is_last: bool
    """Whether no other group has keys of a segment in it after this one."""
    follows: int
    """The last micro-batch of the same pass that adds to what is fetched; -1: none does."""

    @property
    def rows(self) -> slice:
        """The rows of the micro-batch that the group holds."""
        return slice(self.shares[0].row, self.shares[-1].row + self.shares[-1].length)

    @property
    def num_tokens(self) -> int:
        """How much of the buffer is used, room for added tokens included."""
        return self.shares[-1].at + self.shares[-1].size


def groups_of(
    batches: Sequence[MicroBatch], most: int, room: SequenceRoom = ROOM_OF_TOKENS, *, host_attends: bool = False
) -> list[list[Group]]:
    """The groups of each micro-batch of a pass, of at most ``most`` tokens.

    ``room``: what sequences take. Where they are kept by windows, ``most`` is a multiple of one,
    and at least ``least_tokens``.
    ``host_attends``: those that can are attended to where they lie, and come in no group.
    """
    added: dict[Tokens, int] = {}
    """The last micro-batch so far with tokens of a sequence."""
    found = []
    for index, batch in enumerate(batches):
        row = 0
        segments: list[tuple[int, Segment]] = []
        for segment in batch.segments:
            if segment.kind is Kind.ELSEWHERE and not (host_attends and segment.can_attend_on_host):
                segments.append((row, segment))
            row += segment.length
        tokens = sum(_size(segment, room) for _, segment in segments)
        found.append(list(_packed(segments, most, min(most, div_ceil(tokens, LEAST_GROUPS)), room, added)))
        added.update((segment.sequence, index) for segment in batch.segments)
    return found


def _packed(
    segments: Sequence[tuple[int, Segment]], most: int, wanted: int, room: SequenceRoom, added: dict[Tokens, int]
) -> Iterator[Group]:
    """``wanted``: tokens of a group that is no larger than one sequence makes it."""
    together: list[Share] = []
    tier, at, follows = TierName.HOST, 0, -1
    for row, segment in segments:
        assert segment.holding is not None
        cut = _in_parts(segment, most, room)
        size = _size(segment, room) - cut
        if together and (cut or at + size > wanted or segment.holding.tier is not tier):
            yield Group(tier, tuple(together), is_part=False, is_last=True, follows=follows)
            together, at, follows = [], 0, -1
        tier = segment.holding.tier
        before = added.get(segment.sequence, -1)
        for first in range(0, cut, most):
            past = min(most, cut - first)
            runs = tuple(runs_of(segment.holding.extents, first, past, 0))
            share = Share(row, segment.length, first, 0, past, past, runs)
            yield Group(tier, (share,), is_part=True, is_last=first + past == segment.start, follows=before)
        if cut == segment.start:
            continue
        runs = tuple(runs_of(segment.holding.extents, cut, segment.start - cut, at))
        open_at = None
        if segment.start % room.window:
            open_at = at + size - align_up(room.beside, room.window)
            count = div_ceil(segment.start % room.window * room.beside, room.window)
            runs += tuple(runs_of(segment.holding.extents, open_from(segment, room), count, open_at))
        together.append(Share(row, segment.length, cut, at, segment.start - cut, size, runs, open_at))
        at, follows = at + size, max(follows, before)
    if together:
        yield Group(tier, tuple(together), is_part=False, is_last=True, follows=follows)


def least_tokens(most_rows: int, room: SequenceRoom) -> int:
    """Tokens of the smallest buffer with room for the last part of any sequence and ``most_rows`` new tokens."""
    if not room.beside:
        return 1
    # The window in which they begin may have earlier ones, and plain keys.
    return align_up(most_rows, room.window) + room.window + align_up(room.beside, room.window)


def _in_parts(segment: Segment, most: int, room: SequenceRoom) -> int:
    """How many of a segment's earlier tokens come in parts by themselves, if it is longer than a buffer."""
    beyond = _size(segment, room) - most
    if beyond <= 0:
        return 0
    return beyond if room.beside else segment.start


def _size(segment: Segment, room: SequenceRoom) -> int:
    """Tokens of a buffer: whole windows, also for the plain keys behind them."""
    tokens = align_up(segment.start + segment.length, room.window)
    return tokens + (align_up(room.beside, room.window) if segment.start % room.window else 0)


def open_from(segment: Segment, room: SequenceRoom) -> int:
    """Where in the sequence's holding the plain keys of the window that is not full begin, in tokens."""
    return room.of(segment.sequence.num_kv_tokens) - room.beside


def runs_of(extents: Sequence[Extent], first: int, count: int, at: int) -> Iterator[Run]:
    """Where ``count`` tokens of a sequence lie, from its token ``first`` on."""
    for extent in extents:
        begin, end = max(first, extent.start), min(first + count, extent.start + extent.capacity)
        if begin < end:
            yield Run(extent.offset + begin - extent.start, end - begin, at + begin - first)


@dataclass(frozen=True, slots=True)
class Kept:
    """Rows of a micro-batch whose keys and values are kept where compute cannot address them."""

    first_row: int
    num_rows: int
    runs: tuple[tuple[TierName, Run], ...]
    """Where they go; ``at`` counts from the first of these rows."""


def unwritten(runs: Iterable[Run], page_tokens: int) -> Iterator[int]:
    """Tokens of a tier that lie behind the last of a run, in a page that the run begins: nobody has written them."""
    for run in runs:
        end = run.offset + run.num_tokens
        page_end = align_up(end, page_tokens)
        if page_end - page_tokens >= run.offset:
            yield from range(end, page_end)


def kept_of(batch: MicroBatch) -> Kept:
    """What of a micro-batch is stored elsewhere: its last rows."""
    runs: list[tuple[TierName, Run]] = []
    row, first = 0, batch.num_tokens
    for segment in batch.segments:
        holding = segment.holding
        if holding is not None and not holding.is_addressable:
            first = min(first, row)
            found = runs_of(holding.extents, segment.start, segment.length, row - first)
            runs += [(holding.tier, run) for run in found]
        row += segment.length
    return Kept(first, row - first, tuple(runs))
