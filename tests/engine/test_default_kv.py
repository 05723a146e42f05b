"""Where the KV cache lives by default: on the device while there is room, elsewhere only where that pays."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.attention.sizes import kv_bytes_per_token
from engine.devices.facts import MachineFacts
from engine.dtypes import DType
from engine.errors import PlanDoesNotFit
from engine.kvcache.cache import KVCache
from engine.planner.known_models import known_model
from engine.planner.plan import Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.predict import as_filled
from engine.planner.resolve import KV_SLOTS, resolve_plan
from engine.planner.workload import MORE_MAY_COME, Workload
from engine.request import SamplingParams
from engine.sequence import Sequence
from engine.tiers import Shares, TierName
from engine.units import GIB

MODELS = ("facebook/opt-125m", "facebook/opt-1.3b", "facebook/opt-6.7b", "facebook/opt-13b", "facebook/opt-30b")
GPUS = {"T4": 14.5, "RTX 4090": 23.0, "A10G": 22.0, "A100": 79.0, "H100": 78.5}
"""Free GiB."""


def plan_of(
    model: str, facts: MachineFacts, options: PlanOptions | None = None, workload: Workload | None = None
) -> Plan:
    known = known_model(model)
    assert known is not None
    return resolve_plan(
        PlanInput(
            options=options or PlanOptions(),
            shape=known.shape,
            stored=known.stored(DType.FLOAT16),
            device="cuda:0",
            facts=facts,
            disk_dir=Path("spill"),
            workload=workload,
        )
    )


@given(
    model=st.sampled_from(MODELS),
    device=st.sampled_from(sorted(GPUS.values())) | st.floats(1, 100),
    host=st.floats(4, 300),
    dtype=st.sampled_from(["float16", "float32"]),
    kv=st.none() | st.sampled_from([Shares(100, 0, 0), Shares(50, 50, 0)]),
)
def test_a_model_that_is_on_the_device_whole_keeps_its_cache_there(
    model: str, device: float, host: float, dtype: DType, kv: Shares | None
) -> None:
    facts = MachineFacts(int(device * GIB), int(host * GIB), shares_host_memory=False)
    known = known_model(model)
    assert known is not None
    try:
        plan = plan_of(model, facts, PlanOptions(dtype=dtype, kv=kv, disk_space=0))
    except PlanDoesNotFit:
        return
    whole = plan.num_layers_in(TierName.DEVICE) == known.shape.num_layers
    if kv is None and whole:
        assert plan.used_bytes[TierName.HOST] == 0  # nothing is pinned
        assert plan.kv_slots == 0
        assert plan.used_bytes[TierName.DEVICE] == plan.budgets[TierName.DEVICE]
    else:
        assert plan.kv_slots == (0 if kv == Shares(100, 0, 0) else KV_SLOTS)
    if kv is not None:
        assert (plan.kv_bytes[TierName.HOST] > 0) == (kv.host > 0)


@pytest.mark.parametrize(
    ("model", "gpu", "host"),
    [("facebook/opt-1.3b", "RTX 4090", 60), ("facebook/opt-6.7b", "RTX 4090", 60), ("facebook/opt-30b", "H100", 220)],
)
def test_a_model_for_which_the_gpu_has_room_is_there_whole(model: str, gpu: str, host: int) -> None:
    """And so are all its sequences, with nothing pinned: 40 to 140 GiB of host memory were, once."""
    plan = plan_of(model, MachineFacts(int(GPUS[gpu] * GIB), host * GIB, shares_host_memory=False))
    assert set(plan.layers) == {TierName.DEVICE}
    assert plan.used_bytes[TierName.HOST] == 0
    assert plan.kv_bytes[TierName.DEVICE] > 0


def test_a_model_that_is_streamed_keeps_no_more_on_the_host_than_waits() -> None:
    """OPT-30B on a T4: a hundred requests had 87 GiB pinned for them."""
    facts = MachineFacts(int(GPUS["T4"] * GIB), 200 * GIB, shares_host_memory=False)
    plan = plan_of("facebook/opt-30b", facts, workload=Workload.uniform(512, 32, 10))
    assert plan.num_layers_in(TierName.HOST) > 40
    assert plan.kv_bytes[TierName.HOST] < 32 * GIB


@pytest.mark.parametrize("host_attention", [None, "on"])
@pytest.mark.parametrize("kv", [None, Shares(0, 100, 0), Shares(20, 80, 0)], ids=str)
def test_a_host_pool_is_as_large_as_the_work(kv: Shares | None, host_attention: str | None) -> None:
    """Pinned memory is nobody else's: what could never be filled is left to others."""
    t4, options = MachineFacts(int(14.5 * GIB), 200 * GIB, shares_host_memory=False), PlanOptions()
    options = replace(options, kv=kv, host_attention=host_attention)
    pools, of_one = {}, 0
    for requests in (1, 10, 1000):
        plan = plan_of("facebook/opt-30b", t4, options, Workload.uniform(512, 32, requests))
        known = known_model("facebook/opt-30b")
        assert known is not None
        of_one = kv_bytes_per_token(known.shape, plan.kv_format) * 576  # whole pages
        pools[requests] = plan.kv_bytes[TierName.HOST]
        assert pools[requests] <= MORE_MAY_COME * requests * of_one
        assert plan.used_bytes[TierName.HOST] <= plan.budgets[TierName.HOST]
    unknown = plan_of("facebook/opt-30b", t4, options).kv_bytes[TierName.HOST]
    assert pools[1] < pools[10] <= pools[1000] == unknown
    if kv == Shares(0, 100, 0):
        assert pools[10] == 40 * of_one


