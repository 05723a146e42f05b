"""The books of the KV cache: nobody's room is another's, what is free can be had, all of it comes back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from engine.errors import DiskFull, EngineError
from engine.kvcache.cache import KVCache, Layout, Move, SequenceRoom
from engine.request import SamplingParams
from engine.sequence import Sequence
from engine.tiers import TierName
from engine.units import align_up

TOKENS = {TierName.DEVICE: 40, TierName.HOST: 64, TierName.DISK: 25}


def sequence(num_tokens: int) -> Sequence:
    """A sequence that needs room for ``num_tokens`` tokens."""
    return Sequence([1], 1, num_tokens + 1, SamplingParams())


class Books(RuleBasedStateMachine):
    """Any order of admissions and releases."""

    held = Bundle("held")

    @rule(extent_tokens=st.integers(1, 12), together=st.booleans())
    def start_again(self, extent_tokens: int, together: bool) -> None:
        if not self.cache.held:
            self.cache = self.made(extent_tokens, together)

    def __init__(self) -> None:
        super().__init__()
        self.cache = self.made(7, together=False)

    def made(self, extent_tokens: int, together: bool) -> KVCache:
        self.extent_tokens = extent_tokens
        self.claimed = dict.fromkeys(TierName, 0)
        return KVCache(TOKENS, extent_tokens=extent_tokens, fills_together=together, claim=self.claim)

    def claim(self, tier: TierName, end: int) -> None:
        self.claimed[tier] = max(self.claimed[tier], end)

    @rule(target=held, num_tokens=st.integers(1, 70))
    def admit(self, num_tokens: int) -> object:
        one = sequence(num_tokens)
        free = {tier: TOKENS[tier] - self.taken(tier) for tier in TierName}
        if not self.cache.admit(one):
            if self.extent_tokens == 1:
                assert max(free.values()) < num_tokens, "there was room"
            assert one not in self.cache.held
            return multiple()
        holding = self.cache.held[one]
        assert [extent.start for extent in holding.extents] == list(range(0, num_tokens, self.extent_tokens))
        assert sum(extent.capacity for extent in holding.extents) == num_tokens
        assert free[holding.tier] >= num_tokens
        return one

    @rule(one=consumes(held), times=st.integers(1, 2))
    def release(self, one: Sequence, times: int) -> None:
        for _ in range(times):
            self.cache.release(one)

    def taken(self, tier: TierName) -> int:
        holdings = [holding for holding in self.cache.held.values() if holding.tier is tier]
        return sum(extent.capacity for holding in holdings for extent in holding.extents)

    @invariant()
    def nobodys_room_is_anothers(self) -> None:
        for tier in TierName:
            holdings = [holding for holding in self.cache.held.values() if holding.tier is tier]
            extents = [extent for holding in holdings for extent in holding.extents]
            tokens = [token for each in extents for token in range(each.offset, each.offset + each.capacity)]
            assert len(tokens) == len(set(tokens))
            assert not tokens or max(tokens) < min(TOKENS[tier], self.claimed[tier])
        self.cache.check_integrity()
        assert self.cache.held_tokens == sum(map(self.taken, TierName)) == sum(TOKENS.values()) - self.cache.free_tokens

    def teardown(self) -> None:
        for one in list(self.cache.held):
            self.cache.release(one)
        assert self.cache.free_tokens == sum(TOKENS.values())
        largest = sorted(TOKENS.values(), reverse=True)
        assert all(self.cache.admit(sequence(count)) for count in largest), "all of it can be had again"


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.sampled_from(list(Layout)), st.integers(1, 9), st.integers(0, 9), st.lists(st.integers(1, 40), max_size=20))
def test_a_sequence_takes_whole_windows_and_what_lies_beside(
    layout: Layout, window: int, beside: int, lengths: list[int]
) -> None:
    room = SequenceRoom(window, beside)
    cache = KVCache({TierName.DEVICE: 200}, extent_tokens=2 * window, layouts={TierName.DEVICE: layout}, room=room)
    unit = 2 * window if layout is Layout.PAGES else 1
    for one in map(sequence, lengths):
        if cache.admit(one):
            extents = cache.held[one].extents
            needed = align_up(one.num_kv_tokens, window) + beside
            assert sum(each.capacity for each in extents) == align_up(needed, unit)
            if layout is Layout.EXTENTS:  # its own tokens and what lies beside have nothing in common
                assert (extents[-1].start % window, extents[-1].capacity) == (0, beside or extents[-1].capacity)
    cache.check_integrity()
    longest = cache.largest_sequence
    empty = KVCache({TierName.DEVICE: 200}, extent_tokens=2 * window, layouts={TierName.DEVICE: layout}, room=room)
    if longest:
        one = sequence(longest)
        assert empty.admit(one)
        empty.release(one)
    assert not empty.admit(sequence(longest + 1))


def test_room_that_was_used_is_used_again() -> None:
    cache = KVCache(TOKENS, extent_tokens=100)
    first, second, third = sequence(10), sequence(10), sequence(8)
    assert cache.admit(first)
    assert cache.admit(second)
    at = cache.held[first].extents[0].offset
    cache.release(first)
    assert cache.admit(third)
    assert cache.held[third].extents[0].offset == at


def refused(tier: TierName, end: int) -> None:
    """A file system without room."""
    if tier is TierName.DISK:
        raise DiskFull("no space left")


def test_a_full_disk_is_waited_for_while_somebody_runs() -> None:
    cache = KVCache(TOKENS, extent_tokens=8, claim=refused)
    assert cache.admit(sequence(40))
    assert cache.admit(sequence(64))
    assert not cache.admit(sequence(20)), "only the disk has room"
    cache.check_integrity()


def test_a_full_disk_is_an_error_where_nobody_will_make_room() -> None:
    cache = KVCache({TierName.DISK: 25}, extent_tokens=8, claim=refused)
    with pytest.raises(DiskFull):
        cache.admit(sequence(25))
    cache.check_integrity()
    assert cache.free_tokens == 25


def test_books_that_do_not_add_up_are_told() -> None:
    cache = KVCache(TOKENS, extent_tokens=8)
    one = sequence(10)
    assert cache.admit(one)
    del cache.held[one]
    with pytest.raises(EngineError, match="10 tokens of KV cache are reserved, sequences hold 0"):
        cache.check_integrity()


class OnePiece(RuleBasedStateMachine):
    """A tier in which sequences lie in one piece, with what they store there: moves lose nothing, and what is free can
    be had."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache({TierName.DEVICE: 40}, extent_tokens=3, layouts={TierName.DEVICE: Layout.ONE_PIECE})
        self.memory: list[object] = [None] * 40

    @rule(target=held, num_tokens=st.integers(1, 45))
    def come(self, num_tokens: int) -> object:
        one, free = sequence(num_tokens), self.cache.free_tokens
        for move in self.cache.make_gap(one):
            assert move.destination < move.source
            piece = self.memory[move.source : move.source + move.num_tokens]
            self.memory[move.destination : move.destination + move.num_tokens] = piece
        fits = self.cache.admit(one)
        assert fits == (num_tokens <= free)
        if not fits:
            return multiple()
        (extent,) = self.cache.held[one].extents
        for index in range(num_tokens):
            self.memory[extent.offset + index] = (one, index)
        return one

    @rule(one=consumes(held))
    def leave(self, one: Sequence) -> None:
        self.cache.release(one)

    @invariant()
    def each_has_its_own(self) -> None:
        for one, holding in self.cache.held.items():
            (extent,) = holding.extents
            found = self.memory[extent.offset : extent.offset + extent.capacity]
            assert found == [(one, index) for index in range(one.num_kv_tokens)]
        self.cache.check_integrity()


