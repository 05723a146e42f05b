"""A plan for what comes: searched for where something must be streamed, told apart from rules, refused with advice."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.devices.facts import MachineFacts
from engine.devices.host import HostDevice
from engine.dtypes import DType
from engine.engine import Engine
from engine.errors import Interrupted, PlanDoesNotFit, Unmeasurable
from engine.lengths import workload_of
from engine.measure import identity_of
from engine.planner.decide import Decision, Outlook, Question, budgets_of_machine, decide_plan
from engine.planner.default import resolve_plan
from engine.planner.hardware import Hardware
from engine.planner.known_models import known_model
from engine.planner.least import has_room, least_plan
from engine.planner.nearest import format_flag
from engine.planner.plan import PlanOptions
from engine.planner.profiles import load_hardware
from engine.planner.rates import Figure
from engine.planner.workload import Workload
from engine.profile import profile_for, store_profile, stored_profile
from engine.request import Generate, Request, SamplingParams, Score
from engine.tiers import Shares, TierName
from engine.units import GIB, MIB

MODEL = known_model("facebook/opt-1.3b")
assert MODEL is not None
SHAPE, STORED = MODEL.shape, MODEL.stored(DType.BFLOAT16)
FACTS = MachineFacts(8 * GIB, 8 * GIB, shares_host_memory=True, attention_threads=2)
WORK = Workload.uniform(512, 32, 100)


@pytest.fixture(scope="module")
def machine() -> Hardware:
    """Figures of a known machine: what this one is like today decides nothing here."""
    t4 = load_hardware("t4-gcp")
    matmul = {DType.BFLOAT16: t4.matmul[DType.FLOAT16], DType.FLOAT32: t4.matmul[DType.FLOAT32]}
    return replace(t4, device="cpu", shares_host_memory=True, host_attention=None, matmul=matmul)


def never() -> Hardware:
    raise AssertionError("nothing was to be decided")


def decide(options: PlanOptions, outlook: Outlook | None, facts: MachineFacts = FACTS) -> Decision:
    return decide_plan(
        options, outlook, shape=SHAPE, stored=STORED, device="cpu", facts=facts, disk_dir=Path("spill")
    )  # fmt: skip


def test_what_fits_whole_needs_no_measuring() -> None:
    decide(PlanOptions(device_memory=8 * GIB), Outlook(WORK, never))


def test_little_that_is_streamed_is_not_worth_measuring() -> None:
    decide(PlanOptions(device_memory=8 * GIB, weights=Shares(90, 0, 10)), Outlook(WORK, never))


def test_what_must_be_streamed_is_searched_for(machine: Hardware) -> None:
    asked: list[Hardware] = []

    def hardware() -> Hardware:
        asked.append(machine)
        return machine

    decision = decide_plan(
        PlanOptions(device_memory=GIB), Outlook(WORK, hardware),
        shape=SHAPE, stored=STORED, device="cpu", facts=FACTS, disk_dir=Path("spill"),
    )  # fmt: skip
    assert asked == [machine]
    assert decision.hardware is machine
    assert max(decision.plan.used_bytes.values()) <= GIB
    assert decision.plan.disk_dir == Path("spill")


def test_what_a_person_fixed_is_kept(machine: Hardware) -> None:
    fixed = PlanOptions(device_memory=2 * GIB, weights=Shares(0, 0, 100), micro_batch=300)
    decision = decide_plan(
        fixed, Outlook(WORK, lambda: machine),
        shape=SHAPE, stored=STORED, device="cpu", facts=FACTS, disk_dir=Path("spill"),
    )  # fmt: skip
    assert decision.plan.num_layers_in(TierName.DISK) == SHAPE.num_layers
    assert decision.plan.micro_batch == 300


@pytest.mark.parametrize("searched", [False, True])
def test_a_refusal_names_the_nearest_plan_that_fits_and_nothing_is_measured(searched: bool) -> None:
    with pytest.raises(PlanDoesNotFit, match=r"short.*the smallest that fits: --device-memory \S+ with") as refused:
        decide(PlanOptions(device_memory=100 * MIB), Outlook(WORK, never) if searched else None)
    text = str(refused.value).rpartition("--device-memory ")[2].split()[0]
    unit = {"MiB": MIB, "GiB": GIB}[text[-3:]]
    near = PlanOptions(
        device_memory=int(float(text[:-3]) * unit), weights=Shares(0, 0, 100), micro_batch=256, micro_batches=1
    )
    decide(near, None)


@pytest.mark.parametrize(
    ("facts", "weights"),
    [
        (FACTS, r"[1-9]\d*/0/[1-9]\d*"),
        (MachineFacts(8 * GIB, 8 * GIB, shares_host_memory=False), r"[1-9]\d*/[1-9]\d*/0"),
    ],
)
def test_a_refusal_of_flags_says_where_the_weights_should_go(facts: MachineFacts, weights: str) -> None:
    with pytest.raises(PlanDoesNotFit, match=f"the nearest that fits: --weights {weights}$"):
        decide(PlanOptions(device_memory=2 * GIB, weights=Shares(100, 0, 0)), None, facts)


@pytest.mark.parametrize(("budget", "micro_batch"), [(GIB, 2048), (660 * MIB, 256)])
def test_where_measuring_has_too_little_room_the_rules_decide(budget: int, micro_batch: int) -> None:
    """Where the cache of the rules' plan has no room for a request, with small batches."""

    def measured() -> Hardware:
        raise Unmeasurable("too little room")

    decision = decide(PlanOptions(device_memory=budget), Outlook(WORK, measured))
    assert decision.hardware is None
    assert decision.plan.micro_batch == micro_batch
    assert has_room(decision.plan, SHAPE, 543)
    assert decision.plan.used_bytes[TierName.DEVICE] <= budget


