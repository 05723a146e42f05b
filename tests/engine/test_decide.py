"""A plan for what comes: searched for where the machine is known, else by rules, refused with advice."""

import os
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.attention.sizes import kv_bytes_per_token
from engine.devices.facts import MachineFacts
from engine.devices.host import HostDevice
from engine.dtypes import DType
from engine.errors import HardwareError, Interrupted, PlanDoesNotFit, Unmeasurable
from engine.lengths import workload_of
from engine.loading import load_engine
from engine.measure import identity_of
from engine.planner.decide import best_plan, decide, input_for_machine
from engine.planner.hardware import Hardware
from engine.planner.known_models import known_model
from engine.planner.least import least_plan
from engine.planner.nearest import format_flag
from engine.planner.plan import PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.predict import predict
from engine.planner.profiles import load_hardware
from engine.planner.rates import Figure
from engine.planner.replan import Replanning
from engine.planner.resolve import fitting_plan, resolve_plan
from engine.planner.search import Found
from engine.planner.workload import Lengths, Workload
from engine.profile import (
    keep_profile,
    known_profile,
    profile_path,
    profile_paths,
    store_profile,
    stored_profile,
)
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
    raise AssertionError("nothing was to be measured")


def asked_for(options: PlanOptions, workload: Workload | None = WORK, facts: MachineFacts = FACTS) -> PlanInput:
    return PlanInput(
        shape=SHAPE, stored=STORED, device="cpu", facts=facts, options=options, disk_dir=Path("spill"),
        workload=workload,
    )  # fmt: skip


def test_what_fits_whole_needs_no_measuring() -> None:
    assert decide(asked_for(PlanOptions(device_memory=8 * GIB)), measure=never).hardware is None


def test_little_that_is_streamed_is_not_worth_measuring() -> None:
    decide(asked_for(PlanOptions(device_memory=8 * GIB, weights=Shares(90, 0, 10))), measure=never)


def test_what_must_be_streamed_is_searched_for(machine: Hardware) -> None:
    asked: list[Hardware] = []

    def hardware() -> Hardware:
        asked.append(machine)
        return machine

    decision = decide(asked_for(PlanOptions(device_memory=GIB)), measure=hardware)
    assert asked == [machine]
    assert decision.hardware is machine
    assert max(decision.plan.used_bytes.values()) <= GIB
    assert decision.plan.disk_dir == Path("spill")


@pytest.mark.parametrize("memory", [GIB, 8 * GIB])
@pytest.mark.parametrize("fixed", [PlanOptions(), PlanOptions(micro_batch=300), PlanOptions(weights=Shares(10, 0, 90))])
def test_where_figures_are_known_a_worker_loads_what_is_said_to_be_best(
    memory: int, fixed: PlanOptions, machine: Hardware
) -> None:
    """Whether anything must be streamed or not: `overnight plan` and a worker have one answer."""
    asked = asked_for(replace(fixed, device_memory=memory))
    assert decide(asked, machine, never).plan == best_plan(asked, machine).plan


@pytest.mark.parametrize(
    ("name", "preset", "times"),
    [("facebook/opt-125m", "h100-80g", 1.5), ("facebook/opt-6.7b", "l4", 1.2), ("facebook/opt-1.3b", "l4", 1.0)],
)
def test_on_a_large_gpu_a_small_model_is_not_left_to_the_rules(name: str, preset: str, times: float) -> None:
    """Their batches are made for GPUs that are just large enough."""
    known, hardware = known_model(name), load_hardware(preset)
    assert known is not None
    work, stored = Workload.uniform(512, 32, 1000), known.stored()
    asked = input_for_machine(hardware, shape=known.shape, stored=stored, options=PlanOptions(), workload=work)
    decision = decide(asked, hardware, never)
    assert decision.hardware is hardware
    searched, ruled = (
        predict(hardware, known.shape, stored, plan, work).generated_per_s
        for plan in (decision.plan, decide(asked).plan)
    )
    assert searched >= times * ruled


def test_without_a_workload_the_rules_decide(machine: Hardware) -> None:
    assert decide(asked_for(PlanOptions(), None), machine, never).hardware is None


def test_a_profile_without_the_dtype_leaves_it_to_the_rules(machine: Hardware) -> None:
    asked = asked_for(PlanOptions(dtype=DType.FLOAT16))
    assert decide(asked, machine).hardware is None
    with pytest.raises(HardwareError, match="float16"):
        best_plan(asked, machine)


def test_what_a_person_fixed_is_kept(machine: Hardware) -> None:
    fixed = PlanOptions(device_memory=2 * GIB, weights=Shares(0, 0, 100), micro_batch=300)
    plan = decide(asked_for(fixed), machine).plan
    assert plan.num_layers_in(TierName.DISK) == SHAPE.num_layers
    assert plan.micro_batch == 300


