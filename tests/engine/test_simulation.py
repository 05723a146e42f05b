"""The predictor's passes against the real scheduler's: the same tokens, pass by pass."""

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.sizes import kv_bytes_per_token
from engine.devices.facts import MachineFacts
from engine.dtypes import DType
from engine.formats.sizes import Plain
from engine.kvcache.cache import ROOM_OF_TOKENS, KVCache, SequenceRoom
from engine.planner.known_models import KNOWN_MODELS
from engine.planner.load import load_of
from engine.planner.plan import Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import resolve_plan
from engine.planner.simulation import Simulation
from engine.planner.workload import Lengths, Workload
from engine.request import SamplingParams
from engine.schedule.scheduler import Scheduler
from engine.sequence import Sequence
from engine.tiers import TierName
from engine.units import GIB

MODEL = KNOWN_MODELS["facebook/opt-125m"]
TOKEN_BYTES = kv_bytes_per_token(MODEL.shape, Plain(DType.FLOAT16))


def plan_of(
    tokens: Items[int], *, micro_batch: int, micro_batches: int, prefill_chunk: int, room: SequenceRoom = ROOM_OF_TOKENS
) -> Plan:
    """A plan whose tiers hold ``tokens`` of KV cache, in the order of ``TierName``."""
    options = PlanOptions(
        device_memory=8 * GIB, host_memory=8 * GIB, disk_space=0, micro_batch=micro_batch,
        micro_batches=micro_batches, prefill_chunk=prefill_chunk,
    )  # fmt: skip
    facts = MachineFacts(0, 0, shares_host_memory=False)
    given_ = PlanInput(
        shape=MODEL.shape, stored=MODEL.stored(), device="cuda", facts=facts, options=options, disk_dir=Path()
    )
    plan = resolve_plan(given_)
    assert plan.kv_format == Plain(DType.FLOAT16)
    pools = {tier: count * TOKEN_BYTES for tier, count in zip(TierName, tokens, strict=True)}
    return replace(plan, kv_bytes=pools, kv_room=room)


def scheduled(plan: Plan, lengths: Items[Lengths], balanced: Items[int | None]) -> Iterator[tuple[int, int, int]]:
    """Prompt tokens, decode tokens and KV tokens attended to by these, of each pass of the real scheduler."""
    tokens = plan.kv_tokens(MODEL.shape)
    cache = KVCache(tokens, extent_tokens=plan.extent_tokens, layouts=plan.kv_layouts, room=plan.kv_room)
    scheduler = Scheduler(
        cache, micro_batch=plan.micro_batch, micro_batches=plan.micro_batches, prefill_chunk=plan.prefill_chunk
    )
    waiting = deque(
        Sequence([1] * each.prompt, each.prompt, each.prompt + each.generated, SamplingParams()) for each in lengths
    )
    for prompt_tokens in cycle(balanced):
        one = scheduler.next_pass(lambda: [waiting.popleft()] if waiting else None, prompt_tokens)
        if not one.micro_batches:
            assert scheduler.is_idle
            return
        load = load_of(one.segments)
        yield int(load.prompt_tokens), int(load.decode_tokens), int(load.attended)
        scheduler.completed(one)
        for sequence in {segment.sequence: None for segment in one.segments}:
            if sequence.num_computed == len(sequence.tokens):
                sequence.tokens.append(1)
                if len(sequence.tokens) == sequence.max_tokens:
                    scheduler.retire(sequence)


def simulated(plan: Plan, workload: Workload, balanced: Items[int | None]) -> Iterator[tuple[int, int, int]]:
    simulation = Simulation(workload, plan, TOKEN_BYTES)
    for prompt_tokens in cycle(balanced):
        if simulation.is_done:
            return
        load = simulation.next_pass(prompt_tokens)
        assert load.prompt_tokens == int(load.prompt_tokens)
        yield int(load.prompt_tokens), int(load.decode_tokens), int(load.attended)