def test_where_no_plan_has_room_for_a_request_nothing_is_measured() -> None:
    assert not has_room(
        decide(PlanOptions(device_memory=610 * MIB, micro_batch=2048), Outlook(WORK, never)).plan, SHAPE, 543
    )


def test_an_end_of_measuring_is_an_end_of_planning() -> None:
    def stopped() -> Hardware:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        decide(PlanOptions(device_memory=GIB), Outlook(WORK, stopped))


shares = st.tuples(st.integers(0, 100), st.integers(0, 100)).map(
    lambda cut: Shares(min(cut), max(cut) - min(cut), 100 - max(cut))
)


@given(
    device=st.integers(GIB // 4, 4 * GIB),
    host=st.just(0) | st.integers(0, 3 * GIB),
    disk=st.just(0) | st.integers(0, GIB),
    weights=st.none() | shares,
    kv=st.none() | shares,
    batch=st.sampled_from([None, 256, 1024]),
    shares_memory=st.booleans(),
    dtype=st.sampled_from([DType.BFLOAT16, DType.FLOAT32]),
)
@settings(max_examples=400)
def test_what_fits_in_any_way_has_a_least_plan(
    device: int,
    host: int,
    disk: int,
    weights: Shares | None,
    kv: Shares | None,
    batch: int | None,
    shares_memory: bool,
    dtype: DType,
) -> None:
    """Or planning would refuse what a search finds."""
    facts = MachineFacts(8 * GIB, 8 * GIB, shares_host_memory=shares_memory)
    free = PlanOptions(device_memory=device, host_memory=host, disk_space=disk, dtype=dtype)
    found = replace(free, weights=weights, kv=kv, micro_batch=batch)
    try:
        plan = resolve_plan(found, shape=SHAPE, stored=STORED, device="x", facts=facts, disk_dir=Path())
    except PlanDoesNotFit:
        return
    tokens = max(plan.kv_tokens(SHAPE).values())
    assume(tokens)
    least = least_plan(
        free, shape=SHAPE, stored=STORED, facts=facts, tokens=1, device="x", disk_dir=Path()
    )  # fmt: skip
    assert least is not None
    least = least_plan(
        found, shape=SHAPE, stored=STORED, facts=facts, tokens=tokens, device="x", disk_dir=Path()
    )  # fmt: skip
    assert least is not None


def test_a_model_that_no_disk_holds_is_refused(machine: Hardware) -> None:
    small = replace(machine, capacity={tier: Figure(GIB, "") for tier in TierName})
    with pytest.raises(PlanDoesNotFit, match=r"1\.5 GiB short"):
        budgets_of_machine(small, STORED)


def test_flags_are_rounded_up() -> None:
    assert format_flag(GIB + 1) == "1.1GiB"
    assert format_flag(3 * MIB - 1) == "3MiB"


def test_prompts_longer_than_the_model_are_refused(machine: Hardware) -> None:
    question = Question(
        hardware=machine, shape=SHAPE, stored=STORED, workload=Workload.uniform(3000, 32, 1), options=PlanOptions(),
        budgets=dict.fromkeys(TierName, 4 * GIB),
    )  # fmt: skip
    with pytest.raises(PlanDoesNotFit, match="longer than the model's 2048 positions by 984"):
        question.decide()


def test_lengths_are_those_of_the_engine(tiny_model: Path) -> None:
    requests = [
        Request(0, Generate("ab", SamplingParams(max_new_tokens=5))),
        Request(1, Score("ab", "cd")),
        Request(2, Generate("ab " * 5000, SamplingParams())),
    ]
    found = workload_of(tiny_model, requests)
    assert found is not None
    assert found.requests == 2  # the third can never run
    assert sorted(each.generated for each in found.lengths) == [1, 5]
    assert workload_of(tiny_model, requests[2:]) is None


def test_an_engine_that_knows_what_comes_predicts_each_pass(tiny_model: Path, machine: Hardware) -> None:
    requests = [Request(index, Generate("a b c", SamplingParams(max_new_tokens=4))) for index in range(6)]
    workload = workload_of(tiny_model, requests)
    assert workload is not None
    options = PlanOptions(device="cpu", weights=Shares(0, 0, 100), device_memory=256 * MIB)
    with Engine.load(tiny_model, options, outlook=Outlook(workload, lambda: machine, worth_bytes=0)) as engine:
        assert engine.is_planned
        reports = list(engine.passes(iter(requests)))
        assert len([output for report in reports for output in report.outputs]) == 6
        assert all(report.stats.expected is not None and report.stats.expected.seconds > 0 for report in reports)
        assert engine.seconds_saved(workload) <= 0  # it has the plan for this
    with Engine.load(tiny_model, options) as engine:
        assert not engine.is_planned
        assert engine.seconds_saved(workload) < 0


def test_a_measured_profile_is_kept_and_known_again(tmp_path: Path, machine: Hardware) -> None:
    identity = identity_of(HostDevice(), tmp_path)
    mine = replace(machine, identity=identity)
    said: list[str] = []
    assert stored_profile(tmp_path) is None
    assert profile_for(tmp_path, identity, lambda: mine, said.append) is mine
    stored = stored_profile(tmp_path)
    assert stored is not None
    assert stored.hardware == mine
    assert stored.is_of(identity)
    assert not stored.is_of({**identity, "cores": "999"})
    assert profile_for(tmp_path, identity, never, said.append) == mine
    other = replace(mine, identity={**identity, "cores": "999"})
    assert profile_for(tmp_path, dict(other.identity), lambda: other, said.append) is other
    assert not said


def test_a_damaged_profile_is_measured_anew(tmp_path: Path, machine: Hardware) -> None:
    path = store_profile(tmp_path, machine)
    path.write_text("{")
    said: list[str] = []
    assert profile_for(tmp_path, {}, lambda: machine, said.append) is machine
    assert "measuring anew" in said[0]
