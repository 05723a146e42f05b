"""On a device whose copies are issued as CUDA's are: loading, planning and measuring, whatever mode a thread is in."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.lengths import workload_of
from engine.loading import load_engine, plan_input
from engine.measure import QUICK, measure
from engine.memory.lane import LaneName, Reached, ThreadLane
from engine.memory.tier import MemoryTier
from engine.planner.decide import decide, input_for_machine
from engine.planner.hardware import Hardware
from engine.planner.known_models import known_model
from engine.planner.plan import PlanOptions
from engine.planner.profiles import load_hardware
from engine.planner.resolve import resolve_plan
from engine.planner.search import search
from engine.planner.workload import Workload
from engine.request import Generate, Request, SamplingParams, Score, Scoring
from engine.tiers import Shares, TierName
from engine.units import MIB
from engine.weights.importing import import_checkpoint
from tests.engine.checkpoints import make_checkpoint
from tests.engine.like_cuda import CARDS, ROUNDING, Card, LikeCuda, stubbed_cuda
from tests.engine.planned import WIDE, decide_by_measuring


def test_an_engine_loads_for_a_workload_by_measuring_first(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the first load of any streamed model does."""
    requests = [Request(index, Generate("a b c", SamplingParams(max_new_tokens=4))) for index in range(6)]
    workload = workload_of(tiny_model, requests)
    assert workload is not None

    def hardware() -> Hardware:
        with closing(LikeCuda()) as device:
            return measure(device, tmp_path, effort=QUICK, options=options)

    options = PlanOptions(weights=Shares(0, 0, 100), device_memory=128 * MIB, host_memory=128 * MIB)
    device = LikeCuda()
    given = plan_input(tiny_model, options, device, workload)
    monkeypatch.setattr("engine.planner.decide.WORTH_MEASURING", 1)
    decision = decide(given, measure=hardware)
    assert decision.hardware is not None
    with Engine.load(tiny_model, decision.plan, device=device, expects=decision.expects) as engine:
        assert len(list(engine.run(requests))) == 6


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_card_plans_by_what_it_measured_and_computes_what_it_would_with_all_on_the_device(
    card: Card, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "hf", **WIDE)
    import_checkpoint(tmp_path / "hf", tmp_path / "model", dtype=card.dtype)
    requests = [Request(length, Score("a b c d " * length, " and so on")) for length in (1, 5, 20, 40)]
    device = LikeCuda(card.capability)
    decision = decide_by_measuring(tmp_path / "model", requests, device, tmp_path)
    found = []
    for engine in (
        Engine.load(tmp_path / "model", decision.plan, device=device, expects=decision.expects),
        load_engine(tmp_path / "model", PlanOptions(device_memory=64 * MIB), device=LikeCuda(card.capability)),
    ):
        with engine:
            assert engine.plan.dtype == card.dtype
            outputs = list(engine.run(requests))
            engine.check_integrity()
        found.append({output.key: output.result.logprob for output in outputs if isinstance(output.result, Scoring)})
    assert len(found[0]) == len(requests)
    assert found[0] == pytest.approx(found[1], abs=ROUNDING[card.dtype])


@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_a_lane_of_a_gpu_copies_into_memory_made_in_any_mode(
    made_in_inference_mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = stubbed_cuda(monkeypatch)
    tier = MemoryTier(TierName.DEVICE, 64, lambda size: torch.empty(size, dtype=torch.uint8))
    with torch.inference_mode(made_in_inference_mode):
        destination, source = (tier.allocate(16, "a slot").data for _ in range(2))
        source.fill_(7)
    lane = ThreadLane(LaneName.DISK_READ)
    try:
        lane.submit(lambda: device.copy(LaneName.HOST_TO_DEVICE, [(destination, source)], Reached()) and None).wait()
    finally:
        lane.close()
    assert destination.tolist() == [7] * 16


def test_the_first_gpu_is_left_alone_by_whoever_uses_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is left while another GPU is the current one makes a context there."""
    device = stubbed_cuda(monkeypatch, index=1)
    current: list[object] = [0]

    @contextmanager
    def make_current(chosen: torch.device) -> Iterator[None]:
        current.append(torch.device(chosen).index)
        yield
        current.pop()

    @contextmanager
    def enter(_: object) -> Iterator[None]:
        assert current[-1] == 1
        yield
        assert current[-1] == 1

    monkeypatch.setattr(torch.cuda, "device", make_current)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    memory, source = torch.zeros(4), torch.ones(4)
    with device.computing():
        device.copy(LaneName.HOST_TO_DEVICE, [(memory, source)], device.compute_mark())
    assert device.download(memory).tolist() == [1] * 4
    assert current == [0]


@pytest.mark.parametrize(("model", "requests"), [("facebook/opt-30b", 2000), ("facebook/opt-175b", 5000)])
def test_what_is_predicted_for_a_t4_is_what_the_engine_can_run(model: str, requests: int, tmp_path: Path) -> None:
    """The very options that the planner finds there, for a model of eight small layers: nothing but sizes differs."""
    known, t4 = known_model(model), load_hardware("t4-gcp")
    assert known is not None
    workload = Workload.uniform(512, 32, requests)
    given = input_for_machine(
        t4, shape=known.shape, stored=known.stored(), options=PlanOptions(), workload=workload
    )  # fmt: skip
    found = search(given, t4).options
    budgets = {"device_memory": 64 * MIB, "host_memory": 64 * MIB, "disk_space": 64 * MIB}
    small = replace(found, **budgets, dtype=None, micro_batch=32, extent_tokens=32, disk_dir=tmp_path)
    make_checkpoint(tmp_path / "hf", num_hidden_layers=8)
    import_checkpoint(tmp_path / "hf", tmp_path / "model")
    # As there, the device holds the keys and values of few sequences, and the rest must go elsewhere.
    needed = resolve_plan(plan_input(tmp_path / "model", small, LikeCuda((7, 5)))).other_bytes[TierName.DEVICE]
    small = replace(small, device_memory=needed + MIB // 4)
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    work = [Request(index, Generate("a b c d " * (index + 1), sampling)) for index in range(12)]
    outputs = []
    for options in (small, PlanOptions(device_memory=64 * MIB)):
        with load_engine(tmp_path / "model", options, device=LikeCuda((7, 5))) as engine:
            reports = list(engine.passes(iter(work)))
            outputs.append({output.key: output.result for report in reports for output in report.outputs})
            plan = engine.plan
            if options is small:
                assert plan.host_attention == (found.host_attention == "on")
                attended_s = sum(report.stats.lane_seconds.get(LaneName.HOST_COMPUTE, 0.0) for report in reports)
                assert (attended_s > 0) == plan.host_attention
                assert any(tier is not TierName.DEVICE for tier in plan.layers)
                assert bool(plan.kv_bytes[TierName.DISK]) == bool(found.kv and found.kv.disk)
    assert len(outputs[0]) == 12
    assert outputs[0] == outputs[1]
