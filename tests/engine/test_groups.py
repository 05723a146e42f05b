"""Groups of keys and values from elsewhere: each token once, in its place, within the buffer."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.groups import Group, groups_of, kept_of, least_tokens, open_from, unwritten
from engine.kvcache.cache import ROOM_OF_TOKENS, KVCache, Layout, SequenceRoom
from engine.kvcache.segments import Kind, MicroBatch, Segment, arrange
from engine.request import SamplingParams
from engine.sequence import Sequence
from engine.tiers import TierName

LAYOUTS = {TierName.DEVICE: Layout.ONE_PIECE, TierName.HOST: Layout.PAGES, TierName.DISK: Layout.PAGES}
PAGE = 4


@st.composite
def passes(draw: st.DrawFn, room: SequenceRoom = ROOM_OF_TOKENS) -> list[MicroBatch]:
    """Micro-batches over a cache whose free room has come into pieces; some sequences are in two of them."""
    tokens = {TierName.DEVICE: 30, TierName.HOST: 120, TierName.DISK: 80}
    cache = KVCache(tokens, extent_tokens=PAGE, layouts=LAYOUTS, room=room)
    found = [
        Sequence([1] * 60, 60, size + 1, SamplingParams()) for size in draw(st.lists(st.integers(2, 40), max_size=12))
    ]
    admitted = [sequence for sequence in found if cache.admit(sequence)]
    for sequence in draw(st.lists(st.sampled_from(admitted), unique=True) if admitted else st.just([])):
        cache.release(sequence)
    more = [
        Sequence([1] * 60, 60, size + 1, SamplingParams()) for size in draw(st.lists(st.integers(2, 40), max_size=6))
    ]
    running = [sequence for sequence in [*admitted, *more] if sequence in cache.held or cache.admit(sequence)]
    batches: list[list[Segment]] = [[], []]
    for sequence in running:
        start = draw(st.integers(0, sequence.num_kv_tokens - 1))
        length = draw(st.integers(1, sequence.num_kv_tokens - start))
        cut = draw(st.integers(0, length)) if draw(st.booleans()) else draw(st.sampled_from([0, length]))
        for batch, first, count in zip(batches, (start, start + cut), (cut, length - cut), strict=True):
            if count:
                batch.append(Segment(sequence, first, count, cache.held[sequence]))
    for batch in batches:
        if draw(st.booleans()):
            batch.append(Segment(Sequence([1] * 5, 5, 5, score_from=1), 0, 4))
    return [arrange(batch) for batch in batches]


def tokens_of(segment: Segment, first: int, end: int) -> list[int]:
    """Where a sequence's tokens lie in their tier."""
    assert segment.holding is not None
    places = [
        token for extent in segment.holding.extents for token in range(extent.offset, extent.offset + extent.capacity)
    ]
    return places[first:end]


def rows_of(batch: MicroBatch) -> dict[int, Segment]:
    row, found = 0, {}
    for segment in batch.segments:
        found[row] = segment
        row += segment.length
    return found


@settings(max_examples=150, deadline=None)
@given(passes(), st.integers(3, 30))
def test_every_past_token_comes_once_and_in_order(batches: list[MicroBatch], most: int) -> None:
    groups = groups_of(batches, most)
    for index, (batch, its) in enumerate(zip(batches, groups, strict=True)):
        rows = rows_of(batch)
        fetched: dict[int, list[int]] = {}
        for group in its:
            taken: set[int] = set()
            for share in group.shares:
                segment = rows[share.row]
                assert segment.length == share.length
                assert segment.kind is Kind.ELSEWHERE
                assert segment.holding is not None
                assert segment.holding.tier is group.tier
                room = range(share.at, share.at + share.past + (0 if group.is_part else share.length))
                assert taken.isdisjoint(room)
                taken.update(room)
                places = {run.at + each: run.offset + each for run in share.runs for each in range(run.num_tokens)}
                assert sorted(places) == list(range(share.at, share.at + share.past))
                fetched.setdefault(share.row, []).extend(places[at] for at in sorted(places))
                before = [
                    other
                    for other, earlier in enumerate(batches[:index])
                    if any(each.sequence is segment.sequence for each in earlier.segments)
                ]
                assert group.follows >= max(before, default=-1)
            assert max(taken) < group.num_tokens <= most
            assert group.rows == slice(group.shares[0].row, group.shares[-1].row + group.shares[-1].length)
            assert sum(share.length for share in group.shares) == group.rows.stop - group.rows.start
            assert not group.is_part or len(group.shares) == 1
        expected = {
            row: tokens_of(segment, 0, segment.start) for row, segment in rows.items() if segment.kind is Kind.ELSEWHERE
        }
        assert fetched == expected
        lasts = [group.shares[0].row for group in its if group.is_part and group.is_last]
        assert len(lasts) == len({group.shares[0].row for group in its if group.is_part})


ROOM = SequenceRoom(window=4, beside=3)