batches = st.fixed_dictionaries(
    {"micro_batch": st.integers(1, 40), "micro_batches": st.integers(1, 3), "prefill_chunk": st.integers(1, 50)}
)
rooms = st.tuples(*[st.integers(0, 300)] * 3)
balances = st.lists(st.none() | st.integers(1, 80), min_size=1, max_size=5)


windows = st.sampled_from([ROOM_OF_TOKENS, SequenceRoom(8, 5)])


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 60), rooms, batches, balances, windows)
def test_requests_of_one_length_fill_the_very_passes_of_the_scheduler(
    prompt: int,
    generated: int,
    requests: int,
    room: tuple[int, int, int],
    batch: dict[str, int],
    balanced: list[int | None],
    window: SequenceRoom,
) -> None:
    """Whatever the balance asks for, and also where prompts are computed in chunks and the cache is small."""
    lengths = Lengths(prompt, generated, requests)
    room = (max(room[0], window.of(lengths.reserved)), *room[1:])
    plan = plan_of(room, **batch, room=window)
    workload = Workload((lengths,))
    found = list(simulated(plan, workload, balanced))
    assert found == list(scheduled(plan, [lengths] * requests, balanced))
    assert sum(tokens for tokens, _, _ in found) == workload.prompt_tokens
    assert sum(tokens for _, tokens, _ in found) == requests * lengths.decode_steps
    assert sum(attended for _, _, attended in found) == requests * lengths.attended


lists_of_lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=5, unique=True)


@settings(max_examples=60, deadline=None)
@given(lists_of_lengths, st.integers(1, 12), batches)
def test_where_all_have_room_requests_of_any_length_do(
    pairs: list[tuple[int, int]], number: int, batch: dict[str, int]
) -> None:
    workload = Workload(tuple(Lengths(prompt, generated, number) for prompt, generated in pairs))
    plan = plan_of((100_000, 0, 0), **batch)
    # Those of each length are spread evenly: here, where they are as many, one of each by turns.
    order = [each for _ in range(number) for each in workload.lengths]
    assert list(simulated(plan, workload, [None])) == list(scheduled(plan, order, [None]))


@settings(max_examples=60, deadline=None)
@given(lists_of_lengths, st.integers(1, 300), st.integers(52, 400), st.integers(0, 100), batches, balances)
def test_in_little_room_every_token_is_computed_once_and_all_room_is_given_back(
    pairs: list[tuple[int, int]],
    number: int,
    on_device: int,
    on_host: int,
    batch: dict[str, int],
    balanced: list[int | None],
) -> None:
    workload = Workload(tuple(Lengths(prompt, generated, number) for prompt, generated in pairs))
    plan = plan_of((on_device, on_host, 0), **batch)
    simulation = Simulation(workload, plan, TOKEN_BYTES)
    prompts = decodes = 0
    for prompt_tokens in cycle(balanced):
        if simulation.is_done:
            break
        load = simulation.next_pass(prompt_tokens)
        assert 0 < load.tokens <= plan.tokens_per_pass
        assert min(simulation._free) >= 0
        prompts, decodes = prompts + int(load.prompt_tokens), decodes + int(load.decode_tokens)
    assert (prompts, decodes) == (workload.prompt_tokens, workload.generated - workload.requests)
    assert simulation._free == list(plan.kv_tokens(MODEL.shape).values())


def test_each_request_reserves_whole_units() -> None:
    workload = Workload((Lengths(256, 8, 32), Lengths(64, 1, 2)))  # 263 and 64 tokens each
    assert workload.reserved_tokens(1) == 32 * 263 + 2 * 64
    assert workload.reserved_tokens(64) == 32 * 320 + 2 * 64


@pytest.mark.parametrize("requests", [10, 100_000])
def test_many_requests_are_as_few_numbers(requests: int) -> None:
    simulation = Simulation(
        Workload.uniform(512, 32, requests),
        plan_of((10**6, 0, 0), micro_batch=2048, micro_batches=2, prefill_chunk=4096),
        1,
    )
    assert simulation.num_waiting == requests
    assert len(simulation._waiting) <= 64
