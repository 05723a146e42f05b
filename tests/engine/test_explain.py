"""Advice, sweeps and the document of `overnight plan`: each number is a search of its own."""

import functools
import json
from dataclasses import replace

import pytest

from engine.formats.sizes import Int4
from engine.memory.lane import LaneName
from engine.planner.advice import LEAST_GAIN, MOST_ADVICE, WEIGHTS, Advised, advise
from engine.planner.decide import best_plan, input_for_machine
from engine.planner.explain import document, flags_of
from engine.planner.hardware import Hardware
from engine.planner.known_models import KNOWN_MODELS
from engine.planner.plan import PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.profiles import load_hardware
from engine.planner.search import Found
from engine.planner.sweep import FACTORS, sweep
from engine.planner.workload import Workload
from engine.tiers import Shares, TierName
from engine.units import GIB
from engine.weights.layout import in_format

T4 = load_hardware("t4-gcp")


def asked_for(name: str, options: PlanOptions | None = None, hardware: Hardware = T4) -> PlanInput:
    model = KNOWN_MODELS[f"facebook/{name}"]
    return input_for_machine(
        hardware,
        shape=model.shape,
        stored=model.stored(),
        workload=Workload.uniform(512, 32, 300),
        options=options or PlanOptions(),
    )


@functools.cache
def advised(name: str) -> tuple[Found, Advised]:
    asked = asked_for(name)
    found = best_plan(asked, T4)
    return found, advise(asked, T4, found)


@pytest.mark.parametrize("name", ["opt-1.3b", "opt-175b", pytest.param("opt-6.7b", marks=pytest.mark.soak)])
def test_twice_of_one_thing_gains_something_and_never_more_than_is_possible(name: str) -> None:
    found, advice = advised(name)[0], advised(name)[1].changes
    assert 1 <= len(advice) <= MOST_ADVICE
    assert [each.gain for each in advice] == sorted((each.gain for each in advice), reverse=True)
    for each in advice:
        assert each.gain >= LEAST_GAIN
        assert each.generated_per_s == pytest.approx(found.prediction.generated_per_s * (1 + each.gain))
        if "twice as fast" in each.change:
            # No part of a machine is more than all of it. More would mean that the first search missed a plan.
            assert each.gain <= 1.02, each.change


def test_a_faster_disk_helps_what_reads_from_it_and_nothing_else() -> None:
    small, large = ({each.change for each in advised(name)[1].changes} for name in ("opt-1.3b", "opt-175b"))
    assert "a disk twice as fast" not in small
    assert "a disk twice as fast" in large


def test_where_memory_is_one_it_is_called_so_and_no_link_is_advised() -> None:
    cpu = replace(T4, device="cpu", shares_host_memory=True, host_attention=None)
    asked = asked_for("opt-13b", PlanOptions(device_memory=8 * GIB), cpu)
    found = best_plan(asked, cpu)
    advice = advise(asked, cpu, found).changes
    assert advice
    assert not [each.change for each in advice if "link" in each.change or "device memory" in each.change]


def test_a_sweep_begins_at_what_was_asked_and_never_falls() -> None:
    asked = asked_for("opt-6.7b", PlanOptions(device_memory=8 * GIB))
    assert asked.budgets[TierName.DEVICE] == 8 * GIB
    points = list(sweep(asked, T4, TierName.DEVICE))
    assert [point.num_bytes for point in points] == [int(8 * GIB * factor) for factor in FACTORS]
    rates = [point.found.prediction.generated_per_s if point.found else 0.0 for point in points]
    assert rates == sorted(rates)
    for point in points:
        if point.found is not None:
            assert point.found.plan.used_bytes[TierName.DEVICE] <= point.num_bytes


def test_the_document_is_json_and_its_lane_is_the_one_that_decides() -> None:
    asked = asked_for("opt-175b")
    found = best_plan(asked, T4)
    told = json.loads(json.dumps(document(asked, T4, found, Advised())))
    assert told["predicted"]["bound_by"] == str(LaneName.DISK_READ)
    assert told["memory"]["device"]["budget"] == asked.budgets[TierName.DEVICE]
    assert told["advice"] == []


def test_flags_are_those_of_the_placement() -> None:
    options = PlanOptions(weights=Shares(20, 80, 0), micro_batch=512, device_memory=3, dtype="float16")
    assert flags_of(options) == "--weights 20/80/0 --micro-batch 512"
    assert flags_of(PlanOptions()) == ""


def test_what_four_bits_were_tried_for_in_vain_is_known() -> None:
    """Where products bound a plan, a packed cache is not tried, so that nothing is said of it."""
    for name, lane, in_vain in (
        ("opt-1.3b", LaneName.DEVICE_COMPUTE, (WEIGHTS,)),
        ("opt-175b", LaneName.DISK_READ, ()),
    ):
        found, advice = advised(name)
        assert found.prediction.bound_by is lane
        assert advice.in_vain == in_vain
    asked = asked_for("opt-1.3b", PlanOptions(weights=Shares(0, 100, 0), micro_batch=512, micro_batches=1))
    packed = replace(asked, stored=in_format(asked.stored, Int4()))
    assert advise(packed, T4, best_plan(packed, T4)).in_vain == ()
