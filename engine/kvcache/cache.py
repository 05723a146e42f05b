"""Who holds which room of the KV cache: ranges of tokens in the tiers, reserved at admission. No tensor, no torch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from engine.errors import DiskFull, EngineError
from engine.memory.ranges import FreeRanges
from engine.sequence import Sequence
from engine.tiers import TierName


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


class KVCache:
    """The books of the cache: a sequence reserves its maximum, so that nothing is ever preempted."""

    def __init__(
        self,
        tokens: Mapping[TierName, int],
        *,
        extent_tokens: int,
        fills_together: bool = False,
        claim: Callable[[TierName, int], None] | None = None,
    ) -> None:
        """An empty cache.

        Args:
            tokens: how many each tier has room for.
            extent_tokens: the longest extent.
            fills_together: shares were asked for, and the tier that is furthest below its own is filled next; else the
                one that is nearest to compute.
            claim: is called before tokens of a tier are handed out, with the end of their range; may raise
                ``DiskFull``.
        """
        self._tokens = dict(tokens)
        self._extent_tokens = extent_tokens
        self._fills_together = fills_together
        self._claim = claim
        self._free = {tier: FreeRanges(count) for tier, count in tokens.items()}
        self.held: dict[Sequence, Holding] = {}

    @property
    def largest_sequence(self) -> int:
        """Tokens of the longest sequence that an empty cache can hold."""
        return max(self._tokens.values())

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
        needed = sequence.num_kv_tokens
        tiers = [tier for tier in TierName if self._tokens.get(tier) and self._free[tier].free >= needed]
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
                self.held[sequence] = Holding(tier, extents)
                return True
        return False

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's room, if it has any."""
        holding = self.held.pop(sequence, None)
        if holding is not None:
            self._give(holding.tier, holding.extents)

    def _reserve(self, tier: TierName, needed: int) -> tuple[Extent, ...] | None:
        """``None``: as much is free, but not in gaps that are long enough.

        Short gaps are left alone: a sequence in pieces of any length would fill them, but leave shorter ones still to
        the next, and attention over seven pieces takes up to twenty times as long as over one.
        """
        taken: list[Extent] = []
        try:
            for start in range(0, needed, self._extent_tokens):
                capacity = min(self._extent_tokens, needed - start)
                offset = self._free[tier].allocate(capacity)
                if offset is None:
                    self._give(tier, taken)
                    return None
                taken.append(Extent(start, capacity, offset))
                if self._claim is not None:
                    self._claim(tier, offset + capacity)
        except BaseException:
            self._give(tier, taken)
            raise
        return tuple(taken)

    def _give(self, tier: TierName, extents: Iterable[Extent]) -> None:
        for extent in extents:
            self._free[tier].release(extent.offset, extent.capacity)
