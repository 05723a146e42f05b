"""On a device whose copies are issued as CUDA's are: loading, planning and measuring, whatever mode a thread is in."""

from contextlib import closing
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.lengths import workload_of
from engine.loading import plan_input
from engine.measure import QUICK, measure
from engine.memory.lane import LaneName, Reached, ThreadLane
from engine.memory.tier import MemoryTier
from engine.planner.decide import decide
from engine.planner.hardware import Hardware
from engine.planner.plan import PlanOptions
from engine.request import Generate, Request, SamplingParams
from engine.tiers import Shares, TierName
from engine.units import MIB
from tests.engine.like_cuda import LikeCuda, stubbed_cuda


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
