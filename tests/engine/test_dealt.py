"""What the host attends to is dealt out over micro-batches: the laws of that, over random passes. Only counts."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kvcache.cache import Holding, Layout
from engine.kvcache.segments import Segment
from engine.request import SamplingParams
from engine.schedule.packing import Packer, dealt
from engine.sequence import Sequence
from engine.tiers import TierName
from engine.units import div_ceil

ON_HOST = Holding(TierName.HOST, (), Layout.PAGES)
ON_DEVICE = Holding(TierName.DEVICE, (), Layout.ONE_PIECE)
Batches = list[list[Segment]]
Pack = Callable[[Packer], object]


def decoding(start: int, holding: Holding) -> Pack:
    return _cuttable(start, 1, start, holding)


def prompt(start: int, length: int, holding: Holding) -> Pack:
    return _cuttable(start, length, start + length, holding)


def _cuttable(start: int, length: int, num_prompt: int, holding: Holding) -> Pack:
    sequence = Sequence([0] * (start + length), num_prompt, start + length + 9, sampling=SamplingParams())

    def pack(packer: Packer) -> None:
        packer.add(sequence, start, min(length, packer.left), holding)

    return pack


def whole(length: int) -> Pack:
    """A score, which keeps nothing."""
    sequence = Sequence([0] * (length + 1), 1, length + 1, score_from=1)
    return lambda packer: packer.add_whole(sequence, length)


Drawn = tuple[Batches, int]


@st.composite
def passes(draw: st.DrawFn, *, wholes: bool = True, start: int | None = None) -> Drawn:
    """Micro-batches as the scheduler packs them, and how many tokens each may have."""
    most = draw(st.integers(1, 12))
    starts = st.integers(1, 12) | st.integers(1, 1000) if start is None else st.just(start)
    holdings = st.sampled_from([ON_HOST, ON_DEVICE])
    packs = st.builds(decoding, starts, st.just(ON_HOST)) | st.builds(decoding, starts, st.just(ON_DEVICE))
    packs |= st.builds(prompt, st.integers(0, 9), st.integers(1, 20), holdings)
    if wholes:
        packs |= st.builds(whole, st.integers(1, most))
    packer = Packer(most, draw(st.integers(1, 4)))
    for pack in draw(st.lists(packs, max_size=30)):
        pack(packer)
    return packer.finish(), most


def on_host(segments: list[Segment]) -> list[Segment]:
    return [segment for segment in segments if segment.can_attend_on_host]


def tokens_of(batches: Batches) -> dict[Sequence, list[tuple[int, Holding | None]]]:
    """Each sequence's tokens in the order in which they are computed."""
    found: dict[Sequence, list[tuple[int, Holding | None]]] = {}
    for batch in batches:
        for segment in batch:
            places = range(segment.start, segment.start + segment.length)
            found.setdefault(segment.sequence, []).extend((place, segment.holding) for place in places)
    return found


@settings(max_examples=150)
@given(passes())
def test_each_token_is_dealt_once_in_order_and_within_bounds(drawn: Drawn) -> None:
    batches, most = drawn
    before = [list(batch) for batch in batches]
    found = dealt(batches, most)
    assert batches == before, "what was packed is left as it was"
    assert tokens_of(found) == tokens_of(batches)
    for batch in found:
        assert sum(segment.length for segment in batch) <= most
        sequences = [segment.sequence for segment in batch]
        assert len(set(sequences)) == len(sequences), "no two of one sequence"
    for segment in (segment for batch in found for segment in batch):
        assert segment.length >= 1
        assert segment.holding is not None or segment.length == segment.sequence.num_to_compute, "stays whole"


@settings(max_examples=150)
@given(passes())
def test_the_host_has_an_even_part_in_micro_batches_of_about_one_size(drawn: Drawn) -> None:
    batches, most = drawn
    found = dealt(batches, most)
    if found is batches:
        return
    assert len(found) == max(2, len(batches))
    parts = [on_host(batch) for batch in found]
    costs = [sum(segment.start + 1 for segment in part) for part in parts]
    assert sum(map(bool, parts)) == min(len(found), sum(map(len, parts)))
    assert max(costs) - min(costs) <= max(segment.start + 1 for part in parts for segment in part)
    sizes = [sum(segment.length for segment in batch) for batch in found]
    longest = max((segment.length for batch in found for segment in batch if segment.holding is None), default=1)
    for size, part in zip(sizes, parts, strict=True):
        assert size <= max(len(part), div_ceil(sum(sizes), len(found)) + longest - 1)


@settings(max_examples=150)
@given(st.integers(1, 1000).flatmap(lambda start: passes(wholes=False, start=start)))
def test_where_all_can_be_cut_and_is_alike_two_on_the_host_are_always_dealt_out(drawn: Drawn) -> None:
    batches, most = drawn
    number = sum(len(on_host(batch)) for batch in batches)
    assert (dealt(batches, most) is not batches) == (number >= 2)


@pytest.mark.parametrize("number", [0, 1])
def test_nothing_changes_where_the_host_has_nothing_to_share_out(number: int) -> None:
    packer = Packer(4, 3)
    for pack in [decoding(5, ON_HOST)] * number + [decoding(9, ON_DEVICE), prompt(0, 6, ON_HOST)]:
        pack(packer)
    batches = packer.finish()
    assert dealt(batches, 4) is batches


def test_a_prompt_fills_up_what_the_hosts_parts_leave() -> None:
    """The host's long sequence beside the prompt's beginning, its short ones beside the rest."""
    packer = Packer(8, 2)
    for pack in [decoding(100, ON_HOST), *(decoding(9, ON_HOST) for _ in range(3)), prompt(0, 6, ON_DEVICE)]:
        pack(packer)
    found = dealt(packer.finish(), 8)
    assert [[(segment.start, segment.length) for segment in batch] for batch in found] == [
        [(100, 1), (0, 4)],
        [(9, 1), (9, 1), (9, 1), (4, 2)],
    ]


@pytest.mark.parametrize(
    ("most", "packs"),
    [
        # The host's three short sequences beside its long one are more tokens than a micro-batch has.
        (2, [decoding(1000, ON_HOST), *(decoding(1, ON_HOST) for _ in range(3))]),
        # One token of the host's in each leaves no room for a sequence of five.
        (5, [decoding(9, ON_HOST), decoding(9, ON_HOST), whole(3), whole(5)]),
    ],
)
def test_what_does_not_fit_when_dealt_out_stays_as_packed(most: int, packs: list[Pack]) -> None:
    packer = Packer(most, 2)
    for pack in packs:
        pack(packer)
    batches = packer.finish()
    assert dealt(batches, most) is batches
