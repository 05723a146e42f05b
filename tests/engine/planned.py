"""A plan that nobody has a say in: for a machine whose device is too small for the weights, measured first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.lengths import workload_of
from engine.loading import plan_input
from engine.measure import QUICK, measure
from engine.memory.device import Device
from engine.planner.decide import Decision, decide
from engine.planner.plan import PlanOptions
from engine.request import Request
from engine.tiers import TierName
from engine.units import MIB

WIDE: dict[str, Any] = {
    "num_hidden_layers": 8, "hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024,
}  # fmt: skip
"""A checkpoint of some megabytes, beside which whatever else a plan needs is little."""


def decide_by_measuring(model_dir: Path, requests: Sequence[Request], device: Device, folder: Path) -> Decision:
    """What is decided at the first load of a model that must be streamed, with no flag but how much memory there is.

    Args:
        model_dir: of a ``WIDE`` checkpoint; the device has room for three quarters of its weights.
        requests: what will be computed.
        device: is measured, and stays the caller's to close.
        folder: where measuring may write.
    """
    weights = sum(plan_input(model_dir, PlanOptions(), device).stored.unit_bytes.values())
    memory = PlanOptions(device_memory=weights * 3 // 4, host_memory=64 * MIB)
    given = plan_input(model_dir, memory, device, workload_of(model_dir, requests))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.planner.decide.WORTH_MEASURING", 1)
        decision = decide(given, measure=lambda: measure(device, folder, effort=QUICK))
    assert decision.hardware is not None, "the plan is searched for by what was measured"
    assert any(tier is not TierName.DEVICE for tier in decision.plan.layers)
    return decision
