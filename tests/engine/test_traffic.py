"""What the lanes did is counted by lane, once, and busy time is never counted twice."""

import itertools
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.memory.lane import LaneName, ThreadLane
from engine.memory.traffic import Moved, Span, Traffic

READ, IN = LaneName.DISK_READ, LaneName.HOST_TO_DEVICE


class Watching:
    """A ``LaneRecorder`` that keeps everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[LaneName, str, Span, int]] = []

    def moved(self, lane: LaneName, what: str, span: Span, num_bytes: int) -> None:
        self.seen.append((lane, what, span, num_bytes))


class Clock:
    """Points in compute at times that the test sets, reached when it says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reached = float("inf")

    def mark(self) -> "Point":
        return Point(self, self.now)


class Point:
    def __init__(self, clock: Clock, at: float) -> None:
        self._clock = clock
        self._at = at

    def wait(self) -> None:
        raise AssertionError("counting never waits")

    def span(self) -> Span | None:
        return (self._at, self._at) if self._at <= self._clock.reached else None


def test_work_is_counted_by_lane_and_taken_once() -> None:
    traffic = Traffic()
    traffic.add(READ, 100, (0.0, 0.5), weights=True)
    traffic.add(READ, 10, (1.0, 1.25))
    traffic.add(IN, 1, (0.0, 1.0))
    assert traffic.take() == Moved(
        {"disk_read": 110, "host_to_device": 1}, {"disk_read": 0.75, "host_to_device": 1.0}, 100
    )
    assert traffic.take() == Moved({}, {}, 0)


@given(
    st.lists(st.tuples(st.sampled_from([READ, IN]), st.integers(0, 50), st.integers(0, 20), st.integers(0, 9))),
)
def test_a_lane_is_busy_once_however_many_threads_work_on_it(work: list[tuple[LaneName, int, int, int]]) -> None:
    watching = Watching()
    traffic = Traffic(recorder=watching)
    for lane, start, length, num_bytes in work:
        traffic.add(lane, num_bytes, (start, start + length))
    moved = traffic.take()
    for lane in (READ, IN):
        busy = {second for name, start, length, _ in work if name is lane for second in range(start, start + length)}
        assert moved.seconds.get(lane, 0) == len(busy)
        assert moved.num_bytes.get(lane, 0) == sum(n for name, _, _, n in work if name is lane)
        spans = [span for name, _, span, _ in watching.seen if name is lane]
        assert sum(end - start for start, end in spans) == len(busy)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        assert sum(n for name, _, _, n in watching.seen if name is lane) == moved.num_bytes.get(lane, 0)


def test_what_was_busy_before_the_last_take_is_not_busy_again() -> None:
    traffic = Traffic()
    traffic.add(READ, 1, (0.0, 2.0))
    traffic.take()
    traffic.add(READ, 1, (1.0, 3.0))
    assert traffic.take().seconds == {"disk_read": 1.0}


def test_work_under_way_counts_when_it_has_ended() -> None:
    traffic, gate = Traffic(), threading.Event()
    lane = ThreadLane(IN)
    event = lane.submit(lambda: gate.wait() and None)
    traffic.follow(IN, event, 7, weights=True)
    assert traffic.take() == Moved({}, {}, 0)
    gate.set()
    event.wait()
    moved = traffic.take()
    assert (moved.num_bytes, moved.weight_bytes) == ({"host_to_device": 7}, 7)
    assert moved.seconds["host_to_device"] > 0
    lane.close()


def test_work_that_failed_moved_nothing() -> None:
    def fails() -> None:
        raise OSError("the cable is out")

    traffic, lane = Traffic(), ThreadLane(IN)
    event = lane.submit(fails)
    traffic.follow(IN, event, 7)
    lane.close()
    assert event.span() is None
    assert traffic.take() == Moved({}, {}, 0)


def test_compute_is_busy_without_what_it_waits_for() -> None:
    clock, watching = Clock(), Watching()
    traffic = Traffic(clock.mark, watching)

    def at(now: float, act: Callable[[], object]) -> None:
        clock.now = now
        act()

    at(1.0, lambda: traffic.computes("embedding"))
    at(3.0, lambda: traffic.computes("layer.0"))
    clock.now = 4.0
    with traffic.waiting(then="layer.1"):
        clock.now = 9.0
    clock.now = 10.0
    with traffic.waiting():
        clock.now = 20.0
    at(22.0, lambda: traffic.computes(None))
    with traffic.waiting():  # nothing was computed: nothing goes on
        clock.now = 30.0
    assert traffic.take().seconds == {"device_compute": 2.0 + 1.0 + 1.0 + 2.0}
    assert [(what, span) for _, what, span, _ in watching.seen] == [
        ("embedding", (1.0, 3.0)),
        ("layer.0", (3.0, 4.0)),
        ("layer.1", (9.0, 10.0)),
        ("layer.1", (20.0, 22.0)),
    ]


def test_compute_that_the_device_has_not_reached_counts_later() -> None:
    clock = Clock()
    traffic = Traffic(clock.mark)
    traffic.computes("layer.0")
    clock.now, clock.reached = 5.0, 4.0
    traffic.computes(None)
    assert traffic.take().seconds == {}
    clock.reached = 5.0
    assert traffic.take().seconds == {"device_compute": 5.0}


@pytest.mark.parametrize(
    ("seconds", "busiest"), [({}, "device_compute"), ({"disk_read": 2.0, "device_compute": 1.0}, "disk_read")]
)
def test_the_busiest_lane(seconds: dict[str, float], busiest: str) -> None:
    assert Moved({}, seconds).busiest == busiest


def test_nothing_is_lost_between_threads() -> None:
    traffic, total = Traffic(), 0

    def add() -> None:
        for _ in range(2000):
            traffic.add(READ, 1, (0.0, 0.0))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        total += traffic.take().num_bytes.get("disk_read", 0)
    assert total + traffic.take().num_bytes.get("disk_read", 0) == 8000
