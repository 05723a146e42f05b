"""The arithmetic of claims: how fast the machine's limits would have let this run be. No torch here."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.memory.lane import LaneName

UNPACKING = "unpacking"
"""No lane of its own, but part of compute: values a second that are unpacked from four bits."""
COMPUTE = str(LaneName.DEVICE_COMPUTE)
DISK_READ = str(LaneName.DISK_READ)
HOST_TO_DEVICE = str(LaneName.HOST_TO_DEVICE)


@dataclass(frozen=True, slots=True)
class Limits:
    """What each lane can do in a second: bytes, or floating-point operations for compute."""

    alone: Mapping[str, float]
    busy: Mapping[str, float]
    """While all other lanes that the run uses are busy too."""

    @classmethod
    def best(cls, measured: Iterable["Limits"]) -> "Limits":
        """The highest of several measurements: a limit that was exceeded once was none."""
        alone: dict[str, float] = {}
        busy: dict[str, float] = {}
        for limits in measured:
            for into, values in ((alone, limits.alone), (busy, limits.busy)):
                into.update({lane: max(rate, into.get(lane, 0.0)) for lane, rate in values.items()})
        return cls(alone, busy)


@dataclass(frozen=True, slots=True)
class PassWork:
    """What one pass moved and computed."""

    lane_bytes: Mapping[str, int]
    flops: float
    unpacked: float = 0.0
    """Values."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The least time for a run's passes, and the lane that was the longest for most of it."""

    seconds: float
    lane: str


def raised(limits: Limits, passes: Sequence[PassWork], seconds: float) -> Limits:
    """No limit is lower than what a lane did in the mean over a whole run, whatever a short measurement before it said.

    A lane without a limit stays without.
    """
    done: defaultdict[str, float] = defaultdict(float)
    for this_pass in passes:
        done[COMPUTE] += this_pass.flops
        for lane, num_bytes in this_pass.lane_bytes.items():
            done[lane] += num_bytes
        done[UNPACKING] += this_pass.unpacked
    rates = {lane: done[lane] / seconds for lane in limits.busy}
    return Limits.best([limits, Limits(rates, rates)])


def bound_of(passes: Iterable[PassWork], limits: Limits) -> Bound:
    """The sum over the passes of the longest lane at its busy bandwidth; a lane without a limit does not count."""
    longest: defaultdict[str, float] = defaultdict(float)
    for this_pass in passes:
        moved = this_pass.lane_bytes.items()
        seconds = {lane: num_bytes / limits.busy[lane] for lane, num_bytes in moved if lane in limits.busy}
        seconds[COMPUTE] = this_pass.flops / limits.busy[COMPUTE]
        if this_pass.unpacked:
            seconds[COMPUTE] += this_pass.unpacked / limits.busy[UNPACKING]
        lane = max(seconds, key=lambda each: seconds[each])
        longest[lane] += seconds[lane]
    if not longest:
        return Bound(0.0, COMPUTE)
    return Bound(sum(longest.values()), max(longest, key=lambda each: longest[each]))
