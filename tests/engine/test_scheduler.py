"""The scheduler's laws, over random workloads: no torch, no model, only counts."""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kvcache.cache import KVCache
from engine.request import SamplingParams
from engine.schedule.passes import Pass
from engine.schedule.scheduler import LOOK_AHEAD, Scheduler
from engine.sequence import Sequence
from engine.tiers import TierName

SAMPLING = SamplingParams()


def cache_of(room: int) -> KVCache:
    """Whose room is never in pieces that are too short: an extent is one token."""
    return KVCache({TierName.DEVICE: room}, extent_tokens=1)


def generation(num_prompt: int, num_new: int) -> Sequence:
    return Sequence([0] * num_prompt, num_prompt, num_prompt + num_new, sampling=SAMPLING)


def scored(num_context: int, num_continuation: int) -> Sequence:
    total = num_context + num_continuation
    return Sequence([0] * total, num_context, total, score_from=num_context)


@dataclass
class Run:
    """Drives a scheduler as the engine does, and checks every pass."""

    requests: list[list[Sequence]]
    micro_batch: int
    micro_batches: int
    prefill_chunk: int
    room: int
    ends_early: random.Random | None = None
    prompt_tokens: int | None = None
    depth: int = 1
    """Passes in flight at once."""
    in_flight: deque[Pass] = field(default_factory=deque)
    num_pulled: int = 0
    stuck: list[Sequence] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kv = cache_of(self.room)
        self.scheduler = Scheduler(
            self.kv,
            micro_batch=self.micro_batch,
            micro_batches=self.micro_batches,
            prefill_chunk=self.prefill_chunk,
        )
        self.computed: dict[Sequence, int] = {s: 0 for request in self.requests for s in request}
        self.scored_rows: dict[Sequence, list[int]] = {s: [] for s in self.computed}
        self.finished: set[Sequence] = set()

    def pull(self) -> list[Sequence] | None:
        if self.num_pulled == len(self.requests):
            return None
        # The last request may have been of three.
        assert self.scheduler.num_waiting < LOOK_AHEAD + 3 or self.prompt_tokens, "pulled although enough wait"
        self.num_pulled += 1
        return list(self.requests[self.num_pulled - 1])

    def next_pass(self) -> Pass | None:
        this_pass = self.scheduler.next_pass(self.pull, self.prompt_tokens)
        if this_pass.micro_batches:
            self.check(this_pass)
            self.in_flight.append(this_pass)
            self.passes.append(this_pass)
        if self.in_flight and (len(self.in_flight) == self.depth or not this_pass.micro_batches):
            self.compute(self.in_flight.popleft())
            return this_pass
        if this_pass.micro_batches:
            return this_pass
        if (stuck := self.scheduler.stuck()) is not None:
            assert not self.kv.held
            self.stuck.append(stuck)
            self.finished.add(stuck)
            self.scheduler.retire(stuck)
            return this_pass
        return None

    def check(self, this_pass: Pass) -> None:
        assert 1 <= len(this_pass.micro_batches) <= self.micro_batches
        for batch in this_pass.micro_batches:
            assert 1 <= batch.num_tokens <= self.micro_batch
        segments = this_pass.segments
        kinds = [segment.is_decode for segment in segments]
        assert kinds == sorted(kinds, reverse=True), "decode first"
        lengths: dict[Sequence, int] = {}
        for segment in segments:
            sequence = segment.sequence
            assert sequence not in self.finished
            # Every token exactly once and in order, also over the segments of one pass.
            assert segment.start == self.computed[sequence] + lengths.get(sequence, 0)
            assert segment.length >= 1
            assert segment.start + segment.length <= sequence.num_to_compute
            lengths[sequence] = lengths.get(sequence, 0) + segment.length
            assert (segment.holding is not None) == (sequence in self.kv.held)
            if segment.holding is None:
                assert (segment.start, segment.length) == (0, sequence.num_to_compute)
        for sequence, length in lengths.items():
            assert length <= self.prefill_chunk
            fits = sequence.is_scored and sequence.num_to_compute <= min(self.micro_batch, self.prefill_chunk)
            assert self.scheduler.needs_kv(sequence) != fits
            assert (sequence in self.kv.held) != fits, "only what must look back holds KV cache"
        # Whoever was running before is served whenever the pass has tokens left, and prompts are not held back.
        if sum(lengths.values()) < self.micro_batch * self.micro_batches:
            served = {s for s in self.kv.held if s.is_decoding} if self.prompt_tokens else set(self.kv.held)
            assert served <= set(lengths) | self.under_way
        assert not self.under_way & set(lengths), "in one pass at a time"

    @property
    def under_way(self) -> set[Sequence]:
        return {segment.sequence for each in self.in_flight for segment in each.segments}

    def compute(self, this_pass: Pass) -> None:
        self.scheduler.completed(this_pass)
        new_tokens: set[Sequence] = set()
        for segment in this_pass.segments:
            sequence = segment.sequence
            self.computed[sequence] += segment.length
            for row in segment.rows:
                if sequence.is_scored:
                    self.scored_rows[sequence].append(segment.start + row)
                else:
                    assert sequence not in new_tokens, "one new token a pass"
                    new_tokens.add(sequence)
        for segment in this_pass.segments:
            assert segment.sequence.num_computed == self.computed[segment.sequence]
        for sequence in {segment.sequence for segment in this_pass.segments} - self.finished:
            if sequence in new_tokens:
                sequence.tokens.append(0)
                early = self.ends_early is not None and self.ends_early.random() < 0.3
                ended = early or len(sequence.tokens) == sequence.max_tokens
            else:
                ended = sequence.is_scored and sequence.num_computed == sequence.num_to_compute
            if ended:
                self.finished.add(sequence)
                self.scheduler.retire(sequence)
                assert sequence not in self.kv.held, "room is free at once"

    def to_the_end(self) -> "Run":
        # Each call begins a pass of at least one token, completes one, or rejects a sequence: so it must end.
        for _ in range(2 * sum(s.max_tokens for s in self.computed) + len(self.computed) + 1):
            if self.next_pass() is None:
                break
        else:
            raise AssertionError("it never ends")
        assert self.finished == set(self.computed)
        assert self.scheduler.is_idle
        assert self.kv.held == {}
        for sequence in self.finished - set(self.stuck):
            assert self.computed[sequence] == (
                sequence.num_to_compute if sequence.is_scored else len(sequence.tokens) - 1
            )
            if sequence.is_scored:
                assert self.scored_rows[sequence] == list(range(sequence.score_from - 1, len(sequence.tokens) - 1))
        for sequence in self.stuck:
            assert self.scheduler.needs_kv(sequence)
            assert sequence.num_kv_tokens > self.room
        return self