@settings(max_examples=150, deadline=None)
@given(passes(ROOM), st.integers(0, 5))
def test_of_windows_new_tokens_find_room_behind_what_lies_before_them(batches: list[MicroBatch], more: int) -> None:
    """And the plain keys of the window in which they begin, however long their sequence is."""
    most_rows = max((segment.length for batch in batches for segment in batch.segments), default=1)
    most = least_tokens(most_rows, ROOM) + more * ROOM.window
    for batch, groups in zip(batches, groups_of(batches, most, ROOM), strict=True):
        rows = rows_of(batch)
        fetched: dict[int, list[int]] = {}
        whole: list[int] = []
        for group in groups:
            assert group.num_tokens <= most
            assert group.num_tokens % ROOM.window == 0
            end = 0
            for share in group.shares:
                segment, before = rows[share.row], fetched.setdefault(share.row, [])
                assert share.first == len(before)
                assert share.at >= end
                places = {run.at + each: run.offset + each for run in share.runs for each in range(run.num_tokens)}
                its = range(share.at, share.at + share.past)
                before += [places.pop(at) for at in its]
                end = share.at + share.size
                if group.is_part:
                    assert not places
                    continue
                whole.append(share.row)
                assert share.past
                assert share.at % ROOM.window == 0
                opened = [] if share.open_at is None else range(share.open_at, share.open_at + ROOM.beside)
                assert its.stop + share.length <= (share.open_at or end)
                assert set(places) <= set(opened)
                if segment.start % ROOM.window:
                    held = tokens_of(segment, 0, 400)[open_from(segment, ROOM) :]
                    assert places == {at: held[at - share.open_at] for at in places}
                    assert places
            assert end == group.num_tokens
        of_elsewhere = {row: segment for row, segment in rows.items() if segment.kind is Kind.ELSEWHERE}
        assert fetched == {row: tokens_of(segment, 0, segment.start) for row, segment in of_elsewhere.items()}
        assert whole == list(of_elsewhere)


@settings(max_examples=100, deadline=None)
@given(passes())
def test_what_is_kept_elsewhere_are_the_last_rows(batches: list[MicroBatch]) -> None:
    for batch in batches:
        kept = kept_of(batch)
        expected: dict[int, tuple[TierName, int]] = {}
        for row, segment in rows_of(batch).items():
            if segment.holding is not None and not segment.holding.is_addressable:
                places = tokens_of(segment, segment.start, segment.start + segment.length)
                expected |= {row + each: (segment.holding.tier, place) for each, place in enumerate(places)}
        found = {
            kept.first_row + run.at + each: (tier, run.offset + each)
            for tier, run in kept.runs
            for each in range(run.num_tokens)
        }
        assert found == expected
        assert sorted(found) == list(range(kept.first_row, batch.num_tokens))
        assert kept.num_rows == len(found)


@settings(max_examples=100, deadline=None)
@given(passes())
def test_each_kind_is_one_range_and_single_tokens_come_first(batches: list[MicroBatch]) -> None:
    for batch in batches:
        order = [
            (segment.kind, segment.holding.tier if segment.holding is not None else "", segment.length > 1)
            for segment in batch.segments
        ]
        assert order == sorted(order)


def test_a_long_sequence_comes_in_parts() -> None:
    cache = KVCache({TierName.HOST: 40}, extent_tokens=PAGE, layouts=LAYOUTS)
    long, short = (Sequence([1] * 30, 30, size + 1, SamplingParams()) for size in (30, 6))
    assert cache.admit(long)
    assert cache.admit(short)
    segments = [Segment(long, 21, 1, cache.held[long]), Segment(short, 3, 1, cache.held[short])]
    (groups,) = groups_of([arrange(segments)], 10)
    sizes = [(group.is_part, group.is_last, group.num_tokens) for group in groups]
    assert sizes == [(True, False, 10), (True, False, 10), (True, True, 1), (False, True, 4)]
    assert all(isinstance(group, Group) for group in groups)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5), st.randoms(), st.booleans()
)
def test_a_page_that_somebody_has_begun_holds_a_number_everywhere(
    lengths: list[list[int]], random: Random, scatters: bool
) -> None:
    """However a sequence comes, and whoever had its pages before."""
    cache = KVCache({TierName.HOST: 400}, extent_tokens=PAGE, layouts=LAYOUTS)
    if scatters:
        others = [Sequence([1] * 5, 5, 6, SamplingParams()) for _ in range(20)]
        assert all(cache.admit(other) for other in others)
        for other in random.sample(others, 10):
            cache.release(other)
    is_number: set[int] = set()
    for its in lengths:
        sequence = Sequence([1] * 60, sum(its), sum(its) + 1, SamplingParams())
        assert cache.admit(sequence)
        is_number -= set(tokens_of(Segment(sequence, 0, 1, cache.held[sequence]), 0, 400))  # whatever was there
        start = 0
        for length in its:
            segment = Segment(sequence, start, length, cache.held[sequence])
            runs = [run for _, run in kept_of(arrange([segment])).runs]
            written = {run.offset + each for run in runs for each in range(run.num_tokens)}
            cleared = set(unwritten(runs, PAGE))
            assert written.isdisjoint(cleared)
            assert cleared.isdisjoint(is_number)
            is_number |= written | cleared
            start += length
            for token in tokens_of(segment, 0, start):
                assert set(range(token - token % PAGE, token - token % PAGE + PAGE)) <= is_number
