"""The chosen plan beside the best of a grid."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.choices import Timed, beside
from engine.planner.plan import PlanOptions


@given(st.floats(0.5, 2), st.lists(st.floats(0.2, 5), min_size=1, max_size=9))
def test_a_machine_of_changing_speed_does_not_decide_between_plans(faster: float, speeds: list[float]) -> None:
    options = PlanOptions()
    other = Timed(options, tuple(speeds))
    chosen = Timed(options, tuple(faster * speed for speed in speeds))
    assert beside(chosen, other) == pytest.approx(faster)


def test_one_round_that_was_disturbed_does_not_count() -> None:
    options = PlanOptions()
    assert beside(Timed(options, (90.0, 10.0, 91.0)), Timed(options, (100.0, 100.0, 100.0))) == 0.9
