from dataclasses import replace

import pytest

from engine.memory.lane import LaneName
from engine.planner.cost import PassCost
from engine.schedule.passes import PassStats
from worker.watch import PASSES, Watch

COMPUTE, DISK = LaneName.DEVICE_COMPUTE, LaneName.DISK_READ
EXPECTED = PassCost(
    seconds=1.0, lane_seconds={COMPUTE: 0.9, DISK: 1.0, LaneName.DISK_WRITE: 0.01}, lane_bytes={}, exposed_s=0.0,
    bound_by=DISK,
)  # fmt: skip
STATS = PassStats(
    seconds=1.0, prefill_tokens=10, decode_tokens=1, num_sequences=2, num_waiting=0, lane_bytes={},
    lane_seconds={COMPUTE: 0.9, DISK: 1.0}, weight_bytes=0, bound_by=DISK, expected=EXPECTED,
)  # fmt: skip


def test_a_plan_that_holds_needs_no_words() -> None:
    watch = Watch()
    late = replace(STATS, seconds=1.2)
    assert [watch.add(late) for _ in range(5 * PASSES)] == [None] * 5 * PASSES


def test_a_quarter_more_is_said_once_with_the_lane_that_is_slow() -> None:
    watch = Watch()
    late = replace(STATS, seconds=2.0, lane_seconds={COMPUTE: 0.9, DISK: 2.0, LaneName.DISK_WRITE: 1.0})
    said = [watch.add(late) for _ in range(5 * PASSES)]
    assert said[: PASSES - 1] == [None] * (PASSES - 1)
    (sentence,) = [each for each in said if each]
    assert "2.0 times as long as planned; disk_read is slowest" in sentence


@pytest.mark.parametrize("stats", [replace(STATS, expected=None, seconds=9.0)])
def test_without_a_prediction_nothing_is_late(stats: PassStats) -> None:
    watch = Watch()
    assert [watch.add(stats) for _ in range(3 * PASSES)] == [None] * 3 * PASSES