@st.composite
def runs(draw: st.DrawFn) -> Run:
    one = st.tuples(st.booleans(), st.integers(1, 30), st.integers(1, 8))
    wanted = draw(st.lists(st.lists(one, min_size=1, max_size=3), max_size=12))
    micro_batch = draw(st.integers(1, 12))
    seed = draw(st.none() | st.integers(0, 100))
    return Run(
        [[(scored if is_scored else generation)(a, b) for is_scored, a, b in request] for request in wanted],
        micro_batch=micro_batch,
        micro_batches=draw(st.integers(1, 4)),
        prefill_chunk=draw(st.integers(1, 60)),
        room=draw(st.integers(0, 120)),
        ends_early=None if seed is None else random.Random(seed),
        prompt_tokens=draw(st.none() | st.integers(1, 20)),
        depth=draw(st.integers(1, 3)),
    )


@settings(max_examples=150)
@given(runs())
def test_every_token_is_computed_once_in_order_and_within_bounds(run: Run) -> None:
    run.to_the_end()


@settings(max_examples=150)
@given(runs(), st.data())
def test_what_is_dropped_is_never_computed_again(run: Run, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 10))):
        if run.next_pass() is None:
            break
    alive = [s for request in run.requests[: run.num_pulled] for s in request if s not in run.finished]
    if alive:
        dropped = data.draw(st.sampled_from(alive))
        computes = dropped in run.under_way and dropped in run.kv.held
        run.scheduler.retire(dropped)
        assert (dropped in run.kv.held) == computes, "nobody gets the room of a pass under way"
        run.finished.add(dropped)  # from now on, a segment of it is an error
        run.scheduler.retire(dropped)  # and again: nothing happens
        run.stuck.append(dropped)
        while run.next_pass() is not None:
            pass
        assert run.finished == set(run.computed)
        assert run.kv.held == {}


def test_requests_are_pulled_only_when_there_is_room() -> None:
    """A pass of 8 tokens over endless one-token prompts pulls 8, then one for each that ends."""
    run = Run([[generation(1, 4)] for _ in range(1000)], micro_batch=4, micro_batches=2, prefill_chunk=8, room=10_000)
    for expected in (8, 8, 8, 8, 16, 16):
        run.next_pass()
        assert run.num_pulled == expected
        assert run.scheduler.num_waiting == 0


