"""Lanes: first in, first out; a failure reaches whoever waits; closing never hangs."""

import threading

import pytest

from engine.errors import CheckpointError, LaneFailed
from engine.memory.lane import LaneName, ThreadLane


def test_work_is_done_in_order() -> None:
    lane = ThreadLane(LaneName.DISK_READ)
    done: list[int] = []
    events = [lane.submit(lambda number=number: done.append(number)) for number in range(100)]  # type: ignore[misc]
    events[49].wait()
    assert done[:50] == list(range(50))
    events[-1].wait()
    assert done == list(range(100))
    lane.close()


def test_a_failure_reaches_everyone_who_waits_and_stops_nothing_else() -> None:
    lane = ThreadLane(LaneName.DISK_READ)

    def fails() -> None:
        raise OSError("the cable is out")

    failed, fine = lane.submit(fails), lane.submit(lambda: None)
    for _ in range(2):
        with pytest.raises(LaneFailed, match="OSError: the cable is out") as caught:
            failed.wait()
        assert isinstance(caught.value.__cause__, OSError)
    fine.wait()
    lane.close()


def test_the_engines_own_errors_keep_their_kind() -> None:
    lane = ThreadLane(LaneName.DISK_READ)

    def fails() -> None:
        raise CheckpointError("layer.0.bin is damaged")

    with pytest.raises(CheckpointError, match=r"layer\.0\.bin is damaged"):
        lane.submit(fails).wait()
    lane.close()


def test_closing_drops_what_has_not_started_and_wakes_who_waits_for_it() -> None:
    lane = ThreadLane(LaneName.DISK_READ)
    started, gate = threading.Event(), threading.Event()
    done: list[str] = []

    def first() -> None:
        started.set()
        gate.wait()
        done.append("first")

    running, dropped = lane.submit(first), lane.submit(lambda: done.append("second"))
    started.wait()
    closer = threading.Thread(target=lane.close)
    closer.start()
    with pytest.raises(LaneFailed):
        dropped.wait()
    gate.set()
    closer.join()
    running.wait()
    assert done == ["first"]