@pytest.mark.parametrize("searched", [False, True])
def test_a_refusal_names_the_nearest_plan_that_fits_and_nothing_is_measured(searched: bool) -> None:
    with pytest.raises(PlanDoesNotFit, match=r"short.*the smallest that fits: --device-memory \S+ with") as refused:
        decide(asked_for(PlanOptions(device_memory=100 * MIB), WORK if searched else None), measure=never)
    text = str(refused.value).rpartition("--device-memory ")[2].split()[0]
    unit = {"MiB": MIB, "GiB": GIB}[text[-3:]]
    near = PlanOptions(
        device_memory=int(float(text[:-3]) * unit), weights=Shares(0, 0, 100), micro_batch=256, micro_batches=1
    )
    decide(asked_for(near, None))


@pytest.mark.parametrize(
    ("facts", "weights"),
    [
        (FACTS, r"[1-9]\d*/0/[1-9]\d*"),
        (MachineFacts(8 * GIB, 8 * GIB, shares_host_memory=False), r"[1-9]\d*/[1-9]\d*/0"),
    ],
)
def test_a_refusal_of_flags_says_where_the_weights_should_go(facts: MachineFacts, weights: str) -> None:
    with pytest.raises(PlanDoesNotFit, match=f"the nearest that fits: --weights {weights}$"):
        decide(asked_for(PlanOptions(device_memory=2 * GIB, weights=Shares(100, 0, 0)), None, facts))


@pytest.mark.parametrize(("budget", "micro_batch"), [(GIB, 2048), (588 * MIB, 256)])
def test_where_measuring_has_too_little_room_the_rules_decide(budget: int, micro_batch: int) -> None:
    """Where the cache of the rules' plan has no room for a request, with small batches."""

    def measured() -> Hardware:
        raise Unmeasurable("too little room")

    decision = decide(asked_for(PlanOptions(device_memory=budget)), measure=measured)
    assert decision.hardware is None
    assert decision.plan.micro_batch == micro_batch
    assert decision.plan.largest_sequence(SHAPE) >= 543
    assert decision.plan.used_bytes[TierName.DEVICE] <= budget


def test_where_no_plan_has_room_for_a_request_nothing_is_measured() -> None:
    tight = asked_for(PlanOptions(device_memory=610 * MIB, micro_batch=2048))
    assert decide(tight, measure=never).plan.largest_sequence(SHAPE) < 543


def test_an_end_of_measuring_is_an_end_of_planning() -> None:
    def stopped() -> Hardware:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        decide(asked_for(PlanOptions(device_memory=GIB)), measure=stopped)


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
    asked = PlanInput(shape=SHAPE, stored=STORED, device="x", facts=facts, options=found, disk_dir=Path())
    plan = fitting_plan(asked)
    if plan is None:
        return
    tokens = max(plan.kv_tokens(SHAPE).values())
    assume(tokens)
    assert least_plan(asked.asking(free), 1) is not None
    assert least_plan(asked, tokens) is not None


def test_a_model_that_no_disk_holds_is_refused(machine: Hardware) -> None:
    small = replace(machine, capacity={tier: Figure(GIB, "") for tier in TierName})
    with pytest.raises(PlanDoesNotFit, match=r"1\.5 GiB short"):
        input_for_machine(small, shape=SHAPE, stored=STORED, options=PlanOptions(), workload=WORK)


def test_flags_are_rounded_up() -> None:
    assert format_flag(GIB + 1) == "1.1GiB"
    assert format_flag(3 * MIB - 1) == "3MiB"


def test_prompts_longer_than_the_model_are_refused(machine: Hardware) -> None:
    with pytest.raises(PlanDoesNotFit, match="longer than the model's 2048 positions by 984"):
        best_plan(asked_for(PlanOptions(device_memory=4 * GIB), Workload.uniform(3000, 32, 1)), machine)


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
    with load_engine(tiny_model, options, workload=workload, hardware=machine) as engine:
        reports = list(engine.passes(iter(requests)))
        assert len([output for report in reports for output in report.outputs]) == 6
        assert all(report.stats.expected is not None and report.stats.expected.seconds > 0 for report in reports)
    with load_engine(tiny_model, options) as engine:
        assert all(report.stats.expected is None for report in engine.passes(iter(requests)))


def test_a_model_is_loaded_again_only_where_another_plan_gains_more_than_that_takes(machine: Hardware) -> None:
    asked = asked_for(PlanOptions(device_memory=3 * GIB), None)
    slow = resolve_plan(asked.asking(replace(asked.options, weights=Shares(0, 0, 100), micro_batch=256)))
    long = Workload.uniform(1500, 4, 1000)
    assert Replanning(asked, slow, machine).seconds_saved(long) > 0
    assert Replanning(asked, slow, machine).seconds_saved(Workload.uniform(16, 1, 1)) <= 0  # few rows are not worth it
    best = best_plan(replace(asked, workload=long), machine).plan
    assert Replanning(asked, best, machine).seconds_saved(long) <= 0


