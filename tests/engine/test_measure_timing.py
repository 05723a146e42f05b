"""How work is timed: the points of a curve in turns."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.devices.host import HostDevice
from engine.errors import Interrupted
from engine.measure import QUICK
from engine.measure.timing import curve, in_turns, one_turn, timed

ENOUGH = replace(QUICK, figure_s=60.0)


@given(
    st.lists(st.lists(st.floats(1e-6, 10), max_size=4), max_size=3),
    st.lists(st.floats(0.5, 5), min_size=20, max_size=20),
)
def test_a_machine_that_is_fast_and_slow_in_turns_bends_no_curve(
    curves: list[list[float]], slowness: list[float]
) -> None:
    """Each round has its own speed: all points are slowed down by the same, that of the same round."""
    number = sum(map(len, curves))
    calls = count()

    def work(seconds: float) -> Callable[[], float]:
        return lambda: seconds * slowness[next(calls) // number]

    found = in_turns(ENOUGH, *([work(each) for each in points] for points in curves))
    counted = sorted(slowness[1 : next(calls) // max(1, number)])
    assert [len(each) for each in found] == [len(each) for each in curves]
    for points, measured in zip(curves, found, strict=True):
        assert measured == [each * counted[len(counted) // 2] for each in points]


def test_all_have_had_a_turn_before_any_has_another() -> None:
    order: list[str] = []

    def work(name: str) -> Callable[[], float]:
        def done() -> float:
            order.append(name)
            return 1.0

        return done

    in_turns(ENOUGH, [work("a"), work("b")], [work("c")])
    assert order == ["a", "b", "c"] * (len(order) // 3)
    assert len(order) > 2 * 3


def test_the_first_turn_which_compiles_does_not_count() -> None:
    turns = iter([1000.0, *[1.0] * 20])
    assert in_turns(ENOUGH, [lambda: next(turns)]) == [[1.0]]


def test_slow_work_is_not_repeated_often() -> None:
    calls: list[int] = []
    timed(HostDevice(), lambda: calls.append(1), replace(QUICK, figure_s=0.0))
    assert len(calls) == 2
    calls.clear()
    timed(HostDevice(), lambda: calls.append(1), QUICK)
    assert len(calls) > 20


def test_a_turn_of_slow_work_is_one_call() -> None:
    calls: list[int] = []
    assert one_turn(HostDevice(), lambda: calls.append(1), replace(QUICK, figure_s=0.0)) > 0
    assert len(calls) == 1


def test_work_ends_when_it_is_told_to() -> None:
    with pytest.raises(Interrupted):
        one_turn(HostDevice(), lambda: None, replace(QUICK, stopped=lambda: True))


def test_points_are_amounts_per_second() -> None:
    assert curve([1, 4], [10.0, 40.0], [2.0, 5.0]) == ((1.0, 5.0), (4.0, 8.0))
    with pytest.raises(ValueError, match="shorter"):
        curve([1, 4], [10.0, 40.0], [2.0])
