"""What is said when nothing fits: it must be true."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.sizes import kv_bytes_per_token
from engine.devices.facts import MachineFacts
from engine.errors import PlanDoesNotFit
from engine.loading import load_engine
from engine.planner.known_models import KNOWN_MODELS
from engine.planner.nearest import format_flag, nearest_fit
from engine.planner.plan import Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import resolve_plan
from engine.planner.workload import Workload
from engine.tiers import Shares
from engine.units import GIB, MIB, parse_bytes
from engine.weights.importing import import_checkpoint
from tests.engine.checkpoints import make_checkpoint

MODEL = KNOWN_MODELS["facebook/opt-1.3b"]
STORED = MODEL.stored()
TOKENS = 500


def resolved(options: PlanOptions, shares: bool = False) -> Plan:
    facts = MachineFacts(0, 0, shares_host_memory=shares)
    return resolve_plan(
        PlanInput(options=options, shape=MODEL.shape, stored=STORED, device="cuda", facts=facts, disk_dir=Path())
    )


def nearest(options: PlanOptions, shares: bool = False, tokens: int = TOKENS) -> str | None:
    facts = MachineFacts(0, 0, shares_host_memory=shares)
    return nearest_fit(
        PlanInput(
            options=options, shape=MODEL.shape, stored=STORED, facts=facts, device="cuda", disk_dir=Path(),
            workload=Workload.uniform(tokens, 1, 1),
        )
    )  # fmt: skip


def as_told(options: PlanOptions, sentence: str) -> PlanOptions:
    """The options with the flags of a sentence."""
    words, _, without = sentence.partition("that fits: ")[2].replace(" with ", " ").partition("without ")
    flags = words.split()
    values: dict[str, object] = {flag[2:].replace("-", "_"): None for flag in without.split(", ") if flag}
    for flag, text in zip(flags[::2], flags[1::2], strict=True):
        name = flag[2:].replace("-", "_")
        if name == "weights":
            values[name] = Shares.parse(text)
        else:
            values[name] = parse_bytes(text) if name.endswith(("memory", "space")) else int(text)
    return replace(options, **values)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    device=st.integers(0, 4 * GIB),
    host=st.integers(0, 2 * GIB),
    weights=st.none() | st.sampled_from([Shares(100, 0, 0), Shares(30, 70, 0), Shares(0, 100, 0), Shares(0, 0, 100)]),
    kv=st.none() | st.sampled_from([Shares(100, 0, 0), Shares(0, 100, 0), Shares(20, 0, 80)]),
    activations=st.sampled_from([None, "device", "host", "disk"]),
    micro_batch=st.none() | st.integers(1, 20_000),
    shares=st.booleans(),
)
def test_what_is_told_fits_and_a_little_less_memory_does_not(
    device: int, host: int, weights: Shares | None, kv: Shares | None, activations: str | None,
    micro_batch: int | None, shares: bool,
) -> None:  # fmt: skip
    options = PlanOptions(
        device_memory=device, host_memory=host, disk_space=0, weights=weights, kv=kv, activations=activations,
        micro_batch=micro_batch,
    )  # fmt: skip
    sentence = nearest(options, shares)
    assert sentence is not None
    told = as_told(options, sentence)
    plan = resolved(told, shares)
    assert max(plan.kv_bytes.values()) >= TOKENS * kv_bytes_per_token(MODEL.shape, plan.kv_format)
    if "--device-memory" in sentence:
        assert told.device_memory is not None
        less = replace(told, device_memory=told.device_memory - told.device_memory // 8 - 2 * MIB)
        try:
            room = max(resolved(less, shares).kv_bytes.values())
        except PlanDoesNotFit:
            return
        assert room < TOKENS * kv_bytes_per_token(MODEL.shape, plan.kv_format)
    else:
        assert (told.device_memory, told.host_memory) == (device, host) or "--host-memory" in sentence


def test_the_same_memory_comes_before_more_of_it() -> None:
    options = PlanOptions(device_memory=2 * GIB, host_memory=4 * GIB, disk_space=0, weights=Shares(100, 0, 0))
    sentence = nearest(options)
    assert sentence is not None
    told = as_told(options, sentence)
    assert told.weights is not None
    assert 0 < told.weights.device < 100
    one_more = replace(told, weights=Shares(told.weights.device + 1, told.weights.host - 1, 0))
    try:
        plan = resolved(one_more)
    except PlanDoesNotFit:
        return
    assert max(plan.kv_bytes.values()) < TOKENS * kv_bytes_per_token(MODEL.shape, plan.kv_format)


@pytest.mark.parametrize("num_bytes", [1, MIB, 700 * MIB + 1, GIB, GIB + 1, 3 * GIB // 2, 123 * GIB + 7])
def test_a_flag_is_never_less_than_what_is_needed(num_bytes: int) -> None:
    assert num_bytes <= parse_bytes(format_flag(num_bytes)) <= num_bytes + max(MIB, GIB // 10 + 1)


def test_the_engines_own_refusal_names_a_plan_with_which_it_loads(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "model")
    model_dir = tmp_path / "model"
    options = PlanOptions(device="cpu", device_memory=1000)
    with pytest.raises(PlanDoesNotFit, match=r"short; .*the smallest that fits: --device-memory \d") as refused:
        load_engine(model_dir, options)
    assert "\n" not in str(refused.value)
    with load_engine(model_dir, as_told(options, str(refused.value))) as engine:
        assert engine.plan.budgets
