"""Who holds which room of the KV cache: ranges of tokens in the tiers, reserved at admission. No tensor, no torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from engine.errors import DiskFull, EngineError
from engine.memory.ranges import FreeRanges
from engine.sequence import Sequence
from engine.tiers import TierName
from engine.units import align_up

PAGE_TOKENS = 64
"""Tokens of a page."""


class Layout(StrEnum):
    """How a sequence lies in a tier."""

    EXTENTS = "extents"
    """In pieces of one length, and a last one: room in shorter gaps is left alone."""
    ONE_PIECE = "one piece"
    """Where no gap is long enough, others are moved."""
    PAGES = "pages"
    """In as many pieces as there are gaps, each of whole pages: what is free can be had, and nothing is ever moved."""


def layouts(*, shares_host_memory: bool) -> dict[TierName, Layout]:
    """By tier. Where compute is the CPU, it attends to a head's keys as they lie, piece by piece. A GPU's kernels take
    a sequence in one piece. What compute cannot address is fetched, from however many places.
    """
    if shares_host_memory:
        return {TierName.DEVICE: Layout.EXTENTS, TierName.HOST: Layout.EXTENTS, TierName.DISK: Layout.PAGES}
    return {TierName.DEVICE: Layout.ONE_PIECE, TierName.HOST: Layout.PAGES, TierName.DISK: Layout.PAGES}


def unit_tokens(layout: Layout, extent_tokens: int) -> int:
    """Tokens of which a sequence's room is a multiple; no page is longer than an extent."""
    return min(PAGE_TOKENS, extent_tokens) if layout is Layout.PAGES else 1


@dataclass(frozen=True, slots=True)
class SequenceRoom:
    """How much room a sequence takes, in tokens."""

    window: int = 1
    """A multiple of these."""
    beside: int = 0
    """And so much more, behind that of its tokens."""

    def of(self, tokens: int) -> int:
        """The room of a sequence with this number of tokens."""
        return align_up(tokens, self.window) + self.beside if tokens else 0

    def longest_in(self, room: int) -> int:
        """Tokens of the longest sequence that finds room."""
        return max(0, room - self.beside) // self.window * self.window


ROOM_OF_TOKENS = SequenceRoom()
"""Where tokens are all that is kept."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive tokens of one sequence in consecutive room of one tier, in all layers alike."""

    start: int
    """Position of its first token in the sequence."""
    capacity: int
    """Tokens there is room for."""
    offset: int
    """Where its room begins, in tokens of the tier."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Holding:
    """The room of one sequence, in order of position: all of it in one tier."""

    tier: TierName
    extents: tuple[Extent, ...]
    layout: Layout = Layout.EXTENTS

    @property
    def is_addressable(self) -> bool:
        """Whether compute attends to it as it lies; else it is fetched."""
        return self.layout is not Layout.PAGES


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens of a tier that go to another place in it, in all layers: nearer to its beginning."""

    tier: TierName
    source: int
    destination: int
    num_tokens: int