TestOnePiece = OnePiece.TestCase
TestOnePiece.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Pages(RuleBasedStateMachine):
    """A tier in pages: whatever is free can be had at once, in neighbouring pages where there are enough."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache({TierName.HOST: 42}, extent_tokens=4, layouts={TierName.HOST: Layout.PAGES})

    @rule(target=held, num_tokens=st.integers(1, 45))
    def come(self, num_tokens: int) -> object:
        one, free = sequence(num_tokens), self.cache.free_tokens
        assert free % 4 == 0
        fits = self.cache.admit(one)
        assert fits == (-(-num_tokens // 4) * 4 <= free)
        if not fits:
            return multiple()
        extents = self.cache.held[one].extents
        assert [extent.start for extent in extents] == [
            sum(each.capacity for each in extents[:index]) for index in range(len(extents))
        ]
        assert all(extent.offset % 4 == extent.capacity % 4 == 0 for extent in extents)
        assert sum(extent.capacity for extent in extents) == -(-num_tokens // 4) * 4
        return one

    @rule(one=consumes(held))
    def leave(self, one: Sequence) -> None:
        self.cache.release(one)

    @invariant()
    def nobodys_page_is_anothers(self) -> None:
        extents = [extent for holding in self.cache.held.values() for extent in holding.extents]
        tokens = [token for each in extents for token in range(each.offset, each.offset + each.capacity)]
        assert len(tokens) == len(set(tokens))
        assert all(token < 40 for token in tokens)
        self.cache.check_integrity()


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_as_little_as_possible_is_moved() -> None:
    cache = KVCache({TierName.DEVICE: 40}, extent_tokens=3, layouts={TierName.DEVICE: Layout.ONE_PIECE})
    large, gap, small, other, last = (sequence(count) for count in (20, 4, 2, 4, 10))
    for one in (large, gap, small, other, last):
        assert cache.admit(one)
    cache.release(gap)
    cache.release(other)
    needs = sequence(8)
    assert not cache.admit(needs)
    assert cache.make_gap(needs) == (Move(TierName.DEVICE, 24, 20, 2),)
    assert cache.make_gap(needs) == (), "it is there"
    assert cache.admit(needs)
