"""What one pass computes: frozen decisions of the scheduler, carried out by the executor."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.kvcache.cache import Move
from engine.kvcache.segments import MicroBatch, Segment
from engine.request import Output

if TYPE_CHECKING:
    from engine.planner.cost import PassCost


@dataclass(frozen=True, slots=True)
class Pass:
    """One trip through all layers."""

    micro_batches: tuple[MicroBatch, ...]
    moves: tuple[Move, ...] = ()
    """Keys and values that go to other places before anything is computed."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, in order."""
        return tuple(segment for batch in self.micro_batches for segment in batch.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassStats:
    """What one pass did."""

    seconds: float
    prefill_tokens: int
    decode_tokens: int
    num_sequences: int
    """Sequences with tokens in this pass."""
    num_waiting: int
    """Sequences that wait for room."""
    lane_bytes: dict[str, int]
    lane_seconds: dict[str, float]
    """How long each lane was busy. ``device_compute`` leaves out what it waited for; work that goes on beside the next
    pass counts where it ends. Before the report of a pass after which nothing runs, keys and values under way are
    waited for, so that a run counts all that it moved."""
    weight_bytes: int
    """How many weight bytes were moved: 0 where all are resident. A first pass counts those of loading, too, which are
    in no lane's figures."""
    bound_by: str
    """The lane that was busy for longest."""
    expected: "PassCost | None" = None
    """What the planner predicted of such a pass, if the plan was found by it."""


@dataclass(frozen=True, slots=True)
class PassReport:
    """The outputs that a pass completed, and its figures."""

    outputs: tuple[Output, ...]
    stats: PassStats