def test_few_requests_wait_for_room() -> None:
    run = Run([[generation(4, 4)] for _ in range(200)], micro_batch=64, micro_batches=1, prefill_chunk=64, room=15)
    run.next_pass()
    assert len(run.kv.held) == 2
    assert run.num_pulled == 2 + LOOK_AHEAD
    while run.num_pulled < 200:
        run.next_pass()
        assert run.scheduler.num_waiting <= LOOK_AHEAD
        assert len(run.kv.held) <= 2


def test_what_needs_no_room_passes_by_what_waits_for_it() -> None:
    """A pass of 256 tokens over a generation that runs for 60 passes, one that waits for it, and 100 scores."""
    waits = generation(50, 60)
    run = Run(
        [[generation(50, 60)], [waits], *([scored(5, 5)] for _ in range(100))],
        micro_batch=256, micro_batches=1, prefill_chunk=256, room=150,
    )  # fmt: skip
    run.to_the_end()
    tokens = [sum(batch.num_tokens for batch in each.micro_batches) for each in run.passes]
    assert tokens[:4] == [50 + 22 * 9, 1 + 28 * 9, 1 + 28 * 9, 1 + 22 * 9]
    assert tokens[4:] == [1] * 56 + [50] + [1] * 59


@st.composite
def mixtures(draw: st.DrawFn) -> list[tuple[bool, int, int]]:
    return draw(st.lists(st.tuples(st.booleans(), st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=40))


@given(mixtures(), st.integers(40, 90), st.integers(31, 60))
def test_passing_by_takes_nothing_from_whoever_waits(
    wanted: list[tuple[bool, int, int]], room: int, micro_batch: int
) -> None:
    """Each generation is admitted in the pass in which room and tokens are there for it, whatever passed it by."""
    run = Run(
        [[(scored if is_scored else generation)(a, b)] for is_scored, a, b in wanted],
        micro_batch=micro_batch, micro_batches=1, prefill_chunk=micro_batch, room=room,
    )  # fmt: skip
    order = [request[0] for request in run.requests]
    while True:
        waiting = list(run.scheduler._waiting)
        free = run.kv.free_tokens
        held = set(run.kv.held)
        if run.next_pass() is None or not run.passes:
            break
        segments = run.passes[-1].segments
        if waiting and run.scheduler.needs_kv(waiting[0]):
            first = waiting[0]
            left = micro_batch - sum(segment.length for segment in segments if segment.sequence in held)
            served = sum(segment.length for segment in segments if segment.sequence is first)
            assert served == (min(first.num_prompt_tokens, left) if first.num_kv_tokens <= free else 0)
        began = [s for s in order if run.computed[s] and run.scheduler.needs_kv(s)]
        assert began == [s for s in order if run.scheduler.needs_kv(s)][: len(began)], "in their order"
        used = sum(segment.length for segment in segments)
        kept = [s for s in run.scheduler._waiting if not run.scheduler.needs_kv(s)]
        if kept and run.scheduler._running:
            assert kept[0].num_to_compute > micro_batch - used, "room for it was left empty"
    assert run.finished == set(run.computed)


def test_prompts_come_in_measured_amounts_until_the_last_ones_fit() -> None:
    run = Run(
        [[generation(10, 10)] for _ in range(12)],
        micro_batch=64, micro_batches=1, prefill_chunk=64, room=4 * 19, prompt_tokens=5,
    )  # fmt: skip
    run.to_the_end()
    first, *prompts = [sum(s.length for s in each.segments if not s.is_decode) for each in run.passes]
    assert first == 10, "the first prompt whole, since nobody decodes yet"
    held_back = [tokens for tokens in prompts if tokens <= 5]
    assert sum(prompts) == 110
    # At most one pass carries more: the one in which whatever is left finds room.
    (last,) = [tokens for tokens in prompts if tokens > 5]
    assert prompts.index(last) > len(prompts) // 2
    assert all(not tokens for tokens in prompts[prompts.index(last) + 1 :])
    mixed = [each for each in run.passes if {s.is_decode for s in each.segments} == {True, False}]
    assert len(mixed) > len(held_back) // 3


def test_prompts_are_not_held_back_further_than_keeps_the_cache_full() -> None:
    """Four sequences of 10 + 10 tokens find room: 3 of them decode, 9 steps each, while one prompt is read."""
    run = Run(
        [[generation(10, 10)] for _ in range(40)],
        micro_batch=64, micro_batches=1, prefill_chunk=64, room=4 * 19, prompt_tokens=1,
    )  # fmt: skip
    run.to_the_end()
    prompts = [sum(s.length for s in each.segments if not s.is_decode) for each in run.passes]
    decoding = [sum(s.is_decode for s in each.segments) for each in run.passes]
    steady = range(20, 90)
    assert {prompts[index] for index in steady} == {3 * 10 // 9}
    assert sum(decoding[index] for index in steady) / len(steady) > 2.5


def test_prompts_are_not_held_back_where_all_of_them_fit() -> None:
    run = Run(
        [[generation(10, 10)] for _ in range(4)],
        micro_batch=64, micro_batches=1, prefill_chunk=64, room=4 * 19, prompt_tokens=5,
    )  # fmt: skip
    run.to_the_end()
    assert len(run.passes) == 10
    assert run.passes[0].micro_batches[0].num_tokens == 40


def test_what_needs_no_kv_cache_is_not_held_back() -> None:
    run = Run([[scored(5, 5)] for _ in range(6)], micro_batch=60, micro_batches=1, prefill_chunk=60, room=0,
              prompt_tokens=5)  # fmt: skip
    run.to_the_end()
    assert len(run.passes) == 1


def test_decode_goes_on_while_a_long_prompt_is_read() -> None:
    long = generation(100, 1)
    run = Run([[generation(1, 50)], [long]], micro_batch=8, micro_batches=1, prefill_chunk=100, room=1000)
    kinds = []
    while run.computed[long] < 100:
        this_pass = run.next_pass()
        assert this_pass is not None
        kinds.append([(segment.is_decode, segment.length) for segment in this_pass.segments])
    assert kinds[0] == [(False, 1), (False, 7)]
    assert kinds[1:-1] == [[(True, 1), (False, 7)]] * (len(kinds) - 2)


def test_a_scored_sequence_is_not_split_over_micro_batches() -> None:
    run = Run([[scored(4, 4)] for _ in range(3)], micro_batch=10, micro_batches=2, prefill_chunk=10, room=0)
    first, second = run.next_pass(), run.next_pass()
    assert first is not None
    assert second is not None
    assert [batch.num_tokens for batch in first.micro_batches] == [7, 7]
    assert [batch.num_tokens for batch in second.micro_batches] == [7]
    assert run.next_pass() is None


def test_scored_sequences_that_fill_a_micro_batch_exactly_share_it() -> None:
    run = Run([[scored(3, 3)] for _ in range(4)], micro_batch=10, micro_batches=2, prefill_chunk=10, room=0)
    first = run.next_pass()
    assert first is not None
    assert [batch.num_tokens for batch in first.micro_batches] == [10, 10]


def test_what_never_fits_is_named_when_nothing_else_runs() -> None:
    large = generation(50, 10)
    run = Run(
        [[generation(5, 3)], [large], [generation(5, 3)]], micro_batch=64, micro_batches=1, prefill_chunk=64, room=30
    )
    run.to_the_end()
    assert run.stuck == [large]
    assert len(run.passes) == 6, "three for the first; three for the last, after the large one is out of the way"


def test_a_source_that_pauses_is_asked_again_after_each_pass() -> None:
    asked = 0

    def pull() -> list[Sequence] | None:
        nonlocal asked
        asked += 1
        return [generation(1, 3)] if asked == 1 else None

    scheduler = Scheduler(cache_of(100), micro_batch=8, micro_batches=1, prefill_chunk=8)
    for expected in (2, 3, 4):
        this_pass = scheduler.next_pass(pull)
        assert asked == expected
        (segment,) = this_pass.segments
        scheduler.completed(this_pass)
        segment.sequence.tokens.append(0)
    scheduler.retire(segment.sequence)
    assert scheduler.next_pass(pull).micro_batches == ()
    assert scheduler.stuck() is None
    assert scheduler.is_idle


def test_a_source_that_fails_leaves_the_books_in_order() -> None:
    def source() -> Iterator[list[Sequence]]:
        yield [generation(1, 2)]
        raise OSError("the dataset is gone")

    requests = source()
    kv = cache_of(100)
    scheduler = Scheduler(kv, micro_batch=8, micro_batches=1, prefill_chunk=8)
    with pytest.raises(OSError, match="the dataset is gone"):
        scheduler.next_pass(lambda: next(requests, None))
    assert not scheduler.is_idle
    for sequence in list(kv.held):
        scheduler.retire(sequence)
    assert scheduler.is_idle


def test_passes_are_full_while_enough_waits() -> None:
    run = Run([[generation(1, 2)] for _ in range(4000)], micro_batch=500, micro_batches=2, prefill_chunk=8, room=10**6)
    run.to_the_end()
    assert [sum(batch.num_tokens for batch in each.micro_batches) for each in run.passes] == [1000] * 8
