"""What a GPU has no kernels for is refused by the plan, and is no default."""

from pathlib import Path

import pytest
import torch

from engine.devices.facts import MachineFacts
from engine.devices.open import facts_of
from engine.dtypes import DType
from engine.errors import PlanDoesNotFit
from engine.measure import _dtypes
from engine.planner.decide import decide
from engine.planner.hardware import Hardware
from engine.planner.known_models import known_model
from engine.planner.plan import Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.profiles import load_hardware
from engine.planner.resolve import resolve_plan
from engine.planner.search import search
from engine.planner.workload import Workload
from engine.tiers import Shares
from engine.units import GIB
from tests.engine.like_cuda import stubbed_cuda

CARDS = [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True), (None, True)]
"""Capability, and whether it computes in bfloat16."""
KNOWN = known_model("facebook/opt-1.3b")
assert KNOWN is not None
SHAPE = KNOWN.shape


def facts(capability: tuple[int, int] | None) -> MachineFacts:
    return MachineFacts(20 * GIB, 60 * GIB, shares_host_memory=False, capability=capability)


def plan(capability: tuple[int, int] | None, stored: str, **options: object) -> Plan:
    assert KNOWN is not None
    return resolve_plan(
        PlanInput(
            options=PlanOptions(**options),
            shape=SHAPE,
            stored=KNOWN.stored(stored),
            device="cuda:0",
            facts=facts(capability),
            disk_dir=Path(),
        )
    )


@pytest.mark.parametrize(("capability", "has_bfloat16"), CARDS)
def test_weights_in_bfloat16_are_computed_in_what_the_card_has(
    capability: tuple[int, int] | None, has_bfloat16: bool
) -> None:
    assert plan(capability, DType.BFLOAT16).dtype == (DType.BFLOAT16 if has_bfloat16 else DType.FLOAT16)
    for stored in (DType.FLOAT16, DType.FLOAT32):
        assert plan(capability, stored).dtype == stored
        assert plan(capability, DType.BFLOAT16, dtype=stored).dtype == stored


@pytest.mark.parametrize(("capability", "has_bfloat16"), CARDS)
@pytest.mark.parametrize("stored", [DType.FLOAT16, DType.BFLOAT16])
def test_asking_for_what_it_has_not_is_refused_with_what_it_has(
    capability: tuple[int, int] | None, has_bfloat16: bool, stored: str
) -> None:
    if has_bfloat16:
        assert plan(capability, stored, dtype=DType.BFLOAT16).dtype == DType.BFLOAT16
        return
    assert capability is not None
    said = rf"no bfloat16 kernels: its compute capability is {capability[0]}\.{capability[1]}.*use --dtype float16$"
    with pytest.raises(PlanDoesNotFit, match=said):
        plan(capability, stored, dtype=DType.BFLOAT16)


def test_nothing_is_measured_for_a_dtype_that_cannot_be() -> None:
    def never() -> Hardware:
        raise AssertionError("measured")

    assert KNOWN is not None
    options = PlanOptions(dtype=DType.BFLOAT16, weights=Shares(0, 100, 0))
    with pytest.raises(PlanDoesNotFit, match=r"use --dtype float16$"):
        decide(
            PlanInput(
                shape=SHAPE, stored=KNOWN.stored(DType.FLOAT16), device="cuda:0", facts=facts((7, 5)), options=options,
                disk_dir=Path(), workload=Workload.uniform(64, 8, 10),
            ),
            measure=never,
        )  # fmt: skip


def test_a_search_takes_the_default_of_the_card() -> None:
    assert KNOWN is not None
    given = PlanInput(
        shape=SHAPE, stored=KNOWN.stored(DType.BFLOAT16), device="cuda:0", facts=facts((7, 5)), disk_dir=Path(),
        options=PlanOptions(weights=Shares(100, 0, 0), micro_batch=256, micro_batches=1),
        workload=Workload.uniform(64, 8, 10),
    )  # fmt: skip
    found = search(given, load_hardware("t4-gcp"))
    assert found.plan.dtype == DType.FLOAT16


@pytest.mark.parametrize(("capability", "has_bfloat16"), CARDS[:-1])
def test_a_card_is_asked_what_it_is(
    capability: tuple[int, int], has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = stubbed_cuda(monkeypatch, capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB, 2 * GIB))
    found = facts_of(device)
    assert found.capability == capability
    assert _dtypes(found) == (
        (DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32) if has_bfloat16 else (DType.FLOAT16, DType.FLOAT32)
    )
