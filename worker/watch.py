"""Is the plan as good as it promised? Passes as they were predicted against passes as they are."""

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.schedule.passes import PassStats

PASSES = 10
TOLERANCE = 1.25
_SHARE = 0.2
"""Share of a pass: a lane that should be busy for less than that is not what makes the pass late."""


class Watch:
    """Takes passes in; says once if ten of them together take a quarter longer than predicted."""

    def __init__(self) -> None:
        self._said = False
        self._begin()

    def add(self, stats: "PassStats") -> str | None:
        """A sentence for the log, or nothing. Passes without a prediction do not count."""
        if stats.expected is None or self._said:
            return None
        self._count += 1
        self._seconds += stats.seconds
        self._expected_s += stats.expected.seconds
        for lane, seconds in stats.lane_seconds.items():
            self._lane_s[lane] += seconds
        for lane, seconds in stats.expected.lane_seconds.items():
            self._expected_lane_s[lane] += seconds
        if self._count < PASSES:
            return None
        sentence = self._sentence() if self._seconds > TOLERANCE * self._expected_s else None
        self._said = sentence is not None
        self._begin()
        return sentence

    def _sentence(self) -> str:
        late = self._seconds / self._expected_s
        slower = {
            lane: self._lane_s[lane] / expected
            for lane, expected in self._expected_lane_s.items()
            if expected > _SHARE * self._expected_s
        }
        lane = max(slower, key=lambda each: slower[each], default=None)
        why = ""
        if lane is not None and slower[lane] > 1:
            why = f"; {lane} is slowest beside its profile: it took {slower[lane]:.1f} times as long"
        return (
            f"ten passes took {late:.1f} times as long as planned{why}; if nothing else uses this machine, measure it "
            "again: overnight doctor --measure"
        )

    def _begin(self) -> None:
        self._count = 0
        self._seconds = self._expected_s = 0.0
        self._lane_s: defaultdict[str, float] = defaultdict(float)
        self._expected_lane_s: defaultdict[str, float] = defaultdict(float)
