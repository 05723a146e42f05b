"""What is computed together: pieces of sequences, packed into micro-batches. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from engine.kvcache.cache import Holding
from engine.sequence import Sequence
from engine.tiers import TierName


class Kind(IntEnum):
    """Where the keys are that a segment attends to; in the order in which a micro-batch has its segments."""

    HERE = 0
    """Where compute can address them."""
    OWN = 1
    """In the segment alone: it is the first of its sequence, and is kept elsewhere or not at all."""
    ELSEWHERE = 2


@dataclass(frozen=True, slots=True)
class Segment:
    """Contiguous tokens of one sequence: a prefill chunk or one decode token."""

    sequence: Sequence
    start: int
    """Position of its first token; equal to the tokens computed before it."""
    length: int
    holding: Holding | None = None
    """Where its keys and values are kept; ``None`` where it is the whole sequence: no later token attends to it."""

    @property
    def rows(self) -> range:
        """Rows whose logits are needed, relative to ``start``."""
        return self.sequence.wanted_rows(self.start, self.length)

    @property
    def kind(self) -> Kind:
        """Where its keys are."""
        if self.holding is not None and self.holding.is_addressable:
            return Kind.HERE
        return Kind.ELSEWHERE if self.start else Kind.OWN

    @property
    def can_attend_on_host(self) -> bool:
        """Whether it is a decode token whose keys lie in pages of host memory. No other segment of a pass is of its
        sequence, so it may be computed in any micro-batch."""
        is_on_host = self.holding is not None and self.holding.tier is TierName.HOST
        return self.is_decode and self.kind is Kind.ELSEWHERE and is_on_host

    @property
    def is_decode(self) -> bool:
        """Whether it is one generated token."""
        return self.length == 1 and self.start >= self.sequence.num_prompt_tokens and not self.sequence.is_scored


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Segments computed together, their tokens packed one after another; no two are of one sequence.

    ``arrange`` puts them in order.
    """

    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        """Equal to the sum of the segments' lengths."""
        return sum(segment.length for segment in self.segments)


def arrange(segments: Iterable[Segment]) -> MicroBatch:
    """A micro-batch of these, in the one order in which all devices compute them.

    Each kind is one range of rows; what is kept elsewhere are the last rows. In each, those of one token come first:
    they are attended to in another way.
    """
    return MicroBatch(tuple(sorted(segments, key=_place)))


def _place(segment: Segment) -> tuple[int, str, bool, bool, int]:
    holding = segment.holding
    begin = holding.extents[0].offset if holding is not None and holding.extents else 0
    tier = holding.tier if holding is not None else ""
    return segment.kind, tier, segment.length > 1, not segment.is_decode, begin
