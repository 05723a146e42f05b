"""Where the KV cache lives by default: on the device while there is room, elsewhere only where that pays."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.devices.facts import MachineFacts
from engine.devices.simulated import SimulatedDevice
from engine.dtypes import DType
from engine.errors import PlanDoesNotFit
from engine.kvcache.sizes import kv_bytes_per_token
from engine.kvcache.store import KVStore
from engine.memory.spill import DiskTier
from engine.memory.tier import MemoryTier
from engine.memory.traffic import Traffic
from engine.planner.default import KV_SLOTS, resolve_plan
from engine.planner.known_models import known_model
from engine.planner.plan import Plan, PlanOptions
from engine.planner.predict import as_filled
from engine.planner.workload import Workload
from engine.request import SamplingParams
from engine.sequence import Sequence
from engine.tiers import Shares, TierName
from engine.units import GIB

MODELS = ("facebook/opt-125m", "facebook/opt-1.3b", "facebook/opt-6.7b", "facebook/opt-13b", "facebook/opt-30b")
GPUS = {"T4": 14.5, "RTX 4090": 23.0, "A10G": 22.0, "A100": 79.0, "H100": 78.5}
"""Free GiB."""


def plan_of(model: str, facts: MachineFacts, options: PlanOptions | None = None) -> Plan:
    known = known_model(model)
    assert known is not None
    return resolve_plan(
        options or PlanOptions(), shape=known.shape, stored=known.stored(DType.FLOAT16), device="cuda:0", facts=facts,
        disk_dir=Path("spill"),
    )  # fmt: skip


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


@pytest.mark.parametrize(("model", "gpu"), [("facebook/opt-1.3b", "RTX 4090"), ("facebook/opt-6.7b", "RTX 4090")])
def test_models_of_the_review_fit_whole(model: str, gpu: str) -> None:
    plan = plan_of(model, MachineFacts(int(GPUS[gpu] * GIB), 60 * GIB, shares_host_memory=False))
    assert set(plan.layers) == {TierName.DEVICE}
    assert plan.used_bytes[TierName.HOST] == 0


@contextmanager
def store_for(kv: Shares | None) -> Iterator[tuple[KVStore, Plan]]:
    """A cache of which the device holds 4 sequences of 32 tokens, the host 8, on a device of separate memory."""
    known = known_model("facebook/opt-125m")
    assert known is not None
    shape = replace(known.shape, num_layers=2)
    facts = MachineFacts(GIB, GIB, shares_host_memory=False)
    options = PlanOptions(
        weights=Shares(0, 100, 0), kv=kv, device_memory=GIB, host_memory=GIB, micro_batch=32, extent_tokens=32
    )
    plan = resolve_plan(
        options, shape=shape, stored=known.stored(DType.FLOAT16), device="simulated", facts=facts, disk_dir=Path()
    )
    assert plan.kv_bytes[TierName.HOST]
    of_one = 32 * kv_bytes_per_token(shape, plan.dtype)
    pools = {TierName.DEVICE: 4 * of_one, TierName.HOST: 8 * of_one, TierName.DISK: 0}
    plan = replace(plan, kv_bytes=pools)
    with closing(SimulatedDevice()) as device, closing(DiskTier(0, Path())) as disk:
        tiers = {
            TierName.DEVICE: MemoryTier(TierName.DEVICE, GIB, device.allocate),
            TierName.HOST: MemoryTier(TierName.HOST, GIB, device.allocate_host),
        }
        with closing(KVStore(plan, shape, device, tiers, disk, Traffic(device.compute_mark))) as store:
            yield store, plan


def sequences() -> Iterator[Sequence]:
    while True:
        yield Sequence([1] * 32, 32, 33, SamplingParams())


def held(store: KVStore) -> dict[TierName, int]:
    return {tier: sum(kv.tier is tier for kv in store._sequences.values()) for tier in TierName}


def test_the_device_is_filled_first() -> None:
    with store_for(None) as (store, _):
        admitted = [sequence for sequence, _ in zip(sequences(), range(6), strict=False) if store.admit(sequence)]
        assert held(store) == {TierName.DEVICE: 4, TierName.HOST: 2, TierName.DISK: 0}
        store.release(admitted[0])
        for sequence, _ in zip(sequences(), range(2), strict=False):
            assert store.admit(sequence)
        assert held(store) == {TierName.DEVICE: 4, TierName.HOST: 3, TierName.DISK: 0}


def test_shares_that_were_asked_for_fill_together() -> None:
    with store_for(Shares(33, 67, 0)) as (store, _):
        for sequence, _ in zip(sequences(), range(6), strict=False):
            assert store.admit(sequence)
        assert held(store) == {TierName.DEVICE: 2, TierName.HOST: 4, TierName.DISK: 0}


@given(st.integers(1, 400))
def test_a_prediction_takes_the_device_to_be_filled_first(requests: int) -> None:
    plan = plan_of("facebook/opt-30b", MachineFacts(int(78.5 * GIB), 220 * GIB, shares_host_memory=False))
    known = known_model("facebook/opt-30b")
    assert known is not None
    token_bytes = kv_bytes_per_token(known.shape, plan.dtype)
    filled = as_filled(Workload.uniform(512, 32, requests), plan, token_bytes).kv_bytes
    whole = filled[TierName.DEVICE] == plan.kv_bytes[TierName.DEVICE]
    assert filled[TierName.HOST] == 0 or whole
    assert filled[TierName.HOST] <= plan.kv_bytes[TierName.HOST]
    assert sum(filled.values()) <= requests * 544 * token_bytes + 1