def test_for_work_like_that_before_no_plan_is_searched(machine: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_for(PlanOptions(device_memory=3 * GIB))
    found = best_plan(asked, machine)
    searched: list[PlanInput] = []

    def counted(given_: PlanInput, hardware: Hardware) -> Found:
        searched.append(given_)
        return found

    monkeypatch.setattr("engine.planner.replan.search", counted)
    replanning = Replanning(asked, found.plan, machine)
    assert replanning.seconds_saved(WORK) == 0
    assert replanning.seconds_saved(Workload.uniform(500, 30, 300)) == 0
    assert not searched
    for _ in range(3):
        assert replanning.seconds_saved(Workload.uniform(100, 100, 2000)) <= 0
    assert len(searched) == 1


@pytest.mark.parametrize("shorts", [1, 100])
def test_a_loaded_plan_that_refuses_rows_makes_room_for_them(shorts: int, machine: Hardware) -> None:
    """However short the work is, and however like that before: such rows would be error rows for ever."""
    before = Workload((Lengths(32, 1, shorts), Lengths(1400, 100, 1)))
    asked = asked_for(PlanOptions(device_memory=3000 * MIB, host_memory=0), before)
    token_bytes = asked.token_bytes
    plan = replace(resolve_plan(asked), kv_bytes=dict.fromkeys(TierName, 0) | {TierName.DEVICE: 1600 * token_bytes})
    replanning = Replanning(asked, plan, machine)
    longer = Workload((Lengths(32, 1, shorts), Lengths(1500, 120, 1)))
    assert longer.is_like(before)
    assert replanning.seconds_saved(longer) == inf
    assert replanning.seconds_saved(before) <= 0


@pytest.mark.parametrize("work", [Workload.uniform(1500, 500, 100), Workload.uniform(4000, 5, 100)])
def test_work_that_no_plan_fits_leaves_the_loaded_model_alone(work: Workload, machine: Hardware) -> None:
    """Its rows are refused one by one; the others go on."""
    asked = asked_for(PlanOptions(device_memory=660 * MIB), Workload.uniform(32, 8, 100))
    plan = decide(asked, machine).plan
    assert Replanning(asked, plan, machine).seconds_saved(work) <= 0


def test_no_request_is_refused_for_speed(machine: Hardware) -> None:
    """A few long requests among many short ones: the search knows faster plans, which hold only the short ones."""
    work = Workload((Lengths(32, 8, 190), Lengths(1500, 500, 3)))
    asked = asked_for(PlanOptions(device_memory=2928 * MIB, host_memory=0), work)
    assert decide(asked, machine).plan.largest_sequence(SHAPE) >= 1999
    only_short = asked_for(PlanOptions(device_memory=2928 * MIB, host_memory=0), Workload.uniform(32, 8, 190))
    assert decide(only_short, machine).plan.largest_sequence(SHAPE) < 1999


def test_what_a_plan_has_no_room_for_makes_it_no_faster(machine: Hardware) -> None:
    plan = resolve_plan(asked_for(PlanOptions(device_memory=2 * GIB)))
    small = replace(plan, kv_bytes={**plan.kv_bytes, TierName.DEVICE: 1000 * kv_bytes_per_token(SHAPE, plan.kv_format)})
    mixed = Workload((Lengths(100, 8, 50), Lengths(1500, 100, 50)))
    predicted, alone = (predict(machine, SHAPE, STORED, small, work) for work in (mixed, Workload.uniform(100, 8, 50)))
    assert predicted == alone
    assert predicted.generated_per_s <= predicted.lane_ceiling_per_s * 1.02


def test_a_measured_profile_is_kept_and_known_again(tmp_path: Path, machine: Hardware) -> None:
    identity = identity_of(HostDevice(), tmp_path)
    mine = replace(machine, identity=identity)
    path = profile_path(tmp_path, "cpu")
    assert stored_profile(path) is None
    assert known_profile(tmp_path, identity, pytest.fail) is None
    keep_profile(tmp_path, mine, pytest.fail)
    stored = stored_profile(path)
    assert stored is not None
    assert stored.hardware == mine
    assert known_profile(tmp_path, identity, pytest.fail) == mine
    assert known_profile(tmp_path, {**identity, "cores": "999"}, pytest.fail) is None


def test_each_device_has_a_profile_of_its_own(tmp_path: Path, machine: Hardware) -> None:
    """Measuring the processor does not make a worker forget the GPU."""
    of_gpu = replace(machine, identity={"device": "cuda:0"})
    of_cpu = replace(machine, identity={"device": "cpu"}, description="measured later")
    for number, hardware in enumerate((of_gpu, of_cpu)):
        path = store_profile(tmp_path, hardware)
        os.utime(path, (number, number))
    assert known_profile(tmp_path, {"device": "cuda:0"}, pytest.fail) == of_gpu
    assert known_profile(tmp_path, {"device": "cpu"}, pytest.fail) == of_cpu
    assert [path.name for path in profile_paths(tmp_path)] == ["profile-cpu.json", "profile-cuda-0.json"]


def test_a_damaged_profile_is_not_believed(tmp_path: Path, machine: Hardware) -> None:
    path = store_profile(tmp_path, machine)
    path.write_text("{")
    said: list[str] = []
    assert known_profile(tmp_path, {"device": "cpu"}, said.append) is None
    assert "doctor --measure" in said[0]
