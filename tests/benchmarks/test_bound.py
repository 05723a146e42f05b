"""The bound: per pass the longest lane, at the speed it has beside the others."""

import pytest

from benchmarks.bound import COMPUTE, DISK_READ, Limits, PassWork, bound_of, raised

LIMITS = Limits(alone={COMPUTE: 100.0, DISK_READ: 20.0}, busy={COMPUTE: 50.0, DISK_READ: 10.0})


def test_each_pass_takes_its_longest_lane_and_not_the_sum() -> None:
    passes = [PassWork({DISK_READ: 100}, flops=50.0), PassWork({DISK_READ: 100}, flops=1000.0)]
    bound = bound_of(passes, LIMITS)
    assert bound.seconds == pytest.approx(10.0 + 20.0)
    assert bound.lane == COMPUTE


def test_the_run_is_bound_by_the_lane_that_takes_most_of_its_time() -> None:
    passes = [PassWork({DISK_READ: 100}, flops=0.0)] * 3 + [PassWork({}, flops=1000.0)]
    assert bound_of(passes, LIMITS).lane == DISK_READ
    assert bound_of(passes, LIMITS).seconds == pytest.approx(50.0)


def test_a_lane_without_a_measured_limit_is_left_out() -> None:
    assert bound_of([PassWork({"disk_write": 10**9}, flops=50.0)], LIMITS).seconds == pytest.approx(1.0)


def test_no_pass_takes_no_time() -> None:
    assert bound_of([], LIMITS).seconds == 0.0


def test_a_limit_is_the_best_that_was_seen() -> None:
    other = Limits(alone={COMPUTE: 90.0, DISK_READ: 30.0}, busy={COMPUTE: 60.0, DISK_READ: 5.0})
    best = Limits.best([LIMITS, other])
    assert best.alone == {COMPUTE: 100.0, DISK_READ: 30.0}
    assert best.busy == {COMPUTE: 60.0, DISK_READ: 10.0}


def test_what_a_run_did_was_possible() -> None:
    passes = [PassWork({DISK_READ: 100, "disk_write": 1}, flops=50.0), PassWork({DISK_READ: 300}, flops=0.0)]
    limits = raised(LIMITS, passes, 4.0)
    assert limits == Limits(alone={COMPUTE: 100.0, DISK_READ: 100.0}, busy={COMPUTE: 50.0, DISK_READ: 100.0})
    assert bound_of(passes, limits).seconds == pytest.approx(4.0)
    assert raised(LIMITS, passes, 4000.0) == LIMITS
