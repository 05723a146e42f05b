"""The laws of the block schedule, over random workloads; and that it changes when, never what."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Choose, Generate, PlanOptions, Request, SamplingParams, Score
from engine.loading import load_engine
from engine.schedule.passes import Pass, PassStats
from engine.schedule.scheduler import Scheduler
from engine.sequence import Sequence
from engine.units import MIB
from tests.engine.test_scheduler import cache_of, generation, scored


class BlockRun:
    """Drives a scheduler by block as the engine does, and checks every pass."""

    def __init__(
        self, requests: list[list[Sequence]], *, room: int, micro_batch: int, micro_batches: int = 1, chunk: int = 1000
    ) -> None:
        self.requests = requests
        self.tokens_per_pass = micro_batch * micro_batches
        self.kv = cache_of(room)
        self.scheduler = Scheduler(
            self.kv, micro_batch=micro_batch, micro_batches=micro_batches, prefill_chunk=chunk, by_block=True
        )
        self.pulled: list[Sequence] = []
        self.num_requests_pulled = 0
        self.block: list[Sequence] = []
        self.blocks: list[list[Sequence]] = []
        self.stuck: list[Sequence] = []
        self.passes: list[Pass] = []

    def pull(self) -> list[Sequence] | None:
        if self.num_requests_pulled == len(self.requests):
            return None
        assert not self.alive, "asked for more while a block runs"
        self.num_requests_pulled += 1
        self.pulled += (request := self.requests[self.num_requests_pulled - 1])
        return list(request)

    @property
    def alive(self) -> list[Sequence]:
        return [sequence for sequence in self.block if not sequence.finished]

    def to_the_end(self) -> "BlockRun":
        for _ in range(sum(s.max_tokens + 1 for request in self.requests for s in request) + 1):
            if not self.step():
                break
        else:
            raise AssertionError("it never ends")
        assert all(sequence.finished for request in self.requests for sequence in request)
        assert self.scheduler.is_idle
        assert self.kv.held == {}
        return self

    def step(self) -> bool:
        running = self.alive
        waiting_before = self.scheduler.num_waiting
        this_pass = self.scheduler.next_pass(self.pull)
        if running:
            assert self.scheduler.num_waiting == waiting_before, "nobody is admitted while a block runs"
        elif this_pass.micro_batches:
            self.open_block()
        if not this_pass.micro_batches:
            stuck = self.scheduler.stuck()
            if stuck is None:
                return False
            self.stuck.append(stuck)
            stuck.finished = True
            self.scheduler.retire(stuck)
            return True
        self.check(this_pass)
        self.compute(this_pass)
        return True

    def open_block(self) -> None:
        """In the order they came: those that are neither in an earlier block nor stuck nor waiting."""
        left = [sequence for sequence in self.pulled if not sequence.finished]
        self.block = left[: len(left) - self.scheduler.num_waiting]
        self.blocks.append(self.block)
        assert len(self.block) <= self.tokens_per_pass
        needing = [sequence for sequence in self.block if self.scheduler.needs_kv(sequence)]
        assert set(self.kv.held) == set(needing), "a block holds its room from its beginning"
        if len(self.block) < self.tokens_per_pass and self.scheduler.num_waiting:
            first = left[len(self.block)]
            assert self.scheduler.needs_kv(first)
            held = sum(sequence.num_kv_tokens for sequence in needing)
            assert held + first.num_kv_tokens > self.kv.largest_sequence, "as many as there is room for"
        elif len(self.block) < self.tokens_per_pass:
            assert self.num_requests_pulled == len(self.requests)

    def check(self, this_pass: Pass) -> None:
        segments = this_pass.segments
        assert {segment.sequence for segment in segments} <= set(self.alive)
        assert len({segment.is_decode for segment in segments}) == 1, "prefill and decode never share a pass"
        if segments[0].is_decode:
            assert [segment.sequence for segment in segments] == self.alive, "all of the block decode"
            assert all(sequence.is_decoding for sequence in self.alive), "no prompt is left"
        self.passes.append(this_pass)

    def compute(self, this_pass: Pass) -> None:
        computed = {segment.sequence: segment.sequence.num_computed for segment in this_pass.segments}
        for segment in this_pass.segments:
            assert segment.start == computed[segment.sequence], "every token once and in order"
            computed[segment.sequence] += segment.length
        self.scheduler.completed(this_pass)
        for segment in this_pass.segments:
            assert segment.sequence.num_computed <= segment.sequence.num_to_compute
        for sequence in {segment.sequence for segment in this_pass.segments}:
            done = sequence.num_computed == sequence.num_to_compute
            if done and not sequence.is_scored:
                sequence.tokens.append(0)
                done = len(sequence.tokens) == sequence.max_tokens
            if done:
                sequence.finished = True
                self.scheduler.retire(sequence)


@st.composite
def block_runs(draw: st.DrawFn) -> BlockRun:
    one = st.tuples(st.booleans(), st.integers(1, 30), st.integers(1, 8))
    wanted = draw(st.lists(st.lists(one, min_size=1, max_size=3), max_size=12))
    return BlockRun(
        [[(scored if is_scored else generation)(a, b) for is_scored, a, b in request] for request in wanted],
        micro_batch=draw(st.integers(1, 12)),
        micro_batches=draw(st.integers(1, 4)),
        chunk=draw(st.integers(1, 60)),
        room=draw(st.integers(0, 120)),
    )


@settings(max_examples=200)
@given(block_runs())
def test_a_block_is_prefilled_then_decoded_to_its_end_before_the_next(run: BlockRun) -> None:
    run.to_the_end()
    assert sum(map(len, run.blocks)) + len(run.stuck) == sum(map(len, run.requests))
    for sequence in run.stuck:
        assert sequence.num_kv_tokens > run.kv.largest_sequence


def test_a_long_output_holds_the_block_that_mixed_passes_would_have_refilled() -> None:
    short, long, next_one = generation(4, 2), generation(4, 6), generation(4, 2)
    run = BlockRun([[short], [long], [next_one]], room=14, micro_batch=16).to_the_end()
    assert run.blocks == [[short, long], [next_one]]
    counts = [[(segment.is_decode, segment.length) for segment in each.segments] for each in run.passes]
    prompts, alone = [(False, 4)], [(True, 1)]
    assert counts == [prompts * 2, alone * 2, *[alone] * 4, prompts, alone]


def test_prompts_of_a_block_take_as_many_passes_as_they_need() -> None:
    run = BlockRun([[generation(10, 2)] for _ in range(3)], room=1000, micro_batch=6, micro_batches=2).to_the_end()
    assert [sum(batch.num_tokens for batch in each.micro_batches) for each in run.passes] == [12, 12, 6, 3]


def test_what_is_dropped_in_the_middle_of_a_block_frees_the_rest() -> None:
    dropped, kept, later = generation(4, 9), generation(4, 3), generation(4, 2)
    run = BlockRun([[dropped], [kept], [later]], room=20, micro_batch=16)
    assert run.step()
    dropped.finished = True
    run.scheduler.retire(dropped)
    run.to_the_end()
    assert run.blocks == [[dropped, kept], [later]]


def run_both_ways(model: Path, requests: list[Request]) -> dict[str, tuple[dict[object, object], list[PassStats]]]:
    found = {}
    for schedule in ("mixed", "block"):
        chosen = PlanOptions(
            device="cpu", device_memory=2 * MIB, micro_batch=24, micro_batches=2, schedule=schedule, extent_tokens=32
        )
        with load_engine(model, chosen) as engine:
            assert engine.plan.schedule == schedule
            reports = list(engine.passes(iter(requests)))
            engine.check_integrity()
        outputs = {output.key: output.result for report in reports for output in report.outputs}
        found[schedule] = outputs, [report.stats for report in reports]
    return found


def test_the_outputs_are_those_of_mixed_passes(tiny_model: Path) -> None:
    requests = []
    for number in range(24):
        text = "abcdefgh" * (1 + number % 5) + str(number)
        sampling = SamplingParams(max_new_tokens=1 + number % 9, ignore_eos=True, temperature=number % 2, seed=number)
        requests.append(Request(("generate", number), Generate(text, sampling, number)))
        if number % 4 == 0:
            requests.append(Request(("score", number), Score(text, " and more")))
            requests.append(Request(("choose", number), Choose(text, ("yes", "no"))))
    found = run_both_ways(tiny_model, requests)
    (mixed, mixed_passes), (block, block_passes) = found["mixed"], found["block"]
    assert mixed.keys() == block.keys() == {request.key for request in requests}
    for key, result in mixed.items():
        if isinstance(key, tuple) and key[0] == "generate":
            assert block[key] == result
    for number in range(0, 24, 4):
        ours, theirs = block["score", number], mixed["score", number]
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)  # type: ignore[attr-defined]
        ours, theirs = block["choose", number], mixed["choose", number]
        assert ours.label == theirs.label  # type: ignore[attr-defined]
    assert not any(stats.prefill_tokens and stats.decode_tokens for stats in block_passes)
    assert any(stats.prefill_tokens and stats.decode_tokens for stats in mixed_passes)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule must be mixed or block, not 'static'"):
        PlanOptions(schedule="static")


def test_a_sequence_of_a_block_is_in_one_pass_at_a_time() -> None:
    run = BlockRun([[generation(4, 3)] for _ in range(4)], room=1000, micro_batch=8)
    first, second = run.scheduler.next_pass(run.pull), run.scheduler.next_pass(run.pull)
    assert len({segment.sequence for each in (first, second) for segment in each.segments}) == 4
    assert not run.scheduler.next_pass(run.pull).micro_batches, "all prompts are under way"
    assert run.scheduler.stuck() is None
    run.scheduler.completed(first)
    for segment in first.segments:
        segment.sequence.tokens.append(0)
    assert not run.scheduler.next_pass(run.pull).micro_batches, "no decoding while a prompt is under way"
    run.scheduler.completed(second)
    for segment in second.segments:
        segment.sequence.tokens.append(0)
    assert all(segment.is_decode for segment in run.scheduler.next_pass(run.pull).segments)