class KVCache:
    """The books of the cache: a sequence reserves its maximum, so that nothing is ever preempted."""

    def __init__(
        self,
        tokens: Mapping[TierName, int],
        *,
        extent_tokens: int,
        layouts: Mapping[TierName, Layout] | None = None,
        room: SequenceRoom = ROOM_OF_TOKENS,
        fills_together: bool = False,
        claim: Callable[[TierName, int], None] | None = None,
    ) -> None:
        """An empty cache.

        Args:
            tokens: how many each tier has room for.
            extent_tokens: the longest extent, and no page is longer.
            layouts: of the tiers; of those that are not named, in extents.
            room: what a sequence takes.
            fills_together: shares were asked for, and the tier that is furthest below its own is filled next; else the
                one that is nearest to compute.
            claim: is called before tokens of a tier are handed out, with the end of their range; may raise
                ``DiskFull``.
        """
        self._extent_tokens = extent_tokens
        self._layouts = {tier: (layouts or {}).get(tier, Layout.EXTENTS) for tier in tokens}
        self._tokens = {tier: count - count % self._unit(tier) for tier, count in tokens.items()}
        self.room = room
        self._fills_together = fills_together
        self._claim = claim
        self._free = {tier: FreeRanges(count) for tier, count in self._tokens.items()}
        self.held: dict[Sequence, Holding] = {}

    @property
    def largest_sequence(self) -> int:
        """Tokens of the longest sequence that an empty cache can hold."""
        return self.room.longest_in(max(self._tokens.values()))

    @property
    def num_tokens(self) -> int:
        """Tokens there is room for, in all tiers together."""
        return sum(self._tokens.values())

    @property
    def held_tokens(self) -> int:
        """Tokens that are reserved for sequences."""
        return self.num_tokens - self.free_tokens

    @property
    def free_tokens(self) -> int:
        """Tokens for which no room is reserved, in all tiers together, also those in gaps too short for an extent."""
        return sum(ranges.free for ranges in self._free.values())

    def check_integrity(self) -> None:
        """Raise ``EngineError`` unless what is reserved is what the sequences hold."""
        for tier, ranges in self._free.items():
            extents = [each for holding in self.held.values() if holding.tier is tier for each in holding.extents]
            of_sequences, reserved = sum(each.capacity for each in extents), self._tokens[tier] - ranges.free
            if of_sequences != reserved:
                raise EngineError(f"{tier}: {reserved} tokens of KV cache are reserved, sequences hold {of_sequences}")

    def admit(self, sequence: Sequence) -> bool:
        """Reserve room until the sequence's end, all of it in one tier; ``False``: not now.

        Raises:
            DiskFull: the spill file cannot grow although its budget would allow it, and no sequence holds any room.
        """
        needed = self.room.of(sequence.num_kv_tokens)
        tiers = [
            tier
            for tier in TierName
            if self._tokens.get(tier) and self._free[tier].free >= align_up(needed, self._unit(tier))
        ]
        if self._fills_together:
            tiers.sort(key=lambda tier: 1 - self._free[tier].free / self._tokens[tier])
        for tier in tiers:
            try:
                extents = self._reserve(tier, needed)
            except DiskFull:
                if not self.held:  # else: when a running sequence ends, its part of the spill file is free
                    raise
                continue
            if extents is not None:
                self.held[sequence] = Holding(tier, extents, self._layouts[tier])
                return True
        return False

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's room, if it has any."""
        holding = self.held.pop(sequence, None)
        if holding is not None:
            self._give(holding.tier, holding.extents)

    def make_gap(self, sequence: Sequence) -> tuple[Move, ...]:
        """Where enough tokens are free for a sequence but no gap is long enough: what must be moved for it to fit.

        The books have the new places at once, so the moves come before the next pass, and after those of before.
        """
        needed = self.room.of(sequence.num_kv_tokens)
        for tier, layout in self._layouts.items():
            if layout is Layout.ONE_PIECE and self._free[tier].longest < needed <= self._free[tier].free:
                return self._joined(tier, needed)
        return ()

    def _joined(self, tier: TierName, needed: int) -> tuple[Move, ...]:
        """Neighbouring gaps are joined, those that have the fewest tokens between them, by moving these down."""
        in_order = sorted(
            (
                (one, holding.extents[0])
                for one, holding in self.held.items()
                if holding.tier is tier and holding.extents
            ),
            key=lambda each: each[1].offset,
        )
        ends = [0, *(extent.offset + extent.capacity for _, extent in in_order)]
        begins = [*(extent.offset for _, extent in in_order), self._tokens[tier]]
        gaps = [begin - end for end, begin in zip(ends, begins, strict=True)]
        best, first, together, between = (self._tokens[tier], 0, 0), 0, 0, 0
        for last, gap in enumerate(gaps):
            together += gap
            between += in_order[last - 1][1].capacity if last else 0
            while together - gaps[first] >= needed:
                together -= gaps[first]
                between -= in_order[first][1].capacity
                first += 1
            if together >= needed:
                best = min(best, (between, first, last))
        _, first, last = best
        moves, end = [], ends[first]
        for sequence, extent in in_order[first:last]:
            if extent.offset > end:
                self.held[sequence] = Holding(tier, (replace(extent, offset=end),), Layout.ONE_PIECE)
                moves.append(Move(tier, extent.offset, end, extent.capacity))
            end += extent.capacity
        taken = [holding.extents[0] for holding in self.held.values() if holding.tier is tier and holding.extents]
        self._free[tier] = FreeRanges.around(self._tokens[tier], [(each.offset, each.capacity) for each in taken])
        return tuple(moves)

    def _unit(self, tier: TierName) -> int:
        """Tokens of which room is a multiple."""
        return unit_tokens(self._layouts[tier], self._extent_tokens)

    def _reserve(self, tier: TierName, needed: int) -> tuple[Extent, ...] | None:
        """``None``: as much is free, but not in gaps that are long enough."""
        taken: list[Extent] = []
        start = 0
        try:
            for offset, capacity in self._ranges(tier, needed):
                if offset is None:
                    self._give(tier, taken)
                    return None
                taken.append(Extent(start, capacity, offset))
                start += capacity
                if self._claim is not None:
                    self._claim(tier, offset + capacity)
        except BaseException:
            self._give(tier, taken)
            raise
        return tuple(taken)

    def _ranges(self, tier: TierName, needed: int) -> Iterator[tuple[int | None, int]]:
        """Room for a sequence, each piece taken as it is asked for; ``None``: no gap is long enough.

        A sequence in extents leaves short gaps alone: in pieces of any length it would fill them, but leave shorter
        ones still to the next, and attention over seven pieces takes up to twenty times as long as over one.
        """
        free, layout = self._free[tier], self._layouts[tier]
        if layout is Layout.PAGES:
            rest = align_up(needed, self._unit(tier))
            while rest:
                size = rest if free.longest >= rest else free.first
                yield free.allocate(size), size
                rest -= size
            return
        if layout is Layout.ONE_PIECE:
            if needed:
                yield free.allocate(needed), needed
            return
        tokens = needed - self.room.beside if needed else 0
        for start in range(0, tokens, self._extent_tokens):
            size = min(self._extent_tokens, tokens - start)
            yield free.allocate(size), size
        if self.room.beside and needed:
            yield free.allocate(self.room.beside), self.room.beside

    def _give(self, tier: TierName, extents: Iterable[Extent]) -> None:
        for extent in extents:
            self._free[tier].release(extent.offset, extent.capacity)
