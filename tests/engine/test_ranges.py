"""Free ranges: never handed out twice, joined when free again, none lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from engine.errors import EngineError
from engine.memory.ranges import FreeRanges

LIMIT = 200


class RangeBooks(RuleBasedStateMachine):
    """Any order of allocations and releases, beside a map of every single offset."""

    ranges = Bundle("ranges")

    def __init__(self) -> None:
        super().__init__()
        self.space = FreeRanges(LIMIT)
        self.taken = [False] * LIMIT

    @rule(target=ranges, size=st.integers(1, 90))
    def allocate(self, size: int) -> object:
        fits = [at for at in range(LIMIT - size + 1) if not any(self.taken[at : at + size])]
        offset = self.space.allocate(size)
        # First fit, over joined neighbours: the lowest place that is free, whatever order things were released in.
        assert offset == (fits[0] if fits else None)
        if offset is None:
            return multiple()
        self.taken[offset : offset + size] = [True] * size
        return offset, size

    @rule(taken=consumes(ranges), data=st.data())
    def release(self, taken: tuple[int, int], data: st.DataObject) -> None:
        offset, size = taken
        self.space.release(offset, size)
        self.taken[offset : offset + size] = [False] * size
        again = data.draw(st.integers(offset, offset + size - 1))
        with pytest.raises(EngineError, match="released twice"):
            self.space.release(again, 1)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.space.free == self.taken.count(False)


TestRangeBooks = RangeBooks.TestCase
TestRangeBooks.settings = settings(max_examples=40, stateful_step_count=30)


@given(st.permutations(range(20)))
def test_all_released_is_one_range_again(order: list[int]) -> None:
    space = FreeRanges(100)
    offsets = [space.allocate(5) for _ in range(20)]
    assert offsets == list(range(0, 100, 5))
    assert space.allocate(1) is None
    for index in order:
        space.release(5 * index, 5)
    assert space.allocate(100) == 0


def test_no_space_at_all() -> None:
    space = FreeRanges(0)
    assert space.allocate(1) is None
    assert space.free == 0