def cache_for(kv: Shares | None) -> KVCache:
    """A cache of which the device holds 4 sequences of 32 tokens, the host 8, on a device of separate memory."""
    known = known_model("facebook/opt-125m")
    assert known is not None
    shape = replace(known.shape, num_layers=2)
    facts = MachineFacts(GIB, GIB, shares_host_memory=False)
    options = PlanOptions(
        weights=Shares(0, 100, 0), kv=kv, device_memory=GIB, host_memory=GIB, micro_batch=32, extent_tokens=32
    )
    plan = resolve_plan(
        PlanInput(
            options=options,
            shape=shape,
            stored=known.stored(DType.FLOAT16),
            device="simulated",
            facts=facts,
            disk_dir=Path(),
        )
    )
    assert plan.kv_bytes[TierName.HOST]
    of_one = 32 * kv_bytes_per_token(shape, plan.kv_format)
    pools = {TierName.DEVICE: 4 * of_one, TierName.HOST: 8 * of_one, TierName.DISK: 0}
    tokens = replace(plan, kv_bytes=pools).kv_tokens(shape)
    return KVCache(tokens, extent_tokens=plan.extent_tokens, fills_together=plan.kv_fills_together)


def sequences() -> Iterator[Sequence]:
    while True:
        yield Sequence([1] * 32, 32, 33, SamplingParams())


def held(cache: KVCache) -> dict[TierName, int]:
    return {tier: sum(holding.tier is tier for holding in cache.held.values()) for tier in TierName}


def test_the_device_is_filled_first() -> None:
    cache = cache_for(None)
    admitted = [sequence for sequence, _ in zip(sequences(), range(6), strict=False) if cache.admit(sequence)]
    assert held(cache) == {TierName.DEVICE: 4, TierName.HOST: 2, TierName.DISK: 0}
    cache.release(admitted[0])
    for sequence, _ in zip(sequences(), range(2), strict=False):
        assert cache.admit(sequence)
    assert held(cache) == {TierName.DEVICE: 4, TierName.HOST: 3, TierName.DISK: 0}


def test_shares_that_were_asked_for_fill_together() -> None:
    cache = cache_for(Shares(33, 67, 0))
    for sequence, _ in zip(sequences(), range(6), strict=False):
        assert cache.admit(sequence)
    assert held(cache) == {TierName.DEVICE: 2, TierName.HOST: 4, TierName.DISK: 0}


@given(st.integers(1, 400))
def test_a_prediction_takes_the_device_to_be_filled_first(requests: int) -> None:
    plan = plan_of("facebook/opt-30b", MachineFacts(int(78.5 * GIB), 220 * GIB, shares_host_memory=False))
    known = known_model("facebook/opt-30b")
    assert known is not None
    token_bytes = kv_bytes_per_token(known.shape, plan.kv_format)
    filled = as_filled(Workload.uniform(512, 32, requests), plan, token_bytes).kv_bytes
    whole = filled[TierName.DEVICE] == plan.kv_bytes[TierName.DEVICE]
    assert filled[TierName.HOST] == 0 or whole
    assert filled[TierName.HOST] <= plan.kv_bytes[TierName.HOST]
    assert sum(filled.values()) <= requests * 544 * token_bytes + 1
