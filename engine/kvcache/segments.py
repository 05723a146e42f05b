"""What is computed together: pieces of sequences, packed into micro-batches. No torch."""

from dataclasses import dataclass

from engine.kvcache.cache import Holding
from engine.sequence import Sequence


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
    def is_decode(self) -> bool:
        """Whether it is one generated token."""
        return self.length == 1 and self.start >= self.sequence.num_prompt_tokens and not self.sequence.is_scored


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Segments computed together, their tokens packed one after another; no two are of one sequence."""

    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        """Equal to the sum of the segments' lengths."""
        return sum(segment.length for segment in self.segments)
